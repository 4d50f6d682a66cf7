"""BatchNorms folded into the convolutions before them, for tasks that work on the network as it is deployed."""

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common import InputError, first_line
from common.device import full_precision
from common.trace import UNSEEN, baked_copy, batch_like, constants_of, nearly_equal, trace


@torch.no_grad()
@full_precision()
def fold_batchnorm(model, example=None):
    """The traced network as it is deployed: in eval mode, convolutions and linear layers plain, every BatchNorm folded into the
    convolution before it.

    A layer with a custom forward is taken apart: padding becomes a step of the graph, a weight that is computed from
    parameters becomes the weight.

    Args:
        model: left as it is.
        example: a batch that it takes.

    Raises:
        InputError: a network that cannot be traced.
    """
    model = baked_copy(model).eval().requires_grad_(False)
    try:
        traced = trace(model, example, inside=True)
    except Exception as error:  # whatever the model's own forward raises when it is traced
        raise InputError(
            f"the model cannot be traced ({first_line(error)}), so its BatchNorms cannot be folded; give one whose forward "
            "does not branch on its data"
        ) from None
    _layers_from_functions(traced)
    modules, called = dict(traced.named_modules()), [n.target for n in traced.graph.nodes if n.op == "call_module"]
    for name in set(called):
        if called.count(name) > 1 and any(True for _ in modules[name].parameters()):
            raise InputError(
                f"layer '{name}' is called {called.count(name)} times in the model's forward; give each call a layer of its own"
            )
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            continue
        before = node.args[0]
        if before.op == "call_module" and type(modules[before.target]) is nn.Conv2d:
            if len(before.users) == 1 and modules[node.target].running_mean is not None:
                modules[before.target] = fuse_conv_bn_eval(modules[before.target], modules[node.target])
                traced.set_submodule(before.target, modules[before.target])
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
                rest = nn.Module()
                rest._modules |= modules[node.target]._modules
                traced.set_submodule(node.target, rest)
    traced.delete_all_unused_submodules()
    traced.recompile()
    if example is not None:
        images = batch_like(example, UNSEEN)
        if not nearly_equal(traced(images.clone()), model(images)):
            raise InputError(
                "the model computes something else when its BatchNorms are folded, as where layers have forward hooks; give "
                "one without them"
            )
    return traced.requires_grad_(False)


def _plain_convolution(weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    layer = nn.Conv2d(weight.shape[1] * groups, len(weight), weight.shape[2:], stride, padding, dilation, groups, False)
    layer.weight, layer.bias = nn.Parameter(weight.detach()), None if bias is None else nn.Parameter(bias.detach())
    return layer


def _plain_linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], len(weight), False)
    layer.weight, layer.bias = nn.Parameter(weight.detach()), None if bias is None else nn.Parameter(bias.detach())
    return layer


def _plain_batchnorm(mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        return None  # statistics of the batch
    layer = nn.BatchNorm2d(len(mean), eps, affine=weight is not None).to(mean.device)
    parts = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    layer.load_state_dict({name: value for name, value in parts.items() if value is not None}, strict=False)
    return layer


PLAIN = {F.conv2d: _plain_convolution, F.linear: _plain_linear, F.batch_norm: _plain_batchnorm}


def _with_rest(module, old):
    """`module` with what it lacks of the one whose place it takes: submodules, further parameters and buffers."""
    for kind in ("_modules", "_parameters", "_buffers"):
        missing = {name: value for name, value in getattr(old, kind).items() if not hasattr(module, name)}
        getattr(module, kind).update(missing)
    return module


def _layers_from_functions(traced):
    """Turn the convolutions, linear layers and BatchNorms that a layer's own forward has left in the graph as functions, with
    weights that are constants now, into plain modules of the layer's name."""
    known = constants_of(traced)
    for node in list(traced.graph.nodes):
        stack = node.meta.get("nn_module_stack")
        if node.op != "call_function" or node.target not in PLAIN or not stack:
            continue
        path, kind = list(stack.values())[-1]
        constants = {n: known.get(n) for n in node.all_input_nodes if n is not node.args[0]}
        if not path or any(value is None for value in (*constants.values(), *node.args[1:2])):
            continue
        old = traced.get_submodule(path)
        args, kwargs = fx.node.map_arg((node.args[1:], dict(node.kwargs)), constants.__getitem__)
        plain = PLAIN[node.target](*args, **kwargs)
        if plain is None or (isinstance(kind, type) and issubclass(kind, nn.BatchNorm1d)):
            continue
        traced.set_submodule(path, _with_rest(plain.eval(), old))
        with traced.graph.inserting_before(node):
            node.replace_all_uses_with(traced.graph.call_module(path, (node.args[0],)))
        traced.graph.erase_node(node)
    for node in reversed(traced.graph.nodes):
        if not node.users and node in known:
            traced.graph.erase_node(node)
