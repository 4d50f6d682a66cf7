"""Checks that every network must pass before anything is done with it; an error says what to change."""

import torch
from torch import nn

from common import InputError, first_line
from common.trace import batch_like, nearly_equal


def refuse_infinite(model, what):
    """Raise an InputError where a network has weights or statistics that are not finite, has none yet or cannot be changed;
    `what` is what the error calls it."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{what} is a TorchScript module, which cannot be changed; give the nn.Module that it was made from")
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if lazy := [name for name, value in values.items() if torch.nn.parameter.is_lazy(value)]:
        advice = "call it once on a batch of images before it is given"
        raise InputError(f"{what} has '{lazy[0]}' of a lazy layer, which has no values yet; {advice}")
    odd = [name for name, value in model.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    if odd:
        raise InputError(f"{what} has values in '{odd[0]}' that are not finite; give other weights")


def input_channels(model):
    """Image channels that `model` expects, read off its first convolution."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


def probe(model, num_classes, image_size):
    """A small batch of zeros that `model` turns into logits.

    Raises:
        InputError: the model fails on it, returns anything but (2, num_classes) logits, other than one row for a single image,
            its output is not deterministic, or it changes its input.
    """
    device = next(model.parameters()).device
    example = torch.zeros(2, input_channels(model), image_size, image_size, device=device)
    images = batch_like(example, 2)
    try:
        with torch.no_grad():
            logits, once, again = model(example), model(images.clone()), model(given := images.clone())
            alone = tuple(getattr(model(images[:1]), "shape", ()))
    except Exception as error:  # whatever the model's own code raises
        raise InputError(
            f"the model fails on a batch of shape {tuple(example.shape)} ({first_line(error)}); check --image-size and "
            "--arch, and that the convolution which takes the images is the first one that is defined"
        ) from error
    if not isinstance(logits, torch.Tensor):
        what = f"the model returns a {type(logits).__name__}, expected logits (2, {num_classes}) for 2 images"
        raise InputError(f"{what}; wrap it in a module whose forward returns the logits alone")
    if (shape := tuple(logits.shape)) != (2, num_classes):
        raise InputError(f"the model returns {shape} for 2 images, expected (2, {num_classes}); check --num-classes and --arch")
    if alone != (1, num_classes):
        what = f"the model returns {alone} for a single image, expected (1, {num_classes})"
        raise InputError(f"{what}; write x.flatten(1) instead of x.squeeze()")
    if again.min() >= 0 and (again.sum(1) - 1).abs().max() < 1e-3:
        raise InputError("the model returns probabilities; let it return the logits, without softmax")
    if not nearly_equal(again, once):
        advice = "pass training=self.training to F.dropout, and draw no random numbers in eval mode"
        raise InputError(f"the model's output is not deterministic in eval mode; {advice}")
    if given._version:  # which every step in place on the tensor or on a view of it raises
        advice = "write x = x * 2 instead of x.mul_(2), or inplace=False"
        raise InputError(f"the model changes its input in place, which is used again afterwards; {advice}")
    return example


def refuse_undifferentiable(model, example):
    """Raise an InputError where images cannot be made by the gradients of `model`, which takes batches like `example`."""
    why = "no gradient reaches them"
    with torch.enable_grad():
        images = batch_like(example, 2).requires_grad_()
        try:
            if torch.autograd.grad(model(images).sum(), images, allow_unused=True)[0] is not None:
                return
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "inplace" in str(error):
                why = "a value that they need is overwritten in place"
            elif "does not require grad" not in str(error):
                why = first_line(error)
    advice = "remove torch.no_grad(), detach() and in-place steps on values that are used again from its forward"
    raise InputError(f"images cannot be optimised through the model ({why}); {advice}")
