"""Milliseconds per iteration of a method, plain against fast, and the arithmetic floor: `python -m common.bench`.

plain   fp32, eager, NCHW, every operation of common.ops as its formula is written, PyTorch's own choice of optimizer kernels
fast    as the script runs by default on this machine (compiled on a CPU), or as --precision and --capture say
floor   the fast step's convolution and matrix FLOPs, divided by the rate this machine reaches on a large convolution

All forms run in one process, in alternating turns, also those of several captures (--capture none compile). Figures are
medians. Peak MB is that of the whole process: for a second capture it includes the first. --json FILE writes the table as a
list of rows.
"""

import argparse
import ctypes
import gc
import importlib
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError
from common.capture import CHOICES, WARMUP_STEPS, compiler, keep_freed_memory
from common.cli import friendly_errors
from common.device import peak_memory, pick_device, synchronise
from common.models import load_teacher
from common.ops import box_mix, channel_statistics, count_flops, plain_forms, soft_labels, superpose
from common.progress import Progress
from common.published import paper_drop
from common.run import Run, write_atomically

METHODS = {  # and what a method needs to be told to have a step at once
    "gdfq": {},
    "qimera": {},
    "adadfq": {},
    "autorecon": {"genotype": "published:resnet20-cifar10"},
}
COLUMNS = ("method", "dataset", "batch_size", "device", "capture", "plain_ms", "fast_ms", "speedup", "floor_ms", "peak_mb")
WARMUP = WARMUP_STEPS  # steps before one is timed: the first compiles, on a GPU the last captures


class Finished(Exception):
    """Raised inside a method's loop to leave it."""


class _FastRun(Run):
    """A run that calibrates for one step, tunes for one step, and leaves that step behind to be repeated."""

    forms = nullcontext

    def reach_full_step(self, method, teacher):
        """Bring `method` to its full step and past its compilation or capture."""
        try:
            with self.forms():
                method.compress(teacher, self.cfg, self)
        except Finished:
            self.seconds_per_step(WARMUP)
        return self

    def capture(self, step, *optimizers):
        fast = super().capture(step, *optimizers)

        def noted(*args):
            self.step = partial(fast, *args)
            self.step()

        return noted

    def steps(self):
        yield 0
        if self.epoch:
            raise Finished

    def seconds_per_step(self, count):
        """Mean over `count` further steps."""
        synchronise(self.device)
        began = time.perf_counter()
        with self.forms():
            for _ in range(count):
                self.step()
        synchronise(self.device)
        return (time.perf_counter() - began) / count


class _PlainRun(_FastRun):
    forms, layout, fused = staticmethod(plain_forms), torch.contiguous_format, None


@cache
def convolution_rate(device, dtype):
    """FLOPs per second of a large 3x3 convolution (128 to 128 channels, 64 images of 32x32), best layout, median of nine."""
    rates, count = [], 20 if device.type == "cuda" else 1  # at a time: a GPU needs less for one than to be waited for
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(128, 128, 3, padding=1, bias=False).to(device, dtype, memory_format=layout)
        x = torch.randn(64, 128, 32, 32, device=device, dtype=dtype).contiguous(memory_format=layout)
        seconds = []
        with torch.no_grad():
            for _ in range(12):
                began = time.perf_counter()
                for _ in range(count):
                    conv(x)
                synchronise(device)
                seconds.append((time.perf_counter() - began) / count)
        rates.append(2 * x.numel() * 128 * 9 / median(seconds[3:]))
    return max(rates)


def reset_peak(device):
    """Start the measurement of peak memory anew; on a CPU where the system allows it (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(AttributeError):  # no glibc, so nothing is kept
            ctypes.CDLL(None).malloc_trim(0)
            keep_freed_memory()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def compare(name, batch_size, args):
    """The rows of a method and a batch size, one for each of `args.capture`."""
    method = importlib.import_module(name)

    def settings(**kw):
        common = {"arch": args.arch, "dataset": args.dataset, "weights": args.weights, "bits": args.bits[0]}
        epochs = {"epochs": 2, "warmup_epochs": 1, "calibrate_epochs": 1, "iters": 1, "batch_size": batch_size}
        return method.config(**common, **epochs, **METHODS[name], device=args.device, **kw)

    cfg, peaks = settings(), []
    teacher, _, _ = load_teacher(cfg.arch, cfg.dataset, cfg.num_classes, cfg.image_size, cfg.weights)
    flops = count_flops(_FastRun(settings(precision="fp32", capture="none")).reach_full_step(method, teacher).step)
    on_cpu = pick_device(args.device).type == "cpu"
    captures = ["compile" if kind == "auto" and on_cpu and compiler() else kind for kind in args.capture]
    plain = _PlainRun(settings(precision="fp32", capture="none"))
    fast = [_FastRun(settings(precision=args.precision, capture=capture)) for capture in captures]
    for run in fast:
        reset_peak(run.device)
        run.reach_full_step(method, teacher)
        peaks.append(peak_memory(run.device))
    plain.reach_full_step(method, teacher)
    steps = max(1, round(args.seconds / fast[0].seconds_per_step(WARMUP)))
    times = [[] for _ in (plain, *fast)]
    for _ in Progress(range(args.repeats), desc=f"{name}, batch {batch_size}, {steps} steps a turn", leave=False):
        for run, of_run in zip((plain, *fast), times):
            of_run.append(run.seconds_per_step(steps))
    plain_ms, *fast_ms = (1000 * median(of_run) for of_run in times)
    rows = []
    for run, ms, peak in zip(fast, fast_ms, peaks):
        floor_ms = 1000 * flops / convolution_rate(run.device, torch.bfloat16 if run.bf16 else torch.float32)
        about = name, cfg.dataset, batch_size, run.cfg.device, run.cfg.capture
        figures = (plain_ms, ms, plain_ms / ms, floor_ms, peak / 2**20)
        rows.append(dict(zip(COLUMNS, (*about, *(round(figure, 2) for figure in figures)))))
    return rows


def side_by_side(device, forms, repeats=15):
    """Milliseconds of functions (medians, in turns) and the peak of their memory over what was there before, in MB, by name."""
    result = {form.__name__: {"ms": []} for form in forms}
    for form in forms:
        form()  # what libraries allocate for themselves is not its memory
        reset_peak(device)
        before = peak_memory(device)
        form()
        result[form.__name__]["mb"] = (peak_memory(device) - before) / 2**20
    for _ in range(repeats):
        for form in forms:
            began = time.perf_counter()
            form()
            synchronise(device)
            result[form.__name__]["ms"].append(1000 * (time.perf_counter() - began))
    for figures in result.values():
        figures["ms"] = median(figures["ms"])
    return result


def superposition(device, batch=16, num_classes=1000, k=500, width=512, repeats=15):
    """Forward and backward of a superposition of K embeddings: one matrix product against a gather of K rows a sample."""
    table = torch.randn(num_classes, width, device=device, requires_grad=True)
    classes = torch.randint(num_classes, (batch, k), device=device)
    shares = torch.randn(batch, k, device=device).softmax(1)

    def product():
        superpose(soft_labels(classes, shares, num_classes), table).sum().backward()

    def gather():
        (shares[:, :, None] * table[classes]).sum(1).sum().backward()

    return side_by_side(device, (product, gather), repeats)


def box_mixing(device, batch=256, size=32, repeats=15):
    """Forward and backward of MixMix's box mixing: one call for the batch against an interpolation per sample."""
    x1, x2 = (torch.randn(batch, 3, size, size, device=device, requires_grad=True) for _ in range(2))
    sides = torch.randint(1, size + 1, (batch, 2), device=device)
    boxes = torch.cat([(torch.rand(batch, 2, device=device) * (size - sides + 1)).long(), sides], 1)
    rows = boxes.tolist()

    def batched():
        box_mix(x1, x2, boxes).sum().backward()

    def loop():
        mixed = []
        for image, other, (left, top, width, height) in zip(x1.unbind(), x2.unbind(), rows):
            image = image.clone()
            image[:, top : top + height, left : left + width] = F.interpolate(other[None], (height, width), mode="bilinear")[0]
            mixed.append(image)
        torch.stack(mixed).sum().backward()

    return side_by_side(device, (batched, loop), repeats)


def batchnorm_statistics(device, batch=256, channels=16, size=32, repeats=15):
    """Forward and backward of a layer's BatchNorm statistics in bf16, channels last: one pass each way against the formula."""
    x = torch.randn(batch, channels, size, size, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    x.requires_grad_()

    def one_pass():
        channel_statistics([x]).sum().backward()

    def formula():
        with plain_forms():
            one_pass()

    return side_by_side(device, (one_pass, formula), repeats)


OPERATIONS = {"superposition": superposition, "box-mixing": box_mixing, "bn-statistics": batchnorm_statistics}


def print_milliseconds(args):
    """Print the rows of `compare` for all methods and batch sizes; returns them."""
    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    heads = ("plain ms", "fast ms", "speedup", "images/s", "floor ms", "peak MB")
    print(f"{'method':<10}{'batch':>6}{'capture':>11}" + "".join(f"{head:>10}" for head in heads))
    for name in args.method:
        for batch_size in args.batch_size:
            for row in compare(name, batch_size, args):
                rows.append(row)
                print(
                    f"{name:<10}{batch_size:>6}{row['capture']:>11}{row['plain_ms']:>10.1f}{row['fast_ms']:>10.1f}"
                    f"{row['speedup']:>9.2f}x{1000 * batch_size / row['fast_ms']:>10.0f}{row['floor_ms']:>10.1f}"
                    f"{row['peak_mb']:>10.0f}",
                    flush=True,
                )
    return rows


# -------------------------------------------------------------------------------------------------- time to accuracy


def time_to_accuracy(name, bits, args):
    """Whole runs of a script, a seed each, from the start of their processes to their last epoch's accuracy.

    Returns:
        A row for the table: medians over the seeds of `seconds` and of the `drop` from full precision, its `worst`, and what
        the method's own paper and the best published lose with this network (None where there is no figure).
    """
    seconds, drops, calibrated = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            out = Path(folder) / str(seed)
            settings = {"schedule": "short", "arch": args.arch, "dataset": args.dataset, "weights": args.weights, "bits": bits}
            settings |= {"seed": seed, "eval-every": 10**6, "out": out, "precision": args.precision}
            settings |= {"data-dir": args.data_dir, "device": args.device}
            flags = [text for flag, value in settings.items() if value is not None for text in (f"--{flag}", str(value))]
            extra = [text for flag, value in METHODS[name].items() for text in (f"--{flag}", value)]
            script, began = Path(__file__).parent.parent / f"{name}.py", time.time()
            done = subprocess.run([sys.executable, script, *flags, *extra, *args.more], capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                raise InputError(f"{name}.py failed: {said[-1]}")
            result = json.loads((out / "result.json").read_text())
            if result["fp_top1"] is None:
                raise InputError("--time-to-accuracy needs test images; give --data-dir")
            seconds.append((out / "checkpoint.pt").stat().st_mtime - began)  # the last epoch and its evaluation are over
            drops.append(result["fp_top1"] - result["last_top1"])
            calibrated.append(result["fp_top1"] - result["calibrated_top1"])
    steps = result["arguments"]["epochs"] * result["arguments"]["iters"]
    row = {"method": name, "bits": bits, "steps": steps, "batch_size": result["arguments"]["batch_size"]}
    row |= {"seconds": round(median(seconds)), "drop": round(median(drops), 2), "worst": round(max(drops), 2)}
    paper, best = (paper_drop(method, bits, args.dataset, args.arch) for method in (name, "best"))
    row |= {"calibrated": round(median(calibrated), 2), "paper": paper, "best": best}
    return row | {"images": result["images"], "precision": result["arguments"]["precision"]}


def print_time_to_accuracy(args):
    """Print the rows of `time_to_accuracy` for all methods and numbers of bits; returns them."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.seeds} seeds; points of top-1 accuracy lost")
    heads = ("steps", "batch", "seconds", "calibrated", "drop", "worst", "paper", "best")
    print(f"{'method':<10}{'bits':>5}" + "".join(f"{head:>11}" for head in heads))
    rows = []
    for name in args.method:
        for bits in args.bits:
            row = time_to_accuracy(name, bits, args)
            rows.append(row)
            names = ("steps", "batch_size", "seconds", "calibrated", "drop", "worst", "paper", "best")
            print(f"{name:<10}{bits:>5}" + "".join(f"{'-' if row[n] is None else row[n]:>11}" for n in names), flush=True)
    return rows


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m common.bench", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--method", nargs="+", default=["gdfq"], choices=METHODS, help="scripts to time (default: gdfq)")
    add("--arch", default="resnet20", help="architecture of the network (default: resnet20)")
    add("--dataset", default="cifar10", help="data set (default: cifar10)")
    add("--weights", help="weights of the network (default: depends on the data set)")
    add("--bits", type=int, nargs="+", default=[4], help="bit widths of weights and activations (default: 4)")
    add("--batch-size", type=int, nargs="+", default=[16, 64, 200], help="images per iteration (default: 16 64 200)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:i (default: auto)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="precision of the fast form (default: auto)")
    capture = "captures of the fast form, timed in alternation (default: cudagraph on CUDA, compile on a CPU)"
    add("--capture", nargs="+", default=["auto"], choices=CHOICES, help=capture)
    add("--repeats", type=int, default=7, help="timing turns of each form, at least 5 (default: 7)")
    add("--seconds", type=float, default=2.0, help="approximate seconds per turn (default: 2)")
    add("--operation", choices=OPERATIONS, help="time only this operation, optimised and as its formula is written")
    whole_runs = "run the scripts with --schedule short, and report time and accuracy lost"
    add("--time-to-accuracy", action="store_true", help=f"{whole_runs}; flags of the scripts may follow --")
    add("--seeds", type=int, default=3, help="runs of each script for --time-to-accuracy (default: 3)")
    add("--data-dir", help="folder with the test images for --time-to-accuracy (default: the bundled ones)")
    add("--json", metavar="FILE", help="write the rows to this file")
    add("more", nargs="*", metavar="-- FLAGS", help="flags of the scripts, for --time-to-accuracy")
    args = parser.parse_args(argv)
    with friendly_errors("common.bench"):
        if args.repeats < 5:
            raise InputError(f"--repeats is {args.repeats}; medians need at least 5")
        if len(args.bits) > 1 and not args.time_to_accuracy:
            raise InputError(f"--bits is {' '.join(map(str, args.bits))}; give one number of bits to time steps")
        if args.operation:
            figures = OPERATIONS[args.operation](pick_device(args.device))
            for form, figure in figures.items():
                print(f"{form:<10}{figure['ms']:>8.2f} ms{figure['mb']:>8.1f} MB")
            return figures
        if args.time_to_accuracy:
            rows = print_time_to_accuracy(args)
        else:
            rows = print_milliseconds(args)
        if args.json:
            write_atomically(args.json, json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
