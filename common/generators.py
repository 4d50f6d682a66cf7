"""The generator of GDFQ (Xu et al., ECCV 2020), after ACGAN, where it is not the method: DAFL's, and AutoReCon's controls."""

import torch
import torch.nn.functional as F
from torch import nn

from common.ops import upsample_conv

BN_EPS = 0.8  # of the BatchNorms after convolutions, as in the released code of GDFQ and of DAFL


class HumanDesigned(nn.Module):
    """Noise, and labels where it is told of them, to images.

    Args:
        image_size: side of the images, a multiple of 4.
        channels: of the images.
        latent_dim: length of the noise vector.
        width: channels of the layers; the last one has half of them.
        num_classes: number of labels that enter as an embedding that multiplies the noise; None for none.
        norm: makes a conditional BatchNorm of a number of channels and eps, through which labels enter; None for BatchNorms.
    """

    def __init__(self, image_size, channels, latent_dim, width=128, num_classes=None, norm=None):
        super().__init__()
        self.side, self.conditional, half = image_size // 4, norm is not None, width // 2
        norm = norm or nn.BatchNorm2d
        self.embedding = nn.Embedding(num_classes, latent_dim) if num_classes else None
        self.linear = nn.Linear(latent_dim, width * self.side**2)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, half, 3, padding=1)
        self.conv3 = nn.Conv2d(half, channels, 3, padding=1)
        self.bn0, self.bn1, self.bn2 = norm(width, eps=1e-5), norm(width, eps=BN_EPS), norm(half, eps=BN_EPS)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z, y=None):
        """Images (B, channels, size, size), standardised, for noise z (B, latent_dim) and labels y (B,) int64, if any."""
        label = (y,) if self.conditional else ()
        z = z if self.embedding is None else self.embedding(y) * z
        x = self.bn0(self.linear(z).view(len(z), -1, self.side, self.side), *label)
        x = F.leaky_relu(self.bn1(upsample_conv(x, self.conv1), *label), 0.2)
        x = F.leaky_relu(self.bn2(upsample_conv(x, self.conv2), *label), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))
