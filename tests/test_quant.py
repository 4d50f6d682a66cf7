import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import FunctionalNet, ModuleNet, trained
from torch import nn

from common import InputError
from common.folding import fold_batchnorm
from common.models import build
from common.quant import (
    QuantAct,
    QuantConv2d,
    affine_parameters,
    channel_parameters,
    fake_quantize,
    quantize,
    quantized_activations,
    quantized_layers,
    set_observing,
)


@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_torchs_own_fake_quantization(bits):
    weight = torch.randn(6, 4, 3, 3)
    scale, zero_point = channel_parameters(weight, bits)
    arguments = (scale.flatten(), zero_point.flatten().int(), 0, 0, 2**bits - 1)
    expected = torch.fake_quantize_per_channel_affine(weight, *arguments)
    assert torch.equal(fake_quantize(weight, scale, zero_point, bits), expected)
    x = torch.randn(2, 5, 7, 7) * 3
    scale, zero_point = affine_parameters(torch.tensor(-1.3), torch.tensor(2.9), bits)
    expected = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), 0, 2**bits - 1)
    assert torch.equal(fake_quantize(x, scale, zero_point, bits), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_quantized_at_once_are_those_of_each_layer_alone(layout):
    student = quantize(trained(FunctionalNet()).to(memory_format=layout), 3, 8)
    student.conv2.bits, layers, used, gradients = 5, dict(quantized_layers(student)), {}, []
    x, upstream = torch.randn(4, 3, 16, 16), torch.randn(4, 5)
    set_observing(student, True)
    student(x)
    set_observing(student, False)
    hooks = [layer.register_forward_pre_hook(lambda layer, _: used.update({layer: layer.ready})) for layer in layers.values()]
    (student(x) * upstream).sum().backward()
    for name, layer in layers.items():
        expected = fake_quantize(layer.weight, *channel_parameters(layer.weight, layer.bits), layer.bits)
        assert torch.equal(used[layer], expected) and used[layer].stride() == layer.weight.stride(), name
        assert layer.ready is None
        gradients.append(layer.weight.grad.clone())
    for hook in hooks:
        hook.remove()
    student.zero_grad()
    (student.forward(x) * upstream).sum().backward()  # past the network's hooks
    for gradient, layer in zip(gradients, layers.values()):
        assert torch.equal(gradient, layer.weight.grad)
    with pytest.raises(RuntimeError):
        student(x[:, :2])
    assert all(layer.ready is None for layer in layers.values())


def test_gradient_is_the_identity_or_clipped():
    x = torch.linspace(-3, 3, 61, requires_grad=True)
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), 4)
    upstream = torch.randn(61)
    (grad,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, 4), x, upstream)
    assert torch.equal(grad, upstream)
    (grad,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, 4, clipped=True), x, upstream)
    reference = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), 0, 15)
    assert torch.equal(grad, torch.autograd.grad(reference, x, upstream)[0])


def test_range_ends_are_codes_and_narrow_ranges_survive():
    weight = torch.tensor([[0.7], [-0.7], [0.0]])
    scale, zero_point = channel_parameters(weight, 3)
    torch.testing.assert_close(fake_quantize(weight, scale, zero_point, 3), weight)
    assert zero_point.abs().max() < 2**31
    x = torch.tensor([0.0, 6.0])
    torch.testing.assert_close(fake_quantize(x, *affine_parameters(x[0], x[1], 2), 2), x)


def test_observer_is_a_plain_moving_average():
    act, low, high = QuantAct(4), None, None
    act.observing = True
    for _ in range(5):
        x = torch.randn(3, 4, 5, 5) * 2
        act(x)
        low = x.min() if low is None else 0.9 * low + 0.1 * x.min()
        high = x.max() if high is None else 0.9 * high + 0.1 * x.max()
    torch.testing.assert_close((act.low, act.high), (low, high))
    act.observing = False
    act(100 * torch.randn(3))
    torch.testing.assert_close(act.high, high)


def test_functions_are_found_and_the_teacher_is_untouched(net):
    before = copy.deepcopy(net.state_dict())
    student = quantize(net, 4, 3)
    assert [layer.bits for _, layer in quantized_layers(student)] == [4] * 4
    assert [act.bits for _, act in quantized_activations(student)] == [3] * 3
    set_observing(student, True)
    x = torch.randn(4, 3, 16, 16)
    student(x).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(isinstance(module, (QuantAct, QuantConv2d)) for module in net.modules())


def test_quantized_forward_equals_a_hand_written_one(net):
    student, x = quantize(net, 4, 4), torch.randn(8, 3, 16, 16)
    set_observing(student, True)
    with torch.no_grad():
        student(x)
        set_observing(student, False)

        def weight(layer):
            low, high = layer.weight.flatten(1).amin(1), layer.weight.flatten(1).amax(1)
            scale = (high - low) / 15
            return torch.fake_quantize_per_channel_affine(layer.weight, scale, torch.round(-low / scale).int(), 0, 0, 15)

        def act(value):
            return torch.fake_quantize_per_tensor_affine(value, value.max().item() / 15, 0, 0, 15)

        y = act(F.relu(net.bn1(F.conv2d(x, weight(net.conv1), stride=2, padding=1))))
        y = net.bn2(F.conv2d(y, weight(net.conv2), padding=1)) + net.bn3(F.conv2d(y, weight(net.conv3)))
        y = F.linear(act(act(F.relu(y))).mean((2, 3)), weight(net.fc), net.fc.bias)
        torch.testing.assert_close(student(x), y, atol=1e-5, rtol=1e-4)


def test_input_placement_covers_every_layer_once(net):
    student = quantize(net, 4, 4, "input")
    # the image, the activation that both branches read, and the pooled features
    assert [act.bits for _, act in quantized_activations(student)] == [8, 4, 4]
    seen = []
    for _, layer in quantized_layers(student):
        layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0].unique())))
    set_observing(student, True)
    student(torch.randn(8, 3, 16, 16))
    assert len(seen) == 4 and all(count <= 256 for count in seen) and all(count <= 16 for count in seen[1:])


def test_a_function_may_say_what_is_quantized(net):
    student = quantize(net, 4, 3, lambda traced: [node for node in traced.graph.nodes if node.name in ("bn2", "mean")])
    found = [node for node in student.graph.nodes if str(node.target).startswith("act_quant_")]
    assert [node.args[0].name for node in found] == ["bn2", "mean"]
    assert all(set(node.args[0].users) == {node} for node in found)  # nothing sees the full-precision value any more
    with pytest.raises(InputError, match="cannot be traced .* give one that does not branch"):
        quantize(trained(ModuleNet()), 4, 4, lambda traced: [], example=torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("arch, weights, acts", [("resnet20", 22, 19), ("mobilenet_v2", 53, 35), ("densenet121", 121, 121)])
def test_known_networks_are_covered(arch, weights, acts):
    student = quantize(build(arch, 10, 32), 4, 4)
    assert (len(quantized_layers(student)), len(quantized_activations(student))) == (weights, acts)


@pytest.mark.parametrize("placement, bits", [("relu", [4]), ("input", [8, 4])])
def test_untraceable_network_has_its_modules_replaced(placement, bits):
    model, x = trained(ModuleNet()), torch.randn(4, 3, 16, 16)
    student = quantize(model, 4, 4, placement, example=x)
    assert [act.bits for _, act in quantized_activations(student)] == bits
    set_observing(student, True)
    student(x)
    assert all(act.seen and act.high > act.low for _, act in quantized_activations(student))
    assert set(model.state_dict()) <= set(student.state_dict())


def test_what_cannot_be_quantized_is_named():
    class Untraceable(ModuleNet):
        def forward(self, x):
            return super().forward(F.relu(x))

    with pytest.raises(InputError, match="'relu' in module 'Untraceable'"):
        quantize(Untraceable(), 4, 4, example=torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match="example"):
        quantize(Untraceable(), 4, 4)
    with pytest.raises(InputError, match="'1' is a ConvTranspose2d"):
        quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2), nn.ReLU()), 4, 4)

    class FunctionalConv(FunctionalNet):
        def forward(self, x):
            return super().forward(F.conv2d(x, torch.ones(3, 3, 1, 1)))

    with pytest.raises(InputError, match="conv2d"):
        quantize(FunctionalConv(), 4, 4)

    class InPlaceStatement(FunctionalNet):
        def forward(self, x):
            x = self.bn1(self.conv1(x))
            F.relu(x, inplace=True)
            return self.fc(F.relu(self.conv2(x)).mean((2, 3)))

    with pytest.raises(InputError, match="'relu' works in place and its result is not used"):
        quantize(InPlaceStatement(), 4, 4)
    with pytest.raises(InputError, match="2 to 8"):
        quantize(FunctionalNet(), 9, 4)


class ChangedBetween(nn.Module):
    """A value that two layers receive, changed in place between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.bn(self.stem(x))
        first = self.first(x)
        x.relu_().mul_(3)
        return self.fc((first + self.second(x)).mean((2, 3)))


@pytest.mark.parametrize("placement, found", [("relu", "which is changed and used again"), ("input", "between two layers")])
def test_a_value_that_changes_between_two_layers_is_refused(placement, found):
    with pytest.raises(InputError, match=f"'relu_' works in place on 'bn'.* {found}.*; assign its result"):
        quantize(trained(ChangedBetween()), 4, 4, placement)


def test_one_activation_called_twice_may_move_its_range_before_its_gradient():
    """Untraceable networks share a quantizer between the calls of one ReLU module."""
    act = QuantAct(4, clipped=True)
    act.observing = True
    x = torch.tensor([0.5, 3.0], requires_grad=True)
    act(10 * act(x)).sum().backward()
    assert torch.equal(x.grad, torch.tensor([10.0, 0.0]))  # 30 is outside the range that 3 and 30 have made by then


def test_folded_networks_compute_the_same(net):
    folded, x = fold_batchnorm(net), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(folded(x), net(x), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with pytest.raises(InputError, match="cannot be traced"):
        fold_batchnorm(trained(ModuleNet()))
