"""The scripts on a device that is not the host, eager and as graphs; elsewhere.py is that device where there is no GPU."""

import pytest
import torch
from conftest import ROOT, FunctionalNet, ModuleNet, trained
from elsewhere import second_device
from test_capture import STEPS, TINY
from test_data import make_folder
from test_mixmix import NORMAL
from test_mixmix import TINY as SYNTH
from test_tasks import DATA, KD, PTQ, QAT

import autorecon
import common.run
import gdfq
import mixmix
import qimera
from common import InputError
from common.capture import WARMUP_STEPS, GraphedStep
from common.report import draw_images
from common.run import Run

RUNS = STEPS + [(gdfq, {"mix": "cutmix"}), (gdfq, {"act_placement": "input"}), (qimera, {"noise": "slot"})]
COUNT = WARMUP_STEPS + 2
capture = Run.capture


def watched(device):
    """Run.capture whose steps may not read from `device`."""

    def capture_and_watch(run, step, *optimizers):
        fast = capture(run, step, *optimizers)

        def silent(*args):
            before = device.reads
            fast(*args)
            assert device.reads == before, "the step waits for its device"

        return silent

    return capture_and_watch


def on_second_device(monkeypatch, make, graphed="cudagraph"):
    """The tensors that `make()` returns, step by step and as graphs, on the host."""
    results = []
    for kind in ("none", graphed):
        with monkeypatch.context() as patch, second_device(monkeypatch) as device:
            patch.setattr(common.run, "pick_capture", lambda *_, kind=kind: kind)
            patch.setattr(Run, "capture", watched(device))
            results.append({name: value.cpu() for name, value in make().items()})
    return results


def assert_same(eager, graphed):
    assert eager.keys() == graphed.keys()
    for name, value in eager.items():
        assert torch.equal(value, graphed[name]), name


@pytest.mark.parametrize("method, flags", RUNS)
def test_a_run_stays_on_its_device_and_its_graphs_compute_the_same(monkeypatch, method, flags):
    """Same random numbers, same phases, learning rates that decay, losses of every step; and images when it is over."""
    net, histories = trained(FunctionalNet()), []

    def make():
        run = Run(method.config(**TINY | {"iters": COUNT}, **flags, device="meta"))
        student = method.compress(net, run.cfg, run)
        histories.append([{name: value for name, value in line.items() if name != "seconds"} for line in run.history])
        return student.state_dict() | {"images": draw_images(run, torch.arange(5), seed=0)}

    assert_same(*on_second_device(monkeypatch, make))
    assert histories[0] == histories[1] and "loss_q" in histories[0][-1]


def test_real_images_on_the_device(net, monkeypatch, tmp_path):
    """Half of each of the student's batches."""
    data = make_folder(tmp_path, 5, 3, 16, "train")
    cfg = TINY | {"iters": COUNT, "device": "meta", "mean": [0.5] * 3, "std": [0.2] * 3, "data_dir": str(data)}
    cfg |= {"data_source": "unconfusing", "confusing_below": 0, "real_per_class": 2}
    assert_same(*on_second_device(monkeypatch, lambda: gdfq.compress(net, gdfq.config(**cfg)).state_dict()))


def test_a_search_on_the_device(net, monkeypatch):
    schedule = {"search_epochs": 2, "search_iters": COUNT, "arch_iters": COUNT, "lr_alpha": 0.05}
    cfg = autorecon.config(**TINY | schedule | {"device": "meta", "scale": 0.0625, "batch_size": 2})
    seen, probabilities = [], autorecon.Architecture.probabilities

    def noted(architecture):
        seen.append(probabilities(architecture))
        return seen[-1]

    def make():
        seen.clear()
        autorecon.search(net, cfg)
        return {f"{place} {edge}": p for place, edges in enumerate(seen) for edge, p in edges.items()}

    monkeypatch.setattr(autorecon.Architecture, "probabilities", noted)
    assert_same(*on_second_device(monkeypatch, make))


def test_a_compiled_step_becomes_a_graph(monkeypatch):
    """PyTorch compiles nothing for this device, so that the graph holds the step as it was."""
    net = trained(FunctionalNet())

    def make():
        run = Run(gdfq.config(**TINY | {"iters": COUNT}, device="meta"))
        assert run.cfg.capture == "none" or isinstance(capture(run, print), GraphedStep)
        return gdfq.compress(net, run.cfg, run).state_dict()

    assert_same(*on_second_device(monkeypatch, make, "compile"))


LONG_ENOUGH = {"qat": QAT | {"qat_steps": 12}, "kd": KD | {"kd_epochs": 2}}  # for graphs in each phase
LONG_ENOUGH["ptq"] = PTQ | {"weight_iterations": 5 * COUNT, "step_iterations": COUNT}


@pytest.mark.parametrize("task", LONG_ENOUGH)
def test_mixmix_trains_on_the_device(net, monkeypatch, task):
    monkeypatch.syspath_prepend(ROOT / "tests")
    images = torch.randn(40, 3, 16, 16)
    cfg = DATA | LONG_ENOUGH[task] | {"task": task, "data_source": "noise", "device": "meta"}
    assert_same(*on_second_device(monkeypatch, lambda: mixmix.compress(net, images, mixmix.config(**cfg)).state_dict()))


def test_mixmix_images_on_the_device(net, monkeypatch):
    cfg = SYNTH | {"iterations": 2 * COUNT, "low_iterations": COUNT, "device": "meta", "mean": [0.5] * 3, "std": [0.25] * 3}

    def make():
        run = Run(mixmix.config(**cfg))
        zoo = [mixmix.ZooModel("a", net, NORMAL, NORMAL).to("meta", memory_format=run.layout)]
        return {"images": mixmix.invert(zoo, torch.arange(5, device="meta"), run.cfg, run)}

    assert_same(*on_second_device(monkeypatch, make))


def test_a_network_that_no_graph_can_hold_ends_with_one_sentence(monkeypatch):
    run_settings = gdfq.config(**TINY | {"iters": COUNT, "device": "meta"})
    message = "cannot be captured as a CUDA graph .*of host and device cannot be captured.*; give --capture none"  # the cause
    with pytest.raises(InputError, match=message):
        with monkeypatch.context() as patch, second_device(monkeypatch):
            patch.setattr(common.run, "pick_capture", lambda *_: "cudagraph")
            gdfq.compress(trained(ModuleNet()), run_settings)  # it branches on its data


def test_a_run_is_on_a_numbered_gpu(monkeypatch):
    """The current one where --device has no number; PyTorch refuses to set a device without."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)  # a CPU's build has none
    for name, index in (("cuda", 1), ("cuda:0", 0)):
        run = Run(gdfq.config(**TINY, device=name, capture="none"))
        assert run.device == torch.device("cuda", index) and run.cfg.device == f"cuda:{index}"
    assert chosen == [1, 0]


def test_the_device_does_not_mix_and_its_graphs_hold_what_was_captured(monkeypatch):
    with second_device(monkeypatch) as device:
        total, calls = torch.zeros(3, device="meta"), []

        def step(sign, read=False):
            calls.append(sign)
            total.add_(sign * torch.rand(3, device="meta"))
            return total.sum().item() if read else None

        torch.manual_seed(0)
        graphed = GraphedStep(step, [], {})
        for _ in range(COUNT + 1):
            graphed(1)
        graphed(-1)
        assert len(calls) == WARMUP_STEPS + 2 and device.reads == 0  # 1 captured, -1 warming up
        torch.manual_seed(0)
        expected = sum(torch.rand(3) for _ in range(COUNT + 1)) - torch.rand(3)
        torch.testing.assert_close(total.cpu(), expected)
        for _ in range(WARMUP_STEPS):
            graphed(1, True)
        with pytest.raises(InputError, match="_local_scalar_dense.* cannot be captured"):
            graphed(1, True)
    with second_device(monkeypatch) as device:
        x = torch.ones(3, device="meta")
        with pytest.raises(AssertionError, match="both devices"):
            x + torch.ones(3)
        assert x.sum().item() == 3 and x.cpu().tolist() == [1, 1, 1] and device.reads == 2
