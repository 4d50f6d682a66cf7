"""What computes: the device of --device, its arithmetic, its clock and its memory."""

import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from common import InputError

DEVICES = ("cpu", "cuda")


def pick_device(name):
    """torch.device for --device.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        raise InputError(f"--device is '{name}'; give auto, cpu, cuda or cuda:i")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: the machine has {torch.cuda.device_count()} CUDA device(s); give --device cpu or auto"
        )
    return device


def synchronise(device):
    """Wait until `device` has done what it was given, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor(device):
    """What computes: a GPU's name, or a CPU's widest arithmetic, such as amx_bf16, avx512_bf16 or avx2."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    probes = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    found = (kind for kind, probe in probes.items() if getattr(torch.cpu, probe, lambda: False)())
    return next(found, torch.backends.cpu.get_cpu_capability().lower())


def computes_bf16(device):
    """Whether `device` multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return processor(device).endswith("bf16")


def peak_memory(device):
    """Peak memory in bytes: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    peaks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else []
    if peaks:  # unlike the resource usage, it knows nothing of the process that started this one
        return int(peaks[0].split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory():
    """Bytes of memory that a process may take, what caches files included; 4 GB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return 2**32


@contextmanager
def full_precision():
    """Context manager or decorator in which convolutions and matrix products compute in fp32, even where TF32 is the default of
    a GPU or was set by the caller."""
    if hasattr(torch.backends.cudnn, "conv"):  # since torch 2.9, whose settings refuse to be mixed with the older ones
        operations, name, exact = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), "fp32_precision", "ieee"
    else:
        operations, name, exact = (torch.backends.cudnn, torch.backends.cuda.matmul), "allow_tf32", False
    before = [getattr(operation, name) for operation in operations]
    for operation in operations:
        setattr(operation, name, exact)
    try:
        yield
    finally:
        for operation, value in zip(operations, before):
            setattr(operation, name, value)
