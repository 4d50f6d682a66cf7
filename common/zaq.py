"""What Qimera (Table 3) takes from ZAQ, Zero-shot Adversarial Quantization (Liu et al., CVPR 2021).

The generator looks for images on which the quantized network (the student, Q) differs from the full-precision one (the
teacher, P), in its logits (L_o) and in its feature maps (L_f), and which activate P (L_a). Q learns to agree with P on them.
Qimera gives the game in two lines (Eq. 11, 12), so there are two forms of it:

    what                       zaq: ZAQ's released code             zaq-paper: Eq. 11 and 12, the rest chosen here
    beta, gamma                1, 0.1                               0.1, 0.05
    L_f                        L1 distance of the maps plus a       L1 distance of the cosines between channels, mean over
                               tenth of their self-attention over   the stages
                               the pixels, and the same over the
                               channels; sum over the stages
    L_a                        of the last stage                    of the last stage
    student, mode              BatchNorm in train mode              statistics fixed, as in Qimera
    student, SGD               rate 0.1, decay 5e-4, plain          Qimera's, Nesterov
                               momentum
    student, steps             five for one of the generator        one for one
    generator's Adam, beta1    0.9                                  Qimera's
    epochs, iterations, batch  300, 60, 256                         Qimera's
    warm-up                    none                                 Qimera's
    activation ranges          follow the images throughout         fixed after the first epochs, as in Qimera

ZAQ's code differs from both in these points:

    what                       ZAQ's code                           here
    activation ranges          extremes of all images so far        moving average of each batch's extremes
    order of the steps         the student's, then the              the generator's, whose batch the student's first step
                               generator's, all on new images       takes, too
    stages                     outputs of stages: three of          the last map that the student quantizes at each of the
                               ResNet-20, four of other ResNets     three lowest resolutions above one pixel, in any network
    a pixel's vector is        its length                           its length, at least 1e-3, which bounds the gradient
      divided by

On 32x32 maps the self-attention over 1,024 pixels takes most of a step's time, and some GB at batch 256: `zaq` is for a GPU.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError
from common.quant import quantize, quantized_activations, quantized_layers

FORMS = ("zaq", "zaq-paper")  # values of --adversarial
STAGES = 3
EPS = 1e-3  # vectors of maps that are shorter are divided by this instead of their length


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


def relations(features):
    """Maps (B, c, h, w), the vector of each pixel of length 1, plus a tenth of their self-attention: over the pixels, which
    adds those that are alike, and over the channels, which adds those that are not. Both (B, c, h * w)."""
    x = F.normalize(features, dim=1, eps=EPS).flatten(2)
    pixels = x.transpose(1, 2)
    alike = F.scaled_dot_product_attention(pixels, pixels, pixels, scale=1.0).transpose(1, 2)  # x softmax(x'x)'
    unlike = F.scaled_dot_product_attention(-x, x, x, scale=1.0)  # softmax(-xx') x
    return x + 0.1 * alike, x + 0.1 * unlike


def channel_cosines(features):
    """Cosines (B, c, c) between the channels of maps (B, c, h, w); those of a channel close to zero are close to zero."""
    channels = F.normalize(features.flatten(2), dim=2, eps=EPS)
    return channels @ channels.transpose(1, 2)


def feature_distance(of_teacher, of_student, form):
    """-L_f of the maps that `FeatureMaps.stages` returns, for one of FORMS: a scalar, at least 0."""
    pairs = list(zip(of_teacher, of_student))
    if form == "zaq-paper":
        return torch.stack([F.l1_loss(channel_cosines(p), channel_cosines(q)) for p, q in pairs]).mean()
    return torch.stack([F.l1_loss(*both) for p, q in pairs for both in zip(relations(p), relations(q))]).sum()
