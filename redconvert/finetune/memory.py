"""Activation checkpointing for any network: keep the inputs of its blocks, run them again in the backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import RedconvertError
from ..layers import DynamicConv, dynamic_layers

__all__ = ["blocks_of", "recomputed"]

Norm = nn.modules.batchnorm._NormBase  # instance norms too may keep running statistics


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The largest modules that hold at most the square root of all dynamic layers: as many blocks as layers in one.

    Lone convolutions, which keep little by themselves, are blocks only where there are no others.
    """
    found = list(dict.fromkeys(_largest(model, math.isqrt(len(dynamic_layers(model))))))
    return [block for block in found if not isinstance(block, DynamicConv)] or found


def _largest(model: nn.Module, most: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in model.children():
        held = sum(isinstance(module, DynamicConv) for module in child.modules())
        if 0 < held <= most and not isinstance(child, nn.ModuleList | nn.ModuleDict):  # nobody calls those
            found.append(child)
        elif held:
            found += _largest(child, most)
    return found


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Within it, the blocks of ``model`` keep nothing but their inputs for the backward pass.

    Running statistics of norms move once per step, as without it: they rest while a block runs again.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise RedconvertError(
            f"gradient_checkpointing: {type(model).__name__} is a single layer. Use "
            f"torch.utils.checkpoint(..., use_reentrant=False) around it"
        )
    before = [vars(block).get("forward") for block in blocks]  # a user's own
    for block in blocks:
        block.forward = partial(_run, block, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _run(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return forward(*args, **kwargs)
    again = partial(_resting_norms, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)


@contextmanager
def _resting_norms(block: nn.Module) -> Iterator[None]:
    norms: list[Any] = [m for m in block.modules() if isinstance(m, Norm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
