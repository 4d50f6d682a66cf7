import torch
import torch.nn.functional as F
from torch import nn

from common.ops import plain_forms, upsample_conv


def test_upsample_conv_equals_the_plain_form_in_value_and_gradient():
    conv, x = nn.Conv2d(5, 7, 3, padding=1).double(), torch.randn(3, 5, 6, 4, dtype=torch.double, requires_grad=True)
    plain, fast = conv(F.interpolate(x, scale_factor=2)), upsample_conv(x, conv)
    torch.testing.assert_close(fast, plain)
    with plain_forms():
        assert torch.equal(upsample_conv(x, conv), plain)
    upstream = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, conv.weight, conv.bias), upstream) for y in (plain, fast))):
        torch.testing.assert_close(a, b)
