"""What a reduced candidate reads: mixtures of the input channels, fewer than there are.

Output channels that are rebuilt from a few mixtures are half of the redundancy of a convolution; its input channels
depend on each other as well. A candidate that computes a share s of the channels from the same share of mixtures costs
s^2 of the convolution (a Tucker-2 decomposition, whose two small factors are linear operations at each position).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cheap import principal_factors
from .gate import matching
from .routing import select

__all__ = ["InputMixture", "InputMixtures", "mixture_counts"]

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
    """Of one candidate: r mixtures ``x_k + B x_d``, x_k being the first r of the C channels in order, x_d the others.

    ``weight`` is B, ``(r, C - r)``, which learns. ``lift`` A, ``(C, r)``, leads back: the candidate convolves with
    ``W A``, so that it sees ``A (x_k + B x_d)`` instead of x. It is a buffer: where weights are trained, these follow.
    """

    lift: Tensor

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kept, dropped))
        self.register_buffer("lift", torch.eye(kept + dropped, kept))

    def forward(self, kept: Tensor, dropped: Tensor) -> Tensor:
        convolve = F.conv3d if kept.dim() == 5 else F.conv2d
        weight = matching(self.weight, kept).reshape(*self.weight.shape, *(1,) * (kept.dim() - 2))
        return kept + convolve(dropped, weight)

    @torch.no_grad()
    def fit(self, moments: Tensor, metric: Tensor) -> Tensor:
        """Keep the r principal components in the metric M, so that ``tr(M (1 - P) S (1 - P)^T)`` is least.

        P is ``A [1, B]``. Moments are not centred: what pads the borders of a clip is 0, not the mean.

        Args:
            moments: ``S = E[x x^T]``, ``(C, C)``; metric: what errors cost, ``(C, C)``; both in order, float64.

        Returns:
            The share of the metric's error that is left.
        """
        kept = len(self.weight)
        back, forth = principal_factors(moments, metric, kept)
        driver = "gelsd" if back.device.type == "cpu" else None  # those r channels may be nearly dependent
        mixed = torch.linalg.lstsq(forth[:, :kept], forth[:, kept:], driver=driver).solution
        lift = back @ forth[:, :kept]
        self.weight.copy_(mixed)
        self.lift.copy_(lift)
        rest = torch.eye(len(lift), dtype=lift.dtype, device=lift.device)
        rest -= lift @ torch.cat([rest[:kept, :kept], mixed], dim=1)
        return (metric * (rest @ moments @ rest.T)).sum() / (metric * moments).sum().clamp_min(1e-300)


class InputMixtures(nn.Module):
    """The mixtures of all reduced candidates of a layer.

    Args:
        channels: how many each candidate reads, all C_in for the first (see `mixture_counts`).
    """

    order: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        total = self.channels[0]
        self.ops = nn.ModuleList(InputMixture(kept, total - kept) for kept in self.channels[1:])
        self.register_buffer("order", torch.arange(total))

    def extra_repr(self) -> str:
        return f"channels={self.channels}"

    def op(self, index: int) -> InputMixture | None:
        """Of reduced candidate ``index``; None where it reads all channels."""
        reads_all = not index or self.channels[index] == self.channels[0]
        return None if reads_all else cast(InputMixture, self.ops[index - 1])

    def macs_per_position(self, index: int) -> int:
        op = self.op(index)
        return 0 if op is None else op.weight.numel()

    def read(self, index: int, x: Tensor) -> Tensor:
        """What candidate ``index`` reads of ``x (N, C_in, ...)``: ``(N, r, ...)``."""
        op, kept = self.op(index), self.channels[index]
        return x if op is None else op(select(x, 1, self.order[:kept]), select(x, 1, self.order[kept:]))

    def seen(self, index: int, x: Tensor) -> Tensor:
        """``A (x_k + B x_d)``: the input ``(N, C_in, ...)`` as the candidate's filters see it."""
        op = self.op(index)
        if op is None:
            return x
        lifted = torch.matmul(matching(op.lift, x), self.read(index, x).flatten(2))
        return select(lifted, 1, self.order.argsort()).unflatten(2, x.shape[2:])

    def filters(self, index: int, weight: Tensor) -> Tensor:
        """``W A``, ``(C_out, r, ...)``, of filters ``(C_out, C_in, ...)``."""
        op = self.op(index)
        if op is None:
            return weight
        ranks = weight.index_select(1, self.order).flatten(2)
        return (matching(op.lift, weight).T @ ranks).unflatten(2, weight.shape[2:])

    def matrix(self, index: int) -> Tensor:
        """``[1, B]`` with its columns in the channels' own order, ``(r, C_in)``; only where it mixes."""
        op, kept = cast(InputMixture, self.op(index)), self.channels[index]
        eye = torch.eye(kept, dtype=op.weight.dtype, device=op.weight.device)
        return torch.cat([eye, op.weight.detach()], dim=1)[:, self.order.argsort()]
