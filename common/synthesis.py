"""Making a set of images in a run folder: batch by batch, in parts, by one process or several, resumable."""

import argparse
import functools
import json
import math
import re
import shutil
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import InputError, first_line
from common.capture import pick_capture
from common.cli import altered, fill_in, resumable, whole
from common.data import fixed_paths, training_root
from common.device import pick_device
from common.distributed import together, wait_for_all
from common.images import draw_grid, noise, read_images, real_images, renormalise, write_images
from common.progress import Progress
from common.report import show_finished
from common.run import Run, seed_of_part, write_atomically

READY = ("real", "noise")  # values of --data-source that no network makes
COUNT, QAT_COUNT, QAT_IMAGENET = 1024, 4096, 100_000  # Sec. 5.2 of MixMix; 4,096 is as much of CIFAR's training set
CURVE = 100  # points of a batch's loss curves, about
STEPS = 2000  # of all batches together that are worth compiling for: a step has several networks, hundreds of images


def add_flags(parser):
    """Declare the flags of a set of images."""
    add = parser.add_argument_group("set of images").add_argument
    about = f"number of images (default: {COUNT}; with --task qat {QAT_COUNT}, for ImageNet {QAT_IMAGENET})"
    add("--count", type=whole(1), help=about)
    about = "indices of the classes to make images of, such as 3 7 10-15 (default: all)"
    add("--classes", type=class_range, nargs="+", metavar="N|N-M", help=about)
    add("--labels", choices=("balanced", "random"), default="balanced", help="how the images' labels are drawn")
    about = "make only the batches I, I + N, ... of the images (--task synth); torchrun gives each process its part"
    add("--part", type=part, metavar="I/N", help=about)
    parser.shared.add("part")  # not in the folder's name: all parts go to one folder


def class_range(text):
    """A `type` for argparse: a class number N, or N-M for those from N to M, as a list."""
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text)
    classes = list(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else []
    if not classes:
        raise argparse.ArgumentTypeError(f"is '{text}'; give class numbers and ranges of them, such as 3 7 10-15")
    return classes


def part(text):
    """A `type` for argparse: I/N, part I of N, as (I, N)."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"is '{text}'; give I/N, from 0/N to N-1/N")
    return int(found[1]), int(found[2])


def complete(cfg):
    """Fill in --count, sort --classes and apply --part: all parts but the first join the folder that the first has begun.

    Raises:
        InputError: --data-source real without a folder of images, a class that does not exist or gets no image, or --part with
            another task than synth.
    """
    fill_in(cfg, {"count": COUNT if cfg.task != "qat" else QAT_IMAGENET if cfg.dataset == "imagenet" else QAT_COUNT})
    cfg.classes = cfg.classes and sorted(set().union(*cfg.classes))
    if cfg.classes and cfg.classes[-1] >= cfg.num_classes:
        there = f"the classes of --dataset {cfg.dataset} are 0 to {cfg.num_classes - 1}"
        raise InputError(f"--classes names {cfg.classes[-1]}, and {there}; give some of these")
    if cfg.classes and cfg.labels == "balanced" and cfg.count < len(cfg.classes):
        raise InputError(f"--classes names {len(cfg.classes)} classes and --count is {cfg.count}; raise it or name fewer")
    if cfg.data_source == "real" and not cfg.download:
        training_root(cfg.dataset, cfg.data_dir)
    if cfg.part and cfg.task != "synth":
        raise InputError(f"--task {cfg.task} runs in one process; make the images with --task synth, which runs in several")
    if cfg.part and cfg.part[0]:
        cfg.resume, cfg.overwrite = True, False


# -------------------------------------------------------------------------------------------------------------- batches


def make_labels(cfg):
    """Labels of all images (count,), of --classes: balanced and shuffled, or drawn at random. With fewer images
    than classes, the classes are drawn at random, one image each."""
    source, classes = torch.Generator().manual_seed(cfg.seed), torch.tensor(cfg.classes or range(cfg.num_classes))
    if cfg.labels == "random":
        return classes[torch.randint(len(classes), (cfg.count,), generator=source)]
    if cfg.count < len(classes):
        classes = classes[torch.randperm(len(classes), generator=source)]
    return classes[torch.arange(cfg.count) % len(classes)][torch.randperm(cfg.count, generator=source)]


def make_batches(make, labels, files, run):
    """Make the batches that are not in the run's folder yet, or those of --part; each is written when it is finished, with
    about CURVE points of its losses as they are before an iteration: {"batch": 0, "iteration": 20, "ce": 1.5, ...}.

    A batch depends on its number and the seed only, so any number of processes makes the same images, if each has as many
    threads (torchrun gives one, OMP_NUM_THREADS): other numbers of threads round differently, and so do the additions in no
    fixed order by which a GPU differentiates resized boxes.

    Args:
        make: as for `make_set`, without the networks.
        labels: of each batch, (B,).
        files: where each batch goes.
        run: its --part says which.
    """
    cfg = run.cfg
    first, every = cfg.part or (0, 1)
    own = [index for index in range(first, len(files), every) if not zipfile.is_zipfile(files[index])]  # cut short, it is none
    for damaged in filter(Path.exists, (files[index] for index in own)):
        run.announce(f"{damaged} is damaged, so it is made again")
    files[0].parent.mkdir(exist_ok=True)
    with Progress(total=cfg.iterations * len(own), unit="it", position=first, disable=not own) as bar:
        for index in own:
            torch.manual_seed(seed_of_part(cfg.seed, index))
            y, curve = labels[index].to(run.device), []

            def progress(names, losses, index=index, size=len(y), curve=curve):
                step = bar.n % cfg.iterations
                if step % max(cfg.iterations // CURVE, 1) == 0 or step + 1 == cfg.iterations:
                    curve.append({"batch": index, "iteration": step} | losses)
                bar.set_description(f"batch {index + 1}/{len(files)}, {textwrap.shorten(names, 40)}", refresh=False)
                bar.update()
                if bar.n % 50 == 0 or bar.n % cfg.iterations == 0:  # reading the losses waits for the device
                    rate = bar.n * size / cfg.iterations / bar.format_dict["elapsed"]
                    bar.show({"images/s": rate} | {name: loss.item() for name, loss in losses.items()})

            images = make(y, cfg, run, progress).half()
            if not torch.isfinite(images).all():
                raise InputError(f"the images of batch {index + 1} contain NaN or infinity; lower --lr and give another --out")
            lines = [{k: v if isinstance(v, int) else float(f"{v.item():.6g}") for k, v in point.items()} for point in curve]
            write_atomically(files[index].with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
            write_images(files[index], images, y, (cfg.mean, cfg.std))


def read_batches(labels, files, cfg):
    """The images of all batches, (N, channels, H, W) float16; arguments as for `make_batches`."""
    images = torch.empty(cfg.count, len(cfg.mean), cfg.image_size, cfg.image_size, dtype=torch.float16)
    for file, place in zip(files, images.split([len(y) for y in labels])):
        try:
            place.copy_(torch.from_numpy(np.load(file)["images"]))
        except Exception as error:  # whatever damaged bytes raise
            raise InputError(f"{file} is damaged ({first_line(error)}); remove it, then --resume makes it again") from None
    return images


# ------------------------------------------------------------------------------------------------------------- the set


def make_set(cfg, load, make, begin=lambda: None):
    """A set of images in the run folder of `cfg`, unless it is there already.

    Args:
        cfg: parsed arguments, with the flags declared here, --data-source, --iterations and --batch-size.
        load: function of `cfg` that returns the networks that make images, with names; it fills in --mean and --std.
        make: function of the networks, labels (B,), `cfg`, the run and `progress`; returns images (B, channels, H, W).
            It calls progress(names of networks, dict of losses as tensors) after each step.
        begin: called when all is checked, before anything is written.

    Returns:
        The run; its folder has no result.json yet where --part has made some batches only.
    """
    began, joins = time.time(), bool(cfg.part and cfg.part[0])
    if joins:
        wait_for_all()  # the first process downloads what there is to download, and begins the folder
    networks, labels = load(cfg), make_labels(cfg)
    parts = labels.tensor_split(math.ceil(cfg.count / cfg.batch_size))  # none much smaller than the others
    if cfg.data_source not in READY:
        cfg.capture = pick_capture(cfg.capture, pick_device(cfg.device), cfg.iterations * len(parts), worth=STEPS)
    own = ("images.npz", "grid.png", "batches")
    run = Run(cfg, cfg.out, own, free=("part",), fixed=fixed_paths(cfg), part=cfg.part and cfg.part[0])
    if joins and not (run.folder / "config.json").exists():
        raise InputError(f"--part: --out {run.folder} holds no run yet; start --part 0/{cfg.part[1]} first, which begins it")
    if not joins:
        if not run.finished:
            images = real_images(cfg, labels) if cfg.data_source == "real" else None
            begin()
            run.start()
        wait_for_all()
    if run.finished:
        return run
    if cfg.data_source not in READY:
        files = [run.folder / "batches" / f"{index:05}.npz" for index in range(len(parts))]
        placed = [network.place(run.device) for network in networks]
        make_batches(functools.partial(make, placed), parts, files, run)
    wait_for_all()
    if joins or (cfg.part and not together()):
        return run
    if cfg.data_source == "noise":
        images = noise(cfg.count, cfg)
    elif cfg.data_source != "real":
        images = read_batches(parts, files, cfg)
        curves = "".join(file.with_suffix(".jsonl").read_text() for file in files)
        write_atomically(run.folder / "metrics.jsonl", curves)
    write_images(run.folder / "images.npz", images, labels, (cfg.mean, cfg.std))
    draw_grid(images, labels, cfg, run.folder / "grid.png")
    made = {"images": cfg.count, "data_source": cfg.data_source, "zoo": [network.name for network in networks]}
    made |= {"seconds": round(time.time() - began, 1), "arguments": run.arguments()}
    write_atomically(run.folder / "result.json", json.dumps(made, indent=1))
    shutil.rmtree(run.folder / "batches", ignore_errors=True)
    return run


def synthesize(cfg, load, make):
    """--task synth: a set of images, and what is said of it. Arguments as for `make_set`.

    Returns:
        The contents of result.json; None where there are some batches only, or another process says it.
    """
    with resumable():
        run = make_set(cfg, load, make)
    if together() and cfg.part[0]:
        return None

    def show(made, run):
        print(f"\n{made['images']:,} images of source {made['data_source']} in {made['seconds']:.0f} s")
        files = [name for name in ("images.npz", "grid.png", "metrics.jsonl", "result.json") if (run.folder / name).exists()]
        print(f"  in {run.folder}/: {', '.join(files)}; --images {run.folder} uses them")

    if run.finished:
        return show_finished(run, show)
    if not (run.folder / "result.json").exists():
        first, count = cfg.part
        print(f"part {first}/{count} is done; once all are, repeat the command with --resume and without --part")
        return None
    made = json.loads((run.folder / "result.json").read_text())
    show(made, run)
    return made


def find_images(cfg, run, load, make):
    """The images to compress with, normalised as `cfg` says: those of --images, or a new set in the run's folder.

    Args:
        cfg, load, make: as for `make_set`; also `synthesis`, a dict of the arguments that are others for the set.
        run: of the compression, which begins when the images are known to be usable.
    """
    source = cfg.images[0] if cfg.images else run.folder / "images"

    def fitting(own):
        networks = load(own)
        if len(own.mean) != len(cfg.mean):
            found = f"the zoo takes images of {len(own.mean)} channels and the network of {len(cfg.mean)}"
            raise InputError(f"{found}; give another --zoo")
        return networks

    if not cfg.images:
        make_set(altered(cfg, out=str(source), task="synth", **cfg.synthesis), fitting, make, begin=run.start)
    images, labels, normalisation = read_images(source, cfg)
    if images.shape[1] != len(cfg.mean):
        raise InputError(f"--images {source} has {images.shape[1]} channels and the network {len(cfg.mean)}; give others")
    run.start()
    images = renormalise(images, normalisation, (cfg.mean, cfg.std))
    draw_grid(images, labels, cfg, run.folder / "grid.png")
    run.record(data_source=str(source) if cfg.images else cfg.data_source, images_used=len(images))
    return images
