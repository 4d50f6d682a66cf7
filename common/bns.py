"""BatchNorm statistics of a synthetic batch against those the teacher stored while it was trained."""

import torch
from torch import nn

from common import InputError
from common.ops import channel_statistics


class BatchNormStatistics:
    """Hooks on every BatchNorm2d of `model` that keep what the latest forward pass sent in.

    Each BNS loss compares, per layer, the batch's mean and biased variance over (N, H, W) with the running ones:

    - "gdfq": mean over layers of MSE(mean) + MSE(variance), each a mean over channels (the code of GDFQ, Qimera
      and AdaDFQ, and that of AIT for AutoReCon).
    - "sum": sum over layers of the squared L2 norms of both differences (Eq. 11 of AdaDFQ).
    - "norm": sum over layers of the L2 norms, not squared (Eq. 2 of MixMix).
    - "kl": mean over layers of the mean over channels of `gaussian_kl` (The Knowledge Within, by Sec. 3.1 of MixMix).

    Layers that a forward pass does not use take no part. The hooks stay: hand over a copy, not the caller's network.

    Args:
        model: a network in eval mode with at least one BatchNorm2d.

    Raises:
        InputError: the model has no BatchNorm2d with running statistics.
    """

    forms = ("gdfq", "sum", "norm", "kl")

    def __init__(self, model):
        norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
        layers = [m for m in norms if m.running_mean is not None]
        if not layers:
            raise InputError(
                f"model {type(model).__name__} has no BatchNorm2d with running statistics, from which the images are "
                "made; give a model that was trained with BatchNorm and is not folded"
            )
        self.inputs = dict.fromkeys(layers)
        self.width = max(layer.num_features for layer in layers)
        for index, layer in enumerate(layers):
            channels = torch.arange(layer.num_features, device=layer.running_var.device)
            share = layer.running_var.new_full((2 * layer.num_features,), 1 / layer.num_features)
            place = torch.cat([channels + row * self.width for row in (2 * index, 2 * index + 1)])
            layer.register_buffer("bns_share", share, persistent=False)  # both move with the layer
            layer.register_buffer("bns_place", place, persistent=False)
            layer.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, layer, args, kwargs):
        x = args[0] if args else kwargs["input"]
        # a compiler fuses the statistics with the layer itself, if it meets them there
        self.inputs[layer] = channel_statistics([x]) if torch.compiler.is_compiling() else x

    def loss(self, form="gdfq", first=1.0):
        """Distance of the latest batch's statistics from the stored ones: a scalar with a graph to that batch.

        Call it once per forward pass: it releases the stored batch, whose graph would otherwise stay in memory.

        Args:
            form: one of `forms`.
            first: factor of the first layer's part, as DeepInversion has it for ImageNet.
        """
        if form not in self.forms:
            raise ValueError(f"BNS form '{form}'; expected one of {', '.join(self.forms)}")
        inputs, self.inputs = self.inputs, dict.fromkeys(self.inputs)
        used = [layer for layer, x in inputs.items() if x is not None]
        if not used:
            raise InputError(
                "the model calls none of its BatchNorm2d layers as modules, whose inputs could be seen; write x = self.bn(x)"
            )
        given = [inputs[layer] for layer in used]
        if any(x.ndim == 1 for x in given):  # statistics already
            found = torch.cat([x if x.ndim == 1 else channel_statistics([x]) for x in given])
        else:  # all layers at once, since a step has hundreds of small operations as it is
            found = channel_statistics(given)
        difference = found - torch.cat([statistic for layer in used for statistic in (layer.running_mean, layer.running_var)])
        begin = 0  # of the first layer's terms
        if form == "norm":  # all at once: rows of a matrix, filled up with zeros
            matrix = difference.new_zeros(2 * len(inputs), self.width)
            place = torch.cat([layer.bns_place for layer in used])
            terms = matrix.flatten().scatter(0, place, difference).view_as(matrix).norm(dim=1)
            begin, of_first = 2 * list(inputs).index(used[0]), 2
        elif form == "kl":
            statistics = found.split([layer.num_features for layer in used for _ in ("mean", "variance")])
            layers = zip(used, statistics[::2], statistics[1::2])
            terms, of_first = torch.stack([gaussian_kl(*layer).mean() for layer in layers]), 1
        else:
            terms, of_first = difference.square(), 2 * used[0].num_features
            if form == "gdfq":
                terms = terms * torch.cat([layer.bns_share for layer in used])
        total = terms.sum()
        if first != 1.0:
            total = total + (first - 1) * terms[begin : begin + of_first].sum()
        return total / len(used) if form in ("gdfq", "kl") else total


def gaussian_kl(layer, mean, variance):
    """KL(N(mean, variance) || N(mean and variance stored in a BatchNorm)), for each channel (C,).

    In this direction it divides by what is stored, which stays as it is; the other one divides by the batch's variance, so
    that a channel which is nearly constant in one batch outweighs all others. Both variances are as the layer uses them,
    with its eps.
    """
    variance, stored = variance + layer.eps, layer.running_var + layer.eps
    return 0.5 * (stored.log() - variance.log() + (variance + (mean - layer.running_mean).square()) / stored - 1)
