"""Runs the nodes of a fused graph, one after the other, on values that may be clips with few frames held."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import pointwise
from .decide import Batch
from .excite import Excite, Squeeze
from .forks import Regions
from .frames import GATES, Frames, Place, Room, full
from .pack import channels_last
from .pool import Pool
from .unit import Fork, Unit

__all__ = ["Program", "on_clips"]

_POOLS = (nn.MaxPool3d, nn.AvgPool3d)
_MAY_HOLD_FRAMES = (Frames, list, tuple, dict, slice)

Values = dict[fx.Node, Any]


class Program:
    """A fused graph as a list of calls. Called like the network, it gives what the network gives.

    Args:
        graph: what `fuse` left.
        root: the network, for its attributes.
        modules: what the graph calls, units among them, by target.
        batch: that of the units.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, modules: dict[str, nn.Module], batch: Batch) -> None:
        self.root, self.modules, self.batch = root, modules, batch
        nodes = list(graph.nodes)
        self.placeholders = [node for node in nodes if node.op == "placeholder"]
        last = {argument: index for index, node in enumerate(nodes) for argument in node.all_input_nodes}
        self.steps: list[tuple[fx.Node, Callable[[Values], Any], list[fx.Node]]] = []
        self.places = self._parts(nodes)
        self.clips = {node for node in nodes if self._stays_clip(node)}
        self.regions = Regions(
            [node for node in nodes if node.op not in ("placeholder", "output")], modules, self.placeholders
        )
        live: set[fx.Node] = set()
        for index, node in enumerate(nodes):
            unused = [value for value in node.all_input_nodes if last[value] == index]
            if node.op == "output":
                self.output = node
            elif node.op != "placeholder":
                self.steps.append((node, self._compiled(node, live, unused), unused))
            live = (live | {node}) - set(unused)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = iter(args)
        values: Values = {}
        for node in self.placeholders:
            name, default = str(node.target), node.args[0] if node.args else None
            values[node] = kwargs[name] if name in kwargs else next(given, default)
        self._advance(0, len(self.steps), values)
        found = fx.node.map_arg(self.output.args[0], values.__getitem__)
        return tree_map(_whole, found, is_leaf=_is_frames)

    def _advance(self, start: int, stop: int, values: Values) -> None:
        """Run these steps."""
        for position in range(start, stop):
            node, call, unused = self.steps[position]
            values[node] = made = call(values)
            if type(made) is Fork:
                return self._advance(self._part(position, values, made.groups), stop, values)
            for value in unused:
                del values[value]

    def _part(self, position: int, values: Values, groups: list[list[int]]) -> int:
        """Let groups of samples take the steps from this one on apart, one after the other: until which step."""
        region, total, batch = self.regions.at(position), sum(map(len, groups)), self.batch
        assert region is not None
        if not self.regions.fits(region, values, total):
            batch.forks = False
            return position
        pending, parts = self.regions.pending(), []
        whole = batch.samples, batch.total
        running, batch.total = batch.samples or list(range(total)), max(batch.total, total)
        try:
            for group in groups:
                self.regions.tell(pending, group, total)
                batch.samples = [running[sample] for sample in group]
                own = self.regions.part(region, values, group)
                self._advance(position, region.end, own)
                parts.append([own[node] for node in region.kept])
        finally:
            batch.samples, batch.total = whole
            self.regions.tell(pending, None, total)  # somebody may follow later on
        for node, *of_groups in zip(region.kept, *parts, strict=True):
            values[node] = self.regions.joined(of_groups, groups)
        for node in region.unused:
            values.pop(node, None)
        return region.end

    def _compiled(self, node: fx.Node, live: set[fx.Node], unused: list[fx.Node]) -> Callable[[Values], Any]:
        """One node as a function of the values so far."""
        if node.op == "get_attr":
            return lambda values: operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if isinstance(module, Unit):
                return self._unit(module, node, live, unused)
            if isinstance(module, Excite):
                return self._excite(module, node, live, unused)
            if isinstance(module, Squeeze):
                return lambda values: module(values[node.args[0]])  # type: ignore[index]
            if isinstance(module, Pool):
                call = self._on_clips(module, node)
                return lambda values: call(*fx.node.map_arg(node.args, values.__getitem__))
            keeps = _keeps_copies(module)
            return lambda values: _apply(module, *_arguments(node, values), keeps)
        if node.op == "call_method":
            name = str(node.target)
            keeps = name in pointwise.CALLS
            return lambda values: _apply(
                lambda x, *rest, **more: getattr(x, name)(*rest, **more), *_arguments(node, values), keeps
            )
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        keeps = function in pointwise.CALLS or function in pointwise.PAIRWISE
        if function is torch.cat:
            gates = node.meta.get(GATES, 0)
            return lambda values: _concatenate(
                *_arguments(node, values), gates if self.batch.gates_run else 0, values.get(node)
            )
        return lambda values: _apply(function, *_arguments(node, values), keeps)

    def _unit(self, unit: Unit, node: fx.Node, live: set[fx.Node], unused: list[fx.Node]) -> Callable[[Values], Any]:
        """A unit's call; its sum may take its residual's place in memory where nobody needs that any more."""
        x, run = node.args[0], self._on_clips(unit, node)
        forks = self.regions.at(len(self.steps)) is not None
        if node in self.places and len(node.args) == 1:
            whole, first, channels = self.places[node]

            def write(values: Values) -> Any:
                room = values.setdefault(whole, Room(channels))
                return run(values[x], into=Place(room, first))  # type: ignore[index]

            return write
        if len(node.args) == 1:
            return lambda values: run(values[x], forks=forks)  # type: ignore[index]
        residual = node.args[1]
        assert isinstance(residual, fx.Node)
        free = self._free(residual, live, unused) if residual is not x else lambda values: False

        def call(values: Values) -> Any:
            return run(values[x], values[residual], overwrite=free(values), forks=forks)  # type: ignore[index]

        return call

    def _on_clips(self, module: Unit | Pool, node: fx.Node) -> Callable[..., Any]:
        """A unit or pool, which take channels-last clips: images become clips of one frame, and images again.

        Between two of them they stay clips.
        """
        if module.dim == 3:
            return lambda *args, **options: module(
                *(channels_last(each) if isinstance(each, Tensor) else each for each in args), **options
            )
        known = [isinstance(each, fx.Node) and each in self.clips for each in node.args]
        frames, stays = module.frames_per_sample, node in self.clips

        def run(*args: Any, **options: Any) -> Any:
            given = [
                each if is_clip or not isinstance(each, Tensor | Frames) else _as_clip(full(each), frames)
                for each, is_clip in zip(args, known, strict=True)
            ]
            made = module(*given, **options)
            return made if stays or type(made) is Fork else _as_image(full(made))

        return run

    def _stays_clip(self, node: fx.Node) -> bool:
        """Whether a node's images stay clips: it makes them, and whoever reads it takes clips of as many frames."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, Unit | Pool) or module.dim == 3:
            return False
        readers = [self.modules.get(str(user.target)) if user.op == "call_module" else None for user in node.users]
        return all(
            isinstance(reader, Unit | Pool) and (reader.dim, reader.frames_per_sample) == (2, module.frames_per_sample)
            for reader in readers
        )

    def _parts(self, nodes: list[fx.Node]) -> dict[fx.Node, tuple[fx.Node, int, int]]:
        """Units of whose result nobody but a concatenation knows: which one, from which channel on, of how many."""
        found: dict[fx.Node, tuple[fx.Node, int, int]] = {}
        for node in nodes:
            if node.target is not torch.cat or not (node.args[1:] == (1,) or node.kwargs == {"dim": 1}):
                continue
            parts = node.all_input_nodes
            units = [self.modules.get(str(part.target)) for part in parts]
            sizes = [unit.channels for unit in units if isinstance(unit, Unit) and unit.dim == 3]
            once = list(node.args[:1]) == [parts] and all(len(part.users) == 1 for part in parts)
            if once and len(sizes) == len(parts):
                found |= {part: (node, sum(sizes[:i]), sum(sizes)) for i, part in enumerate(parts)}
        return found

    def _excite(
        self, excite: Excite, node: fx.Node, live: set[fx.Node], unused: list[fx.Node]
    ) -> Callable[[Values], Any]:
        """The product takes the place of what is scaled where nobody needs that any more."""
        x, scale = node.args
        assert isinstance(x, fx.Node) and isinstance(scale, fx.Node)
        free = self._free(x, live, unused)
        return lambda values: excite(values[x], values[scale], free(values))

    def _free(self, value: fx.Node, live: set[fx.Node], unused: list[fx.Node]) -> Callable[[Values], bool]:
        """Whether a node may write over one of its arguments: nobody reads it later, by this name or another."""
        fresh = {each for each in live if self._is_fresh(each)}
        free = value in fresh and value in unused
        suspects = [each for each in live - fresh if each is not value]  # may be views of it
        return lambda values: free and not any(_share_memory(values[each], values[value]) for each in suspects)

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether a value is in memory of its own: what units, pools and products return."""
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], Unit | Pool | Excite)


def _arguments(node: fx.Node, values: Values) -> tuple[Any, Any]:
    return fx.node.map_arg(node.args, values.__getitem__), fx.node.map_arg(node.kwargs, values.__getitem__)


def _concatenate(args: Any, kwargs: Any, gates: int, room: Room | None) -> Any:
    """``torch.cat``, of parts that may be in a room already.

    ``gates``: how many will ask for the mean of the result over H and W, which is taken once.
    """
    parts: Any = args[0] if args else ()
    along_channels = list(args)[1:] == [1] or kwargs == {"dim": 1}
    if not along_channels or not all(isinstance(each, Tensor | Frames) and len(each.shape) == 5 for each in parts):
        return _apply(torch.cat, args, kwargs, False)
    clips = [each if isinstance(each, Frames) else Frames(each, 1, each.shape[2]) for each in parts]
    if not _all_alike(clips):
        return _apply(torch.cat, args, kwargs, False)
    held, pooled = (room or Room(0)).joined([each.held for each in clips]), None
    if gates > 1 or (gates and all(each.pooled is not None for each in clips)):
        pooled = torch.cat([each.means() for each in clips], dim=2)
    return held if clips[0].stride == 1 and pooled is None else clips[0].replaced(held, pooled)


def on_clips(unit: Unit, x: Tensor) -> Any:
    """Call a unit, which takes channels-last clips, on clips or images."""
    if unit.dim == 3:
        return unit(channels_last(x))
    return _as_image(full(unit(_as_clip(x, unit.frames_per_sample))))


def _apply(function: Callable[..., Any], args: Any, kwargs: Any, keeps: bool) -> Any:
    """Any other call: on the frames held where it treats each alone, else on all of them."""
    given = [*args, *kwargs.values()]
    if not any(isinstance(each, _MAY_HOLD_FRAMES) for each in given):  # most: sizes and sums of them, tensors
        return function(*args, **kwargs)
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
    return isinstance(module, (*pointwise.MODULES, nn.BatchNorm3d))


def _share_memory(value: Any, other: Any) -> bool:
    memory = _memory([other])
    return bool(memory & _memory(tree_leaves(value)))


def _memory(values: list[Any]) -> set[int]:
    tensors = [each for value in values for each in ((value.held, *value.filled) if _is_frames(value) else (value,))]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, Tensor)}


def _as_clip(x: Tensor, frames: int) -> Tensor:
    """``(N * T, C, H, W)`` as ``(N, C, T, H, W)``, channels last."""
    if frames == 1 and min(x.shape[1:]) > 1 and x.is_contiguous(memory_format=torch.channels_last):
        return x.unsqueeze(2)
    return x.permute(0, 2, 3, 1).contiguous().unflatten(0, (-1, frames)).permute(0, 4, 1, 2, 3)


def _as_image(x: Tensor) -> Tensor:
    if x.shape[2] == 1:
        return x.squeeze(2)
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def _is_frames(value: Any) -> bool:
    return isinstance(value, Frames)


def _whole(value: Any) -> Any:
    return full(value) if isinstance(value, Frames) else value


def _all_alike(values: Any) -> bool:
    return bool(values) and all(isinstance(each, Frames) and values[0].alike(each) for each in values)
