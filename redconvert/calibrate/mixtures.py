"""Mixtures of filters that make up for what the layers before have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..layers import Decision, DynamicConv
from ..layers.cheap import Principal
from ..layers.gate import processes
from ..layers.routing import group_samples, sample_rows
from .absorb import making_up, slope_behind
from .regress import FOLDS, best_strength, products, ridge_towards
from .statistics import sum_over_processes

__all__ = ["MixtureMoments"]


class MixtureMoments:
    """Of one layer with ``"principal"`` operations: its dense result, regressed on what it would give, reduced nowhere.

    The layers before hand it another input, so that all of its own filters would give y' instead of the dense y. ``G``
    and ``c`` minimise ``E |y - G y' - c|^2``, pulled towards no change (`regress`), and candidates then compute the
    components of ``G y' + c``: their mixtures become ``components G``, as many filters as before. Where an input that
    was changed is added to the result (a residual block's), the layer makes up for that as well.

    Layers are mended in the order in which they run, so that each regresses on inputs that are right already.

    Args:
        layer: the layer.
        ridge: the least, relative to the mean variance of y'.
        norm: the batch norm between the layer and the sum, if there is one.
    """

    def __init__(self, layer: DynamicConv, ridge: float, norm: nn.Module | None = None) -> None:
        assert layer.cheap_c is not None
        self.layer, self.ridge, self.slope = layer, ridge, slope_behind(layer, norm)
        self.ops, C = [cast(Principal, op) for op in layer.cheap_c.ops], layer.out_channels
        indices, device = range(1, 1 + len(self.ops)), layer.weight.device
        # Rows: targets, the constant, y'; columns: the constant, y'.
        self.sums = {i: torch.zeros(FOLDS, 2 * C + 1, C + 1, dtype=torch.float64, device=device) for i in indices}
        self.unchanged = torch.eye(C + 1, dtype=torch.float64, device=device)[1:]
        self.samples = 0
        self.solved = dict.fromkeys(indices, 0.0)  # rows that the last solution saw

    @torch.no_grad()
    def mend(self, x: Tensor, out: Tensor, decisions: Sequence[Decision], added: Tensor | None = None) -> Tensor:
        """Add one call's input and result, both of the dense stream and then of the reduced one; the mended result.

        Args:
            x: ``(2N, C_in, ...)``; out: ``(2N, C_out, ...)``.
            decisions: of each reduced sample.
            added: what will be added to the result, of both streams, where that is known.
        """
        layer, cheap = self.layer, self.layer.cheap_c
        assert cheap is not None
        dense, found = out.chunk(2)
        given, mended, wanted = x.chunk(2)[1], found.clone(), making_up(dense, added, self.slope)
        for decision, samples in group_samples(decisions).items():
            i, temporal, blend, source = decision
            if not i or temporal or blend:
                continue
            rows = sample_rows(torch.tensor(samples, device=out.device), layer.frames_per_sample)
            ranks = cheap.to_ranks(layer.whole(given.index_select(0, rows), source))
            self._add(i, cheap.to_ranks(wanted.index_select(0, rows)), ranks)
            if processes() == 1 and self._count(i) >= 2 * self.solved[i]:  # several solve at the end, all the same
                self._solve(i)
            mended[rows] = cheap.single(cheap.computed(i, ranks), i)
        return torch.cat([dense, mended])

    def synchronize(self) -> None:
        """Sum over processes, where there are several."""
        for sums in self.sums.values():
            sum_over_processes(sums)

    def apply(self) -> None:
        """Solve with all that was seen."""
        for index in self.sums:
            self._solve(index)

    @property
    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(sums).all()) for sums in self.sums.values())

    def _add(self, index: int, wanted: Tensor, ranks: Tensor) -> None:
        frames = self.layer.frames_per_sample
        samples = len(ranks) // frames
        fold = (self.samples + torch.arange(samples, device=ranks.device)).repeat_interleave(frames) % FOLDS
        self.samples += samples
        targets, predictors = (each.detach().flatten(2).float() for each in (wanted, ranks))
        self.sums[index] += products(targets, predictors, fold)

    def _count(self, index: int) -> float:
        return float(self.sums[index][:, self.layer.out_channels, 0].sum())

    @torch.no_grad()
    def _solve(self, index: int) -> None:
        count, sums = self._count(index), self.sums[index]
        if count < len(self.unchanged):
            return
        solution = ridge_towards(self.unchanged, sums.sum(0), best_strength(sums, self.unchanged, self.ridge))
        if not torch.isfinite(solution).all():
            return
        self.ops[index - 1].correct(solution[:, 1:], solution[:, 0])
        self.solved[index] = count
