"""Masked mode with static shapes: what ``torch.compile``, ``torch.export`` and ONNX see.

Decisions stay tensors, so that one graph serves all of them, and every step more is a node more for a compiler to
read: with hard gates no weights are computed, since the largest open candidate alone counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .absorb import Choice, pooled_static, static_source
from .gate import GateWeights, largest_open
from .masked import attach, rebuild_loss, replace_value

if TYPE_CHECKING:
    from .base import DynamicConv

__all__ = ["mixed", "run_static"]

AXES = ("channel", "temporal")


def run_static(layer: DynamicConv, x: Tensor) -> Tensor:
    """The layer's output without a look at any value.

    Where Python knows the candidate (`redconvert.forced` with an index, an axis with one candidate), only that one is
    computed. Where the gate decides, all candidates come from one full convolution.
    """
    pooled = pooled_static(layer, x)
    if layer.training or layer.config.gate == "soft":
        weights = layer._weights(x, pooled)
        if layer.training and not layer.learns:
            weights = GateWeights(*(each.detach() for each in weights))
        if layer.hands_to is not None:
            layer.hands_to.static = weights.channel, weights.channel
        return mixed(layer, x, weights)
    channel, temporal = _choices(layer, x, pooled)
    if layer.hands_to is not None:
        layer.hands_to.static = channel, None
        channel = channel if isinstance(channel, int) else 0  # all are computed, and the reader leaves some out
    i, j = (choice if isinstance(choice, int) else 0 for choice in (channel, temporal))
    y = _read(layer, x, i, j)
    num_frames = layer._output_frames(x)
    computed = layer.candidates.frames(j, num_frames)
    if isinstance(channel, Tensor):
        folded = layer.frames_per_sample > 1  # then a sample has a row per frame
        rows = channel.repeat_interleave(computed, dim=0) if folded else channel
        y = _largest(rows, _channel_candidates(layer, y))
    elif i:
        y = layer.cheap_c.single(y, i)  # type: ignore[union-attr]
    if isinstance(temporal, int) and not j:
        return y
    z = layer.as_clips(y, computed)
    if isinstance(temporal, Tensor):
        z = _largest(temporal, _frame_candidates(layer, z))
    else:
        z = layer.cheap_t.single(z, j, num_frames)  # type: ignore[union-attr]
    return layer.from_clips(z)


def _read(layer: DynamicConv, x: Tensor, i: int, j: int) -> Tensor:
    """The convolution of the channels that the layer's source hands over, whatever is known of them."""
    source, _ = static_source(layer)
    if isinstance(source, int):
        return layer._convolve(x, i, j, source) if i or j or source else layer.dense_class.forward(layer, x)
    full = layer._convolve(x, i, j) if i or j else layer.dense_class.forward(layer, x)
    frames = layer.candidates.frames(j, layer.frames_per_sample) if layer.frames_per_sample > 1 else 1
    rows = source.repeat_interleave(frames, dim=0) if frames > 1 else source
    return _largest(rows, (layer._convolve(x, i, j, s) if s else full for s in range(rows.shape[1] - 1, -1, -1)))


def _read_mixed(layer: DynamicConv, x: Tensor) -> Tensor:
    """The full convolution for training: in value what each sample's source hands over, in gradient the soft sum."""
    y = layer.dense_class.forward(layer, x)
    _, weights = static_source(layer)
    if weights is None:
        return y
    results = [y, *(layer._convolve(x, 0, 0, index) for index in range(1, weights.shape[1]))]
    rows = weights.repeat_interleave(layer.frames_per_sample, dim=0)
    shape = (-1, *(1,) * (y.dim() - 1))
    soft = sum(each * row.to(y.dtype).view(shape) for each, row in zip(results, rows.unbind(1), strict=True))
    hard = _largest(rows > 0, (each.detach() for each in reversed(results)))
    return replace_value(soft, hard)


def mixed(layer: DynamicConv, x: Tensor, weights: GateWeights) -> Tensor:
    """The soft sum over all candidates (Eq. 5); in training with hard gates the largest open one, straight-through."""
    y = _read_mixed(layer, x)
    if layer.hands_to is not None:
        if layer.cheap_t is None:
            return y
        weights = GateWeights(F.one_hot(largest_open(weights.channel) * 0, weights.channel.shape[1]), weights.temporal)
    out = layer.mix(y, weights)
    if not layer.training:
        return out
    if layer.config.gate == "hard":
        hard = GateWeights(*(F.one_hot(largest_open(w).long(), w.shape[1]).to(w.dtype) for w in weights))
        out = replace_value(out, layer.mix(y.detach(), hard).detach())
    loss = rebuild_loss(layer, y.detach(), GateWeights(*(w.detach() for w in weights)))
    return out if loss is None else attach(out, loss)


def _choices(layer: DynamicConv, x: Tensor, pooled: Tensor) -> list[Choice]:
    sizes = (len(layer.candidates.channels), len(layer.candidates.strides))
    forced = [0 if size == 1 else wanted for size, wanted in zip(sizes, layer.forced, strict=True)]
    known = [isinstance(wanted, int) for wanted in forced]
    if all(known):
        found: list[Tensor] = []
    elif any(isinstance(wanted, list) for wanted in forced):
        found = [weights > 0 for weights in layer._weights(x, pooled)]
    else:
        opened = layer.gate.logits(layer._per_clip(pooled)) > 0
        found = [layer.gate.axis(axis, opened) for axis in AXES]
    nearest = layer.candidates.nearest
    return [
        nearest(AXES[axis], wanted) if known[axis] else found[axis]  # type: ignore[arg-type]
        for axis, wanted in enumerate(forced)
    ]


def _channel_candidates(layer: DynamicConv, y: Tensor) -> Iterator[Tensor]:
    """From the full convolution what each candidate makes of it, from the cheapest to the full one."""
    cheap = layer.cheap_c
    assert cheap is not None
    for i in reversed(range(1, len(layer.candidates.channels))):
        yield cheap.single(cheap.taken(i, y), i)
    yield y


def _frame_candidates(layer: DynamicConv, z: Tensor) -> Iterator[Tensor]:
    cheap = layer.cheap_t
    assert cheap is not None
    for j, stride in reversed(list(enumerate(layer.candidates.strides[1:], start=1))):
        yield cheap.single(z[:, :, ::stride], j, z.shape[2])
    yield z


def _largest(opened: Tensor, candidates: Iterator[Tensor]) -> Tensor:
    """Sample by sample the largest candidate that is open, ``opened (N, S)``; the cheapest where none is."""
    out = next(candidates)
    shape = (-1, *(1,) * (out.dim() - 1))
    for index, larger in zip(range(opened.shape[1] - 2, -1, -1), candidates, strict=True):
        out = torch.where(opened[:, index].view(shape), larger, out)
    return out
