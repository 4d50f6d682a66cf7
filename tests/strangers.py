"""Networks as strangers write them: each has something that published code often has and quantization code often trips over."""

import warnings

import torch
import torch.nn.functional as F
from conftest import trained
from torch import nn


def conv_bn(channels_in, channels_out, size=3, stride=1, groups=1, dilation=1):
    padding = dilation * (size // 2)
    conv = nn.Conv2d(channels_in, channels_out, size, stride, padding, dilation, groups, bias=False)
    return conv, nn.BatchNorm2d(channels_out)


class ViewAndFeatureFlags(nn.Module):
    """A functional ResNet: `view` of a map larger than 1x1, arguments for knowledge distillation, the dtype of a weight."""

    def __init__(self, num_classes=5):
        super().__init__()
        (self.conv1, self.bn1), (self.conv2, self.bn2) = conv_bn(3, 8, stride=2), conv_bn(8, 8)
        self.fc = nn.Linear(8 * 4 * 4, num_classes)

    def forward(self, x, is_feat=False, use_relu=True, *unused, **others):
        x = F.relu(self.bn1(self.conv1(x.to(self.fc.weight.dtype))))
        features = self.bn2(self.conv2(x)) + x
        if use_relu:
            features = F.relu(features)
        out = F.avg_pool2d(features, 2)
        out = out.view(out.size(0), -1)
        return (features, self.fc(out)) if is_feat else self.fc(out)


class DeadActivation(nn.Module):
    """The result of one activation is overwritten before it is used."""

    def __init__(self, num_classes=5):
        super().__init__()
        (self.conv1, self.bn1), (self.conv2, self.bn2) = conv_bn(3, 8, stride=2), conv_bn(8, 8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(x)))
        out = self.bn2(self.conv2(x))
        return self.fc(F.relu(out + x).mean((2, 3)))


class ShuffleArithmetic(nn.Module):
    """Channel counts computed in forward, an assertion and a branch on shapes, channels shuffled by view and transpose."""

    def __init__(self, num_classes=5, ratio=0.5):
        super().__init__()
        self.ratio, (self.stem, self.bn0) = ratio, conv_bn(3, 16, stride=2)
        (self.conv1, self.bn1), (self.conv2, self.bn2) = conv_bn(8, 8, 1), conv_bn(8, 8, groups=8)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        assert x.dim() == 4 and x.shape[0] > 0, "images come in batches"
        x = F.relu(self.bn0(self.stem(x)))
        if x.size(2) != x.size(3):
            raise ValueError("square images only")
        kept = int(x.size(1) * self.ratio)
        left, right = x[:, :kept], x[:, kept:]
        right = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(right))))))
        x = torch.cat([left, right], 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c))


class GroupedAndDilated(nn.Module):
    """ResNeXt's grouped convolution, a dilated one, a training flag in forward, dropout as a function of it."""

    def __init__(self, num_classes=5):
        super().__init__()
        first, second = conv_bn(3, 8, stride=2), conv_bn(8, 8, groups=4)
        self.layers = nn.Sequential(*first, nn.ReLU(inplace=True), *second, nn.ReLU(inplace=True))
        self.conv, self.bn = conv_bn(8, 8, dilation=2)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.layers(x)
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        x = F.dropout(x.mean((2, 3)), 0.5, self.training)
        return self.fc(x) if self.training or x.ndim == 2 else x


class SqueezeAndExcitation(nn.Module):
    """EfficientNet's gates, SiLU written out."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8, stride=2)
        self.conv2, self.bn2 = conv_bn(8, 8, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.silu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = x * torch.sigmoid(x)
        gates = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.fc((x * torch.sigmoid(gates)).mean([2, 3]))


class GreyDigits(nn.Module):
    """28x28 grey images, seven classes, a fully connected layer after flattening."""

    def __init__(self, num_classes=7):
        super().__init__()
        self.features = nn.Sequential(*conv_bn(1, 8), nn.ReLU(), nn.MaxPool2d(2), *conv_bn(8, 8), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(8 * 49, 16), nn.ReLU(), nn.Linear(16, num_classes))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.view(-1, 8 * 7 * 7))


class SamePadding(nn.Conv2d):
    """Pads by itself, as TensorFlow does; the padding is computed from the image."""

    def forward(self, x):
        height, width = x.shape[-2:]
        pads = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip((width, height), self.stride, self.kernel_size)]
        x = F.pad(x, [pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardisedWeights(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019)."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class Classifier(nn.Linear):
    """A subclass that does what its base does."""

    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class LayersOfTheirOwn(nn.Module):
    """Subclasses of Conv2d and Linear with a forward of their own."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.bn1 = SamePadding(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = StandardisedWeights(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.act, self.fc = nn.ReLU6(), Classifier(8, num_classes)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        return self.fc(self.act(self.bn2(self.conv2(x))).mean((-2, -1)))


class PreActivation(nn.Module):
    """Residual blocks that begin with BatchNorm, in-place ReLU modules."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.bn3, self.relu1, self.relu2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x))))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.bn3(x)), (1, 1)), start_dim=1))


class DenseConnections(nn.Module):
    """Every layer sees all layers before it."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False) for i in range(2))
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs):
            features.append(conv(F.relu(norm(torch.cat(features, dim=1)))))
        x = F.relu(self.norms[-1](torch.cat(features, 1)))
        return self.fc(x.mean(dim=(2, 3)))


class SharedReLU(nn.Module):
    """One ReLU module for all places."""

    def __init__(self, num_classes=5):
        super().__init__()
        (self.conv1, self.bn1), (self.conv2, self.bn2) = conv_bn(3, 8, stride=2), conv_bn(8, 8)
        self.relu, self.pool, self.fc = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.pool(x).flatten(1))


class ShortcutOfZeros(nn.Module):
    """Channels of zeros made in forward, an assignment to a slice, `len` of a batch, keywords, old-style weight norm."""

    def __init__(self, num_classes=5):
        super().__init__()
        (self.conv1, self.bn1), (self.conv2, self.bn2) = conv_bn(3, 8, stride=2), conv_bn(8, 16, stride=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # old, and still in many repositories
            self.conv2 = nn.utils.weight_norm(self.conv2)
        self.fc = nn.Linear(16 * 4 * 4, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(input=self.conv1(input=x)))
        shortcut = x[:, :, ::2, ::2]
        padding = torch.zeros(x.size(0), 8, shortcut.size(2), shortcut.size(3), device=x.device)
        out = self.bn2(self.conv2(x)) + torch.cat((shortcut, padding), dim=1)
        out[:, :2] = 0.5 * out[:, :2]
        return self.fc(F.relu(out).view(len(x), -1))


class ScaledConvolution(nn.Conv2d):
    """A convolution with a parameter of its own, in the method that Conv2d leaves to its subclasses."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def _conv_forward(self, x, weight, bias):
        return self.scale * super()._conv_forward(x, weight, bias)


class WrittenOutActivations(nn.Module):
    """Swish, hard swish and Mish by their formulas, a clamp, a convolution with a scale."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.bn1 = ScaledConvolution(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        (self.conv2, self.bn2), (self.conv3, self.bn3) = conv_bn(8, 8), conv_bn(8, 8)
        (self.conv4, self.bn4), self.sigmoid, self.fc = conv_bn(8, 8), nn.Sigmoid(), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = x * self.sigmoid(x)
        x = self.bn2(self.conv2(x))
        x = x * F.relu6(x + 3.0) / 6.0
        x = self.bn3(self.conv3(x))
        x = x * torch.tanh(F.softplus(x))
        return self.fc(self.bn4(self.conv4(x)).clamp(min=0).mean((2, 3)))


class BatchNormWithActivation(nn.BatchNorm2d):
    """A BatchNorm that applies its activation, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(x)


class FusedNorms(nn.Module):
    """BatchNorm subclasses; data that a branch looks at only in training."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), BatchNormWithActivation(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), BatchNormWithActivation(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        if self.training and torch.isnan(x).any():
            raise ValueError("NaN")
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x)) + x
        return self.fc(x.mean((2, 3)))


class WorksInPlace(nn.Module):
    """Values are overwritten by a module, a method, an index and an operator; the images are normalised inside."""

    def __init__(self, num_classes=5):
        super().__init__()
        (self.conv1, self.bn1), (self.conv2, self.bn2) = conv_bn(3, 8, stride=2), conv_bn(8, 8)
        self.conv3, self.bn3 = conv_bn(8, 8)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1((x - 0.1) / 0.5)))
        y = self.bn2(self.conv2(x))
        y.add_(x)
        y[:, :2] = 0.5
        z = self.bn3(self.conv3(y))
        z += y
        return self.fc(self.relu(z).mean((2, 3)))


FAMILY = {
    cls.__name__: cls
    for cls in (
        ViewAndFeatureFlags, DeadActivation, ShuffleArithmetic, GroupedAndDilated, SqueezeAndExcitation, GreyDigits,
        LayersOfTheirOwn, PreActivation, DenseConnections, SharedReLU, FusedNorms, ShortcutOfZeros, WrittenOutActivations,
        WorksInPlace,
    )
}  # fmt: skip


def data_of(name):
    """Settings of a network's data: classes, image size, channels."""
    return (7, 28, 1) if name == "GreyDigits" else (5, 16, 3)


def make(name):
    """A network of the family with BatchNorm statistics, in eval mode."""
    torch.manual_seed(1)
    _, size, channels = data_of(name)
    return trained(FAMILY[name](), size, steps=3, channels=channels)
