"""What Qimera (Table 3) takes from ZAQ, Zero-shot Adversarial Quantization (Liu et al., CVPR 2021).

The generator looks for images on which the quantized network (the student, Q) differs from the full-precision one (the
teacher, P), in its logits (L_o) and in its feature maps (L_f), and which activate P (L_a). Q learns to agree with P on them.
Qimera gives the game in two lines (Eq. 11, 12), so there are two forms of it:

    what                       zaq: ZAQ's released code             zaq-paper: Eq. 11 and 12 as printed, the rest chosen here
    beta, gamma                1, 0.1                               0.1, 0.05
    L_f                        distance of spatial and of channel   distance of channel attention, mean over the stages
                               attention, sum over the stages
    student, mode              BatchNorm in train mode              statistics fixed, as in Qimera
    student, rate and weight   0.1, 5e-4                            Qimera's
      decay
    student, steps             five for one of the generator        one for one
    epochs, iterations, batch  300, 60, 256                         Qimera's
    warm-up                    none, chosen here                    Qimera's
    activation ranges          follow the images for 300 epochs     fixed after the first epochs, as in Qimera
                               (chosen here: the rate is high)

Chosen here for both, since ZAQ's paper was not at hand:

- The rest is Qimera's: the generator's rate, decay of both rates by 10 after 100 and 200 epochs, momentum.
- Stages are told apart by resolution, in any network: the output of a stage is the last map that the student quantizes at each
  of the three lowest resolutions above one pixel. In a ResNet it is what the last ReLU of a stage returns. L_a takes the last.
- Spatial attention is the mean over the channels of the squared map, of length 1 (Zagoruyko and Komodakis, ICLR 2017),
  compared by squared distance; channel attention is the cosines between channels, compared by absolute difference.
- The student's first step takes the generator's batch, its further steps take new images.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError
from common.quant import quantize, quantized_activations, quantized_layers

FORMS = ("zaq", "zaq-paper")  # values of --adversarial
STAGES = 3


class FeatureMaps:
    """Hooks that keep the outputs of the last stages of both networks, in passes with gradients enabled.

    `teacher` is the network to compute with in the teacher's place: it has an Identity wherever the student has a quantizer.

    Args:
        teacher, student: the full-precision network, and what `quantize` has made of it.
        act_placement: of the student.
        example: a batch that they take.

    Raises:
        InputError: the student quantizes no feature map.
    """

    def __init__(self, teacher, student, act_placement, example):
        self.teacher = quantize(teacher, 8, 8, act_placement, example=example).requires_grad_(False)
        for _, layer in quantized_layers(self.teacher):
            layer.packed = True  # its weights are used as they are
        self.kept = {}, {}
        for name, quantizer in quantized_activations(student):
            self.teacher.set_submodule(name, identity := nn.Identity())
            for module, maps in zip((identity, quantizer), self.kept):
                module.register_forward_hook(self._keep_in(maps))
        self.teacher(example)
        if not self.kept[0]:
            raise InputError("the model computes no feature map that --adversarial could compare; leave the flag out")
        self.clear()

    @staticmethod
    def _keep_in(maps):
        def keep(module, args, output):
            pixels = output.shape[2] * output.shape[3] if output.ndim == 4 else 1
            if pixels > 1 and torch.is_grad_enabled():  # an evaluation's would take its memory
                maps[pixels] = output  # later ones of the same resolution replace it

        return keep

    def stages(self):
        """Two lists of maps (B, c, h, w) float32, the teacher's and the student's; the lowest resolution comes last."""
        sizes = sorted(self.kept[0], reverse=True)[-STAGES:]
        return [[maps[size].float() for size in sizes] for maps in self.kept]

    def clear(self):
        """Let go of the maps, and so of the graph that they belong to."""
        for maps in self.kept:
            maps.clear()


def spatial_attention(features):
    """(B, h * w), of length 1 for each image, of maps (B, c, h, w)."""
    return F.normalize(features.square().mean(1).flatten(1))


def channel_attention(features):
    """Cosines (B, c, c) between the channels of maps (B, c, h, w); those of a channel close to zero are close to zero."""
    channels = F.normalize(features.flatten(2), dim=2, eps=1e-3)
    return channels @ channels.transpose(1, 2)


def feature_distance(of_teacher, of_student, form):
    """-L_f of the maps that `FeatureMaps.stages` returns, for one of FORMS: a scalar, at least 0."""
    pairs = list(zip(of_teacher, of_student))
    channel = torch.stack([F.l1_loss(channel_attention(p), channel_attention(q)) for p, q in pairs])
    if form == "zaq-paper":
        return channel.mean()
    spatial = [(spatial_attention(p) - spatial_attention(q)).square().sum(1).mean() for p, q in pairs]
    return torch.stack(spatial).sum() + channel.sum()
