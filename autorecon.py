"""AutoReCon: Neural Architecture Search-based Reconstruction for Data-free Compression (Zhu et al., IJCAI 2021).

Which generator reconstructs the lost data best? Stage 1 searches its architecture: a super net that mixes all candidate
operations on every edge is trained against the frozen full-precision network (the teacher), its weights and its architecture
parameters in turn. Stage 2 compresses the teacher with the discovered generator, under GDFQ's settings.

    python autorecon.py --arch resnet20 --dataset cifar100 --bits 4

Where the equations are:
    EDGES, CANDIDATES            macro-architecture and search space                  Figure 2, Table 1
    Operation                    up-sampling, conditional BatchNorm, convolution      Table 1
    Generator                    nodes as sums of edges, edges as sums of operations  Eq. 3, 8
    Architecture.probabilities   p = softmax(alpha)                                   Eq. 4
    Architecture.sample          each edge drawn by itself                            Eq. 5
    Architecture.gumbel_softmax  m = softmax((p + g) / tau), g ~ Gumbel(0, 1)         Eq. 7
    reconstruction_loss          L_r = L_class + weight * L_bns                       Eq. 1
    search                       weights and architecture alternately                 Eq. 2, 6; Algorithm 1, lines 1-8
    derive                       the likeliest operation of every edge                end of stage 1
    compress                     stage 2: quantization, or distillation (--task kd)   Algorithm 1, lines 9-13

The search was never released. The authors of AIT published architectures that it found (common/genotypes.py) and the
generators built from them, which show the macro-architecture exactly. The paper leaves these settings open:

    what                  here                                                                      taken from
    L1, T1, V1            25 epochs: 200 batches for weights, 200 for alpha                         AdversarialNAS, GDFQ
    tau                   falls exponentially from 5 to 0.1                                         AdversarialNAS
    alpha                 starts as 1e-3 N(0, 1); Adam, rate 3e-4, beta1 0.5, weight decay 1e-4     AdversarialNAS
    super net's weights   Adam, rate 1e-3, beta1 0.5, as the generator's                            GDFQ
    scale s (Table 3)     64 s channels; the published networks, all of 64, count as s = 1          chosen here
    BatchNorms            eps 0.8, the images' own 1e-5                                             published networks
    before convolutions   conditional BatchNorm and LeakyReLU                                       published networks
    up- and cross-edges   a 1x1 convolution after the interpolation                                 published networks
    batch of the search   200, on ImageNet 16 (--batch-size)                                        GDFQ
    generator alone       4 epochs of stage 2, on ImageNet 50                                       GDFQ
    activation ranges     plain moving average over the first four epochs                           GDFQ, without feedback
    Table 4's settings    500 epochs of 50 batches of 256, student's rate 0.1 and weight decay      DFAD's CIFAR script
                          5e-4, five student steps, L1 of the logits
      learning-rate decay at epochs 100 and 200                                                     DFAD, if a flag asks for it
      student's steps     after the generator's, the first on its images                            DFAD: before it, all
                                                                                                    on fresh images
      latent vector       100 entries (--latent-dim)                                                GDFQ (DFAD: 256)
      generator's beta1   0.5 (--beta1)                                                             GDFQ (DFAD: 0.9)
    precision             --precision; auto is bf16 where the hardware has it                       chosen here
    reported accuracy     last epoch (best also recorded)                                           chosen here

The paper gives these settings:

    what                  paper                                 here
    discovered generator  sampled from p (Sec. 3.2)             argmax of p, as in AdversarialNAS; a node that would get
                                                                nothing takes its likeliest operation
    L_r                   L_class + L_bns (Eq. 1)               weight of L_bns 0.1 (--bns-weight), as in GDFQ
    generator in stage 2  fixed (Algorithm 1), trained before   initialised again and trained along with the student,
                          (Figure 1)                            as in GDFQ, whose settings the paper takes
    L_KD                  as in GDFQ                            temperature 20
    Table 4's networks    ResNet-34 into ResNet-18              --arch, --student-arch
    teachers, top-1 in %
      of ImageNet         ResNet-18 71.47, ResNet-50 77.72,     torchvision's: 69.76, 76.13, 71.88; --weights
                          MobileNetV2 73.03
      of CIFAR-100        ResNet-18 78.83, ResNet-50 79.36,     no public source; MobileNetV2 with 74.20: chenyaofo's
                          MobileNetV2 70.72
      ResNet-20           as AIT has it: CIFAR-10 93.89,        CIFAR-10: bundled, 92.41; CIFAR-100: pytorchcv's, as in AIT
                          CIFAR-100 70.33

The cell and the Gumbel noise on p are those of AdversarialNAS (Gao et al., CVPR 2020). Table 3 scales a found architecture:
`--genotype RUN --scale 2`; in a search, --scale is also that of the super net. The published generators need 4.5 to 5.3
times the FLOPs of GDFQ's (CIFAR 1.0 to 1.2 against 0.23 G, ImageNet 51 to 57 against 11), although the paper claims fewer.
Published accuracies of stage 2 were presumably made with GDFQ's released losses (`--variant released`, the default).

Controls for `--genotype`: `random`; `gdfq`, GDFQ's generator; and `gdfq-cbn`, the same with the label in conditional
BatchNorms, because the published generators differ from GDFQ's in that, too (above 64 pixels GDFQ's has them itself, and the
two are the same). `--generator-loss dfad` is Table 4's baseline.

`--gumbel logits` and `--search-mode hard` extend the search (see `Architecture`). With both and `--lr-alpha 3e-2` a search
decides in 5,000 batches of 16 on CIFAR-10; in hard mode with the paper's noise on p, 1,500 batches left almost every edge
open, and the paper's soft search has not been measured. The generator that was found costs as much as GDFQ's; at 3 and 4
bits in the short schedule it is no better than random draws, and at 3 bits GDFQ's is better than both (docs/MEASUREMENTS.md).
`--schedule short` (SHORT) takes minutes: with the published generator of CIFAR-10's ResNet-20 instead of a search, and
other weights of the losses.
"""

import copy
import json
import math
from collections import defaultdict, namedtuple
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError, finetune, genotypes
from common.bns import BatchNormStatistics
from common.check import describe
from common.cli import Parser, altered, check_image_size, checked_schedule, friendly_errors, number, whole
from common.device import pick_device
from common.generators import HumanDesigned
from common.images import RealImages
from common.models import SMALL_IMAGE, build_student
from common.ops import count_flops, kd_loss, plain_forms, superpose, weighted_operation
from common.probe import input_channels
from common.quant import quantize
from common.report import execute
from common.run import Run, write_atomically

BN_EPS = 0.8  # of all BatchNorms but that of the images, in all published generators


# ---------------------------------------------------------------------------------------------- search space, Figure 2

Edge = namedtuple("Edge", "source target kind")
CANDIDATES = {  # Table 1
    "up": ("nearest", "bilinear"),
    "normal": ("none", "identity", "conv1x1", "conv3x3", "conv5x5", "dilated3x3", "dilated5x5"),
    "cross": ("none", "nearest", "bilinear"),
}


def _macro_architecture():
    """The edges of Figure 2 by name, in the order in which they are evaluated."""
    edges = []
    for block in (1, 2, 3):
        edges += [(block, 1, block, target, "up") for target in (2, 3)]
        for target in (4, 5):
            edges += [(block, source, block, target, "normal") for source in range(2, target)]
            edges += [(block - 1, source, block, target, "cross") for source in (2, 3, 4) if block > 1]
    edges = [Edge(f"B{a}-N{i}", f"B{b}-N{j}", kind) for a, i, b, j, kind in edges]
    return {f"{edge.source} -> {edge.target}": edge for edge in edges}


EDGES = _macro_architecture()  # 6 up, 15 normal, 12 cross
INTO = {edge.target: [name for name, other in EDGES.items() if other.target == edge.target] for edge in EDGES.values()}


# ------------------------------------------------------------------------------------------------------------ generator


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose scale and shift are looked up by label."""

    def __init__(self, num_classes, channels, eps=BN_EPS):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gamma = nn.Embedding(num_classes, channels)
        self.beta = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def affine(self, x, y):
        """The labels' scale and shift of x, which is normalised already: `weighted_operation` normalises a node once for all
        operations."""
        rows = (superpose(y, t.weight) if y.is_floating_point() else t(y) for t in (self.beta, self.gamma))
        beta, gamma = (row.to(x.dtype)[:, :, None, None] for row in rows)
        return torch.addcmul(beta, gamma, x)

    def forward(self, x, y):
        """x (B, channels, H, W) for labels y, (B,) int64 or soft (B, C)."""
        return self.affine(self.bn(x), y)


class Operation(nn.Module):
    """A candidate operation of Table 1 that has parameters; `weighted_operation` computes the same in a faster order."""

    def __init__(self, name, num_classes, width):
        super().__init__()
        size = int(name[-1]) if name[-1].isdigit() else 1
        dilation = 2 if name.startswith("dilated") else 1
        self.upsampling = name if name in ("nearest", "bilinear") else None
        self.norm = ConditionalBatchNorm(num_classes, width)
        self.conv = nn.Conv2d(width, width, size, padding=dilation * (size // 2), dilation=dilation)

    def forward(self, x, y):
        """x (B, width, H, W), or twice as high and wide, for labels y as `Generator.forward` has them."""
        if self.upsampling:
            x = F.interpolate(x, scale_factor=2, mode=self.upsampling)
        return self.conv(F.leaky_relu(self.norm(x, y), 0.2))


class Generator(nn.Module):
    """The generator of Figure 2: three blocks of five nodes, each doubling the resolution; nodes are sums of their edges.

    Args:
        genotype: dict of edge -> operation, as `read_genotype` returns it; None for the super net with all candidates.
        num_classes: number of labels.
        image_size: side of the images, a multiple of 8.
        channels: of the images.
        latent_dim: length of the noise vector, of which each block gets a third.
        width: channels of all nodes.
    """

    def __init__(self, genotype, num_classes, image_size=32, channels=3, latent_dim=100, width=64):
        super().__init__()
        self.genotype, self.width, self.side = genotype, width, image_size // 8
        self.slices = (latent_dim // 3, latent_dim // 3, latent_dim - 2 * (latent_dim // 3))
        areas = ((self.side * 2**block) ** 2 for block in range(3))
        self.linears = nn.ModuleList(nn.Linear(length, width * area) for length, area in zip(self.slices, areas))
        self.operations = nn.ModuleDict()
        for name, edge in EDGES.items():
            present = CANDIDATES[edge.kind] if genotype is None else (genotype[name],)
            with_parameters = [op for op in present if op not in ("none", "identity")]
            self.operations[name] = nn.ModuleDict({op: Operation(op, num_classes, width) for op in with_parameters})
        self.norm = ConditionalBatchNorm(num_classes, width)
        self.conv = nn.Conv2d(width, channels, 3, padding=1)
        self.standardise = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z, y, mixture=None):
        """Images (B, channels, size, size), standardised.

        Args:
            z: noise (B, latent_dim).
            y: labels, (B,) int64 or soft (B, C).
            mixture: for the super net, dict of edge -> {operation: weight, a scalar tensor}; operations that are not in
                it are not evaluated.
        """
        mixture = mixture or {name: {op: None} for name, op in self.genotype.items()}  # one operation an edge, unweighted
        values, normalised, above = {}, defaultdict(dict), 0

        def outputs(name):
            """What an edge sends: m_j O_j(x) of each of its operations, Eq. 8."""
            source = EDGES[name].source
            for op, m in mixture[name].items():
                if op == "identity":
                    yield values[source] if m is None else m * values[source]
                elif op != "none":
                    yield weighted_operation(self.operations[name][op], values[source], y, m, normalised[source])

        for block, linear, part in zip((1, 2, 3), self.linears, z.split(self.slices, 1)):
            side = self.side * 2 ** (block - 1)
            start = linear(part).view(-1, self.width, side, side)
            values[f"B{block}-N1"] = start.contiguous(memory_format=torch.channels_last) + above
            for node in (f"B{block}-N{i}" for i in (2, 3, 4, 5)):
                received = [output for name in INTO[node] for output in outputs(name)]
                values[node] = sum(received) if received else z.new_zeros(len(z), self.width, 2 * side, 2 * side)
            above = values[node]  # N5 of a block is N1 of the next
        return self.standardise(torch.tanh(self.conv(F.leaky_relu(self.norm(above, y), 0.2))))


CONTROLS = ("gdfq", "gdfq-cbn")  # GDFQ's layers; the label in an embedding (ACGAN), or in BatchNorms (SN-GAN), Sec. 4.1


def build_generator(genotype, cfg, channels):
    """The generator of a genotype (None for the super net) or of a control, of the sizes that `cfg` says."""
    sizes, width = (cfg.image_size, channels, cfg.latent_dim), round(64 * cfg.scale)
    if genotype == "gdfq-cbn" or (genotype == "gdfq" and cfg.image_size > SMALL_IMAGE):
        return HumanDesigned(*sizes, 2 * width, norm=partial(ConditionalBatchNorm, cfg.num_classes))
    if genotype == "gdfq":
        return HumanDesigned(*sizes, 2 * width, cfg.num_classes)
    return Generator(genotype, cfg.num_classes, *sizes, width)


def make_generator(teacher, cfg, channels, example=None):
    """The generator of a run, whose folder has its genotype; on the CPU."""
    genotype = cfg.genotype if cfg.genotype in CONTROLS else genotypes.read(cfg.out, EDGES, CANDIDATES, "--analyze")
    return build_generator(genotype, cfg, channels)


def sample(generator, y, cfg):
    """Images of labels y (B,), with fresh noise."""
    return generator(torch.randn(len(y), cfg.latent_dim, device=y.device), y)


# ------------------------------------------------------------------------------------------------- stage 1: the search


def by_edge(tables):
    """Alpha, or what is made of it, is a table (edges of that kind, ...) for each kind of edge: this gives every edge its row,
    as a dict of edge -> row."""
    rows = {kind: iter(table) for kind, table in tables.items()}
    return {name: next(rows[edge.kind]) for name, edge in EDGES.items()}


class Architecture(nn.Module):
    """The architecture parameters alpha of every edge, and the mixtures drawn by them.

    Args:
        gumbel: "p" adds the noise to the probabilities (Eq. 7). These lie in 0 to 1, so that it never commits: even an edge
            with p = 1 for one of seven operations samples it in 31 % of the cases. "logits", an extension, adds it to their
            logarithms, which samples an operation with probability p.
        hard: an extension: mixtures hold the sampled operation of each edge only, with the weight m_j / m_j.detach().
    """

    def __init__(self, gumbel="p", hard=False):
        super().__init__()
        self.gumbel, self.hard = gumbel, hard
        counts = {kind: sum(edge.kind == kind for edge in EDGES.values()) for kind in CANDIDATES}
        self.alpha = nn.ParameterDict({k: 1e-3 * torch.randn(counts[k], len(ops)) for k, ops in CANDIDATES.items()})
        self.register_buffer("temperature", torch.tensor(1.0))  # a tensor, so that a captured step follows it

    @torch.no_grad()
    def probabilities(self):
        """p of every edge: dict of edge -> (F,), on the CPU."""
        return by_edge({kind: self.alpha[kind].softmax(1).cpu() for kind in CANDIDATES})  # Eq. 4

    def gumbel_softmax(self, alpha):
        """m (edges, F) from alpha (edges, F), with fresh noise."""
        scores = alpha.softmax(1) if self.gumbel == "p" else alpha.log_softmax(1)
        g = -torch.empty_like(scores).exponential_().log()  # Gumbel(0, 1)
        return ((scores + g) / self.temperature).softmax(1)  # Eq. 7

    def sample(self):
        """A mixture for `Generator.forward`: dict of edge -> {operation: m_j, a scalar tensor}."""
        tables = {kind: self.gumbel_softmax(self.alpha[kind]) for kind in CANDIDATES}
        mixture = {name: dict(zip(CANDIDATES[EDGES[name].kind], m)) for name, m in by_edge(tables).items()}
        if self.hard:
            largest = by_edge({kind: m.argmax(1).tolist() for kind, m in tables.items()})  # waits for the device
            for name, index in largest.items():
                op = CANDIDATES[EDGES[name].kind][index]
                mixture[name] = {op: mixture[name][op] / mixture[name][op].detach()}
        return mixture


def reconstruction_loss(teacher_logits, y, bns, bns_weight):
    """L_r = L_class + bns_weight * L_bns, Eq. 1 (without the factor): images of class y with the statistics the teacher knows.
    Logits (B, C), labels (B,)."""
    return F.cross_entropy(teacher_logits, y) + bns_weight * bns


def reconstruct(synthesize, teacher, stats, cfg, run):
    """One batch of either stage: images x, the teacher's logits, labels y, L_bns and L_r, all with their graph."""
    y = torch.randint(cfg.num_classes, (cfg.batch_size,), device=run.device)
    x = synthesize(y)
    logits, bns = run.compute(teacher, x), stats.loss(cfg.bns_form)
    return x, logits, y, bns, reconstruction_loss(logits, y, bns, cfg.bns_weight)


def search(teacher, cfg, folder=None):
    """Stage 1: the generator's architecture; weights and architecture parameters train alternately (Algorithm 1, lines 1-8).

    Both sides see fresh noise and labels: there is no data to be split. Neither looks ahead to the other (first order).

    Args:
        teacher: as for `compress`.
        cfg: from `config(...)`, or the command line.
        folder: where the search keeps its checkpoint and metrics, to go on from; None for nowhere.

    Returns:
        The genotype, dict of edge -> operation, and how many seconds the steps took.
    """
    hard = cfg.search_mode == "hard"
    graphed = not hard and cfg.capture != "none" and pick_device(cfg.device).type == "cuda"  # hard mode's path needs the host
    capture, iters = "cudagraph" if graphed else "none", cfg.search_iters + cfg.arch_iters
    run = Run(altered(cfg, epochs=cfg.search_epochs, iters=iters, capture=capture), folder)
    teacher, _ = run.adopt(teacher)
    supernet = run.place(build_generator(None, cfg, input_channels(teacher)))
    architecture = Architecture(cfg.gumbel, hard).to(run.device)
    stats = BatchNormStatistics(teacher)
    optim_w = torch.optim.Adam(supernet.parameters(), cfg.lr_g, betas=(cfg.beta1, 0.999), fused=run.fused)
    adam = {"betas": (0.5, 0.999), "weight_decay": 1e-4, "fused": run.fused}
    optim_a = torch.optim.Adam(architecture.parameters(), cfg.lr_alpha, **adam)

    def synthesize(y):
        mixture = architecture.sample()
        return run.compute(supernet, torch.randn(len(y), cfg.latent_dim, device=run.device), y, mixture)

    def turn(optimizer, name):
        *_, bns, loss = reconstruct(synthesize, teacher, stats, cfg, run)
        run.update(optimizer, loss)
        run.log(**{f"loss_{name}": loss, f"bns_{name}": bns})

    run.rates = "--lr-g or --lr-alpha"
    how = "as CUDA graphs" if capture == "cudagraph" else "step by step"
    run.announce(f"searching a generator: {cfg.search_mode} mixtures of {len(EDGES)} edges, {how}")
    weight_step = run.capture(lambda: turn(optim_w, "weights"), optim_w)  # the inner problem of Eq. 2 and 6
    architecture_step = run.capture(lambda: turn(optim_a, "architecture"), optim_a)  # the outer one
    parts = {"architecture": architecture, "optim_w": optim_w, "optim_a": optim_a}
    for epoch in run.epochs(cfg.search_epochs, supernet, synthesize, **parts):
        architecture.temperature.fill_(cfg.tau_start * (cfg.tau_end / cfg.tau_start) ** (epoch / cfg.search_epochs))
        for index in run.steps():
            (weight_step if index < cfg.search_iters else architecture_step)()
        p = architecture.probabilities()
        entropies = {name: torch.special.entr(v).sum().item() / math.log(len(v)) for name, v in p.items()}  # 1: undecided
        run.note(entropy=sum(entropies.values()) / len(entropies), entropy_of_edges=entropies)
    return derive(architecture.probabilities()), run.seconds


def derive(probabilities):
    """The discrete architecture: every edge's likeliest operation; a node that would get nothing is fed by the operation,
    other than none, that is likeliest among all of its edges.

    Args:
        probabilities: dict of edge -> (F,) in the order of CANDIDATES.
    """
    genotype = {name: CANDIDATES[EDGES[name].kind][p.argmax()] for name, p in probabilities.items()}
    for names in INTO.values():
        if all(genotype[name] == "none" for name in names):
            best = max(names, key=lambda name: probabilities[name][1:].max())
            genotype[best] = CANDIDATES[EDGES[best].kind][1 + probabilities[best][1:].argmax()]
    return genotype


# ----------------------------------------------------------------------------------------------- stage 2: compression


def compression_loss(student_logits, teacher_logits, y, cfg):
    """L_c: cross-entropy and distillation for quantization; for distillation alone the mean absolute difference of the
    logits, as in DFAD. There the generator maximises it, which Table 4 replaces by L_r. Logits (B, C), labels (B,)."""
    if cfg.task == "kd":
        return F.l1_loss(student_logits, teacher_logits)
    kd = kd_loss(student_logits, teacher_logits, cfg.temperature, cfg.kd_reduction)
    return F.cross_entropy(student_logits, y) + cfg.kd_weight * kd


def compress(teacher, cfg, run=None):
    """Quantize a network, or distil it into another (--task kd), without data.

    Args:
        teacher: a trained classifier with BatchNorm2d, (B, channels, image_size, image_size) -> (B, num_classes); it is
            copied and left as it is.
        cfg: from `config(...)`, or the command line.
        run: a `Run`, which handles device, files and progress; by default nothing is written or shown.

    Returns:
        The quantized network, or the student, in eval mode.

    Raises:
        InputError: a teacher without BatchNorm, of another shape, or with something that cannot be quantized; a student or
            an image size that does not fit.
    """
    run = run or Run(cfg)
    device, distilling = run.device, cfg.task == "kd"
    teacher, example = run.adopt(teacher)
    if distilling:
        student = run.adopt_student(build_student(cfg.student_arch, teacher, cfg.num_classes, cfg.image_size), example)
        run.record(student="distilled")
    else:
        student = quantize(teacher, cfg.wbits, cfg.abits, cfg.act_placement, cfg.clipped_ste, example)
        student = finetune.set_ranges(student, cfg.act_ranges)  # as MatchedFeatures and `mixed`, beyond the paper, if asked to
    real = cfg.data_source == "real"  # training images take the generator's place; nothing is searched or trained there
    BatchNormStatistics(copy.deepcopy(teacher))  # refuses a network without BatchNorm before anything is written
    genotype = None if real else find_genotype(teacher, cfg, run)
    torch.manual_seed(cfg.seed)  # stage 2 draws the same numbers whether the genotype was searched or given
    features = finetune.MatchedFeatures(teacher, student, cfg.feature_weight)
    # for images that need no BatchNorm statistics: copied with the hooks of `features`, and before `stats` adds its own
    unwatched = copy.deepcopy(teacher) if cfg.student_steps > 1 else None
    stats = BatchNormStatistics(teacher)
    generator = RealImages(run) if real else run.place(build_generator(genotype, cfg, input_channels(teacher)))
    optim_g = finetune.generator_optimizer(generator, cfg, run.fused)
    sgd = {"momentum": 0.9, "nesterov": not distilling}
    optim_q = finetune.student_optimizer(student, cfg.optimizer, cfg.lr_q, cfg.weight_decay, run.fused, **sgd)

    def synthesize(y):
        return run.compute(sample, generator, y, cfg)

    def generator_step():
        x, logits, y, bns, loss = reconstruct(synthesize, teacher, stats, cfg, run)
        if cfg.generator_loss == "dfad":
            loss = -compression_loss(run.compute(student, x), logits, y, cfg)
        if not real:
            run.update(optim_g, loss)
            run.log(loss_g=loss, bns=bns)
        return x.detach(), logits.detach(), y

    def student_step(x, teacher_logits, y):
        x, teacher_logits, y = finetune.mixed(run, teacher, x, teacher_logits, y)
        loss = features.added_to(compression_loss(run.compute(student, x), teacher_logits, y, cfg))
        run.update(optim_q, loss)
        run.log(loss_q=loss)

    def fresh_batch():
        y = torch.randint(cfg.num_classes, (cfg.batch_size,), device=device)
        with torch.no_grad():
            x = synthesize(y)
        return x, run.compute(unwatched, x), y

    def iteration(calibrating, tuning):
        batch = generator_step()
        if tuning:
            student_step(*batch)
            for _ in range(cfg.student_steps - 1):
                student_step(*fresh_batch())
        elif calibrating:
            with torch.no_grad(), run.autocast():
                student(batch[0])

    run.announce(f"distilling into {cfg.student_arch}" if distilling else describe(student))
    step = run.capture(iteration, optim_g, optim_q)
    # the first --calibrate-epochs are calibrating, those after the first --warmup-epochs tuning
    for calibrating, tuning in finetune.phases(run, student, generator, synthesize, optim_g, optim_q):
        student.train(distilling)  # a quantized network keeps the BatchNorm statistics it has
        for _ in run.steps():
            step(calibrating, tuning)
    return finetune.keep_ranges(student)


# ---------------------------------------------------------------------------------------------------------- genotypes


def read_genotype(name, seed=0, flag="--genotype"):
    """The genotype that a flag stands for: "random" by `seed`, CONTROLS as they are, all else as `common.genotypes.read`
    finds it."""
    if name in CONTROLS:
        return name
    if name == "random":
        source = torch.Generator().manual_seed(seed)
        return derive({n: torch.rand(len(CANDIDATES[edge.kind]), generator=source) for n, edge in EDGES.items()})
    others = ("search", "random", *CONTROLS) if flag == "--genotype" else ("random",)
    return genotypes.read(name, EDGES, CANDIDATES, flag, others)


def generator_cost(genotype, cfg, channels):
    """Parameters, and FLOPs per image of the convolutions and matrix products as the architecture states them."""
    with torch.device("meta"), torch.no_grad(), plain_forms():
        generator = build_generator(genotype, cfg, channels)
        flops = count_flops(lambda: generator(torch.zeros(2, cfg.latent_dim), torch.zeros(2, dtype=torch.int64)))
    return sum(p.numel() for p in generator.parameters()), flops // 2


def find_genotype(teacher, cfg, run):
    """The genotype to compress with, searched for or read; the run's folder gets it."""
    channels = input_channels(teacher)
    check_image_size(cfg, multiple=4 if cfg.genotype in CONTROLS else 8)
    run.start()
    if cfg.genotype == "search":
        genotype, seconds = search(teacher, cfg, run.folder and run.folder / "search")
        run.record(search_seconds=round(seconds, 1))
    else:
        genotype = read_genotype(cfg.genotype, cfg.seed)
    if run.folder is not None:
        leave_genotype(genotype, cfg, channels, run)
    return genotype


def leave_genotype(genotype, cfg, channels, run):
    """Write the genotype and its drawing into the run's folder, and record what its generator and GDFQ's cost."""
    for name, which, title in (("generator", genotype, "generator"), ("gdfq", "gdfq", "GDFQ's at this scale")):
        parameters, flops = generator_cost(which, cfg, channels)
        run.record(**{f"{name}_parameters": parameters, f"{name}_flops": flops})
        run.announce(f"{title}: {parameters:,} parameters, {flops / 1e6:,.0f} MFLOPs per image")
    if genotype not in CONTROLS:
        short = genotypes.to_short(genotype, EDGES)
        run.record(genotype=short)
        run.announce(f"genotype: {short}")
        write_atomically(run.folder / "genotype.json", json.dumps({"edges": genotype}, indent=1) + "\n")
        write_atomically(run.folder / "genotype.svg", genotypes.draw(genotype, EDGES))


# -------------------------------------------------------------------------------------------------------- command line


SHORT = {"genotype": "published:resnet20-cifar10"}
SHORT |= finetune.short_schedule(bns_weight=100.0, kd_weight=20.0, kd_reduction="batchmean")


def parser():
    p = Parser("autorecon", __doc__.split("\n\n")[0], unquantized=("kd",), settings=("variant", "task"))
    add = p.add_argument_group("AutoReCon, stage 1: the search").add_argument
    sources = "search for the generator, or take a genotype.json, the folder of a run that has one, published:NETWORK-DATASET"
    add("--genotype", default="search", help=f"{sources}, or a control: random, gdfq, gdfq-cbn")
    add("--search-only", action="store_true", help="stop after stage 1")
    add("--search-epochs", type=whole(1, 10**6), default=25, help="epochs of the search, L1 of Algorithm 1")
    add("--search-iters", type=whole(1, 10**6), default=200, help="batches per epoch for the super net's weights, T1")
    add("--arch-iters", type=whole(1, 10**6), default=200, help="batches per epoch for the architecture parameters, V1")
    mode = "mix all operations (soft, Eq. 8) or evaluate the sampled one only (hard, an extension, several times cheaper)"
    add("--search-mode", choices=("soft", "hard"), default="soft", help=mode)
    gumbel = "what the noise is added to: the probabilities (p, Eq. 7) or their logarithms (logits, an extension)"
    add("--gumbel", choices=("p", "logits"), default="p", help=gumbel)
    add("--tau-start", type=number(1e-3, 1e3), default=5.0, help="temperature of the search in its first epoch")
    add("--tau-end", type=number(1e-3, 1e3), default=0.1, help="temperature towards which the search decays exponentially")
    add("--lr-alpha", type=number(0), default=3e-4, help="learning rate of the architecture parameters (Adam)")
    add("--scale", type=number(1 / 64, 64), default=1.0, help="factor s of the generator's (or super net's) channels (Table 3)")
    group = p.add_argument_group("AutoReCon, stage 2: compression as in GDFQ")
    add = group.add_argument
    add("--task", choices=("quantize", "kd"), default="quantize", help="quantize, or distil into another network (kd, Table 4)")
    add("--student-arch", help="architecture of the student for --task kd, written as for --arch")
    variant = "GDFQ's losses, as in its code (released) or as they are printed (paper): sets --bns-form and --kd-reduction"
    add("--variant", choices=("released", "paper"), default="released", help=variant)
    losses = "what the generator minimises with --task kd: L_r of Eq. 1, or minus the student's loss as in DFAD (Table 4)"
    add("--generator-loss", choices=("reconstruction", "dfad"), default="reconstruction", help=losses)
    p.add_training(
        "AutoReCon, stage 2: schedule and losses (--batch-size, --lr-g, --beta1, --latent-dim, --bns-* also apply to stage 1)",
        epochs={"quantize": 400, "kd": 500}, iters={"quantize": 200, "kd": 50},  # as GDFQ, and as DFAD on CIFAR
        batch_size={"quantize": (200, 16), "kd": 256}, warmup_epochs={"quantize": (4, 50), "kd": 0}, calibrate_epochs=4,
        lr_g=1e-3, beta1=0.5, lr_q={"quantize": (1e-4, 1e-6), "kd": 0.1}, weight_decay={"quantize": 1e-4, "kd": 5e-4},
        decay_epochs={"quantize": [100, 200, 300], "kd": [100, 200]}, latent_dim=100,
        bns_weight=0.1, bns_form={"released": "gdfq", "paper": "sum"},
        kd_weight=1.0, temperature=20.0, kd_reduction={"released": "mean", "paper": "batchmean"},
    )  # fmt: skip
    steps = "number of student steps per iteration; all but the first take new images"
    p.add_derived(group, "--student-steps", {"quantize": 1, "kd": 5}, steps, type=whole(1, 10**6))
    add("--no-finetune", action="store_true", help="only calibrate the activation ranges; do not fine-tune")
    stage1 = "--search-epochs --search-iters --arch-iters --search-mode --gumbel --tau-start --tau-end --lr-alpha --search-only"
    quantizer = "--bits --wbits --abits --act-placement --clipped-ste --calibrate-epochs"
    losses = "--kd-weight --temperature --kd-reduction"
    learning = f"{losses} --lr-q --weight-decay --student-steps --warmup-epochs"
    stage2 = "--student-arch --epochs --iters --decay-epochs --no-finetune --eval-every --eval --check"
    added = "--act-ranges --optimizer --mix --decay --feature-weight"
    p.without_effect("--data-source real", "--genotype --scale --generator-loss", stage1)
    p.without_effect("--generator-loss dfad and --genotype", "--bns-weight --bns-form")
    p.without_effect("--task quantize", "--generator-loss")
    p.without_effect("--genotype", stage1)
    p.without_effect("--search-only", "--export --generator-loss", quantizer, learning, stage2, added)
    p.without_effect("--task kd", quantizer, losses, "--no-finetune --schedule --act-ranges --feature-weight")
    p.without_effect("--no-finetune", learning)
    finetune.add_flags(p, SHORT)
    return p


def _complete(cfg):
    if not cfg.search_only and cfg.task == "kd" and cfg.student_arch is None:
        raise InputError("--task kd needs --student-arch; give the architecture to distil into")
    if cfg.student_arch is not None and cfg.task != "kd":
        raise InputError(f"--student-arch is {cfg.student_arch} and has no effect without --task kd; give both or neither")
    if cfg.latent_dim < 3:
        raise InputError(f"--latent-dim is {cfg.latent_dim}; each of three blocks gets a third of it, so give at least 3")
    if cfg.tau_end > cfg.tau_start:
        raise InputError(f"--tau-end is {cfg.tau_end}, above --tau-start {cfg.tau_start}; the temperature falls, so swap them")
    if cfg.genotype != "search":
        read_genotype(cfg.genotype)  # an unusable one is reported before anything is loaded
    return checked_schedule(cfg)


def parse_args(argv=None):
    return _complete(parser().parse(argv))


def config(**settings):
    """Settings for `compress` by flag name: config(dataset="folder", num_classes=5, image_size=32, bits=4)."""
    return _complete(parser().config(**settings))


def finish_search(run, teacher, genotype):
    """The result of --search-only: what the search has cost."""
    return run.facts | {"arguments": run.arguments()}


def show_search(result, run):
    print(f"  in {run.folder}/: genotype.json, genotype.svg, search/; --genotype {run.folder} compresses with it")


def main(argv=None):
    with friendly_errors("autorecon.py"):
        cfg, files = parse_args(argv), ("genotype.json", "genotype.svg", "search")
        if cfg.search_only:
            return execute(cfg, find_genotype, finish_search, show_search, files=files)
        return execute(cfg, compress, files=files, short=SHORT if cfg.task == "quantize" else None)


if __name__ == "__main__":
    main()
