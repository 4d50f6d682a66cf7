"""MixMix: All You Need for Data-Free Compression Are Feature and Data Mixing (Li et al., ICCV 2021).

Images are optimised so that several trained networks at once classify them as their labels, and so that each network's
BatchNorm layers see the statistics that they have stored (feature mixing). Meanwhile, a shrunken copy of another image covers
part of each image (data mixing). One set of images then serves to compress any network.

    python mixmix.py --arch resnet20 --dataset cifar10 --bits 4

Where the equations are:
    bn_loss                  L_BN                                                      Eq. 2
    mixed_cross_entropy      L_CE, where nothing is mixed (beta = 0)                   Eq. 1
    prior_loss               L_prior: total variation and L2 norm; of KW, a blur       Sec. 3.1
    LossWeights              lambda_1 L_CE + lambda_2 L_BN + lambda_3 L_prior          Eq. 3
    mixmix_loss              the same, with the mean over m' models, of mixed images   Eq. 6
    draw_boxes               the box of the mask alpha                                 Eq. 7
    mix_data                 (1 - alpha) X1 + alpha g(X2)                              Eq. 8
    mixed_cross_entropy      (1 - beta) L_CE(Y1) + beta L_CE(Y2)                       Eq. 9
    invert                   one batch of images; common/synthesis.py: a set of them   Algorithm 1
    common/tasks/            evaluate, what networks see in images                     Tables 1 and 2
                             ptq (BRECQ), qat (LSQ), prune, transfer, kd (DAFL)        Tables 3, 4, 5 and 8, 6, 7
    DaflTerms                Eq. 6 in DAFL's loop                                      Sec. 5.4, Table 7

No code of it was published. What the paper leaves open or has differently, and what this code does:

    what                 here                                                          why
    recipe               DeepInversion's for ImageNet and for CIFAR-10 (RECIPE), for   the paper aligns with it
                         both with warm-up and cosine (DeepInversion's own rate for
                         CIFAR is constant)
    rate, lambda_2       CIFAR: 0.25, 1, where DeepInversion has 0.05, 10              docs/MEASUREMENTS.md
    5,000 iterations     ImageNet: two thirds at half the resolution, then full size   DeepInversion's ratio, 2 to 1
                         (CIFAR: 2,000, all at full size)
    learned lambdas      exp(-s_i) L_i + s_i, with a rate of their own; fixed by       plain descent drives lambda to 0;
                         default (--weights-form)                                      fixed ones are as accurate
    L_prior, lambda_3    R_TV + lambda R_L2 (Sec. 3.1) as a weighted mean: lambda_3     values not published
                         is the sum of --tv-weight and --l2-weight
    batch                ImageNet 32, where DeepInversion has 84 (total variation is a  memory of m' networks
                         norm over the batch, so against the mean cross-entropy it
                         weighs sqrt(32/84) = 0.62 as much); CIFAR 256
    labels               balanced; --labels random as in the paper                     the tasks see every class
    zoo                  torchvision's 21 networks of the families named, for CIFAR    appendix not published
                         what is bundled or can be fetched (ZOO)
    held out (Table 6)   ResNet-18, EfficientNet-B0, but not MobileNet-b                not in torchvision (docs/PAPERS.md)
    Inception Score      of the first held-out network's predictions: at most the      Table 2 does not say whose
                         number of classes
    teachers             torchvision's, bundled ones (the paper's: ResNet-50 77.00,    the paper does not say where its
                         MobileNetV2 72.49; CIFAR-10 94.31, 95.42)                     own are from
    models of a batch    m' drawn without replacement, once                            Sec. 4.1
    box                  width, height uniform; place uniform inside; one per sample   "sampled from a uniform distribution"
    partner              a random permutation of the batch, new in every iteration     Algorithm 1 draws a mask each time
    prior                on the jittered images, before they are mixed                 Algorithm 1: L_prior(X_i)
    in DAFL (Table 7)    Eq. 9 weighs as much as DAFL's one-hot loss, L_BN 0.1          not given
                         (--kd-bn-weight), no prior; the teacher is always among the m'
    images               1,024; for qat 100,000 on ImageNet, elsewhere 4,096: 8 % of   Sec. 5.2 has ImageNet only
                         the training images, in CIFAR as in ImageNet
    KW                   Eq. 3, not mixed, with KL(N of the images || N stored), mean  Sec. 3.1 names both losses only;
                         over channels and layers, and a 3x3 blur of sigma 1; lambdas  weights: docs/MEASUREMENTS.md
                         1, 100, 10; the rest as in the recipe
    precision            bf16 where the hardware has it (--precision), but on a CPU    not given; depthwise convolutions
                         fp32 for networks with depthwise convolutions; images are     are slower in bf16 there
                         stored as float16

Baselines (--data-source): "single" inverts the network itself (DeepInversion), "kw" too, with the losses of The Knowledge
Within (Sec. 3.1), "zeroq" matches its BatchNorm statistics only, "real" takes training images from DIR/train, "noise" draws
N(0, 1). They share this recipe, so that only the losses differ, except that "zeroq", which is Eq. 2 alone, neither shifts nor
mirrors its images. "single" leaves out the competition of Adaptive DeepInversion, whose settings for CIFAR are `--lr 0.05
--bn-weight 10`.
"""

import argparse
import functools
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from common import InputError, distributed, synthesis, tasks
from common.capture import compiled
from common.cli import Parser, alone, fill_in, friendly_errors, number, whole
from common.data import ASSETS, NORMALISATION, as_tensors
from common.images import jitter
from common.models import SMALL_IMAGE, default_weights
from common.ops import box_mix
from common.probe import input_channels, probe
from common.report import arithmetic, execute, per_channel
from common.run import Run, seed_of_part
from common.tasks import TASKS, evaluate, kd, transfer
from common.zoo import ZooModel, load_zoo

# ---------------------------------------------------------------------------------------------------------- equations


def bn_loss(model, first=1.0, form="norm"):
    """L_BN, Eq. 2: L2 distances of the statistics of what a `ZooModel` has just seen from the stored ones, summed over its
    layers; the first layer's part `first` times (DeepInversion). KW has `form` "kl", see common/bns.py."""
    return model.stats.loss(form, first)


def logits_and_bn(model, x, cfg, autocast):
    """Logits (B, C) that a `ZooModel` returns for images (B, channels, H, W), and L_BN, a scalar. On a CPU, where depthwise
    convolutions are slower in bf16, a network that has some computes in fp32."""
    with nullcontext() if model.depthwise and x.device.type == "cpu" else autocast():
        logits = model(x).float()
    return logits, bn_loss(model, cfg.first_bn, "kl" if cfg.data_source == "kw" else "norm")


def image_prior(x):
    """Total variation and L2 norm of images (B, channels, H, W), as DeepInversion has them: the sum of the Frobenius norms,
    over the whole batch, of the differences in four directions; the mean of the images' norms."""
    steps = (x[:, :, :, 1:] - x[:, :, :, :-1], x[:, :, 1:] - x[:, :, :-1])
    diagonals = (x[:, :, 1:, 1:] - x[:, :, :-1, :-1], x[:, :, 1:, :-1] - x[:, :, :-1, 1:])
    return sum(d.norm() for d in (*steps, *diagonals)), x.flatten(1).norm(dim=1).mean()


def blur_prior(x):
    """KW's prior (Sec. 3.1): mean squared difference between images and themselves blurred, by 3x3 pixels of a Gaussian."""
    return F.mse_loss(x, gaussian_blur(x, 3, 1.0))


def prior_loss(x, cfg):
    """L_prior of images as `image_prior` takes them: the mean of its two parts, weighted by the recipe, so that lambda_3 is one
    number; KW has its own."""
    if cfg.data_source == "kw":
        return blur_prior(x)
    weights = cfg.tv_weight, cfg.l2_weight
    return sum(weight / sum(weights) * part for weight, part in zip(weights, image_prior(x)) if weight)


class LossWeights(nn.Module):
    """Eq. 3: lambda_1 L_CE + lambda_2 L_BN + lambda_3 L_prior, from a dict of loss name -> lambda; what has weight 0 stays out.
    The lambdas are fixed, or `learned` as exp(-s_i) L_i + s_i (the negative log-likelihood of a Gaussian of log-variance s_i),
    which keeps them above zero; then they start at the given values."""

    def __init__(self, weights, learned=False):
        super().__init__()
        self.initial = {name: weight for name, weight in weights.items() if weight}
        start = {name: torch.tensor(-math.log(weight)) for name, weight in self.initial.items()}
        self.s = nn.ParameterDict(start if learned else {})

    def forward(self, losses):
        """The weighted sum of a dict of scalar losses."""
        if len(self.s):
            return sum(torch.exp(-s) * losses[name] + s for name, s in self.s.items())
        return sum(weight * losses[name] for name, weight in self.initial.items())  # Eq. 3

    def lambdas(self):
        """The learned lambdas as they are now, by loss name, for the record; none where they are fixed."""
        return {f"lambda_{name}": torch.exp(-s) for name, s in self.s.items()}


def weights_of(cfg):
    """The lambdas of Eq. 3 as a `LossWeights` takes them."""
    bn, prior = (cfg.kl_weight, cfg.blur_weight) if cfg.data_source == "kw" else (cfg.bn_weight, cfg.tv_weight + cfg.l2_weight)
    return {"ce": cfg.ce_weight, "bn": bn, "prior": prior}


def mixmix_loss(models, x, y, weights, cfg, autocast, forward=logits_and_bn):
    """Eq. 6, with the prior of Eq. 3: what a batch of images minimises.

    Args:
        models: m' of the zoo.
        x, y: images (B, channels, H, W), jittered, and labels (B,).
        weights: a `LossWeights`.
        cfg: from `config(...)`, or the command line.
        autocast: function that returns the context the models run in.
        forward: `logits_and_bn`, or what computes the same.

    Returns:
        The weighted loss, and a dict of its scalar parts: ce and bn of the mixed images, prior of the images
        before they are mixed, unless its weight is 0.
    """
    prior = {"prior": prior_loss(x, cfg)} if "prior" in weights.initial else {}  # of the images before they are mixed
    not_mixed = x, torch.arange(len(x), device=x.device), x.new_zeros(len(x))
    mixed, partner, beta = not_mixed if cfg.no_dmix else mix_data(x)
    ce, bn = [], []
    for model in models:
        logits, distance = forward(model, mixed, cfg, autocast)
        ce.append(mixed_cross_entropy(logits, y, partner, beta))
        bn.append(distance)
    losses = {"ce": torch.stack(ce).mean(), "bn": torch.stack(bn).mean()} | prior  # Eq. 6
    return weights(losses), losses


def draw_boxes(batch, height, width, device):
    """Boxes of Eq. 7, one per sample: sides uniform over 1 ... size, places uniform where the box fits; no border is crossed.

    Returns:
        int64 (B, 4): left, top, width, height in pixels.
    """
    places, sides = [], []
    for size in (width, height):
        side = 1 + (torch.rand(batch, device=device) * size).long().clamp(max=size - 1)
        places.append((torch.rand(batch, device=device) * (size - side + 1)).long().minimum(size - side))
        sides.append(side)
    return torch.stack([*places, *sides], 1)


def mix_data(x):
    """Eq. 8: every image (B, channels, H, W) with another of the batch, resized to the box, in its box.

    Returns:
        The mixed images as x, int64 (B,) which image is in each box, and beta (B,), the share of the image that it covers.
    """
    partner = torch.rand(len(x), device=x.device).argsort()  # a permutation that a CUDA graph can hold
    boxes = draw_boxes(len(x), *x.shape[2:], x.device)
    beta = boxes[:, 2] * boxes[:, 3] / (x.shape[2] * x.shape[3])
    return box_mix(x, x[partner], boxes), partner, beta


def mixed_cross_entropy(logits, y, partner, beta):
    """Eq. 9, mean over the batch: logits (B, C) of mixed images, labels y (B,); partner and beta as `mix_data` returns them."""
    first, second = (F.cross_entropy(logits, labels, reduction="none") for labels in (y, y[partner]))
    return torch.lerp(first, second, beta).mean()  # (1 - beta) L_CE(Y1) + beta L_CE(Y2)


# ------------------------------------------------------------------------------------------ Algorithm 1: the synthesis


@functools.cache
def compiled_forward(run):
    """`logits_and_bn` for --capture compile: compiled once for each network and size, in whichever batch it comes first."""
    run.announce("compiling the networks: the first iteration of each takes a minute or two")
    return compiled(logits_and_bn, variants=256)


def invert(zoo, y, cfg, run, progress=lambda names, losses: None):
    """Algorithm 1: one batch of images.

    Args:
        zoo: from `load_zoo`; m' of them are chosen at random.
        y: labels (B,).
        cfg: from `config(...)`, or the command line.
        run: device and precision.
        progress: called after each step with the models' names and the dict of losses, as tensors.

    Returns:
        Images (B, channels, H, W), normalised as the zoo's.
    """
    models = [zoo[index] for index in sorted(torch.randperm(len(zoo))[: cfg.zoo_sample].tolist())]
    names = ", ".join(model.name for model in models)
    x = torch.randn(len(y), len(cfg.mean), cfg.image_size, cfg.image_size, device=run.device).requires_grad_()
    weights = LossWeights(weights_of(cfg), cfg.weights_form == "learned").to(run.device)
    mean, std = as_tensors((cfg.mean, cfg.std), run.device)
    low, high = ((pixel - mean) / std for pixel in (0, 1))
    compiling = cfg.capture == "compile"  # the networks, which all batches share, not the step
    forward = compiled_forward(run) if compiling else logits_and_bn

    def iteration(shrink, optimizer):
        seen = F.avg_pool2d(x, shrink) if shrink > 1 else x
        seen = jitter(seen, cfg.jitter // shrink, cfg.flip)
        loss, losses = mixmix_loss(models, seen, y, weights, cfg, run.autocast, forward)
        run.log(**losses, **weights.lambdas())
        run.update(optimizer, loss)
        if cfg.clip:
            with torch.no_grad():
                x.clamp_(low, high)

    peaks = cfg.lr, cfg.lr_weights
    for shrink, steps in ((2, cfg.low_iterations), (1, cfg.iterations - cfg.low_iterations)):
        rates = [torch.tensor(peak, device=run.device) for peak in peaks]  # which a CUDA graph reads anew
        groups = [{"params": p, "lr": rate} for p, rate in zip(([x], list(weights.parameters())), rates) if p]
        optimizer = torch.optim.Adam(groups, betas=(cfg.beta1, cfg.beta2), fused=run.fused)
        step = functools.partial(iteration, shrink, optimizer)
        step = step if compiling else run.capture(step, optimizer)
        for index in range(steps):
            warm = min((index + 1) / cfg.warmup_iterations, 1.0) if cfg.warmup_iterations else 1.0
            for rate, peak in zip(rates, peaks):
                rate.fill_(peak * (warm * 0.5 * (1 + math.cos(math.pi * index / steps))))
            step()
            progress(names, run.latest)
    return x.detach()


# ------------------------------------------------------------------------------------- Tables 3 to 5 and 7: compression


class DaflTerms:
    """What DAFL's generator minimises beside its own loss (Sec. 5.4), in the form that `kd.compress` takes: Eq. 6 of its
    images, labelled by the teacher, over the teacher and m' - 1 further networks of the zoo, drawn anew in every epoch."""

    def __init__(self, teacher, run):
        cfg, channels = run.cfg, input_channels(teacher)
        shared = tuple(per_channel(cfg, NORMALISATION["imagenet" if cfg.dataset == "folder" else cfg.dataset], channels))
        others, _ = load_zoo([name for name in cfg.zoo if not is_teacher(name, cfg)], cfg, shared, inverts=True)
        models = ZooModel(cfg.arch, teacher, shared, shared, run.layout), *others
        if cfg.zoo_sample > len(models):
            raise InputError(f"--zoo-sample is {cfg.zoo_sample} and there are {len(models)} models with the teacher; lower it")
        self.run, self.zoo = run, [model.place(run.device) for model in models]
        self.weights = LossWeights({"ce": cfg.one_hot_weight, "bn": cfg.kd_bn_weight})

    def choose(self, epoch):
        """Indices of an epoch's models; the teacher, 0, is always one of them."""
        drawn = torch.Generator().manual_seed(seed_of_part(self.run.cfg.seed, epoch))
        return 0, *sorted((1 + torch.randperm(len(self.zoo) - 1, generator=drawn)[: self.run.cfg.zoo_sample - 1]).tolist())

    def loss(self, x, y, chosen):
        """Eq. 6 of images (B, channels, H, W) with labels (B,)."""
        models = [self.zoo[index] for index in chosen]
        weighted, losses = mixmix_loss(models, x, y, self.weights, self.run.cfg, self.run.autocast)
        self.run.log(bn=losses["bn"])
        return weighted


def compress(teacher, images, cfg, run=None):
    """Quantize, prune or distil a network, as --task says.

    Args:
        teacher: a trained classifier that can be traced (for "kd" it need not be); it is copied and left as it is.
        images: (N, channels, H, W), normalised for the teacher, without labels; None for "kd" with a generator of its own.
        cfg: from `config(...)`, or the command line.
        run: a `Run`, which handles device, files and progress; by default nothing is written or shown.

    Returns:
        The quantized, pruned or distilled network, in eval mode.
    """
    run = run or Run(cfg)
    run.announce(f"{cfg.task} with {'a generator' if images is None else f'{len(images):,} images'}")
    mixing = cfg.task == "kd" and images is None and cfg.data_source == "mixmix"
    return TASKS[cfg.task].compress(teacher, images, cfg, run, **({"added": DaflTerms} if mixing else {}))


def make_and_compress(teacher, cfg, run):
    """A task of the command line: the network is examined first, then images are found or made, then it is compressed."""
    generates = cfg.task == "kd" and not cfg.images and cfg.data_source in ("mixmix", "single")
    planned = TASKS[cfg.task].plan(teacher, cfg, run, **({"generates": True} if generates else {}))
    if cfg.check:
        return planned
    run.images = None if generates else synthesis.find_images(cfg, run, load_source, invert)
    student = compress(teacher, run.images, cfg, run)
    run.record(student=TASKS[cfg.task].STUDENT, **arithmetic(teacher, student, cfg.image_size))
    return student


# ------------------------------------------------------------------------------------------------------- command line


ZOO = {  # ImageNet: of the families that the paper names; squeeze and excitation is in RegNetY and MobileNetV3
    "imagenet": "resnet34 resnet50 resnet101 resnext50_32x4d wide_resnet50_2 regnet_x_400mf regnet_x_1_6gf regnet_y_400mf "
    "regnet_y_1_6gf mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 vgg11_bn vgg16_bn densenet121 "
    "densenet169 shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5".split(),
    "cifar100": "resnet20 resnet56 vgg11_bn vgg16_bn shufflenet_v2_x0_5 shufflenet_v2_x1_0".split(),
}
HELD_OUT = {"imagenet": ["resnet18", "efficientnet_b0"], "cifar10": ["regnet_y_narrow"], "cifar100": ["resnet32"]}  # Table 6
RECIPE = {  # (CIFAR, ImageNet), DeepInversion's or its README's but for what the table above has, and KW's two weights
    "--batch-size": (256, 32, whole(1), "number of images that are optimised together"),
    "--iterations": (2000, 5000, whole(0), "number of iterations per batch"),
    "--lr": (0.25, 0.25, number(0), "peak learning rate of the pixels (Adam, cosine decay)"),
    "--beta1": (0.9, 0.5, number(0, 0.9999), "beta1 of Adam"),
    "--beta2": (0.999, 0.9, number(0, 0.9999), "beta2 of Adam"),
    "--ce-weight": (1.0, 1.0, number(0), "lambda_1, weight of the cross-entropy"),
    "--bn-weight": (1.0, 0.01, number(0), "lambda_2, weight of L_BN"),
    "--first-bn": (1.0, 10.0, number(0), "factor of the first BatchNorm's term in L_BN"),
    "--tv-weight": (2.5e-5, 1e-4, number(0), "weight of the total variation, a part of lambda_3"),
    "--l2-weight": (0.0, 1e-5, number(0), "weight of the L2 norm, the other part of lambda_3"),
    "--kl-weight": (100.0, 100.0, number(0), "--data-source kw: lambda_2, weight of the Kullback-Leibler divergence"),
    "--blur-weight": (10.0, 10.0, number(0), "--data-source kw: lambda_3, weight of the squared distance to blurred images"),
    "--jitter": (2, 30, whole(0), "in every iteration, shift images by up to this many pixels (half at half resolution)"),
    "--flip": (False, True, None, "mirror the images in half of the iterations"),
    "--clip": (False, True, None, "after every iteration, clip pixels to 0 to 1 (before normalisation)"),
}


def default_zoo(cfg):
    """Names of the networks of --zoo where it is not given: the bundled ones for CIFAR-10."""
    bundled = [path.stem.removesuffix(f"_{cfg.dataset}") for path in sorted(ASSETS.glob(f"*_{cfg.dataset}.pt"))]
    return [name for name in ZOO.get(cfg.dataset, bundled) if name not in cfg.held_out]


def is_teacher(name, cfg):
    """Whether a network of --zoo is that of --arch and --weights."""
    theirs = alone(cfg, name)
    if theirs.arch != cfg.arch:
        return False
    try:
        known = theirs.weights or default_weights(theirs.arch, cfg.dataset)
    except InputError:
        return True  # it has no weights but those of --weights
    return known == (cfg.weights or default_weights(cfg.arch, cfg.dataset))


def load_source(cfg):
    """The networks that --data-source inverts, or that normalise its images; --mean and --std are filled in."""
    own = cfg.arch if cfg.weights is None else f"{cfg.arch}={cfg.weights}"
    inverts = cfg.data_source not in synthesis.READY
    zoo, (cfg.mean, cfg.std) = load_zoo(cfg.zoo if cfg.data_source == "mixmix" else [own], cfg, inverts=inverts)
    if cfg.zoo_sample > len(zoo):
        names = ", ".join(model.name for model in zoo)
        raise InputError(f"--zoo-sample is {cfg.zoo_sample} and the zoo has {len(zoo)} models ({names}); lower it")
    if cfg.low_iterations and inverts:
        refuse_fixed_size(zoo, cfg)
    return zoo


def refuse_fixed_size(zoo, cfg):
    """Raise an InputError that names a network which does not take images of half the resolution."""
    for model in zoo:
        try:
            probe(model.model, cfg.num_classes, cfg.image_size // 2)
        except InputError:
            what = f"does not take images of {cfg.image_size // 2} pixels, which the initial iterations have"
            raise InputError(f"zoo model {model.name} {what}; give --low-iterations 0") from None


def parser():
    compiling = "compile, of the networks, for sets of 2,000 iterations or more)"
    unquantized = ("synth", "evaluate", "prune", "kd")
    p = Parser("mixmix", __doc__.split("\n\n")[0], unquantized, compiling=compiling)
    add = p.add_argument_group("MixMix").add_argument
    about = (
        "quantize (ptq, qat), prune or distil (kd) with the images; only make them (synth); compare them (evaluate, transfer); "
        "with --data-source mixmix or single and no --images, kd trains DAFL's generator"
    )
    add("--task", choices=(*TASKS, "synth", "evaluate", "transfer"), default="ptq", help=about)
    sources = ("mixmix", "single", "zeroq", "kw", *synthesis.READY)
    origins = "images made from several networks (mixmix), or from --arch alone (single, zeroq, kw); training images (real) or "
    add("--data-source", choices=sources, default="mixmix", help=origins + "noise; the top of mixmix.py describes them")
    ready = "use existing images: an images.npz, the run that made it, a folder of pictures (with its subfolders; resized and "
    ready += "cropped), or bundled (256 that MixMix made for CIFAR-10)"
    add("--images", nargs="+", metavar="FILE|RUN|FOLDER|bundled", help=ready)
    zoo = "networks to invert: names, arch=weights or package.module:factory (default: the data set's, except held-out ones)"
    add("--zoo", nargs="+", help=zoo)
    judges = "; ".join(f"{dataset} {' '.join(names)}" for dataset, names in HELD_OUT.items())
    add("--held-out", nargs="*", help=f"networks used only to evaluate the images (default: {judges})")
    add("--zoo-sample", type=whole(1), help="m', networks per batch (Sec. 4.1; default: 3)")
    add("--no-dmix", action="store_true", help="do not mix images (Table 8)")
    add("--kd-bn-weight", type=number(0), default=0.1, help="weight of L_BN beside DAFL's losses (--task kd; Sec. 5.4)")
    synthesis.add_flags(p)
    group = p.add_argument_group("MixMix (defaults depend on the data set)")
    for flag, (small, large, kind, about) in RECIPE.items():
        how = {"type": kind} if kind else {"action": argparse.BooleanOptionalAction}
        p.add_derived(group, flag, (small, large), about, **how)
    add = group.add_argument
    low = "number of initial iterations, at half the resolution (default: CIFAR 0, ImageNet two thirds of --iterations)"
    add("--low-iterations", type=whole(0), help=low)
    warmup = "number of iterations in which --lr rises linearly, at each resolution"
    add("--warmup-iterations", type=whole(0), default=100, help=warmup)
    add("--weights-form", choices=("fixed", "learned"), default="fixed", help="whether the three lambdas are fixed or learned")
    add("--lr-weights", type=number(0), default=0.01, help="learning rate of learned lambdas (Adam)")
    tasks.add_flags(p, kd={"--kd-bn-weight"}, synth={"--part"}, evaluate=set())
    refuse_idle(p)
    return p


def refuse_idle(p):
    """Declare which flags have no effect with which source of images."""
    zoo, labels, kw = ["--zoo-sample", "--no-dmix"], ["--labels", "--classes"], ["--kl-weight", "--blur-weight"]
    networks = ["--zoo", "--held-out"]  # which --task evaluate and transfer take with any images
    recipe = [flag for flag in RECIPE if flag != "--batch-size"]
    recipe += "--low-iterations --warmup-iterations --weights-form --lr-weights".split()
    dafl = [*kd.GENERATOR_FLAGS, "--kd-bn-weight"]
    idle = {f"--task {task}": ["--bits", "--wbits", "--abits", "--act-placement"] for task in p.unquantized}
    idle["--task synth"] += ["--images"]
    for task in ("synth", "evaluate", "ptq", "prune"):
        idle[f"--task {task}"] = [*idle.get(f"--task {task}", []), "--eval-every"]
    idle["--task transfer"] = ["--batch-size", "--export", "--eval-every"]
    idle["--images"] = ["--data-source", "--count", *labels, *recipe, *zoo, *dafl]
    idle |= {f"--images and --task {task}": ["--batch-size", *networks] for task in TASKS}
    idle |= {f"--zoo and --task {task}": ["--held-out"] for task in (*TASKS, "synth")}
    zoo = networks + zoo
    idle["--data-source real"] = ["--part", "--batch-size", *recipe, *zoo, *dafl]
    idle["--data-source noise"] = [*idle["--data-source real"], *labels]
    idle["--data-source single"] = ["--kd-bn-weight", *zoo, *kw]
    idle["--data-source zeroq"] = [*"--ce-weight --tv-weight --l2-weight --jitter --flip".split(), *labels, *zoo, *dafl, *kw]
    idle["--data-source kw"] = [*"--bn-weight --first-bn --tv-weight --l2-weight".split(), *zoo, *dafl]
    idle["--data-source mixmix"] = kw
    idle["--task kd and --data-source single"] = ["--count", *labels, "--batch-size", *recipe]  # DAFL's generator instead
    idle["--task kd and --data-source mixmix"] = ["--count", *labels, "--batch-size", *(f for f in recipe if f != "--first-bn")]
    idle["--weights-form fixed"] = ["--lr-weights"]
    for setting, flags in idle.items():
        p.without_effect(setting, *flags)


def _complete(cfg):
    cfg.no_dmix = cfg.no_dmix or cfg.data_source != "mixmix"
    fill_in(cfg, {"held_out": [name for name in HELD_OUT.get(cfg.dataset, []) if name not in (cfg.zoo or ())]})
    fill_in(cfg, {"zoo": default_zoo(cfg), "zoo_sample": 3 if cfg.data_source == "mixmix" else 1})
    low = 0 if cfg.image_size <= SMALL_IMAGE else round(cfg.iterations * 2 / 3)
    fill_in(cfg, {"targets": [*cfg.held_out, *cfg.zoo], "low_iterations": low})
    if cfg.data_source == "kw":
        cfg.first_bn = 1.0
    if cfg.data_source == "zeroq":
        cfg.ce_weight, cfg.tv_weight, cfg.l2_weight, cfg.jitter, cfg.flip = 0.0, 0.0, 0.0, 0, False
    if not any(weights_of(cfg).values()):
        raise InputError(f"--data-source {cfg.data_source} with these weights minimises nothing; raise one of them")
    if cfg.low_iterations > cfg.iterations:
        raise InputError(f"--low-iterations is {cfg.low_iterations}, more than the {cfg.iterations} of --iterations; lower it")
    several = cfg.task in ("evaluate", "transfer")
    if several and not cfg.images:
        raise InputError(f"--task {cfg.task} needs --images; give the folders of --task synth runs")
    if not several and len(cfg.images or ()) > 1:
        raise InputError(f"--task {cfg.task} takes one set of images, and --images names {len(cfg.images)}; give one")
    makes_images = cfg.eval is None and not cfg.images and cfg.data_source == "mixmix"
    if not cfg.zoo and (makes_images or cfg.task == "evaluate"):
        raise InputError(f"--dataset {cfg.dataset} has no zoo of its own; give --zoo")
    if cfg.task == "transfer" and not cfg.targets:
        raise InputError("--task transfer has no networks to quantize; give --targets")
    if cfg.capture == "compile" and cfg.task != "synth":
        raise InputError(f"--capture compile is for --task synth, and --task is {cfg.task}; give auto, none or cudagraph")
    given = cfg.images or cfg.data_source in synthesis.READY
    exact = several or (given and cfg.task in ("ptq", "prune"))
    eager = exact and cfg.task not in ("ptq", "transfer")
    for flag, value, only, fixed in (("--precision", cfg.precision, "fp32", exact), ("--capture", cfg.capture, "none", eager)):
        if fixed and value not in ("auto", only):
            raise InputError(f"{flag} is {value} and --task {cfg.task} runs with {only} only; leave it out")
    if twice := sorted(set(cfg.zoo) & set(cfg.held_out)):
        raise InputError(f"--zoo and --held-out both name {twice[0]}; give it in one of them")
    others = several or (cfg.task == "synth" and cfg.data_source == "mixmix")
    named = (*cfg.zoo, *cfg.held_out, *cfg.targets)
    if others and cfg.weights is not None and not any(is_teacher(name, cfg) for name in named):
        flag = "targets" if cfg.task == "transfer" else "zoo"
        raise InputError(
            f"--weights has no effect with --task {cfg.task}, which uses the networks of --{flag}; give --{flag} ARCH=WEIGHTS"
        )
    if cfg.task == "kd" and not cfg.images and cfg.data_source in ("mixmix", "single"):
        cfg.batch_size = cfg.kd_batch_size  # of the generator, by which it also draws what is evaluated and shown
    synthesis.complete(cfg)
    cfg.synthesis = {"capture": cfg.capture, "precision": cfg.precision}  # of the images; the task may have its own
    if task := TASKS.get("ptq" if cfg.task == "transfer" else cfg.task):
        task.complete(cfg)
    fill_in(cfg, {"act_placement": "relu"})  # which only networks that a task quantizes ask for
    return cfg


def parse_args(argv=None):
    cfg = parser().parse(argv)
    cfg.part = distributed.join(cfg) or cfg.part
    return _complete(cfg)


def config(**settings):
    """Settings by flag name: config(dataset="folder", num_classes=5, image_size=32, zoo=["nets:a", "nets:b"])."""
    return _complete(parser().config(**settings))


def check_networks(cfg):
    """--check where no network is compressed alone: load the networks and say which; returns their names."""
    if cfg.task == "transfer":
        networks = [(name, model) for name, model, _ in transfer.load_targets(cfg)]
    else:
        zoo = load_source(cfg) if cfg.task == "synth" else load_zoo([*cfg.zoo, *cfg.held_out], cfg)[0]
        networks = [(model.name, model.model) for model in zoo]
    for name, model in networks:
        print(f"network   {name}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return [name for name, _ in networks]


def main(argv=None):
    with friendly_errors("mixmix.py"):
        cfg = parse_args(argv)
        if cfg.task in TASKS:
            return execute(cfg, make_and_compress, files=("grid.png", "parts", "images"))
        make_set = functools.partial(synthesis.synthesize, load=load_source, make=invert)
        other = {"synth": make_set, "evaluate": evaluate.evaluate, "transfer": transfer.transfer}
        return check_networks(cfg) if cfg.check else other[cfg.task](cfg)


if __name__ == "__main__":
    main()
