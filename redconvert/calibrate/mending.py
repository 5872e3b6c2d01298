"""Layers that make up for what the layers before them have changed: what all of them do, whatever they solve for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Decision, DynamicConv
from ..layers.gate import processes
from ..layers.routing import group_samples, sample_rows
from .regress import FOLDS
from .statistics import norm_slope, sum_over_processes

__all__ = ["MendedLayer", "making_up", "slope_behind"]

LEAST_SLOPE = 0.1  # of the mean: what a norm all but removes need not make up for anything


class MendedLayer(ABC):
    """Of one layer: its dense result, regressed on what it has to make it of once the layers before are reduced.

    Layers are mended in the order in which they run: `mend` returns the mended result, so that each layer regresses on
    inputs that are right already, and one pass does for all. Where an input that the reduced network has changed is
    added to the result (a residual block's), the layer makes up for that as well: its target is y less that change,
    seen through the norm.

    Args:
        layer: the layer.
        ridge: of the regression, the least that is tried, relative to the mean variance of the predictors.
        norm: the batch norm between the layer and the sum, if there is one.

    Attributes:
        sums: by candidate, those of `regress.products`; rows: targets, the constant, predictors.
        stored: the tensors that hold them, which candidates may share.
        solved: by candidate, rows that the last solution saw.
    """

    sums: dict[int, Tensor]
    stored: list[Tensor]

    def __init__(self, layer: DynamicConv, ridge: float, norm: nn.Module | None) -> None:
        self.layer, self.ridge, self.slope = layer, ridge, slope_behind(layer, norm)
        self.samples = 0
        self.solved: dict[int, float] = {}

    @torch.no_grad()
    def mend(self, x: Tensor, out: Tensor, decisions: Sequence[Decision], added: Tensor | None = None) -> Tensor:
        """Add one call's input and result, both of the dense stream and then of the reduced one; the mended result.

        Args:
            x: ``(2N, C_in, ...)``; out: ``(2N, C_out, ...)``.
            decisions: of each reduced sample.
            added: what will be added to the result, of both streams, where that is known.
        """
        dense, found = out.chunk(2)
        given, mended, wanted = x.chunk(2)[1], found.clone(), making_up(dense, added, self.slope)
        for decision, samples in group_samples(decisions).items():
            index = self._candidate(decision)
            if index not in self.sums:
                continue
            rows = sample_rows(torch.tensor(samples, device=out.device), self.layer.frames_per_sample)
            predictors = self._predictors(given.index_select(0, rows), decision)
            self._add(index, predictors, wanted.index_select(0, rows))
            # Few solutions tell as much as many. Several processes must pull towards the same, and solve at the end.
            if processes() == 1 and self._count(index) >= 2 * self.solved.get(index, 0.0):
                self._solve(index)
            mended[rows] = self._result(predictors, decision)
        return torch.cat([dense, mended])

    def synchronize(self) -> None:
        """Sum over processes, where there are several."""
        for sums in self.stored:
            sum_over_processes(sums)

    def apply(self) -> None:
        """Solve with all that was seen."""
        for index in self.sums:
            self._solve(index)

    @property
    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(sums).all()) for sums in self.stored)

    @abstractmethod
    def _candidate(self, decision: Decision) -> int:
        """Whose sums a sample with this decision belongs to; one that has none is left as it is."""

    @abstractmethod
    def _predictors(self, x: Tensor, decision: Decision) -> Tensor:
        """What the regression reads, of a reduced input ``(N, C_in, ...)``."""

    @abstractmethod
    def _add(self, index: int, predictors: Tensor, wanted: Tensor) -> None:
        """Add to the sums of a candidate; wanted: ``(N, C_out, ...)``."""

    @abstractmethod
    def _result(self, predictors: Tensor, decision: Decision) -> Tensor:
        """What the layer gives as it is now, ``(N, C_out, ...)``."""

    @abstractmethod
    def _solve(self, index: int) -> None:
        """Set the candidate to the solution, where enough was seen, and say so in ``solved``."""

    def _count(self, index: int) -> float:
        """Rows seen: the constant's product with itself."""
        return float(self.sums[index][:, self.layer.out_channels, 0].sum())

    def _fold(self, rows: int, device: torch.device) -> Tensor:
        """Of each row of the next samples, ``(rows)``: samples take turns, and all frames of one share a fold."""
        frames = self.layer.frames_per_sample
        samples = rows // frames
        fold = (self.samples + torch.arange(samples, device=device)).repeat_interleave(frames) % FOLDS
        self.samples += samples
        return fold


def making_up(dense: Tensor, added: Tensor | None, slope: Tensor) -> Tensor:
    """What a layer is to give: its dense result, and what the reduced network has changed of that which is added to it.

    Args:
        dense: ``(N, C, ...)``.
        added: of both streams, ``(2N, C, ...)``; None where nothing is, or nobody knows.
        slope: what the norm between multiplies each channel by, ``(C)``.
    """
    if added is None or added.shape != (2 * len(dense), *dense.shape[1:]):
        return dense
    before, changed = added.chunk(2)
    return dense + (before - changed) / slope.to(dense.dtype).view(1, -1, *(1,) * (dense.dim() - 2))


def slope_behind(layer: DynamicConv, norm: nn.Module | None) -> Tensor:
    """What a batch norm multiplies each channel by; nearly none of it is taken for LEAST_SLOPE of the others'."""
    slope = norm_slope(layer, norm)
    least = LEAST_SLOPE * slope.abs().mean()
    return torch.where(slope.abs() < least, torch.where(slope < 0, -least, least), slope)
