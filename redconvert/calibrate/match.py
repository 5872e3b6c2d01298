"""Rebuilt channels get back the mean and variance that least squares took from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers import DynamicConv
from ..layers.routing import sample_rows
from .statistics import channel_sums, sum_over_processes

__all__ = ["MatchedVariance"]

# Least squares keeps the explained share E of a channel's variance, so matching multiplies by E^-1/2. What explains
# less than a quarter is noise, which is better left small.
HIGHEST_SCALE = 2.0


class MatchedVariance:
    """Of one layer: ``a y + b`` for each rebuilt channel, such that its mean and variance are the dense network's.

    Where mixtures are computed, that is every channel.

    A regression shrinks what it predicts towards the mean, layer after layer, and the norms behind expect the
    dense network's variance. Layers are mended in the order in which they run: the forward hook below returns the
    mended result, so each layer sees inputs that are right already, and one pass does for all.
    """

    def __init__(self, layer: DynamicConv) -> None:
        self.layer = layer
        cheap = layer.cheap_c
        assert cheap is not None
        counts = [layer.out_channels - (0 if cheap.is_principal else kept) for kept in layer.candidates.channels]
        # Per candidate: count, sums and squares of dense and reduced, (1 + 4 D).
        self.sums = {
            i: torch.zeros(1 + 4 * dropped, dtype=torch.float64, device=layer.weight.device)
            for i, dropped in enumerate(counts)
            if i
        }

    def mend(self, out: Tensor, decisions: Sequence[int]) -> Tensor:
        """Add one call's result and return it mended.

        Args:
            out: of the dense stream, then of the reduced ones, each of as many samples. It is written over.
            decisions: channel candidate of each reduced sample.
        """
        cheap, frames = self.layer.cheap_c, self.layer.frames_per_sample
        assert cheap is not None
        dense, reduced = out.tensor_split([len(out) - len(decisions) * frames])
        of_dense = torch.stack(_moments(dense))
        for i in set(decisions) - {0}:
            samples = [n for n, each in enumerate(decisions) if each == i]
            rows, changed = _rows_of(samples, frames, out.device), cheap.changed(i)
            whole = isinstance(rows, slice) and len(samples) * frames == len(dense)
            wanted = of_dense if whole else torch.stack(_moments(dense[_within(rows, len(dense), out.device)]))
            found = reduced[rows]  # a view of samples that follow each other
            moments = torch.cat([wanted, torch.stack(_moments(found))])[:, changed]
            self.sums[i] += torch.cat([_count(found), moments.flatten()])
            scale, shift = torch.ones_like(of_dense[0]), torch.zeros_like(of_dense[0])
            scale[changed], shift[changed] = self._affine(i)
            shape = (-1, *(1,) * (out.dim() - 2))
            found.mul_(scale.to(out.dtype).view(shape)).add_(shift.to(out.dtype).view(shape))
            if not isinstance(rows, slice):
                reduced[rows] = found
        return out

    def apply(self) -> None:
        """Fold what was found into the cheap operations."""
        assert self.layer.cheap_c is not None
        for i, sums in self.sums.items():
            sums.copy_(sum_over_processes(sums))
            if sums[0] > 0:
                op = self.layer.cheap_c.op(i)
                scale, shift = (each.to(op.bias.dtype) for each in self._affine(i))
                op.rescale(scale, shift)

    def _affine(self, index: int) -> tuple[Tensor, Tensor]:
        sums = self.sums[index]
        means = sums[1:] / sums[0]
        wanted, wanted_square, found, found_square = means.chunk(4)
        variances = [
            (square - mean.square()).clamp_min(0) for mean, square in ((wanted, wanted_square), (found, found_square))
        ]
        tiny = torch.finfo(torch.float32).tiny
        scale = ((variances[0] + tiny) / (variances[1] + tiny)).sqrt().clamp_max(HIGHEST_SCALE)
        return scale, wanted - scale * found


def _count(y: Tensor) -> Tensor:
    return torch.tensor([y.numel() // y.shape[1]], dtype=torch.float64, device=y.device)


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares of each channel, ``(C)``."""
    return channel_sums(y), channel_sums(y, squared=True)


def _rows_of(samples: list[int], frames: int, device: torch.device) -> slice | Tensor:
    """Their rows of a batch; a slice where they follow each other."""
    if samples[-1] - samples[0] == len(samples) - 1:
        return slice(samples[0] * frames, (samples[-1] + 1) * frames)
    return sample_rows(torch.tensor(samples, device=device), frames)


def _within(rows: slice | Tensor, total: int, device: torch.device) -> Tensor:
    """The rows of the one dense stream that those of any reduced stream go with."""
    return (torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows) % total
