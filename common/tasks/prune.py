"""Pruning by L1 magnitude, and least-squares reconstruction of the layers' outputs (MixMix, Sec. 5.3).

Single weights (Han et al., ICLR 2016) or whole channels are removed. The weights that remain, in that layer or in the layers
that received the channels, are then fitted again by least squares, layer by layer, as He et al. (ICCV 2017) do:

    refit, least_squares    min_W |Y - X W^T - b|^2, Y the full network's outputs, X the pruned one's inputs
    removable               the convolutions whose channels can go
    load_pruned             reads the network that a run leaves

What MixMix leaves open, and what this code does:

    what                  here                                               why
    which weights go      the smallest of each layer, all layers alike       not given; He et al. choose channels by LASSO
    ranking               of weights with the BatchNorms folded in           what a channel sends is what counts
    "0.2" of channels     removed, of every convolution in `removable`       a residual sum needs all its channels
    solution              with intercept and a small ridge (--ridge)         pixels can be fewer than weights
    pixels                --points random ones of each image                 He et al. take ten
    fine-tuning           none                                               none is mentioned
"""

import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError
from common.activations import is_activation, kind_of
from common.cli import fill_in, number, whole
from common.device import full_precision
from common.folding import fold_batchnorm
from common.models import fit, read_weights
from common.progress import Progress
from common.run import Run
from common.supported import LAYERS, check_layers

# what works on each channel alone, beside activations and depthwise convolutions; names as `kind_of` has them
CHANNELWISE = {"identity", "dropout", "dropout2d", "maxpool2d", "avgpool2d", "adaptiveavgpool2d", "adaptivemaxpool2d"}

STUDENT = "pruned"  # what the network is called in the table of a run


def add_flags(parser):
    """Declare the flags of this task; returns the groups of `parser` that hold them."""
    group = parser.add_argument_group("pruning")
    add = group.add_argument
    kinds = ("unstructured", "structured")
    add("--prune", choices=kinds, default="unstructured", help="prune single weights or whole channels")
    share = "fraction of the weights or channels to prune (default: unstructured 0.5, structured 0.2)"
    add("--sparsity", type=number(0, 0.99), help=share)
    add("--points", type=whole(1), default=10, help="number of pixels per image for the least-squares reconstruction")
    ridge = "ridge of the least-squares reconstruction, relative to the inputs' variance"
    add("--ridge", type=number(1e-12), default=1e-4, help=ridge)
    add("--no-refit", action="store_true", help="leave out the least-squares reconstruction after pruning")
    parser.without_effect("--no-refit", "--points", "--ridge")
    return (group,)


def complete(cfg):
    """Fill in the defaults that depend on others: the reconstruction runs step by step in fp32."""
    cfg.capture, cfg.precision = "none", "fp32"
    fill_in(cfg, {"sparsity": 0.5 if cfg.prune == "unstructured" else 0.2})


def weighted_layers(network):
    """The convolutions and linear layers of a network, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LAYERS)}


def give_biases(network):
    """`network`, with a bias in every convolution and linear layer."""
    for layer in weighted_layers(network).values():
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)
    return network


def plan(model, cfg, run):
    """The network that is pruned: traced, its BatchNorms folded, every layer with a bias."""
    folded = fold_batchnorm(*run.adopt(model))
    check_layers(folded)
    if cfg.prune == "structured" and not removable(folded):
        raise InputError(
            "--prune structured: no convolution of the network has removable channels, because all of them feed sums, "
            "products, grouped convolutions, norms that do not follow a convolution or the classifier; give --prune "
            "unstructured"
        )
    return run.place(give_biases(folded))


def least_squares(inputs, targets, keep, ridge):
    """Weights and intercept with the smallest squared error: targets ~ inputs @ weights.T + intercept .

    Args:
        inputs: (N, D).
        targets: (N, O).
        keep: bool (O, D), which weights there are; the others are 0.
        ridge: added to the diagonal of the inputs' covariance, relative to its mean.

    Returns:
        weights (O, D), intercept (O,), float32.
    """
    x, y = inputs.double(), targets.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    covariance, products = (x - x_mean).T @ (x - x_mean), (x - x_mean).T @ (y - y_mean)
    covariance += ridge * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance), device=x.device)
    weights = torch.zeros(len(keep), x.shape[1], dtype=x.dtype, device=x.device)
    if keep.all():
        weights = torch.linalg.solve(covariance, products).T
    else:
        for row, kept in enumerate(keep):
            chosen = kept.nonzero()[:, 0]
            weights[row, chosen] = torch.linalg.solve(covariance[chosen][:, chosen], products[chosen, row])
    return weights.float(), (y_mean - weights @ x_mean).float()


def pick(columns, places):
    """The columns (B, D, pixels) at `places`, int64 (B, P): (B * P, D)."""
    return columns.gather(2, places[:, None].expand(-1, columns.shape[1], -1)).movedim(2, 1).flatten(0, 1)


def vectors(layer, x):
    """What a layer takes or sends, as (B, D, places): pixels, for a linear layer all between its first and last dimension."""
    return x.movedim(-1, 1).reshape(len(x), x.shape[-1], -1) if isinstance(layer, nn.Linear) else x.flatten(2)


def patches(layer, x, places):
    """What each output of a layer sees.

    Args:
        layer: nn.Conv2d or nn.Linear.
        x: its input, (B, C, H, W) or (B, ..., D).
        places: int64 (B, P), outputs in the order of `vectors`.

    Returns:
        (groups, B * P, D).
    """
    if isinstance(layer, nn.Linear):
        return pick(vectors(layer, x), places)[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)  # as the convolution does
    columns = pick(F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride), places)
    return columns.view(len(columns), layer.groups, -1).movedim(1, 0)


def observe_layer(name, full, pruned, images, cfg):
    """Inputs of a layer in the pruned network and its outputs in the full one, at the same random pixels of each image."""
    layer, reference = pruned.get_submodule(name), full.get_submodule(name)
    inputs, targets, seen = [], [], {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].clone())),  # what comes after may
        reference.register_forward_hook(lambda *args: seen.update(y=args[2].clone())),  # work in place
    ]
    for part in images.split(64):
        pruned(part)
        full(part)
        y = vectors(layer, seen["y"])
        places = torch.rand(len(y), y.shape[2], device=y.device).argsort(1)[:, : cfg.points]
        inputs.append(patches(layer, seen["x"], places))
        targets.append(pick(y, places))
    for hook in hooks:
        hook.remove()
    return torch.cat(inputs, 1), torch.cat(targets)


def refit(name, full, pruned, images, keep, cfg):
    """Reconstruct a layer's weights from images, so that it answers as the full network's on the pruned one's inputs.

    Args:
        name: of the layer in both networks.
        full, pruned: traced, BatchNorms folded.
        images: (N, channels, H, W).
        keep: bool, of the shape of the pruned layer's weight: which of them there are.
    """
    layer = pruned.get_submodule(name)
    inputs, targets = observe_layer(name, full, pruned, images, cfg)
    groups = len(inputs)
    keep = keep.flatten(1).view(groups, -1, inputs.shape[2])
    rows = targets.view(len(targets), groups, -1)
    solved = [least_squares(inputs[g], rows[:, g], keep[g], cfg.ridge) for g in range(groups)]
    layer.weight.copy_(torch.cat([weights for weights, _ in solved]).view_as(layer.weight))
    layer.bias.copy_(torch.cat([intercept for _, intercept in solved]))


def _slopes(module):
    """Whether an activation has parameters for each channel."""
    return isinstance(module, nn.PReLU) and module.num_parameters > 1


def removable(network):
    """The convolutions of a traced network whose channels can go: all that a channel goes through, up to the convolutions
    that take it, works on that channel alone (activations, pooling, depthwise convolutions). What a residual sum, a
    concatenation or the classifier takes stays whole.

    Returns:
        Dict of producer -> (depthwise convolutions on the way, consumers), names.
    """
    modules, found = dict(network.named_modules()), {}
    for node in network.graph.nodes:
        producer = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(producer, nn.Conv2d) or producer.groups > 1:
            continue
        way, consumers, ahead = [], [], list(node.users)
        while ahead:
            user = ahead.pop()
            module = modules.get(user.target) if user.op == "call_module" else None
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                consumers.append(user.target)
                continue
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels
            alone = is_activation(user, modules) and len(user.all_input_nodes) == 1 and not _slopes(module)
            if not (depthwise or alone or kind_of(user, modules) in CHANNELWISE):
                break
            way += [user.target] if depthwise else []
            ahead += user.users
        else:
            if consumers:
                found[node.target] = way, consumers
    return found


def remove_channels(network, producer, way, consumers, keep):
    """Remove the channels of `producer` that are not in `keep`, int64 indices, from it and from all that takes them."""
    for name in (producer, *way):
        layer = network.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach()[keep], requires_grad=False)
        layer.bias = nn.Parameter(layer.bias.detach()[keep], requires_grad=False)
        layer.out_channels = len(keep)
        if name in way:
            layer.in_channels = layer.groups = len(keep)
    for name in consumers:
        layer = network.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach()[:, keep], requires_grad=False)
        layer.in_channels = len(keep)


def kept_entries(magnitude, sparsity):
    """Which entries of a tensor stay, bool in its shape, when the share `sparsity` of them goes, the smallest first."""
    rank = magnitude.flatten().argsort().argsort().view_as(magnitude)
    return rank >= round(sparsity * magnitude.numel())


@full_precision()
def compress(model, images, cfg, run=None):
    """Prune a trained network and reconstruct its layers from images, without fine-tuning.

    --prune unstructured: in every convolution and linear layer the share --sparsity of its weights, those of least magnitude,
    becomes 0. structured: of every convolution in `removable` that share of the channels is removed, those whose filters
    have the smallest L1 norms. The result is traced, its BatchNorms folded.
    """
    run = run or Run(cfg)
    began = time.time()
    torch.manual_seed(cfg.seed)
    full = plan(model, cfg, run)
    pruned, images = copy.deepcopy(full), images.to(run.device, torch.float32)
    run.start()
    weighted = weighted_layers(full)
    layers = [node.target for node in full.graph.nodes if node.op == "call_module" and node.target in weighted]
    quiet = run.folder is None

    def reconstruct(name, keep):
        if not cfg.no_refit:
            refit(name, full, pruned, images, keep, cfg)

    if cfg.prune == "unstructured":
        for name in Progress(layers, desc="layers", disable=quiet):
            layer = pruned.get_submodule(name)
            keep = kept_entries(layer.weight.abs(), cfg.sparsity)
            layer.weight.mul_(keep)
            reconstruct(name, keep)
    else:
        for producer, (way, consumers) in Progress(removable(pruned).items(), desc="convolutions", disable=quiet):
            norms = full.get_submodule(producer).weight.abs().flatten(1).sum(1)
            keep = norms.argsort(descending=True)[: max(1, len(norms) - round(cfg.sparsity * len(norms)))].sort().values
            remove_channels(pruned, producer, way, consumers, keep)
            for name in sorted(consumers, key=layers.index):
                reconstruct(name, torch.ones_like(pruned.get_submodule(name).weight, dtype=torch.bool))
    weights = torch.cat([p.detach().flatten() for p in pruned.parameters() if p.ndim > 1])
    run.record(weights=len(weights), zero_weights=int((weights == 0).sum()))
    run.conclude(pruned, began)
    return pruned


def load_pruned(path, model, example=None):
    """A pruned network from its student.pt.

    Args:
        path: of a run with --task prune.
        model: an untrained instance of the teacher's architecture, strides included.
        example: a batch that it takes; needed where its forward computes with shapes.

    Returns:
        The network in eval mode, traced, its BatchNorms folded, with the channels that are left.
    """
    state, network = read_weights(path), give_biases(fold_batchnorm(model, example))
    for producer, (way, consumers) in removable(network).items():
        left = len(state.get(f"{producer}.weight", ()))  # where that is none, `fit` says what is missing
        remove_channels(network, producer, way, consumers, torch.arange(network.get_submodule(producer).out_channels)[:left])
    fit(network, state, path)
    return network.eval()
