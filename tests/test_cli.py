"""The command line end to end: what a run leaves, what it refuses, how it goes on after it was killed."""

import errno
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, without_network
from test_data import make_cifar100, make_folder

import adadfq
import autorecon
import gdfq
import mixmix
import qimera
from common import InputError
from common.cli import friendly_errors
from common.export import load_quantized
from common.models import build
from common.progress import SECONDS_BETWEEN_LINES, Progress
from common.report import SyntheticSet
from common.run import Run

TINY = "--arch tiny:net --dataset folder --num-classes 5 --image-size 16 --batch-size 8 --iters 3 --warmup-epochs 2".split()
TINY += "--calibrate-epochs 2 --device cpu --precision fp32 --lr-q 0.01".split()


def start(folder, *flags):
    command = [sys.executable, str(ROOT / "gdfq.py"), *TINY, "--out", str(folder), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell runs in the background ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=heed, **pipes)


def read_metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    for epochs in (1, 5):  # killed while it calibrates, and while it fine-tunes
        killed = start(tmp_path / "killed", "--epochs", 16, "--threads", 1, "--resume")
        while killed.poll() is None and len(read_metrics(tmp_path / "killed")) < epochs:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "result.json").exists()
    for name, flags in (("whole", []), ("killed", ["--resume"])):
        gdfq.main([*TINY, "--epochs", "16", "--threads", "1", "--out", str(tmp_path / name), *flags])
    files = [(tmp_path / name / "quantized.pt").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "killed")
    assert len(read_metrics(tmp_path / "whole")) == 16


def test_a_copy_of_the_script_and_common_works_alone(tmp_path):
    shutil.copy(ROOT / "gdfq.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    shutil.copy(ROOT / "tests" / "tiny.py", tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    command = [sys.executable, "gdfq.py", *TINY, "--epochs", "3", "--bits", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").glob("gdfq-tiny-net-folder-w3a3-s0-epochs3-*")
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "samples.png", "quantized.pt", "result.json", ".lock",
    }  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert result["fp_top1"] is None and result["test_set"] is None and 0 <= result["agreement"] <= 100
    assert result["machine"]["threads"] == 1 and result["machine"]["processor"]
    assert result["bytes_quantized"] == (run / "quantized.pt").stat().st_size
    assert "agreement with the full-precision network" in done.stdout and "synthetic images" in done.stdout


def test_a_run_with_a_test_set_and_its_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    data, run = make_folder(tmp_path / "data", 5, images=4, size=16), tmp_path / "run"
    arguments = [*TINY, "--epochs", "4", "--out", str(run), "--data-dir", str(data), "--eval-every", "2"]
    result = gdfq.main(arguments)
    assert result["images"] == 20 and result["calibrated_top1"] is not None
    assert ["top1" in line for line in read_metrics(run)] == [False, False, False, True]
    gdfq.main([*arguments[:-1], "1", "--out", str(tmp_path / "other")])  # evaluating more often changes nothing
    assert (run / "quantized.pt").read_bytes() == (tmp_path / "other" / "quantized.pt").read_bytes()
    where = ["--arch", "tiny:net", "--data-dir", str(data), "--device", "cpu"]
    assert gdfq.main(["--eval", str(run / "quantized.pt"), *where]) == {"top1": result["last_top1"], "images": 20}
    assert "fine-tuned, last epoch" in capsys.readouterr().out


def test_cifar100_from_its_own_files(tmp_path, monkeypatch, capsys):
    make_cifar100(tmp_path / "data", monkeypatch)
    torch.save(build("resnet20", 100, 32, "pad").state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    small = "--epochs 2 --iters 1 --batch-size 4 --warmup-epochs 0 --device cpu".split()
    result = gdfq.main(["--dataset", "cifar100", "--weights", "weights.pt", *small])
    assert result["images"] == 20 and result["arguments"]["num_classes"] == 100
    shown = f"full precision {result['fp_top1']:.2f} % (in Qimera and AdaDFQ 70.33 %), top-5 {result['fp_top5']:.2f} %\n"
    assert shown in capsys.readouterr().out
    (path,) = tmp_path.glob("runs/gdfq-resnet20-cifar100-w4a4-s0*/quantized.pt")
    assert 100 >= result["fp_top5"] >= result["fp_top1"] and 100 >= result["last_top5"] >= result["last_top1"]
    found = gdfq.main(["--eval", str(path), "--data-dir", "data", "--device", "cpu"])
    assert found == {"top1": result["last_top1"], "top5": result["last_top5"], "images": 20}
    assert f"%, top-5 {found['top5']:.2f} % of 20 test images" in capsys.readouterr().out
    student = load_quantized(path)
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 100)


@pytest.mark.full_agreement
def test_synthetic_images_for_agreement_are_all_different():
    run = Run(gdfq.config(dataset="folder", num_classes=5, image_size=16, batch_size=20, device="cpu"))
    run.synthesize = lambda labels: torch.rand(len(labels), 1) + labels[:, None]
    images, labels = (torch.cat(parts) for parts in zip(*SyntheticSet(run)))
    assert len(images.unique()) == len(images) == 2000
    assert torch.equal(images[:, 0].long(), labels) and labels.bincount().tolist() == [400] * 5


def test_calibration_shorter_than_its_epochs_is_still_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    data = make_folder(tmp_path / "data", 5, images=4, size=16)
    calibrating = [*TINY[: TINY.index("--warmup-epochs")], *"--calibrate-epochs 2 --device cpu --no-finetune".split()]
    result = gdfq.main([*calibrating, "--epochs", "1", "--out", str(tmp_path / "run"), "--data-dir", str(data)])
    assert result["calibrated_top1"] is not None and result["last_top1"] is None


def test_grey_images_and_a_convolution_as_classifier(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    data = make_folder(tmp_path / "data", 5, images=4, size=16)
    arguments = ["tiny:grey" if argument == "tiny:net" else argument for argument in TINY]
    result = gdfq.main([*arguments, "--epochs", "3", "--out", str(tmp_path / "run"), "--data-dir", str(data)])
    assert result["images"] == 20 and result["arguments"]["mean"] == [0.5]


def test_the_readmes_commands_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "found").mkdir(parents=True)  # what one of the commands leaves for another
    (tmp_path / "runs" / "found" / "genotype.json").write_text(json.dumps({"edges": autorecon.read_genotype("random")}))
    runs = []
    for method in (gdfq, qimera, adadfq, autorecon, mixmix):
        name = f"python {method.__name__}.py"
        lines = [line.split("#")[0] for line in (ROOT / "README.md").read_text().splitlines() if name in line]
        argv = [shlex.split(line.split(name, 1)[1]) for line in lines if not line.startswith("|")]
        runs += [method.parse_args(arguments) for arguments in argv if "--analyze" not in arguments]
    assert len(runs) >= 10 and len({run.out for run in runs}) == len(runs)


def test_unusable_input_ends_with_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    torch.save(build("resnet20", 100, 32).state_dict(), tmp_path / "hundred.pt")
    (tmp_path / "file").write_text("")
    (tmp_path / "none").mkdir()
    for arguments, words in [
        (["--arch", "resnet21"], "nearest: resnet"),
        (["--dataset", "cifar11"], "did you mean cifar10"),
        (["--bits", 9], "--bits is 9; give a whole number from 2 to 8; see gdfq.py --help"),
        (["--abits", 1], "--abits is 1"),
        (["--bits", "four"], "--bits is four; give a whole number from 2 to 8"),
        (["--bit", 4], "unrecognized arguments"),
        (["--weights", "hundred.pt"], "100 classes and the data set has 10"),
        (["--weights", "hundred.pt", "--num-classes", 100], "use --dataset folder"),
        (["--dataset", "folder"], "needs --num-classes"),
        (["--data-dir", "none"], "neither test/ nor val/"),
        (["--device", "cuda:7"], "CUDA device(s); give"),
        (["--device", "tpu"], "give auto, cpu"),
        (["--no-kd", "--temperature", 4], "--temperature has no effect with --no-kd; leave one of them out"),
        (["--no-kd", "--no-student-ce", "--lr-q", 1], "--lr-q has no effect with --no-kd and --no-student-ce"),
        (["--no-kd", "--no-student-ce", "--data-source", "confusing"], "--no-student-ce has no effect with --data-source"),
        (["--no-bns", "--bns-weight", 0.1], "--bns-weight has no effect with --no-bns"),  # also where it is the default
        ([*TINY, "--no-finetune"], "--warmup-epochs has no effect with --no-finetune"),
        ([*TINY, "--batch-size", 1, "--image-size", 4, "--arch", "tiny:grey"], "--batch-size is 1 with --image-size 4"),
        (["--check", *TINY, "--arch", "tiny:plain"], "no BatchNorm2d"),
        (["--iters", 0], "--iters is 0"),
        (["--eval", "absent.pt"], "is not a file"),
        (["--eval", "absent.pt", "--epochs", 3], "--epochs has no effect with --eval; leave one of them out"),
        (["--eval", "absent.pt", "--weights", "hundred.pt"], "--weights has no effect with --eval"),
        ([*TINY, "--mean", 1, 2], "--mean has 2 values"),
        ([*TINY, "--mean", "nan"], "--mean is nan"),
        ([*TINY, "--std", 0], "--std is 0.0"),
        (
            [*TINY, "--mean", 123.7, "--std", 58],
            "--mean is 123.7, as for pixels from 0 to 255; give numbers for pixels from 0 to 1",
        ),
        ([*TINY, "--device", "meta"], "--device is 'meta'; give auto, cpu, cuda or cuda:i"),
        ([*TINY, "--data-dir", "absent"], "--data-dir 'absent' is not a folder; give one with val or test/ in it"),
        ([*TINY, "--out", "file/run"], "cannot be written"),
        ([*TINY, "--out", ""], "--out is empty"),
        (["--arch", "./nets:make"], "cannot be imported"),
        (["--dataset", "imagenet", "--arch", "resnet20"], "no ImageNet weights in torchvision"),
    ]:
        assert words in fails(gdfq.main, *arguments), arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "hundred.pt", "none"]


def test_a_missing_download_says_what_and_where(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    without_network(monkeypatch)
    sentence = fails(gdfq.main, "--dataset", "cifar100")
    assert "resnet20_cifar100-2964-a5322afe.pth.zip cannot be fetched" in sentence
    assert f"save its one file as {tmp_path}/hub/checkpoints/resnet20_cifar100-2964-a5322afe.pth" in sentence
    torch.save(build("resnet20", 100, 32).state_dict(), tmp_path / "weights.pt")
    assert "save it as data/cifar-100-python.tar.gz" in fails(gdfq.main, "--dataset", "cifar100", "--weights", "weights.pt")


def test_what_is_not_a_run_stays(tmp_path, fails, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    (tmp_path / "samples.png").write_bytes(b"mine")
    sentence = fails(gdfq.main, *TINY, "--out", tmp_path, "--epochs", 3)
    assert f"--out {tmp_path} is not a run folder but contains 'samples.png', which a run would replace" in sentence
    assert [path.name for path in tmp_path.rglob("*")] == ["samples.png"]


def test_no_result_is_lost_to_a_repeated_command(tmp_path, fails, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    run, arguments = tmp_path / "run", [*TINY, "--out", str(tmp_path / "run"), "--epochs", "3"]
    result = gdfq.main(arguments)
    first = capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    for again in ([], ["--resume"], ["--eval-every", "2"]):
        assert gdfq.main([*arguments, *again]) == result
        printed = capsys.readouterr().out
        assert printed.startswith("\ngdfq  w4a4") and "--overwrite runs it again" in printed
        assert first[first.index("\ngdfq  w4a4") :].strip() in printed  # the same table
    gdfq.main([*arguments, "--data-dir", str(run)])
    assert f"not with the images in {run}; for these, --eval {run}/quantized.pt --data-dir {run}" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert "(epochs 3 there, 4 here); give another --out, or --overwrite" in fails(gdfq.main, *arguments[:-1], 4, "--resume")
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"bns_form"', '"older"'))  # of a version with other flags
    assert "bns_form unknown there, gdfq here; older gdfq there, unknown here" in fails(gdfq.main, *arguments)
    (run / "config.json").write_text(config)
    (run / "result.json").write_text("{")
    assert "result.json is damaged; --overwrite runs it again" in fails(gdfq.main, *arguments)
    (run / "result.json").unlink()
    assert "holds an unfinished run; give --resume to continue it, or --overwrite" in fails(gdfq.main, *arguments)
    assert (run / "quantized.pt").exists()
    assert gdfq.main([*arguments, "--overwrite"])["agreement"] == result["agreement"]
    (run / "result.json").unlink()
    (run / "checkpoint.pt").write_bytes(b"damaged")
    assert "checkpoint.pt is damaged" in fails(gdfq.main, *arguments, "--resume")
    for content in ("{", '{"model_type": "resnet"}'):  # the second of another program
        (run / "config.json").write_text(content)
        for flags in ([], ["--overwrite"]):
            assert "config.json that is damaged or does not belong to a run" in fails(gdfq.main, *arguments, *flags)
    assert (run / "checkpoint.pt").read_bytes() == b"damaged"


def test_a_resumed_run_may_have_other_test_images(tmp_path, monkeypatch, fails):
    monkeypatch.syspath_prepend(ROOT / "tests")
    arguments = [*TINY, "--out", str(tmp_path / "run"), "--epochs", "3"]
    gdfq.main(arguments)
    before = (tmp_path / "run" / "quantized.pt").read_bytes()
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed before the end
    data = make_folder(tmp_path / "data", 5, images=4, size=16)
    result = gdfq.main([*arguments, "--resume", "--data-dir", str(data), "--eval-every", "3", "--threads", "1"])
    assert result["images"] == 20 and (tmp_path / "run" / "quantized.pt").read_bytes() == before
    other = [*arguments[:-1], "4", "--overwrite", "--data-dir", str(data)]
    gdfq.main(other)
    (tmp_path / "run" / "result.json").unlink()
    larger = make_folder(tmp_path / "larger", 5, images=6, size=16)  # on which nothing of the table would have been measured
    again = [argument for argument in other if argument != "--overwrite"]
    assert gdfq.main([*again, "--resume"])["images"] == 20
    (tmp_path / "run" / "result.json").unlink()
    sentence = fails(gdfq.main, *again[:-1], larger, "--resume")
    assert "the run was begun with 20 test images, and there are 30 now; give --data-dir as before" in sentence


def test_a_run_does_not_replace_what_it_reads(tmp_path, monkeypatch, fails):
    monkeypatch.syspath_prepend(ROOT / "tests")
    run = tmp_path / "run"
    images = [
        *TINY[: TINY.index("--batch-size")],
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--zoo",
        "tiny:net",
        "--zoo-sample",
        "1",
        "--count",
        "10",
        "--iterations",
        "2",
    ]
    mixmix.main([*images, "--task", "synth", "--batch-size", "10", "--out", str(run)])
    ptq = [
        *images[: images.index("--zoo")],
        "--weight-iterations",
        "1",
        "--step-iterations",
        "1",
        "--overwrite",
        "--out",
        str(run),
    ]
    for given in (run, run / "images.npz"):
        assert f"--images {given} lies in --out {run}, which is to be replaced" in fails(mixmix.main, *ptq, "--images", given)
    assert (run / "images.npz").exists() and (run / "result.json").exists()
    gdfq.main([*TINY, "--epochs", "3", "--overwrite", "--out", str(run)])
    assert not (run / "images.npz").exists() and not (run / "grid.png").exists()  # of the set, which is no more


def test_check_prints_the_layers_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    for method in (gdfq, adadfq, qimera, autorecon):
        found = method.main(["--check", *TINY, "--epochs", "9", "--bits", "3"])
        assert [row[:6] for row in found["rows"]] == [
            ("conv1", "Conv2d", "8x3x3x3", 3, 216, 216 * 64),
            ("conv2", "Conv2d", "8x8x3x3", 3, 576, 576 * 64),
            ("conv3", "Conv2d", "8x8x1x1", 3, 64, 64 * 64),
            ("fc", "Linear", "5x8", 3, 40, 40),
        ]
        sources = [row[6] for row in found["rows"]]
        assert sources == ["the image, full precision", "relu, 3 bits", "relu, 3 bits", "mean, full precision"]
        assert found["bytes_student"] < found["bytes_fp32"]
    assert "activations quantized: 3 to 3 bits" in capsys.readouterr().out
    found = gdfq.main(["--check", *TINY, "--act-placement", "input"])
    assert [row[6] for row in found["rows"]] == ["the image, 8 bits", "relu, 4 bits", "relu, 4 bits", "mean, 4 bits"]
    assert gdfq.main(["--check", *[a if a != "tiny:net" else "tiny:branch" for a in TINY]])["rows"][0][6].startswith("unknown")
    assert not list(tmp_path.iterdir())


def test_a_setting_that_does_not_exist_is_refused_whatever_its_value():
    for value in (True, False, None, 3):
        with pytest.raises(InputError, match="config.. has no setting 'no_finetun'"):
            gdfq.config(no_finetun=value)
    assert not qimera.config(no_dm=True).dm and qimera.config(no_dm=False).dm


def test_help_shows_defaults_of_zero():
    assert "seed of every random number (default: 0)" in " ".join(gdfq.parser().format_help().split())


def test_progress_in_a_log_is_a_few_lines_and_an_error_has_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    began = time.monotonic()
    gdfq.main([*TINY, "--out", str(tmp_path / "run"), "--epochs", "6", "--iters", "10"])
    most = 2 + (time.monotonic() - began) / SECONDS_BETWEEN_LINES
    lines = capsys.readouterr().err.splitlines()
    assert (
        1 <= len(lines) <= most
        and "100%" in lines[-1]
        and "loss_q=" in lines[-1]
        and all(len(line) <= 100 and "\r" not in line for line in lines)
    )
    bar = Progress(total=10)
    Progress(total=10, desc=70 * "a").show({"loss_g": 1.0})  # for which no room is left
    bar.show({"gain": 1.0, "bns": 2.0, "loss_g": 3.0, "h": 4.0, "h_q10": 5.0, "loss_q": 6.0, "top1": 7.0})
    assert bar.postfix == "loss_g=3, loss_q=6, top1=7, gain=1"
    with pytest.raises(SystemExit), friendly_errors("gdfq.py"):
        raise InputError("what is wrong")
    assert capsys.readouterr().err.endswith("\ngdfq.py: error: what is wrong\n")


def test_only_what_can_be_resumed_speaks_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def printed(place, *arguments):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(place, interrupted)
            gdfq.main(arguments)
        assert stop.value.code == 130
        return capsys.readouterr().err.splitlines()[-1]

    run = [*TINY, "--out", str(tmp_path / "run")]
    assert printed("gdfq.generator_loss", *run).endswith("stopped; the same command with --resume continues it")
    assert printed("common.report.load_teacher", *run, "--check") == "gdfq.py: stopped"
    assert printed("common.report.read_quantized", "--eval", "file.pt") == "gdfq.py: stopped"


def test_a_diverging_run_names_the_step_and_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    with pytest.raises(SystemExit) as stop:
        gdfq.main([*TINY[:-1], "1e30", "--out", str(tmp_path / "run"), "--epochs", "9"])
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "loss_q became" in sentence and "give another --out" in sentence
    assert "checkpoint.pt holds the first 2 epochs" in sentence


@pytest.mark.parametrize("error, sentence", [
    (
        torch.OutOfMemoryError("CUDA out of memory.\nMore of it"),
        "out of GPU memory (CUDA out of memory.); lower the batch size, or give --device cpu",
    ),
    (
        PermissionError(errno.EACCES, "Permission denied", "/root/x"),
        "/root/x cannot be used (Permission denied); give another path, or change its permissions",
    ),
])  # fmt: skip
def test_a_full_gpu_or_a_forbidden_path_is_one_sentence(fails, error, sentence):
    def main(argv):
        with friendly_errors("gdfq.py"):
            raise error

    assert fails(main) == f"gdfq.py: error: {sentence}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    arguments = [argument if argument != "cpu" else "cuda" for argument in TINY]
    result = gdfq.main([*arguments, "--out", str(tmp_path / "run"), "--epochs", "3", "--iters", "6"])
    assert result["peak_mb"] > 0
