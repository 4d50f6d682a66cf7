import platform
import resource
import sys

import pytest
import torch
from conftest import FunctionalNet, trained

import adadfq
import autorecon
import common.run
import gdfq
import qimera
from common import InputError, capture, ops
from common.bns import BatchNormStatistics
from common.capture import WARMUP_STEPS, GraphedStep, pick_capture
from common.run import Run
from gdfq import config

TINY = {"dataset": "folder", "num_classes": 5, "image_size": 16, "batch_size": 8, "epochs": 4, "iters": 4, "lr_q": 0.01}
TINY |= {"warmup_epochs": 2, "calibrate_epochs": 1, "precision": "fp32", "decay_epochs": [3]}
STEPS = [(gdfq, {}), (qimera, {"act_ranges": "learned"}), (qimera, {"adversarial": "zaq", "student_steps": 2}), (adadfq, {})]
STEPS.append((autorecon, {"genotype": "published:resnet20-cifar10", "scale": 0.125}))
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class SecondStepRun(Run):
    """Refuses to compile anything from the third step of each phase on (calibrating, warming up, tuning)."""

    def steps(self):
        for step in super().steps():
            with torch._dynamo.config.patch(error_on_recompile=step >= 2 or self.epoch == 3):  # the rate decays in epoch 3
                yield step


def record_as_compiled(stats, layer, args, kwargs):
    """For an eager run, which adds up in another order."""
    stats.inputs[layer] = torch.cat(ops._plain_statistics(args[0]))


@pytest.mark.parametrize("method, flags", STEPS[1:])  # AutoReCon has GDFQ's losses and loop
def test_a_compiled_run_does_not_recompile_and_equals_the_eager_one(net, monkeypatch, method, flags):
    """Traced and differentiated as for the C++ compiler, which alone is left out for its time."""
    monkeypatch.setattr(capture, "COMPILER", {"backend": "aot_eager"})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runs, states = [], []
    for name, kind in (("compile", SecondStepRun), ("none", Run)):
        runs.append(kind(method.config(**TINY, **flags, capture=name, device="cpu")))
        states.append(method.compress(net, runs[-1].cfg, runs[-1]).state_dict())
        monkeypatch.setattr(BatchNormStatistics, "_record", record_as_compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, atol=1e-4, rtol=1e-4)  # rounding, grown over 16 steps
    assert [list(line) for line in runs[0].history] == [list(line) for line in runs[1].history]
    for key in ("loss_g", "loss_q"):
        assert runs[0].history[-1][key] == pytest.approx(runs[1].history[-1][key], rel=1e-4)


def test_masks_are_computed_again_and_nothing_else_is():
    def step(x):
        return torch.where(x > 0, x.exp(), 0.0)

    graph = torch.fx.experimental.proxy_tensor.make_fx(step)(torch.randn(3)).graph
    capture.RecomputedMasks()(graph)
    marked = [node.name for node in graph.nodes if "recompute" in node.meta]
    assert marked == [node.name for node in graph.nodes if "gt" in node.name] and len(marked) == 1
    dropout = torch.fx.experimental.proxy_tensor.make_fx(lambda x: torch.ops.aten.native_dropout(x, 0.5, True))
    graph = dropout(torch.randn(3)).graph
    capture.RecomputedMasks()(graph)
    assert any(node.meta["val"].dtype is torch.bool for node in graph.nodes if "getitem" in node.name)
    assert not any("recompute" in node.meta for node in graph.nodes)


def test_a_view_without_gradients_sees_what_the_network_learns():
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    view, x = capture.without_gradients(network), torch.randn(2, 2, 4, 4, requires_grad=True)
    before = view.eval()(x)
    network(x).square().sum().backward()  # moves the running statistics
    torch.optim.SGD(network.parameters(), 0.1).step()
    assert torch.equal(view(x), network.eval()(x)) and not torch.equal(view(x), before)
    assert view(x).requires_grad and not any(parameter.requires_grad for parameter in view.parameters())


def test_capture_is_decided_by_flags_device_and_length(monkeypatch):
    monkeypatch.setattr(capture, "compiler", lambda *_: "g++")
    assert pick_capture("auto", CUDA, 1) == "cudagraph"
    assert pick_capture("auto", CPU, 100) == "none" and pick_capture("auto", CPU, 10**5) == "compile"
    assert pick_capture("none", CUDA, 10**5) == "none" and pick_capture("compile", CPU, 1) == "compile"
    monkeypatch.setattr(capture, "compiler", lambda *_: None)
    assert pick_capture("auto", CPU, 10**5) == "none"
    with pytest.raises(InputError, match="--capture compile needs a C.. compiler"):
        pick_capture("compile", CPU, 1)
    with pytest.raises(InputError, match="needs a C compiler .*; install gcc and python3-dev, or give cudagraph"):
        pick_capture("compile", CUDA, 1)
    with pytest.raises(InputError, match="--capture cudagraph needs a CUDA device and this run is on cpu"):
        pick_capture("cudagraph", CPU, 1)
    paper = config(dataset="cifar100", device="cpu")
    assert paper.epochs * paper.iters > capture.WORTH_COMPILING


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_run_keeps_freed_memory_for_the_next_tensors():
    """Pages that had to be asked for again are counted by the system."""
    Run(config(**TINY, device="cpu"))
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 1000


def test_a_graph_knows_the_learning_rates_of_a_resumed_run():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)
    graphed = GraphedStep(print, [optimizer], {})
    before = graphed.baked_in((True,))
    optimizer.load_state_dict(optimizer.state_dict())
    assert graphed.baked_in((True,)) == before != graphed.baked_in((False,))
    optimizer.param_groups[0]["lr"] = 1e-4
    assert graphed.baked_in((True,)) != before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method, flags", STEPS)
@pytest.mark.parametrize("kind", ["cudagraph", "compile"])
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def test_a_graphed_run_equals_one_without_graphs(monkeypatch, method, flags, kind):
    """Same random numbers, same phases, learning rates that decay, losses of every step. Rounding grows over 36 steps, so a
    graph of a compiled step is compared with the compiled step, which the CPU compares with the eager one."""
    monkeypatch.setattr(capture, "COMPILER", {"backend": "aot_eager"})  # without code of its own, which takes minutes
    net, histories, states = trained(FunctionalNet()), [], []
    for graphed in (GraphedStep, lambda step, optimizers, losses: step):
        monkeypatch.setattr(common.run, "GraphedStep", graphed)
        cfg = method.config(**TINY | {"iters": 3 * WARMUP_STEPS}, **flags, capture=kind, device="cuda")
        run = Run(cfg)
        states.append(method.compress(net, cfg, run).state_dict())
        histories.append(run.history)
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, atol=1e-4, rtol=1e-3)
    for ours, plain in zip(*histories):
        assert ours.keys() == plain.keys() and ours["loss_g"] == pytest.approx(plain["loss_g"], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_is_captured_anew_for_a_phase_and_a_learning_rate():
    weight = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    optimizer, losses = torch.optim.SGD([weight], lr=1.0), {}

    def step(sign):
        optimizer.zero_grad()
        loss = sign * weight.sum()
        loss.backward()
        optimizer.step()
        losses["loss"] = loss.detach()

    graphed, expected = GraphedStep(step, [optimizer], losses), 0.0
    for sign, lr in ((1, 1.0), (-1, 1.0), (-1, 0.5)):
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(WARMUP_STEPS + 3):
            graphed(sign)
            assert losses["loss"].item() == pytest.approx(4 * sign * expected)
            expected -= sign * lr
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, expected))
