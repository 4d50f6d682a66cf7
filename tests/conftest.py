"""Networks and runs small enough for the tests, and one place that makes the tests the same on every machine.

A test runs on the host and in fp32 unless it asks for something else: the defaults of --device and --precision are cpu and fp32
here, where the scripts' `auto` goes by the machine. That no test depends on the machine is shown by runs of the whole suite

    pytest --computes-bf16 yes                                            # as on a CPU that multiplies bf16 in hardware
    pytest --computes-bf16 no                                             # and on one that does not
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 pytest               # other kernels, which round otherwise
    OMP_NUM_THREADS=1 pytest                                              # and sums in another order, as with 2
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common.cli  # noqa: E402
from common.progress import close_all  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "full_agreement: agreement on as many synthetic images as by default")


def pytest_addoption(parser):
    choices = ("auto", "yes", "no")
    parser.addoption("--computes-bf16", choices=choices, default="auto", help="what the hardware is taken to compute")


@pytest.fixture(autouse=True)
def same_on_every_machine(request, monkeypatch):
    """The host and fp32 unless a test says otherwise, whatever hardware there is, and the same random numbers in any order of
    the tests; a run's --threads and progress bar end with its test, also where the run was interrupted."""
    torch.manual_seed(0)
    threads, forced = torch.get_num_threads(), request.config.getoption("--computes-bf16")
    if "full_agreement" not in request.keywords:
        monkeypatch.setattr("common.report.SyntheticSet.count", 100)  # of 2,000, for time
    if forced != "auto":
        monkeypatch.setattr("common.run.computes_bf16", lambda device: forced == "yes")
    for name, value in (("device", "cpu"), ("precision", "fp32")):
        monkeypatch.setitem(common.cli.DEFAULTS, name, value)
    yield
    torch.set_num_threads(threads)
    close_all()


class FunctionalNet(nn.Module):
    """Three convolutions with a shortcut; activations are functions and methods, not modules."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + self.bn3(self.conv3(x))).relu()
        return self.fc(x.mean((2, 3)))


class ModuleNet(nn.Module):
    """A convolution, an activation module and a branch on the data, which cannot be traced."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))


def without_network(monkeypatch):
    """Send what would be downloaded to a proxy that is not there."""
    for name, value in {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}.items():
        monkeypatch.setenv(name, value), monkeypatch.delenv(name.upper(), raising=False)


def trained(model, size=16, steps=20, channels=3):
    """The model with random scales and shifts of its BatchNorms and with their statistics of random images, in eval mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 0, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(torch.randn(32, channels, size, size))
    return model.eval()


@pytest.fixture
def net():
    torch.manual_seed(1)
    return trained(FunctionalNet())


@pytest.fixture
def fails(capsys):
    """Runs a script's main with arguments that cannot be used; returns the one sentence it printed."""

    def run(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in argv])
        printed = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert "Traceback" not in printed and len(printed.splitlines()) == 1
        return printed

    return run
