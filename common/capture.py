"""Making a training step fast without changing how it reads: a CUDA graph, torch.compile, or the step as it is."""

import copy
import ctypes
import operator
import os
import shutil
import sysconfig
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch._functorch.config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from common import InputError, first_line

CHOICES = ("auto", "none", "compile", "cudagraph")
WARMUP_STEPS = 3  # run before a graph is captured, so that libraries have chosen their kernels and states exist
# Steps: compiling costs two minutes and saves GDFQ 4 to 70 ms of each, on two cores. Where PyTorch's cache has the code it
# costs 20 s; the threshold ignores that, so that what a command computes does not depend on what ran before it.
WORTH_COMPILING = 10_000
# The backward pass computes cheap things anew from what is stored for it anyway: the compiler would rather store masks of the
# ReLUs, and on a CPU its code for storing booleans takes twenty times as long as the ReLU.
PARTITIONER = {"ban_recompute_used_far_apart": False, "ban_recompute_long_fusible_chains": False}


class RecomputedMasks(CustomGraphPass):
    """Forbids the compiler to store tensors of booleans for the backward pass, except one result among several, such as a
    dropout's mask, which cannot be computed again by itself."""

    def __call__(self, graph):
        for node in graph.nodes:
            value, computed = node.meta.get("val"), node.op == "call_function" and node.target is not operator.getitem
            if computed and isinstance(value, torch.Tensor) and value.dtype is torch.bool and value.ndim:
                node.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}

    def uuid(self):
        """What the compiler's cache knows it by: this file's contents."""
        return get_hash_for_files((__file__,))


# fallback_random: the eager step's random numbers
COMPILER = {"options": {"fallback_random": True, "joint_custom_post_pass": RecomputedMasks()}}


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensors, in huge pages where Linux has them on request. By default, every step
    gives its large tensors back to the system and receives them again page by page, for up to a seventh of its time, and a
    processor that looks up pages of 4 KB takes a tenth longer. Does nothing where there is no glibc."""
    trim_threshold, mmap_max, hugepage, page = -1, -4, 14, 2**21  # parameters of mallopt(3) and madvise(2)
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # tensors of any size from the heap
        libc.mallopt(trim_threshold, -1)  # whose end is never given back
        libc.malloc.restype = ctypes.c_void_p
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        if start := libc.malloc(ctypes.c_size_t(size)):  # addresses only: memory is taken when it is written to
            libc.free(ctypes.c_void_p(start))
            libc.madvise(ctypes.c_void_p(start + -start % page), ctypes.c_size_t(size - page), hugepage)


def compiler(device_type="cpu"):
    """The compiler that torch.compile calls, of C++ for a CPU, of C for a GPU; None where there is none, or where there are no
    headers of Python, which the compiled code includes."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return None
    names = ("CXX", "g++", "clang++") if device_type == "cpu" else ("CC", "gcc", "clang")
    return next((c for c in (os.environ.get(names[0]), *names[1:]) if c and shutil.which(c)), None)


def pick_capture(name, device, steps, worth=WORTH_COMPILING):
    """What --capture means on this machine: "none", "compile" or "cudagraph".

    "auto" is a CUDA graph on CUDA. On a CPU it compiles where a compiler is installed and the run is long enough to earn
    the compilation back. On CUDA, "compile" also captures the compiled step as a graph.

    Args:
        name: one of CHOICES.
        device: torch.device.
        steps: training steps of the whole run.
        worth: how many steps it takes to earn the compilation back.

    Raises:
        InputError: a graph without CUDA, or compilation without a compiler.
    """
    if name == "cudagraph" and device.type != "cuda":
        raise InputError(f"--capture cudagraph needs a CUDA device and this run is on {device}; give auto, none or compile")
    if name == "compile" and not compiler(device.type):
        kind, usual, other = ("C++", "g++", "none") if device.type == "cpu" else ("C", "gcc", "cudagraph")
        what = f"needs a {kind} compiler and Python's headers, and one of them is not installed"
        raise InputError(f"--capture compile {what}; install {usual} and python3-dev, or give {other}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "cudagraph"
    return "compile" if device.type == "cpu" and steps >= worth and compiler() else "none"


def compiled(step, variants=None):
    """`step` through torch.compile, with static shapes. It draws the random numbers that the eager step would draw. `variants`
    is how many compiled forms of it are kept, for other arguments or shapes (default: PyTorch's eight).

    Each phase of a run (calibrating or not, tuning or not) is compiled at its first step and not again; functions under
    `torch.compiler.disable`, such as the optimizers' steps with their changing learning rates, stay as they are.
    """
    step = torch._functorch.config.patch(PARTITIONER)(torch.compile(step, dynamic=False, **COMPILER))
    return step if variants is None else torch._dynamo.config.patch(cache_size_limit=variants)(step)  # torch 2.6's name


class GraphedStep:
    """`step` as one CUDA graph: captured after a few eager steps, replayed from then on.

    Whatever a graph bakes in makes a new one: the step's arguments (phases of the run, such as ranges that still move)
    and the learning rates. Each call is one step; replays advance the device's generator as the eager steps would, so
    both draw the same random numbers.

    Args:
        step: function of hashable arguments that works on tensors of fixed shapes on the current device, without
            reading them on the host, and leaves its losses in `losses`.
        optimizers: those that `step` moves; Adam's are made capturable.
        losses: dict of name -> scalar tensor, filled by each step.

    Calling it raises InputError where the step does what a graph cannot hold.
    """

    streams = {}  # one for each device, since libraries keep a workspace for each stream

    def __init__(self, step, optimizers, losses):
        self.step, self.optimizers, self.losses, self.key = step, optimizers, losses, None

    def groups(self):
        """The optimizers' parameter groups as they are now: a checkpoint that was loaded has brought new ones."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def baked_in(self, args):
        """What a graph of this step would hold as constants."""
        return args, *(group["lr"] for group in self.groups())

    def __call__(self, *args):
        if (key := self.baked_in(args)) != self.key:
            self.key, self.graph, self.warmup = key, None, WARMUP_STEPS
            device = torch.cuda.current_device()
            self.stream = self.streams[device] = self.streams.get(device) or torch.cuda.Stream()
            for group in self.groups():
                if "capturable" in group:
                    group["capturable"] = True
        if self.warmup:
            self.warmup -= 1
            self._on_side_stream(args)
            return
        if self.graph is None:
            self._capture(args)
        self.graph.replay()
        self.losses.update(zip(self.names, self.values.clone()))

    def _on_side_stream(self, args):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # it will be captured
            self.step(*args)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, args):
        self.losses.clear()
        self.graph, failure = torch.cuda.CUDAGraph(), None
        try:
            outside = torch.cuda.stream(torch.cuda.current_stream())  # torch 2.6 does not return from a failed capture's
            with outside, torch.cuda.graph(self.graph, stream=self.stream):  # the one that gradients' accumulators know
                try:
                    self.step(*args)
                    self.names, losses = tuple(self.losses), tuple(self.losses.values())
                    self.values = torch.stack([loss.float() for loss in losses]) if losses else torch.zeros(0)
                except Exception as error:  # whatever a network does that needs the host, such as branching on its data
                    failure = error  # the end of the capture raises a second one, which says less
        except Exception as error:
            failure = failure or error
        if isinstance(failure, torch.OutOfMemoryError):
            raise failure
        if failure:
            reason = f"the step cannot be captured as a CUDA graph ({first_line(failure)})"
            raise InputError(f"{reason}; give --capture none") from failure


class OneForward:
    """The student's logits for the generator's side of an iteration and then for its own, from one forward where that is
    possible and quicker: each side's gradient is taken only with respect to its own parameters.

    A compiled step (--capture compile) makes one for each side once the ranges are frozen: it differentiates its graph as a
    whole, which costs more. The generator's side then goes through a student whose parameters have no gradient.

    Args:
        run: of the method.
        student: the network.
        same_images: whether both sides have the same ones.
    """

    def __init__(self, run, student, same_images=True):
        self.run, self.student, self.same_images = run, student, same_images
        self.splits = run.cfg.capture == "compile"
        self.constant = without_gradients(student) if self.splits else student
        self.shared, self.logits = False, None

    def begin(self, calibrating, tuning):
        """An iteration begins; arguments as `finetune.phases` yields them."""
        self.shared = tuning and self.same_images and (calibrating or not self.splits)
        self.seen_by_generator = self.student if calibrating else self.constant

    def for_generator(self, x):
        """Logits (B, C), with a graph to the images x."""
        logits = self.run.compute(self.seen_by_generator, x)
        self.logits = logits if self.shared else None
        return logits

    def update_generator(self, optimizer, loss):
        """The generator's update, through the logits that `for_generator` has returned."""
        self.run.update(optimizer, loss, keep_graph=self.shared)

    def for_student(self, x):
        """Logits (B, C) of x for the student's update; what both share is used up by it."""
        logits, self.logits = self.logits, None
        return self.run.compute(self.student, x) if logits is None else logits


def without_gradients(network):
    """A copy of a network that has its parameters and buffers in the same memory, the parameters without gradients."""
    instead = {id(buffer): buffer for buffer in network.buffers()}
    for parameter in network.parameters():
        instead[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(network, instead)
