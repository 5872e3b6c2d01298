"""Masked mode with static shapes: what ``torch.compile``, ``torch.export``, ONNX and CUDA graphs see.

Decisions stay tensors, so that one graph serves all of them, and every step more is a node more for a compiler to
read: with hard gates no weights are computed, since the largest open candidate alone counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .absorb import Choice, pooled_static, static_source
from .composed import composes
from .gate import GateWeights, largest_open, one_hot
from .masked import attach, rebuild_loss, replace_value
from .routing import FULL, Decision
from .training import trained_candidate

if TYPE_CHECKING:
    from .base import DynamicConv

__all__ = ["mixed", "run_static"]

AXES = ("channel", "temporal")


def run_static(layer: DynamicConv, x: Tensor) -> Tensor:
    """The layer's output without a look at any value.

    Where Python knows the candidate (`redconvert.forced` with an index, an axis with one candidate, a gate that
    `redconvert.capturable` found settled), only that one is computed; in training, where its gate rests. Where the gate
    decides, all candidates come from one full convolution.
    """
    known = _known(layer)
    if None not in known and (not layer.training or not layer.learns):
        out = _run_chosen(layer, x, known)  # type: ignore[arg-type]
        _tell_known(layer, x, out, *known)  # type: ignore[arg-type]
        return out
    pooled = pooled_static(layer, x)
    if layer.training or layer.config.gate == "soft":
        weights = layer._weights(x, pooled)
        if layer.training and not layer.learns:
            weights = GateWeights(*(each.detach() for each in weights))
        if layer.hands_to is not None:
            layer.hands_to.static = weights.channel, weights.channel
        out = mixed(layer, x, weights)
        if _tells(layer):
            layer.tell(x, out, weights, [FULL] * len(weights.channel), _told_source(layer, weights.channel))
        return out
    return _run_chosen(layer, x, _choices(layer, x, pooled, known))


def _run_chosen(layer: DynamicConv, x: Tensor, choices: Sequence[Choice]) -> Tensor:
    """The candidates that Python knows, or the largest that the gate opens, sample by sample."""
    channel, temporal = choices
    learned = 0
    if layer.hands_to is not None:
        layer.hands_to.static = channel, None
        if layer.training and isinstance(channel, int) and not torch.compiler.is_compiling():
            learned = trained_candidate(layer, channel)
        # All are computed, for the norm's statistics in training, and the reader leaves some out.
        channel = channel if isinstance(channel, int) and not layer.training else 0
    i, j = (choice if isinstance(choice, int) else 0 for choice in (channel, temporal))
    composed = composes(layer, i)
    y = _read(layer, x, i, j, learned, composed)
    num_frames = layer._output_frames(x)
    computed = layer.candidates.frames(j, num_frames)
    if isinstance(channel, Tensor):
        folded = layer.frames_per_sample > 1  # then a sample has a row per frame
        rows = channel.repeat_interleave(computed, dim=0) if folded else channel
        y = _largest(rows, _channel_candidates(layer, x, y, j))
    elif i and not composed:
        y = layer.cheap_c.single(y, i)  # type: ignore[union-attr]
    if isinstance(temporal, int) and not j:
        return y
    z = layer.as_clips(y, computed)
    if isinstance(temporal, Tensor):
        z = _largest(temporal, _frame_candidates(layer, z))
    else:
        z = layer.cheap_t.single(z, j, num_frames)  # type: ignore[union-attr]
    return layer.from_clips(z)


def _tells(layer: DynamicConv) -> bool:
    """Whether somebody listens: a graph of a compiler's tells nobody."""
    return bool(layer.observers) and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _tell_known(layer: DynamicConv, x: Tensor, out: Tensor, channel: int, temporal: int) -> None:
    """Tell observers what a resting gate is known to decide."""
    if not _tells(layer):
        return
    num_samples = x.shape[0] // layer.frames_per_sample
    sizes = (len(layer.candidates.channels), len(layer.candidates.strides))
    like = layer.gate.beta.new_empty(num_samples, 0)
    weights = GateWeights(*(_certain(like, *each) for each in zip((channel, temporal), sizes, strict=True)))
    source, _ = static_source(layer)
    decision = Decision(channel, temporal, source=source if isinstance(source, int) else 0)
    layer.tell(x, out, weights, [decision] * num_samples, _told_source(layer, like))


def _told_source(layer: DynamicConv, like: Tensor) -> Tensor | None:
    """The weights over the candidates of the layer that is read, ``(N, S)``, also where Python knows the candidate."""
    source, weights = static_source(layer)
    if layer.told_by is None or not isinstance(source, int):
        return weights
    return _certain(like, source, len(layer.told_by.channels))


def _certain(like: Tensor, index: int, size: int) -> Tensor:
    """Weights ``(N, size)`` of samples that all take candidate ``index``."""
    return one_hot(torch.full((len(like),), index, device=like.device), size).to(like.dtype)


def _read_source(layer: DynamicConv) -> tuple[Choice, Tensor | None]:
    """What `static_source` says to a reader; whoever carries computes all channels, as the layer before does."""
    return (0, None) if layer.carries is not None else static_source(layer)


def _read(layer: DynamicConv, x: Tensor, i: int, j: int, learned: int = 0, composed: bool = False) -> Tensor:
    """The convolution of the channels that the layer's source hands over, whatever is known of them.

    ``learned``: the channel candidate whose channels alone get gradients, 0 for all. ``composed``: see `compose`.
    """
    source, _ = _read_source(layer)
    if isinstance(source, int):
        if i or j:
            return layer._convolve(x, i, j, source, learned, composed)
        return layer.whole(x, source, learned)
    full = layer._convolve(x, i, j, composed=composed) if i or j else layer.dense_class.forward(layer, x)
    frames = layer.candidates.frames(j, layer.frames_per_sample) if layer.frames_per_sample > 1 else 1
    rows = source.repeat_interleave(frames, dim=0) if frames > 1 else source
    indices = range(rows.shape[1] - 1, 0, -1)
    reduced = (layer._convolve(x, i, j, index, composed=composed) for index in indices)
    return _largest(rows, chain(reduced, [full]))


def _read_mixed(layer: DynamicConv, x: Tensor) -> Tensor:
    """The full convolution for training: in value what each sample's source hands over, in gradient the soft sum."""
    y = layer.dense_class.forward(layer, x)
    _, weights = _read_source(layer)
    if weights is None:
        return y
    return _soft_sum(layer, [y, *(layer._convolve(x, 0, 0, index) for index in range(1, weights.shape[1]))], weights)


def _soft_sum(layer: DynamicConv, results: list[Tensor], weights: Tensor) -> Tensor:
    """Each sample's largest open candidate in value, in gradient the sum of all; full one first."""
    rows = weights.repeat_interleave(layer.frames_per_sample, dim=0)
    shape = (-1, *(1,) * (results[0].dim() - 1))
    terms = [each * row.to(each.dtype).view(shape) for each, row in zip(results, rows.unbind(1), strict=True)]
    soft = sum(terms[1:], terms[0])
    hard = _largest(rows > 0, (each.detach() for each in reversed(results)))
    return replace_value(soft, hard)


def mixed(layer: DynamicConv, x: Tensor, weights: GateWeights) -> Tensor:
    """The soft sum over all candidates (Eq. 5); in training with hard gates the largest open one, straight-through."""
    y = _read_mixed(layer, x)
    if layer.mixed_in is not None:
        y = _soft_sum(layer, list(_channel_candidates(layer, x, y, 0))[::-1], weights.channel)
    if not layer.derives:
        if layer.cheap_t is None:
            return y
        opened = one_hot(largest_open(weights.channel) * 0, weights.channel.shape[1])
        weights = GateWeights(opened.to(weights.channel.dtype), weights.temporal)
    out = layer.mix(y, weights)
    if not layer.training:
        return out
    if layer.config.gate == "hard":
        hard = GateWeights(*(one_hot(largest_open(w), w.shape[1]).to(w.dtype) for w in weights))
        out = replace_value(out, layer.mix(y.detach(), hard).detach())
    loss = rebuild_loss(layer, y.detach(), GateWeights(*(w.detach() for w in weights)))
    return out if loss is None else attach(out, loss)


def _known(layer: DynamicConv) -> list[int | None]:
    """The candidate on each axis, where Python knows it without a look at the gate."""
    sizes = (len(layer.candidates.channels), len(layer.candidates.strides))
    settled = layer.settled or (None, None)
    found: list[int | None] = []
    for axis, size, wanted, always in zip(AXES, sizes, layer.forced, settled, strict=True):
        wanted = always if wanted is None else wanted
        found.append(0 if size == 1 else layer.candidates.nearest(axis, wanted) if isinstance(wanted, int) else None)
    return found


def _choices(layer: DynamicConv, x: Tensor, pooled: Tensor, known: Sequence[int | None]) -> list[Choice]:
    """On each axis what is known, else which candidates the gate opens, ``(N, S)``."""
    if any(isinstance(wanted, list) for wanted in layer.forced):
        found = [weights > 0 for weights in layer._weights(x, pooled)]
    else:
        opened = layer.gate.logits(layer._per_clip(pooled)) > 0
        found = [layer.gate.axis(axis, opened) for axis in AXES]
    return [gated if index is None else index for gated, index in zip(found, known, strict=True)]


def _channel_candidates(layer: DynamicConv, x: Tensor, y: Tensor, temporal: int) -> Iterator[Tensor]:
    """What each candidate gives of the frames that are computed, from the cheapest to the full one, which is ``y``.

    From y, or from the input where each reads mixtures of its own.
    """
    cheap = layer.cheap_c
    assert cheap is not None
    for i in reversed(range(1, len(layer.candidates.channels))):
        computed = cheap.taken(i, y) if layer.mixed_in is None else layer._convolve(x, i, temporal)
        yield cheap.single(computed, i)
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
