import re
import threading

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from torch import nn

from common import InputError
from common.data import NORMALISATION
from common.models import BasicBlock, ZeroPadShortcut, build, build_student, canonical, design_of, load_teacher
from common.probe import probe, refuse_infinite, refuse_undifferentiable
from common.quant import quantized_activations
from common.trace import baked_copy


def count(model):
    return sum(p.numel() for p in model.parameters())


def logits(model):
    return model.eval()(torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin())


def randomised(model):
    """Weights and statistics that make every key matter."""
    torch.manual_seed(3)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5 if tensor.ndim < 2 else torch.randn_like(tensor) * 0.1
    return model


def test_sizes_of_the_cifar_resnets():
    assert [count(build("resnet20", classes, 32)) for classes in (10, 100)] == [272_474, 278_324]
    assert count(build("resnet20", 10, 32, "pad")) == 269_722
    assert count(build("resnet56", 10, 32)) == 855_770


def test_zero_padding_shortcut():
    x = torch.randn(1, 4, 6, 6)
    out = ZeroPadShortcut(4, 8, 2)(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2]) and out.shape == (1, 8, 3, 3)
    assert out[:, [0, 1, 6, 7]].abs().sum() == 0


def to_pytorchcv(key):
    key = re.sub(r"^layer(\d)\.(\d)\.", lambda m: f"features.stage{m[1]}.unit{int(m[2]) + 1}.", key)
    key = re.sub(r"unit(\d)\.(conv|bn)(\d)\.", lambda m: f"unit{m[1]}.body.conv{m[3]}.{m[2]}.", key)
    key = key.replace("downsample.0.", "identity_conv.conv.").replace("downsample.1.", "identity_conv.bn.")
    key = re.sub(r"^conv1\.", "features.init_block.conv.", key)
    return re.sub(r"^bn1\.", "features.init_block.bn.", key).replace("fc.", "output.")


@pytest.mark.parametrize("layout", ["own", "pytorchcv", "chenyaofo", "akamaster"])
def test_published_layouts_load_as_they_are(tmp_path, layout):
    model = randomised(build("resnet20", 10, 32, "pad" if layout == "akamaster" else "projection"))
    state, path, normalisation = model.state_dict(), tmp_path / "resnet20.pt", NORMALISATION["cifar10"]
    if layout == "pytorchcv":
        state = {to_pytorchcv(key): value for key, value in state.items()}
        assert {"features.stage2.unit1.identity_conv.bn.weight", "features.stage1.unit3.body.conv2.conv.weight"} <= set(state)
    elif layout == "chenyaofo":
        path, normalisation = tmp_path / "cifar10_resnet20-4118986f.pt", NORMALISATION["chenyaofo-cifar10"]
    elif layout == "akamaster":
        keys = (key for key in state if "num_batches_tracked" not in key)
        state = {"state_dict": {"module." + key.replace("fc.", "linear."): state[key] for key in keys}, "best_prec1": 91.73}
        normalisation = NORMALISATION["imagenet"]
    torch.save(state, path)
    loaded, found, _ = load_teacher("resnet20", "cifar10", 10, 32, str(path))
    assert torch.equal(logits(loaded), logits(model)) and found == normalisation
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    shortcut = nn.Sequential if layout != "akamaster" else ZeroPadShortcut
    assert [type(m.downsample) for m in loaded.modules() if isinstance(m, BasicBlock)][3] is shortcut


def mobilenet_to_pytorchcv(key):
    units = [f"stage{stage}.unit{unit}" for stage, count in enumerate((1, 2, 3, 7, 4), 1) for unit in range(1, count + 1)]
    block, place, name = re.fullmatch(r"features\.(\d+)\.([\w.]+)\.(\w+)", key).groups()
    parts = {"0": "conv", "1": "bn", "conv.0.0": "conv1.conv", "conv.0.1": "conv1.bn", "conv.1.0": "conv2.conv"}
    parts |= {"conv.1.1": "conv2.bn", "conv.2": "conv3.conv", "conv.3": "conv3.bn"}
    return f"features.{['init_block', *units, 'final_block'][int(block)]}.{parts[place]}.{name}"


@pytest.mark.parametrize("file", ["resnet18-1.pth", "resnet50-1.pth", "resnet50b-1.pth", "mobilenetv2_w1-1.pth"])
def test_pytorchcvs_imagenet_networks(tmp_path, file):
    arch = "mobilenet_v2" if "mobile" in file else file[:8]
    torch.manual_seed(3)
    model = torchvision.models.get_model(arch, weights=None)
    if file == "resnet50-1.pth":
        for stage in (model.layer2, model.layer3, model.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    elif arch == "mobilenet_v2":
        model.features[1].conv.insert(0, nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2), module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1), nn.init.normal_(module.bias, 0, 0.2)
    state = model.state_dict()
    if arch == "mobilenet_v2":
        weight, bias = state.pop("classifier.1.weight"), state.pop("classifier.1.bias")
        assert not bias.any()
        state = {mobilenet_to_pytorchcv(key): value for key, value in state.items()}
        state["output.weight"] = weight[:, :, None, None]
    else:
        state = {to_pytorchcv(key).replace("init_block.", "init_block.conv."): value for key, value in state.items()}
    assert all(key.startswith(("features.", "output.")) for key in state)
    torch.save(state, tmp_path / file)
    loaded, normalisation, _ = load_teacher(arch, "imagenet", 1000, 224, str(tmp_path / file))
    torch.testing.assert_close(logits(loaded), logits(model))
    assert normalisation == NORMALISATION["imagenet"]
    assert design_of(loaded) == ("pytorchcv" if file in ("resnet50-1.pth", "mobilenetv2_w1-1.pth") else None)


@pytest.mark.parametrize("arch, side", [("resnet18", 4), ("mobilenet_v2", 4), ("vgg11_bn", 1), ("shufflenet_v2_x0_5", 4)])
def test_torchvision_networks_get_a_cifar_stem(arch, side):
    model, sizes = build(arch, 10, 32), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
    assert logits(model).shape == (2, 10) and logits(model).isfinite().all()
    assert sizes[0] == 32 and sizes[-1] == (2 if arch == "vgg11_bn" else side)
    if arch == "vgg11_bn":
        assert model.classifier[0].weight.shape == (512, 512)
    assert not quantized_activations(model)


def test_imagenet_architectures_are_torchvisions_own():
    assert build("resnet18", 1000, 224).conv1.kernel_size == (7, 7)
    assert count(build("mobilenet_v2", 1000, 224)) == 3_504_872


def test_heads_that_serve_training_only_are_left_out():
    kept = {"fc.weight": torch.ones(2, 3)}
    for arch, head in (("inception_v3", "AuxLogits.fc.weight"), ("googlenet", "aux2.conv.bn.bias")):
        assert canonical(kept | {head: torch.ones(2)}, arch)[0] == kept


def test_only_what_wraps_a_whole_network_is_taken_off_its_keys():
    bare = {"module.weight": 1, "fc.weight": 2}
    assert canonical(bare, "own:net")[0] == bare
    for wrapper in ("module.", "_orig_mod.", "module._orig_mod."):
        assert canonical({wrapper + key: value for key, value in bare.items()}, "own:net")[0] == bare


def test_a_checkpoint_of_lightning_loads(tmp_path):
    expected = randomised(build("resnet20", 10, 32))
    state = {f"model.{key}": value for key, value in expected.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "lightning.ckpt")
    model = load_teacher("resnet20", "cifar10", 10, 32, str(tmp_path / "lightning.ckpt"))[0]
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    "forward, words",
    [
        (lambda net, x: net(x.detach()), "no gradient reaches them"),
        (lambda net, x: torch.no_grad()(net)(x), "no gradient reaches them"),
        (lambda net, x: net(x) + (y := x.relu()).mul_(y).mean(), "is overwritten in place"),
        (lambda net, x: F.dropout(net(x), 0.3), "is not deterministic in eval mode; pass training=self.training"),
        (lambda net, x: net(x).softmax(1), "returns probabilities; let it return the logits"),
        (lambda net, x: (net(x), x), "returns a tuple, expected logits .* wrap it"),
        (lambda net, x: net(x.sub_(0.5)), "changes its input in place"),
        (lambda net, x: net(x.clamp_(-100, 100)), "changes its input in place"),
        (lambda net, x: net(x - 0.5), None),
    ],
)
def test_networks_whose_forward_serves_no_gradients_are_refused(forward, words):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build("resnet20", 10, 32).eval().requires_grad_(False)

        def forward(self, x):
            return forward(self.net, x)

    model, state = Own(), torch.get_rng_state()
    if words is None:
        refuse_undifferentiable(model, probe(model, 10, 32))
        assert torch.equal(torch.get_rng_state(), state)
    else:
        with pytest.raises(InputError, match=words):
            refuse_undifferentiable(model, probe(model, 10, 32))


class Squeezing(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).mean((2, 3)).squeeze())


def test_networks_that_treat_a_single_image_otherwise_are_refused():
    model = Squeezing(nn.Conv2d(3, 4, 3), nn.Linear(4, 5)).eval()
    with pytest.raises(InputError, match=r"returns \(5,\) for a single image, expected \(1, 5\); write x.flatten\(1\)"):
        probe(model, 5, 16)


def test_a_student_with_another_output_in_training_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    with pytest.raises(InputError, match="--student-arch tiny:auxiliary returns a tuple while it trains, expected logits"):
        build_student("tiny:auxiliary", nn.Conv2d(3, 4, 3), 5, 16)
    build_student("tiny:net", nn.Conv2d(3, 4, 3), 5, 16)


def test_a_network_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.lock = threading.Lock()
    with pytest.raises(InputError, match="the model cannot be copied .*lock.*; remove what cannot be copied"):
        baked_copy(model)


def test_networks_that_are_no_plain_modules_yet_are_refused():
    with pytest.raises(InputError, match="the network is a TorchScript module"):
        refuse_infinite(torch.jit.script(nn.Linear(2, 2)), "the network")
    with pytest.raises(InputError, match="the network has '0.weight' of a lazy layer"):
        refuse_infinite(nn.Sequential(nn.LazyLinear(2)), "the network")


def test_own_factory(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\ndef make(num_classes):\n    return nn.Linear(3, num_classes)\ndef bad():\n    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build("own_net:make", 7, 32).out_features == 7
    with pytest.raises(InputError, match="returned a int"):
        build("own_net:bad", 7, 32)
    with pytest.raises(InputError, match="cannot be imported"):
        build("own_net:absent", 7, 32)


def test_weights_that_do_not_fit(tmp_path):
    good = tmp_path / "good.pt"
    torch.save(build("resnet20", 10, 32).state_dict(), good)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:50_000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    state = torch.load(good)
    state["fc.bias"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    torch.save({"module": nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    torch.save({"ema": {"fc.bias": torch.zeros(10)}, "epoch": 3}, tmp_path / "nested.pt")
    for arch, classes, weights, words in [
        ("resnet20", 10, tmp_path / "absent.pt", "is not a file"),
        ("resnet20", 10, tmp_path / "cut.pt", "truncated"),
        ("resnet20", 10, tmp_path / "text.pt", "not a PyTorch checkpoint"),
        ("resnet20", 10, tmp_path / "list.pt", "no dict of tensors"),
        ("resnet20", 10, tmp_path / "nan.pt", "'fc.bias' .* not finite"),
        ("resnet20", 10, tmp_path / "pickled.pt", r"holds more than tensors \(torch.nn.modules.linear.Linear\)"),
        ("resnet20", 10, tmp_path / "script.pt", "is a TorchScript archive"),
        ("resnet20", 10, tmp_path / "nested.pt", "no dict of tensors but ema, epoch;"),
        ("resnet20", 100, good, "are for 10 classes and the data set has 100"),
        ("resnet32", 10, good, "another architecture"),
        ("resnet18", 10, good, "another architecture"),
        ("resnet2o", 10, good, "nearest: .*resnet20"),
        ("resnet32", 10, "bundled", "no bundled weights of resnet32"),
        ("resnet18", 10, "pytorchcv", "known are: resnet20"),
        ("resnet18", 10, "torchvision", "are for ImageNet"),
    ]:
        with pytest.raises(InputError, match=words):
            load_teacher(arch, "cifar10", classes, 32, str(weights))
