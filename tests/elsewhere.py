"""A second device for a machine that has none: its tensors hold CPU data, but do not mix with the host's, and it has graphs.

Its name is "meta", a device that PyTorch knows everywhere. It computes what the CPU computes, from the CPU's random numbers,
and notes each time the host reads from it, where a GPU would have to be waited for. A graph captures as a CUDA graph does:
nothing is computed then, each replay computes everything anew from and into the same memory, and what Python did in between
is not repeated.
"""

import sys
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import common.device

READ = "_local_scalar_dense"  # what .item() calls


class Elsewhere(torch.Tensor):
    """A tensor of the second device around its data."""

    is_cuda = True  # so that what was written for a GPU runs
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data):
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, **layout, device="meta")

    def __init__(self, data):
        self.data_on_host = data

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called when the device was gone")


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Device(TorchDispatchMode):
    """While it is entered, tensors on "meta" have values. `reads` counts how often the host read one."""

    def __init__(self):
        super().__init__()
        self.reads, self.graph = 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given, name = tensors((args, kwargs)), function.overloadpacket.__name__
        here = [tensor for tensor in given if isinstance(tensor, Elsewhere)]
        target = torch.device(kwargs.get("device") or "cpu").type
        if not here and target == "cpu":
            return function(*args, **kwargs)
        copies_in, moves = name == "copy_", name == "_to_copy" and kwargs.get("device")
        reads = name == READ or (copies_in and not isinstance(args[0], Elsewhere)) or (moves and target == "cpu")
        assert copies_in or moves or len(here) == len(given), f"{function} of tensors on both devices"
        args_on_host, kwargs_on_host = tree_map_only(Elsewhere, lambda tensor: tensor.data_on_host, (args, kwargs))
        if "device" in kwargs:
            kwargs_on_host["device"] = torch.device("cpu")
        if self.graph is None:
            result = function(*args_on_host, **kwargs_on_host)
        else:
            self.graph.broken = reads or len(here) != len(given)
            assert not self.graph.broken, f"{function} of host and device cannot be captured"
            result = self.graph.capture(function, args_on_host, kwargs_on_host)
        if reads:
            self.reads += 1
            return args[0] if copies_in else result
        result = tree_map_only(torch.Tensor, Elsewhere, result)
        return return_and_correct_aliasing(function, args, kwargs, result) if here and name != "_to_copy" else result


class Graph:
    """What torch.cuda.CUDAGraph is to a GPU."""

    def __init__(self):
        self.calls, self.before, self.broken = [], {}, False

    def capture(self, function, args, kwargs):
        """Remember a call. It is computed to know its result's shape; memory is put back as it was by `end`."""
        for tensor in tensors((args, kwargs)):
            memory = tensor.untyped_storage()
            self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        old = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        result = function(*args, **kwargs)
        new = [(place, out) for place, out in enumerate(tensors(result)) if out.untyped_storage().data_ptr() not in old]
        self.calls.append((function, args, kwargs, new))
        return result

    def end(self):
        for memory, content in self.before.values():
            memory.copy_(content)
        self.before.clear()
        assert not self.broken, "a previous error during capture"  # all that the end of one says

    def replay(self):
        for function, args, kwargs, new in self.calls:
            values = tensors(function(*args, **kwargs))
            for place, out in new:
                out.copy_(values[place])


class Stream:
    def wait_stream(self, other):
        pass


@contextmanager
def second_device(monkeypatch):
    """The device, there while the context lasts; PyTorch's CUDA graphs are its graphs. Computes in float32."""

    @contextmanager
    def captured(graph, stream):
        random, device.graph = torch.get_rng_state(), graph
        yield
        device.graph = None
        torch.set_rng_state(random)
        graph.end()

    new_tensor = torch.tensor
    with monkeypatch.context() as patch:
        for name, value in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph": captured}.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda, "stream", nullcontext)
        patch.setattr(common.device, "DEVICES", ("meta",))
        patch.setattr(torch.cuda, "current_device", lambda: "meta")
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know this device
        patch.setattr(torch, "tensor", lambda data, *, device="cpu", **kw: new_tensor(data, **kw).to(device))  # nor does it
        for module, kernels in (("optimizer", "fused_kernels"), ("adam", "capturable")):  # optimizers that are not for a CPU
            patch.setattr(sys.modules[f"torch.optim.{module}"], f"_get_{kernels}_supported_devices", lambda *_: ["meta"])
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with Device() as device:
                yield device
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
