"""AutoReCon: Neural Architecture Search-based Reconstruction for Data-free Compression (Zhu et al., IJCAI 2021).

Which generator reconstructs the lost data best? Stage 1 searches its architecture: a super net that mixes all candidate
operations on every edge is trained against the frozen full-precision network (the teacher), its weights and its architecture
parameters in turn. Stage 2 compresses the teacher with the discovered generator, under GDFQ's settings.

    python autorecon.py --arch resnet20 --dataset cifar100 --bits 4

Where the equations are:
    EDGES, CANDIDATES            macro-architecture and search space                  Figure 2, Table 1
    Generator                    edges as sums of their operations; the super net     Eq. 3, 8
    Architecture.probabilities   p = softmax(alpha)                                   Eq. 4
    Architecture.sample          m = softmax((p + g) / tau), g ~ Gumbel(0, 1)         Eq. 7
    reconstruction_loss          L_r = L_class + L_bns                                Eq. 1
    search                       weights and architecture by turns                    Eq. 2, 6, Algorithm 1, lines 1-8
    derive                       the likeliest operation of every edge                end of stage 1
    compress                     stage 2: quantization, or distillation (--task kd)   Algorithm 1, lines 9-13

The search was never released; what the authors of AIT published are architectures found by it (PUBLISHED) and the networks they
stand for, from which the macro-architecture is known exactly. For what the paper leaves open:

    what                  here                                                                   after
    L1, T1, V1            25 epochs of 200 batches for the weights, 200 for the architecture     AdversarialNAS, GDFQ's epoch
    tau                   falls exponentially from 5 to 0.1                                      AdversarialNAS
    alpha                 starts as 1e-3 N(0, 1); Adam, rate 3e-4, beta1 0.5, weight decay 1e-4  AdversarialNAS
    super net's weights   Adam, rate 1e-3, beta1 0.5, as the generator of stage 2                GDFQ
    L_r                   cross-entropy + 0.1 BNS                                                GDFQ
    discovered generator  argmax of p; a node that gets nothing takes its likeliest operation    AdversarialNAS
    its weights           start anew in stage 2                                                  stages share nothing else
    scale s (Table 3)     64 s channels                                                          the published networks

AdversarialNAS (Gao et al., CVPR 2020) is the search whose cell and whose Gumbel noise on p these are. Table 3 scales a found
architecture: `--genotype RUN --scale 2`; with a search, the super net has that scale, too. The published generators need about
four times the FLOPs of GDFQ's (CIFAR 1.0 to 1.2 against 0.23 G, ImageNet 51 to 57 against 11), where the paper speaks of fewer.
Gumbel noise on p, as printed, never commits: p lies in 0 to 1, so that even an edge with p = 1 for one of seven operations
samples it in 31 % of the cases. `--gumbel logits` adds the noise to log p, which samples an operation with probability p.
`--search-mode hard` evaluates the sampled operation only (its weight m_j / m_j.detach(), so that only it has a gradient).
Published accuracies of stage 2 were made with GDFQ's released losses (`--variant released`, the default).
"""

import argparse
import copy
import json
import math
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import InputError
from common.bns import BatchNormStatistics
from common.cli import Parser, checked_schedule, fill_in, friendly_errors, number, resumable, whole
from common.models import SMALL_IMAGE, build_student, input_channels
from common.ops import plain_forms, superpose, upsample, upsample_conv, upsample_pointwise
from common.quant import describe, observe, quantize
from common.report import execute, prepare, show_finished
from common.run import Run, write_atomically

FILES = ("genotype.json", "genotype.svg", "search")  # beside those of any run
BN_EPS = 0.8  # of the inner BatchNorms, in all published generators
CONTROLS = ("acgan", "gdfq")  # human-designed: with the label in conditional BatchNorms, and as GDFQ has it
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
NODES = tuple(f"B{block}-N{node}" for block in (1, 2, 3) for node in (1, 2, 3, 4, 5))
INTO = {node: [name for name, edge in EDGES.items() if edge.target == node] for node in NODES}


# ------------------------------------------------------------------------------------------------------- generators


class Condition(nn.Module):
    """Scale and shift of a normalised feature map, looked up by label: the conditional half of a BatchNorm."""

    def __init__(self, num_classes, channels):
        super().__init__()
        self.gamma = nn.Embedding(num_classes, channels)
        self.beta = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x, y):
        """x (B, channels, H, W) for labels y, (B,) int64 or soft (B, C)."""
        gamma, beta = (superpose(y, t.weight) if y.is_floating_point() else t(y) for t in (self.gamma, self.beta))
        return torch.addcmul(beta.to(x.dtype)[:, :, None, None], x, gamma.to(x.dtype)[:, :, None, None])


class Operation(nn.Module):
    """Conditional BatchNorm, LeakyReLU, convolution; up and cross operations have a 1x1 convolution and interpolate before.

    Two rearrangements change nothing but the time. The BatchNorm's first half, the normalisation, is the generator's: all
    operations on a node's value share it. Nearest interpolation comes last, for it commutes with all else.
    """

    def __init__(self, name, num_classes, width):
        super().__init__()
        size = int(name[-1]) if name[-1].isdigit() else 1
        dilation = 2 if name.startswith("dilated") else 1
        self.nearest = name == "nearest"
        self.condition = Condition(num_classes, width)
        self.conv = nn.Conv2d(width, width, size, padding=dilation * (size // 2), dilation=dilation)

    def forward(self, normalised, y, weight=None):
        """Output for a normalised node (B, width, H, W), times the scalar `weight`, which goes into the kernel."""
        x, kernel, bias = F.leaky_relu(self.condition(normalised, y), 0.2), self.conv.weight, self.conv.bias
        if weight is not None:
            kernel, bias = weight * kernel, weight * bias
        if self.nearest:
            return upsample_pointwise(x, kernel, bias)
        return F.conv2d(x, kernel, bias, padding=self.conv.padding, dilation=self.conv.dilation)


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
        self.linears = nn.ModuleList(
            nn.Linear(length, width * (self.side * 2**block) ** 2) for block, length in enumerate(self.slices)
        )
        self.operations, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for name, edge in EDGES.items():
            present = CANDIDATES[edge.kind] if genotype is None else (genotype[name],)
            made = {op: Operation(op, num_classes, width) for op in present if op not in ("none", "identity")}
            self.operations[name] = nn.ModuleDict(made)
            for op in made:
                form = f"{edge.source} bilinear" if op == "bilinear" else edge.source
                if form not in self.norms:
                    self.norms[form] = nn.BatchNorm2d(width, eps=BN_EPS, affine=False)
        self.norm, self.condition = nn.BatchNorm2d(width, eps=BN_EPS, affine=False), Condition(num_classes, width)
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
        values, forms, above = {}, {}, 0
        starts = [linear(part) for linear, part in zip(self.linears, z.split(self.slices, 1))]

        def normalised(source, bilinear):
            form = f"{source} bilinear" if bilinear else source
            if form not in forms:
                x = values[source]
                if bilinear:
                    x = upsample(x, "bilinear")
                forms[form] = self.norms[form](x)
            return forms[form]

        def outputs(name):
            """What an edge sends: m_j O_j(x) of each of its operations, Eq. 8."""
            source, operations = EDGES[name].source, self.operations[name]
            for op, weight in ({self.genotype[name]: None} if mixture is None else mixture[name]).items():
                if op == "identity":
                    yield values[source] if weight is None else weight * values[source]
                elif op != "none":
                    yield operations[op](normalised(source, op == "bilinear"), y, weight)

        for node in NODES:
            side = self.side * 2 ** (int(node[1]) - (node[-1] == "1"))
            if node[-1] == "1":
                start = starts[int(node[1]) - 1].view(-1, self.width, side, side)
                values[node] = start.contiguous(memory_format=torch.channels_last) + above
            else:
                sent = [output for name in INTO[node] for output in outputs(name)]
                values[node] = sum(sent) if sent else z.new_zeros(len(z), self.width, side, side)
            above = values[node]  # N5 of a block is N1 of the next
        x = F.leaky_relu(self.condition(self.norm(above), y), 0.2)
        return self.standardise(torch.tanh(self.conv(x)))


class HumanDesigned(nn.Module):
    """GDFQ's generator after ACGAN, as a control for the discovered ones.

    Args:
        conditional: the label enters through conditional BatchNorm, as in the discovered generators; else as an embedding
            that multiplies the noise.
        num_classes, channels, latent_dim: as for `Generator`; image_size a multiple of 4.
        width: channels of the first two stages; the last has half of them.
    """

    def __init__(self, conditional, num_classes, image_size=32, channels=3, latent_dim=100, width=128):
        super().__init__()
        self.side, half = image_size // 4, width // 2
        self.embedding = None if conditional else nn.Embedding(num_classes, latent_dim)
        self.linear = nn.Linear(latent_dim, width * self.side**2)
        self.bn0 = nn.BatchNorm2d(width, affine=not conditional)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width, eps=BN_EPS, affine=not conditional)
        self.conv2 = nn.Conv2d(width, half, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(half, eps=BN_EPS, affine=not conditional)
        self.conv3 = nn.Conv2d(half, channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)
        self.conditions = nn.ModuleList(Condition(num_classes, n) for n in (width, width, half) if conditional)

    def forward(self, z, y):
        """As `Generator.forward`."""

        def norm(index, bn, x):
            return self.conditions[index](bn(x), y) if self.conditions else bn(x)

        z = z if self.embedding is None else self.embedding(y) * z
        x = norm(0, self.bn0, self.linear(z).view(len(z), -1, self.side, self.side))
        x = F.leaky_relu(norm(1, self.bn1, upsample_conv(x, self.conv1)), 0.2)
        x = F.leaky_relu(norm(2, self.bn2, upsample_conv(x, self.conv2)), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))


def make_generator(genotype, cfg, channels):
    """The generator of a genotype, or the control of that name ("acgan" or "gdfq"), as `cfg` describes it."""
    sizes = cfg.num_classes, cfg.image_size, channels, cfg.latent_dim
    if isinstance(genotype, str):
        return HumanDesigned(genotype == "acgan" or cfg.image_size > SMALL_IMAGE, *sizes, 2 * round(64 * cfg.scale))
    return Generator(genotype, *sizes, round(64 * cfg.scale))


def generator_cost(genotype, cfg, channels):
    """Parameters, and FLOPs per image of the convolutions and matrix products as the architecture states them."""
    with torch.device("meta"), torch.no_grad(), plain_forms(), FlopCounterMode(display=False) as counter:
        generator = make_generator(genotype, cfg, channels)
        generator(torch.zeros(2, cfg.latent_dim), torch.zeros(2, dtype=torch.int64))
    return sum(p.numel() for p in generator.parameters()), counter.get_total_flops() // 2


# -------------------------------------------------------------------------------------------------------- genotypes

LETTERS = {"n": "nearest", "b": "bilinear", "-": "none", "i": "identity"}
LETTERS |= {"k1": "conv1x1", "k3": "conv3x3", "k5": "conv5x5", "d3": "dilated3x3", "d5": "dilated5x5"}
PUBLISHED = {  # up edges; normal edges of each block, N2 N3 into N4, N2 N3 N4 into N5; cross edges into each block, likewise
    "resnet20-cifar10": "n n n n b n | d5 - d5 d3 k5 | d5 d5 k3 d3 d5 | d5 d5 k1 k5 d3 | - - b - - n | n n n b b b",
    "resnet20-cifar100": "b n n n n n | d5 d5 d5 - k5 | d5 k5 k1 d3 d5 | d5 d3 k5 k5 d5 | - b n - - n | - b n n b b",
    "resnet18-imagenet": "b b b b b b | d5 d5 d5 d5 d5 | d5 d5 d5 d5 d3 | d5 d5 k5 d3 d3 | n b n b b n | b b n n b n",
    "resnet50-imagenet": "b b b b b b | d5 d5 d5 d5 d5 | d5 d5 k3 k1 k1 | d3 d5 d5 k5 d3 | b b b n n b | n n n n b b",
    "mobilenet_v2-imagenet": "b b b b n b | d5 d5 k5 d5 d5 | k5 d5 k1 k1 k1 | k3 d5 k5 d5 d3 | b b n b b b | b n b b b n",
}


def short_order():
    """Names of the edges in the order of the short notation."""
    groups = [[name for name, edge in EDGES.items() if edge.kind == "up"]]
    for kind, blocks in (("normal", "123"), ("cross", "23")):
        groups += [[n for n, edge in EDGES.items() if edge.kind == kind and edge.target[1] == b] for b in blocks]
    return groups


def from_short(text):
    """A genotype from the notation of PUBLISHED."""
    parts = [part.split() for part in text.split("|")]
    return {name: LETTERS[op] for names, part in zip(short_order(), parts) for name, op in zip(names, part)}


def to_short(genotype):
    """A genotype in the notation of PUBLISHED."""
    letters = {op: letter for letter, op in LETTERS.items()}
    return " | ".join(" ".join(letters[genotype[name]] for name in names) for names in short_order())


def derive(probabilities):
    """The discrete architecture: every edge's likeliest operation; a node that would get nothing is fed by the operation,
    other than none, that is likeliest among all of its edges.

    Args:
        probabilities: dict of edge -> (F,) in the order of CANDIDATES.
    """
    genotype = {name: CANDIDATES[EDGES[name].kind][p.argmax()] for name, p in probabilities.items()}
    for names in INTO.values():
        if names and all(genotype[name] == "none" for name in names):
            best = max(names, key=lambda name: probabilities[name][1:].max())
            genotype[best] = CANDIDATES[EDGES[best].kind][1 + probabilities[best][1:].argmax()]
    return genotype


def read_genotype(name, seed=0, flag="--genotype"):
    """The genotype that a flag stands for.

    Args:
        name: a genotype.json or a folder with one, "published:..." (PUBLISHED), or "random"; "acgan" and "gdfq" name no
            genotype and are returned as they are.
        seed: of "random".
        flag: what error messages call it.

    Raises:
        InputError: no such genotype, or an unusable one; the edge is named.
    """
    if name in CONTROLS:
        return name
    if name == "random":
        source = torch.Generator().manual_seed(seed)
        return derive({n: torch.rand(len(CANDIDATES[edge.kind]), generator=source) for n, edge in EDGES.items()})
    if name.startswith("published:"):
        if (short := PUBLISHED.get(name.removeprefix("published:"))) is None:
            raise InputError(f"{flag} {name} is not known; published are {', '.join(PUBLISHED)}")
        return from_short(short)
    path = Path(name) / "genotype.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise InputError(
            f"{flag} {name} is not a file; give a genotype.json, its folder, published:NAME, search, random, acgan or gdfq"
        )
    try:
        genotype = dict(json.loads(path.read_text())["edges"])
        unknown = [edge for edge in genotype if edge not in EDGES]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{flag} {path} holds no genotype; give a genotype.json that a search wrote") from None
    if unknown:
        raise InputError(f"{flag} {path} has the edge '{unknown[0]}', which is not in the search space; remove it")
    for edge, (*_, kind) in EDGES.items():
        if edge not in genotype:
            raise InputError(f"{flag} {path} lacks the edge '{edge}'; give it one of {', '.join(CANDIDATES[kind])}")
        if genotype[edge] not in CANDIDATES[kind]:
            raise InputError(
                f"{flag} {path} has '{genotype[edge]}' for the edge '{edge}'; give one of {', '.join(CANDIDATES[kind])}"
            )
    for node, names in INTO.items():
        if names and all(genotype[edge] == "none" for edge in names):
            raise InputError(f"{flag} {path} sends nothing to {node}; give '{names[0]}' an operation other than none")
    return genotype


def draw_genotype(genotype):
    """A picture of the architecture, SVG text: blocks from left to right, edges coloured by their operation."""
    colours = {"nearest": "#1f77b4", "bilinear": "#17becf", "identity": "#7f7f7f", "conv1x1": "#ff9896", "conv3x3": "#ff7f0e"}
    colours |= {"conv5x5": "#d62728", "dilated3x3": "#98df8a", "dilated5x5": "#2ca02c"}
    spots = {"1": (0, 150), "2": (150, 60), "3": (150, 240), "4": (230, 150), "5": (310, 150)}
    place = {node: (40 + 310 * (int(node[1]) - 1) + spots[node[-1]][0], spots[node[-1]][1]) for node in NODES}
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1060 400" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="1060" height="400" fill="white"/>')
    for name, (source, target, kind) in EDGES.items():
        if (colour := colours.get(genotype[name])) is not None:
            (x0, y0), (x1, y1) = place[source], place[target]
            bend = (y0 + y1) / 2 + {"cross": 130 if y0 > 100 else -110}.get(kind, -40 if y0 == y1 else 0)
            curve = f"M{x0},{y0} Q{(x0 + x1) / 2},{bend} {x1},{y1}"
            dashes = ' stroke-dasharray="6 4"' if kind == "cross" else ""
            parts.append(f'<path d="{curve}" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}>')
            parts.append(f"<title>{name.replace('>', '&gt;')}: {genotype[name]}</title></path>")
    for node, (x, y) in place.items():
        if node[-1] != "1" or node[1] == "1":  # N1 of a later block is N5 of the one before
            parts.append(f'<circle cx="{x}" cy="{y}" r="19" fill="white" stroke="black"/>')
            parts.append(f'<text x="{x}" y="{y + 4}" text-anchor="middle">{node}</text>')
    for index, (op, colour) in enumerate(colours.items()):
        parts.append(f'<text x="{40 + 125 * index}" y="385" fill="{colour}">&#9644; {op}</text>')
    return "\n".join([*parts, "</svg>\n"])


# ----------------------------------------------------------------------------------------------------------- stage 1


class Architecture(nn.Module):
    """The architecture parameters alpha of every edge, and the mixtures drawn by them.

    Args:
        gumbel: "p" adds the noise to the probabilities (Eq. 7), "logits" to their logarithms.
        hard: mixtures hold the sampled operation of each edge only.
    """

    def __init__(self, gumbel="p", hard=False):
        super().__init__()
        self.gumbel, self.hard = gumbel, hard
        counts = {kind: sum(edge.kind == kind for edge in EDGES.values()) for kind in CANDIDATES}
        self.alpha = nn.ParameterDict({k: 1e-3 * torch.randn(counts[k], len(ops)) for k, ops in CANDIDATES.items()})
        self.register_buffer("temperature", torch.tensor(1.0))  # a tensor, so that a captured step follows it

    @staticmethod
    def by_edge(tables):
        """Rows of a table (edges of a kind, F) for each kind, as a dict of edge -> (F,)."""
        rows = {kind: iter(table.unbind()) for kind, table in tables.items()}
        return {name: next(rows[edge.kind]) for name, edge in EDGES.items()}

    @torch.no_grad()
    def probabilities(self):
        """p of every edge, Eq. 4: dict of edge -> (F,), on the CPU."""
        return self.by_edge({kind: self.alpha[kind].softmax(1).cpu() for kind in CANDIDATES})

    def sample(self):
        """A mixture m for `Generator.forward`, Eq. 7: dict of edge -> {operation: scalar tensor}."""
        tables = {}
        for kind in CANDIDATES:
            alpha = self.alpha[kind]
            scores = alpha.softmax(1) if self.gumbel == "p" else alpha.log_softmax(1)
            g = -torch.empty_like(scores).exponential_().log()  # Gumbel(0, 1)
            tables[kind] = ((scores + g) / self.temperature).softmax(1)
        if not self.hard:
            return {n: dict(zip(CANDIDATES[EDGES[n].kind], m.unbind())) for n, m in self.by_edge(tables).items()}
        chosen = self.by_edge({kind: table.argmax(1).cpu() for kind, table in tables.items()})  # waits for the device
        mixture = {}
        for name, m in self.by_edge(tables).items():
            index = chosen[name].item()
            mixture[name] = {CANDIDATES[EDGES[name].kind][index]: m[index] / m[index].detach()}
        return mixture


def reconstruction_loss(teacher_logits, y, bns, bns_weight):
    """L_r = L_class + L_bns, Eq. 1: images of class y with the statistics the teacher knows.

    Args:
        teacher_logits: (B, C).
        y: labels (B,).
        bns: L_bns of the same batch, a scalar.
        bns_weight: its weight.
    """
    return F.cross_entropy(teacher_logits, y) + bns_weight * bns


def reconstruct(synthesize, teacher, stats, cfg, run):
    """One batch of either stage: images x of random labels y, and what the teacher makes of them.

    Returns:
        x, the teacher's logits, y, L_bns and L_r, all with their graph.
    """
    y = torch.randint(cfg.num_classes, (cfg.batch_size,), device=run.device)
    x = synthesize(y)
    with run.autocast():
        logits = teacher(x).float()
    bns = stats.loss(cfg.bns_form)
    return x, logits, y, bns, reconstruction_loss(logits, y, bns, cfg.bns_weight)


def search(teacher, cfg, folder=None):
    """Stage 1: the generator's architecture, by turns of weights and architecture parameters (Algorithm 1, lines 1-8).

    Both sides see fresh noise and labels: there is no data to be split. Neither looks ahead to the other (first order).

    Args:
        teacher: as for `compress`.
        cfg: from `config(...)`, or the command line.
        folder: where the search keeps its checkpoint and metrics, to go on from; None for nowhere.

    Returns:
        The genotype, dict of edge -> operation, and how many seconds the steps took.
    """
    hard = cfg.search_mode == "hard"
    schedule = {"epochs": cfg.search_epochs, "iters": cfg.search_iters + cfg.arch_iters}
    capture = "cudagraph" if cfg.capture == "cudagraph" and not hard else "none"  # hard mode's path is decided on the host
    run = Run(argparse.Namespace(**vars(cfg) | schedule | {"capture": capture}), folder)
    teacher, _ = run.adopt(teacher)
    supernet = run.place(make_generator(None, cfg, input_channels(teacher)))
    architecture = Architecture(cfg.gumbel, hard).to(run.device)
    stats = BatchNormStatistics(teacher)
    optim_w = torch.optim.Adam(supernet.parameters(), cfg.lr_g, betas=(cfg.beta1, 0.999), fused=run.fused)
    adam = {"betas": (0.5, 0.999), "weight_decay": 1e-4, "fused": run.fused}
    optim_a = torch.optim.Adam(architecture.parameters(), cfg.lr_alpha, **adam)

    def synthesize(y):
        mixture = architecture.sample()
        with run.autocast():
            return supernet(torch.randn(len(y), cfg.latent_dim, device=run.device), y, mixture).float()

    def turn(optimizer, name):
        *_, bns, loss = reconstruct(synthesize, teacher, stats, cfg, run)
        run.update(optimizer, loss)
        run.log(**{f"loss_{name}": loss, f"bns_{name}": bns})

    run.rates = "--lr-g or --lr-alpha"
    how = "as CUDA graphs" if capture == "cudagraph" else "step by step"
    run.announce(f"searching a generator: {cfg.search_mode} mixtures of {len(EDGES)} edges, {how}")
    weight_step = run.capture(lambda: turn(optim_w, "weights"), optim_w)
    architecture_step = run.capture(lambda: turn(optim_a, "architecture"), optim_a)
    parts = {"architecture": architecture, "optim_w": optim_w, "optim_a": optim_a}
    for epoch in run.epochs(cfg.search_epochs, supernet, synthesize, **parts):
        architecture.temperature.fill_(cfg.tau_start * (cfg.tau_end / cfg.tau_start) ** (epoch / cfg.search_epochs))
        for index in run.steps():
            (weight_step if index < cfg.search_iters else architecture_step)()
        p = architecture.probabilities()
        entropies = {name: torch.special.entr(v).sum().item() / math.log(len(v)) for name, v in p.items()}  # 1: undecided
        run.note(entropy=sum(entropies.values()) / len(entropies), entropy_of_edges=entropies)
    return derive(architecture.probabilities()), run.seconds


def find_genotype(teacher, cfg, run):
    """The genotype to compress with, searched for or read, printed, drawn and noted in the run's folder."""
    channels, multiple = input_channels(teacher), 4 if cfg.genotype in CONTROLS else 8
    if cfg.image_size % multiple:
        raise InputError(f"--image-size is {cfg.image_size}; the generator needs a multiple of {multiple}")
    run.start()
    if cfg.genotype == "search":
        genotype, seconds = search(teacher, cfg, run.folder and run.folder / "search")
        run.record(search_seconds=round(seconds, 1))
    else:
        genotype = read_genotype(cfg.genotype, cfg.seed)
    costs = [generator_cost(which, cfg, channels) for which in (genotype, "gdfq")]
    run.record(generator_parameters=costs[0][0], generator_flops=costs[0][1])
    run.record(gdfq_parameters=costs[1][0], gdfq_flops=costs[1][1])
    run.announce(
        f"generator: {costs[0][0]:,} parameters, {costs[0][1] / 1e6:,.0f} MFLOPs an image "
        f"(GDFQ's at this scale: {costs[1][0]:,} and {costs[1][1] / 1e6:,.0f})"
    )
    if isinstance(genotype, dict):
        run.record(genotype=to_short(genotype))
        run.announce(f"genotype: {to_short(genotype)}")
        if run.folder:
            write_atomically(run.folder / "genotype.json", json.dumps({"edges": genotype}, indent=1) + "\n")
            write_atomically(run.folder / "genotype.svg", draw_genotype(genotype))
    return genotype


# ----------------------------------------------------------------------------------------------------------- stage 2


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


def compression_loss(student_logits, teacher_logits, y, cfg):
    """L_c: cross-entropy and distillation for quantization; for distillation alone the mean absolute difference of the
    logits, as DFAD has it, whose reconstruction Table 4 replaces. Logits (B, C), labels (B,)."""
    if cfg.task == "kd":
        return F.l1_loss(student_logits, teacher_logits)
    kd = kd_loss(student_logits, teacher_logits, cfg.temperature, cfg.kd_reduction)
    return F.cross_entropy(student_logits, y) + cfg.kd_weight * kd


def make_student(teacher, cfg, example):
    """The network that stage 2 trains: the quantized teacher, or one of --student-arch with random weights."""
    if cfg.task == "quantize":
        return quantize(teacher, cfg.wbits, cfg.abits, cfg.act_placement, cfg.clipped_ste, example)
    return build_student(cfg.student_arch, teacher, cfg.num_classes, cfg.image_size)


def compress(teacher, cfg, run=None):
    """Quantize a network, or distil it into another (--task kd), without data.

    Args:
        teacher: a trained classifier with BatchNorm2d, (B, channels, image_size, image_size) -> (B, num_classes); it is
            copied and left as it is.
        cfg: from `config(...)`, or the command line.
        run: what surrounds the loop; by default nothing is written or shown.

    Returns:
        The quantized network, or the student, in eval mode.

    Raises:
        InputError: a teacher without BatchNorm, of another shape, or with something that cannot be quantized; a student or
            an image size that does not fit.
    """
    run = run or Run(cfg)
    device, channels = run.device, input_channels(teacher)
    teacher, example = run.adopt(teacher)
    distilling, student = cfg.task == "kd", run.place(make_student(teacher, cfg, example))
    genotype = find_genotype(teacher, cfg, run)
    torch.manual_seed(cfg.seed)  # as if the genotype had been given
    without_hooks = copy.deepcopy(teacher) if cfg.student_steps > 1 else None
    stats = BatchNormStatistics(teacher)
    generator = run.place(make_generator(genotype, cfg, channels))
    optim_g = torch.optim.Adam(generator.parameters(), cfg.lr_g, betas=(cfg.beta1, 0.999), fused=run.fused)
    sgd = {"momentum": 0.9, "nesterov": not distilling, "weight_decay": cfg.weight_decay, "fused": run.fused}
    optim_q = torch.optim.SGD(student.parameters(), cfg.lr_q, **sgd)

    def synthesize(y):
        with run.autocast():
            return generator(torch.randn(len(y), cfg.latent_dim, device=device), y).float()

    def generator_step():
        x, logits, y, bns, loss = reconstruct(synthesize, teacher, stats, cfg, run)
        run.update(optim_g, loss)
        run.log(loss_g=loss, bns=bns)
        return x.detach(), logits.detach(), y

    def student_step(x, teacher_logits, y):
        with run.autocast():
            logits = student(x).float()
        loss = compression_loss(logits, teacher_logits, y, cfg)
        run.update(optim_q, loss)
        run.log(loss_q=loss)

    def fresh_batch():
        y = torch.randint(cfg.num_classes, (cfg.batch_size,), device=device)
        with torch.no_grad(), run.autocast():
            x = synthesize(y)
            return x, without_hooks(x).float(), y

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
    tuned_from = cfg.calibrate_epochs if cfg.no_finetune else cfg.warmup_epochs
    calibrated_at = None if distilling else min(cfg.calibrate_epochs, tuned_from, cfg.epochs)
    parts = {"generator": generator, "optim_g": optim_g, "optim_q": optim_q}
    for epoch in run.epochs(cfg.epochs, student, synthesize, evaluate_from=tuned_from, **parts):
        decay = 0.1 ** sum(epoch >= start for start in cfg.decay_epochs)
        optim_g.param_groups[0]["lr"], optim_q.param_groups[0]["lr"] = cfg.lr_g * decay, cfg.lr_q * decay
        calibrating, tuning = not distilling and epoch < cfg.calibrate_epochs, epoch >= tuned_from
        observe(student, calibrating)
        student.train(distilling)  # a quantized network keeps the BatchNorm statistics it has
        for _ in run.steps():
            step(calibrating, tuning)
        student.eval()
        observe(student, False)
        if epoch + 1 == calibrated_at:
            run.measure("calibrated_top1", student)
    return student


def parser():
    p = Parser("autorecon", __doc__.split("\n\n")[0], unquantized=("kd",))
    add = p.add_argument_group("AutoReCon, stage 1: the search").add_argument
    sources = "search, or where the architecture is from: a genotype.json, a run folder, published:NAME"
    controls = "random, acgan, gdfq are controls, the last two the same network for large images"
    add("--genotype", default="search", help=f"{sources} (NETWORK-DATASET); {controls}")
    add("--search-only", action="store_true", help="stop after stage 1")
    add("--search-epochs", type=whole(1, 10**6), default=25, help="L1 of Algorithm 1")
    add("--search-iters", type=whole(1, 10**6), default=200, help="T1, batches an epoch for the super net's weights")
    add("--arch-iters", type=whole(1, 10**6), default=200, help="V1, batches an epoch for the architecture parameters")
    mode = "mixtures of all operations (Eq. 8), or the sampled operation only, several times cheaper"
    add("--search-mode", choices=("soft", "hard"), default="soft", help=mode)
    add("--gumbel", choices=("p", "logits"), default="p", help="noise on the probabilities (Eq. 7) or on their logarithms")
    add("--tau-start", type=number(1e-3, 1e3), default=5.0, help="temperature in the first epoch")
    add("--tau-end", type=number(1e-3, 1e3), default=0.1, help="temperature that the exponential decay would reach after the last epoch")
    add("--lr-alpha", type=number(0), default=3e-4, help="learning rate of the architecture parameters (Adam)")
    add("--scale", type=number(1 / 64, 64), default=1.0, help="s, factor of the generator's channels (Table 3), in a search the super net's")
    add = p.add_argument_group("AutoReCon, stage 2: compression as in GDFQ").add_argument
    add("--task", choices=("quantize", "kd"), default="quantize", help="quantize, or distil into another network (Table 4)")
    add("--student-arch", help="with --task kd: architecture of the student, as for --arch")
    variant = "sets --bns-form and --kd-reduction, as in gdfq.py"
    add("--variant", choices=("released", "paper"), default="released", help=variant)
    add("--epochs", type=whole(1), help="epochs, warm-up included (default: 400; kd 500)")
    add("--iters", type=whole(1), help="iterations per epoch (default: 200; kd 50)")
    add("--batch-size", type=whole(1), help="images per iteration, in the search, too (default: CIFAR 200, ImageNet 16; kd 256)")
    add("--warmup-epochs", type=whole(0, 10**6), help="epochs of the generator alone (default: CIFAR 4, ImageNet 50; kd 0)")
    add("--lr-q", type=number(0), help="learning rate of the student (default: CIFAR 1e-4, ImageNet 1e-6; kd 0.1)")
    add("--calibrate-epochs", type=whole(1, 10**6), default=4, help="first epochs, in which activation ranges follow the images")
    add("--lr-g", type=number(0), default=1e-3, help="learning rate of the generator and of the super net (Adam)")
    add("--beta1", type=number(0, 0.9999), default=0.5, help="of the generator's and the super net's Adam")
    add("--weight-decay", type=number(0), help="of the student (default: 1e-4; kd 5e-4)")
    decay = "epochs at which both learning rates fall to a tenth (default: 100 200 300; kd 100 200)"
    add("--decay-epochs", type=whole(0), nargs="*", help=decay)
    add("--latent-dim", type=whole(1, 10**6), default=100, help="length of the noise vector")
    add("--bns-weight", type=number(0), default=0.1, help="weight of L_bns (Eq. 1)")
    add("--bns-form", choices=BatchNormStatistics.forms, help="form of L_bns (default: released gdfq, paper sum)")
    add("--kd-weight", type=number(0), default=1.0, help="weight of L_KD")
    add("--temperature", type=number(1e-3, 1e6), default=20.0, help="T of the distillation loss")
    add("--kd-reduction", choices=("mean", "batchmean"), help="of L_KD (default: released mean, paper batchmean)")
    add("--student-steps", type=whole(1, 10**6), help="student steps per iteration, on fresh images from the second on (default: 1; kd 5)")
    add("--no-finetune", action="store_true", help="calibrate the activation ranges only")
    search = "--search-epochs --search-iters --arch-iters --search-mode --gumbel --tau-start --tau-end --lr-alpha".split()
    p.without_effect("--genotype", *search)
    p.without_effect("--task kd", "--kd-weight", "--temperature", "--kd-reduction", "--calibrate-epochs")
    p.without_effect("--no-finetune", "--lr-q", "--weight-decay", "--kd-weight", "--temperature", "--kd-reduction")
    return p


def _complete(cfg):
    large = cfg.image_size > SMALL_IMAGE
    quantizing = {"epochs": 400, "iters": 200, "batch_size": 16 if large else 200, "warmup_epochs": 50 if large else 4}
    quantizing |= {"lr_q": 1e-6 if large else 1e-4, "weight_decay": 1e-4, "decay_epochs": [100, 200, 300], "student_steps": 1}
    distilling = {"epochs": 500, "iters": 50, "batch_size": 256, "warmup_epochs": 0, "lr_q": 0.1}  # DFAD's, from memory
    distilling |= {"weight_decay": 5e-4, "decay_epochs": [100, 200], "student_steps": 5}
    fill_in(cfg, quantizing if cfg.task == "quantize" else distilling)
    bns_form, kd_reduction = {"released": ("gdfq", "mean"), "paper": ("sum", "batchmean")}[cfg.variant]
    fill_in(cfg, {"bns_form": bns_form, "kd_reduction": kd_reduction})
    if cfg.latent_dim < 3:
        raise InputError(f"--latent-dim is {cfg.latent_dim}; each of three blocks gets a third of it, so give at least 3")
    if not cfg.search_only and (cfg.task == "kd") != (cfg.student_arch is not None):
        raise InputError(
            f"--task is {cfg.task} and --student-arch {cfg.student_arch}; distillation needs both, quantization none"
        )
    if cfg.task == "kd" and cfg.no_finetune:
        raise InputError("--task kd has no calibration, so --no-finetune leaves nothing to do; leave it out")
    if cfg.search_only and cfg.genotype != "search":
        raise InputError(f"--search-only with --genotype {cfg.genotype} does nothing; leave one of them out")
    if cfg.tau_end > cfg.tau_start:
        raise InputError(f"--tau-end is {cfg.tau_end}, above --tau-start {cfg.tau_start}; the temperature falls, so swap them")
    if cfg.genotype != "search":
        read_genotype(cfg.genotype)  # an unusable one is told before anything is loaded
    return checked_schedule(cfg)


def parse_args(argv=None):
    return _complete(parser().parse(argv))


def config(**settings):
    """Settings for `compress` by flag name: config(dataset="folder", num_classes=5, image_size=32, bits=4)."""
    return _complete(parser().config(**settings))


def print_found(result):
    """Where the genotype of a search is."""
    folder = result["arguments"]["out"]
    print(f"  in {folder}/: genotype.json, genotype.svg, search/metrics.jsonl; --genotype {folder} compresses with it")


def main(argv=None):
    with friendly_errors("autorecon.py"):
        cfg = parse_args(argv)
        if cfg.eval or not cfg.search_only:
            return execute(cfg, compress, files=FILES)
        teacher, run = prepare(cfg, files=FILES)
        if run.finished:
            return show_finished(run, print_found)
        with resumable():
            find_genotype(teacher, cfg, run)
        write_atomically(run.folder / "result.json", json.dumps(run.facts | {"arguments": run.arguments()}, indent=1))
        print_found(run.facts | {"arguments": run.arguments()})
        return run.facts


if __name__ == "__main__":
    main()
