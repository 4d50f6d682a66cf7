import numpy as np
import pytest
import torch
from test_data import make_cifar100, make_folder
from torch import nn

from common import pretrain
from common.data import NORMALISATION
from common.models import load_teacher
from common.pretrain import Muon, augment, orthogonalise, parse_args, train, usual_optimizers


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in ((16, 27), (64, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), steps=5))
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_keeps_the_norm_and_goes_downhill():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 8, 3, bias=False), torch.randn(4, 3, 8, 8)
    optimizer, losses = Muon([conv.weight], lr=0.05), []
    for _ in range(10):
        losses.append(conv(x)[:, 0].mean())
        conv.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    torch.testing.assert_close(conv.weight.norm(), torch.tensor(8.0).sqrt(), rtol=0.2, atol=0)


def test_augmentation_equals_cropping_each_image_by_hand():
    images, flip = torch.randn(6, 3, 10, 10), torch.tensor([True, False] * 3)
    out = augment(images, flip, 8, 2, torch.Generator().manual_seed(4))
    offsets = torch.randint(0, 7, (2, 6, 1), generator=torch.Generator().manual_seed(4)).squeeze(-1)
    padded = nn.functional.pad(images, (2,) * 4, mode="reflect")
    for i in range(6):
        image = padded[i].flip(2) if flip[i] else padded[i]
        row, column = offsets[:, i]
        assert torch.equal(out[i], image[:, row : row + 8, column : column + 8])


def dropping(num_classes):
    """A depthwise kernel, dropout, a parameter that is a scalar."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return x * self.factor

    layers = (
        nn.Conv2d(3, 8, 3, 2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), Scale(), nn.Linear(8, num_classes))


@pytest.mark.parametrize("recipe", ["fast --small-epochs 1", "sgd --decay-epochs 1", "sgd"])
def test_training_goes_on_where_it_stopped_and_its_file_loads(recipe, tmp_path, monkeypatch):
    data, arch = make_folder(make_folder(tmp_path, 10, images=2), 10, images=2, split="train"), "test_pretrain:dropping"

    def arguments(name):
        flags = f"--arch {arch} --recipe {recipe} --data-dir {data} --epochs 2 --batch-size 5 --out {tmp_path / name}"
        return parse_args(flags.split())

    def stops_in_the_second_epoch(steps, desc, **_):
        if desc == "epoch 2/2":
            raise KeyboardInterrupt
        return steps

    train(arguments("whole.pt"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "Progress", stops_in_the_second_epoch)
        train(arguments("resumed.pt"))
    assert (tmp_path / "resumed.pt.checkpoint").exists() and not (tmp_path / "resumed.pt").exists()
    train(arguments("resumed.pt"))
    whole, resumed = (load_teacher(arch, "cifar10", 10, 32, str(tmp_path / n))[0] for n in ("whole.pt", "resumed.pt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert not list(tmp_path.glob("*.checkpoint"))
    torch.manual_seed(0)
    untrained = dropping(10).state_dict()
    assert all(not torch.equal(value, untrained[key]) for key, value in whole.state_dict().items())


def test_one_step_of_the_usual_recipe_equals_one_by_hand(tmp_path, monkeypatch):
    """Images from CIFAR-100's own files, cut out of a black border and mirrored, and PyTorch's SGD."""
    pixels, labels = make_cifar100(tmp_path, monkeypatch)
    flags = (
        f"--arch test_pretrain:plain --dataset cifar100 --data-dir {tmp_path} --batch-size 20 --epochs 1 --out {tmp_path / 'w'}"
    )
    train(parse_args([*flags.split(), *"--recipe sgd --lr 0.5 --weight-decay 0.1 --seed 3".split()]))
    torch.manual_seed(3)
    model, random = plain(100), torch.Generator().manual_seed(3000)
    order, mirrored = torch.randperm(20, generator=random), torch.rand(20, generator=random) < 0.5
    offsets = torch.randint(0, 9, (2, 20, 1), generator=random).squeeze(-1)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in NORMALISATION["cifar100"])
    batch = []
    for place, index in enumerate(order.tolist()):
        image = pixels[index][:, :, ::-1] if mirrored[index] else pixels[index]
        bordered = np.zeros((3, 40, 40))
        bordered[:, 4:36, 4:36] = image
        row, column = offsets[:, place].tolist()
        batch.append((bordered[:, row : row + 32, column : column + 32] / 255 - mean) / std)
    x, y = torch.from_numpy(np.stack(batch)).float(), torch.tensor(labels)[order]
    nn.functional.cross_entropy(model.train()(x), y).backward()
    found = torch.load(tmp_path / "w", weights_only=True)
    for name, p in model.named_parameters():  # the first step has no momentum yet
        torch.testing.assert_close(found[name], (p - 0.5 * (p.grad + 0.1 * p)).detach(), atol=1e-5, rtol=1e-4)


def plain(num_classes):
    layers = nn.Conv2d(3, 4, 3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, num_classes))


def test_rates_of_the_usual_recipe():
    model = nn.Linear(2, 2)

    def rates(*flags):
        args = parse_args(["--out", "w", "--recipe", "sgd", "--epochs", "6", *flags])
        _, rate = usual_optimizers(model, args, steps=10)
        return [rate(step) for step in (0, 19, 20, 30, 59)]

    assert rates("--decay-epochs", "2", "3") == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert rates() == pytest.approx([1, (1 + 3**0.5 / 2) / 2, 0.75, 0.5, (1 - 3**0.5 / 2) / 2])


def test_what_cannot_be_trained_is_said_in_one_sentence(tmp_path, fails):
    data = make_folder(make_folder(tmp_path / "data", 10, images=1), 10, images=1, split="train")
    for flags, words in [
        ("--recipe sgd --small-size 24", "--small-size has no effect with --recipe sgd; leave one of them out"),
        ("--decay-epochs 3", "--decay-epochs has no effect with --recipe fast"),
        (f"--data-dir {data}", "--batch-size is 128 and there are 10 training images; lower it"),
        (f"--data-dir {tmp_path / 'none'}", f"--data-dir '{tmp_path / 'none'}' is not a folder"),
        (f"--data-dir {data} --dataset cifar100", "has 10 class folders and the network 100 classes"),
        (f"--data-dir {data} --batch-size 5 --arch resnet21", "nearest: resnet"),
        (f"--data-dir {data} --batch-size 5 --arch tiny:grey", "takes images of 1 channels, and CIFAR's have 3"),
        (f"--data-dir {data} --batch-size 5 --epochs 1 --lr 1e30", "the loss became"),
    ]:
        assert words in fails(pretrain.main, *flags.split(), "--out", tmp_path / "w"), flags
    assert f"--out {data} exists already" in fails(pretrain.main, "--data-dir", data, "--out", data)
    (data / "train").rename(data / "val")
    assert "has no train/" in fails(pretrain.main, "--data-dir", data, "--out", tmp_path / "w")
