"""A deployed network in integer arithmetic alone, to be read by those who write its kernels (--integer-check).

    codes    unsigned integers of 2 to 8 bits: weights, and what a convolution or linear layer receives
    sums     int32: a layer's sums of (code - zero point) * (weight code - zero point)
    fixed    int32 fixed-point numbers with `point` fractional bits, one `point` for the network: what layers send, and all
             that is computed of it until a layer receives it: ReLU, residual sums, pooling, concatenation, the logits

    layer           codes -> sums -> fixed    sums * multiplier / 2^shift + bias, three integers per output channel
    QuantAct        fixed -> codes            zero point + fixed * multiplier / 2^shift, limited to 0 ... 2^bits - 1
    image, logits   real -> fixed -> real     fixed = real * 2^point

`rescale` does all products and shifts: one int64 product, an addition that rounds, a shift. A mean is a sum divided by the
count. A kernel that fuses everything between two layers needs no fixed-point number in memory, except for a residual sum
that waits. Real numbers are used only to compute constants, before deployment.
"""

import math

import torch
import torch.nn.functional as F
from torch import fx, nn

from common import InputError
from common.activations import kind_of
from common.quant import QuantAct, quantized_activations, quantized_layers
from common.trace import METADATA, compute_node, constants_of, overwriting

LARGEST = 2**31 - 1
HEADROOM = 4  # bits: fixed-point numbers may be 16 times as large as the largest activation range
EXACT = "relu maxpool2d flatten reshape view permute transpose chunk split getitem cat concat pad identity contiguous dropout "
EXACT += "squeeze unsqueeze zeropad2d pixelshuffle channelshuffle stack neg getattr dropout1d dropout2d dropout3d alphadropout"
EXACT = METADATA | set(EXACT.split())  # what is computed in integers as it is
CURVES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardsigmoid": F.hardsigmoid}  # by table, constant beyond +-16
GATED = {"silu": "sigmoid", "hardswish": "hardsigmoid"}  # x times a curve
STEP, END = 6, 16  # a table has 2^STEP entries per unit from -END to END, and is linear between them


def multiplier(real):
    """Integers (m, shift), tensors, with m / 2^shift = `real` (float64 tensor) to 31 bits."""
    shift = (31 - torch.frexp(real.double())[1]).clamp(1, 62).long()
    m = torch.round(real.double() * 2.0**shift).long()
    if (m.abs() > 2**31).any():
        raise InputError("--integer-check: a scale of the network is too large for a 32-bit multiplier; check its weights")
    return m, shift


def saturated(x):
    """int64 values as int32, cut off at its ends."""
    return x.clamp(-LARGEST, LARGEST).int()


def rescale(x, m, shift):
    """Round(x * m / 2^shift), halves up: a 64-bit product, as int32 with saturation."""
    return saturated((x.long() * m + (1 << (shift - 1))) >> shift)


def refuse_overwritten(graph, modules):
    """Refuse values that are used after something has worked in place on them which does not do so in integers."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        last = max((order[n] for n in node.users if kind_of(n, modules) not in METADATA), default=-1)
        for writer in overwriting(node, modules):
            if kind_of(writer, modules) not in EXACT and order[writer] < last:
                raise InputError(
                    f"--integer-check: '{writer.name}' works in place on '{node.name}', which is used again after it; assign "
                    "its result, as in x = x + y"
                )


class IntegerNetwork:
    """The integers of a network, from `common.deploy.integer_form`, and what is done with them.

    Raises InputError where a step of the network has no integer arithmetic here.
    """

    def __init__(self, network):
        self.graph, self.modules = network.graph, dict(network.named_modules()) | {"": network}
        acts = dict(quantized_activations(network))
        largest = max(max(-act.low.item(), act.high.item()) for act in acts.values())
        self.point = min(31 - HEADROOM - math.ceil(math.log2(largest)), 24)  # 2 * END fits int32, too
        one = torch.tensor(2.0**self.point, dtype=torch.float64)
        self.acts = {name: multiplier(1 / (act.scale.double() * one)) for name, act in acts.items()}
        self.layers, layers = {}, dict(quantized_layers(network))
        refuse_overwritten(self.graph, self.modules)
        for node in self.graph.nodes:
            if node.op == "call_module" and node.target in layers:
                layer, act = layers[node.target], acts[node.args[0].target]
                weight = (layer.codes() - layer.weight_zero_point).int()
                if weight.abs().flatten(1).sum(1, dtype=torch.long).max() * (2**act.bits - 1) > LARGEST:
                    raise InputError(f"--integer-check: the sums of layer '{node.target}' may exceed int32; give fewer bits")
                m, shift = multiplier(act.scale.double() * layer.weight_scale.flatten() * one)
                bias = self.fixed(torch.zeros(len(weight)) if layer.bias is None else layer.bias)
                column = (-1,) + (1,) * (weight.ndim - 2)
                self.layers[node.target] = weight, int(act.zero_point), *(v.view(column) for v in (m, shift, bias))
        reals = {n: v for n, v in constants_of(network).items() if torch.is_tensor(v) and v.is_floating_point()}
        if large := [n.name for n, v in reals.items() if v.abs().max() * 2**self.point > LARGEST]:
            raise InputError(f"--integer-check: constant '{large[0]}' is too large for the network's fixed-point numbers")
        self.constants = {node: self.fixed(value) for node, value in reals.items()}
        points = torch.arange(-END << STEP, (END << STEP) + 2, dtype=torch.float64) / 2**STEP
        self.tables = {kind: torch.round(curve(points) * one).int() for kind, curve in CURVES.items()}

    def fixed(self, real):
        """Real numbers as fixed-point integers, int32."""
        return saturated(torch.round(torch.as_tensor(real, dtype=torch.float64) * 2**self.point))

    def __call__(self, images):
        """Logits (B, C) float32 of images (B, channels, H, W), normalised."""
        values = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = self.fixed(images)
            elif node in self.constants:
                values[node] = self.constants[node]
            elif node.op == "output":
                return values[node.args[0]].float() / 2**self.point
            else:
                values[node] = self.compute(node, values)

    def compute(self, node, values):
        """The value of a node of the graph from those of its inputs; int32 fixed-point, or codes after a `QuantAct`."""
        module, kind = self.modules.get(node.target) if node.op == "call_module" else None, kind_of(node, self.modules)
        inputs = [values[n] for n in node.args if isinstance(n, fx.Node)]
        x = inputs[0] if inputs else None
        if module and node.target in self.layers:
            weight, zero_point, m, shift, bias = self.layers[node.target]
            x = x - zero_point
            if isinstance(module, nn.Linear):
                sums = F.linear(x, weight)
            else:  # in float64, which holds the sums exactly: PyTorch has no dilated convolution of integers
                sums = module._conv_forward(x.double(), weight.double(), None).int()
            return saturated(rescale(sums, m, shift).long() + bias)
        if isinstance(module, QuantAct):
            return (rescale(x, *self.acts[node.target]) + int(module.zero_point)).clamp(0, 2**module.bits - 1)
        padded = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None) if kind == "pad" else None
        if (kind in EXACT and not padded) or not any(isinstance(values[n], torch.Tensor) for n in node.all_input_nodes):
            result = compute_node(node, values.__getitem__, self.modules)
            return self.fixed(result) if torch.is_tensor(result) and result.is_floating_point() else result
        types = [*node.args[1:], *node.kwargs.values()]
        if kind in ("to", "float") and all(isinstance(t, torch.dtype) and t.is_floating_point for t in types):
            return x
        plain = len(inputs) == len(node.args) == 2 and not node.kwargs
        if kind in ("add", "iadd") and plain:
            return saturated(inputs[0].long() + inputs[1])
        if kind in ("mul", "imul") and plain:
            return self.product(*inputs)
        if kind == "relu6" or (kind == "hardtanh" and module):
            low, high = (0, 6) if kind == "relu6" else (module.min_val, module.max_val)
            return x.clamp(int(self.fixed(low)), int(self.fixed(high)))
        if kind in CURVES:
            return self.curve(x, kind)
        if kind in GATED:
            return self.product(x, self.curve(x, GATED[kind]))
        if kind == "adaptiveavgpool2d" and (module.output_size if module else node.args[1]) in (1, (1, 1)):
            return self.mean(x, (2, 3), True)
        if kind == "mean" and node.kwargs.keys() <= {"dim", "axis", "keepdim"}:
            return self.mean(x, *node.args[1:], **{"dim" if n == "axis" else n: value for n, value in node.kwargs.items()})
        if kind == "avgpool2d" and (module or (len(node.args) == 2 and not node.kwargs)):
            size = module.kernel_size if module else node.args[1]
            others = (module.stride, module.padding, module.ceil_mode, module.divisor_override) if module else None
            if isinstance(size, int) and others in (None, (size, 0, False, None)):
                return self.mean(x.unfold(2, size, size).unfold(3, size, size), (-2, -1))
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:  # one that follows no layer
            factor = (module.running_var.double() + module.eps).rsqrt() * (1 if module.weight is None else module.weight)
            summand = self.fixed(-module.running_mean * factor + (0 if module.bias is None else module.bias))
            m, shift, summand = (value.view(-1, 1, 1) for value in (*multiplier(factor), summand))
            return saturated(rescale(x, m, shift).long() + summand)
        raise InputError(f"--integer-check: '{node.name}' ({kind}) has no integer arithmetic here; use --export alone")

    def product(self, x, y):
        """x * y of fixed-point numbers, int32."""
        return rescale(x, y.long(), torch.tensor(self.point))

    def curve(self, x, kind):
        """A function of fixed-point numbers, from its table."""
        down, table = self.point - STEP, self.tables[kind]
        x = x.clamp(-END << self.point, END << self.point) + (END << self.point)
        index, rest = (x >> down).long(), x & ((1 << down) - 1)
        return table[index] + rescale(table[index + 1] - table[index], rest.long(), torch.tensor(down))

    def mean(self, x, dim, keepdim=False):
        """The mean of fixed-point numbers over `dim`, rounded, halves up; int32."""
        total = x.sum(dim, keepdim, dtype=torch.long)
        count = x.numel() // total.numel()
        return saturated((total + count // 2).div(count, rounding_mode="floor"))
