"""What `--check` prints: which layers would be quantized, what stays in full precision, and sizes."""

import tempfile
from collections import Counter
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn

from common.activations import FULL_PRECISION, Calls, full_precision_activations, name_of
from common.export import save_quantized, saved_bytes
from common.quant import QuantAct, quantized_activations, quantized_layers, set_observing
from common.supported import LAYERS
from common.trace import UNSEEN, batch_like, trace

# what hands values on as they are: the codes of a quantized tensor stay codes
UNCHANGED_BY = {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split, F.max_pool2d, F.dropout}
UNCHANGED_BY |= set("flatten reshape view permute transpose chunk split contiguous squeeze unsqueeze".split())
UNCHANGED_BY_MODULES = (
    nn.MaxPool2d, nn.ZeroPad2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.PixelShuffle, nn.ChannelShuffle,
)  # fmt: skip
NORMS, ADDS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm"), ("add", "iadd")
HEADS = ("layer", "kind", "weight", "bits", "weights", "multiply-adds", "input")


def describe(student):
    """One line on what of the network is quantized, and which activation functions are not."""
    weights, acts = quantized_layers(student), quantized_activations(student)
    wbits, abits = (" and ".join(map(str, sorted({module.bits for _, module in group}))) for group in (weights, acts))
    floating = ", ".join(f"{count} {name}" for name, count in sorted(full_precision_activations(student).items()))
    text = f"{len(weights)} weight tensors to {wbits} bits, {len(acts)} activations to {abits} bits"
    return text + (f"; in full precision: {floating}" if floating else "")


def sources(node, modules):
    """Where a value of a traced graph comes from: list of (name, bits), bits None in full precision."""
    module = modules.get(node.target) if node.op == "call_module" else None
    if isinstance(module, QuantAct):
        return [(name, module.bits) for name, _ in sources(node.args[0], {})]
    inputs = node.all_input_nodes
    getitem = getattr(node.target, "__name__", "") == "getitem"
    if module and isinstance(module, UNCHANGED_BY_MODULES) or node.target in UNCHANGED_BY or getitem:
        return sources(inputs[0], modules)
    if node.target in (torch.cat, torch.concat) and modules:
        return [source for part in inputs for source in sources(part, modules)]
    name = {"placeholder": "the image", "call_module": str(node.target)}.get(node.op, node.name)
    return [(name, None)]


def graph_of(network, example):
    """The graph of a network, quantized or not; None where it cannot be traced."""
    if isinstance(network, fx.GraphModule):
        return network.graph
    try:
        return trace(network, example).graph
    except Exception:  # whatever the network's own forward raises when it is traced
        return None


def input_of(name, graph, modules):
    """What a layer receives, in words."""
    if graph is None:
        quantizer = getattr(modules[name], "input_quantizer", None)
        return f"{quantizer.bits} bits" if quantizer else "unknown: the network cannot be traced"
    node = next((n for n in graph.nodes if n.op == "call_module" and n.target == name and n.args), None)
    if node is None:
        return "unknown: it is called by keyword or inside another module"
    found = dict.fromkeys(sources(node.args[0], modules))
    texts = [f"{source}, {f'{bits} bits' if bits else 'full precision'}" for source, bits in found]
    return " + ".join(texts) if len(texts) < 3 else f"{texts[0]} + {len(texts) - 1} more"


def layer_rows(student, example):
    """A row of HEADS for each convolution and linear layer, in the order of the forward."""
    modules, rows, hooks, graph = dict(student.named_modules()), {}, [], graph_of(student.eval(), example)

    def note(name):
        def hook(layer, args, output):
            weight = layer.weight
            count = output[0].numel() * prod(weight.shape[1:])
            kind, shape = type(layer).__name__.removeprefix("Quant"), "x".join(map(str, weight.shape))
            where = input_of(name, graph, modules)
            before = rows[name][5] if name in rows else 0  # of an earlier call
            rows[name] = name, kind, shape, getattr(layer, "bits", 32), weight.numel(), before + count, where

        return hook

    for name, module in modules.items():
        if isinstance(module, LAYERS):
            hooks.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        student(example)
    for hook in hooks:
        hook.remove()
    return list(rows.values())


def in_full_precision(student, rows, cfg, example):
    """What is not quantized and why, a list of lines; `example` is a batch that the student takes."""
    with torch.no_grad(), Calls(student) as calls:
        student(batch_like(example, UNSEEN))
    quantizing = (QuantAct, *LAYERS, type(None))  # the last quantizes all weights, in front of the network
    called = [call for call in calls.found if not isinstance(call.module, quantizing)]
    names = Counter(name_of(call.function) for call in called)
    lines = []
    if any("full precision" in row[-1] for row in rows):
        reasons = {"blocks": "the network's input is not quantized, nor are averages of quantized values"}
        reason = reasons.get(cfg.act_placement, "only results of activation functions are quantized")
        lines.append(f"inputs listed as full precision: {reason}; --act-placement input quantizes what layers receive")
    activations = full_precision_activations(student)
    if not isinstance(student, fx.GraphModule):  # its modules do not show what its forward calls
        activations = {name: names[name.lower()] for name in FULL_PRECISION if names[name.lower()]}
    for name, count in sorted(activations.items()):
        lines.append(f"{count} {name}: no quantizer for it, as for the gates of squeeze-and-excitation")
    others = [f"{names[name.lower()]} {name}" for name in NORMS if names[name.lower()]]
    others += ["biases"] * any(getattr(m, "bias", None) is not None for m in student.modules())
    sums = sum(name_of(c.function) in ADDS and all(isinstance(x, torch.Tensor) for x in c.args[:2]) for c in called)
    others += [f"{sums} residual sum{'s' * (sums > 1)}"] * (sums > 0)
    others += [f"{products} products of attention"] if (products := 2 * names["scaleddotproductattention"]) else []
    return lines + [f"{', '.join([*others, 'the logits'])}: computed in float32, as in the papers"]


def print_check(teacher, student, example, cfg):
    """Print the check of a network.

    Args:
        teacher: the full-precision network.
        student: what a run would train, quantized or not.
        example: a batch that both take.
        cfg: parsed arguments.

    Returns:
        Dict of rows (as HEADS), full_precision (lines), bytes_fp32 and bytes_student.
    """
    quantized = bool(quantized_layers(student))
    with torch.no_grad():
        set_observing(student, True)  # ranges, without which what the network computes is not a number
        student(batch_like(example, UNSEEN))
        set_observing(student, False)
    rows = layer_rows(student, example)
    table = [HEADS] + [tuple(f"{cell:,}" if isinstance(cell, int) else cell for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADS))]
    for row in table:
        cells = [cell.rjust(width) if 3 <= i < 6 else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
    total = f"{sum(row[4] for row in rows):,} weights, {sum(row[5] for row in rows):,} multiply-adds per image"
    print(f"\n{len(rows)} layers, {total}")
    lines, before, after = [], saved_bytes(teacher), saved_bytes(student)
    if quantized:
        bits = Counter(act.bits for _, act in quantized_activations(student))
        print("activations quantized: " + ", ".join(f"{count} to {bits} bits" for bits, count in sorted(bits.items())))
        lines = in_full_precision(student, rows, cfg, example)
        print("in full precision:\n  " + "\n  ".join(lines))
        with tempfile.TemporaryDirectory() as folder:
            save_quantized(student, Path(folder) / "quantized.pt", {"arch": cfg.arch, "act_placement": cfg.act_placement})
            after = (Path(folder) / "quantized.pt").stat().st_size
    print(f"file: {before / 1024:,.0f} KB -> {after / 1024:,.0f} KB ({before / after:.1f}x)", flush=True)
    return {"rows": rows, "full_precision": lines, "bytes_fp32": before, "bytes_student": after}
