"""CUDA graphs of whole passes, one for each combination of input shapes and decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import RedconvertError
from ..inputs import tensors_in
from ..layers import DynamicConv
from .decide import Batch
from .unit import Unit

__all__ = ["Captures"]

KEPT = 16  # graphs, each with the memory of its inputs and results
WARM_UP = 2  # passes on the stream that records, before it does
PLAIN = (bool, int, float, str, type(None))
Key = tuple[Any, ...]
Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Recording:
    """A graph, the tensors that it reads and those that it writes; all of a network share the memory in between."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Any

    def __call__(self, given: Sequence[Tensor]) -> Any:
        for mine, theirs in zip(self.inputs, given, strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return tree_map(_copied, self.outputs)  # the next replay writes over them


class Captures:
    """The graphs of a deployed network.

    Args:
        layers: its dynamic layers.
        units: what runs in their places, by id.
        batch: what all units share.
    """

    def __init__(self, layers: Sequence[DynamicConv], units: Mapping[int, Unit], batch: Batch) -> None:
        self.layers, self.units, self.batch = layers, units, batch
        self._recordings: dict[Key, Recording] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._recordings)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording | None:
        """The recording of such a call under the decisions that stand now; None where there is none."""
        if not self._recordings or self.obstacle() is not None:
            return None
        key = self._key(args, kwargs)
        return None if key is None else self._recordings.get(key)

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run) -> None:
        """Record ``run(args, kwargs)`` unless it was before.

        Raises:
            RedconvertError: something stands against it.
        """
        problem, key = self.obstacle(), self._key(args, kwargs)
        if problem is not None:
            raise RedconvertError(f"this pass cannot be captured: {problem}")
        if key is None:
            raise RedconvertError(
                "this pass cannot be captured: CUDA graphs need a network and inputs on a GPU, beside them numbers and "
                "strings alone. Elsewhere a deployed network runs without capture"
            )
        if key in self._recordings:
            return
        try:
            with torch.cuda.device(tensors_in((args, kwargs))[0].device):
                recording = self._record(args, kwargs, run)
        except (RedconvertError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RedconvertError(
                f"this pass cannot be captured, an operation of the network waits for the device or allocates outside "
                f"PyTorch: {type(error).__name__}: {error}. It runs without capture"
            ) from error
        while len(self._recordings) >= KEPT:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[key] = recording

    def obstacle(self) -> str | None:
        """What stands against capturing a pass now, in words; None where nothing does."""
        for layer in self.layers:
            unit = self.units.get(id(layer))
            if layer.observers:
                return f"somebody observes layer '{layer.layer_name}', and a graph tells nobody"
            if unit is not None and (unit._forward_hooks or unit._forward_pre_hooks):
                return f"layer '{layer.layer_name}' has hooks, which no graph calls"
            if not layer.enabled:
                continue
            if unit is None:
                return f"layer '{layer.layer_name}' could not be deployed, and reads its gate's decision"
            if not _is_settled(unit):
                return (
                    f"the gate of layer '{layer.layer_name}' decides by its input, and a graph follows one decision. "
                    "Use forced(channel=..., temporal=...), disabled, a budget by layers, or deploy(bake=batches)"
                )
        return None

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
        """All that a pass depends on but the values of its inputs; None where that cannot be said."""
        leaves, structure = tree_flatten((args, kwargs))
        described: list[Any] = [str(structure), self.batch.always_ask, torch.is_autocast_enabled("cuda")]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if not leaf.is_cuda:
                    return None
                described.append((leaf.shape, leaf.dtype, leaf.device))
            elif isinstance(leaf, PLAIN):
                described.append((type(leaf), leaf))
            else:
                return None
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return None
        for layer in self.layers:
            unit = self.units.get(id(layer))
            if unit is None or not layer.enabled:
                described.append(layer.enabled)
                continue
            decision = unit.known() if layer.forced == (None, None) else tuple(layer.forced)
            version = layer.gate.threshold._version if self.batch.always_ask else None  # what its gate was folded of
            described.append((decision, version))
        return tuple(described)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run) -> Recording:
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def call() -> Any:
            given = tree_unflatten(leaves, structure)  # anew: a network may change the list that it is given
            return run(given[0], given[1])

        call()  # forms are timed, kernels compiled
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = call()
        return Recording(graph, [leaf for leaf in leaves if isinstance(leaf, Tensor)], outputs)


def _is_settled(unit: Unit) -> bool:
    """Whether an enabled unit takes one decision for all samples of every input."""
    forced = unit.layer.forced
    if forced == (None, None):
        return unit.known() is not None
    return all(isinstance(index, int) for index in forced)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
