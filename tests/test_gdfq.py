import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import FunctionalNet

import gdfq
from common import InputError, finetune
from common.ops import kd_loss, mix_images
from common.probe import input_channels
from common.quant import quantized_activations, quantized_layers, set_observing
from gdfq import Generator, compress, config, generator_loss, student_loss

TINY = {"dataset": "folder", "num_classes": 5, "image_size": 16, "batch_size": 8, "epochs": 3, "iters": 4}
TINY |= {"warmup_epochs": 1, "calibrate_epochs": 1, "device": "cpu", "precision": "fp32"}


def test_generators_have_the_papers_sizes():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    # embedding + linear + BatchNorm + three convolutions with bias + two BatchNorms
    expected = 100 * 100 + 101 * 8192 + 256 + (128 * 9 + 1) * 128 + 256 + (128 * 9 + 1) * 64 + 128 + (64 * 9 + 1) * 3
    assert count(Generator(100)) == expected
    z, y = torch.randn(4, 100), torch.tensor([0, 1, 2, 2])
    images = Generator(3)(z, y)
    assert images.shape == (4, 3, 32, 32)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-2, rtol=0)


def test_large_generator_knows_the_label_by_conditional_batchnorm_only():
    large, z = Generator(3, 68), torch.randn(4, 100)
    with_one, without_one = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 2, 2])
    before = large(z, with_one)
    assert before.shape == (4, 3, 68, 68) and torch.equal(before, large(z, without_one))
    with torch.no_grad():
        large.bn1.gamma.weight[1] *= 2
    assert torch.equal(before, large(z, without_one)) and not torch.equal(before, large(z, with_one))


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_losses_against_double_precision_formulas(reduction):
    q, t, y, T = torch.randn(6, 7), torch.randn(6, 7) * 3, torch.randint(7, (6,)), 20.0
    log_p, log_q = (torch.log_softmax(v.double() / T, 1) for v in (t, q))
    expected = T * T * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / (6 if reduction == "batchmean" else 42)
    torch.testing.assert_close(kd_loss(q, t, T, reduction).double(), expected, atol=1e-5, rtol=1e-4)
    ce = -torch.log_softmax(q.double(), 1)[range(6), y].mean()
    cfg = config(**TINY, kd_reduction=reduction, kd_weight=0.5)
    torch.testing.assert_close(student_loss(q, t, y, cfg).double(), ce + 0.5 * expected, atol=1e-5, rtol=1e-4)
    bns = torch.tensor(3.0)
    torch.testing.assert_close(generator_loss(q, y, bns, cfg).double(), ce + 0.3, atol=1e-5, rtol=1e-4)
    assert generator_loss(q, y, bns, config(**TINY, no_ce=True)) == pytest.approx(0.3)
    torch.testing.assert_close(generator_loss(q, y, bns, config(**TINY, no_bns=True)).double(), ce, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixing_keeps_pixels_and_labels_in_step(how):
    y = torch.arange(16) % 4
    x = y.view(-1, 1, 1, 1).expand(16, 1, 20, 20).float()  # every pixel is its own label
    torch.manual_seed(0)
    mixed, soft = mix_images(x, torch.nn.functional.one_hot(y, 4).float(), how)
    torch.testing.assert_close(soft.sum(1), torch.ones(16))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), (soft * torch.arange(4.0)).sum(1), atol=1e-5, rtol=1e-5)
    flat = [len(image.unique()) for image in mixed]
    assert max(flat) == (1 if how == "mixup" else 2) and (soft.amax(1) < 0.99).any()


@pytest.mark.parametrize("how, mean", [("mixup", 1 / 2), ("cutmix", 1 / 2 - 1 / 5 + 1 / 48)])
def test_shares_of_mixed_images_are_uniform(how, mean):
    """Their mean is 1/2; of a box with sides s, the border leaves (s - s^2 / 4)^2 on average, where s^2 is uniform."""
    torch.manual_seed(0)
    y = torch.arange(4000) % 2
    x = y.float().view(-1, 1, 1, 1).expand(4000, 1, 32, 32)
    mixed, _ = mix_images(x, F.one_hot(y, 2).float(), how)
    share = 2 * (mixed - x).abs().mean((1, 2, 3))  # half of the partners are of the other class
    assert share.mean().item() == pytest.approx(mean, abs=0.03)


def test_compress_quantizes_a_small_network_with_functional_activations(net):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    student = compress(net, config(**TINY, bits=3, lr_q=0.01))
    assert len(quantized_layers(student)) == 4 and len(quantized_activations(student)) == 3
    for _, layer in quantized_layers(student):
        assert all(len(row.unique()) <= 8 for row in layer.quantized_weight().flatten(1))
    assert all(act.seen and act.high > act.low for _, act in quantized_activations(student))
    changed = [key for key, value in before.items() if not torch.equal(student.state_dict()[key], value)]
    assert "fc.weight" in changed and "bn1.weight" in changed and not any("running" in key for key in changed)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert len(student._forward_pre_hooks) == len(student._forward_hooks) == 1  # those that quantize its weights
    for model in (net, *student.children()):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for model in (net, student):
        assert all(p.requires_grad for p in model.parameters())


def test_calibration_alone_leaves_the_weights(net):
    student = compress(net, config(**TINY | {"warmup_epochs": None}, no_finetune=True))
    state = student.state_dict()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert all(act.seen for _, act in quantized_activations(student))


def test_first_student_step_equals_one_computed_by_hand(net):
    """One generator step, then one step of plain SGD on the stated loss, from the same random numbers."""
    settings = TINY | {"epochs": 1, "iters": 1, "warmup_epochs": 0, "lr_q": 0.1, "seed": 5, "weight_decay": 0.0}
    student = compress(net, config(**settings))
    torch.manual_seed(5)
    generator = Generator(5, 16)
    y = torch.randint(5, (8,))
    x = generator(torch.randn(8, 100), y).detach()
    reference = gdfq.quantize(net, 4, 4)
    set_observing(reference, True)
    logits, cfg = reference(x), config(**settings)
    student_loss(logits, net(x).detach(), y, cfg).backward()
    expected = net.fc.weight - 0.1 * 1.9 * reference.fc.weight.grad  # Nesterov: gradient + 0.9 * buffer
    torch.testing.assert_close(student.fc.weight.detach(), expected, atol=1e-6, rtol=1e-5)


def test_batchnorm_statistics_follow_the_images_only_with_no_fixed_bns(net):
    settings = TINY | {"epochs": 2, "iters": 1, "warmup_epochs": 1, "seed": 5, "bns_form": "sum"}
    student = compress(net, config(**settings, no_fixed_bns=True))
    torch.manual_seed(5)
    generator = Generator(5, 16)
    optimizer = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999))
    reference, cfg = gdfq.quantize(net, 4, 4), config(**settings)
    watched = copy.deepcopy(net)
    stats = gdfq.BatchNormStatistics(watched)
    for training in (False, True):  # the generator learns alone in the first epoch
        y = torch.randint(5, (8,))
        x = generator(torch.randn(8, 100), y)
        gdfq.generator_loss(watched(x), y, stats.loss(cfg.bns_form), cfg).backward()
        optimizer.step()
        optimizer.zero_grad()
        set_observing(reference, not training)  # --calibrate-epochs 1
        reference.train(training)(x.detach())
    net.dropout = torch.nn.Dropout().eval()
    finetune.train_norms(net, True)
    assert [name for name, module in net.named_modules() if module.training] == ["bn1", "bn2", "bn3"]
    net.eval()
    state = student.state_dict()
    buffers = {name: value for name, value in reference.state_dict().items() if "running" in name}
    assert buffers and all(not torch.equal(value, net.state_dict()[name]) for name, value in buffers.items())
    for name, value in buffers.items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4)


def test_ranges_freeze_after_calibration(net):
    def ranges(**settings):
        return [act.high for _, act in quantized_activations(compress(net, config(**TINY | settings)))]

    short, longer = ranges(epochs=2), ranges(epochs=4)
    assert torch.equal(torch.stack(short), torch.stack(longer))
    assert not torch.equal(torch.stack(longer), torch.stack(ranges(epochs=4, calibrate_epochs=2)))


def test_defaults_are_the_papers():
    def defaults(*argv):
        cfg = gdfq.parse_args(argv)
        return cfg.arch, cfg.batch_size, cfg.warmup_epochs, cfg.lr_q, cfg.epochs, cfg.iters

    assert defaults("--dataset", "cifar100") == ("resnet20", 200, 4, 1e-4, 400, 200)
    assert defaults("--dataset", "imagenet") == ("resnet18", 16, 50, 1e-6, 400, 200)


def test_ablations_and_variants_change_what_they_name(net):
    released = config(**TINY)
    assert (released.bns_form, released.kd_reduction, released.beta1) == ("gdfq", "mean", 0.5)
    paper = config(**TINY, variant="paper", kd_reduction="mean")
    assert (paper.bns_form, paper.kd_reduction, paper.beta1) == ("sum", "mean", 0.9)
    results = {}
    for name in ("no_ce", "no_bns", "no_student_ce", "no_kd", "no_fixed_bns", "clipped_ste"):
        results[name] = compress(net, config(**TINY, lr_q=0.05, **{name: True})).fc.weight
    features = {"no_student_ce": True, "no_kd": True, "feature_weight": 0.1}  # alone
    results["features"] = compress(net, config(**TINY, lr_q=0.05, **features)).fc.weight
    results["mixup"] = compress(net, config(**TINY, lr_q=0.05, mix="mixup")).fc.weight
    results["none"] = compress(net, config(**TINY, lr_q=0.05)).fc.weight
    weights = list(results.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_a_model_that_does_not_fit_is_refused(net):
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(5))
    plain(torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match="no BatchNorm2d"):
        compress(plain, config(**TINY))
    with pytest.raises(InputError, match="multiples of 4"):
        compress(net, config(**TINY | {"image_size": 18}))
    with pytest.raises(InputError, match=r"returns \(2, 5\) for 2 images, expected \(2, 7\)"):
        compress(net, config(**TINY | {"num_classes": 7}))
    with pytest.raises(InputError, match="before any fine-tuning"):
        config(**TINY | {"epochs": 1})
    with pytest.raises(InputError, match="--calibrate-epochs is 0"):
        config(**TINY | {"calibrate_epochs": 0})
    assert input_channels(FunctionalNet()) == 3


def test_a_loss_that_is_not_finite_stops_with_the_step(net):
    with pytest.raises(InputError, match=r"loss_q became (nan|inf) in epoch 2, step \d+, and no epoch is saved yet"):
        compress(net, config(**TINY, lr_q=1e30))
    with pytest.raises(InputError, match="weights stopped being finite in the last step of epoch 2"):
        compress(net, config(**TINY | {"iters": 1}, lr_q=1e30, weight_decay=1e10))
    compress(net, config(**TINY))  # the caller's network is as good as before
