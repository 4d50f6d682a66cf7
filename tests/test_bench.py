import json
import os

import pytest
import torch
from conftest import ROOT
from test_data import make_folder
from torch import nn

import gdfq
from common import bench
from common.models import build
from common.ops import count_flops, plain_forms


def forward_flops(model, *inputs, plain=False):
    """2 x multiplications of each convolution and linear layer, from the shapes that pass through; and the first layer's."""
    flops = []

    def count(layer, args, output):
        per_output = layer.weight[0].numel()
        flops.append(2 * output.numel() * per_output)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad(), plain_forms():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(flops), flops[0]


def test_the_floor_counts_the_arithmetic_of_the_step():
    batch, teacher = 2, build("resnet20", 10, 32).eval()
    settings = {"epochs": 2, "warmup_epochs": 1, "calibrate_epochs": 1, "iters": 1, "batch_size": batch}
    cfg = gdfq.config(**settings, device="cpu", precision="fp32", capture="none")
    network, first = forward_flops(teacher, torch.randn(batch, 3, 32, 32))
    generator, _ = forward_flops(gdfq.Generator(10), torch.randn(batch, 100), torch.tensor([0, 1]))
    for size, inputs, outputs in ((8, 128, 128), (16, 128, 64)):  # 3x3 at the high resolution, 2x2 at the low one
        generator -= 2 * batch * inputs * outputs * (9 * 4 * size**2 - 4 * 4 * (size + 1) ** 2)
    # generator: forward, both gradients; teacher: forward, inputs' gradient; student: no gradient of its input
    expected = 3 * generator + 2 * network + 3 * network - first
    measured = count_flops(bench._FastRun(cfg).reach_full_step(gdfq, teacher).step)
    assert measured == pytest.approx(expected, rel=1e-3)


def test_the_table_and_its_file(tmp_path, capsys, fails):
    command = ["--batch-size", "2", "--repeats", "5", "--seconds", "0", "--capture", "none", "none", "--device", "cpu"]
    methods = ["gdfq", "adadfq"]  # the fewest steps and the most
    command += ["--method", *methods, "--precision", "fp32", "--json", str(tmp_path / "rows.json")]
    bench.main(command)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["capture"]) for row in rows] == [(method, "none") for method in methods for _ in range(2)]
    for row in rows:
        assert tuple(row) == bench.COLUMNS and (row["batch_size"], row["device"]) == (2, "cpu")
        assert row["speedup"] == pytest.approx(row["plain_ms"] / row["fast_ms"], rel=0.01)
        assert row["floor_ms"] > 0 and row["fast_ms"] > 0 and row["peak_mb"] > 100
    assert "images/s" in capsys.readouterr().out
    assert "--repeats is 4" in fails(bench.main, "--repeats", 4)


def test_whole_runs_are_timed_and_set_beside_the_papers(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    data = make_folder(tmp_path / "data", 5, images=4, size=16)
    small = "--num-classes 5 --image-size 16 --epochs 2 --iters 2 --warmup-epochs 1 --calibrate-epochs 1 --device cpu"
    command = "--time-to-accuracy --arch tiny:net --dataset folder --bits 3 --seeds 1 --precision fp32".split()
    (row,) = bench.main([*command, "--data-dir", str(data), "--", *small.split()])
    assert (row["method"], row["steps"], row["images"], row["paper"], row["best"]) == ("gdfq", 4, 20, None, None)
    assert row["seconds"] > 0 and -100 <= row["drop"] == row["worst"] <= 100
    assert "calibrated" in capsys.readouterr().out
    assert "needs test images; give --data-dir" in fails(bench.main, *command, "--", *small.split())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory, to reset it")
def test_superposition_by_product_needs_less_memory_than_by_gathering():
    figures = bench.superposition(torch.device("cpu"), repeats=5)
    assert figures["product"]["mb"] < figures["gather"]["mb"] > 16 * 500 * 512 * 4 / 2**20


@pytest.mark.parametrize("operation", ["box-mixing", "bn-statistics"])
def test_an_operation_and_its_formula_side_by_side(operation, capsys):
    figures = bench.main(["--operation", operation, "--device", "cpu"])
    assert len(figures) == 2 and all(figure["ms"] > 0 for figure in figures.values())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(figures)
