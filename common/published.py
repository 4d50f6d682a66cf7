"""Where trained weights are found, and accuracies that the papers report."""

import hashlib
import re
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torchvision

from common import InputError, timm_models
from common.data import ASSETS, IMAGE_SIZE, download
from common.timm_models import is_timm, stated

GITHUB = "https://github.com"
_CHENYAOFO = GITHUB + "/chenyaofo/pytorch-cifar-models/releases/download/"


def _pytorchcv(file, sha1):
    return f"{GITHUB}/osmr/imgclsmob/releases/download/{file}-{sha1[:8]}.pth.zip", "sha1:" + sha1


def _chenyaofo(dataset, files):
    def entry(family, name):
        return f"{_CHENYAOFO}{family}/{dataset}_{name}.pt", "sha256:" + name.rpartition("-")[2]

    return {arch: entry(*file.split("/")) for arch, file in files.items()}


PUBLISHED = {  # source -> data set -> architecture -> (address, digest of the file or of its one member)
    "pytorchcv": {
        "cifar10": {"resnet20": _pytorchcv("v0.0.163/resnet20_cifar10-0597", "9b0024ac4c2f374cde2c5052e0d0344a75871cdb")},
        "cifar100": {"resnet20": _pytorchcv("v0.0.180/resnet20_cifar100-2964", "a5322afed92fa96cb7b3453106f73cf38e316151")},
        "imagenet": {
            "resnet18": _pytorchcv("v0.0.478/resnet18-0896", "77a56f155214819bfc79ff09795370f955b20e6d"),
            "resnet50": _pytorchcv("v0.0.329/resnet50-0633", "b00d1c8e52aa7a2badc705b1545aaf6ccece6ce9"),
            "mobilenet_v2": _pytorchcv("v0.0.213/mobilenetv2_w1-0887", "13a021bca5b679b76156829743f7182da42e8bb6"),
        },
    },
    "chenyaofo": {
        "cifar10": _chenyaofo(
            "cifar10",
            {
                "resnet20": "resnet/resnet20-4118986f",
                "resnet32": "resnet/resnet32-ef93fc4d",
                "resnet44": "resnet/resnet44-2a3cabcb",
                "resnet56": "resnet/resnet56-187c023a",
                "vgg11_bn": "vgg/vgg11_bn-eaeebf42",
                "vgg13_bn": "vgg/vgg13_bn-c01e4a43",
                "vgg16_bn": "vgg/vgg16_bn-6ee7ea24",
                "vgg19_bn": "vgg/vgg19_bn-57191229",
                "mobilenet_v2": "mobilenetv2/mobilenetv2_x1_0-fe6a5b48",
                "shufflenet_v2_x0_5": "shufflenetv2/shufflenetv2_x0_5-1308b4e9",
                "shufflenet_v2_x1_0": "shufflenetv2/shufflenetv2_x1_0-98807be3",
                "shufflenet_v2_x1_5": "shufflenetv2/shufflenetv2_x1_5-296694dd",
                "shufflenet_v2_x2_0": "shufflenetv2/shufflenetv2_x2_0-ec31611c",
            },
        ),
        "cifar100": _chenyaofo(
            "cifar100",
            {
                "resnet20": "resnet/resnet20-23dac2f1",
                "resnet32": "resnet/resnet32-84213ce6",
                "resnet44": "resnet/resnet44-ffe32858",
                "resnet56": "resnet/resnet56-f2eff4c8",
                "vgg11_bn": "vgg/vgg11_bn-57d0759e",
                "vgg13_bn": "vgg/vgg13_bn-5ebe5778",
                "vgg16_bn": "vgg/vgg16_bn-7d8c4031",
                "vgg19_bn": "vgg/vgg19_bn-b98f7bd7",
                "mobilenet_v2": "mobilenetv2/mobilenetv2_x1_0-1311f9ff",
                "shufflenet_v2_x0_5": "shufflenetv2/shufflenetv2_x0_5-1977720f",
                "shufflenet_v2_x1_0": "shufflenetv2/shufflenetv2_x1_0-9ae22beb",
                "shufflenet_v2_x1_5": "shufflenetv2/shufflenetv2_x1_5-e2c85ad8",
                "shufflenet_v2_x2_0": "shufflenetv2/shufflenetv2_x2_0-e7e584cd",
            },
        ),
    },
}

# Top-1 accuracy in percent of the networks that Qimera and AdaDFQ compress, as they print it
PAPER_TOP1 = {
    ("cifar10", "resnet20"): 93.89,
    ("cifar100", "resnet20"): 70.33,
    ("imagenet", "resnet18"): 71.47,
    ("imagenet", "resnet50"): 77.73,
    ("imagenet", "mobilenet_v2"): 73.03,
}

# Top-1 accuracy in percent of ResNet-20 on CIFAR-10, all layers at these bits. At 3 bits AdaDFQ reports GDFQ's and Qimera's, at
# 4 and 5 Qimera GDFQ's and AutoReCon's. "best" is the best published with a range per tensor of activations and per channel of
# weights: SynQ (ICLR 2025), twice, and AdaDFQ + AKT; without Qimera + ZAQ, for which Qimera's Table 3 has 93.91 at 4 bits, more
# than full precision, and 93.84 at 5.
PAPER_CIFAR10 = {
    "gdfq": {3: 75.11, 4: 90.25, 5: 93.38},
    "qimera": {3: 74.43, 4: 91.26, 5: 93.46},
    "adadfq": {3: 84.89, 4: 92.31, 5: 93.81},
    "autorecon": {4: 88.55, 5: 92.88},
    "best": {3: 88.11, 4: 92.76, 5: 93.83},
}


def paper_drop(method, bits, dataset, arch):
    """Points of top-1 accuracy that a method loses, as published, all layers at `bits`, or None where no figure is known."""
    top1 = PAPER_CIFAR10.get(method, {}).get(bits) if (dataset, arch) == ("cifar10", "resnet20") else None
    return None if top1 is None else round(PAPER_TOP1[dataset, arch] - top1, 2)


def bundled_weights(arch, dataset):
    """Path of the weights in common/assets, which may not exist."""
    return ASSETS / f"{arch}_{dataset}.pt"


def torchvision_weights(arch):
    """torchvision's first ImageNet weights of `arch`: the classic recipe, which the papers' networks share."""
    try:
        return next(iter(torchvision.models.get_model_weights(arch)))
    except ValueError:
        raise InputError(
            f"--arch {arch} has no ImageNet weights in torchvision; give one that has, or --weights FILE"
        ) from None


def native_size(arch):
    """Side in pixels of the images that ImageNet weights of `arch`, timm's or torchvision's, take; 224 where there are none."""
    if is_timm(arch):
        return stated(arch)["image_size"]
    try:
        return torchvision_weights(arch).transforms.keywords["crop_size"]
    except InputError:
        return IMAGE_SIZE["imagenet"]


def locate_weights(weights, arch, dataset):
    """Path of a weights file, downloaded where necessary, and the name of its source."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if weights == "bundled":
        path = bundled_weights(arch, dataset)
        if not path.exists():
            names = ", ".join(sorted(p.stem for p in ASSETS.glob("*.pt")))
            raise InputError(f"--weights bundled: there are no bundled weights of {arch} for {dataset}; there are: {names}")
        return path, weights
    if weights in PUBLISHED:
        known = PUBLISHED[weights].get(dataset, {})
        if arch not in known:
            names = ", ".join(known) or "none"
            raise InputError(f"--weights {weights}: {arch} for {dataset} is not among them; known are: {names}")
        address, digest = known[arch]
        return download(address, cache / Path(address).name.removesuffix(".zip"), digest), weights
    if weights == "torchvision":
        if dataset != "imagenet":
            raise InputError(f"--weights torchvision are for ImageNet, and --dataset is {dataset}; give --weights FILE")
        address = torchvision_weights(arch).url
        return download(address, cache / Path(address).name, "sha256:" + address[-12:-4]), weights
    if weights == "timm":
        address, cached = timm_models.locate(arch)
        return cached or download(address, cache / f"{timm_models.full_name(arch)}{Path(address).suffix}"), weights
    if re.match("https?://", weights):
        unique = hashlib.sha256(weights.encode()).hexdigest()[:8]  # two addresses may end in the same name
        return download(weights, cache / f"{unique}-{Path(urlsplit(weights).path).name.removesuffix('.zip')}"), weights
    return Path(weights), weights
