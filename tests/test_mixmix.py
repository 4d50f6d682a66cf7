import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT, FunctionalNet, trained
from test_data import make_folder
from torch import nn

import mixmix
from common import InputError
from common.bns import BatchNormStatistics
from common.export import load_quantized
from common.models import build
from common.ops import box_mix
from common.quant import QuantConv2d, observe, quantize, quantized_activations, quantized_layers
from common.run import Run
from common.trace import fold_batchnorm
from mixmix import (
    LossWeights,
    ZooModel,
    compress,
    config,
    dafl_loss,
    draw_boxes,
    feature_loss,
    find_blocks,
    image_prior,
    inception_score,
    invert,
    jitter,
    least_squares,
    load_pruned,
    load_zoo,
    make_labels,
    mixed_cross_entropy,
    mixmix_loss,
    patches,
    read_images,
    removable,
)

TINY = {"dataset": "folder", "num_classes": 5, "image_size": 16, "batch_size": 10, "count": 25, "iterations": 6}
TINY |= {"zoo": ["tiny:net", "tiny:other"], "zoo_sample": 1, "warmup_iterations": 2, "device": "cpu", "precision": "fp32"}
NORMAL = ([0.5] * 3, [0.25] * 3)


def command_line(settings):
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return flags


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")


def plain_mix(x1, x2, boxes):
    """Eq. 7 and 8, one sample at a time."""
    mixed = []
    for a, b, (left, top, width, height) in zip(x1, x2, boxes.tolist()):
        resized = F.interpolate(b[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        a = a.clone()
        a[:, top : top + height, left : left + width] = resized
        mixed.append(a)
    return torch.stack(mixed)


@pytest.mark.parametrize("height, width", [(16, 16), (9, 20)])
def test_box_mixing_equals_a_loop_of_interpolations(height, width):
    torch.manual_seed(0)
    x1, x2 = (torch.randn(64, 3, height, width, dtype=torch.float64, requires_grad=True) for _ in range(2))
    boxes = draw_boxes(62, height, width, "cpu")
    boxes = torch.cat([boxes, torch.tensor([[0, 0, width, height], [width - 1, height - 1, 1, 1]])])  # whole image, one pixel
    ours, plain = box_mix(x1, x2, boxes), plain_mix(x1, x2, boxes)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    towards = torch.randn_like(ours)
    grads = [torch.autograd.grad((mixed * towards).sum(), (x1, x2)) for mixed in (ours, plain)]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[62], x2[62], atol=1e-5, rtol=1e-5)


def test_boxes_have_uniform_sides_and_stay_inside():
    torch.manual_seed(0)
    left, top, width, height = draw_boxes(20000, 8, 10, "cpu").unbind(1)
    for start, length, size in ((left, width, 10), (top, height, 8)):
        assert start.min() == 0 and (start + length).max() == size and length.min() == 1
        shares = length.bincount(minlength=size + 1)[1:] / len(length)
        torch.testing.assert_close(shares, torch.full((size,), 1 / size), atol=0.01, rtol=0)
        of_one_length = start[length == size - 2]
        torch.testing.assert_close(of_one_length.bincount() / len(of_one_length), torch.full((3,), 1 / 3), atol=0.04, rtol=0)


def test_losses_against_double_precision_formulas():
    torch.manual_seed(0)
    logits, y, partner, beta = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 1, 0]), torch.rand(4)
    log_p = logits.double().log_softmax(1)
    expected = -sum((1 - b) * log_p[i, y[i]] + b * log_p[i, y[partner[i]]] for i, b in enumerate(beta.tolist())) / 4  # Eq. 9
    torch.testing.assert_close(mixed_cross_entropy(logits, y, partner, beta).double(), expected, atol=1e-6, rtol=1e-5)
    x = torch.randn(3, 2, 4, 5)
    squares = {"right": 0.0, "down": 0.0, "down right": 0.0, "down left": 0.0}
    for image in x.double():
        for plane in image:
            for i in range(4):
                for j in range(5):
                    near = {"right": (i, j + 1), "down": (i + 1, j), "down right": (i + 1, j + 1), "down left": (i + 1, j - 1)}
                    for name, (a, b) in near.items():
                        if a < 4 and 0 <= b < 5:
                            squares[name] += (plane[i, j] - plane[a, b]).item() ** 2
    tv, l2 = image_prior(x)
    assert tv.item() == pytest.approx(sum(math.sqrt(v) for v in squares.values()), rel=1e-5)
    assert l2.item() == pytest.approx(sum(math.sqrt(image.double().square().sum()) for image in x) / 3, rel=1e-5)


def test_the_loss_is_the_mean_over_the_models_of_the_mixed_images(net, monkeypatch):
    torch.manual_seed(0)
    other = trained(FunctionalNet())
    zoo = [ZooModel("a", net, NORMAL, NORMAL), ZooModel("b", other, NORMAL, NORMAL)]
    cfg = config(**TINY, first_bn=3.0)
    x, y, run = torch.randn(6, 3, 16, 16), torch.arange(6) % 5, Run(cfg)
    torch.manual_seed(7)
    losses = mixmix_loss(zoo, x, y, cfg, run.autocast)
    torch.manual_seed(7)
    partner = torch.rand(6).argsort()
    boxes = draw_boxes(6, 16, 16, "cpu")
    mixed, beta = plain_mix(x, x[partner], boxes), boxes[:, 2] * boxes[:, 3] / 256
    ce = bn = 0.0
    for model in (net, other):
        ce += mixed_cross_entropy(model(mixed), y, partner, beta) / 2
        seen = []
        layers = (model.bn1, model.bn2, model.bn3)
        hooks = [m.register_forward_pre_hook(lambda m, a, seen=seen: seen.append((m, a[0]))) for m in layers]
        model(mixed)
        for hook in hooks:
            hook.remove()
        for index, (layer, z) in enumerate(seen):  # Eq. 2, norms not squared
            variance, mean = torch.var_mean(z, (0, 2, 3), correction=0)
            term = (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
            bn += (3.0 if index == 0 else 1.0) * term / 2
    torch.testing.assert_close(losses["ce"], ce, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses["bn"], bn, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["tv"], image_prior(x)[0])  # of the images as they are
    plain = mixmix_loss(zoo, x, y, config(**TINY, no_dmix=True), run.autocast)
    torch.testing.assert_close(plain["ce"], sum(F.cross_entropy(model(x), y) for model in (net, other)) / 2)


def test_weights_fixed_and_learned():
    losses = {"ce": torch.tensor(2.0), "bn": torch.tensor(5.0), "tv": torch.tensor(3.0), "l2": torch.tensor(4.0)}
    weights = {"ce": 1.0, "bn": 0.1, "tv": 0.0, "l2": 0.5}
    assert LossWeights(weights, False)(losses).item() == pytest.approx(2 + 0.5 + 2)
    learned = LossWeights(weights, True)
    assert learned(losses).item() == pytest.approx(2 + 0.5 + 2 - math.log(0.1) - math.log(0.5))
    optimizer = torch.optim.SGD(learned.parameters(), 0.2)
    for _ in range(500):
        optimizer.zero_grad()
        learned(losses).backward()
        optimizer.step()
    for name, s in learned.s.items():  # the minimum is at lambda = 1 / L, above zero
        assert torch.exp(-s).item() == pytest.approx(1 / losses[name].item(), rel=1e-3)


def test_a_model_sees_images_normalised_as_its_own(net):
    other = ([0.4] * 3, [0.2] * 3)
    zoo = ZooModel("a", net, other, NORMAL)
    pixels = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(zoo((pixels - 0.5) / 0.25), net((pixels - 0.4) / 0.2), atol=1e-5, rtol=1e-4)


def test_jitter_rolls_and_mirrors():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    torch.manual_seed(0)
    outcomes = {tuple(jitter(x, 1, True).flatten().tolist()) for _ in range(200)}
    expected = {
        tuple((image.flip(3) if mirrored else image).flatten().tolist())
        for a in (-1, 0, 1)
        for b in (-1, 0, 1)
        for image in [x.roll((a, b), (2, 3))]
        for mirrored in (False, True)
    }
    assert outcomes == expected and torch.equal(jitter(x, 0, False), x)


def test_inverted_images_are_classified_and_have_the_statistics(net):
    cfg = config(**TINY | {"iterations": 150}, lr=0.1, bn_weight=1.0, no_dmix=True, jitter=0)
    cfg.mean, cfg.std = NORMAL
    zoo, y = [ZooModel("a", net, NORMAL, NORMAL)], torch.arange(10) % 5
    torch.manual_seed(0)
    x = invert(zoo, y, cfg, Run(cfg))
    stats, noise = BatchNormStatistics(net), torch.randn(10, 3, 16, 16)
    found = {}
    for name, images in (("ours", x), ("noise", noise)):
        found[name] = F.cross_entropy(net(images), y).item(), stats.loss("norm").item()
    assert found["ours"][0] < 0.8 * found["noise"][0] and found["ours"][1] < found["noise"][1]
    large = config(**TINY | {"iterations": 9}, low_iterations=6, clip=True, flip=True, lr=10.0)
    large.mean, large.std = NORMAL
    pixels = invert(zoo, y, large, Run(large)) * 0.25 + 0.5
    assert pixels.min() == 0 and pixels.max() == 1
    learned = config(**TINY, weights_form="learned", lr_weights=0.1)
    learned.mean, learned.std = NORMAL
    assert invert(zoo, y, learned, Run(learned)).isfinite().all()


def test_labels_are_balanced_or_random():
    labels = make_labels(config(**TINY | {"count": 100}))
    assert labels.bincount().tolist() == [20] * 5 and labels.tolist() != sorted(labels.tolist())
    random = make_labels(config(**TINY | {"count": 100}, labels="random"))
    assert random.bincount(minlength=5).tolist() != [20] * 5 and not torch.equal(random, labels)


def test_inception_score_of_known_distributions():
    assert inception_score(torch.eye(5).repeat(4, 1)) == pytest.approx(5)
    assert inception_score(torch.full((8, 5), 0.2)) == pytest.approx(1)
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    mean = [0.6, 0.4]
    kl = sum(row[i] * math.log(row[i] / mean[i]) for row in p.tolist() for i in (0, 1)) / 2
    assert inception_score(p) == pytest.approx(math.exp(kl))


def start(folder, *flags, processes=1):
    command = [sys.executable, str(ROOT / "mixmix.py"), "--task", "synth", *command_line(TINY), "--out", str(folder), *flags]
    if processes > 1:
        command[:1] = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_runs_and_several_processes_make_the_images_of_one(tmp_path):
    slow = ["--iterations", "40"]
    whole, two = start(tmp_path / "whole", *slow), start(tmp_path / "two", *slow, processes=2)
    killed = start(tmp_path / "killed", *slow)
    while killed.poll() is None and not (tmp_path / "killed" / "batches" / "00000.npz").exists():
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "images.npz").exists()
    resumed = start(tmp_path / "killed", *slow, "--resume")
    for process in (whole, two, resumed):
        out, err = process.communicate()
        assert process.returncode == 0, err
    contents = [np.load(tmp_path / name / "images.npz") for name in ("whole", "two", "killed")]
    for key in ("images", "labels", "mean", "std"):
        assert all(np.array_equal(contents[0][key], other[key]) for other in contents[1:])
    assert contents[0]["images"].shape == (25, 3, 16, 16) and not (tmp_path / "whole" / "batches").exists()
    assert (tmp_path / "two" / "grid.png").exists()
    batches = contents[0]["images"][:10], contents[0]["images"][10:20]
    assert not np.array_equal(*batches)


def test_sources_and_what_networks_see_in_them(tmp_path, capsys):
    data = make_folder(tmp_path / "data", 5, images=6, size=16)
    (data / "test").rename(data / "train")
    fast = ["--task", "synth", *command_line(TINY | {"iterations": 2})]
    plain = [item for item in fast if item not in ("--zoo", "tiny:net", "tiny:other", "--zoo-sample", "1")]
    plain += ["--arch", "tiny:net"]
    runs = {"mixmix": fast, "single": plain, "zeroq": plain, "noise": plain, "real": [*plain, "--data-dir", str(data)]}
    for name, flags in runs.items():
        mixmix.main([*flags, "--data-source", name, "--out", str(tmp_path / name)])
        images, labels, _ = read_images(tmp_path / name, config(**TINY))
        assert images.shape == (25, 3, 16, 16) and labels.bincount().tolist() == [5] * 5
    images, labels, (mean, std) = read_images(tmp_path / "real", config(**TINY))
    pixels = 255 * (images[:, 0, 0, 0] * std[0] + mean[0])  # every image is one grey: 20 times its class, and up to 5
    assert torch.equal(pixels.round().long() // 20, labels) and len(pixels.round().unique()) == 25
    judge = ["--task", "evaluate", "--held-out", "tiny:other", "--images", *(str(tmp_path / name) for name in runs)]
    judge += [*fast[2 : fast.index("--zoo")], "--zoo", "tiny:net", "--out", str(tmp_path / "evaluation")]
    result = mixmix.main(judge)
    assert result == json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    (zoo, _), (images, labels, _) = load_zoo(["tiny:net"], config(**TINY)), read_images(tmp_path / "noise", config(**TINY))
    figures = result[str(tmp_path / "noise")]
    expected = 100 * (zoo[0].model(images.float()).argmax(1) == labels).float().mean().item()
    assert figures["models"]["tiny:net"]["top1"] == pytest.approx(expected, abs=0.01) == figures["zoo_top1"]
    assert figures["zoo_deviation"] == 0 and 1 <= figures["inception_score"] <= 5
    out = capsys.readouterr().out
    assert "tiny:other (held out)" in out and "Inception Score" in out


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
    observe(student, True)
    student(images)
    observe(student, False)
    x = images
    for block in find_blocks(student, net):
        x = block(x, dict(student.named_modules()))
    assert torch.equal(x, student(images)) and not torch.equal(x, folded(images))


PTQ = {"wbits": 2, "abits": 8, "weight_iterations": 300, "step_iterations": 20, "lr_rounding": 0.01}
PTQ |= {"device": "cpu", "precision": "fp32", "dataset": "folder", "num_classes": 5, "image_size": 16, "zoo": ["tiny:net"]}


def test_reconstruction_comes_nearer_to_the_network_than_nearest_rounding(net):
    images = torch.randn(128, 3, 16, 16)
    learned, nearest = (compress(net, images, config(**PTQ | {"weight_iterations": n})) for n in (300, 0))
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


def test_a_ptq_run_interrupted_at_any_block_gives_the_same_file(tmp_path, monkeypatch):
    settings = PTQ | {"weight_iterations": 3, "step_iterations": 3, "data_source": "noise", "count": 64}
    flags = [*command_line({name: value for name, value in settings.items() if name != "zoo"}), "--arch", "tiny:net"]
    result = mixmix.main([*flags, "--out", str(tmp_path / "whole")])
    assert result["data_source"] == "noise" and result["images_used"] == 64 and result["last_top1"] is None
    for name in ("reconstruct_weights", "reconstruct_steps"):  # stopped at the second call of either
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            calls, real = [], getattr(mixmix, name)

            def stop(*arguments, calls=calls, real=real):
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return real(*arguments)

            patched.setattr(mixmix, name, stop)
            mixmix.main([*flags, "--out", str(tmp_path / "stopped"), "--resume"])
    assert not (tmp_path / "stopped" / "quantized.pt").exists()
    mixmix.main([*flags, "--out", str(tmp_path / "stopped"), "--resume"])
    files = [(tmp_path / name / "quantized.pt").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
    data = make_folder(tmp_path / "data", 5, images=4, size=16)
    again = mixmix.main(["--eval", str(tmp_path / "whole" / "quantized.pt"), "--arch", "tiny:net", "--data-dir", str(data)])
    loaded = load_quantized(tmp_path / "whole" / "quantized.pt", tiny.net())
    assert again["images"] == 20 and [layer.bits for _, layer in quantized_layers(loaded)] == [8, 2, 2, 8]


QAT = {"task": "qat", "wbits": 3, "abits": 4, "qat_steps": 40, "qat_batch_size": 16, "device": "cpu", "precision": "fp32"}
QAT |= {"dataset": "folder", "num_classes": 5, "image_size": 16, "zoo": ["tiny:net"], "qat_lr": 0.02}


def test_quantization_aware_training_comes_nearer_to_the_teacher(net):
    torch.manual_seed(0)
    images, losses = torch.randn(64, 3, 16, 16), []
    for steps in (1, 600):
        cfg = config(**QAT | {"qat_steps": steps}, capture="none")
        run = Run(cfg)
        student = compress(net, images, cfg, run)
        losses.append((student(images) - net(images)).square().mean().item())
    assert losses[1] < 0.5 * losses[0] and run.iterations == 600 and {"kd", "features"} < set(run.history[-1])
    layers = quantized_layers(student)
    assert [layer.bits for _, layer in layers] == [8, 3, 3, 8]
    assert [activation.bits for _, activation in quantized_activations(student)] == [8, 4, 4]
    assert all(len(layer.weight.unique()) <= 2**layer.bits for _, layer in layers)  # one step per layer, not per channel
    assert type(layers[1][1]) is QuantConv2d and not net.training
    assert torch.equal(student.bn1.running_mean, net.bn1.running_mean)


def test_feature_loss_is_relative_to_the_teachers_variance():
    ours, theirs = [torch.randn(4, 3), torch.randn(4, 2, 5)], [torch.randn(4, 3), 9 * torch.randn(4, 2, 5)]
    expected = sum(((a - b) ** 2).mean() / b.var() for a, b in zip(ours, theirs)) / 2
    assert feature_loss(ours, theirs).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("task", ["qat", "prune"])
def test_a_task_from_the_command_line_and_what_it_leaves(tmp_path, task):
    flags = {**{name: value for name, value in QAT.items() if name not in ("zoo", "qat_steps")}, "task": task}
    flags = [*command_line(flags | {"qat_steps": 4, "data_source": "noise", "count": 40}), "--arch", "tiny:net"]
    images, run = tmp_path / "images", tmp_path / "run"
    mixmix.main([*flags, "--task", "synth", "--out", str(images)])
    made = (images / "images.npz").stat().st_mtime_ns
    mixmix.main([*flags, "--task", "synth", "--out", str(images), "--resume"])  # finished images stay
    assert (images / "images.npz").stat().st_mtime_ns == made
    config_file = json.loads((images / "config.json").read_text())
    assert config_file["arguments"]["device"] == "cpu"  # the kind alone: each process has a device of its own
    result = mixmix.main([*flags, "--images", str(images), "--out", str(run)])
    assert result["data_source"] == str(images) and result["images_used"] == 40 and result["flops"] == result["flops_fp32"]
    if task == "qat":
        loaded = load_quantized(run / "quantized.pt", tiny.net())
        assert [layer.bits for _, layer in quantized_layers(loaded)] == [8, 3, 3, 8]
    else:
        loaded = load_pruned(run / "student.pt", tiny.net())
        assert result["zero_weights"] / result["weights"] == pytest.approx(0.5, abs=0.01) and result["wbits"] is None
    x = torch.randn(8, 3, 16, 16)
    cfg = mixmix.parse_args([*flags, "--images", str(images)])
    cfg.mean, cfg.std = result["arguments"]["mean"], result["arguments"]["std"]
    again = compress(tiny.net().train(), read_images(images, cfg)[0], cfg)  # which must not move its statistics
    torch.testing.assert_close(loaded(x), again(x), atol=1e-5, rtol=1e-4)
    left = sorted(run.iterdir())
    with pytest.raises(SystemExit):  # what is there stays when the images are not
        mixmix.main([*flags, "--images", str(tmp_path / "absent"), "--out", str(run)])
    assert sorted(run.iterdir()) == left


@pytest.mark.parametrize("task", ["qat", "kd"])
def test_a_training_interrupted_after_an_epoch_gives_the_same_file(tmp_path, monkeypatch, task):
    settings = {**QAT, **KD, "task": task, "data_source": "noise", "count": 40, "batch_size": 20, "qat_steps": 3}
    unused = ("zoo", "zoo_sample", *(["student_arch"] if task == "qat" else []))
    flags = command_line({name: value for name, value in settings.items() if name not in unused})
    flags += ["--arch", "tiny:net", "--resume"]
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


@pytest.mark.parametrize("task", ["ptq", "qat", "prune"])
def test_a_network_with_a_constant_in_its_forward_pass(task):
    torch.manual_seed(0)
    cfg = config(**QAT | {"task": task, "qat_steps": 2, "weight_iterations": 2, "step_iterations": 2, "wbits": 8, "abits": 8})
    net, images = trained(Centred()), torch.randn(64, 3, 16, 16)
    student = compress(net, images, cfg)
    assert (student(images).argmax(1) == net(images).argmax(1)).float().mean() > 0.8


def test_least_squares_against_numpys(net):
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


@pytest.mark.parametrize("layer", [*(nn.Conv2d(*settings) for settings in CONVS), nn.Linear(5, 3)])
def test_patches_are_what_each_output_sees(layer):
    x = torch.randn(3, 5) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 9, 9)
    y, places = layer(x), None
    if y.ndim == 4:
        count = y.shape[2] * y.shape[3]
        places = torch.rand(3, count).argsort(1)[:, :5]
        y = torch.stack([image.flatten(1)[:, place] for image, rows in zip(y, places) for place in rows])
    seen, groups = patches(layer, x, places), getattr(layer, "groups", 1)
    weights = layer.weight.flatten(1).view(groups, -1, seen.shape[2])
    ours = torch.cat([seen[g] @ weights[g].T for g in range(groups)], 1) + layer.bias
    torch.testing.assert_close(ours, y, atol=1e-5, rtol=1e-5)


def test_unstructured_pruning_and_its_reconstruction(net):
    torch.manual_seed(0)
    images, outputs = torch.randn(128, 3, 16, 16), []
    for no_refit in (True, False):
        pruned = compress(net, images, config(**QAT | {"task": "prune"}, no_refit=no_refit))
        outputs.append((pruned(images) - net(images)).square().mean().item())
        for name in ("conv1", "conv2", "conv3", "fc"):
            weight = pruned.get_submodule(name).weight
            assert (weight == 0).sum() == round(0.5 * weight.numel())
    kept, magnitude = pruned.conv2.weight != 0, fold_batchnorm(net).conv2.weight.abs()
    assert magnitude[kept].min() >= magnitude[~kept].max() and outputs[1] < 0.3 * outputs[0]


def test_a_reconstruction_with_nothing_pruned_changes_nothing():
    """Although what comes behind the convolutions works in place."""
    torch.manual_seed(0)
    net, images = trained(build("resnet18", 5, 16), steps=2), torch.randn(48, 3, 16, 16)
    pruned = compress(net, images, config(**QAT | {"task": "prune"}, sparsity=0.0, points=20))
    torch.testing.assert_close(pruned(images), net(images), atol=2e-3, rtol=1e-2)


def test_a_layer_that_is_called_twice_is_refused():
    class Twice(FunctionalNet):
        def forward(self, x):
            x = F.relu(self.bn2(self.conv2(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))))
            return self.fc(x.mean((2, 3)))

    with pytest.raises(InputError, match="is called 2 times"):
        fold_batchnorm(trained(Twice()))


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


@pytest.mark.parametrize("arch", ["resnet20", "mobilenet_v2"])
def test_a_network_without_channels_computes_what_it_does_with_them_silenced(arch, tmp_path):
    torch.manual_seed(0)
    net = trained(build(arch, 5, 16), steps=2)
    images = torch.randn(16, 3, 16, 16)
    cfg = config(**QAT | {"task": "prune"}, prune="structured", sparsity=0.25, no_refit=True)
    run = Run(cfg)
    pruned, silenced, full = compress(net, images, cfg, run), fold_batchnorm(net), fold_batchnorm(net)
    for producer, (way, _) in removable(silenced).items():
        norms = full.get_submodule(producer).weight.abs().flatten(1).sum(1)
        gone = norms.argsort()[: round(0.25 * len(norms))]
        for name in (producer, *way):
            silenced.get_submodule(name).weight[gone] = 0
            silenced.get_submodule(name).bias[gone] = 0
        assert pruned.get_submodule(producer).out_channels == len(norms) - len(gone)
    torch.testing.assert_close(pruned(images), silenced(images), atol=1e-4, rtol=1e-3)
    assert run.facts["flops"] < 0.9 * run.facts["flops_fp32"]
    torch.save(pruned.state_dict(), tmp_path / "student.pt")
    loaded = load_pruned(tmp_path / "student.pt", build(arch, 5, 16))
    torch.testing.assert_close(loaded(images), pruned(images))


KD = {"task": "kd", "student_arch": "tiny:other", "kd_epochs": 4, "kd_iters": 6, "kd_batch_size": 20, "kd_latent_dim": 8}
KD |= {name: QAT[name] for name in ("dataset", "num_classes", "image_size", "device", "precision")}
KD |= {"zoo": ["tiny:net", "tiny:other"], "zoo_sample": 2, "kd_lr_g": 0.001}


def test_dafl_losses_in_plain_arithmetic():
    logits, features, cfg = torch.randn(6, 5), torch.randn(6, 3), config(**KD)
    p = logits.double().softmax(1)
    one_hot = -sum(row.max().log() for row in p) / 6
    mean = p.mean(0)
    information = sum(v * math.log10(v) for v in mean.tolist())
    expected = 0.05 * one_hot + 5 * information - 0.01 * features.abs().mean()
    assert dafl_loss(logits, features, cfg).item() == pytest.approx(expected.item(), rel=1e-4)


def test_distillation_with_and_without_the_mixmix_terms_and_from_images(net):
    cfg = config(**KD)
    cfg.mean, cfg.std = NORMAL
    histories = {}
    for name, images, flags in [("mixmix", None, {}), ("dafl", None, {"data_source": "single"}), ("images", 40, {})]:
        torch.manual_seed(0)
        cfg = config(**{k: v for k, v in KD.items() if not flags or k not in ("zoo", "zoo_sample")}, **flags, capture="none")
        cfg.mean, cfg.std = NORMAL
        run = Run(cfg)
        images = images and torch.randn(images, 3, 16, 16)
        student = compress(net, images, cfg, run)
        assert not student.training and student.bn1.num_batches_tracked > 20
        histories[name] = run.history
    assert {name: "bn" in lines[-1] for name, lines in histories.items()} == {"mixmix": True, "dafl": False, "images": False}
    assert "loss_g" in histories["dafl"][-1] and "loss_g" not in histories["images"][-1]
    for lines in histories.values():
        assert lines[-1]["loss_q"] < lines[0]["loss_q"]


def test_distillation_and_transfer_from_the_command_line(tmp_path, capsys):
    data = make_folder(tmp_path / "data", 5, images=4, size=16)
    arguments = [*command_line(KD), "--arch", "tiny:net", "--data-dir", str(data)]
    result = mixmix.main([*arguments, "--out", str(tmp_path / "kd")])
    assert result["wbits"] is None and result["images"] == 20 and (tmp_path / "kd" / "samples.png").exists()
    assert "student, last epoch" in capsys.readouterr().out
    noise = [*command_line({name: QAT[name] for name in ("dataset", "num_classes", "image_size", "device", "precision")})]
    mixmix.main([*noise, "--task", "synth", "--data-source", "noise", "--arch", "tiny:net", "--out", str(tmp_path / "noise")])
    table = [*noise, "--task", "transfer", "--targets", "tiny:net", "tiny:other", "--zoo", "tiny:net", "--data-dir", str(data)]
    table += ["--images", str(tmp_path / "noise"), "--weight-iterations", "2", "--step-iterations", "2"]
    result = mixmix.main([*table, "--out", str(tmp_path / "transfer")])
    assert set(result) == {"full precision", str(tmp_path / "noise")}
    assert all(set(row) == {"tiny:net", "tiny:other"} for row in result.values())
    assert result == json.loads((tmp_path / "transfer" / "transfer.json").read_text())


def test_unusable_input_ends_with_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["--task", "synth", *command_line(TINY)]
    own = [*tiny, "--task", "ptq", "--data-source", "noise"]
    whole = {"images": np.zeros((2, 3, 8, 8)), "labels": np.zeros(2, int), "mean": [0.0] * 3, "std": [1.0] * 3}
    np.savez(tmp_path / "other.npz", **whole)
    broken = {
        "flat": {"images": np.zeros((2, 3))},
        "short": {"labels": np.zeros(1, int)},
        "negative": {"labels": -np.ones(2, int)},
    }
    broken |= {"infinite": {"images": np.full((2, 3, 8, 8), np.inf)}, "grey": {"mean": [0.0]}}
    for name, change in broken.items():
        np.savez(tmp_path / f"{name}.npz", **whole | change)
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    for arguments, words in [
        ([*tiny, "--zoo-sample", 3], "--zoo-sample is 3 and the zoo has 2 models (tiny:net, tiny:other)"),
        ([*tiny, "--zoo", "tiny:net", "tiny:grey"], "zoo model tiny:grey:"),
        ([*tiny, "--zoo", "tiny:net", "tiny:plain"], "zoo model tiny:plain: model FunctionalNet has no BatchNorm2d"),
        (
            [*tiny, "--zoo", "tiny:net", "tiny:seven"],
            "zoo model tiny:seven: the model returns (2, 7) for 2 images, expected (2, 5)",
        ),
        ([*tiny, "--zoo", "tiny:absent"], "zoo model tiny:absent: --arch 'tiny:absent' cannot be imported"),
        ([*tiny, "--data-source", "single"], "--data-source single inverts --arch alone"),
        ([*tiny, "--data-source", "real"], "needs training images; give --data-dir"),
        ([*tiny, "--low-iterations", 7], "--low-iterations is 7; give 0 to --iterations, 6"),
        ([*tiny, "--task", "evaluate"], "evaluate and transfer need some"),
        ([*tiny, "--task", "evaluate", "--images", "absent"], "--images absent is not a file or a finished run"),
        ([*tiny, "--task", "evaluate", "--images", "damaged.npz"], "--images damaged.npz is damaged"),
        *(([*tiny, "--task", "evaluate", "--images", f"{name}.npz"], f"{name}.npz is damaged") for name in broken),
        ([*tiny, "--task", "evaluate", "--images", "other.npz"], "has images of 8x8 pixels and labels up to 0"),
        ([*tiny, "--capture", "compile"], "would compile anew"),
        ([*tiny, "--clipped-ste"], "--clipped-ste is set"),
        ([*tiny, *command_line({f"{name}_weight": 0 for name in ("ce", "bn", "tv", "l2")})], "minimises nothing"),
        ([*tiny, "--task", "kd"], "kd needs it"),
        ([*own, "--arch", "tiny:branch"], "the model cannot be traced"),  # before any image is made
        ([*own, "--arch", "tiny:net", "--task", "kd", "--student-arch", "resnet2x"], "--student-arch 'resnet2x' is not known"),
        ([*tiny, "--task", "transfer"], "evaluate and transfer need some"),
        (
            ["--dataset", "folder", "--num-classes", 5, "--image-size", 16, "--task", "transfer", "--images", "other.npz"],
            "has no networks to quantize; give --targets",
        ),
    ]:
        assert words in fails(mixmix.main, *arguments), arguments
    assert all(path.suffix == ".npz" for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="stopped being finite; lower --lr"):
        mixmix.synthesize(config(**TINY, lr=1e30))
