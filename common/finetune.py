"""The epochs of a script that trains a generator, and options beyond the papers that shorten training to minutes. They are off
by default; `--schedule short` turns on a set of them.

    flag                     what it does, and what the papers do                   source
    --act-ranges search      range of least error, not the batch's extremes         L2.4 search of BRECQ (Li et al., ICLR 2021)
    --act-ranges learned     such a range, whose step size is then learned          LSQ (Esser et al., ICLR 2020)
    --optimizer adam         AdamW, not SGD                                         AdamW (Loshchilov and Hutter, ICLR 2019)
    --mix mixup|cutmix       images mixed in pairs (a control in Qimera's           mixup (Zhang et al., ICLR 2018),
                             Table 2), not as they are                              CutMix (Yun et al., ICCV 2019)
    --decay cosine           cosine decay, not a division by 10 at --decay-epochs   SGDR (Loshchilov and Hutter, ICLR 2017)
    --feature-weight         matches the outputs of all BatchNorm layers to the     FitNets (Romero et al., ICLR 2015); between
                             teacher's, not the logits alone                        blocks, Haroush et al. (CVPR 2020)
"""

import math
from statistics import median

import torch
import torch.nn.functional as F
from torch import fx, nn

from common import InputError, distributed
from common.cli import number, one_of
from common.learned import LearnedStep, quantize_by_step, scaled_gradient, search_parameters, step_parameters
from common.ops import mix_images
from common.quant import QuantAct, quantized_activations, set_observing
from common.trace import works_in_place

SAMPLE = 2048  # values of a batch that a search looks at


def short_schedule(**losses):
    """What --schedule short sets, by names in Python: minutes on a CPU instead of hours on a GPU. `losses` are the weights and
    forms of the method's own terms."""
    first = {"epochs": 12, "iters": 60, "batch_size": 16, "warmup_epochs": 4, "calibrate_epochs": 4}
    return first | losses | {"lr_q": 2e-4, "optimizer": "adam", "decay": "cosine", "act_ranges": "learned"}


def add_flags(parser, short):
    """Declare --schedule, whose `short` is this dict, and the flags of the table above."""
    group = parser.add_argument_group("beyond the papers (common/finetune.py)")
    parser.add_schedule(group, short)
    add = group.add_argument
    ranges = "activation ranges: each batch's minimum and maximum (extremes), the range with the smallest error (search), "
    ranges += "or a searched range whose step size is then learned (learned)"
    add("--act-ranges", default="extremes", type=one_of("extremes", "search", "learned"), help=ranges)
    about = "optimizer of the student: sgd (with momentum), or adam for AdamW"
    add("--optimizer", default="sgd", type=one_of("sgd", "adam"), help=about)
    decay = "learning rate decay: divided by 10 at --decay-epochs (steps), or a cosine towards 0 after the warm-up (cosine)"
    add("--decay", default="steps", type=one_of("steps", "cosine"), help=decay)
    mix = "mix the images that the student learns from in pairs; the teacher's logits are those of the mixtures"
    add("--mix", choices=("none", "mixup", "cutmix"), default="none", help=mix)
    features = "weight of the squared distance between the two networks' features, relative to their variance (0: not computed)"
    add("--feature-weight", default=0.0, type=number(0), help=features)
    parser.without_effect("--decay cosine", "--decay-epochs")
    parser.without_effect("--no-finetune", "--optimizer --mix --feature-weight")


class SearchedAct(QuantAct):
    """A `QuantAct` whose range follows the range of least error in each batch, found by search, instead of its extremes."""

    @torch.no_grad()
    def observe(self, x):
        values = distributed.sample(x.flatten(), SAMPLE)
        scale, zero_point = (value[0, 0] for value in search_parameters(values[None], self.bits, steps=40, by=0.02))
        self.follow(-zero_point * scale, (2**self.bits - 1 - zero_point) * scale)


class LearnedAct(SearchedAct):
    """A `SearchedAct` whose step is a parameter once the range is fixed (LSQ, Eq. 3)."""

    def __init__(self, bits, clipped=False):
        super().__init__(bits, clipped)
        del self.scale
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        if self.observing:
            return super().forward(x)
        largest = torch.maximum(self.zero_point, 2**self.bits - 1 - self.zero_point)  # Q_P; Q_N where that is larger
        scale = scaled_gradient(self.scale, x[0].numel(), largest)
        return quantize_by_step(x.float(), scale, self.zero_point, self.bits, "lsq")


def set_ranges(student, how):
    """Give the activations of a quantized network the ranges that --act-ranges has; returns the network."""
    kind = {"extremes": QuantAct, "search": SearchedAct, "learned": LearnedAct}[how]
    for name, act in quantized_activations(student):
        if kind is not QuantAct:
            student.set_submodule(name, kind(act.bits, act.clipped).to(act.scale.device))
    return student


def keep_ranges(student):
    """Make the learned steps of activations final, once the network has learned; returns the network."""
    for name, act in list(student.named_modules()):
        if isinstance(act, (LearnedAct, LearnedStep)):
            fixed = QuantAct(act.bits).to(act.scale.device)
            fixed.fix(act.scale, act.zero_point)
            student.set_submodule(name, fixed)
    return student


def train_norms(student, on):
    """Put the BatchNorms of a network in train mode, or back in eval mode; dropout stays as it is."""
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(on)


class MatchedFeatures:
    """What the BatchNorm layers of teacher and student return in their latest passes, and how far the student is off, relative
    to the variance that the teacher's affine parameters give its features: mean(weight^2) + var(bias). Layers that the traced
    student does not call (of a head that only training uses, or with a forward of their own) are left out.

    Args:
        teacher: the full-precision network.
        student: what `common.quant.quantize` has made of it, with layers of the same names.
        weight: of the distance; with 0 nothing is kept.

    Raises:
        InputError: no layer is left.
    """

    def __init__(self, teacher, student, weight):
        self.weight, self.kept, self.variances = weight, ({}, {}), {}
        if not weight:
            return
        modules, changed = dict(student.named_modules()), True
        called = modules.keys()
        if isinstance(student, fx.GraphModule):
            called = {node.target for node in student.graph.nodes}
            changed = any(works_in_place(node, modules) for node in student.graph.nodes)
        for name, layer in teacher.named_modules():
            if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)) and name in called:
                gains, means = (layer.weight, layer.bias) if layer.affine else (torch.ones(1), torch.zeros(1))
                self.variances[name] = (gains.square().mean() + means.var(correction=0)).item()
        typical = median(self.variances.values()) if self.variances else 0
        for name in [name for name, variance in self.variances.items() if variance <= 1e-6 * typical]:
            del self.variances[name]  # of a dead layer, whose features are constant
        if not self.variances:
            raise InputError(
                f"--feature-weight is {weight:g} and the network calls no BatchNorm as a module, so none can be matched; give "
                "--feature-weight 0"
            )
        for name in self.variances:
            for network, kept in zip((teacher, student), self.kept):
                network.get_submodule(name).register_forward_hook(self._keep_in(kept, name, network is teacher, changed))

    @staticmethod
    def _keep_in(kept, name, of_teacher, changed):
        def keep(layer, args, output):  # copies where what comes next works in place, as out += x may in the teacher
            if of_teacher:
                kept[name] = output.detach().clone()
            elif torch.is_grad_enabled():
                kept[name] = output.clone() if changed else output

        return keep

    def distance(self):
        """Mean over the layers of the mean squared difference over the variance, where both networks have seen the same images.
        Call it once per step: it releases the features, whose graph would otherwise stay in memory."""
        theirs, ours = ({name: kept.pop(name) for name in list(kept)} for kept in self.kept)
        return torch.stack([F.mse_loss(ours[n], theirs[n]).float() / self.variances[n] for n in ours]).mean()

    def added_to(self, loss):
        """`loss` plus the weighted distance."""
        return loss + self.weight * self.distance() if self.weight else loss


def mixed(run, teacher, x, teacher_logits, y):
    """A batch as --mix has it: images (B, ...), the teacher's logits (B, C), labels (B,) or their probabilities (B, C)."""
    if run.cfg.mix == "none":
        return x, teacher_logits, y
    soft = F.one_hot(y, run.cfg.num_classes).to(x.dtype) if y.ndim == 1 else y
    x, soft = mix_images(x, soft, run.cfg.mix)
    return x, run.compute(teacher, x), soft


def generator_optimizer(generator, cfg, fused):
    """Adam for what is trained of a generator; real images in its place have no parameters, which only a group may lack."""
    trained = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    return torch.optim.Adam([{"params": trained}], cfg.lr_g, betas=(cfg.beta1, 0.999), fused=fused)


def student_optimizer(student, kind, lr, weight_decay, fused, **sgd):
    """AdamW or SGD for the parameters of `student`; learned steps have no weight decay. `sgd` is what SGD alone is told."""
    steps = step_parameters(student)
    others = [p for p in student.parameters() if all(p is not step for step in steps)]
    groups = [{"params": others, "weight_decay": weight_decay}]
    groups += [{"params": steps, "weight_decay": 0.0}] if steps else []
    if kind == "adam":
        return torch.optim.AdamW(groups, lr, fused=fused)
    return torch.optim.SGD(groups, lr, fused=fused, **sgd)


def set_rates(cfg, epoch, optim_g, optim_q):
    """Learning rates of an epoch, --decay."""
    if cfg.decay == "cosine":
        done = max(epoch - cfg.warmup_epochs, 0) / max(cfg.epochs - cfg.warmup_epochs, 1)
        factor = 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = 0.1 ** sum(epoch >= start for start in cfg.decay_epochs)
    for optimizer, rate in ((optim_g, cfg.lr_g), (optim_q, cfg.lr_q)):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def phases(run, student, generator, synthesize, optim_g, optim_q):
    """The epochs of a script that trains a generator, as pairs of bools (calibrating, tuning).

    `calibrating` is true in the first --calibrate-epochs, in which the activation ranges follow the images (in none if the
    student has no ranges). In the first --warmup-epochs the generator learns alone; after them `tuning` is true. Learning rates
    are set before an epoch; after it the ranges are frozen and the student is in eval mode. "calibrated_top1" is the accuracy
    once the student is calibrated or about to be tuned, whichever comes first; there is none where all epochs tune. Arguments
    as for `Run.epochs`.
    """
    cfg, acts = run.cfg, quantized_activations(student)
    may_clip = acts and not cfg.clipped_ste and cfg.act_ranges != "learned"
    rates = "--lr-q" if cfg.data_source == "real" else "--lr-g or --lr-q"
    run.rates = rates + (", or add --clipped-ste," if may_clip else "")
    calibrated = cfg.calibrate_epochs if acts else 0
    tuned_from = cfg.calibrate_epochs if cfg.no_finetune else cfg.warmup_epochs
    parts = {"generator": generator, "optim_g": optim_g, "optim_q": optim_q}
    for epoch in run.epochs(cfg.epochs, student, synthesize, evaluate_from=tuned_from, **parts):
        set_rates(cfg, epoch, optim_g, optim_q)
        set_observing(student, epoch < calibrated)
        yield epoch < calibrated, epoch >= tuned_from
        set_observing(student.eval(), False)
        if epoch + 1 == min(calibrated, tuned_from, cfg.epochs):
            run.measure("calibrated_top1", student)
