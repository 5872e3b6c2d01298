"""The calls of a pass on a CPU, written down: PyTorch's operators, oneDNN's among them, and functions in C.

Between two gates a pass over inputs of one shape makes the same calls every time. A `Recorder` is told of them by
PyTorch's dispatcher, by `launch` and, where what follows depends on values, by `read`. `replay.py` makes them again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["Call", "Constant", "Recorder", "Stretch", "View", "Way", "launch", "read", "unrecorded"]

aten = torch.ops.aten
PACKS = ("reorder", "to_mkldnn")  # in the names of what is to be done once
UNPREDICTABLE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
Choose = Callable[[Tensor], Hashable]
_local = threading.local()


def launch(function: Callable[..., None], *args: Any, owner: Any = None) -> None:
    """Call a function in C, tensors as their addresses. ``owner`` keeps alive what numbers among ``args`` point to."""
    function(*[arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args])
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.launched(function, args, owner)


def read(z: Tensor, choose: Choose) -> Any:
    """``choose(z)``, on which everything after it may depend. All that a pass makes of values must come from here."""
    recorder = getattr(_local, "recorder", None)
    if recorder is None:
        return choose(z)
    with unrecorded():
        chosen = choose(z)
    recorder.branched(z, choose, chosen)
    return chosen


@contextmanager
def unrecorded() -> Iterator[None]:
    """For trials: what is called within is on no tape, nor slowed down by one."""
    recorder, _local.recorder = getattr(_local, "recorder", None), None
    try:
        with _disable_current_modes() if recorder is not None else nullcontext():
            yield
    finally:
        _local.recorder = recorder


class Way:
    """In a recorder's place: writes down what was chosen alone, which costs nothing."""

    def __init__(self) -> None:
        self.way: list[Hashable] = []

    def __enter__(self) -> Way:
        _local.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        _local.recorder = None

    def launched(self, function: Callable[..., None], args: tuple[Any, ...], owner: Any) -> None:
        """Nothing."""

    def branched(self, z: Tensor, choose: Choose, chosen: Hashable) -> None:
        """Values were read."""
        self.way.append(chosen)


class View(NamedTuple):
    """A tensor on tape: where its storage comes from, and how it lies in it (of an input: from its beginning on)."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class Constant(NamedTuple):
    """Something that is the same in every pass."""

    value: Any


class Call(NamedTuple):
    """One call: its arguments hold views and constants, its results are these slots; None: nobody's."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...]
    in_c: bool = False
    changes: bool = False  # what it is given, so that it cannot be left out


@dataclass
class Stretch:
    """Calls up to where a gate decides, or to the end."""

    calls: list[Call] = field(default_factory=list)
    z: View | None = None
    choose: Choose | None = None
    chosen: Hashable = None


class Recorder(TorchDispatchMode):
    """Writes down the calls of one pass. Its tensors are known by their storages, of which it holds none.

    Attributes:
        problem: why this pass cannot be played again, in words; None where it can.
        packs: weights were packed, which the next pass need not do.
        way: all that was chosen.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.problem: str | None = None
        self.packs = False
        self.way: list[Hashable] = []
        self.stretches = [Stretch()]
        self.bases: list[View] = []  # by slot, the inputs first: the tensor that its name stands for
        self._slots: dict[int, int] = {}
        self._begin: list[int] = []  # of the inputs in their storages, which is elsewhere in the next pass
        self._alive: list[Any] = []  # weakly: the address of a storage is nobody else's meanwhile
        self.inputs = len(inputs)
        for tensor in inputs:
            self._begin.append(int(tensor.storage_offset()))
            self._new_slot(tensor)
        if len(self._slots) < len(inputs):
            self.problem = "two inputs share memory"

    def __enter__(self) -> Recorder:
        _local.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _local.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if self.problem is None:
            self._called(func, args, kwargs, made)
        return made

    def launched(self, function: Callable[..., None], args: tuple[Any, ...], owner: Any) -> None:
        """A call of a function in C."""
        if self.problem is None:
            call = Call(function, tuple(map(self.known, args)), {"owner": Constant(owner)}, (), True, True)
            self.stretches[-1].calls.append(call)

    def branched(self, z: Tensor, choose: Choose, chosen: Hashable) -> None:
        """Values were read: what follows depends on them."""
        self.way.append(chosen)
        known = self.known(z)
        if not isinstance(known, View):
            return  # what no input can change
        stretch = self.stretches[-1]
        stretch.z, stretch.choose, stretch.chosen = known, choose, chosen
        self.stretches.append(Stretch())

    def known(self, value: Any) -> Any:
        """An argument or a result as it stands on tape."""
        if isinstance(value, list | tuple):
            return type(value)(map(self.known, value)) if any(isinstance(v, Tensor) for v in value) else Constant(value)
        if not isinstance(value, Tensor):
            return Constant(value)
        slot = self._slots.get(_storage(value))
        if slot is None:
            return Constant(value)
        if value.dtype != self.bases[slot].dtype:
            self.problem = "one memory is read as numbers of two types"
        return self._view(slot, value)

    def _view(self, slot: int, tensor: Tensor) -> View:
        begin = self._begin[slot] if slot < self.inputs else 0
        return View(slot, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - begin, tensor.dtype)

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        indexes = func.overloadpacket is aten.index and not _by_mask(args)  # by numbers, whose count is known
        if UNPREDICTABLE & set(func.tags) and not indexes:
            self.problem = f"{func} depends on values"
            return
        given = {_storage(each) for each in tensors}
        outs = made if isinstance(made, list | tuple) else (made,)
        arguments, options = tuple(map(self.known, args)), {key: self.known(each) for key, each in kwargs.items()}
        results: list[int | None] = []
        for out in outs:
            fresh = isinstance(out, Tensor) and _storage(out) not in given and _storage(out) not in self._slots
            results.append(self._new_slot(out) if fresh else None)
        changes = func._schema.is_mutable
        if changes and any(self._outlives(each) for each in _written(func, args, kwargs)):
            self.problem = f"{func} changes what is there before the pass"  # and would again where a pass begins anew
            return
        self.packs = self.packs or any(each in str(func) for each in PACKS)
        make = MAKERS.get(func)
        if make is not None and results == [len(self.bases) - 1]:
            base = self.bases[-1]  # nothing of what it is like need be there
            arguments, options = (Constant(base.size), Constant(base.stride)), {"dtype": Constant(base.dtype)}
            self.stretches[-1].calls.append(Call(make, arguments, options, tuple(results)))
        elif changes or any(slot is not None for slot in results):  # all else are views
            call = Call(getattr(func, "_op", func), arguments, options, tuple(results), changes=changes)
            self.stretches[-1].calls.append(call)

    def _outlives(self, tensor: Tensor) -> bool:
        slot = self._slots.get(_storage(tensor))
        return slot is None or slot < self.inputs

    def _new_slot(self, tensor: Tensor) -> int:
        slot = len(self.bases)
        self._slots[_storage(tensor)] = slot
        if tensor.layout == torch.strided:
            self._alive.append(StorageWeakRef(tensor.untyped_storage()))
            self.bases.append(self._view(slot, tensor))
        else:
            self._alive.append(tensor)
            self.bases.append(View(slot, tuple(tensor.shape), (), 0, tensor.dtype))
        return slot


def _zeros(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype).zero_()


EMPTY = (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default)
ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
MAKERS: dict[Any, Callable[..., Tensor]] = {**dict.fromkeys(EMPTY, torch.empty_strided), **dict.fromkeys(ZEROS, _zeros)}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = kwargs.get(argument.name, args[index] if index < len(args) else None)
            yield from (each for each in tree_leaves(given) if isinstance(each, Tensor))


def _by_mask(args: tuple[Any, ...]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
