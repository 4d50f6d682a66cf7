"""What the analyses of finished runs share: a run's networks and images, the teacher's features, files and pictures."""

import argparse
import copy
import importlib
import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from common import InputError, first_line, replacing
from common.data import find_test_set
from common.device import pick_device
from common.export import load_quantized
from common.images import save_grid
from common.models import is_own, load_teacher
from common.probe import input_channels, probe
from common.progress import Progress
from common.run import write_atomically
from common.trace import last_layer

SCRIPTS = ("gdfq", "qimera", "adadfq", "autorecon")  # those that train a generator, each with `make_generator` and `sample`
WHITE = 1e3  # a pixel, however images are normalised


class TrainedRun:
    """A run of a generator script; its networks are in eval mode.

    Args:
        given: arguments of the analysis: --analyze, and --arch, --data-dir and --device, which the run's own may need.

    Attributes:
        cfg: the run's arguments; `out` is where its folder lies now.
        history: its lines of metrics.jsonl.
        device, teacher, generator, student: the networks, on the device; the student is read from quantized.pt when it is used.
        test_set: re-iterable over (images, labels), or None.

    Raises:
        InputError: a folder without such a run, or one that cannot be written.
    """

    def __init__(self, given):
        self.folder, self.device = Path(given.analyze), pick_device(given.device)
        try:
            self.cfg = cfg = argparse.Namespace(**json.loads((self.folder / "config.json").read_text())["arguments"])
            state = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            weights, self.history = state["stateful"]["generator"], state["history"]
            method, own, cfg.out = cfg.method, is_own(cfg.arch), str(self.folder)
        except Exception:  # whatever damaged bytes raise
            self._refuse("is not a run folder with config.json and checkpoint.pt of a trained generator; give one")
        if method not in SCRIPTS:
            self._refuse(f"holds a run of {method}.py, expected one of {', '.join(SCRIPTS)}; give one of these")
        if not weights:
            self._refuse("is a run with real images and has no generator; give another")
        if own and cfg.arch != given.arch:
            self._refuse(f"is of an own architecture; give --arch {cfg.arch}, if you trust that code")
        if not os.access(self.folder, os.W_OK):
            self._refuse("cannot be written, and the analysis is written there; give a copy")
        try:
            self.script = importlib.import_module(method)
        except ImportError:
            self._refuse(f"needs {method}.py, whose run it is; copy it beside this script")
        teacher, *_ = load_teacher(cfg.arch, cfg.dataset, cfg.num_classes, cfg.image_size, cfg.weights)
        self.teacher = teacher.float().to(self.device)
        self.example, channels = probe(self.teacher, cfg.num_classes, cfg.image_size), input_channels(self.teacher)
        try:
            generator = self.script.make_generator(self.teacher, cfg, channels, self.example)
            generator.load_state_dict(weights)
        except (AttributeError, RuntimeError, TypeError) as error:
            self._refuse(f"is a run of another version ({first_line(error)}); make it again")
        self.generator = generator.to(self.device).eval()
        cfg.data_dir = given.data_dir or cfg.data_dir
        self.test_set = find_test_set(cfg, self.device, channels)
        torch.manual_seed(cfg.seed)

    def _refuse(self, why):
        raise InputError(f"--analyze {self.folder} {why}") from None

    @cached_property
    def place(self):
        """Where the analysis goes."""
        place = self.folder / "analysis"
        place.mkdir(exist_ok=True)
        return place

    @cached_property
    def student(self):
        file = self.folder / "quantized.pt"
        if not file.is_file():
            self._refuse("has no quantized.pt, whose network is analysed; give a finished run that quantizes")
        return load_quantized(file, copy.deepcopy(self.teacher).cpu()).to(self.device)

    def sample(self, y):
        """Fresh images of labels y (B,), on the device."""
        return self.script.sample(self.generator, y.to(self.device), self.cfg)

    def images(self, y):
        """Fresh images of labels y (N,), in batches of at most 100."""
        yield from map(self.sample, Progress(y.split(100), desc="synthetic images", leave=False))

    @cached_property
    def _entering(self):
        """What the last pass has sent into the teacher's last layer, by the name "features"."""
        try:
            seen, layer = {}, self.teacher.get_submodule(last_layer(self.teacher, self.example)[0])
        except InputError as error:
            raise InputError(f"--analyze {self.folder}: {error}; analyse a run of a network with such a layer") from None
        layer.register_forward_pre_hook(lambda _, args: seen.update(features=args[0].flatten(1)))
        return seen

    def look(self, images):
        """Features (N, F) that enter the teacher's last layer, and its logits (N, C), on the CPU."""
        seen, logits = self._entering, self.teacher(images)
        return seen["features"].cpu(), logits.cpu()

    def logits(self, batches):
        """The teacher's and the student's logits (N, C) of batches of images, on the CPU."""
        return [torch.cat(parts) for parts in zip(*((self.teacher(x).cpu(), self.student(x).cpu()) for x in batches))]

    def losses(self):
        """The student's cross-entropy by epoch, in training ("train_loss") and on test images ("test_loss"), as far as the run
        has recorded it: a dict of arrays with NaN in the other epochs."""
        names = [name for name in ("train_loss", "test_loss") if any(name in line for line in self.history)]
        return {name: np.array([line.get(name, np.nan) for line in self.history]) for name in names}

    def save_beside_real(self, name, images, classes):
        """A grid of one row per class, analysis/NAME.png: first test images, where there are any, then synthetic ones.

        Args:
            name: of the picture.
            images: (classes, n, channels, H, W), normalised.
            classes: their labels, (classes,).
        """
        count = images.shape[1]
        grid = torch.full((len(classes), 2 * count + 1, *images.shape[2:]), WHITE)
        grid[:, count + 1 :], found = images, [0] * len(classes)
        for batch, labels in Progress(self.test_set or (), desc="test images", leave=False):
            for row, label in enumerate(classes.tolist()):
                new = batch[labels == label][: count - found[row]].cpu()
                grid[row, found[row] : found[row] + len(new)] = new
                found[row] += len(new)
            if min(found) == count:
                break
        save_grid(grid.flatten(0, 1), self.cfg, self.place / f"{name}.png", grid.shape[1])

    def write(self, name, result, arrays, panels, **shared):
        """Leave a result, arrays and a picture in the run's folder, as analysis/NAME.json, .npz and .png; say so.

        Args:
            name: of the analysis.
            result: a dict for JSON.
            arrays: dict of arrays.
            panels, shared: as for `draw`.
        """
        place = self.place
        with replacing(place / f"{name}.npz") as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        write_atomically(place / f"{name}.json", json.dumps(result, indent=1))
        draw(place / f"{name}.png", panels, **shared)
        print(f"  in {place}/: {', '.join(sorted(path.name for path in place.glob(f'{name}*')))}")


def principal_axes(features):
    """The function that projects features onto the first two principal axes of `features` (N, F): (M, F) -> (M, 2), NumPy."""
    centre = features.mean(0)
    axes = torch.linalg.svd(features - centre, full_matrices=False).Vh[:2].T
    return lambda others: ((others - centre) @ axes).numpy()


def plot_losses(panel, losses):
    """Draw what `TrainedRun.losses` returns."""
    for name, values in losses.items():
        epochs = np.flatnonzero(np.isfinite(values))
        panel.plot(epochs + 1, values[epochs], ".-", label={"train_loss": "training", "test_loss": "test images"}[name])
    panel.set_xlabel("epoch")
    panel.legend()


def scatter(panel, points, labels, **style):
    """Draw points (N, 2) in the colours of their labels (N,)."""
    panel.scatter(*points.T, c=labels, cmap="tab10" if labels.max() < 10 else "hsv", s=4, **style)


def draw(path, panels, size=(6, 5.5), **shared):
    """A picture of panels side by side, where matplotlib is installed.

    Args:
        path: of a PNG file.
        panels: dict of title -> function that draws on matplotlib Axes.
        size: of a panel in inches.
        shared: sharex, sharey of matplotlib's `subplots`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("  no picture: matplotlib is not installed; pip install matplotlib, then repeat")
        return
    figure = Figure((size[0] * len(panels), size[1]), layout="tight")
    for axes, (title, paint) in zip(figure.subplots(1, len(panels), squeeze=False, **shared)[0], panels.items()):
        axes.set_title(title)
        paint(axes)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
