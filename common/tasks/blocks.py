"""Blocks of a traced network, which ptq.py reconstructs and qat.py compares; where its activations are quantized, and the bits
of its first and last layer."""

import functools
import operator
import os
from typing import NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.activations import is_activation, kind_of
from common.cli import one_of, whole
from common.quant import ACT_PREFIX, QuantAct
from common.supported import LAYERS
from common.trace import METADATA, compute_node

ARITHMETIC = {"add", "iadd", "sub", "isub", "mul", "imul"}


class Block(NamedTuple):
    """Consecutive nodes of a traced network; later nodes use only the value of the last."""

    name: str
    nodes: tuple
    entry: fx.Node

    def __call__(self, x, modules, quantize_activations=True):
        """The block's output for its input `x`, with its submodules taken from the dict `modules`."""
        env = {self.entry: x}
        for node in self.nodes:
            passes = node.op == "call_module" and node.target.startswith(ACT_PREFIX) and not quantize_activations
            env[node] = env[node.args[0]] if passes else compute_node(node, env.__getitem__, modules)
        return env[self.nodes[-1]]


def is_a(node, modules, kind):
    """Whether a node of a graph calls a module of this class."""
    return node.op == "call_module" and isinstance(modules[node.target], kind)


def find_blocks(network, teacher):
    """The blocks that are reconstructed together (BRECQ): what a residual connection spans, all layers of a module of the
    same class that has none (an inverted residual of stride 2); single layers otherwise.

    Args:
        network: a traced network, quantized or not.
        teacher: the network it was made of, whose classes tell which modules are alike.

    Returns:
        A list of `Block`, in order; run one after the other they are the network.
    """
    graph, modules = list(network.graph.nodes), dict(network.named_modules())
    nodes, entry = [n for n in graph if n.op not in ("placeholder", "output")], graph[0]
    place = {node: index for index, node in enumerate(nodes)}

    def layers(group):
        return [n.target for n in group if is_a(n, modules, LAYERS)]

    def last_use(node):
        return max((place.get(user, len(nodes)) for user in node.users), default=-1)

    groups, group, reach, latest = [], [], last_use(entry), 0
    for index, node in enumerate(nodes):
        if latest and layers([node]):  # the next layer: what comes after the latest cut begins a new group
            groups.append(group[:latest])
            group, latest = group[latest:], 0
        group.append(node)
        is_tuple = any(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
        if reach <= index and layers(group) and not is_tuple:  # a cut: nothing before this node is used after it
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


def computes(node, modules):
    """Whether a node is a layer, a BatchNorm, a sum or a product (or the network's input), and so has values of its own, which
    activation functions, pooling, reshaping and the like hand on."""
    several = len(node.all_input_nodes) > 1 and kind_of(node, modules) in ARITHMETIC and not is_activation(node, modules)
    return several or node.op == "placeholder" or is_a(node, modules, (*LAYERS, _BatchNorm))


def nearest(node, found):
    """The nodes for which `found` is true that the value of `node` is made of: itself, or the nearest before it."""
    if found(node) or node.target is getattr or node.target in METADATA:  # a size is no value
        return [node] if found(node) else []
    return [n for source in node.all_input_nodes for n in nearest(source, found)]


def brecq_places(network, teacher):
    """Where BRECQ quantizes activations: the outputs of activation functions and of blocks, residual sums and linear
    bottlenecks included, but not the network's input and output. Also what else a layer receives of another without an
    activation function between (ShuffleNetV2), and products with gates (squeeze and excitation), which BRECQ does not have.

    Args:
        network: traced, not quantized.
        teacher: as for `find_blocks`.

    Returns:
        A set of nodes.
    """
    modules, nodes = dict(network.named_modules()), list(network.graph.nodes)
    layers = [node for node in nodes if is_a(node, modules, LAYERS)]
    found = {node for node in nodes[: nodes.index(layers[-1])] if is_activation(node, modules)}
    for node in [block.nodes[-1] for block in find_blocks(network, teacher)[:-1]] + [layer.args[0] for layer in layers[1:]]:
        found.update(nearest(node, lambda n: is_activation(n, modules) or computes(n, modules)))
    return found - {nodes[0]}


def placement(cfg, teacher):
    """--act-placement as `quantize` takes it."""
    return functools.partial(brecq_places, teacher=teacher) if cfg.act_placement == "blocks" else cfg.act_placement


def shared_group(parser):
    """The group of flags that ptq.py and qat.py share, --ends-bits; --act-placement has a third value with them."""
    title = "post-training quantization and quantization-aware training"
    group = next((group for group in parser._action_groups if group.title == title), None)
    if group is None:
        group = parser.add_argument_group(title)
        about = "minimum bit width of the first and the last layer: of their weights, of the last layer's input, and of the "
        about += "first layer's output (ptq) or input (qat)"
        group.add_argument("--ends-bits", type=whole(2, 8), default=8, help=about)
        flag = parser._option_string_actions["--act-placement"]
        flag.default, flag.type = None, one_of("relu", "input", "blocks")
        flag.help = "quantize outputs of activation functions (relu), these and outputs of blocks (blocks, as in BRECQ), or "
        flag.help += "inputs of all layers (input, as in LSQ) (default: ptq blocks, qat input)"
    return group


def raise_ends(student, bits, paper):
    """Give the first and the last layer of a traced network at least `bits` bits for their weights, and for the activations
    beside them that `paper` has: "lsq" the inputs of both; "brecq" the first one's output, and the last one's input where
    that is a layer's own output, and no residual sum."""
    modules, nodes = dict(student.named_modules()), list(student.graph.nodes)
    layers, acts = ([node for node in nodes if is_a(node, modules, kind)] for kind in (LAYERS, QuantAct))

    def inputs(layer):
        return [node for node in nearest(layer.args[0], {*layers, *acts}.__contains__) if node in acts]

    raised = inputs(layers[-1])
    if paper == "lsq":
        raised += inputs(layers[0])
    else:
        own = functools.partial(nearest, found=lambda node: computes(node, modules))
        raised = [act for act in raised if set(layers).issuperset(own(act.args[0]))]
        raised += [act for act in acts if nodes.index(act) > nodes.index(layers[0])][:1]
    for node in (layers[0], layers[-1], *raised):
        modules[node.target].bits = max(modules[node.target].bits, bits)
