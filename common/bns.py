"""BatchNorm statistics of a synthetic batch against those the teacher stored while it was trained."""

import torch
from torch import nn

from common import InputError
from common.ops import channel_statistics


class BatchNormStatistics:
    """Hooks on every BatchNorm2d of `model` that keep mean and variance of what the latest forward pass sent in.

    Each BNS loss compares, per layer, the batch's mean and biased variance over (N, H, W) with the running ones:

    - "gdfq": mean over layers of MSE(mean) + MSE(variance), each a mean over channels (the released GDFQ, Qimera,
      AutoReCon and AdaDFQ code).
    - "sum": sum over layers of the squared L2 norms of both differences (Eq. 11 of AdaDFQ).
    - "norm": sum over layers of the L2 norms, not squared (Eq. 2 of MixMix).

    Layers that a forward pass does not use take no part. The hooks stay: hand over a copy, not the caller's network.

    Args:
        model: a network in eval mode with at least one BatchNorm2d.

    Raises:
        InputError: the model has no BatchNorm2d with running statistics.
    """

    forms = ("gdfq", "sum", "norm")

    def __init__(self, model):
        layers = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) and m.track_running_stats]
        if not layers:
            raise InputError(
                f"model {type(model).__name__} has no BatchNorm2d with running statistics, from which the images are "
                "made; give a model that was trained with BatchNorm and is not folded"
            )
        self.batch = dict.fromkeys(layers)
        for layer in layers:
            layer.register_forward_pre_hook(self._record)

    def _record(self, layer, args):
        self.batch[layer] = channel_statistics(args[0])

    def loss(self, form="gdfq", first=1.0):
        """Distance of the latest batch's statistics from the stored ones: a scalar with a graph to that batch.

        The statistics are used up by it: kept any longer, they would keep that batch's graph alive.

        Args:
            form: one of `forms`.
            first: factor of the first layer's part, as DeepInversion has it for ImageNet.
        """
        batch, self.batch, terms = self.batch, dict.fromkeys(self.batch), []
        for layer, (mean, variance) in ((layer, recorded) for layer, recorded in batch.items() if recorded):
            differences = (mean - layer.running_mean, variance - layer.running_var)
            if form == "gdfq":
                terms.append(sum(d.square().mean() for d in differences))
            elif form == "sum":
                terms.append(sum(d.square().sum() for d in differences))
            elif form == "norm":
                terms.append(sum(d.norm() for d in differences))
            else:
                raise ValueError(f"BNS form '{form}'; expected one of {', '.join(self.forms)}")
        if first != 1.0:
            terms[0] = first * terms[0]
        total = torch.stack(terms).sum()
        return total / len(terms) if form == "gdfq" else total
