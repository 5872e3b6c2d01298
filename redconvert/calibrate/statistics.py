"""Streaming moments of a layer's output: what selection and least squares need, and nothing more.

Memory does not grow with the number of batches. Products are taken in the layer's precision (float32 at
least) over one sample, sums over samples and batches in float64, and over processes where there are several.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, distributed, nn

from ..errors import RedconvertError

__all__ = [
    "ChannelMoments",
    "FrameMoments",
    "channel_sums",
    "gram",
    "norm_slope",
    "process_rank",
    "raise_together",
    "sum_over_processes",
]


@dataclass
class ChannelMoments:
    """Joint moments of predictors x ``(k)`` and targets y ``(D)`` over samples, frames and positions.

    Attributes:
        count: how many positions were added, a scalar tensor.
        sum_x, sum_y: ``(k)`` and ``(D)``.
        within: sum of ``x x^T``, ``(k, k)``; across: sum of ``y x^T``, ``(D, k)``.
        squares: sum of ``y^2``, ``(D)``.
    """

    count: Tensor
    sum_x: Tensor
    sum_y: Tensor
    within: Tensor
    across: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, predictors: int, targets: int, device: torch.device) -> ChannelMoments:
        sizes = ((), (predictors,), (targets,), (predictors, predictors), (targets, predictors), (targets,))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add the positions of ``x (N, k, ...)`` and ``y (N, D, ...)``; without y, of x with itself."""
        x = _rows(x)
        within, total = _sum_of_products(x, x), _sum(x)
        self.count += x.shape[0] * x.shape[2]
        self.within += within
        self.sum_x += total
        if y is None:
            self.across += within
            self.sum_y += total
            self.squares += within.diagonal()
        else:
            y = _rows(y)
            self.across += _sum_of_products(y, x)
            self.sum_y += _sum(y)
            self.squares += _sum(y.square())

    def select(self, predictors: Tensor, targets: Tensor) -> ChannelMoments:
        """The moments of these predictors and targets alone, given by index."""
        return ChannelMoments(
            self.count,
            self.sum_x[predictors],
            self.sum_y[targets],
            self.within[predictors][:, predictors],
            self.across[targets][:, predictors],
            self.squares[targets],
        )

    @property
    def covariance(self) -> Tensor:
        """Of the predictors, ``(k, k)``."""
        mean = self.sum_x / self.count
        return self.within / self.count - torch.outer(mean, mean)

    @property
    def cross_covariance(self) -> Tensor:
        """Of targets with predictors, ``(D, k)``."""
        return self.across / self.count - torch.outer(self.sum_y, self.sum_x) / self.count**2

    @property
    def target_variance(self) -> Tensor:
        """Of the targets, ``(D)``."""
        return (self.squares / self.count - (self.sum_y / self.count).square()).clamp_min(0)

    def synchronize(self) -> None:
        """Sum over processes, where there are several."""
        _all_reduce([getattr(self, field.name) for field in fields(self)])

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.within).all() and torch.isfinite(self.across).all())


@dataclass
class FrameMoments:
    """Second moments of ``(1, x_s, x_(s+R), y_(s+d))`` per offset d and channel, ``(R - 1, C, 4, 4)``.

    x_s and x_(s+R) are the computed frames on both sides of the skipped frame y_(s+d).
    """

    moments: Tensor

    @classmethod
    def empty(cls, stride: int, channels: int, device: torch.device) -> FrameMoments:
        return cls(torch.zeros(stride - 1, channels, 4, 4, dtype=torch.float64, device=device))

    def add(self, clips: Tensor, targets: Tensor) -> None:
        """Add the groups of ``clips`` and ``targets``, both ``(N, C, T, H, W)``, that have both neighbours."""
        stride = len(self.moments) + 1
        groups = (clips.shape[2] - 1) // stride
        if groups < 1:
            return
        computed = clips[:, :, ::stride]
        left, right = computed[:, :, :groups], computed[:, :, 1 : groups + 1]
        for offset in range(1, stride):
            target = targets[:, :, offset::stride][:, :, :groups]
            parts = [part.transpose(0, 1).flatten(1) for part in (torch.ones_like(left), left, right, target)]
            rows = torch.stack([part if part.dtype == torch.float64 else part.float() for part in parts], dim=1)
            self.moments[offset - 1] += (rows @ rows.transpose(1, 2)).double()

    def synchronize(self) -> None:
        """Sum over processes, where there are several."""
        _all_reduce([self.moments])

    @property
    def has_data(self) -> bool:
        """Whether any skipped frame lay between two computed ones."""
        return bool(self.moments[..., 0, 0].any())

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.moments).all())


def norm_slope(layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """What the batch norm behind a layer multiplies each channel by, ``weight / sqrt(variance)``; 1 without one."""
    convolved: Tensor = layer.weight  # type: ignore[assignment]
    ones = torch.ones(len(convolved), dtype=torch.float64, device=convolved.device)
    variance, weight = getattr(norm, "running_var", None), getattr(norm, "weight", None)
    if not isinstance(variance, Tensor) or len(variance) != len(convolved):
        return ones
    scale = weight.detach().double() if isinstance(weight, Tensor) else ones
    return scale * torch.rsqrt(variance.double() + norm.eps)  # type: ignore[union-attr, operator]


def gram(x: Tensor) -> Tensor:
    """Sum of ``x x^T`` over samples, frames and positions of ``x (N, C, ...)``: ``(C, C)``, float64."""
    rows = _rows(x)
    return _sum_of_products(rows, rows)


def channel_sums(x: Tensor, squared: bool = False) -> Tensor:
    """Sum of each channel of ``x (N, C, ...)``, or of its squares, over all else: ``(C)``, float64."""
    rows = _rows(x)
    if not squared:
        return _sum(rows)
    return torch.linalg.vector_norm(rows, dim=2).double().square().sum(0)  # the only one that writes no squares


def _rows(x: Tensor) -> Tensor:
    """``(N, C, ...) -> (N, C, positions)``, in float32 at least."""
    rows = x.detach().flatten(2)
    return rows if rows.dtype == torch.float64 else rows.float()


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(2).double().sum(0)


def _sum_of_products(y: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(y, x.transpose(1, 2)).double().sum(0)


def _all_reduce(tensors: list[Tensor]) -> None:
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


# -- processes -----------------------------------------------------------------------------------------


def process_rank() -> int:
    """Which of the processes this is, from 0."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of every process's ``value``, in place; as it is where there is one process."""
    _all_reduce([value])
    return value


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise ``error`` here, and an error in every other process: none may wait for one that has left.

    Raises:
        RedconvertError: all is well here, but not in another process.
    """
    failed = int(sum_over_processes(torch.tensor(int(error is not None), device=device)))
    if error is not None:
        raise error
    if failed:
        raise RedconvertError(f"calibration failed in {failed} of the other processes: see the error there")
