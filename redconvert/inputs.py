"""What users hand to networks: example inputs, batches with labels, devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import RedconvertError

__all__ = [
    "as_arguments",
    "call_with",
    "device_of",
    "each_batch",
    "each_labelled_batch",
    "evaluating",
    "measuring",
    "move_to",
    "take_inputs",
    "take_labels",
    "tensors_in",
    "unwrapped",
]

LABELS = frozenset({"label", "labels", "target", "targets"})

ACCEPTED = (
    "A batch is a tensor; a tuple or list whose first element is the input (a tensor, a list of tensors, a "
    "tuple of arguments or a dict of them) and whose others are labels; or a dict of keyword arguments, whose "
    "'label', 'labels', 'target' and 'targets' are left out"
)


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple is the former, a dict with string keys the latter.

    Anything else, a tensor or the list of tensors that SlowFast takes, is the one argument. Lists and dicts are
    handed over as copies: SlowFast puts its features into the list that it is given.
    """
    example_inputs = tree_map(lambda leaf: leaf, example_inputs)
    if isinstance(example_inputs, tuple):
        return tuple(example_inputs), {}
    if _is_keywords(example_inputs):
        return (), dict(example_inputs)
    return (example_inputs,), {}


def call_with(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` called with ``example_inputs``, as `as_arguments` reads them."""
    args, kwargs = as_arguments(example_inputs)
    return model(*args, **kwargs)


def take_inputs(batch: Any) -> Any:
    """The inputs of one item of ``batches``, labels left out: something that `as_arguments` takes.

    ``x`` and ``(x, y)`` give x, ``([slow, fast], y)`` the list, ``((x, mask), y)`` the two positional
    arguments, ``{"x": x, "label": y}`` the dict without its label.

    Raises:
        RedconvertError: anything else.
    """
    if isinstance(batch, Tensor):
        return batch
    if _is_keywords(batch):
        inputs = {key: value for key, value in batch.items() if key not in LABELS}
        if inputs:
            return inputs
        raise RedconvertError(f"a batch holds only labels: {', '.join(batch)}. {ACCEPTED}")
    if isinstance(batch, tuple | list) and batch:
        first = batch[0]
        if isinstance(first, Tensor) or _is_keywords(first) or (isinstance(first, tuple | list) and tensors_in(first)):
            return first
    raise RedconvertError(f"cannot read a batch of type {_describe(batch)}. {ACCEPTED}")


def take_labels(batch: Any) -> Any:
    """The labels of one item of ``batches``: what follows the inputs, or a dict's label; None without any."""
    if _is_keywords(batch):
        return next((value for key, value in batch.items() if key in LABELS), None)
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1]
    return None


def each_batch(batches: Any) -> Iterator[Any]:
    """The inputs of every batch: `take_inputs` of each item.

    Args:
        batches: any iterable of batches; a tensor, a tuple or a dict is a single one.

    Raises:
        RedconvertError: not iterable, empty, or an item that is no batch.
    """
    return (inputs for inputs, _ in each_labelled_batch(batches))


def each_labelled_batch(batches: Any) -> Iterator[tuple[Any, Any]]:
    """The inputs and the labels of every batch: `take_inputs` and `take_labels` of each item; as `each_batch`."""
    single = isinstance(batches, Tensor | tuple) or _is_keywords(batches)
    if not single and not isinstance(batches, Iterable):
        raise RedconvertError(f"batches must be an iterable of batches, not {type(batches).__name__}. {ACCEPTED}")
    iterator = iter([batches] if single else batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise RedconvertError("batches is empty: give at least one batch (an iterator can be used only once)") from None
    return ((take_inputs(batch), take_labels(batch)) for batch in chain([first], iterator))


def move_to(value: Any, device: torch.device | str) -> Any:
    """The tensors in ``value`` (nested tuples, lists and dicts) on ``device``, all else as it is."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in ``value`` (nested tuples, lists and dicts), in their order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter is (its first buffer, or the CPU, where it has none)."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def unwrapped(model: nn.Module) -> nn.Module:
    """The network without what torch.compile, parallel training and `redconvert.deploy` put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "deployed_from", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Run in ``eval()`` without gradients, and put every module's train flag back, also after an error."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def measuring(model: nn.Module) -> Iterator[nn.Module]:
    """`evaluating`, for passes that are waited for: max pools of clips read channels-last memory on a CPU.

    PyTorch pools that ten times as fast, and the same to the bit; convolutions behind then run channels-last, too. Not
    where there is much to differentiate: backwards the large pools of a stem are slower so.
    """
    with evaluating(model), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.MaxPool3d):
                stack.callback(module.register_forward_pre_hook(_channels_last).remove)
        yield model


def _channels_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not (args and isinstance(args[0], Tensor) and args[0].dim() == 5 and args[0].device.type == "cpu"):
        return None
    return args[0].contiguous(memory_format=torch.channels_last_3d), *args[1:]


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(key, str) for key in value)


def _describe(batch: Any) -> str:
    name = type(batch).__name__
    if isinstance(batch, tuple | list):
        return f"{name} of {type(batch[0]).__name__}" if batch else f"empty {name}"
    return name
