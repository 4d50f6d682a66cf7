"""Train a CIFAR network from scratch, as a teacher:  python -m common.pretrain --arch resnet20 --data-dir DIR --out FILE

DIR holds train/ and test/, each with one folder per class, or torchvision's own files. FILE is for --weights of all scripts.

--recipe fast made the bundled networks. Muon trains all kernels, depthwise ones too (after three epochs its loss was a
fifth below SGD's), SGD with Nesterov momentum everything else; half an epoch of linear warm-up, then a linear decay to
zero; random translations and alternating flips. The first `--small-epochs` epochs see crops of `--small-size` pixels, which
cost half as much; the rest see the full image.

--recipe sgd is the usual one: SGD with momentum 0.9 from a rate of 0.1, which falls along a cosine or is divided by 10 at
`--decay-epochs`; weight decay 5e-4 on everything; crops of images with a black border of 4 pixels, random flips. The
ResNet-34 of DAFL's code has `--epochs 199 --decay-epochs 80 120`.

The test images are used only once, after the last epoch, so nothing is selected on them. Images that do not fill the last batch
of an epoch are skipped. Repeat the command to continue an interrupted run.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import InputError
from common.checkpoint import load_checkpoint, previous, save_checkpoint
from common.cli import Arguments, Help, friendly_errors, number, resumable, whole
from common.data import KINDS, NORMALISATION, NUM_CLASSES, accuracy, as_tensors, fetch_cifar, in_memory, read_cifar
from common.device import pick_device
from common.models import build, save_weights
from common.probe import input_channels, probe
from common.progress import Progress

RECIPES = {  # what each takes, and its defaults
    "fast": dict(epochs=42, small_epochs=26, small_size=24, pad=2, lr_kernels=0.03, lr=0.1, weight_decay=5e-4),
    "sgd": dict(epochs=200, decay_epochs=[], pad=4, lr=0.1, weight_decay=5e-4),
}


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), for kernels followed by BatchNorm.

    Such kernels have no scale of their own, so each is kept at norm sqrt(rows) and `lr` is the step relative to that.
    """

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:  # of a part that the forward leaves out
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buffer, alpha=group["momentum"])
                p.mul_(len(p) ** 0.5 / p.norm())
                p.sub_(orthogonalise(update.flatten(1)).view(p.shape), alpha=group["lr"])


def orthogonalise(matrix, steps=3):
    """An approximation of the nearest semi-orthogonal matrix, from a quintic Newton-Schulz iteration."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def augment(images, flip, size, pad, generator, border="reflect"):
    """Translate and flip a batch.

    Args:
        images: (B, C, H, W) float, any range.
        flip: (B,) bool, which images to mirror.
        size: side of the crop in pixels, at most H + 2 * pad.
        pad: width of the border in pixels.
        generator: source of the offsets.
        border: "reflect", or "constant" for zeros.

    Returns:
        (B, C, size, size), each image cropped at its own offset.
    """
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    images = F.pad(images, (pad,) * 4, mode=border)
    batch, channels, side = images.shape[:3]
    rows, columns = torch.randint(0, side - size + 1, (2, batch, 1), generator=generator) + torch.arange(size)
    index = torch.arange(batch)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def fast_optimizers(model, args, steps):
    """Muon for kernels, SGD for all else, weight decay for its matrices; and the rate of a step relative to its peak."""
    everything = list(model.parameters())
    kernels, vectors = [p for p in everything if p.ndim == 4], [p for p in everything if p.ndim < 2]
    matrices = [p for p in everything if p.ndim not in (0, 1, 4)]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    warmup, total = max(steps // 2, 1), args.epochs * steps

    def triangle(step):
        return min((step + 1) / warmup, (total - step) / max(total - warmup, 1))

    sgd = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    return [Muon([{"params": kernels}], args.lr_kernels), sgd], triangle


def usual_optimizers(model, args, steps):
    """SGD, and the rate of a step relative to that of the first."""

    def rate(step):
        epoch = step // steps
        if args.decay_epochs:
            return 0.1 ** sum(epoch >= start for start in args.decay_epochs)
        return 0.5 + 0.5 * math.cos(math.pi * epoch / args.epochs)

    return [torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)], rate


def parse_args(argv=None):
    about = "Train a CIFAR network from scratch, as a teacher. The default recipe takes about 90 minutes on two AVX2 cores."
    parser = Arguments(prog="python -m common.pretrain", description=about, formatter_class=Help)
    add = parser.add_argument
    add("--arch", default="resnet20", help="architecture to train, as for --arch of the scripts")
    add("--dataset", choices=tuple(KINDS), default="cifar10", help="data set to train on")
    add("--data-dir", default="data", help="folder with train/ and test/, one folder per class in each, or torchvision's files")
    add("--download", action="store_true", help="download torchvision's files into --data-dir")
    add("--out", required=True, help="weights file to write")
    about = "recipe: that of the bundled networks (fast), or the usual one (sgd)"
    add("--recipe", choices=tuple(RECIPES), default="fast", help=about)
    recipe = {
        "epochs": (whole(1), "number of epochs"),
        "small_epochs": (whole(0), "number of initial epochs on small crops"),
        "small_size": (whole(1, 32), "side of the small crops in pixels"),
        "decay_epochs": (whole(0), "epochs at which the learning rate is divided by 10; cosine decay if none are given"),
        "pad": (whole(0, 31), "padding in pixels for random crops"),
        "lr_kernels": (number(0), "peak learning rate of the kernels (Muon; a step relative to the kernel's norm)"),
        "lr": (number(0), "peak learning rate of SGD, for all other weights (fast) or all (sgd)"),
        "weight_decay": (number(0), "weight decay, of matrices only (fast) or of everything (sgd)"),
    }
    for name, (kind, about) in recipe.items():
        default = ", ".join(f"{known} {values[name] or 'none'}" for known, values in RECIPES.items() if name in values)
        how = {"nargs": "*"} if name == "decay_epochs" else {}
        add("--" + name.replace("_", "-"), type=kind, help=f"{about} (default: {default})", default=argparse.SUPPRESS, **how)
    add("--batch-size", type=whole(1), default=128, help="images per iteration")
    precision = "precision of convolutions: bf16, or fp32 (TF32 on a GPU)"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=precision)
    add("--seed", type=whole(0), default=0, help="seed of every random number")
    args = parser.parse_args(argv)
    for name in recipe:
        if hasattr(args, name) and name not in RECIPES[args.recipe]:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} has no effect with --recipe {args.recipe}; leave one of them out")
    return argparse.Namespace(**RECIPES[args.recipe] | vars(args))


def main(argv=None):
    with friendly_errors("python -m common.pretrain"), resumable("the same command continues it"):
        train(parse_args(argv))


def train(args):
    """Train, report the accuracy on the test images once, and write the weights."""
    device, fast = pick_device("auto"), args.recipe == "fast"
    if Path(args.out).exists():
        raise InputError(f"--out {args.out} exists already; give another file, or remove it to train again")
    torch.manual_seed(args.seed)
    mean, std = as_tensors(NORMALISATION[args.dataset])
    if args.download and not (Path(args.data_dir) / KINDS[args.dataset].base_folder).is_dir():
        fetch_cifar(KINDS[args.dataset], Path(args.data_dir))
    (images, labels), test_split = (read_cifar(args.dataset, args.data_dir, train) for train in (True, False))
    if (steps := len(images) // args.batch_size) == 0:
        raise InputError(f"--batch-size is {args.batch_size} and there are {len(images)} training images; lower it")
    model = build(args.arch, NUM_CLASSES[args.dataset], 32).to(device, memory_format=torch.channels_last)
    if (channels := input_channels(model)) != 3:
        raise InputError(f"--arch {args.arch} takes images of {channels} channels, and CIFAR's have 3; give another")
    probe(model.eval(), NUM_CLASSES[args.dataset], 32)
    optimizers, rate = (fast_optimizers if fast else usual_optimizers)(model, args, steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    stateful = [model, *optimizers, *schedules]
    checkpoint, start = Path(f"{args.out}.checkpoint"), 0
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if state := load_checkpoint(checkpoint):
        if state["arguments"] != vars(args):
            raise InputError(f"{checkpoint} was made with other arguments ({state['arguments']}); remove it or repeat those")
        for item, saved in zip(stateful, state["stateful"]):
            item.load_state_dict(saved)
        start = state["epoch"]

    for epoch in range(start, args.epochs):
        model.train()
        torch.manual_seed(args.seed * 1000 + epoch)  # of dropout
        random = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        size = args.small_size if fast and epoch < args.small_epochs else 32
        order = torch.randperm(len(images), generator=random)
        if fast:  # every image is seen mirrored in every second epoch; which ones begin mirrored is drawn once
            flips = torch.rand(len(images), generator=torch.Generator().manual_seed(args.seed)) < 0.5
            flips = flips ^ bool(epoch % 2)
        else:
            flips = torch.rand(len(images), generator=random) < 0.5
        began, total_loss, correct = time.time(), 0.0, 0
        for step in Progress(range(steps), desc=f"epoch {epoch + 1}/{args.epochs}", leave=False):
            index = order[step * args.batch_size : (step + 1) * args.batch_size]
            x = augment(images[index].float() / 255, flips[index], size, args.pad, random, "reflect" if fast else "constant")
            x = ((x - mean) / std).to(device, memory_format=torch.channels_last)
            y = labels[index].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                logits = model(x).float()
            loss = F.cross_entropy(logits, y)
            model.zero_grad()
            loss.backward()
            for item in (*optimizers, *schedules):
                item.step()
            total_loss += loss.item()
            correct += (logits.argmax(1) == y).sum().item()
        if not math.isfinite(total_loss):
            raise InputError(f"the loss became {total_loss} in epoch {epoch + 1}; lower --lr and give another --out")
        print(
            f"epoch {epoch + 1:3d}  size {size}  loss {total_loss / steps:.4f}  "
            f"train {100 * correct / (steps * args.batch_size):.2f} %  {time.time() - began:.0f} s",
            flush=True,
        )
        state = {"epoch": epoch + 1, "arguments": vars(args), "stateful": [item.state_dict() for item in stateful]}
        save_checkpoint(state, checkpoint)

    model.eval()
    images, labels = test_split
    top1 = accuracy(model, in_memory(images, labels, args.data_dir, NORMALISATION[args.dataset], device, 500))
    print(f"test accuracy after the last epoch: {top1:.2f} % of {len(labels)} images", flush=True)
    save_weights(model, args.out)
    for path in (checkpoint, previous(checkpoint)):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
