"""Quantization-aware training with learned step sizes (LSQ: Esser et al., ICLR 2020), as MixMix uses it (its Sec. 5.2).

One step per weight tensor and one per activation are learned with the weights; the full-precision network is the teacher.

    learned.quantize_by_step   x = s round(clip(x / s, -Q_N, Q_P)) and its gradient to s   Eq. 1 to 3
    learned._ScaledGradient    the gradient of s times 1 / sqrt(N Q_P)                     Sec. 2.2
    common.ops.kd_loss         Kullback-Leibler divergence at temperature tau              MixMix, Sec. 5.2
    feature_loss               intermediate features (Haroush et al., CVPR 2020)           MixMix, Sec. 5.2

What MixMix leaves open, and what this code does:

    what                  here                                              why
    optimizer             SGD, Nesterov momentum 0.9, cosine decay          LSQ's, which does not mention Nesterov
    weight decay          1e-4 at all numbers of bits; MobileNetV2 0        LSQ's at 4; it has half at 3, a quarter at 2
    learning rate         a tenth of LSQ's; MobileNetV2 a hundredth         higher rates fail with fixed statistics:
                                                                            ResNet-20, 4 bits, real images: 22 % with 0.01
    BatchNorm             statistics stay fixed                             those of synthetic images are no better
    feature loss          blocks' outputs, squared difference over the      Haroush et al. do not say
                          variance of the teacher's, mean over blocks
    distillation loss     KL at tau, times tau^2 as in common.ops           Hinton et al.; MixMix names tau only
    labels                none                                              the teacher's logits take their place
    augmentation          none                                              not mentioned
    activations           inputs of all layers (--act-placement input)      as LSQ has it
    first and last layer  weights and inputs: --ends-bits                   as LSQ has it

`--qat-recipe short` is what common/finetune.py has instead: the weights' own extremes per channel, activation steps that begin
with a search, AdamW; features are what the BatchNorms return, before the activation is rounded, not the blocks. The images are
shifted, mirrored and mixed in pairs, so that a few hundred are enough.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import fx

from common import InputError
from common.check import describe
from common.cli import fill_in, number, whole
from common.finetune import MatchedFeatures, keep_ranges, set_ranges, student_optimizer
from common.images import jitter, sampler
from common.learned import LearnedStep, LearnedWeight, begin_steps
from common.ops import kd_loss, mix_images
from common.quant import quantize, quantized_activations, quantized_layers, set_observing, weights_at_once
from common.run import Run
from common.tasks.blocks import find_blocks, placement, raise_ends, shared_group
from common.trace import trace

STUDENT = "fine-tuned"  # what the network is called in the table of a run


def add_flags(parser):
    """Declare the flags of this task; returns the groups of `parser` that hold them."""
    group = parser.add_argument_group("quantization-aware training (LSQ)")
    add = group.add_argument
    recipe = "LSQ's (lsq), or one for a few hundred images and steps (short); the top of common/tasks/qat.py compares them"
    add("--qat-recipe", choices=("lsq", "short"), default="lsq", help=recipe)
    add("--qat-steps", type=whole(1), help="training steps, rounded up to whole epochs (default: lsq 44000, short 800)")
    add("--qat-batch-size", type=whole(1), help="number of images per step (default: lsq 128, short 32)")
    rate = "peak learning rate, cosine decay (default: lsq 0.001, mobilenet_v2 0.0001; short 0.0003, from 4 bits on 0.0001)"
    add("--qat-lr", type=number(0), help=rate)
    decay = "weight decay of all parameters except the step sizes (default: 1e-4, mobilenet_v2 0)"
    add("--qat-weight-decay", type=number(0), help=decay)
    add("--temperature", type=number(1e-3, 1e6), help="tau of the distillation loss (default: lsq 3, short 20)")
    add("--feature-weight", type=number(0), help="weight of the intermediate feature loss (default: lsq 1, short 40)")
    return group, shared_group(parser)


def complete(cfg):
    """Fill in the defaults that depend on the network, and LSQ's placement."""
    mobile, short = cfg.arch.startswith("mobilenet_v2"), cfg.qat_recipe == "short"
    fill_in(cfg, {"act_placement": "input", "qat_weight_decay": 0.0 if mobile else 1e-4})
    rate = (3e-4 if cfg.wbits < 4 else 1e-4) if short else 1e-4 if mobile else 1e-3
    fill_in(cfg, {"qat_lr": rate, "qat_steps": 800 if short else 44000})
    fill_in(cfg, {"qat_batch_size": 32 if short else 128, "temperature": 20.0 if short else 3.0})
    fill_in(cfg, {"feature_weight": 40.0 if short else 1.0})


def plan(model, cfg, run):
    teacher, example, student = _begin(model, cfg, run)
    if cfg.qat_recipe == "short":
        MatchedFeatures(trace(teacher, example), copy.deepcopy(student), cfg.feature_weight)  # or an InputError
    return student


def _begin(model, cfg, run):
    """The teacher, a batch that it takes, and the quantized network before its steps are learned, --ends-bits at its ends."""
    teacher, example = run.adopt(model)
    student = quantize(teacher, cfg.wbits, cfg.abits, placement(cfg, teacher), example=example)
    if not isinstance(student, fx.GraphModule):
        raise InputError("the model cannot be traced, so its blocks cannot be found; give one whose forward does not branch")
    raise_ends(student, cfg.ends_bits, "lsq")
    return teacher, example, student


def feature_loss(ours, theirs):
    """How far the student's block outputs are from the teacher's: mean over the blocks of the mean squared difference over
    the variance of the teacher's. Lists of (B, ...)."""
    losses = [F.mse_loss(a.float(), b.float()) / b.float().var() for a, b in zip(ours, theirs)]
    return torch.stack(losses).mean()


def augmented(x):
    """Images (B, channels, H, W) as the short recipe sees them: some mirrored, shifted by up to 2 pixels, mixed in pairs."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return mix_images(jitter(x, 2, flip=False), x.new_zeros(len(x), 0), "mixup")[0]


def learn_steps(student):
    """Let the weights of all layers have a learned step; returns the `LearnedStep`s in the places of activations."""
    for _, layer in quantized_layers(student):
        layer.quantizer = LearnedWeight(layer.weight, layer.bits)
    device = next(student.parameters()).device
    steps = {name: LearnedStep(act.bits, lsq=True).to(device) for name, act in quantized_activations(student)}
    for name, step in steps.items():
        student.set_submodule(name, step)
    return steps.values()


def keep_steps(student):
    """Make the learned steps of weights final: quantized layers as every quantized network here has them."""
    for _, layer in quantized_layers(student):
        learned, weight = layer.quantizer, layer.quantizer(layer.weight).detach()
        del layer.quantizer
        column = (len(weight),) + (1,) * (weight.ndim - 1)
        layer.pack(weight, *(value.detach().expand(column).clone() for value in (learned.scale, learned.zero_point)))
    return student


def compress(model, images, cfg, run=None):
    """Quantize a trained network and train it with images."""
    run = run or Run(cfg)
    torch.manual_seed(cfg.seed)
    teacher, example, student = _begin(model, cfg, run)
    run.announce(describe(student))
    blocks, short = find_blocks(student, teacher), cfg.qat_recipe == "short"
    traced = trace(teacher, example)
    full = dict(traced.named_modules())
    matched = MatchedFeatures(traced, student, cfg.feature_weight if short else 0.0)
    x, draw = sampler(images, cfg.qat_batch_size, run.device)
    if short:
        set_observing(set_ranges(student, "learned"), True)
        with torch.no_grad():
            student(draw())
        set_observing(student, False)
    else:
        begin_steps(lambda: student(draw()), learn_steps(student))
    kind, sgd = "adam" if short else "sgd", {"momentum": 0.9, "nesterov": True}
    optimizer = student_optimizer(student, kind, cfg.qat_lr, cfg.qat_weight_decay, run.fused, **sgd)
    modules = dict(student.named_modules())

    def outputs(x, modules, quantized):
        """What each block sends; the last sends the logits."""
        sent = []
        for block in blocks:
            x = block(x, modules, quantized)
            sent.append(x)
        return sent

    def iteration():
        seen = augmented(x) if short else x
        with run.autocast(), weights_at_once(student):
            theirs, ours = outputs(seen, full, False), outputs(seen, modules, True)
        kd = kd_loss(ours[-1].float(), theirs[-1].float(), cfg.temperature, "batchmean")
        if short and cfg.feature_weight:
            features = matched.distance()
        else:
            compared = cfg.feature_weight and len(blocks) > 1
            features = feature_loss(ours[:-1], theirs[:-1]) if compared else torch.zeros_like(kd)
        run.update(optimizer, kd + cfg.feature_weight * features)
        run.log(kd=kd, features=features)

    step = run.capture(iteration, optimizer)
    run.rates = "--qat-lr"
    longest = max(min(500, cfg.qat_steps // 20), 1)  # steps of an epoch: the rate decays by epochs, at least 20
    epochs = math.ceil(cfg.qat_steps / longest)
    for epoch in run.epochs(epochs, student, None, iters=math.ceil(cfg.qat_steps / epochs), optimizer=optimizer):
        for group in optimizer.param_groups:
            group["lr"] = cfg.qat_lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for _ in run.steps():
            draw()
            step()
    return keep_ranges(student if short else keep_steps(student)).requires_grad_(False)
