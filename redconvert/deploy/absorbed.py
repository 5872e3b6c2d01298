"""Channels that are handed over, in a deployed network: what reads them, alone or in their places among all."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layers import DynamicConv
from ..layers.absorb import Handover
from ..layers.routing import select
from .frames import Frames
from .pack import Filter, from_rows, to_rows

__all__ = ["absorbed_filter", "kept_alone", "masked_means", "spread_out"]


def absorbed_filter(layer: DynamicConv, filter: Filter, source: int) -> Filter:
    """What a layer convolves with where candidate ``source`` hands over its channels, in their rank order."""
    if not source:
        return filter
    if layer.carries is not None:
        return filter.pick(layer.carries.kept(source))
    assert layer.cheap_in is not None and layer.reads_from is not None
    weight = filter.weight if isinstance(layer, nn.Conv3d) else filter.weight.squeeze(2)
    with torch.no_grad():
        weight, bias = layer.cheap_in.filter(source, weight, filter.bias, layer.reads_from.kept(source))
    weight = weight if isinstance(layer, nn.Conv3d) else weight.unsqueeze(2)
    return replace(filter, weight=weight.detach(), bias=bias.detach())


def kept_alone(x: Tensor | Frames, handover: Handover, source: int) -> Tensor | Frames:
    """The channels that candidate ``source`` computed, in rank order, whether x holds all of them or those alone."""
    if x.shape[1] == handover.channels[source]:
        return x
    kept = handover.kept(source)
    return x.replaced(select(x.held, 1, kept)) if isinstance(x, Frames) else select(x, 1, kept)


def spread_out(y: Tensor | Frames, handover: Handover, source: int) -> Tensor | Frames:
    """All channels again, zeros where candidate ``source`` has none: what `kept_alone` undoes."""
    held = y.held if isinstance(y, Frames) else y
    rows = to_rows(held)
    out = rows.new_zeros(*rows.shape[:-1], handover.channels[0])
    out.index_copy_(-1, handover.kept(source), rows)
    return y.replaced(from_rows(out)) if isinstance(y, Frames) else from_rows(out)


def masked_means(x: Tensor | Frames, handover: Handover, candidates: list[int]) -> Tensor:
    """Means of all channels over H and W, ``(N, T', C)``, zeros where samples have none."""
    held, pooled = (x.held, x.pooled) if isinstance(x, Frames) else (x, None)
    if pooled is None:
        pooled = to_rows(held).flatten(2, 3).mean(2)
    present = handover.present(pooled)
    if candidates.count(candidates[0]) == len(candidates):  # a number, which no device waits for
        present = present[candidates[0]][None]
    else:
        present = present[torch.tensor(candidates, device=pooled.device)]
    return torch.where(present[:, None] > 0, pooled, torch.zeros_like(pooled))
