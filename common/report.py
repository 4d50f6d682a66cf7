"""The start and end of every script: load and describe the network; evaluate the written file, write result.json, print the
table, save samples."""

import argparse
import copy
import json
import math
from pathlib import Path

import torch

from common import InputError, distributed
from common.check import describe, print_check
from common.cli import altered, resumable
from common.data import agreement, evaluate, find_test_set, fixed_paths
from common.deploy import check_export, deploy, givers_of_integers
from common.device import pick_device
from common.export import load_quantized, read_quantized, save_quantized, saved_bytes
from common.images import ImageSet, save_grid
from common.models import OWN, SMALL_IMAGE, build, design_of, load_teacher, save_weights
from common.ops import count_flops
from common.probe import input_channels, probe
from common.published import PAPER_TOP1
from common.quant import quantize, quantized_layers
from common.run import Run, write_atomically


def load(cfg):
    """The teacher and where its weights come from; --mean and --std of `cfg` are filled in."""
    teacher, normalisation, source = load_teacher(cfg.arch, cfg.dataset, cfg.num_classes, cfg.image_size, cfg.weights)
    cfg.mean, cfg.std = per_channel(cfg, normalisation, input_channels(teacher))
    return teacher, source


def prepare(cfg, **about):
    """What every script's main begins with: load the network and the test set, and say what they are.

    Args:
        cfg: parsed arguments; --mean and --std are filled in.
        about: what `Run` is told of the method.

    Returns:
        The teacher, on its device, and the run. Where the run is finished, nothing is said yet.
    """
    teacher, source = load(cfg)
    run = Run(cfg, cfg.out, fixed=fixed_paths(cfg), **about)
    if run.finished:
        return teacher, run
    run.test_set = test_set = find_test_set(cfg, run.device, input_channels(teacher)) if distributed.rank == 0 else None
    kind = next(teacher.parameters()).dtype
    teacher, _ = run.adopt(teacher)
    parameters = sum(p.numel() for p in teacher.parameters())
    stem = ", CIFAR stem" if cfg.image_size <= SMALL_IMAGE and ":" not in cfg.arch and cfg.arch not in OWN else ""
    print(f"network   {cfg.arch}{stem}, {parameters:,} parameters, weights: {source}")
    if kind is not torch.float32:
        print(f"          converted from {str(kind).removeprefix('torch.')} to float32")
    fast = {"none": "step by step", "compile": "compiled", "cudagraph": "as a CUDA graph"}[cfg.capture]
    print(f"          on {cfg.device} in {cfg.precision}, {fast}; evaluated in fp32")
    print(f"          images normalised by mean {cfg.mean}, std {cfg.std}")
    if test_set is None:
        print("test set  none found: agreement with the full-precision network on synthetic images is reported instead")
    else:
        print(f"test set  {test_set.count:,} images from {test_set.name}")
        run.fp_top1, run.fp_top5, _ = evaluate(teacher, test_set)
        papers = PAPER_TOP1.get((cfg.dataset, cfg.arch))
        known = f" (in Qimera and AdaDFQ {papers:.2f} %)" if papers else ""
        print(f"          full precision {run.fp_top1:.2f} %{known}{top5_text(run.fp_top5)}", flush=True)
    return teacher, run


def per_channel(cfg, normalisation, channels):
    """(mean, std) from --mean and --std, else from the weights' own normalisation, one value per image channel; 0.5 where that
    has another number of channels.

    Raises:
        InputError: --mean or --std of another length, not finite, above 1, or --std not above 0.
    """
    values = []
    for flag, given, known in (("--mean", cfg.mean, normalisation[0]), ("--std", cfg.std, normalisation[1])):
        value = list(given or (known if len(known) == channels else [0.5]))
        if len(value) not in (1, channels):
            raise InputError(f"{flag} has {len(value)} values and the model {channels} channels; give one value or {channels}")
        found = " ".join(map(str, value))
        if not all(map(math.isfinite, value)) or (flag == "--std" and min(value) <= 0):
            raise InputError(f"{flag} is {found}; give finite numbers for pixels in 0 to 1, for --std above 0")
        if given and max(value) > 1:
            raise InputError(f"{flag} is {found}, as for pixels from 0 to 255; give numbers for pixels from 0 to 1")
        values.append(value * (channels // len(value)))
    return values


def in_batches(labels, size):
    """Parts of labels, of `size` or fewer. A single last one joins the part before it: a generator's BatchNorm may have no
    statistics of one image."""
    parts = labels.split(size)
    return parts if len(parts[-1]) > 1 or size == 1 or len(parts) == 1 else (*parts[:-2], torch.cat(parts[-2:]))


class SyntheticSet:
    """2,000 fresh synthetic images, re-iterable; the run's own random numbers are left alone."""

    count = 2000

    def __init__(self, run):
        self.run = run

    def __iter__(self):
        labels = torch.arange(self.count) % self.run.cfg.num_classes
        for seed, part in enumerate(in_batches(labels, self.run.cfg.batch_size)):
            yield draw_images(self.run, part, seed), part


@torch.no_grad()
def draw_images(run, labels, seed):
    """Synthetic images of `labels` (B,) with noise of their own seed, in batches of the size the generator learned with."""
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(seed)
        order = torch.randperm(len(labels))  # a batch of one class would have other statistics
        parts = in_batches(labels[order].to(run.device), run.cfg.batch_size)
        images = torch.cat([run.synthesize(part) for part in parts])
        return images[torch.argsort(order).to(run.device)]


def save_samples(run, path, columns=8):
    """A grid of synthetic images, one row per class; of more than 100 classes, or 20 of large images, a choice."""
    rows = min(run.cfg.num_classes, 100 if run.cfg.image_size <= SMALL_IMAGE else 20)
    labels = torch.linspace(0, run.cfg.num_classes - 1, rows).round().long().repeat_interleave(columns)
    save_grid(draw_images(run, labels, seed=0).cpu(), run.cfg, path, columns)


def finish(run, teacher, student):
    """Write the student and samples.png; returns the contents of result.json.

    A quantized student goes to quantized.pt, and the agreement is that file's; another one goes to student.pt.

    Args:
        run, teacher, student: as `execute` has them.
    """
    cfg, folder, quantized = run.cfg, run.folder, bool(quantized_layers(student))
    file = folder / ("quantized.pt" if quantized else "student.pt")
    if quantized:
        meta = {
            **{k: getattr(cfg, k) for k in ("method", "arch", "dataset", "num_classes", "image_size", "wbits", "abits")},
            **{k: getattr(cfg, k) for k in ("act_placement", "mean", "std")},
            "channels": input_channels(teacher),
            "folded": run.folded,
            "design": design_of(teacher),
        }
        save_quantized(student, file, meta)
        student = load_quantized(file, copy.deepcopy(teacher).cpu()).to(run.device)
    else:
        save_weights(student, file)
    if run.images is None:
        save_samples(run, folder / "samples.png")
    batches = run.test_set or (SyntheticSet(run) if run.images is None else ImageSet(run.images, run.device))
    result = {"fp_top1": run.fp_top1} | {n: run.results.get(n) for n in ("calibrated_top1", "last_top1", "best_top1")}
    if run.fp_top5 is not None:
        result |= {"fp_top5": run.fp_top5, "last_top5": run.results.get("last_top5")}
    return result | {
        "agreement": round(agreement(teacher, student, batches), 2),
        "images": batches.count,
        "test_set": run.test_set.name if run.test_set else None,
        "wbits": cfg.wbits if quantized else None,
        "abits": cfg.abits if quantized else None,
        "bytes_fp32": saved_bytes(teacher),
        "bytes_quantized" if quantized else "bytes_student": file.stat().st_size,
        "ms_per_iter": round(1000 * run.seconds / run.iterations, 1) if run.iterations else None,
        "peak_mb": round(run.peak / 2**20),
        "seconds": round(run.seconds, 1),
        "method": cfg.method,
        **run.facts,
        "arguments": run.arguments(),
        **{name: about for name, about in json.loads((folder / "config.json").read_text()).items() if name != "arguments"},
    }


def arithmetic(teacher, student, image_size):
    """Floating-point operations per image of both networks, a dict for `Run.record`."""
    image = torch.zeros(1, input_channels(teacher), image_size, image_size, device=next(teacher.parameters()).device)
    with torch.no_grad():
        return {"flops_fp32": count_flops(lambda: teacher(image)), "flops": count_flops(lambda: student(image))}


def print_rows(title, columns, rows):
    """Print a table: the titles of its columns, and for each row its title and texts."""
    width = max(14, *(len(text) + 2 for text in columns))
    for name, texts in ((title, columns), *rows):
        print(f"{name:<28}" + "".join(f"{text:>{width}}" for text in texts))


def top5_text(top5):
    return "" if top5 is None else f", top-5 {top5:.2f} %"


def print_table(result, run):
    """The figures of result.json as a small table."""
    on = f"of {result['images']:,} test images" if result["test_set"] else ""
    student = result.get("student", "fine-tuned")  # what the method makes of the network, in a word
    what = f"w{result['wbits']}a{result['abits']}" if result["wbits"] else student
    last = student if result["best_top1"] is None else f"{student}, last epoch"
    rows = [
        ("full precision", result["fp_top1"], "%"),
        ("calibrated only", result["calibrated_top1"], "%"),
        (last, result["last_top1"], "%"),
        (f"{student}, best epoch", result["best_top1"], "%  (chosen on the test set: for comparison only)"),
        ("full precision, top-5", result.get("fp_top5"), "%"),
        (f"{last}, top-5", result.get("last_top5"), "%"),
        ("same class as full precision", result["agreement"], "%" if on else f"%  of {result['images']:,} synthetic images"),
    ]
    print(f"\n{result['method']}  {what}  top-1 accuracy {on}".rstrip())
    for name, value, unit in rows:
        if value is not None:
            print(f"  {name:<30}{value:>8.2f} {unit}")
    before, after = (result[name] / 1024 for name in ("bytes_fp32", "bytes_quantized" if result["wbits"] else "bytes_student"))
    print(f"  {'file':<30}{after:>8.0f} KB  (full precision {before:.0f} KB, {before / after:.1f}x)")
    if "flops" in result:
        before, after = result["flops_fp32"] / 1e6, result["flops"] / 1e6
        print(f"  {'arithmetic, per image':<30}{after:>8.1f} MFLOPs  (full precision {before:.1f})")
    if "data_source" in result:
        print(f"  {'images':<30}{result['images_used'] or '':>8} {result['data_source']}")
    each = f"  ({result['ms_per_iter']} ms per iteration)" if result["ms_per_iter"] else ""
    print(f"  {'time':<30}{result['seconds']:>8.0f} s{each}")
    made = [name for name in run.files if (run.folder / name).is_file() and name != "checkpoint.pt"]
    print(f"  in {run.folder}/: {', '.join(dict.fromkeys(made))}", flush=True)


def write_result(run, result, show):
    """Write what a run has found, a dict, to its result file, and print it by `show(result, run)`; returns it."""
    write_atomically(run.folder / run.result_file, json.dumps(result, indent=1))
    show(result, run)
    return result


def show_finished(run, show):
    """Print what a run that is there already has found, as `write_result` did, and how it would be made anew; returns it."""
    try:
        result = dict(json.loads((run.folder / run.result_file).read_text()))
    except (ValueError, TypeError):
        raise InputError(f"{run.folder / run.result_file} is damaged; --overwrite runs it again") from None
    show(result, run)
    given, before = run.cfg.data_dir, (result.get("arguments") or {}).get("data_dir")
    if given not in (None, before) and (run.folder / "quantized.pt").exists():
        print(f"  not with the images in {given}; for these, --eval {run.folder}/quantized.pt --data-dir {given}")
    print("  this run was finished before; --overwrite runs it again", flush=True)
    return result


def execute(cfg, compress, finish=finish, show=print_table, **about):
    """What every script's main does: load, compress, evaluate, write, print.

    Args:
        cfg: parsed arguments.
        compress: the method, (teacher, cfg, run) -> student, quantized or not.
        finish: (run, teacher, student) -> the contents of result.json.
        show: as for `write_result`.
        about: what `Run` is told of the method.

    Returns:
        The contents of result.json; None in all but the first of several processes.
    """
    distributed.share_batches(cfg)
    if cfg.eval is not None or cfg.check:
        if not distributed.leave():
            return None
        return check(cfg, compress) if cfg.eval is None else evaluate_file(cfg)
    check_export(cfg)
    with distributed.first_before_others():  # it downloads what there is to download
        teacher, run = prepare(cfg, **about)
    finished = distributed.from_first(run.finished)
    if cfg.export and not finished:  # what cannot be exported is refused now, not after training
        example = probe(teacher, cfg.num_classes, cfg.image_size)
        givers_of_integers(quantize(teacher, cfg.wbits, cfg.abits, cfg.act_placement, example=example))
    with resumable():
        student = None if finished else compress(teacher, cfg, run)
        if not distributed.leave():
            return None
        result = show_finished(run, show) if finished else write_result(run, finish(run, teacher, student), show)
    if cfg.export:
        file = run.folder / "quantized.pt"
        deploy(load_quantized(file, copy.deepcopy(teacher).cpu()), cfg, file, cfg)
    return result


def check(cfg, compress):
    """--check: what would be quantized, from a run of no epochs, which refuses what a real one would refuse."""
    teacher, source = load(cfg)
    run = Run(cfg)
    student = compress(teacher, cfg, run)
    teacher, example = run.adopt(teacher)
    print(f"network   {cfg.arch}, weights: {source}")
    return print_check(teacher, student, example, cfg)


def evaluate_file(cfg):
    """--eval: accuracy of a quantized.pt; data set, normalisation and sizes are the file's, the images --data-dir's. With it
    --export, which needs no images, and --integer-check."""
    check_export(cfg)
    meta = read_quantized(cfg.eval)["meta"]
    if missing := [name for name in ("method", "dataset", "mean", "std") if meta.get(name) is None]:
        raise InputError(f"--eval {cfg.eval} was saved without {', '.join(missing)}; include them in save_quantized's `meta`")
    own = build(cfg.arch, meta["num_classes"], meta["image_size"]) if ":" in cfg.arch else None
    device = pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    student = load_quantized(cfg.eval, own).to(device)
    test_set = find_test_set(altered(cfg, **meta), device, meta["channels"])
    if test_set is None and (cfg.export is None or cfg.integer_check):
        raise InputError(f"--eval {cfg.eval} needs test images; give --data-dir")
    found, size = {}, Path(cfg.eval).stat().st_size / 1024
    print(f"{cfg.eval}: {meta['method']} {meta['arch']} w{meta['wbits']}a{meta['abits']}, {describe(student)}, {size:.0f} KB")
    if test_set is not None:
        top1, top5, _ = evaluate(student, test_set)
        print(f"top-1 accuracy {top1:.2f} %{top5_text(top5)} of {test_set.count:,} test images from {test_set.name}")
        found = {"top1": top1} | ({} if top5 is None else {"top5": top5}) | {"images": test_set.count}
    return found | deploy(student, cfg, cfg.eval, argparse.Namespace(**meta), test_set)
