"""What surrounds a method: shared flags, the run's folder, seeds, device and precision, resuming, progress, results."""

import argparse
import copy
import difflib
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.utils import save_image
from tqdm import tqdm

from common import InputError, first_line, replacing
from common.capture import CHOICES, GraphedStep, compiled, keep_freed_memory, pick_capture
from common.data import IMAGE_SIZE, NUM_CLASSES, accuracy, agreement, load_test_set
from common.export import load_quantized, read_quantized, save_quantized
from common.models import OWN, SMALL_IMAGE, ZeroPadShortcut, build, input_channels, load_teacher
from common.quant import quantized_activations, quantized_layers

DATASETS = ("cifar10", "cifar100", "imagenet", "folder")
RANGES = {  # of the arguments that have one, where a script has them
    "seed": (0, 2**63 - 1),
    "warmup_epochs": (0, 10**6),
    "calibrate_epochs": (1, 10**6),
    "latent_dim": (1, 10**6),
    "mapped_dim": (1, 10**6),
    "temperature": (1e-3, 1e6),
    "beta1": (0, 0.9999),
    "scale": (1 / 64, 64),
    **dict.fromkeys(("search_epochs", "search_iters", "arch_iters", "student_steps"), (1, 10**6)),
    **dict.fromkeys(("tau_start", "tau_end"), (1e-3, 1e3)),
    **dict.fromkeys(
        ("lr_g", "lr_q", "lr_alpha", "weight_decay", "bns_weight", "kd_weight", "alpha_ds", "alpha_as", "beta", "gamma"),
        (0, 1e30),
    ),
    **dict.fromkeys(("zoo_sample", "count", "iterations"), (1, 10**9)),
    **dict.fromkeys(("low_iterations", "warmup_iterations", "jitter"), (0, 10**9)),
    **dict.fromkeys(("lr", "lr_weights", "ce_weight", "bn_weight", "first_bn", "tv_weight", "l2_weight"), (0, 1e30)),
    "beta2": (0, 0.9999999),
    **dict.fromkeys(("weight_iterations", "step_iterations"), (0, 10**9)),
    **dict.fromkeys(("lr_rounding", "lr_step", "rounding_weight"), (0, 1e30)),
    **dict.fromkeys(("kd_epochs", "kd_iters", "kd_batch_size", "kd_latent_dim"), (1, 10**9)),
    **dict.fromkeys(
        ("kd_lr", "kd_lr_g", "one_hot_weight", "information_weight", "activation_weight", "kd_bn_weight"), (0, 1e30)
    ),
    **dict.fromkeys(("ptq_batch_size", "qat_batch_size", "qat_steps", "points"), (1, 10**9)),
    **dict.fromkeys(("qat_lr", "qat_weight_decay", "feature_weight"), (0, 1e30)),
    "ridge": (1e-12, 1e30),
    "sparsity": (0, 0.99),
    "ends_bits": (2, 8),
    **dict.fromkeys(("zaq_beta", "zaq_gamma", "zaq_rho"), (0, 1e6)),
}
LEFT = "quantized.pt student.pt result.json samples.png metrics.jsonl genotype.json genotype.svg".split()
LEFT += ["images.npz", "grid.png", "checkpoint.pt"]  # the files of a run, but for config.json
DEVICES = ("cpu", "cuda")
LEFT_FOLDERS = ("search", "batches", "parts", "images")
NOT_COMPARED = ("out", "resume", "eval")  # arguments in which a resumed run may differ


# ---------------------------------------------------------------------------------------------------- command line


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        told = action.default in (None, False) or "(default" in action.help
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The flags that all scripts share; a script adds its own.

    Args:
        method: name of the script, as in the run folder.
        description: first paragraph of --help.
        unquantized: values of the script's --task that leave a full-precision network.
    """

    def __init__(self, method, description, unquantized=()):
        super().__init__(prog=f"{method}.py", description=description, formatter_class=_Help, allow_abbrev=False)
        self.method, self.by_size, self.unquantized = method, {}, unquantized
        add = self.add_argument_group("network and data").add_argument
        names = "resnet20|32|44|56|110, vgg11_bn_x0_25, regnet_y_narrow (CIFAR), torchvision's, or package.module:factory"
        add("--arch", help=f"{names} (default: resnet20, for ImageNet resnet18)")
        add("--dataset", default="cifar10", type=_one_of(DATASETS), help="cifar10, cifar100, imagenet or folder (own data)")
        images = (
            "test images: a folder per class under val/ or test/ (MixMix's real ones: train/), or torchvision's CIFAR files"
        )
        add("--data-dir", help=f"{images} (default: ./data, then the bundled slice of CIFAR-10)")
        add("--download", action="store_true", help="fetch the full CIFAR test set")
        add("--weights", help="file, address, or bundled|pytorchcv|chenyaofo|torchvision (default: by data set)")
        add("--num-classes", type=int, help="of an own model (default: by data set)")
        add("--image-size", type=int, help="side in pixels, of an own model (default: by data set)")
        add("--mean", type=float, nargs="+", help="per channel, images in 0 to 1 (default: by weights)")
        add("--std", type=float, nargs="+", help="per channel (default: by weights)")
        add = self.add_argument_group("quantization").add_argument
        add("--bits", type=int, default=4, help="of weights and activations, 2 to 8")
        add("--wbits", type=int, help="of weights (default: --bits)")
        add("--abits", type=int, help="of activations (default: --bits)")
        placement = "quantize what activation functions return (relu, as the papers) or what layers receive (input)"
        add("--act-placement", default="relu", type=_one_of(("relu", "input")), help=placement)
        add("--clipped-ste", action="store_true", help="no gradient for activations outside their range; the papers pass it")
        add = self.add_argument_group("run").add_argument
        add("--seed", type=int, default=0, help="of every random number")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:i")
        precision = "of convolutions in training; auto is bf16 where the hardware computes it, fp32 is TF32 on a GPU"
        add("--precision", default="auto", type=_one_of(("auto", "fp32", "bf16")), help=precision)
        capture = "of the training step; auto is a CUDA graph, on a CPU torch.compile where the run is long"
        add("--capture", default="auto", type=_one_of(CHOICES), help=capture)
        add("--out", help="run folder (default: runs/METHOD-ARCH-DATASET-wXaY-sSEED)")
        add("--resume", action="store_true", help="go on from the run folder's checkpoint (without: start over)")
        add("--eval-every", type=int, default=1, help="epochs between two evaluations; the last is always evaluated")
        add("--eval", metavar="FILE", help="only evaluate this quantized.pt")
        self.shared = set(vars(self.parse_args([])))

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")

    def add_by_size(self, group, flag, small, large, help, **kwargs):
        """A flag whose default depends on the data: `small` for images up to 64 pixels (CIFAR), else `large`."""
        action = group.add_argument(flag, help=f"{help} (default: CIFAR {small}, ImageNet {large})", **kwargs)
        self.by_size[action.dest] = (small, large)

    def parse(self, argv=None):
        """Arguments with every default filled in.

        Raises:
            InputError: unusable arguments; the message names the flag.
        """
        args = self.parse_args(argv)
        changed = self._changed(args)
        args.arch = args.arch or ("resnet18" if args.dataset == "imagenet" else "resnet20")
        for name in ("bits", "wbits", "abits"):
            if getattr(args, name) is None:
                setattr(args, name, args.bits)
            if not 2 <= getattr(args, name) <= 8:
                raise InputError(f"--{name} is {getattr(args, name)}; give a number of bits from 2 to 8")
        for name, known in (("num_classes", NUM_CLASSES), ("image_size", IMAGE_SIZE)):
            given, expected = getattr(args, name), known.get(args.dataset)
            flag = "--" + name.replace("_", "-")
            if given is None and expected is None:
                raise InputError(f"--dataset {args.dataset} needs {flag}; give it")
            if given is not None and expected is not None and given != expected:
                raise InputError(
                    f"{flag} is {given} and --dataset {args.dataset} has {expected}; use --dataset folder for own data"
                )
            setattr(args, name, given if given is not None else expected)
        for name, (small, large) in self.by_size.items():
            if getattr(args, name) is None:
                setattr(args, name, small if args.image_size <= SMALL_IMAGE else large)
        for name in ("num_classes", "image_size", "epochs", "iters", "batch_size", "eval_every"):
            least = 2 if name == "num_classes" else 1
            if getattr(args, name, None) is not None and getattr(args, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least {least}")
        for name, (low, high) in RANGES.items():
            value = getattr(args, name, None)
            if value is not None and not low <= value <= high:
                raise InputError(f"--{name.replace('_', '-')} is {value}; give a value from {low:g} to {high:g}")
        args.method = self.method
        if args.out is None:
            arch = re.sub(r"[^\w]+", "-", args.arch)
            bits = "" if getattr(args, "task", None) in self.unquantized else f"-w{args.wbits}a{args.abits}"
            if len(changed) > 120:  # a file system takes 255
                changed = f"-{hashlib.sha256(changed.encode()).hexdigest()[:12]}"
            args.out = f"runs/{self.method}-{arch}-{args.dataset}{bits}-s{args.seed}{changed}"
        if not args.out:
            raise InputError("--out is empty; give a folder")
        return args

    def _changed(self, args):
        """The method's own flags that were given, for the folder's name, so that ablations do not share a folder."""
        defaults, parts = vars(self.parse_args([])), []
        for name, value in vars(args).items():
            if name not in self.shared and value != defaults[name]:
                text = "" if value is True else re.sub(r"[^\w.]+", "_", str(value))[-60:]
                parts.append(f"-{name.replace('_', '-')}{text}")
        return "".join(parts)

    def config(self, **settings):
        """The same arguments for a caller in Python: config(bits=4, epochs=10, no_bns=True)."""
        argv = []
        for name, value in settings.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                argv.append(flag)
            elif value is False and isinstance(self._option_string_actions.get(flag), argparse.BooleanOptionalAction):
                argv.append("--no-" + flag[2:])
            elif value is not None and value is not False:
                argv += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
        return self.parse(argv)


def fill_in(cfg, defaults):
    """Give the arguments of `cfg` that were not given (None) their values from `defaults`, a dict by name."""
    for name, value in defaults.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)


def checked_schedule(cfg):
    """`cfg`, with its epochs cut to the calibrating ones where nothing is fine-tuned.

    Raises:
        InputError: the run would end before any fine-tuning.
    """
    if cfg.no_finetune:
        cfg.epochs = min(cfg.epochs, cfg.calibrate_epochs)
    elif cfg.epochs <= cfg.warmup_epochs:
        raise InputError(
            f"--epochs {cfg.epochs} ends within the {cfg.warmup_epochs} warm-up epochs, before any fine-tuning; raise it, "
            "lower --warmup-epochs, or give --no-finetune"
        )
    return cfg


def _one_of(choices):
    def check(text):
        if text not in choices:
            nearest = difflib.get_close_matches(text, choices, n=2, cutoff=0.5)
            offer = f"did you mean {' or '.join(nearest)}" if nearest else f"give {', '.join(choices)}"
            raise argparse.ArgumentTypeError(f"'{text}' is not known; {offer}")
        return text

    return check


@contextmanager
def friendly_errors(program):
    """Ends the program with one sentence and exit status 2 where the input cannot be used."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command with --resume goes on from the last finished epoch", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------- device, precision, seed


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
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use --device cpu or auto")
    return device


def synchronise(device):
    """Wait until `device` has done what it was given, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def computes_bf16(device):
    """Whether `device` multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


# --------------------------------------------------------------------------------------------------------- one run


class Run:
    """One run of a method: what its loop needs besides the method itself.

    Without a folder (a call of `compress` from Python) nothing is written and nothing is shown.

    Args:
        cfg: from `Parser.parse` or `Parser.config`.
        folder: where the run leaves its files, or None.

    `test_set` may be set to a re-iterable over (images, labels) on which the student is evaluated.
    """

    layout = torch.channels_last
    fused = True  # optimizers in one kernel
    started = False  # whether the folder is this run's
    rates = "--lr-g or --lr-q"  # what to lower when a loss is not finite
    fp_top1 = None  # accuracy of the full-precision network, where there is a test set

    def __init__(self, cfg, folder=None):
        self.cfg, self.folder, self.test_set = cfg, folder and Path(folder), None
        self.device = pick_device(cfg.device)
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)  # streams and graphs are those of the current device
        else:
            keep_freed_memory()
        self.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and computes_bf16(self.device))
        cfg.device, cfg.precision = str(self.device), "bf16" if self.bf16 else "fp32"  # what config.json records
        cfg.capture = pick_capture(cfg.capture, self.device, cfg.epochs * cfg.iters)
        self.results, self.history, self.latest, self.facts = {}, [], {}, {}
        self.seconds, self.iterations, self.peak = 0.0, 0, 0
        if self.folder:
            self._claim_folder()
        torch.manual_seed(cfg.seed)

    def autocast(self):
        """Convolutions in bf16 where --precision says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, module):
        """`module` on the run's device, in the memory layout that its convolutions are fastest in."""
        return module.to(self.device, memory_format=self.layout)

    def capture(self, step, *optimizers):
        """`step` as --capture says: its arguments name the phase of the run, and it returns nothing.

        Args:
            step: function of hashable arguments, one training iteration.
            optimizers: all that it moves.
        """
        if self.cfg.capture == "cudagraph":
            return GraphedStep(step, optimizers, self.latest)
        if self.cfg.capture == "compile":
            self.announce("compiling the step: the first iterations take a minute or two")
            self.update, self.log = torch.compiler.disable(self.update), torch.compiler.disable(self.log)
            return compiled(step)
        return step

    def update(self, optimizer, loss, keep_graph=False):
        """One step of `optimizer` down the gradient of `loss`, which goes to its own parameters only."""
        optimizer.zero_grad()
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        loss.backward(inputs=own, retain_graph=keep_graph)
        optimizer.step()

    def note(self, **figures):
        """Note figures of the whole epoch, or dicts of them, for its line of metrics.jsonl."""

        def rounded(value):
            return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else round(value, 6)

        self.noted |= rounded(figures)

    def record(self, **facts):
        """Record what the method alone knows about the run, for result.json."""
        self.facts |= facts

    def epochs(self, count, student, synthesize, evaluate_from=0, **stateful):
        """Epoch numbers 0 ... count - 1, with everything around them: resuming, progress, metrics, checkpoints.

        Args:
            count: epochs of the run.
            student: the network to evaluate.
            synthesize: labels (B,) -> images (B, C, H, W), for samples and agreement when the run is over.
            evaluate_from: first epoch after which the student is evaluated.
            stateful: all else that changes from epoch to epoch: networks, optimizers.

        Raises:
            InputError: a folder that cannot be used, or a loss that is not finite.
        """
        stateful["student"], self.synthesize = student, synthesize
        start = self._begin(stateful)
        self.bar = tqdm(total=count * self.cfg.iters, initial=start * self.cfg.iters, disable=self.folder is None, unit="it")
        for epoch in range(start, count):
            self.epoch, self.losses, self.noted = epoch, {}, {}
            before = self.seconds
            self.bar.set_description(f"epoch {epoch + 1}/{count}")
            yield epoch
            line = {"epoch": epoch, **self._mean_losses(), **self.noted, "seconds": round(self.seconds - before, 2)}
            self._check_weights(student)
            due = (epoch + 1) % self.cfg.eval_every == 0 or epoch + 1 == count
            if self.test_set and due and epoch >= evaluate_from:
                line["top1"] = self.measure("last_top1", student)
                self.results["best_top1"] = max(self.results.get("best_top1", 0.0), line["top1"])
            self.history.append(line)
            plain = {key: value for key, value in line.items() if not isinstance(value, dict)}
            self.bar.set_postfix({key: f"{value:.4g}" for key, value in plain.items() if key not in ("epoch", "seconds")})
            self._save_checkpoint(epoch + 1, stateful)
        self.bar.close()
        self.peak = peak_memory(self.device)

    def steps(self):
        """Step numbers of one epoch, timed, moving the progress bar."""
        began = time.time()
        for step in range(self.cfg.iters):
            yield step
            for name, loss in self.latest.items():
                self.losses.setdefault(name, []).append(loss)
            self.latest.clear()
            self.bar.update()
        synchronise(self.device)
        self.seconds += time.time() - began
        self.iterations += self.cfg.iters

    def log(self, **losses):
        """Note one step's losses (scalar tensors); they are read from the device once an epoch."""
        self.latest.update((name, loss.detach()) for name, loss in losses.items())

    def announce(self, line):
        """Say what the run is about to do, where it says anything."""
        if self.folder is not None:
            tqdm.write(f"{self.cfg.method:<10}{line}")

    def measure(self, name, student):
        """Record the student's accuracy on the test set under `name`; None where there is no test set."""
        if self.test_set is None:
            return None
        self.results[name] = round(accuracy(student, self.test_set), 2)
        return self.results[name]

    def _mean_losses(self):
        means, bad = {}, []
        for name, losses in self.losses.items():
            values = torch.stack(losses).float()
            finite = torch.isfinite(values)
            if not finite.all():
                step = int((~finite).int().argmax())
                bad.append((step, name, values[step].item()))
            means[name] = round(values.mean().item(), 6)
        if bad:
            step, name, value = min(bad)
            self._stop(f"{name} became {value} in epoch {self.epoch + 1}, step {step + 1}")
        return means

    def _check_weights(self, student):
        sums = torch.stack([p.detach().float().sum() for p in student.parameters()])
        if not torch.isfinite(sums).all():
            self._stop(f"the student's weights stopped being finite in the last step of epoch {self.epoch + 1}")

    def _stop(self, what):
        kept = "no epoch is saved yet"
        if self.folder and self.epoch:
            kept = f"{self.folder / 'checkpoint.pt'} holds the first {self.epoch} epochs"
        raise InputError(f"{what}, and {kept}; lower {self.rates} and give another --out")

    # ------------------------------------------------------------------------------------------------- the folder

    def arguments(self):
        """The arguments as plain values, without those in which a resumed run may differ."""
        arguments = {k: v for k, v in vars(self.cfg).items() if k not in NOT_COMPARED}
        arguments["device"] = self.device.type  # each of several processes has its own
        return json.loads(json.dumps(arguments))

    def _claim_folder(self):
        """Whether the folder can take this run, before anything is computed; nothing is written yet."""
        existing = next(path for path in (self.folder, *self.folder.resolve().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"--out {self.folder} cannot be written ({existing} forbids it); give another folder")
        config = self.folder / "config.json"
        if not config.exists():
            if theirs := [name for name in (*LEFT, *LEFT_FOLDERS) if (self.folder / name).exists()]:
                raise InputError(f"--out {self.folder} holds no run, but a '{theirs[0]}' that one would replace; give another")
            return
        try:
            before, now = json.loads(config.read_text())["arguments"], self.arguments()
        except (ValueError, KeyError, TypeError):
            raise InputError(f"--out {self.folder} has a config.json that is damaged or not of a run; give another") from None
        differ = [f"{k} {before.get(k)} there, {now.get(k)} here" for k in now | before if before.get(k) != now.get(k)]
        if differ:
            raise InputError(f"--out {self.folder} holds a run with other arguments ({'; '.join(differ)}); give another --out")

    def _begin(self, stateful):
        """Start the folder, or load its checkpoint; returns the epoch to go on with."""
        if self.folder is None:
            return 0
        checkpoint = self.folder / "checkpoint.pt"
        if self.cfg.resume and checkpoint.exists():
            return self._load_checkpoint(checkpoint, stateful)
        self.start()
        return 0

    def start(self):
        """Make the folder and write config.json. Unless the run is resumed, what an earlier one has left there goes."""
        if self.started or self.folder is None:
            return
        self.started = True
        versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
        content = {"arguments": self.arguments(), "versions": versions | {"numpy": np.__version__}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "config.json", json.dumps(content, indent=1))
        except OSError as error:
            raise InputError(f"--out {self.folder} cannot be written ({error.strerror}); give another folder") from None
        if not self.cfg.resume:
            for name in LEFT:
                (self.folder / name).unlink(missing_ok=True)
            for name in LEFT_FOLDERS:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _save_checkpoint(self, epoch, stateful):
        if self.folder is None:
            return
        state = {
            "epoch": epoch,
            "stateful": {name: item.state_dict() for name, item in stateful.items()},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "results": self.results,
            "history": self.history,
            "seconds": self.seconds,
            "iterations": self.iterations,
        }
        with replacing(self.folder / "checkpoint.pt") as partial:
            torch.save(state, partial)
        self._write_metrics()

    def _write_metrics(self):
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def _load_checkpoint(self, path, stateful):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever the damaged bytes make of it
            raise InputError(f"--resume: {path} is damaged ({first_line(error)}); remove it to start over") from None
        try:
            for name, item in stateful.items():
                item.load_state_dict(state["stateful"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"--resume: {path} is of another network or version ({first_line(error)}); remove it") from None
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.results, self.history = state["results"], state["history"]
        self.seconds, self.iterations = state["seconds"], state["iterations"]
        self._write_metrics()
        return state["epoch"]


def write_atomically(path, text):
    """Write a text file in one step, so that a killed run never leaves half of it."""
    with replacing(path) as partial:
        partial.write_text(text)


# ------------------------------------------------------------------------------------------------- start to finish


def prepare(cfg):
    """What every script's main begins with: load the network and the test set, and say what they are.

    Args:
        cfg: parsed arguments; --mean and --std are filled in.

    Returns:
        The teacher, on its device, and the run.
    """
    teacher, normalisation, source = load_teacher(cfg.arch, cfg.dataset, cfg.num_classes, cfg.image_size, cfg.weights)
    cfg.mean, cfg.std = per_channel(cfg, normalisation, input_channels(teacher))
    run = Run(cfg, cfg.out)
    what = (cfg.dataset, cfg.data_dir, cfg.num_classes, cfg.image_size, (cfg.mean, cfg.std))
    run.test_set = test_set = load_test_set(*what, run.device, cfg.download, channels=input_channels(teacher))
    run.place(teacher)
    parameters = sum(p.numel() for p in teacher.parameters())
    stem = ", CIFAR stem" if cfg.image_size <= SMALL_IMAGE and ":" not in cfg.arch and cfg.arch not in OWN else ""
    print(f"network   {cfg.arch}{stem}, {parameters:,} parameters, weights: {source}")
    fast = {"none": "step by step", "compile": "compiled", "cudagraph": "as a CUDA graph"}[cfg.capture]
    print(f"          on {cfg.device} in {cfg.precision}, {fast}; evaluated in fp32")
    print(f"          images normalised by mean {cfg.mean}, std {cfg.std}")
    if test_set is None:
        print("test set  none at hand: agreement with the full-precision network on synthetic images is reported instead")
    else:
        print(f"test set  {test_set.count:,} images from {test_set.name}")
        run.fp_top1 = round(accuracy(teacher, test_set), 2)
        print(f"          full precision {run.fp_top1:.2f} %", flush=True)
    return teacher, run


def execute(cfg, compress):
    """What every script's main does: load, compress, evaluate, write, print.

    Args:
        cfg: parsed arguments.
        compress: the method, (teacher, cfg, run) -> student, quantized or not.

    Returns:
        The contents of result.json.
    """
    if cfg.eval is not None:
        return evaluate_file(cfg)
    teacher, run = prepare(cfg)
    return finish(run, teacher, compress(teacher, cfg, run))


def per_channel(cfg, normalisation, channels):
    """(mean, std) from --mean and --std, else from the weights' own normalisation, one value per image channel."""
    values = []
    for flag, given, known in (("--mean", cfg.mean, normalisation[0]), ("--std", cfg.std, normalisation[1])):
        value = list(given or (known if len(known) == channels else [0.5]))
        if len(value) not in (1, channels):
            raise InputError(f"{flag} has {len(value)} values and the model {channels} channels; give one value or {channels}")
        if not all(map(math.isfinite, value)) or (flag == "--std" and min(value) <= 0):
            raise InputError(f"{flag} is {' '.join(map(str, value))}; give finite numbers (pixels are 0 to 1), --std above 0")
        values.append(value * (channels // len(value)))
    return values


def describe(student):
    """One line on what of the network is quantized."""
    weights, acts = quantized_layers(student), quantized_activations(student)
    wbits, abits = (" and ".join(map(str, sorted({module.bits for _, module in group}))) for group in (weights, acts))
    return f"{len(weights)} weight tensors to {wbits} bits, {len(acts)} activations to {abits} bits"


class SyntheticSet:
    """2,000 fresh synthetic images, re-iterable; the run's own random numbers are left alone."""

    count = 2000

    def __init__(self, run):
        self.run = run

    def __iter__(self):
        labels = torch.arange(self.count) % self.run.cfg.num_classes
        for seed, part in enumerate(labels.split(self.run.cfg.batch_size)):
            yield draw(self.run, part, seed), part


class ImageSet:
    """Images (N, channels, H, W) without labels, re-iterable in batches."""

    def __init__(self, images, device):
        self.images, self.device, self.count = images, device, len(images)

    def __iter__(self):
        for part in self.images.split(250):
            yield part.to(self.device, torch.float32), None


@torch.no_grad()
def draw(run, labels, seed):
    """Synthetic images of `labels` (B,) with noise of their own seed, in batches of the size the generator learned with."""
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(seed)
        order = torch.randperm(len(labels))  # a batch of one class would have other statistics
        parts = labels[order].to(run.device).split(run.cfg.batch_size)
        images = torch.cat([run.synthesize(part) for part in parts])
        return images[torch.argsort(order).to(run.device)]


def save_samples(run, path, columns=8, most_rows=100):
    """A grid of synthetic images, one row per class (evenly chosen classes where there are more than `most_rows`)."""
    rows = min(run.cfg.num_classes, most_rows if run.cfg.image_size <= SMALL_IMAGE else 20)
    labels = torch.linspace(0, run.cfg.num_classes - 1, rows).round().long().repeat_interleave(columns)
    save_grid(draw(run, labels, seed=0).cpu(), run.cfg, path, columns)


def save_grid(images, cfg, path, columns):
    """A picture of images (N, channels, H, W) on the CPU, normalised as `cfg` says, `columns` to a row."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (cfg.mean, cfg.std))
    images = (images.float() * std + mean).clamp(0, 1)
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    with replacing(path) as partial:
        save_image(images, partial, format="png", nrow=columns, padding=1)


def finish(run, teacher, student, images=None, folded=False):
    """Write the student, samples.png and result.json, and print the table.

    A quantized student goes to quantized.pt, and what is evaluated is that file; another one to student.pt.

    Args:
        run, teacher, student: as `execute` has them.
        images: (N, channels, H, W), what the student was made with, where the run has no generator to draw samples from.
        folded: whether the student's BatchNorms are folded.
    """
    cfg, folder, quantized = run.cfg, run.folder, bool(quantized_layers(student))
    file = folder / ("quantized.pt" if quantized else "student.pt")
    if quantized:
        meta = {
            **{k: getattr(cfg, k) for k in ("method", "arch", "dataset", "num_classes", "image_size", "wbits", "abits")},
            **{k: getattr(cfg, k) for k in ("act_placement", "mean", "std")},
            "channels": input_channels(teacher),
            "folded": folded,
            "shortcut": "pad" if any(isinstance(m, ZeroPadShortcut) for m in teacher.modules()) else "projection",
        }
        save_quantized(student, file, meta)
        student = load_quantized(file, copy.deepcopy(teacher).cpu()).to(run.device)
    else:
        with replacing(file) as partial:
            torch.save({key: value.cpu().contiguous() for key, value in student.state_dict().items()}, partial)
    if images is None:
        save_samples(run, folder / "samples.png")
    batches = run.test_set or (SyntheticSet(run) if images is None else ImageSet(images, run.device))
    result = {"fp_top1": run.fp_top1} | {n: run.results.get(n) for n in ("calibrated_top1", "last_top1", "best_top1")}
    result |= {
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
        "versions": json.loads((folder / "config.json").read_text())["versions"],
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1))
    print_table(result, file)
    return result


def saved_bytes(model):
    """Size of the network's own checkpoint file."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def peak_memory(device):
    """Peak memory in bytes: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike the resource usage, it knows nothing of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_table(result, file):
    """The figures of result.json as a small table; `file` is where the student is."""
    on = f"of {result['images']:,} test images" if result["test_set"] else ""
    task = result["arguments"].get("task", "quantize")
    what = f"w{result['wbits']}a{result['abits']}" if result["wbits"] else task
    learned = {"kd": "student", "ptq": "quantized", "prune": "pruned"}.get(task, "fine-tuned")
    last = learned if task in ("ptq", "prune") else f"{learned}, last epoch"
    rows = [
        ("full precision", result["fp_top1"], "%"),
        ("calibrated only", result["calibrated_top1"], "%"),
        (last, result["last_top1"], "%"),
        (f"{learned}, best epoch", result["best_top1"], "%  (chosen on the test set: for comparison only)"),
        ("same class as full precision", result["agreement"], "%" if on else f"%  of {result['images']:,} synthetic images"),
    ]
    print(f"\n{result['method']}  {what}  top-1 accuracy {on}".rstrip())
    for name, value, unit in rows:
        if value is not None:
            print(f"  {name:<30}{value:>8.2f} {unit}")
    before, after = result["bytes_fp32"] / 1024, file.stat().st_size / 1024
    print(f"  {'file':<30}{after:>8.0f} KB  (full precision {before:.0f} KB, {before / after:.1f}x)")
    if "flops" in result:
        before, after = result["flops_fp32"] / 1e6, result["flops"] / 1e6
        print(f"  {'arithmetic, per image':<30}{after:>8.1f} MFLOPs  (full precision {before:.1f})")
    if "data_source" in result:
        print(f"  {'images':<30}{result['images_used'] or '':>8} {result['data_source']}")
    each = f"  ({result['ms_per_iter']} ms per iteration)" if result["ms_per_iter"] else ""
    print(f"  {'time':<30}{result['seconds']:>8.0f} s{each}")
    made = [name for name in LEFT if (file.parent / name).exists() and name not in ("checkpoint.pt", "images.npz")]
    print(f"  in {file.parent}/: {', '.join(made)}", flush=True)


def evaluate_file(cfg):
    """--eval: accuracy of a quantized.pt; data set, normalisation and sizes are the file's, the images --data-dir's."""
    meta = read_quantized(cfg.eval)["meta"]
    own = build(cfg.arch, meta["num_classes"], meta["image_size"]) if ":" in cfg.arch else None
    device = pick_device(cfg.device)
    student = load_quantized(cfg.eval, own).to(device)
    what = (meta["dataset"], cfg.data_dir, meta["num_classes"], meta["image_size"], (meta["mean"], meta["std"]))
    test_set = load_test_set(*what, device, cfg.download, channels=meta["channels"])
    if test_set is None:
        raise InputError(f"--eval {cfg.eval} needs test images of {meta['dataset']}; give --data-dir")
    top1 = round(accuracy(student, test_set), 2)
    size = Path(cfg.eval).stat().st_size / 1024
    print(f"{cfg.eval}: {meta['method']} {meta['arch']} w{meta['wbits']}a{meta['abits']}, {describe(student)}, {size:.0f} KB")
    print(f"top-1 accuracy {top1:.2f} % of {test_set.count:,} test images from {test_set.name}")
    return {"top1": top1, "images": test_set.count}
