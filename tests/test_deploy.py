"""The integer network: folding, integer arithmetic, ONNX, torch.export."""

import os
import subprocess
import sys
from argparse import Namespace
from fractions import Fraction
from functools import partial
from math import floor

import pytest
import strangers
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT, FunctionalNet, trained
from test_cli import TINY
from test_data import make_folder
from test_export import META, calibrated
from test_tasks import DATA, NOISE
from torch import nn

import gdfq
import mixmix
from common import InputError
from common.deploy import integer_form
from common.export import load_quantized, save_quantized
from common.integer import IntegerNetwork, multiplier, rescale
from common.quant import quantized_activations, quantized_layers
from common.trace import _BatchNorm

NETWORKS = "inverted ViewAndFeatureFlags ShuffleArithmetic SqueezeAndExcitation PreActivation DenseConnections Curved".split()


class Curved(FunctionalNet):
    """Activations that the integer network has in tables, and pooling by a module."""

    def __init__(self):
        super().__init__()
        self.gate, self.hard, self.box, self.pool = nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(-1, 2), nn.AvgPool2d(2)

    def forward(self, x):
        x = self.pool(self.gate(self.bn1(self.conv1(x))))
        x = self.box(self.bn2(self.conv2(x))) + torch.tanh(self.bn3(self.conv3(x))) * self.hard(x)
        return self.fc(x.mean((2, 3)))


def loaded(path, make, bits, placement="input", size=16):
    """A quantized network that was written to `path` and read again."""
    student = calibrated(make(), bits, placement, size, torch.zeros(2, 3, size, size))
    save_quantized(student, path, META | {"wbits": bits, "abits": bits, "act_placement": placement})
    return load_quantized(path, make()).requires_grad_(False)


def maker(name):
    own = {"inverted": tiny.inverted, "Curved": lambda: trained(Curved())}
    return own.get(name) or partial(strangers.make, name)


def with_odd_norms():
    """A network with a BatchNorm of negative and zero factors, and a channel of positive weights alone."""
    net = trained(FunctionalNet())
    with torch.no_grad():
        net.bn2.weight[0], net.bn2.weight[1] = -1.5, 0.0
        net.conv2.weight[2] = net.conv2.weight[2].abs() + 0.1
    return net


def test_ranges_of_the_integer_network_include_zero(tmp_path):
    student = loaded(tmp_path / "q.pt", with_odd_norms, 4)
    for _, layer in quantized_layers(student):
        assert layer.weight_zero_point.min() >= 0 and layer.weight_zero_point.max() <= 15
    for _, act in quantized_activations(student):  # the mean over all positions is positive
        assert 0 <= act.zero_point <= 2**act.bits - 1
    relu = loaded(tmp_path / "relu.pt", with_odd_norms, 4, "relu")
    assert relu.conv2.weight_zero_point.min() < 0  # as in the papers


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_folded_network_has_the_same_codes_and_outputs(tmp_path, bits):
    student, x = loaded(tmp_path / "q.pt", with_odd_norms, bits), torch.randn(6, 3, 16, 16)
    network = integer_form(student)
    assert not any(isinstance(module, _BatchNorm) for module in network.modules())
    codes, folded = student.conv2.codes(), network.conv2.codes()
    assert torch.equal(folded[0], 2**bits - 1 - codes[0]) and torch.equal(folded[2:], codes[2:])
    assert torch.equal(folded[1], network.conv2.weight_zero_point[1].expand_as(folded[1]))
    torch.testing.assert_close(network(x), student(x), rtol=0, atol=1e-5)


def test_rescaling_is_exact_to_the_last_bit():
    real = torch.tensor([3.7e-9, 0.02, 0.7, 1.0, 31.5, 1e5], dtype=torch.float64)
    m, shift = multiplier(real)
    for value, a, b in zip(real.tolist(), m.tolist(), shift.tolist()):
        assert abs(Fraction(a, 2**b) / Fraction(value) - 1) < 2**-30 and a <= 2**31
    x = torch.tensor([-(2**31) + 1, -12345, -3, 0, 1, 2**30])[:, None].int()
    pairs = list(zip(m.tolist(), shift.tolist()))
    expected = [[floor(Fraction(value * a, 2**b) + Fraction(1, 2)) for a, b in pairs] for value in x[:, 0].tolist()]
    assert torch.equal(rescale(x, m, shift), torch.tensor(expected).clamp(1 - 2**31, 2**31 - 1).int())


def test_means_are_exact_at_any_size(tmp_path):
    network = IntegerNetwork(integer_form(loaded(tmp_path / "q.pt", with_odd_norms, 4)))
    for count in (7, 16, 56):
        x = torch.randint(-(2**30), 2**30, (2, 3, count, count), dtype=torch.int32)
        expected = [[floor(Fraction(sum(map_.flatten().tolist()), count**2) + Fraction(1, 2)) for map_ in image] for image in x]
        assert torch.equal(network.mean(x, (2, 3)), torch.tensor(expected, dtype=torch.int32))
        constant = torch.full((1, 1, count, count), 3 << 24, dtype=torch.int32)
        assert network.mean(constant, (2, 3)).item() == 3 << 24


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_integer_arithmetic_gives_the_logits(tmp_path, name, bits):
    student, x = loaded(tmp_path / "q.pt", maker(name), bits), torch.randn(8, 3, 16, 16)
    network = IntegerNetwork(integer_form(student))
    seen, compute = [], network.compute
    network.compute = lambda node, values: seen.append(compute(node, values)) or seen[-1]
    found, expected = network(x), student(x)
    assert {value.dtype for value in seen if isinstance(value, torch.Tensor)} == {torch.int32}
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


class ConstantsAndTies(nn.Module):
    """Parameters beside the layers, a tensor made in forward, two layers with one weight, a dilated convolution."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 2, 2), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, 1, 2, 2), nn.BatchNorm2d(8)
        self.conv3.weight = self.conv2.weight
        self.gamma, self.shift = nn.Parameter(torch.full((8, 1, 1), 0.7)), nn.Parameter(torch.randn(8, 1, 1))
        self.fc = nn.Linear(9, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + self.gamma * self.bn2(self.conv2(x))
        x = x + self.bn3(self.conv3(x)) + self.shift
        ones = torch.ones(x.size(0), 1, x.size(2), x.size(3))
        return self.fc(torch.cat([x, ones], 1).mean(axis=(2, 3)))


def test_constants_and_tied_weights_in_integers(tmp_path):
    torch.manual_seed(0)
    student, x = loaded(tmp_path / "q.pt", lambda: trained(ConstantsAndTies()), 8), torch.randn(8, 3, 16, 16)
    expected, network = student(x), integer_form(student)
    torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)
    assert (IntegerNetwork(network)(x) - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: F.pad(x, (1, 1), value=1.0), "pad.* has no integer arithmetic here"),
        (lambda x: torch.add(x, x, alpha=3), "add.* has no integer arithmetic here"),
        (nn.AvgPool2d(2, divisor_override=1), "avgpool2d.* has no integer arithmetic here"),
    ],
)
def test_arguments_that_integer_arithmetic_lacks_are_refused(tmp_path, function, words):
    class Net(FunctionalNet):
        def __init__(self):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.fc(self.function(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))

    student = loaded(tmp_path / "q.pt", lambda: trained(Net()), 8)
    with pytest.raises(InputError, match=words):
        IntegerNetwork(integer_form(student))(torch.zeros(1, 3, 16, 16))


def test_what_cannot_be_in_integers_is_named(tmp_path):
    relu = loaded(tmp_path / "relu.pt", with_odd_norms, 4, "relu")
    with pytest.raises(InputError, match="2 of 4 would stay in floating point .'conv1' receives the image.*--act-placement"):
        integer_form(relu)
    student = loaded(tmp_path / "q.pt", with_odd_norms, 4)
    student.conv2.weight_zero_point[1] = -3
    with pytest.raises(InputError, match="layer 'conv2' has zero points beyond its codes"):
        integer_form(student)
    in_place = integer_form(loaded(tmp_path / "place.pt", maker("WorksInPlace"), 4))
    with pytest.raises(InputError, match="'add_' works in place on 'conv2', which is used again after it; assign its result"):
        IntegerNetwork(in_place)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 5, 14)
    odd = loaded(tmp_path / "odd.pt", lambda: nn.Sequential(*layers), 4)
    with pytest.raises(InputError, match="softplus.* has no integer arithmetic here"):
        IntegerNetwork(integer_form(odd))(torch.zeros(1, 3, 16, 16))


def test_integer_check_of_a_run(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.syspath_prepend(ROOT / "tests")
    data, run = make_folder(tmp_path / "data", 5, images=4, size=16), tmp_path / "run"
    where = ["--arch", "tiny:net", "--data-dir", str(data), "--device", "cpu"]
    result = gdfq.main([*TINY, "--epochs", "3", "--out", str(run), "--data-dir", str(data), "--act-placement", "input"])
    found = gdfq.main(["--eval", str(run / "quantized.pt"), *where, "--integer-check"])
    assert found["top1"] == result["last_top1"] and found["integer_agreement"] == 100 and found["integer_difference"] < 1e-3
    assert "integer arithmetic: same class on 100.00 % of 20 images" in capsys.readouterr().out
    flags = ["--epochs", "3", "--act-ranges", "learned", "--data-dir", str(data), "--act-placement", "input"]
    gdfq.main([*TINY, *flags, "--out", str(tmp_path / "learned")])
    quick = "--task ptq --count 64 --weight-iterations 2 --step-iterations 2 --act-placement input".split()
    mixmix.main([*NOISE, *quick, "--data-dir", str(data), "--out", str(tmp_path / "ptq")])
    for script, name in ((gdfq, "learned"), (mixmix, "ptq")):
        found = script.main(["--eval", str(tmp_path / name / "quantized.pt"), *where, "--integer-check"])
        assert found["integer_agreement"] >= 95  # of 20 images one may lie on a boundary
    assert "--integer-check has no effect without --eval FILE" in fails(gdfq.main, "--integer-check")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package onnx, which is absent; pip" in fails(gdfq.main, *TINY, "--export", "onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    said = fails(gdfq.main, *TINY, "--export", "onnx", "--out", tmp_path / "none")
    assert "with --act-placement relu the image, pooled features" in said and not (tmp_path / "none").exists()
    flags = ["--arch", "tiny:branch", "--act-placement", "input", "--export", "onnx", "--out", tmp_path / "none"]
    assert "--export needs the graph of the network" in fails(gdfq.main, *TINY, *flags)  # now, not after training
    assert not (tmp_path / "none").exists()


ALONE = """
import sys, torch
sys.modules |= dict.fromkeys(("common", "gdfq"))  # importing them fails
program, x, expected = torch.export.load(sys.argv[1]), *torch.load(sys.argv[2])
assert torch.equal(program.module()(x), expected)
"""


@pytest.mark.parametrize("placement", ["relu", "input"])
def test_torch_export_leaves_a_file_that_runs_without_this_project(tmp_path, placement):
    student = loaded(tmp_path / "q.pt", tiny.inverted, 4, placement)
    how = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "strict": False}  # the strict mode of torch 2.6 fails
    program = torch.export.export(student, (torch.randn(2, 3, 16, 16),), **how)
    x = torch.randn(5, 3, 16, 16)
    torch.export.save(program, tmp_path / "student.pt2")
    torch.save((x, student(x)), tmp_path / "expected.pt")
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path / "student.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------ ONNX


def written(path, student):
    """ONNX Runtime's and onnx's view of a network's ONNX file."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (requirements-export.txt)")
    import onnx

    from common.onnx_file import runtime, write_onnx

    about = Namespace(mean=[0.5] * 3, std=[0.25] * 3, arch=None)
    write_onnx(integer_form(student), path / "q.onnx", torch.zeros(2, 3, 16, 16), about)
    return runtime(path / "q.onnx"), onnx.load(path / "q.onnx")


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_onnx_runtime_gives_the_logits(tmp_path, bits):
    student = loaded(tmp_path / "q.pt", with_odd_norms, bits)
    run, model = written(tmp_path, student)
    x = torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(run(x), student(x), rtol=0, atol=1e-4)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for name in ("conv1", "conv2", "conv3", "fc"):
        assert kinds[f"{name}.codes"] == kinds[f"{name}.zero_point"] == (21 if bits <= 4 else 2)  # UINT4, UINT8
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clips) == (2 if bits < 8 else 0) and model.opset_import[0].version == 21  # not of the image
    assert not any(item.metadata_props for item in (*model.graph.node, *model.graph.value_info))  # they would need most bytes
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [len(node.input) for node in convolutions] == [2, 2, 2]  # a bias there would be rounded by ONNX Runtime


def test_layers_with_equal_zero_points_are_exported(tmp_path, net):
    """As all are that LSQ has learned; the exporter merges them."""
    cfg = mixmix.config(**DATA, task="qat", qat_steps=2, qat_batch_size=8, data_source="noise", bits=4)
    student = mixmix.compress(net, torch.randn(16, 3, 16, 16), cfg)
    run, model = written(tmp_path, student)
    x, kinds = torch.randn(7, 3, 16, 16), [tensor.data_type for tensor in model.graph.initializer]
    torch.testing.assert_close(run(x), student(x), rtol=0, atol=1e-4)
    assert kinds.count(21) == len(quantized_layers(student)) - 2 + 1  # codes of all but the first and last, and zero points
