"""The activation functions that a network computes: as modules, as functions, written out, inside other layers."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

ACTIVATION_MODULES = (nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish)
ACTIVATION_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.rrelu, F.rrelu_, F.prelu, F.elu, F.elu_, F.silu, F.gelu, F.mish,
    F.hardswish, F.hardtanh, F.hardtanh_, torch.relu, torch.relu_, torch.prelu, torch.rrelu,
}  # fmt: skip
ACTIVATION_METHODS = {"relu", "relu_", "prelu"}
# functions of single numbers of which written-out activations are made, as `kind_of` names them, and those that are bounded
BOUNDED = {"sigmoid", "hardsigmoid", "tanh", "erf", "relu6", "hardtanh", "clamp", "clip"}
POINTWISE = BOUNDED | set("add iadd sub isub mul imul div idiv truediv itruediv pow neg exp softplus".split())
# what a network may compute between its layers and no quantizer here takes: gates, most often
FULL_PRECISION = {
    "Tanh", "Sigmoid", "LogSigmoid", "Softplus", "Hardsigmoid", "Softmax", "LogSoftmax", "Softsign", "SELU", "CELU",
    "Tanhshrink", "Softshrink", "Hardshrink", "Threshold", "GLU", "Erf", "Where", "Maximum",
}  # fmt: skip


def kind_of(node, modules):
    """What a node computes, as a name such as "relu6" or "logsoftmax"."""
    return name_of(type(modules[node.target]) if node.op == "call_module" else node.target)


def name_of(function):
    """The name of a function, class or method as `kind_of` has it."""
    name = getattr(function, "__name__", None) or getattr(function, "name", function)  # of a scripted function, a method
    return str(name).lower().replace("_", "")


def clamps(function, args, kwargs):
    """Whether a call by this name (as `kind_of` has it) cuts off what is negative, as ReLU does."""
    least = kwargs.get("min", args[1] if len(args) > 1 else None)
    return function in ("clamp", "clip", "clampmin") and isinstance(least, (int, float)) and least == 0


def _is_function_of(node, x, modules, through):
    """Whether a value is made of another one, x, by functions of single numbers; `through` gets the nodes on the way."""
    if node is x or node in through or node.op == "get_attr":
        return True
    if kind_of(node, modules) not in POINTWISE or not node.all_input_nodes:
        return False
    through.add(node)
    return all(_is_function_of(n, x, modules, through) for n in node.all_input_nodes)


def _gates(node, modules):
    """The nodes of the gate of an activation that is written out as x times a bounded function of x (Swish, hard swish, Mish,
    GELU); none where `node` is not such a product."""
    if kind_of(node, modules) not in ("mul", "imul") or len(node.args) != 2:
        return set()
    for x, gate in (node.args, node.args[::-1]):
        if not isinstance(x, fx.Node) or not isinstance(gate, fx.Node):
            return set()
        while kind_of(x, modules) in ("mul", "imul", "div", "truediv") and len(x.all_input_nodes) == 1:
            x = x.all_input_nodes[0]  # 0.5 x
        inside = set()
        if _is_function_of(gate, x, modules, inside) and any(kind_of(n, modules) in BOUNDED for n in inside):
            return inside
    return set()


def _is_gate(node, modules):
    """Whether a node is the gate of an activation that is written out, or a step on the way to it."""
    ahead, seen = [node] if kind_of(node, modules) in POINTWISE else [], set()
    while ahead:
        for user in ahead.pop().users.keys() - seen:
            seen.add(user)
            if node in _gates(user, modules):
                return True
            ahead += [user] if kind_of(user, modules) in POINTWISE else []
    return False


def is_activation(node, modules):
    """Whether a node of a traced graph is an activation function whose result is quantized; `modules` by name."""
    if node.op == "call_module":
        found = isinstance(modules[node.target], ACTIVATION_MODULES)
    else:
        found = node.target in ACTIVATION_FUNCTIONS or node.target in ACTIVATION_METHODS
        found = found or clamps(kind_of(node, modules), node.args, node.kwargs)
    return bool(_gates(node, modules)) or (found and not _is_gate(node, modules))


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


class Call(NamedTuple):
    """A torch function that was called, by the forward of a module and its name; ("", None) in front of the network."""

    function: Callable
    name: str
    module: nn.Module | None
    args: tuple
    kwargs: dict
    output: Any


class Calls(TorchFunctionMode):
    """Notes each `Call` that is made within it while `model` computes."""

    def __init__(self, model):
        super().__init__()
        self.found, self.hooks, self.stack = [], [], [("", None)]
        for name, module in model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(lambda m, _, name=name: self.stack.append((name, m))))
            self.hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _leave(self, *_):
        self.stack.pop()  # returns None: anything else would take the place of the module's output

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.found.append(Call(function, *self.stack[-1], args, kwargs or {}, output))
        return output

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)


def activations_among(calls, in_modules=False):
    """Those of a list of `Call`s that compute an activation, as functions or written out; `in_modules`, also torch.nn's own."""
    functions = ACTIVATION_FUNCTIONS | {getattr(torch.Tensor, name) for name in ACTIVATION_METHODS}
    found, multiple_of, made_of = [], {}, {}  # by id, of what a value is a multiple; and a function, and whether it is bounded
    for call in calls:
        name, values = name_of(call.function), [id(x) for x in call.args if isinstance(x, torch.Tensor)]
        name = name.removeprefix("r") if name.removeprefix("r") in POINTWISE else name  # 2 * x calls rmul
        before = [made_of.get(value, (set(), False)) for value in values]
        gates = zip(values, before[::-1]) if name in ("mul", "imul") and len(values) == 2 else ()
        gated = any(bounded and multiple_of.get(x, x) in origins for x, (origins, bounded) in gates)
        if gated or call.function in functions or clamps(name, call.args, call.kwargs):
            found += [call] if in_modules or not isinstance(call.module, ACTIVATION_MODULES) else []
        if name in POINTWISE:
            bounded = name in BOUNDED or any(bounded for _, bounded in before)
            made_of[id(call.output)] = set(values).union(*(origins for origins, _ in before)), bounded
        if len(values) == 1 and name in ("mul", "imul", "div", "truediv"):
            multiple_of[id(call.output)] = multiple_of.get(values[0], values[0])
    return found
