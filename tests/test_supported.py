"""Weights and activations in places where they cannot be quantized are named, and what can be is found wherever it is."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import FunctionalNet, trained
from torch import nn

from common import InputError
from common.bns import BatchNormStatistics
from common.export import load_quantized, save_quantized
from common.folding import fold_batchnorm
from common.quant import quantize, quantized_activations, quantized_layers, set_observing
from common.trace import memory_layout, trace

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
META = {"arch": None, "num_classes": 5, "image_size": 16, "channels": 3, "wbits": 4, "abits": 4, "act_placement": "relu"}


class OwnActivation(nn.Module):
    """A network with a function of its own as its second activation; its forward may look at its data, and cannot be traced."""

    def __init__(self, function, on_data=False):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.fc = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.function, self.on_data, self.slope = function, on_data, nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        if self.on_data and x.isnan().any():
            raise ValueError("NaN")
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.function(self, self.bn2(self.conv2(x)) + x).mean((2, 3)))


WRITTEN_OUT = {
    "swish of a sum": lambda net, x: x * torch.sigmoid(x),
    "gelu": lambda net, x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu by tanh": lambda net, x: 0.5 * x * (1.0 + torch.tanh(0.797885 * (x + 0.044715 * torch.pow(x, 3)))),
    "quick gelu": lambda net, x: x * torch.sigmoid(1.702 * x),
    "hard swish": lambda net, x: F.relu6(3 + x) * x / 6,
    "swish with a learned slope": lambda net, x: x * torch.sigmoid(net.slope * x),
    "clamp": lambda net, x: x.clamp(0, 6),
    "method": lambda net, x: x.relu(),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_activations_that_are_written_out_are_found(name):
    """Traced, their results are quantized, and no step on the way; in a network that cannot be traced they are refused."""
    student = quantize(trained(OwnActivation(WRITTEN_OUT[name])), 4, 2, example=X)
    assert len(quantized_activations(student)) == 2
    taken, sent = [], []
    student.act_quant_1.register_forward_hook(lambda act, args, out: taken.append(args[0]))
    student.bn2.register_forward_hook(lambda layer, args, out: sent.append(out))
    student.act_quant_0.register_forward_hook(lambda act, args, out: sent.append(out))
    set_observing(student, True)
    student(X)
    expected = WRITTEN_OUT[name](student, sent[1] + sent[0])
    torch.testing.assert_close(taken[0] / (6 if name == "hard swish" else 1), expected)  # which divides last
    with pytest.raises(InputError, match="in module 'OwnActivation' as a function; write it as a module of torch.nn"):
        quantize(trained(OwnActivation(WRITTEN_OUT[name], on_data=True)), 4, 4, example=X)


@pytest.mark.parametrize("on_data", [False, True])
def test_a_gate_made_of_another_value_is_no_activation(on_data):
    net = OwnActivation(lambda net, x: x * torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True))), on_data)
    net.gate = nn.Conv2d(8, 8, 1)
    assert len(quantized_activations(quantize(trained(net), 4, 4, example=X))) == 1


def test_an_activation_before_another_one_is_no_gate_of_it():
    def two(net, x):
        x = F.relu6(x)
        for _ in range(40):  # many ways through these sums
            x = x + 0.5 * x
        return x * torch.sigmoid(x)

    assert len(quantized_activations(quantize(trained(OwnActivation(two)), 4, 4, example=X))) == 3


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def not_used(net, x):
    x = x + 0
    net.lost(x)
    return x


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda net, x: (x.mean((2, 3)) @ net.weight.t())[:, :, None, None], "calls 'matmul' .* as nn.Conv2d or nn.Linear"),
        (not_used, "does not use the result of an activation in place"),
        (lambda net, x: net.swish(x), "calls 'mul' in module 'swish' as a function"),
        (lambda net, x: F.conv2d(x, F.normalize(net.weight)[:, :, None, None]), "calls 'conv2d' .* as nn.Conv2d or nn.Linear"),
    ],
)
def test_what_modules_do_not_show_is_refused(function, words):
    """In a network that cannot be traced."""
    net = OwnActivation(function, on_data=True)
    net.weight, net.lost, net.swish = nn.Parameter(torch.randn(8, 8)), nn.ReLU(inplace=True), Swish()
    with pytest.raises(InputError, match=words):
        quantize(trained(net), 4, 4, example=X)


class Hidden(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(min=0)


class Activated(nn.Conv2d):
    """As detectron2 has it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Clamped(nn.Conv2d):
    """Computes its weight, not an activation."""

    def forward(self, x):
        weight = self.weight.clamp(min=0) * torch.sigmoid(self.weight)
        return self._conv_forward(x, weight * torch.sigmoid(weight), self.bias)


class Adapted(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.low = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x):
        return super().forward(x) + F.conv2d(x, self.low)


class Nested(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return super().forward(x) + self.inner(x)


class Conditioned(nn.Conv2d):
    """Takes two values, which no one can guess."""

    def forward(self, x, scale):
        return super().forward(x) * scale


def test_layers_with_a_forward_of_their_own_are_looked_into():
    for kind, words in (
        (Hidden, "layer 'conv2' .Hidden. computes 'clamp' in its own forward"),
        (Activated, "layer 'conv2' .Activated. computes 'relu' in its own forward"),
        (Adapted, "layer 'conv2' .Adapted. multiplies by its parameter 'low'"),
        (Nested, "layer 'conv2' .Nested. has the layer 'inner' inside"),
    ):
        net = FunctionalNet()
        net.conv2 = kind(8, 8, 3, 1, 1)
        with pytest.raises(InputError, match=words):
            quantize(trained(net), 4, 4, example=X)

    class Net(FunctionalNet):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            return self.fc(F.relu(self.bn2(self.conv2(x, 2.0))).mean((2, 3)))

    clamped = FunctionalNet()
    clamped.conv2 = Clamped(8, 8, 3, 1, 1)
    for example in (X, None):
        assert len(quantized_activations(quantize(trained(clamped), 4, 4, example=example))) == 3
    net = Net()
    net.conv2 = Conditioned(8, 8, 3, 1, 1)
    assert [name for name, _ in quantized_layers(quantize(trained(net), 4, 4, example=X))] == ["conv1", "conv2", "fc"]


def test_wrappers_are_taken_off_and_scripts_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # DataParallel moves a network to a GPU, if there is one
    whole = trained(FunctionalNet())
    expected = quantize(whole, 4, 4, example=X).state_dict().keys()
    nested = torch.compile(nn.DataParallel(nn.Sequential(torch.compile(whole, backend="eager"))), backend="eager")
    inside = {f"0.{key}" for key in expected if not key.startswith("act_quant")}
    assert inside <= quantize(nested, 4, 4, example=X).state_dict().keys()
    for net in (nn.DataParallel(whole), torch.compile(whole, backend="eager")):
        assert quantize(net, 4, 4, example=X).state_dict().keys() == expected

    class InsideParallel(nn.Module):
        def __init__(self):
            super().__init__()
            layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            self.features, self.fc = nn.DataParallel(nn.Sequential(*layers)), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.features(x))

    student = quantize(trained(InsideParallel()), 4, 4, example=X)
    assert len(quantized_activations(student)) == 1 and "features.0" in dict(quantized_layers(student))
    set_observing(student, True)
    student(X)
    set_observing(student, False)
    save_quantized(student, tmp_path / "q.pt", META)
    assert torch.equal(load_quantized(tmp_path / "q.pt", InsideParallel())(X), student(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())))
    with pytest.raises(InputError, match="the model has a part, '1', that is scripted by torch.jit"):
        quantize(scripted, 4, 4, example=X)


def test_what_an_activation_has_overwritten_is_its_result():
    """As in RefineNet: the shortcut is what the activation has worked on in place."""

    class Net(FunctionalNet):
        def forward(self, x):
            x = self.bn1(self.conv1(x))
            out = F.relu(x, inplace=True)
            return self.fc(F.relu(self.bn2(self.conv2(out)) + x).mean((2, 3)))

    student = quantize(trained(Net()), 2, 2, example=X)
    sums = [node for node in student.graph.nodes if getattr(node.target, "__name__", "") == "add"]
    assert "act_quant_0" in [str(n.target) for n in sums[0].all_input_nodes]


def test_a_single_image_may_not_be_another_case():
    class Net(FunctionalNet):
        def forward(self, x):
            y = super().forward(x)
            return 2 * y if x.size(0) > 1 else y

    with pytest.raises(Exception, match="something else for a single image"):
        trace(trained(Net()), X)


def test_constants_of_a_forward_have_the_same_names_each_time(tmp_path):
    class Net(FunctionalNet):
        def forward(self, x):
            return super().forward(x * torch.tensor([1.0, 2.0, 3.0])[:, None, None])

    net = trained(Net())
    trace(net, X)
    memory_layout(net, X)
    student = quantize(net, 4, 4, example=X)
    set_observing(student, True)
    student(X)
    set_observing(student, False)
    save_quantized(student, tmp_path / "q.pt", META)
    assert torch.equal(load_quantized(tmp_path / "q.pt", Net())(X), student(X))


def test_folding_is_checked_and_batch_statistics_are_left():
    net = trained(FunctionalNet())
    net.bn2.register_forward_hook(lambda layer, args, output: 2 * output)
    with pytest.raises(InputError, match="computes something else when its BatchNorms are folded"):
        fold_batchnorm(net, X)

    class OfTheBatch(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, None, None, self.weight, self.bias, True)

    class OnVectors(nn.BatchNorm1d):
        def forward(self, x):
            return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias))

    for kind in (OfTheBatch, OnVectors):
        net = OwnActivation(lambda net, x: net.relu(x))
        net.bn2 = kind(8) if kind is OfTheBatch else net.bn2
        net.fc = nn.Sequential(nn.Linear(8, 8), OnVectors(8), nn.Linear(8, 5)) if kind is OnVectors else net.fc
        net = trained(net)
        torch.testing.assert_close(fold_batchnorm(net, X)(X), net(X), atol=1e-4, rtol=1e-4)


def test_synchronised_batchnorms_are_folded():
    net = trained(FunctionalNet())
    twin = copy.deepcopy(net)
    folded = fold_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(twin), X)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(X), net(X), atol=1e-4, rtol=1e-4)


def test_frozen_batchnorms_count():
    """Their statistics are used, whatever the flag says afterwards."""
    net, x = trained(FunctionalNet()), X
    expected = BatchNormStatistics(trained(FunctionalNet())).inputs
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    assert len(BatchNormStatistics(net).inputs) == len(expected) > 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fold_batchnorm(net, x).modules())
