"""Several processes for one run, as torchrun starts them:  torchrun --nproc_per_node=2 gdfq.py ...

In mixmix.py each process makes batches of its own. In the scripts with a generator the processes share every batch: each of N
processes computes --batch-size / N of its images, and all of them take the step that one process would take:

    random numbers               every process draws those of the whole batch and keeps its own rows
    BatchNorm in training mode,  means and variances are those of the whole batch; gradients flow to all processes
      BNS losses
    activation ranges            the extremes of the whole batch, or the result of a search in a sample of the whole batch
    --mix, H' of AdaDFQ          partners and the smallest entropy are found in the whole batch
    gradients                    are averaged over the processes before an optimizer steps (`Run.update`)
    losses in metrics.jsonl      are averaged over the processes, once an epoch

In exact arithmetic, N processes and one take the same step. In floating point the order of the sums differs, and
quantization amplifies the difference within a few steps, as it does for another number of threads. There is one exception:
with --data-source confusing or unconfusing, half of each process's share is real, not half of the batch. Parameters, ranges
and random states are the same in all processes, bit for bit, so that a run can be resumed with another number of processes.

Only the first process (rank 0) has the run folder, evaluates, prints and writes; the others wait for it at the next exchange.
Exchanges use gloo on a CPU and NCCL on CUDA, where CUDA graphs can hold them (not run on a GPU yet). --capture compile
is refused.
"""

import atexit
import os
import signal
import sys
import time
from contextlib import ContextDecorator, contextmanager
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

from common import InputError, first_line

GRACE = 10  # seconds in which torchrun ends all processes when one has ended with an error
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # the variables it sets in each process
DRAWS = (torch.rand, torch.randn, torch.randint)

rank, size = 0, 1  # of this process, and of those that share the run's batches
sharing = False  # whether a step is being computed in which they do


class Unreachable(InputError):
    """An exchange has failed: most likely another process has ended, and has said why."""


# ------------------------------------------------------------------------------------------------ joining and waiting


def started():
    """How many processes torchrun has started; 1 without it, even where a cluster has set some of its variables."""
    return int(os.environ["WORLD_SIZE"]) if TORCHRUN <= os.environ.keys() else 1


def is_first():
    """Whether this is the first process, which reports for all of them."""
    return started() == 1 or os.environ["RANK"] == "0"


def join(cfg, gpus_exchange=False):
    """Join the processes that torchrun has started, each on a GPU of its own.

    Args:
        cfg: parsed arguments; `device` becomes this process's GPU.
        gpus_exchange: whether they exchange tensors that are on GPUs.

    Returns:
        (rank, number of processes); None for one process alone.

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    if (count := started()) == 1:
        return None
    if torch.cuda.is_available() and cfg.device in ("auto", "cuda"):
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
        if here > there:
            advice = f"give --nproc_per_node {there}, or --device cuda:0 if each process sees a GPU of its own, or --device cpu"
            raise InputError(f"torchrun starts {here} processes on this machine, which has {there} GPU(s); {advice}")
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
    nccl = gpus_exchange and cfg.device.startswith("cuda") and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=30))  # the first may evaluate for as long as it takes
    if not nccl:  # which waits in vain for processes that have failed
        atexit.register(_end)  # before the interpreter ends: gloo's threads, if they are still there, abort the process
    return int(os.environ["RANK"]), count


def share_batches(cfg):
    """Join the processes that torchrun has started, where they are to compute each step of a run together.

    Raises:
        InputError: they cannot have equal parts of --batch-size, or --capture cannot hold what they exchange.
    """
    global rank, size
    if (count := started()) == 1:
        return
    if cfg.batch_size % count:
        advice = f"which share each batch; give a multiple of {count}"
        raise InputError(f"--batch-size is {cfg.batch_size} and torchrun starts {count} processes, {advice}")
    if cfg.capture == "compile":
        raise InputError("--capture compile works in one process, and torchrun starts several; give auto, none or cudagraph")
    rank, size = join(cfg, gpus_exchange=True)
    if cfg.capture == "auto":
        cfg.capture = "cudagraph" if cfg.device.startswith("cuda") else "none"
    if rank:
        sys.stdout = open(os.devnull, "w")


def together():
    """Whether there are several processes, which can wait for each other."""
    return dist.is_available() and dist.is_initialized()


def _end():
    """End the communication of this process, unless it has ended."""
    if together():
        dist.destroy_process_group()


def wait_for_all():
    """Return when all processes are here."""
    if together():
        add_up(torch.zeros(()))


@contextmanager
def first_before_others():
    """Context manager: the first process finishes before the others begin."""
    if rank:
        wait_for_all()
    yield
    if size > 1 and rank == 0:
        wait_for_all()


def leave():
    """Wait for all processes and end their communication. True in the first one, which continues alone."""
    global size
    if size > 1:
        wait_for_all()
        _end()
        size = 1
    return rank == 0


def let_another_speak(error):
    """Wait before this process reports `error`: if another one reports the cause, torchrun ends this one in the meantime."""
    if not is_first() or isinstance(error, Unreachable):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE)


# ---------------------------------------------------------------------------------------------------------- exchanges


def exchange(function, *args, **kwargs):
    """Call a function of torch.distributed.

    Raises:
        Unreachable: it failed.
    """
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        advice = "if another process has exited, see its error, then repeat the command with --resume"
        raise Unreachable(f"the processes of torchrun cannot communicate ({first_line(error)}); {advice}") from error


def add_up(tensor):
    """Replace a tensor by its sum over the processes, and return it."""
    exchange(dist.all_reduce, tensor)
    return tensor


def average(tensors):
    """Replace tensors, of an iterable, by their means over the processes, all at once."""
    if size > 1:
        tensors = list(tensors)
        flat = add_up(torch.cat([tensor.flatten() for tensor in tensors])).div_(size)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view(tensor.shape))


def from_first(value):
    """The first process's `value`, which can be pickled, in all of them."""
    values = [value]
    if size > 1:
        exchange(dist.broadcast_object_list, values, src=0, device=torch.device("cpu"))
    return values[0]


# ------------------------------------------------------------------------- what a step needs to know of the whole batch


class _Whole(torch.autograd.Function):
    """The rows of all processes. The gradient of a row, to which all of them have contributed, goes to the one it is from."""

    @staticmethod
    def forward(ctx, x):
        rows = x.new_zeros(size * len(x), *x.shape[1:])
        own(rows).copy_(x)
        return add_up(rows)

    @staticmethod
    def backward(ctx, grad):
        return own(add_up(grad.clone(memory_format=torch.contiguous_format)))


def whole_batch(x):
    """The rows of the whole batch (B, ...), of which this process has x (B / N, ...), floating point; with a graph to all."""
    return _Whole.apply(x) if sharing else x


def own(x):
    """This process's rows of x (B, ...)."""
    return x.tensor_split(size)[rank] if sharing else x


def whole_moments(mean, variance):
    """Mean and biased variance over the whole batch from those over this process's part, tensors of one shape."""
    if not sharing:
        return mean, variance
    means, variances = whole_batch(torch.stack([mean, variance])[None]).unbind(1)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


def whole_extremes(low, high):
    """Extremes of the whole batch from those of this process's part, scalars."""
    return (whole_batch(low[None]).amin(), whole_batch(high[None]).amax()) if sharing else (low, high)


def sample(values, count):
    """Float32 (count,) of the whole batch's values, of which this process has `values` (n,); the same in all processes."""
    if not sharing:
        return values[torch.randint(len(values), (count,), device=values.device)].float()
    index = torch.empty(count, dtype=torch.int64, device=values.device).random_(size * len(values)) - rank * len(values)
    here = (index >= 0) & (index < len(values))
    return add_up(torch.where(here, values[index.clamp(0, len(values) - 1)].float(), 0))


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=True, momentum=0.1, eps=1e-5):
    """`F.batch_norm` in training, by the statistics of the whole batch."""
    dims, shape = [d for d in range(x.ndim) if d != 1], [-1] + [1] * (x.ndim - 2)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = values.mean(dims)
    mean, variance = whole_moments(mean, (values - mean.view(shape)).square().mean(dims))
    if running_mean is not None:
        count = size * x.numel() / x.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (count / (count - 1)), momentum)
    scale = (variance + eps).rsqrt()
    y = (values - mean.view(shape)) * (scale if weight is None else scale * weight).view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


class WholeBatch(TorchFunctionMode, ContextDecorator):
    """Context manager for a step that the processes share: random draws give this process its rows of what one process alone
    would draw, and BatchNorm in training mode sees the whole batch.

    A tensor drawn with `batch_size` rows belongs to the whole batch. With any other number of rows it belongs to a part, and N
    times as many are drawn. Scalars, and tensors filled in place, are the same in all processes.
    """

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def __enter__(self):
        global sharing
        sharing = True
        return super().__enter__()

    def __exit__(self, *error):
        global sharing
        sharing = False
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.batch_norm and kwargs["training"]:
            return batch_norm(*args, **kwargs)
        if function in DRAWS:
            *limits, shape = args if isinstance(args[-1], (tuple, list)) else [args]
            if len(shape):
                rows = shape[0] if shape[0] == self.batch_size else size * shape[0]
                return own(function(*limits, (rows, *shape[1:]), **kwargs))
        return function(*args, **kwargs)
