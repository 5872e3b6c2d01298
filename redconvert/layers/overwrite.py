"""Turn full convolutions into what reduced decisions return, in place, and back: only what changes is moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .gate import GateWeights
from .routing import FULL, Decision, group_samples, sample_rows

if TYPE_CHECKING:
    from .base import DynamicConv

__all__ = ["Overwritten", "overwrite", "restore"]

Rows = slice | Tensor


class Overwritten(NamedTuple):
    """What a group of samples held before: the channels that changed, then the dropped frames offset by offset."""

    rows: Rows
    decision: Decision
    before: list[Tensor]


def overwrite(layer: DynamicConv, y: Tensor, weights: GateWeights, decisions: list[Decision]) -> list[Overwritten]:
    """Make each sample of the full convolution ``y`` what inference would return for its decision."""
    result = []
    for decision, samples in group_samples(decisions).items():
        if decision == FULL:
            continue
        rows = _rows(layer, samples, y.device)
        part = y[rows]  # a view of one sample, or a copy of several
        if decision.blend:
            before = [part.clone()]
            chosen = torch.tensor(samples, device=y.device)
            part.copy_(layer.mix(before[0], GateWeights(*(w[chosen] for w in weights))))
        else:
            before = _overwrite_part(layer, part, decision)
        if isinstance(rows, Tensor):
            y[rows] = part
        result.append(Overwritten(rows, decision, before))
    return result


def restore(layer: DynamicConv, y: Tensor, overwritten: list[Overwritten]) -> None:
    """Undo `overwrite` in place."""
    for rows, decision, before in overwritten:
        if decision.blend:
            y[rows] = before[0]
            continue
        part = y[rows]
        pieces = iter(before)
        clips, kept, stride = _parts(layer, part, decision)
        if decision.channel:
            clips[:, layer.cheap_c.changed(decision.channel)] = next(pieces)  # type: ignore[union-attr]
        for offset in range(1, stride):
            clips[:, :, offset::stride][:, kept] = next(pieces)
        if isinstance(rows, Tensor):
            y[rows] = part


def _overwrite_part(layer: DynamicConv, part: Tensor, decision: Decision) -> list[Tensor]:
    clips, kept, stride = _parts(layer, part, decision)
    computed = clips[:, :, ::stride]
    before = []
    if decision.channel:
        assert layer.cheap_c is not None
        cheap, i = layer.cheap_c, decision.channel
        before.append(clips[:, cheap.changed(i)].clone())
        if cheap.is_principal:
            made = cheap.single(cheap.taken(i, layer.from_clips(computed)), i)
            computed.copy_(layer.as_clips(made, computed.shape[2]))
        else:
            rebuilt = cheap.op(i)(layer.from_clips(computed[:, kept]))
            computed[:, cheap.dropped(i)] = layer.as_clips(rebuilt, computed.shape[2])
    if decision.temporal:
        assert layer.cheap_t is not None
        for offset, frames in enumerate(layer.cheap_t.rebuild(decision.temporal, computed), start=1):
            place = clips[:, :, offset::stride]
            before.append(place[:, kept].clone())
            place.copy_(frames[:, :, : place.shape[2]])  # the last group may be shorter
    return before


def _parts(layer: DynamicConv, part: Tensor, decision: Decision) -> tuple[Tensor, Rows, int]:
    """``part`` as clips (a view), the channels that the decision leaves as they are, and its frame stride."""
    kept: Rows = slice(None)
    if layer.cheap_c is not None:
        principal = decision.channel and layer.cheap_c.is_principal
        kept = slice(0) if principal else layer.cheap_c.kept(decision.channel)
    return layer.as_clips(part, layer.frames_per_sample), kept, layer.candidates.strides[decision.temporal]


def _rows(layer: DynamicConv, samples: list[int], device: torch.device) -> Rows:
    frames = layer.frames_per_sample
    if len(samples) == 1:
        return slice(samples[0] * frames, (samples[0] + 1) * frames)
    return sample_rows(torch.tensor(samples, device=device), frames)
