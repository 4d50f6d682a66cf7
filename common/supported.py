"""Checks that refuse weights and activations which cannot be quantized; the error names them."""

from contextlib import suppress

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import InputError
from common.activations import ACTIVATION_MODULES, Calls, activations_among, kind_of, name_of
from common.trace import UNSEEN, batch_like, constants_of, is_plain, nearly_equal

LAYERS = (nn.Conv2d, nn.Linear)  # whose weights are quantized
OTHER_LAYERS = (
    nn.modules.conv._ConvNd, torchvision.ops.DeformConv2d, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip
WEIGHT_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, F.bilinear,
    torchvision.ops.deform_conv2d,
}  # fmt: skip
PRODUCTS = set(  # which may hold a weight, too
    "matmul rmatmul mm bmm mv addmm addmv baddbmm addbmm einsum inner tensordot multidot chainmatmul".split()
)


def check_layers(model, example=None):
    """Refuse layers whose weights or activations cannot be quantized, by name.

    Args:
        model: in eval mode.
        example: a batch that it takes; without it, layers with a custom forward are tried on images of 32 pixels.
    """
    odd = {}
    for name, module in model.named_modules():
        if not isinstance(module, (*LAYERS, *OTHER_LAYERS)):
            continue
        if "forward" in module.__dict__:
            raise InputError(
                f"layer '{name}' has its forward replaced on the instance, so its weight cannot be quantized; define a "
                "subclass instead"
            )
        if not isinstance(module, LAYERS) or "weight" not in module._parameters:
            raise InputError(
                f"layer '{name}' is a {type(module).__name__}, and only weights of Conv2d and Linear layers can be quantized; "
                "replace it in the model"
            )
        if not is_plain(module):
            odd[name] = module
    for name, layer in odd.items():
        if inner := [n for n, m in layer.named_modules() if n and isinstance(m, LAYERS)]:
            raise InputError(
                f"layer '{name}' ({type(layer).__name__}) has the layer '{inner[0]}' inside, whose input cannot be quantized; "
                "take it out"
            )
    for name, layer, calls in _calls_of(odd, model, example):
        of_weights = _computed_of(layer, calls)
        if hidden := [c for c in activations_among(calls, in_modules=True) if id(c.output) not in of_weights]:
            raise InputError(
                f"layer '{name}' ({type(layer).__name__}) computes '{hidden[0].function.__name__}' in its own forward, where "
                "it cannot be quantized; make that a module of its own"
            )
        others = {n: p for n, p in layer.named_parameters() if n not in ("weight", "bias")}
        for call in calls:
            if weights := [n for n, p in others.items() if multiplies(call, {_storage(p)})]:
                raise InputError(
                    f"layer '{name}' ({type(layer).__name__}) multiplies by its parameter '{weights[0]}', which cannot be "
                    "quantized there; make that a layer of its own"
                )


@torch.no_grad()
def _calls_of(layers, model, example):
    """The torch functions that the forwards of `layers`, a dict of those of `model` by name, call: (name, layer, calls)."""
    if example is not None and layers:
        with Calls(model) as calls:
            model(example)
        inside = {name: set(layer.modules()) for name, layer in layers.items()}
        return [(name, layer, [c for c in calls.found if c.module in inside[name]]) for name, layer in layers.items()]
    found = []
    for name, layer in layers.items():
        shape = (1, layer.in_channels, 32, 32) if isinstance(layer, nn.Conv2d) else (1, layer.in_features)
        image = layer.weight.new_zeros(shape)
        with suppress(Exception), Calls(layer) as calls:  # it may take something else, and quantize() says so then
            layer(image)
        found.append((name, layer, calls.found))
    return found


def _computed_of(layer, calls):
    """The ids of a layer's parameters and buffers and of what its forward computes of them alone."""
    known = {id(value) for value in (*layer.parameters(), *layer.buffers())}
    for call in calls:
        values = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.Tensor)]
        if values and all(id(value) in known for value in values):
            known.add(id(call.output))
    return known


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


def multiplies(call, weights):
    """Whether a call of a torch function takes a weight, by `weights`, the addresses of their memory."""
    if call.function not in WEIGHT_FUNCTIONS and name_of(call.function) not in PRODUCTS:
        return False
    values = [v for arg in (*call.args, *call.kwargs.values()) for v in (arg if isinstance(arg, (tuple, list)) else [arg])]
    return any(isinstance(v, torch.Tensor) and _storage(v) in weights for v in values)


def check_graph(traced):
    """Refuse weights that a traced network uses otherwise than in its layers."""
    modules, constants = dict(traced.named_modules()), constants_of(traced)
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in WEIGHT_FUNCTIONS:
            raise InputError(
                f"'{node.target.__name__}' is called as a function in the model's forward (graph node '{node.name}'), where "
                "its weight cannot be quantized; write it as nn.Conv2d or nn.Linear"
            )
        product = node.op != "call_module" and kind_of(node, modules) in PRODUCTS
        if product and any(n in constants for n in node.all_input_nodes):
            raise InputError(
                f"graph node '{node.name}' ({kind_of(node, modules)}) takes a weight of the model, where it cannot be "
                "quantized; write it as nn.Linear"
            )


@torch.no_grad()
def check_calls(model, example, reason):
    """Refuse what the modules of a network that cannot be traced do not show: weights and activations of functions, and
    activations in place whose results are not used. None works in place afterwards.

    Args:
        reason: why the network cannot be traced, for errors.

    Returns:
        The layer that is called first.
    """
    with Calls(model) as calls:
        model(example)
    weights = {_storage(parameter) for parameter in model.parameters()}
    weighted = [call for call in calls.found if call.function in WEIGHT_FUNCTIONS or multiplies(call, weights)]
    wrong = [(call, "nn.Conv2d or nn.Linear") for call in weighted]
    wrong += [(call, "nn.ReLU(), nn.SiLU() or nn.Hardtanh(0, 1)") for call in activations_among(calls.found)]
    for call, instead in wrong:
        if isinstance(call.module, LAYERS):  # which `check_layers` has seen
            continue
        called = f"'{call.function.__name__}' in module '{call.name or type(call.module).__name__}'"
        raise InputError(f"{reason} and calls {called} as a function; write it as a module of torch.nn, such as {instead}")
    images = batch_like(example, UNSEEN)
    before = model(images.clone())
    for module in model.modules():
        if isinstance(module, ACTIVATION_MODULES) and getattr(module, "inplace", False):
            module.inplace = False
    if not nearly_equal(model(images), before):
        raise InputError(f"{reason} and does not use the result of an activation in place; assign it, as in x = relu(x)")
    return next(call.module for call in calls.found if isinstance(call.module, LAYERS))
