"""MixMix: All You Need for Data-Free Compression Are Feature and Data Mixing (Li et al., ICCV 2021).

Images are optimised until several trained networks at once see their labels in them and find the BatchNorm statistics they
stored (feature mixing), while parts of every image are covered by a shrunk other one (data mixing). Images made once serve
to compress any network.

    python mixmix.py --arch resnet20 --dataset cifar10 --bits 4

Where the equations are:
    mixmix_loss              mean over m' models of lambda_1 L_CE + lambda_2 L_BN      Eq. 3, 6
    BatchNormStatistics      L_BN, form "norm"                                         Eq. 2
    draw_boxes               the box of the mask alpha                                 Eq. 7
    common.ops.box_mix       (1 - alpha) X1 + alpha g(X2)                              Eq. 8
    mixed_cross_entropy      (1 - beta) L_CE(Y1) + beta L_CE(Y2)                       Eq. 9
    image_prior              total variation and L2 norm of the unmixed images         Sec. 3.1
    invert                   one batch of images                                       Algorithm 1
    evaluate                 accuracies, BN losses and Inception Scores of images      Tables 1 and 2
    ptq                      post-training quantization by block reconstruction        Sec. 5.2, Table 3
    qat                      quantization-aware training with learned steps            Sec. 5.2, Table 4
    prune                    magnitude pruning with least-squares reconstruction       Sec. 5.3, Table 5
    kd                       DAFL's distillation with the terms of Eq. 6               Sec. 5.4, Table 7
    transfer                 images of one network, quantization of another            Sec. 5.5, Table 6

No code of it was published; this is the first. What the paper leaves open, and what stands here:

    what                 here                                                          why
    recipe               DeepInversion's for ImageNet and for CIFAR-10 (RECIPES)       the paper aligns with it
    rate, lambda_2       CIFAR: 0.25, 1, where DeepInversion has 0.05, 10              see below
    5,000 iterations     two thirds at half the resolution, the rest at full size      DeepInversion's ratio, 2 to 1
    learned lambda       exp(-s_i) L_i + s_i, with a rate of its own (--weights-form)  plain descent on lambda ends at 0
    zoo, ImageNet        21 torchvision networks of the families named (ZOO)           appendix not published
    models of a batch    m' drawn without replacement, once                            Sec. 4.1
    box                  width, height uniform; place uniform inside; one per sample   "sampled from a uniform distribution"
    partner              a random permutation of the batch, new in every iteration     Algorithm 1 draws a mask each time
    prior                on the jittered images, before they are mixed                 Algorithm 1: L_prior(X_i)

MixMix has no CIFAR recipe for synthesis. With DeepInversion's weight of 10, two networks recognised 8 to 30 % of 64 images as
their class after 200 iterations, at rates of 0.05 to 0.25; with 1, and the paper's rate of 0.25, all of them, at the same
distance of the BatchNorm statistics. No test image was looked at for it.

Baselines run on the same machinery (--data-source): "single" inverts the network itself (DeepInversion), "zeroq" matches its
BatchNorm statistics only, "real" takes training images from DIR/train, "noise" draws N(0, 1).
"""

import argparse
import copy
import functools
import json
import math
import operator
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.utils.flop_counter import FlopCounterMode

from common import InputError, replacing
from common.bns import BatchNormStatistics
from common.cli import Parser, fill_in, friendly_errors, number, whole
from common.data import accuracy, full_precision, load_test_set
from common.images import draw_grid, jitter, noise, read_images, real_images, renormalise, sampler, write_images
from common.models import ASSETS, SMALL_IMAGE, build_student, fit, input_channels, load_teacher, probe, read_weights
from common.ops import box_mix, upsample_conv
from common.progress import Progress
from common.quant import AdaRound, LearnedStep, LearnedWeight, QuantAct, quantize, quantized_activations, quantized_layers
from common.report import evaluate_file, finish, per_channel, prepare
from common.run import Run, peak_memory, pick_device, write_atomically
from common.trace import fold_batchnorm, memory_layout, trace

ZOO = {  # ImageNet: of the families that the paper names; squeeze and excitation is in RegNetY and MobileNetV3
    "imagenet": "resnet34 resnet50 resnet101 resnext50_32x4d wide_resnet50_2 regnet_x_400mf regnet_x_1_6gf regnet_y_400mf "
    "regnet_y_1_6gf mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 vgg11_bn vgg16_bn densenet121 "
    "densenet169 shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5".split(),
    "cifar100": "resnet20 resnet56 vgg11_bn vgg16_bn shufflenet_v2_x0_5 shufflenet_v2_x1_0".split(),
}
HELD_OUT = {"imagenet": ["resnet18", "efficientnet_b0"], "cifar10": ["regnet_y_narrow"], "cifar100": ["resnet32"]}  # Table 6
RECIPES = {  # DeepInversion's; its published settings disagree on the weights, the large ones are its README's
    "small": {
        "batch_size": 256, "iterations": 2000, "lr": 0.25, "beta1": 0.9, "beta2": 0.999,
        "ce_weight": 1.0, "bn_weight": 1.0, "first_bn": 1.0, "tv_weight": 2.5e-5, "l2_weight": 0.0,
        "jitter": 2, "flip": False, "clip": False,
    },
    "large": {
        "batch_size": 32, "iterations": 5000, "lr": 0.25, "beta1": 0.5, "beta2": 0.9,
        "ce_weight": 1.0, "bn_weight": 0.01, "first_bn": 10.0, "tv_weight": 1e-4, "l2_weight": 1e-5,
        "jitter": 30, "flip": True, "clip": True,
    },
}  # fmt: skip
SOURCES = ("mixmix", "single", "zeroq", "real", "noise")


# ------------------------------------------------------------------------------------------------------------ the zoo


class ZooModel(nn.Module):
    """A trained network that takes the zoo's images: what normalises them is made its own.

    Args:
        name: as in --zoo.
        model: the network, which is frozen.
        normalisation: (mean, std) that it was trained with.
        shared: (mean, std) of the images.
    """

    def __init__(self, name, model, normalisation, shared):
        super().__init__()
        self.name, self.model = name, model.eval().requires_grad_(False)
        self.stats = BatchNormStatistics(model)
        (own_mean, own_std), (mean, std) = ((torch.tensor(v).view(-1, 1, 1) for v in n) for n in (normalisation, shared))
        self.same = normalisation == shared
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, x):
        """Logits (B, C) of images (B, channels, H, W)."""
        return self.model(x if self.same else x * self.scale + self.shift)


def load_zoo(names, cfg, shared=None):
    """The networks of --zoo.

    Args:
        names: architectures, "arch=weights" or "package.module:factory".
        cfg: what says which data set, how many classes and how large images.
        shared: (mean, std) of the images; by default those of the first network.

    Returns:
        A list of `ZooModel`, and (mean, std) of the images.

    Raises:
        InputError: a network that cannot be loaded, or does not fit the others; it is named.
    """
    zoo = []
    for name in names:
        arch, _, weights = name.partition("=")
        try:
            model, normalisation, _ = load_teacher(arch, cfg.dataset, cfg.num_classes, cfg.image_size, weights or None)
            model.layout = memory_layout(model, probe(model, cfg.num_classes, cfg.image_size))
            channels, own = input_channels(model), argparse.Namespace(mean=None, std=None)
            shared = shared or tuple(per_channel(cfg, normalisation, channels))
            given = cfg if (arch, weights or None) == (cfg.arch, cfg.weights) else own
            normalisation = tuple(per_channel(given, normalisation, channels))
            if len(shared[0]) != channels:
                raise InputError(f"it takes images of {channels} channels and the others of {len(shared[0])}")
            zoo.append(ZooModel(name, model, normalisation, shared))
        except InputError as error:
            raise InputError(f"zoo model {name}: {error}") from None
    return zoo, shared


def default_zoo(cfg):
    """Names of the networks that --zoo stands for when it is not given: the bundled ones for CIFAR-10."""
    bundled = [path.stem.removesuffix(f"_{cfg.dataset}") for path in sorted(ASSETS.glob(f"*_{cfg.dataset}.pt"))]
    return [name for name in ZOO.get(cfg.dataset, bundled) if name not in cfg.held_out]


# ------------------------------------------------------------------------------------------------------------- losses


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


def mixed_cross_entropy(logits, y, partner, beta):
    """Eq. 9: (1 - beta) L_CE(Y1) + beta L_CE(Y2), mean over the batch.

    Args:
        logits: (B, C) of mixed images.
        y: labels (B,).
        partner: int64 (B,), whose images are in the boxes.
        beta: (B,), share of the image that the box covers.
    """
    losses = [F.cross_entropy(logits, labels, reduction="none") for labels in (y, y[partner])]
    return torch.lerp(*losses, beta).mean()


def image_prior(x):
    """Total variation and L2 norm of images (B, channels, H, W), as DeepInversion has them: the sum of the Frobenius norms,
    over the whole batch, of the differences in four directions; the mean of the images' norms."""
    steps = (x[:, :, :, 1:] - x[:, :, :, :-1], x[:, :, 1:] - x[:, :, :-1])
    diagonals = (x[:, :, 1:, 1:] - x[:, :, :-1, :-1], x[:, :, 1:, :-1] - x[:, :, :-1, 1:])
    return sum(d.norm() for d in (*steps, *diagonals)), x.flatten(1).norm(dim=1).mean()


class LossWeights(nn.Module):
    """lambda_1 ... lambda_3 of Eq. 3 and of the prior: fixed, or learned as exp(-s_i) L_i + s_i (the likelihood of a
    Gaussian of unknown spread), which keeps them above zero.

    Args:
        weights: dict of loss name -> initial lambda; a loss of weight 0 stays out.
        learned: whether they are learned.
    """

    def __init__(self, weights, learned):
        super().__init__()
        self.fixed = {name: weight for name, weight in weights.items() if weight}
        start = {name: torch.tensor(-math.log(weight)) for name, weight in self.fixed.items()}
        self.s = nn.ParameterDict(start if learned else {})

    def forward(self, losses):
        """The weighted sum of a dict of scalar losses."""
        if len(self.s):
            return sum(torch.exp(-s) * losses[name] + s for name, s in self.s.items())
        return sum(weight * losses[name] for name, weight in self.fixed.items())


def mixmix_loss(models, x, y, cfg, autocast):
    """The losses of a batch, Eq. 6: cross-entropy and BatchNorm statistics of the mixed images, averaged over the models, and
    the prior of the unmixed ones.

    Args:
        models: m' of the zoo.
        x: images (B, channels, H, W), jittered.
        y: labels (B,).
        autocast: function that returns the context the models run in.

    Returns:
        Dict of scalar losses: ce, bn, tv, l2.
    """
    tv, l2 = image_prior(x)
    partner, beta = torch.arange(len(x), device=x.device), x.new_zeros(len(x))
    if not cfg.no_dmix:
        partner = torch.rand(len(x), device=x.device).argsort()
        boxes = draw_boxes(len(x), *x.shape[2:], x.device)
        beta = boxes[:, 2] * boxes[:, 3] / (x.shape[2] * x.shape[3])
        x = box_mix(x, x[partner], boxes)
    ce, bn = [], []
    for model in models:
        with autocast():
            logits = model(x).float()
        ce.append(mixed_cross_entropy(logits, y, partner, beta))
        bn.append(model.stats.loss("norm", cfg.first_bn))
    return {"ce": torch.stack(ce).mean(), "bn": torch.stack(bn).mean(), "tv": tv, "l2": l2}


# ---------------------------------------------------------------------------------------------------------- synthesis


def invert(models, y, cfg, run, progress=lambda step, losses: None):
    """One batch of images, Algorithm 1.

    Args:
        models: the m' networks of this batch.
        y: labels (B,).
        cfg: from `config(...)`, or the command line.
        run: device and precision.
        progress: called with (steps done, dict of the losses' latest values as tensors).

    Returns:
        Images (B, channels, H, W), normalised as the zoo's.
    """
    channels, size = len(cfg.mean), cfg.image_size
    x = torch.randn(len(y), channels, size, size, device=run.device).requires_grad_()
    weights = {"ce": cfg.ce_weight, "bn": cfg.bn_weight, "tv": cfg.tv_weight, "l2": cfg.l2_weight}
    weigh = LossWeights(weights, cfg.weights_form == "learned").to(run.device)
    mean, std = (torch.tensor(v, device=run.device).view(-1, 1, 1) for v in (cfg.mean, cfg.std))
    low, high = -mean / std, (1 - mean) / std

    def step(shrink, optimizer):
        seen = F.avg_pool2d(x, shrink) if shrink > 1 else x
        losses = mixmix_loss(models, jitter(seen, cfg.jitter // shrink, cfg.flip), y, cfg, run.autocast)
        run.update(optimizer, weigh(losses))
        if cfg.clip:
            with torch.no_grad():
                x.clamp_(low, high)
        run.log(**losses)

    done = 0
    for shrink, count in ((2, cfg.low_iterations), (1, cfg.iterations - cfg.low_iterations)):
        rates = [torch.tensor(rate, device=run.device) for rate in (cfg.lr, cfg.lr_weights)]
        groups = [{"params": [x], "lr": rates[0]}, {"params": list(weigh.parameters()), "lr": rates[1]}]
        optimizer = torch.optim.Adam(
            [group for group in groups if group["params"]], betas=(cfg.beta1, cfg.beta2), fused=run.fused
        )

        captured = run.capture(functools.partial(step, shrink, optimizer), optimizer)
        for index in range(count):
            warm = min((index + 1) / cfg.warmup_iterations, 1.0) if cfg.warmup_iterations else 1.0
            factor = warm * 0.5 * (1 + math.cos(math.pi * index / count))
            for tensor, rate in zip(rates, (cfg.lr, cfg.lr_weights)):
                tensor.fill_(rate * factor)
            captured()
            done += 1
            progress(done, run.latest)
    return x.detach()


def make_labels(cfg):
    """Labels of all images (count,): balanced and shuffled, or drawn at random."""
    source = torch.Generator().manual_seed(cfg.seed)
    if cfg.labels == "random":
        return torch.randint(cfg.num_classes, (cfg.count,), generator=source)
    return (torch.arange(cfg.count) % cfg.num_classes)[torch.randperm(cfg.count, generator=source)]


def make_batches(zoo, cfg, run, rank=0, world=1):
    """Make the batches of `cfg` that are not in the run's folder yet; each is written when it is finished.

    A batch depends on its number and the seed only, so any number of processes makes the same images, if each has as many
    threads (torchrun gives one, OMP_NUM_THREADS): other numbers of threads round differently, and so do the additions in no
    fixed order by which a GPU differentiates the resized boxes.

    Args:
        zoo: from `load_zoo`.
        cfg: from `config(...)`, or the command line.
        run: with a folder.
        rank, world: this process makes the batches rank, rank + world, ...
    """
    labels = make_labels(cfg).tensor_split(math.ceil(cfg.count / cfg.batch_size))  # none much smaller than the others
    own = [index for index in range(rank, len(labels), world) if not batch_file(run, index).exists()]
    zoo = [model.to(run.device, memory_format=model.model.layout) for model in zoo]
    with Progress(total=cfg.iterations * len(own), unit="it", position=rank, disable=not own) as bar:
        for index in own:
            torch.manual_seed((cfg.seed * 1_000_003 + index) % 2**63)
            chosen = sorted(torch.randperm(len(zoo))[: cfg.zoo_sample].tolist())
            bar.set_description(f"batch {index + 1}/{len(labels)}, {', '.join(zoo[i].name for i in chosen)}")

            y = labels[index].to(run.device)

            def progress(step, losses, y=y):
                bar.update()
                if step % 50 == 0 or step == cfg.iterations:  # reading the losses waits for the device
                    rate = bar.n * len(y) / cfg.iterations / bar.format_dict["elapsed"]
                    values = {name: f"{loss.item():.3g}" for name, loss in losses.items()}
                    bar.set_postfix(values | {"images/s": f"{rate:.2f}"})

            x = invert([zoo[i] for i in chosen], y, cfg, run, progress).half()
            if not torch.isfinite(x).all():
                raise InputError(f"the images of batch {index + 1} stopped being finite; lower --lr")
            write_images(batch_file(run, index), x, y, (cfg.mean, cfg.std))


def batch_file(run, index):
    """Where the batch of that number goes."""
    return run.folder / "batches" / f"{index:05}.npz"


def synthesize(cfg, rank=0, world=1, barrier=lambda: None, begin=lambda: None):
    """--task synth: the images of `cfg` in its run folder, from the zoo or one of the baselines' sources.

    Args:
        cfg: from `config(...)`, or the command line; --mean and --std are filled in.
        rank, world: as for `make_batches`.
        barrier: function that returns when all processes have called it.
        begin: called when all is checked, before anything is written.

    Returns:
        The contents of result.json, for rank 0.
    """
    names = [cfg.arch if cfg.weights is None else f"{cfg.arch}={cfg.weights}"]
    if cfg.data_source == "mixmix":
        names = cfg.zoo
    began = time.time()
    if rank:
        barrier()  # the first process downloads what there is to download
    zoo, shared = load_zoo(names, cfg)
    if rank == 0:
        barrier()
    cfg.mean, cfg.std = shared
    if cfg.zoo_sample > len(zoo):
        raise InputError(f"--zoo-sample is {cfg.zoo_sample} and the zoo has {len(zoo)} models ({', '.join(names)}); lower it")
    if cfg.capture == "auto":
        cfg.capture = "cudagraph" if pick_device(cfg.device).type == "cuda" else "none"
    run, labels = Run(cfg, cfg.out), make_labels(cfg)
    finished = cfg.resume and (run.folder / "result.json").exists()
    if cfg.data_source == "real" and rank == 0 and not finished:
        images = real_images(cfg, labels)
    if rank == 0:
        begin()
        run.start()
    barrier()
    if finished:
        return json.loads((run.folder / "result.json").read_text()) if rank == 0 else None
    if cfg.data_source in ("mixmix", "single", "zeroq"):
        make_batches(zoo, cfg, run, rank, world)
    barrier()
    if rank:
        return None
    if cfg.data_source == "noise":
        images = noise(len(labels), cfg)
    elif cfg.data_source != "real":
        files = [batch_file(run, i) for i in range(math.ceil(cfg.count / cfg.batch_size))]
        images = torch.empty(cfg.count, len(cfg.mean), cfg.image_size, cfg.image_size, dtype=torch.float16)
        for place, file in zip(images.tensor_split(len(files)), files):
            place.copy_(torch.from_numpy(np.load(file)["images"]))
    write_images(run.folder / "images.npz", images, labels, (cfg.mean, cfg.std))
    draw_grid(images, labels, cfg, run.folder / "grid.png")
    result = {"images": len(labels), "data_source": cfg.data_source, "zoo": names, "seconds": round(time.time() - began, 1)}
    write_atomically(run.folder / "result.json", json.dumps(result | {"arguments": run.arguments()}, indent=1))
    shutil.rmtree(run.folder / "batches", ignore_errors=True)
    print(f"\n{len(labels):,} images of source {cfg.data_source} in {result['seconds']:.0f} s")
    print(f"  in {run.folder}/: images.npz, grid.png, result.json; --images {run.folder} uses them")
    return result


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
@full_precision()
def look(model, images, labels, batch_size, device):
    """What one network makes of images: top-1 accuracy in percent, L_BN (Eq. 2, mean over batches), class probabilities."""
    model = model.to(device)
    probabilities, losses = [], []
    for part in images.split(batch_size):
        probabilities.append(model(part.to(device, torch.float32)).softmax(1).cpu())
        losses.append(model.stats.loss("norm").item())
    probabilities = torch.cat(probabilities)
    top1 = 100 * (probabilities.argmax(1) == labels).float().mean().item()
    return top1, sum(losses) / len(losses), probabilities


def inception_score(probabilities):
    """exp of the mean Kullback-Leibler divergence from each image's class probabilities (N, C) to their mean; 1 to C."""
    p = probabilities.double().clamp(min=1e-16)
    return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()


def evaluate(cfg):
    """--task evaluate: what the zoo's and the held-out networks see in the images of each --images (Tables 1 and 2).

    Returns:
        The contents of evaluation.json: per source the accuracies and BN losses by network, their mean and deviation over
        the zoo, and the Inception Score under the first held-out network (the first of the zoo where none is).
    """
    sources, run, result = {name: read_images(name, cfg) for name in cfg.images}, Run(cfg, cfg.out), {}
    loaded_for = None
    for name, (images, labels, shared) in sources.items():
        if shared != loaded_for:  # most often once: all sources are normalised alike
            (zoo, _), (held_out, _), loaded_for = load_zoo(cfg.zoo, cfg, shared), load_zoo(cfg.held_out, cfg, shared), shared
        seen = {}
        for model in Progress([*zoo, *held_out], desc=name, leave=False):
            top1, bn, probabilities = look(model, images, labels, cfg.batch_size, run.device)
            seen[model.name] = {"top1": round(top1, 2), "bn_loss": round(bn, 4)}
            if model is (held_out or zoo)[0]:
                score = inception_score(probabilities)
        accuracies = torch.tensor([seen[model.name]["top1"] for model in zoo])
        result[name] = {
            "images": len(labels),
            "zoo_top1": round(accuracies.mean().item(), 2),
            "zoo_deviation": round(accuracies.std(correction=0).item(), 2),
            "inception_score": round(score, 3),
            "models": seen,
        }
    run.start()
    write_atomically(run.folder / "evaluation.json", json.dumps(result, indent=1))
    short = {name: (Path(name).parent if Path(name).is_file() else Path(name)).name[-18:] for name in result}
    width = max(14, *(len(text) + 2 for text in short.values()))
    for title, key, digits in (("accuracy, %", "top1", 2), ("L_BN (Eq. 2)", "bn_loss", 2)):
        print(f"{title:<28}" + "".join(f"{text:>{width}}" for text in short.values()))
        for model in (*cfg.zoo, *cfg.held_out):
            mark = " (held out)" if model in cfg.held_out else ""
            print(f"  {model + mark:<26}" + "".join(f"{r['models'][model][key]:>{width}.{digits}f}" for r in result.values()))
    zoo_mean = [f"{r['zoo_top1']:.2f} ± {r['zoo_deviation']:.2f}" for r in result.values()]
    print(f"{'zoo, mean ± deviation':<28}" + "".join(f"{text:>{width}}" for text in zoo_mean))
    print(f"{'Inception Score':<28}" + "".join(f"{r['inception_score']:>{width}.2f}" for r in result.values()))
    print(f"  in {run.folder}/: evaluation.json")
    return result


# --------------------------------------------------------------------------------------- post-training quantization


class Block(NamedTuple):
    """Consecutive nodes of a traced network through whose last value alone the rest of the network sees them."""

    name: str
    nodes: tuple
    entry: fx.Node

    def __call__(self, x, modules, quantize_activations=True):
        """The block's output for its input `x`, with its submodules taken from the dict `modules`."""
        env = {self.entry: x}
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "call_module":
                passes = node.target.startswith("act_quant_") and not quantize_activations
                env[node] = args[0] if passes else modules[node.target](*args, **kwargs)
            elif node.op == "call_function":
                env[node] = node.target(*args, **kwargs)
            elif node.op == "call_method":
                env[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                env[node] = operator.attrgetter(node.target)(modules[""])
        return env[self.nodes[-1]]


def find_blocks(student, teacher):
    """The blocks that are reconstructed together (BRECQ): what a residual connection spans, all layers of a module of the
    same class that has none (an inverted residual of stride 2); single layers otherwise.

    Args:
        student: from `quantize`, of a traced network.
        teacher: the network it was made of, whose classes tell which modules are alike.

    Returns:
        A list of `Block`, in order; run one after the other they are the network.
    """
    graph, modules = list(student.graph.nodes), dict(student.named_modules())
    nodes, entry = [n for n in graph if n.op not in ("placeholder", "output")], graph[0]
    place = {node: index for index, node in enumerate(nodes)}

    def layers(group):
        return [n.target for n in group if n.op == "call_module" and isinstance(modules[n.target], (nn.Conv2d, nn.Linear))]

    def last_use(node):
        return max((place.get(user, len(nodes)) for user in node.users), default=-1)

    groups, group, reach, latest = [], [], last_use(entry), 0
    for index, node in enumerate(nodes):
        if latest and layers([node]):  # the next layer: what lies behind the latest cut begins a new group
            groups.append(group[:latest])
            group, latest = group[latest:], 0
        group.append(node)
        is_tuple = any(user.target is operator.getitem for user in node.users)
        if reach <= index and layers(group) and not is_tuple:  # a cut: nothing before this node is used behind it
            latest = len(group)
        reach = max(reach, last_use(node))
    groups.append(group)

    def homes(group):
        """The modules, from the outermost, that all layers of a group are in."""
        path = os.path.commonprefix([name.split(".")[:-1] for name in layers(group)])
        return [".".join(path[: depth + 1]) for depth in range(len(path))]

    def kinds(group):
        """The classes of its homes that say more than Sequential does, by path."""
        found = {path: type(teacher.get_submodule(path)) for path in homes(group)}
        return {path: kind for path, kind in found.items() if kind is not nn.Sequential}

    residual = {list(kinds(group).values())[-1] for group in groups if len(layers(group)) > 1 and kinds(group)}
    blocks, previous = [], None
    for group in groups:
        home = next((path for path, kind in kinds(group).items() if kind in residual), None)
        if home is not None and home == previous:
            blocks[-1] = blocks[-1]._replace(nodes=blocks[-1].nodes + tuple(group))
        else:
            blocks.append(Block(home or layers(group)[0], tuple(group), entry))
        entry, previous = group[-1], home
    return blocks


def raise_ends(student, cfg):
    """Give the first and the last layer of a traced network, and the activation behind the first, --ends-bits (BRECQ, LSQ);
    returns the names of all layers in order."""
    modules = dict(student.named_modules())
    called = [(n.target, modules[n.target]) for n in student.graph.nodes if n.op == "call_module"]
    layers = [name for name, module in called if isinstance(module, (nn.Conv2d, nn.Linear))]
    behind = called[[name for name, _ in called].index(layers[0]) :]
    for module in (modules[layers[0]], modules[layers[-1]], next(m for _, m in behind if isinstance(m, QuantAct))):
        module.bits = max(module.bits, cfg.ends_bits)
    return layers


def in_parts(function, x, size=256):
    """function(x), in parts of `size` images, without gradients."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(size)])


def reconstruct_weights(block, roundings, modules, x, target, cfg, progress):
    """Learn how each weight of a block is rounded, so that its output for `x` comes near `target` (BRECQ, with AdaRound).

    Args:
        block: a `Block`.
        roundings: dict of layer name -> `AdaRound`.
        modules: of the student.
        x: (N, ...), what the blocks before send, with their weights quantized.
        target: (N, ...), the full-precision block's output.
        cfg: from `config(...)`, or the command line.
        progress: called after every iteration.
    """
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings.values()], cfg.lr_rounding, fused=True)
    for index in range(cfg.weight_iterations):
        chosen = torch.randint(len(x), (cfg.ptq_batch_size,), device=x.device)
        soft = {name: functools.partial(modules[name].with_weight, weight=r()) for name, r in roundings.items()}
        output = block(x[chosen], modules | soft, quantize_activations=False)
        loss = (output - target[chosen]).square().sum(1).mean()
        share = (index / cfg.weight_iterations - 0.2) / 0.8  # the regulariser waits for a fifth of the iterations
        if share >= 0:
            loss = loss + cfg.rounding_weight * sum(r.undecided(20 - 18 * share) for r in roundings.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress()


def begin_steps(forward, steps):
    """Let each `LearnedStep` take its range from what reaches it in one forward pass."""
    hooks = [step.register_forward_pre_hook(lambda step, args: step.begin(args[0])) for step in steps]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()


def reconstruct_steps(block, steps, modules, x, target, cfg, progress):
    """Learn the step sizes of a block's activations. Arguments as `reconstruct_weights`; steps: dict of name ->
    `LearnedStep`; x: the full-precision input."""
    optimizer = torch.optim.Adam([step.scale for step in steps.values()], cfg.lr_step, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.step_iterations)
    for _ in range(cfg.step_iterations):
        chosen = torch.randint(len(x), (cfg.ptq_batch_size,), device=x.device)
        output = block(x[chosen], modules | steps)
        loss = (output - target[chosen]).abs().pow(2.4).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress()


def ptq(teacher, images, cfg, run):
    """Post-training quantization by block reconstruction (BRECQ; Sec. 5.2).

    The weights of one block after the other are rounded so that the block, fed by the quantized blocks before it, answers as
    the full-precision one; then the step sizes of its activations are learned on full-precision inputs. The first layer is
    rounded to nearest; it and the last have --ends-bits, and so has what follows the first.

    Args:
        teacher: a trained network that can be traced.
        images: (N, channels, H, W), normalised for it.
        cfg: from `config(...)`, or the command line.
        run: what surrounds the task; by its folder an interrupted run goes on with the next block.

    Returns:
        The quantized network, its BatchNorms folded.
    """
    teacher = copy.deepcopy(teacher).cpu().eval()
    example = probe(teacher, cfg.num_classes, cfg.image_size)
    folded = fold_batchnorm(teacher, example)
    student = quantize(folded, cfg.wbits, cfg.abits, cfg.act_placement, example=example).requires_grad_(False)
    blocks = find_blocks(student, teacher)
    full = dict(run.place(folded).named_modules())
    modules = dict(run.place(student).named_modules())
    layers = raise_ends(student, cfg)
    run.start()
    bar = Progress(total=len(blocks) * (cfg.weight_iterations + cfg.step_iterations), unit="it", disable=run.folder is None)

    def calls(block, kind):
        """The block's modules of a kind, by name, in order."""
        names = [n.target for n in block.nodes if n.op == "call_module"]
        return {name: modules[name] for name in names if isinstance(modules[name], kind)}

    def kept(stage, index, make):
        """What `make` returns, from the run's folder if an earlier run has it."""
        path = run.folder and run.folder / "parts" / f"{stage}-{index:03}.pt"
        if path and path.exists():
            return torch.load(path, map_location=run.device, weights_only=True)
        torch.manual_seed((cfg.seed * 1_000_003 + index) % 2**63)
        made = make()
        if path:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as partial:
                torch.save(made, partial)
        return made

    x_full = x = images.to(run.device, torch.float32)
    for index, block in enumerate(blocks):
        bar.set_description(f"weights {index + 1}/{len(blocks)}, {block.name}")
        target = in_parts(lambda part, block=block: block(part, full, quantize_activations=False), x_full)

        def rounded(block=block, x=x, target=target):
            layers_here = calls(block, (nn.Conv2d, nn.Linear))
            roundings = {name: AdaRound(m.weight, m.bits).to(run.device) for name, m in layers_here.items()}
            if list(roundings) != layers[:1]:
                reconstruct_weights(block, roundings, modules, x, target, cfg, bar.update)
            return {name: (r(hard=True).detach(), r.scale, r.zero_point) for name, r in roundings.items()}

        for name, (weight, scale, zero_point) in kept("weights", index, rounded).items():
            modules[name].pack(weight, scale, zero_point)
        x = in_parts(lambda part, block=block: block(part, modules, quantize_activations=False), x)
        x_full = target
    x_full = images.to(run.device, torch.float32)
    for index, block in enumerate(blocks):
        bar.set_description(f"activations {index + 1}/{len(blocks)}, {block.name}")
        target = in_parts(lambda part, block=block: block(part, full, quantize_activations=False), x_full)

        def stepped(block=block, x_full=x_full, target=target):
            steps = {name: LearnedStep(act.bits).to(run.device) for name, act in calls(block, QuantAct).items()}
            begin_steps(lambda: block(x_full[:64], modules | steps), steps.values())
            if steps:
                reconstruct_steps(block, steps, modules, x_full, target, cfg, bar.update)
            return {name: (step.scale.detach(), step.zero_point) for name, step in steps.items()}

        for name, values in kept("activations", index, stepped).items():
            modules[name].fix(*values)
        x_full = target
    bar.close()
    return student


# --------------------------------------------------------------------------------------- quantization-aware training


def feature_loss(ours, theirs):
    """How far the students' block outputs are from the teacher's: mean over the blocks of the mean squared difference over
    the variance of the teacher's. Lists of (B, ...)."""
    losses = [F.mse_loss(a.float(), b.float()) / b.float().var() for a, b in zip(ours, theirs)]
    return torch.stack(losses).mean()


def qat(teacher, images, cfg, run):
    """Quantization-aware training with learned step sizes (LSQ; Sec. 5.2): one step per weight tensor and activation, the
    full-precision network as the teacher, by its softened outputs and by the outputs of its blocks.

    Open in the paper, chosen here: SGD with momentum 0.9 and a cosine decay, as LSQ has it; BatchNorm statistics stay fixed,
    for those of synthetic images are no better; a tenth of LSQ's learning rates, because networks with fixed statistics do not
    bear more (ResNet-20 at 4 bits, real images: 0.01 leaves it at 22 %); the feature loss normalised by the teacher's
    variance; no labels.
    Arguments and result as `ptq`.
    """
    teacher, example = run.adopt(teacher)
    student = quantize(teacher, cfg.wbits, cfg.abits, cfg.act_placement, example=example)
    if not isinstance(student, fx.GraphModule):
        raise InputError("the model cannot be traced, so its blocks cannot be found; give one whose forward does not branch")
    blocks = find_blocks(student, teacher)
    raise_ends(student, cfg)
    for _, layer in quantized_layers(student):
        register_parametrization(layer, "weight", LearnedWeight(layer.weight, layer.bits))
        layer.packed = True  # its weight is quantized by the parametrization
    steps = {name: LearnedStep(act.bits, lsq=True).to(run.device) for name, act in quantized_activations(student)}
    for name, step in steps.items():
        student.set_submodule(name, step)
    full, modules = dict(trace(teacher, example).named_modules()), dict(student.named_modules())
    x, draw = sampler(images, cfg.qat_batch_size, run.device)
    begin_steps(lambda: student(draw()), steps.values())
    scales = [p for name, p in student.named_parameters() if name.endswith("scale")]
    others = [p for name, p in student.named_parameters() if not name.endswith("scale")]
    groups = [{"params": others, "weight_decay": cfg.qat_weight_decay}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, cfg.qat_lr, momentum=0.9, nesterov=True, fused=run.fused)

    def outputs(x, modules, quantized):
        """What each block sends; the last sends the logits."""
        sent = []
        for block in blocks:
            x = block(x, modules, quantized)
            sent.append(x)
        return sent

    def iteration():
        with run.autocast():
            with torch.no_grad():
                theirs = outputs(x, full, False)
            ours = outputs(x, modules, True)
        p, q = (F.log_softmax(sent[-1].float() / cfg.temperature, 1) for sent in (theirs, ours))
        kd = cfg.temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)
        features = feature_loss(ours[:-1], theirs[:-1]) if len(blocks) > 1 else torch.zeros_like(kd)
        run.update(optimizer, kd + cfg.feature_weight * features)
        run.log(kd=kd, features=features)

    step, run.rates = run.capture(iteration, optimizer), "--qat-lr"
    for epoch in run.epochs(cfg.epochs, student, None, optimizer=optimizer):
        for group in optimizer.param_groups:
            group["lr"] = cfg.qat_lr * 0.5 * (1 + math.cos(math.pi * epoch / cfg.epochs))
        for _ in run.steps():
            draw()
            step()
    for _, layer in quantized_layers(student):
        learned, weight = layer.parametrizations.weight[0], layer.weight.detach()
        remove_parametrizations(layer, "weight")
        column = (len(weight),) + (1,) * (weight.ndim - 1)
        layer.pack(weight, *(value.detach().expand(column).clone() for value in (learned.scale, learned.zero_point)))
    for name, step in steps.items():
        act = QuantAct(step.bits).to(run.device)
        act.fix(step.scale, step.zero_point)
        student.set_submodule(name, act)
    return student.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ pruning


def least_squares(inputs, targets, keep, ridge):
    """Weights and intercept with the smallest squared error: targets ~ inputs @ weights.T + intercept (He et al., ICCV 2017).

    Args:
        inputs: (N, D).
        targets: (N, O).
        keep: bool (O, D), which weights there are; the others are 0.
        ridge: added to the diagonal of the inputs' covariance, relative to its mean.

    Returns:
        weights (O, D), intercept (O,), float32.
    """
    x, y = inputs.double(), targets.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    covariance, products = (x - x_mean).T @ (x - x_mean), (x - x_mean).T @ (y - y_mean)
    covariance += ridge * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance), device=x.device)
    weights = torch.zeros(len(keep), x.shape[1], dtype=x.dtype, device=x.device)
    if keep.all():
        weights = torch.linalg.solve(covariance, products).T
    else:
        for row, kept in enumerate(keep):
            chosen = kept.nonzero()[:, 0]
            weights[row, chosen] = torch.linalg.solve(covariance[chosen][:, chosen], products[chosen, row])
    return weights.float(), (y_mean - weights @ x_mean).float()


def pick(columns, places):
    """The columns (B, D, pixels) at `places`, int64 (B, P): (B * P, D)."""
    return columns.gather(2, places[:, None].expand(-1, columns.shape[1], -1)).movedim(2, 1).flatten(0, 1)


def patches(layer, x, places):
    """What each output of a layer sees.

    Args:
        layer: nn.Conv2d or nn.Linear.
        x: its input, (B, C, H, W) or (B, D).
        places: int64 (B, P), output pixels; nothing for a linear layer.

    Returns:
        (groups, B * P, D).
    """
    if isinstance(layer, nn.Linear):
        return x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)  # as the convolution does
    columns = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)  # (B, D, pixels)
    columns = pick(columns, places)
    return columns.view(len(columns), layer.groups, -1).movedim(1, 0)


def observe_layer(name, full, pruned, images, cfg):
    """Inputs of a layer in the pruned network and its outputs in the full one, at the same random pixels of each image."""
    layer, reference = pruned.get_submodule(name), full.get_submodule(name)
    inputs, targets, seen = [], [], {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].clone())),  # what comes behind may
        reference.register_forward_hook(lambda *args: seen.update(y=args[2].clone())),  # work in place
    ]
    with torch.no_grad():
        for part in images.split(64):
            pruned(part)
            full(part)
            x, y, places = seen["x"], seen["y"], None
            if y.ndim == 4:
                count = y.shape[2] * y.shape[3]
                places = torch.rand(len(y), count, device=y.device).argsort(1)[:, : cfg.points]
                y = pick(y.flatten(2), places)
            inputs.append(patches(layer, x, places))
            targets.append(y)
    for hook in hooks:
        hook.remove()
    return torch.cat(inputs, 1), torch.cat(targets)


def refit(name, full, pruned, images, keep, cfg):
    """Reconstruct a layer's weights from images, so that it answers as the full network's on the pruned one's inputs.

    Args:
        name: of the layer in both networks.
        full, pruned: traced, BatchNorms folded.
        images: (N, channels, H, W).
        keep: bool, of the shape of the pruned layer's weight: which of them there are.
    """
    layer = pruned.get_submodule(name)
    inputs, targets = observe_layer(name, full, pruned, images, cfg)
    groups = len(inputs)
    keep = keep.flatten(1).view(groups, -1, inputs.shape[2])
    rows = targets.view(len(targets), groups, -1)
    solved = [least_squares(inputs[g], rows[:, g], keep[g], cfg.ridge) for g in range(groups)]
    with torch.no_grad():
        layer.weight.copy_(torch.cat([weights for weights, _ in solved]).view_as(layer.weight))
        layer.bias.copy_(torch.cat([intercept for _, intercept in solved]))


CHANNELWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.SiLU,
    nn.Identity,
    nn.Dropout,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)


def removable(network):
    """The convolutions of a traced network whose channels can go: all that a channel goes through, up to the convolutions
    that take it, works on that channel alone (activations, pooling, depthwise convolutions). What a residual sum, a
    concatenation or the classifier takes stays whole.

    Returns:
        Dict of producer -> (depthwise convolutions on the way, consumers), names.
    """
    modules, found = dict(network.named_modules()), {}
    for node in network.graph.nodes:
        producer = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(producer, nn.Conv2d) or producer.groups > 1:
            continue
        way, consumers, ahead = [], [], list(node.users)
        while ahead:
            user = ahead.pop()
            module = modules.get(user.target) if user.op == "call_module" else None
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                consumers.append(user.target)
                continue
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels
            if not depthwise and not isinstance(module, CHANNELWISE) and user.target not in (F.relu, torch.relu, F.relu6):
                break
            way += [user.target] if depthwise else []
            ahead += user.users
        else:
            if consumers:
                found[node.target] = way, consumers
    return found


def remove_channels(network, producer, way, consumers, keep):
    """Remove the channels of `producer` that are not in `keep`, int64 indices, from it and from all that takes them."""
    for name in (producer, *way):
        layer = network.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach()[keep], requires_grad=False)
        layer.bias = nn.Parameter(layer.bias.detach()[keep], requires_grad=False)
        layer.out_channels = len(keep)
        if name in way:
            layer.in_channels = layer.groups = len(keep)
    for name in consumers:
        layer = network.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach()[:, keep], requires_grad=False)
        layer.in_channels = len(keep)


def prune(teacher, images, cfg, run):
    """L1 magnitude pruning and reconstruction of the layers' outputs by least squares (Sec. 5.3), without fine-tuning.

    --prune unstructured: in every convolution and linear layer the share --sparsity of its weights, those of least magnitude,
    becomes 0. structured: of every convolution in `removable` that share of the channels is removed, those whose filters
    have the smallest L1 norms. Either way the weights of the layer, or of those that took the channels, are solved for anew,
    with an intercept, one after the other, at --points random pixels of each image; a small ridge keeps the solution tame
    where pixels are few. Arguments as `ptq`.

    Returns:
        The pruned network, traced, its BatchNorms folded.
    """
    teacher = copy.deepcopy(teacher).cpu()
    full = run.place(fold_batchnorm(teacher, probe(teacher, cfg.num_classes, cfg.image_size)))
    layers = {name: module for name, module in full.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for layer in layers.values():
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)
    pruned, images = copy.deepcopy(full), images.to(run.device, torch.float32)
    ordered = [node.target for node in pruned.graph.nodes if node.target in layers]
    quiet = run.folder is None
    if cfg.prune == "unstructured":
        for name in Progress(ordered, desc="layers", disable=quiet):
            layer = pruned.get_submodule(name)
            magnitude = layer.weight.abs()
            rank = magnitude.flatten().argsort().argsort().view_as(magnitude)
            keep = rank >= round(cfg.sparsity * magnitude.numel())
            layer.weight.mul_(keep)
            if not cfg.no_refit:
                refit(name, full, pruned, images, keep, cfg)
        return pruned
    for producer, (way, consumers) in Progress(removable(pruned).items(), desc="convolutions", disable=quiet):
        norms = full.get_submodule(producer).weight.abs().flatten(1).sum(1)
        keep = norms.argsort(descending=True)[: max(1, len(norms) - round(cfg.sparsity * len(norms)))].sort().values
        remove_channels(pruned, producer, way, consumers, keep)
        for name in sorted(consumers, key=ordered.index):
            if not cfg.no_refit:
                refit(name, full, pruned, images, torch.ones_like(pruned.get_submodule(name).weight, dtype=torch.bool), cfg)
    return pruned


def load_pruned(path, model):
    """A pruned network from its student.pt.

    Args:
        path: of a run with --task prune.
        model: an untrained instance of the architecture.

    Returns:
        The network in eval mode, traced, its BatchNorms folded, with the channels that are left.
    """
    state, network = read_weights(path), fold_batchnorm(model)
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and f"{name}.weight" in state:
            weight = state[f"{name}.weight"]
            layer.weight, layer.bias = (
                nn.Parameter(state[f"{name}.{part}"], requires_grad=False) for part in ("weight", "bias")
            )
            if isinstance(layer, nn.Conv2d):
                if len(weight) != layer.out_channels and layer.groups == layer.in_channels == layer.out_channels:
                    layer.groups = len(weight)
                layer.out_channels, layer.in_channels = len(weight), weight.shape[1] * layer.groups
    fit(network, state, path)
    return network.eval()


# ------------------------------------------------------------------------------------------------------- distillation


class Generator(nn.Module):
    """DAFL's generator for small images: noise (B, latent_dim) -> images (B, channels, size, size), standardised.

    Args:
        image_size: side of the images, a multiple of 4.
        channels: of the images.
        latent_dim: length of the noise vector.
    """

    def __init__(self, image_size=32, channels=3, latent_dim=1000):
        super().__init__()
        self.side = image_size // 4
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.bn0 = nn.BatchNorm2d(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(128, eps=0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(64, eps=0.8)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z):
        x = self.linear(z).view(len(z), 128, self.side, self.side)
        x = F.leaky_relu(self.bn1(upsample_conv(self.bn0(x), self.conv1)), 0.2)
        x = F.leaky_relu(self.bn2(upsample_conv(x, self.conv2)), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))


def dafl_loss(logits, features, cfg):
    """What DAFL's generator minimises (Chen et al., ICCV 2019): one-hot, information entropy and activation terms.

    Args:
        logits: the teacher's, (B, C).
        features: what enters its last layer, (B, D).
    """
    log_p = F.log_softmax(logits, 1)
    one_hot = F.nll_loss(log_p, logits.argmax(1))
    mean = log_p.exp().mean(0)
    information = (mean * mean.clamp(min=1e-12).log10()).sum()
    return cfg.one_hot_weight * one_hot + cfg.information_weight * information - cfg.activation_weight * features.abs().mean()


def kd(teacher, images, cfg, run):
    """Distil the teacher into --student-arch (Sec. 5.4), from random weights.

    Without --images it is DAFL's loop, in which a generator is trained beside the student; with data source "mixmix" its
    generator also minimises the MixMix objective (Eq. 6) of its images, pseudo-labelled by the teacher and mixed (Eq. 8, 9),
    over the teacher and m' - 1 further networks of the zoo, drawn anew in every epoch; "single" is DAFL alone. The weights
    of the added terms are open in the paper: --ce-weight and --kd-bn-weight. With images the student learns from them alone,
    shifted and mirrored, labelled anew by the teacher each time.

    Args:
        teacher: a trained network, left as it is.
        images: (N, channels, H, W), normalised for it, or None.
        cfg: from `config(...)`, or the command line.
        run: what surrounds the loop.

    Returns:
        The student, in eval mode.
    """
    device, channels = run.device, input_channels(teacher)
    teacher = run.place(copy.deepcopy(teacher)).eval().requires_grad_(False)
    student = run.place(build_student(cfg.student_arch, teacher, cfg.num_classes, cfg.image_size))
    sgd = torch.optim.SGD(student.parameters(), cfg.kd_lr, momentum=0.9, weight_decay=5e-4, fused=run.fused)
    stateful, optimizers, zoo, generator = {"sgd": sgd}, [sgd], [], None
    if images is None:
        if cfg.image_size > SMALL_IMAGE or cfg.image_size % 4:
            raise InputError(f"--image-size is {cfg.image_size}; DAFL's generator makes up to {SMALL_IMAGE}, in fours")
        generator = run.place(Generator(cfg.image_size, channels, cfg.kd_latent_dim))
        adam = torch.optim.Adam(generator.parameters(), cfg.kd_lr_g, fused=run.fused)
        stateful |= {"generator": generator, "adam": adam}
        optimizers.append(adam)
        if cfg.data_source == "mixmix":
            normalisation = list(cfg.mean or [0.0] * channels), list(cfg.std or [1.0] * channels)
            zoo.append(ZooModel(cfg.arch, teacher, normalisation, normalisation).to(device))
            others, _ = load_zoo([name for name in cfg.zoo if name != cfg.arch], cfg, normalisation)
            zoo += [run.place(model) for model in others]
            if cfg.zoo_sample > len(zoo):
                raise InputError(f"--zoo-sample is {cfg.zoo_sample} and there are {len(zoo)} models with the teacher; lower it")
    else:
        batch, draw = sampler(images, cfg.kd_batch_size, device)
    seen, last = {}, [m for m in teacher.modules() if isinstance(m, nn.Linear)]
    if images is None and not last:
        raise InputError("the teacher has no linear layer, whose input DAFL's activation term needs; distil with --images")
    if last:
        last[-1].register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))

    def generator_step(models):
        with run.autocast():
            x = generator(torch.randn(cfg.kd_batch_size, cfg.kd_latent_dim, device=device)).float()
            logits = teacher(x).float()
        loss = dafl_loss(logits, seen.pop("features").float(), cfg)
        if cfg.data_source == "mixmix":
            losses = mixmix_loss([zoo[index] for index in models], x, logits.argmax(1), cfg, run.autocast)
            loss = loss + cfg.ce_weight * losses["ce"] + cfg.kd_bn_weight * losses["bn"]
            run.log(bn=losses["bn"])
        run.update(adam, loss)
        run.log(loss_g=loss)
        return x.detach(), logits.detach()

    def iteration(models):
        if generator is None:
            x = jitter(batch, cfg.image_size // 8, flip=True)
            with torch.no_grad(), run.autocast():
                logits = teacher(x).float()
        else:
            x, logits = generator_step(models)
        with run.autocast():
            ours = student(x).float()
        loss = F.kl_div(F.log_softmax(ours, 1), F.log_softmax(logits, 1), reduction="batchmean", log_target=True)
        run.update(sgd, loss)
        run.log(loss_q=loss)

    def synthesize(y):
        """Images for samples; what they show is the generator's choice."""
        return generator(torch.randn(len(y), cfg.kd_latent_dim, device=device)).float()

    step, run.rates = run.capture(iteration, *optimizers), "--kd-lr or --kd-lr-g"
    for epoch in run.epochs(cfg.epochs, student, synthesize, **stateful):
        sgd.param_groups[0]["lr"] = cfg.kd_lr * 0.1 ** sum(5 * epoch >= part * cfg.epochs for part in (2, 4))
        drawn = torch.Generator().manual_seed((cfg.seed * 1_000_003 + epoch) % 2**63)
        others = 1 + torch.randperm(max(len(zoo) - 1, 0), generator=drawn)[: cfg.zoo_sample - 1]
        models = (0, *sorted(others.tolist()))
        student.train()
        for _ in run.steps():
            if generator is None:
                draw()
            step(models)
        student.eval()
    return student


def transfer(cfg):
    """--task transfer: Table 6. Post-training quantization of every network of --targets with the images of each of --images.

    Returns:
        The contents of transfer.json: accuracy in percent by source and target, and the full-precision ones.
    """
    sources = {source: read_images(source, cfg) for source in cfg.images}
    run = Run(argparse.Namespace(**vars(cfg)), cfg.out)
    networks, result = [], {"full precision": {}}
    for target in cfg.targets:
        arch, _, weights = target.partition("=")
        teacher, known, _ = load_teacher(arch, cfg.dataset, cfg.num_classes, cfg.image_size, weights or None)
        try:
            probe(teacher, cfg.num_classes, cfg.image_size)
        except InputError as error:
            raise InputError(str(error).replace("--arch", "--targets")) from None
        channels = input_channels(teacher)
        for source, (images, *_) in sources.items():
            if images.shape[1] != channels:
                raise InputError(f"--images {source} has {images.shape[1]} channels and {target} {channels}; give others")
        cfg.mean, cfg.std = per_channel(argparse.Namespace(mean=None, std=None), known, channels)
        what = (cfg.dataset, cfg.data_dir, cfg.num_classes, cfg.image_size, (cfg.mean, cfg.std))
        test_set = load_test_set(*what, run.device, cfg.download, channels=channels)
        if test_set is None:
            raise InputError("--task transfer compares accuracies, so it needs test images; give --data-dir")
        networks.append((target, teacher, (cfg.mean, cfg.std), test_set))
    run.start()
    for row, (target, teacher, normalisation, test_set) in enumerate(networks):
        result["full precision"][target] = round(accuracy(run.place(teacher), test_set), 2)
        cfg.arch, _, weights = target.partition("=")
        cfg.weights, (cfg.mean, cfg.std) = weights or None, normalisation
        for column, (source, (images, _, normalised)) in enumerate(sources.items()):
            own = Run(cfg, run.folder / f"{row}-{column}")
            student = ptq(teacher, renormalise(images, normalised, normalisation), cfg, own)
            result.setdefault(source, {})[target] = round(accuracy(student, test_set), 2)
            write_atomically(run.folder / "transfer.json", json.dumps(result, indent=1))
    width = max(14, *(len(target) + 2 for target in cfg.targets))
    print(f"{f'w{cfg.wbits}a{cfg.abits}':<28}" + "".join(f"{target:>{width}}" for target in cfg.targets))
    for source, row in result.items():
        print(f"  {source[-24:]:<26}" + "".join(f"{row[target]:>{width}.2f}" for target in cfg.targets))
    print(f"  in {run.folder}/: transfer.json")
    return result


def compress(teacher, images, cfg, run=None):
    """Quantize, prune or distil a network, as --task says, with images.

    Args:
        teacher: a trained classifier with BatchNorm2d that can be traced; left as it is.
        images: (N, channels, H, W), normalised for the teacher; None for "kd" with a generator of its own.
        cfg: from `config(...)`, or the command line.
        run: what surrounds the task; by default nothing is written or shown.

    Returns:
        The quantized or pruned network or the student, in eval mode; after "ptq" and "prune" its BatchNorms are folded.

    Raises:
        InputError: a network that cannot be traced or quantized.
    """
    run = run or Run(cfg)
    teacher = copy.deepcopy(teacher).eval()
    probe(teacher, cfg.num_classes, cfg.image_size)
    run.announce(f"{cfg.task} with {'a generator' if images is None else f'{len(images):,} images'}")
    began = time.time()
    torch.manual_seed(cfg.seed)  # whether the images were made just now or before
    student = {"ptq": ptq, "qat": qat, "prune": prune, "kd": kd}[cfg.task](teacher, images, cfg, run)
    if cfg.task in ("ptq", "prune"):  # the others have epochs
        run.seconds, run.peak = time.time() - began, peak_memory(run.device)
        run.measure("last_top1", student)
    example = torch.zeros(1, input_channels(teacher), cfg.image_size, cfg.image_size, device=run.device)
    for name, network in (("flops_fp32", teacher), ("flops", student)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(example.to(next(network.parameters()).device))
        run.record(**{name: counter.get_total_flops()})
    if cfg.task == "prune":
        weights = torch.cat([p.detach().flatten() for p in student.parameters() if p.ndim > 1])
        run.record(weights=len(weights), zero_weights=int((weights == 0).sum()))
    return student


def check_task(teacher, cfg):
    """Raises the InputErrors of --task that need no images, before hours are spent on making them."""
    if cfg.task in ("ptq", "prune"):
        fold_batchnorm(teacher, probe(teacher, cfg.num_classes, cfg.image_size))
    elif cfg.task == "kd":
        build_student(cfg.student_arch, teacher, cfg.num_classes, cfg.image_size)


def find_images(cfg, run):
    """The images to compress with, normalised as `cfg` says: those of --images, or new ones in the run's folder."""
    source = cfg.images and cfg.images[0]
    if source is None:
        source = run.folder / "images"
        own = {"out": str(source), "task": "synth", **cfg.synthesis}
        synthesize(argparse.Namespace(**vars(cfg) | own), begin=run.start)
    images, labels, (mean, std) = read_images(source, cfg)
    if images.shape[1] != len(cfg.mean):
        raise InputError(f"--images {source} has {images.shape[1]} channels and the network {len(cfg.mean)}; give others")
    run.start()
    images = renormalise(images, (mean, std), (cfg.mean, cfg.std))
    draw_grid(images, labels, cfg, run.folder / "grid.png")
    run.record(data_source=cfg.data_source if cfg.images is None else str(source), images_used=len(images))
    return images


# ------------------------------------------------------------------------------------------------------- command line


def parser():
    p = Parser("mixmix", __doc__.split("\n\n")[0], unquantized=("synth", "evaluate", "prune", "kd"))
    add = p.add_argument_group("MixMix").add_argument
    tasks = (
        "quantize after (ptq) or with training (qat), prune, distil (kd) with the images; only make images (synth); see what "
    )
    tasks += "networks make of them (evaluate); how images of one network serve others (transfer)"
    add("--task", choices=("ptq", "qat", "prune", "kd", "synth", "evaluate", "transfer"), default="ptq", help=tasks)
    add("--data-source", choices=SOURCES, default="mixmix", help="of the images; see the top of mixmix.py")
    add("--images", nargs="+", metavar="FILE|RUN", help="images that are there already: images.npz or the run that made them")
    names = "names, arch=weights or package.module:factory"
    zoo = f"networks to invert: {names}; normalised as their weights say (default: by data set, those of the held-out left out)"
    add("--zoo", nargs="+", help=zoo)
    held_out = (
        "networks that only judge (default: CIFAR-10 regnet_y_narrow, CIFAR-100 resnet32, ImageNet resnet18 efficientnet_b0)"
    )
    add("--held-out", nargs="*", help=held_out)
    add("--zoo-sample", type=whole(1), help="m', networks per batch (Sec. 4.1; default: 3; single and zeroq 1)")
    add("--no-dmix", action="store_true", help="no data mixing (Table 8)")
    add("--count", type=whole(1), default=1024, help="images")
    add("--labels", choices=("balanced", "random"), default="balanced", help="of the images")
    group = p.add_argument_group("MixMix, defaults by data set")
    meanings = {
        "batch_size": "images that are optimised together",
        "iterations": "steps per batch",
        "lr": "peak learning rate of the pixels (Adam, cosine decay)",
        "beta1": "of Adam",
        "beta2": "of Adam",
        "ce_weight": "lambda_1",
        "bn_weight": "lambda_2",
        "first_bn": "factor of the first BatchNorm's part of L_BN",
        "tv_weight": "of the total variation",
        "l2_weight": "of the L2 norm",
        "jitter": "largest shift, pixels",
        "flip": "mirror the images in half of the steps",
        "clip": "keep pixels in the range of images",
    }
    for name, meaning in meanings.items():
        small, large = (RECIPES[size][name] for size in ("small", "large"))
        how = {"action": argparse.BooleanOptionalAction} if isinstance(small, bool) else {"type": (whole if isinstance(small, int) else number)(0)}
        p.add_by_size(group, "--" + name.replace("_", "-"), small, large, meaning, **how)
    add("--low-iterations", type=whole(0), help="the first of them at half the resolution (default: CIFAR 0, ImageNet two thirds)")
    add("--warmup-iterations", type=whole(0), default=100, help="steps of linear warm-up, per resolution")
    add("--weights-form", choices=("fixed", "learned"), default="fixed", help="lambda_1 ... lambda_3: fixed or learned")
    add("--lr-weights", type=number(0), default=0.01, help="learning rate of learned weights")
    add = p.add_argument_group("post-training quantization (BRECQ)").add_argument
    add("--weight-iterations", type=whole(0), default=20000, help="steps per block for the rounding of the weights")
    add("--step-iterations", type=whole(0), default=5000, help="steps per block for the step sizes of the activations")
    add("--ptq-batch-size", type=whole(1), default=32, help="images per step")
    add("--lr-rounding", type=number(0), default=1e-3, help="learning rate of the rounding (Adam)")
    add("--lr-step", type=number(0), default=4e-4, help="learning rate of the step sizes (Adam, cosine decay)")
    add("--rounding-weight", type=number(0), default=0.01, help="weight of the regulariser that decides the rounding")
    add = p.add_argument_group("quantization-aware training (LSQ)").add_argument
    add("--qat-steps", type=whole(1), default=44000, help="steps, rounded up to whole epochs")
    add("--qat-batch-size", type=whole(1), default=128, help="images per step")
    add("--qat-lr", type=number(0), help="peak learning rate (SGD, cosine decay; default: 0.001, mobilenet_v2 0.0001)")
    add("--qat-weight-decay", type=number(0), help="of all but the step sizes (default: 1e-4, mobilenet_v2 0)")
    add("--temperature", type=number(1e-3, 1e6), default=3.0, help="tau of the distillation loss")
    add("--feature-weight", type=number(0), default=1.0, help="weight of the intermediate feature loss")
    add = p.add_argument_group("pruning").add_argument
    add("--prune", choices=("unstructured", "structured"), default="unstructured", help="single weights, or whole channels")
    add("--sparsity", type=number(0, 0.99), help="share that goes (default: unstructured 0.5, structured 0.2)")
    add("--points", type=whole(1), default=10, help="pixels per image for the least-squares reconstruction")
    add("--ridge", type=number(1e-12), default=1e-4, help="of the least-squares reconstruction, relative to the inputs' variance")
    add("--no-refit", action="store_true", help="no reconstruction")
    add = p.add_argument_group("distillation (DAFL)").add_argument
    add("--student-arch", help="architecture of the student, as for --arch")
    add("--kd-epochs", type=whole(1), default=2000, help="epochs")
    add("--kd-iters", type=whole(1), default=120, help="iterations per epoch")
    add("--kd-batch-size", type=whole(1), default=1024, help="images per iteration")
    add("--kd-latent-dim", type=whole(1), default=1000, help="length of the generator's noise vector")
    add("--kd-lr", type=number(0), default=0.1, help="learning rate of the student (SGD), a tenth after 2/5 and 4/5 of the epochs")
    add("--kd-lr-g", type=number(0), default=0.02, help="learning rate of the generator (Adam)")
    add("--one-hot-weight", type=number(0), help="of DAFL's one-hot loss (default: 0.05, CIFAR-100 0.5)")
    add("--information-weight", type=number(0), help="of DAFL's information entropy (default: 5, CIFAR-100 20)")
    add("--activation-weight", type=number(0), help="of DAFL's activation loss (default: 0.01, CIFAR-100 0.1)")
    add("--kd-bn-weight", type=number(0), default=0.1, help="of L_BN beside DAFL's losses")
    add = p.add_argument_group("transfer (Table 6)").add_argument
    add("--targets", nargs="+", help="networks to quantize, as for --zoo (default: the held-out ones and the zoo)")
    add = p.add_argument_group("both quantizations").add_argument
    add("--ends-bits", type=whole(2, 8), default=8, help="of the first and the last layer's weights and of the first activation")
    return p


def _complete(cfg):
    single = cfg.data_source in ("single", "zeroq")
    if single and (cfg.zoo or (cfg.zoo_sample or 1) > 1):
        raise InputError(f"--data-source {cfg.data_source} inverts --arch alone; leave --zoo and --zoo-sample out")
    others = [name for name in HELD_OUT.get(cfg.dataset, []) if name not in (cfg.zoo or ())]
    fill_in(cfg, {"held_out": others, "zoo_sample": 1 if cfg.data_source != "mixmix" else 3})
    fill_in(cfg, {"zoo": default_zoo(cfg)})
    makes_images = cfg.eval is None and not cfg.images and cfg.data_source == "mixmix"
    if not cfg.zoo and (makes_images or cfg.task == "evaluate"):
        raise InputError(f"--dataset {cfg.dataset} has no zoo of its own; give --zoo")
    cfg.no_dmix = cfg.no_dmix or single
    if cfg.data_source == "zeroq":
        cfg.ce_weight, cfg.tv_weight, cfg.l2_weight, cfg.jitter, cfg.flip = 0.0, 0.0, 0.0, 0, False
    if cfg.ce_weight == cfg.bn_weight == cfg.tv_weight == cfg.l2_weight == 0:
        raise InputError(f"--data-source {cfg.data_source} with these weights minimises nothing; raise --bn-weight")
    if cfg.data_source == "real" and cfg.data_dir is None:
        raise InputError("--data-source real needs training images; give --data-dir with train/, one folder per class")
    fill_in(cfg, {"low_iterations": 0 if cfg.image_size <= SMALL_IMAGE else round(cfg.iterations * 2 / 3)})
    if not 0 <= cfg.low_iterations <= cfg.iterations:
        raise InputError(
            f"--low-iterations is {cfg.low_iterations}; give 0 to --iterations, {cfg.iterations}; both count from the start"
        )
    given, several = len(cfg.images or ()), cfg.task in ("evaluate", "transfer")
    if (several and not given) or (cfg.task == "synth" and given) or (not several and given > 1):
        raise InputError(
            f"--task is {cfg.task} and --images {cfg.images}; evaluate and transfer need some, synth none, others one"
        )
    if cfg.clipped_ste:
        raise InputError("--clipped-ste is set and MixMix's quantizers have the gradients of BRECQ and LSQ; leave it out")
    if cfg.capture == "compile":
        raise InputError("--capture compile would compile anew for every batch's networks; give auto, none or cudagraph")
    cfg.synthesis = {"capture": cfg.capture, "precision": cfg.precision}  # of the images that another task makes itself
    if cfg.task in ("ptq", "prune", "transfer"):
        cfg.capture, cfg.precision = "none", "fp32"
    elif cfg.capture == "auto" and pick_device(cfg.device).type == "cpu":
        cfg.capture = "none"
    mobile = cfg.arch.startswith("mobilenet_v2")
    fill_in(cfg, {"qat_lr": 1e-4 if mobile else 1e-3, "qat_weight_decay": 0.0 if mobile else 1e-4})
    fill_in(cfg, {"sparsity": 0.5 if cfg.prune == "unstructured" else 0.2})
    cfg.epochs, cfg.iters = math.ceil(cfg.count / cfg.batch_size), cfg.iterations  # what a Run reads: an epoch is a batch
    fill_in(cfg, {"targets": [*cfg.held_out, *cfg.zoo]})
    if cfg.task == "transfer" and not cfg.targets:
        raise InputError("--task transfer has no networks to quantize; give --targets")
    dafl = (0.5, 20.0, 0.1) if cfg.dataset == "cifar100" else (0.05, 5.0, 0.01)
    fill_in(cfg, dict(zip(("one_hot_weight", "information_weight", "activation_weight"), dafl)))
    if (cfg.task == "kd") != (cfg.student_arch is not None):
        raise InputError(f"--task is {cfg.task} and --student-arch {cfg.student_arch}; kd needs it, the others do not")
    if cfg.task == "kd":
        cfg.epochs, cfg.iters = cfg.kd_epochs, cfg.kd_iters
    if cfg.task == "qat":
        cfg.epochs = math.ceil(cfg.qat_steps / max(min(500, cfg.qat_steps // 20), 1))  # the rate decays by epochs
        cfg.iters = math.ceil(cfg.qat_steps / cfg.epochs)
    return cfg


def parse_args(argv=None):
    return _complete(parser().parse(argv))


def config(**settings):
    """Settings by flag name: config(dataset="folder", num_classes=5, image_size=32, zoo=["nets:a", "nets:b"])."""
    return _complete(parser().config(**settings))


def wait_for_all():
    """Return when all processes are here; when another has ended, which has said why, so does this one."""
    try:
        torch.distributed.barrier()
    except RuntimeError:
        sys.exit(2)


def main(argv=None):
    with friendly_errors("mixmix.py"):
        cfg = parse_args(argv)
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world > 1:
            if torch.cuda.is_available() and cfg.device in ("auto", "cuda"):
                cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        if cfg.eval is not None:
            return evaluate_file(cfg)
        if cfg.task == "evaluate":
            return evaluate(cfg)
        if cfg.task == "synth":
            return synthesize(cfg, rank, world, wait_for_all if world > 1 else lambda: None)
        if world > 1:
            raise InputError(f"--task {cfg.task} runs in one process and there are {world}; make the images with --task synth")
        if cfg.task == "transfer":
            return transfer(cfg)
        teacher, run = prepare(cfg, files=("images.npz", "grid.png", "batches", "parts", "images"))
        check_task(teacher, cfg)
        makes_its_own = cfg.task == "kd" and cfg.images is None and cfg.data_source in ("mixmix", "single")
        images = None if makes_its_own else find_images(cfg, run)
        return finish(run, teacher, compress(teacher, images, cfg, run), images, folded=cfg.task == "ptq")


if __name__ == "__main__":
    main()
