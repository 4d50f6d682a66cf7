"""What stands beyond the papers: searched and learned activation ranges, optimizers, rates, --schedule short."""

import copy
import math

import pytest
import strangers
import torch
from conftest import trained
from test_cli import TINY
from torch import nn

import gdfq
from common import InputError
from common.export import load_quantized, save_quantized
from common.finetune import LearnedAct, MatchedFeatures, SearchedAct, keep_ranges, set_ranges, set_rates, student_optimizer
from common.learned import quantize_by_step
from common.quant import QuantAct, fake_quantize, quantize, quantized_activations, set_observing
from common.run import duration


def test_a_searched_range_loses_less_than_the_extremes_and_moves_with_the_images():
    torch.manual_seed(0)
    x = torch.relu(torch.randn(20_000)) ** 2  # a long tail
    extremes, searched = QuantAct(3), SearchedAct(3)
    for act in (extremes, searched):
        act.observing = True
        act(x)
    lost = [(act(x) - x).abs().pow(2.4).mean().item() for act in (extremes, searched)]
    assert lost[1] < 0.5 * lost[0] and searched.low == 0
    before = searched.high.item()
    alone = SearchedAct(3)
    alone.observing = True
    torch.manual_seed(1)
    alone(2 * x)
    torch.manual_seed(1)
    searched(2 * x)
    assert searched.high.item() == pytest.approx(0.9 * before + 0.1 * alone.high.item())
    assert searched.scale.item() == pytest.approx(searched.high.item() / 7)


def test_a_learned_range_moves_after_calibration_only_and_ends_as_any_other(net, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    student = set_ranges(quantize(net, 3, 3), "learned")
    acts = [act for _, act in quantized_activations(student)]
    assert all(isinstance(act, LearnedAct) for act in acts)
    set_observing(student, True)
    student(x).sum().backward()
    assert all(act.scale.grad is None and act.scale > 0 for act in acts)
    set_observing(student, False)
    optimizer = student_optimizer(student, "sgd", 0.1, 0.5, fused=False, momentum=0.9)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(student.parameters()))
    before = [act.scale.item() for act in acts]
    student(x).square().sum().backward()
    optimizer.step()
    assert all(act.scale.item() != was for act, was in zip(acts[:2], before))  # the third gets values of its own grid alone
    expected = student(x)
    keep_ranges(student)
    assert all(type(act) is QuantAct and not list(act.parameters()) for _, act in quantized_activations(student))
    torch.testing.assert_close(student(x), expected, rtol=1e-5, atol=1e-5)
    sizes = {"num_classes": 5, "image_size": 16, "channels": 3, "wbits": 3, "abits": 3, "act_placement": "relu"}
    save_quantized(student, tmp_path / "quantized.pt", {"arch": "tiny:net", "design": None, **sizes})
    torch.testing.assert_close(load_quantized(tmp_path / "quantized.pt", net)(x), student(x), rtol=1e-5, atol=1e-5)


def test_a_learned_range_has_the_scaled_gradient_of_lsq():
    for x in (torch.rand(6, 4, 5, 5), torch.rand(6, 4, 5, 5) - 0.4, -torch.rand(6, 4, 5, 5)):
        act = LearnedAct(3)
        act.observing = True
        act(x)
        act.observing = False
        scale = act.scale.detach().clone().requires_grad_()
        plain = torch.autograd.grad(quantize_by_step(x, scale, act.zero_point, 3, "lsq").sum(), scale)[0]
        ours = torch.autograd.grad(act(x).sum(), act.scale)[0]
        assert (act.zero_point > 0) == (x.min() < 0)
        largest = max(act.zero_point.item(), 7 - act.zero_point.item())
        torch.testing.assert_close(ours, plain / (4 * 5 * 5 * largest) ** 0.5)  # features of an image, times Q_P


def test_weight_decay_of_adam_is_decoupled(net):
    before, optimizer = net.fc.weight.detach().clone(), student_optimizer(net.requires_grad_(True), "adam", 1e-3, 0.5, False)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(net.fc.weight.detach(), before * (1 - 1e-3 * 0.5))


def test_features_are_matched_layer_by_layer(net):
    torch.manual_seed(0)
    x, student = torch.randn(8, 3, 16, 16), quantize(net, 3, 3)
    set_observing(student, True)
    student(x)
    set_observing(student, False)
    norms = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    apart = []
    for name, layer in norms:  # independently: the inputs of both layers, through the formula of BatchNorm in eval mode
        seen = []
        for network in (net, student):
            layer_of = network.get_submodule(name)
            hook = layer_of.register_forward_pre_hook(lambda layer, args, seen=seen: seen.append(args[0]))
            network(x)
            hook.remove()
        column = (layer.weight / (layer.running_var + layer.eps).sqrt()).view(-1, 1, 1)
        theirs, ours = ((value - layer.running_mean.view(-1, 1, 1)) * column for value in seen)
        apart.append((ours - theirs).square().mean() / (layer.weight.square().mean() + layer.bias.var(correction=0)))
    dead = nn.Sequential(net, nn.BatchNorm2d(4))  # as of an unused branch, whose features are constant
    dead[1].weight.data.zero_()
    assert not MatchedFeatures(dead, copy.deepcopy(dead), 3.0).variances.keys() & {"1"}
    features = MatchedFeatures(net, student, 3.0)
    net(x), student(x)
    loss = features.added_to(torch.tensor(2.0))
    assert loss.item() == pytest.approx(2 + 3 * sum(apart).item() / len(norms), rel=1e-4)
    loss.backward()
    assert features.kept == ({}, {}) and all(p.grad is None for p in net.parameters())
    assert student.get_submodule(norms[0][0]).weight.grad.abs().sum() > 0
    off = MatchedFeatures(net, student, 0.0)
    net(x), student(x)
    assert off.kept == ({}, {}) and off.added_to(loss) is loss


class Residual(torch.nn.Module):
    """Two convolutions with a shortcut, in place or not, and a head that only training uses."""

    def __init__(self, inplace):
        super().__init__()
        (self.conv1, self.bn1), (self.conv2, self.bn2) = strangers.conv_bn(3, 8, stride=2), strangers.conv_bn(8, 8)
        self.relu, self.fc, self.aux = torch.nn.ReLU(inplace), torch.nn.Linear(8, 5), torch.nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(self.aux(x) if self.training else x))
        if self.relu.inplace:
            y += x
        else:
            y = y + x
        return self.fc(self.relu(y).mean((2, 3)))


def test_features_are_those_of_the_batchnorms_also_where_a_network_works_in_place():
    x, distances = torch.randn(8, 3, 16, 16), []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = trained(Residual(inplace))
        student = quantize(net, 3, 3, example=x)
        set_observing(student, True)
        student(x)
        set_observing(student, False)
        features = MatchedFeatures(net, student, 1.0)
        net(x), student(x)
        distances.append(features.distance())
        distances[-1].backward()
        assert student.conv2.weight.grad.abs().sum() > 0
    assert distances[0] > 0 and torch.equal(*distances)


def test_a_network_whose_batchnorms_cannot_be_matched_is_told_so():
    net, x = strangers.make("FusedNorms"), torch.randn(4, 3, 16, 16)
    with pytest.raises(InputError, match="--feature-weight is 200 .* so none can be matched; give --feature-weight 0$"):
        MatchedFeatures(net, quantize(net, 4, 4, example=x), 200.0)


def test_a_step_that_learns_its_way_below_zero_stops_the_run(net):
    settings = {
        "dataset": "folder",
        "num_classes": 5,
        "image_size": 16,
        "device": "cpu",
        "batch_size": 4,
        "epochs": 3,
        "iters": 2,
    }
    learned = {"act_ranges": "learned", "optimizer": "adam", "warmup_epochs": 1, "calibrate_epochs": 1}
    with pytest.raises(
        InputError,
        match="a learned step size of the student became -.* in epoch 2, .*; lower --lr-g or --lr-q and give another",
    ):
        gdfq.compress(net, gdfq.config(**settings, **learned, lr_q=0.5))


def test_a_parameter_of_the_network_that_is_called_scale_is_no_step(net):
    net.scale, net.fc.scale = torch.nn.Parameter(torch.tensor(-0.5)), torch.nn.Parameter(torch.full((8, 1, 1), -0.5))
    settings = {"dataset": "folder", "num_classes": 5, "image_size": 16, "batch_size": 4, "epochs": 2, "iters": 1}
    student = gdfq.compress(net, gdfq.config(**settings, warmup_epochs=1, calibrate_epochs=1, device="cpu"))
    assert student.fc.scale.amax() < 0


def test_a_learned_step_rounds_as_the_file_does():
    x, zero_point = torch.randn(2**18), torch.tensor(3.0)
    for scale in torch.rand(8) / 10:
        ours, files = quantize_by_step(x, scale, zero_point, 4, "lsq"), fake_quantize(x, scale, zero_point, 4)
        assert torch.equal(ours, files)


@pytest.mark.parametrize("decay, factors", [
    ({"decay_epochs": [2, 7]}, {0: 1, 1: 1, 2: 0.1, 6: 0.1, 7: 0.01, 11: 0.01}),
    ({"decay": "cosine"}, {0: 1, 2: 1, 7: 0.5, 11: math.cos(0.45 * math.pi) ** 2}),  # after the warm-up
])  # fmt: skip
def test_rates_fall_in_steps_or_by_a_cosine(decay, factors):
    cfg = gdfq.config(dataset="folder", num_classes=5, image_size=16, epochs=12, warmup_epochs=2, lr_g=0.5, **decay)
    weights = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimizers = [torch.optim.SGD(weights[:1], 1.0), torch.optim.SGD(weights[1:], 1.0)]
    for epoch, factor in factors.items():
        set_rates(cfg, epoch, *optimizers)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates == pytest.approx([0.5 * factor, 1e-4 * factor])


def test_the_command_line_wins_over_the_short_schedule(fails):
    short = gdfq.SHORT
    cfg = gdfq.parse_args(["--schedule", "short", "--epochs", "7"])
    assert cfg.epochs == 7 and cfg.iters == short["iters"] and cfg.act_ranges == short["act_ranges"]
    assert cfg.out == "runs/gdfq-resnet20-cifar10-w4a4-s0-epochs7-scheduleshort"
    plain = gdfq.parse_args([])
    assert (plain.epochs, plain.batch_size, plain.act_ranges, plain.decay) == (400, 200, "extremes", "steps")
    assert gdfq.config(schedule="short", iters=3).iters == 3
    told = "--decay-epochs has no effect with --decay cosine (which --schedule short sets); leave one of them out"
    assert told in fails(gdfq.main, "--schedule", "short", "--decay-epochs", 3)
    told = " ".join(gdfq.parser().format_help().split())
    assert f"--epochs {short['epochs']} --iters {short['iters']}" in told


def test_a_run_tells_how_long_it_takes_and_what_the_short_schedule_would(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.run.PACE", (1, 2))
    monkeypatch.setattr("common.run.SLOW", (0.0, 0.0))  # then every epoch is slow, and one of them is spoken of
    gdfq.main([*TINY, "--epochs", "4", "--calibrate-epochs", "1", "--out", str(tmp_path / "short")])
    printed = capsys.readouterr().out.splitlines()
    (advice,) = [line for line in printed if "--threads 1" in line]
    assert "epoch 1 took" in advice and "where the fastest one took" in advice
    lines = [line for line in printed if "left on this machine" in line]
    assert len(lines) == 2 and "first steps" in lines[0] and "the student learns" in lines[1]
    assert all("--schedule short" not in line for line in lines)  # which is longer than this run
    assert [duration(seconds) for seconds in (0.2, 89, 91, 3600, 8400)] == ["1 s", "89 s", "2 min", "60 min", "2 h 20 min"]
