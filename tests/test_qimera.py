import json
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT, FunctionalNet, trained
from test_adadfq import Keeping
from test_data import make_folder
from torch import nn

import qimera
from common import InputError, zaq
from common.bns import BatchNormStatistics
from common.boundaries import path_metrics
from common.data import accuracy
from common.export import load_quantized, save_quantized
from common.models import build
from common.ops import soft_labels, superpose
from common.progress import close_all
from common.quant import quantize, quantized_activations, set_observing
from common.run import Run
from common.trace import last_layer
from qimera import Latent, ReleasedLatent, compress, config, make_labels, single_labels

TINY = {"dataset": "folder", "num_classes": 5, "image_size": 16, "batch_size": 8, "epochs": 3, "iters": 4}
TINY |= {"warmup_epochs": 1, "calibrate_epochs": 1, "device": "cpu", "precision": "fp32"}


def make_superposition(batch=6, k=4, num_classes=9, width=5):
    classes, shares = torch.randint(num_classes, (batch, k)), torch.randn(batch, k).softmax(1).double()
    classes[0, 1] = classes[0, 0]  # a class may come twice
    return classes, shares, torch.randn(num_classes, width, dtype=torch.double, requires_grad=True)


def test_superposition_equals_a_loop_over_samples_and_classes():
    classes, shares, table = make_superposition()
    soft = soft_labels(classes, shares, len(table))
    mixed = superpose(soft, table)
    labels, rows = torch.zeros_like(soft), []
    for i, (row, weights) in enumerate(zip(classes.tolist(), shares)):
        rows.append(sum(weight * table[c] for c, weight in zip(row, weights)))  # Eq. 8
        for c, weight in zip(row, weights):
            labels[i, c] += weight
    torch.testing.assert_close(soft, labels)
    torch.testing.assert_close(mixed, torch.stack(rows))
    upstream = torch.randn_like(mixed)
    gradients = [torch.autograd.grad(x, table, upstream)[0] for x in (mixed, torch.stack(rows))]
    torch.testing.assert_close(*gradients)


def in_double(labels):
    return labels._replace(shares=labels.shares.double(), soft=labels.soft.double())


def standardised(x):
    """By the values of all its elements."""
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("noise, shape", [("after", (6, 3)), ("before", (6, 5)), ("slot", (6, 4, 5))])
def test_the_latent_with_noise_after_or_before_the_mapping_or_in_each_slot(noise, shape, normalise):
    """Eq. 8 sample by sample, Eq. 5 for one class; standardised over the batch, but single classes each by itself."""
    latent, (classes, shares, _) = ReleasedLatent(9, 5, 3, noise, 0.5, normalise=normalise).double(), make_superposition()
    z, rows = latent.draw_noise(classes).double(), latent.embedding.weight
    assert z.shape == shape
    single = F.one_hot(torch.zeros(6, dtype=torch.int64), 4).double()

    def summed(weights, values):
        return sum(weights[:, k, None] * value for k, value in enumerate(values))

    for weights, superposed in ((shares, True), (single, False)):
        over = standardised if superposed else lambda x: torch.stack([standardised(sample) for sample in x])
        over = over if normalise else lambda x: x
        embedded = [rows[classes[:, k]] for k in range(4)]
        if noise == "after":
            expected = over(summed(weights, map(latent.mapping, embedded)) + z)
        elif noise == "before":
            expected = latent.mapping(over(summed(weights, embedded) + z))
        else:
            expected = summed(weights, [latent.mapping(over(e + z[:, k])) for k, e in enumerate(embedded)])
        labels = make_labels(classes, weights, 9, superposed)
        torch.testing.assert_close(latent(labels, z), expected)
        if noise != "slot" and not normalise:  # the paper's
            paper = Latent(9, 5, 3, noise, 0.5).double()
            paper.load_state_dict(latent.state_dict())
            assert torch.equal(paper(labels, z), latent(labels, z)) and paper.draw_noise(classes).shape == shape
    plain = Latent(9, 5, noise=noise) if noise != "slot" else ReleasedLatent(9, 5, None, noise, normalise=False)
    one = single_labels(classes[:, 0], 1, 9)
    assert torch.equal(plain(one, torch.zeros(())), plain.embedding(classes[:, 0])) and plain.out_features == 5


def test_flags_choose_the_latent(net):
    def latent(**flags):
        made = qimera.make_generator(net, config(**TINY, **flags), 3).latent
        return made.noise, made.noise_scale, getattr(made, "normalise", False), made.out_features

    assert latent() == ("after", 1, False, 64) and latent(no_dm=True) == ("after", 1, False, 8)
    assert latent(noise="before", mapped_dim=3, noise_scale=0.5) == ("before", 0.5, False, 3)
    assert latent(variant="released") == ("slot", 1, True, 8)
    assert latent(no_eei=True, latent_dim=6, no_dm=True) == ("after", 1, False, 6)
    assert Latent(9, 500, noise_scale=3.0).draw_noise(torch.zeros(400, 1)).std().item() == pytest.approx(3, rel=0.02)


def test_frozen_embeddings_stay_while_the_generator_learns(net, tmp_path):
    saved = {}
    for name, flags in (("frozen", {"freeze_embeddings": True}), ("trained", {}), ("still", {"lr_g": 0})):
        cfg = config(**TINY, **flags)
        compress(net, cfg, Run(cfg, tmp_path / name))
        saved[name] = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["stateful"]["generator"]
    embedding = {name: state["latent.embedding.weight"] for name, state in saved.items()}
    assert torch.equal(embedding["frozen"], net.fc.weight) and not torch.equal(embedding["trained"], net.fc.weight)
    learned = [name for name in saved["still"] if not torch.equal(saved["frozen"][name], saved["still"][name])]
    assert {"latent.mapping.weight", "latent.mapping.bias", "body.linear.weight", "body.conv3.weight"} <= set(learned)


def test_draws_follow_p_and_equation_9():
    cfg = config(**TINY | {"batch_size": 4000}, k=3, p=0.3)
    torch.manual_seed(0)
    draws = [qimera.draw_labels(cfg, "cpu") for _ in range(200)]
    assert 0.2 < sum(bool(labels.superposed) for labels in draws) / 200 < 0.4
    for labels in draws[:20]:
        torch.testing.assert_close(labels.shares.sum(1), torch.ones(4000))
        torch.testing.assert_close(labels.soft.sum(1), torch.ones(4000))
        assert (labels.shares[:, 1:] == 0).all() != labels.superposed
        assert labels.superposed or torch.equal(labels.soft, F.one_hot(labels.classes[:, 0], 5).float())
    shares = next(labels.shares for labels in draws if labels.superposed)
    log_odds = (shares[:, 0] / shares[:, 1]).log()  # a difference of two standard normals
    assert abs(log_odds.mean()) < 0.1 and abs(log_odds.std() - math.sqrt(2)) < 0.1


def test_conditional_batchnorm_sums_or_averages_the_superposed_rows():
    classes, shares, _ = make_superposition(4, 4, 5)
    shares, z, images = shares.float(), torch.zeros(()), {}
    for cbn in ("sum", "mean"):
        torch.manual_seed(1)
        generator = qimera.make_generator(FunctionalNet(), config(**TINY | {"image_size": 68}, k=4, cbn=cbn), 3).eval()
        images[cbn] = [generator(make_labels(classes, shares, 5, flag), z) for flag in (False, True)]
    assert torch.equal(images["sum"][0], images["sum"][1]) and torch.equal(images["sum"][0], images["mean"][0])
    labels = make_labels(classes, shares, 5)
    assert torch.equal(images["mean"][1], generator.body(generator.latent(labels, z), labels.soft / 4))
    assert not torch.allclose(images["mean"][1], images["sum"][1])
    layer, x = qimera.ConditionalBatchNorm(5, 3), torch.randn(4, 3, 6, 6)
    nn.init.normal_(layer.gamma.weight)
    gamma = torch.stack([sum(s * layer.gamma.weight[c] for c, s in zip(*row)) for row in zip(classes, shares)])
    expected = F.batch_norm(x, None, None, training=True) * gamma[:, :, None, None]
    torch.testing.assert_close(layer(x, labels.soft), expected, atol=1e-5, rtol=1e-4)


def test_embeddings_are_extracted_from_the_last_layer_of_the_graph(net):
    name, weight = last_layer(net)
    assert name == "fc" and torch.equal(weight, net.fc.weight)
    wide = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 5, 1))
    wide.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    assert last_layer(wide)[0] == "4" and torch.equal(last_layer(wide)[1], wide[4].weight[:, :, 0, 0])
    generator = qimera.make_generator(net, config(**TINY), 3)
    assert torch.equal(generator.latent.embedding.weight, net.fc.weight) and generator.latent.out_features == 64
    random = qimera.make_generator(net, config(**TINY, no_eei=True, no_dm=True), 3).latent
    assert random.embedding.weight.shape == net.fc.weight.shape and random.out_features == 8
    assert not torch.equal(random.embedding.weight, net.fc.weight)


@pytest.mark.parametrize("form", ["zaq", "zaq-paper"])
def test_zaq_losses_against_double_precision_formulas(form):
    cfg = config(**TINY, adversarial=form, zaq_beta=0.7, zaq_gamma=0.3, zaq_rho=0.1)
    t, q, soft = torch.randn(6, 5), torch.randn(6, 5), torch.rand(6, 5).softmax(1)
    maps = [[torch.randn(6, 3, 4, 4), torch.randn(6, 8, 2, 2)] for _ in range(2)]
    distances = {"zaq": [], "zaq-paper": []}
    for pair in zip(*maps):
        pair = [one.double().flatten(2) for one in pair]
        cosines = [F.cosine_similarity(*(one.unsqueeze(d) for d in (1, 2)), dim=3) for one in pair]
        distances["zaq-paper"].append((cosines[0] - cosines[1]).abs().mean() / 2)
        units = [one / one.square().sum(1, keepdim=True).sqrt() for one in pair]
        pixels = [(torch.einsum("bci,bcj->bij", x, x).exp(), x) for x in units]  # softmax by its definition
        channels = [((-torch.einsum("bcn,bdn->bcd", x, x)).exp(), x) for x in units]
        by_pixel = [x + 0.1 * torch.einsum("bij,bcj->bci", w / w.sum(2, keepdim=True), x) for w, x in pixels]
        by_channel = [x + 0.1 * torch.einsum("bcd,bdn->bcn", w / w.sum(2, keepdim=True), x) for w, x in channels]
        distances["zaq"] += [(of_t - of_q).abs().mean() for of_t, of_q in (by_pixel, by_channel)]
    distance = sum(distances[form])
    ce = [-(soft.double() * v.double().log_softmax(1)).sum(1).mean() for v in (t, q)]
    game, activation = (t - q).double().abs().mean() + 0.7 * distance, maps[0][1].double().abs().mean()
    loss_g, loss_q = qimera.zaq_losses(t, q, maps, soft, cfg)
    torch.testing.assert_close(loss_g.double(), -game - 0.3 * activation + 0.1 * ce[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss_q.double(), game + 0.1 * ce[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["zaq", "zaq-paper"])
def test_channels_and_pixels_without_activation_leave_the_feature_losses_finite(form):
    maps = torch.rand(2, 3, 4, 4, requires_grad=True)
    dead = (maps * torch.tensor([0.0, 1e-30, 1.0]).view(1, 3, 1, 1), torch.zeros(2, 2, 2, 2) * maps[:, :2, :2, :2])
    zaq.feature_distance(dead, (torch.rand(2, 3, 4, 4), torch.rand(2, 2, 2, 2)), form).backward()
    assert maps.grad.isfinite().all() and 0 < maps.grad.abs().max() < 100


def test_zaq_compares_the_outputs_of_the_stages(net):
    """They are those of the full-precision network's and the student's own layers, at the three lowest resolutions."""
    teacher, x = trained(build("resnet20", 5, 64), 64, steps=2).requires_grad_(False), torch.randn(4, 3, 64, 64)
    student = quantize(teacher, 4, 4)
    set_observing(student, True)
    maps, expected = zaq.FeatureMaps(teacher, student, "relu", x[:2]), []
    for stage in (teacher.layer1, teacher.layer2, teacher.layer3):
        stage.register_forward_hook(lambda module, args, output: expected.append(output))
    torch.testing.assert_close(maps.teacher(x), teacher(x))
    student(x)
    of_teacher, of_student = maps.stages()
    assert [one.shape[1:] for one in of_student] == [(16, 64, 64), (32, 32, 32), (64, 16, 16)]
    torch.testing.assert_close(of_teacher, expected)
    assert all(len(one.unique()) <= 16 for one in of_student) and of_student[0].requires_grad
    maps.clear()
    with torch.no_grad():
        student(x)
    assert maps.kept == ({}, {})
    for network in (tiny.branch(), tiny.plain()):  # cannot be traced; has no BatchNorm
        compress(network, config(**TINY, adversarial="zaq", no_eei=True))
    flat = nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5)).eval()
    with pytest.raises(InputError, match="no feature map that --adversarial could compare; leave the flag out"):
        compress(flat, config(**TINY, adversarial="zaq"))


@pytest.mark.parametrize("form", ["zaq", "zaq-paper"])
def test_zaq_lets_the_generator_part_the_networks_and_the_student_follow(net, form):
    game = {"adversarial": form, "zaq_gamma": 0, "zaq_rho": 0, "epochs": 8, "iters": 8, "calibrate_epochs": 1, "bits": 2}
    game["student_steps"] = 1
    losses = {}
    for side, flags in (("loss_g", {"lr_q": 0, "weight_decay": 0}), ("loss_q", {"lr_g": 0, "lr_q": 0.02})):
        cfg = config(**TINY | game | flags | {"warmup_epochs": 1})
        run = Run(cfg)
        student = compress(net, cfg, run)
        losses[side] = [line[side] for line in run.history[1:]]  # the ranges are fixed from the second epoch on
        assert all(act.seen for _, act in quantized_activations(student))
        assert torch.equal(student.fc.weight, net.fc.weight) == (side == "loss_g")
    assert losses["loss_g"][-1] < losses["loss_g"][0] < 0  # minus the distance
    assert losses["loss_q"][-1] < losses["loss_q"][0]


class Stopping:
    """One batch of test images; the second evaluation is interrupted."""

    def __init__(self, stops):
        self.batch, self.left = (torch.randn(40, 3, 16, 16), torch.arange(40) % 5), 2 if stops else math.inf

    def __iter__(self):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        yield self.batch


def test_the_students_batchnorms_learn_in_zaqs_released_form(net, tmp_path):
    """Six passes in train mode for a step of the generator; evaluated, saved and resumed with what they have learned."""
    cfg = {"adversarial": "zaq", "warmup_epochs": 0, "lr_q": 0.01, "eval_every": 1}
    students = []
    for name, stops in (("whole", False), ("stopped", True), ("stopped", False)):
        torch.manual_seed(0)
        run = Run(config(**TINY | cfg, resume=True), tmp_path / name)
        run.test_set = test_set = Stopping(stops)
        if stops:
            with pytest.raises(KeyboardInterrupt):
                compress(net, run.cfg, run)
            close_all()
            continue
        students.append(compress(net, run.cfg, run))
    whole, resumed = (student.state_dict() for student in students)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert whole["bn1.num_batches_tracked"] - net.bn1.num_batches_tracked == 3 * 4 * (1 + 5)
    assert not torch.equal(whole["bn1.running_mean"], net.bn1.running_mean)
    student, images = students[0], test_set.batch[0]
    assert not student.training and run.results["last_top1"] == round(accuracy(student, test_set), 2)
    meta = {"arch": None, "num_classes": 5, "image_size": 16, "channels": 3, "wbits": 4, "abits": 4, "act_placement": "relu"}
    save_quantized(student, tmp_path / "quantized.pt", meta)
    assert torch.equal(load_quantized(tmp_path / "quantized.pt", net)(images), student(images))
    fixed = compress(net, config(**TINY | cfg | {"adversarial": "zaq-paper"}))
    assert torch.equal(fixed.bn1.running_mean, net.bn1.running_mean)


def test_losses_of_soft_labels_against_double_precision_formulas():
    q, t, soft, cfg = torch.randn(6, 5), 3 * torch.randn(6, 5), torch.randn(6, 5).softmax(1), config(**TINY, kd_weight=0.5)
    ce = [-(soft.double() * v.double().log_softmax(1)).sum(1).mean() for v in (t, q)]
    log_p, log_q = ((v.double() / 20).log_softmax(1) for v in (t, q))
    kd = 400 * (log_p.exp() * (log_p - log_q)).sum() / 30  # mean over samples and classes
    loss = qimera.generator_loss(t, soft, torch.tensor(3.0), cfg)
    torch.testing.assert_close(loss.double(), ce[0] + 0.3, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(qimera.student_loss(q, t, soft, cfg).double(), ce[1] + 0.5 * kd, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["gdfq", "sum"])
def test_first_generator_step_equals_one_computed_by_hand(net, form):
    cfg = config(**TINY | {"epochs": 1, "iters": 1, "warmup_epochs": 0, "seed": 5}, p=1, bns_form=form)
    run = Keeping(cfg)
    compress(net, cfg, run)
    torch.manual_seed(5)
    generator, stats = qimera.make_generator(net, cfg, 3), BatchNormStatistics(net)
    classes, _, shares = torch.randint(5, (8, 2)), torch.rand(()), torch.randn(8, 2).softmax(1)
    labels = make_labels(classes, shares, 5)
    optimizer = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999))
    (F.cross_entropy(net(generator(labels)), labels.soft) + 0.1 * stats.loss(form)).backward()
    optimizer.step()
    for ours, plain in zip(run.parts["generator"].parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-4, rtol=1e-3)


def test_first_student_step_equals_one_computed_by_hand(net):
    once = {"epochs": 1, "iters": 1, "warmup_epochs": 0, "lr_q": 0.1, "weight_decay": 0, "seed": 5, "p": 1}
    cfg = config(**TINY | once)
    student = compress(net, cfg)
    torch.manual_seed(5)
    generator, reference = qimera.make_generator(net, cfg, 3), quantize(net, 4, 4)
    classes, _, shares = torch.randint(5, (8, 2)), torch.rand(()), torch.randn(8, 2).softmax(1)
    soft = (F.one_hot(classes, 5) * shares[:, :, None]).sum(1)  # Eq. 7
    x = generator(make_labels(classes, shares, 5)).detach()
    set_observing(reference, True)
    q, p = reference(x), net(x).detach()
    kd = 400 * F.kl_div((q / 20).log_softmax(1), (p / 20).softmax(1), reduction="sum") / 40
    (F.cross_entropy(q, soft) + kd).backward()
    expected = net.fc.weight - 0.1 * 1.9 * reference.fc.weight.grad  # Nesterov's first step
    torch.testing.assert_close(student.fc.weight.detach(), expected, atol=1e-6, rtol=1e-4)


def test_further_student_steps_take_images_of_their_own(net, monkeypatch):
    seen, loss = [], qimera.student_loss
    monkeypatch.setattr(qimera, "student_loss", lambda q, t, *rest: seen.append(t) or loss(q, t, *rest))
    compress(net, config(**TINY, student_steps=3))
    assert len(seen) == 2 * 4 * 3 and len({tuple(t.flatten().tolist()) for t in seen}) == len(seen)
    assert not any(t.requires_grad for t in seen)  # no graph to the generator


def test_ablations_and_differences_change_what_they_name(net):
    released = config(**TINY, variant="released")
    assert (released.dm, released.eei, released.noise, released.normalise, released.cbn) == (False, False, "slot", True, "mean")
    paper = config(**TINY)
    assert (paper.dm, paper.eei, paper.noise, paper.normalise, paper.cbn) == (True, True, "after", False, "sum")
    both = config(**TINY, variant="released", dm=True, noise="before", normalise=False)
    assert (both.dm, both.eei, both.noise, both.normalise) == (True, False, "before", False)
    flags = [{}, {"no_se": True}, {"no_dm": True}, {"no_eei": True}, {"normalise": True}, {"k": 5}, {"p": 1}]
    flags += [{"noise": "slot"}, {"noise": "before"}, {"noise_scale": 2}, {"freeze_embeddings": True}]
    weights = [compress(net, config(**TINY, lr_q=0.05, **flag)).conv1.weight for flag in flags]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_defaults_are_the_papers_and_the_run_tables():
    def defaults(*argv):
        cfg = qimera.parse_args(argv)
        return cfg.batch_size, cfg.lr_q, cfg.p, cfg.k, cfg.eei, cfg.mapped_dim

    assert defaults("--dataset", "cifar10") == (64, 1e-4, 0.4, 2, True, 64)
    assert defaults("--dataset", "cifar100") == (64, 1e-4, 0.4, 10, True, 64)
    assert defaults("--dataset", "cifar100", "--bits", "5") == (64, 1e-4, 0.4, 50, True, 64)
    assert defaults("--dataset", "imagenet", "--arch", "resnet50") == (16, 1e-4, 0.7, 500, True, 100)
    assert defaults("--dataset", "imagenet", "--bits", "5", "--variant", "released") == (16, 1e-6, 0.4, 100, False, 100)
    assert defaults("--dataset", "cifar10", "--variant", "released")[:2] == (200, 1e-4)

    def schedule(*argv):
        cfg = qimera.parse_args(argv)
        found = cfg.epochs, cfg.iters, cfg.batch_size, cfg.warmup_epochs, cfg.calibrate_epochs, cfg.lr_q, cfg.weight_decay
        return (*found, cfg.student_steps), (cfg.zaq_beta, cfg.zaq_gamma, cfg.zaq_rho)

    plain = (400, 200, 64, 4, 4, 1e-4, 1e-4, 1)
    assert schedule() == (plain, (None, None, 0.1))
    assert schedule("--adversarial", "zaq-paper") == (plain, (0.1, 0.05, 0.1))
    assert schedule("--adversarial", "zaq", "--iters", "9") == ((300, 9, 256, 0, 300, 0.1, 5e-4, 5), (1, 0.1, 0.1))


def test_path_metrics_of_known_paths():
    t = torch.linspace(0, 1, 101)[:, None]
    logits = torch.tensor([5.0, 2.0, 1.0, 0.0]).expand(101, 4)
    ratio, intrusion = path_metrics(torch.cat([3 * t, 4 * t], 1), logits, (0, 1))
    assert ratio.item() == pytest.approx(1, abs=1e-5)
    others = (math.exp(1) + 1) / (math.exp(5) + math.exp(2) + math.exp(1) + 1)
    assert intrusion.item() == pytest.approx(others, rel=1e-5)
    half_circle = torch.cat([torch.cos(math.pi * t), torch.sin(math.pi * t)], 1)
    assert path_metrics(half_circle, logits, (0, 1))[0].item() == pytest.approx(math.pi / 2, rel=1e-3)


def test_a_run_and_its_analysis(tmp_path, monkeypatch, fails, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    data, run = make_folder(tmp_path / "data", 5, images=4, size=16), tmp_path / "run"
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    qimera.main([*tiny, "--arch", "tiny:net", "--out", str(run), "--data-dir", str(data)])
    drawn = []

    def noted(classes, *rest, **of_single):
        drawn.extend([] if of_single else [classes])
        return make_labels(classes, *rest, **of_single)

    monkeypatch.setattr(qimera, "make_labels", noted)
    result = qimera.main(["--analyze", str(run), "--arch", "tiny:net"])
    assert json.loads((run / "analysis" / "qimera.json").read_text()) == result and result["pairs"] == 10
    assert all(result[name]["distance_ratio"] >= 0.999 for name in ("zero", "shared", "mixup"))
    arrays = np.load(run / "analysis" / "qimera.npz")
    assert arrays["single"].shape == (2000, 2) and arrays["superposed"].shape == (500, 2) and arrays["real"].shape == (20, 2)
    zero, mixup = arrays["path_zero"], arrays["path_mixup"]  # pairs in the order (0, 1), (0, 2), ..., (3, 4)
    assert zero.shape == (10, 101, 2) and mixup.shape == (40, 101, 2) == arrays["path_shared"].shape
    np.testing.assert_allclose(zero[0, 0], zero[1, 0], atol=1e-5)  # without noise, a class is one point
    np.testing.assert_allclose(zero[0, -1], zero[4, 0], atol=1e-5)
    assert not np.allclose(mixup[0, 0], mixup[1, 0], atol=1e-3)
    pairs = torch.cat(drawn[:5])  # the superposed points of Figure 3 are of different classes
    assert len(pairs) == 500 and {tuple(p) for p in pairs.tolist()} == {(a, b) for a in range(5) for b in range(5) if a != b}
    printed = capsys.readouterr().out
    assert "10 paths between classes" in printed and "analysis/: qimera.json, qimera.npz" in printed
    assert "give --arch tiny:net, if you trust that code" in fails(qimera.main, "--analyze", run)
    assert "--check has no effect with --analyze" in fails(qimera.main, "--analyze", run, "--check")
    assert "--dm has no effect with --analyze" in fails(qimera.main, "--analyze", run, "--no-dm")
    assert "is not a run folder" in fails(qimera.main, "--analyze", tmp_path)


def test_unusable_input_ends_with_one_sentence(tmp_path, fails, monkeypatch, net):
    monkeypatch.chdir(tmp_path)
    for arguments, words in [
        (["--k", 11], "--k is 11 and there are 10 classes; give 1 to 10"),
        (["--k", 0], "give a whole number from 1"),
        (["--p", 1.5], "give a number from 0 to 1"),
        (["--no-se", "--k", 3], "--k has no effect with --no-se"),
        (["--no-se", "--cbn", "mean"], "--cbn has no effect with --no-se"),
        (["--latent-dim", 7], "--latent-dim is 7, and extracted embeddings have their own; give --no-eei with it"),
        (["--no-dm", "--mapped-dim", 8], "--mapped-dim is 8 and there is no disentanglement mapping; give --dm with it"),
        (["--variant", "released", "--mapped-dim", 8], "--mapped-dim is 8 and there is no disentanglement mapping"),
        (["--cbn", "mean"], "--cbn is mean and the generator of small images has no conditional BatchNorm; leave it out"),
        (["--zaq-rho", 1], "--zaq-rho has no effect with --adversarial none"),
        (["--adversarial", "zaq", "--temperature", 4], "--temperature has no effect with --adversarial zaq"),
        (["--analyze", ""], "is not a run folder"),
        (["--epochs", 3], "before any fine-tuning"),
    ]:
        assert words in fails(qimera.main, *arguments)
    assert not list(tmp_path.iterdir())
    net.fc = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))
    with pytest.raises(qimera.InputError, match=r"last layer of the model is 'fc.1' \(BatchNorm1d\).*give --no-eei"):
        compress(net.eval(), config(**TINY))
    compress(net, config(**TINY, no_eei=True))
    net.fc = nn.Linear(8, 1)
    with pytest.raises(qimera.InputError, match="has 1 rows, expected one for each of the 5 classes"):
        qimera.make_generator(net, config(**TINY), 3)
