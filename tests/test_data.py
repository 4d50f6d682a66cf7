import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from common import InputError
from common.data import NORMALISATION, _class_folder, accuracy, agreement, download, load_test_set, read_folder, read_slice

CIFAR = NORMALISATION["cifar10"]


def make_folder(root, classes, images=3, size=32):
    for c in range(classes):
        (root / "test" / f"class{c}").mkdir(parents=True)
        for i in range(images):
            pixels = np.full((size, size, 3), 20 * c + i, dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / f"class{c}" / f"{i}.png")
    return root


def test_class_folder_in_order_and_normalised(tmp_path):
    test_set = load_test_set("cifar10", make_folder(tmp_path, 10), 10, 32, CIFAR, batch_size=4)
    images, labels = (torch.cat(parts) for parts in zip(*test_set))
    assert test_set.count == 30 and torch.equal(labels, torch.arange(10).repeat_interleave(3))
    expected = (torch.tensor(20 * 2 + 1) / 255 - torch.tensor(CIFAR[0])) / torch.tensor(CIFAR[1])
    torch.testing.assert_close(images[7].mean((1, 2)), expected)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(test_set, test_set))


def test_larger_images_are_resized_and_cropped(tmp_path):
    test_set = load_test_set("folder", make_folder(tmp_path, 2, size=50), 2, 24, CIFAR)
    assert {tuple(images.shape[1:]) for images, _ in test_set} == {(3, 24, 24)}


def make_cifar100(root, monkeypatch, count=20):
    """torchvision's CIFAR-100 files with a few images, and their digests in place of the real ones."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [99 - i for i in range(count)]
    for name, content in (
        ("test", {"data": pixels, "fine_labels": labels}),
        ("meta", {"fine_label_names": [f"c{i}" for i in range(100)]}),
    ):
        (folder / name).write_bytes(pickle.dumps(content))
        digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
        if name == "test":
            monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", digest]])
            monkeypatch.setattr(datasets.CIFAR100, "train_list", [])
        else:
            monkeypatch.setattr(datasets.CIFAR100, "meta", datasets.CIFAR100.meta | {"md5": digest})
    return pixels.reshape(count, 3, 32, 32), labels


def test_cifar100_files(tmp_path, monkeypatch):
    pixels, labels = make_cifar100(tmp_path, monkeypatch)
    test_set = load_test_set("cifar100", tmp_path, 100, 32, ((0.0,) * 3, (1.0,) * 3))
    images, found = next(iter(test_set))
    assert found.tolist() == labels
    torch.testing.assert_close(images, torch.from_numpy(pixels) / 255)
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged cifar-100-python"):
        load_test_set("cifar100", tmp_path, 100, 32, CIFAR)


def test_bundled_slice():
    images, labels = read_slice()
    assert images.shape == (2000, 3, 32, 32) and labels.bincount().tolist() == [200] * 10
    assert hashlib.md5(images.numpy().tobytes()).hexdigest() == "fb2c2addac31ada725abe7ed40e9f744"


def test_folders_that_do_not_fit(tmp_path):
    (tmp_path / "empty" / "test").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    make_folder(tmp_path / "three", 3)
    for name, words in (("empty", "no class folders"), ("none", "neither val/ nor test/"), ("three", "3 class folders .* 10")):
        with pytest.raises(InputError, match=words):
            load_test_set("cifar10", tmp_path / name, 10, 32, CIFAR)


def test_a_damaged_image_is_named(tmp_path):
    damaged = make_folder(tmp_path, 2) / "test" / "class1" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(InputError, match=f"^--data-dir: {damaged} cannot be read .*; repair or delete it$"):
        list(load_test_set("folder", tmp_path, 2, 32, CIFAR))
    with pytest.raises(InputError, match=f"^--data-dir: {damaged} cannot be read"):
        read_folder(_class_folder(tmp_path, 2, 32))


def test_download_is_checked_and_says_where_to_put_the_file(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    path = download(source.as_uri(), tmp_path / "cache" / "file.bin", f"sha256:{digest[:8]}")
    assert path.read_bytes() == b"weights"
    with pytest.raises(InputError, match="expected 00000000"):
        download(source.as_uri(), tmp_path / "other.bin", "sha256:00000000")
    with pytest.raises(InputError, match=f"save it as {tmp_path}/cache/absent.bin"):
        download("http://127.0.0.1:9/absent.bin", tmp_path / "cache" / "absent.bin")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["file.bin", "source.bin"]


def test_accuracy_and_agreement_count_images():
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 3, 1], [1, 0, 0]])
    batches = [(logits[:3], torch.tensor([0, 2, 0])), (logits[3:], torch.tensor([1]))]
    assert accuracy(lambda x: x, batches) == 50.0
    assert agreement(lambda x: x, lambda x: -x, batches) == 0.0
    assert agreement(lambda x: x, lambda x: x + torch.tensor([2.5, 0, 0]), batches) == 75.0
