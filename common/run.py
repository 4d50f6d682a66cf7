"""One run of a method: its folder, seeds, device and precision, epochs, checkpoints, resuming. Of the
methods it knows only the names of their files."""

import json
import os
import platform
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

from common import InputError, distributed, first_line, replacing
from common.capture import GraphedStep, compiled, keep_freed_memory, pick_capture
from common.checkpoint import load_checkpoint, lock, previous, save_checkpoint, share
from common.data import evaluate
from common.device import computes_bf16, peak_memory, pick_device, processor, synchronise
from common.learned import step_parameters
from common.probe import probe, refuse_infinite, refuse_undifferentiable
from common.progress import Progress, say
from common.trace import baked_copy, memory_layout

FILES = "quantized.pt quantized.onnx student.pt result.json samples.png metrics.jsonl checkpoint.pt checkpoint.pt.previous"
FILES = [*FILES.split(), "analysis"]  # beside config.json
FURTHER_FILES = {  # what scripts leave beside these
    "autorecon": "genotype.json genotype.svg search".split(),
    "mixmix": "grid.png images.npz images batches parts evaluation.json transfer.json".split(),
}
INPUTS = ("genotype", "generator", "images", "weights", "zoo", "held_out", "targets")  # arguments that may name files
PACE = 5, 25  # steps of a phase of the run between which its pace is measured
SLOW = 2.0, 10.0  # an epoch is slow if it takes this many times as long as the fastest one, and this many seconds
NOT_COMPARED = "out resume overwrite eval check export integer_check threads data_dir download eval_every".split()  # no effect


def seed_of_part(seed, index):
    """The seed of one of a run's parts, which so depends on nothing that was made before it."""
    return (seed * 1_000_003 + index) % 2**63


# --------------------------------------------------------------------------------------------------------- one run


class Run:
    """One run of a method: what its loop needs besides the method itself.

    Without a folder (a call of `compress` from Python) nothing is written and nothing is shown. Of several processes that share
    the run's batches (common/distributed.py) only the first has a folder.

    Args:
        cfg: from `Parser.parse` or `Parser.config`; its `precision` and `capture` become those that are used.
        folder: where the run leaves its files, or None.
        files: names of files and folders that this method leaves beside those of any run.
        result: the file that a finished run has.
        short: what `--schedule short` sets, by name, for methods that have it.
        free: names of arguments that may differ in a resumed run, in addition to NOT_COMPARED.
        fixed: names in NOT_COMPARED that may not.
        part: which part of a run that several processes make together is this process's; each part has a lock of its own.

    `test_set` may be set to a re-iterable over (images, labels) on which the student is evaluated.
    """

    layout = torch.channels_last
    fused = True  # optimizers in one kernel
    started = False  # whether the folder is this run's
    held = None  # the lock that keeps other processes out of the folder
    rates = "the learning rate"  # what to lower when a loss is not finite
    fp_top1 = fp_top5 = None  # accuracy of the full-precision network, where there is a test set
    images = None  # (N, channels, H, W) that the student is made with, where there is no generator to draw samples from
    folded = False  # whether the student's BatchNorms are folded

    def __init__(self, cfg, folder=None, files=(), result="result.json", short=None, free=(), fixed=(), part=None):
        self.cfg, self.test_set, self.short = cfg, None, short
        self.folder = Path(folder) if folder and distributed.rank == 0 else None
        self.files, self.result_file = (*FILES, *files, result), result
        self.may_differ, self.part = {*NOT_COMPARED, *free} - {*fixed}, part
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.device = pick_device(cfg.device)
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)  # streams and graphs are those of the current device
        else:
            keep_freed_memory()
        self.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and computes_bf16(self.device))
        cfg.device, cfg.precision = str(self.device), "bf16" if self.bf16 else "fp32"  # what config.json records
        steps = cfg.epochs * cfg.iters if hasattr(cfg, "epochs") else 0  # a loop of another kind is never compiled
        cfg.capture = pick_capture(cfg.capture, self.device, steps)
        self.results, self.history, self.latest = {}, [], {}
        self.facts = {"processes": distributed.size} if distributed.size > 1 else {}
        self.seconds, self.iterations, self.peak = 0.0, 0, 0
        self.fastest, self.advised = {}, False
        if self.folder:
            self._claim_folder()
        torch.manual_seed(cfg.seed)

    def autocast(self):
        """Convolutions in bf16 where --precision says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def compute(self, network, *args):
        """What `network` makes of `args` in the run's precision, as float32."""
        with self.autocast():
            return network(*args).float()

    def place(self, module):
        """`module` on the run's device, in the memory layout that its convolutions are fastest in."""
        return module.to(self.device, memory_format=self.layout)

    def adopt(self, model):
        """A frozen float32 copy of a caller's network on the run's device, and a small batch that it takes.

        A network that cannot be computed in channels-last has the whole run in PyTorch's own layout, and the run says so.

        Raises:
            InputError: the network fails on images of the size that the run's arguments say, returns other logits, has
                weights or statistics that are not finite, or lets no gradient through to images that are to be made.
        """
        refuse_infinite(model, "the network")
        model = baked_copy(model).eval().requires_grad_(False).to(self.device, torch.float32)
        example = probe(model, self.cfg.num_classes, self.cfg.image_size)
        if hasattr(self.cfg, "lr_g") and self.cfg.data_source != "real":  # a generator is to learn from its gradients
            refuse_undifferentiable(model, example)
        self._settle_layout(model, example)
        return self.place(model), example

    def adopt_student(self, student, example):
        """A network that is to be trained, on the run's device, as `adopt` says; `example` is what that returned."""
        student = student.to(self.device)
        self._settle_layout(student, example, retrace=False)
        return self.place(student)

    def _settle_layout(self, model, example, retrace=True):
        """Give up channels-last for the run if `model` cannot be computed in it; arguments as for `memory_layout`."""
        if self.layout is torch.channels_last and memory_layout(model, example, retrace) is not self.layout:
            self.layout = torch.contiguous_format
            self.announce("the network's forward needs NCHW memory layout, so the run is slower than in channels-last")
        if self.layout is torch.contiguous_format:
            model.register_forward_pre_hook(lambda model, args: (args[0].contiguous(), *args[1:]))

    def capture(self, step, *optimizers):
        """`step` as --capture says: its arguments name the phase of the run, and it returns nothing.

        Args:
            step: function of hashable arguments, one training iteration.
            optimizers: all that it moves.
        """
        if distributed.size > 1:
            step = distributed.WholeBatch(self.cfg.batch_size)(step)
        if self.cfg.capture == "compile":
            self.announce("compiling the step: the first iterations take a minute or two")
            self.update, self.log = torch.compiler.disable(self.update), torch.compiler.disable(self.log)
            step = compiled(step)
        if self.cfg.capture != "none" and self.device.type != "cpu":
            step = GraphedStep(step, optimizers, self.latest)
        return step

    def update(self, optimizer, loss, keep_graph=False):
        """One step of `optimizer` down the gradient of `loss`, which goes to its own parameters only; with `keep_graph` the
        gradient of another loss can be taken through the same forward."""
        optimizer.zero_grad()
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        loss.backward(inputs=own, retain_graph=keep_graph)
        distributed.average(parameter.grad for parameter in own if parameter.grad is not None)
        optimizer.step()

    def note(self, **figures):
        """Note figures of the whole epoch, or dicts of them, for its line of metrics.jsonl."""

        def rounded(value):
            return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else round(value, 6)

        self.noted |= rounded(figures)

    def record(self, **facts):
        """Record what the method alone knows about the run, for result.json."""
        self.facts |= facts

    def epochs(self, count, student, synthesize, evaluate_from=0, iters=None, **stateful):
        """Epoch numbers 0 ... count - 1, with everything around them: resuming, progress, metrics, checkpoints.

        Args:
            count: epochs of the run.
            student: the network to evaluate.
            synthesize: labels (B,) -> images (B, C, H, W), for samples and agreement when the run is over.
            evaluate_from: first epoch after which the student is evaluated.
            iters: steps of an epoch (default: --iters).
            stateful: all else that changes from epoch to epoch: networks, optimizers.

        Raises:
            InputError: a folder that cannot be used, or a loss that is not finite.
        """
        stateful["student"], self.synthesize = student, synthesize
        if self.cfg.check:
            return
        start = self._begin(stateful)
        self.iters, self.total = iters or self.cfg.iters, count * (iters or self.cfg.iters)
        phases = {start: "at the pace of the first steps", max(start, evaluate_from): "now that the student learns"}
        self.bar = Progress(total=count * self.iters, initial=start * self.iters, disable=self.folder is None, unit="it")
        for epoch in range(start, count):
            self.epoch, self.losses, self.noted = epoch, {}, {}
            before, self.phase = self.seconds, phases.get(epoch)
            self.bar.set_description(f"epoch {epoch + 1}/{count}", refresh=False)
            yield epoch
            spent = self.seconds - before
            self._advise(spent, epoch >= evaluate_from)
            line = {"epoch": epoch, **self._mean_losses(), **self.noted, "seconds": round(spent, 2)}
            self._check_weights(student)
            due = (epoch + 1) % self.cfg.eval_every == 0 or epoch + 1 == count
            if self.test_set and due and epoch >= evaluate_from:
                line |= self.measure("last_top1", student)
                self.results["best_top1"] = max(self.results.get("best_top1", 0.0), line["top1"])
            self.history.append(line)
            self.bar.show({k: v for k, v in line.items() if not isinstance(v, dict) and k not in ("epoch", "seconds")})
            self._save_checkpoint(epoch + 1, stateful)
        self.bar.close()
        if self.folder:
            previous(self.folder / "checkpoint.pt").unlink(missing_ok=True)
        self.peak = peak_memory(self.device)

    def steps(self):
        """Step numbers of one epoch, timed, moving the progress bar."""
        began = time.time()
        for step in range(self.iters):
            yield step
            for name, loss in self.latest.items():
                self.losses.setdefault(name, []).append(loss)
            self.latest.clear()
            self.bar.update()
            if self.phase and step + 1 in PACE and self.iters >= PACE[1]:
                self._tell_time(step + 1)
        synchronise(self.device)
        self.seconds += time.time() - began
        self.iterations += self.iters

    def _tell_time(self, step):
        """Say how long the run will take, and what --schedule short would take, from the time between two steps."""
        synchronise(self.device)
        if step == PACE[0]:
            self.pace_began = time.time()
            return
        pace = (time.time() - self.pace_began) / (step - PACE[0])
        line = f"about {duration(pace * (self.total - self.epoch * self.iters - step))} left on this machine, {self.phase}"
        if self.short and self.cfg.schedule == "paper" and self.total > (steps := self.short["epochs"] * self.short["iters"]):
            images = self.short["batch_size"] / self.cfg.batch_size
            line += f"; --schedule short takes about {duration(pace * steps * images)}"
        self.announce(line)

    def _advise(self, spent, learning):
        """Say once that an epoch was slow, among those in which the student learns or among the others, and why it may be."""
        best = self.fastest.setdefault(learning, spent)
        self.fastest[learning] = min(best, spent)
        if self.cfg.capture == "none" and spent > SLOW[0] * best and spent > SLOW[1] and not self.advised:
            took = f"epoch {self.epoch + 1} took {duration(spent)}, where the fastest one took {duration(best)}"
            self.announce(f"{took}; where several runs share the processor, start each with --threads 1")
            self.advised = True

    def log(self, **losses):
        """Note one step's losses (scalar tensors); they are read from the device once an epoch."""
        self.latest.update((name, loss.detach()) for name, loss in losses.items())

    def conclude(self, student, began):
        """Note the time since `began`, the peak memory and the accuracy of a run that has no epochs."""
        self.seconds, self.peak = self.seconds + time.time() - began, peak_memory(self.device)
        self.measure("last_top1", student)

    def announce(self, line):
        """Say what the run is about to do, where it says anything."""
        if self.folder is not None:
            say(f"{self.cfg.method:<10}{line}")

    def measure(self, name, student):
        """Record the student's accuracy on the test set under `name`, top-5 beside it; returns what metrics.jsonl says."""
        if self.test_set is None:
            return {}
        top1, top5, loss = evaluate(student, self.test_set)
        self.results |= {name: top1} | ({} if top5 is None else {name.replace("top1", "top5"): top5})
        return {"top1": top1, "test_loss": round(loss, 6)}

    def _mean_losses(self):
        means, bad = {}, []
        for name, losses in self.losses.items():
            values = torch.stack(losses).float()
            distributed.average([values])
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
        steps = [step.detach().float() for step in step_parameters(student)]
        if steps and (least := torch.stack(steps).min().item()) < 0:
            self._stop(f"a learned step size of the student became {least:.2g} in epoch {self.epoch + 1}")

    def _stop(self, what):
        kept = "no epoch is saved yet"
        if self.folder and self.epoch:
            kept = f"{self.folder / 'checkpoint.pt'} holds the first {self.epoch} epochs"
        raise InputError(f"{what}, and {kept}; lower {self.rates} and give another --out")

    # ------------------------------------------------------------------------------------------------- the folder

    def arguments(self):
        """The arguments as plain values."""
        arguments = vars(self.cfg) | {"device": self.device.type}  # each of several processes has its own
        return json.loads(json.dumps(arguments))

    def _claim_folder(self):
        """Refuse a folder that cannot take this run, before anything is computed. That of an unfinished run is locked."""
        existing = next(path for path in (self.folder, *self.folder.resolve().parents) if path.exists())
        if not existing.is_dir() or not (self.finished or os.access(existing, os.W_OK)):
            raise InputError(f"--out {self.folder} cannot be written ({existing} forbids it); give another folder")
        config = self.folder / "config.json"
        self.joins = config.exists()
        if not self.joins:
            if theirs := [name for name in self.files if (self.folder / name).exists()]:
                what = f"is not a run folder but contains '{theirs[0]}', which a run would replace"
                raise InputError(f"--out {self.folder} {what}; give another folder")
            return
        try:
            there = json.loads(config.read_text())["arguments"]
            before, now = ({k: v for k, v in a.items() if k not in self.may_differ} for a in (there, self.arguments()))
        except (ValueError, KeyError, TypeError, AttributeError):
            what = "has a config.json that is damaged or does not belong to a run"
            raise InputError(f"--out {self.folder} {what}; give another folder") from None
        if not self.finished:
            self._take_folder()
        if self.cfg.overwrite:
            return
        changed = [k for k in now | before if before.get(k) != now.get(k)]
        differ = [f"{k} {before.get(k, 'unknown')} there, {now.get(k, 'unknown')} here" for k in changed]
        if differ:
            advice = "give another --out, or --overwrite to replace it"
            raise InputError(f"--out {self.folder} holds a run with other arguments ({'; '.join(differ)}); {advice}")
        if not self.finished and not self.cfg.resume:
            advice = "give --resume to continue it, or --overwrite to replace it"
            raise InputError(f"--out {self.folder} holds an unfinished run; {advice}")

    @property
    def finished(self):
        """Whether the folder holds the result of a run with these arguments, which is to stay."""
        return bool(self.folder and not self.cfg.overwrite and not self.started and (self.folder / self.result_file).exists())

    def _begin(self, stateful):
        """Start the folder, or load its checkpoint; returns the epoch to go on with."""
        state = None
        if self.folder:
            self._take_folder()
            state = load_checkpoint(self.folder / "checkpoint.pt", self.announce) if self.cfg.resume else None
        if state := distributed.from_first(state):
            return self._continue(state, stateful)
        self.start()
        return 0

    def _take_folder(self):
        """Make the folder and keep other processes out of it, or out of this one's part."""
        if self.held and self.folder.exists():  # one that lies in another run's may have been removed with its lock
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.held = lock(self.folder / ".lock", self.part if self.joins and self.cfg.resume else None)
        except BlockingIOError:
            advice = "wait until it ends, or give another --out"
            raise InputError(f"--out {self.folder} is in use by another process; {advice}") from None
        except OSError as error:
            raise InputError(f"--out {self.folder} cannot be written ({error.strerror}); give another folder") from None
        if not self.joins and (self.folder / "config.json").exists():
            raise InputError(f"--out {self.folder} holds a run that another process began after this one; give another folder")

    def start(self):
        """Make the folder and write config.json. What an earlier run has left there goes, if it is to be replaced."""
        if self.started or self.folder is None:
            return
        self._take_folder()
        self.started = True
        versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
        machine = {"processor": processor(self.device), "threads": torch.get_num_threads()}
        content = {"arguments": self.arguments(), "versions": versions | {"numpy": np.__version__}, "machine": machine}
        if not self.cfg.resume:  # results first, so that none is ever found beside the arguments of another run
            self._refuse_own_input()
            for path in (self.folder / name for name in (self.result_file, *self.files, *self._left_before())):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        write_atomically(self.folder / "config.json", json.dumps(content, indent=1))
        if self.part is not None:
            share(self.held)

    def _test_images(self):
        """How many test images there are, where the test set says so."""
        count = getattr(self.test_set, "count", None)
        return count if isinstance(count, int) else None

    def _left_before(self):
        """What else the run that is to be replaced may have left, by its method."""
        try:
            method = json.loads((self.folder / "config.json").read_text())["arguments"]["method"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return FURTHER_FILES.get(method, [])

    def _refuse_own_input(self):
        """Refuse a run that would remove what it is to read."""
        for name in INPUTS:
            values = getattr(self.cfg, name, None)
            for value in values if isinstance(values, list) else [values]:
                path = Path(re.sub(r"^autorecon:|^[^/]*=", "", str(value)))
                inside = self.folder.resolve() in (path.resolve(), *path.resolve().parents)
                if value and inside and path.exists():
                    flag = "--" + name.replace("_", "-")
                    raise InputError(f"{flag} {value} lies in --out {self.folder}, which is to be replaced; give another --out")

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
            "test_images": self._test_images(),
            "seconds": self.seconds,
            "iterations": self.iterations,
        }
        save_checkpoint(state, self.folder / "checkpoint.pt")
        self._write_metrics()

    def _write_metrics(self):
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def _continue(self, state, stateful):
        """Take over the contents of a checkpoint; returns the epoch to go on with."""
        try:
            for name, item in stateful.items():
                item.load_state_dict(state["stateful"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            what = f"{self.folder}/checkpoint.pt belongs to another network or version ({first_line(error)})"
            raise InputError(f"--resume: {what}; remove it") from None
        before, now = state.get("test_images"), self._test_images()
        if distributed.rank == 0 and before is not None and before != now:
            found = f"the run was begun with {before:,} test images, and there are {f'{now:,}' if now else 'none'} now"
            raise InputError(f"--resume: {found}; give --data-dir as before")
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.results, self.history = state["results"], state["history"]
        self.seconds, self.iterations = state["seconds"], state["iterations"]
        if self.folder:
            self._write_metrics()
        return state["epoch"]


def write_atomically(path, text):
    """Write a text file in one step, so that a killed run never leaves half of it."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def duration(seconds):
    """A time in words: 40 s, 12 min, 2 h 20 min."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
