"""Several processes for one run: what they compute, what they refuse, and that one goes on where two were stopped."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_cli import TINY, read_metrics
from test_data import make_folder

import gdfq
from adadfq import normalised_entropy
from common import distributed
from qimera import standardise

FLAGS = [*TINY, "--bits", "8", "--act-ranges", "search", "--mix", "cutmix", "--epochs", "14", "--threads", "1"]


def start_two(flags, script=ROOT / "gdfq.py"):
    """Two processes as torchrun would start them; its own, which imports PyTorch too, is left out."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, str(script), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for rank in ("0", "1"):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        yield subprocess.Popen(command, env=os.environ | own, **pipes)


def test_two_processes_compute_what_one_does_and_one_goes_on(tmp_path, monkeypatch):
    """The same batches, mixtures, ranges and steps but for rounding: when measured, 2e-5 in the first three epochs and 1e-3
    later, so ten epochs are compared; from epoch to epoch losses change by up to a tenth."""
    monkeypatch.syspath_prepend(ROOT / "tests")
    make_folder(tmp_path, 5, images=2, size=16)  # quicker than to evaluate on synthetic images
    command = [*FLAGS, "--data-dir", str(tmp_path), "--out"]
    for resume, epochs in ([], 3), (["--resume"], 6):
        two = list(start_two([*command, str(tmp_path / "two"), *resume]))
        while two[0].poll() is None and len(read_metrics(tmp_path / "two")) < epochs:
            time.sleep(0.005)
        for process in two:
            process.send_signal(signal.SIGTERM)
        printed = [process.communicate() for process in two]
        assert two[0].returncode == 143 and printed[0][1].endswith("stopped; the same command with --resume continues it\n")
        said = [line for line in printed[1][0].splitlines() if not line.startswith("[Gloo]")]  # as torch 2.9 does by itself
        assert two[1].returncode != 0 and said == [] and "gdfq.py:" not in printed[1][1]  # the first one speaks
        assert epochs <= len(read_metrics(tmp_path / "two")) < 14
    gdfq.main([*command, str(tmp_path / "one")])  # not beside the two, which would end first on a busy machine
    gdfq.main([*command, str(tmp_path / "two"), "--resume"])
    both = [read_metrics(tmp_path / name) for name in ("one", "two")]
    assert len(both[0]) == len(both[1]) == 14
    for one, two in zip(*(lines[:10] for lines in both)):
        losses, expected = ({name: value for name, value in line.items() if "loss" in name} for line in (two, one))
        assert losses == pytest.approx(expected, rel=1e-4 if one["epoch"] < 3 else 1e-2)
        assert one["epoch"] >= 3 or two["bns"] == pytest.approx(one["bns"], rel=1e-3)


HALF = """
import sys
from argparse import Namespace
import torch
from adadfq import normalised_entropy
from common import distributed
from qimera import standardise

distributed.share_batches(Namespace(batch_size=8, capture="none", device="cpu"))
inputs = [whole.chunk(2)[distributed.rank].requires_grad_() for whole in torch.load(sys.argv[1])]
with distributed.WholeBatch(8):
    outputs = normalised_entropy(*inputs[:2]), standardise(inputs[2], (0, -1))
    sum(output.square().mean() for output in outputs).backward()
torch.save([*outputs, *(one.grad for one in inputs)], f"{sys.argv[1]}.{distributed.rank}")
distributed.leave()
"""


def test_what_a_method_asks_of_the_whole_batch(tmp_path):
    """The smallest entropy of AdaDFQ's batch and the moments of Qimera's latents, with gradients to both processes' images."""
    inputs, file, script = (
        [torch.randn(8, 5), torch.randn(8, 5), torch.randn(8, 3)],
        tmp_path / "inputs.pt",
        tmp_path / "half.py",
    )
    torch.save(inputs, file)
    script.write_text(HALF)
    for process, said in [(process, process.communicate()) for process in list(start_two([str(file)], script))]:
        assert process.returncode == 0, said
    leaves = [whole.clone().requires_grad_() for whole in inputs]
    outputs = normalised_entropy(*leaves[:2]), standardise(leaves[2], (0, -1))
    sum(output.square().mean() for output in outputs).backward()
    halves = zip(*(torch.load(f"{file}.{rank}") for rank in (0, 1)))
    found = [torch.cat(pair) for pair in halves]
    torch.testing.assert_close(found[:2], list(outputs))
    torch.testing.assert_close(found[2:], [2 * one.grad for one in leaves])  # gradients of the weights are averaged later


def test_what_several_processes_cannot_do_is_refused(fails, monkeypatch):
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (shared | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    sentence = fails(gdfq.main, *FLAGS)
    assert sentence.endswith("--batch-size is 8 and torchrun starts 3 processes, which share each batch; give a multiple of 3")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        sentence = fails(gdfq.main, *FLAGS, "--batch-size", "9", "--device", "auto")
    assert "torchrun starts 3 processes on this machine, which has 1 GPU(s); give --nproc_per_node 1, or" in sentence
    assert "--capture compile works in one process" in fails(gdfq.main, *FLAGS, "--batch-size", "9", "--capture", "compile")
    monkeypatch.delenv("LOCAL_RANK")  # a cluster's batch script has set the others
    assert distributed.started() == 1 and distributed.is_first()
