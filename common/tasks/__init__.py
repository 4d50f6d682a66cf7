"""Tasks that use a set of images: one module per cited paper, and two that compare sets, as MixMix's Tables 1, 2 and 6 do
(evaluate, transfer). Each module of TASKS has

    STUDENT                                   what the resulting network is called
    add_flags(parser)                         declares its flags; returns the groups of `parser` that hold them
    complete(cfg)                             fills in the settings that follow from others
    plan(model, cfg, run)                     the network as the task begins: what --check shows
    compress(model, images, cfg, run=None)    the task itself: the network that comes of it, in eval mode

where these are

    model     a trained classifier, which is left as it is; it must be possible to trace it, except for kd
    images    (N, channels, H, W), normalised for it; labels are not needed
    cfg       the task's flags and the shared ones
    run       a `Run`: device, memory layout, progress, files; without one nothing is written or shown

An InputError says what is wrong with a network that a task cannot take.
"""

from common.tasks import kd, prune, ptq, qat, transfer

TASKS = {"ptq": ptq, "qat": qat, "prune": prune, "kd": kd}


def add_flags(parser, **more):
    """Declare the flags of all tasks, and that each does nothing with the others.

    Args:
        parser: with a flag --task.
        more: by task, sets of flags that are declared elsewhere and serve it alone; for values of --task beside TASKS, too.
    """

    def flags(module):
        return {action.option_strings[0] for group in module.add_flags(parser) for action in group._group_actions}

    own = {name: flags(module) for name, module in TASKS.items()}
    own["transfer"] = own["ptq"] | flags(transfer)
    for task, others in more.items():
        own[task] = own.get(task, set()) | others
    for task, used in own.items():
        parser.without_effect(f"--task {task}", "--clipped-ste", *sorted(set().union(*own.values()) - used))
