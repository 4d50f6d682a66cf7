"""What networks see in images (MixMix, Sec. 3.2, 5.1): accuracies, Inception Score and distance of the BatchNorm statistics."""

import math
from pathlib import Path

import torch

from common.device import full_precision
from common.images import read_images
from common.progress import Progress
from common.report import print_rows, show_finished, write_result
from common.run import Run
from common.zoo import load_zoo


@full_precision()
def look(model, images, labels, batch_size, device):
    """What one network makes of images: top-1 accuracy in percent, L_BN (Eq. 2, mean over batches), class probabilities."""
    model = model.place(device)
    probabilities, losses = [], []
    for some in images.tensor_split(math.ceil(len(images) / batch_size)):  # none much smaller than the others
        probabilities.append(model(some.to(device, torch.float32)).softmax(1).cpu())
        losses.append(model.stats.loss("norm").item())
    probabilities = torch.cat(probabilities)
    top1 = 100 * (probabilities.argmax(1) == labels).float().mean().item()
    return top1, sum(losses) / len(losses), probabilities


def inception_score(probabilities):
    """exp of the mean Kullback-Leibler divergence from each image's class probabilities (N, C) to their mean; 1 to C."""
    p = probabilities.double().clamp(min=1e-16)
    return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()


def judge(zoo, held_out, images, labels, source, cfg, device):
    """What all networks see in one set of images; the Inception Score is that of the first held-out one, or of the zoo."""
    seen = {}
    for model in Progress([*zoo, *held_out], desc=source, leave=False):
        top1, bn, probabilities = look(model, images, labels, cfg.batch_size, device)
        seen[model.name] = {"top1": round(top1, 2), "bn_loss": round(bn, 4)}
        if model is (held_out or zoo)[0]:
            score = inception_score(probabilities)
    accuracies = torch.tensor([seen[model.name]["top1"] for model in zoo])
    mean, deviation = accuracies.mean().item(), accuracies.std(correction=0).item()
    judged = {"images": len(labels), "zoo_top1": round(mean, 2), "zoo_deviation": round(deviation, 2)}
    return judged | {"inception_score": round(score, 3), "models": seen}


def evaluate(cfg):
    """--task evaluate: what the zoo's and the held-out networks see in the images of each --images (Tables 1 and 2).

    Args:
        cfg: --zoo, --held-out, --images, --batch-size and the shared flags.

    Returns:
        The contents of evaluation.json, by source: accuracies and BN losses by network, mean and deviation of the zoo's, and
        the Inception Score.
    """
    run, result, loaded_for = Run(cfg, cfg.out, result="evaluation.json"), {}, None
    if run.finished:
        return show_finished(run, show_evaluation)
    for name in cfg.images:
        images, labels, shared = read_images(name, cfg, labelled=True)
        if shared != loaded_for:  # most often once: all sources are normalised alike
            (zoo, _), (held_out, _) = (load_zoo(names, cfg, shared) for names in (cfg.zoo, cfg.held_out))
            loaded_for = shared
        result[name] = judge(zoo, held_out, images, labels, name, cfg, run.device)
    run.start()
    return write_result(run, result, show_evaluation)


def show_evaluation(result, run):
    """Print the contents of evaluation.json as tables."""
    found, models = list(result.values()), [*run.cfg.zoo, *run.cfg.held_out]
    titles = [f"  {name} (held out)" if name in run.cfg.held_out else f"  {name}" for name in models]
    columns = [(path.parent if path.is_file() else path).name[-18:] for path in map(Path, result)]
    for title, key in (("accuracy, %", "top1"), ("L_BN (Eq. 2)", "bn_loss")):
        figures = [[f"{r['models'][name][key]:.2f}" for r in found] for name in models]
        print_rows(title, columns, zip(titles, figures))
    means = [f"{r['zoo_top1']:.2f} ± {r['zoo_deviation']:.2f}" for r in found]
    print_rows("zoo, mean ± deviation", means, [("Inception Score", [f"{r['inception_score']:.2f}" for r in found])])
    print(f"  in {run.folder}/: {run.result_file}")
