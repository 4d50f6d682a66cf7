"""AdaDFQ: Adaptive Data-Free Quantization (Qian et al., CVPR 2023).

A generator and the quantized network (the student) play a zero-sum game over how much the student disagrees with the frozen
full-precision network (the teacher) about the generator's images. The generator seeks images that the student can still
learn from: neither so hard that it cannot follow (underfitting) nor so easy that there is nothing to learn (overfitting).

    python adadfq.py --arch resnet20 --dataset cifar100 --bits 3

Where the equations are:
    entropy                 H_info(p_ds), p_ds = softmax(z_p - z_q)                 Eq. 1, 2
    normalised_entropy      H'_info(p_ds), by its smallest value within the batch   Eq. 3
    compress                the game: each side against the other, alternately      Eq. 4
    loss_ds                 L_ds                                                    Eq. 6
    loss_as                 L_as, p_as = softmax(z_p + z_q)                         Eq. 7, 8
    margin_loss             the two hinges at lambda_l and lambda_u                 Eq. 10, 12
    BatchNormStatistics     L_BNS                                                   Eq. 11
    generator_loss          the generator's side of the game                        Eq. 9, 12
    student_loss            the student's side                                      Eq. 13
    game_figures            H', and the shares of the samples that are defined      Definitions 1, 2
    measured_gains          what an epoch of either side does to disagreement       Figure 3(a)
    common.quant            the quantizer                                           Eq. 18
    similarity, analyze     L1 norms between p_ds; H' of samples, losses, images    Figures 1, 3(b), 4(b), 5, 6

    what                  paper                        released code                           here
    student's loss        1 - H' (Eq. 13)              -T^2 H(z_p - z_q; T), T = 20, on        --variant, --student-loss,
                                                       ImageNet 5                              --temperature
    gradient of the       not given                    in the generator's hinges (its          as released; none in the
    batch's minimum                                    student's loss has no minimum)          student's Eq. 13
    L_BNS                 sum of squared L2 norms      mean over layers and channels           --variant, --bns-form
    alpha_ds, lambda_l    0.2, 0.1 everywhere          by network and bits                     --variant, --alpha-ds, --lambda-l
    learning-rate decay   student's, every 100         both, by network and bits               both; --variant, --decay-epochs
                          epochs, ImageNet once, 350
    generator's beta1     0.9                          0.5                                     --variant, --beta1
    student's forward     not given                    once for each side                      once for both losses where
                                                                                               possible (last paragraph)
    teacher, top-1 %      CIFAR-10 93.89, CIFAR-100 70.33, ResNet-18 71.47, ResNet-50 77.73,   --weights; bundled for
                          MobileNetV2 73.03                                                    CIFAR-10: 92.41
    precision             fp32                         fp32                                    --precision; auto is bf16 where
                                                                                               the hardware has it
    BatchNorms' eps       not given                    0.8 after convolutions                  0.8
    activation ranges     not given                    moving average that feeds its bias      plain moving average
                                                       correction back
    epoch                 not given                    200 iterations                          --iters 200
    calibration           not given                    first 4 epochs                          --calibrate-epochs 4
    generator alone       not given                    4 epochs, on ImageNet 50, ResNet-50 at  --warmup-epochs
                                                       three bits 100
    quantizer             Eq. 18, called symmetric     Eq. 18 with an integer zero point;      as released (common.quant),
                                                       outputs of activation functions         --act-placement relu
    Figure 3(a)           H_info, by iteration         not released                            1 - H_info / ln C, by epoch,
                                                                                               of 256 fixed noise vectors
    Figures 1, 3(b):      "classification loss"        not released                            cross-entropy with the images'
      training loss                                                                            labels, mean over an epoch
    student's BatchNorms  not given                    eval mode                               eval mode: fixed statistics
    reported accuracy     not given                    best epoch on test images               last epoch (best also recorded)

The released code does not run as uploaded, and the published figures cannot be traced to either column. `--variant
released` is the default, because only the code has values by network and number of bits. For CIFAR it has those of three bits,
which are used for all bits here; on ImageNet other networks than ResNet-18, ResNet-50 and MobileNetV2 take ResNet-18's.
AdaSG, the predecessor, has both losses at the same weight in its code: `--alpha-ds 0.1 --alpha-as 0.1 --lambda-l 0.3`.
`--schedule short` (SHORT, below) goes beyond the paper: it takes minutes, and L_BNS has ten times the weight.
With the bundled teacher the full schedule loses 1.52 points at 4 bits and 0.22 at 5. At 3 bits it diverges in epoch 82, and
with `--clipped-ste` it is best after 30 of its 400 epochs (docs/MEASUREMENTS.md).

Both losses need the student's logits on the same images. The generator's step does not change the student, so one forward
serves both, except for mixed images and for a compiled step with frozen ranges (`OneForward`). So while activation ranges
move, they are updated once per iteration, where the released code updates them twice.
"""

import copy
import math
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError, finetune
from common.analysis import TrainedRun, plot_losses
from common.bns import BatchNormStatistics
from common.capture import OneForward
from common.check import describe
from common.cli import Described, Parser, check_image_size, checked_schedule, fill_in, friendly_errors, number
from common.device import full_precision
from common.distributed import whole_batch
from common.images import RealImages
from common.models import SMALL_IMAGE
from common.ops import kd_loss, upsample_conv
from common.probe import input_channels
from common.quant import quantize
from common.report import draw_images, execute, print_rows
from common.run import Run

# ----------------------------------------------------------------------------------------------------------- generator


BN_EPS = 0.8  # of the BatchNorms after convolutions, as in the released code


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that is called with labels, as a conditional one is, and ignores them."""

    def forward(self, x, y):
        return super().forward(x)


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose scale and shift are looked up by label."""

    def __init__(self, num_classes, channels, eps=1e-5):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gamma = nn.Embedding(num_classes, channels)
        self.beta = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x, y):
        return self.gamma(y)[:, :, None, None] * self.bn(x) + self.beta(y)[:, :, None, None]


class Generator(nn.Module):
    """G(z | y). For small images (up to 64 pixels) the label enters as an embedding that multiplies the noise, for large ones
    through conditional BatchNorms.

    Args:
        num_classes: number of labels.
        image_size: side of the images, a multiple of 4.
        channels: of the images.
        latent_dim: length of the noise vector.
    """

    def __init__(self, num_classes, image_size=32, channels=3, latent_dim=100):
        super().__init__()
        small = image_size <= SMALL_IMAGE
        norm = BatchNorm if small else partial(ConditionalBatchNorm, num_classes)
        self.side = image_size // 4
        self.embedding = nn.Embedding(num_classes, latent_dim) if small else None
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.bn0 = norm(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn1 = norm(128, eps=BN_EPS)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.bn2 = norm(64, eps=BN_EPS)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z, y):
        """Images (B, channels, size, size), standardised, for noise z (B, latent_dim) and labels y (B,) int64."""
        z = z if self.embedding is None else self.embedding(y) * z
        x = self.linear(z).view(-1, 128, self.side, self.side)
        x = F.leaky_relu(self.bn1(upsample_conv(self.bn0(x, y), self.conv1), y), 0.2)
        x = F.leaky_relu(self.bn2(upsample_conv(x, self.conv2), y), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))


def make_generator(teacher, cfg, channels, example=None):
    """The generator that `cfg` describes, on the CPU; it does not depend on the teacher."""
    return Generator(cfg.num_classes, cfg.image_size, channels, cfg.latent_dim)


def sample(generator, y, cfg):
    """Images of labels y (B,), with fresh noise."""
    return generator(torch.randn(len(y), cfg.latent_dim, device=y.device), y)


# -------------------------------------------------------------------------------------------------------------- losses


GDFQ_BNS_WEIGHT = 0.1  # alpha of GDFQ's L(G) = L_CE + alpha L_BNS


def entropy(z_p, z_q, temperature=1.0):
    """H_info(p_ds) with p_ds = softmax((z_p - z_q) / T), Eq. 1 and 2.

    Args:
        z_p, z_q: the teacher's and the student's logits, (B, C).
        temperature: T, 1 in the paper.

    Returns:
        (B,), 0 to ln C; ln C where teacher and student agree.
    """
    log_p_ds = F.log_softmax((z_p - z_q) / temperature, 1)
    return -(log_p_ds.exp() * log_p_ds).sum(1)


def normalised_entropy(z_p, z_q, detach_least=False):
    """H'_info(p_ds) (B,), 0 to 1; H_nor of Eq. 3 is 1 - H'. It is 0 for the sample of the batch that the two networks
    disagree about most.

    Args:
        z_p, z_q: the teacher's and the student's logits, (B, C), B at least 2.
        detach_least: whether the batch's smallest entropy is a constant. It has a gradient in the generator's hinges, as in
            the released code. In the student's loss that gradient would reward parting from the teacher on that sample.
    """
    h = entropy(z_p, z_q)
    least = whole_batch(h).min().detach() if detach_least else whole_batch(h).min()
    return (h - least) / (math.log(z_p.shape[1]) - least).clamp(min=1e-4)  # below it only rounding error remains


def loss_ds(z_p, z_q, y):
    """L_ds = H_CE(p_ds, y), Eq. 6: images that the teacher classifies as y and the student does not. Logits (B, C), labels
    (B,)."""
    return F.cross_entropy(z_p - z_q, y)


def loss_as(z_p, z_q, y):
    """L_as = H_CE(p_as, y) with p_as = softmax(z_p + z_q), Eq. 7 and 8: images that both classify as y."""
    return F.cross_entropy(z_p + z_q, y)


def margin_loss(h, lambda_l, lambda_u):
    """The hinges of Eq. 12, which keep H' (B,) between its bounds: no image too hard (small H') or too easy (large)."""
    return F.relu(lambda_l - h).mean() + F.relu(h - lambda_u).mean()


def generator_loss(z_p, z_q, y, bns, cfg):
    """What the generator minimises: Eq. 12, negated, or GDFQ's loss as a control.

    Args:
        z_p, z_q: the teacher's and the student's logits, (B, C), both with a graph to the images.
        y: labels (B,).
        bns: L_BNS of the same batch, a scalar.
    """
    if cfg.generator_loss == "gdfq":
        return F.cross_entropy(z_p, y) + GDFQ_BNS_WEIGHT * bns
    zero = torch.zeros_like(bns)
    hinges = zero if cfg.no_margin else margin_loss(normalised_entropy(z_p, z_q), cfg.lambda_l, cfg.lambda_u)
    l_ds = zero if cfg.no_ds else loss_ds(z_p, z_q, y)
    l_as = zero if cfg.no_as else loss_as(z_p, z_q, y)
    l_bal = cfg.alpha_ds * l_ds + cfg.alpha_as * l_as  # Eq. 9
    return hinges + cfg.beta * l_bal + cfg.gamma * (zero if cfg.no_bns else bns)


def student_loss(z_p, z_q, y, cfg):
    """What the student minimises, as --student-loss says.

    "eq13" is the paper's 1 - H'_info(p_ds) (Eq. 13). The default "entropy-t" is not Eq. 13 but what the released code has
    there: -T^2 H(z_p - z_q; T), for large T half the variance over the classes of the logits' difference, up to a constant.
    "gdfq" is cross-entropy and distillation, as a control.

    Args:
        z_p, z_q: the teacher's and the student's logits, (B, C).
        y: labels (B,) or their probabilities (B, C); only "gdfq" uses them.
    """
    temperature = cfg.temperature
    if cfg.student_loss == "eq13":
        return (1 - normalised_entropy(z_p, z_q, detach_least=True)).mean()
    if cfg.student_loss == "entropy-t":
        return -(temperature**2) * entropy(z_p, z_q, temperature).mean()
    return F.cross_entropy(z_q, y) + kd_loss(z_q, z_p, temperature, "mean")  # GDFQ's, as released


# ----------------------------------------------------------------------------------------------------------- algorithm


def compress(teacher, cfg, run=None):
    """Quantize a network without data.

    Args:
        teacher: a trained classifier with BatchNorm2d, (B, channels, image_size, image_size) -> (B, num_classes); it is
            copied and left as it is.
        cfg: from `config(...)`, or the command line.
        run: a `Run`, which handles device, files and progress; by default nothing is written or shown.

    Returns:
        The quantized network, in eval mode.

    Raises:
        InputError: a teacher without BatchNorm, of another shape, or with something that cannot be quantized.
    """
    run = run or Run(cfg)
    device, channels = run.device, input_channels(teacher)
    check_image_size(cfg, multiple=4)
    teacher, example = run.adopt(teacher)
    student = quantize(teacher, cfg.wbits, cfg.abits, cfg.act_placement, cfg.clipped_ste, example)
    student = finetune.set_ranges(student, cfg.act_ranges)  # this, MatchedFeatures and `mixed` go beyond the paper, if asked to
    shared = OneForward(run, student, same_images=cfg.mix == "none")  # the student's logits, for both losses
    stats, features = BatchNormStatistics(teacher), finetune.MatchedFeatures(teacher, student, cfg.feature_weight)
    real = cfg.data_source == "real"  # training images take the generator's place, and nothing is trained there
    generator = RealImages(run) if real else run.place(make_generator(teacher, cfg, channels, example))
    optim_g = finetune.generator_optimizer(generator, cfg, run.fused)
    sgd = {"momentum": 0.9, "nesterov": True}
    optim_q = finetune.student_optimizer(student, cfg.optimizer, cfg.lr_q, cfg.weight_decay, run.fused, **sgd)

    def synthesize(y):
        return run.compute(sample, generator, y, cfg)

    def generator_step():
        y = torch.randint(cfg.num_classes, (cfg.batch_size,), device=device)
        x = synthesize(y)
        z_p, z_q = run.compute(teacher, x), shared.for_generator(x)
        bns = stats.loss(cfg.bns_form)
        if not real:
            loss = generator_loss(z_p, z_q, y, bns, cfg)
            if loss.requires_grad:
                shared.update_generator(optim_g, loss)
            run.log(loss_g=loss, bns=bns)
        run.log(**game_figures(z_p.detach(), z_q.detach(), y))
        return x.detach(), z_p.detach(), y

    def student_step(x, z_p, y):
        x, z_p, y = finetune.mixed(run, teacher, x, z_p, y)
        loss = features.added_to(student_loss(z_p, shared.for_student(x), y, cfg))
        run.update(optim_q, loss)
        run.log(loss_q=loss)

    def iteration(calibrating, tuning):
        shared.begin(calibrating, tuning)
        batch = generator_step()
        if tuning:
            student_step(*batch)

    run.announce(describe(student))
    step = run.capture(iteration, optim_g, optim_q)
    # the first --calibrate-epochs are calibrating, those after the first --warmup-epochs tuning
    for calibrating, tuning in finetune.phases(run, student, generator, synthesize, optim_g, optim_q):
        with measured_gains(run, teacher, student) if tuning and not calibrating else nullcontext():  # Figure 3(a)
            for _ in run.steps():
                step(calibrating, tuning)
    return finetune.keep_ranges(student)


# ------------------------------------------------------------------------------------------------------------ analyses


@torch.no_grad()
def game_figures(z_p, z_q, y):
    """How the game stands for a batch, as scalar tensors by name: mean, 10 %, 50 % and 90 % quantiles of H' (of quantile q the
    sample nearest to rank q (B - 1)); ds_samples, the share of disagreement samples (Definition 1: the teacher says y, the
    student does not); as_samples, that of agreement samples (Definition 2: both say y); train_loss, the
    student's cross-entropy (Figure 3(b)). Logits (B, C), labels (B,)."""
    h, p, q = normalised_entropy(z_p, z_q), z_p.argmax(1), z_q.argmax(1)
    known = p == y
    ordered = whole_batch(h).sort().values
    low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9))
    shares = {"ds_samples": (known & (p != q)).float().mean(), "as_samples": (known & (p == q)).float().mean()}
    return {"h_mean": h.mean(), "h_q10": low, "h_q50": middle, "h_q90": high, **shares, "train_loss": F.cross_entropy(z_q, y)}


@torch.no_grad()
@full_precision()
def disagreement(run, teacher, *students):
    """Figure 3(a)'s quantity for each student: the mean of 1 - H_info(p_ds) / ln C, 0 to 1, over images that the generator
    makes of 256 fixed noise vectors."""
    classes = run.cfg.num_classes
    labels = torch.arange(256) % classes if classes <= 256 else torch.arange(256) * classes // 256
    parts = draw_images(run, labels, seed=0).split(256 if run.cfg.image_size <= SMALL_IMAGE else run.cfg.batch_size)
    z_p = torch.cat([teacher(part) for part in parts])
    h = [entropy(z_p, torch.cat([student(part) for part in parts])) for student in students]
    return [1 - values.mean().item() / math.log(classes) for values in h]


@contextmanager
def measured_gains(run, teacher, student):
    """Figure 3(a) by epochs: notes how in an epoch the generator's, then the student's progress changes the disagreement."""
    (before,), student_before = disagreement(run, teacher, student), copy.deepcopy(student)
    yield
    after_g, after_q = disagreement(run, teacher, student_before, student)
    run.note(gain_g=after_g - before, gain_q=after_q - after_g, disagreement=after_q)


def similarity(z_p, z_q):
    """Figure 5(c): L1 norms (N, N) of the differences between the samples' p_ds, 0 (alike) to 2. Logits (N, C)."""
    p_ds = (z_p - z_q).softmax(1)  # Eq. 1
    return torch.cdist(p_ds, p_ds, p=1)


@torch.no_grad()
@full_precision()
def analyze(cfg, samples=3200, batch=16, each=10):
    """Figures 1, 3(b), 4(b), 5 and 6 of a finished run; returns what analysis/adadfq.json holds.

    H' is that of `samples` images in batches of `batch`, whatever batches the run had; similarity and pictures are those of
    `each` images of each of `each` classes drawn at random.
    """
    run = TrainedRun(cfg)
    y = torch.randint(run.cfg.num_classes, (samples,))
    z_p, z_q = run.logits(run.images(y))
    batches = list(zip(z_p.split(batch), z_q.split(batch), y.split(batch)))
    h = torch.cat([normalised_entropy(z_p, z_q) for z_p, z_q, _ in batches])
    figures = [game_figures(*part) for part in batches]
    result = {name: torch.stack([f[name] for f in figures]).mean().item() for name in figures[0]}
    result["cross_entropy"] = result.pop("train_loss")  # that of training is in `losses`
    result["h_histogram"] = h.histc(20, 0, 1).int().tolist()

    classes = torch.randperm(run.cfg.num_classes)[:each].sort().values
    y = classes.repeat_interleave(each)
    images = list(run.images(y))
    l1, same = similarity(*run.logits(images)), y[:, None] == y
    result["classes"], result["l1_between_classes"] = classes.tolist(), l1[~same].mean().item()
    result["l1_within_classes"] = (l1[same].sum() / (same.sum() - len(y))).item()  # but for the diagonal
    losses = run.losses()
    rows = [(name, (f"{value:.3f}",)) for name, value in result.items() if isinstance(value, float)]
    print_rows(f"of {samples:,} samples", ("mean",), rows)
    run.save_beside_real("adadfq-images", torch.cat(images).unflatten(0, (-1, each)).cpu(), classes)
    panels = {"cross-entropy of the student": lambda panel: plot_losses(panel, losses)} if losses else {}
    panels |= {
        f"H' of {samples:,} samples": lambda panel: panel.hist(h.numpy(), 20, range=(0, 1)),
        "L1 norm between p_ds, the darker the more alike": lambda panel: panel.imshow(l1, cmap="gray", vmin=0, vmax=2),
    }
    run.write("adadfq", result, losses | {"h": h, "l1": l1, "labels": y}, panels)
    return result


# -------------------------------------------------------------------------------------------------------- command line


class Settings(NamedTuple):
    """What the released code sets by network and bits."""

    warmup_epochs: int
    lr_q: float
    decay_epochs: tuple
    alpha_ds: float
    lambda_l: float


CIFAR = Settings(4, 1e-4, (100, 200, 300), 0.2, 0.1)
IMAGENET = {  # by network and bits; 2 bits take the values of 3, and 6 to 8 bits those of 5
    ("resnet18", 3): Settings(50, 1e-5, (350, 400), 0.2, 0.1),
    ("resnet18", 4): Settings(50, 1e-5, (350, 400), 0.2, 0.3),
    ("resnet18", 5): Settings(50, 1e-5, (350, 400), 0.3, 0.3),
    ("mobilenet_v2", 3): Settings(50, 1e-5, (350, 400), 0.2, 0.1),
    ("mobilenet_v2", 4): Settings(50, 1e-5, (350, 400), 0.3, 0.1),
    ("mobilenet_v2", 5): Settings(50, 1e-5, (350, 400), 0.2, 0.1),
    ("resnet50", 3): Settings(100, 1e-4, (150, 300, 400), 0.2, 0.4),
    ("resnet50", 4): Settings(50, 1e-4, (200, 300, 400), 0.1, 0.3),
    ("resnet50", 5): Settings(50, 1e-4, (350, 400), 0.2, 0.3),
}

SHORT = finetune.short_schedule(gamma=10.0)


def parser():
    p = Parser("adadfq", __doc__.split("\n\n")[0])
    group = p.add_argument_group("AdaDFQ")
    add = group.add_argument
    variant = "use the losses and settings of the released code or of the paper; the table at the top of adadfq.py lists them"
    add("--variant", choices=("released", "paper"), default="released", help=variant)
    p.add_training(
        "AdaDFQ: schedule",
        epochs=400, iters=200, batch_size=16,
        warmup_epochs=Described("CIFAR 4, ImageNet 50, ResNet-50 at 3 bits 100"), calibrate_epochs=4,
        lr_g=1e-3, beta1={"released": 0.5, "paper": 0.9},
        lr_q=Described("CIFAR 1e-4, ImageNet 1e-5, ResNet-50 on ImageNet 1e-4"), weight_decay=1e-4,
        decay_epochs=Described("CIFAR 100 200 300, ImageNet by network and bits, with --variant paper 350"),
        latent_dim=100, bns_form={"released": "gdfq", "paper": "sum"},
    )  # fmt: skip
    by_network = "with --variant released on ImageNet 0.1 to 0.4, by network and bits"
    low = f"lower bound of the normalised entropy H' (Eq. 12) (default: 0.1; {by_network})"
    add("--lambda-l", type=number(0, 1), help=low)
    add("--lambda-u", type=number(0, 1), default=0.8, help="upper bound of the normalised entropy H' (Eq. 12)")
    about = f"weight of L_ds (Eq. 9) (default: 0.2; {by_network.replace('0.4', '0.3')})"
    add("--alpha-ds", type=number(0), help=about)
    add("--alpha-as", type=number(0), default=0.1, help="weight of L_as (Eq. 9)")
    add("--beta", type=number(0), default=1.0, help="common weight of L_ds and L_as (Eq. 12)")
    add("--gamma", type=number(0), default=1.0, help="weight of the BatchNorm statistics loss L_BNS (Eq. 12)")
    sides = "loss of the student: the paper's (eq13), the released code's (entropy-t) or GDFQ's (gdfq)"
    by_variant = {"released": "entropy-t", "paper": "eq13"}
    p.add_derived(group, "--student-loss", by_variant, sides, choices=("eq13", "entropy-t", "gdfq"))
    temperature = "temperature T of the student losses entropy-t and gdfq (default: CIFAR 20, ImageNet 5; gdfq 20)"
    add("--temperature", type=number(1e-3, 1e6), help=temperature)
    add = p.add_argument_group("ablations").add_argument
    add("--generator-loss", choices=("adadfq", "gdfq"), default="adadfq", help="loss of the generator: AdaDFQ's or GDFQ's")
    add("--no-ds", action="store_true", help="train the generator without L_ds (Table 3)")
    add("--no-as", action="store_true", help="train the generator without L_as (Table 3)")
    add("--no-margin", action="store_true", help="train the generator without the bounds on H' (Table 3)")
    add("--no-bns", action="store_true", help="train the generator without the BatchNorm statistics loss (Table 3)")
    add("--no-finetune", action="store_true", help="only calibrate the activation ranges; do not fine-tune")
    p.without_effect("--no-ds", "--alpha-ds")
    p.without_effect("--no-as", "--alpha-as")
    p.without_effect("--no-ds and --no-as", "--beta")
    p.without_effect("--no-margin", "--lambda-l --lambda-u")
    p.without_effect("--no-bns", "--gamma --bns-form")
    p.without_effect("--no-ds and --no-as and --no-margin and --no-bns", "--lr-g --beta1")
    terms = "--alpha-ds --alpha-as --beta --gamma --lambda-l --lambda-u --no-ds --no-as --no-margin --no-bns"
    p.without_effect("--generator-loss gdfq", terms)
    p.without_effect("--data-source real", "--generator-loss", terms)
    p.without_effect("--no-finetune", "--warmup-epochs --lr-q --weight-decay --student-loss --temperature")
    finetune.add_flags(p, SHORT)
    p.add_analysis("Figures 1, 3(b), 4(b), 5 and 6")
    return p


def _complete(cfg):
    large, settings = cfg.image_size > SMALL_IMAGE, CIFAR
    if large:
        network = cfg.arch if (cfg.arch, 3) in IMAGENET else "resnet18"
        settings = IMAGENET[network, min(max(cfg.wbits, 3), 5)]
    if cfg.variant == "paper":
        decay = (350,) if large else settings.decay_epochs
        settings = settings._replace(decay_epochs=decay, alpha_ds=0.2, lambda_l=0.1)
    if cfg.student_loss == "eq13" and cfg.temperature is not None:
        raise InputError(f"--temperature is {cfg.temperature} and --student-loss eq13 has none; leave it out")
    temperature = 5.0 if large and cfg.student_loss != "gdfq" else 20.0
    fill_in(cfg, settings._asdict() | {"decay_epochs": list(settings.decay_epochs), "temperature": temperature})
    if cfg.lambda_l > cfg.lambda_u:
        raise InputError(
            f"--lambda-l is {cfg.lambda_l} and --lambda-u is {cfg.lambda_u}; give bounds with 0 <= lambda-l <= lambda-u <= 1"
        )
    if cfg.batch_size < 2:
        raise InputError(
            f"--batch-size is {cfg.batch_size}; H' is relative to the batch's smallest entropy, so give at least 2"
        )
    return checked_schedule(cfg)


def parse_args(argv=None):
    return _complete(parser().parse(argv))


def config(**settings):
    """Settings for `compress` by flag name: config(dataset="folder", num_classes=5, image_size=32, bits=3)."""
    return _complete(parser().config(**settings))


def main(argv=None):
    with friendly_errors("adadfq.py"):
        given = parser().parse(argv)
        return execute(_complete(given), compress, short=SHORT) if given.analyze is None else analyze(given)


if __name__ == "__main__":
    main()
