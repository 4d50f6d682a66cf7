import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.ops import channel_statistics, plain_forms, upsample_conv


def test_upsample_conv_equals_the_plain_form_in_value_and_gradient():
    conv, x = nn.Conv2d(5, 7, 3, padding=1).double(), torch.randn(3, 5, 6, 4, dtype=torch.double, requires_grad=True)
    plain, fast = conv(F.interpolate(x, scale_factor=2)), upsample_conv(x, conv)
    torch.testing.assert_close(fast, plain)
    with plain_forms():
        assert torch.equal(upsample_conv(x, conv), plain)
    upstream = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, conv.weight, conv.bias), upstream) for y in (plain, fast))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(7, 5, 6, 9), (130, 5, 32, 32)])
def test_channel_statistics_equal_var_mean(dtype, tolerance, layout, shape):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape) + 9).to(dtype, memory_format=layout).requires_grad_()
    weights = torch.randn(2, 5, dtype=torch.float64)
    found = channel_statistics(x)
    exact = x.detach().double().requires_grad_()
    variance, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    for value, expected in zip(found, (mean, variance)):
        torch.testing.assert_close(value.double(), expected.detach(), atol=1e-5 if dtype != torch.float64 else 1e-12, rtol=1e-5)
    (gradient,) = torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, found)), x)
    (expected,) = torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, (mean, variance))), exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)
