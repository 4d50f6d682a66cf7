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


class Auxiliary(FunctionalNet):
    """A second classifier that only training uses, as GoogLeNet's."""

    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


def auxiliary(num_classes=5):
    return trained(Auxiliary(num_classes))


class Inverted(nn.Module):
    """Inverted residuals with linear bottlenecks, one of stride 2, one with a residual sum."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.stem, self.down, self.same, self.head = self.conv(3, 8, 3, 2), self.block(2), self.block(1), self.conv(8, 12)
        self.fc = nn.Linear(12, num_classes)

    @staticmethod
    def conv(inputs, outputs, kernel=1, stride=1, groups=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))

    def block(self, stride):
        return nn.Sequential(self.conv(8, 16), self.conv(16, 16, 3, stride, 16), *self.conv(16, 8)[:2])

    def forward(self, x):
        x = self.down(self.stem(x))
        return self.fc(self.head(x + self.same(x)).mean((2, 3)))


def inverted(num_classes=5):
    torch.manual_seed(1)
    return trained(Inverted(num_classes))


def seven():
    return trained(FunctionalNet(7))


def plain(num_classes=5):
    """A network whose BatchNorms keep no statistics."""
    model = FunctionalNet(num_classes)
    model.bn1 = model.bn2 = model.bn3 = nn.Identity()
    return model
