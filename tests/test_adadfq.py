import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import adadfq
from adadfq import agreement_loss, compress, config, disagreement_loss, entropy, generator_loss, margin_loss, normalised_entropy
from adadfq import student_loss as side_of_the_student
from common.quant import observe, quantize
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
    assert entropy(p - q).tolist() == pytest.approx(h, rel=1e-4)
    assert normalised_entropy(p - q).tolist() == pytest.approx(normalised, rel=1e-4, abs=1e-6)
    ds, agree = plain_cross_entropy(minus, y), plain_cross_entropy(plus, y)  # Eq. 6 and 8
    assert disagreement_loss(p, q, y).item() == pytest.approx(ds, rel=1e-4)
    assert agreement_loss(p, q, y).item() == pytest.approx(agree, rel=1e-4)
    margin = sum(max(0.3 - x, 0) + max(x - 0.6, 0) for x in normalised) / 6
    assert margin > 0.1 and margin_loss(normalised_entropy(p - q), 0.3, 0.6).item() == pytest.approx(margin, rel=1e-4)
    settings = {"lambda_l": 0.3, "lambda_u": 0.6, "alpha_ds": 0.2, "alpha_as": 0.7, "beta": 0.5, "gamma": 2.0}
    bns = torch.tensor(3.0)
    parts = {"no_margin": margin, "no_ds": 0.5 * 0.2 * ds, "no_as": 0.5 * 0.7 * agree, "no_bns": 6.0}
    assert generator_loss(p, q, y, bns, config(**TINY, **settings)).item() == pytest.approx(sum(parts.values()), rel=1e-4)
    for name, part in parts.items():
        loss = generator_loss(p, q, y, bns, config(**TINY, **settings, **{name: True}))
        assert loss.item() == pytest.approx(sum(parts.values()) - part, rel=1e-4)
    gdfq = generator_loss(p, q, y, bns, config(**TINY, generator_loss="gdfq")).item()
    assert gdfq == pytest.approx(plain_cross_entropy(p.double().tolist(), y) + 0.3, rel=1e-4)


def test_the_students_losses_against_the_equations_in_double_precision(logits):
    p, q, y = logits
    minus = (p - q).double().tolist()
    h = [plain_entropy(v) for v in minus]
    expected = sum(1 - (x - min(h)) / (math.log(5) - min(h)) for x in h) / 6  # Eq. 13
    assert side_of_the_student(q, p, y, config(**TINY, student_loss="eq13")).item() == pytest.approx(expected, rel=1e-4)
    softened = -400 * sum(plain_entropy(v, 20) for v in minus) / 6
    released = side_of_the_student(q, p, y, config(**TINY))
    assert released.item() == pytest.approx(softened, rel=1e-4)
    variance = sum(torch.tensor(v).var(correction=0).item() for v in minus) / 6  # for large T, up to a constant
    assert released.item() + 400 * math.log(5) == pytest.approx(variance / 2, rel=0.1)
    log_p, log_q = (F.log_softmax(v.double() / 20, 1) for v in (p, q))
    kd = 400 * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / 30 + F.cross_entropy(q.double(), y)
    gdfq = side_of_the_student(q, p, y, config(**TINY, student_loss="gdfq"))
    torch.testing.assert_close(gdfq.double(), kd, atol=1e-4, rtol=1e-4)


def test_the_generators_gradient_goes_through_the_quantized_student(net):
    student, x = quantize(net, 3, 3), torch.randn(8, 3, 16, 16, requires_grad=True)
    observe(student, True)
    student(x.detach())
    observe(student, False)
    through_both = torch.autograd.grad(disagreement_loss(net(x), student(x), torch.arange(8) % 5), x)[0]
    with_a_constant = torch.autograd.grad(disagreement_loss(net(x), student(x).detach(), torch.arange(8) % 5), x)[0]
    assert not torch.allclose(through_both, with_a_constant) and through_both.abs().sum() > 0


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_one_forward_for_both_sides_equals_two(net, variant, monkeypatch):
    """The second forward is what a compiled step makes; the compiler itself is left out."""
    monkeypatch.setattr(Run, "capture", lambda self, step, *optimizers: step)
    weights = []
    for name in ("none", "compile"):
        cfg = config(**TINY, capture=name, lr_q=0.01, variant=variant)
        student = compress(net, cfg, Run(cfg))
        weights.append(torch.cat([p.flatten() for p in student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)
    before = torch.cat([p.flatten() for p in net.parameters()])
    assert (weights[0] - before).abs().max() > 1e-4


def test_each_side_moves_its_own_network_only(net):
    cfg = config(**TINY | {"epochs": 2, "iters": 1}, lr_g=0.0, student_loss="gdfq", lr_q=0.1)
    moved = compress(net, cfg)
    still = compress(net, config(**TINY | {"epochs": 2, "iters": 1}, lr_q=0.0, weight_decay=0.0))
    assert not torch.equal(moved.fc.weight, net.fc.weight)
    assert all(torch.equal(still.state_dict()[key], value) for key, value in net.state_dict().items())


def test_ablations_change_what_they_name(net):
    names = ("no_ds", "no_as", "no_margin", "no_bns")
    flags = [{}, {"variant": "paper"}, {"generator_loss": "gdfq"}, {"student_loss": "gdfq"}, *({name: True} for name in names)]
    weights = [compress(net, config(**TINY, lr_q=0.05, **flag)).conv1.weight for flag in flags]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    compress(net, config(**TINY, no_ds=True, no_as=True, no_margin=True, no_bns=True))  # a generator that does not learn


def test_every_epoch_tells_how_the_game_stands(net):
    cfg = config(**TINY)
    run = Run(cfg)
    compress(net, cfg, run)
    first, _, last = run.history
    assert first.keys() == {"epoch", "seconds", "loss_g", "bns", "disagreement_samples", "agreement_samples"} | {
        f"h_{name}" for name in ("mean", "q10", "q50", "q90")
    }
    assert {"gain_g", "gain_q", "disagreement", "loss_q"} <= last.keys()
    assert 0 <= last["h_q10"] <= last["h_q50"] <= last["h_q90"] <= 1 and 0 <= last["disagreement"] <= 1
    before = run.history[1]["disagreement"]
    assert before + last["gain_g"] + last["gain_q"] == pytest.approx(last["disagreement"], abs=3e-6)


def test_defaults_are_the_papers_or_the_released_ones():
    def defaults(*argv):
        cfg = adadfq.parse_args(argv)
        return cfg.batch_size, cfg.warmup_epochs, cfg.lr_q, cfg.decay_epochs, cfg.alpha_ds, cfg.lambda_l, cfg.temperature

    assert defaults("--dataset", "cifar100") == (16, 4, 1e-4, [100, 200, 300], 0.2, 0.1, 20)
    imagenet = ["--dataset", "imagenet", "--arch"]
    assert defaults(*imagenet, "resnet50", "--bits", "3") == (16, 100, 1e-4, [150, 300, 400], 0.2, 0.4, 5)
    assert defaults(*imagenet, "resnet18", "--bits", "5") == (16, 50, 1e-5, [350, 400], 0.3, 0.3, 5)
    assert defaults(*imagenet, "mobilenet_v2", "--variant", "paper") == (16, 50, 1e-5, [350], 0.2, 0.1, 5)
    paper = adadfq.parse_args(["--variant", "paper"])
    assert (paper.student_loss, paper.bns_form, paper.beta1) == ("eq13", "sum", 0.9)


def test_unusable_input_ends_with_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, words in [
        (["--lambda-l", 0.9], "--lambda-l is 0.9 and --lambda-u is 0.8; give bounds with 0 <= lambda-l < lambda-u <= 1"),
        (["--lambda-u", 1.1], "--lambda-u is 1.1"),
        (["--lambda-l", -0.1], "--lambda-l is -0.1"),
        (["--batch-size", 1], "--batch-size is 1; H' is relative to the batch's smallest entropy, so give at least 2"),
        (["--epochs", 3], "before any fine-tuning"),
    ]:
        assert words in fails(adadfq.main, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    result = adadfq.main([*tiny, "--arch", "tiny:net", "--out", str(tmp_path / "run"), "--bits", "3"])
    assert 0 <= result["agreement"] <= 100 and (tmp_path / "run" / "samples.png").exists()
