"""Distillation of a network into a small one with a generator of its images (DAFL: Chen et al., ICCV 2019), or with images.

    one_hot, activation, information    what the generator minimises, in `dafl_loss`          Eq. 4 to 7
    compress                            the student learns from the teacher's outputs        Eq. 1

With images, the student learns from them alone: each batch rolled and mirrored as a whole, labelled by the teacher anew. A
method that has terms of its own for the generator hands them over as a class (see `compress`); MixMix does (its Sec. 5.4).

The settings are those of the released code, whose recipe MixMix starts from; what differs here, or is left open:

    what                   released code                                     here
    student's loss         Kullback-Leibler divergence, temperature 1        the same
    weights of the terms   0.05, 5, 0.01; CIFAR-100 0.5, 20, 0.1             the same
    information entropy    to base 10, where the paper does not say          the same
    learning rates         0.1, a tenth at 800 and 1,600 of 2,000 epochs;    the same, at 2/5 and 4/5 of --kd-epochs
                           generator 0.02
    generator              the layers of GDFQ's, without a label             the same (common/generators.py)
    reported accuracy      best epoch on test images                         last epoch (best also recorded)
    with images            -                                                 rolled by up to an eighth of the side, mirrored
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError
from common.cli import fill_in, number, whole
from common.generators import HumanDesigned
from common.images import jitter, sampler
from common.models import SMALL_IMAGE, build_student
from common.ops import kd_loss
from common.probe import input_channels, refuse_undifferentiable
from common.run import Run

GENERATOR_FLAGS = "--kd-latent-dim --kd-lr-g --one-hot-weight --information-weight --activation-weight".split()

STUDENT = "distilled"  # what the network is called in the table of a run


def add_flags(parser):
    """Declare the flags of this task; returns the groups of `parser` that hold them."""
    group = parser.add_argument_group("distillation (DAFL)")
    add = group.add_argument
    add("--student-arch", help="architecture of the student, as for --arch")
    add("--kd-epochs", type=whole(1), default=2000, help="number of epochs")
    add("--kd-iters", type=whole(1), default=120, help="number of iterations per epoch")
    add("--kd-batch-size", type=whole(1), default=1024, help="number of images per iteration")
    add("--kd-latent-dim", type=whole(1), default=1000, help="length of the generator's noise vector")
    student = "learning rate of the student (SGD), divided by 10 after 2/5 and again after 4/5 of the epochs"
    add("--kd-lr", type=number(0), default=0.1, help=student)
    add("--kd-lr-g", type=number(0), default=0.02, help="learning rate of the generator (Adam)")
    one_hot = "weight of DAFL's one-hot loss, and of MixMix's mixed cross-entropy beside it (default: 0.05, CIFAR-100 0.5)"
    add("--one-hot-weight", type=number(0), help=one_hot)
    add("--information-weight", type=number(0), help="weight of DAFL's information entropy (default: 5, CIFAR-100 20)")
    add("--activation-weight", type=number(0), help="weight of DAFL's activation loss (default: 0.01, CIFAR-100 0.1)")
    return (group,)


def complete(cfg):
    """Fill in the defaults that depend on the data set.

    Raises:
        InputError: no student.
    """
    weights = (0.5, 20.0, 0.1) if cfg.dataset == "cifar100" else (0.05, 5.0, 0.01)
    fill_in(cfg, dict(zip(("one_hot_weight", "information_weight", "activation_weight"), weights)))
    if cfg.student_arch is None:
        raise InputError("--task kd needs --student-arch; give the architecture to distil into")


def plan(model, cfg, run, generates=False):
    """The student as the distillation begins, with random weights; `generates`: there will be a generator, not images."""
    teacher, example = run.adopt(model)
    student = build_student(cfg.student_arch, teacher, cfg.num_classes, cfg.image_size)
    if generates and (cfg.image_size > SMALL_IMAGE or cfg.image_size % 4):
        sides = f"a multiple of 4, at most {SMALL_IMAGE}"
        raise InputError(f"--image-size is {cfg.image_size}, and DAFL's generator needs {sides}; distil with --images")
    if generates and not any(isinstance(m, nn.Linear) for m in teacher.modules()):
        raise InputError("the teacher has no linear layer, whose input DAFL's activation term needs; distil with --images")
    if generates:
        refuse_undifferentiable(teacher, example)
    return run.adopt_student(student, example)


def dafl_loss(logits, features, cfg):
    """What the generator minimises: images of one class each, of all classes alike, that excite the teacher.

    Args:
        logits: the teacher's, (B, C).
        features: what enters its last layer, (B, D).
        cfg: the flags of this task.
    """
    log_p = F.log_softmax(logits, 1)
    one_hot = F.nll_loss(log_p, logits.argmax(1))  # Eq. 4
    activation = -features.abs().mean()  # Eq. 5
    mean = log_p.exp().mean(0)
    information = (mean * mean.clamp(min=1e-12).log10()).sum()  # Eq. 6
    return cfg.one_hot_weight * one_hot + cfg.information_weight * information + cfg.activation_weight * activation  # Eq. 7


def compress(model, images, cfg, run=None, added=None):
    """Distil a network into --student-arch, from random weights. Arguments as for all tasks, and

    Args:
        images: None for DAFL's generator.
        added: what the generator minimises beside DAFL's loss: a class, made of the teacher, as the loop has it, and the run.
            Its choose(epoch) returns something hashable that is used in the epoch; its loss(x, y, chosen), of images (B,
            channels, H, W), the teacher's labels (B,) for them and that choice, a scalar.
    """
    run = run or Run(cfg)
    torch.manual_seed(cfg.seed)
    device = run.device
    student = plan(model, cfg, run, generates=images is None)
    teacher, _ = run.adopt(model)
    sgd = torch.optim.SGD(student.parameters(), cfg.kd_lr, momentum=0.9, weight_decay=5e-4, fused=run.fused)
    stateful, features = {"sgd": sgd}, {}
    if images is None:
        generator = run.place(HumanDesigned(cfg.image_size, input_channels(teacher), cfg.kd_latent_dim))
        adam = torch.optim.Adam(generator.parameters(), cfg.kd_lr_g, fused=run.fused)
        stateful |= {"generator": generator, "adam": adam}
        for layer in (m for m in teacher.modules() if isinstance(m, nn.Linear)):  # what enters the one that is called last
            layer.register_forward_pre_hook(lambda _, args: features.update(latest=args[0]))
    else:
        batch, draw = sampler(images, cfg.kd_batch_size, device)
    terms = added(teacher, run) if added else None

    def synthesize(y):
        """Images for samples; what they show is the generator's choice."""
        return generator(torch.randn(len(y), cfg.kd_latent_dim, device=device)).float()

    def generator_step(chosen):
        x = run.compute(generator, torch.randn(cfg.kd_batch_size, cfg.kd_latent_dim, device=device))
        logits = run.compute(teacher, x)
        loss = dafl_loss(logits, features.pop("latest").float(), cfg)
        if terms:
            loss = loss + terms.loss(x, logits.argmax(1), chosen)
        run.update(adam, loss)
        run.log(loss_g=loss)
        return x.detach(), logits.detach()

    def labelled_batch():
        x = jitter(batch, cfg.image_size // 8, flip=True)
        return x, run.compute(teacher, x)

    def iteration(chosen):
        x, logits = generator_step(chosen) if images is None else labelled_batch()
        ours = run.compute(student, x)
        loss = kd_loss(ours, logits, 1.0, "batchmean")
        run.update(sgd, loss)
        run.log(loss_q=loss)

    step = run.capture(iteration, *((sgd, adam) if images is None else (sgd,)))
    run.rates = "--kd-lr or --kd-lr-g" if images is None else "--kd-lr"
    for epoch in run.epochs(cfg.kd_epochs, student, synthesize, iters=cfg.kd_iters, **stateful):
        sgd.param_groups[0]["lr"] = cfg.kd_lr * 0.1 ** sum(5 * epoch >= part * cfg.kd_epochs for part in (2, 4))
        chosen = terms.choose(epoch) if terms else None
        student.train()
        for _ in run.steps():
            if images is not None:
                draw()
            step(chosen)
        student.eval()
    return student
