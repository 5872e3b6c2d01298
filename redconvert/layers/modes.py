"""Switch every dynamic layer of a network for a while: dense, forced, observed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RedconvertError
from ..inputs import unwrapped
from .base import DynamicConv, Forced, Observation

__all__ = [
    "attributes",
    "capturable",
    "disabled",
    "dynamic_layers",
    "forced",
    "observed",
    "remembered",
    "resting_gates",
    "undone_on_error",
]


def dynamic_layers(model: nn.Module) -> dict[str, DynamicConv]:
    """The dynamic layers by name, each once. An error where there are none."""
    layers = {name: module for name, module in unwrapped(model).named_modules() if isinstance(module, DynamicConv)}
    if not layers:
        raise RedconvertError(
            f"{type(model).__name__} has no dynamic layers: pass what redconvert.convert(model) returned"
        )
    return layers


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the network dense, as it was before conversion: the teacher, or the other side of a benchmark."""
    with attributes(dynamic_layers(model).values(), enabled=False):
        yield model


@contextmanager
def resting_gates(model: nn.Module) -> Iterator[nn.Module]:
    """In training, let the gates decide and not learn: a step then costs what the decisions leave to compute.

    A gate learns from what every candidate would have given, so all of them are computed; here only those that are
    taken, each in parts or, where that takes less time (few channels, small savings), by one convolution whose filters
    hold what mixes and rebuilds. Put it around the forward and the backward pass of most steps, and let gates learn in
    every few alone. A compiled network computes everything all the same.
    """
    with attributes(dynamic_layers(model).values(), learns=False):
        yield model


@contextmanager
def capturable(model: nn.Module) -> Iterator[nn.Module]:
    """Run without a look at any value, so that a CUDA graph can capture the passes, those of training included.

    A step of training is then one launch, where its kernels are small. Values and gradients are those of the network
    outside. Decisions stay on the device, and every candidate is computed of which one could be taken; not so where
    `forced` names it, or no input can change what the gate decides (so it is after `set_budget` by layers): in
    inference, and in training inside `resting_gates`, that candidate alone is computed. Which gates these are is read
    when the block is entered: enter it again after thresholds or gates have changed.

        with redconvert.capturable(dynamic), redconvert.resting_gates(dynamic):
            ...  # warm up on a side stream
            with torch.cuda.graph(graph):
                loss = criterion(dynamic(x), y)
                loss.backward()
    """
    with ExitStack() as stack:
        for layer in dynamic_layers(model).values():
            settled = layer.gate.settled() if layer.config.gate == "hard" else None
            stack.enter_context(attributes([layer], capturable=True, settled=settled))
        yield model


@contextmanager
def forced(
    model: nn.Module,
    *,
    channel: int | Sequence[int | None] | Tensor | None = None,
    temporal: int | Sequence[int | None] | Tensor | None = None,
) -> Iterator[nn.Module]:
    """Take these candidates whatever the gates say: tests, benchmarks and what-if questions.

    Args:
        model: a converted network.
        channel: candidate index, 0 for all channels; one for all samples, or one per sample. A layer with
            fewer candidates takes its cheapest, one without the axis ignores it. None leaves it, or that sample,
            to the gates.
        temporal: the same for frames.

    Raises:
        RedconvertError: an index that no layer has, or not one per sample.
    """
    layers = dynamic_layers(model)
    wanted = (_indices("channel", channel), _indices("temporal", temporal))
    for axis, index, counts in (
        ("channel", wanted[0], [len(layer.candidates.channels) for layer in layers.values()]),
        ("temporal", wanted[1], [len(layer.candidates.strides) for layer in layers.values()]),
    ):
        highest = max(_numbers(index))
        if highest > 0 and highest >= max(counts):
            raise RedconvertError(
                f"forced({axis}={highest}): no layer has this candidate; the largest index is {max(counts) - 1}"
            )
    with attributes(layers.values(), forced=wanted):
        yield model


@contextmanager
def observed(model: nn.Module, listener: Callable[[DynamicConv, Observation], None]) -> Iterator[nn.Module]:
    """Call ``listener(layer, observation)`` after every call of a dynamic layer; what is compiled runs eagerly."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; a graph would tell nobody
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in dynamic_layers(model).values():
            stack.enter_context(attributes([layer], observers=(*layer.observers, listener)))
        yield model


def remembered(parts: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that puts these modules, such as gates and cheap operations, back to what they are now."""
    now = [(part, copy.deepcopy(part.state_dict())) for part in parts]

    def undo() -> None:
        for part, state in now:
            part.load_state_dict(state)

    return undo


@contextmanager
def undone_on_error(parts: Iterable[nn.Module]) -> Iterator[Callable[[], None]]:
    """Whatever stops the block, these modules are then what they were before it.

    What is yielded puts them back at any time.
    """
    undo = remembered(parts)
    try:
        yield undo
    except BaseException:
        undo()
        raise


@contextmanager
def attributes(layers, **values: Any) -> Iterator[None]:
    """Set instance attributes, and put back what was there, also where nothing was."""
    before = [(layer, name, vars(layer).get(name, ...)) for layer in layers for name in values]
    try:
        for layer, name, _ in before:
            setattr(layer, name, values[name])
        yield
    finally:
        for layer, name, value in before:
            if value is ...:
                vars(layer).pop(name, None)
            else:
                setattr(layer, name, value)


def _indices(axis: str, value: int | Sequence[int | None] | Tensor | None) -> Forced:
    if isinstance(value, Tensor):
        value = value.tolist()
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        indices: Forced = value
    elif isinstance(value, Sequence) and value and all(item is None or isinstance(item, int) for item in value):
        indices = list(value)
    else:
        raise RedconvertError(f"forced({axis}=...) takes an index or one index per sample, not {value!r}")
    if min(_numbers(indices)) < 0:
        raise RedconvertError(f"forced({axis}={value!r}): candidates count from 0, which computes everything")
    return indices


def _numbers(indices: Forced) -> list[int]:
    """The indices that are named; [0] where there are none."""
    listed = indices if isinstance(indices, list) else [indices]
    return [index for index in listed if index is not None] or [0]
