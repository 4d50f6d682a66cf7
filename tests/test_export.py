from functools import partial

import pytest
import strangers
import tiny
import torch
from conftest import FunctionalNet, trained
from torch import nn

import gdfq
from common import InputError
from common.export import load_quantized, pack, read_quantized, save_quantized, unpack
from common.folding import fold_batchnorm
from common.models import build, design_of
from common.quant import quantize, quantized_layers, set_observing
from common.run import Run
from common.tasks.blocks import brecq_places

META = {"arch": None, "num_classes": 5, "image_size": 16, "channels": 3, "design": None, "act_placement": "relu"}


def calibrated(model, bits, placement="relu", size=16, example=None):
    student = quantize(model, bits, bits, placement, example=example)
    set_observing(student, True)
    torch.manual_seed(2)
    student(torch.randn(16, 3, size, size))
    set_observing(student, False)
    return student


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_a_dense_bit_stream(bits):
    codes = torch.randint(2**bits, (3, 7))
    packed = pack(codes, bits)
    assert packed.numel() == -(-21 * bits // 8)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes.flatten()))
    assert bytes(packed.tolist()) == stream.to_bytes(packed.numel(), "little")
    assert torch.equal(unpack(packed, bits, 21).view(3, 7), codes.to(torch.uint8))


PLAIN, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    "bits, placement, layout", [(2, "relu", PLAIN), (3, "relu", CHANNELS_LAST), (4, "input", PLAIN), (8, "relu", CHANNELS_LAST)]
)
def test_a_loaded_network_has_the_same_outputs_to_the_bit(tmp_path, bits, placement, layout):
    student, x = calibrated(trained(FunctionalNet()), bits, placement), torch.randn(5, 3, 16, 16)
    student = student.to(memory_format=layout)
    path, meta = tmp_path / "quantized.pt", META | {"wbits": bits, "abits": bits, "act_placement": placement}
    save_quantized(student, path, meta)
    loaded = load_quantized(path, FunctionalNet())
    assert torch.equal(loaded(x), student(x))
    for (_, layer), (_, original) in zip(quantized_layers(loaded), quantized_layers(student)):
        assert torch.equal(layer.weight, original.quantized_weight())
        assert layer.weight.stride() == original.weight.stride()  # convolutions round by layout
    save_quantized(loaded, tmp_path / "again.pt", meta)
    assert torch.equal(load_quantized(tmp_path / "again.pt", FunctionalNet())(x), student(x))


class SharedBlock(nn.Module):
    """A block under two names, in a network that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Linear(8, 5)
        self.first = self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.relu(self.stem(x))
        for block in (self.first, self.second):
            x = self.relu(block(x)) if x.sum() > 0 else x
        return self.fc(x.mean((2, 3)))


def test_a_layer_with_two_names_is_stored_in_its_bits_under_both(tmp_path):
    x = torch.randn(5, 3, 16, 16)
    student = calibrated(trained(SharedBlock()), 2, example=x)
    save_quantized(student, tmp_path / "quantized.pt", META | {"wbits": 2, "abits": 2})
    loaded = load_quantized(tmp_path / "quantized.pt", SharedBlock())
    assert torch.equal(loaded(x), student(x)) and loaded.second[0].weight[0].unique().numel() <= 4


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("name", ["inverted", "ViewAndFeatureFlags", "DeadActivation", "ShortcutOfZeros"])
def test_places_of_a_methods_own_are_those_of_the_file(tmp_path, name, folds):
    """The network that is saved has the forward of its graph where its own cannot be computed in channels-last."""
    make = tiny.inverted if name == "inverted" else partial(strangers.make, name)
    run, path = Run(gdfq.config(dataset="folder", num_classes=5, image_size=16, device="cpu")), tmp_path / "quantized.pt"
    teacher, example = run.adopt(make())
    student = calibrated(fold_batchnorm(teacher, example) if folds else teacher, 4, partial(brecq_places, teacher=teacher))
    meta = META | {"act_placement": "blocks", "folded": folds, "wbits": 4, "abits": 4}
    save_quantized(student, path, meta)
    loaded, x = load_quantized(path, make()), torch.randn(5, 3, 16, 16)
    assert torch.equal(loaded(x), student(x.contiguous(memory_format=run.layout)))
    with pytest.raises(InputError, match="another architecture"):
        load_quantized(path, FunctionalNet())


def test_resnet20_file_is_small_and_complete(tmp_path):
    torch.manual_seed(0)
    model = trained(build("resnet20", 10, 32), size=32, steps=2)
    student = calibrated(model, 4, size=32)
    path = tmp_path / "quantized.pt"
    save_quantized(student, path, META | {"arch": "resnet20", "num_classes": 10, "image_size": 32, "wbits": 4, "abits": 4})
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(student))
    assert weights / 2 < path.stat().st_size < weights / 2 + 40_000
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_quantized(path)(x), student(x))
    first = read_quantized(path)["layers"]["conv1"]
    assert first["codes"].dtype == torch.uint8 and first["zero_point"].dtype == torch.int32


@pytest.mark.parametrize(
    "arch, design, key",
    [("resnet50", "pytorchcv", "design"), ("mobilenet_v2", "pytorchcv", "design"), ("resnet20", "pad", "design")]
    + [("resnet20", design, "shortcut") for design in ("pad", "projection")],  # as earlier versions wrote it
)
def test_the_design_of_a_network_is_part_of_its_file(tmp_path, arch, design, key):
    model = trained(build(arch, 5, 65, design), size=32, steps=1)
    assert design_of(model) == (None if design == "projection" else design)
    student, x = calibrated(model, 4, size=32), torch.randn(2, 3, 32, 32)
    meta = {k: v for k, v in META.items() if k != "design"} | {key: design}
    save_quantized(student, tmp_path / "quantized.pt", meta | {"arch": arch, "image_size": 65, "wbits": 4, "abits": 4})
    assert torch.equal(load_quantized(tmp_path / "quantized.pt")(x), student(x))


def test_files_that_cannot_be_read(tmp_path):
    student = calibrated(trained(FunctionalNet()), 4)
    path = tmp_path / "quantized.pt"
    save_quantized(student, path, META | {"wbits": 4, "abits": 4})
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:3000])
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    for name, model, words in [
        ("absent.pt", None, "is not a file"),
        ("cut.pt", None, "damaged"),
        ("other.pt", None, "not a quantized network"),
        ("quantized.pt", None, "an architecture of your own"),
        ("quantized.pt", build("resnet20", 5, 16), "another architecture"),
        ("quantized.pt", FunctionalNet(6), "another architecture .*fc"),
    ]:
        with pytest.raises(InputError, match=words):
            load_quantized(tmp_path / name, model)
