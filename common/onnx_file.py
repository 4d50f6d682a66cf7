"""A quantized network as an ONNX file, by PyTorch's exporter, with its integers.

    activations   QuantizeLinear to UINT8, Clip to 2^bits - 1 below 8 bits, DequantizeLinear
    weights       initializers of UINT4 up to 4 bits, of UINT8 above, with a zero point per channel: DequantizeLinear
    biases        FLOAT, added after the layer

ONNX Runtime would round a layer's own bias to units of the two scales, which at 4 bits changes one class in twenty, and would
compute a layer of UINT8 weights in a kernel that refuses zero points that differ by channel (microsoft/onnxruntime#28447).
Adding the bias after the layer avoids both: the layer is computed in floating point, of exactly the same integers. Needs
opset 21 and the packages in requirements-export.txt.
"""

import copy

import ml_dtypes
import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from torch import nn

from common import replacing
from common.quant import QuantAct, decode_, fake_quantize, quantized_layers


@torch.library.custom_op("integers::activation", mutates_args=())
def activation(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, largest: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """`x` in steps of `scale`; `largest` is the largest code, None for 8 bits."""
    return fake_quantize(x, scale, zero_point.float(), bits)


@torch.library.custom_op("integers::weight", mutates_args=())
def weight(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """What `codes` stand for, with a scale and a zero point for each of their first dimension."""
    return decode_(codes.float(), *(value.float().view((-1,) + (1,) * (codes.ndim - 1)) for value in (scale, zero_point)))


activation.register_fake(lambda x, scale, zero_point, largest, bits: torch.empty_like(x))
weight.register_fake(lambda codes, scale, zero_point: torch.empty_like(codes, dtype=torch.float32))


def onnx_activation(x, scale, zero_point, largest=None, bits: int = 8):
    codes = op.QuantizeLinear(x, scale, zero_point)
    return op.DequantizeLinear(codes if largest is None else op.Clip(codes, None, largest), scale, zero_point)


def onnx_weight(codes, scale, zero_point):
    return op.DequantizeLinear(codes, scale, zero_point, axis=0)


TABLE = {torch.ops.integers.activation.default: onnx_activation, torch.ops.integers.weight.default: onnx_weight}


class Activation(nn.Module):
    """A `QuantAct` as the exporter sees it."""

    def __init__(self, act):
        super().__init__()
        self.bits = act.bits
        self.register_buffer("scale", act.scale)
        self.register_buffer("zero_point", act.zero_point.to(torch.uint8))
        self.register_buffer("largest", torch.tensor(2**act.bits - 1, dtype=torch.uint8) if act.bits < 8 else None)

    def forward(self, x):
        return torch.ops.integers.activation(x, self.scale, self.zero_point, self.largest, self.bits)


class Layer(nn.Module):
    """A packed layer as the exporter sees it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = copy.copy(layer)
        zero_point, scale = (value.flatten().contiguous() for value in (layer.weight_zero_point, layer.weight_scale))
        self.register_buffer("codes", layer.codes().to(torch.uint8).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.uint8))
        bias = torch.zeros(len(scale)) if layer.bias is None else layer.bias.detach()
        self.register_buffer("bias", bias.view((-1,) + (1,) * (self.codes.ndim - 2)))
        del self.layer._parameters["weight"]
        self.layer._parameters["bias"] = None

    def forward(self, x):
        weight = torch.ops.integers.weight(self.codes, self.scale, self.zero_point)
        compute = nn.functional.linear if isinstance(self.layer, nn.Linear) else self.layer._conv_forward
        return compute(x, weight, None) + self.bias


def of_four_bits(graph):
    """The initializers that can be UINT4: codes and zero points of weights, where both are at most 15. The exporter merges
    equal ones, as the zero points of LSQ are, so those that a layer of more bits shares stay as they are."""
    nodes = [n for n in graph if n.op_type == "DequantizeLinear" and n.inputs[0].name in graph.initializers]
    pairs = [{node.inputs[0], node.inputs[2]} for node in nodes]
    wide = {value for pair in pairs for value in pair if value.const_value.numpy().max() > 15}
    while more := {value for pair in pairs if pair & wide for value in pair} - wide:
        wide |= more
    return {value for pair in pairs for value in pair} - wide


def write_onnx(network, path, example, about):
    """Write a network to an ONNX file.

    Args:
        network: from `common.deploy.integer_form`.
        path: of the file.
        example: images (B, channels, H, W); the file's batch size is free.
        about: namespace with mean, std and arch, which the file keeps as text.
    """
    network = copy.deepcopy(network)
    modules, layers = dict(network.named_modules()), dict(quantized_layers(network))
    for node in list(network.graph.nodes):
        if node.op == "call_module" and node.target in layers:
            network.set_submodule(node.target, Layer(layers[node.target]))
    for name, module in modules.items():
        if isinstance(module, QuantAct):
            network.set_submodule(name, Activation(module))
    program = torch.onnx.export(
        network, (example,), dynamo=True, opset_version=21, custom_translation_table=TABLE, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), input_names=["images"], output_names=["logits"],
    )  # fmt: skip
    model = program.model
    for value in of_four_bits(model.graph):
        value.const_value = ir.Tensor(value.const_value.numpy().astype(ml_dtypes.uint4), name=value.name)
        value.dtype = ir.DataType.UINT4
    for item in (model, *model.graph, *model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)):
        item.metadata_props.clear()  # stack traces, several times the size of the weights
    model.metadata_props.update({key: str(getattr(about, key)) for key in ("arch", "mean", "std")})
    with replacing(path) as partial:
        ir.save(model, partial)


def runtime(path):
    """ONNX Runtime's CPU kernels as a function: images (B, channels, H, W) -> logits, both tensors."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
