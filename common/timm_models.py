"""timm's networks as --arch timm:NAME, with what their configurations state. timm is optional (requirements-extra.txt)."""

import difflib
from pathlib import Path

from common import InputError


def is_timm(arch):
    """Whether an --arch is a network of timm."""
    return arch.startswith("timm:")


def _find(arch):
    """timm, and the name and the configuration of its network `arch`, "timm:NAME"; NAME may end in a tag of pretrained weights.

    Raises:
        InputError: timm is not installed, or has no such network.
    """
    name = arch.removeprefix("timm:")
    try:
        import timm
    except ImportError:
        raise InputError(f"--arch {arch} needs timm, which is not installed; pip install -r requirements-extra.txt") from None
    try:
        return timm, name, timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # a name or a tag that timm does not know
        known = [*timm.list_pretrained(), *timm.list_models()]
        nearest = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "none"
        raise InputError(f"--arch '{arch}' is not in timm; nearest: {nearest}; give one of those or another") from None


def build(arch, num_classes, state=None):
    """The network, with random weights or with `state`, the dict of tensors that timm has published for it."""
    timm, name, _ = _find(arch)
    if state is None:
        return timm.create_model(name, num_classes=num_classes)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    del model.pretrained_cfg["state_dict"]  # which copies of the network would copy
    return model


def stated(arch):
    """num_classes and image_size, a dict, as a timm network's configuration has them; nothing for others."""
    if not is_timm(arch):
        return {}
    config = _find(arch)[2]
    return {"num_classes": config.num_classes, "image_size": config.input_size[-1]}


def normalisation(arch):
    """(mean, std) per channel that the weights were trained with, for images in 0 to 1."""
    config = _find(arch)[2]
    return config.mean, config.std


def full_name(arch):
    """The network's name with the tag of its weights."""
    config = _find(arch)[2]
    return f"{config.architecture}.{config.tag}"


def locate(arch):
    """Address of the pretrained weights, and their path where the Hugging Face cache has them, else None.

    Raises:
        InputError: there are none.
    """
    _, _, config = _find(arch)
    if not config.hf_hub_id:
        if not config.url:
            raise InputError(f"--arch {arch} has no pretrained weights in timm; give --weights FILE")
        return config.url, None
    from huggingface_hub import try_to_load_from_cache  # timm needs it, too

    file = config.hf_hub_filename or "model.safetensors"
    cached = try_to_load_from_cache(config.hf_hub_id, file)
    return f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}", Path(cached) if isinstance(cached, str) else None
