"""Train a bundled CIFAR-10 teacher from scratch:  python -m common.pretrain --arch resnet20 --data-dir DIR --out FILE

DIR holds train/ and test/, each with one folder per class. Kernels are trained by Muon (after three epochs its loss was a
fifth below SGD's), everything else by SGD with Nesterov momentum; half an epoch of linear warm-up, then a linear decay to
zero; random translations and alternating flips. The first `--small-epochs` epochs see crops of `--small-size` pixels,
which cost half as much; the rest see the full image. The test images are looked at after the last epoch only, so a run
selects nothing on them. A run that is killed goes on from its last epoch when the same command is given again.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import transforms
from torchvision.datasets import ImageFolder

from common import InputError, replacing
from common.cli import friendly_errors
from common.data import NORMALISATION, TestSet, accuracy, read_folder
from common.models import build
from common.progress import Progress
from common.run import pick_device


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


def augment(images, flip, size, pad, generator):
    """Translate and flip a batch.

    Args:
        images: (B, C, H, W) float, any range.
        flip: (B,) bool, which images to mirror.
        size: side of the crop in pixels, at most H + 2 * pad.
        pad: reflected border in pixels.
        generator: source of the offsets.

    Returns:
        (B, C, size, size), each image cropped at its own offset.
    """
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    images = F.pad(images, (pad,) * 4, mode="reflect")
    batch, channels, side = images.shape[:3]
    rows, columns = torch.randint(0, side - size + 1, (2, batch, 1), generator=generator) + torch.arange(size)
    index = torch.arange(batch)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load_split(root, split):
    """Images (N, 3, 32, 32) uint8 and labels (N,) of one folder per class."""
    if not (Path(root) / split).is_dir():
        raise InputError(f"--data-dir '{root}' has no {split}/; give one with train/ and test/, a folder per class in each")
    return read_folder(ImageFolder(Path(root) / split, transforms.PILToTensor()))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--arch", default="resnet20", help="architecture to train")
    parser.add_argument("--data-dir", required=True, help="folder with train/ and test/, one folder per class in each")
    parser.add_argument("--out", required=True, help="weights file to write")
    parser.add_argument("--epochs", type=int, default=42, help="number of epochs")
    parser.add_argument("--small-epochs", type=int, default=26, help="number of first epochs on small crops")
    parser.add_argument("--small-size", type=int, default=24, help="side of the small crops in pixels")
    parser.add_argument("--pad", type=int, default=2, help="reflected border in pixels from which crops are taken")
    parser.add_argument("--batch-size", type=int, default=128, help="images per iteration")
    parser.add_argument("--lr-kernels", type=float, default=0.03, help="peak step of Muon, relative to a kernel's norm")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate of everything else")
    parser.add_argument(
        "--weight-decay", type=float, default=5e-4, help="weight decay of the last layer's matrix, the only one"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of convolutions")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random number")
    return parser.parse_args()


def main():
    with friendly_errors("python -m common.pretrain"):
        train(parse_args())


def train(args):
    """Train, report the accuracy on the test images once, and write the weights."""
    device = pick_device("auto")
    torch.manual_seed(args.seed)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALISATION["cifar10"])
    (images, labels), test_split = load_split(args.data_dir, "train"), load_split(args.data_dir, "test")
    model = build(args.arch, 10, 32).to(device, memory_format=torch.channels_last)
    kernels, matrices, vectors = ([p for p in model.parameters() if p.ndim in dims] for dims in ((4,), (2,), (1,)))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [Muon(kernels, args.lr_kernels), torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)]
    steps = len(images) // args.batch_size
    warmup, total = steps // 2, args.epochs * steps

    def triangle(step):
        return min((step + 1) / warmup, (total - step) / (total - warmup))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, triangle) for optimizer in optimizers]
    stateful = [model, *optimizers, *schedules]
    checkpoint, start = Path(args.out).with_suffix(".checkpoint"), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["arguments"] != vars(args):
            raise InputError(f"{checkpoint} was made with other arguments ({state['arguments']}); remove it or repeat those")
        for item, saved in zip(stateful, state["stateful"]):
            item.load_state_dict(saved)
        start = state["epoch"]

    for epoch in range(start, args.epochs):
        model.train()
        random = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        size = args.small_size if epoch < args.small_epochs else 32
        order = torch.randperm(len(images), generator=random)
        # Every image is seen mirrored in every second epoch; which ones begin mirrored is drawn once.
        flips = torch.rand(len(images), generator=torch.Generator().manual_seed(args.seed)) < 0.5
        flips = flips ^ bool(epoch % 2)
        began, total_loss, correct = time.time(), 0.0, 0
        for step in Progress(range(steps), desc=f"epoch {epoch + 1}/{args.epochs}", leave=False):
            index = order[step * args.batch_size : (step + 1) * args.batch_size]
            x = (images[index].float() / 255 - mean) / std
            x = augment(x, flips[index], size, args.pad, random).to(device, memory_format=torch.channels_last)
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
        print(
            f"epoch {epoch + 1:3d}  size {size}  loss {total_loss / steps:.4f}  "
            f"train {100 * correct / (steps * args.batch_size):.2f} %  {time.time() - began:.0f} s",
            flush=True,
        )
        state = {"epoch": epoch + 1, "arguments": vars(args), "stateful": [item.state_dict() for item in stateful]}
        with replacing(checkpoint) as partial:
            torch.save(state, partial)

    model.eval()
    images, labels = test_split
    batches = list(zip(images.split(500), labels.split(500)))
    top1 = accuracy(model, TestSet(batches, len(labels), args.data_dir, NORMALISATION["cifar10"], device))
    print(f"test accuracy after the last epoch: {top1:.2f} % of {len(labels)} images", flush=True)
    with replacing(args.out) as partial:
        torch.save({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, partial)
    checkpoint.unlink()


if __name__ == "__main__":
    main()
