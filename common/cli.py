"""The command line: the flags that all scripts share, and what each of them may be."""

import argparse
import difflib
import hashlib
import re
import signal
import sys
import threading
from contextlib import contextmanager

import numpy as np
import torch

from common import InputError, distributed, first_line
from common.bns import BatchNormStatistics
from common.capture import CHOICES
from common.data import IMAGE_SIZE, NUM_CLASSES
from common.models import SMALL_IMAGE
from common.progress import close_all
from common.published import native_size
from common.timm_models import stated

DEFAULTS = {"device": "auto", "precision": "auto"}  # of flags that tests set otherwise for all runs at once
DATASETS = ("cifar10", "cifar100", "imagenet", "folder")


# ------------------------------------------------------------------------------------------------ what a flag may be


def number(low, high=1e30):
    """A `type` for argparse: a number from `low` to `high`."""
    return _checked(float, "number", low, high)


def whole(low, high=10**9):
    """A `type` for argparse: a whole number from `low` to `high`."""
    return _checked(int, "whole number", low, high)


def _checked(kind, name, low, high):
    limits = f"of at least {low:g}" if high in (10**9, 1e30) else f"from {low:g} to {high:g}"

    def check(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # a NaN is not
            raise argparse.ArgumentTypeError(f"is {text}; give a {name} {limits}")
        return value

    return check


def one_of(*choices):
    """A `type` for argparse: one of `choices`; the nearest are offered where it is another."""

    def check(text):
        if text not in choices:
            nearest = difflib.get_close_matches(text, choices, n=2, cutoff=0.5)
            offer = f"did you mean {' or '.join(nearest)}" if nearest else f"give {', '.join(choices)}"
            raise argparse.ArgumentTypeError(f"is '{text}', which is not known; {offer}")
        return text

    return check


TRAINING = {  # flags of every method that trains a generator: what each may be, and what it is
    "epochs": (whole(1), "number of epochs, including warm-up"),
    "iters": (whole(1), "number of iterations per epoch"),
    "batch_size": (whole(1), "number of images per iteration"),
    "warmup_epochs": (whole(0, 10**6), "number of initial epochs in which only the generator learns"),
    "calibrate_epochs": (whole(1, 10**6), "number of initial epochs in which the activation ranges are calibrated"),
    "lr_g": (number(0), "learning rate of the generator (Adam)"),
    "beta1": (number(0, 0.9999), "beta1 of the generator's Adam"),
    "lr_q": (number(0), "learning rate of the student"),
    "weight_decay": (number(0), "weight decay of the student"),
    "decay_epochs": (whole(0), "epochs at which both learning rates are divided by 10"),
    "latent_dim": (whole(1, 10**6), "length of the noise vector"),
    "bns_weight": (number(0), "weight of the BatchNorm statistics loss"),
    "bns_form": (one_of(*BatchNormStatistics.forms), "form of the statistics loss: gdfq, sum, norm or kl (common/bns.py)"),
    "kd_weight": (number(0), "weight of the distillation loss"),
    "temperature": (number(1e-3, 1e6), "temperature T of the distillation loss"),
    "kd_reduction": (
        one_of("mean", "batchmean"),
        "distillation loss: divided by the batch size (batchmean), or also by the classes (mean)",
    ),
}


class Described(str):
    """A default that the method works out itself, as --help describes it."""


def _in_words(default):
    """A default of `Parser.add_derived`, for --help."""
    if isinstance(default, dict):
        return "; ".join(f"{setting} {_in_words(value)}" for setting, value in default.items())
    if isinstance(default, tuple):
        small, large = map(_in_words, default)
        return small if small == large else f"CIFAR {small}, ImageNet {large}"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return " ".join(map(str, default))
    if isinstance(default, float) and 0 < default < 1e-3:
        return np.format_float_scientific(default, trim="-", exp_digits=1)  # 1e-4
    return str(default)


class Help(argparse.HelpFormatter):
    """--help with the defaults of all flags that have one."""

    def _get_help_string(self, action):
        told = any(action.default is none for none in (None, False, argparse.SUPPRESS)) or "(default" in action.help
        return action.help if told else f"{action.help} (default: {_in_words(action.default)})"


class Arguments(argparse.ArgumentParser):
    """Flags whose errors are one sentence."""

    def error(self, message):
        message = re.sub(r"^argument (--[^ :]+): (?=is )", r"\1 ", message)
        raise InputError(f"{message}; see {self.prog} --help")


class Parser(Arguments):
    """The flags that all scripts share; a script adds its own.

    Args:
        method: name of the script, as in the run folder.
        description: first paragraph of --help.
        unquantized: values of the script's --task that leave a full-precision network.
        settings: names of the flags on which the defaults of other flags depend, see `add_derived`.
        compiling: what --help says of --capture compile.
    """

    LONG = "compile for runs of 10,000 steps or more); on CUDA, compile also captures a CUDA graph"

    def __init__(self, method, description, unquantized=(), settings=("variant",), compiling=LONG):
        super().__init__(prog=f"{method}.py", description=description, formatter_class=Help, allow_abbrev=False)
        self.method, self.derived, self.idle, self.unquantized, self.schedules = method, {}, [], unquantized, {"paper": {}}
        self.settings = settings
        add = self.add_argument_group("network and data").add_argument
        names = "resnet20|32|44|56|110, vgg11_bn_x0_25, regnet_y_narrow (CIFAR), torchvision's, timm:NAME"
        add("--arch", help=f"architecture: {names}, or package.module:factory (default: resnet20; resnet18 for ImageNet)")
        about = "cifar10, cifar100, imagenet, or folder for your own data"
        add("--dataset", default="cifar10", type=one_of(*DATASETS), help=about)
        images = "folder with the test images: one folder per class in val/ or test/, or torchvision's CIFAR files; for "
        images += "real images (--data-source) also the training images, in train/"
        add("--data-dir", help=f"{images} (default: CIFAR's files in ./data, else CIFAR-10's 2,000 bundled images)")
        about = "download CIFAR, training and test images, to --data-dir (or ./data)"
        add("--download", action="store_true", help=about)
        weights = "weights of the network: a file (of PyTorch or .safetensors), a URL, or "
        weights += "bundled|pytorchcv|chenyaofo|torchvision|timm (default: bundled if there are some, else pytorchcv or "
        weights += "chenyaofo; torchvision for ImageNet; timm for timm:NAME; those that package.module:factory returns)"
        add("--weights", help=weights)
        add("--num-classes", type=whole(2), help="number of classes (required with --dataset folder, except for timm:NAME)")
        add("--image-size", type=whole(1, 10**5), help="side of the images in pixels (required like --num-classes)")
        channels = "for normalising pixels in [0, 1] (default: of the weights or data set; with --dataset folder ImageNet's)"
        add("--mean", type=float, nargs="+", help=f"per-channel mean {channels}")
        add("--std", type=float, nargs="+", help=f"per-channel standard deviation {channels}")
        add = self.add_argument_group("quantization").add_argument
        add("--bits", type=whole(2, 8), default=4, help="bit width of weights and activations, 2 to 8")
        add("--wbits", type=whole(2, 8), help="bit width of the weights (default: --bits)")
        add("--abits", type=whole(2, 8), help="bit width of the activations (default: --bits)")
        placement = "quantize outputs of activation functions (relu, as in the papers' code) or inputs of all layers (input)"
        add("--act-placement", default="relu", type=one_of("relu", "input"), help=placement)
        about = "zero the gradient of activations outside their range (in the papers it passes through; not for mixmix.py)"
        add("--clipped-ste", action="store_true", help=about)
        add = self.add_argument_group("run").add_argument
        add("--seed", type=whole(0, 2**63 - 1), default=0, help="seed of every random number")
        device = "device to run on: cpu, cuda, cuda:i, or auto (cuda if available)"
        add("--device", default=DEFAULTS["device"], help=device)
        precision = (
            "precision of convolutions in training: bf16, fp32 (TF32 on a GPU), or auto (bf16 if the hardware supports it)"
        )
        add("--precision", default=DEFAULTS["precision"], type=one_of("auto", "fp32", "bf16"), help=precision)
        capture = "how the training step runs: none (eager), compile, cudagraph, or auto (cudagraph on CUDA; on a CPU, "
        add("--capture", default="auto", type=one_of(*CHOICES), help=capture + compiling)
        threads = "number of CPU threads; give 1 when several runs share a CPU (default: PyTorch's)"
        add("--threads", type=whole(1, 4096), help=threads)
        add("--out", help="run folder (default: runs/METHOD-ARCH-DATASET-wXaY-sSEED and the script's flags that were changed)")
        add("--resume", action="store_true", help="continue from the checkpoint in the run folder")
        add("--overwrite", action="store_true", help="replace the run in the run folder")
        add("--eval-every", type=whole(1), default=1, help="evaluate every N epochs; the last epoch is always evaluated")
        add("--eval", metavar="FILE", help="only evaluate this quantized.pt")
        add("--check", action="store_true", help="only print what would be quantized, layer by layer")
        about = "onnx: also write the quantized network (of a run or of --eval) as ONNX; needs --act-placement input"
        add("--export", type=one_of("onnx"), help=about)
        about = "with --eval: run the network in integers only (common/integer.py) and compare"
        add("--integer-check", action="store_true", help=about)
        self.without_effect("--check", "--export")
        for task in unquantized:
            self.without_effect(f"--task {task}", "--export")
        self.without_effect("--overwrite", "--resume")
        of_training = "--weights --mean --std --bits --wbits --abits --act-placement --clipped-ste --seed --precision --capture"
        of_the_file = "--dataset --num-classes --image-size"
        self.without_effect("--eval", of_the_file, of_training, "--out --resume --overwrite --eval-every --check")
        self.shared = set(vars(self.parse_args([])))

    def add_derived(self, group, flag, default, help, **kwargs):
        """A flag whose default depends on the size of the images or on other flags.

        Args:
            default: a pair (for images up to 64 pixels, for larger ones), or a dict that maps values of the flags in `settings`
                to such pairs or to single values: the first that matches counts, and "otherwise" always matches.
        """
        action = group.add_argument(flag, help=f"{help} (default: {_in_words(default)})", **kwargs)
        self.derived[action.dest] = default

    def add_training(self, title, sources=("generator", "real"), about_sources="", **defaults):
        """Flags of TRAINING with a method's own defaults, in the order given, and --data-source.

        Args:
            title: of their group in --help.
            sources, about_sources: what the method takes for --data-source, and what --help adds about others than these two.
            defaults: a value; as for `add_derived`; `Described` where the method works it out from more.
        """
        group = self.add_argument_group(title)
        for name, default in defaults.items():
            flag, (kind, about) = "--" + name.replace("_", "-"), TRAINING[name]
            how = {"type": kind} | ({"nargs": "*"} if name == "decay_epochs" else {})
            if isinstance(default, (tuple, dict)):
                self.add_derived(group, flag, default, about, **how)
            elif isinstance(default, Described):
                group.add_argument(flag, help=f"{about} (default: {default})", **how)
            else:
                group.add_argument(flag, help=about, default=default, **how)
        about = "what the student learns from: the generator's images, or the training images in --data-dir (real)"
        group.add_argument("--data-source", choices=sources, default="generator", help=about + about_sources)
        idle = {"lr_g", "beta1", "latent_dim", "bns_weight", "bns_form", "warmup_epochs"} & set(defaults)
        self.without_effect("--data-source real", *("--" + name.replace("_", "-") for name in sorted(idle)))

    def add_schedule(self, group, short):
        """--schedule, in a group; `short` is a dict of what --schedule short gives other flags, by their names in Python."""
        self.schedules["short"] = short
        about = f"the full schedule (paper), or one that takes minutes, with settings of its own (short: {as_flags(short)})"
        group.add_argument("--schedule", choices=tuple(self.schedules), default="paper", help=f"{about} (default: paper)")

    def add_analysis(self, what):
        """--analyze RUN, a script's last flag; `what` is what it finds out. --arch, --data-dir and --device go with it."""
        others = set(self._option_string_actions) - {"-h", "--help", "--arch", "--data-dir", "--device"}
        add = self.add_argument_group("analysis").add_argument
        add("--analyze", metavar="RUN", help=f"analyse a finished run of any script with a generator, and exit: {what}")
        self.without_effect("--analyze", *sorted(others))

    def _check_value(self, action, value):
        """Of argparse: refuse what is not among a flag's `choices`, in the words of `one_of`."""
        if action.choices is not None:
            try:
                one_of(*action.choices)(value)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentError(action, str(error)) from None

    def without_effect(self, setting, *flags):
        """Declare that `flags` do nothing with a setting, so that both together are refused.

        Args:
            setting: a flag and its value ("--adversarial zaq"), or a flag that is on or has another value than by default; or
                several of these, joined by " and ".
            flags: one or, with spaces between them, several in a text.
        """
        self.idle.append((setting, " ".join(flags).split()))

    def parse(self, argv=None):
        """Arguments with every default filled in.

        Raises:
            InputError: unusable arguments; the message names the flag.
        """
        args = self.parse_args(argv)
        scheduled = as_flags(self.schedules[getattr(args, "schedule", "paper")]).split()
        args = self.parse_args([*scheduled, *(sys.argv[1:] if argv is None else argv)])  # the command line wins
        own = set(vars(args)) - self.shared
        self.without_effect("--eval", *(flag for flag, action in self._option_string_actions.items() if action.dest in own))
        self._refuse_idle(args, argv)
        if args.integer_check and args.eval is None:
            raise InputError("--integer-check has no effect without --eval FILE; give the quantized.pt of a run")
        changed = self._changed(args, vars(self.parse_args(scheduled)))
        args.arch = args.arch or ("resnet18" if args.dataset == "imagenet" else "resnet20")
        args.wbits, args.abits = args.wbits or args.bits, args.abits or args.bits
        sizes, own = IMAGE_SIZE | {"imagenet": native_size(args.arch)}, stated(args.arch) if args.dataset == "folder" else {}
        for name, known in (("num_classes", NUM_CLASSES), ("image_size", sizes)):
            given, expected = getattr(args, name) or own.get(name), known.get(args.dataset)
            flag = "--" + name.replace("_", "-")
            if given is None and expected is None:
                raise InputError(f"--dataset {args.dataset} needs {flag}")
            if given is not None and expected is not None and given != expected:
                raise InputError(
                    f"{flag} is {given} and --dataset {args.dataset} has {expected}; use --dataset folder for your own data"
                )
            setattr(args, name, given if given is not None else expected)
        for name, default in self.derived.items():
            if isinstance(default, dict):
                keys = ("otherwise", *(vars(args)[setting] for setting in self.settings))
                default = next((value for key, value in default.items() if key in keys), None)
            fill_in(args, {name: default[args.image_size > SMALL_IMAGE] if isinstance(default, tuple) else default})
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

    def _refuse_idle(self, args, argv):
        unset = object()
        given = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))

        def holds(setting):
            flag, _, value = setting.partition(" ")
            action = self._option_string_actions[flag]
            found = getattr(args, action.dest)
            return str(found) == value if value else found != action.default

        schedule = getattr(args, "schedule", "paper")
        by_schedule = {name for name in self.schedules[schedule] if given[name] is unset}
        for setting, flags in self.idle:
            parts = setting.split(" and ")
            if all(map(holds, parts)):
                theirs = by_schedule & {self._option_string_actions[part.split(" ")[0]].dest for part in parts}
                note = f" (which --schedule {schedule} sets)" if theirs else ""
                for idle in flags:
                    if given[self._option_string_actions[idle].dest] is not unset:
                        raise InputError(f"{idle} has no effect with {setting}{note}; leave one of them out")

    def _changed(self, args, defaults):
        """The method's own flags that are not as in `defaults`, for the folder's name, so that ablations do not share a folder;
        --schedule stands for what it sets."""
        defaults, parts = defaults | {"schedule": "paper"}, []
        for name, value in vars(args).items():
            if name not in self.shared and value != defaults[name]:
                text = "" if value is True else re.sub(r"[^\w.]+", "_", str(value))[-60:]
                parts.append(f"-{name.replace('_', '-')}{text}")
        return "".join(parts)

    def config(self, **settings):
        """The same arguments for a caller in Python: config(bits=4, epochs=10, no_bns=True)."""
        argv, known = [], {flag[2:].replace("-", "_") for flag in self._option_string_actions}
        for name, value in settings.items():
            if name not in known:
                raise InputError(f"config() has no setting '{name}'; its names are those of the flags, see {self.prog} --help")
            flag = "--" + name.replace("_", "-")
            if value is True:
                argv.append(flag)
            elif value is False and isinstance(self._option_string_actions.get(flag), argparse.BooleanOptionalAction):
                argv.append("--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:])
            elif value is not None and value is not False:
                argv += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
        return self.parse(argv)


def as_flag(name, value):
    """A setting by its name in Python, as a command line has it."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else "--no-" + flag[2:]
    return " ".join([flag, *map(str, value if isinstance(value, list) else [value])])


def as_flags(settings):
    """A dict of settings by their names in Python, as a command line has them."""
    return " ".join(as_flag(name, value) for name, value in settings.items())


def fill_in(cfg, defaults):
    """Give the arguments of `cfg` that were not given (None) their values from `defaults`, a dict by name."""
    for name, value in defaults.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)


def checked_schedule(cfg):
    """`cfg`, with its epochs cut to the calibrating ones where nothing is fine-tuned. Without a generator there is no warm-up:
    a quantized network is fine-tuned once it is calibrated, another one (whose warm-up is 0) from the first epoch.

    Raises:
        InputError: the run would end before any fine-tuning.
    """
    real = cfg.data_source == "real"
    cfg.warmup_epochs = cfg.calibrate_epochs if real and cfg.warmup_epochs else cfg.warmup_epochs
    if cfg.no_finetune:
        cfg.epochs = min(cfg.epochs, cfg.calibrate_epochs)
    elif cfg.epochs <= cfg.warmup_epochs:
        phase, flag = ("calibrating", "--calibrate-epochs") if real else ("warm-up", "--warmup-epochs")
        raise InputError(
            f"--epochs {cfg.epochs} ends within the {cfg.warmup_epochs} {phase} epochs, before any fine-tuning; raise it or "
            f"lower {flag}"
        )
    return cfg


def altered(cfg, **settings):
    """A copy of the arguments with some of them set otherwise."""
    return argparse.Namespace(**(vars(cfg) | settings))


def alone(cfg, name):
    """The arguments for another network than --arch, by name or "arch=weights": its own normalisation is to be found, unless it
    is that network after all."""
    arch, _, weights = name.partition("=")
    own = {"arch": arch, "weights": weights or None}
    if (arch, own["weights"]) != (cfg.arch, cfg.weights):
        own |= {"mean": None, "std": None}
    return altered(cfg, **own)


def check_image_size(cfg, multiple):
    """Raise an InputError where a generator whose first map is --image-size / `multiple` pixels wide cannot be trained."""
    if cfg.data_source == "real":
        return  # no generator
    if cfg.image_size % multiple:
        below = max(cfg.image_size // multiple, 1) * multiple
        possible = f"makes images of multiples of {multiple} pixels, such as {below} or {below + multiple}"
        raise InputError(f"--image-size is {cfg.image_size} and the generator {possible}; give another network or size")
    if cfg.batch_size * cfg.image_size == multiple:
        raise InputError(
            f"--batch-size is 1 with --image-size {cfg.image_size}, which leaves the generator's first BatchNorm one value per "
            "channel; raise one of them"
        )


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a program as Ctrl-C does."""


def _terminate(number, frame):
    raise Terminated


@contextmanager
def friendly_errors(program):
    """Ends the program with one sentence, on a line of its own, and exit status 2 where the input cannot be used, 130 after
    Ctrl-C and 143 after SIGTERM."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        if ours:
            signal.signal(signal.SIGTERM, _terminate)
        yield
    except (ValueError, RuntimeError, OSError) as error:  # InputError is a ValueError, torch.OutOfMemoryError a RuntimeError
        if isinstance(error, OSError):
            if error.filename is None:
                raise
            error = f"{error.filename} cannot be used ({error.strerror}); give another path, or change its permissions"
        elif isinstance(error, torch.OutOfMemoryError):
            error = f"out of GPU memory ({first_line(error)}); lower the batch size, or give --device cpu"
        elif isinstance(error, RuntimeError):
            if not any(words in str(error) for words in ("can't allocate memory", "not enough memory")):
                raise
            error = f"out of memory ({first_line(error)}); lower the batch size"
        elif "more than 1 value per channel when training" in str(error):
            error = "a BatchNorm in training needs more than one value per channel; raise the batch size or --image-size"
        elif not isinstance(error, InputError):
            raise
        close_all()
        distributed.let_another_speak(error)
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        close_all()
        if distributed.is_first():
            print(f"{program}: stopped{'; ' if interrupt.args else ''}{' '.join(interrupt.args)}", file=sys.stderr)
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def resumable(how="the same command with --resume continues it"):
    """Context manager that, after an interrupt, tells the user how to continue."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(how) from None
