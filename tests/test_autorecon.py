import copy
import json
import math
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import autorecon
import gdfq
import qimera
from autorecon import (
    CANDIDATES,
    EDGES,
    INTO,
    Architecture,
    Generator,
    compress,
    config,
    derive,
    generator_cost,
    read_genotype,
    search,
)
from common import InputError, genotypes
from common.bns import BatchNormStatistics
from common.genotypes import PUBLISHED, draw
from common.models import build, load_teacher
from common.ops import plain_forms
from common.run import Run

TINY = {"dataset": "folder", "num_classes": 5, "image_size": 16, "batch_size": 4, "epochs": 3, "iters": 2, "scale": 0.125}
TINY |= {"warmup_epochs": 1, "calibrate_epochs": 1, "device": "cpu", "precision": "fp32"}
SEARCH = {"search_epochs": 3, "search_iters": 1, "arch_iters": 1, "lr_alpha": 0.05}
UNQUANTIZED = {name: value for name, value in TINY.items() if name != "calibrate_epochs"}
from_short, to_short = (partial(function, edges=EDGES) for function in (genotypes.from_short, genotypes.to_short))
STAGE_1 = {name: TINY[name] for name in ("dataset", "num_classes", "image_size", "batch_size", "scale", "device")}


@pytest.fixture
def on_the_command_line(monkeypatch):
    """`tiny:net` is found."""
    monkeypatch.syspath_prepend(ROOT / "tests")


def command_line(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def test_the_search_space_is_the_papers():
    counts = [sum(edge.kind == kind for edge in EDGES.values()) for kind in ("up", "normal", "cross")]
    assert counts == [6, 15, 12] and [len(CANDIDATES[kind]) for kind in ("up", "normal", "cross")] == [2, 7, 3]
    assert INTO["B1-N5"] == ["B1-N2 -> B1-N5", "B1-N3 -> B1-N5", "B1-N4 -> B1-N5"]
    assert INTO["B3-N4"] == [f"{node} -> B3-N4" for node in ("B3-N2", "B3-N3", "B2-N2", "B2-N3", "B2-N4")]
    generator = Generator(from_short(PUBLISHED["resnet20-cifar10"]), 10)
    linears = sum(p.numel() for p in generator.linears.parameters())
    assert linears == (33 + 1) * 64 * 4**2 + (33 + 1) * 64 * 8**2 + (34 + 1) * 64 * 16**2
    assert generator(torch.randn(2, 100), torch.tensor([1, 2])).shape == (2, 3, 32, 32)


def test_the_published_genotypes_read_as_in_their_table():
    """As published: up edges N1->N2, N1->N3 by block; c0 ... c4; cross edges N2, N3, N4 -> N4, then -> N5."""
    cifar = from_short(PUBLISHED["resnet20-cifar10"])
    expected = {
        "B2-N1 -> B2-N3": "nearest", "B3-N1 -> B3-N2": "bilinear", "B3-N1 -> B3-N3": "nearest",
        "B1-N2 -> B1-N4": "dilated5x5", "B1-N3 -> B1-N4": "none", "B1-N3 -> B1-N5": "dilated3x3", "B1-N4 -> B1-N5": "conv5x5",
        "B2-N2 -> B2-N5": "conv3x3", "B3-N2 -> B3-N5": "conv1x1", "B3-N3 -> B3-N5": "conv5x5",
        "B1-N4 -> B2-N4": "bilinear", "B1-N2 -> B2-N5": "none", "B1-N4 -> B2-N5": "nearest",
        "B2-N4 -> B3-N4": "nearest", "B2-N2 -> B3-N5": "bilinear",
    }  # fmt: skip
    assert {name: cifar[name] for name in expected} == expected
    mobile = from_short(PUBLISHED["mobilenet_v2-imagenet"])
    assert (
        mobile["B3-N1 -> B3-N2"] == "nearest"
        and mobile["B2-N2 -> B2-N4"] == "conv5x5"
        and mobile["B2-N3 -> B3-N4"] == "nearest"
    )


def plainly(generator, z, y):
    """The generator's images with every edge worked out by itself, as METHODS and Figure 2 have them: interpolation first,
    each edge with a BatchNorm of its own."""

    def conditional(x, norm):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        gamma, beta = (table.weight[y][:, :, None, None] for table in (norm.gamma, norm.beta))
        return F.leaky_relu(gamma * (x - mean) / torch.sqrt(variance + 0.8) + beta, 0.2)

    def edge(source, target):
        name = f"{source} -> {target}"
        op, x = generator.genotype[name], values[source]
        if op in ("none", "identity"):
            return x if op == "identity" else 0.0
        if op in ("nearest", "bilinear"):
            x = F.interpolate(x, scale_factor=2, mode=op)
        operation = generator.operations[name][op]
        padding = {"conv1x1": 0, "conv3x3": 1, "conv5x5": 2, "dilated3x3": 2, "dilated5x5": 4}.get(op, 0)
        dilation = 2 if op.startswith("dilated") else 1
        return F.conv2d(conditional(x, operation.norm), operation.conv.weight, operation.conv.bias, 1, padding, dilation)

    values, first = {}, 0
    for block, part in enumerate(z.split((33, 33, 34), 1), start=1):
        n = [None, *(f"B{block}-N{i}" for i in range(1, 6))]
        side = 2 * 2 ** (block - 1)
        values[n[1]] = generator.linears[block - 1](part).view(len(z), -1, side, side) + first
        values[n[2]], values[n[3]] = edge(n[1], n[2]), edge(n[1], n[3])
        values[n[4]] = edge(n[2], n[4]) + edge(n[3], n[4])
        values[n[5]] = edge(n[2], n[5]) + edge(n[3], n[5])
        if block > 1:
            for source in (2, 3, 4):
                values[n[4]] = values[n[4]] + edge(f"B{block - 1}-N{source}", n[4])
                values[n[5]] = values[n[5]] + edge(f"B{block - 1}-N{source}", n[5])
        values[n[5]] = first = values[n[5]] + edge(n[4], n[5])
    x = torch.tanh(generator.conv(conditional(first, generator.norm)))
    return (x - x.mean((0, 2, 3), keepdim=True)) / torch.sqrt(x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5)


@pytest.mark.parametrize("name", ["published:resnet20-cifar10", "published:mobilenet_v2-imagenet", "random"])
def test_a_generator_equals_its_figure_edge_by_edge(name):
    torch.manual_seed(0)
    generator = Generator(read_genotype(name, 1), 5, 16, width=8)
    for table in (m for m in generator.modules() if isinstance(m, torch.nn.Embedding)):
        torch.nn.init.normal_(table.weight)
    z, y, towards = torch.randn(6, 100), torch.tensor([0, 1, 1, 2, 3, 4]), torch.randn(6, 3, 16, 16)
    ours, plain = generator(z, y), plainly(generator, z, y)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    weights = [p for p in generator.parameters() if p.ndim == 4]
    grads = [torch.autograd.grad((images * towards).sum(), weights, allow_unused=True) for images in (ours, plain)]
    assert sum(g is not None for g in grads[0]) > 10
    for ours, plain in zip(*grads):
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)
    soft = F.one_hot(y, 5).float()
    torch.testing.assert_close(generator(z, soft), generator(z, y), atol=1e-5, rtol=1e-5)


def test_the_super_net_equals_its_written_form_in_value_and_gradient():
    torch.manual_seed(0)
    supernet, architecture = Generator(None, 5, 8, width=4).double(), Architecture().double()
    for table in (m for m in supernet.modules() if isinstance(m, torch.nn.Embedding)):
        torch.nn.init.normal_(table.weight)
    z, y, mixture = torch.randn(3, 100).double(), torch.tensor([0, 1, 4]), architecture.sample()
    parameters = [*supernet.parameters(), *architecture.parameters()]
    towards, results = torch.randn(3, 3, 8, 8), []
    for form in (nullcontext, plain_forms):
        with form():
            images = supernet(z, y, mixture)
        results.append([images, *torch.autograd.grad((images * towards).sum(), parameters, retain_graph=True)])
    torch.testing.assert_close(*results)


def test_a_frozen_one_hot_mixture_makes_the_super_net_the_derived_generator():
    torch.manual_seed(0)
    genotype = read_genotype("random", 3)
    supernet, derived = Generator(None, 5, 16, width=8), Generator(genotype, 5, 16, width=8)
    loaded = derived.load_state_dict({k: v for k, v in supernet.state_dict().items() if k in derived.state_dict()})
    assert not loaded.missing_keys
    one_hot = {
        name: {op: torch.tensor(float(op == genotype[name])) for op in CANDIDATES[edge.kind]} for name, edge in EDGES.items()
    }
    z, y = torch.randn(4, 100), torch.tensor([0, 1, 2, 2])
    torch.testing.assert_close(supernet(z, y, one_hot), derived(z, y), atol=1e-6, rtol=1e-5)
    sampled = {name: {op: torch.tensor(1.0)} for name, op in genotype.items()}  # as hard mixtures are
    torch.testing.assert_close(supernet(z, y, sampled), derived(z, y), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gumbel, law", [("p", lambda p: p.softmax(-1)), ("logits", lambda p: p)])
def test_sampling_follows_the_stated_law(gumbel, law):
    torch.manual_seed(0)
    architecture = Architecture(gumbel, hard=True)
    with torch.no_grad():
        architecture.alpha["cross"].copy_(torch.tensor([2.0, 0.0, -1.0]).expand(12, 3))
    draws = [name for _ in range(300) for edge, m in architecture.sample().items() if EDGES[edge].kind == "cross" for name in m]
    shares = torch.tensor([draws.count(op) / len(draws) for op in CANDIDATES["cross"]])
    torch.testing.assert_close(shares, law(torch.tensor([2.0, 0.0, -1.0]).softmax(-1)), atol=0.03, rtol=0)


def test_soft_mixtures_are_equation_7_and_hard_ones_their_largest_share():
    hard, soft = Architecture(hard=True), Architecture()
    soft.load_state_dict(hard.state_dict())
    mixtures = []
    for architecture in (hard, soft):
        architecture.temperature.fill_(0.5)
        torch.manual_seed(2)
        mixtures.append(architecture.sample())
    for name, edge in EDGES.items():
        ((op, weight),) = mixtures[0][name].items()
        m = mixtures[1][name]
        assert weight.item() == 1 and op == max(m, key=m.get) and sum(m.values()).item() == pytest.approx(1)
        ours = torch.autograd.grad(weight, hard.alpha[edge.kind], retain_graph=True)[0]
        theirs = torch.autograd.grad(m[op].log(), soft.alpha[edge.kind], retain_graph=True)[0]
        torch.testing.assert_close(ours, theirs)
    torch.manual_seed(2)
    p = soft.alpha["up"].softmax(1)
    noise = -torch.log(torch.empty(6, 2).exponential_())
    expected = torch.exp((p + noise) / 0.5) / torch.exp((p + noise) / 0.5).sum(1, keepdim=True)
    ups = [list(mixtures[1][name].values()) for name, edge in EDGES.items() if edge.kind == "up"]
    torch.testing.assert_close(torch.stack([torch.stack(row) for row in ups]), expected)


def test_derivation_takes_the_likeliest_and_feeds_every_node():
    probabilities = {name: torch.zeros(len(CANDIDATES[edge.kind])) for name, edge in EDGES.items()}
    for name, edge in EDGES.items():
        probabilities[name][0 if edge.kind != "up" else 1] = 1.0  # none everywhere
    probabilities["B2-N2 -> B3-N4"][1], probabilities["B3-N3 -> B3-N4"][4] = 0.5, 0.4
    genotype = derive(probabilities)
    assert genotype["B1-N1 -> B1-N2"] == "bilinear" and genotype["B2-N2 -> B3-N4"] == "nearest"
    assert genotype["B3-N3 -> B3-N4"] == "none"
    fed = {EDGES[name].target for name, op in genotype.items() if op != "none"}
    assert fed == set(INTO)
    assert from_short(to_short(genotype)) == genotype
    assert all(to_short(from_short(short)) == short for short in PUBLISHED.values())


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_each_phase_moves_its_own_parameters_only(net, monkeypatch, mode):
    moved = []

    class Watching(Run):
        known = []

        def capture(self, step, *optimizers):
            own = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
            self.known.append(own)

            def watched():
                before = [[p.clone() for p in parameters] for parameters in self.known]
                step()
                changed = [any(not torch.equal(*pair) for pair in zip(*both)) for both in zip(before, self.known)]
                moved.append((self.known.index(own), changed))

            return watched

    monkeypatch.setattr(autorecon, "Run", Watching)
    search(net, config(**TINY, **SEARCH | {"search_epochs": 2, "search_iters": 2}, search_mode=mode))
    weights, architecture = (0, [True, False]), (1, [False, True])
    assert moved == 2 * [weights, weights, architecture]


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_a_search_that_was_stopped_goes_on_to_the_same_genotype(net, tmp_path, monkeypatch, mode):
    class Stopped(Run):
        def steps(self):
            if self.epoch == 2:
                raise KeyboardInterrupt
            return super().steps()

    def lines(name):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        return [json.loads(line) | {"seconds": 0} for line in text.splitlines()]

    cfg = config(**TINY, **SEARCH, search_mode=mode, resume=True)
    whole, _ = search(net, cfg, tmp_path / "whole")
    monkeypatch.setattr(autorecon, "Run", Stopped)
    with pytest.raises(KeyboardInterrupt):
        search(net, cfg, tmp_path / "stopped")
    monkeypatch.setattr(autorecon, "Run", Run)
    assert search(net, cfg, tmp_path / "stopped")[0] == whole and lines("stopped") == lines("whole")
    first, last = lines("whole")[0], lines("whole")[-1]
    assert set(first["entropy_of_edges"]) == set(EDGES) and {"loss_weights", "loss_architecture"} < set(first)
    assert 1 >= first["entropy"] > last["entropy"] > 0  # each edge's distribution starts undecided
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_entropies_are_those_of_the_distributions(net, monkeypatch):
    seen = []
    monkeypatch.setattr(Run, "note", lambda self, **figures: seen.append(figures))
    search(net, config(**TINY, **SEARCH | {"search_epochs": 1, "lr_alpha": 0.0}))  # alpha stays at 1e-3 N(0, 1)
    (figures,) = seen
    assert all(0.999 < entropy <= 1 + 1e-6 for entropy in figures["entropy_of_edges"].values())
    assert figures["entropy"] == pytest.approx(sum(figures["entropy_of_edges"].values()) / 33)


def test_gdfqs_generator_here_is_gdfq_to_the_bit(net):
    plain = {name: value for name, value in TINY.items() if name != "scale"}
    theirs = gdfq.compress(net, gdfq.config(**plain, lr_q=0.01)).state_dict()
    ours = compress(net, config(**plain, lr_q=0.01, genotype="gdfq")).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    controls = [compress(net, config(**plain, lr_q=0.01, genotype=name)).fc.weight for name in ("gdfq-cbn", "random")]
    assert not any(torch.equal(weight, ours["fc.weight"]) for weight in controls)


def test_costs_are_those_of_the_stated_architecture():
    cfg = config(dataset="cifar10")
    parameters, flops = generator_cost("gdfq", cfg, 3)
    assert parameters == sum(p.numel() for p in gdfq.Generator(10).parameters())
    convolutions = 128 * 128 * 9 * 16**2 + 128 * 64 * 9 * 32**2 + 64 * 3 * 9 * 32**2
    assert flops == 2 * (100 * 128 * 8**2 + convolutions)
    single = dict.fromkeys(EDGES, "none") | {name: "nearest" for name, edge in EDGES.items() if edge.kind == "up"}
    single |= {f"B{b}-N{i} -> B{b}-N{j}": "conv3x3" for b in (1, 2, 3) for i, j in ((2, 4), (4, 5))}
    _, flops = generator_cost(single, cfg, 3)
    linears = 64 * (33 * 4**2 + 33 * 8**2 + 34 * 16**2)
    edges = sum((2 * 64 * 64 + 2 * 64 * 64 * 9) * side**2 for side in (8, 16, 32))
    assert flops == 2 * (linears + edges + 64 * 3 * 9 * 32**2)
    halves = [generator_cost("gdfq", config(dataset="cifar10", scale=scale), 3)[0] for scale in (0.5, 1, 2)]
    assert halves[0] < halves[1] < halves[2]


def test_defaults_are_those_of_the_docstring_and_of_the_stages_sources():
    cfg = autorecon.parse_args(["--dataset", "cifar100"])
    assert (cfg.search_epochs, cfg.search_iters, cfg.arch_iters, cfg.lr_alpha) == (25, 200, 200, 3e-4)
    assert (cfg.tau_start, cfg.tau_end, cfg.gumbel, cfg.search_mode, cfg.bns_weight) == (5, 0.1, "p", "soft", 0.1)
    theirs = vars(gdfq.parse_args(["--dataset", "cifar100"]))
    shared = set(theirs) & set(vars(cfg)) - {"method", "out"}
    assert {"batch_size", "warmup_epochs", "lr_q", "kd_reduction"} <= shared
    assert {name: getattr(cfg, name) for name in shared} == {name: theirs[name] for name in shared}
    large = ["--dataset", "imagenet"]
    assert autorecon.parse_args(large).lr_q == gdfq.parse_args(large).lr_q == 1e-6
    kd = autorecon.parse_args(["--task", "kd", "--student-arch", "resnet20"])
    assert (kd.epochs, kd.iters, kd.batch_size, kd.lr_q, kd.weight_decay) == (500, 50, 256, 0.1, 5e-4)
    assert (kd.student_steps, kd.warmup_epochs, kd.decay_epochs) == (5, 0, [100, 200])
    architecture = Architecture()
    alpha = torch.cat([alpha.detach().flatten() for alpha in architecture.alpha.values()])
    assert len(alpha) == 6 * 2 + 15 * 7 + 12 * 3 and 5e-4 < alpha.std() < 2e-3


def test_a_search_step_is_adam_on_cross_entropy_and_bns(net, monkeypatch):
    """The first weight step and the first architecture step against both done by hand from the same random numbers."""
    kept = {}

    class Keeping(Run):
        def epochs(self, count, student, synthesize, **parts):
            kept.update(parts, supernet=student)
            return super().epochs(count, student, synthesize, **parts)

    cfg = config(
        **TINY, **SEARCH | {"search_epochs": 1, "search_iters": 1, "arch_iters": 1}, tau_start=2.0, bns_weight=0.3, beta1=0.7
    )
    monkeypatch.setattr(autorecon, "Run", Keeping)
    search(net, cfg)
    torch.manual_seed(cfg.seed)
    supernet, architecture, stats = Generator(None, 5, 16, width=8), Architecture(), BatchNormStatistics(net)
    architecture.temperature.fill_(2.0)
    weights = torch.optim.Adam(supernet.parameters(), 1e-3, betas=(0.7, 0.999))
    alphas = torch.optim.Adam(architecture.parameters(), 0.05, betas=(0.5, 0.999), weight_decay=1e-4)
    for optimizer in (weights, alphas):
        y = torch.randint(5, (4,))
        mixture = architecture.sample()
        logits = net(supernet(torch.randn(4, 100), y, mixture))
        for model in (supernet, architecture):
            model.zero_grad()
        (F.cross_entropy(logits, y) + 0.3 * stats.loss()).backward()
        optimizer.step()
    assert {name: kept[name].defaults["betas"] for name in ("optim_w", "optim_a")} == {
        "optim_w": (0.7, 0.999), "optim_a": (0.5, 0.999),
    }  # fmt: skip
    for ours, plain in zip(kept["architecture"].parameters(), architecture.parameters()):
        torch.testing.assert_close(ours, plain, atol=2e-3, rtol=0)  # of a step of 0.05
    for ours, plain in zip(kept["supernet"].parameters(), supernet.parameters()):
        assert (ours - plain).abs().mean() < 1e-4  # of a step of 1e-3


def test_a_quantized_student_may_take_several_steps(net):
    settings = TINY | {"epochs": 2, "iters": 1, "genotype": "random", "lr_q": 0.01, "feature_weight": 1.0}
    one, three = (compress(net, config(**settings, student_steps=steps)) for steps in (1, 3))
    moved = [(student.fc.weight - net.fc.weight).abs().mean() for student in (one, three)]
    assert 0 < moved[0] < moved[1]


def test_compression_losses():
    student, teacher, y = torch.randn(6, 7), torch.randn(6, 7) * 3, torch.randint(7, (6,))
    kd = autorecon.config(**UNQUANTIZED, task="kd", student_arch="resnet20")
    assert autorecon.compression_loss(student, teacher, y, kd).item() == pytest.approx((student - teacher).abs().mean().item())
    ours = autorecon.compression_loss(student, teacher, y, config(**TINY))
    torch.testing.assert_close(ours, gdfq.student_loss(student, teacher, y, gdfq.config(dataset="cifar10")))


def test_dfads_generator_maximises_the_difference_of_the_networks(net, monkeypatch):
    kept = {}

    class Keeping(Run):
        def epochs(self, count, student, synthesize, **parts):
            kept.update(copy.deepcopy({"generator": parts["generator"], "student": student}), trained=parts["generator"])
            kept["random"] = torch.get_rng_state()
            assert not parts["optim_q"].defaults["nesterov"]  # which GDFQ's student has
            return super().epochs(count, student, synthesize, **parts)

    monkeypatch.setattr(autorecon, "Run", Keeping)
    settings = UNQUANTIZED | {"genotype": "gdfq", "epochs": 1, "iters": 1, "warmup_epochs": 0, "student_steps": 1}
    cfg = config(**settings, task="kd", student_arch="resnet20", generator_loss="dfad")
    compress(net, cfg, Keeping(cfg))
    torch.set_rng_state(kept["random"])
    y = torch.randint(5, (cfg.batch_size,))
    x = kept["generator"](torch.randn(cfg.batch_size, cfg.latent_dim), y)
    (-(kept["student"].train()(x) - net(x)).abs().mean()).backward()
    for ours, expected in zip(kept["trained"].parameters(), kept["generator"].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-6, rtol=1e-3)


def test_distillation_trains_a_student_of_another_architecture(tmp_path, on_the_command_line):
    run = tmp_path / "run"
    arguments = command_line(UNQUANTIZED | {"task": "kd", "student-arch": "resnet20", "genotype": "random", "epochs": 2})
    result = autorecon.main([*arguments, "--arch", "tiny:net", "--student-steps", "2", "--out", str(run)])
    assert result["wbits"] is None and result["bytes_student"] == (run / "student.pt").stat().st_size
    student = load_teacher("resnet20", "folder", 5, 16, str(run / "student.pt"))[0]
    start = build("resnet20", 5, 16)
    assert student.state_dict().keys() == start.state_dict().keys()
    assert student.bn1.num_batches_tracked == 2 * 2 and not torch.equal(student.bn1.running_mean, start.bn1.running_mean)


def test_a_search_alone_then_compression_with_what_it_found(tmp_path, on_the_command_line, capsys):
    search = [*command_line(SEARCH | {"search_epochs": 1}), "--arch", "tiny:net"]
    found, alone = tmp_path / "found", [*command_line(STAGE_1), *search, "--search-only", "--out", str(tmp_path / "found")]
    first = autorecon.main(alone)
    genotype = read_genotype(str(found))
    assert f"genotype: {to_short(genotype)}" in capsys.readouterr().out
    assert (found / "genotype.svg").read_text() == draw(genotype, EDGES)
    assert json.loads((found / "result.json").read_text()).items() >= first.items()
    assert autorecon.main(alone)["genotype"] == to_short(genotype)
    printed = capsys.readouterr().out
    assert f"--genotype {found} compresses with it" in printed and "--overwrite runs it again" in printed
    runs = {"search": search, "given": ["--arch", "tiny:net", "--genotype", str(found)]}
    results = {name: autorecon.main([*command_line(TINY), *argv, "--out", str(tmp_path / name)]) for name, argv in runs.items()}
    assert results["search"]["genotype"] == results["given"]["genotype"] == to_short(genotype)
    cfg = config(**TINY)
    for name, which in (("generator", genotype), ("gdfq", "gdfq")):
        cost = generator_cost(which, cfg, 3)
        for result in (*results.values(), first):
            assert (result[f"{name}_parameters"], result[f"{name}_flops"]) == cost
    assert results["search"]["search_seconds"] > 0
    files = [(tmp_path / name / "quantized.pt").read_bytes() for name in runs]
    assert files[0] == files[1]  # the search leaves no trace but the genotype


def test_a_run_killed_in_its_search_or_after_it_resumes_to_the_same_bits(tmp_path, on_the_command_line, monkeypatch, fails):
    """The whole command. A finished run that is overwritten leaves nothing that the resumed one could take."""
    run, whole = tmp_path / "stopped", tmp_path / "whole"
    monkeypatch.setattr(autorecon, "generator_cost", lambda *_: (0, 0))  # takes longer than all the rest
    arguments = [*command_line(TINY), *command_line(SEARCH | {"search_epochs": 2}), "--arch", "tiny:net", "--out"]
    autorecon.main([*arguments, str(whole)])
    shutil.copytree(whole, run)
    for where, how in (("search", "--overwrite"), ("stage 2", "--resume")):

        class Stopped(Run):
            def steps(self, where=where):
                if self.epoch == 1 and (self.folder.name == "search") == (where == "search"):
                    raise KeyboardInterrupt
                return super().steps()

        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(autorecon, "Run", Stopped)
            patched.setattr("common.report.Run", Stopped)
            autorecon.main([*arguments, str(run), how])
        assert (run / "config.json").exists() and not (run / "result.json").exists() and not (run / "quantized.pt").exists()
        assert "holds an unfinished run; give --resume" in fails(autorecon.main, *arguments, run)
    autorecon.main([*arguments, str(run), "--resume"])
    assert (run / "quantized.pt").read_bytes() == (whole / "quantized.pt").read_bytes()


def test_a_check_runs_no_epoch_and_leaves_no_file(tmp_path, on_the_command_line, monkeypatch):
    monkeypatch.setattr(Run, "steps", None)
    rows = autorecon.main([*command_line(STAGE_1), "--arch", "tiny:net", "--check", "--out", str(tmp_path / "run")])["rows"]
    assert [row[3] for row in rows] == 4 * [4] and not (tmp_path / "run").exists()


def test_a_discovered_generator_serves_qimera(net):
    plain = {name: value for name, value in TINY.items() if name != "scale"}
    for variant in ("paper", "released"):
        cfg = qimera.config(**plain, lr_q=0.05, variant=variant, generator="autorecon:published:resnet20-cifar100")
        generator = qimera.make_generator(net, cfg, 3)
        assert isinstance(generator.body, Generator) and generator.body.slices == ((21, 21, 22) if cfg.dm else (2, 2, 4))
        student = qimera.compress(net, cfg)
        own = qimera.compress(net, qimera.config(**plain, lr_q=0.05, variant=variant))
        assert not torch.equal(student.fc.weight, own.fc.weight)


def broken(tmp_path, edges):
    genotype = from_short(PUBLISHED["resnet20-cifar10"]) | edges
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps({"edges": {name: op for name, op in genotype.items() if op}}))
    return path


def test_unusable_input_ends_with_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    for edges, words in [
        ({"B2-N2 -> B2-N4": "conv7x7"}, "has conv7x7 for the edge 'B2-N2 -> B2-N4'; give it one of none, identity"),
        ({"B1-N1 -> B1-N2": "none"}, "has none for the edge 'B1-N1 -> B1-N2'; give it one of nearest, bilinear"),
        ({"B2-N3 -> B3-N5": None}, "has nothing for the edge 'B2-N3 -> B3-N5'; give it one of none, nearest, bilinear"),
        ({"B1-N2 -> B3-N4": "nearest"}, "has nearest for the edge 'B1-N2 -> B3-N4'; remove it, it is not in the search space"),
        ({"B1-N2 -> B1-N4": "none", "B1-N3 -> B1-N4": "none"}, "sends nothing to B1-N4; give 'B1-N2 -> B1-N4' an operation"),
    ]:
        assert words in fails(autorecon.main, "--genotype", broken(tmp_path, edges))
    (tmp_path / "genotype.json").write_text('{"edges": ["B1-N1 -> B1-N2"]}')
    tiny, kd = [*command_line(STAGE_1), "--arch", "tiny:net"], ["--task", "kd", "--student-arch", "resnet20"]
    for arguments, words in [
        (["--genotype", "genotype.json"], "holds no genotype"),
        (["--genotype", "absent.json"], "is not a file; give one of a genotype.json, its folder, published:NAME, search"),
        (["--genotype", "published:resnet21"], "is not known; published are resnet20-cifar10"),
        (["--genotype", "random", "--search-only"], "--search-only has no effect with --genotype; leave one of them out"),
        (["--genotype", "random", "--tau-start", 3], "--tau-start has no effect with --genotype"),
        (["--search-only", "--lr-q", 1], "--lr-q has no effect with --search-only"),
        (["--search-only", "--check"], "--check has no effect with --search-only"),
        (["--no-finetune", "--student-steps", 2], "--student-steps has no effect with --no-finetune"),
        ([*kd, "--abits", 4], "--abits has no effect with --task kd"),
        ([*kd, "--no-finetune"], "--no-finetune has no effect with --task kd"),
        (["--task", "kd"], "--task kd needs --student-arch; give the architecture to distil into"),
        (["--tau-end", 9], "--tau-end is 9.0, above --tau-start 5.0"),
        (["--search-epochs", 0], "; give a whole number from 1 to 1e+06"),
        (["--scale", 0], "; give a number from 0.015625 to 64"),
        (["--latent-dim", 2], "--latent-dim is 2; each of three blocks gets a third of it, so give at least 3"),
        ([*tiny, "--image-size", 12], "--image-size is 12 and the generator makes images of multiples of 8 pixels"),
        (
            [*tiny, *kd, "--genotype", "random", "--student-arch", "resnet2x"],
            "--student-arch 'resnet2x' is not known",
        ),
    ]:
        assert words in fails(autorecon.main, *arguments)
    assert "--generator is autorecon:gdfq" in fails(qimera.main, "--generator", "autorecon:gdfq")
    assert "--generator autorecon: absent is not a file" in fails(qimera.main, "--generator", "autorecon:absent")
    grey = [*tiny, *kd, "--genotype", "random", "--student-arch", "tiny:grey"]
    assert "--student-arch tiny:grey takes images of 1 channels and the teacher of 3" in fails(autorecon.main, *grey)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["genotype.json"]


def test_a_diverging_search_names_its_rates(net):
    with pytest.raises(InputError, match="lower --lr-g or --lr-alpha"):
        search(net, config(**TINY, **SEARCH | {"lr_alpha": 1e30}, gumbel="logits"))


def test_temperature_falls_exponentially(net, monkeypatch):
    temperatures = []
    sample = Architecture.sample
    monkeypatch.setattr(Architecture, "sample", lambda self: temperatures.append(self.temperature.item()) or sample(self))
    search(net, config(**TINY, **SEARCH))
    assert temperatures[::2] == pytest.approx([5 * math.exp(-math.log(50) * epoch / 3) for epoch in range(3)])
