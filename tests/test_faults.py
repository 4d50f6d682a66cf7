"""What goes wrong outside of the program: signals, full disks, two processes on one folder, damaged and hostile files."""

import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_cli import TINY, read_metrics, start
from test_tasks import DATA, command_line

import gdfq
import mixmix
from common import InputError
from common.checkpoint import load_checkpoint, previous, save_checkpoint
from common.export import load_quantized, save_quantized


def paused(folder, epochs, *flags):
    """A process that runs gdfq.py, stopped when it has saved so many epochs."""
    process = start(folder, "--epochs", 24, *flags)
    while process.poll() is None and len(read_metrics(folder)) < epochs:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None
    return process


def ended(process, number=signal.SIGCONT):
    """Let a paused process go on, after a signal: its exit status and the last line of its stderr."""
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    printed = process.communicate()[1]
    assert "Traceback" not in printed
    return process.returncode, printed.splitlines()[-1]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux, to limit a process that runs")
def test_nothing_is_lost_to_signals_a_full_disk_or_a_second_process(tmp_path, fails, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    folder, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint.pt"
    arguments = [*TINY, "--epochs", "24", "--threads", "1"]  # as many as `start` gives
    gdfq.main([*arguments, "--out", str(tmp_path / "whole")])

    def stands():
        """The last epoch is there, and nothing half-written."""
        assert not list(folder.glob("*.partial"))
        return torch.load(checkpoint, weights_only=True)["epoch"] == len(read_metrics(folder)) > 0

    first = paused(folder, 1)
    for flags in ([], ["--resume"], ["--overwrite"]):
        sentence = fails(gdfq.main, *arguments, "--out", folder, *flags)
        assert sentence.endswith(f"--out {folder} is in use by another process; wait until it ends, or give another --out")
    stopped = "gdfq.py: stopped; the same command with --resume continues it"
    assert ended(first, signal.SIGTERM) == (143, stopped) and stands()
    assert ended(paused(folder, 5, "--resume"), signal.SIGINT) == (130, stopped) and stands()
    full = paused(folder, 10, "--resume")
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (5000, 5000))  # bytes of a file, from now on
    status, line = ended(full)
    assert status == 2 and stands()
    assert f"error: {checkpoint} cannot be written (no space left, or the file is too large) and is left as it was" in line
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    capsys.readouterr()
    gdfq.main([*arguments, "--out", str(folder), "--resume"])
    said = capsys.readouterr().out
    assert f"{checkpoint} is damaged" in said and "the one before it is used, so an epoch is repeated" in said
    assert (folder / "quantized.pt").read_bytes() == (tmp_path / "whole" / "quantized.pt").read_bytes()
    assert read_metrics(folder) == read_metrics(tmp_path / "whole") and not previous(checkpoint).exists()


class Hostile:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_file_runs_code(tmp_path, fails, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    marker, run, flags = tmp_path / "marker", tmp_path / "run", [*TINY, "--epochs", "3", "--out", tmp_path / "run"]
    for name, legacy in (("new.pt", False), ("old.pth", True)):
        torch.save({"fc.weight": Hostile(marker)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        assert "holds more than tensors" in fails(gdfq.main, *TINY, "--weights", tmp_path / name)
    assert "not a quantized network" in fails(gdfq.main, "--eval", tmp_path / "new.pt")
    gdfq.main([str(flag) for flag in flags])
    (run / "result.json").unlink()
    (tmp_path / "new.pt").replace(run / "checkpoint.pt")
    assert "checkpoint.pt is damaged" in fails(gdfq.main, *flags, "--resume")
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "old.pth").replace(hub / "resnet18-f37072fd.pth")  # which torchvision would unpickle
    monkeypatch.setattr("common.published.download", lambda address, path, digest: path)  # as if the hash were right
    assert "holds more than tensors" in fails(gdfq.main, "--dataset", "imagenet")
    assert not marker.exists()


def test_what_is_not_finite_or_not_told_is_refused_by_name(tmp_path, net, fails):
    cfg = gdfq.config(**DATA, epochs=3, iters=2, batch_size=4, warmup_epochs=1, calibrate_epochs=1)
    shape = {"arch": "tiny:net", "num_classes": 5, "image_size": 16, "channels": 3, "wbits": 4, "abits": 4}
    save_quantized(gdfq.compress(net, cfg), tmp_path / "student.pt", shape | {"act_placement": "relu"})
    assert "saved without method, dataset, mean, std; include them in" in fails(gdfq.main, "--eval", tmp_path / "student.pt")
    content = torch.load(tmp_path / "student.pt")
    name, stored = next(iter(content["activations"].items()))
    stored["scale"].fill_(torch.nan)
    torch.save(content, tmp_path / "student.pt")
    with pytest.raises(InputError, match=f"student.pt' has values in '{name}.scale' that are not finite"):
        load_quantized(tmp_path / "student.pt", net)
    net.bn2.running_var[3] = torch.inf
    with pytest.raises(InputError, match="the network has values in 'bn2.running_var' that are not finite"):
        gdfq.compress(net, cfg)


def test_of_two_checkpoints_one_can_always_be_read(tmp_path):
    path, said = tmp_path / "checkpoint.pt", []
    assert load_checkpoint(path) is None
    for epoch in (1, 2, 3):
        save_checkpoint({"epoch": epoch}, path)
    assert load_checkpoint(path, said.append) == {"epoch": 3} and not said
    path.unlink()  # as if it had been killed between the two renamings
    assert load_checkpoint(path, said.append) == {"epoch": 2} and f"{path} is missing" in said.pop()
    save_checkpoint({"epoch": 3}, path)
    path.write_bytes(path.read_bytes()[:100])
    assert load_checkpoint(path, said.append) == {"epoch": 2} and f"{path} is damaged" in said.pop()
    assert load_checkpoint(path, said.append) == {"epoch": 2} and not said
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint.pt is damaged .* and there is none before it; remove it"):
        load_checkpoint(path)


@contextmanager
def other_part(folder, part):
    """Another process that works on a part of the set of images in a folder, as far as its lock shows."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX, 1, int(sys.argv[2])); print(); input()"
    command = [sys.executable, "-c", code, str(folder / ".lock"), str(part)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.communicate(b"\n")


def test_parts_share_a_folder_and_a_damaged_batch_is_made_again(tmp_path, fails, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    folder, flags = tmp_path / "run", {"batch_size": 5, "count": 20, "iterations": 2, "zoo": ["tiny:net"], "zoo_sample": 1}
    arguments = ["--task", "synth", *command_line(DATA | flags), "--out"]
    mixmix.main([*arguments, str(tmp_path / "whole")])
    arguments.append(str(folder))
    mixmix.main([*arguments, "--part", "0/2"])
    with other_part(folder, 1):
        for taken in (["--part", "1/2"], ["--resume"], ["--overwrite", "--part", "0/2"]):
            assert f"--out {folder} is in use by another process" in fails(mixmix.main, *arguments, *taken)
        mixmix.main([*arguments, "--part", "0/2", "--resume"])
    with other_part(folder, 0):
        mixmix.main([*arguments, "--part", "1/2"])
    batches = sorted((folder / "batches").glob("*.npz"))
    content = bytearray(batches[2].read_bytes())
    content[1000] ^= 1
    batches[2].write_bytes(content)
    assert f"{batches[2]} is damaged (Bad CRC-32" in fails(mixmix.main, *arguments, "--resume")
    batches[2].unlink()
    batches[1].write_bytes(batches[1].read_bytes()[:-50])
    mixmix.main([*arguments, "--resume"])
    assert f"{batches[1]} is damaged, so it is made again" in capsys.readouterr().out
    whole, parts = (np.load(tmp_path / name / "images.npz")["images"] for name in ("whole", "run"))
    assert np.array_equal(whole, parts)
