"""Batched tensor operations with static shapes: the arithmetic that the methods share, in as few operations as it takes."""

from functools import cache

import torch
import torch.nn.functional as F


@cache
def _fold(device, dtype):
    """Taps of a 3-tap kernel on a nearest-upsampled signal, folded to 2 taps: (phase, folded tap, tap)."""
    return torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=device, dtype=dtype)


def upsample_conv(x, conv):
    """`conv(F.interpolate(x, scale_factor=2))` for a 3x3 convolution with padding 1, at the low resolution.

    Each of the four output phases sees only 2x2 different pixels, so four 2x2 convolutions, computed as one, take the
    place of the 3x3 convolution over repeated pixels: 2.25 times fewer multiplications.

    Args:
        x: (B, C, H, W).
        conv: nn.Conv2d with a 3x3 kernel, stride 1, padding 1, groups 1.

    Returns:
        (B, conv.out_channels, 2H, 2W), equal to the plain form up to rounding.
    """
    batch, _, height, width = x.shape
    fold = _fold(x.device, conv.weight.dtype)
    kernels = torch.einsum("aik,bjl,ockl->abocij", fold, fold, conv.weight).flatten(0, 2)
    bias = conv.bias.repeat(4) if conv.bias is not None else None
    y = F.conv2d(x, kernels, bias, padding=1).view(batch, 2, 2, conv.out_channels, height + 1, width + 1)
    rows = [torch.stack([y[:, a, b, :, a : a + height, b : b + width] for b in (0, 1)], -1) for a in (0, 1)]
    return torch.stack(rows, 3).view(batch, conv.out_channels, 2 * height, 2 * width)
