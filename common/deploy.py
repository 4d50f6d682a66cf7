"""A quantized network as integer runtimes hold it, and as an ONNX file.

A student that was trained with --act-placement input has integers at the input of every convolution and linear layer: the
image in 8 bits, residual sums, pooled features and the outputs of linear bottlenecks in --abits. What is done for export:

    BatchNorm          folded after training, into the scale of each output channel and the bias. The integer
                       codes do not change, except that those of a channel with a negative factor are mirrored, so nothing
                       is rounded again. A BatchNorm that follows no layer stays, as a scale and an offset per channel.
    ranges             of weights and activations include zero during training, so that zero points are codes. A
                       network that has others (written by an earlier version) is refused.
    residual sums      are sums of layer outputs, which have more than --abits bits. They are rounded at the input of the next
                       layer, as in LSQ, which is more accurate than 4-bit shortcuts. In integer arithmetic they are int32
                       fixed-point numbers (common/integer.py).
"""

import copy
import importlib.util
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import InputError
from common.check import input_of
from common.device import full_precision
from common.integer import IntegerNetwork
from common.quant import QuantAct, QuantConv2d, QuantLinear, quantized_layers


def check_export(cfg):
    """Refuse, before anything is computed, what --export cannot do."""
    if cfg.export is None:
        return
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--export needs the package {missing[0]}, which is absent; pip install -r requirements-export.txt")
    if cfg.eval is None and cfg.act_placement != "input":
        raise InputError(
            f"--export needs integers at the input of every layer; with --act-placement {cfg.act_placement} the image, pooled "
            "features and all else that no activation function returns stay in floating point; give --act-placement input"
        )


def deploy(student, cfg, path, about, test_set=None):
    """--export and --integer-check.

    Args:
        student: what `load_quantized` returns for `path`.
        cfg: parsed arguments.
        path: of a quantized.pt; the ONNX file goes beside it.
        about: namespace with mean, std, image_size and arch of the network.
        test_set: images on which the networks are compared.

    Returns:
        Dict of onnx_ or integer_agreement (percent of images with the same class as from `student`), onnx_ or
        integer_difference (largest of any logit), bytes_onnx.
    """
    found, others = {}, {}
    if cfg.export is None and not cfg.integer_check:
        return found
    network = integer_form(student, "--export" if cfg.export else "--integer-check")
    if cfg.integer_check:
        others["integer"] = "integer arithmetic", IntegerNetwork(network)
    if cfg.export:
        from common.onnx_file import runtime, write_onnx

        path = Path(path).with_suffix(".onnx")
        channels = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))
        write_onnx(network, path, torch.zeros(2, channels, about.image_size, about.image_size), about)
        found["bytes_onnx"] = path.stat().st_size
        print(f"{path}: opset 21, {found['bytes_onnx'] / 1024:.0f} KB", flush=True)
        if test_set and importlib.util.find_spec("onnxruntime"):
            others["onnx"] = "ONNX Runtime", runtime(path)
    for key, (name, other) in others.items():
        same, most = compare(student, other, test_set)
        print(f"{name}: same class on {same:.2f} % of {test_set.count:,} images, logits differ by at most {most:.2g}")
        found |= {f"{key}_agreement": round(same, 2), f"{key}_difference": most}
    return found


@torch.no_grad()
@full_precision()
def compare(student, other, batches):
    """How far `other`, a function of images on the CPU, agrees with `student`.

    Args:
        batches: re-iterable over (images, anything).

    Returns:
        Percent of the images with the same class, and the largest difference of a logit.
    """
    same, count, most = 0, 0, 0.0
    for images, _ in batches:
        ours, theirs = student(images).cpu(), other(images.cpu())
        same += (ours.argmax(1) == theirs.argmax(1)).sum().item()
        count, most = count + len(images), max(most, (ours - theirs).abs().max().item())
    return 100 * same / count, most


def givers_of_integers(student, flag="--export"):
    """The `QuantAct` that gives each quantized layer its input, by the layer's name; the student need not be trained.

    Raises:
        InputError: the network cannot be traced, or a layer's input stays in floating point, or a layer is no plain one that is
            called once.
    """
    if not isinstance(student, fx.GraphModule):
        raise InputError(f"{flag} needs the graph of the network, and it cannot be traced; give one that does not branch")
    modules, layers = dict(student.named_modules()), dict(quantized_layers(student))
    calls = [n for n in student.graph.nodes if n.op == "call_module" and n.target in layers]
    givers = {n.target: modules.get(n.args[0].target) for n in calls}
    floating = [name for name, giver in givers.items() if not isinstance(giver, QuantAct)]
    if floating:
        named = "; ".join(f"'{name}' receives {input_of(name, student.graph, modules)}" for name in floating[:3])
        raise InputError(
            f"{flag} needs integers at the input of every layer, and {len(floating)} of {len(givers)} would stay in floating "
            f"point ({named}), because only results of activation functions are quantized; train with --act-placement input"
        )
    for name, layer in layers.items():
        if [n.target for n in calls].count(name) > 1 or type(layer) not in (QuantConv2d, QuantLinear):
            raise InputError(f"{flag}: layer '{name}' has a custom forward or is called twice; write plain layers instead")
    return givers


@torch.no_grad()
def integer_form(student, flag="--export"):
    """A copy of the network with its BatchNorms folded, which computes what `student` does.

    Args:
        student: from `load_quantized`, of --act-placement input.
        flag: what asks for it, for errors.

    Returns:
        torch.fx.GraphModule.

    Raises:
        InputError: something of the network is not in integers.
    """
    givers = givers_of_integers(student, flag)
    network = copy.deepcopy(student).eval().requires_grad_(False).cpu().to(memory_format=torch.contiguous_format)
    modules, layers = dict(network.named_modules()), dict(quantized_layers(network))
    for name, layer in layers.items():
        given, top = givers[name], 2**layer.bits - 1
        zero_point = layer.weight_zero_point
        if zero_point.min() < 0 or zero_point.max() > top or not 0 <= given.zero_point <= 2**given.bits - 1:
            raise InputError(f"{flag}: layer '{name}' has zero points beyond its codes; train again with --act-placement input")
    for node in list(network.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            before = node.args[0]
            if before.target in layers and len(before.users) == 1:
                fold(layers[before.target], norm)
                node.replace_all_uses_with(before)
                network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def fold(layer, norm):
    """Fold a BatchNorm in eval mode into the packed layer before it."""
    factor = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    layer.bias = nn.Parameter(bias * factor + (0 if norm.bias is None else norm.bias), requires_grad=False)
    factor = factor.view_as(layer.weight_scale)
    mirrored = 2**layer.bits - 1 - layer.weight_zero_point
    zero_point = torch.where(factor < 0, mirrored, layer.weight_zero_point)
    scale = torch.where(factor == 0, 1, layer.weight_scale * factor.abs())
    layer.pack(layer.weight * factor, scale, zero_point)
