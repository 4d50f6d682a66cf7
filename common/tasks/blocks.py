"""Blocks of a traced network, which ptq.py reconstructs and qat.py compares, and the bits of its first and last layer."""

import itertools
import operator
import os
from typing import NamedTuple

from torch import fx, nn

from common.cli import whole
from common.quant import QuantAct
from common.trace import evaluate


class Block(NamedTuple):
    """Consecutive nodes of a traced network through whose last value alone the rest of the network sees them."""

    name: str
    nodes: tuple
    entry: fx.Node

    def __call__(self, x, modules, quantize_activations=True):
        """The block's output for its input `x`, with its submodules taken from the dict `modules`."""
        env = {self.entry: x}
        for node in self.nodes:
            passes = node.op == "call_module" and node.target.startswith("act_quant_") and not quantize_activations
            env[node] = env[node.args[0]] if passes else evaluate(node, env.__getitem__, modules)
        return env[self.nodes[-1]]


def find_blocks(student, teacher):
    """The blocks that are reconstructed together (BRECQ): what a residual connection spans, all layers of a module of the
    same class that has none (an inverted residual of stride 2); single layers otherwise.

    Args:
        student: from `quantize`, of a traced network.
        teacher: the network it was made of, whose classes tell which modules are alike.

    Returns:
        A list of `Block`, in order; run one after the other they are the network.
    """
    graph, modules = list(student.graph.nodes), dict(student.named_modules())
    nodes, entry = [n for n in graph if n.op not in ("placeholder", "output")], graph[0]
    place = {node: index for index, node in enumerate(nodes)}

    def layers(group):
        return [n.target for n in group if n.op == "call_module" and isinstance(modules[n.target], (nn.Conv2d, nn.Linear))]

    def last_use(node):
        return max((place.get(user, len(nodes)) for user in node.users), default=-1)

    groups, group, reach, latest = [], [], last_use(entry), 0
    for index, node in enumerate(nodes):
        if latest and layers([node]):  # the next layer: what lies behind the latest cut begins a new group
            groups.append(group[:latest])
            group, latest = group[latest:], 0
        group.append(node)
        is_tuple = any(user.target is operator.getitem for user in node.users)
        if reach <= index and layers(group) and not is_tuple:  # a cut: nothing before this node is used behind it
            latest = len(group)
        reach = max(reach, last_use(node))
    groups.append(group)

    def homes(group):
        """The modules, from the outermost, that all layers of a group are in."""
        path = os.path.commonprefix([name.split(".")[:-1] for name in layers(group)])
        return [".".join(path[: depth + 1]) for depth in range(len(path))]

    def kinds(group):
        """The classes of its homes that say more than Sequential does, by path."""
        found = {path: type(teacher.get_submodule(path)) for path in homes(group)}
        return {path: kind for path, kind in found.items() if kind is not nn.Sequential}

    residual = {list(kinds(group).values())[-1] for group in groups if len(layers(group)) > 1 and kinds(group)}
    blocks, previous = [], None
    for group in groups:
        home = next((path for path, kind in kinds(group).items() if kind in residual), None)
        if home is not None and home == previous:
            blocks[-1] = blocks[-1]._replace(nodes=blocks[-1].nodes + tuple(group))
        else:
            blocks.append(Block(home or layers(group)[0], tuple(group), entry))
        entry, previous = group[-1], home
    return blocks


def ends_group(parser):
    """The group of flags that ptq.py and qat.py share: --ends-bits."""
    title = "both quantizations"
    about = "at least this many bits for the weights of the first and the last layer, and for the first activation"
    group = next((group for group in parser._action_groups if group.title == title), None)
    if group is None:
        group = parser.add_argument_group(title)
        group.add_argument("--ends-bits", type=whole(2, 8), default=8, help=about)
    return group


def raise_ends(student, bits):
    """Give the first and the last layer of a traced network, and the activation behind the first, at least `bits` bits."""
    modules = dict(student.named_modules())
    called = [modules[n.target] for n in student.graph.nodes if n.op == "call_module"]
    layers = [module for module in called if isinstance(module, (nn.Conv2d, nn.Linear))]
    behind = (module for module in called[called.index(layers[0]) :] if isinstance(module, QuantAct))
    for module in (layers[0], layers[-1], *itertools.islice(behind, 1)):
        module.bits = max(module.bits, bits)
