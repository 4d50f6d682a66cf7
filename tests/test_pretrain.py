import pytest
import torch
from test_data import make_folder
from torch import nn

from common import pretrain
from common.models import load_teacher
from common.pretrain import Muon, augment, orthogonalise, parse_args, train


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


def test_training_goes_on_where_it_stopped_and_its_file_loads(tmp_path, monkeypatch):
    data = make_folder(tmp_path, 10, images=2)
    (data / "train").symlink_to(data / "test")

    def arguments(name):
        flags = f"pretrain --data-dir {data} --epochs 2 --small-epochs 1 --batch-size 5 --out {tmp_path / name}"
        monkeypatch.setattr("sys.argv", flags.split())
        return parse_args()

    def stops_in_the_second_epoch(steps, desc, **_):
        if desc == "epoch 2/2":
            raise KeyboardInterrupt
        return steps

    train(arguments("whole.pt"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "Progress", stops_in_the_second_epoch)
        train(arguments("resumed.pt"))
    assert (tmp_path / "resumed.checkpoint").exists() and not (tmp_path / "resumed.pt").exists()
    train(arguments("resumed.pt"))
    whole, resumed = (load_teacher("resnet20", "cifar10", 10, 32, str(tmp_path / n))[0] for n in ("whole.pt", "resumed.pt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert not list(tmp_path.glob("*.checkpoint"))
