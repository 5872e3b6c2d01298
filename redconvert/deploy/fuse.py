"""The fx pass for inference: each convolution takes in the norm, the residual add and the activation behind it.

So does a product with one number per channel, as in squeeze and excitation, with the activation behind it.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..layers import DynamicConv
from ..layers.recipes import Recipe, recipe_of
from .decide import Batch
from .excite import Excite, Squeeze
from .frames import GATES
from .handover import link_units, tell_who_hands_over
from .pack import Filter
from .pool import Pool
from .unit import Unit

__all__ = ["filter_of", "fuse"]

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE_ADDS = {operator.iadd, "add_"}
_ACTIVATION_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "swish",
    nn.Hardswish: "hardswish",
}
_ACTIVATION_CALLS: dict[Any, str] = {
    **{F.relu: "relu", torch.relu: "relu", F.relu_: "relu", "relu": "relu", "relu_": "relu"},
    **{F.silu: "swish", F.relu6: "relu6", F.hardswish: "hardswish"},
}
_PRODUCTS = {operator.mul, torch.mul, "mul"}
_SIGMOIDS = {nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"}
_SCALES = _SIGMOIDS | {nn.Hardsigmoid, F.hardsigmoid}
_IDENTITIES = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}  # in inference


def filter_of(conv: nn.Module) -> Filter | None:
    """What a convolution convolves with, in 3D; None where it is more than a convolution with zero padding."""
    if not isinstance(conv, nn.Conv2d | nn.Conv3d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    dense = conv.dense_class if isinstance(conv, DynamicConv) else type(conv)
    if recipe_of(dense) is not Recipe or "forward" in vars(conv) or conv._forward_hooks or conv._forward_pre_hooks:
        return None
    if isinstance(conv, DynamicConv) and conv.config.gate != "hard":
        return None
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    stride, padding, dilation = tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation)
    if isinstance(conv, nn.Conv2d):
        weight = weight.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    return Filter(weight, bias, stride, padding, dilation, conv.groups)  # type: ignore[arg-type]


def fuse(
    graph: fx.Graph, modules: dict[str, nn.Module], batch: Batch, forms: dict[str, dict[str, str]]
) -> dict[str, nn.Module]:
    """Replace convolutions with what follows them, pools, means and scales; returned are the modules of new targets."""
    _simplify(graph, modules)
    units = _fuse_convolutions(graph, modules, batch, forms)
    excites = _fuse_excitations(graph, modules, batch)
    squeezes = _fuse_means(graph, modules, units)
    _tell_who_feeds_gates(graph, units, excites)
    pools = _fuse_pools(graph, modules)
    link_units(units.values())
    tell_who_hands_over(graph, units, {**modules, **pools, **excites})
    return {**units, **excites, **squeezes, **pools}


def _simplify(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Without what does nothing in inference, and with ``x * sigmoid(x)`` by its name."""
    for node in list(graph.nodes):
        if _kind(node, modules) in _IDENTITIES and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        for x, gate in _factors(node):
            if _kind(gate, modules) in _SIGMOIDS and gate.args == (x,) and len(gate.users) == 1 and gate.next is node:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(F.silu, (x,)))
                graph.erase_node(node)
                graph.erase_node(gate)
                break


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """What a node calls: a function, the name of a method, or the class of a module on which nobody looks."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return None if module is None or _is_hooked(module) else type(module)
    return node.target if node.op in ("call_function", "call_method") else None


def _factors(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Both factors of a product of two nodes, in both orders."""
    pair = [each for each in node.args if isinstance(each, fx.Node)]
    is_product = node.op in ("call_function", "call_method") and node.target in _PRODUCTS
    if not is_product or len(pair) != 2 or len(node.args) != 2 or node.kwargs:
        return []
    return [(pair[0], pair[1]), (pair[1], pair[0])]


def _fuse_convolutions(
    graph: fx.Graph, modules: dict[str, nn.Module], batch: Batch, forms: dict[str, dict[str, str]]
) -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        conv = modules[node.target]
        filter = filter_of(conv)
        if filter is None:
            continue
        chain = _Chain(node, modules)
        target = f"unit{len(units)}"
        units[target] = Unit(conv, filter, chain.norm, chain.activation, batch, forms.get(target))
        with graph.inserting_before(chain.last):
            call = graph.call_module(
                target, (node.args[0],) if chain.residual is None else (node.args[0], chain.residual)
            )
        chain.last.replace_all_uses_with(call)
        for part in reversed(chain.parts):
            graph.erase_node(part)
    return units


def _tell_who_feeds_gates(graph: fx.Graph, units: dict[str, Unit], excites: dict[str, Excite]) -> None:
    """Of a concatenation's parts, too, which notes how many gates read it."""

    def gates(node: fx.Node) -> int:
        readers = [units[user.target] for user in node.users if user.target in units and user.args[0] is node]
        return sum(reader.decider is not None for reader in readers)

    for node in graph.nodes:
        if node.target is torch.cat:
            node.meta[GATES] = gates(node)
        writer = units.get(node.target) or excites.get(node.target)
        if writer is not None:
            joined = [user for user in node.users if user.target is torch.cat]
            writer.feeds_gate = any(gates(each) for each in (node, *joined))


def _fuse_excitations(graph: fx.Graph, modules: dict[str, nn.Module], batch: Batch) -> dict[str, Excite]:
    """Products with a sigmoid, and the activation behind them."""
    excites: dict[str, Excite] = {}
    for node in list(graph.nodes):
        for x, scale in _factors(node):
            if _kind(scale, modules) not in _SCALES:
                continue
            user = next(iter(node.users)) if len(node.users) == 1 else None
            activation = None if user is None else _activation(user, node, modules)
            last = node if activation is None or user is None else user
            target = f"excite{len(excites)}"
            excites[target] = Excite(activation or "none", batch)
            with graph.inserting_before(node):
                last.replace_all_uses_with(graph.call_module(target, (x, scale)))
            for part in (last, node) if last is not node else (node,):
                graph.erase_node(part)
            break
    return excites


def _fuse_means(graph: fx.Graph, modules: dict[str, nn.Module], units: dict[str, Unit]) -> dict[str, Squeeze]:
    """Means over three axes of what a unit computes."""
    squeezes: dict[str, Squeeze] = {}
    for node in list(graph.nodes):
        squeeze, source = _squeeze(node, modules), node.args[0] if node.args else None
        if squeeze is None or not isinstance(source, fx.Node) or source.target not in units:
            continue
        target = f"squeeze{len(squeezes)}"
        squeezes[target] = squeeze
        units[str(source.target)].feeds_mean = True
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(target, (source,)))
        graph.erase_node(node)
    return squeezes


def _squeeze(node: fx.Node, modules: dict[str, nn.Module]) -> Squeeze | None:
    kind = _kind(node, modules)
    if kind is nn.AdaptiveAvgPool3d and modules[str(node.target)].output_size in (1, (1, 1, 1)):
        return Squeeze((2, 3, 4), True)
    if kind not in (torch.mean, "mean") or not {*node.kwargs} <= {"dim", "keepdim"}:
        return None
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
    dims, keepdim = given.get("dim"), given.get("keepdim", False)
    fixed = isinstance(dims, list | tuple) and len(dims) == 3 and all(isinstance(dim, int) for dim in dims)
    return Squeeze(tuple(dims), keepdim) if fixed and isinstance(keepdim, bool) else None  # type: ignore[arg-type]


def _fuse_pools(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, Pool]:
    """Max pools, and a padding by a constant that only the pool reads."""
    pools: dict[str, Pool] = {}
    for node in list(graph.nodes):
        if node.op != "call_module" or not Pool.serves(modules.get(node.target)) or len(node.args) != 1:
            continue
        target, source = f"pool{len(pools)}", node.args[0]
        pool = pools[target] = Pool(modules[node.target])  # type: ignore[arg-type]
        pads = source if _is_constant_pad(source) and pool.padding == (0, 0, 0) else None
        with graph.inserting_before(node):
            call = graph.call_module(target, _pool_arguments(source, pads))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        if pads is not None:
            graph.erase_node(pads)
    return pools


def _is_constant_pad(node: fx.Node) -> bool:
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    return bool(node.target is F.pad and len(node.users) == 1 and mode == "constant")


def _pool_arguments(source: fx.Node, pads: fx.Node | None) -> tuple[Any, ...]:
    if pads is None:
        return (source,)
    given = inspect.signature(_pad).bind(*pads.args, **pads.kwargs).arguments
    return given["input"], given["pad"], given.get("value")


def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> None:
    """The signature of ``F.pad``, which is a builtin without one."""


class _Chain:
    """From a convolution on, the nodes that one unit computes."""

    def __init__(self, conv: fx.Node, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.parts = [conv]
        self.norm: tuple[Tensor, Tensor] | None = None
        self.residual: fx.Node | None = None
        self.activation = "none"
        self._take_norm()
        self._take_residual()
        self._take_activation()

    @property
    def last(self) -> fx.Node:
        return self.parts[-1]

    def _next(self) -> fx.Node | None:
        """The only node that reads the last one."""
        users = list(self.last.users)
        return users[0] if len(users) == 1 and users[0].op != "output" else None

    def _take_norm(self) -> None:
        node = self._next()
        module = self.modules.get(str(node.target)) if node is not None and node.op == "call_module" else None
        if node is not None and isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) and _is_plain(module):
            affine = _affine(module)
            if affine is not None:
                self.norm = affine
                self.parts.append(node)

    def _take_residual(self) -> None:
        node = self._next()
        if node is None or node.target not in _ADDS or len(node.args) != 2 or node.kwargs:
            return
        others = [argument for argument in node.args if argument is not self.last]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return  # x + x, or a number
        other = others[0]
        if node.target in _IN_PLACE_ADDS and node.args[0] is other and len(other.users) > 1:
            return  # somebody else sees the sum
        if self._is_overwritten(node):
            return
        self.residual = other
        self.parts.append(node)

    def _is_overwritten(self, until: fx.Node) -> bool:
        """Whether something between the convolution and ``until``, where the unit will run, may change its input."""
        source, node = self.parts[0].args[0], self.parts[0].next
        while node is not until:
            if source in node.all_input_nodes and node not in self.parts and self._writes(node):
                return True
            node = node.next
        return False

    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.modules.get(str(node.target)), "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return bool(node.kwargs.get("inplace")) or name.endswith("_") or name in ("iadd", "imul", "isub", "setitem")

    def _take_activation(self) -> None:
        node = self._next()
        found = None if node is None else _activation(node, self.last, self.modules)
        if node is not None and found is not None:
            self.activation = found
            self.parts.append(node)


def _activation(node: fx.Node, of: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The key of ACTIVATIONS that a node applies to ``of``; None for anything else."""
    kind = _kind(node, modules)
    if node.op == "call_module":
        return _ACTIVATION_MODULES.get(kind)
    return _ACTIVATION_CALLS.get(kind) if node.args[:1] == (of,) else None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain(norm: nn.Module) -> bool:
    """PyTorch's own forward, and nobody looks on."""
    return type(norm) in (nn.BatchNorm2d, nn.BatchNorm3d) and not _is_hooked(norm)


def _affine(norm: nn.BatchNorm2d | nn.BatchNorm3d) -> tuple[Tensor, Tensor] | None:
    """``scale, shift`` of a batch norm in inference; None where it has no statistics."""
    if norm.running_mean is None or norm.running_var is None:
        return None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale.to(norm.running_mean.dtype), shift.to(norm.running_mean.dtype)
