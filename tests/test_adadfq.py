import math
import shlex

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import adadfq
import gdfq
from adadfq import (
    compress,
    config,
    entropy,
    game_figures,
    generator_loss,
    loss_as,
    loss_ds,
    margin_loss,
    normalised_entropy,
    similarity,
)
from adadfq import student_loss as side_of_the_student
from common import capture
from common.bns import BatchNormStatistics
from common.quant import quantize, set_observing
from common.report import draw_images
from common.run import Run

TINY = {"dataset": "folder", "num_classes": 5, "image_size": 16, "batch_size": 8, "epochs": 3, "iters": 4}
TINY |= {"warmup_epochs": 1, "calibrate_epochs": 1, "device": "cpu", "precision": "fp32"}


def plain_entropy(v, temperature=1.0):
    """Eq. 2 in Python floats, one row."""
    weights = [math.exp(x / temperature) for x in v]
    p = [w / sum(weights) for w in weights]
    return sum(x * math.log(1 / x) for x in p)


def plain_cross_entropy(rows, y):
    return sum(math.log(sum(math.exp(x) for x in v)) - v[c] for v, c in zip(rows, y)) / len(y)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(6, 5) * 2, torch.randn(6, 5) * 2, torch.randint(5, (6,))


def test_losses_against_the_equations_in_double_precision(logits):
    p, q, y = logits
    minus, plus = (p - q).double().tolist(), (p + q).double().tolist()
    h = [plain_entropy(v) for v in minus]
    normalised = [(x - min(h)) / (math.log(5) - min(h)) for x in h]  # Eq. 3
    assert entropy(p, q).tolist() == pytest.approx(h, rel=1e-4)
    assert normalised_entropy(p, q).tolist() == pytest.approx(normalised, rel=1e-4, abs=1e-6)
    ds, agree = plain_cross_entropy(minus, y), plain_cross_entropy(plus, y)  # Eq. 6 and 8
    assert loss_ds(p, q, y).item() == pytest.approx(ds, rel=1e-4)
    assert loss_as(p, q, y).item() == pytest.approx(agree, rel=1e-4)
    margin = sum(max(0.3 - x, 0) + max(x - 0.6, 0) for x in normalised) / 6
    assert margin > 0.1 and margin_loss(normalised_entropy(p, q), 0.3, 0.6).item() == pytest.approx(margin, rel=1e-4)
    settings = {"lambda_l": 0.3, "lambda_u": 0.6, "alpha_ds": 0.2, "alpha_as": 0.7, "beta": 0.5, "gamma": 2.0}
    bns = torch.tensor(3.0)
    parts = {"no_margin": margin, "no_ds": 0.5 * 0.2 * ds, "no_as": 0.5 * 0.7 * agree, "no_bns": 6.0}
    assert generator_loss(p, q, y, bns, config(**TINY, **settings)).item() == pytest.approx(sum(parts.values()), rel=1e-4)
    for name, part in parts.items():
        cfg = config(**TINY, **settings)
        setattr(cfg, name, True)  # the command line refuses the weight of a term that is left out
        loss = generator_loss(p, q, y, bns, cfg)
        assert loss.item() == pytest.approx(sum(parts.values()) - part, rel=1e-4)
    gdfq = generator_loss(p, q, y, bns, config(**TINY, generator_loss="gdfq")).item()
    assert gdfq == pytest.approx(plain_cross_entropy(p.double().tolist(), y) + 0.3, rel=1e-4)


def test_the_students_losses_against_the_equations_in_double_precision(logits):
    p, q, y = logits
    minus = (p - q).double().tolist()
    h = [plain_entropy(v) for v in minus]
    expected = sum(1 - (x - min(h)) / (math.log(5) - min(h)) for x in h) / 6  # Eq. 13
    assert side_of_the_student(p, q, y, config(**TINY, student_loss="eq13")).item() == pytest.approx(expected, rel=1e-4)
    softened = -400 * sum(plain_entropy(v, 20) for v in minus) / 6
    released = side_of_the_student(p, q, y, config(**TINY))
    assert released.item() == pytest.approx(softened, rel=1e-4)
    variance = sum(torch.tensor(v).var(correction=0).item() for v in minus) / 6  # for large T, up to a constant
    assert released.item() + 400 * math.log(5) == pytest.approx(variance / 2, rel=0.1)
    log_p, log_q = (F.log_softmax(v.double() / 20, 1) for v in (p, q))
    kd = 400 * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / 30 + F.cross_entropy(q.double(), y)
    gdfq = side_of_the_student(p, q, y, config(**TINY, student_loss="gdfq"))
    torch.testing.assert_close(gdfq.double(), kd, atol=1e-4, rtol=1e-4)


def test_no_sample_gains_by_parting_from_the_teacher(logits):
    """A small step down Eq. 13 raises every sample's entropy, that of the batch's minimum included."""
    p, q, y = logits
    free = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(side_of_the_student(p, free, y, config(**TINY, student_loss="eq13")), free)
    before, after = entropy(p, q), entropy(p, q - 0.1 * grad)
    assert (after > before).all()
    others = torch.arange(6) != before.argmin()
    (grad,) = torch.autograd.grad(normalised_entropy(p, free)[others].sum(), free)
    assert grad[~others].abs().sum() > 0  # in the generator's hinges the minimum has a gradient


def test_normalised_entropy_stays_between_its_bounds_where_both_networks_agree():
    for spread in (1e-6, 1e-4, 1e-3, 1.0):
        z_p = spread * torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))
        h = normalised_entropy(z_p, torch.zeros(16, 1000))
        assert h.min() == 0 and h.max() <= 1 + 1e-5


def test_game_figures_of_logits_made_by_hand():
    z_p = 5 * F.one_hot(torch.tensor([0, 1, 2, 3, 4, 1]), 5).float()
    z_q = 4 * F.one_hot(torch.tensor([0, 2, 2, 4, 0, 1]), 5).float()
    z_q[0] = z_p[0]  # the only sample on which nothing differs
    figures = game_figures(z_p, z_q, torch.tensor([0, 1, 2, 3, 0, 0]))
    assert figures["as_samples"] == pytest.approx(2 / 6)  # samples 0 and 2; of sample 5 both say 1, which is wrong
    assert figures["ds_samples"] == pytest.approx(2 / 6)  # samples 1 and 3; the teacher does not say 0 of sample 4
    h = normalised_entropy(z_p, z_q).sort().values
    names = ("h_q10", "h_q50", "h_q90", "h_mean")
    assert [figures[name] for name in names] == [h[0], h[2], h[4], h.mean()] and h[5] == pytest.approx(1)
    assert figures["train_loss"] == pytest.approx(plain_cross_entropy(z_q.double().tolist(), [0, 1, 2, 3, 0, 0]), rel=1e-5)


def test_similarity_is_the_l1_norm_between_disagreements(logits):
    p, q, _ = logits
    rows = []
    for v in (p - q).double().tolist():
        weights = [math.exp(x) for x in v]
        rows.append([w / sum(weights) for w in weights])
    l1 = [[sum(abs(a - b) for a, b in zip(one, other)) for other in rows] for one in rows]
    torch.testing.assert_close(similarity(p, q), torch.tensor(l1), atol=1e-5, rtol=1e-4)


class Keeping(Run):
    """Keeps what the loop works on."""

    def epochs(self, count, student, synthesize, **rest):
        self.parts = rest
        self.first = [p.clone() for p in rest["generator"].parameters()]
        return super().epochs(count, student, synthesize, **rest)


@pytest.mark.parametrize("bits, form", [(2, "gdfq"), (8, "sum")])
def test_first_generator_step_equals_one_computed_by_hand(net, bits, form):
    """Its loss goes through the teacher and through the student, whose ranges the same forward sets."""
    cfg = config(**TINY | {"epochs": 1, "iters": 1, "warmup_epochs": 0}, bits=bits, seed=5, bns_form=form)
    run = Keeping(cfg)
    compress(net, cfg, run)
    torch.manual_seed(5)
    generator, student, stats = adadfq.Generator(5, 16), quantize(net, bits, bits), BatchNormStatistics(net)
    y = torch.randint(5, (8,))
    x = generator(torch.randn(8, 100), y)
    set_observing(student, True)
    z_p, z_q = net(x), student(x)
    optimizer, bns = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999)), stats.loss(form)
    unopposed = generator_loss(z_p, z_q.detach(), y, bns, cfg)  # without the graph through the student
    (gradient,) = torch.autograd.grad(unopposed, generator.conv3.weight, retain_graph=True)
    generator_loss(z_p, z_q, y, bns, cfg).backward()
    assert not torch.allclose(generator.conv3.weight.grad, gradient)
    optimizer.step()
    for ours, plain in zip(run.parts["generator"].parameters(), generator.parameters()):
        torch.testing.assert_close(ours, plain, atol=2e-4, rtol=1e-3)  # Adam's first step is the gradient's sign


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_one_forward_for_both_sides_equals_two(net, variant, monkeypatch):
    """The second forward is what a compiled step makes; the compiler itself is left out. Epoch 0 calibrates and tunes."""
    monkeypatch.setattr(Run, "capture", lambda self, step, *optimizers: step)
    monkeypatch.setattr(capture, "compiler", lambda *_: "g++")
    weights = []
    for name in ("none", "compile"):
        cfg = config(**TINY | {"warmup_epochs": 0}, capture=name, lr_q=0.01, variant=variant)
        student = compress(net, cfg, Run(cfg))
        weights.append(torch.cat([p.flatten() for p in student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)
    before = torch.cat([p.flatten() for p in net.parameters()])
    assert (weights[0] - before).abs().max() > 1e-4


def test_each_side_moves_its_own_network_and_has_its_own_gain(net):
    def play(**rates):
        cfg = config(**TINY, student_loss="gdfq", weight_decay=0.0, **rates)
        run = Keeping(cfg)
        student = compress(net, cfg, run)
        moved = any(not torch.equal(a, b) for a, b in zip(run.first, run.parts["generator"].parameters()))
        return student, moved, run.history[-1]

    student, moved, last = play(lr_g=0.0, lr_q=0.1)
    assert not torch.equal(student.fc.weight, net.fc.weight) and not moved
    assert last["gain_g"] == 0 != last["gain_q"]
    student, moved, last = play(lr_g=1e-3, lr_q=0.0)
    assert all(torch.equal(student.state_dict()[key], value) for key, value in net.state_dict().items()) and moved
    assert last["gain_q"] == 0 != last["gain_g"]


def test_large_images_use_the_large_generator_which_is_gdfqs(net):
    torch.manual_seed(0)
    ours, theirs = adadfq.Generator(3, 68), gdfq.Generator(3, 68)
    theirs.load_state_dict(ours.state_dict())
    torch.nn.init.normal_(ours.bn1.gamma.weight)
    z, y = torch.randn(4, 100), torch.tensor([0, 1, 2, 2])
    assert not torch.equal(ours(z, y), theirs(z, y))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(z, y), theirs(z, y)) and not torch.equal(ours(z, y), ours(z, y.flip(0)))
    cfg = config(**TINY | {"image_size": 68, "iters": 1, "batch_size": 2, "warmup_epochs": None}, no_finetune=True)
    run = Keeping(cfg)
    compress(net, cfg, run)
    assert run.parts["generator"].embedding is None


def test_ablations_change_what_they_name(net):
    names = ("no_ds", "no_as", "no_margin", "no_bns")
    flags = [{}, {"variant": "paper"}, {"generator_loss": "gdfq"}, {"student_loss": "gdfq"}, *({name: True} for name in names)]
    short = TINY | {"epochs": 2, "iters": 2}
    weights = [compress(net, config(**short, lr_q=0.05, **flag)).conv1.weight for flag in flags]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    compress(net, config(**short, no_ds=True, no_as=True, no_margin=True, no_bns=True))  # a generator that does not learn


def test_every_epoch_tells_how_the_game_stands(net):
    cfg = config(**TINY)
    run = Run(cfg)
    compress(net, cfg, run)
    first, _, last = run.history
    assert first.keys() == {"epoch", "seconds", "loss_g", "bns", "train_loss", "ds_samples", "as_samples"} | {
        f"h_{name}" for name in ("mean", "q10", "q50", "q90")
    }
    assert {"gain_g", "gain_q", "disagreement", "loss_q"} <= last.keys()
    assert 0 <= last["h_q10"] <= last["h_q50"] <= last["h_q90"] <= 1 and 0 <= last["disagreement"] <= 1
    before = run.history[1]["disagreement"]
    assert before + last["gain_g"] + last["gain_q"] == pytest.approx(last["disagreement"], abs=3e-6)
    student, x = quantize(net, 2, 2), draw_images(run, torch.arange(256) % 5, 0)
    set_observing(student, True)
    student(x)
    set_observing(student, False)
    with torch.no_grad():
        rows = (net(x) - student(x)).double().tolist()
    expected = 1 - sum(map(plain_entropy, rows)) / 256 / math.log(5)
    assert adadfq.disagreement(run, net, net, student) == pytest.approx([0, expected], abs=1e-6)


def test_defaults_are_the_papers_or_the_released_ones():
    def defaults(*argv):
        cfg = adadfq.parse_args(argv)
        return cfg.batch_size, cfg.warmup_epochs, cfg.lr_q, cfg.decay_epochs, cfg.alpha_ds, cfg.lambda_l, cfg.temperature

    assert defaults("--dataset", "cifar100") == (16, 4, 1e-4, [100, 200, 300], 0.2, 0.1, 20)
    table = {  # as released: three, four and five bits
        "resnet18": [(50, 1e-5, [350, 400], a, low) for a, low in ((0.2, 0.1), (0.2, 0.3), (0.3, 0.3))],
        "mobilenet_v2": [(50, 1e-5, [350, 400], a, 0.1) for a in (0.2, 0.3, 0.2)],
        "resnet50": [
            (100, 1e-4, [150, 300, 400], 0.2, 0.4), (50, 1e-4, [200, 300, 400], 0.1, 0.3), (50, 1e-4, [350, 400], 0.2, 0.3)
        ],
    }  # fmt: skip
    for arch, rows in table.items():
        for bits, row in zip("345", rows):
            assert defaults("--dataset", "imagenet", "--arch", arch, "--bits", bits) == (16, *row, 5)
    assert defaults("--dataset", "imagenet", "--variant", "paper") == (16, 50, 1e-5, [350], 0.2, 0.1, 5)
    for variant, expected in {"released": ("entropy-t", "gdfq", 0.5), "paper": ("eq13", "sum", 0.9)}.items():
        cfg = adadfq.parse_args(["--variant", variant])
        assert (cfg.student_loss, cfg.bns_form, cfg.beta1) == expected
    sg = adadfq.parse_args("--alpha-ds 0.1 --alpha-as 0.1 --lambda-l 0.3".split())  # AdaSG as its code has it
    assert (sg.alpha_ds, sg.alpha_as, sg.beta, sg.gamma, sg.lambda_l, sg.lambda_u) == (0.1, 0.1, 1, 1, 0.3, 0.8)
    assert "`--alpha-ds 0.1 --alpha-as 0.1 --lambda-l 0.3`" in adadfq.__doc__
    cell = adadfq.parse_args(["--lambda-l", "0.5", "--lambda-u", "0.5"])  # of Figure 4(a)
    assert cell.lambda_l == cell.lambda_u == 0.5


def test_unusable_input_ends_with_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, words in [
        (["--lambda-l", 0.9], "--lambda-l is 0.9 and --lambda-u is 0.8; give bounds with 0 <= lambda-l <= lambda-u <= 1"),
        (["--lambda-u", 1.1], "--lambda-u is 1.1"),
        (["--lambda-l", -0.1], "--lambda-l is -0.1"),
        (["--batch-size", 1], "--batch-size is 1; H' is relative to the batch's smallest entropy, so give at least 2"),
        (["--epochs", 3], "before any fine-tuning"),
        (["--student-loss", "eq13", "--temperature", 5], "--temperature is 5.0 and --student-loss eq13 has none"),
        (["--variant", "paper", "--temperature", 5], "--temperature is 5.0 and --student-loss eq13 has none"),
        (["--generator-loss", "gdfq", "--no-bns"], "--no-bns has no effect with --generator-loss gdfq; leave one of them out"),
        (["--no-as", "--alpha-as", 0.1], "--alpha-as has no effect with --no-as; leave one of them out"),
        (["--no-ds", "--no-as", "--beta", 2], "--beta has no effect with --no-ds and --no-as"),
        (["--no-margin", "--lambda-u", 0.8], "--lambda-u has no effect with --no-margin"),
        (["--no-ds", "--no-as", "--no-margin", "--no-bns", "--lr-g", 1], "--lr-g has no effect with --no-ds and --no-as and"),
        (["--dataset", "folder", "--num-classes", 1, "--image-size", 8], "--num-classes is 1; give a whole number of"),
    ]:
        assert words in fails(adadfq.main, *arguments)
    assert not list(tmp_path.iterdir())


def test_the_readmes_first_command_as_printed_but_shorter(tmp_path, monkeypatch):
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "bin/python adadfq.py" in line]
    monkeypatch.chdir(tmp_path)
    shorter = "--epochs 2 --iters 2 --warmup-epochs 1 --calibrate-epochs 1 --device cpu --out run".split()
    result = adadfq.main([*shlex.split(line.partition("adadfq.py")[2]), *shorter])
    assert (result["fp_top1"], result["images"], result["wbits"]) == (92.7, 2000, 3)
    assert result["arguments"]["schedule"] == "short" and result["last_top1"] > 20
    assert (tmp_path / "run" / "samples.png").exists()
