"""Qimera: Data-free Quantization with Synthetic Boundary Supporting Samples (Choi et al., NeurIPS 2021).

A generator that gets class embeddings as its input is trained against the frozen full-precision network (the teacher, P), as
in GDFQ. With probability p a batch is made from superpositions of K class embeddings, with soft labels in the same proportions:
such images lie near the teacher's decision boundaries, which images of single classes do not cover. The quantized network
(the student, Q) is calibrated and then fine-tuned on both kinds.

    python qimera.py --arch resnet20 --dataset cifar100 --bits 4

Where the equations are:
    Latent (ReleasedLatent)                S(m) = z + sum_k lambda_k m_k, m_k = M(e_k)        Eq. 5, 6, 8, Sec. 4.3
    make_labels                            y' = sum_k lambda_k y_k                            Eq. 7, 8
    draw_labels                            lambda = Softmax(p), p ~ N(0, 1)                   Eq. 9
    make_latent                            extracted embedding initialization                 Sec. 4.4
    generator_loss, student_loss           L(G), L(Q) of GDFQ                                 Eq. 1, 3
    zaq_losses, common/zaq.py              L_o, L_f, L_a; L(G), L(Q) of ZAQ with L_CE         Eq. 2, 4, 11, 12
    common.quant                           the quantizer                                      Eq. 10
    common/boundaries.py                   distance ratio, intrusion score; PCA               Table 5, Figure 3, 5

    what                       paper                      released code               here
    batch, CIFAR / ImageNet    64 / 16                    200 / 16                    --variant, --batch-size
    student's learning rate    1e-4                       1e-4, on ImageNet 1e-6      --variant, --lr-q
    disentanglement mapping    to 64 (CIFAR), 100;        off, by an inverted flag;   --variant, --dm, --mapped-dim;
                               "single-layer perceptron"  linear, to 100              linear
    extracted initialization   always                     CIFAR-100, ResNet-50 only   --variant, --eei
    noise, one vector          per sample, after the      per embedding, before the   --variant, --noise after, before
                               mapping by Eq. 8, before   mapping                     or slot
                               it by Sec. 4.4 and 5.1
    factor on the noise        none                       1; for small images only    1, --noise-scale
    embeddings with noise      as they are                standardised per sample;    --variant, --normalise
                                                          when superposed, per slot
    embeddings                 trained; frozen in         trained                     trained; --freeze-embeddings
                               Appendix B.2
    classes of a sample        not given                  with replacement: of K = C  as released
                                                          some 63 % occur
    conditional BatchNorm of   not given                  mean, so K times smaller    sum; --variant, --cbn
      superposed embeddings
    eps of the BatchNorms      not given                  0.8                         0.8
      after convolutions
    L_BNS                      Eq. 1 names it only        mean over layers, channels  as released, --bns-form
    L_KD                       Eq. 3 names it only        also divided by C classes   as released, --kd-reduction
    temperature of L_KD        not given                  20                          20, --temperature
    activation ranges          not given                  moving average that feeds   plain moving average
                                                          its correction back
    calibration                not given                  first 4 epochs              --calibrate-epochs 4
    generator alone            not given                  4 epochs, on ImageNet 50    --warmup-epochs
    generator's Adam, beta1    not given                  0.5                         0.5, --beta1
    quantized                  all layers and             all layers, outputs of      --act-placement relu
                               activations                activation functions
    quantizer                  Eq. 10: 2^(n-1) steps      2^n - 1 steps, integer      as released
                               (AdaDFQ cites it with      zero points, activations
                               2^n - 1), channels' ranges with one range
    K and p                    varied in Table 4          by network and bits         as released; three bits as four,
                                                                                      other networks as CIFAR-10
    ZAQ's game (Table 3)       Eq. 11, 12 and rho only    not released; ZAQ's own is  --adversarial zaq (ZAQ's code) or
                                                                                      zaq-paper: table in common/zaq.py
    intrusion score            sum of other logits        not released                sum of other probabilities
    Figure 3(a), real images   of the training set        not released                of the test set
    teacher, CIFAR-10, -100    93.89, 70.33 %             as the paper                92.41 (bundled), 70.36 (pytorchcv)
    teacher, ResNet-18, -50,   71.47, 77.73,              as the paper                69.76, 76.13,
      MobileNetV2              73.03 %                                                71.88 (torchvision); --weights
    precision                  not given                  fp32                        --precision; auto is bf16 where the
                                                                                      hardware has it
    reported accuracy          not given                  best epoch on test images   last epoch (best also recorded)

`--variant paper` is the default. The released scripts correspond to "+SE" and "+SE, EEI" in the paper's Table 4. Its main
results are those of "+SE, DM, EEI", which need the mapping.
`--schedule short` (SHORT, below) goes beyond the paper: it takes minutes, and reweights the terms of both losses.
"""

import argparse
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError, finetune
from common.bns import BatchNormStatistics
from common.boundaries import analyze
from common.check import describe
from common.cli import Parser, check_image_size, checked_schedule, fill_in, friendly_errors, number, whole
from common.distributed import whole_moments
from common.images import RealImages
from common.models import SMALL_IMAGE
from common.ops import kd_loss, soft_labels, superpose, upsample_conv
from common.probe import input_channels
from common.quant import quantize
from common.report import execute
from common.run import Run
from common.trace import last_layer
from common.zaq import FORMS, FeatureMaps, feature_distance

# ----------------------------------------------------------------------------------------------------------- generator


BN_EPS = 0.8  # of the BatchNorms after convolutions, as in the released code


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that is called with labels, as a conditional one is, and ignores them."""

    def forward(self, x, soft):
        return super().forward(x)


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


class Generator(nn.Module):
    """The body of the generator; for large images its BatchNorms are conditional (Sec. 5.1).

    `in_features` is d, `num_classes` C, `image_size` the side of the images, a multiple of 4, `channels` theirs.
    """

    def __init__(self, in_features, num_classes, image_size=32, channels=3):
        super().__init__()
        norm = BatchNorm if image_size <= SMALL_IMAGE else partial(ConditionalBatchNorm, num_classes)
        self.side = image_size // 4
        self.linear = nn.Linear(in_features, 128 * self.side**2)
        self.bn0 = norm(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn1 = norm(128, eps=BN_EPS)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.bn2 = norm(64, eps=BN_EPS)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, latent, soft):
        """Images (B, channels, size, size), standardised, for latent vectors (B, d) and soft labels (B, C)."""
        x = self.linear(latent).view(-1, 128, self.side, self.side)
        x = F.leaky_relu(self.bn1(upsample_conv(self.bn0(x, soft), self.conv1), soft), 0.2)
        x = F.leaky_relu(self.bn2(upsample_conv(x, self.conv2), soft), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))


# ---------------------------------------------------------------------------------------- superposition, Eq. 5 to 9


class Labels(NamedTuple):
    """What the samples of a batch are made of; a sample of one class has the shares (1, 0, ..., 0)."""

    classes: torch.Tensor  # (B, K) int64; a class may come twice
    shares: torch.Tensor  # lambda, (B, K)
    soft: torch.Tensor  # y', (B, C)
    superposed: torch.Tensor  # bool scalar: whether this is a batch of superpositions


class Latent(nn.Module):
    """The generator's input, (B, d): class embeddings, mapped and superposed, with noise (Eq. 5, 6, 8).

    Args:
        num_classes: C.
        width: D, the dimension of an embedding.
        mapped: d, the dimension to which embeddings are mapped; None leaves the mapping out.
        noise: where z enters: "after" the mapping, in R^d (Eq. 8, Sec. 4.3), or "before" it, in R^D, after the superposition
            (Sec. 4.4, 5.1).
        noise_scale: factor on z.

    With the noise after it, a linear M can express nothing that a table of C vectors in R^d cannot; it only changes their
    initial values and how they are trained.
    """

    def __init__(self, num_classes, width, mapped=None, noise="after", noise_scale=1.0):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)  # E
        self.mapping = nn.Linear(width, mapped) if mapped else nn.Identity()  # M
        self.out_features = mapped or width
        self.noise, self.noise_scale = noise, noise_scale

    def draw_noise(self, classes):
        """z for the classes (B, K) of `Labels`: (B, d) after the mapping, (B, D) before it."""
        width = self.out_features if self.noise == "after" else self.embedding.embedding_dim
        return self.noise_scale * torch.randn(len(classes), width, device=classes.device)  # z ~ N(0, 1)

    def forward(self, labels, z):
        if self.noise == "after":
            m = self.mapping(self.embedding.weight)  # m_k = M(e_k), Sec. 4.3
            return z + superpose(labels.soft, m)  # S(m) = z + sum_k lambda_k m_k, Eq. 8; of two classes Eq. 6, of one Eq. 5
        return self.mapping(z + superpose(labels.soft, self.embedding.weight))  # M(S(e))


class ReleasedLatent(Latent):
    """The input with --noise slot or --normalise, as the released code has both; `Latent` covers the paper's two readings.

    `noise` "slot" adds one vector to each of the K embeddings, before they are mapped and then superposed. `normalise`
    standardises the sums of embeddings and noise: in a batch of single classes each sample by itself, in a superposed one the
    whole batch (slot by slot).
    """

    def __init__(self, *args, normalise=True):
        super().__init__(*args)
        self.normalise = normalise

    def draw_noise(self, classes):
        """As `Latent.draw_noise`; (B, K, D) for slots."""
        if self.noise != "slot":
            return super().draw_noise(classes)
        return self.noise_scale * torch.randn(*classes.shape, self.embedding.embedding_dim, device=classes.device)

    def forward(self, labels, z):
        if self.noise == "after":
            return self.normalised(super().forward(labels, z), labels)
        if self.noise == "before":
            return self.mapping(self.normalised(z + superpose(labels.soft, self.embedding.weight), labels))
        slots = self.normalised(z + self.embedding(labels.classes), labels)  # (B, K, D)
        return (labels.shares[:, :, None] * self.mapping(slots)).sum(1)

    def normalised(self, x, labels):
        if not self.normalise:
            return x
        return torch.where(labels.superposed, standardise(x, (0, -1)), standardise(x, -1))


def standardise(x, dims):
    """x (B, ..., d) less its mean, over its standard deviation: each sample's own (-1), or those of the batch (0, -1)."""
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    if dims != -1:
        mean, variance = whole_moments(mean, variance)  # other processes may have rows of the batch
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def make_labels(classes, shares, num_classes, superposed=True):
    """Labels of superpositions; `superposed` is a bool or a bool scalar tensor."""
    soft = soft_labels(classes, shares, num_classes)  # y' = sum_k lambda_k y_k, Eq. 7, 8
    return Labels(classes, shares, soft, torch.as_tensor(superposed, device=classes.device))


def single_labels(y, k, num_classes):
    """Labels of samples of one class each, y (B,), as superpositions of K."""
    shares = torch.eye(1, k, device=y.device).expand(len(y), k)
    return make_labels(y[:, None].expand(-1, k), shares, num_classes, superposed=False)


def draw_labels(cfg, device):
    """Labels of a batch, superposed with probability --p; drawn on the device, in shapes that do not depend on the outcome."""
    classes = torch.randint(cfg.num_classes, (cfg.batch_size, cfg.k), device=device)
    superposed = torch.rand((), device=device) < cfg.p
    shares = torch.randn(cfg.batch_size, cfg.k, device=device).softmax(1)  # lambda, Eq. 9; its p_i ~ N(0, 1) are not --p
    shares = torch.where(superposed, shares, torch.eye(1, cfg.k, device=device))
    return make_labels(classes, shares, cfg.num_classes, superposed)


def make_latent(teacher, cfg, example=None):
    """The latent that `cfg` describes; its embeddings start as the rows of the teacher's last layer, or random."""
    try:
        rows = None if cfg.latent_dim else last_layer(teacher, example)[1]
    except InputError as error:
        if cfg.eei:
            raise InputError(f"{error}; give --no-eei, which starts from random embeddings") from None
        rows = None
    width = cfg.latent_dim or (64 if rows is None else rows.shape[1])  # the last layer's (Sec. 5.1); 64 is chosen here
    mapped = cfg.mapped_dim if cfg.dm else None
    about = cfg.num_classes, width, mapped, cfg.noise, cfg.noise_scale
    as_released = cfg.noise == "slot" or cfg.normalise
    latent = ReleasedLatent(*about, normalise=cfg.normalise) if as_released else Latent(*about)
    latent.embedding.requires_grad_(not cfg.freeze_embeddings)
    if cfg.eei:
        if len(rows) != cfg.num_classes:
            expected = f"{len(rows)} rows, expected one for each of the {cfg.num_classes} classes"
            raise InputError(f"the last layer of the model has {expected}; give --no-eei, which starts from random embeddings")
        latent.embedding.weight.data.copy_(rows)  # Sec. 4.4
    return latent


class SuperposingGenerator(nn.Module):
    """A latent, and the body that makes images of it: (latent vectors, soft labels) -> images.

    `cbn` "sum" superposes the rows of conditional BatchNorms, "mean" takes a K-th of that in superposed batches.
    """

    def __init__(self, latent, body, cbn="sum"):
        super().__init__()
        self.latent, self.body, self.cbn = latent, body, cbn

    def forward(self, labels, z=None):
        """Images of `Labels`, by default with noise of their own."""
        classes, soft = labels.classes, labels.soft
        with torch.autocast(soft.device.type, enabled=False):
            latent = self.latent(labels, self.latent.draw_noise(classes) if z is None else z)
            if self.cbn == "mean":
                soft = torch.where(labels.superposed, soft / classes.shape[1], soft)
        return self.body(latent, soft)


def make_generator(teacher, cfg, channels, example=None):
    """The generator that `cfg` describes, for a teacher; on the CPU."""
    latent = make_latent(teacher, cfg, example)
    about = (cfg.num_classes, cfg.image_size, channels)
    if cfg.generator == "qimera":
        return SuperposingGenerator(latent, Generator(latent.out_features, *about), cfg.cbn)
    Discovered, genotype = discovered(cfg)
    return SuperposingGenerator(latent, Discovered(genotype, *about, latent.out_features), cfg.cbn)


class RealSamples(RealImages):
    """Real images of `Labels` of single classes (Table 1)."""

    def forward(self, labels):
        return super().forward(None, labels.classes[:, 0])


def sample(generator, y, cfg):
    """Images of labels y (B,), of one class each, with fresh noise."""
    return generator(single_labels(y, cfg.k, cfg.num_classes))


def discovered(cfg):
    """AutoReCon's generator class and the genotype that --generator names; only these need the other script."""
    source, _, name = cfg.generator.partition(":")
    if source != "autorecon" or name in ("", "gdfq", "gdfq-cbn", "search"):
        raise InputError(f"--generator is {cfg.generator}; give qimera or autorecon:GENOTYPE, such as a run folder")
    try:
        import autorecon
    except ImportError:
        raise InputError(f"--generator {cfg.generator} needs autorecon.py; copy it beside qimera.py") from None
    return autorecon.Generator, autorecon.read_genotype(name, cfg.seed, "--generator autorecon:")


# -------------------------------------------------------------------------------------------------------------- losses


def generator_loss(teacher_logits, soft, bns, cfg):
    """L(G) = L_CE + alpha * L_BNS, Eq. 1, with soft labels (B, C)."""
    return F.cross_entropy(teacher_logits, soft) + cfg.bns_weight * bns


def student_loss(student_logits, teacher_logits, soft, cfg):
    """L(Q) = L_CE + delta * L_KD, Eq. 3, with soft labels (B, C)."""
    kd = kd_loss(student_logits, teacher_logits, cfg.temperature, cfg.kd_reduction)
    return F.cross_entropy(student_logits, soft) + cfg.kd_weight * kd


def zaq_losses(teacher_logits, student_logits, maps, soft, cfg):
    """ZAQ's L(G) and L(Q) with cross-entropy; logits and soft labels (B, C), maps from `FeatureMaps.stages`."""
    l_o = -F.l1_loss(student_logits, teacher_logits)  # L_o, Eq. 2: minus the distance of the logits of P and Q
    l_f = -feature_distance(*maps, cfg.adversarial)  # L_f: minus the distance of their feature maps
    l_a = -maps[0][-1].abs().mean()  # L_a: minus the mean activation of P's last feature map
    of_p, of_q = F.cross_entropy(teacher_logits, soft), F.cross_entropy(student_logits, soft)
    loss_g = l_o + cfg.zaq_beta * l_f + cfg.zaq_gamma * l_a + cfg.zaq_rho * of_p  # Eq. 11
    return loss_g, -l_o - cfg.zaq_beta * l_f + cfg.zaq_rho * of_q  # Eq. 12


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
        InputError: a teacher without BatchNorm, of another shape, with something that cannot be quantized, or without a
            last linear layer where embeddings are to be extracted from it.
    """
    run = run or Run(cfg)
    device, channels = run.device, input_channels(teacher)
    check_image_size(cfg, multiple=4 if cfg.generator == "qimera" else 8)
    teacher, example = run.adopt(teacher)
    student = quantize(teacher, cfg.wbits, cfg.abits, cfg.act_placement, cfg.clipped_ste, example)
    student = finetune.set_ranges(student, cfg.act_ranges)  # this, MatchedFeatures and `mixed` go beyond the paper, if asked to
    real = cfg.data_source == "real"  # training images take the generator's place, and nothing is trained there
    generator = RealSamples(run) if real else run.place(make_generator(teacher, cfg, channels, example))
    maps = FeatureMaps(teacher, student, cfg.act_placement, example) if cfg.adversarial != "none" else None
    if maps:
        teacher = maps.teacher
    else:
        stats = BatchNormStatistics(teacher)
    features = finetune.MatchedFeatures(teacher, student, cfg.feature_weight)
    optim_g = finetune.generator_optimizer(generator, cfg, run.fused)
    sgd = {"momentum": 0.9, "nesterov": cfg.adversarial != "zaq"}
    optim_q = finetune.student_optimizer(student, cfg.optimizer, cfg.lr_q, cfg.weight_decay, run.fused, **sgd)

    def synthesize(y):
        return run.compute(sample, generator, y, cfg)

    def draw_batch(for_generator=True):
        labels = draw_labels(cfg, device)
        with torch.set_grad_enabled(for_generator):
            x = run.compute(generator, labels)
        return x, run.compute(teacher, x), labels.soft

    def generator_step(x, teacher_logits, soft):
        if maps:
            loss, _ = zaq_losses(teacher_logits, run.compute(student, x), maps.stages(), soft, cfg)
        else:
            bns = stats.loss(cfg.bns_form)  # which also releases the batch that its hooks have kept
            if real:
                return
            loss = generator_loss(teacher_logits, soft, bns, cfg)
            run.log(bns=bns)
        run.update(optim_g, loss)
        run.log(loss_g=loss)

    def student_step(x, teacher_logits, soft):
        x, teacher_logits, soft = finetune.mixed(run, teacher, x, teacher_logits, soft)
        student_logits = run.compute(student, x)
        if maps:
            _, loss = zaq_losses(teacher_logits, student_logits, maps.stages(), soft, cfg)
        else:
            loss = features.added_to(student_loss(student_logits, teacher_logits, soft, cfg))
        run.update(optim_q, loss)
        run.log(loss_q=loss)

    def iteration(calibrating, tuning):
        batch = draw_batch()
        generator_step(*batch)
        batch = [tensor.detach() for tensor in batch]
        if tuning:
            student_step(*batch)
            for _ in range(cfg.student_steps - 1):
                student_step(*draw_batch(for_generator=False))
        elif calibrating and not maps:  # ZAQ's generator has sent its images through the student already
            with torch.no_grad(), run.autocast():
                student(batch[0])
        if maps:
            maps.clear()

    run.announce(describe(student))
    step = run.capture(iteration, optim_g, optim_q)
    # the first --calibrate-epochs are calibrating, those after the first --warmup-epochs tuning
    for calibrating, tuning in finetune.phases(run, student, generator, synthesize, optim_g, optim_q):
        finetune.train_norms(student, cfg.adversarial == "zaq")  # whose code updates the student's BatchNorm statistics
        for _ in run.steps():
            step(calibrating, tuning)
    return finetune.keep_ranges(student)


# -------------------------------------------------------------------------------------------------------- command line


class Released(NamedTuple):
    """What the released scripts set by data set and network."""

    p: float
    k_to_four_bits: int
    k_from_five_bits: int
    eei: bool


RELEASED = {
    "cifar10": Released(0.4, 2, 2, eei=False),
    "cifar100": Released(0.4, 10, 50, eei=True),
    "resnet18": Released(0.4, 500, 100, eei=False),
    "resnet50": Released(0.7, 500, 100, eei=True),
    "mobilenet_v2": Released(0.4, 100, 100, eei=False),
}

SHORT = finetune.short_schedule(bns_weight=100.0, kd_weight=20.0, kd_reduction="batchmean")


def parser():
    p = Parser("qimera", __doc__.split("\n\n")[0], settings=("adversarial", "variant"))
    add = p.add_argument_group("Qimera").add_argument
    variant = "use the settings of the paper or of the released code; the table at the top of qimera.py lists them"
    add("--variant", choices=("paper", "released"), default="paper", help=variant)
    k = "CIFAR-100 10, from 5 bits on 50; large images: resnet18, resnet50 500, from 5 bits on 100; mobilenet_v2 100; others 2"
    add("--k", type=whole(1, 10**6), help=f"K, number of embeddings in a superposition (default: {k})")
    add("--p", type=number(0, 1), help="p, probability that a batch is superposed (default: 0.4, ImageNet ResNet-50 0.7)")
    mapped = "d, the dimension of the mapped embeddings (Sec. 5.1; default: CIFAR 64, ImageNet and --variant released 100)"
    add("--mapped-dim", type=whole(1, 10**6), help=mapped)
    width = "dimension of the embeddings with --no-eei (default: number of inputs of the teacher's last linear layer)"
    add("--latent-dim", type=whole(1, 10**6), help=width)
    p.add_training(
        "Qimera: schedule and losses",
        epochs={"zaq": 300, "otherwise": 400}, iters={"zaq": 60, "otherwise": 200},
        batch_size={"zaq": 256, "paper": (64, 16), "released": (200, 16)},
        warmup_epochs={"zaq": 0, "otherwise": (4, 50)}, calibrate_epochs={"zaq": 300, "otherwise": 4},
        lr_g=1e-3, beta1={"zaq": 0.9, "otherwise": 0.5}, lr_q={"zaq": 0.1, "paper": 1e-4, "released": (1e-4, 1e-6)},
        weight_decay={"zaq": 5e-4, "otherwise": 1e-4}, decay_epochs=[100, 200, 300],
        bns_weight=0.1, bns_form="gdfq",  # alpha of Eq. 1
        kd_weight=1.0, temperature=20.0, kd_reduction="mean",  # delta of Eq. 3
    )  # fmt: skip
    group = p.add_argument_group("where paper and released code differ")
    add = group.add_argument
    switch = {"action": argparse.BooleanOptionalAction}
    add("--dm", **switch, help="disentanglement mapping (default: paper on, released off)")
    add("--eei", **switch, help="embeddings start as the last layer's weights (default: paper on; released: by network)")
    noise = "where noise is added: to an image's vector after the mapping or before it, or to each embedding (slot)"
    p.add_derived(group, "--noise", {"paper": "after", "released": "slot"}, noise, choices=("after", "before", "slot"))
    add("--normalise", **switch, help="standardise the sum of embedding and noise (default: paper off, released on)")
    superposed = (
        "conditional BatchNorms of superposed classes: weighted sum of their scales and shifts (sum), or that over K (mean)"
    )
    add("--cbn", choices=("sum", "mean"), help=f"{superposed} (default: paper sum, released mean)")
    group = p.add_argument_group("ablations and combinations")
    add = group.add_argument
    add("--no-se", action="store_true", help="do not superpose embeddings: every image is of a single class")
    add("--freeze-embeddings", action="store_true", help="do not train the class embeddings (Sec. 4.4, Appendix B.2)")
    add("--noise-scale", type=number(0, 1e6), default=1.0, help="factor on the noise z")
    add("--no-finetune", action="store_true", help="only calibrate the activation ranges; do not fine-tune")
    generators = "qimera, or autorecon:GENOTYPE (Table 3): a genotype.json, its folder, published:NETWORK-DATASET or random"
    add("--generator", default="qimera", help=generators)
    game = "train adversarially, as in ZAQ (Table 3): as in its released code (zaq), or by Eq. 11 and 12 alone (zaq-paper)"
    add("--adversarial", choices=("none", *FORMS), default="none", help=f"{game}; common/zaq.py compares them")
    weight = {"type": number(0, 1e6)}
    p.add_derived(group, "--zaq-beta", {"zaq": 1.0, "zaq-paper": 0.1}, "beta of Eq. 11 and 12", **weight)
    p.add_derived(group, "--zaq-gamma", {"zaq": 0.1, "zaq-paper": 0.05}, "gamma of Eq. 11", **weight)
    add("--zaq-rho", **weight, default=0.1, help="rho of Eq. 11 and 12")
    steps = "number of student steps per iteration; all but the first take new images"
    p.add_derived(group, "--student-steps", {"zaq": 5, "otherwise": 1}, steps, type=whole(1, 10**6))
    p.without_effect("--no-se", "--k --p --cbn")
    distilling = "--kd-weight --temperature --kd-reduction"
    for form in FORMS:
        p.without_effect(f"--adversarial {form}", "--bns-weight --bns-form", distilling, "--mix --feature-weight")
    p.without_effect("--adversarial none", "--zaq-beta --zaq-gamma --zaq-rho")
    latent = "--k --p --no-se --dm --eei --noise --noise-scale --normalise --freeze-embeddings --mapped-dim --latent-dim"
    p.without_effect("--data-source real", latent, "--cbn --generator --adversarial")
    p.without_effect("--no-finetune", "--warmup-epochs --lr-q --weight-decay --student-steps", distilling)
    finetune.add_flags(p, SHORT)
    p.add_analysis("Table 5, Figure 3 and Figure 5")
    return p


def _complete(cfg):
    paper, large = cfg.variant == "paper", cfg.image_size > SMALL_IMAGE
    cfg.no_se = cfg.no_se or cfg.data_source == "real"
    released = RELEASED.get(cfg.arch if large else cfg.dataset, RELEASED["cifar10"])
    k = released.k_from_five_bits if cfg.wbits >= 5 else released.k_to_four_bits
    fill_in(cfg, {"dm": paper, "eei": paper or released.eei})
    if cfg.mapped_dim is not None and not cfg.dm:
        raise InputError(f"--mapped-dim is {cfg.mapped_dim} and there is no disentanglement mapping; give --dm with it")
    if cfg.latent_dim is not None and cfg.eei:
        raise InputError(f"--latent-dim is {cfg.latent_dim}, and extracted embeddings have their own; give --no-eei with it")
    if cfg.cbn is not None and not large and cfg.generator == "qimera":
        raise InputError(f"--cbn is {cfg.cbn} and the generator of small images has no conditional BatchNorm; leave it out")
    defaults = {
        "mapped_dim": 64 if paper and not large else 100,
        "normalise": not paper,
        "cbn": "sum" if paper else "mean",
        "k": 1 if cfg.no_se else min(k, cfg.num_classes),
        "p": 0.0 if cfg.no_se else released.p,
    }
    fill_in(cfg, defaults)
    if cfg.k > cfg.num_classes:
        raise InputError(f"--k is {cfg.k} and there are {cfg.num_classes} classes; give 1 to {cfg.num_classes}")
    if cfg.generator != "qimera":
        discovered(cfg)  # an unusable one is reported before anything is loaded
    return checked_schedule(cfg)


def parse_args(argv=None):
    return _complete(parser().parse(argv))


def config(**settings):
    """Settings for `compress` by flag name: config(dataset="folder", num_classes=5, image_size=32, bits=4, no_dm=True)."""
    return _complete(parser().config(**settings))


def main(argv=None):
    with friendly_errors("qimera.py"):
        given = parser().parse(argv)
        return execute(_complete(given), compress, short=SHORT) if given.analyze is None else analyze(given)


if __name__ == "__main__":
    main()
