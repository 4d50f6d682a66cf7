"""`quantized.pt`: weights as packed integer codes, with all that is needed to run the network again, bit for bit."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common import InputError, replacing
from common.activations import kind_of
from common.folding import fold_batchnorm
from common.models import build, is_own
from common.probe import input_channels, refuse_infinite
from common.quant import (
    QuantAct,
    decode_,
    is_channels_last,
    quantize,
    quantized_activations,
    quantized_layers,
)
from common.trace import baked_copy

FORMAT = 1


def pack(codes, bits):
    """Codes 0 ... 2^bits - 1 as a bit stream, lowest bit first (two 4-bit codes to a byte, eight 3-bit codes to three).

    Args:
        codes: integer-valued tensor of any shape.
        bits: 1 to 8.

    Returns:
        uint8 tensor of ceil(numel * bits / 8) bytes.
    """
    flat = codes.reshape(-1, 1).cpu().numpy().astype(np.uint8)
    stream = np.unpackbits(flat, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed, bits, count):
    """The first `count` codes of a stream that `pack` made, as a uint8 tensor (count,)."""
    stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little")[:, 0])


def place_names(network):
    """Names for the values of a traced network, quantized or not, that are the same however it was traced: a dict of node ->
    the module or function that computes it, and which of its calls it is."""
    modules, calls, names = dict(network.named_modules()), Counter(), {}
    for node in network.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], QuantAct):
            what = node.target if node.op == "call_module" else kind_of(node, modules)
            calls[what] += 1
            names[node] = f"{what} {calls[what]}"
    return names


def save_quantized(student, path, meta):
    """Write a quantized network.

    Args:
        student: from `common.quant.quantize`, with frozen activation ranges.
        path: file to write; replaced in one step.
        meta: plain values; `load_quantized` needs arch, num_classes, image_size, channels, wbits, abits and
            act_placement (also folded, if its BatchNorms are, and the design that `build` takes, if it takes one), `--eval`
            also method, dataset, mean and std. With another act_placement than "relu" and "input", each activation is
            stored with its place.
    """
    layers, activations, weights = {}, {}, set()
    for name, layer in quantized_layers(student, every_name=True):
        scale, zero_point = layer.parameters_of_codes()
        layers[name] = {
            "bits": layer.bits,
            "shape": list(layer.weight.shape),
            "codes": pack(layer.codes(), layer.bits),
            "scale": scale.flatten(),
            "zero_point": zero_point.flatten().to(torch.int32),
        }
        weights.add(f"{name}.weight")
    for name, act in quantized_activations(student):
        ranges = {key: getattr(act, key) for key in ("low", "high", "scale", "zero_point")}
        activations[name] = {"bits": act.bits, **ranges}
        weights |= {f"{name}.{buffer}" for buffer in (*ranges, "seen")}
    if meta.get("act_placement", "relu") not in ("relu", "input"):
        names = place_names(student)
        for node in student.graph.nodes:
            if node.op == "call_module" and node.target in activations:
                activations[node.target]["place"] = names[node.args[0]]
    tensors = {
        key: value
        for key, value in student.state_dict().items()
        if key not in weights and not key.endswith("num_batches_tracked")
    }
    _share_storage([*layers.values(), *activations.values(), tensors])
    content = {"format": FORMAT, "meta": meta, "layers": layers, "activations": activations, "tensors": tensors}
    kernels = [layer.weight for _, layer in quantized_layers(student) if layer.weight.ndim == 4]
    content["channels_last"] = all(map(is_channels_last, kernels))
    with replacing(path) as partial:
        torch.save(content, partial)


def saved_bytes(model):
    """Size of the network's own checkpoint file."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def _share_storage(dicts):
    """Turn the tensors in `dicts` into views of one storage per dtype; a file then holds no padding between them."""
    by_dtype = {}
    for entry in dicts:
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                by_dtype.setdefault(value.dtype, []).append((entry, key, value.detach().cpu()))
    for items in by_dtype.values():
        flat, start = torch.cat([value.reshape(-1) for _, _, value in items]), 0
        for entry, key, value in items:
            entry[key] = flat[start : start + value.numel()].view(value.shape)
            start += value.numel()


def read_quantized(path):
    """The contents of a quantized.pt.

    Raises:
        InputError: no such file, or not one that `save_quantized` wrote.
    """
    if not Path(path).is_file():
        raise InputError(f"'{path}' is not a file; give the quantized.pt of a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
    except Exception:  # the unpickler raises whatever the damaged bytes make of it
        raise InputError(f"'{path}' is not a quantized network or is damaged; give the quantized.pt of a run") from None
    if version != FORMAT:
        raise InputError(f"'{path}' has format {version}, expected {FORMAT}; make it again with this version")
    return content


def load_quantized(path, model=None):
    """A quantized network from its file, with the outputs it had when it was saved, to the bit.

    Args:
        path: a quantized.pt.
        model: an untrained instance of an own architecture; the bundled and torchvision's ones are built from the
            file. A file never decides which code of yours is imported.

    Returns:
        The network in eval mode; its convolution and linear weights hold the exact dequantized values.

    Raises:
        InputError: a damaged file, or an own architecture without `model`.
    """
    content = read_quantized(path)
    meta = content["meta"]
    if model is None:
        if meta["arch"] is None or is_own(meta["arch"]):
            raise InputError(f"'{path}' holds an architecture of your own; give --arch package.module:factory")
        design = meta.get("design", meta.get("shortcut"))  # earlier files have "shortcut", "pad" or "projection"
        model = build(meta["arch"], meta["num_classes"], meta["image_size"], design)
    if (found := input_channels(model)) != meta["channels"]:
        what = f"'{path}' was saved from another architecture, for images of {meta['channels']} channels, not {found}"
        raise InputError(f"{what}; give the one it was saved from")
    example = torch.zeros(1, meta["channels"], meta["image_size"], meta["image_size"])
    model = baked_copy(model).float()
    model = fold_batchnorm(model, example) if meta.get("folded") else model
    places = {stored["place"] for stored in content["activations"].values() if "place" in stored}

    def stored_places(traced):
        return {node for node, name in place_names(traced).items() if name in places}

    placement = stored_places if places else meta["act_placement"]
    student = quantize(model, meta["wbits"], meta["abits"], placement, example=example)
    layers, activations = dict(quantized_layers(student, every_name=True)), dict(quantized_activations(student))
    known = {layer for name, layer in layers.items() if name in content["layers"]}
    for name, layer in layers.items():
        if name not in content["layers"] and layer in known:
            raise InputError(f"'{path}' lacks '{name}', a layer's second name; make it again with this version")
    shapes = {name: value.shape for name, value in student.state_dict().items()}
    state = dict(content["tensors"])
    for name, stored in content["layers"].items():
        shape = stored["shape"]
        column = (-1,) + (1,) * (len(shape) - 1)
        scale, zero_point = stored["scale"].clone().view(column), stored["zero_point"].float().view(column)
        codes = unpack(stored["codes"], stored["bits"], torch.Size(shape).numel()).view(shape).float()
        state[f"{name}.weight"] = decode_(codes, scale, zero_point)
        if name in layers:
            layers[name].bits = stored["bits"]
            layers[name].pack(state[f"{name}.weight"], scale, zero_point)
    for name, stored in content["activations"].items():
        if name in activations:
            activations[name].bits = stored["bits"]
        state |= {f"{name}.{key}": stored[key] for key in ("low", "high", "scale", "zero_point")}
        state[f"{name}.seen"] = torch.tensor(True)
    expected = {key for key in student.state_dict() if not key.endswith("num_batches_tracked")}
    odd = sorted(expected ^ set(state)) or sorted(set(activations) ^ set(content["activations"]))
    if odd := odd or [name for name in expected if shapes[name] != state[name].shape]:
        raise InputError(
            f"'{path}' was saved from another architecture (they differ in '{odd[0]}'); give the one it was saved from"
        )
    student.load_state_dict(state, strict=False)
    refuse_infinite(student, f"'{path}'")
    layout = torch.channels_last if content.get("channels_last") else torch.contiguous_format
    return student.to(memory_format=layout)  # convolutions round differently in another layout
