"""GDFQ: Generative Low-bitwidth Data Free Quantization (Xu et al., ECCV 2020).

A conditional generator is trained against the frozen full-precision network (the teacher): its images must be classified
as the label they were drawn for, and must give every BatchNorm layer the statistics it saw in training. The quantized
network (the student) is calibrated and then fine-tuned on these images, with labels and with the teacher's outputs.

    python gdfq.py --arch resnet20 --dataset cifar100 --bits 4

Where the equations are (the Qimera paper restates GDFQ; the numbers are Qimera's where no other paper is named):
    Generator                       G(z | y)
    generator_loss                  L(G) = L_CE + alpha * L_BNS                         Eq. 1
    BatchNormStatistics.loss        L_BNS                                               Eq. 11 of AdaDFQ
    student_loss                    L(Q) = L_CE + delta * L_KD                          Eq. 3
    common.ops.kd_loss              L_KD, Kullback-Leibler divergence at temperature T
    common.quant                    the quantizer                                       Eq. 10; Eq. 18 of AdaDFQ

    what                     paper                      released code               here
    L_BNS                    sum of squared L2 norms    mean over layers, channels  --variant, --bns-form
    L_KD                     per sample                 also divided by C classes   --variant, --kd-reduction
    generator's Adam, beta1  not given; AdaDFQ states   0.5                         --variant, --beta1
                             0.9 for its own
    eps of the BatchNorms    not given                  0.8 (CIFAR and ImageNet)    0.8
      after convolutions
    student's BatchNorms     not given                  eval mode                   eval mode; scale and shift learn, as
                                                                                    there (--no-fixed-bns)
    quantizer                Qimera's Eq. 10,           2^n - 1 steps, a range for  as released, integer zero points
                             AdaDFQ's Eq. 18            each channel or activation
    activation ranges        not given                  moving average that feeds   plain moving average
                                                        its correction back
    quantized                all layers, activations    all layers, outputs of      --act-placement relu
                                                        activation functions
    calibration              not given                  first 4 epochs              --calibrate-epochs 4
    generator alone          not given                  4 epochs, on ImageNet 50    --warmup-epochs
    temperature              not given                  20                          20 (--temperature)
    settings, CIFAR-10       not given                  none                        those of CIFAR-100
    settings, ResNet-50,     not given                  none                        those of ResNet-18
      MobileNetV2
    precision                not given                  fp32                        --precision; auto is bf16 where the
                                                                                    hardware has it
    teacher, top-1 %, as     CIFAR-10 93.89, CIFAR-100 70.33, ResNet-18 71.47,      --weights; by default the bundled
      Qimera and AdaDFQ      ResNet-50 77.73, MobileNetV2 73.03                     92.41 for CIFAR-10, pytorchcv's 70.36
      report it                                                                     for CIFAR-100, torchvision's for ImageNet
    real samples in          not given                  not released                half of each batch from which the
      Qimera's Table 1                                                              student learns
    Mixup, CutMix in         not given                  not released                every batch from which the student
      Qimera's Table 2                                                              learns; shares U(0, 1), see mix_images
    reported accuracy        not given                  best epoch on test images   last epoch (best also recorded)

The paper column is taken from the papers that restate GDFQ. The published figures were presumably made with the released
code, so `--variant released` is the default. Activation ranges are updated
in the first `--calibrate-epochs` epochs and then frozen, on ImageNet too, where the generator trains alone for longer.
`--schedule short` (SHORT, below) goes beyond the paper: it takes minutes, and reweights the terms of both losses.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError, finetune
from common.bns import BatchNormStatistics
from common.check import describe
from common.cli import Parser, check_image_size, checked_schedule, friendly_errors, number, whole
from common.data import HALF_REAL, evaluation_batch, in_memory
from common.device import full_precision
from common.images import RealImages, training_set
from common.models import SMALL_IMAGE
from common.ops import kd_loss, upsample_conv
from common.probe import input_channels
from common.quant import quantize
from common.report import execute
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


def generator_loss(teacher_logits, y, bns, cfg):
    """L(G) = L_CE + alpha * L_BNS, Eq. 1: images of labels y (B,) with the statistics the teacher knows; bns is a scalar."""
    loss = 0.0 if cfg.no_ce else F.cross_entropy(teacher_logits, y)
    return loss if cfg.no_bns else loss + cfg.bns_weight * bns


def student_loss(student_logits, teacher_logits, target, cfg):
    """L(Q) = L_CE + delta * L_KD, Eq. 3; `target` is (B,) labels or (B, C) probabilities."""
    loss = 0.0 if cfg.no_student_ce else F.cross_entropy(student_logits, target)
    if cfg.no_kd:
        return loss
    return loss + cfg.kd_weight * kd_loss(student_logits, teacher_logits, cfg.temperature, cfg.kd_reduction)


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
    added = RealImages(run, *select_real(teacher, cfg, device)) if cfg.data_source in HALF_REAL else None
    stats, features = BatchNormStatistics(teacher), finetune.MatchedFeatures(teacher, student, cfg.feature_weight)
    real = cfg.data_source == "real"  # training images take the generator's place, and nothing is trained there
    generator = RealImages(run) if real else run.place(make_generator(teacher, cfg, channels, example))
    optim_g = finetune.generator_optimizer(generator, cfg, run.fused)
    sgd = {"momentum": 0.9, "nesterov": True}
    optim_q = finetune.student_optimizer(student, cfg.optimizer, cfg.lr_q, cfg.weight_decay, run.fused, **sgd)
    train_generator = not real and not (cfg.no_ce and cfg.no_bns)

    def synthesize(y):
        return run.compute(sample, generator, y, cfg)

    def generator_step():
        y = torch.randint(cfg.num_classes, (cfg.batch_size,), device=device)
        x = synthesize(y)
        logits, bns = run.compute(teacher, x), stats.loss(cfg.bns_form)
        if train_generator:
            loss = generator_loss(logits, y, bns, cfg)
            run.update(optim_g, loss)
            run.log(loss_g=loss, bns=bns)
        return x.detach(), logits.detach(), y

    def student_step(x, teacher_logits, y):
        if added:  # half of the batch is real (Table 1 of Qimera)
            x = torch.cat([x[: len(y) // 2], added(None, y[len(y) // 2 :])])
            teacher_logits = run.compute(teacher, x) if cfg.mix == "none" else None  # of mixed images, then
        x, teacher_logits, y = finetune.mixed(run, teacher, x, teacher_logits, y)
        logits = run.compute(student, x)
        loss = features.added_to(student_loss(logits, teacher_logits, y, cfg))
        run.update(optim_q, loss)
        run.log(loss_q=loss, train_loss=F.cross_entropy(logits.detach(), y))  # AdaDFQ's Figures 1 and 3(b)

    def iteration(calibrating, tuning):
        batch = generator_step()
        if tuning:
            student_step(*batch)
        elif calibrating:  # the student does not learn yet, but its activation ranges follow the images
            with torch.no_grad(), run.autocast():
                student(batch[0])

    run.announce(describe(student))
    step = run.capture(iteration, optim_g, optim_q)
    # the first --calibrate-epochs are calibrating, those after the first --warmup-epochs tuning
    for calibrating, tuning in finetune.phases(run, student, generator, synthesize, optim_g, optim_q):
        finetune.train_norms(student, tuning and cfg.no_fixed_bns)  # by default they keep the teacher's statistics
        for _ in run.steps():
            step(calibrating, tuning)
    return finetune.keep_ranges(student)


# ------------------------------------------------------------------------------------- a control of Qimera's Table 1


@torch.no_grad()
@full_precision()
def select_real(teacher, cfg, device):
    """--real-per-class training images of each class, drawn at random from those for which the teacher's highest confidence is
    below --confusing-below (confusing) or from the others (unconfusing), and their labels (Table 1 of Qimera).

    Raises:
        InputError: a class has fewer.
    """
    images, labels = training_set(cfg)
    batches = in_memory(images, labels, "", (cfg.mean, cfg.std), device, evaluation_batch(device, cfg.image_size))
    confidence = torch.cat([teacher(x).softmax(1).amax(1).cpu() for x, _ in batches])
    wanted = (confidence < cfg.confusing_below) == (cfg.data_source == "confusing")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(cfg.seed))
    chosen = []
    for label in range(cfg.num_classes):
        members = order[(wanted & (labels == label))[order]][: cfg.real_per_class]
        if len(members) < cfg.real_per_class:
            raise InputError(
                f"--data-source {cfg.data_source} finds {len(members)} training images of class {label} at --confusing-below "
                f"{cfg.confusing_below}, and --real-per-class is {cfg.real_per_class}; change one of them"
            )
        chosen.append(members)
    chosen = torch.cat(chosen)
    return images[chosen], labels[chosen]


# -------------------------------------------------------------------------------------------------------- command line


SHORT = finetune.short_schedule(bns_weight=100.0, kd_weight=20.0, kd_reduction="batchmean", feature_weight=200.0)


def parser():
    p = Parser("gdfq", __doc__.split("\n\n")[0])
    add = p.add_argument_group("GDFQ").add_argument
    variant = "use the losses and settings of the released code or of the paper: sets --bns-form, --kd-reduction and --beta1"
    add("--variant", choices=("released", "paper"), default="released", help=variant)
    half = "; confusing or unconfusing: half are real images of low or high confidence"  # Table 1 of Qimera
    p.add_training(
        "GDFQ: schedule and losses",
        epochs=400, iters=200, batch_size=(200, 16), warmup_epochs=(4, 50), calibrate_epochs=4,
        lr_g=1e-3, beta1={"released": 0.5, "paper": 0.9}, lr_q=(1e-4, 1e-6), weight_decay=1e-4, decay_epochs=[100, 200, 300],
        latent_dim=100,
        bns_weight=0.1, bns_form={"released": "gdfq", "paper": "sum"},  # alpha of Eq. 1
        kd_weight=1.0, temperature=20.0, kd_reduction={"released": "mean", "paper": "batchmean"},  # delta of Eq. 3
        sources=("generator", "real", *HALF_REAL), about_sources=half,
    )  # fmt: skip
    add = p.add_argument_group("ablations").add_argument
    add("--real-per-class", type=whole(1), default=15, help="number of real images of each class (confusing, unconfusing)")
    below = "an image is confusing if the teacher's highest confidence is below this"
    add("--confusing-below", type=number(0, 1), default=0.25, help=below)
    add("--no-ce", action="store_true", help="train the generator without the cross-entropy loss")
    add("--no-bns", action="store_true", help="train the generator without the BatchNorm statistics loss")
    add("--no-student-ce", action="store_true", help="train the student without the cross-entropy loss")
    add("--no-kd", action="store_true", help="train the student without the distillation loss")
    add("--no-fixed-bns", action="store_true", help="update the student's BatchNorm statistics during fine-tuning")
    add("--no-finetune", action="store_true", help="only calibrate the activation ranges; do not fine-tune")
    for source in HALF_REAL:
        p.without_effect(f"--data-source {source}", "--no-finetune")
        p.without_effect(f"--data-source {source} and --no-kd", "--no-student-ce")
    for source in ("generator", "real"):
        p.without_effect(f"--data-source {source}", "--real-per-class --confusing-below")
    p.without_effect("--data-source real", "--no-ce --no-bns")
    p.without_effect("--no-bns", "--bns-weight --bns-form")
    p.without_effect("--no-kd", "--kd-weight --temperature --kd-reduction")
    learning = "--warmup-epochs --lr-q --weight-decay --kd-weight --temperature --kd-reduction"
    p.without_effect("--no-finetune", learning, "--no-kd --no-student-ce --no-fixed-bns")
    p.without_effect("--no-kd and --no-student-ce and --feature-weight 0.0", learning, "--no-fixed-bns --mix --optimizer")
    p.without_effect("--no-ce and --no-bns", "--lr-g --beta1")
    finetune.add_flags(p, SHORT)
    return p


def _complete(cfg):
    cfg.no_finetune = cfg.no_finetune or (cfg.no_student_ce and cfg.no_kd and not cfg.feature_weight)
    return checked_schedule(cfg)


def parse_args(argv=None):
    return _complete(parser().parse(argv))


def config(**settings):
    """Settings for `compress` by flag name: config(dataset="folder", num_classes=5, image_size=32, bits=4)."""
    return _complete(parser().config(**settings))


def main(argv=None):
    with friendly_errors("gdfq.py"):
        return execute(parse_args(argv), compress, short=SHORT)


if __name__ == "__main__":
    main()
