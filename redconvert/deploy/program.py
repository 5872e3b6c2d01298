"""Runs the nodes of a fused graph, one after the other, on values that may be clips with few frames held."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from .frames import Frames, full
from .pack import channels_last
from .pool import Pool
from .unit import Unit

__all__ = ["Program", "on_clips"]

# What treats every frame alone, so that copies stay copies.
_POINTWISE_MODULES = (nn.ReLU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Identity, nn.modules.dropout._DropoutNd)
_POINTWISE_CALLS = frozenset({F.relu, torch.relu, F.silu, F.hardswish, torch.sigmoid, "relu", "relu_", "sigmoid"})
_PAIRWISE_CALLS = frozenset({operator.add, operator.iadd, operator.mul, torch.add, torch.mul})
_POOLS = (nn.MaxPool3d, nn.AvgPool3d)

Values = dict[fx.Node, Any]


class Program:
    """A fused graph as a list of calls. Called like the network, it gives what the network gives.

    Args:
        graph: what `fuse` left.
        root: the network, for its attributes.
        modules: what the graph calls, units among them, by target.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.root, self.modules, self.nodes = root, modules, list(graph.nodes)
        last = {argument: node for node in self.nodes for argument in node.all_input_nodes}
        self.unused: dict[fx.Node, list[fx.Node]] = {}  # values that nobody needs after a node
        for value, node in last.items():
            self.unused.setdefault(node, []).append(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values: Values = {}
        given = iter(args)
        for node in self.nodes:
            if node.op == "output":
                found = fx.node.map_arg(node.args[0], values.__getitem__)
                return tree_map(_whole, found, is_leaf=_is_frames)
            values[node] = self._run(node, values, given, kwargs)
            for value in self.unused.get(node, ()):
                del values[value]
        raise AssertionError("a graph ends with its output")

    def _run(self, node: fx.Node, values: Values, given: Any, kwargs: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            name, default = str(node.target), node.args[0] if node.args else None
            return kwargs[name] if name in kwargs else next(given, default)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args: Any
        more: Any
        args, more = (fx.node.map_arg(each, values.__getitem__) for each in (node.args, node.kwargs))
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if isinstance(module, Unit) and len(args) > 1:
                return on_clips(module, *args, overwrite=self._may_overwrite(node, values))
            if isinstance(module, Unit | Pool):
                return on_clips(module, *args)
            return _apply(module, args, more, _keeps_copies(module))
        if node.op == "call_method":
            name = str(node.target)
            return _apply(lambda x, *rest, **kw: getattr(x, name)(*rest, **kw), args, more, name in _POINTWISE_CALLS)
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        if function is torch.cat and (args[1:] == (1,) or more == {"dim": 1}):
            parts: Any = args[0]
            if _all_alike(parts):
                return parts[0].replaced(torch.cat([each.held for each in parts], dim=1))
        return _apply(function, args, more, function in _POINTWISE_CALLS or function in _PAIRWISE_CALLS)

    def _may_overwrite(self, node: fx.Node, values: Values) -> bool:
        """Whether the residual of a unit is needed nowhere else, so that the sum may take its place in memory."""
        residual = node.args[1]
        assert isinstance(residual, fx.Node)
        ours = residual.op == "call_module" and isinstance(self.modules[str(residual.target)], Unit | Pool)
        if not ours or residual not in self.unused.get(node, ()):
            return False
        memory = _memory(values[residual])
        others = (leaf for other, value in values.items() if other is not residual for leaf in tree_leaves(value))
        return not any(_memory(leaf) & memory for leaf in others)


def on_clips(module: Unit | Pool, *args: Any, **options: Any) -> Any:
    """Call a unit or pool, which take channels-last clips; an image is a clip of one frame."""
    if module.dim == 3:
        return module(*(channels_last(each) if isinstance(each, Tensor) else each for each in args), **options)
    frames = module.frames_per_sample
    clips = (_as_clip(full(each), frames) if isinstance(each, Tensor | Frames) else each for each in args)
    return _as_image(full(module(*clips, **options)))


def _apply(function: Callable[..., Any], args: Any, kwargs: Any, keeps: bool) -> Any:
    """Any other call: on the frames held where it treats each alone, else on all of them."""
    given = [*args, *kwargs.values()]
    clips = [each for each in given if isinstance(each, Frames)]
    if keeps and clips and _all_alike(clips) and not any(isinstance(each, Tensor) for each in given):
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, Frames) else x, (args, kwargs), is_leaf=_is_frames)
        return clips[0].replaced(function(*args, **kwargs))
    args, kwargs = tree_map(_whole, (args, kwargs), is_leaf=_is_frames)
    return function(*args, **kwargs)


def _keeps_copies(module: nn.Module) -> bool:
    if isinstance(module, _POOLS):
        sizes = (module.kernel_size, module.stride, module.padding)
        return [size[0] if isinstance(size, tuple) else size for size in sizes] == [1, 1, 0]
    return isinstance(module, (*_POINTWISE_MODULES, nn.BatchNorm3d))


def _memory(value: Any) -> set[int]:
    tensors = [value.held, *value.filled] if isinstance(value, Frames) else [value] if isinstance(value, Tensor) else []
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _as_clip(x: Tensor, frames: int) -> Tensor:
    """``(N * T, C, H, W)`` as ``(N, C, T, H, W)``, channels last."""
    return x.permute(0, 2, 3, 1).contiguous().unflatten(0, (-1, frames)).permute(0, 4, 1, 2, 3)


def _as_image(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def _is_frames(value: Any) -> bool:
    return isinstance(value, Frames)


def _whole(value: Any) -> Any:
    return full(value) if isinstance(value, Frames) else value


def _all_alike(values: Any) -> bool:
    return bool(values) and all(isinstance(each, Frames) and values[0].alike(each) for each in values)
