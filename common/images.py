"""Sets of images: the npz file that holds them, a user's own pictures, real and random ones, normalisation, batches, grids."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.utils import save_image

from common import InputError, replacing
from common.data import (
    ASSETS,
    KINDS,
    NORMALISATION,
    as_tensors,
    fetch_cifar,
    load_training_images,
    load_training_set,
    read_mosaic,
    read_pictures,
)

BUNDLED = ASSETS / "cifar10_mixmix_256.png"  # 256 images of MixMix, the i-th of class i mod 10


class ImageSet:
    """Images (N, channels, H, W) without labels, re-iterable in batches."""

    def __init__(self, images, device):
        self.images, self.device, self.count = images, device, len(images)

    def __iter__(self):
        for part in self.images.split(250):
            yield part.to(self.device, torch.float32), None


def write_images(path, images, labels, normalisation):
    """Write images (float16: the 100,000 of a training set are 30 GB) and labels in one step.

    Args:
        path: of an .npz file; its folder is made.
        images, labels: (N, channels, H, W) and (N,).
        normalisation: (mean, std) per channel that the images have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mean, std = normalisation
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, images=images.cpu().numpy(), labels=labels.cpu().numpy(), mean=mean, std=std)


def read_images(name, cfg, labelled=False):
    """The images of --images.

    Args:
        name: an images.npz, the folder of the run that made it, a folder of pictures, which need no labels, or "bundled" for
            those in common/assets.
        cfg: how many classes and how large images there must be; --mean and --std, by which pictures are normalised.
        labelled: refuse images without labels.

    Returns:
        Images (N, channels, H, W) float16, labels (N,) int64 or None, and (mean, std) by which they are normalised.

    Raises:
        InputError: no such file, a damaged one, or images of another data set.
    """
    if str(name) == "bundled":
        if cfg.dataset != "cifar10":
            raise InputError(f"--images bundled are of CIFAR-10, and --dataset is {cfg.dataset}; give others")
        normalisation = tuple(map(list, NORMALISATION["cifar10"]))
        return normalise(read_mosaic(BUNDLED, 16, 16), normalisation), torch.arange(256) % 10, normalisation
    places = Path(name) / "images.npz", Path(name) / "images" / "images.npz", Path(name)  # a run's own, or for its task
    path = next((place for place in places if place.is_file()), Path(name))
    if path.is_dir() and not (path / "config.json").exists():
        if labelled:
            raise InputError(f"--images {name} holds pictures, and --task {cfg.task} needs labels; give images.npz files")
        normalisation = (list(cfg.mean), list(cfg.std))
        pixels = read_pictures(path, cfg.image_size, len(cfg.mean))
        return normalise(pixels, normalisation), None, normalisation
    if not path.is_file():
        raise InputError(f"--images {name} is not a file, a folder of pictures or a finished run of --task synth; give one")
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
            normalisation = file["mean"].tolist(), file["std"].tolist()
        fits = images.ndim == 4 and len(images) == len(labels) > 0 and labels.min() >= 0
        fits = fits and images.is_floating_point() and all(len(values) == images.shape[1] for values in normalisation)
        if not fits or not images.isfinite().all():
            raise ValueError
    except Exception:  # whatever damaged bytes raise
        raise InputError(f"--images {path} is damaged or not an images.npz of mixmix.py; make it again") from None
    if images.shape[2:] != (cfg.image_size, cfg.image_size) or labels.max() >= cfg.num_classes:
        raise InputError(
            f"--images {path} has images of {images.shape[2]}x{images.shape[3]} pixels and labels up to {labels.max()}; the "
            f"network takes {cfg.image_size} pixels and {cfg.num_classes} classes; give images that were made for it"
        )
    return images, labels, normalisation


def real_images(cfg, labels):
    """Training images from --data-dir, one of each label (N,): (N, channels, H, W) float16, normalised as `cfg` says."""
    fetch_if_asked(cfg)
    what = (cfg.num_classes, cfg.image_size, cfg.seed, len(cfg.mean))
    return normalise(load_training_images(cfg.dataset, cfg.data_dir, labels, *what), (cfg.mean, cfg.std))


class RealImages(nn.Module):
    """Training images in a generator's place (--data-source), kept on the run's device as uint8 and not augmented: the papers
    say nothing of it. There are no parameters, and nothing that a checkpoint would hold.

    Args:
        run: its arguments say how images are normalised; it records how many there are.
        images, labels: (N, channels, H, W) uint8 and (N,), some of every class; by default the training set.
    """

    def __init__(self, run, images=None, labels=None):
        super().__init__()
        images, labels = training_set(run.cfg) if images is None else (images, labels)
        run.record(data_source=run.cfg.data_source, images_used=len(labels))
        count = labels.bincount(minlength=run.cfg.num_classes)
        mean, std = as_tensors((run.cfg.mean, run.cfg.std))
        tensors = {"images": images[labels.argsort(stable=True)], "first": count.cumsum(0) - count, "count": count}
        for name, tensor in (tensors | {"mean": mean, "std": std}).items():
            self.register_buffer(name, tensor, persistent=False)
        run.place(self)

    def forward(self, z, y):
        """Images (B, channels, H, W), normalised, of labels y (B,), each drawn from all of its class; z is not looked at."""
        index = self.first[y] + (torch.rand(len(y), device=y.device) * self.count[y]).long()
        return (self.images[index].float() / 255 - self.mean) / self.std


def fetch_if_asked(cfg):
    """Download CIFAR where --download is given and --data-dir, or ./data, has no images yet."""
    root, kind = Path(cfg.data_dir or "data"), KINDS.get(cfg.dataset)
    if cfg.download and kind and not any((root / name).is_dir() for name in (kind.base_folder, "train")):
        fetch_cifar(kind, root)


def training_set(cfg):
    """The training images of --data-dir (N, channels, H, W) uint8 and their labels (N,); for --check a few."""
    if cfg.mean is None or cfg.std is None:
        raise InputError(f"--data-source {cfg.data_source} has real images to normalise; give --mean and --std")
    fetch_if_asked(cfg)
    few = {"most": 1} if cfg.check and cfg.data_source == "real" else {}
    what = (cfg.dataset, cfg.data_dir, cfg.num_classes, cfg.image_size, cfg.seed, len(cfg.mean))
    return load_training_set(*what, **few)


def noise(count, cfg):
    """Images of N(0, 1), (count, channels, H, W) float16."""
    return torch.randn(count, len(cfg.mean), cfg.image_size, cfg.image_size, dtype=torch.float16)


def normalise(pixels, normalisation):
    """Pixels (N, channels, H, W) uint8 as float16 images normalised by (mean, std)."""
    mean, std = as_tensors(normalisation)
    return torch.cat([((part / 255 - mean) / std).half() for part in pixels.split(256)])


def renormalise(images, before, after):
    """Images (N, channels, H, W) normalised by (mean, std) `before`, as they are by `after`."""
    if before == after:
        return images
    (mean, std), (own_mean, own_std) = as_tensors(before), as_tensors(after)
    return torch.cat([((part * std + mean - own_mean) / own_std).to(images.dtype) for part in images.split(256)])


def sampler(images, size, device):
    """A batch that stays in its place, and the function that fills it with images drawn at random and returns it.

    Args:
        images: (N, channels, H, W); where they would take more than a quarter of a GPU's memory they stay outside.
        size: images in the batch.
        device: of the batch, float32 (size, channels, H, W).
    """
    crowded = device.type == "cuda" and images.nbytes > torch.cuda.get_device_properties(device).total_memory / 4
    images = images.cpu() if crowded else images.to(device)
    batch = torch.empty(size, *images.shape[1:], device=device)
    return batch, lambda: batch.copy_(images[torch.randint(len(images), (size,), device=images.device)])


def jitter(x, most, flip):
    """x (B, channels, H, W) rolled by up to `most` pixels in each direction, all images alike, and mirrored or not."""
    for dim in (2, 3):
        shift = torch.randint(-most, most + 1, (), device=x.device)
        x = x.index_select(dim, (torch.arange(x.shape[dim], device=x.device) - shift) % x.shape[dim])
    if flip:
        x = torch.where(torch.rand((), device=x.device) < 0.5, x.flip(3), x)
    return x


def draw_grid(images, labels, cfg, path, columns=10, most_rows=20):
    """A picture of some images, one row per class; without labels the first ones, in their order."""
    if labels is None:
        return save_grid(images[: columns * columns], cfg, path, columns)
    rows = [images[labels == label][:columns] for label in labels.unique()[:most_rows]]
    rows = [torch.cat([row, row.new_zeros(columns - len(row), *row.shape[1:])]) for row in rows]
    save_grid(torch.cat(rows), cfg, path, columns)


def save_grid(images, cfg, path, columns):
    """A picture of images (N, channels, H, W) on the CPU, normalised as `cfg` says, `columns` to a row."""
    mean, std = as_tensors((cfg.mean, cfg.std))
    images = (images.float() * std + mean).clamp(0, 1)
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    with replacing(path) as partial:
        save_image(images, partial, format="png", nrow=columns, padding=1)
