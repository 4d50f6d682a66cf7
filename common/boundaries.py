"""Qimera's analysis of the space between classes (Table 5, Figures 3 and 5), for a finished run of any script with a generator.

    path_metrics      distance ratio and intrusion score of a path                            Sec. 5.5, Table 5
    measure_paths     both, mean over pairs of classes; features along the paths              Table 5, Figure 5
    gather_features   features of single classes, of superpositions of two and of test images Figure 3

Measures that need superpositions are skipped unless the run's script defines `make_labels`, as qimera.py does.
"""

from collections import defaultdict

import numpy as np
import torch

from common.analysis import TrainedRun, principal_axes, scatter
from common.device import full_precision
from common.progress import Progress
from common.report import print_rows

PATHS = {"zero": "superposed, z = 0", "shared": "superposed, one z per path", "mixup": "pixels of two images mixed"}


def label_maker(run):
    """The function of a run's script that makes labels of superpositions; None where it has none."""
    return getattr(run.script, "make_labels", None)


def path_metrics(features, logits, pair):
    """Table 5's two figures of a path between the classes `pair`: the teacher's features (N, F) and logits (N, C) along it.

    The distance ratio is the path's length over the distance of its ends, at least 1; the intrusion score is the probability
    of all other classes, mean over the points.
    """
    length = (features[1:] - features[:-1]).norm(dim=1).sum()
    others = 1 - logits.softmax(1)[:, list(pair)].sum(1)
    return length / (features[-1] - features[0]).norm(), others.mean()


def measure_paths(run, project, points=101, most_pairs=450, draws=4):
    """Table 5, means over all pairs of classes or `most_pairs` drawn ones, and Figure 5: the paths' features as `project` sees
    them, arrays (paths, points, 2) by name.

    The paper leaves open where the noise comes from: superposed paths, which only Qimera's generators have, are measured for
    z = 0 ("zero") and for one z per path ("shared", `draws` of them a pair). "mixup" mixes the pixels of two images of single
    classes, which have noise of their own (`draws` times a pair).
    """
    pairs = torch.combinations(torch.arange(run.cfg.num_classes))
    if len(pairs) > most_pairs:
        pairs = pairs[torch.randperm(len(pairs))[:most_pairs]]
    share = torch.linspace(1, 0, points, device=run.device)  # lambda of Eq. 6
    found, paths = defaultdict(list), defaultdict(list)

    def note(name, images):
        features, logits = run.look(images)
        found[name].append(path_metrics(features, logits, pair))
        paths[name].append(project(features))

    for pair in Progress(pairs.tolist(), desc="paths between classes", leave=False):
        y = torch.tensor(pair, device=run.device)
        if make_labels := label_maker(run):
            shares = torch.stack([share, 1 - share], 1)
            labels = make_labels(y.expand(points, 2), shares, run.cfg.num_classes)
            note("zero", run.generator(labels, torch.zeros((), device=run.device)))
            for _ in range(draws):
                note("shared", run.generator(labels, run.generator.latent.draw_noise(labels.classes[:1])))
        for _ in range(draws):
            ends = run.sample(y)
            note("mixup", torch.lerp(ends[1], ends[0], share.view(-1, 1, 1, 1)))
    result = {"pairs": len(pairs), "points": points, "draws": draws}
    for name, values in found.items():
        ratio, intrusion = torch.tensor(values).mean(0).tolist()
        result[name] = {"distance_ratio": round(ratio, 4), "intrusion": round(intrusion, 6)}
    return result, {name: np.stack(values) for name, values in paths.items()}


def gather_features(run, samples=2000):
    """Figure 3: the teacher's features (N, F) of images of single classes ("single"), of superpositions of two ("superposed")
    and of test images ("real"), and the labels (N,) of "single" and "real"; two dicts by name."""
    count = run.cfg.num_classes
    y = torch.arange(samples) % count
    features, labels = {"single": torch.cat([run.look(images)[0] for images in run.images(y)])}, {"single": y}
    if make_labels := label_maker(run):
        classes = torch.rand(samples // 4, count).topk(2).indices.to(run.device)  # pairs of different classes
        shares = torch.randn(len(classes), 2).softmax(1).to(run.device)
        parts = [make_labels(*part, count) for part in zip(classes.split(100), shares.split(100))]
        features["superposed"] = torch.cat([run.look(run.generator(part))[0] for part in parts])
    if run.test_set:
        parts = [(run.look(images)[0], y.cpu()) for images, y in run.test_set]
        features["real"], labels["real"] = map(torch.cat, zip(*parts))
    return features, labels


@torch.no_grad()
@full_precision()
def analyze(cfg):
    """The analyses of a run, with K = 2, as `TrainedRun` takes it; returns what analysis/qimera.json holds."""
    run = TrainedRun(cfg)
    features, labels = gather_features(run)
    project = principal_axes(features["single"])
    result, paths = measure_paths(run, project)
    points = {name: project(values) for name, values in features.items()}
    labels = {name: y.numpy() for name, y in labels.items()}
    shown = [name for name in PATHS if name in paths]
    rows = [(PATHS[n], (f"{result[n]['distance_ratio']:.2f}", f"{result[n]['intrusion']:.5f}")) for n in shown]
    print_rows(f"{result['pairs']} paths between classes", ("distance ratio", "intrusion"), rows)

    def synthetic(panel):
        scatter(panel, points["single"], labels["single"])
        if "superposed" in points:
            panel.scatter(*points["superposed"].T, c="black", s=4)

    def between(panel):
        scatter(panel, points["single"], labels["single"], alpha=0.2)
        one_of_each = paths[shown[0]][:: len(paths[shown[0]]) // result["pairs"]]
        panel.plot(*one_of_each[:45].transpose(2, 1, 0), c="black", lw=0.5)  # CIFAR-10's pairs, or as many

    panels = {"test images": lambda panel: scatter(panel, points["real"], labels["real"])} if "real" in points else {}
    panels["synthetic: single classes" + (", superposed in black" if "superposed" in points else "")] = synthetic
    panels[f"paths: {PATHS[shown[0]]}"] = between
    arrays = points | {f"{name}_labels": y for name, y in labels.items()}
    arrays |= {f"path_{name}": values for name, values in paths.items()}
    run.write("qimera", result, arrays, panels, sharex=True, sharey=True)
    return result
