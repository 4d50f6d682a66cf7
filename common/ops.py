"""Batched tensor operations with static shapes: the arithmetic that the methods share, in as few operations as it takes."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import library
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import FlopCounterMode

from common import distributed

_plain = False


@contextmanager
def plain_forms():
    """Within it every operation here is computed the way its formula is written; for benchmarks and tests."""
    global _plain
    _plain = True
    try:
        yield
    finally:
        _plain = False


def count_flops(function):
    """Floating-point operations of the convolutions and matrix products in a call of `function`, gradients' included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _fold(taps):
    """Taps (3, ...) of a kernel on a nearest-upsampled signal, folded to (2 phases, 2 taps, ...) at the low resolution."""
    left, middle, right = taps
    return torch.stack([left, middle + right, left + middle, right]).unflatten(0, (2, 2))


class _ChannelStatistics(torch.autograd.Function):
    """The forward pass keeps nothing but its arguments; the backward pass is one affine map of each, in its dtype."""

    @staticmethod
    def forward(ctx, *xs):
        found = torch.cat([statistic for x in xs for statistic in _one_pass_statistics(x)])
        ctx.save_for_backward(found, *xs)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        found, *xs = ctx.saved_tensors
        sizes = [2 * x.shape[1] for x in xs]
        means = [of_one[: len(of_one) // 2] for of_one in found.split(sizes)]
        shares = torch._foreach_div(grad.split(sizes), [x.numel() // x.shape[1] for x in xs])  # dL/dmean / n, dL/dvariance / n
        # (x - mean) * 2 dL/dvariance / n + dL/dmean / n: batch normalisation by a variance of 1 / 4 has the kernel for it; half
        # of that is its epsilon, since torch 2.11 refuses one of 0
        eighth = grad.new_full((max(sizes),), 0.125)
        return tuple(
            F.batch_norm(x, mean, eighth[: len(mean)], share[len(mean) :], share[: len(mean)], False, 0.0, 0.125)
            for x, mean, share in zip(xs, means, shares)
        )


def _one_pass_statistics(x):
    """Mean and biased variance by the kernels that update running statistics."""
    return torch.batch_norm_update_stats(x, None, None, 0.0) if x.is_cuda else _statistics_in_parts(x)


def _statistics_in_parts(x):
    """The CPU's kernel adds up in float32, so it gets some 10,000 values at a time."""
    parts = x.split(max(1, 2**14 // x[0, 0].numel()))
    unused = [torch.zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]
    found = [torch.batch_norm_update_stats(part, *unused, 0.0) for part in parts]
    if len(parts) == 1:
        return found[0]
    means, variances = (torch.stack(values).double() for values in zip(*found))
    shares = torch.tensor([len(part) / len(x) for part in parts], dtype=torch.float64)
    mean = shares @ means
    variance = shares @ (variances + (means - mean).square())
    return mean.to(unused[0].dtype), variance.to(unused[0].dtype)


def _plain_statistics(x):
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean((0, 2, 3))
    # two passes over x are ten times faster than torch.var_mean on a CPU; deviations from the mean sum to zero, so the mean
    # can be detached here without changing the gradient
    return mean, (x - mean.detach()[:, None, None]).square().mean((0, 2, 3))


def channel_statistics(xs):
    """Mean and biased variance of every channel of some tensors, over their batch and pixels.

    Args:
        xs: list of (B, C, H, W), floating point, on one device; C may differ.

    Returns:
        One vector, all means of the first tensor, all its variances, then those of the second: float32 (float64 for
        float64), with a graph to the tensors that has no second derivative.
    """
    with torch.autocast(xs[0].device.type, enabled=False):
        if _plain or torch.compiler.is_compiling():  # a compiler fuses the plain form better than what it would have to call
            found = torch.cat([statistic for x in xs for statistic in _plain_statistics(x)])
        else:
            found = _ChannelStatistics.apply(*xs)
    if not distributed.sharing:
        return found
    parts = found.split([x.shape[1] for x in xs for _ in ("mean", "variance")])
    whole = distributed.whole_moments(torch.cat(parts[::2]), torch.cat(parts[1::2]))
    layers = zip(*(values.split([x.shape[1] for x in xs]) for values in whole))
    return torch.cat([statistic for layer in layers for statistic in layer])


def _interleave(phases: torch.Tensor) -> torch.Tensor:
    """Pixels of the four phases (B, H + 1, W + 1, 2, 2, C) side by side: (B, H, 2, W, 2, C)."""
    batch, height, width, _, _, channels = phases.shape
    pixels = phases.new_empty(batch, height - 1, 2, width - 1, 2, channels)
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pixels[:, :, a, :, b] = phases[:, a : a + height - 1, b : b + width - 1, a, b]
    return pixels


def _take_apart(pixels: torch.Tensor) -> torch.Tensor:
    """The adjoint of `_interleave`."""
    batch, height, _, width, _, channels = pixels.shape
    phases = pixels.new_zeros(batch, height + 1, width + 1, 2, 2, channels)  # a border pixel of each phase is not used
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        phases[:, a : a + height, b : b + width, a, b] = pixels[:, :, a, :, b]
    return phases


def _double(x: torch.Tensor, mode: str) -> torch.Tensor:
    """Twice the height and width of x (B, C, H, W)."""
    return F.interpolate(x, scale_factor=2, mode=mode)


def _halve(grad: torch.Tensor, mode: str) -> torch.Tensor:
    """The adjoint of `_double`."""
    sizes = grad.shape[2:], (*grad.shape[:2], grad.shape[2] // 2, grad.shape[3] // 2)
    if mode == "nearest":
        return torch.ops.aten.upsample_nearest2d_backward(grad, *sizes, 2.0, 2.0)
    return torch.ops.aten.upsample_bilinear2d_backward(grad, *sizes, False, 2.0, 2.0)


def _operator(function):
    """Made of `function`: an operator that torch.compile calls, because its own code takes five to twenty times as long on
    a CPU for slices and for interpolation."""
    operator = library.custom_op(f"data_free::{function.__name__[1:]}", function, mutates_args=())
    operator.register_fake(function)
    return operator


interleave, take_apart, double, halve = map(_operator, (_interleave, _take_apart, _double, _halve))
interleave.register_autograd(lambda ctx, grad: take_apart(grad))
double.register_autograd(
    lambda ctx, grad: (halve(grad, ctx.mode), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "mode", inputs[1]),
)


def upsample(x, mode="nearest"):
    """`F.interpolate(x, scale_factor=2, mode=mode)` for x (B, C, H, W) and mode "nearest" or "bilinear"."""
    if torch.compiler.is_compiling():
        return double(x, mode)
    if mode == "bilinear":  # autocast on CUDA computes it in fp32: its gradient is a sum in no fixed order
        return _double(x, mode).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _double(x, mode)


def upsample_conv(x, conv):
    """`conv(F.interpolate(x, scale_factor=2))` for a 3x3 convolution with padding 1, at the low resolution.

    Each of the four output phases sees only 2x2 different pixels, so four 2x2 convolutions, computed as one, take the
    place of the 3x3 convolution over repeated pixels: 2.25 times fewer multiplications.

    Args:
        x: (B, C, H, W).
        conv: nn.Conv2d with a 3x3 kernel, stride 1, padding 1, groups 1.

    Returns:
        (B, conv.out_channels, 2H, 2W) in channels-last layout, equal to the plain form up to rounding.
    """
    if _plain:
        return conv(F.interpolate(x, scale_factor=2))
    rows = _fold(conv.weight.movedim(2, 0))  # (row phase, row tap, out, in, 3)
    columns = _fold(rows.movedim(4, 0))  # (column phase, column tap, row phase, row tap, out, in)
    kernels = columns.permute(2, 0, 4, 5, 3, 1).flatten(0, 2).contiguous(memory_format=torch.channels_last)
    bias = conv.bias.repeat(4) if conv.bias is not None else None
    y = F.conv2d(x.contiguous(memory_format=torch.channels_last), kernels, bias, padding=1)
    phases = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, conv.out_channels))
    return interleave(phases).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def weighted_operation(operation, x, y, weight, shared):
    """`weight * operation(x, y)` for an operation that up-samples, normalises, activates and convolves, in a faster order.

    All operations on x share its normalisation. Nearest interpolation, with which a 1x1 convolution and everything before it
    commute, comes last, at a quarter of the multiplications. The weight goes into the kernel.

    Args:
        operation: a module whose forward is the plain form, `conv(F.leaky_relu(norm(x, y), 0.2))` of x up-sampled as
            `upsampling` says (None, or "nearest" or "bilinear" before a 1x1 convolution); `norm(x, y)` is
            `norm.affine(norm.bn(x), y)`, where bn has no parameters.
        x: (B, C, H, W).
        y: labels, as `norm` takes them.
        weight: scalar tensor; None for 1.
        shared: dict, empty at the first operation on x and handed to all others on it.

    Returns:
        (B, D, H, W), or (B, D, 2H, 2W) where the operation up-samples, equal to the plain form up to rounding.
    """
    if _plain:
        output = operation(x, y)
        return output if weight is None else weight * output
    bilinear, conv = operation.upsampling == "bilinear", operation.conv
    if bilinear not in shared:
        shared[bilinear] = operation.norm.bn(upsample(x, "bilinear") if bilinear else x)
    x = F.leaky_relu(operation.norm.affine(shared[bilinear], y), 0.2)
    kernel, bias = (conv.weight, conv.bias) if weight is None else (weight * conv.weight, weight * conv.bias)
    x = F.conv2d(x, kernel, bias, padding=conv.padding, dilation=conv.dilation)
    return upsample(x) if operation.upsampling == "nearest" else x


def soft_labels(classes, shares, num_classes):
    """Soft labels of superposed samples, sum_k lambda_k y_k (Eq. 8 of Qimera).

    Args:
        classes: (B, K) int64, the classes a sample is made of; a class may come twice.
        shares: (B, K), lambda of each, a sum of 1 per sample.
        num_classes: C.

    Returns:
        (B, C), a sum of 1 per sample.
    """
    return shares.new_zeros(len(classes), num_classes).scatter_add(1, classes, shares)


def superpose(soft, table):
    """Superposed rows of a table, sum_k lambda_k e_k (Eq. 8 of Qimera), as one matrix product: no row is gathered.

    Args:
        soft: soft labels (B, C) from `soft_labels`, or one-hot.
        table: (C, D), one row per class.

    Returns:
        (B, D). Time and memory do not depend on K.
    """
    with torch.autocast(table.device.type, enabled=False):
        return soft @ table


def kd_loss(student_logits, teacher_logits, temperature, reduction):
    """GDFQ's L_KD: T^2 times the Kullback-Leibler divergence from teacher to student, both softened by T; logits (B, C).

    `reduction` "batchmean" divides it by B, "mean" by B * C as the released code does.
    """
    teacher_log = F.log_softmax(teacher_logits / temperature, 1)
    student_log = F.log_softmax(student_logits / temperature, 1)
    divergence = (teacher_log.exp() * (teacher_log - student_log)).sum()
    count = teacher_logits.shape[0] if reduction == "batchmean" else teacher_logits.numel()
    return temperature**2 * divergence / count


def mix_images(x, soft, how):
    """Mixup or CutMix of synthetic images with a random partner, lambda ~ U(0, 1) per sample (Table 2 of Qimera).

    Args:
        x: (B, channels, H, W).
        soft: (B, C) probabilities of their labels.
        how: "mixup" (Zhang et al. 2018) or "cutmix" (Yun et al. 2019).

    Returns:
        Mixed images and probabilities, as x and soft.
    """
    batch, _, height, width = x.shape
    whole, own = distributed.whole_batch, distributed.own
    partner = own(whole(torch.rand(batch, device=x.device)).argsort())  # a permutation that a CUDA graph can hold
    share = torch.rand(batch, device=x.device)  # of the partner
    if how == "mixup":
        mask = share.view(-1, 1, 1, 1)
    else:
        half = share.sqrt() / 2  # half the box's side, relative to the image's
        centre = [torch.rand(batch, 1, device=x.device) for _ in range(2)]
        rows = ((torch.arange(height, device=x.device) + 0.5) / height - centre[0]).abs() < half[:, None]
        columns = ((torch.arange(width, device=x.device) + 0.5) / width - centre[1]).abs() < half[:, None]
        mask = (rows[:, :, None] & columns[:, None, :])[:, None].to(x.dtype)
        share = mask.mean((1, 2, 3))  # what the border left of the box
    return torch.lerp(x, whole(x)[partner], mask), torch.lerp(soft, whole(soft)[partner], share[:, None])


def box_mix(x1, x2, boxes):
    """Images with a box each into which the whole of another image is resized (Eq. 8 of MixMix).

    The bilinear weights are those of `F.interpolate(x2, (height, width), mode="bilinear")`; all boxes of the batch in one
    call, in shapes that do not depend on them.

    Args:
        x1: (B, C, H, W), outside the boxes.
        x2: (B, C, H, W), inside.
        boxes: int64 (B, 4), left, top, width, height in pixels, inside the image.

    Returns:
        (B, C, H, W), with gradients to both.
    """
    left, top, width, height = boxes.unbind(1)

    def along(start, length, size):
        """Which pixels are inside (B, size), and where each looks in x2, from -1 (its left edge) to 1."""
        pixels = torch.arange(size, device=boxes.device) - start[:, None]
        return (pixels >= 0) & (pixels < length[:, None]), 2 * (pixels + 0.5) / length[:, None] - 1

    (rows, y), (columns, x) = along(top, height, x1.shape[2]), along(left, width, x1.shape[3])
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3).to(x2.dtype)
    inside = F.grid_sample(x2, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], inside, x1)
