"""Architectures and their trained weights.

The CIFAR-size ResNets live here; other architectures are torchvision's, with a stem for small images where the data are
small, or timm's as they are. Weights load as they were published: the layout is recognised from the keys.
"""

import copy
import difflib
import importlib
import inspect
import re
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import make_layers
from torchvision.ops import Conv2dNormActivation

from common import InputError, first_line, replacing, timm_models
from common.data import NORMALISATION
from common.probe import input_channels, probe, refuse_infinite
from common.published import PUBLISHED, bundled_weights, locate_weights, torchvision_weights
from common.timm_models import is_timm, stated

CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
AUXILIARY = ("googlenet", "inception_v3")  # torchvision's with further heads, which serve training only
SMALL_IMAGE = 64  # up to this side, torchvision's architectures get a stem that does not shrink the image


class ZeroPadShortcut(nn.Module):
    """Parameter-free shortcut: every second pixel, zero channels added on both sides (He et al. 2016, option A)."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.pad, self.stride = (out_channels - in_channels) // 2, stride

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels, out_channels, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        if stride == 1 and in_channels == out_channels:
            self.downsample = nn.Identity()
        elif shortcut == "projection":
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
        else:
            self.downsample = ZeroPadShortcut(in_channels, out_channels, stride)

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images, widths 16, 32, 64 (He et al. 2016, section 4.2).

    Args:
        depth: 6n+2, for example 20, 32, 44 or 56.
        num_classes: width of the last layer.
        shortcut: "projection" (1x1 convolution and BatchNorm; 272,474 parameters at depth 20 with 10 classes)
            or "pad" (no parameters; 269,722).
    """

    def __init__(self, depth, num_classes=10, shortcut="projection"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        in_channels = 16
        for stage, channels in enumerate((16, 32, 64), start=1):
            blocks = []
            for unit in range((depth - 2) // 6):
                stride = 2 if stage > 1 and unit == 0 else 1
                blocks.append(BasicBlock(in_channels, channels, stride, shortcut))
                in_channels = channels
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def narrow_vgg11(num_classes):
    """VGG-11 with BatchNorm for small images: a quarter of the channels, four poolings, one linear layer (579,786
    parameters with 10 classes)."""
    layers = make_layers([16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128], batch_norm=True)
    return nn.Sequential(
        OrderedDict(features=layers, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(128, num_classes))
    )


def narrow_regnet_y(num_classes):
    """RegNetY with squeeze-and-excitation for small images: nine blocks of 32 to 256 channels, a stem that keeps the
    resolution (677,562 parameters with 10 classes)."""
    params = BlockParams([1, 2, 4, 2], [32, 64, 128, 256], [16] * 4, [1.0] * 4, [2, 2, 2, 1], se_ratio=0.25)
    model = torchvision.models.RegNet(params, num_classes=num_classes, stem_width=32)
    model.stem[0].stride = (1, 1)
    return model


NARROW = {"vgg11_bn_x0_25": narrow_vgg11, "regnet_y_narrow": narrow_regnet_y}  # small enough to bundle
OWN = {*CIFAR_DEPTHS, *NARROW}  # not torchvision's


def build(arch, num_classes, image_size, design=None):
    """A network with random weights.

    Args:
        arch: resnet20|32|44|56|110, vgg11_bn_x0_25 or regnet_y_narrow (CIFAR), a torchvision classifier, "timm:NAME", or
            "package.module:factory" for an own model; the factory is called with num_classes if it takes that argument.
        num_classes: width of the last layer.
        image_size: side of the images in pixels; up to 64, torchvision's architectures get a CIFAR stem.
        design: "pad" for CIFAR ResNets whose shortcuts have no parameters, "pytorchcv" for torchvision's networks changed
            to that package's; all else is the usual network.

    Raises:
        InputError: no such architecture; the nearest names are offered.
    """
    if is_own(arch):
        return _build_own(arch, num_classes)
    if is_timm(arch):
        return timm_models.build(arch, num_classes)
    if arch in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[arch], num_classes, "pad" if design == "pad" else "projection")
    if arch in NARROW:
        return NARROW[arch](num_classes)
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        nearest = difflib.get_close_matches(arch, [*OWN, *known], n=3, cutoff=0.4)
        raise InputError(
            f"--arch '{arch}' is not known; nearest: {', '.join(nearest) or 'none'}; "
            "give one of those, another torchvision classifier, or package.module:factory"
        )
    extra = {}
    if arch in AUXILIARY:
        extra = {"aux_logits": False, "init_weights": False, "transform_input": image_size > SMALL_IMAGE}
    small = image_size <= SMALL_IMAGE
    with torch.device("meta") if small and arch.startswith("vgg") else torch.device("cpu"):
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **extra)
    if design == "pytorchcv":
        _as_pytorchcv(model)
    return _cifar_stem(model, num_classes) if small else model


def _as_pytorchcv(model):
    """Where pytorchcv's networks are not torchvision's: in ResNet-50 a bottleneck's stride is in the first convolution;
    MobileNetV2's first block has a convolution more, its classifier no bias."""
    if isinstance(model, torchvision.models.MobileNetV2):
        model.features[1].conv.insert(0, Conv2dNormActivation(32, 32, 1, activation_layer=nn.ReLU6))
        model.classifier[1].bias = None
    for block in model.modules():
        if isinstance(block, Bottleneck) and block.conv2.groups == 1:  # its ResNeXt-50 is torchvision's
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def design_of(model):
    """The `design` with which `build` makes the architecture of `model`, None for most."""
    if any(isinstance(module, ZeroPadShortcut) for module in model.modules()):
        return "pad"
    moved = any(isinstance(module, Bottleneck) and module.conv1.stride != (1, 1) for module in model.modules())
    bare = isinstance(model, torchvision.models.MobileNetV2) and "classifier.1.bias" not in model.state_dict()
    return "pytorchcv" if moved or bare else None


def is_own(arch):
    """Whether an --arch is code of the user's own."""
    return ":" in arch and not is_timm(arch)


def _build_own(arch, num_classes):
    module_name, _, factory_name = arch.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        takes_classes = "num_classes" in inspect.signature(factory).parameters
    except Exception as error:  # whatever the caller's own code raises
        raise InputError(f"--arch '{arch}' cannot be imported ({first_line(error)}); give package.module:factory") from None
    try:
        model = factory(num_classes=num_classes) if takes_classes else factory()
    except Exception as error:
        what = f"--arch '{arch}' failed with {type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"{what}; the factory is called with num_classes if it has that parameter, else without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"--arch '{arch}' returned a {type(model).__name__}; the factory must return a torch.nn.Module")
    refuse_infinite(model, f"--arch '{arch}': the network")
    return model


def _cifar_stem(model, num_classes):
    """Keep the resolution of a small image in the stem, as the published CIFAR versions of these networks do."""
    name, conv = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    conv.stride = (1, 1)
    if conv.kernel_size == (7, 7):
        model.set_submodule(name, nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=conv.bias is not None))
    if isinstance(model, torchvision.models.VGG):
        model = model.to_empty(device="cpu")
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        for index, width in ((0, 512), (3, 512), (6, num_classes)):
            model.classifier[index] = nn.Linear(512, width)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.reset_parameters()
    elif isinstance(model, torchvision.models.MobileNetV2):
        model.features[2].conv[1][0].stride = (1, 1)
    elif isinstance(model, torchvision.models.DenseNet):
        model.features.pool0 = nn.Identity()
    elif hasattr(model, "maxpool"):
        model.maxpool = nn.Identity()
    return model


def build_student(arch, teacher, num_classes, image_size):
    """A network of --student-arch with random weights, in eval mode, that takes the teacher's images.

    Args:
        arch, num_classes, image_size: see `build`.
        teacher: the network it is to learn from.

    Raises:
        InputError: no such architecture, or one that does not fit.
    """
    try:
        student = build(arch, num_classes, image_size).eval()
        probe(student, num_classes, image_size)
        if (found := input_channels(student)) != (expected := input_channels(teacher)):
            raise InputError(f"--arch {arch} takes images of {found} channels and the teacher of {expected}; give another")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            learning = copy.deepcopy(student).train()(torch.randn(2, expected, image_size, image_size))
        if tuple(getattr(learning, "shape", ())) != (2, num_classes):
            what = f"--arch {arch} returns a {type(learning).__name__} while it trains, expected logits (2, {num_classes})"
            raise InputError(f"{what} for 2 images; wrap it in a module that returns the logits alone")
        return student
    except InputError as error:
        raise InputError(str(error).replace("--arch", "--student-arch")) from None


def load_teacher(arch, dataset, num_classes, image_size, weights=None):
    """The trained network that is to be compressed.

    Args:
        arch, num_classes, image_size: see `build`.
        dataset: "cifar10", "cifar100", "imagenet" or "folder".
        weights: a file, an address, or "bundled", "pytorchcv", "chenyaofo", "torchvision", "timm"; by default "timm" for its
            networks; "bundled" for CIFAR-10 and "pytorchcv" for CIFAR-100 where they have the architecture, else
            "chenyaofo"; "torchvision" for ImageNet; an own model's factory may return it trained.

    Returns:
        model: in eval mode, on the CPU, its parameters without gradient.
        normalisation: (mean, std) the weights were trained with, per channel, for images in 0 to 1.
        source: where the weights come from, for the record.

    Raises:
        InputError: weights that cannot be found, read, or fitted to the architecture.
    """
    normalisation, design = NORMALISATION["imagenet" if dataset == "folder" else dataset], None
    if weights == "":
        raise InputError("--weights is empty; give a file or a source, or leave it out")
    weights = weights or default_weights(arch, dataset)
    if is_timm(arch) and dataset in ("imagenet", "folder"):
        normalisation = timm_models.normalisation(arch)
    if weights is None:
        model, source = build(arch, num_classes, image_size), f"as {arch} returns it"
    else:
        if weights == "timm" and not is_timm(arch):
            raise InputError(f"--weights timm is for --arch timm:NAME, and --arch is {arch}; give a file or another source")
        if weights == "timm" and (found := stated(arch)["num_classes"]) != num_classes:
            advice = f"give --weights FILE, or --dataset folder --num-classes {found}"
            raise InputError(f"--weights timm: {arch} is for {found} classes and the data set has {num_classes}; {advice}")
        path, source = locate_weights(weights, arch, dataset)
        if source == "timm":
            model = timm_models.build(arch, num_classes, read_weights(path))
        elif source == "torchvision":
            read_weights(path)  # which runs no code of the file, as torchvision would
            model = torchvision.models.get_model(arch, weights=torchvision_weights(arch))  # finds the file just checked
            if arch == "inception_v3":
                model.aux_logits, model.AuxLogits = False, None  # for training only, as in `build`
        else:
            state, design = canonical(read_weights(path), arch)
            if re.search(r"resnet\d+b-", Path(path).name):
                design = None  # pytorchcv's resnet50b and its like have resnet50's keys and torchvision's strides
            model = build(arch, num_classes, image_size, design)
            fit(model, state, path)
            if design == "pad":
                normalisation = NORMALISATION["imagenet"]  # akamaster's networks, the only ones with such shortcuts
            elif any(Path(path).name.endswith(Path(a).name) for a, _ in PUBLISHED["chenyaofo"].get(dataset, {}).values()):
                normalisation = NORMALISATION[f"chenyaofo-{dataset}"]
    refuse_infinite(model, f"--weights: the network {source}")
    return model.eval().requires_grad_(False), normalisation, source


def default_weights(arch, dataset):
    """Name of the source that `--weights` stands for when it is not given; None for an own model."""
    if is_timm(arch):
        return "timm"
    if is_own(arch):
        return None
    if dataset == "cifar10" and bundled_weights(arch, dataset).exists():
        return "bundled"
    if dataset == "imagenet":
        return "torchvision"
    for source, published in PUBLISHED.items():
        if arch in published.get(dataset, {}):
            return source
    build(arch, 10, 32)  # an unknown architecture is the likelier mistake, and says so
    raise InputError(f"no pretrained weights of {arch} for {dataset} are known; give --weights FILE")


def save_weights(model, path):
    """Write the state dict of a network, its tensors on the CPU and in row-major order; all of the file or nothing."""
    with replacing(path) as partial:
        torch.save({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, partial)


def read_weights(path):
    """The dict of tensors in a checkpoint file of PyTorch, read with weights_only=True, or of safetensors.

    Raises:
        InputError: no such file, a damaged one, one without tensors, or safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--weights '{path}' is not a file; give a checkpoint file, an address or the name of a source")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript's archives
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the damaged bytes make of it
        if "TorchScript" in str(error):
            what = "is a TorchScript archive; save state_dict() of the network that it was made from"
            raise InputError(f"--weights '{path}' {what}") from None
        if other := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"holds more than tensors ({other[1]}), which is not read; save model.state_dict() alone"
            raise InputError(f"--weights '{path}' {what}, or let the factory of --arch return the trained network") from None
        with path.open("rb") as file:
            magic = file.read(2)
        if magic in (b"PK", b"\x80\x02"):
            raise InputError(f"--weights '{path}' is truncated or damaged ({first_line(error)}); fetch it again") from None
        raise InputError(f"--weights '{path}' is not a PyTorch checkpoint; give a file that torch.save wrote") from None
    for key in ("state_dict", "model_state_dict", "model_state", "model", "net", "weights"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and all(isinstance(v, torch.Tensor) and isinstance(k, str) for k, v in state.items())
    if not tensors or not state:
        found = f" but {', '.join(map(str, [*state][:5]))}" if isinstance(state, dict) and state else ""
        raise InputError(f"--weights '{path}' holds no dict of tensors{found}; save model.state_dict() with torch.save")
    return state


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        advice = "pip install -r requirements-extra.txt"
        raise InputError(f"--weights '{path}' needs safetensors, which is not installed; {advice}") from None
    try:
        return load_file(path)
    except Exception as error:  # whatever the damaged bytes make of it
        what = f"is damaged or not of safetensors ({first_line(error)})"
        raise InputError(f"--weights '{path}' {what}; fetch it again") from None


_PYTORCHCV_RESNET = (
    (r"^features\.init_block\.(conv\.)?bn\.", "bn1."),
    (r"^features\.init_block\.(conv\.)?conv\.", "conv1."),
    (r"^features\.stage(\d)\.unit(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) - 1}"),
    (r"\.body\.conv(\d)\.conv\.", r".conv\1."),
    (r"\.body\.conv(\d)\.bn\.", r".bn\1."),
    (r"\.identity_conv\.conv\.", ".downsample.0."),
    (r"\.identity_conv\.bn\.", ".downsample.1."),
    (r"^output\.", "fc."),
)
_PYTORCHCV_MOBILENET = (
    (r"\.conv\.", ".0."),
    (r"\.bn\.", ".1."),
    (r"\.conv3\.(\d)\.", lambda m: f".conv.{int(m[1]) + 2}."),
    (r"\.conv(\d)\.", lambda m: f".conv.{int(m[1]) - 1}."),
    (r"\.init_block\.", ".0."),
    (r"\.stage([1-5])\.unit(\d)", lambda m: f".{(0, 1, 3, 6, 13)[int(m[1]) - 1] + int(m[2])}"),
    (r"\.final_block\.", ".18."),
    (r"^output\.", "classifier.1."),
)


def canonical(state, arch):
    """A published state dict under the key names of this file's networks and torchvision's; own models keep theirs.

    Returns:
        state: the dict.
        design: of the network that it is for, as `build` takes it.
    """
    wrappers = ["module.", "_orig_mod."]  # DataParallel's and torch.compile's, each once, for a network may have a `module`
    wrappers += ["model."] * (":" not in arch)  # Lightning's; an own network may have a `model`, which `fit` sees
    while state and (wrapper := next((w for w in wrappers if all(key.startswith(w) for key in state)), None)):
        wrappers.remove(wrapper)
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    if ":" in arch:
        return state, None
    if arch in AUXILIARY:
        state = {key: value for key, value in state.items() if not key.startswith(("AuxLogits.", "aux1.", "aux2."))}
    if any(key.startswith("features.init_block.") for key in state):
        renamed = {}
        for key, value in state.items():
            name = key
            for pattern, replacement in _PYTORCHCV_MOBILENET if arch == "mobilenet_v2" else _PYTORCHCV_RESNET:
                name = re.sub(pattern, replacement, name)
            renamed[name] = value.flatten(1) if key == "output.weight" and value.ndim == 4 else value
        return renamed, "pytorchcv"
    if "layer1.0.conv1.weight" in state:  # akamaster: linear and, in its option B, shortcut
        state = {re.sub(r"^linear\.", "fc.", key).replace(".shortcut.", ".downsample."): v for key, v in state.items()}
    padded = arch in CIFAR_DEPTHS and not any("downsample" in key for key in state)
    return state, "pad" if padded else None


def fit(model, state, path):
    """Load `state` into `model`.

    Raises:
        InputError: another number of classes (both are named), or another architecture.
    """
    own = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    for wrapper in ("model.", "_orig_mod."):  # Lightning's, of a compiled network perhaps
        if all(key.startswith(wrapper) for key in state) and not any(key.startswith(wrapper) for key in own):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    different = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing, unknown = [key for key in own if key not in state], [key for key in state if key not in model.state_dict()]
    last = next((key.rpartition(".")[0] for key in reversed(own) if key.endswith(".weight") and own[key].ndim > 1), "")
    if different and not missing and not unknown and all(key.rpartition(".")[0] == last for key in different):
        found, expected = (len(s[last + ".weight"]) for s in (state, own))
        if found != expected:
            raise InputError(
                f"--weights '{path}' are for {found} classes and the data set has {expected}; give weights for {expected} "
                f"classes, or --dataset folder --num-classes {found}"
            )
    if missing or unknown or different:
        what = (
            f"lacks '{missing[0]}'" if missing else f"has '{unknown[0]}', which the model lacks" if unknown
            else f"has {tuple(state[different[0]].shape)} for '{different[0]}' instead of {tuple(own[different[0]].shape)}"
        )  # fmt: skip
        raise InputError(f"--weights '{path}' are of another architecture ({what}); give the --arch they were made for")
    model.load_state_dict(state, strict=False)
