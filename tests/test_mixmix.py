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
from test_tasks import DATA, GENERATOR, KD, command_line
from torchvision.utils import save_image

import mixmix
from common import InputError, capture
from common.bns import BatchNormStatistics
from common.cli import altered
from common.data import accuracy, find_test_set
from common.images import jitter, read_images, renormalise
from common.ops import box_mix
from common.run import Run
from common.synthesis import make_labels, make_set
from common.tasks import ptq
from common.tasks.evaluate import inception_score, judge
from common.tasks.transfer import load_targets
from mixmix import (
    LossWeights,
    ZooModel,
    blur_prior,
    config,
    draw_boxes,
    image_prior,
    invert,
    load_source,
    load_zoo,
    mixed_cross_entropy,
    mixmix_loss,
    weights_of,
)

TINY = DATA | {"batch_size": 10, "count": 25, "iterations": 6, "warmup_iterations": 2}
TINY |= {"zoo": ["tiny:net", "tiny:other"], "zoo_sample": 1}
NORMAL = ([0.5] * 3, [0.25] * 3)


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


def test_the_blur_prior_is_the_distance_from_a_gaussian_mean():
    assert blur_prior(torch.full((2, 3, 6, 7), 3.0)).item() == pytest.approx(0, abs=1e-10)
    torch.manual_seed(0)
    x, expected = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True), 0.0
    bell = {(i, j): math.exp(-(i * i + j * j) / 2) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    for plane in x.detach().flatten(0, 1):
        for i in range(5):
            for j in range(6):  # beyond the border it is mirrored: -1 is 1
                near = sum(w * plane[4 - abs(4 - abs(i + di)), 5 - abs(5 - abs(j + dj))] for (di, dj), w in bell.items())
                expected += (plane[i, j] - near / sum(bell.values())) ** 2 / x.numel()
    torch.testing.assert_close(blur_prior(x), expected)
    assert torch.autograd.gradcheck(blur_prior, x)


def test_kw_has_a_divergence_and_a_blur_in_its_loss(net):
    cfg = config(**DATA, data_source="kw", kl_weight=3.0, blur_weight=0.2, arch="tiny:net")
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    loss, losses = mixmix_loss([ZooModel("a", net, NORMAL, NORMAL)], x, y, LossWeights(weights_of(cfg)), cfg, Run(cfg).autocast)
    stats, logits = BatchNormStatistics(net), net(x)
    expected = {"ce": F.cross_entropy(logits, y), "bn": stats.loss("kl"), "prior": blur_prior(x)}
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(loss, expected["ce"] + 3 * expected["bn"] + 0.2 * expected["prior"])


def test_the_loss_is_the_mean_over_the_models_of_the_mixed_images(net, monkeypatch):
    torch.manual_seed(0)
    other = trained(FunctionalNet())
    zoo = [ZooModel("a", net, NORMAL, NORMAL), ZooModel("b", other, NORMAL, NORMAL)]
    cfg = config(**TINY, first_bn=3.0, tv_weight=1e-4, l2_weight=1e-5)
    x, y, run = torch.randn(6, 3, 16, 16), torch.arange(6) % 5, Run(cfg)
    torch.manual_seed(7)
    weights = LossWeights({"ce": 2.0, "bn": 0.5, "prior": 3.0})
    loss, losses = mixmix_loss(zoo, x, y, weights, cfg, run.autocast)
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
    tv, l2 = image_prior(x)  # of the images as they are
    torch.testing.assert_close(losses["prior"], (10 * tv + l2) / 11)
    torch.testing.assert_close(loss, 2 * ce + 0.5 * bn + 3 * losses["prior"], atol=1e-4, rtol=1e-4)
    _, plain = mixmix_loss(zoo, x, y, weights, config(**TINY, no_dmix=True), run.autocast)
    torch.testing.assert_close(plain["ce"], sum(F.cross_entropy(model(x), y) for model in (net, other)) / 2)


def test_weights_fixed_and_learned():
    losses = {"ce": torch.tensor(2.0), "bn": torch.tensor(5.0), "prior": torch.tensor(4.0)}
    weights = {"ce": 0.0, "bn": 0.1, "prior": 0.5}
    assert LossWeights(weights)(losses).item() == pytest.approx(0.5 + 2)
    learned = LossWeights(weights, True)
    assert learned(losses).item() == pytest.approx(0.5 + 2 - math.log(0.1) - math.log(0.5))
    optimizer = torch.optim.SGD(learned.parameters(), 0.2)
    for _ in range(500):
        optimizer.zero_grad()
        learned(losses).backward()
        optimizer.step()
    found = {name: value.item() for name, value in learned.lambdas().items()}  # the minimum is at lambda = 1 / L, above zero
    assert found == pytest.approx({"lambda_bn": 1 / 5, "lambda_prior": 1 / 4}, rel=1e-3)


def test_a_model_sees_images_normalised_as_its_own(net):
    other = ([0.4] * 3, [0.2] * 3)
    zoo = ZooModel("a", net, other, NORMAL)
    pixels = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(zoo((pixels - 0.5) / 0.25), net((pixels - 0.4) / 0.2), atol=1e-5, rtol=1e-4)


def test_images_are_renormalised_for_another_network():
    pixels, a, b = torch.rand(300, 3, 4, 4), ([0.5] * 3, [0.25] * 3), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    of_a, of_b = ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1) for mean, std in (a, b))
    torch.testing.assert_close(renormalise(of_a, a, b), of_b)


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
    learned, lines = config(**TINY, weights_form="learned", lr_weights=0.1, tv_weight=1e-4, l2_weight=1e-5), []
    learned.mean, learned.std = NORMAL
    x = invert(zoo, y, learned, Run(learned), lambda names, losses: lines.append(dict(losses)))
    lambdas = {name for name in lines[-1] if name.startswith("lambda")}  # of three losses: the prior's parts share one
    assert x.isfinite().all() and lambdas == {"lambda_ce", "lambda_bn", "lambda_prior"}
    assert lines[0]["lambda_prior"] != lines[-1]["lambda_prior"]


def test_the_pixels_rate_warms_up_and_falls_by_a_cosine_at_each_size(net):
    rates = []

    class Watching(Run):
        def update(self, optimizer, loss):
            assert optimizer.defaults["betas"] == (0.6, 0.7)
            rates.append(optimizer.param_groups[0]["lr"].item())
            super().update(optimizer, loss)

    cfg = config(**TINY, low_iterations=4, lr=0.5, beta1=0.6, beta2=0.7)  # of 6 iterations; 2 of each size warm up
    cfg.mean, cfg.std = NORMAL
    invert([ZooModel("a", net, NORMAL, NORMAL)], torch.arange(10) % 5, cfg, Watching(cfg))
    cosines = [(i, 0.25 * (1 + math.cos(math.pi * i / n))) for n in (4, 2) for i in range(n)]
    assert rates == pytest.approx([min((i + 1) / 2, 1) * cosine for i, cosine in cosines])


def test_networks_see_small_images_first_and_shifted_ones(net):
    seen = []

    class Watched(ZooModel):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    cfg = config(**TINY | {"iterations": 2, "zoo_sample": 1}, low_iterations=1, jitter=2, no_dmix=True, lr=0)
    cfg.mean, cfg.std = NORMAL
    run = Run(cfg)
    torch.manual_seed(2)
    images = invert([Watched("a", net, NORMAL, NORMAL)], torch.arange(10) % 5, cfg, run)
    torch.manual_seed(2)
    _, x = torch.randperm(1), torch.randn(10, 3, 16, 16)
    torch.testing.assert_close(seen, [jitter(F.avg_pool2d(x, 2), 1, False), jitter(x, 2, False)])
    assert torch.equal(images, x) and not torch.equal(seen[1], x)


def test_networks_are_drawn_for_each_batch_and_epoch(net):
    zoo, names = [ZooModel(name, trained(FunctionalNet()), NORMAL, NORMAL) for name in "abc"], set()
    cfg = config(**TINY | {"iterations": 1, "zoo_sample": 2})
    cfg.mean, cfg.std = NORMAL
    for seed in range(20):
        run = Run(cfg)
        torch.manual_seed(seed)
        invert(zoo, torch.arange(10) % 5, cfg, run, lambda drawn, losses: names.add(drawn))
    assert names == {"a, b", "a, c", "b, c"}
    networks = {"zoo": ["tiny:net", "tiny:other", "tiny:inverted"], "zoo_sample": 2, "arch": "tiny:net"}
    settings = config(**DATA, **KD, **GENERATOR, **networks, task="kd")
    terms = mixmix.DaflTerms(net, Run(settings))
    chosen = [terms.choose(epoch) for epoch in range(20)]
    assert set(chosen) == {(0, 1), (0, 2)} and chosen == [terms.choose(epoch) for epoch in range(20)]
    x, y, losses = torch.randn(8, 3, 16, 16), torch.arange(8) % 5, []
    for networks_of, cfg in (((0, 2), settings), ((0,), settings), ((0, 2), altered(settings, no_dmix=True))):
        torch.manual_seed(0)
        models = [terms.zoo[index] for index in networks_of]
        losses.append(mixmix.mixmix_loss(models, x, y, terms.weights, cfg, terms.run.autocast)[0].item())
    torch.manual_seed(0)
    assert terms.loss(x, y, (0, 2)).item() == losses[0] and len(set(losses)) == 3
    assert terms.zoo[1].same  # without --mean and --std, images are normalised for the data set
    settings.weights = "its own.pt"  # then the zoo's network of this architecture is another one
    assert [model.name for model in mixmix.DaflTerms(net, Run(settings)).zoo] == [networks["arch"], *networks["zoo"]]


def test_compiled_networks_make_the_images_of_eager_ones(net, monkeypatch):
    """But for rounding; traced and differentiated as for the C++ compiler, which alone is left out for its time."""
    monkeypatch.setattr(capture, "COMPILER", {"backend": "aot_eager"})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    zoo = [ZooModel("a", net, NORMAL, NORMAL), ZooModel("b", trained(FunctionalNet()), NORMAL, ([0.4] * 3, [0.3] * 3))]
    images = []
    for name in ("compile", "none"):
        cfg = config(**TINY | {"task": "synth", "capture": name, "zoo_sample": 2})
        cfg.mean, cfg.std = NORMAL
        run = Run(cfg)
        for seed in range(2):
            torch.manual_seed(seed)
            images.append(invert(zoo, torch.arange(10) % 5, cfg, run))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one of each network
    torch.testing.assert_close(images[:2], images[2:], atol=1e-3, rtol=1e-3)


def test_the_bundled_images_are_classified():
    images, labels, normalisation = read_images("bundled", config())
    zoo, shared = load_zoo(["resnet20", "vgg11_bn_x0_25"], config())
    assert normalisation == shared and labels.bincount().tolist() == [26] * 6 + [25] * 4
    assert all((model(images.float()).argmax(1) == labels).float().mean() > 0.95 for model in zoo)
    with pytest.raises(InputError, match="--images bundled are of CIFAR-10, and --dataset is folder; give"):
        read_images("bundled", config(**TINY))


def test_images_of_integers_are_refused(tmp_path):
    settings = {"labels": np.zeros(2, np.int64), "mean": [0.5] * 3, "std": [0.25] * 3}
    for dtype in (np.float16, np.uint8):
        np.savez(tmp_path / f"{dtype.__name__}.npz", images=np.ones((2, 3, 16, 16), dtype), **settings)
    assert len(read_images(str(tmp_path / "float16.npz"), config(**TINY))[0]) == 2
    with pytest.raises(InputError, match="uint8.npz is damaged or not an images.npz of mixmix.py"):
        read_images(str(tmp_path / "uint8.npz"), config(**TINY))


def test_labels_are_balanced_or_random():
    labels = make_labels(config(**TINY | {"count": 100}))
    assert labels.bincount().tolist() == [20] * 5 and labels.tolist() != sorted(labels.tolist())
    random = make_labels(config(**TINY | {"count": 100}, labels="random"))
    assert random.bincount(minlength=5).tolist() != [20] * 5 and not torch.equal(random, labels)
    some = config(**TINY | {"count": 100}, classes=["4", "1-2", "2"])
    assert make_labels(some).bincount().tolist() == [0, 34, 33, 0, 33]
    some.labels = "random"
    assert make_labels(some).unique().tolist() == [1, 2, 4]
    few = make_labels(config(**TINY | {"count": 40, "num_classes": 100}))
    assert len(few.unique()) == 40 and few.max() > 60  # not the first ones only


def test_the_number_of_images_goes_by_task_and_data():
    counts = [config(task="qat", **flags).count for flags in ({"dataset": "imagenet"}, {"dataset": "cifar10"}, {"count": 5})]
    assert counts == [100_000, 4096, 5] and config(dataset="imagenet").count == config(task="synth").count == 1024


def test_defaults_are_the_recipes():
    def recipe(**flags):
        cfg = config(**flags)
        return [getattr(cfg, flag[2:].replace("-", "_")) for flag in mixmix.RECIPE]

    assert recipe() == [256, 2000, 0.25, 0.9, 0.999, 1, 1, 1, 2.5e-5, 0, 100, 10, 2, False, False]
    assert recipe(dataset="imagenet") == [32, 5000, 0.25, 0.5, 0.9, 1, 0.01, 10, 1e-4, 1e-5, 100, 10, 30, True, True]
    assert config(dataset="imagenet").low_iterations == 3333 and config().low_iterations == 0
    assert weights_of(config(data_source="zeroq")) == {"ce": 0, "bn": 1, "prior": 0}


def test_what_is_judged_and_by_which_network(net):
    """Table 1: the mean of L_BN over the batches; Table 2: the Inception Score of the held-out network."""
    torch.manual_seed(0)
    x, other = torch.randn(25, 3, 16, 16), tiny.other()
    other.fc.weight.data.mul_(20)
    zoo, held_out = ([ZooModel(name, model, NORMAL, NORMAL)] for name, model in (("a", net), ("b", other)))
    with torch.no_grad():
        found = judge(zoo, held_out, x, torch.arange(25) % 5, "", config(**TINY), torch.device("cpu"))  # batches of 10
        stats, bn = BatchNormStatistics(net), []
        for part in x.tensor_split(3):
            net(part)
            bn.append(stats.loss("norm").item())
        assert found["models"]["a"]["bn_loss"] == pytest.approx(sum(bn) / 3, abs=1e-4)
        assert found["inception_score"] == pytest.approx(inception_score(other(x).softmax(1)), abs=1e-3)


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
    curves = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "two", "killed")]
    assert curves[0].count("\n") == 3 * 40 and curves[0] == curves[1] == curves[2]
    contents = [np.load(tmp_path / name / "images.npz") for name in ("whole", "two", "killed")]
    for key in ("images", "labels", "mean", "std"):
        assert all(np.array_equal(contents[0][key], other[key]) for other in contents[1:])
    assert contents[0]["images"].shape == (25, 3, 16, 16) and not (tmp_path / "whole" / "batches").exists()
    assert (tmp_path / "two" / "grid.png").exists()
    batches = contents[0]["images"][:10], contents[0]["images"][10:20]
    assert not np.array_equal(*batches)


def test_the_losses_of_every_batch_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.synthesis.CURVE", 2)
    flags = [*command_line(TINY | {"iterations": 7}), "--weights-form", "learned", "--lr-weights", "0.1"]
    mixmix.main(["--task", "synth", *flags, "--out", str(tmp_path / "run")])
    assert "metrics.jsonl" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["batch"], line["iteration"]) for line in lines] == [(b, i) for b in range(3) for i in (0, 3, 6)]
    for line in lines:
        assert set(line) == {"batch", "iteration", *(p + name for p in ("", "lambda_") for name in ("ce", "bn", "prior"))}
    assert lines[0]["lambda_ce"] == 1 != lines[1]["lambda_ce"]  # as used in that iteration


def test_parts_make_the_images_of_one_process(tmp_path, fails, capsys):
    flags = ["--task", "synth", *command_line(TINY)]
    mixmix.main([*flags, "--out", str(tmp_path / "whole")])
    parts = [*flags, "--out", str(tmp_path / "parts")]
    assert "start --part 0/2 first" in fails(mixmix.main, *parts, "--part", "1/2")
    assert mixmix.main([*parts, "--part", "0/2"]) is None and "with --resume and without --part" in capsys.readouterr().out
    assert len(list((tmp_path / "parts" / "batches").glob("*.npz"))) == 2
    mixmix.main([*parts, "--part", "1/2"])
    assert "holds an unfinished run" in fails(mixmix.main, *parts)
    result = mixmix.main([*parts, "--resume"])
    assert result["images"] == 25 and not (tmp_path / "parts" / "batches").exists()
    contents = [np.load(tmp_path / name / "images.npz") for name in ("whole", "parts")]
    assert all(np.array_equal(contents[0][key], contents[1][key]) for key in ("images", "labels", "mean", "std"))
    made = (tmp_path / "parts" / "images.npz").stat().st_mtime_ns
    assert mixmix.main(parts) == result and "25 images of source mixmix" in capsys.readouterr().out  # finished ones stay
    assert (tmp_path / "parts" / "images.npz").stat().st_mtime_ns == made
    mixmix.main([*parts, "--overwrite"])
    assert (tmp_path / "parts" / "images.npz").stat().st_mtime_ns > made


def test_sources_and_what_networks_see_in_them(tmp_path, capsys, fails):
    data = make_folder(tmp_path / "data", 5, images=6, size=16)
    (data / "test").rename(data / "train")
    fast = ["--task", "synth", *command_line(TINY | {"iterations": 2})]
    ready = ["--task", "synth", *command_line(DATA), "--count", "25", "--arch", "tiny:net"]
    plain = [*ready, "--iterations", "2", "--batch-size", "10"]
    runs = {
        "mixmix": fast,
        "single": plain,
        "zeroq": plain,
        "kw": plain,
        "noise": ready,
        "real": [*ready, "--data-dir", str(data)],
    }
    for name, flags in runs.items():
        mixmix.main([*flags, "--data-source", name, "--out", str(tmp_path / name)])
        images, labels, _ = read_images(tmp_path / name, config(**TINY))
        assert images.shape == (25, 3, 16, 16) and labels.bincount().tolist() == [5] * 5
    images, labels, (mean, std) = read_images(tmp_path / "real", config(**TINY))
    pixels = 255 * (images[:, 0, 0, 0] * std[0] + mean[0])  # every image is one grey: 20 times its class, and up to 5
    assert torch.equal(pixels.round().long() // 20, labels) and len(pixels.round().unique()) == 25
    judge = ["--task", "evaluate", *command_line(DATA), "--zoo", "tiny:net", "--held-out", "tiny:other"]
    judging = [*judge, "--images", *(str(tmp_path / name) for name in runs), "--out", str(tmp_path / "evaluation")]
    result = mixmix.main(judging)
    assert result == json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    (zoo, _), (images, labels, _) = load_zoo(["tiny:net"], config(**TINY)), read_images(tmp_path / "noise", config(**TINY))
    figures = result[str(tmp_path / "noise")]
    expected = 100 * (zoo[0].model(images.float()).argmax(1) == labels).float().mean().item()
    assert figures["models"]["tiny:net"]["top1"] == pytest.approx(expected, abs=0.01) == figures["zoo_top1"]
    assert figures["zoo_deviation"] == 0 and 1 <= figures["inception_score"] <= 5
    table = capsys.readouterr().out.split("there\n")[-1]
    assert "tiny:other (held out)" in table and "Inception Score" in table
    assert mixmix.main(judging) == result
    again = capsys.readouterr().out
    assert again.splitlines()[-2] in table and again.endswith("finished before; --overwrite runs it again\n")
    assert "needs labels; give images.npz files" in fails(mixmix.main, *judge, "--images", data / "train")


def test_distillation_with_the_mixmix_terms(net):
    histories = {}
    for source, flags in (("mixmix", {"zoo": TINY["zoo"], "zoo_sample": 2}), ("single", {"data_source": "single"})):
        cfg = config(**DATA, **KD, **GENERATOR, **flags, task="kd", arch="tiny:net")
        cfg.mean, cfg.std = NORMAL
        run = Run(cfg)
        mixmix.compress(net, None, cfg, run)
        histories[source] = run.history
    with_weight = config(**DATA, **KD, **GENERATOR, zoo=TINY["zoo"], zoo_sample=2, task="kd", arch="tiny:net")
    assert mixmix.DaflTerms(net, Run(with_weight)).weights.initial == {"ce": 0.05, "bn": 0.1}  # DAFL's one-hot weight
    assert "bn" in histories["mixmix"][-1] and "bn" not in histories["single"][-1]
    assert all(lines[-1]["loss_q"] < lines[0]["loss_q"] for lines in histories.values())


def test_distillation_and_transfer_from_the_command_line(tmp_path, capsys):
    data = make_folder(tmp_path / "data", 5, images=20, size=16)
    torch.manual_seed(0)
    for file in data.rglob("*.png"):  # images of which networks differ
        save_image(torch.rand(3, 16, 16), file)
    flags = [*command_line(DATA | KD | GENERATOR), "--task", "kd", "--arch", "tiny:net", "--data-dir", str(data)]
    result = mixmix.main([*flags, "--zoo", "tiny:net", "tiny:other", "--zoo-sample", "2", "--out", str(tmp_path / "kd")])
    assert result["wbits"] is None and result["images"] == 100 and (tmp_path / "kd" / "samples.png").exists()
    assert "distilled, last epoch" in capsys.readouterr().out
    noise = [*command_line(DATA), "--task", "synth", "--data-source", "noise", "--arch", "tiny:net", "--count", "64"]
    mixmix.main([*noise, "--out", str(tmp_path / "noise")])
    low = command_line(DATA | {"wbits": 2, "abits": 2, "ends_bits": 2})
    table = [*low, "--task", "transfer", "--targets", "tiny:net", "tiny:other", "--data-dir", str(data)]
    table += ["--images", str(tmp_path / "noise"), "--weight-iterations", "2", "--step-iterations", "2"]
    table += ["--out", str(tmp_path / "transfer")]
    result = mixmix.main(table)
    assert set(result) == {"full precision", str(tmp_path / "noise")}
    assert all(set(row) == {"tiny:net", "tiny:other"} for row in result.values())
    assert result == json.loads((tmp_path / "transfer" / "transfer.json").read_text())
    images, _, normalised = read_images(tmp_path / "noise", mixmix.parse_args(table))
    for name, model, own in load_targets(mixmix.parse_args(table)):
        student = ptq.compress(model, renormalise(images, normalised, (own.mean, own.std)), own)
        test_set = find_test_set(own, torch.device("cpu"), 3)
        found = {"full precision": accuracy(model, test_set), str(tmp_path / "noise"): accuracy(student, test_set)}
        assert found == {source: row[name] for source, row in result.items()}
    assert len({row["tiny:net"] for row in result.values()}) == 2
    own = mixmix.parse_args([*table, "--arch", "tiny:net", "--mean", "0.3"])  # the network's that is named, as in the zoo
    assert [cfg.mean for *_, cfg in load_targets(own)] == [[0.3] * 3, [0.485, 0.456, 0.406]]
    (tmp_path / "noise" / "images.npz").unlink()
    assert mixmix.main(table) == result and "--overwrite runs it again" in capsys.readouterr().out


def test_the_images_of_a_task_follow_its_resume_and_overwrite(tmp_path, monkeypatch, fails):
    flags = [*command_line(TINY | {"weight_iterations": 1, "step_iterations": 1}), "--arch", "tiny:net"]
    flags += ["--out", str(tmp_path / "run")]
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(mixmix, "compress", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        mixmix.main(flags)
    images = tmp_path / "run" / "images" / "images.npz"
    made = images.stat().st_mtime_ns
    assert "holds an unfinished run; give --resume" in fails(mixmix.main, *flags)
    mixmix.main([*flags, "--resume"])
    assert images.stat().st_mtime_ns == made
    mixmix.main([*flags, "--overwrite"])
    assert images.stat().st_mtime_ns > made


@pytest.mark.parametrize("task", ["synth", "evaluate", "transfer"])
def test_the_check_of_a_set_of_images_says_which_networks_there_are(tmp_path, monkeypatch, capsys, task):
    monkeypatch.chdir(tmp_path)
    flags = {"zoo": ["tiny:net", "tiny:other"]} | ({"zoo_sample": 2} if task == "synth" else {"images": "absent"})
    assert mixmix.main([*command_line(DATA | flags), "--task", task, "--check"]) == ["tiny:net", "tiny:other"]
    assert "network   tiny:other, 949 parameters" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_unusable_input_ends_with_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["--task", "synth", *command_line(TINY)]
    data = command_line(DATA)
    own = [*data, "--data-source", "noise"]
    judge = [*data, "--zoo", "tiny:net", "--task", "evaluate"]
    judging = ["--task", "evaluate", "--images", "bundled"]
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
        ([*tiny, "--data-source", "single"], "--zoo has no effect with --data-source single"),
        ([*tiny, "--blur-weight", 1], "--blur-weight has no effect with --data-source mixmix"),
        ([*own[:-1], "kw", "--tv-weight", 1], "--tv-weight has no effect with --data-source kw"),
        ([*own[:-1], "zeroq", "--classes", 1], "--classes has no effect with --data-source zeroq"),
        ([*own[:-1], "kw", "--ce-weight", 0, "--kl-weight", 0, "--blur-weight", 0], "minimises nothing"),
        ([*data, "--task", "kd", "--ce-weight", 2], "--ce-weight has no effect with --task kd and --data-source mixmix"),
        ([*tiny, "--classes", "4-2"], "--classes is '4-2'; give class numbers and ranges of them"),
        ([*tiny, "--classes", "0", "3-5"], "--classes names 5, and the classes of --dataset folder are 0 to 4"),
        ([*data, "--task", "synth", "--data-source", "real"], "no training images found; give --data-dir"),
        ([*tiny, "--qat-lr", 1], "--qat-lr has no effect with --task synth"),
        ([*tiny, "--count", 2, "--classes", "0-2"], "--classes names 3 classes and --count is 2; raise it or name fewer"),
        ([*data, "--images", "other.npz", "--iterations", 3], "--iterations has no effect with --images"),
        ([*data, "--images", "other.npz", "--zoo", "tiny:net"], "--zoo has no effect with --images and --task ptq"),
        ([*own, "--batch-size", 3], "--batch-size has no effect with --data-source noise"),
        ([*own[:-1], "single", "--held-out", "tiny:net"], "--held-out has no effect with --data-source single"),
        ([*own, "--task", "prune", "--no-refit", "--ridge", 1], "--ridge has no effect with --no-refit"),
        ([*own, "--part", "0/2"], "--part has no effect with --task ptq"),
        ([*tiny, "--part", "2/2"], "--part is '2/2'; give I/N"),
        ([*tiny, "--low-iterations", 7], "--low-iterations is 7, more than the 6 of --iterations"),
        (judge, "--task evaluate needs --images"),
        ([*judge, "--images", "absent"], "--images absent is not a file, a folder of pictures"),
        ([*judge, "--images", "damaged.npz"], "--images damaged.npz is damaged"),
        *(([*judge, "--images", f"{name}.npz"], f"{name}.npz is damaged") for name in broken),
        ([*judge, "--images", "other.npz"], "has images of 8x8 pixels and labels up to 0"),
        ([*data, "--images", "other.npz", "--capture", "compile"], "--capture compile is for --task synth, and --task is ptq"),
        ([*tiny, "--clipped-ste"], "--clipped-ste has no effect with --task synth"),
        ([*tiny, *command_line({f"{name}_weight": 0 for name in ("ce", "bn", "tv", "l2")})], "minimises nothing"),
        ([*data, "--task", "kd", "--zoo", "tiny:net"], "--task kd needs --student-arch"),
        (
            [*data, "--task", "synth", "--zoo", "strangers:ViewAndFeatureFlags", "--zoo-sample", 1, "--low-iterations", 2],
            "ViewAndFeatureFlags does not take images of 8 pixels, which the initial iterations have; give --low-iterations 0",
        ),
        *(([*own, "--arch", "tiny:branch", "--task", task], "the model cannot be traced") for task in ("ptq", "qat", "prune")),
        ([*own, "--arch", "tiny:net", "--task", "kd", "--student-arch", "resnet2x"], "--student-arch 'resnet2x' is not known"),
        ([*data, "--task", "transfer"], "--task transfer needs --images"),
        ([*data, "--task", "transfer", "--batch-size", 5], "--batch-size has no effect with --task transfer"),
        (
            [*data, "--task", "transfer", "--targets", "tiny:branch", "--images", "other.npz"],
            "--targets tiny:branch: the model",
        ),
        ([*judging, "--precision", "bf16"], "--task evaluate runs with fp32 only"),
        (["--task", "synth", "--weights", "x.pt"], "no effect with --task synth, which uses the networks of --zoo; give --zoo"),
        (["--task", "synth", "--zoo", "resnet20", "--held-out", "resnet32"], "--held-out has no effect with --zoo and --task"),
        ([*judging, "--zoo", "resnet20", "--held-out", "resnet20"], "--zoo and --held-out both name resnet20"),
        (
            ["--dataset", "folder", "--num-classes", 5, "--image-size", 16, "--task", "transfer", "--images", "other.npz"],
            "has no networks to quantize; give --targets",
        ),
    ]:
        assert words in fails(mixmix.main, *arguments), arguments
    assert all(path.suffix == ".npz" for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="contain NaN or infinity; lower --lr"):
        make_set(config(**TINY, lr=1e30, task="synth"), load_source, invert)
