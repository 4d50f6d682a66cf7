"""Uniform affine fake quantization, and `quantize`, which turns a trained network into its quantized copy.

Asymmetric, integer zero point, 2^bits codes 0 ... 2^bits - 1 (Jacob et al., CVPR 2018). Weights: one range per output
channel, recomputed from the weights at each forward, never clipped. Activations: one range per tensor, which includes zero, a
moving average of each batch's extremes while the observer is on. The backward pass is straight-through.
"""

import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError, distributed, first_line
from common.activations import ACTIVATION_MODULES, is_activation
from common.supported import LAYERS, check_calls, check_graph, check_layers
from common.trace import baked_copy, images_of, overwriting, trace, works_in_place

ACT_PREFIX = "act_quant_"  # of the names that a quantized network gives its `QuantAct`s
INPUT_BITS = 8  # the network's own input, with act_placement="input": images are 8-bit integers already


def affine_parameters(low, high, bits):
    """Scale and zero point of the 2^bits codes that span [low, high].

    A range too narrow for float32 to hold (a channel with a single weight, say) is widened to include zero.

    Args:
        low, high: float32 tensors of one shape, low <= high.
        bits: 2 to 8.

    Returns:
        scale, zero_point: float32 tensors of that shape; zero_point holds integers, of any sign.
    """
    narrow = high - low < 1e-6 * torch.maximum(-low, high)
    low, high = torch.where(narrow, low.clamp(max=0), low), torch.where(narrow, high.clamp(min=0), high)
    scale = (high - low).clamp(min=1e-8) / (2**bits - 1)
    return scale, torch.round(-low / scale)


def encode(x, scale, zero_point, bits):
    """Codes 0 ... 2^bits - 1 of `x`, as float32 integers; `scale` and `zero_point` broadcast against `x`."""
    return (x * (1 / scale)).round_().add_(zero_point).clamp_(0, 2**bits - 1)  # in place: half the time of new tensors


def scale_(x, scale):
    """`x` times `scale`, in place. Out of place when compiled, because torch 2.11 then loses the gradient of a Function that
    returns it (pytorch#180642)."""
    return x * scale if torch.compiler.is_compiling() else x.mul_(scale)


def decode_(codes, scale, zero_point):
    """The real values that `codes` stand for, in the place of the codes."""
    return scale_(codes.sub_(zero_point), scale)


class FakeQuantize(torch.autograd.Function):
    """Round to the nearest code and back; the gradient passes unchanged (straight-through).

    `clipped` stops the gradient of values whose rounded code is outside the range, as BRECQ does; the papers here do not.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, bits, clipped):
        if clipped:
            ctx.save_for_backward(x, scale, zero_point)
        ctx.bits, ctx.clipped = bits, clipped
        return decode_(encode(x, scale, zero_point, bits), scale, zero_point)

    @staticmethod
    def backward(ctx, grad):
        if ctx.clipped:
            x, scale, zero_point = ctx.saved_tensors
            code = torch.round(x * (1 / scale)) + zero_point
            grad = grad * ((code >= 0) & (code < 2**ctx.bits))
        return grad, None, None, None, None


def fake_quantize(x, scale, zero_point, bits, clipped=False):
    """`x` as the quantized network sees it.

    Args:
        x: float tensor; computed in float32 whatever its dtype.
        scale, zero_point: from `affine_parameters`, broadcastable against `x`.
        bits: 2 to 8.
        clipped: no gradient where the rounded code lies outside the range.

    Returns:
        float32 tensor of x's shape with at most 2^bits values per range.
    """
    return FakeQuantize.apply(x.float(), scale, zero_point, bits, clipped)


def with_zero(low, high):
    """The range [low, high] (tensors), widened to include zero, which is then represented exactly, as zero padding and integer
    runtimes require."""
    return low.clamp(max=0), high.clamp(min=0)


def channel_parameters(weight, bits, zero=False):
    """Scale and zero point per output channel (dimension 0) of `weight`, shaped to broadcast against it; `zero`: of ranges
    that include zero."""
    ends = torch.aminmax(weight.detach().float().flatten(1), dim=1)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    scale, zero_point = affine_parameters(*(with_zero(*ends) if zero else ends), bits)
    return scale.view(shape), zero_point.view(shape)


def is_channels_last(weight):
    """Whether a weight lies in channels-last layout; that of a 1x1 kernel lies in both."""
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _to_rows(weight):
    """`weight` as (out, all others) in the order of its memory, so that nothing is copied."""
    return (weight.movedim(1, -1) if is_channels_last(weight) else weight).flatten(1)


def _from_rows(rows, weight):
    """What `_to_rows(weight)` has become, in the shape and layout of `weight`."""
    if weight.is_contiguous() or is_channels_last(weight):
        return rows.as_strided(weight.shape, weight.stride(), rows.storage_offset())
    return rows.view(weight.shape)


class FakeQuantizeWeights(torch.autograd.Function):
    """The weights of many layers, with one range per output channel; straight-through. Arguments: bits, whether the ranges
    include zero, the weights.

    Layers whose channels have equally many weights are rows of one matrix, and all ranges are computed at once: a network
    takes as many operations as a few layers would. Values are those of `fake_quantize` layer by layer, to the bit.
    """

    @staticmethod
    def forward(ctx, bits, zero, *weights):
        alike, quantized = {}, [None] * len(weights)
        for index, weight in enumerate(weights):
            alike.setdefault(weight[0].numel(), []).append(index)
        matrices = [torch.cat([_to_rows(weights[index]).float() for index in group]) for group in alike.values()]
        low, high = (torch.cat(ends) for ends in zip(*(torch.aminmax(matrix, dim=1) for matrix in matrices)))
        low, high = with_zero(low, high) if zero else (low, high)
        counts = [len(matrix) for matrix in matrices]
        parameters = (values[:, None].split(counts) for values in affine_parameters(low, high, bits))
        for group, matrix, scale, zero_point in zip(alike.values(), matrices, *parameters):
            values = decode_(encode(matrix, scale, zero_point, bits), scale, zero_point)
            for index, rows in zip(group, values.split([len(weights[index]) for index in group])):
                quantized[index] = _from_rows(rows, weights[index])
        return tuple(quantized)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *grads


class _QuantWeight:
    """Weights quantized at each forward: all of a network's before its first layer, or this layer's own when it is called
    alone. Weights that are `packed` are used as they are: they are values of codes, or not to be quantized."""

    packed = False
    ready = None  # the quantized weights, while the network computes

    @classmethod
    def from_float(cls, module, bits, zero=False):
        """A quantized layer that shares the parameters of `module`; `zero`: its ranges include zero."""
        layer = cls.__new__(cls)
        layer.__dict__.update(module.__dict__)
        layer.bits, layer.zero = bits, zero
        return layer

    def parameters_of_codes(self):
        """Scale and zero point per output channel, shaped to broadcast against the weight."""
        if self.packed:
            return self.weight_scale, self.weight_zero_point
        return channel_parameters(self._parameters["weight"], self.bits, self.zero)

    def codes(self):
        """The weight as codes 0 ... 2^bits - 1, float32."""
        return encode(self._parameters["weight"].detach().float(), *self.parameters_of_codes(), self.bits)

    def quantized_weight(self):
        if self.ready is not None:
            return self.ready
        weight = self._parameters["weight"]
        if "quantizer" in self._modules:  # one that is learned
            return self._modules["quantizer"](weight)
        return weight if self.packed else fake_quantize(weight, *self.parameters_of_codes(), self.bits)

    def with_weight(self, x, weight):
        """What the layer computes of `x` with another weight."""
        before, self.ready = self.ready, weight
        try:
            return self.forward(x)
        finally:
            self.ready = before

    def pack(self, weight, scale, zero_point):
        """Keep `weight`, whose values are exactly those of codes of this scale and zero point, as it is from now on."""
        kept = nn.Parameter(weight, self._parameters["weight"].requires_grad)
        self._parameters, self.packed = self._parameters | {"weight": kept}, True  # of this layer alone, where weights are tied
        self.register_buffer("weight_scale", scale, persistent=False)
        self.register_buffer("weight_zero_point", zero_point, persistent=False)

    def extra_repr(self):
        return f"{super().extra_repr()}, bits={self.bits}"


class _AllWeights:
    """Hooks of a network that quantize the weights of all its layers when it is called, and forget them afterwards."""

    def __init__(self, layers):
        self.layers = layers

    def quantize(self, network, args):
        if torch.compiler.is_compiling():  # a compiler fuses each layer's own operations, and better
            return
        unpacked = [layer for layer in self.layers if not layer.packed and "quantizer" not in layer._modules]
        for bits, zero in {(layer.bits, layer.zero) for layer in unpacked}:
            layers = [layer for layer in unpacked if (layer.bits, layer.zero) == (bits, zero)]
            for layer, weight in zip(layers, FakeQuantizeWeights.apply(bits, zero, *(layer.weight for layer in layers))):
                layer.ready = weight

    def forget(self, network, args, output):
        for layer in self.layers:
            layer.ready = None


@contextmanager
def weights_at_once(student):
    """While it lasts, layers of a quantized network that are called by themselves have had their weights quantized together, as
    in a call of the network."""
    all_weights = _AllWeights([layer for _, layer in quantized_layers(student)])
    all_weights.quantize(student, ())
    try:
        yield
    finally:
        all_weights.forget(student, (), None)


class QuantConv2d(_QuantWeight, nn.Conv2d):
    """Conv2d with weights of `bits` bits, one range per output channel."""

    def forward(self, input):
        return self._conv_forward(input, self.quantized_weight(), self.bias)


class QuantLinear(_QuantWeight, nn.Linear):
    """Linear with weights of `bits` bits, one range per output row."""

    def forward(self, input):
        return F.linear(input, self.quantized_weight(), self.bias)


class _OwnForward(_QuantWeight):
    """A layer whose class has a custom forward, as for padding: what that reads as `weight` is quantized."""

    reading = False

    @property
    def weight(self):
        return self.quantized_weight() if self.reading else self._parameters["weight"]

    def forward(self, *args, **kwargs):
        self.reading = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.reading = False


@functools.cache
def _quantized_class(cls):
    """The class of a quantized layer for that of a full-precision one."""
    if cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward:
        return QuantConv2d
    if cls.forward is nn.Linear.forward:
        return QuantLinear
    return type(f"Quant{cls.__name__}", (_OwnForward, cls), {})


class QuantAct(nn.Module):
    """Activations of `bits` bits with one range per tensor.

    While `observing`, the range follows each batch's minimum and maximum: the first batch sets it, later ones move it
    with an exponential average (the released GDFQ code feeds its bias correction back into its state and needs about
    250 steps to settle; not reproduced). The state lives in buffers, so checkpoints carry it.
    """

    momentum = 0.9

    def __init__(self, bits, clipped=False):
        super().__init__()
        self.bits, self.clipped, self.observing = bits, clipped, False
        for name in ("low", "high", "scale", "zero_point"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def observe(self, x):
        """Move the range towards the smallest and largest value of `x`."""
        self.follow(*distributed.whole_extremes(*torch.aminmax(x.float())))

    @torch.no_grad()
    def follow(self, low, high):
        """Move the range towards [low, high] (scalars) and zero."""
        for state, value in zip((self.low, self.high), with_zero(low, high)):
            state.copy_(torch.where(self.seen, torch.lerp(value, state, self.momentum), value))
        for state, value in zip((self.scale, self.zero_point), affine_parameters(self.low, self.high, self.bits)):
            state.copy_(value)
        self.seen.fill_(True)

    def forward(self, x):
        scale, zero_point = self.scale, self.zero_point
        if self.observing:
            self.observe(x.detach())
            scale, zero_point = scale.clone(), zero_point.clone()  # the module's next call moves the buffers
        return fake_quantize(x, scale, zero_point, self.bits, self.clipped)

    def fix(self, scale, zero_point):
        """Take this scale and zero point (scalars) from now on."""
        values = scale, zero_point, -zero_point * scale, (2**self.bits - 1 - zero_point) * scale
        for state, value in zip((self.scale, self.zero_point, self.low, self.high), values):
            state.copy_(value.detach())
        self.seen.fill_(True)

    def extra_repr(self):
        return f"bits={self.bits}, low={self.low.item():.4g}, high={self.high.item():.4g}"


def quantized_layers(model, every_name=False):
    """Names and modules of all quantized convolutions and linear layers; with `every_name`, one that has several occurs under
    each of them."""
    named = model.named_modules(remove_duplicate=not every_name)
    return [(name, module) for name, module in named if isinstance(module, _QuantWeight)]


def quantized_activations(model):
    """Names and modules of all activation quantizers."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantAct)]


def set_observing(model, on):
    """Let the activation ranges of `model` follow the data, or freeze them."""
    for _, module in quantized_activations(model):
        module.observing = on


def quantize(model, wbits, abits, act_placement="relu", clipped=False, example=None):
    """The quantized copy of a trained network, in eval mode: BatchNorm statistics stay fixed while it is fine-tuned.

    All Conv2d and Linear weights are quantized, first and last layer included. The traced graph tells where
    activations are computed, as modules or as functions. A network that cannot be traced has its modules replaced
    instead; since activations written as functions would be missed there, one forward pass looks for them, and a module
    that is called at several places has one range for all of them.

    Args:
        model: the teacher; left as it is.
        wbits, abits: bits of weights and activations, 2 to 8.
        act_placement: "relu" quantizes what every activation function returns (the papers); "input" quantizes what
            every convolution and linear layer receives, the network's own input with 8 bits, and has ranges of weights
            include zero (integer inference: common/deploy.py). Or a function of the traced network that returns the nodes
            of its graph whose values are quantized.
        clipped: no gradient for activations outside their range.
        example: a batch that the network takes. Without it shapes are unknown while the network is traced, and one that
            cannot be traced is refused.

    Returns:
        A network with the teacher's parameter names, all parameters with gradient. Its activations have no ranges before it
        has computed images with `set_observing`.

    Raises:
        InputError: bits out of range, or something that cannot be quantized; the message names it.
    """
    for flag, bits in (("--wbits", wbits), ("--abits", abits)):
        if not 2 <= bits <= 8:
            raise InputError(f"{flag} is {bits}; give a number of bits from 2 to 8")
    if act_placement not in ("relu", "input") and not callable(act_placement):
        raise InputError(f"--act-placement is '{act_placement}'; give relu or input")
    model, example = baked_copy(model).float().eval().requires_grad_(True), None if example is None else example.float()
    check_layers(model, example)
    try:
        traced = trace(model, example)
    except Exception as error:  # whatever the model's own forward raises when it is traced
        student = _quantize_modules(model, abits, act_placement, clipped, example, error)
    else:
        student = _quantize_graph(traced, abits, act_placement, clipped)
    for name, module in list(student.named_modules(remove_duplicate=False)):
        if isinstance(module, LAYERS):
            layer = _quantized_class(type(module)).from_float(module, wbits, zero=act_placement == "input")
            student.set_submodule(name, layer)
    if not quantized_activations(student):
        raise InputError("the model computes no activation that could be quantized; use --act-placement input")
    all_weights = _AllWeights([layer for _, layer in quantized_layers(student)])
    student.register_forward_pre_hook(all_weights.quantize)
    student.register_forward_hook(all_weights.forget, always_call=True)
    return student.to(next(student.parameters()).device)  # the activations' ranges, too


def _quantize_graph(traced, abits, act_placement, clipped):
    """Insert a QuantAct at every place of the traced graph that `act_placement` names."""
    modules, graph = dict(traced.named_modules()), traced.graph
    order, images = {node: index for index, node in enumerate(graph.nodes)}, images_of(graph, modules)

    def insert(node, users, before):
        name = f"{ACT_PREFIX}{sum(isinstance(m, QuantAct) for m in traced.children())}"
        traced.add_submodule(name, QuantAct(INPUT_BITS if node in images else abits, clipped))
        with graph.inserting_before(before):
            quantized = graph.call_module(name, (node,))
        for user in users:
            user.replace_input_with(node, quantized)
        return quantized

    check_graph(traced)
    weighted = [n for n in graph.nodes if n.op == "call_module" and isinstance(modules[n.target], LAYERS)]
    placed = act_placement(traced) if callable(act_placement) else ()
    if act_placement == "relu":
        placed = {node for node in graph.nodes if is_activation(node, modules)}
    for node in list(graph.nodes):
        if node in placed or (act_placement == "input" and is_activation(node, modules)):
            if not node.users:
                raise InputError(
                    f"activation '{node.name}' works in place and its result is not used in the model's forward, so its output "
                    "cannot be quantized; assign it, as in x = F.relu(x)"
                )
        if node in placed:
            in_place = node.args and works_in_place(node, modules)
            again = [user for user in node.args[0].users if order[user] > order[node]] if in_place else []
            if again and any(works_in_place(user, modules) for user in node.users):
                raise InputError(
                    f"activation '{node.name}' works in place on '{node.args[0].name}', which is changed and used again after "
                    "it; assign its result, as in x = F.relu(x)"
                )
            quantized = insert(node, list(node.users), node.next)
            for user in again:  # the value that it has overwritten is its result
                user.replace_input_with(node.args[0], quantized)
        elif act_placement == "input" and any(user in weighted for user in node.users):
            takers = sorted((user for user in node.users if user in weighted), key=order.get)
            between = [n for n in overwriting(node, modules) if order[takers[0]] < order[n] < order[takers[-1]]]
            if between:
                raise InputError(
                    f"'{between[0].name}' works in place on '{node.name}' between two layers that receive it, which cannot be "
                    "quantized; assign its result, as in x = x + y"
                )
            insert(node, takers, takers[0])  # after what works in place on the value
    graph.lint()
    traced.recompile()
    return traced


def _quantize_output(module, args, output):
    return module.output_quantizer(output)


def _quantize_input(module, args, kwargs):
    if args:
        return (module.input_quantizer(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, kwargs | {name: module.input_quantizer(kwargs[name])}


def _quantize_modules(model, abits, act_placement, clipped, example, trace_error):
    """Attach a QuantAct to every module that `act_placement` names; for networks that cannot be traced."""
    reason = f"the model cannot be traced ({first_line(trace_error)})"
    if callable(act_placement):
        raise InputError(f"{reason}, and its graph tells where activations are quantized; give one that does not branch")
    if example is None:
        raise InputError(f"{reason}; give quantize() an example batch, so that its modules can be replaced instead")
    first = check_calls(model, example, reason)
    for module in list(model.modules()):
        if act_placement == "relu" and isinstance(module, ACTIVATION_MODULES):
            module.output_quantizer = QuantAct(abits, clipped)
            module.register_forward_hook(_quantize_output)
        elif act_placement == "input" and isinstance(module, LAYERS):
            module.input_quantizer = QuantAct(INPUT_BITS if module is first else abits, clipped)
            module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    return model
