"""Test sets, the normalisation each set of weights was trained with, and the evaluation loops."""

import hashlib
import http.client
import os
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import functional as TF

from common import InputError, first_line
from common.device import free_memory, full_precision
from common.progress import Progress

KINDS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
IMAGE_SIZE = {"cifar10": 32, "cifar100": 32, "imagenet": 224}
# mean and standard deviation per channel, for images in 0 to 1
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2557, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "chenyaofo-cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "chenyaofo-cifar100": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}
ASSETS = Path(__file__).parent / "assets"
SPLITS = ("val", "test")  # folders that hold test images
DOWNLOAD_TIMEOUT = 5  # seconds without an answer
HALF_REAL = ("confusing", "unconfusing")  # values of --data-source: half of each batch is real
FROM_TRAINING_SET = ("real", *HALF_REAL)  # those that read real training images
MOST_REAL = 50_000  # of them; as many as CIFAR has, and 7.5 GB of ImageNet's


def fixed_paths(cfg):
    """Names of the paths among the arguments that a resumed run may not change: that of training images which it reads."""
    return ("data_dir",) if cfg.data_source in FROM_TRAINING_SET else ()


def download(address, path, digest=None):
    """Fetch a file once and check it.

    Args:
        address: http(s) address; a .zip with one member is unpacked.
        path: where the file goes; if it is there already, nothing is fetched.
        digest: "algorithm:hex", a prefix of the file's (the member's) digest in hexadecimal.

    Returns:
        path.

    Raises:
        InputError: no connection, or a file with another digest.
    """
    path, zipped = Path(path), urlsplit(address).path.endswith(".zip")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # other runs may fetch it, too
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(address, timeout=DOWNLOAD_TIMEOUT) as answer, partial.open("wb") as file:
                size = int(answer.headers.get("Content-Length") or 0)
                with Progress(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                    while block := answer.read(1 << 16):
                        file.write(block)
                        bar.update(len(block))
            if size and partial.stat().st_size != size:
                raise OSError(f"the connection ended after {partial.stat().st_size:,} of {size:,} bytes")
            if zipped:
                with zipfile.ZipFile(partial) as archive:
                    content = archive.read(archive.namelist()[0])
                partial.write_bytes(content)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if not isinstance(error, (OSError, ValueError, http.client.HTTPException, zipfile.BadZipFile)):
                raise
            what = "unpack it and save its one file" if zipped else "save it"
            reason = getattr(error, "reason", error)
            raise InputError(
                f"{address} cannot be fetched ({reason}); download it on a machine with internet access and {what} as {path}"
            ) from None
    fetched = path if path.exists() else partial
    if digest:
        algorithm, _, expected = digest.partition(":")
        found = hashlib.new(algorithm, fetched.read_bytes()).hexdigest()
        if not found.startswith(expected):
            partial.unlink(missing_ok=True)
            raise InputError(f"{path} has {algorithm} {found[:12]}, expected {expected[:12]}; delete it and download it again")
    if fetched is partial:
        partial.replace(path)
    return path


def as_tensors(normalisation, device=None):
    """(mean, std) per channel as two tensors (channels, 1, 1)."""
    return tuple(torch.tensor(values, device=device).view(-1, 1, 1) for values in normalisation)


class TestSet:
    """Normalised test images, batch by batch; can be iterated again and again.

    Args:
        batches: re-iterable over (uint8 images (B, C, H, W), int64 labels (B,)).
        count: number of images.
        name: for the record.
        normalisation: (mean, std) per channel, for images in 0 to 1.
        device: where the batches go.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(self, batches, count, name, normalisation, device):
        self.batches, self.count, self.name, self.device = batches, count, name, device
        self.mean, self.std = as_tensors(normalisation, device)

    def __iter__(self):
        try:
            for images, labels in self.batches:
                images = images.to(self.device, non_blocking=True).float() / 255
                yield (images - self.mean) / self.std, labels.to(self.device, non_blocking=True)
        except InputError as error:  # that of a process which loads images comes with where it was raised
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("common.InputError: ")) from None
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            what = "the processes that load images have too little shared memory (/dev/shm)"
            raise InputError(f"{what}; give --threads 1, which needs none, or docker run --shm-size") from None


def evaluation_batch(device, image_size):
    """Images per batch that an eighth of the free memory holds, at 256 float32 values per pixel; no more than help."""
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], 2000
    else:
        free, most = free_memory(), 250
    return max(8, min(most, free // 8 // (4 * 256 * image_size**2)))  # batches of one round differently from larger ones


def load_test_set(
    dataset, data_dir, num_classes, image_size, normalisation, device="cpu", fetch=False, batch_size=None, channels=3
):
    """The test set that the flags and the disk determine, or None where there is none.

    Args:
        dataset: "cifar10", "cifar100", "imagenet" or "folder".
        data_dir: a folder with one folder per class under val/ or test/, or with torchvision's own CIFAR files; None
            looks for torchvision's files under ./data, then takes the bundled 2,000 CIFAR-10 images; CIFAR-100 is
            fetched; ImageNet and own data have no test set then.
        num_classes, image_size: what the network expects.
        normalisation: (mean, std) the network was trained with.
        device: where the batches go.
        fetch: download the full CIFAR test set if it is not on disk.
        batch_size: images per batch (default: by memory).
        channels: of the network's images; class folders are read as RGB (3) or as grey values (1).

    Raises:
        InputError: a folder that does not fit, or a download that cannot start.
    """
    device = torch.device(device)
    batch_size = batch_size or evaluation_batch(device, image_size)
    if dataset in KINDS:
        if channels != 3:
            what = f"has images of 3 channels, and the model takes {channels}"
            raise InputError(f"--dataset {dataset} {what}; give --dataset folder for the images that it was trained with")
        images, labels, name = _load_cifar(dataset, data_dir, fetch)
    elif data_dir is None:
        return None
    else:
        folder = _class_folder(data_dir, num_classes, image_size, channels)
        on_gpu = device.type == "cuda"
        workers = min(8, torch.get_num_threads()) if torch.get_num_threads() > 1 else 0
        own_generator = torch.Generator()  # else each pass would draw from the run's random numbers
        loader = DataLoader(folder, batch_size, num_workers=workers, pin_memory=on_gpu, generator=own_generator)
        return TestSet(loader, len(folder), str(folder.root), normalisation, device)
    return in_memory(images, labels, name, normalisation, device, batch_size)


def in_memory(images, labels, name, normalisation, device, batch_size):
    """A `TestSet` of images (N, C, H, W) uint8 and labels (N,) int64."""
    batches = list(zip(images.split(batch_size), labels.split(batch_size)))
    return TestSet(batches, len(labels), name, normalisation, device)


def find_test_set(cfg, device, channels):
    """`load_test_set` as parsed arguments say, which have --mean and --std filled in."""
    what = (cfg.dataset, cfg.data_dir, cfg.num_classes, cfg.image_size, (cfg.mean, cfg.std))
    return load_test_set(*what, device, cfg.download, channels=channels)


def _load_cifar(dataset, data_dir, fetch):
    """Test images (N, 3, 32, 32) uint8 in memory, labels, and where they come from."""
    kind = KINDS[dataset]
    root = Path(data_dir or "data")
    has_files = (root / kind.base_folder).is_dir()
    has_folders = any((root / split).is_dir() for split in SPLITS)
    if data_dir is not None and not has_files and (has_folders or not fetch):
        return (*read_cifar(dataset, data_dir), str(data_dir))
    if not has_files:
        if dataset == "cifar10" and not fetch:
            return (*read_slice(), "the bundled CIFAR-10 slice")
        fetch_cifar(kind, root)
    return (*read_cifar(dataset, root), str(root))


def fetch_cifar(kind, root):
    """Download torchvision's own files of a CIFAR data set into the folder `root`: training and test images."""
    archive, place = download(kind.url, root / kind.filename, f"md5:{kind.tgz_md5}"), root / kind.base_folder
    try:
        with tempfile.TemporaryDirectory(dir=root) as folder:  # so that no run finds half of it
            datasets.utils.extract_archive(str(archive), folder)
            Path(folder, kind.base_folder).rename(place)
    except OSError as error:
        if not place.is_dir():  # another run was not quicker
            why = error.strerror or first_line(error)
            raise InputError(f"{archive} cannot be unpacked ({why}); make room, and repeat the command") from None


def read_cifar(dataset, data_dir, train=False):
    """Images (N, 3, 32, 32) uint8 and labels (N,) of CIFAR's test or training set.

    Args:
        dataset: "cifar10" or "cifar100".
        data_dir: a folder with torchvision's own files, or with one folder per class under test/ (else val/) and train/.
        train: which of the two.

    Raises:
        InputError: a folder that does not fit.
    """
    kind = KINDS[dataset]
    if (Path(data_dir) / kind.base_folder).is_dir():
        files = _cifar_files(kind, data_dir, train)
        return torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(files.targets)
    return read_folder(_class_folder(data_dir, NUM_CLASSES[dataset], 32, splits=("train",) if train else SPLITS[::-1]))


def _cifar_files(kind, root, train):
    """torchvision's own files of a CIFAR data set, which are there."""
    try:
        return kind(root, train=train)
    except RuntimeError:
        raise InputError(
            f"--data-dir '{root}' holds a damaged {kind.base_folder}; remove that folder and fetch it again"
        ) from None


def training_root(dataset, data_dir):
    """The folder of the training images: --data-dir, with one folder per class under train/ or torchvision's own CIFAR files;
    or, where that is None, ./data, if it has CIFAR's files.

    Raises:
        InputError: there is none.
    """
    root = Path(data_dir or "data")
    if data_dir is None and not (dataset in KINDS and (root / KINDS[dataset].base_folder).is_dir()):
        fetch = ", or --download" if dataset in KINDS else ""
        raise InputError(f"--data-source: no training images found; give --data-dir with train/, one folder per class{fetch}")
    return root


def load_training_images(dataset, data_dir, labels, num_classes, image_size, seed=0, channels=3):
    """Real training images, the reference for synthetic ones.

    Args:
        dataset: "cifar10", "cifar100", "imagenet" or "folder".
        data_dir: as for `training_root`.
        labels: (N,), the classes of the images that are wanted; no image comes twice while its class has others.
        num_classes, image_size, channels: of the data.
        seed: of the choice among a class's images.

    Returns:
        Images (N, channels, H, W) uint8.

    Raises:
        InputError: a folder that does not fit.
    """
    kind, data_dir = KINDS.get(dataset), training_root(dataset, data_dir)
    if kind and (data_dir / kind.base_folder).is_dir():
        files = _cifar_files(kind, data_dir, train=True)
        targets, get = torch.tensor(files.targets), lambda index: torch.from_numpy(files.data[index]).permute(2, 0, 1)
    else:
        folder = _class_folder(data_dir, num_classes, image_size, channels, ("train",))
        targets, get = torch.tensor(folder.targets), lambda index: folder[index][0]
    source, chosen = torch.Generator().manual_seed(seed), torch.zeros_like(labels)
    for label in labels.unique():
        members, wanted = (targets == label).nonzero()[:, 0], labels == label
        order = torch.randperm(len(members), generator=source)
        chosen[wanted] = members[order[torch.arange(int(wanted.sum())) % len(members)]]
    return torch.stack([get(index) for index in Progress(chosen.tolist(), desc="reading real images", leave=False)])


def load_training_set(dataset, data_dir, num_classes, image_size, seed=0, channels=3, most=MOST_REAL):
    """The training set in memory. Of a larger one than CIFAR's, at most `most` / `num_classes` images of each class are
    read, chosen at random.

    Args:
        data_dir: as for `training_root`.
        dataset, num_classes, image_size, seed, channels: as for `load_training_images`.

    Returns:
        Images (N, channels, H, W) uint8 and labels (N,) int64.

    Raises:
        InputError: no such folder, or one that does not fit.
    """
    root = training_root(dataset, data_dir)
    if dataset in KINDS:
        return read_cifar(dataset, root, train=True)
    folder = _class_folder(root, num_classes, image_size, channels, ("train",))
    targets, source = torch.tensor(folder.targets), torch.Generator().manual_seed(seed)
    classes = [(targets == label).nonzero()[:, 0] for label in range(num_classes)]
    chosen = [members[torch.randperm(len(members), generator=source)[: max(1, most // num_classes)]] for members in classes]
    return read_folder(Subset(folder, torch.cat(chosen).sort().values.tolist()))


class _Fit:
    """PIL image -> uint8 tensor of the network's size, as ImageNet's test images are cut: 256 of which 224 remain, or 342 of
    which 299. EfficientNets are evaluated so, too, where torchvision resizes bicubically and cuts the larger ones less."""

    def __init__(self, image_size, channels):
        self.image_size, self.channels = image_size, channels

    def __call__(self, image):
        image = image.convert("L") if self.channels == 1 else image
        if image.size != (self.image_size, self.image_size):
            image = TF.center_crop(TF.resize(image, round(self.image_size / 0.875)), self.image_size)
        return TF.pil_to_tensor(image)


def _class_folder(data_dir, num_classes, image_size, channels=3, splits=SPLITS):
    """ImageFolder of uint8 tensors over the first of `splits` in DIR, resized and cropped where they have another size."""
    root = next((Path(data_dir) / split for split in splits if (Path(data_dir) / split).is_dir()), None)
    if root is None:
        if not Path(data_dir).is_dir():
            raise InputError(f"--data-dir '{data_dir}' is not a folder; give one with {' or '.join(splits)}/ in it")
        have, where = (word.join(f"{split}/" for split in splits) for word in (" nor ", " or "))
        found = f"has {'neither' if len(splits) > 1 else 'no'} {have}"
        raise InputError(f"--data-dir '{data_dir}' {found}; put one folder per class into {where}")

    if channels not in (1, 3):
        raise InputError(f"--data-dir: the model takes {channels} channels and image files give 1 or 3; leave --data-dir out")

    try:
        folder = datasets.ImageFolder(root, _Fit(image_size, channels), loader=_open_image)
    except FileNotFoundError as error:
        raise InputError(f"--data-dir: {root} has no class folders with images ({error}); give one folder per class") from None
    if len(folder.classes) != num_classes:
        raise InputError(
            f"--data-dir: {root} has {len(folder.classes)} class folders and the network {num_classes} classes; give the data "
            "the network was trained on, or --num-classes"
        )
    return folder


PICTURES = datasets.folder.IMG_EXTENSIONS


def read_pictures(folder, image_size, channels):
    """All pictures in a folder and its subfolders, in the order of their names: (N, channels, H, W) uint8, resized and cropped
    where they have another size.

    Raises:
        InputError: no pictures, or a damaged one.
    """
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [n for n in folders if not n.startswith(".") and os.path.realpath(os.path.join(place, n)) not in seen]
        files += [Path(place, name) for name in names if name.lower().endswith(PICTURES) and not name.startswith(".")]
    files.sort()
    if not files:
        raise InputError(f"--images {folder} holds no pictures ({', '.join(PICTURES)}); give a folder that does")
    if channels not in (1, 3):
        raise InputError(f"--images {folder}: the model takes {channels} channels and pictures have 1 or 3; give an images.npz")
    fit = _Fit(image_size, channels)
    try:
        return torch.stack([fit(_open_image(path)) for path in Progress(files, desc="reading pictures", leave=False)])
    except InputError as error:
        raise InputError(str(error).replace("--data-dir", "--images")) from None


def _open_image(path):
    """The image file in RGB, as torchvision's own loader reads it; one of more than 8 bits would be cut off at 255."""
    try:
        with Image.open(path) as image:
            if image.mode in ("F", "I") or image.mode.startswith("I;"):
                raise InputError(f"--data-dir: {path} has more than 8 bits a pixel; convert it to 8 bits")
            return image.convert("RGB")
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's for damaged files
        raise InputError(f"--data-dir: {path} cannot be read ({first_line(error)}); repair or delete it") from None


def read_folder(folder):
    """All images of an ImageFolder, or a subset of one, of equally large uint8 tensors: (N, C, H, W) and labels (N,)."""
    images, labels = torch.empty(len(folder), *folder[0][0].shape, dtype=torch.uint8), torch.empty(len(folder), dtype=int)
    loader = DataLoader(folder, 500, generator=torch.Generator())
    places = zip(images.split(500), labels.split(500))
    for place, batch in zip(places, Progress(loader, desc="reading images", leave=False)):
        for target, source in zip(place, batch):
            target.copy_(source)
    return images, labels


def read_mosaic(path, rows, columns):
    """The images of a picture with `rows` x `columns` of them, row by row: (N, 3, 32, 32) uint8."""
    mosaic = torch.from_numpy(np.array(Image.open(path)))
    return mosaic.view(rows, 32, columns, 32, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)


def read_slice():
    """The bundled 2,000 CIFAR-10 test images (2000, 3, 32, 32) uint8, the first 200 of each class, and labels."""
    return read_mosaic(ASSETS / "cifar10_test_2000.png", 40, 50), torch.arange(10).repeat_interleave(200)


def accuracy(model, test_set):
    """Top-1 accuracy of `model` over a re-iterable of (images, labels), in percent to two decimals."""
    return evaluate(model, test_set)[0]


@torch.no_grad()
@full_precision()
def evaluate(model, test_set):
    """Top-1 and top-5 accuracy of `model` over a re-iterable of (images, labels), in percent to two decimals, and its
    cross-entropy; top-5 is None where there are ten classes or fewer. Read from the device once."""
    top1, top5, loss, count = 0, 0, 0, 0
    for images, labels in test_set:
        logits = model(images)
        top1 += (logits.argmax(1) == labels).sum()
        if logits.shape[1] > 10:
            top5 += (logits.topk(5).indices == labels[:, None]).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    percent = [round(100 * float(correct) / count, 2) for correct in (top1, top5)]
    return percent[0], percent[1] if logits.shape[1] > 10 else None, float(loss) / count


@torch.no_grad()
@full_precision()
def agreement(teacher, student, batches):
    """Share, in percent, of the images in `batches` to which both networks give the same class.

    Args:
        batches: re-iterable over (images, anything).
    """
    same, count = 0, 0
    for images, _ in batches:
        same += (teacher(images).argmax(1) == student(images).argmax(1)).sum()
        count += len(images)
    return 100 * float(same) / count
