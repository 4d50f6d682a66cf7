"""What holds for each of the scripts with a generator, and for every run of them."""

import pytest
import torch
import torch.nn.functional as F
from test_gdfq import TINY
from test_qimera import Stopping
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import adadfq
import autorecon
import gdfq
import qimera
from common import finetune
from common.ops import mix_images
from common.progress import close_all
from common.quant import QuantConv2d
from common.run import Run

METHODS = {gdfq: {}, autorecon: {"genotype": "gdfq"}, qimera: {}, adadfq: {}}
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def settings(method, **flags):
    return method.config(**TINY | METHODS[method] | flags)


def layer_by_layer(generator, start):
    """The generator of small images by the plain formulas, from what its first layer returns."""

    def norm(x, eps):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance + eps).sqrt()

    x = norm(start.view(len(start), 128, 4, 4), 1e-5)
    for conv in (generator.conv1, generator.conv2):
        x = F.leaky_relu(norm(conv(F.interpolate(x, scale_factor=2)), 0.8), 0.2)
    return norm(torch.tanh(generator.conv3(x)), 1e-5)


def test_small_generators_layer_by_layer():
    z, y = torch.randn(4, 100), torch.tensor([0, 1, 2, 2])
    for script in (gdfq, adadfq):
        generator = script.Generator(3, 16)
        expected = layer_by_layer(generator, generator.linear(generator.embedding.weight[y] * z))
        torch.testing.assert_close(generator(z, y), expected, atol=1e-4, rtol=1e-4)
    generator = qimera.Generator(100, 3, 16)
    expected = layer_by_layer(generator, generator.linear(z))
    torch.testing.assert_close(generator(z, F.one_hot(y, 3).float()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("script", [gdfq, qimera, adadfq], ids=lambda script: script.__name__)
def test_conditional_batchnorm_has_the_scale_and_shift_of_the_class(script):
    x, y, layer = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 2]), script.ConditionalBatchNorm(3, 3)
    nn.init.normal_(layer.gamma.weight), nn.init.normal_(layer.beta.weight)
    scale, shift = (table.weight[y][:, :, None, None] for table in (layer.gamma, layer.beta))
    expected = scale * F.batch_norm(x, None, None, training=True) + shift
    labels = F.one_hot(y, 3).float() if script is qimera else y
    torch.testing.assert_close(layer(x, labels), expected, atol=1e-5, rtol=1e-4)


class Keeping(Run):
    """Keeps what the loop works on, and has no epochs."""

    def epochs(self, count, student, synthesize, **parts):
        self.parts = parts
        return iter(())


@every_method
def test_optimizers_are_those_of_the_papers(net, method):
    run = Keeping(settings(method, beta1=0.7, lr_g=0.02, lr_q=0.03, weight_decay=0.4))
    method.compress(net, run.cfg, run)
    adam, sgd = run.parts["optim_g"].defaults, run.parts["optim_q"].defaults
    assert (adam["lr"], adam["betas"]) == (pytest.approx(0.02), (0.7, 0.999))
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"]) == (pytest.approx(0.03), 0.9, True)
    assert run.parts["optim_q"].param_groups[0]["weight_decay"] == 0.4


@every_method
def test_rates_fall_in_the_loop_and_calibrated_is_before_the_first_step(net, method):
    rates, weights = {}, {}

    class Watching(Run):
        def update(self, optimizer, loss, **how):
            rates.setdefault(self.epoch, []).append(optimizer.param_groups[0]["lr"])
            super().update(optimizer, loss, **how)

        def measure(self, name, student):
            weights.setdefault(name, student.fc.weight.detach().clone())
            return super().measure(name, student)

    run = Watching(settings(method, lr_g=0.02, lr_q=0.03, decay_epochs=[2], iters=1))
    run.test_set = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5)]
    method.compress(net, run.cfg, run)
    assert rates == {0: [0.02], 1: [0.02, 0.03], 2: pytest.approx([0.002, 0.003])}
    assert torch.equal(weights["calibrated_top1"], net.fc.weight) and not torch.equal(weights["last_top1"], net.fc.weight)


SHARED = {"clipped_ste": True, "act_placement": "input", "feature_weight": 1.0, "optimizer": "adam"}


@every_method
def test_shared_flags_change_the_student(net, method):
    images, outputs = torch.randn(8, 3, 16, 16), {}
    changes = {name: {name: value} for name, value in SHARED.items()}
    changes |= {ranges: {"act_ranges": ranges} for ranges in ("extremes", "search", "learned")}
    for name, flags in changes.items():
        student = method.compress(net, settings(method, epochs=2, bits=2, lr_q=0.1, calibrate_epochs=1, **flags))
        outputs[name] = student(images)
    pairs = [(name, "extremes") for name in (*SHARED, "search")] + [("learned", "search")]
    assert [pair for pair in pairs if torch.equal(*(outputs[name] for name in pair))] == []


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixed_images_have_the_teachers_logits_and_mixed_labels(net, how):
    run, x, y = Run(gdfq.config(**TINY, mix=how)), torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    for labels, soft in ((y, F.one_hot(y, 5).float()), (q := torch.rand(8, 5).softmax(1), q)):
        torch.manual_seed(0)
        found = finetune.mixed(run, net, x, net(x), labels)
        torch.manual_seed(0)
        images, expected = mix_images(x, soft, how)
        torch.testing.assert_close(found, (images, net(images), expected))


@every_method
def test_teacher_and_student_see_the_same_mixtures(net, method):
    seen = {nn.Conv2d: set(), QuantConv2d: set()}  # the sums of the batches that the first layer of either network gets

    def note(module, args):
        if type(module) in seen and module.weight.shape == net.conv1.weight.shape and type(args[0]) is torch.Tensor:
            seen[type(module)].add(args[0].sum().item())

    hook = register_module_forward_pre_hook(note)
    try:
        method.compress(net, settings(method, mix="mixup"))
    finally:
        hook.remove()
    teachers, students = seen.values()
    mixed = {total for total in students if abs(total) > 1}  # a generator's last layer gives every batch a mean of 0
    assert len(mixed) >= 8 and mixed <= teachers


# ---------------------------------------------------------------------------------------------------------------- runs


def test_no_range_follows_the_test_images(net):
    states = []
    for test_set in (None, [(100 * torch.randn(8, 3, 16, 16), torch.arange(8) % 5)]):
        run = Run(gdfq.config(**TINY))
        run.test_set = test_set
        states.append(gdfq.compress(net, run.cfg, run).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_bf16_is_for_what_the_networks_compute(net, monkeypatch):
    kinds, x, run = [], torch.randn(8, 3, 16, 16), Run(gdfq.config(**TINY | {"precision": "bf16"}))
    net.conv1.register_forward_hook(lambda *args: kinds.append(args[2].dtype))
    logits = run.compute(net, x)
    assert kinds == [torch.bfloat16] and logits.dtype is torch.float32
    torch.testing.assert_close(logits, net(x), atol=0.05, rtol=0.05)
    for known in (True, False):
        monkeypatch.setattr("common.run.computes_bf16", lambda device, known=known: known)  # as conftest.py does
        assert Run(gdfq.config(**TINY | {"precision": "auto"})).bf16 is known


def test_a_resumed_run_keeps_its_figures(net, tmp_path):
    runs = []
    for name, stops in (("whole", False), ("stopped", True), ("stopped", False)):
        torch.manual_seed(0)
        runs.append(run := Run(gdfq.config(**TINY, resume=True), tmp_path / name))
        run.test_set = Stopping(stops)
        if stops:
            with pytest.raises(KeyboardInterrupt):
                gdfq.compress(net, run.cfg, run)
        else:
            gdfq.compress(net, run.cfg, run)
        close_all()
    assert "calibrated_top1" in runs[0].results and runs[0].results == runs[2].results
    assert runs[0].iterations == runs[2].iterations == 12


class Worsening:
    """Test images, all of class 0 in the second evaluation and of no class in the others."""

    def __init__(self):
        self.times, self.x = 0, torch.randn(8, 3, 16, 16)

    def __iter__(self):
        self.times += 1
        yield self.x, torch.full((8,), 0 if self.times == 2 else -100)


def test_an_epochs_line_has_its_means_and_the_best_epoch_stays(net, monkeypatch):
    losses, student_loss, run = [], gdfq.student_loss, Run(gdfq.config(**TINY, lr_q=0))
    monkeypatch.setattr(gdfq, "student_loss", lambda *args: losses.append(student_loss(*args)) or losses[-1])
    net.fc.bias.data[0], run.test_set = 100.0, Worsening()  # the networks say class 0 of every image
    gdfq.compress(net, run.cfg, run)
    assert run.history[-1]["loss_q"] == pytest.approx(sum(loss.item() for loss in losses[-4:]) / 4, rel=1e-5)
    assert (run.results["best_top1"], run.results["last_top1"]) == (100, 0)
