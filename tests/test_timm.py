"""timm's networks and safetensors files. Where the packages are missing, what is said of it is tested, and nothing else."""

import sys

import pytest
import torch
from conftest import trained, without_network
from test_cli import TINY

import gdfq
from common.export import load_quantized
from common.models import load_teacher

NAME = "timm:test_resnet.r160_in1k"


def extra(module):
    """A module of an optional package; the test is skipped where it is not installed."""
    return pytest.importorskip(module, reason=f"{module} is not installed (requirements-extra.txt)")


@pytest.mark.parametrize("package", ["timm", "safetensors"])
def test_a_missing_package_is_named(tmp_path, fails, monkeypatch, package):
    for module in ("timm", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "net.safetensors").write_bytes(b"")
    flags = ["--arch", "timm:resnet18"] if package == "timm" else ["--weights", tmp_path / "net.safetensors"]
    sentence = fails(gdfq.main, *flags)
    assert f"needs {package}, which is not installed; pip install -r requirements-extra.txt" in sentence
    assert "--weights timm is for --arch timm:NAME, and --arch is resnet20" in fails(gdfq.main, "--weights", "timm")


def test_weights_of_safetensors(tmp_path, fails):
    safetensors = extra("safetensors.torch")
    bundled, *_ = load_teacher("resnet20", "cifar10", 10, 32)
    safetensors.save_model(bundled, str(tmp_path / "net.safetensors"))
    loaded, *_ = load_teacher("resnet20", "cifar10", 10, 32, str(tmp_path / "net.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(bundled.state_dict().values(), loaded.state_dict().values()))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:-100])
    assert "cut.safetensors' is damaged or not of safetensors" in fails(gdfq.main, "--weights", tmp_path / "cut.safetensors")


def test_a_network_of_timm_brings_its_own_settings(tmp_path, fails, monkeypatch):
    timm, safetensors = extra("timm"), extra("safetensors.torch")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    without_network(monkeypatch)
    cfg = gdfq.config(arch=NAME, dataset="folder")
    assert (cfg.num_classes, cfg.image_size) == (1000, 160) == (1000, gdfq.config(arch=NAME, dataset="imagenet").image_size)
    file = tmp_path / "hub" / "checkpoints" / "test_resnet.r160_in1k.safetensors"
    sentence = fails(gdfq.main, "--arch", NAME, "--dataset", "folder")
    assert "cannot be fetched" in sentence and f"save it as {file}" in sentence
    assert "is for 1000 classes and the data set has 10" in fails(gdfq.main, "--arch", NAME)
    assert "nearest: test_resnet.r160_in1k" in fails(gdfq.main, "--arch", "timm:test_resnet.r16_in1k")
    assert "'timm:hf-hub:timm/test_resnet' is not in timm" in fails(gdfq.main, "--arch", "timm:hf-hub:timm/test_resnet")
    network = trained(timm.create_model("test_resnet"), size=32, steps=3)
    safetensors.save_model(network, str(file))
    loaded, normalisation, source = load_teacher(NAME, "imagenet", 1000, 160)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), network(x)) and source == "timm" and "state_dict" not in loaded.pretrained_cfg
    assert normalisation == (network.pretrained_cfg["mean"], network.pretrained_cfg["std"])


def test_a_network_of_timm_is_quantized_and_read_again(tmp_path):
    timm, safetensors = extra("timm"), extra("safetensors.torch")
    torch.manual_seed(0)
    weights, name = tmp_path / "net.safetensors", "test_efficientnet"  # whose BatchNorms compute their activations
    safetensors.save_model(trained(timm.create_model(name, num_classes=5), size=32, steps=3), str(weights))
    flags = [*TINY, "--arch", f"timm:{name}", "--weights", str(weights), "--image-size", "32", "--epochs", "3"]
    result = gdfq.main([*flags, "--out", str(tmp_path / "run")])
    assert result["arguments"]["mean"] == list(timm.get_pretrained_cfg(name).mean) and 0 <= result["agreement"] <= 100
    assert load_quantized(tmp_path / "run" / "quantized.pt")(torch.randn(2, 3, 32, 32)).shape == (2, 5)
