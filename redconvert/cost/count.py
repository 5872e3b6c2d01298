"""MACs: what a network costs dense, and what each decision of a dynamic layer costs.

The unit is one multiply-add, which the paper and fvcore call one FLOP. Counted are convolutions (also
transposed ones), matrix products and attention; elementwise operations, norms and pooling are not, except for
the gates' average over H and W, which is all of the input that a gate reads.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from ..inputs import as_arguments, evaluating, unwrapped
from ..layers import DynamicConv, disabled
from .handles import HANDLES, may_multiply

__all__ = ["DenseMacs", "dense_macs"]


@dataclass(frozen=True)
class DenseMacs:
    """MACs of one forward pass, for the whole batch that was passed.

    Attributes:
        total: of the network.
        by_module: by module name, what the module contains included; ``""`` is the network. A module that
            is used in several places stands under its first name, with all its calls.
        unsupported: operators that may multiply and were not counted.
        source: ``"fvcore"``, or ``"flop_counter"`` (torch.utils.flop_counter) where tracing failed.
    """

    total: int
    by_module: dict[str, int]
    unsupported: tuple[str, ...]
    source: str


def dense_macs(model: nn.Module, example_inputs: Any) -> DenseMacs:
    """MACs of one dense forward pass in ``eval()``; dynamic layers count as the convolutions they were.

    Args:
        model: any network; it is run once, and left as it was.
        example_inputs: a tuple is the positional arguments, a dict with string keys the keyword
            arguments, anything else the one argument.
    """
    model = unwrapped(model)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if any(isinstance(module, DynamicConv) for module in model.modules()):
            stack.enter_context(disabled(model))
        stack.enter_context(_no_fused_attention())
        try:
            return _from_fvcore(model, example_inputs)
        except Exception:  # tracing can fail in many ways; where the network itself fails, the next line says so
            return _from_flop_counter(model, example_inputs)


def _from_fvcore(model: nn.Module, example_inputs: Any) -> DenseMacs:
    with warnings.catch_warnings(), _silenced("fvcore"):
        warnings.simplefilter("ignore")  # fvcore uses parts of torch.jit that warn, at import and in traces
        from fvcore.nn import FlopCountAnalysis

        flat = _Flat(model, example_inputs)
        with _hooks_restored(model):
            flat.keep_outputs()
            analysis = FlopCountAnalysis(flat, flat.tensors)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            analysis.set_op_handle(**HANDLES)
            counts = {name: int(count) for name, count in analysis.by_module().items()}
            unsupported = tuple(sorted(filter(may_multiply, analysis.unsupported_ops())))
    return DenseMacs(counts[""], _without_prefix(counts, "network"), unsupported, "fvcore")


def _from_flop_counter(model: nn.Module, example_inputs: Any) -> DenseMacs:
    flat = _Flat(model, example_inputs)
    with FlopCounterMode(display=False) as counter:
        flat(*flat.tensors)
    flops = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    counts = {name: count // 2 for name, count in flops.items()}  # it counts a multiply-add as two
    total = counter.get_total_flops() // 2
    by_module = {name: 0 for name, _ in model.named_modules()}
    first = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, count in _without_prefix(counts, f"{type(flat).__name__}.network").items():
        by_module[first[modules[name]]] += count  # shared modules stand under any of their names
    for module, name in reversed(first.items()):  # children before parents
        if type(module).forward is nn.Module.forward:  # a ModuleList is never called
            by_module[name] = sum(by_module[first[child]] for child in module.children())
    return DenseMacs(total, {**by_module, "": total}, (), "flop_counter")


def _without_prefix(counts: dict[str, int], prefix: str) -> dict[str, int]:
    inside = {name: count for name, count in counts.items() if name == prefix or name.startswith(prefix + ".")}
    return {name[len(prefix) + 1 :]: count for name, count in inside.items()}


class _Flat(nn.Module):
    """A network as fvcore's tracer can run it: tensors in, a tuple of tensors out, both flat."""

    def __init__(self, network: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.leaves, self.structure = tree_flatten(as_arguments(example_inputs))
        self.tensors = tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))
        self.kept: list[Tensor] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        outputs = tree_leaves(self.network(*args, **kwargs))
        return (*(leaf for leaf in outputs if isinstance(leaf, Tensor)), *self.kept)

    def keep_outputs(self) -> None:
        """Tracing drops what no output depends on, though it runs: return one element of every leaf's output too."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.kept.append(output[(slice(0, 1),) * output.dim()].clone())

        for module in self.network.modules():
            if not any(module.children()):
                module.register_forward_hook(keep)


@contextmanager
def _hooks_restored(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that were added within; fvcore leaves its own behind where tracing fails."""
    before = [(hooks, set(hooks)) for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    try:
        yield
    finally:
        for hooks, keys in before:
            for key in [key for key in hooks if key not in keys]:
                del hooks[key]


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.disabled, logger.level
    logger.disabled, logger.level = True, logging.CRITICAL
    try:
        yield
    finally:
        logger.disabled, logger.level = before


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` in ``eval()`` is one operator that neither counter knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
