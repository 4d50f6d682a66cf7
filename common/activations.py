"""The activation functions that a network computes: as modules, as functions, written out, inside other layers."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

ACTIVATION_MODULES = (nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish)
ACTIVATION_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.rrelu, F.rrelu_, F.prelu, F.elu, F.elu_, F.silu, F.gelu, F.mish,
    F.hardswish, F.hardtanh, F.hardtanh_, torch.relu, torch.relu_, torch.prelu, torch.rrelu,
}  # fmt: skip
ACTIVATION_METHODS = {"relu", "relu_"}
# what a network may compute between its layers and no quantizer here takes: gates, most often
FULL_PRECISION = {
    "Tanh", "Sigmoid", "LogSigmoid", "Softplus", "Hardsigmoid", "Softmax", "LogSoftmax", "Softsign", "SELU", "CELU",
    "Tanhshrink", "Softshrink", "Hardshrink", "Threshold", "GLU",
}  # fmt: skip


def kind_of(node, modules):
    """What a node computes, as a name such as "relu6" or "logsoftmax"."""
    function = type(modules[node.target]) if node.op == "call_module" else node.target
    name = getattr(function, "__name__", None) or getattr(function, "name", function)  # of a scripted function, a method
    return str(name).lower().replace("_", "")


def _gated(gate, modules):
    """The x of which `gate` is a function that makes an activation of x: x * sigmoid(x), x * relu6(x + 3) / 6 and so on."""
    if not isinstance(gate, fx.Node) or not gate.args:
        return None
    kind, x = kind_of(gate, modules), gate.args[0]
    inner = kind_of(x, modules) if isinstance(x, fx.Node) else ""
    if kind in ("sigmoid", "hardsigmoid"):
        return x
    if (kind == "tanh" and inner == "softplus") or (kind == "relu6" and inner in ("add", "iadd") and 3 in x.args):
        return x.args[0]
    if kind in ("div", "truediv", "mul") and len(gate.args) == 2 and isinstance(gate.args[1], (int, float)):
        return _gated(x, modules)
    return None


def _is_swish(node, modules):
    """Whether a node is an activation that is written out, x times a gate of x."""
    if kind_of(node, modules) not in ("mul", "imul") or len(node.args) != 2:
        return False
    return any(isinstance(x, fx.Node) and _gated(gate, modules) is x for x, gate in (node.args, node.args[::-1]))


def _is_gate(node, modules):
    """Whether a node is the gate of an activation that is written out, or a step on the way to it."""
    for user in node.users:
        if _is_swish(user, modules):
            if any(x is not node and _gated(node, modules) is x for x in user.args):
                return True
        elif kind_of(user, modules) in ("tanh", "div", "truediv", "mul") and user.args[0] is node and _is_gate(user, modules):
            return True
    return False


def is_activation(node, modules):
    if node.op == "call_module":
        found = isinstance(modules[node.target], ACTIVATION_MODULES)
    else:
        least = node.kwargs.get("min", node.args[1] if len(node.args) > 1 else None)
        clamps = kind_of(node, modules) in ("clamp", "clip", "clampmin") and least == 0
        found = clamps or node.target in ACTIVATION_FUNCTIONS or node.target in ACTIVATION_METHODS
    return _is_swish(node, modules) or (found and not _is_gate(node, modules))


def full_precision_activations(student):
    """The activations that a quantized network computes in full precision: a Counter of class or function names."""
    if not hasattr(student, "graph"):
        return Counter(type(m).__name__ for m in student.modules() if type(m).__name__ in FULL_PRECISION)
    modules, known, found = dict(student.named_modules()), {name.lower(): name for name in FULL_PRECISION}, Counter()
    for node in student.graph.nodes:
        name = known.get(kind_of(node, modules))
        if isinstance(node.target, torch.jit.ScriptFunction):
            name = node.target.name
        found.update([name] if name and node.users and not _is_gate(node, modules) else [])
    return found


class Calls(TorchFunctionMode):
    """Notes the torch functions that are called within it, with the name and the module of `model` whose forward calls them:
    ("", None) for those in front of the network."""

    def __init__(self, model):
        super().__init__()
        self.found, self.hooks, self.stack = [], [], [("", None)]
        for name, module in model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(lambda m, _, name=name: self.stack.append((name, m))))
            self.hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _leave(self, *_):
        self.stack.pop()  # returns None: anything else would take the place of the module's output

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.found.append((function, *self.stack[-1]))
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)


@torch.no_grad()
def activations_inside(layer):
    """Names of the activation functions that a layer's own forward calls."""
    shape = (1, layer.in_channels, 32, 32) if isinstance(layer, nn.Conv2d) else (1, layer.in_features)
    with Calls(layer) as calls:
        layer(layer.weight.new_zeros(shape))
    return [function.__name__ for function, _, _ in calls.found if function in ACTIVATION_FUNCTIONS]
