"""Own architectures for the command line: package.module:factory."""

import torch
from conftest import FunctionalNet, ModuleNet, trained
from torch import nn


def grey(num_classes=5):
    """One channel in, a 1x1 convolution as classifier."""
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 1), nn.AdaptiveAvgPool2d(1)
    return trained(nn.Sequential(*layers, nn.Flatten()), channels=1)


def net(num_classes=5):
    torch.manual_seed(1)
    return trained(FunctionalNet(num_classes))


def branch(num_classes=5):
    """A network that cannot be traced."""
    torch.manual_seed(1)
    return trained(ModuleNet(num_classes))


def other(num_classes=5):
    torch.manual_seed(2)
    return trained(FunctionalNet(num_classes))


def seven():
    return trained(FunctionalNet(7))


def plain(num_classes=5):
    """A network whose BatchNorms keep no statistics."""
    model = FunctionalNet(num_classes)
    model.bn1 = model.bn2 = model.bn3 = nn.Identity()
    return model
