"""The graph of a network: traced with the shapes of an example, free of its memory layout.

`torch.fx` alone stops at arithmetic on shapes, at branches on them and at `view` in the layout that convolutions are fastest
in. Most published networks have one of these.
"""

import copy
import inspect
import operator
import types
from contextlib import contextmanager, suppress

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from common import InputError, first_line
from common.activations import is_activation, kind_of
from common.device import full_precision

EXAMPLES = (2, 3)  # batch sizes: what differs between them depends on the batch size, all else is a constant
UNSEEN = 4  # images in the batch on which a graph must compute what its network computes
OLD_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
METADATA = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "element_size"}
VIEWS = "getitem view reshape flatten permute transpose chunk split narrow squeeze unsqueeze contiguous detach identity".split()


def compute_node(node, value, modules):
    """What a node of a graph computes.

    Args:
        node: any but a placeholder or the output.
        value: function of a node that returns what it has computed.
        modules: the network's submodules by name, itself as "".
    """
    if node.op == "get_attr":
        return operator.attrgetter(node.target)(modules[""])
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    if node.op == "call_module":
        return modules[node.target](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


class _Proxy(fx.Proxy):
    """A value of the graph. Its shape, dtype and so on are those it has for the examples."""

    def __setitem__(self, key, value):
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __getattr__(self, name):
        values = self.tracer.values.get(self.node)
        if self.node.op == "get_attr" and self.tracer.examples:
            values = [self.tracer.value(self.node, 0)]  # a parameter is the same for all of them
        if values is None or not hasattr(values[0], name) or callable(getattr(values[0], name)):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})


class _Tracer(fx.Tracer):
    """Records a network's forward while it computes every node for two batches of different sizes.

    Shapes that are equal for both are plain Python numbers to the network's code; those that are not stay in the graph. What
    is read from the data of a tensor never decides a branch.

    Args:
        examples: two input batches, or nothing, with which this is `fx.Tracer`.
        whole: further classes of modules that are single nodes.
        inside: whether convolutions and linear layers with a custom forward are looked into.
        reshaping: whether a `view` becomes a `reshape`, which has the same values in any memory layout.
    """

    def __init__(self, examples=(), whole=(), inside=False, reshaping=True):
        super().__init__()
        self.examples, self.whole, self.inside, self.reshaping = examples, whole, inside, reshaping
        self.values, self.from_data, self.computing = {}, set(), False

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """The images are the only argument; all others keep their defaults."""
        self.modules = dict(self.root.named_modules(remove_duplicate=False))
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m, module_qualified_name):
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            return not self.inside or is_plain(m)
        own = type(m).forward not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
        if isinstance(m, _BatchNorm) and not isinstance(m, self.whole):
            return not own  # one with a forward of its own may compute an activation
        return isinstance(m, self.whole) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        return forward(*args, **kwargs) if self.computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node):
        return _Proxy(node, self)

    def value(self, node, index):
        """What `node` is for an example."""
        if node.op != "get_attr":
            return self.values[node][index]
        before, self.computing = self.computing, True  # the network's own parameter, not one more node for it
        try:
            return compute_node(node, None, self.modules)
        finally:
            self.computing = before

    def create_proxy(self, kind, target, args, kwargs, *more, **named):
        if self.reshaping and (kind, target) == ("call_method", "view") and not kwargs and not isinstance(args[1], torch.dtype):
            target = "reshape"
        if kind == "call_module" and not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        node = proxy.node
        if not self.examples or kind == "get_attr":
            return proxy
        if kind == "placeholder":
            self.values[node] = [example.clone() for example in self.examples]
            return proxy
        self.computing = True
        try:
            values = self.values[node] = [
                compute_node(node, lambda n, index=index: self.value(n, index), self.modules)
                for index in range(len(self.examples))
            ]
        finally:
            self.computing = False
        first = values[0]
        of_tensors = any(isinstance(self.value(n, 0), torch.Tensor) for n in node.all_input_nodes)
        metadata = target is getattr or (kind == "call_method" and target in METADATA)
        if isinstance(first, torch.Tensor) or target is operator.setitem:
            return proxy
        if any(n in self.from_data for n in node.all_input_nodes) or (of_tensors and not metadata and not _has_tensors(first)):
            self.from_data.add(node)
            return proxy
        if type(first) in (tuple, list, torch.Size):
            parts = [self.create_proxy("call_function", operator.getitem, (proxy, index), {}) for index in range(len(first))]
            return tuple(parts)
        if isinstance(first, (int, float, str, torch.dtype, type(None))) and values.count(first) == len(values):
            self.graph.erase_node(node)
            return first
        return proxy

    def to_bool(self, obj):
        values = self.values.get(obj.node)
        known = values and obj.node not in self.from_data and not isinstance(values[0], torch.Tensor)
        if known and len({bool(value) for value in values}) == 1:
            return bool(values[0])
        return super().to_bool(obj)


def _has_tensors(value):
    return isinstance(value, (tuple, list, dict)) and any(
        isinstance(v, torch.Tensor) for v in (value.values() if isinstance(value, dict) else value)
    )


def is_plain(layer):
    """Whether a convolution or linear layer computes what its class in torch.nn does."""
    own = getattr(type(layer), "_conv_forward", None) not in (None, nn.Conv2d._conv_forward)
    return type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward) and not own


@contextmanager
def _sizes_in_calls(tracer, model):
    """Within it, `len` and the functions that make tensors of a size take sizes that depend on the batch."""

    def recorded(function):
        def call(*args, **kwargs):
            values = [*args, *kwargs.values()]
            values += [v for value in values if isinstance(value, (tuple, list)) for v in value]
            if any(isinstance(value, fx.Proxy) for value in values):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def length(x):
        return x.size(0) if isinstance(x, fx.Proxy) else len(x)

    makers = {name: getattr(torch, name) for name in ("zeros", "ones", "full", "empty", "arange")}
    forwards = [type(module).forward for module in model.modules()]
    scopes = [f.__globals__ for f in forwards if "len" not in getattr(f, "__globals__", {"len": len})]
    try:
        for scope in scopes:
            scope["len"] = length
        for name, function in makers.items():
            setattr(torch, name, recorded(function))
        yield
    finally:
        for scope in scopes:
            scope.pop("len", None)
        for name, function in makers.items():
            setattr(torch, name, function)


def _weight_hooks(module):
    """Hooks by which PyTorch's older functions compute a parameter anew in each forward: list of (key, hook, name)."""
    hooks = [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, OLD_HOOKS)]
    return [(key, hook, getattr(hook, "name", None) or hook._tensor_name) for key, hook in hooks]


def _unwrapped(module):
    """What nn.DataParallel, DistributedDataParallel or torch.compile has wrapped."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module._orig_mod
        else:
            return module


def baked_copy(model):
    """A copy of a network, in which weights that hooks or parametrizations compute are parameters with the values of now, and
    the wrappers of several GPUs and of torch.compile are taken off.

    Raises:
        InputError: a network of torch.jit, whose forward cannot be read.
    """
    model = _unwrapped(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"the model{name and f' has a part, {name!r}, that'} is scripted by torch.jit; give the original")
        for _, _, name in _weight_hooks(module):
            setattr(module, name, getattr(module, name).detach())  # its graph could not be copied; the next forward has another
    try:
        model = copy.deepcopy(model)
    except Exception as error:  # whatever its parts raise, such as a lock
        advice = "remove what cannot be copied; build it under torch.no_grad() if it keeps what it computes"
        raise InputError(f"the model cannot be copied ({first_line(error)}); {advice}") from error
    for module in list(model.modules()):
        module._modules.update({name: _unwrapped(child) for name, child in module._modules.items() if child is not None})
    for module in list(model.modules()):
        for key, hook, _ in _weight_hooks(module):
            hook.remove(module)
            del module._forward_pre_hooks[key]
        if is_parametrized(module):  # PyTorch's own way would change the class, which copies of the module share
            values = {name: getattr(module, name).detach() for name in module.parametrizations}
            module.__class__ = type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
    return model


def batch_like(example, count):
    """Random images of the shape and on the device of an example batch; no random number of the run is used."""
    source = torch.Generator().manual_seed(count)
    return torch.randn(count, *example.shape[1:], generator=source).to(example)


def works_in_place(node, modules):
    """Whether a node of a graph may change the value that it takes; `modules` are those of the network by name."""
    if kind_of(node, modules).startswith("dropout"):
        return False  # in eval mode
    if node.op == "call_module":
        return getattr(modules[node.target], "inplace", False)
    name = getattr(node.target, "__name__", str(node.target))
    operators = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
    flagged = node.kwargs.get("inplace", False)
    if node.op == "call_function" and node.args and node.args[-1] is True:
        with suppress(TypeError, ValueError):  # where it has no signature
            flagged = flagged or "inplace" in inspect.signature(node.target).parameters
    return flagged or node.target in operators or (name.endswith("_") and not name.endswith("__"))


def images_of(graph, modules):
    """The nodes whose values are still images: the network's input, padded or normalised, before any layer or activation."""
    images = set()
    for node in graph.nodes:
        layer = node.op == "call_module" and any(True for _ in modules[node.target].parameters())
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        known = inputs and images.issuperset(inputs) and node.op != "output"
        if node.op == "placeholder" or (known and not layer and not is_activation(node, modules)):
            images.add(node)
    return images


def overwriting(node, modules):
    """The nodes of a graph that write into the memory of a node's value, also through a view of it; in their order."""
    found, ahead = set(), [node]
    while ahead:
        value = ahead.pop()
        for user in value.users:
            if user.args and user.args[0] is value:
                writes = works_in_place(user, modules)
                found |= {user} if writes else set()
                ahead += [user] if writes or kind_of(user, modules) in VIEWS else []
    return [other for other in node.graph.nodes if other in found]


@torch.no_grad()
@full_precision()
def trace(model, example=None, whole=(), inside=False, reshaping=True):
    """The graph of a network in eval mode, which computes the same in any memory layout where that can be had.

    Args:
        model: the network, whose parameters the graph shares.
        example: a batch that it takes; without it, shapes are unknown.
        whole, inside, reshaping: as for `_Tracer`.

    Returns:
        torch.fx.GraphModule of one argument; the forward's further arguments keep their defaults.

    Raises:
        Exception: whatever the network's own forward raises when it is traced; a TraceError where the graph computes
            something else than the network.
    """
    examples = [] if example is None else [batch_like(example, count) for count in EXAMPLES]
    tracer = _Tracer(examples, whole, inside, reshaping)
    with _sizes_in_calls(tracer, model):
        graph = tracer.trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and not works_in_place(node, modules):
            graph.erase_node(node)  # computed and not used
    traced = _numbered(fx.GraphModule(tracer.root, graph))
    if example is not None:
        images = batch_like(example, UNSEEN)
        expected = model(images.clone())
        if not nearly_equal(traced(images.clone()), expected):
            again = nearly_equal(model(images.clone()), expected)
            what = "for another batch" if again else "each time, as if it drew random numbers in eval mode"
            raise fx.proxy.TraceError(f"it computes something else {what}")
        try:
            single = model(images[:1].clone())
        except Exception:  # it takes no single image
            single = None
        if single is not None and not nearly_equal(traced(images[:1].clone()).reshape(single.shape), single):
            raise fx.proxy.TraceError("it computes something else for a single image")
        if reshaping and not nearly_equal(traced(images.clone(memory_format=torch.channels_last)), expected):
            return trace(model, example, whole, inside, reshaping=False)  # a view that is written to
    return traced


def _numbered(traced):
    """A traced network whose constants, tensors that its forward makes, are numbered as they come: fx goes on counting where an
    earlier trace of the same network has stopped."""
    nodes = [n for n in traced.graph.nodes if n.op == "get_attr" and str(n.target).startswith("_tensor_constant")]
    values = {name: traced._buffers.pop(name) for name in dict.fromkeys(node.target for node in nodes)}
    names = {old: f"_tensor_constant{number}" for number, old in enumerate(values)}
    for old, value in values.items():
        traced.register_buffer(names[old], value)
    for node in nodes:
        node.target = names[node.target]
    traced.recompile()
    return traced


def nearly_equal(found, expected):
    """Whether outputs are the same but for rounding: tensors of one shape, NaN where the others are."""
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    found, expected = found.nan_to_num(), expected.nan_to_num()
    return (found - expected).abs().max() <= 1e-2 * expected.abs().max() + 1e-4  # kernels of other layouts round differently


@torch.no_grad()
@full_precision()
def memory_layout(model, example, retrace=True):
    """The memory layout for a network: channels-last where its forward can be computed in it.

    A forward with `view` often cannot; then the network is given the forward of its graph, which has `reshape` there.

    Args:
        model: in eval mode; its parameters' layout is not preserved.
        example: a batch that it takes.
        retrace: whether it may be given another forward; not if it is to be trained.
    """

    images = batch_like(example, UNSEEN)
    expected = model.to(memory_format=torch.contiguous_format)(images.clone())

    def computes():
        model.to(memory_format=torch.channels_last)
        try:
            return nearly_equal(model(images.clone(memory_format=torch.channels_last)), expected)
        except Exception:  # whatever the model's own code raises
            return False

    if computes():
        return torch.channels_last
    model.to(memory_format=torch.contiguous_format)
    if retrace:
        try:
            graph = trace(model, example, whole=(_BatchNorm,))  # whose hooks are to be called
        except Exception:
            return torch.contiguous_format
        own, model.forward = model.forward, types.MethodType(type(graph).forward, model)
        if computes():
            return torch.channels_last
        model.forward = own
        model.to(memory_format=torch.contiguous_format)
    return torch.contiguous_format


def constants_of(traced):
    """The values of the nodes that do not depend on the network's input, by node."""
    found = {}
    for node in traced.graph.nodes:
        known = node.op in ("get_attr", "call_function", "call_method")
        if known and all(n in found for n in node.all_input_nodes):
            found[node] = compute_node(node, found.__getitem__, {"": traced})
    return found


def last_layer(model, example=None):
    """Name and weight (C, F) of the layer whose outputs are the logits, linear or a 1x1 convolution.

    `example` is a batch that the network takes. Raises InputError where the logits do not come from such a layer.
    """
    try:
        graph = trace(model, example)
    except Exception as error:  # whatever the model's own forward raises when it is traced
        why = f"since the model cannot be traced ({first_line(error)})"
        raise InputError(f"the last layer of the model cannot be found, {why}") from None
    modules, shaping = dict(graph.named_modules()), (torch.reshape, "reshape", torch.flatten, "flatten", "view")
    node = next(node for node in graph.graph.nodes if node.op == "output")
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        layer = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1):
            return node.target, layer.weight.detach().flatten(1)
        mixes = len(node.all_input_nodes) > 1 and node.target not in shaping
        if mixes or (layer is not None and any(True for _ in layer.parameters())):
            break
    what = f"is '{node.target}' ({type(layer).__name__})" if layer is not None else f"is computed by '{node.name}'"
    raise InputError(f"the last layer of the model {what}, expected a linear layer or a 1x1 convolution")
