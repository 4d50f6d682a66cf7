"""Networks as strangers write them go through every script; what the graph of a network holds."""

import pytest
import strangers
import torch
import torch.nn.functional as F
from conftest import FunctionalNet, trained
from torch import nn

import adadfq
import autorecon
import gdfq
import mixmix
import qimera
from common import InputError
from common.check import describe
from common.export import load_quantized, save_quantized
from common.folding import fold_batchnorm
from common.probe import input_channels
from common.quant import (
    QuantConv2d,
    channel_parameters,
    fake_quantize,
    quantize,
    quantized_activations,
    quantized_layers,
    set_observing,
)
from common.run import Run
from common.trace import memory_layout, trace

SHORT = {"dataset": "folder", "device": "cpu", "batch_size": 4}
SHORT |= {"epochs": 2, "iters": 1, "warmup_epochs": 1, "calibrate_epochs": 1}
METHODS = {
    "gdfq": (gdfq, {}),
    "adadfq": (adadfq, {}),
    "qimera": (qimera, {}),
    "autorecon": (autorecon, {"genotype": "gdfq-cbn"}),
}
ACTIVATIONS = {  # quantized activations of each network, counted by hand
    "ViewAndFeatureFlags": 2, "DeadActivation": 2, "ShuffleArithmetic": 3, "GroupedAndDilated": 3, "SqueezeAndExcitation": 3,
    "GreyDigits": 3, "LayersOfTheirOwn": 2, "PreActivation": 3, "DenseConnections": 3, "SharedReLU": 2, "FusedNorms": 2,
    "ShortcutOfZeros": 2, "WrittenOutActivations": 4, "WorksInPlace": 2,
}  # fmt: skip


def settings(name, **more):
    classes, size, _ = strangers.data_of(name)
    return {"num_classes": classes, "image_size": size, **more}


def batch(name, count=4):
    _, size, channels = strangers.data_of(name)
    return torch.randn(count, channels, size, size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", strangers.FAMILY)
def test_a_network_from_the_wild_goes_through_the_generator_scripts(name, method):
    script, flags = METHODS[method]
    net = strangers.make(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    baked = {"conv2.weight_g": "conv2.weight", "conv2.weight_v": "conv2.weight"} if name == "ShortcutOfZeros" else {}
    cfg = script.config(**settings(name, **SHORT, **flags, lr_q=0.01))
    run = Run(cfg)
    student = script.compress(net, cfg, run)
    assert run.layout is torch.channels_last
    assert len(quantized_activations(student)) == ACTIVATIONS[name] and all(a.seen for _, a in quantized_activations(student))
    layers = [key for key, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted(key for key, _ in quantized_layers(student)) == sorted(layers)
    state = student.state_dict()
    for key, _ in net.named_parameters():
        assert key in baked or not torch.equal(state[key], before[key])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("task", ["ptq", "prune"])
@pytest.mark.parametrize("name", strangers.FAMILY)
def test_a_network_from_the_wild_goes_through_mixmix(name, task):
    net, images = strangers.make(name), batch(name, 16)
    flags = {"dataset": "folder", "device": "cpu", "data_source": "single", "task": task}
    if task == "ptq":
        flags |= {"weight_iterations": 2, "step_iterations": 2, "bits": 8}
    student = mixmix.compress(net, images, mixmix.config(**settings(name, **flags)))
    error = (student(images) - net(images)).std() / net(images).std()
    assert error < (0.2 if task == "ptq" else 0.9)
    if task == "prune":
        pruned = [m for m in student.modules() if isinstance(m, nn.Conv2d)]
        assert all((m.weight == 0).float().mean() > 0.4 for m in pruned)


@pytest.mark.parametrize("name", strangers.FAMILY)
def test_the_graph_computes_what_the_network_computes(name):
    net, x = strangers.make(name), batch(name, 6)
    for count in (1, 6):  # batch sizes that it was not traced with
        torch.testing.assert_close(trace(net, x)(x[:count]), net(x[:count]))
        torch.testing.assert_close(fold_batchnorm(net, x)(x[:count]), net(x[:count]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("placement", ["relu", "input"])
@pytest.mark.parametrize("name", strangers.FAMILY)
def test_eight_bits_are_nearly_the_network(name, placement):
    net, x = strangers.make(name), batch(name, 32)
    student = quantize(net, 8, 8, placement, example=x)
    if name == "WorksInPlace" and placement == "input":
        assert [act.bits for _, act in quantized_activations(quantize(net, 4, 4, "input", example=x))] == [8, 4, 4, 4]
    set_observing(student, True)
    student(x)
    set_observing(student, False)
    for layout in (torch.contiguous_format, torch.channels_last):
        error = student(x.clone(memory_format=layout)) - net(x)
        assert error.std() < 0.05 * net(x).std()


@pytest.mark.parametrize("name", ["LayersOfTheirOwn", "ViewAndFeatureFlags", "FusedNorms", "WrittenOutActivations"])
def test_files_hold_them(name, tmp_path):
    net, x = strangers.make(name), batch(name)
    student = quantize(net, 3, 4, example=x)
    set_observing(student, True)
    student(x)
    set_observing(student, False)
    meta = settings(name, channels=input_channels(net), arch=None, wbits=3, abits=4, act_placement="relu")
    save_quantized(student, tmp_path / "quantized.pt", meta)
    loaded = load_quantized(tmp_path / "quantized.pt", strangers.FAMILY[name]())
    assert torch.equal(loaded(x), student(x))


def test_a_layer_with_a_forward_of_its_own_reads_quantized_weights():
    net, x = strangers.make("LayersOfTheirOwn"), batch("LayersOfTheirOwn")
    student = quantize(net, 3, 8, example=x)
    reference = strangers.make("LayersOfTheirOwn")
    with torch.no_grad():
        for layer in (reference.conv1, reference.conv2, reference.fc):
            layer.weight.copy_(fake_quantize(layer.weight, *channel_parameters(layer.weight, 3), 3))
        expected = F.relu6(reference.bn1(reference.conv1(x)))
        student.act_quant_0.register_forward_pre_hook(lambda _, args: torch.testing.assert_close(args[0], expected))
        student(x)
        other = torch.randn_like(net.conv2.weight)
        before = net.conv2.weight.clone()
        found = student.conv2.with_weight(expected, other)
        net.conv2.weight.copy_(other)
        torch.testing.assert_close(found, net.conv2(expected))
    assert torch.equal(student.conv2.weight, before) and isinstance(student.conv2, strangers.StandardisedWeights)


def test_what_depends_on_data_or_on_the_batch_is_not_taken_for_a_constant():
    class OnData(FunctionalNet):
        def forward(self, x):
            return super().forward(x if x.sum().item() > 0 else -x)

    class OnBatch(FunctionalNet):
        def forward(self, x):
            return super().forward(x) * (1.0 if x.size(0) == 2 else 2.0)

    class BakedIn(FunctionalNet):
        def forward(self, x):
            return super().forward(x) + float(x.size(0))

    for cls in (OnData, OnBatch, BakedIn):
        with pytest.raises(Exception, match="control flow|float"):
            trace(cls().eval(), torch.zeros(2, 3, 16, 16))


def test_a_view_that_is_written_to_stays_a_view():
    class Aliased(FunctionalNet):
        def forward(self, x):
            x = self.bn1(self.conv1(x))
            x.view(x.size(0), -1).mul_(2)
            return self.fc(F.relu(self.bn2(self.conv2(F.relu(x)))).mean((2, 3)))

    net, x = trained(Aliased()), torch.randn(4, 3, 16, 16)
    assert memory_layout(net, x) is torch.contiguous_format
    torch.testing.assert_close(trace(net, x)(x), net(x))


def test_weights_that_no_layer_holds_are_named(net):
    class Product(FunctionalNet):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x))).mean((2, 3))
            return torch.matmul(x, F.normalize(self.fc.weight, dim=1).t())

    with pytest.raises(InputError, match="'matmul' .* takes a weight of the model"):
        quantize(trained(Product()), 4, 4, example=torch.zeros(2, 3, 16, 16))
    net.conv2.forward = lambda x: 2 * x
    with pytest.raises(InputError, match="layer 'conv2' has its forward replaced on the instance"):
        quantize(net, 4, 4, example=torch.zeros(2, 3, 16, 16))


def test_layers_that_hide_an_activation_are_named():
    class Hiding(nn.Conv2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    net = nn.Sequential(Hiding(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(InputError, match=r"layer '0' \(Hiding\) computes 'relu' in its own forward"):
        quantize(net, 4, 4, example=torch.zeros(2, 3, 8, 8))


def test_weights_with_a_parametrization_are_taken_as_they_are(net):
    expected, x = net(torch.ones(2, 3, 16, 16)), torch.ones(2, 3, 16, 16)
    nn.utils.parametrizations.weight_norm(net.conv2)
    student = quantize(net, 8, 8, example=x)
    assert isinstance(student.conv2, QuantConv2d) and "parametrizations" not in dict(student.conv2.named_children())
    torch.testing.assert_close(student.conv2.weight, net.conv2.weight)
    torch.testing.assert_close(net(x), expected)


class ViewOfTheData(strangers.ViewAndFeatureFlags):
    """`view` on a map larger than 1x1 in a forward that cannot be traced."""

    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


class ViewWithModules(nn.Module):
    """As above, with activations that are modules, so that modules can be replaced."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.fc = nn.Linear(4 * 64, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x if x.sum() > -1e9 else -x)))
        return self.fc(x.view(len(x), -1))


def test_the_memory_layout_is_ours(tmp_path, capsys):
    x, last = batch("ViewAndFeatureFlags"), torch.channels_last
    traceable, opaque = strangers.make("ViewAndFeatureFlags"), trained(ViewOfTheData())
    expected = traceable(x)
    assert memory_layout(traceable, x) is last
    torch.testing.assert_close(traceable(x.to(memory_format=last)), expected)
    assert memory_layout(opaque, x) is torch.contiguous_format and opaque(x).shape == (4, 5)
    cfg = gdfq.config(**SHORT, num_classes=5, image_size=16, lr_q=0.01)
    run = Run(cfg, tmp_path / "run")
    student = gdfq.compress(trained(ViewWithModules()), cfg, run)
    assert run.layout is torch.contiguous_format and len(quantized_activations(student)) == 1
    assert capsys.readouterr().out.count("needs NCHW memory layout") == 1


def test_activations_in_full_precision_are_named():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Tanh(), nn.Softplus(), nn.Flatten(), nn.Linear(144, 5)
    net = nn.Sequential(*layers)
    x = torch.zeros(2, 3, 8, 8)
    assert describe(quantize(net, 4, 4, example=x)).endswith("; in full precision: 1 Softplus, 1 Tanh")
    gates = strangers.make("SqueezeAndExcitation")
    assert describe(quantize(gates, 4, 4, example=batch("SqueezeAndExcitation"))).endswith("; in full precision: 1 Sigmoid")
    assert describe(quantize(FunctionalNet(), 4, 4)) == "4 weight tensors to 4 bits, 3 activations to 4 bits"


def test_a_dataparallel_checkpoint_of_an_own_network(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wild.py").write_text("from strangers import ViewAndFeatureFlags as make\n")
    net = strangers.make("ViewAndFeatureFlags")
    torch.save({"state_dict": nn.DataParallel(net).state_dict(), "epoch": 3}, tmp_path / "net.pt")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings("ViewAndFeatureFlags", **SHORT).items()]
    where = ["--arch", "wild:make", "--weights", str(tmp_path / "net.pt"), "--out", str(tmp_path / "run")]
    assert gdfq.main([*flags, *where])["agreement"] >= 0


def test_teachers_of_other_precisions_are_converted(net):
    cfg = gdfq.config(**SHORT, num_classes=5, image_size=16, lr_q=0.01)
    expected = gdfq.compress(net, cfg).state_dict()
    for kind in (torch.float64, torch.bfloat16):
        student = gdfq.compress(trained(FunctionalNet()).to(kind), cfg)
        assert all(p.dtype is torch.float32 for p in student.parameters())
    as_double = gdfq.compress(net.double(), cfg).state_dict()
    assert all(torch.equal(value, as_double[key]) for key, value in expected.items())
