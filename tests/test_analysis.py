"""Analyses of runs by other scripts than their own, and what all analyses share."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from test_data import make_folder

import adadfq
import autorecon
import gdfq
import mixmix
import qimera
from common import InputError
from common.analysis import TrainedRun, principal_axes
from common.export import load_quantized

TINY = "--dataset folder --num-classes 5 --image-size 16 --arch tiny:net --batch-size 8 --epochs 3 --iters 4".split()
TINY += "--warmup-epochs 1 --calibrate-epochs 1 --device cpu --precision fp32".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), 5, images=4, size=16)


@pytest.fixture
def make_run(tmp_path, monkeypatch, data):
    monkeypatch.syspath_prepend(ROOT / "tests")

    def make(script, *flags):
        run = tmp_path / script.__name__
        script.main([*TINY, "--data-dir", str(data), "--out", str(run), *flags])
        return run

    return make


def given(run):
    return SimpleNamespace(analyze=str(run), arch="tiny:net", data_dir=None, device="cpu")


@pytest.mark.parametrize("script", [gdfq, qimera, adadfq, autorecon])
def test_the_generator_of_every_script_comes_back(script, make_run, tmp_path):
    flags = {autorecon: ("--genotype", "random"), qimera: ("--variant", "released")}.get(script, ())
    run = make_run(script, *flags).rename(tmp_path / "moved")
    restored, y = TrainedRun(given(run)), torch.arange(5)
    state = torch.load(run / "checkpoint.pt")["stateful"]["generator"]
    assert state.keys() == restored.generator.state_dict().keys() and not restored.generator.training
    assert all(torch.equal(state[name], value) for name, value in restored.generator.state_dict().items())
    torch.manual_seed(3)
    parts = [restored.script.sample(restored.generator, part, restored.cfg) for part in (y.repeat(20), y)]
    torch.manual_seed(3)
    for ours, expected in zip(restored.images(y.repeat(21)), parts, strict=True):
        assert torch.equal(ours, expected) and ours.shape[1:] == (3, 16, 16)


def test_a_run_of_gdfq_analysed_by_the_other_papers(make_run, monkeypatch, fails, capsys, data):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = make_run(gdfq, "--eval-every", "2")
    result = qimera.main(["--analyze", str(run), "--arch", "tiny:net"])  # Table 5's mixup, Figure 3(b)
    assert result.keys() == {"pairs", "points", "draws", "mixup"} and 0 < result["mixup"]["intrusion"] < 1
    assert "pip install matplotlib" in capsys.readouterr().out
    result = adadfq.main(["--analyze", str(run), "--arch", "tiny:net"])
    assert adadfq.main(["--analyze", str(run), "--arch", "tiny:net"]) == result
    assert json.loads((run / "analysis" / "adadfq.json").read_text()) == result
    arrays = np.load(run / "analysis" / "adadfq.npz")
    h, l1 = arrays["h"].reshape(200, 16), arrays["l1"]
    assert result["cross_entropy"] > 0 and "train_loss" not in result  # that of training is the run's own
    assert (h.min(1) == 0).all() and sum(result["h_histogram"]) == 3200  # Eq. 3: relative to the least of a batch of 16
    assert result["h_mean"] == pytest.approx(h.mean(), rel=1e-4) and result["h_histogram"][0] == (h < 0.05).sum()
    same = np.kron(np.eye(5), np.ones((10, 10))).astype(bool)
    assert l1.shape == (50, 50) and result["l1_between_classes"] == pytest.approx(l1[~same].mean(), rel=1e-4)
    assert result["l1_within_classes"] == pytest.approx(l1[same & ~np.eye(50, dtype=bool)].mean(), rel=1e-4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    student, test_set = load_quantized(run / "quantized.pt", tiny.net()), TrainedRun(given(run)).test_set
    with torch.no_grad():
        losses = [F.cross_entropy(student(images), labels, reduction="none") for images, labels in test_set]
    assert lines[2]["test_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert arrays["test_loss"][1:].tolist() == [line["test_loss"] for line in lines[1:]] and np.isnan(arrays["train_loss"][0])
    kd_apart = lines[2]["loss_q"] - lines[2]["train_loss"]
    assert 0 < kd_apart < lines[2]["loss_q"] and arrays["train_loss"][2] == lines[2]["train_loss"]
    picture = np.array(Image.open(run / "analysis" / "adadfq-images.png"))  # 21 columns and 5 rows of 16 pixels and a border
    assert picture.shape == (5 * 17 + 1, 21 * 17 + 1, 3)
    cells = picture[1:, 1:].reshape(5, 17, 21, 17, 3)[:, :16, :, :16]
    assert (cells[:, :, 4:11] == 255).all()  # each class has four test images, the i-th of class c of the grey value 20 c + i
    grey = 20 * np.arange(5)[:, None] + np.arange(4)
    assert np.abs(cells[:, :, :4] - grey[:, None, :, None, None]).max() <= 1 and (cells[:, :, 11:] != 255).any((1, 3, 4)).all()
    gdfq.main([*TINY, "--data-dir", str(data), "--out", str(run), "--overwrite"])
    assert not (run / "analysis").exists()  # it was that of the replaced run
    (run / "quantized.pt").unlink()
    assert "has no quantized.pt" in fails(adadfq.main, "--analyze", run, "--arch", "tiny:net")
    monkeypatch.setitem(sys.modules, "gdfq", None)
    assert "needs gdfq.py" in fails(qimera.main, "--analyze", run, "--arch", "tiny:net")


def test_folders_that_are_no_run_of_a_generator(make_run, tmp_path):
    run = make_run(gdfq)
    config = json.loads((run / "config.json").read_text())
    for change, words in [
        ({"method": "mixmix"}, "holds a run of mixmix.py, expected one of gdfq, qimera, adadfq, autorecon"),
        ({"method": "antigravity"}, "holds a run of antigravity.py"),  # nothing that a file names is imported
        ({"latent_dim": 7}, "is a run of another version"),
        ({"latent_dim": None}, "is a run of another version"),
    ]:
        (run / "config.json").write_text(json.dumps(config | {"arguments": config["arguments"] | change}))
        with pytest.raises(InputError, match=words):
            TrainedRun(given(run))
    assert mixmix and "antigravity" not in sys.modules
    shutil.copy(ROOT / "README.md", run / "checkpoint.pt")
    with pytest.raises(InputError, match="is not a run folder with config.json and checkpoint.pt"):
        TrainedRun(given(run))


def test_principal_axes_are_those_of_the_covariance():
    torch.manual_seed(0)
    x = (torch.randn(300, 4) * torch.tensor([0.1, 3.0, 0.5, 1.0])) @ torch.linalg.qr(torch.randn(4, 4)).Q + 5
    project, vectors = principal_axes(x), torch.linalg.eigh(x.double().T.cov()).eigenvectors
    expected = (x.double() - x.double().mean(0)) @ vectors[:, [3, 2]]
    np.testing.assert_allclose(np.abs(project(x)), expected.abs(), atol=1e-4)
    assert project(x[:7] + 1).shape == (7, 2)
