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
        if form not in self.forms:
            raise ValueError(f"BNS form '{form}'; expected one of {', '.join(self.forms)}")
        batch, self.batch = self.batch, dict.fromkeys(self.batch)
        used = [layer for layer, recorded in batch.items() if recorded]
        found = torch.cat([statistic for layer in used for statistic in batch[layer]])
        stored = torch.cat([statistic for layer in used for statistic in (layer.running_mean, layer.running_var)])
        difference = found - stored  # of all layers at once: a step has hundreds of small operations as it is
        sizes = [2 * layer.num_features for layer in used]
        if form == "norm":
            terms = [of_layer.view(2, -1).norm(dim=1).sum() for of_layer in difference.split(sizes)]
        elif form == "sum":
            terms = [of_layer.sum() for of_layer in difference.square().split(sizes)]
        else:
            # over both statistics, so half of the sum of their means
            terms = [of_layer.mean() for of_layer in difference.square().split(sizes)]
        if first != 1.0:
            terms[0] = first * terms[0]
        total = torch.stack(terms).sum()
        return 2 * total / len(terms) if form == "gdfq" else total
