"""What a reduced candidate reads: mixtures of the input channels, fewer than there are.

Output channels that are rebuilt from a few mixtures are half of the redundancy of a convolution; its input channels
depend on each other as well. A candidate that computes a share s of the channels from the same share of mixtures costs
s^2 of the convolution (a Tucker-2 decomposition, whose two small factors are linear operations at each position).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cheap import principal_factors
from .gate import matching
from .routing import select

__all__ = ["InputMixture", "InputMixtures", "interpolative", "mixture_counts"]

LEAST_INPUTS = 8  # of fewer channels (pixels, most of all) each tells what the others do not


def mixture_counts(conv: Any, channels: Sequence[int], align: int) -> tuple[int, ...] | None:
    """How many mixtures each candidate reads, all C_in channels for the first: as large a share as it computes.

    None where mixtures save nothing: of few channels, in groups, and for 1x1 convolutions, whose filters' mixtures are
    a product of two thin matrices already.
    """
    inputs, outputs = conv.in_channels, conv.out_channels
    if conv.groups != 1 or inputs < LEAST_INPUTS or math.prod(conv.kernel_size) == 1:
        return None
    counts = (inputs, *(min(inputs, -(-inputs * kept // outputs // align) * align) for kept in channels[1:]))
    return None if len(set(counts)) == 1 else counts


class InputMixture(nn.Module):
    """Of one candidate: r mixtures ``x_k + B x_d``; x_k are the first r of the C channels in ``order``, x_d the others.

    ``weight`` is B, ``(r, C - r)``, which learns. ``lift`` A, ``(C, r)``, leads back: the candidate convolves with
    ``W A``, so that it sees ``A (x_k + B x_d)`` instead of x. It is a buffer: where weights are trained, these follow.
    """

    lift: Tensor
    order: Tensor

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kept, dropped))
        self.register_buffer("lift", torch.eye(kept + dropped, kept))
        self.register_buffer("order", torch.arange(kept + dropped))

    @property
    def kept(self) -> Tensor:
        """Indices of the channels x_k."""
        return self.order[: len(self.weight)]

    @property
    def dropped(self) -> Tensor:
        """Indices of the channels x_d."""
        return self.order[len(self.weight) :]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, ...) -> (N, r, ...)``."""
        convolve = F.conv3d if x.dim() == 5 else F.conv2d
        weight = matching(self.weight, x).reshape(*self.weight.shape, *(1,) * (x.dim() - 2))
        return select(x, 1, self.kept) + convolve(select(x, 1, self.dropped), weight)

    def seen(self, x: Tensor) -> Tensor:
        """``A (x_k + B x_d)``, ``(N, C, ...)``: the input as the candidate's filters see it."""
        lifted = torch.matmul(matching(self.lift, x), self(x).flatten(2))
        return select(lifted, 1, self.order.argsort()).unflatten(2, x.shape[2:])

    def filters(self, weight: Tensor) -> Tensor:
        """``W A``, ``(C_out, r, ...)``, of filters ``(C_out, C, ...)``."""
        ranks = weight.index_select(1, self.order).flatten(2)
        return (matching(self.lift, weight).T @ ranks).unflatten(2, weight.shape[2:])

    def compose(self, weight: Tensor) -> Tensor:
        """``W A [1, B]``, ``(C_out, C, ...)``: what ``weight (C_out, r, ...)`` gives of mixtures, given of x."""
        dropped = (self.weight.T @ weight.flatten(2)).unflatten(2, weight.shape[2:])
        return torch.cat([weight, dropped], dim=1).index_select(1, self.order.argsort())

    @property
    def matrix(self) -> Tensor:
        """``[1, B]`` with its columns in the channels' own order, ``(r, C)``."""
        eye = torch.eye(len(self.weight), dtype=self.weight.dtype, device=self.weight.device)
        return torch.cat([eye, self.weight.detach()], dim=1)[:, self.order.argsort()]

    @torch.no_grad()
    def fit(self, moments: Tensor, metric: Tensor) -> Tensor:
        """Keep the r principal components in the metric M, so that ``tr(M (1 - P) S (1 - P)^T)`` is least.

        P is ``A [1, B]``. Moments are not centred: what pads the borders of a clip is 0, not the mean. Any r channels
        that are independent could be x_k; those of `interpolative` keep B small.

        Args:
            moments: ``S = E[x x^T]``, ``(C, C)``; metric: what errors cost, ``(C, C)``; both float64.

        Returns:
            The share of the metric's error that is left.
        """
        kept = len(self.weight)
        back, forth = principal_factors(moments, metric, kept)
        order, mixed = interpolative(forth)
        lift = back[order] @ forth[:, order[:kept]]
        self.order.copy_(order)
        self.weight.copy_(mixed)
        self.lift.copy_(lift)
        rest = torch.eye(len(lift), dtype=lift.dtype, device=lift.device)
        rest -= lift @ torch.cat([rest[:kept, :kept], mixed], dim=1)
        moments, metric = (each[order][:, order] for each in (moments, metric))
        return (metric * (rest @ moments @ rest.T)).sum() / (metric * moments).sum().clamp_min(1e-300)


def interpolative(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The interpolative decomposition ``rows = rows_k [1, B]`` of ``(r, C)``, of rank r, by r of its own columns.

    Of an orthonormal basis of the rows each next column is the longest of what those before leave: entries of B then
    stay about 1, where other columns, as good in theory, make everything of small differences of large numbers.

    Returns:
        The order of the columns, those r first, ``(C)``, and B, ``(r, C - r)``.
    """
    basis = torch.linalg.qr(rows.T).Q.T
    rest, free = basis.clone(), torch.ones(basis.shape[1], dtype=torch.bool, device=rows.device)
    chosen: list[int] = []
    for _ in range(len(basis)):
        pivot = int(torch.where(free, rest.square().sum(0), -1.0).argmax())
        free[pivot] = False
        chosen.append(pivot)
        column = rest[:, pivot] / rest[:, pivot].norm().clamp_min(torch.finfo(rest.dtype).tiny)
        rest -= torch.outer(column, column @ rest)
    kept, others = torch.tensor(chosen, device=rows.device), free.nonzero().flatten()
    return torch.cat([kept, others]), torch.linalg.solve(basis[:, kept], basis[:, others])


class InputMixtures(nn.Module):
    """The mixtures of all reduced candidates of a layer.

    Args:
        channels: how many each candidate reads, all C_in for the first (see `mixture_counts`).
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        total = self.channels[0]
        self.ops = nn.ModuleList(InputMixture(kept, total - kept) for kept in self.channels[1:])

    def extra_repr(self) -> str:
        return f"channels={self.channels}"

    @torch.no_grad()
    def start(self) -> None:
        """As at birth: each candidate reads the first channels, and does without the others."""
        for op in cast(Iterable[InputMixture], self.ops):
            op.weight.zero_()
            op.lift.zero_().fill_diagonal_(1)
            op.order.copy_(torch.arange(len(op.order)))

    def op(self, index: int) -> InputMixture | None:
        """Of reduced candidate ``index``; None where it reads all channels."""
        reads_all = not index or self.channels[index] == self.channels[0]
        return None if reads_all else cast(InputMixture, self.ops[index - 1])

    def macs_per_position(self, index: int) -> int:
        op = self.op(index)
        return 0 if op is None else op.weight.numel()

    def read(self, index: int, x: Tensor) -> Tensor:
        """What candidate ``index`` reads of ``x (N, C_in, ...)``: ``(N, r, ...)``."""
        op = self.op(index)
        return x if op is None else op(x)

    def seen(self, index: int, x: Tensor) -> Tensor:
        """The input ``(N, C_in, ...)`` as the filters of candidate ``index`` see it."""
        op = self.op(index)
        return x if op is None else op.seen(x)

    def compose(self, index: int, weight: Tensor) -> Tensor:
        """Filters ``(C_out, C_in, ...)`` that give of the input what candidate ``index`` gives of its mixtures."""
        op = self.op(index)
        return weight if op is None else op.compose(weight)

    def filters(self, index: int, weight: Tensor) -> Tensor:
        """What candidate ``index`` convolves its mixtures with, of filters ``(C_out, C_in, ...)``."""
        op = self.op(index)
        return weight if op is None else op.filters(weight)
