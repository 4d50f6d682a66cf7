"""Make docs/RESULTS.md and its pictures from run folders alone.

    python -m common.results RUN ...             add runs, a line each, to docs/results/; then make the page and its pictures
    python -m common.results                     only make the page and its pictures, from what lies in docs/results/
    python -m common.results --pictures RUN ...  copy the runs' pictures; then make the page and its pictures

Runs with the same network, data set, schedule and machine form one table, stored as one file in docs/results/. Flags common
to all its runs appear in the command above the table, the others in the names of its rows. To add an ablation, add its
runs.
"""

import argparse
import importlib
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from PIL import Image
from torchvision.utils import make_grid

from common import InputError
from common.analysis import draw
from common.cli import as_flag, friendly_errors
from common.data import read_slice
from common.published import paper_drop
from common.run import NOT_COMPARED, write_atomically

METHODS = {"gdfq": "GDFQ", "autorecon": "AutoReCon", "qimera": "Qimera", "adadfq": "AdaDFQ", "mixmix": "MixMix"}
ORDER = {method: number for number, method in enumerate(METHODS)}
MINUTES = (0.5, 2, 8, 32, 128)  # marked on the axis of accuracy.png
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()

SELECTING = "dataset num_classes image_size arch task student_arch qat_recipe variant schedule adversarial data_source".split()
SELECTING += ["images", "wbits", "abits"]
LENGTH = {"epochs", "iters", "batch_size"}
ELSEWHERE = set(NOT_COMPARED) - {"threads", "eval_every"}  # arguments that say where a run lies, or what else it does
APART = {"bits", "wbits", "abits", "seed", "method", "mean", "std", "device", "synthesis"}  # what no row's name has
PROTOCOL = set(
    "--weights --task --schedule --act-placement --epochs --iters --batch-size".split()
)  # with another one, another table
MACHINE = {"--precision", "--capture", "--threads", "--eval-every"}  # flags that leave the method as it is

PAPERS = {  # by the task of MixMix: the table that has such an experiment
    None: "Table 2 of Qimera and of AdaDFQ",
    "ptq": "Table 3 of MixMix (ImageNet there)",
    "qat": "Table 4 of MixMix (ImageNet there)",
    "prune": "Table 5 of MixMix (ImageNet there)",
    "kd": "Table 7 of MixMix",
}
NETWORK = "cifar10", "resnet20"  # of the overview and of accuracy.png
LENGTHS = {  # the heading of the overview's column: the flags of PROTOCOL that its runs were given
    "`short`": ("--schedule short",),
    "`tenth`": ("--epochs 40", "--iters 200", "--batch-size 16"),
    "`full`": (),
}
HEADS = "bits | method | seeds | calibrated | last epoch | best epoch | drop | published | best published | minutes | KB"
HEADER = """# Results

`python -m common.results` makes this page from the files in [results/](results), which have one line for each run: the results
in its `result.json`, the arguments and versions of its `config.json`, and its accuracy by epoch from `metrics.jsonl`. Other
measurements, such as how settings were chosen, speed and most of MixMix's tasks, are in [MEASUREMENTS.md](MEASUREMENTS.md).

Accuracies are top-1 in percent on test images, mean ± standard deviation over the seeds. "Calibrated" is the accuracy after the
activation ranges are set and before the quantized network (the student) is trained. Quote the last epoch; the best one is
chosen on the test images and is given for comparison only. "Drop" is what the last epoch lost from full precision, in points.
"Published" is the loss published for the method. "Best published" is the smallest loss published for any method that quantizes
activations per tensor and weights per tensor or channel: SynQ at 3 and 4 bits, AdaDFQ with the add-on AKT at 5. Qimera + ZAQ is
left out, whose 93.91 % at 4 bits exceeds full precision. Both losses are for CIFAR-10's ResNet-20 of 93.89 %, after 80,000
iterations (SynQ: 20,000), and most from the best epoch. Minutes are those of training, on machines that may have run other
jobs. KB is the size of the written network. `amx_bf16` and `avx512_bf16` are CPUs with AMX, and with AVX512-BF16 but no AMX.

The command above each table is that of its first row's first seed. The other rows change the script, `--bits`, `--seed` and the
flags shown in the method column. `DIR` is a folder with the test images. `--genotype found` is the result of the second search
in [MEASUREMENTS.md](MEASUREMENTS.md#autorecon-generators-compared). Names after `--images` stand for sets of images, which you
give as a folder of your own: `both` is MixMix's; `single`, `kw` and `zeroq` were made from ResNet-20 alone with three different
losses, `kw-noblur` as `kw` without its blur prior, `own` from the compressed network alone; `feature` and `data` have one of
MixMix's kinds of mixing; `noise` is Gaussian noise; `real`, `real-s1` and `real-s2` are draws of training images ([how they
were made](MEASUREMENTS.md#mixmix)).
"""
OVERVIEW = """## Points lost, by length of training

ResNet-20 on CIFAR-10, the runs of the tables below: accuracy in full precision less accuracy after the last epoch, mean ±
standard deviation, and in brackets the number of runs on all machines. `short` is `--schedule short`, 720 iterations of 16
images with settings of its own. `tenth` is 8,000 iterations of 16 images, which is AdaDFQ's batch and a fraction of the others'
(GDFQ, AutoReCon 200, Qimera 64), with rates that fall after 10, 20 and 30 of 40 epochs, otherwise the script's defaults.
`full` is the script's plain command, 80,000 iterations. A seed counts once on each machine. Flags in a cell are those of its
runs; AdaDFQ's plain command diverges at 3 bits ([MEASUREMENTS.md](MEASUREMENTS.md#the-full-schedules)).
"""
PICTURES = {
    "accuracy.png": "Accuracy against time, from calibration on: medians and range of the seeds; the best published is full "
    "precision less the smallest published drop, without that of Qimera + ZAQ.",
    "methods.png": "Two test images of each class of CIFAR-10, and below them images of GDFQ, Qimera, AdaDFQ and MixMix.",
    "genotype.svg": "AutoReCon's generator: the operations of its edges.",
    "features.png": "Qimera: features of test images, of its images, and of paths between two classes (`--analyze`).",
}


# ------------------------------------------------------------------------------------------------- from a run to a line


def changed_flags(arguments):
    """The flags of a run that has these arguments, a dict, as far as they are not its script's defaults or in APART."""
    parse = importlib.import_module(arguments["method"]).parse_args

    def settings(flags):  # as config.json has them
        return json.loads(json.dumps(vars(parse(flags))))

    def unlike(flags):
        defaults = settings(flags)
        return {n for n, value in arguments.items() if value is not None and n in defaults and value != defaults[n]}

    plain = settings([])
    selected = {n for n in SELECTING if arguments.get(n) not in (None, plain.get(n))}
    if arguments["dataset"] != "folder":
        selected -= {"num_classes", "image_size"}
    chosen = [text for name in selected for text in as_flag(name, arguments[name]).split()]
    switches = {n for n in unlike(chosen) if isinstance(arguments[n], bool)}  # they may set other arguments: --no-se sets --k
    changed = switches | unlike(chosen + [as_flag(name, arguments[name]) for name in switches])
    changed |= selected | (LENGTH if changed & LENGTH else set())  # the same for all methods, whatever their defaults
    changed |= {"task"} if arguments["method"] == "mixmix" else set()  # its default one, too
    if arguments.get("task") == "ptq" and arguments["device"] == "cpu":
        changed -= {"capture"}  # always none there
    return [as_flag(name, value) for name, value in arguments.items() if name in changed - APART]


def without_paths(value):
    """`value` of JSON with absolute paths cut down to their last parts."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def read_run(folder, machine=None):
    """What docs/results/ keeps of a run, a dict.

    Args:
        folder: of a finished run.
        machine: processor of a run that has not recorded it.

    Raises:
        InputError: no such folder, or one without an accuracy.
    """
    try:
        result, config = (json.loads((Path(folder) / name).read_text()) for name in ("result.json", "config.json"))
        curve = Path(folder) / "metrics.jsonl"  # which a run without epochs has not
        metrics = [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []
        arguments = without_paths({n: v for n, v in config["arguments"].items() if n not in ELSEWHERE})
        flags, method = changed_flags(arguments), arguments["method"]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{folder} is not the folder of a finished run of one of the scripts ({error}); give one") from None
    if result.get("last_top1") is None or result["fp_top1"] is None:
        raise InputError(f"{folder} holds no accuracy on test images; give runs of a task and with test images")
    seconds, curve = 0.0, []
    tuned_from = arguments.get("calibrate_epochs" if arguments.get("no_finetune") else "warmup_epochs", 0)
    calibrated = min(arguments.get("calibrate_epochs", 0), tuned_from, len(metrics))  # as `finetune.phases` measures
    for line in metrics:
        seconds, epoch = round(seconds + line["seconds"], 2), line["epoch"] + 1
        if epoch == calibrated and result["calibrated_top1"] is not None:
            curve.append([epoch, seconds, result["calibrated_top1"]])
        if "top1" in line:
            curve.append([epoch, seconds, line["top1"]])
    return {
        "method": method,
        "bits": str(result["wbits"] or "") if result["wbits"] == result["abits"] else f"W{result['wbits']}A{result['abits']}",
        "flags": [*flags, *["--data-dir DIR"] * (config["arguments"]["data_dir"] is not None)],
        "seed": arguments["seed"],
        "result": without_paths({n: v for n, v in result.items() if n not in ("arguments", "versions", "machine", "method")}),
        "curve": curve,
        "machine": config.get("machine") or {"processor": machine, "threads": arguments["threads"]},
        "versions": config["versions"],
        "arguments": arguments,
    }


def protocol_of(flags):
    return tuple(flag for flag in flags if flag.split()[0] in PROTOCOL)


def network_of(runs):
    return runs[0]["arguments"]["dataset"], runs[0]["arguments"]["arch"]


def block_of(run):
    """The name of the table that a run belongs to."""
    arguments, protocol = run["arguments"], protocol_of(run["flags"])
    machine = run["machine"]["processor"] or "unknown machine"
    parts = arguments["arch"], arguments["dataset"], *protocol, f"{run['result']['images']} images", machine
    return re.sub(r"[^\w.]+", "-", " ".join(parts)).strip("-").lower()


def collect(folders, place, machine=None):
    """Add runs to the files of their tables in the folder `place`; one with the same arguments is replaced."""
    tables = defaultdict(dict)
    for run in (read_run(folder, machine) for folder in folders):
        tables[block_of(run)][_order(run)] = run
    for name, runs in tables.items():
        file = place / f"{name}.jsonl"
        runs = {_order(run): run for run in (read_table(file) if file.exists() else [])} | runs
        lines = (json.dumps(runs[key], separators=(",", ":")) + "\n" for key in sorted(runs))
        write_atomically(file, "".join(lines))


def _order(run):
    return run["bits"], ORDER[run["method"]], len(run["flags"]), tuple(run["flags"]), run["seed"]


def read_table(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- from lines to the page


def spread(values, digits=2):
    """Mean ± standard deviation (of the sample) of figures; nothing where one is missing."""
    if None in values:
        return ""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def rows_of(runs):
    """The rows of a table, {(bits, method, flags that not all runs have): runs}, and the flags that all have. How often a run
    was evaluated makes no row of its own."""
    common = [flag for flag in runs[0]["flags"] if all(flag in run["flags"] for run in runs)]
    rows = defaultdict(list)
    for run in sorted(runs, key=_order):
        own = tuple(flag for flag in run["flags"] if flag not in common and "--eval-every" not in flag)
        rows[run["bits"], run["method"], own].append(run)
    return rows, common


def published(bits, method, *network):
    """Cells with the points that have been published for this method and for the best one, empty where none are known."""
    drops = [paper_drop(name, int(bits), *network) if bits.isdigit() else None for name in (method, "best")]
    return ["" if drop is None else f"{drop:.2f}" for drop in drops]


def table(runs):
    """The text of one table: title, what all runs share, command and rows."""
    rows, common = rows_of(runs)
    arguments, (first_bits, first_method, own) = runs[0]["arguments"], next(iter(rows))
    protocol = [f"`{flag}`" for flag in protocol_of(common)]

    def all_of(texts):
        return "; ".join(dict.fromkeys(filter(None, texts)))

    epochs = ("{epochs} epochs of {iters} iterations of {batch_size} images".format(**run["arguments"])
              for run in runs if "epochs" in run["arguments"])  # fmt: skip
    machines = (f"{run['machine']['processor'] or 'not recorded'}, threads: {run['machine']['threads']}" for run in runs)
    versions = (", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs)
    task = arguments["task"] if first_method == "mixmix" else None
    known = task or paper_drop(first_method, 4, arguments["dataset"], arguments["arch"])
    shown = [f"As in {PAPERS[task]} ([PAPERS.md](PAPERS.md))"] if known else []
    shown += [all_of(epochs), f"{runs[0]['result']['images']:,} test images"]
    shown += ["full precision: " + all_of(f"{run['result']['fp_top1']:.2f} %" for run in runs), "machine: " + all_of(machines)]
    numbers = re.findall(r"\d+", first_bits)
    bits = [f"--{kind}bits {number}" for kind, number in zip("wa" if len(numbers) == 2 else [""], numbers)]
    command = " ".join([f"python {first_method}.py", *bits, *common, *own, f"--seed {runs[0]['seed']}"])
    processor = runs[0]["machine"]["processor"] or "machine not recorded"
    lines = [", ".join([f"## {arguments['arch']} on {arguments['dataset']}", *protocol, processor]), ""]
    lines += ["; ".join(filter(None, shown)) + f"; versions: {all_of(versions)}.", "", "```bash", command, "```", ""]
    lines += [f"| {HEADS} |", "|---" * (HEADS.count("|") + 1) + "|"]
    for (bits, method, flags), seeds in rows.items():
        results = [run["result"] for run in seeds]
        calibrated, last, best = ([result[f"{n}_top1"] for result in results] for n in ("calibrated", "last", "best"))
        cells = [
            bits,
            " ".join([METHODS[method], *(f"`{flag}`" for flag in flags)]),
            ", ".join(str(run["seed"]) for run in seeds),
            *map(spread, (calibrated, last, best)),
            f"{fmean(result['fp_top1'] - result['last_top1'] for result in results):.2f}",
            *published(bits, method, *network_of(runs)),
            spread([result["seconds"] / 60 for result in results], 1),
            f"{(results[0].get('bytes_quantized') or results[0]['bytes_student']) / 1024:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview(tables):
    """The text of the table of points lost after each length of training, from the runs of NETWORK on all machines. Of a
    method's rows it has the one with the fewest flags."""
    found = defaultdict(lambda: defaultdict(list))  # (bits, method, heading) -> flags -> points lost
    for heading, protocol in LENGTHS.items():
        chosen = [runs for runs in tables if network_of(runs) == NETWORK and protocol_of(rows_of(runs)[1]) == protocol]
        runs = [run | {"flags": [f for f in run["flags"] if f.split()[0] not in MACHINE]} for runs in chosen for run in runs]
        for (bits, method, flags), seeds in (rows_of(runs)[0] if runs else {}).items():
            found[bits, method, heading][flags] += [r["result"]["fp_top1"] - r["result"]["last_top1"] for r in seeds]

    def cell(rows):
        if not rows:
            return ""
        flags = min(rows, key=len)
        return ", ".join([f"{spread(rows[flags])} ({len(rows[flags])})", *(f"`{flag}`" for flag in flags)])

    heads = ["bits", "method", *LENGTHS, "published", "best published"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for bits, method in sorted({key[:2] for key in found}, key=lambda row: (row[0], ORDER[row[1]])):
        cells = [bits, METHODS[method], *(cell(found[bits, method, heading]) for heading in LENGTHS)]
        lines.append("| " + " | ".join([*cells, *published(bits, method, *NETWORK)]) + " |")
    return "\n".join([OVERVIEW, *lines]) if found else ""


def page(place):
    """The text of RESULTS.md, from the folder `place` of its tables and the pictures beside it."""
    tables = [read_table(file) for file in sorted(place.glob("*.jsonl"), key=lambda file: file.name)]
    tables.sort(key=lambda runs: (runs[0]["arguments"]["arch"] != "resnet20", -len({run["method"] for run in runs})))
    shown = {name: about for name, about in PICTURES.items() if (place.parent / name).exists()}
    pictures = "\n\n".join(f"![{about}]({name})\n\n*{about}*" for name, about in shown.items())
    parts = HEADER.strip(), overview(tables), *map(table, tables), "## Pictures" if shown else "", pictures
    return "\n\n".join(filter(None, parts)) + "\n"


# ------------------------------------------------------------------------------------------------------------ pictures


def take_pictures(folders, place):
    """Copy pictures of runs: as they are beside the page, and to `place` two images of each class, as METHOD.png."""
    for folder in map(Path, folders):
        try:
            arguments = json.loads((folder / "config.json").read_text())["arguments"]
            grid = next(path for path in (folder / "samples.png", folder / "grid.png") if path.exists())
        except (OSError, ValueError, StopIteration):
            raise InputError(f"{folder} is not the folder of a finished run with samples.png or grid.png; give one") from None
        if arguments["dataset"] == "cifar10":
            strip = side_by_side(np.asarray(Image.open(grid).convert("RGB")))
            Image.fromarray(strip).save(place / f"{arguments['method']}.png", optimize=True)
        if (folder / "genotype.svg").exists():
            shutil.copyfile(folder / "genotype.svg", place.parent / "genotype.svg")
        if (folder / "analysis" / "qimera.png").exists():  # in few colours, which make it small
            few = Image.open(folder / "analysis" / "qimera.png").convert("RGB").quantize(32)
            few.save(place.parent / "features.png", optimize=True)


def side_by_side(grid, cell=33, gap=3):
    """The first two images of each of ten classes, from a grid (H, W, 3) of one row per class and lines of one pixel."""
    rows = [grid[cell * row : cell * (row + 1) + 1, : 2 * cell + 1] for row in range(10)]
    return np.hstack([np.pad(row, ((0, gap), (0, gap), (0, 0)), constant_values=255) for row in rows])


def draw_methods(place):
    """methods.png: a row of test images, and below it one of each method."""
    files = {name: place / f"{method}.png" for method, name in METHODS.items()}
    strips = {name: np.asarray(Image.open(file)) for name, file in files.items() if file.exists()}
    if not strips:
        return
    images = read_slice()[0].view(10, 200, 3, 32, 32)[:, 20:22].flatten(0, 1)
    real = side_by_side(make_grid(images, nrow=2, padding=1).permute(1, 2, 0).numpy())
    height, width = real.shape[0], real.shape[1] / 10

    def paint(axes):
        axes.imshow(np.vstack([real, *strips.values()]))
        axes.set_xticks(width * (np.arange(10) + 0.47), CLASSES, fontsize=8)
        axes.set_yticks(height * (np.arange(1 + len(strips)) + 0.45), ["test images", *strips])
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)

    draw(place.parent / "methods.png", {"": paint}, (7.6, 0.36 * len(strips) + 0.7))


def draw_accuracy(place):
    """accuracy.png: of each number of bits that several methods have, a panel with their runs that were evaluated more than
    once, solid lines for --schedule short and broken ones for the papers' schedules, by their steps. Of a table's rows, those
    with the fewest flags are drawn, and of several machines' tables the first one's; other placements of the activations'
    quantizers are left out."""
    panels, times, lengths = defaultdict(dict), [], set()
    for file in sorted(place.glob("*.jsonl")):
        rows, _ = rows_of(read_table(file))
        for bits, method, flags in sorted(rows, key=lambda row: len(row[2])):
            runs, arguments = rows[bits, method, flags], rows[bits, method, flags][0]["arguments"]
            alike = len({len(run["curve"]) for run in runs}) == 1 < len(runs[0]["curve"])
            if not alike or network_of(runs) != NETWORK or arguments.get("act_placement") != "relu":
                continue
            steps = None if arguments.get("schedule") == "short" else arguments["epochs"] * arguments["iters"]
            if (line := (method, steps)) not in panels[bits]:
                panels[bits][line] = runs
                lengths |= {steps} - {None}
                times += [seconds for run in runs for _, seconds, _ in run["curve"]]

    panels = {bits: lines for bits, lines in panels.items() if len({method for method, _ in lines}) > 1}
    styles = {None: "-", **dict(zip(sorted(lengths), ("--", "-.", ":")))}

    def look(method):
        return {"color": f"C{ORDER[method]}", "marker": "os^Dv"[ORDER[method]], "ms": 4}

    def painter(bits, lines):
        def paint(axes):
            for (method, steps), runs in lines.items():
                _, seconds, top1 = np.array([run["curve"] for run in runs]).transpose(2, 0, 1)
                marked = {"markevery": max(1, seconds.shape[1] // 8)}
                axes.plot(np.median(seconds, 0), np.median(top1, 0), ls=styles[steps], lw=1.2, **marked, **look(method))
                axes.fill_between(np.median(seconds, 0), top1.min(0), top1.max(0), alpha=0.2, color=look(method)["color"], lw=0)
            full = runs[0]["result"]["fp_top1"]
            axes.axhline(full, color="black", lw=1, label="full precision")
            if best := paper_drop("best", int(bits), *NETWORK) if bits.isdigit() else None:
                axes.axhline(full - best, color="grey", ls=":", lw=1, label="best published")
            axes.set_xscale("log")
            axes.set_xticks([60 * minutes for minutes in MINUTES], map(str, MINUTES))
            axes.set_xticks([], minor=True)
            axes.set_xlim(0.8 * min(times), 1.25 * max(times))
            axes.set_xlabel("minutes of training")
            axes.set_ylabel("top-1 accuracy, %")
            if bits == max(panels):  # for all panels, where there are the fewest lines
                for method in sorted({method for drawn in panels.values() for method, _ in drawn}, key=ORDER.get):
                    axes.plot([], [], label=METHODS[method], **look(method))
                for steps in sorted(lengths):
                    axes.plot([], [], color="black", ls=styles[steps], label=f"the papers' schedules, {steps:,} steps")
                axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)

        return paint

    if panels:
        shown = {f"{bits} bits": painter(bits, panels[bits]) for bits in sorted(panels)}
        draw(place.parent / "accuracy.png", shown, (3.6, 3.2))


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m common.results", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of finished runs")
    add("--out", default="docs/RESULTS.md", help="page to write, with results/ and pictures beside it (default: %(default)s)")
    add("--pictures", action="store_true", help="only copy the pictures of the runs; do not add their results")
    add("--machine", help="processor of runs whose config.json does not record it, such as amx_bf16")
    args = parser.parse_args(argv)
    place = Path(args.out).parent / "results"
    with friendly_errors("common.results"):
        place.mkdir(parents=True, exist_ok=True)
        if args.pictures:
            take_pictures(args.runs, place)
        else:
            collect(args.runs, place, args.machine)
        draw_accuracy(place)
        draw_methods(place)
        write_atomically(args.out, page(place))


if __name__ == "__main__":
    main()
