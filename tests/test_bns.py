import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from common import InputError
from common.bns import BatchNormStatistics, gaussian_kl
from common.ops import channel_statistics


@pytest.mark.parametrize("form", BatchNormStatistics.forms)
def test_losses_equal_plain_loops(net, form):
    x = torch.randn(6, 3, 16, 16, requires_grad=True)
    stats = BatchNormStatistics(net)
    net(x)
    loss = stats.loss(form)
    inputs = []
    hooks = [m.register_forward_hook(lambda _, args, __: inputs.append(args[0])) for m in (net.bn1, net.bn2, net.bn3)]
    net(x)
    total = 0.0
    for layer, value in zip((net.bn1, net.bn2, net.bn3), inputs):
        mean_term = var_term = kl = 0.0
        for c in range(8):
            channel = value[:, c].double()
            mean = channel.mean()
            variance, eps = ((channel - mean) ** 2).mean(), layer.eps
            mean_term = mean_term + (mean - layer.running_mean[c]) ** 2
            var_term = var_term + (variance - layer.running_var[c]) ** 2
            stored = Normal(layer.running_mean[c].double(), (layer.running_var[c].double() + eps).sqrt())
            kl = kl + kl_divergence(Normal(mean, (variance + eps).sqrt()), stored)
        if form == "kl":
            total = total + kl / 8 / 3
        elif form == "gdfq":
            total = total + (mean_term + var_term) / 8 / 3
        else:
            total = total + (mean_term + var_term if form == "sum" else mean_term.sqrt() + var_term.sqrt())
    torch.testing.assert_close(loss.double(), total, atol=1e-6, rtol=1e-5)
    expected = torch.autograd.grad(total, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected, atol=1e-7, rtol=1e-4)
    for hook in hooks:
        hook.remove()


def test_unused_layers_take_no_part_and_a_model_without_batchnorm_is_refused(net):
    net.auxiliary = nn.BatchNorm2d(4)
    stats = BatchNormStatistics(net)
    net(torch.randn(2, 3, 16, 16))
    assert len([x for x in stats.inputs.values() if x is not None]) == 3 and stats.loss().isfinite()
    assert set(stats.inputs.values()) == {None}  # used up, so that no graph outlives its step
    net(torch.randn(2, 3, 16, 16)), stats.loss()
    with pytest.raises(InputError, match="calls none of its BatchNorm2d layers as modules"):
        stats.loss()
    with pytest.raises(InputError, match="Sequential has no BatchNorm2d"):
        BatchNormStatistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


@pytest.mark.parametrize("form", BatchNormStatistics.forms)
def test_the_first_layer_is_the_first_that_is_used(net, form):
    x, losses = torch.randn(2, 3, 16, 16), []
    for unused in ([], [nn.BatchNorm2d(9)]):  # wider than the others
        stats = BatchNormStatistics(nn.ModuleList([*unused, net]))
        for first in (1.0, 3.0):
            net(x)
            losses.append(stats.loss(form, first).item())
    means, variances = channel_statistics([net.conv1(x)]).split(8)
    parts = [(means - net.bn1.running_mean).square(), (variances - net.bn1.running_var).square()]
    own = {"sum": sum(parts).sum(), "gdfq": sum(parts).mean() / 3, "norm": sum(part.sum().sqrt() for part in parts)}
    own["kl"] = gaussian_kl(net.bn1, means, variances).mean() / 3
    assert losses[1] - losses[0] == pytest.approx(2 * own[form].item(), rel=1e-3)
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-6)
