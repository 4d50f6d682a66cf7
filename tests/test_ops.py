import pytest
import torch
import torch.nn.functional as F
from torch import library, nn

import autorecon
from common.ops import channel_statistics, double, interleave, plain_forms, upsample_conv, weighted_operation


def test_upsample_conv_equals_the_plain_form_in_value_and_gradient():
    conv, x = nn.Conv2d(5, 7, 3, padding=1).double(), torch.randn(3, 5, 6, 4, dtype=torch.double, requires_grad=True)
    plain, fast = conv(F.interpolate(x, scale_factor=2)), upsample_conv(x, conv)
    torch.testing.assert_close(fast, plain)
    with plain_forms():
        assert torch.equal(upsample_conv(x, conv), plain)
    upstream = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, conv.weight, conv.bias), upstream) for y in (plain, fast))):
        torch.testing.assert_close(a, b)


def test_weighted_operations_equal_the_plain_form_in_value_and_gradient():
    torch.manual_seed(0)
    names = ("nearest", "bilinear", "conv1x1", "conv5x5", "dilated3x3", "bilinear")  # all on one x
    operations = nn.ModuleList(autorecon.Operation(name, 3, 4) for name in names).double()
    for operation in operations:
        nn.init.normal_(operation.norm.gamma.weight)
        nn.init.normal_(operation.norm.beta.weight)
    x, weights = torch.randn(5, 4, 6, 4, dtype=torch.double), torch.rand(len(names), dtype=torch.double)
    y, sources = torch.tensor([0, 1, 2, 2, 0]), (x.requires_grad_(), weights.requires_grad_(), *operations.parameters())
    shared, each = {}, list(zip(operations, [None, *weights[1:]]))
    plain = [operation(x, y) * (1 if weight is None else weight) for operation, weight in each]
    fast = [weighted_operation(operation, x, y, weight, shared) for operation, weight in each]
    torch.testing.assert_close(fast, plain)
    with plain_forms():
        assert all(torch.equal(weighted_operation(o, x, y, weight, {}), output) for (o, weight), output in zip(each, plain))
    upstream = [torch.randn_like(output) for output in plain]
    for a, b in zip(*(torch.autograd.grad(outputs, sources, upstream) for outputs in (plain, fast))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_operators_of_compiled_steps(mode):
    """Shapes, layouts and gradients that a compiler relies on, checked by PyTorch; values against the plain operation."""
    x = torch.randn(2, 3, 4, 6, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    assert torch.equal(double(x, mode), F.interpolate(x, scale_factor=2, mode=mode))
    static = [f"test_{name}" for name in ("schema", "autograd_registration", "faketensor", "aot_dispatch_static")]
    library.opcheck(double, (x, mode), test_utils=static)
    library.opcheck(interleave, (torch.randn(2, 3, 4, 2, 2, 5, requires_grad=True),), test_utils=static)
    assert torch.autograd.gradcheck(lambda x: double(x, mode), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(7, 5, 6, 9), (130, 5, 32, 32)])
def test_channel_statistics_equal_var_mean(dtype, tolerance, layout, shape):
    torch.manual_seed(0)
    shapes = [shape, (2, 3, 4, 4)]
    xs = [(3 * torch.randn(shape) + 9).to(dtype, memory_format=layout).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in xs]
    expected = torch.cat([v for x in exact for v in reversed(torch.var_mean(x, (0, 2, 3), correction=0))])
    found, weights = channel_statistics(xs), torch.randn(2 * (5 + 3), dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=1e-5 if dtype != torch.float64 else 1e-12, rtol=1e-5)
    gradients, exact_gradients = (torch.autograd.grad((weights * v).sum(), x) for v, x in ((found, xs), (expected, exact)))
    for gradient, exactly in zip(gradients, exact_gradients):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), exactly, atol=tolerance * exactly.abs().max().item(), rtol=tolerance)
