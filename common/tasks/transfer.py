"""Whether images of one network serve others (MixMix, Sec. 5.5, Table 6): post-training quantization of every network of
--targets with the images of each of --images."""

from common import InputError
from common.cli import alone, resumable
from common.data import accuracy, find_test_set
from common.images import read_images, renormalise
from common.probe import input_channels
from common.report import load, print_rows, show_finished, write_result
from common.run import Run
from common.tasks import ptq


def add_flags(parser):
    """Declare the flags of this task; returns the groups of `parser` that hold them."""
    group = parser.add_argument_group("transfer (Table 6)")
    about = "networks to quantize, as for --zoo (default: the held-out ones and the zoo)"
    group.add_argument("--targets", nargs="+", help=about)
    return (group,)


def load_targets(cfg):
    """The networks of --targets.

    Returns:
        List of (name, network, arguments of its own quantization).

    Raises:
        InputError: a network that cannot be loaded or quantized; it is named.
    """
    targets = []
    for name in cfg.targets:
        own = alone(cfg, name)
        try:
            model, _ = load(own)
            run = Run(own)
            ptq.plan(model, own, run)
        except InputError as error:
            raise InputError(f"--targets {name}: {error}") from None
        targets.append((name, run.adopt(model)[0], own))
    return targets


def transfer(cfg):
    """--task transfer.

    Args:
        cfg: the flags of ptq.py, --targets, --images and the shared ones.

    Returns:
        The contents of transfer.json: accuracy in percent by source and target, and the full-precision ones.
    """
    targets, cells = load_targets(cfg), [f"{i}-{j}" for i in range(len(cfg.targets)) for j in range(len(cfg.images))]
    run = Run(cfg, cfg.out, files=cells, result="transfer.json")
    if run.finished:
        return show_finished(run, show_transfer)
    sources = {source: read_images(source, targets[0][2]) for source in cfg.images}
    test_sets = []
    for name, model, own in targets:
        channels = input_channels(model)
        for source, (images, *_) in sources.items():
            if images.shape[1] != channels:
                raise InputError(f"--images {source} has {images.shape[1]} channels and {name} {channels}; give others")
        test_sets.append(find_test_set(own, run.device, channels))
        if test_sets[-1] is None:
            raise InputError("--task transfer compares accuracies, so it needs test images; give --data-dir")
    run.start()
    result = {"full precision": {}} | {source: {} for source in sources}
    with resumable():
        for row, ((name, model, own), test_set) in enumerate(zip(targets, test_sets)):
            result["full precision"][name] = accuracy(model, test_set)
            for column, (source, (images, _, normalised)) in enumerate(sources.items()):
                images = renormalise(images, normalised, (own.mean, own.std))
                student = ptq.compress(model, images, own, Run(own, run.folder / f"{row}-{column}"))
                result[source][name] = accuracy(student, test_set)
    return write_result(run, result, show_transfer)


def show_transfer(result, run):
    """Print the contents of transfer.json as a table."""
    names = list(result["full precision"])
    rows = {f"  {source[-24:]}": [f"{row[name]:.2f}" for name in names] for source, row in result.items()}
    print_rows(f"w{run.cfg.wbits}a{run.cfg.abits}", names, rows.items())
    print(f"  in {run.folder}/: {run.result_file}")
