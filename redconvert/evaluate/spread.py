"""How differently a converted network treats its inputs: MACs sample by sample, and what they go along with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cost.measure import MacsMeter
from ..errors import RedconvertError
from ..inputs import device_of, each_batch, measuring, move_to
from ..layers import dynamic_layers
from ..progress import progress_bar

__all__ = ["Spread", "rank_correlation", "spread_of_macs"]


@dataclass(frozen=True, eq=False)
class Spread:
    """MACs of every sample, whole network, gates and cheap operations included; one multiply-add is one.

    Attributes:
        macs: ``(samples,)`` float64, executed, in the order of the batches.
        dense: ``(samples,)`` float64, of the network before conversion.
    """

    macs: Tensor
    dense: Tensor

    @property
    def samples(self) -> int:
        return len(self.macs)

    @property
    def mean(self) -> float:
        return float(self.macs.mean())

    @property
    def min(self) -> float:
        return float(self.macs.min())

    @property
    def max(self) -> float:
        return float(self.macs.max())

    @property
    def std(self) -> float:
        """Over these samples (divided by their number): 0 where all cost the same."""
        return float(self.macs.std(correction=0))

    def quantile(self, q: float) -> float:
        """What a share ``q`` of the samples stays under, linear between two samples. RedconvertError: q outside 0-1."""
        if not 0.0 <= q <= 1.0:
            raise RedconvertError(f"quantile({q}): q is a share, from 0.0 to 1.0.")
        return float(self.macs.quantile(q))

    def cheapest(self, k: int) -> list[int]:
        """Indices of the k samples with the fewest MACs, the cheapest first; the earlier one first where they tie."""
        return self.macs.argsort(stable=True)[:k].tolist()

    def dearest(self, k: int) -> list[int]:
        """Indices of the k samples with the most MACs, the dearest first; the earlier one first where they tie."""
        return self.macs.argsort(descending=True, stable=True)[:k].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: ``share`` is executed of dense MACs, over all samples."""
        values = {name: getattr(self, name) for name in ("samples", "mean", "min", "max", "std")}
        quantiles = {str(q): self.quantile(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        share = float(self.macs.sum() / self.dense.sum())
        return {**values, "quantiles": quantiles, "share": share, "macs": self.macs.tolist()}

    def __str__(self) -> str:
        giga = {name: getattr(self, name) / 1e9 for name in ("mean", "std", "min", "max")}
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in giga.items())
        return f"GMACs of {self.samples} samples: {numbers} (dense {float(self.dense.mean()) / 1e9:.3f})"


def spread_of_macs(model: nn.Module, batches: Any, *, progress: bool = False) -> Spread:
    """Run a converted network and count what every sample executes. It runs in ``eval()`` and is left as it was.

    Args:
        model: what `redconvert.convert` returned.
        batches: an iterable of batches, labels are ignored; or one batch: a tensor, tuple or dict.
        progress: show a bar (needs rich).

    Raises:
        RedconvertError: no dynamic layers, no batches, or a batch that is none.
    """
    meter = MacsMeter(model, dynamic_layers(model))
    with measuring(model), progress_bar(progress, "Counting MACs of every sample") as step:
        for batch in each_batch(batches):
            meter.run(move_to(batch, device_of(model)))
            step()
    return Spread(torch.tensor(meter.executed, dtype=torch.float64), torch.tensor(meter.dense, dtype=torch.float64))


def rank_correlation(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> float:
    """Spearman's correlation of two lists, from -1 to 1: Pearson's, of their ranks.

    Equal values share the average of their ranks. NaN where all values of one list are equal: it has no order.

    Raises:
        RedconvertError: lists of different lengths, or shorter than 2.
    """
    x, y = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (a, b))
    if len(x) != len(y) or len(x) < 2:
        raise RedconvertError(
            f"rank_correlation: {len(x)} and {len(y)} values; it takes two lists of one length, at least 2."
        )
    x, y = (ranks - ranks.mean() for ranks in (_average_ranks(x), _average_ranks(y)))
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def _average_ranks(values: Tensor) -> Tensor:
    """1 for the smallest; of equal values, the mean of the places that they take together."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[place]
