"""The tasks of common/tasks, alone and from the command line of mixmix.py, which makes images for them."""

import json
import math

import numpy as np
import pytest
import strangers
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT, FunctionalNet, trained
from test_data import make_folder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.utils import save_image

import mixmix
from common import InputError, learned
from common.check import describe, layer_rows
from common.cli import Parser
from common.export import load_quantized
from common.folding import fold_batchnorm
from common.images import read_images
from common.learned import AdaRound, LearnedStep, LearnedWeight, quantize_by_step, search_parameters
from common.models import build
from common.progress import Progress
from common.quant import (
    FakeQuantizeWeights,
    QuantAct,
    QuantConv2d,
    QuantLinear,
    fake_quantize,
    quantize,
    quantized_activations,
    quantized_layers,
    set_observing,
)
from common.report import arithmetic
from common.run import Run
from common.tasks import TASKS, kd, ptq, qat
from common.tasks.blocks import find_blocks
from common.tasks.kd import dafl_loss
from common.tasks.prune import least_squares, load_pruned, patches, removable
from common.tasks.qat import feature_loss

DATA = {"dataset": "folder", "num_classes": 5, "image_size": 16, "device": "cpu", "precision": "fp32"}
PTQ = {"wbits": 2, "abits": 8, "weight_iterations": 300, "step_iterations": 20, "lr_rounding": 0.01}
QAT = {"wbits": 3, "abits": 4, "qat_steps": 40, "qat_batch_size": 16, "qat_lr": 5e-4}
KD = {"student_arch": "tiny:other", "kd_epochs": 4, "kd_iters": 6, "kd_batch_size": 20}
GENERATOR = {"kd_latent_dim": 8, "kd_lr_g": 0.001}


def config(task, **flags):
    """The arguments of a task without those of a script."""
    parser = Parser("task", "")
    TASKS[task].add_flags(parser)
    cfg = parser.config(**DATA, **flags)
    TASKS[task].complete(cfg)
    return cfg


def command_line(settings):
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return flags


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")


# ------------------------------------------------------------------------------------------------------------- learned


@pytest.mark.parametrize("at_once", [1, 3000, learned.AT_ONCE])
def test_searched_ranges_are_the_best_of_the_shrunk_ones(monkeypatch, at_once):
    monkeypatch.setattr(learned, "AT_ONCE", at_once)
    rows = torch.randn(5, 200) ** 3
    scale, zero_point = search_parameters(rows, 3)
    for row, s, z in zip(rows, scale, zero_point):
        losses = []
        for step in range(80):
            low, high = row.min() * (1 - 0.01 * step), row.max() * (1 - 0.01 * step)
            unit = (high - low) / 7
            ours = torch.fake_quantize_per_tensor_affine(row, unit, torch.round(-low / unit).int(), 0, 7)
            losses.append((ours - row).abs().pow(2.4).mean().item())
        found = (fake_quantize(row, s, z, 3) - row).abs().pow(2.4).mean().item()
        assert found == pytest.approx(min(losses), rel=1e-3) and min(losses) < losses[0]


def test_a_search_of_more_ranges_takes_no_more_operations():
    """A GPU that calibrates spends its time on their number."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    calls = []
    for steps in (2, 40):
        with Count() as count:
            search_parameters(torch.randn(1, 2048), 4, steps=steps, by=0.02)
        calls.append(count.calls)
    assert 0 < calls[0] == calls[1]


def test_adaround_begins_with_the_weights_and_ends_on_codes():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    rounding = AdaRound(weight, 4)
    nearest = fake_quantize(weight, rounding.scale, rounding.zero_point, 4)
    inside = (rounding.floor + rounding.zero_point >= 0) & (rounding.floor + rounding.zero_point < 15)
    torch.testing.assert_close(rounding()[inside], weight[inside], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rounding(hard=True), nearest)
    assert rounding.undecided(20.0) > 0
    with torch.no_grad():
        rounding.v.copy_(torch.where(torch.rand_like(weight) < 0.5, -9.0, 9.0))
    codes = rounding(hard=True) / rounding.scale + rounding.zero_point
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(rounding(), rounding(hard=True))
    assert rounding.undecided(2.0).abs() < 1e-3


@pytest.mark.parametrize("lsq", [True, False])
def test_learned_steps_have_the_gradient_of_their_paper(lsq):
    """LSQ's Eq. 3 asks whether x / s is inside before it is rounded; BRECQ rounds first, and has half a step more."""
    act, beyond = LearnedStep(3, lsq), 0.0 if lsq else 0.5
    with torch.no_grad():
        act.scale.fill_(0.4)
        act.zero_point.fill_(2.0)
    x = torch.tensor([-3.0, -0.5, 0.1, 0.55, 1.9, 7.0, -0.9, 2.12, 2.3], requires_grad=True)  # -2.25, 5.3, 5.75 steps
    upstream = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, 1.5, 0.7, -0.6, 1.1])
    out = act(x)
    expected, slopes = [], []
    for value in x.tolist():  # Q_N = 2, Q_P = 5
        v = value / 0.4
        slopes.append(-2.0 if v <= -2 - beyond else 5.0 if v >= 5 + beyond else round(v) - v)
        expected.append(0.4 * min(max(round(v), -2), 5))
    assert out.tolist() == pytest.approx(expected, abs=1e-6)
    grad_x, grad_scale = torch.autograd.grad((out * upstream).sum(), (x, act.scale))
    factor = (5 if lsq else 1) ** -0.5  # of one value each
    assert grad_scale.item() == pytest.approx(factor * sum(u * s for u, s in zip(upstream.tolist(), slopes)), abs=1e-4)
    assert grad_x.tolist() == pytest.approx([0.0, 2.0, -1.0, 0.5, 3.0, 0.0, *([0.0, 0.0] if lsq else [0.7, -0.6]), 0.0])


def test_a_learned_step_begins_with_the_first_batch():
    first = LearnedStep(4)
    batch = 1 + torch.rand(50)
    first.begin(batch)
    scale, zero_point = search_parameters(torch.cat([batch, torch.zeros(1)])[None], 4)  # the range includes zero
    assert first.scale.item() == pytest.approx(scale.item()) and first.zero_point.item() == zero_point.item() == 0


def test_what_is_always_zero_stays_zero():
    """A channel that no image excites: LSQ's first step would be 0, and all that comes after it NaN."""
    act, kernel, zeros = LearnedStep(4, lsq=True), LearnedWeight(torch.zeros(3, 2), 4), torch.zeros(2, 3)
    act.begin(zeros)
    out = act(zeros) + kernel(zeros)
    out.sum().backward()
    assert torch.equal(out, zeros) and act.scale.grad == kernel.scale.grad == 0


def test_lsq_begins_and_scales_its_gradient_as_in_its_paper():
    torch.manual_seed(0)
    x, weight = torch.rand(3, 4, 5, 5), torch.randn(6, 4, 3, 3)
    act, kernel = LearnedStep(4, lsq=True), LearnedWeight(weight, 4)
    act.begin(x)
    assert act.scale.item() == pytest.approx(2 * x.mean().item() / 15**0.5) and act.zero_point == 0
    assert kernel.scale.item() == pytest.approx(2 * weight.abs().mean().item() / 7**0.5)
    plain = quantize_by_step(x, scale := act.scale.detach().clone().requires_grad_(), torch.tensor(0.0), 4, "lsq")
    expected = torch.autograd.grad(plain.sum(), scale)[0] / (4 * 5 * 5 * 15) ** 0.5
    torch.testing.assert_close(torch.autograd.grad(act(x).sum(), act.scale)[0], expected, atol=1e-4, rtol=1e-4)
    assert {value.device.type for value in LearnedWeight(weight.to("meta"), 4).state_dict().values()} == {"meta"}
    codes = kernel(weight) / kernel.scale
    assert codes.min() >= -8 and codes.max() <= 7
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    plain = quantize_by_step(weight, scale := kernel.scale.detach().clone().requires_grad_(), torch.tensor(8.0), 4, "lsq")
    expected = torch.autograd.grad(plain.sum(), scale)[0] / (weight.numel() * 7) ** 0.5
    torch.testing.assert_close(torch.autograd.grad(kernel(weight).sum(), kernel.scale)[0], expected, atol=1e-4, rtol=1e-4)
    signed = LearnedStep(4, lsq=True)
    signed.begin(x - 0.5)
    assert signed.zero_point == 8


# -------------------------------------------------------------------------------------------------------- blocks, ptq


STAGES = ((2, 4), (3, 8), (4, 4))  # of ShuffleNetV2, with their units


@pytest.mark.parametrize("arch, names", [
    ("resnet20", ["conv1", *(f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)), "fc"]),
    ("mobilenet_v2", ["features.0.0", *(f"features.{i}" for i in range(1, 18)), "features.18.0", "classifier.1"]),
    ("shufflenet_v2_x0_5", ["conv1.0", *(f"stage{i}.{j}" for i, n in STAGES for j in range(n)), "conv5.0", "fc"]),
    ("vgg11_bn_x0_25", [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)] + ["fc"]),
])  # fmt: skip
def test_blocks_are_residual_ones_or_layers_and_make_up_the_network(arch, names):
    torch.manual_seed(0)
    net = trained(build(arch, 5, 16), steps=1)
    folded = fold_batchnorm(net)
    blocks = find_blocks(quantize(folded, 4, 4), net)
    assert [block.name for block in blocks] == names
    x = images = torch.randn(2, 3, 16, 16)
    for block in blocks:
        x = block(x, dict(folded.named_modules()), quantize_activations=False)
    torch.testing.assert_close(x, net(images), atol=1e-4, rtol=1e-4)
    student = quantize(folded, 4, 4)
    set_observing(student, True)
    student(images)
    set_observing(student, False)
    x = images
    for block in find_blocks(student, net):
        x = block(x, dict(student.named_modules()))
    assert torch.equal(x, student(images)) and not torch.equal(x, folded(images))


def test_reconstruction_comes_nearer_to_the_network_than_nearest_rounding(net):
    images = torch.randn(128, 3, 16, 16)
    learned, nearest = (ptq.compress(net, images, config("ptq", **PTQ | {"weight_iterations": n})) for n in (300, 0))
    seen = []
    for student in (learned, nearest):
        modules = dict(student.named_modules())
        block = find_blocks(student, net)[1]
        x = images
        for before in find_blocks(student, net)[:1]:
            x = before(x, modules, quantize_activations=False)
        full = dict(fold_batchnorm(net).named_modules())
        target = block(find_blocks(student, net)[0](images, full, False), full, False)
        seen.append((block(x, modules, quantize_activations=False) - target).square().mean().item())
    assert seen[0] < 0.7 * seen[1]
    layers = [layer for _, layer in quantized_layers(learned)]
    assert [layer.bits for layer in layers] == [8, 2, 2, 8] and all(layer.packed for layer in layers)
    for layer in layers:
        assert all(len(row.unique()) <= 2**layer.bits for row in layer.weight.flatten(1))
    acts = [act for _, act in quantized_activations(learned)]
    assert all(act.seen and act.scale > 0 for act in acts) and [act.bits for act in acts] == [8, 8, 8]
    assert all(p.requires_grad for p in net.parameters())


def learn_rounding(weight, x, rounding, run=None, **flags):
    """Rounds a linear layer to 3 bits as the only layer of a block."""
    run = run or Run(config("ptq", **PTQ | flags))
    layer = QuantLinear.from_float(nn.Linear(*reversed(weight.shape), bias=False), 3)

    def block(x, modules, quantize_activations):
        return modules["fc"](x)

    ptq.reconstruct_weights(block, {"fc": rounding}, {"fc": layer}, x, x @ weight.T, run, Progress(disable=True))


def test_the_rounding_is_decided_by_a_regulariser_that_is_annealed():
    """BRECQ: none for a fifth of the steps, then with an exponent that falls from 20 to 2."""
    torch.manual_seed(0)
    x, weight, decided, exponents = torch.randn(200, 6), torch.randn(4, 6), [], []
    for rounding_weight in (0.0, 1.0):
        rounding = AdaRound(weight, 3)
        learn_rounding(weight, x, rounding, rounding_weight=rounding_weight, lr_rounding=0.02)
        decided.append(((2 * rounding.up() - 1).abs() > 0.99).float().mean())
    assert decided[0] < 0.5 and decided[1] > 0.9

    class WithExponents(AdaRound):
        def undecided(self, sharpness):
            exponents.append(sharpness)
            return super().undecided(sharpness)

    learn_rounding(weight, x, WithExponents(weight, 3), weight_iterations=10)
    assert exponents == pytest.approx([20 - 18 * (i / 10 - 0.2) / 0.8 for i in range(2, 10)])


def test_steps_are_learned_towards_the_target():
    torch.manual_seed(0)
    x, act, cfg = torch.rand(200, 30), LearnedStep(3), config("ptq", **PTQ | {"step_iterations": 300, "lr_step": 0.01})
    act.begin(x)
    best = act.scale.item()
    with torch.no_grad():
        act.scale.mul_(1.5)
    ptq.reconstruct_steps(lambda x, modules: modules["act"](x), {"act": act}, {}, x, x, Run(cfg), Progress(disable=True))
    assert act.scale.item() == pytest.approx(best, rel=0.1)


class Noting(Run):
    """Keeps the loss and the rate of every step."""

    def update(self, optimizer, loss):
        self.steps_made = [*getattr(self, "steps_made", []), (loss.item(), float(optimizer.param_groups[0]["lr"]))]
        super().update(optimizer, loss)


def test_losses_and_rates_of_a_reconstruction():
    """Sums over the channels, means over the images; a step's rate is at most 2 % of it and falls along a cosine."""
    x, weight, rounding = torch.randn(200, 6), torch.randn(4, 6), AdaRound(torch.randn(4, 6), 3)
    run = Noting(config("ptq", **PTQ | {"weight_iterations": 1}))
    expected = (x @ rounding().T - x @ weight.T).detach()
    torch.manual_seed(0)
    learn_rounding(weight, x, rounding, run)
    torch.manual_seed(0)
    _, chosen = nn.Linear(6, 4, bias=False), torch.randint(200, (32,))  # as learn_rounding draws
    assert run.steps_made == [(pytest.approx(expected[chosen].square().sum(1).mean().item(), rel=1e-4), 0.01)]
    act, run = LearnedStep(3), Noting(config("ptq", **PTQ | {"step_iterations": 4, "lr_step": 0.1}))
    act.begin(x.relu())
    scale, lost = act.scale.item(), (act(x) - x).detach().abs().pow(2.4).sum(1)
    torch.manual_seed(0)
    chosen = torch.randint(200, (32,))
    torch.manual_seed(0)
    ptq.reconstruct_steps(lambda x, modules: modules["act"](x), {"act": act}, {}, x, x, run, Progress(disable=True))
    assert run.steps_made[0][0] == pytest.approx(lost[chosen].mean().item(), rel=1e-4)
    expected = [0.02 * scale * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert [rate for _, rate in run.steps_made] == pytest.approx(expected, rel=1e-4)


def test_a_block_learns_on_what_the_quantized_ones_before_it_send(net, monkeypatch):
    """Its weights; the step sizes of its activations learn on what full-precision blocks send."""
    seen, images = {}, torch.randn(64, 3, 16, 16)
    for name in ("reconstruct_weights", "reconstruct_steps"):

        def note(*args, name=name, learn=getattr(ptq, name)):
            seen.setdefault(name, []).append(args[3:5])
            learn(*args)

        monkeypatch.setattr(ptq, name, note)
    flags = {"ends_bits": 2, "weight_iterations": 10, "step_iterations": 2}
    student = ptq.compress(net, images, config("ptq", **PTQ | flags))
    full, modules = dict(fold_batchnorm(net).named_modules()), dict(student.named_modules())
    first, second, *_ = find_blocks(student, net)
    (x, target), (x_full, target_full) = seen["reconstruct_weights"][0], seen["reconstruct_steps"][1]
    expected = first(images, full, False)
    torch.testing.assert_close(x, first(images, modules, False))
    torch.testing.assert_close(x_full, expected, atol=1e-5, rtol=1e-4)
    for one in (target, target_full):
        torch.testing.assert_close(one, second(expected, full, False), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(x, expected)


# what is quantized of tiny.Inverted, from the image to the last layer's input, and to how many bits
BRECQ = {"stem.2": 8, "down.0.2": 4, "down.1.2": 4, "down.2": 4, "same.0.2": 4, "same.1.2": 4, "add": 4, "head.2": 8}
LSQ = {"x": 8, "stem.2": 4, "down.0.2": 4, "down.1.2": 4, "down.3": 4, "same.0.2": 4, "same.1.2": 4, "add": 4, "mean": 8}
RELU = {"stem.2": 4, "down.0.2": 4, "down.1.2": 4, "same.0.2": 4, "same.1.2": 4, "head.2": 8}


def places(student):
    """What is quantized: a dict of module or node -> bits."""
    quantizers = [n for n in student.graph.nodes if str(n.target).startswith("act_quant_")]
    sources = [quantizer.args[0] for quantizer in quantizers]
    names = [source.target if source.op == "call_module" else source.name for source in sources]
    return {name: student.get_submodule(quantizer.target).bits for name, quantizer in zip(names, quantizers)}


@pytest.mark.parametrize("task, flags, expected", [
    ("ptq", {}, BRECQ), ("qat", {}, LSQ),
    ("ptq", {"ends_bits": 2}, dict.fromkeys(BRECQ, 4)), ("qat", {"ends_bits": 2}, dict.fromkeys(LSQ, 4) | {"x": 8}),
    ("ptq", {"act_placement": "relu"}, RELU | {"stem.2": 8}), ("qat", {"act_placement": "relu"}, RELU),
    ("ptq", {"act_placement": "input"}, {"down.2" if k == "down.3" else k: v for k, v in LSQ.items()} | {"stem.2": 8}),
])  # fmt: skip
def test_activations_are_quantized_where_the_tasks_papers_do(task, flags, expected):
    """Linear bottlenecks and residual sums, too; at the ends as each paper has it."""
    net, cfg = tiny.inverted(), config(task, **flags)
    student = TASKS[task].plan(net, cfg, Run(cfg))
    assert places(student) == expected
    ends = {name: 4 if "ends_bits" in flags else 8 for name in ("stem.0", "fc")}
    assert {name: layer.bits for name, layer in quantized_layers(student) if layer.bits != 4} == {
        name: bits for name, bits in ends.items() if bits != 4
    }


def test_the_input_of_the_last_layer_stays_at_n_bits_behind_a_residual_sum(net):
    for task, expected in {"ptq": {"relu": 8, "relu_1": 4, "relu_2": 4}, "qat": {"x": 8, "relu": 4, "mean": 8}}.items():
        cfg = config(task)
        assert places(TASKS[task].plan(net, cfg, Run(cfg))) == expected


@pytest.mark.parametrize("arch, left", [
    ("mobilenet_v2", ["features.0.0", "classifier.1"]), ("shufflenet_v2_x0_5", ["conv1.0", "fc"]),
    ("tests.strangers:SqueezeAndExcitation", ["conv1", "squeeze", "fc"]),
])  # fmt: skip
def test_no_layer_has_a_full_precision_input_but_what_the_papers_leave(arch, left):
    """BRECQ: the image, and averages of quantized values."""
    net = strangers.make(arch.split(":")[1]) if ":" in arch else trained(build(arch, 5, 16), steps=1)
    for task, expected in (("ptq", left), ("qat", [])):
        cfg = config(task)
        rows = layer_rows(TASKS[task].plan(net, cfg, Run(cfg)), torch.zeros(1, 3, 16, 16))
        assert [row[0] for row in rows if "full precision" in row[-1]] == expected and len(rows) > 4


@pytest.mark.parametrize("placement", [None, "relu", "input", "blocks"])
@pytest.mark.parametrize("task", ["ptq", "qat"])
def test_a_file_knows_where_its_activations_are_quantized(tmp_path, capsys, task, placement):
    fast = {"ptq": {"weight_iterations": 2, "step_iterations": 2}, "qat": {"qat_steps": 2, "qat_batch_size": 8}}[task]
    flags = command_line(fast | {"task": task, "count": 64} | ({"act_placement": placement} if placement else {}))
    run, default = tmp_path / "run", {"ptq": "blocks", "qat": "input"}[task]
    result = mixmix.main([*command_line(DATA), "--data-source", "noise", "--arch", "tiny:inverted", *flags, "--out", str(run)])
    loaded = load_quantized(run / "quantized.pt", tiny.inverted())
    assert result["arguments"]["act_placement"] == (placement or default)
    cfg = config(task, act_placement=placement)
    planned = TASKS[task].plan(tiny.inverted(), cfg, Run(cfg))
    assert places(loaded) == places(planned) and describe(planned) in capsys.readouterr().out
    data = make_folder(tmp_path / "data", 5, images=4, size=16)
    again = mixmix.main(["--eval", str(run / "quantized.pt"), "--arch", "tiny:inverted", "--data-dir", str(data)])
    assert again["images"] == 20


NOISE = command_line(DATA) + ["--data-source", "noise", "--arch", "tiny:net"]


def test_a_ptq_run_interrupted_at_any_block_gives_the_same_file(tmp_path, monkeypatch, capsys):
    flags = [*NOISE, *command_line(PTQ | {"weight_iterations": 3, "step_iterations": 3, "count": 64})]
    result = mixmix.main([*flags, "--out", str(tmp_path / "whole")])
    assert result["data_source"] == "noise" and result["images_used"] == 64 and result["last_top1"] is None
    for name in ("reconstruct_weights", "reconstruct_steps"):  # stopped at the second call of either
        capsys.readouterr()
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            calls, real = [], getattr(ptq, name)

            def stop(*arguments, calls=calls, real=real):
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return real(*arguments)

            patched.setattr(ptq, name, stop)
            mixmix.main([*flags, "--out", str(tmp_path / "stopped"), "--resume"])
        assert "the same command with --resume" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "quantized.pt").exists()
    part = tmp_path / "stopped" / "parts" / "weights-000.pt"
    made, seconds = torch.load(part)
    torch.save((made, seconds + 3600), part)
    resumed = mixmix.main([*flags, "--out", str(tmp_path / "stopped"), "--resume"])
    assert 0 < result["seconds"] < 3600 < resumed["seconds"] < 7200
    files = [(tmp_path / name / "quantized.pt").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
    data = make_folder(tmp_path / "data", 5, images=4, size=16)
    again = mixmix.main(["--eval", str(tmp_path / "whole" / "quantized.pt"), "--arch", "tiny:net", "--data-dir", str(data)])
    loaded = load_quantized(tmp_path / "whole" / "quantized.pt", tiny.net())
    assert again["images"] == 20 and [layer.bits for _, layer in quantized_layers(loaded)] == [8, 2, 2, 8]


def test_a_folder_of_pictures_without_labels_serves_a_task(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for index, pixels in enumerate(torch.rand(64, 3, 20, 24)):
        save_image(pixels, (pictures / "more" if index % 2 else pictures) / f"{index}.png")
    fast = command_line({"weight_iterations": 2, "step_iterations": 2, "images": str(pictures)})
    flags = [*command_line(DATA), "--arch", "tiny:net", *fast, "--out", str(tmp_path / "run")]
    result = mixmix.main(flags)
    assert result["images_used"] == 64 and result["data_source"] == str(pictures) and (tmp_path / "run" / "grid.png").exists()
    table = capsys.readouterr().out.split("\n\n")[1]
    written = (tmp_path / "run" / "quantized.pt").stat().st_mtime_ns
    assert mixmix.main(flags) == result  # the run that is there, shown again
    again = capsys.readouterr().out.strip()
    assert again.startswith(table.strip()) and again.endswith("--overwrite runs it again")
    assert (tmp_path / "run" / "quantized.pt").stat().st_mtime_ns == written
    mixmix.main([*flags, "--overwrite"])
    assert (tmp_path / "run" / "quantized.pt").stat().st_mtime_ns > written


@pytest.mark.parametrize("task, bits", [("ptq", [8, 2, 2, 8]), ("qat", [8, 2, 2, 8]), ("prune", [32] * 4), ("kd", [32] * 4)])
def test_the_check_of_a_task_shows_the_bits_of_every_layer(tmp_path, monkeypatch, capsys, task, bits):
    monkeypatch.chdir(tmp_path)
    more = {"kd": ["--student-arch", "tiny:other"], "prune": []}.get(task, ["--wbits", "2"])
    checked = mixmix.main([*command_line(DATA), "--arch", "tiny:net", "--task", task, *more, "--check", "--zoo", "tiny:net"])
    assert [row[3] for row in checked["rows"]] == bits and "conv1" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------- qat


def test_quantization_aware_training_comes_nearer_to_the_teacher(net):
    torch.manual_seed(0)
    images, losses = torch.randn(64, 3, 16, 16), []
    for steps in (1, 600):
        cfg = config("qat", **QAT | {"qat_steps": steps})
        run = Run(cfg)
        student = qat.compress(net, images, cfg, run)
        losses.append((student(images) - net(images)).square().mean().item())
    assert losses[1] < 0.5 * losses[0] and run.iterations == 600 and {"kd", "features"} < set(run.history[-1])
    layers = quantized_layers(student)
    assert [layer.bits for _, layer in layers] == [8, 3, 3, 8]
    assert [activation.bits for _, activation in quantized_activations(student)] == [8, 4, 8]
    assert all(len(layer.weight.unique()) <= 2**layer.bits for _, layer in layers)  # one step per layer, not per channel
    assert type(layers[1][1]) is QuantConv2d and not net.training
    assert torch.equal(student.bn1.running_mean, net.bn1.running_mean)


def test_the_short_recipe_learns_the_ranges_of_activations_and_clips_no_weight(net):
    torch.manual_seed(0)
    images, losses = torch.randn(32, 3, 16, 16), []
    for steps in (1, 150):
        cfg = config("qat", **QAT | {"qat_steps": steps, "qat_recipe": "short", "qat_lr": 0.002})
        student = qat.compress(net, images, cfg)
        losses.append((student(images) - net(images)).square().mean().item())
    assert losses[1] < 0.7 * losses[0]
    assert all(type(act) is QuantAct for _, act in quantized_activations(student))
    for _, layer in quantized_layers(student):  # the rounding error of a weight at the end of a range is half a step at most
        scale, _ = layer.parameters_of_codes()
        assert ((layer.quantized_weight() - layer.weight).abs() <= 0.5 * scale + 1e-6).all()


def test_the_first_step_of_lsq_equals_one_computed_by_hand(net):
    """SGD with Nesterov's momentum and weight decay, which the step sizes have not, on the teacher's softened outputs."""
    images, moved = torch.randn(40, 3, 16, 16), []

    class Keeping(Run):
        def update(self, optimizer, loss):
            super().update(optimizer, loss)
            moved.extend(p.detach().clone() for group in optimizer.param_groups for p in group["params"])

    flags = {"qat_steps": 1, "qat_lr": 0.1, "temperature": 0.5, "feature_weight": 0.0, "qat_weight_decay": 0.01}
    cfg = config("qat", **QAT | flags)
    qat.compress(net, images, cfg, Keeping(cfg))
    torch.manual_seed(cfg.seed)
    plain = qat.plan(net, cfg, Run(cfg))
    qat.begin_steps(lambda: plain(images[torch.randint(40, (16,))]), qat.learn_steps(plain))
    x = images[torch.randint(40, (16,))]
    log_p, log_q = (network(x).div(0.5).log_softmax(1) for network in (net, plain))
    (0.25 * (log_p.exp() * (log_p - log_q)).sum() / 16).backward()
    steps = [p for name, p in plain.named_parameters() if name.endswith("scale")]
    others = [p for p in plain.parameters() if all(p is not step for step in steps)]
    expected = [w - cfg.qat_lr * 1.9 * (w.grad + decay * w) for group, decay in ((others, 0.01), (steps, 0)) for w in group]
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-4)


def test_the_short_recipe_quantizes_the_weights_of_all_layers_together(net, monkeypatch):
    """As a call of the network does; one by one, this was three tenths of the operations of a step."""
    images, counts, together = torch.randn(40, 3, 16, 16), [], FakeQuantizeWeights.apply
    monkeypatch.setattr(FakeQuantizeWeights, "apply", lambda bits, zero, *w: counts.append(len(w)) or together(bits, zero, *w))
    totals = []
    for steps in (1, 3):
        counts.clear()
        student = qat.compress(net, images, config("qat", **QAT | {"qat_steps": steps, "qat_recipe": "short"}))
        totals.append(sum(counts))
    assert totals[1] - totals[0] == 2 * len(quantized_layers(student))


def test_the_short_recipe_mixes_its_images(net):
    seen, images = [], (torch.arange(16) < 8).float().expand(40, 3, 16, 16)  # the left half is 1, the right half 0
    net.conv1.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    qat.compress(net, images, config("qat", **QAT | {"qat_steps": 1, "qat_recipe": "short", "feature_weight": 0.0}))
    assert ((seen[-1] > 0.1) & (seen[-1] < 0.9)).any()


@pytest.mark.parametrize("recipe", ["lsq", "short"])
def test_matched_features_move_the_student(net, recipe):
    images, flags = torch.randn(40, 3, 16, 16), QAT | {"qat_steps": 2, "qat_recipe": recipe}
    weights = [qat.compress(net, images, config("qat", **flags, feature_weight=w)).conv1.weight for w in (0.0, 1.0)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("task, flags, expected", [
    ("kd", KD | {"kd_epochs": 5, "kd_iters": 1}, [0.1, 0.1, 0.01, 0.01, 0.001]),
    ("qat", QAT | {"qat_steps": 4, "qat_lr": 2e-4}, [1e-4 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
])  # fmt: skip
def test_rates_fall_as_in_the_papers(net, task, flags, expected):
    rates = []

    class Watching(Run):
        def update(self, optimizer, loss):
            rates.append(optimizer.param_groups[0]["lr"])
            super().update(optimizer, loss)

    cfg = config(task, **flags)
    TASKS[task].compress(net, torch.randn(40, 3, 16, 16), cfg, Watching(cfg))
    assert rates == pytest.approx(expected)


def test_layers_with_a_forward_of_their_own_are_trained():
    net, images = strangers.make("LayersOfTheirOwn"), torch.randn(16, 3, 16, 16)
    student = qat.compress(net, images, config("qat", **QAT | {"qat_steps": 3}))
    assert all(len(layer.weight.unique()) <= 2**layer.bits for _, layer in quantized_layers(student))
    assert student(images).isfinite().all() and not any("quantizer" in key for key in student.state_dict())


def test_feature_loss_is_relative_to_the_teachers_variance():
    ours, theirs = [torch.randn(4, 3), torch.randn(4, 2, 5)], [torch.randn(4, 3), 9 * torch.randn(4, 2, 5)]
    expected = sum(((a - b) ** 2).mean() / b.var() for a, b in zip(ours, theirs)) / 2
    assert feature_loss(ours, theirs).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("task, flags", [("qat", QAT | {"qat_steps": 4}), ("prune", {"points": 8})])
def test_a_task_from_the_command_line_and_what_it_leaves(tmp_path, task, flags):
    images, run = tmp_path / "images", tmp_path / "run"
    mixmix.main([*NOISE, "--count", "40", "--task", "synth", "--out", str(images)])
    config_file = json.loads((images / "config.json").read_text())
    assert config_file["arguments"]["device"] == "cpu"  # the kind alone: each process has a device of its own
    task_flags = [*command_line(DATA | flags), "--task", task, "--arch", "tiny:net"]
    result = mixmix.main([*task_flags, "--images", str(images), "--out", str(run)])
    assert result["data_source"] == str(images) and result["images_used"] == 40 and result["flops"] == result["flops_fp32"]
    if task == "qat":
        loaded = load_quantized(run / "quantized.pt", tiny.net())
        assert [layer.bits for _, layer in quantized_layers(loaded)] == [8, 3, 3, 8]
    else:
        loaded = load_pruned(run / "student.pt", tiny.net())
        assert result["zero_weights"] / result["weights"] == pytest.approx(0.5, abs=0.01) and result["wbits"] is None
    x = torch.randn(8, 3, 16, 16)
    cfg = mixmix.parse_args([*task_flags, "--images", str(images)])
    cfg.mean, cfg.std = result["arguments"]["mean"], result["arguments"]["std"]
    again = mixmix.compress(tiny.net().train(), read_images(images, cfg)[0], cfg)  # which must not move its statistics
    torch.testing.assert_close(loaded(x), again(x), atol=1e-5, rtol=1e-4)
    left = sorted(run.iterdir())
    with pytest.raises(SystemExit):  # what is there stays when the images are not
        mixmix.main([*task_flags, "--images", str(tmp_path / "absent"), "--out", str(run), "--overwrite"])
    assert sorted(run.iterdir()) == left


@pytest.mark.parametrize("task, flags", [("qat", QAT | {"qat_steps": 3}), ("kd", KD)])
def test_a_training_interrupted_after_an_epoch_gives_the_same_file(tmp_path, monkeypatch, task, flags):
    flags = [*NOISE, *command_line(flags | {"count": 40}), "--task", task, "--resume"]
    file, epochs = "quantized.pt" if task == "qat" else "student.pt", []

    def save(run, epoch, stateful, real=Run._save_checkpoint):
        real(run, epoch, stateful)
        epochs.append(epoch)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Run, "_save_checkpoint", save)
        mixmix.main([*flags, "--out", str(tmp_path / "stopped")])
    assert len(epochs) == 2 and not (tmp_path / "stopped" / file).exists()
    for name in ("stopped", "whole"):
        mixmix.main([*flags, "--out", str(tmp_path / name)])
    assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class Centred(FunctionalNet):
    """With a constant that tracing turns into an attribute of its own."""

    def forward(self, x):
        return super().forward(x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))


@pytest.mark.parametrize("task, flags", [
    ("ptq", {"weight_iterations": 2, "step_iterations": 2}), ("qat", QAT | {"qat_steps": 2}), ("prune", {}),
])  # fmt: skip
def test_a_network_with_a_constant_in_its_forward_pass(task, flags):
    torch.manual_seed(0)
    net, images = trained(Centred()), torch.randn(64, 3, 16, 16)
    student = TASKS[task].compress(net, images, config(task, **flags | {"wbits": 8, "abits": 8}))
    assert (student(images).argmax(1) == net(images).argmax(1)).float().mean() > 0.8


# --------------------------------------------------------------------------------------------------------------- prune


def test_least_squares_against_numpys():
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(60, 7)), rng.normal(size=(3, 7))
    y = x @ true.T + 2 + 0.1 * rng.normal(size=(60, 3))
    keep = rng.random((3, 7)) < 0.6
    for mask in (keep, np.ones((3, 7), bool)):
        weights, intercept = least_squares(*map(torch.from_numpy, (x, y)), torch.from_numpy(mask), 0.0)
        for row in range(3):
            columns = np.concatenate([x[:, mask[row]], np.ones((60, 1))], 1)
            expected = np.linalg.lstsq(columns, y[:, row], rcond=None)[0]
            np.testing.assert_allclose(weights[row].numpy()[mask[row]], expected[:-1], atol=1e-5)
            assert intercept[row].item() == pytest.approx(expected[-1], abs=1e-5) and not weights[row].numpy()[~mask[row]].any()
    tamed, _ = least_squares(torch.randn(4, 7), torch.randn(4, 3), torch.ones(3, 7, dtype=torch.bool), 1.0)  # fewer rows
    assert tamed.isfinite().all() and tamed.abs().max() < 3


CONVS = [(4, 6, 3, 2, 1), (4, 8, (3, 1), 1, (1, 0), 1, 2), (4, 4, 3, 1, 2, 2, 4)]  # a stride, groups, depthwise with holes


@pytest.mark.parametrize("settings", [*CONVS, None])
def test_patches_are_what_each_output_sees(settings):
    layer = nn.Conv2d(*settings) if settings else nn.Linear(5, 3)
    x = torch.randn(3, 7, 5) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 9, 9)
    y = layer(x)
    y = y.flatten(2) if isinstance(layer, nn.Conv2d) else y.transpose(1, 2)
    places = torch.rand(3, y.shape[2]).argsort(1)[:, :5]
    y = torch.stack([image[:, place] for image, rows in zip(y, places) for place in rows])
    seen, groups = patches(layer, x, places), getattr(layer, "groups", 1)
    weights = layer.weight.flatten(1).view(groups, -1, seen.shape[2])
    ours = torch.cat([seen[g] @ weights[g].T for g in range(groups)], 1) + layer.bias
    torch.testing.assert_close(ours, y, atol=1e-5, rtol=1e-5)


def prune(net, images, **flags):
    return TASKS["prune"].compress(net, images, config("prune", **flags))


def test_unstructured_pruning_and_its_reconstruction(net):
    torch.manual_seed(0)
    images, outputs = torch.randn(128, 3, 16, 16), []
    for no_refit in (True, False):
        pruned = prune(net, images, no_refit=no_refit)
        outputs.append((pruned(images) - net(images)).square().mean().item())
        for name in ("conv1", "conv2", "conv3", "fc"):
            weight = pruned.get_submodule(name).weight
            assert (weight == 0).sum() == round(0.5 * weight.numel())
    kept, magnitude = pruned.conv2.weight != 0, fold_batchnorm(net).conv2.weight.abs()
    assert magnitude[kept].min() >= magnitude[~kept].max() and outputs[1] < 0.3 * outputs[0]


def test_what_receives_fewer_channels_is_reconstructed():
    torch.manual_seed(0)
    net, images = trained(build("resnet20", 5, 16), steps=2), torch.randn(64, 3, 16, 16)
    pruned = (prune(net, images, prune="structured", sparsity=0.25, no_refit=no_refit) for no_refit in (True, False))
    errors = [(smaller(images) - net(images)).square().mean().item() for smaller in pruned]
    assert errors[1] < 0.7 * errors[0]


class InPlace(FunctionalNet):
    """What follows its convolutions works in place."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(x))
        y.add_(self.bn3(self.conv3(x)))
        x.add_(F.relu(y, inplace=True))
        return self.fc(x.mean((2, 3)))


def test_a_reconstruction_with_nothing_pruned_changes_nothing():
    net, images = trained(InPlace()), torch.randn(48, 3, 16, 16)
    pruned = prune(net, images, sparsity=0.0, points=20)
    torch.testing.assert_close(pruned(images), net(images), atol=2e-3, rtol=1e-2)


def test_a_layer_that_is_called_twice_is_refused():
    class Twice(FunctionalNet):
        def forward(self, x):
            x = F.relu(self.bn2(self.conv2(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))))
            return self.fc(x.mean((2, 3)))

    with pytest.raises(InputError, match="is called 2 times"):
        fold_batchnorm(trained(Twice()))


def test_two_batchnorms_in_a_row_one_with_the_name_of_a_method_of_tensors_are_folded():
    class Normed(FunctionalNet):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            x = F.relu(self.norm(self.bn1(self.conv1(x))))
            return self.fc(x.mean((2, 3)) / x.norm())

    net, x = trained(Normed()), torch.randn(4, 3, 16, 16)
    folded = fold_batchnorm(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), net(x), atol=1e-5, rtol=1e-4)


def test_only_channels_without_a_residual_sum_are_removed():
    found = removable(fold_batchnorm(build("resnet20", 5, 16)))
    assert found == {f"layer{i}.{j}.conv1": ([], [f"layer{i}.{j}.conv2"]) for i in (1, 2, 3) for j in (0, 1, 2)}
    mobile = removable(fold_batchnorm(build("mobilenet_v2", 5, 16)))
    assert (
        mobile["features.2.conv.0.0"] == (["features.2.conv.1.0"], ["features.2.conv.2"]) and "features.2.conv.2" not in mobile
    )
    assert list(removable(fold_batchnorm(build("vgg11_bn_x0_25", 5, 16)))) == [
        f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22)
    ]


class OtherActivations(nn.Module):
    """Activations and pooling of other kinds than ReLU modules."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, 8, 3, padding=1) for width in (3, 8, 8, 8, 8))
        self.leaky, self.slopes, self.fc = nn.LeakyReLU(), nn.PReLU(8), nn.Linear(8, 5)

    def forward(self, x):
        a, b, c, d, e = self.convs
        x = F.max_pool2d(F.silu(b(self.leaky(a(x)))), 2)
        return self.fc(e(self.slopes(d(c(x).relu()))).mean((2, 3)))


def test_channels_go_through_other_activations_and_a_network_without_any_is_refused(fails):
    network = OtherActivations().eval()
    found = removable(fold_batchnorm(network))
    assert found == {f"convs.{i}": ([], [f"convs.{i + 1}"]) for i in (0, 1, 2)}  # a PReLU's slopes are the channels'
    alone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="--prune structured: no convolution of the network has removable channels"):
        prune(alone, torch.randn(8, 3, 16, 16), prune="structured")


@pytest.mark.parametrize("arch", ["resnet20", "mobilenet_v2"])
def test_a_network_without_channels_computes_what_it_does_with_them_silenced(arch, tmp_path):
    torch.manual_seed(0)
    net = trained(build(arch, 5, 16), steps=2)
    images = torch.randn(16, 3, 16, 16)
    pruned = prune(net, images, prune="structured", sparsity=0.25, no_refit=True)
    silenced, full = fold_batchnorm(net), fold_batchnorm(net)
    for producer, (way, _) in removable(silenced).items():
        norms = full.get_submodule(producer).weight.abs().flatten(1).sum(1)
        gone = norms.argsort()[: round(0.25 * len(norms))]
        for name in (producer, *way):
            silenced.get_submodule(name).weight[gone] = 0
            silenced.get_submodule(name).bias[gone] = 0
        assert pruned.get_submodule(producer).out_channels == len(norms) - len(gone)
    torch.testing.assert_close(pruned(images), silenced(images), atol=1e-4, rtol=1e-3)
    found = arithmetic(net, pruned, 16)
    assert found["flops"] < 0.9 * found["flops_fp32"]
    torch.save(pruned.state_dict(), tmp_path / "student.pt")
    loaded = load_pruned(tmp_path / "student.pt", build(arch, 5, 16))
    torch.testing.assert_close(loaded(images), pruned(images))


def test_a_pruned_network_whose_forward_computes_with_shapes_is_read_again(tmp_path):
    net, images = strangers.make("ShuffleArithmetic"), torch.randn(16, 3, 16, 16)
    pruned = prune(net, images)
    torch.save(pruned.state_dict(), tmp_path / "student.pt")
    loaded = load_pruned(tmp_path / "student.pt", strangers.FAMILY["ShuffleArithmetic"](), images[:2])
    torch.testing.assert_close(loaded(images), pruned(images))


# ------------------------------------------------------------------------------------------------------------------ kd


def test_dafl_losses_in_plain_arithmetic():
    logits, features, cfg = torch.randn(6, 5), torch.randn(6, 3), config("kd", **KD)
    p = logits.double().softmax(1)
    one_hot = -sum(row.max().log() for row in p) / 6
    mean = p.mean(0)
    information = sum(v * math.log10(v) for v in mean.tolist())
    expected = 0.05 * one_hot + 5 * information - 0.01 * features.abs().mean()
    assert dafl_loss(logits, features, cfg).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("generates", [True, False])
def test_distillation_with_a_generator_and_with_images(net, generates):
    images = None if generates else torch.randn(40, 3, 16, 16)
    net.auxiliary = torch.nn.Linear(3, 3)  # of a head that only training uses
    run = Run(config("kd", **KD, **GENERATOR))
    student = kd.compress(net, images, run.cfg, run)
    assert not student.training and student.bn1.num_batches_tracked > 20
    assert ("loss_g" in run.history[-1]) == (images is None)
    assert run.history[-1]["loss_q"] < run.history[0]["loss_q"]
    if generates:
        run = Run(config("kd", **KD | {"kd_lr": 0}, **GENERATOR))
        kd.compress(net, None, run.cfg, run)
        assert run.history[-1]["loss_g"] < run.history[0]["loss_g"]


def test_the_first_step_of_distillation_equals_one_computed_by_hand(net):
    """With jittered images: the Kullback-Leibler divergence from the teacher to the student."""
    images, cfg = torch.randn(40, 3, 16, 16), config("kd", **KD | {"kd_epochs": 1, "kd_iters": 1})
    student = kd.compress(net, images, cfg)
    torch.manual_seed(cfg.seed)
    plain, x = kd.plan(net, cfg, Run(cfg)).train(), images[torch.randint(40, (20,))]
    x = x.roll([torch.randint(-2, 3, ()).item() for _ in range(2)], (2, 3))
    x = x.flip(3) if torch.rand(()) < 0.5 else x
    p = net(x).softmax(1)
    ((p * (p.log() - plain(x).log_softmax(1))).sum() / 20).backward()
    for ours, w in zip(student.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, w - 0.1 * (w.grad + 5e-4 * w), atol=1e-6, rtol=1e-4)


def test_a_method_adds_to_the_loss_of_the_generator(net):
    """Its terms see the generator's images and the teacher's labels, and what it chose for the epoch."""
    seen, losses = [], []

    class Added:
        def __init__(self, teacher, run):
            self.teacher = teacher

        def choose(self, epoch):
            return epoch // 2

        def loss(self, x, y, chosen):
            assert torch.equal(self.teacher(x).argmax(1), y) and x.requires_grad
            seen.append(chosen)
            return 100.0 * x.square().mean()

    for terms in (None, Added):
        run = Run(config("kd", **KD, **GENERATOR))
        kd.compress(net, None, run.cfg, run, added=terms)
        losses.append(run.history[0]["loss_g"])
    assert seen == [0] * 12 + [1] * 12 and losses[1] > losses[0] + 10


def test_a_generator_needs_a_linear_layer_and_small_images(net):
    cfg = config("kd", **KD | {"student_arch": "tiny:grey"})
    kd.plan(tiny.grey(), cfg, Run(cfg))
    with pytest.raises(InputError, match="no linear layer"):
        kd.plan(tiny.grey(), cfg, Run(cfg), generates=True)
    cfg = config("kd", **KD)
    cfg.image_size = 18
    with pytest.raises(InputError, match="--image-size is 18, and DAFL's generator needs a multiple of 4, at most 64"):
        kd.plan(net, cfg, Run(cfg), generates=True)
