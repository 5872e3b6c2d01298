"""A reduced candidate as one convolution: where that takes less time than its parts.

To mix the input and to rebuild channels are linear operations at each position, and so part of the filters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import DynamicConv

__all__ = ["BALANCE", "compose", "composes", "saved_per_pass"]

# Multiply-adds in the time in which a number is read or written. A CPU with AVX-512 trains ResNet-56 fastest with 25 in
# float32 and with 40 or more in bfloat16; for GPUs it is what an H100's data sheet promises, halved, and not measured.
BALANCE = {"cpu": 30, "cuda": 125}
PASSES = 4  # over all channels, that parts take more


def composes(layer: DynamicConv, channel: int) -> bool:
    """Whether a reduced candidate trains as one convolution, see `compose`, while its gate rests.

    That multiplies as much as the full one and passes over memory once; in parts a candidate mixes, convolves, rebuilds
    and sorts, each a pass of its own, forward and backward. Which is faster is the device's balance of the two.
    """
    if not channel or not layer.training or layer.learns:
        return False
    saved = saved_per_pass(layer, channel)
    return saved is not None and saved <= BALANCE.get(layer.weight.device.type, BALANCE["cpu"])


def saved_per_pass(layer: DynamicConv, channel: int) -> float | None:
    """Multiply-adds that a reduced candidate saves per number that its parts read or write more; None: no `compose`."""
    if layer.cheap_c is None or not layer.rebuilds or layer.groups > 1 or not layer.cheap_c.op(channel).composes:
        return None
    outputs, inputs, *kernel = layer.weight.shape
    kept, read, passes = layer.candidates.channels[channel], inputs, PASSES * outputs
    parts = layer.cheap_c.op(channel).macs_per_position
    if layer.mixed_in is not None:
        read, positions = layer.mixed_in.channels[channel], math.prod(layer.stride)
        passes += PASSES * inputs * positions
        parts += layer.mixed_in.macs_per_position(channel) * positions
    return ((outputs * inputs - kept * read) * math.prod(kernel) - parts) / passes


def compose(layer: DynamicConv, channel: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``[1; Phi_c] W_i A [1, B]``: the filters that give of the input all channels that candidate i makes of it.

    Args:
        weight: the layer's filters, ``(C_out, C_in, ...)``; bias: ``(C_out)`` or none.
    """
    assert layer.cheap_c is not None
    with torch.autocast(weight.device.type, enabled=False):
        weight, bias = layer.cheap_c.filters(channel, weight, bias)
        if layer.mixed_in is not None:
            weight = layer.mixed_in.compose(channel, layer.mixed_in.filters(channel, weight))
        return layer.cheap_c.compose(channel, weight, bias)
