"""Recorded passes, played again: one Python function from gate to gate, and a tree of them where gates decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.modules.module as every
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..layers import DynamicConv
from .decide import Batch
from .tape import Call, Constant, Recorder, Stretch, View, Way

__all__ = ["Replays", "Tape"]

MISSED = object()  # a gate decided as it never did while somebody recorded
KEPT = 64  # tapes of a network
BRANCHES = 32  # ways through a network that are kept; others run as they would without
PATIENCE = 64  # so many more passes that missed than hit, and nobody tries any more
READING = {"tolist", "numpy", "item"}  # methods whose results are no tensors
KNOWN = {"torch", "torchvision", "timm", "pytorchvideo", "redconvert", "_operator", "builtins", "math"}  # do not read
LITERALS = (bool, int, str, type(None))


class Tape:
    """All that was recorded of passes over inputs of some shapes, in one state of the network.

    A way through the network is recorded when it is met for the second time: the first time weights are packed and
    forms timed, and a state of the network that stands for one pass alone should cost no more than that.

    Attributes:
        problem: why nothing is recorded any more, in words; None where it may be.
        branches: ways through the network that are played.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self.branches = 0
        self._root: Segment | None = None
        self._bases: list[View] = []
        self._met: set[Hashable] = set()
        self._lead = 0  # hits, less misses
        self._packing = 0  # recorded passes of no use, as weights were packed in them

    def __call__(self, inputs: Sequence[Tensor], run: Callable[[], Any]) -> Any:
        """What ``run()`` returns for these inputs."""
        if self._root is not None:
            found = self._play(inputs)
            if found is not MISSED:
                self._lead = min(self._lead + 1, PATIENCE)
                return found
            self._lead -= 1
            if self._lead < -PATIENCE:
                self._give_up("gates decide differently from pass to pass")
        if self.problem is not None or self.branches >= BRANCHES:
            return run()
        if len(self._met) == self.branches:
            with Way() as noted:
                made = run()
            self._meet(noted.way)
            return made
        with Recorder(inputs) as recorder:
            made = run()
        self._keep(recorder, made)
        return made

    def _play(self, inputs: Sequence[Tensor]) -> Any:
        segment, values = self._root, [*inputs, *[None] * (len(self._bases) - len(inputs))]
        while segment is not None:
            found = segment.run(values)
            if segment.choose is None:
                return found if segment.structure is None else tree_unflatten(found, segment.structure)
            segment = segment.following.get(segment.choose(found))
        return MISSED

    def _keep(self, recorder: Recorder, made: Any) -> None:
        if tuple(recorder.way) not in self._met:  # things were made that the next pass finds
            return self._meet(recorder.way)
        if recorder.packs:
            self._packing += 1
            return None if self._packing < BRANCHES else self._give_up("weights are packed again in every pass")
        leaves, structure = tree_flatten(made)
        outputs = [recorder.known(leaf) for leaf in leaves]
        if recorder.problem is not None:
            return self._give_up(recorder.problem)
        self._root = self._root or Segment(recorder.stretches[0])
        passed = [self._root]
        for before, stretch in zip(recorder.stretches, recorder.stretches[1:], strict=False):
            passed.append(passed[-1].following.setdefault(before.chosen, Segment(stretch)))
        if not all(segment.is_of(stretch) for segment, stretch in zip(passed, recorder.stretches, strict=True)):
            return self._give_up("passes that decide alike make different calls")
        passed[-1].outputs, passed[-1].structure = outputs, None if structure.is_leaf() else structure
        if len(recorder.bases) > len(self._bases):
            self._bases = recorder.bases
        for segment in reversed(passed):
            segment.write(recorder.bases, recorder.inputs)
        self.branches += 1
        return None

    def _meet(self, way: list[Hashable]) -> None:
        self._met.add(tuple(way))
        if len(self._met) > BRANCHES * 4:
            self._give_up("gates decide differently from pass to pass")

    def _give_up(self, problem: str) -> None:
        self.problem, self._root, self._bases = problem, None, []
        self._met.clear()


class Segment:
    """The calls of a stretch as one Python function, and what may come after it.

    Attributes:
        run: from the values by slot, which it takes and leaves, to what the next gate said, or the results.
        following: the next segment by what ``choose`` makes of that.
        needs: slots that it, or what follows, reads and does not fill.
        outputs, structure: of the last one: what it returns; no structure where that is one tensor.
    """

    def __init__(self, stretch: Stretch) -> None:
        self.calls, self.z, self.choose = stretch.calls, stretch.z, stretch.choose
        self.following: dict[Hashable, Segment] = {}
        self.needs: set[int] = set()
        self.outputs: list[Any] = []
        self.structure: Any = None
        self.run: Callable[[list[Any]], Any]

    def is_of(self, stretch: Stretch) -> bool:
        """Whether the same calls were made."""
        ours, theirs = self.calls, stretch.calls
        alike = all(a.function == b.function and a.results == b.results for a, b in zip(ours, theirs, strict=False))
        return alike and len(ours) == len(theirs) and self.z == stretch.z

    def write(self, bases: Sequence[View], inputs: int) -> None:
        """Compile `run`; what follows is written already."""
        after = {slot for segment in self.following.values() for slot in segment.needs}
        returned = self.outputs if self.z is None else [self.z]
        needed = after | set(_slots(returned))
        calls: list[Call] = []
        for call in reversed(self.calls):
            filled = set(_filled(call))
            if call.changes or filled & needed:
                calls.append(call)
                needed = (needed - filled) | set(_slots([call.args, call.kwargs]))
        self.needs = needed
        source = Source(bases, inputs)
        self.run = source.function(
            calls[::-1], self.needs, after, returned, self.z is not None or self.structure is None
        )


class Source:
    """Python that makes calls, each value held in a local variable until it was read for the last time."""

    def __init__(self, bases: Sequence[View], inputs: int) -> None:
        self.bases, self.inputs = bases, inputs
        self.names: dict[str, Any] = {"as_strided": torch.as_strided}

    def function(self, calls: list[Call], given: set[int], after: set[int], returned: list[Any], one: bool) -> Any:
        """``given``: slots that are filled before; ``after``: those that somebody reads later on."""
        last = dict.fromkeys(given, -1)
        for position, call in enumerate(calls):
            last |= dict.fromkeys([*_slots([call.args, call.kwargs]), *_filled(call)], position)
        last |= dict.fromkeys(_slots(returned), len(calls))
        used = {slot for slot in given if last[slot] >= 0}
        lines = [f"t{slot} = values[{slot}]" for slot in sorted(used)]
        lines += [f"values[{slot}] = None" for slot in sorted(used - after)]
        for position, call in enumerate(calls):
            lines.append(self._call(call))
            gone = [slot for slot, at in last.items() if at == position and slot not in after]
            if gone:
                lines.append("del " + ", ".join(f"t{slot}" for slot in sorted(gone)))
        filled = {slot for call in calls for slot in _filled(call)}
        lines += [f"values[{slot}] = t{slot}" for slot in sorted(filled & after)]
        results = [self._value(each) for each in returned]
        lines.append(f"return {results[0]}" if one else f"return [{', '.join(results)}]")
        text = "def run(values):\n" + "\n".join(f"    {line}" for line in lines) + "\n"
        exec(compile(text, "<a recorded pass>", "exec"), self.names)
        return self.names["run"]

    def _call(self, call: Call) -> str:
        function = self._name(call.function, "f")
        if call.in_c:
            self._name(call.kwargs["owner"].value, "c")
            return f"{function}({', '.join(map(self._number, call.args))})"
        arguments = [*map(self._value, call.args), *(f"{key}={self._value(v)}" for key, v in call.kwargs.items())]
        text, filled = f"{function}({', '.join(arguments)})", list(_filled(call))
        if not filled:
            return text
        targets = ", ".join("_" if slot is None else f"t{slot}" for slot in call.results)
        return f"{targets} = {text}"

    def _value(self, value: Any) -> str:
        if isinstance(value, View):
            return self._view(value)
        if isinstance(value, Constant):
            return self._constant(value.value)
        return f"[{', '.join(map(self._value, value))}]"

    def _view(self, view: View) -> str:
        base, name = self.bases[view.slot], f"t{view.slot}"
        if view == base:
            return name
        # An input may lie elsewhere in its storage the next time.
        offset = f"{name}.storage_offset() + {view.offset}" if view.slot < self.inputs else view.offset
        return f"as_strided({name}, {view.size}, {view.stride}, {offset})"

    def _number(self, value: Any) -> str:
        """An argument of a function in C: of a tensor, its address."""
        if isinstance(value, View):
            base = self.bases[value.slot]
            shift = (value.offset - base.offset) * value.dtype.itemsize
            return f"t{value.slot}.data_ptr()" + (f" + {shift}" if shift else "")
        if isinstance(value.value, Tensor):
            self._name(value.value, "c")  # to keep it
            return str(value.value.data_ptr())
        return self._constant(value.value)

    def _constant(self, value: Any) -> str:
        plain = type(value) in LITERALS or (type(value) is float and math.isfinite(value))
        return repr(value) if plain else self._name(value, "c")

    def _name(self, value: Any, kind: str) -> str:
        name = f"{kind}{id(value)}"  # which stays its own, as the name keeps it
        self.names[name] = value
        return name


def _filled(call: Call) -> Iterator[int]:
    return (slot for slot in call.results if slot is not None)


def _slots(values: Any) -> Iterator[int]:
    """Those that arguments name."""
    if isinstance(values, View):
        yield values.slot
    elif isinstance(values, dict):
        yield from _slots(list(values.values()))
    elif isinstance(values, list | tuple) and not isinstance(values, Constant):
        for each in values:
            yield from _slots(each)


class Replays:
    """The tapes of a deployed network, by the shapes of its inputs and the state of its layers.

    Args:
        layers: its dynamic layers.
        graph, modules: what it runs; a graph that reads values, or calls what may do so, is not recorded.
        batch: what all units share.

    Attributes:
        problem: why this network is not recorded at all, in words; None where it is.
    """

    def __init__(
        self, layers: Sequence[DynamicConv], graph: fx.Graph, modules: Mapping[str, nn.Module], batch: Batch
    ) -> None:
        self.batch, self.problem = batch, _obstacle(graph, modules)
        # What modes set on a layer stands in its dictionary while it differs from what the class says.
        self._layers: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (layer.__dict__, layer.gate._buffers) for layer in layers
        ]
        called = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
        parts = [part for module in called for part in module.modules()]
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._hooks += [every._global_forward_hooks, every._global_forward_pre_hooks]
        self._tapes: dict[Hashable, Tape] = {}

    def __len__(self) -> int:
        """How many ways through the network are played."""
        return sum(tape.branches for tape in self._tapes.values() if tape.problem is None)

    def clear(self) -> None:
        """Forget all of them, after a change that `state` does not see."""
        self._tapes.clear()

    def state(self) -> Hashable | None:
        """All that a pass depends on beside its inputs; None where it must run as it would without."""
        if self.problem is not None or any(self._hooks):
            return None
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():  # somebody listens
            return None
        told: list[Any] = [
            self.batch.always_ask,
            torch.is_autocast_enabled("cpu"),
            torch.is_inference_mode_enabled(),
            torch._C._get_mkldnn_enabled(),
        ]
        by_sample = False
        for own, gate in self._layers:
            if own.get("observers"):
                return None
            forced = own.get("forced")
            if forced is not None:
                forced = tuple(tuple(each) if isinstance(each, list) else each for each in forced)
                by_sample = by_sample or any(isinstance(each, tuple) for each in forced)
            told.append((own.get("enabled"), forced, gate["threshold"]._version))
        return by_sample, *told

    def __call__(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """What ``run()`` gives for these arguments, in a state of the network."""
        leaves, structure = ([args[0]], None) if len(args) == 1 and not kwargs else tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        if not all(type(each) is Tensor and each.layout == torch.strided and each.is_cpu for each in inputs):
            return run()
        if not all(kind in (float, *LITERALS) for kind, _ in others):
            return run()
        samples = (tuple(self.batch.samples or ()), self.batch.total) if state[0] else None
        shapes = tuple((each.shape, each.stride(), each.dtype) for each in inputs)
        key = state, samples, shapes, others, structure and repr(structure)
        tape = self._tapes.get(key)
        if tape is None:
            while len(self._tapes) >= KEPT:
                del self._tapes[next(iter(self._tapes))]
            tape = self._tapes[key] = Tape()
        return tape(inputs, run)


def _obstacle(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> str | None:
    """What of a graph may read values behind the recorder's back, in words; None: nothing."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target in READING:
            return f"it calls .{node.target}()"
        if node.op == "call_function" and not _is_known(getattr(node.target, "__module__", None)):
            return f"it calls {node.target}"
        if node.op == "call_module" and not _is_known(type(modules[str(node.target)]).__module__):
            return f"it calls a {type(modules[str(node.target)]).__name__}"
    return None


def _is_known(module: str | None) -> bool:
    return module is None or module.split(".")[0] in KNOWN
