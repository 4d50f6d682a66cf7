"""Qimera: Data-free Quantization with Synthetic Boundary Supporting Samples (Choi et al., NeurIPS 2021).

A generator that gets class embeddings as its input is trained against the frozen full-precision network (the teacher), as
in GDFQ. With probability p a batch is made from superpositions of K class embeddings, with soft labels of the same shares:
such images lie near the teacher's decision boundaries, which images of single classes leave bare. The quantized network
(the student) is calibrated and then fine-tuned on both kinds.

    python qimera.py --arch resnet20 --dataset cifar100 --bits 4

Where the equations are:
    Latent                          x = G(z + E_y), and superposed with K embeddings    Eq. 5-8
    draw_classes                    lambda = Softmax(p), p ~ N(0, 1)                    Eq. 9
    common.ops.superposed_labels    y = sum_k lambda_k y_k                              Eq. 7, 8
    Latent.mapping                  disentanglement mapping M                           Sec. 4.3
    classifier                      extracted embedding initialization                  Sec. 4.4
    generator_loss, student_loss    L(G), L(Q) of GDFQ                                  Eq. 1, 3
    zaq_losses                      L(G), L(Q) of ZAQ with cross-entropy                Eq. 2, 4, 11, 12
    analyze                         distance ratio, intrusion score, PCA                Table 5, Figure 3

    what                       paper                        released code                     here
    batch, CIFAR / ImageNet    64 / 16                      200 / 16                          --variant, --batch-size
    student's rate             1e-4                         1e-4, on ImageNet 1e-6            --variant, --lr-q
    disentanglement mapping    to 64 (CIFAR), 100           off, by an inverted flag          --variant, --dm
    extracted initialization   always                       CIFAR-100 and ResNet-50 only      --variant, --eei
    noise                      one vector per sample,       one per slot, before the mapping  --variant, --noise
                               after the superposition
    embeddings with noise      as they are                  standardised: per sample, in      --variant, --normalise
                                                            superposed batches per slot
    conditional BatchNorm      sum over the embeddings      mean, so shrunk K times           --variant, --cbn
    reported accuracy          not said                     best epoch on test images         last (best beside it)

`--variant paper` is the default. The released scripts correspond to the published table's "+SE" and "+SE, EEI" cells; its
headline figures are the "+SE, DM, EEI" cells, which need the mapping. Both take GDFQ's losses as GDFQ's code has them.
K and p are those of the released run scripts; three bits, which they leave out, take the settings of four.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import InputError, first_line
from common.bns import BatchNormStatistics
from common.cli import Parser, checked_schedule, fill_in, friendly_errors, number, whole
from common.data import full_precision, load_test_set
from common.models import SMALL_IMAGE, input_channels, load_teacher, probe
from common.ops import superpose, superposed_labels, upsample_conv
from common.progress import Progress
from common.quant import describe, observe, quantize
from common.report import execute
from common.run import Run, pick_device, write_atomically
from common.trace import trace

BN_EPS = 0.8  # of the inner BatchNorms, in the released code and so in every published figure


class Latent(nn.Module):
    """The generator's input: class embeddings, mapped, superposed, with noise (Eq. 5-8).

    Args:
        num_classes: C.
        width: D, of an embedding.
        mapped: d, of what the disentanglement mapping makes of it; None leaves the mapping out.
        noise: "sample" adds one vector z ~ N(0, 1) to the superposition (Eq. 8), "slot" one to each embedding before it is
            mapped, as the released code does.
        normalise: standardise embeddings with noise, as the released code does; with it, "sample" adds its one vector to
            each embedding, before both.
    """

    def __init__(self, num_classes, width, mapped=None, noise="sample", normalise=False):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.mapping = nn.Linear(width, mapped) if mapped else nn.Identity()
        self.out_features = mapped or width
        self.noise, self.normalise = noise, normalise

    @property
    def slotwise(self):
        """Whether every embedding of a superposition is worked on by itself, as in the released code."""
        return self.noise == "slot" or self.normalise

    def draw(self, batch, k):
        """Noise z ~ N(0, 1) for a batch of superpositions of K embeddings."""
        device = self.embedding.weight.device
        if self.slotwise:
            return torch.randn(batch, k if self.noise == "slot" else 1, self.embedding.embedding_dim, device=device)
        return torch.randn(batch, self.out_features, device=device)

    def forward(self, classes, shares, superposed, z):
        """Latent vectors (B, d).

        Args:
            classes: (B, K) int64.
            shares: (B, K), lambda; a sample of one class has (1, 0, ..., 0).
            superposed: bool scalar tensor, whether the batch is one of superpositions.
            z: from `draw`, or anything that broadcasts to it.
        """
        table = self.embedding.weight
        if not self.slotwise:
            return superpose(superposed_labels(classes, shares, len(table)), self.mapping(table)) + z
        slots = self.embedding(classes) + z  # (B, K, D)
        if self.normalise:
            slots = torch.where(superposed, _standardise(slots, (0, 2)), _standardise(slots, 2))
        return (shares[:, :, None] * self.mapping(slots)).sum(1)


def _standardise(x, dims):
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


class Generator(nn.Module):
    """Generator for small images.

    Args:
        latent_dim: length of the latent vectors.
        image_size: side of the images, a multiple of 4.
        channels: of the images.
    """

    def __init__(self, latent_dim, image_size=32, channels=3):
        super().__init__()
        self.side = image_size // 4
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.bn0 = nn.BatchNorm2d(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(128, eps=BN_EPS)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(64, eps=BN_EPS)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, latent, soft):
        """Images (B, channels, size, size), standardised, for latent vectors (B, d); the labels are in them already."""
        x = self.linear(latent).view(-1, 128, self.side, self.side)
        x = F.leaky_relu(self.bn1(upsample_conv(self.bn0(x), self.conv1)), 0.2)
        x = F.leaky_relu(self.bn2(upsample_conv(x, self.conv2)), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose scale and shift are superposed by soft label."""

    def __init__(self, num_classes, channels, eps=1e-5):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gamma = nn.Embedding(num_classes, channels)
        self.beta = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x, soft):
        gamma, beta = superpose(soft, self.gamma.weight), superpose(soft, self.beta.weight)
        return gamma[:, :, None, None] * self.bn(x) + beta[:, :, None, None]


class ImageNetGenerator(nn.Module):
    """Generator for large images, with conditional BatchNorm at every scale (Sec. 5.1). Arguments as `Generator`."""

    def __init__(self, latent_dim, image_size=224, channels=3, num_classes=1000):
        super().__init__()
        self.side = image_size // 4
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.bn0 = ConditionalBatchNorm(num_classes, 128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn1 = ConditionalBatchNorm(num_classes, 128, BN_EPS)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.bn2 = ConditionalBatchNorm(num_classes, 64, BN_EPS)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, latent, soft):
        """Images for latent vectors (B, d) and soft labels (B, C)."""
        x = self.linear(latent).view(-1, 128, self.side, self.side)
        x = F.leaky_relu(self.bn1(upsample_conv(self.bn0(x, soft), self.conv1), soft), 0.2)
        x = F.leaky_relu(self.bn2(upsample_conv(x, self.conv2), soft), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))


class SuperposingGenerator(nn.Module):
    """Latent vectors and the network that turns them into images.

    Args:
        latent: a `Latent`.
        body: (latent vectors, soft labels) -> images.
        cbn: "sum" gives conditional BatchNorms the superposition of their rows, "mean" a K-th of it in superposed batches,
            as the released code does.
    """

    def __init__(self, latent, body, cbn="sum"):
        super().__init__()
        self.latent, self.body, self.cbn = latent, body, cbn

    def forward(self, classes, shares, superposed, z=None):
        """Images of superposed classes; arguments as `Latent.forward`, by default with noise of their own."""
        with torch.autocast(classes.device.type, enabled=False):
            z = self.latent.draw(*classes.shape) if z is None else z
            latent = self.latent(classes, shares, superposed, z)
            soft = superposed_labels(classes, shares, self.latent.embedding.num_embeddings)
            if self.cbn == "mean":
                soft = torch.where(superposed, soft / classes.shape[1], soft)
        return self.body(latent, soft)


def draw_classes(batch, cfg, device):
    """Classes (B, K), shares (B, K), and whether this batch is superposed: lambda = Softmax(N(0, 1)), Eq. 9, in a share p
    of the batches, else all of the first class. Drawn on the device, in shapes that do not depend on the outcome."""
    classes = torch.randint(cfg.num_classes, (batch, cfg.k), device=device)
    superposed = torch.rand((), device=device) < cfg.p
    shares = torch.where(superposed, torch.randn(batch, cfg.k, device=device).softmax(1), single(batch, cfg.k, device))
    return classes, shares, superposed


def single(batch, k, device):
    """Shares (B, K) of samples of one class."""
    return (torch.arange(k, device=device) == 0).float().expand(batch, k)


def classifier(model, example=None):
    """Name and weight (C, D) of the last linear layer of a network, a 1x1 convolution included (Sec. 4.4).

    Args:
        model: the network.
        example: a batch that it takes.

    Raises:
        InputError: the network's output does not come from such a layer.
    """
    advice = "embeddings cannot be extracted (--no-eei does without), nor its features analysed"
    try:
        graph = trace(model, example)
    except Exception:  # whatever the model's own forward raises when it is traced
        raise InputError(f"the last layer of the model cannot be found, since it cannot be traced; {advice}") from None
    modules, shaping = dict(graph.named_modules()), (torch.reshape, "reshape", torch.flatten, "flatten", "view")
    node = next(node for node in graph.graph.nodes if node.op == "output")
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        layer = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1):
            return node.target, layer.weight.detach().flatten(1)
        mixes = len(node.all_input_nodes) > 1 and node.target not in shaping
        if mixes or (layer is not None and any(True for _ in layer.parameters())):
            break
    what = f"is '{node.target}' ({type(layer).__name__})" if layer is not None else f"is computed by '{node.name}'"
    raise InputError(f"the last layer of the model {what}, expected a linear layer or a 1x1 convolution; {advice}")


def generator_loss(teacher_logits, soft, bns, bns_weight):
    """L(G) = L_CE + alpha * L_BNS, Eq. 1, with soft labels (B, C)."""
    return F.cross_entropy(teacher_logits, soft) + bns_weight * bns


def kd_loss(student_logits, teacher_logits, temperature, reduction):
    """L_KD: T^2 times the Kullback-Leibler divergence from teacher to student, both softened by T.

    Args:
        student_logits, teacher_logits: (B, C).
        temperature: T.
        reduction: "batchmean" divides by B, "mean" by B * C as the released code does.
    """
    teacher_log = F.log_softmax(teacher_logits / temperature, 1)
    student_log = F.log_softmax(student_logits / temperature, 1)
    divergence = (teacher_log.exp() * (teacher_log - student_log)).sum()
    count = teacher_logits.shape[0] if reduction == "batchmean" else teacher_logits.numel()
    return temperature**2 * divergence / count


def student_loss(student_logits, teacher_logits, soft, cfg):
    """L(Q) = L_CE + delta * L_KD, Eq. 3, with soft labels (B, C)."""
    kd = kd_loss(student_logits, teacher_logits, cfg.temperature, cfg.kd_reduction)
    return F.cross_entropy(student_logits, soft) + cfg.kd_weight * kd


class Features:
    """Hooks that keep what enters each BatchNorm2d of `model` in passes with gradients, by name: the feature maps that ZAQ
    compares."""

    def __init__(self, model):
        self.maps = {}
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        for name, layer in layers:
            layer.register_forward_pre_hook(partial(self._record, name))
        if not layers:
            raise InputError("the model has no BatchNorm2d, where --adversarial zaq takes its feature maps; leave the flag out")

    def _record(self, name, layer, args):
        if torch.is_grad_enabled():  # an evaluation's would take its memory
            self.maps[name] = args[0]


def feature_discrepancy(teacher_maps, student_maps):
    """ZAQ's distance of feature maps: mean over layers of the mean absolute difference of their channel relation maps, the
    cosines (B, c, c) between a layer's channels. Maps: dicts of (B, c, h, w) by layer."""
    distances = []
    for name, theirs in teacher_maps.items():
        relations = []
        for maps in (theirs, student_maps[name]):
            channels = F.normalize(maps.float().flatten(2), dim=2)
            relations.append(channels @ channels.transpose(1, 2))
        distances.append(F.l1_loss(*relations))
    return torch.stack(distances).mean()


def zaq_losses(teacher_logits, student_logits, teacher_maps, student_maps, soft, cfg):
    """L(G) and L(Q) of ZAQ with cross-entropy, Eq. 11 and 12: a generator that parts teacher and student, a student that
    follows. `teacher_maps`, `student_maps` as for `feature_discrepancy`; the last of them is the activation of L_a."""
    outputs = F.l1_loss(student_logits, teacher_logits)  # -L_o
    features = feature_discrepancy(teacher_maps, student_maps)  # -L_f
    activation = -list(teacher_maps.values())[-1].float().abs().mean()  # L_a: large activations, as real images have
    game = outputs + cfg.zaq_beta * features
    loss_g = -game + cfg.zaq_gamma * activation + cfg.zaq_rho * F.cross_entropy(teacher_logits, soft)  # Eq. 11
    loss_q = game + cfg.zaq_rho * F.cross_entropy(student_logits, soft)  # Eq. 12
    return loss_g, loss_q


def make_generator(teacher, cfg, channels, example=None):
    """The superposing generator that `cfg` describes, for a teacher; on the CPU."""
    weight = classifier(teacher, example)[1] if cfg.eei else None  # D is the width of the last linear layer (Sec. 5.1)
    if cfg.eei and len(weight) != cfg.num_classes:
        raise InputError(
            f"the last layer of the model has {len(weight)} rows, expected one for each of the {cfg.num_classes} classes; give "
            "--no-eei, which starts from random embeddings"
        )
    width = weight.shape[1] if cfg.eei else cfg.latent_dim or _width(teacher, example)
    latent = Latent(cfg.num_classes, width, cfg.mapped_dim if cfg.dm else None, cfg.noise, cfg.normalise)
    if cfg.eei:
        latent.embedding.weight.data.copy_(weight)
    if cfg.generator != "qimera":
        from autorecon import Generator as Discovered

        body = Discovered(discovered_genotype(cfg), cfg.num_classes, cfg.image_size, channels, latent.out_features)
    elif cfg.image_size <= SMALL_IMAGE:
        body = Generator(latent.out_features, cfg.image_size, channels)
    else:
        body = ImageNetGenerator(latent.out_features, cfg.image_size, channels, cfg.num_classes)
    return SuperposingGenerator(latent, body, cfg.cbn)


def discovered_genotype(cfg):
    """The genotype that --generator names; only this combination needs the other script."""
    try:
        from autorecon import read_genotype
    except ImportError:
        raise InputError(f"--generator {cfg.generator} needs autorecon.py; copy it beside qimera.py") from None
    return read_genotype(cfg.generator.removeprefix("autorecon:"), cfg.seed, "--generator autorecon:")


def _width(teacher, example):
    try:
        return classifier(teacher, example)[1].shape[1]
    except InputError:
        return 64


def compress(teacher, cfg, run=None):
    """Quantize a network without data.

    Args:
        teacher: a trained classifier with BatchNorm2d, (B, channels, image_size, image_size) -> (B, num_classes); it is
            copied and left as it is.
        cfg: from `config(...)`, or the command line.
        run: what surrounds the loop; by default nothing is written or shown.

    Returns:
        The quantized network, in eval mode.

    Raises:
        InputError: a teacher without BatchNorm, of another shape, with something that cannot be quantized, or without a
            last linear layer where embeddings are to be extracted from it.
    """
    run = run or Run(cfg)
    device, channels = run.device, input_channels(teacher)
    multiple = 4 if cfg.generator == "qimera" else 8
    if cfg.image_size % multiple:
        raise InputError(f"--image-size is {cfg.image_size}; the generator needs a multiple of {multiple}")
    teacher, example = run.adopt(teacher)
    student = quantize(teacher, cfg.wbits, cfg.abits, cfg.act_placement, cfg.clipped_ste, example)
    generator = run.place(make_generator(teacher, cfg, channels, example))
    stats = BatchNormStatistics(teacher) if cfg.adversarial == "none" else None
    maps = (Features(teacher).maps, Features(student).maps) if cfg.adversarial == "zaq" else None
    optim_g = torch.optim.Adam(generator.parameters(), cfg.lr_g, betas=(cfg.beta1, 0.999), fused=run.fused)
    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": cfg.weight_decay, "fused": run.fused}
    optim_q = torch.optim.SGD(student.parameters(), cfg.lr_q, **sgd)

    def synthesize(y):
        """Images of single classes, labels (B,)."""
        with run.autocast():
            classes, shares = y[:, None].expand(-1, cfg.k), single(len(y), cfg.k, device)
            return generator(classes, shares, torch.tensor(False, device=device)).float()

    def generator_step():
        classes, shares, superposed = draw_classes(cfg.batch_size, cfg, device)
        soft = superposed_labels(classes, shares, cfg.num_classes)  # Eq. 7, 8
        with run.autocast():
            x = generator(classes, shares, superposed).float()
            logits = teacher(x).float()
        if maps:
            with run.autocast():
                student_logits = student(x).float()
            loss = zaq_losses(logits, student_logits, *maps, soft, cfg)[0]
        else:
            bns = stats.loss(cfg.bns_form)
            loss = generator_loss(logits, soft, bns, cfg.bns_weight)
            run.log(bns=bns)
        run.update(optim_g, loss)
        run.log(loss_g=loss)
        return x.detach(), logits.detach(), soft

    def student_step(x, teacher_logits, soft):
        with run.autocast():
            logits = student(x).float()
        if maps:
            theirs = {name: features.detach() for name, features in maps[0].items()}
            loss = zaq_losses(teacher_logits, logits, theirs, maps[1], soft, cfg)[1]
        else:
            loss = student_loss(logits, teacher_logits, soft, cfg)
        run.update(optim_q, loss)
        run.log(loss_q=loss)

    def iteration(calibrating, tuning):
        batch = generator_step()
        if tuning:
            student_step(*batch)
        elif calibrating and not maps:  # ZAQ's generator has sent its images through the student already
            with torch.no_grad(), run.autocast():
                student(batch[0])
        for kept in maps or ():
            kept.clear()  # they would keep the graph of this iteration alive

    run.announce(describe(student))
    step = run.capture(iteration, optim_g, optim_q)
    tuned_from = cfg.calibrate_epochs if cfg.no_finetune else cfg.warmup_epochs
    calibrated_at = min(cfg.calibrate_epochs, tuned_from, cfg.epochs)
    parts = {"generator": generator, "optim_g": optim_g, "optim_q": optim_q}
    for epoch in run.epochs(cfg.epochs, student, synthesize, evaluate_from=tuned_from, **parts):
        decay = 0.1 ** sum(epoch >= start for start in cfg.decay_epochs)
        optim_g.param_groups[0]["lr"], optim_q.param_groups[0]["lr"] = cfg.lr_g * decay, cfg.lr_q * decay
        calibrating, tuning = epoch < cfg.calibrate_epochs, epoch >= tuned_from
        observe(student, calibrating)
        for _ in run.steps():
            step(calibrating, tuning)
        observe(student, False)
        if epoch + 1 == calibrated_at:
            run.measure("calibrated_top1", student)
    return student


@torch.no_grad()
def path_metrics(features, logits, pair):
    """Table 5's two figures of a path between two classes.

    Args:
        features: (..., N, F), what enters the teacher's last layer at N points from one end to the other.
        logits: (..., N, C) there.
        pair: the two classes.

    Returns:
        Distance ratio (length of the path over the distance of its ends, at least 1) and intrusion score (probability of
        all other classes, mean over the points), a tensor of shape (...) each.
    """
    steps = (features[..., 1:, :] - features[..., :-1, :]).norm(dim=-1).sum(-1)
    others = 1 - logits.softmax(-1)[..., list(pair)].sum(-1)
    return steps / (features[..., -1, :] - features[..., 0, :]).norm(dim=-1), others.mean(-1)


def load_generator(folder, arch):
    """The teacher and the trained generator of a run folder, in eval mode, and its arguments."""
    folder = Path(folder)
    try:
        arguments = json.loads((folder / "config.json").read_text())["arguments"]
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["stateful"]["generator"]
        saved = argparse.Namespace(**arguments)
        known, own = saved.method == "qimera", ":" in saved.arch
    except Exception:  # whatever damaged bytes raise
        raise InputError(f"--analyze {folder} is not a run folder with config.json and checkpoint.pt; give one") from None
    if not known:
        raise InputError(f"--analyze {folder} holds a run of {saved.method}.py; give one of qimera.py")
    if own and saved.arch != arch:
        raise InputError(f"--analyze {folder} is of an own architecture; give --arch {saved.arch}, if you trust that code")
    teacher = load_teacher(saved.arch, saved.dataset, saved.num_classes, saved.image_size, saved.weights)[0].eval()
    channels = input_channels(teacher)
    try:
        generator = make_generator(teacher, saved, channels, probe(teacher, saved.num_classes, saved.image_size))
        generator.load_state_dict(state)
    except (AttributeError, RuntimeError) as error:
        raise InputError(f"--analyze {folder} is a run of another version ({first_line(error)}); make it again") from None
    return teacher, generator.eval(), saved


@torch.no_grad()
@full_precision()
def analyze(cfg, points=101, most_pairs=450, shared=4, samples=2000):
    """Distance ratio and intrusion score (Table 5), and a PCA of the teacher's features (Figure 3), of a finished run.

    The paper leaves open where the noise comes from: the figures are given for z = 0 and for one z per path (mean over
    `shared`). The paths join all pairs of classes, or `most_pairs` drawn ones; K is 2. "mixup" mixes the pixels of the
    path's ends. The axes are those of the single-class images' features, the same for all points.

    Returns:
        The contents of analysis.json, which goes to the run's folder with projection.npz and, if matplotlib is there,
        analysis.png.
    """
    teacher, generator, saved = load_generator(cfg.analyze, cfg.arch)
    folder, count, latent, device = Path(cfg.analyze), saved.num_classes, generator.latent, pick_device(cfg.device)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--analyze {folder} cannot be written, and the analysis goes there; give a copy")
    what = (saved.dataset, cfg.data_dir or saved.data_dir, count, saved.image_size, (saved.mean, saved.std))
    test_set = load_test_set(*what, device, channels=input_channels(teacher))
    teacher.to(device)
    generator.to(device)
    torch.manual_seed(saved.seed)
    seen = {}
    layer = teacher.get_submodule(classifier(teacher, probe(teacher, count, saved.image_size))[0])
    hook = layer.register_forward_pre_hook(lambda _, args: seen.update(features=args[0].flatten(1)))

    def look(images):
        logits = teacher(images)
        return seen["features"].cpu(), logits.cpu()

    pairs = torch.combinations(torch.arange(count))
    if len(pairs) > most_pairs:
        pairs = pairs[torch.randperm(len(pairs))[:most_pairs]]
    along = torch.linspace(1, 0, points, device=device)
    shares = torch.stack([along, 1 - along], 1)
    yes, no = torch.tensor(True, device=device), torch.tensor(False, device=device)
    found = {"zero": [], "shared": [], "mixup": []}
    for pair in Progress(pairs.tolist(), desc="paths between classes", leave=False):
        classes = torch.tensor(pair, device=device).expand(points, 2)
        for z in [torch.zeros((), device=device)] + [latent.draw(1, 2) for _ in range(shared)]:
            images = generator(classes, shares, yes, z)
            found["shared" if z.ndim else "zero"].append(path_metrics(*look(images), pair))
            if not z.ndim:
                mixed = along.view(-1, 1, 1, 1) * images[0] + (1 - along).view(-1, 1, 1, 1) * images[-1]
                found["mixup"].append(path_metrics(*look(mixed), pair))
    result = {"pairs": len(pairs), "points": points, "shared_noise_vectors": shared}
    for name, values in found.items():
        ratio, intrusion = torch.tensor(values).mean(0).tolist()
        result[name] = {"distance_ratio": round(ratio, 4), "intrusion": round(intrusion, 6)}

    def features_of(classes, shares, superposed):
        parts = [a.to(device).split(250) for a in (classes, shares)]
        return torch.cat([look(generator(c, s, superposed))[0] for c, s in zip(*parts)]).numpy()

    labels = torch.arange(samples) % count
    clouds = {"single": features_of(labels[:, None].expand(-1, 2), single(samples, 2, "cpu"), no), "labels": labels.numpy()}
    drawn = torch.randint(count, (samples // 4, 2))
    clouds["superposed"] = features_of(drawn, torch.randn(len(drawn), 2).softmax(1), yes)
    if test_set:
        parts = [(look(images)[0], labels.cpu()) for images, labels in test_set]
        clouds["real"], clouds["real_labels"] = (torch.cat(part).numpy() for part in zip(*parts))
    hook.remove()
    centre = clouds["single"].mean(0)
    axes = np.linalg.svd(clouds["single"] - centre, full_matrices=False)[2][:2].T
    projected = {name: values if "labels" in name else (values - centre) @ axes for name, values in clouds.items()}
    np.savez_compressed(folder / "projection.npz", **projected)
    write_atomically(folder / "analysis.json", json.dumps(result, indent=1))
    print(f"{len(pairs)} pairs of classes, {points} points each" + f"{'distance ratio':>18}{'intrusion':>12}")
    for name, text in (("zero", "superposed, z = 0"), ("shared", "superposed, one z a path"), ("mixup", "pixels mixed, z = 0")):
        print(f"  {text:<34}{result[name]['distance_ratio']:>18.2f}{result[name]['intrusion']:>12.5f}")
    drawn = draw_clouds(projected, folder / "analysis.png")
    print(f"  in {folder}/: analysis.json, projection.npz" + (", analysis.png" if drawn else ""))
    return result


def draw_clouds(projected, path):
    """Figure 3 as a picture, if matplotlib is installed; whether it is."""
    try:
        import matplotlib
    except ImportError:
        print("  no picture: matplotlib is not installed; pip install matplotlib, then repeat")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in ("real", "single") if name in projected]
    figure, panels = plt.subplots(1, len(names), figsize=(6 * len(names), 5.5), sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names):
        labels = projected["real_labels" if name == "real" else "labels"]
        panel.scatter(*projected[name].T, c=labels, cmap="tab10" if labels.max() < 10 else "hsv", s=4)
        panel.set_title("test images" if name == "real" else "synthetic: single classes, superposed in black")
    panels[0][-1].scatter(*projected["superposed"].T, c="black", s=4)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


RUN_TABLE = {  # p and K at four and at five bits, and whether the released script extracts embeddings
    "cifar10": (0.4, 2, 2, False),
    "cifar100": (0.4, 10, 50, True),
    "resnet18": (0.4, 500, 100, False),
    "resnet50": (0.7, 500, 100, True),
    "mobilenet_v2": (0.4, 100, 100, False),
}


def parser():
    p = Parser("qimera", __doc__.split("\n\n")[0])
    add = p.add_argument_group("Qimera").add_argument
    add("--variant", choices=("paper", "released"), default="paper", help="see the table at the top of qimera.py")
    add("--epochs", type=whole(1), default=400, help="epochs, warm-up included")
    add("--iters", type=whole(1), default=200, help="iterations per epoch")
    add("--k", type=whole(1, 10**6), help="embeddings in a superposition (default: CIFAR-10 2, CIFAR-100 10, ImageNet by network and bits)")
    add("--p", type=number(0, 1), help="share of superposed batches (default: 0.4, ResNet-50 0.7)")
    group = p.add_argument_group("Qimera, defaults by data set")
    p.add_by_size(group, "--warmup-epochs", 4, 50, "first epochs, in which only the generator learns", type=whole(0, 10**6))
    p.add_by_size(group, "--mapped-dim", 64, 100, "d of the disentanglement mapping (Sec. 5.1)", type=whole(1, 10**6))
    add("--batch-size", type=whole(1), help="images per iteration (default: paper CIFAR 64, ImageNet 16; released 200, 16)")
    add("--lr-q", type=number(0), help="learning rate of the student (default: 1e-4; released, ImageNet 1e-6)")
    add("--calibrate-epochs", type=whole(1, 10**6), default=4, help="first epochs, in which activation ranges follow the images")
    add("--lr-g", type=number(0), default=1e-3, help="learning rate of the generator (Adam)")
    add("--beta1", type=number(0, 0.9999), default=0.5, help="of the generator's Adam")
    add("--weight-decay", type=number(0), default=1e-4, help="of the student")
    decay = "epochs at which both learning rates fall to a tenth"
    add("--decay-epochs", type=whole(0), nargs="*", default=[100, 200, 300], help=decay)
    add("--latent-dim", type=whole(1, 10**6), help="D without extracted embeddings (default: width of the last linear layer)")
    add("--bns-weight", type=number(0), default=0.1, help="alpha of Eq. 1")
    add("--bns-form", choices=BatchNormStatistics.forms, default="gdfq", help="form of L_BNS")
    add("--kd-weight", type=number(0), default=1.0, help="delta of Eq. 3")
    add("--temperature", type=number(1e-3, 1e6), default=20.0, help="T of the distillation loss")
    add("--kd-reduction", choices=("mean", "batchmean"), default="mean", help="of L_KD; mean divides by the classes too")
    add = p.add_argument_group("where paper and released code differ").add_argument
    switch = {"action": argparse.BooleanOptionalAction}
    add("--dm", **switch, help="disentanglement mapping (default: paper on, released off)")
    add("--eei", **switch, help="embeddings start as the last layer's weights (default: on; released by network)")
    add("--noise", choices=("sample", "slot"), help="one noise vector per what (default: paper sample, released slot)")
    add("--normalise", **switch, help="standardise embeddings with noise (default: paper off, released on)")
    add("--cbn", choices=("sum", "mean"), help="of conditional BatchNorm rows (default: paper sum, released mean)")
    add = p.add_argument_group("ablations and combinations").add_argument
    add("--no-se", action="store_true", help="no superposed embeddings: every batch of single classes")
    add("--no-finetune", action="store_true", help="calibrate the activation ranges only")
    discovered = "qimera, or autorecon:GENOTYPE, one that autorecon.py --genotype takes or a search has left (Table 3)"
    add("--generator", default="qimera", help=discovered)
    add("--adversarial", choices=("none", "zaq"), default="none", help="play ZAQ's game (Table 3, Eq. 11 and 12)")
    add("--zaq-beta", type=number(0, 1e6), default=0.1, help="beta of Eq. 11 and 12, not given in the paper")
    add("--zaq-gamma", type=number(0, 1e6), default=0.05, help="gamma of Eq. 11, not given in the paper")
    add("--zaq-rho", type=number(0, 1e6), default=0.1, help="rho of Eq. 11 and 12")
    add("--analyze", metavar="RUN", help="only analyse this run folder's generator: Table 5 and Figure 3")
    p.without_effect("--no-se", "--k", "--p")
    p.without_effect("--no-dm", "--mapped-dim")
    p.without_effect("--adversarial zaq", "--bns-weight", "--bns-form", "--kd-weight", "--temperature", "--kd-reduction")
    p.without_effect("--adversarial none", "--zaq-beta", "--zaq-gamma", "--zaq-rho")
    p.without_effect("--no-finetune", "--lr-q", "--weight-decay", "--kd-weight", "--temperature", "--kd-reduction")
    return p


def _complete(cfg):
    paper, large = cfg.variant == "paper", cfg.image_size > SMALL_IMAGE
    p, k_four, k_five, released_eei = RUN_TABLE.get(cfg.arch if large else cfg.dataset, (0.4, 2, 2, False))
    defaults = {
        "batch_size": 16 if large else 64 if paper else 200,
        "lr_q": 1e-4 if paper or not large else 1e-6,
        "dm": paper,
        "eei": paper or released_eei,
        "noise": "sample" if paper else "slot",
        "normalise": not paper,
        "cbn": "sum" if paper else "mean",
        "k": min(k_five if cfg.wbits >= 5 else k_four, cfg.num_classes),
        "p": p,
    }
    fill_in(cfg, defaults)
    if cfg.eei and cfg.latent_dim is not None:
        raise InputError(f"--latent-dim is {cfg.latent_dim}, and extracted embeddings have their own; give --no-eei with it")
    if not 1 <= cfg.k <= cfg.num_classes:
        raise InputError(f"--k is {cfg.k} and there are {cfg.num_classes} classes; give 1 to {cfg.num_classes}")
    if not 0 <= cfg.p <= 1:
        raise InputError(f"--p is {cfg.p}; give a share of the batches, 0 to 1")
    if cfg.no_se:
        cfg.k, cfg.p = 1, 0.0
    if cfg.generator != "qimera":
        source, _, name = cfg.generator.partition(":")
        if source != "autorecon" or name in ("", "acgan", "gdfq", "search"):
            raise InputError(f"--generator is {cfg.generator}; give qimera or autorecon:GENOTYPE, such as a run folder")
        discovered_genotype(cfg)  # an unusable one is told before anything is loaded
    return checked_schedule(cfg)


def parse_args(argv=None):
    return _complete(parser().parse(argv))


def config(**settings):
    """Settings for `compress` by flag name: config(dataset="folder", num_classes=5, image_size=32, bits=4, no_dm=True)."""
    return _complete(parser().config(**settings))


def main(argv=None):
    with friendly_errors("qimera.py"):
        given = parser().parse(argv)
        return execute(_complete(given), compress) if given.analyze is None else analyze(given)


if __name__ == "__main__":
    main()
