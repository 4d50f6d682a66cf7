import hashlib
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision import datasets
from torchvision.models import get_model_weights

import adadfq
import autorecon
import gdfq
import qimera
from common import InputError
from common.cli import check_image_size
from common.data import (
    NORMALISATION,
    _class_folder,
    _open_image,
    accuracy,
    agreement,
    download,
    evaluate,
    load_test_set,
    load_training_set,
    read_folder,
    read_pictures,
    read_slice,
)
from common.images import RealImages
from common.report import draw_images, in_batches, save_samples
from common.run import Run

CIFAR = NORMALISATION["cifar10"]


def make_folder(root, classes, images=3, size=32, split="test"):
    for c in range(classes):
        (root / split / f"class{c}").mkdir(parents=True)
        for i in range(images):
            pixels = np.full((size, size, 3), 20 * c + i, dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"class{c}" / f"{i}.png")
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
        ("train", {"data": pixels, "fine_labels": labels}),
        ("meta", {"fine_label_names": [f"c{i}" for i in range(100)]}),
    ):
        (folder / name).write_bytes(pickle.dumps(content))
        digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
        if name != "meta":
            monkeypatch.setattr(datasets.CIFAR100, f"{name}_list", [[name, digest]])
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
    for name, words in (("empty", "no class folders"), ("none", "neither test/ nor val/"), ("three", "3 class folders .* 10")):
        with pytest.raises(InputError, match=words):
            load_test_set("cifar10", tmp_path / name, 10, 32, CIFAR)


def test_a_damaged_image_is_named(tmp_path, monkeypatch):
    damaged = make_folder(tmp_path, 2) / "test" / "class1" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(InputError, match=f"^--data-dir: {damaged} cannot be read .*; repair or delete it$"):
        list(load_test_set("folder", tmp_path, 2, 32, CIFAR))
    with pytest.raises(InputError, match=f"^--data-dir: {damaged} cannot be read"):
        read_folder(_class_folder(tmp_path, 2, 32))
    cut, large = tmp_path / "cut.ppm", damaged.with_name("0.png")
    cut.write_bytes(b"P6 32 ")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    for path in (cut, large):
        with pytest.raises(InputError, match=f"{path} cannot be read .*; repair or delete it$"):
            _open_image(path)


def test_pictures_of_more_than_8_bits_are_refused_and_hidden_ones_skipped(tmp_path):
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="deep.png has more than 8 bits a pixel; convert it to 8 bits"):
        _open_image(tmp_path / "deep.png")
    folder, elsewhere = tmp_path / "pictures", make_folder(tmp_path / "others", 1, images=3)
    for place in (folder / ".thumbnails", folder / "more.png"):
        place.mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(place / "x.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(folder / "grey.pgm")
    (folder / "._grey.pgm").write_bytes(b"of a Mac")
    assert len(read_pictures(folder, 32, 3)) == 3 + 2


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


def test_accuracy_is_measured_in_full_precision_whatever_the_caller_has_set():
    convolutions = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)  # settings by operation since torch 2.9
    name, exact = ("allow_tf32", False) if convolutions is torch.backends.cudnn else ("fp32_precision", "ieee")

    def look(x):
        seen.append([getattr(operation, name) for operation in (convolutions, torch.backends.cuda.matmul)])
        return x

    seen, before = [], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        look(None)
        assert accuracy(look, [(torch.eye(3), torch.arange(3))]) == 100.0
        look(None)
        assert seen[0] == seen[2] and exact not in seen[0] and seen[1] == [exact, exact]
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_top5_against_ranks_and_cross_entropy_against_probabilities():
    torch.manual_seed(0)
    logits, labels = torch.randn(300, 12), torch.randint(12, (300,))
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)  # how many classes are before the right one
    expected = [round(100 * (rank < k).double().mean().item(), 2) for k in (1, 5)]
    *found, loss = evaluate(lambda x: x, list(zip(logits.split(70), labels.split(70))))
    assert found == expected
    p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    assert loss == pytest.approx(-p[torch.arange(300), labels].log().mean().item(), rel=1e-5)
    assert evaluate(lambda x: x, [(logits[:, :10], labels % 10)])[1] is None


@pytest.mark.parametrize("arch, side", [("inception_v3", 299), ("resnet18", 224), ("efficientnet_b1", 240)])
def test_imagenet_images_have_the_size_of_the_network(arch, side, tmp_path):
    """The data set's default size is that of torchvision's weights, and images are prepared as its own transforms do."""
    assert gdfq.parse_args(["--dataset", "imagenet", "--arch", arch]).image_size == side
    if arch == "efficientnet_b1":
        return  # its own transforms are bicubic, of another margin
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((500, 400))
    for c in range(2):
        (tmp_path / "val" / f"class{c}").mkdir(parents=True)
        image.save(tmp_path / "val" / f"class{c}" / "0.png")
    (images, _), *_ = load_test_set("folder", tmp_path, 2, side, NORMALISATION["imagenet"])
    expected = next(iter(get_model_weights(arch))).transforms()(image)
    torch.testing.assert_close(images[0], expected)


def test_a_generator_that_cannot_make_the_size_says_which_it_makes():
    with pytest.raises(InputError, match="--image-size is 299 and the generator makes .* such as 296 or 300; give another"):
        check_image_size(gdfq.parse_args(["--dataset", "imagenet", "--arch", "inception_v3"]), 4)
    check_image_size(gdfq.parse_args("--dataset imagenet --arch inception_v3 --data-source real".split()), 4)


def test_a_large_training_set_is_read_in_part_the_same_from_each_class(tmp_path):
    data = make_folder(tmp_path, 4, images=6, size=8, split="train")
    images, labels = load_training_set("folder", data, 4, 8)
    assert images.dtype == torch.uint8 and torch.equal(labels, torch.arange(4).repeat_interleave(6))
    assert torch.equal(images[:, 0, 0, 0], 20 * labels + torch.arange(24) % 6)
    some, labels = load_training_set("folder", data, 4, 8, most=13)
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and torch.equal(some[:, 0, 0, 0] // 20, labels)
    assert len(some[:, 0, 0, 0].unique()) == 12 and len(some) == 12
    assert torch.equal(some, load_training_set("folder", data, 4, 8, most=13)[0])
    assert not torch.equal(some, load_training_set("folder", data, 4, 8, seed=1, most=13)[0])


def test_real_images_are_of_the_labels_and_normalised():
    labels = torch.tensor([2, 0, 1, 2, 2, 0])  # in no order; one image of class 1
    pixels = (10 * labels + torch.arange(6)).to(torch.uint8).view(-1, 1, 1, 1).expand(6, 1, 4, 4)
    settings = {"dataset": "folder", "num_classes": 3, "image_size": 4, "device": "cpu", "data_source": "real"}
    real = RealImages(Run(gdfq.config(**settings, mean=[0.5], std=[0.2])), pixels, labels)
    y = torch.arange(3).repeat(40)
    seen = ((real(None, y) * 0.2 + 0.5) * 255).round().long()
    assert seen.shape == (120, 1, 4, 4) and not real.state_dict() and not list(real.parameters())
    found = [set(seen[y == label].unique().tolist()) for label in range(3)]
    assert found == [{1, 5}, {12}, {20, 23, 24}]


def small_data(root):
    return make_folder(make_folder(root, 5, images=4, size=16), 5, images=6, size=16, split="train")


@pytest.mark.parametrize("method", [gdfq, adadfq, qimera, autorecon])
def test_the_student_learns_from_real_images(method, tmp_path, monkeypatch, fails):
    """Its ranges are those of real images, its samples are training images, and no flag of a generator is taken."""
    monkeypatch.syspath_prepend(ROOT / "tests")
    data, out = small_data(tmp_path / "data"), tmp_path / "run"
    flags = "--arch tiny:net --dataset folder --num-classes 5 --image-size 16 --batch-size 8 --iters 3 --epochs 2 --device cpu"
    arguments = [*flags.split(), "--calibrate-epochs", 1, "--data-source", "real", "--out", out, "--lr-q", 0.01]
    runs = []

    def look(run, path):
        runs.append(run)
        save_samples(run, path)

    monkeypatch.setattr("common.report.save_samples", look)
    result = method.main([str(argument) for argument in [*arguments, "--data-dir", data]])
    assert result["data_source"] == "real" and result["images_used"] == 30 and result["calibrated_top1"] is not None
    y = torch.arange(5).repeat(100)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALISATION["imagenet"])
    pixels = ((draw_images(runs[0], y, 0) * std + mean) * 255).round().long()
    assert (pixels == pixels[:, :1, :1, :1]).all() and torch.equal(pixels[:, 0, 0, 0] // 20, y)
    assert len(pixels.unique()) == 30
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert all(line.keys().isdisjoint(("loss_g", "bns")) for line in checkpoint["history"])  # nothing is trained on them
    state = checkpoint["stateful"]
    assert not state["generator"] and not state["optim_g"]["state"] and state["optim_q"]["state"]
    moved = make_folder(tmp_path / "other", 5, size=16)
    assert "data_dir" in fails(method.main, *arguments, "--data-dir", moved)
    assert "no training images found; give --data-dir" in fails(method.main, *arguments, "--overwrite")
    assert "has no train/" in fails(method.main, *arguments, "--overwrite", "--data-dir", moved)
    assert "--lr-g has no effect with --data-source real" in fails(method.main, *arguments, "--lr-g", 0.1)
    assert "within the 6 calibrating epochs" in fails(method.main, *arguments, "--epochs", 5, "--calibrate-epochs", 6)


def test_images_of_low_and_high_confidence(net, tmp_path):
    """Table 1 of Qimera: which images are chosen, and that half of each of the student's batches is made of them."""
    torch.manual_seed(0)
    images = torch.randint(256, (60, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(60) % 5
    for index, (image, label) in enumerate(zip(images, labels)):
        folder = tmp_path / "train" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:02}.png")
    with torch.no_grad():
        confidence = net((images / 255 - 0.5) / 0.25).softmax(1).amax(1)
    settings = {"dataset": "folder", "num_classes": 5, "image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "device": "cpu"}
    settings |= {"data_dir": str(tmp_path), "confusing_below": confidence.median().item(), "real_per_class": 2}
    known = {image.numpy().tobytes(): value for image, value in zip(images, confidence)}
    for source, low in (("confusing", True), ("unconfusing", False)):
        chosen, classes = gdfq.select_real(net, gdfq.config(**settings, data_source=source), torch.device("cpu"))
        assert classes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        found = torch.stack([known[image.contiguous().numpy().tobytes()] for image in chosen])
        assert ((found < settings["confusing_below"]) == low).all() and len(found.unique()) == 10
    with pytest.raises(InputError, match="finds 12 training images of class 0 at --confusing-below 1.0, and --real-per-class"):
        cfg = gdfq.config(**settings | {"confusing_below": 1.0, "real_per_class": 13}, data_source="confusing")
        gdfq.select_real(net, cfg, torch.device("cpu"))
    batches, plain = [], {"epochs": 1, "iters": 1, "batch_size": 8, "warmup_epochs": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gdfq, "student_loss", lambda q, t, y, cfg: batches.append((t, y)) or q.sum())
        cfg = gdfq.config(**settings | plain, data_source="confusing")
        gdfq.compress(net, cfg)
    (logits, y), real = batches[0], gdfq.select_real(net, cfg, torch.device("cpu"))
    with torch.no_grad():
        expected = net((real[0] / 255 - 0.5) / 0.25)
    for row, label in zip(logits[4:], y[4:]):  # each is one of the two images of its class
        assert (row - expected[real[1] == label]).abs().amax(1).min() < 1e-4
    assert all((row - expected).abs().amax(1).min() > 1e-3 for row in logits[:4])


def test_no_batch_of_synthetic_images_has_a_single_one():
    """A generator's BatchNorm would have no statistics of a map of one pixel."""
    for count, size, expected in ((7, 3, [3, 4]), (8, 3, [3, 3, 2]), (3, 2, [3]), (1, 3, [1]), (2, 1, [1, 1])):
        parts = in_batches(torch.arange(count), size)
        assert [len(part) for part in parts] == expected and torch.cat(tuple(parts)).tolist() == list(range(count))
