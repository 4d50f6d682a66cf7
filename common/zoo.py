"""Several networks for one set of images: each sees the images with the normalisation that it was trained with."""

import torch
from torch import nn

from common import InputError
from common.bns import BatchNormStatistics
from common.cli import alone
from common.data import as_tensors
from common.models import load_teacher
from common.probe import input_channels, probe, refuse_undifferentiable
from common.report import per_channel
from common.trace import memory_layout


class ZooModel(nn.Module):
    """A trained network that takes the zoo's images and converts them to the normalisation that it was trained with.

    Args:
        name: as in --zoo.
        model: the network, which is frozen.
        normalisation, shared: (mean, std) that it was trained with, and those of the images.
        layout: the memory layout in which it is computed.
    """

    def __init__(self, name, model, normalisation, shared, layout=torch.channels_last):
        super().__init__()
        self.name, self.model, self.layout = name, model.eval().requires_grad_(False), layout
        self.stats = BatchNormStatistics(model)
        (own_mean, own_std), (mean, std) = as_tensors(normalisation), as_tensors(shared)
        self.same = normalisation == shared
        self.depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, x):
        """Logits (B, C) of images (B, channels, H, W)."""
        return self.model(x if self.same else x * self.scale + self.shift)

    def place(self, device):
        """The model on a device, in its memory layout."""
        return self.to(device, memory_format=self.layout)


def load_zoo(names, cfg, shared=None, inverts=False):
    """Networks by name: architectures, "arch=weights" or "package.module:factory"; `inverts`: to make images by gradients.

    Returns:
        A list of `ZooModel`, and (mean, std) of the images: `shared`, else --mean and --std, else those of the first network.

    Raises:
        InputError: a network that cannot be loaded, or does not fit the others; it is named.
    """
    zoo = []
    for name in names:
        own = alone(cfg, name)
        try:
            model, normalisation, _ = load_teacher(own.arch, cfg.dataset, cfg.num_classes, cfg.image_size, own.weights)
            model = model.float()
            example = probe(model, cfg.num_classes, cfg.image_size)
            layout = memory_layout(model, example)
            if inverts:
                refuse_undifferentiable(model, example)
            channels = input_channels(model)
            shared = shared or tuple(per_channel(cfg, normalisation, channels))
            normalisation = tuple(per_channel(own, normalisation, channels))
            if len(shared[0]) != channels:
                raise InputError(f"it takes images of {channels} channels and the others of {len(shared[0])}")
            zoo.append(ZooModel(name, model, normalisation, shared, layout))
        except InputError as error:
            raise InputError(f"zoo model {name}: {error}") from None
    return zoo, shared
