"""Quantizers whose parameters are searched, rounded or learned, for common/tasks and common/finetune.py.

search_parameters    the range, of those shrunk in steps, that loses least         BRECQ's start
AdaRound             W = s (floor(W / s) + h(V)), h a stretched sigmoid           Nagel et al., ICML 2020, Eq. 22 to 24
quantize_by_step     s round(clip(x / s, -Q_N, Q_P)) with a gradient to s         LSQ (Esser et al., ICLR 2020), Eq. 1 to 3
"""

import torch
from torch import nn

from common.quant import QuantAct, affine_parameters, fake_quantize, scale_, with_zero

AT_ONCE = 2**18  # values that a search quantizes in one operation: a GPU waits for single ranges of a few thousand


def search_parameters(rows, bits, steps=80, by=0.01, zero=False):
    """Scale and zero point per row by BRECQ's search. It tries `steps` ranges, each narrower than the one before by `by` times
    the full range, and takes the one whose absolute errors, raised to 2.4, have the smallest mean.

    Args:
        rows: (R, N) float32.
        bits: 2 to 8.
        zero: whether the ranges include zero.

    Returns:
        scale, zero_point: (R, 1).
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    low, high = with_zero(low, high) if zero else (low, high)
    shares = (1 - by * torch.arange(steps, dtype=torch.float64, device=rows.device)).to(rows.dtype)[:, None, None]
    candidates = affine_parameters(low * shares, high * shares, bits)  # (steps, R, 1) each
    parts = zip(*(values.split(max(1, AT_ONCE // rows.numel())) for values in candidates))
    losses = [(fake_quantize(rows, *part, bits) - rows).abs().pow(2.4).mean(2, keepdim=True) for part in parts]
    best = torch.cat(losses).argmin(0, keepdim=True)
    scale, zero_point = (values.gather(0, best)[0] for values in candidates)
    return scale, zero_point


class AdaRound(nn.Module):
    """Weights whose rounding, up or down, is learned (Nagel et al., ICML 2020); scales per output channel by search.

    Args:
        weight: of a layer, (out, ...).
        bits: 2 to 8.
        zero: whether the ranges include zero.
    """

    LOW, HIGH = -0.1, 1.1  # the stretched sigmoid's ends

    def __init__(self, weight, bits, zero=False):
        super().__init__()
        weight = weight.detach().float()
        shape = (-1,) + (1,) * (weight.ndim - 1)
        scale, zero_point = (v.view(shape) for v in search_parameters(weight.flatten(1), bits, zero=zero))
        self.bits = bits
        for name, value in (("scale", scale), ("zero_point", zero_point), ("floor", torch.floor(weight / scale))):
            self.register_buffer(name, value)
        rest = weight / scale - self.floor
        self.v = nn.Parameter(torch.logit((rest - self.LOW) / (self.HIGH - self.LOW)))  # h(v) = rest, to begin with

    def up(self):
        """h(v), how far each weight is rounded up, 0 to 1."""
        return (torch.sigmoid(self.v) * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)

    def forward(self, hard=False):
        """The weights; `hard` rounds each up or down for good."""
        up = (self.up() >= 0.5).float() if hard else self.up()
        codes = (self.floor + up + self.zero_point).clamp(0, 2**self.bits - 1)
        return (codes - self.zero_point) * self.scale

    def undecided(self, sharpness):
        """The regulariser: sum of 1 - |2 h - 1|^sharpness, 0 when every weight is decided."""
        return (1 - (2 * self.up() - 1).abs().pow(sharpness)).sum()


class _QuantizeByStep(torch.autograd.Function):
    """The passes of `quantize_by_step`."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, bits, inside):
        v = x * (1 / scale)  # rounds as fake_quantize does, with which the file is evaluated
        ctx.save_for_backward(v, zero_point)
        ctx.lsq, ctx.top, ctx.shape = inside == "lsq", 2**bits - 1, scale.shape
        steps = torch.round(v).add_(zero_point).clamp_(0, ctx.top).sub_(zero_point)
        return scale_(steps, scale)

    @staticmethod
    def backward(ctx, grad):
        v, zero_point = ctx.saved_tensors
        steps = torch.round(v).add_(zero_point)
        within = torch.ops.aten.hardtanh_backward  # (x, v, low, high): x where low < v < high, else 0
        inside = (v + zero_point, 0, ctx.top) if ctx.lsq else (steps.clone(), -1, ctx.top + 1)
        steps.clamp_(0, ctx.top).sub_(zero_point).sub_(within(v, *inside)).mul_(grad)
        return within(grad, *inside), steps.sum_to_size(ctx.shape), None, None, None


def quantize_by_step(x, scale, zero_point, bits, inside):
    """`x` in steps of `scale`, with LSQ's gradient to the scale (Esser et al., ICLR 2020, Eq. 3): the rounding error inside
    the range, the end's code outside. Values outside have no gradient.

    Args:
        x: float32 tensor.
        scale: scalar, learned.
        zero_point: integer-valued scalar.
        bits: codes 0 ... 2^bits - 1.
        inside: which values count as inside the range: "lsq", those whose x / s is inside before it is rounded; "brecq", those
            whose rounded x / s is, which adds half a step at both ends.
    """
    return _QuantizeByStep.apply(x, scale, zero_point, bits, inside)


class _ScaledGradient(torch.autograd.Function):
    """A step size with LSQ's factor on its gradient, 1 / sqrt(count * Q_P), which makes steps learn as fast as weights do."""

    @staticmethod
    def forward(ctx, scale, count, largest):
        ctx.factor = (count * largest) ** -0.5
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None


scaled_gradient = _ScaledGradient.apply


def lsq_start(values, largest):
    """LSQ's first step, 2 mean |v| / sqrt(Q_P), a scalar; 1 where all values are 0, which every step leaves as they are."""
    step = 2 * values.detach().abs().mean() / largest**0.5
    return torch.where(step > 0, step, 1.0)


class LearnedStep(nn.Module):
    """Activations with a learned step size; the first batch sets it.

    Args:
        bits: 2 to 8.
        lsq: start from 2 mean |x| / sqrt(Q_P) and scale the gradient, as LSQ does; otherwise search the range, as BRECQ does.
    """

    def __init__(self, bits, lsq=False):
        super().__init__()
        self.bits, self.lsq = bits, lsq
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))

    @torch.no_grad()
    def begin(self, x):
        """Take the range of `x`."""
        x = x.detach().float()
        if self.lsq:
            self.zero_point.fill_(2 ** (self.bits - 1) if x.min() < 0 else 0)
            self.scale.copy_(lsq_start(x, 2**self.bits - 1 - self.zero_point))
        else:
            scale, zero_point = search_parameters(x.flatten()[None], self.bits, zero=True)
            self.scale.copy_(scale[0, 0])
            self.zero_point.copy_(zero_point[0, 0])

    def forward(self, x):
        if not self.lsq:
            return quantize_by_step(x.float(), self.scale, self.zero_point, self.bits, "brecq")
        scale = scaled_gradient(self.scale, x[0].numel(), 2**self.bits - 1 - self.zero_point)
        return quantize_by_step(x.float(), scale, self.zero_point, self.bits, "lsq")


class LearnedWeight(nn.Module):
    """The quantizer of a layer's weight: signed, with one learned step per layer (LSQ).

    Args:
        weight: what the layer has, from which the step begins.
        bits: 2 to 8.
    """

    def __init__(self, weight, bits):
        super().__init__()
        self.bits = bits
        self.register_buffer("zero_point", torch.tensor(2.0 ** (bits - 1), device=weight.device))
        self.scale = nn.Parameter(lsq_start(weight, 2 ** (bits - 1) - 1))

    def forward(self, weight):
        scale = scaled_gradient(self.scale, weight.numel(), 2 ** (self.bits - 1) - 1)
        return quantize_by_step(weight, scale, self.zero_point, self.bits, "lsq")


def step_parameters(student):
    """The step sizes that a network learns, scalar parameters."""
    kinds = (QuantAct, LearnedStep, LearnedWeight)
    return [m.scale for m in student.modules() if isinstance(m, kinds) and isinstance(m.scale, nn.Parameter)]


@torch.no_grad()
def begin_steps(forward, steps):
    """Let each `LearnedStep` take its range from what reaches it in one forward pass."""
    hooks = [step.register_forward_pre_hook(lambda step, args: step.begin(args[0])) for step in steps]
    forward()
    for hook in hooks:
        hook.remove()
