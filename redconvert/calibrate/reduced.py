"""Moments of dense results against what a reduced network computes, whatever each sample decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers import Decision, DynamicConv
from .statistics import ChannelMoments, FrameMoments

__all__ = ["ROWS_PER_CHANNEL", "ReducedMoments"]

ROWS_PER_CHANNEL = 10  # where gates decide, a regression waits for more positions than it has predictors


class ReducedMoments:
    """Of one layer: dense results against what the reduced network computes, by the candidate that was decided.

    A batch may hold samples of several decisions. A soft gate's mixture of several tells of none alone.
    """

    def __init__(self, layer: DynamicConv) -> None:
        self.layer = layer
        device, count, candidates = layer.weight.device, layer.out_channels, layer.candidates
        self.channels = {
            i: ChannelMoments.empty(kept, count - kept, device) for i, kept in enumerate(candidates.channels) if i
        }
        self.frames = {j: FrameMoments.empty(s, count, device) for j, s in enumerate(candidates.strides) if j}

    def add(self, dense: Tensor, reduced: Tensor, decisions: Sequence[Decision]) -> None:
        """Outputs of the dense and of the reduced stream, and what each sample of the latter decided."""
        layer = self.layer
        dense, reduced = (layer.as_clips(y, layer.frames_per_sample) for y in (dense, reduced))
        for decision in {each for each in decisions if not each.blend}:
            rows = torch.tensor([n for n, each in enumerate(decisions) if each == decision], device=dense.device)
            wanted, found = dense.index_select(0, rows), reduced.index_select(0, rows)
            stride = layer.candidates.strides[decision.temporal]
            if decision.channel and layer.rebuilds:
                assert layer.cheap_c is not None
                kept, dropped = layer.cheap_c.kept(decision.channel), layer.cheap_c.dropped(decision.channel)
                x, y = found[:, kept, ::stride], wanted[:, dropped, ::stride]  # frames that were computed
                self.channels[decision.channel].add(x, y)
            if decision.temporal:
                self.frames[decision.temporal].add(found, wanted)

    def all(self) -> list[Any]:
        return [*self.channels.values(), *self.frames.values()]
