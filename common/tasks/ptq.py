"""Post-training quantization by block reconstruction (BRECQ: Li et al., ICLR 2021), with AdaRound (Nagel et al., ICML 2020).

Block by block, the weights are rounded so that the block, fed by the quantized blocks before it, reproduces the output of the
full-precision one; then the step sizes of its activations are learned on full-precision inputs.

    reconstruct_weights    min_V |z - z_q(V)|^2 + lambda f_reg(V), z the block's output      AdaRound's Eq. 21, for blocks
    learned.AdaRound       W(V), the softly rounded weights, and f_reg                       AdaRound's Eq. 22 to 24
    reconstruct_steps      min_s |z - z_q(s)|^2.4 by the gradient of LSQ                     BRECQ, LSQ's Eq. 3
    blocks.find_blocks     what is reconstructed together
    blocks.brecq_places    what is quantized of the activations

What the papers leave open or have differently, and what this code does:

    what                   paper                       BRECQ's code                here
    distance of outputs    weighted by the Fisher      squared error by default    squared error
                           information
    ranges                 not given                   80 shrunk ranges, L_2.4     the same; activations on 64 images, a
                                                                                   block's input in full precision
                                                                                   (there quantized)
    rate of step sizes     not given                   4e-4                        --lr-step, but at most 2 % of the step
    lambda, sharpness      not given                   0.01; 20 to 2, linear,      the same (--rounding-weight)
                                                       after a fifth of the steps
    first layer            8 bits                      not reconstructed           rounded to nearest, --ends-bits;
                                                                                   its activation's step is learned
    activations            not given                   outputs of activation       the same, and products with
                                                       functions and of blocks     gates (--act-placement blocks)
    image, logits          not given                   full precision              full precision
    training images        not given                   random crops, mirrored      centre crops
    last layer, first act. 8 bits                      8 bits                      --ends-bits
    input of last layer    not given                   8 bits; after a residual    the same: --ends-bits, but in a
                                                       block as all others         ResNet --abits
"""

import functools
import math
import time

import torch

from common import replacing
from common.check import describe
from common.cli import fill_in, number, whole
from common.device import full_precision
from common.folding import fold_batchnorm
from common.learned import AdaRound, LearnedStep, begin_steps
from common.progress import Progress
from common.quant import QuantAct, quantize
from common.run import Run, seed_of_part
from common.supported import LAYERS
from common.tasks.blocks import find_blocks, placement, raise_ends, shared_group

STUDENT = "quantized"  # what the network is called in the table of a run
LARGEST_CHANGE = 0.02  # of a step size in an iteration, relative to its start: Adam moves all by its rate, whatever their size


def add_flags(parser):
    """Declare the flags of this task; returns the groups of `parser` that hold them."""
    group = parser.add_argument_group("post-training quantization (BRECQ)")
    add = group.add_argument
    what = "number of iterations per block for "
    add("--weight-iterations", type=whole(0), default=20000, help=what + "the rounding of the weights")
    add("--step-iterations", type=whole(0), default=5000, help=what + "the activations' step sizes")
    add("--ptq-batch-size", type=whole(1), default=32, help="number of images per iteration")
    add("--lr-rounding", type=number(0), default=1e-3, help="learning rate of the rounding (Adam)")
    add("--lr-step", type=number(0), default=4e-4, help="learning rate of the step sizes (Adam, cosine decay)")
    add("--rounding-weight", type=number(0), default=0.01, help="weight of the regulariser that decides the rounding")
    return group, shared_group(parser)


def complete(cfg):
    """Settings that follow from others: the reconstruction computes in fp32."""
    fill_in(cfg, {"act_placement": "blocks"})
    cfg.precision = "fp32"


def plan(model, cfg, run):
    return _begin(model, cfg, run)[-1]


def _begin(model, cfg, run):
    """The teacher, the same with its BatchNorms folded, and the quantized network, with --ends-bits at its ends."""
    teacher, example = run.adopt(model)
    folded = fold_batchnorm(teacher, example)
    student = quantize(folded, cfg.wbits, cfg.abits, placement(cfg, teacher), example=example).requires_grad_(False)
    raise_ends(student, cfg.ends_bits, "brecq")
    return teacher, run.place(folded), run.place(student)


def reconstruct_weights(block, roundings, modules, x, target, run, bar):
    """Learn how each weight of a block is rounded, so that its output for `x` comes near `target`.

    Args:
        block: a `Block`.
        roundings: dict of layer name -> `AdaRound`.
        modules: of the student, by name.
        x: (N, ...), what the blocks before send, with their weights quantized.
        target: (N, ...), the full-precision block's output.
        run: its cfg has the flags of this task.
        bar: of all steps.
    """
    cfg = run.cfg
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings.values()], cfg.lr_rounding, fused=run.fused)
    graphed, sharpness = run.cfg.capture != "none", torch.zeros((), device=x.device)

    def iteration(deciding):
        chosen = torch.randint(len(x), (cfg.ptq_batch_size,), device=x.device)
        soft = {name: functools.partial(modules[name].with_weight, weight=r()) for name, r in roundings.items()}
        output = block(x[chosen], modules | soft, quantize_activations=False)
        loss = (output - target[chosen]).square().sum(1).mean()
        if deciding:
            loss = loss + cfg.rounding_weight * sum(r.undecided(sharpness) for r in roundings.values())  # Eq. 21
        run.update(optimizer, loss)

    step = run.capture(iteration, optimizer)
    for index in range(cfg.weight_iterations):
        share = (index / cfg.weight_iterations - 0.2) / 0.8  # the regulariser waits for a fifth of the steps
        exponent = 20 - 18 * share
        sharpness = sharpness.fill_(exponent) if graphed else exponent  # a graph reads a tensor anew; a number is faster
        step(share >= 0)
        bar.update()


def reconstruct_steps(block, steps, modules, x, target, run, bar):
    """Learn the step sizes of a block's activations. Arguments as `reconstruct_weights`; steps: dict of name ->
    `LearnedStep`; x: the full-precision input."""
    cfg = run.cfg
    scales = [step.scale for step in steps.values()]
    peaks = [min(cfg.lr_step, LARGEST_CHANGE * scale.item()) for scale in scales]
    rates = [torch.tensor(peak, device=x.device) for peak in peaks]  # tensors, which a CUDA graph reads anew
    groups = [{"params": [scale], "lr": rate} for scale, rate in zip(scales, rates)]
    optimizer = torch.optim.Adam(groups, fused=run.fused)

    def iteration():
        chosen = torch.randint(len(x), (cfg.ptq_batch_size,), device=x.device)
        output = block(x[chosen], modules | steps)
        run.update(optimizer, (output - target[chosen]).abs().pow(2.4).sum(1).mean())

    step = run.capture(iteration, optimizer)
    for index in range(cfg.step_iterations):
        for rate, peak in zip(rates, peaks):
            rate.fill_(peak * 0.5 * (1 + math.cos(math.pi * index / cfg.step_iterations)))
        step()
        bar.update()


@torch.no_grad()
def output_of(block, x, modules):
    """The block's output for x (N, ...) without quantized activations, computed in parts of 256 images."""
    return torch.cat([block(part, modules, quantize_activations=False) for part in x.split(256)])


def made_once(run, stage, index, make):
    """What `make` returns for block `index`, a dict of tensors; from the run's folder if an earlier process has left it there,
    whose time counts as the run's."""
    path = run.folder and run.folder / "parts" / f"{stage}-{index:03}.pt"
    if path and path.exists():
        try:
            made, seconds = torch.load(path, map_location=run.device, weights_only=True)
            run.seconds += seconds
            return made
        except Exception:  # whatever damaged bytes raise
            run.announce(f"{path} is damaged, so it is made again")
    began = time.time()
    torch.manual_seed(seed_of_part(run.cfg.seed, index))
    made = make()
    if path:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            torch.save((made, time.time() - began), partial)
    return made


@full_precision()
def compress(model, images, cfg, run=None):
    """Quantize a trained network with images; the result's BatchNorms are folded. An interrupted run goes on with the block
    that is not in its folder yet."""
    run = run or Run(cfg)
    began = time.time()
    torch.manual_seed(cfg.seed)
    teacher, folded, student = _begin(model, cfg, run)
    blocks = find_blocks(student, teacher)
    full = dict(folded.named_modules())
    modules = dict(student.named_modules())
    images = images.to(run.device, torch.float32)
    run.folded = True
    run.start()
    run.announce(describe(student))
    total = len(blocks) * (cfg.weight_iterations + cfg.step_iterations)
    bar = Progress(total=total, unit="it", disable=run.folder is None)

    def calls(block, kind):
        """The block's modules of a kind, by name, in order."""
        names = [n.target for n in block.nodes if n.op == "call_module"]
        return {name: modules[name] for name in names if isinstance(modules[name], kind)}

    def rounded(block, x, target, learn):
        layers = calls(block, LAYERS)
        roundings = {name: AdaRound(layer.weight, layer.bits, layer.zero).to(run.device) for name, layer in layers.items()}
        if learn:
            reconstruct_weights(block, roundings, modules, x, target, run, bar)
        return {name: (r(hard=True).detach(), r.scale, r.zero_point) for name, r in roundings.items()}

    def stepped(block, x, target):
        steps = {name: LearnedStep(act.bits).to(run.device) for name, act in calls(block, QuantAct).items()}
        begin_steps(lambda: block(x[:64], modules | steps), steps.values())
        if steps:
            reconstruct_steps(block, steps, modules, x, target, run, bar)
        return {name: (step.scale.detach(), step.zero_point) for name, step in steps.items()}

    x = x_full = images
    for index, block in enumerate(blocks):
        bar.set_description(f"weights {index + 1}/{len(blocks)}, {block.name}", refresh=False)
        target = output_of(block, x_full, full)
        only_first = index == 0 and len(calls(block, LAYERS)) == 1
        make = functools.partial(rounded, block, x, target, learn=not only_first)
        for name, (weight, scale, zero_point) in made_once(run, "weights", index, make).items():
            modules[name].pack(weight, scale, zero_point)
        x, x_full = output_of(block, x, modules), target
        bar.update((index + 1) * cfg.weight_iterations - bar.n)  # of blocks that have nothing to learn, or have it already
    x_full = images
    for index, block in enumerate(blocks):
        bar.set_description(f"activations {index + 1}/{len(blocks)}, {block.name}", refresh=False)
        target = output_of(block, x_full, full)
        for name, values in made_once(run, "activations", index, functools.partial(stepped, block, x_full, target)).items():
            modules[name].fix(*values)
        x_full = target
        bar.update(len(blocks) * cfg.weight_iterations + (index + 1) * cfg.step_iterations - bar.n)
    bar.close()
    run.conclude(student, began)
    return student
