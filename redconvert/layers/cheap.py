"""Phi_c, the cheap linear operations that rebuild dropped channels.

One object knows every candidate, so that one call mixes them (Eq. 5): candidates are nested, and whatever all of them
share is passed on untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RedconvertError
from .candidates import Candidates
from .gate import matching
from .routing import select

__all__ = ["ChannelRebuild", "Depthwise", "Nothing", "Pointwise", "Scale", "resolve_cheap"]

AUTO_COST = 0.1  # "auto" takes pointwise where it costs at most this share of what it saves


def resolve_cheap(kind: str, kept: int, macs_per_output: int) -> str:
    """The operation that ``kind`` stands for.

    Per dropped channel and position, pointwise costs ``kept`` MACs and saves ``macs_per_output``.
    """
    if kind != "auto":
        return kind
    return "pointwise" if kept <= AUTO_COST * macs_per_output else "scale"


class CheapOp(nn.Module):
    """A linear operation ``(N, k, ...) -> (N, D, ...)``, with what its backward pass needs and no more."""

    weight: nn.Parameter
    bias: nn.Parameter

    @property
    def macs_per_position(self) -> int:
        return self.weight.numel()

    def pairing(self, kept: Tensor, gradient: Tensor) -> Tensor:
        """``<op(kept), gradient>`` per sample, ``(N)``; differentiable in the operation's parameters alone."""
        return (self(kept) * gradient).flatten(1).sum(1)

    def adjoint(self, gradient: Tensor, kept: Tensor) -> Tensor:
        """The gradient ``(N, k, ...)`` that ``gradient (N, D, ...)`` gives to ``kept``."""
        with torch.enable_grad():
            point = kept.detach().requires_grad_()
            return torch.autograd.grad(self(point), point, gradient)[0]

    def fit(self, within: Tensor, across: Tensor, mean_x: Tensor, mean_y: Tensor, ridge: float) -> Tensor:
        """Set weight and bias to the regression of the dropped channels y on the kept ones x.

        Args:
            within: covariance of x, ``(k, k)``; across: of y with x, ``(D, k)``.
            mean_x, mean_y: ``(k)`` and ``(D)``.
            ridge: strength, relative to the mean variance of x; one source alone needs none.

        Returns:
            The coefficients, ``(D, k)``: ``y ~ mean_y + coefficients (x - mean_x)``.
        """
        raise TypeError("use Pointwise, Scale or Depthwise")


class Pointwise(CheapOp):
    """A 1x1 convolution, ``(N, k, ...) -> (N, D, ...)``: ``weight (D, k)``, ``bias (D)``."""

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dropped, kept))
        self.bias = nn.Parameter(torch.zeros(dropped))

    def forward(self, kept: Tensor) -> Tensor:
        convolve = F.conv3d if kept.dim() == 5 else F.conv2d
        weight = matching(self.weight, kept).reshape(*self.weight.shape, *(1,) * (kept.dim() - 2))
        return convolve(kept, weight, matching(self.bias, kept))

    def pairing(self, kept: Tensor, gradient: Tensor) -> Tensor:
        # <W y, g> = <W, g y^T>: one product of small result instead of the operation's output.
        kept, gradient = kept.detach().flatten(2), gradient.detach().flatten(2)
        moments = torch.bmm(gradient, kept.transpose(1, 2))
        moments, sums = moments.to(self.weight.dtype), gradient.sum(2).to(self.weight.dtype)  # autocast: add in float32
        return torch.einsum("dk,ndk->n", self.weight, moments) + sums @ self.bias

    @torch.no_grad()
    def fit(self, within: Tensor, across: Tensor, mean_x: Tensor, mean_y: Tensor, ridge: float) -> Tensor:
        # W = S_yx (S_xx + ridge * mean(diag S_xx) I)^-1
        damping = ridge * within.diagonal().mean() + torch.finfo(within.dtype).tiny
        eye = torch.eye(len(within), dtype=within.dtype, device=within.device)
        coefficients = torch.linalg.solve(within + damping * eye, across.T).T
        self.weight.copy_(coefficients)
        self.bias.copy_(mean_y - coefficients @ mean_x)
        return coefficients

    def adjoint(self, gradient: Tensor, kept: Tensor) -> Tensor:
        return torch.matmul(self.weight.detach().to(gradient.dtype).T, gradient.flatten(2)).view_as(kept)


class OneSource(CheapOp):
    """Operations that read one kept channel for each dropped one: ``source (D)`` holds its index."""

    source: Tensor

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__()
        self.register_buffer("source", torch.arange(dropped) % kept)
        self.bias = nn.Parameter(torch.zeros(dropped))

    @torch.no_grad()
    def fit(self, within: Tensor, across: Tensor, mean_x: Tensor, mean_y: Tensor, ridge: float) -> Tensor:
        # The source is the kept channel that explains most of the variance of the dropped one. A constant one explains
        # nothing: what stands in its covariances is rounding, which a division by its variance would blow up.
        variance = within.diagonal()
        floor = 1e-9 * variance.mean().clamp_min(torch.finfo(within.dtype).tiny)
        slopes = torch.where(variance > floor, across / variance.clamp_min(floor), torch.zeros_like(across))
        source = (slopes * across).argmax(1)
        scale = slopes.gather(1, source[:, None]).squeeze(1)
        self.source.copy_(source)
        self._set_scale(scale.to(self.weight.dtype))
        self.bias.copy_(mean_y - scale * mean_x[source])
        return torch.zeros_like(across).scatter(1, source[:, None], scale[:, None])

    def _set_scale(self, scale: Tensor) -> None:
        self.weight.copy_(scale)


class Scale(OneSource):
    """``weight[d] * kept[source[d]] + bias[d]``, ``weight (D)``."""

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__(kept, dropped)
        self.weight = nn.Parameter(torch.zeros(dropped))

    def forward(self, kept: Tensor) -> Tensor:
        shape = (-1, *(1,) * (kept.dim() - 2))
        weight, bias = matching(self.weight, kept).view(shape), matching(self.bias, kept).view(shape)
        return torch.addcmul(bias, select(kept, 1, self.source), weight)

    def pairing(self, kept: Tensor, gradient: Tensor) -> Tensor:
        gradient = gradient.detach().flatten(2)
        source = kept.detach().flatten(2).index_select(1, self.source)
        moments = torch.einsum("ndp,ndp->nd", source, gradient).to(self.weight.dtype)
        return moments @ self.weight + gradient.sum(2).to(self.weight.dtype) @ self.bias


class Depthwise(OneSource):
    """The paper's figure: a 3x3 convolution in H and W on one source channel each, ``weight (D, 1, 3, 3)``."""

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__(kept, dropped)
        self.weight = nn.Parameter(torch.zeros(dropped, 1, 3, 3))

    def forward(self, kept: Tensor) -> Tensor:
        source, weight, bias = select(kept, 1, self.source), matching(self.weight, kept), matching(self.bias, kept)
        if kept.dim() == 5:
            return F.conv3d(source, weight.unsqueeze(2), bias, padding=(0, 1, 1), groups=len(weight))
        return F.conv2d(source, weight, bias, padding=1, groups=len(weight))

    def _set_scale(self, scale: Tensor) -> None:
        self.weight.zero_()
        self.weight[:, 0, 1, 1] = scale


class Nothing(CheapOp):
    """Zeros: the channels are not rebuilt here, but by the convolution that reads them (see `absorb`)."""

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__()
        self.dropped = dropped

    @property
    def macs_per_position(self) -> int:
        return 0

    def forward(self, kept: Tensor) -> Tensor:
        return kept.new_zeros((kept.shape[0], self.dropped, *kept.shape[2:]))

    def fit(self, within: Tensor, across: Tensor, mean_x: Tensor, mean_y: Tensor, ridge: float) -> Tensor:
        return torch.zeros_like(across)


KINDS: dict[str, type[CheapOp]] = {
    "none": Nothing,
    "pointwise": Pointwise,
    "scale": Scale,
    "depthwise": Depthwise,
}


class ChannelRebuild(nn.Module):
    """Phi_c for each channel candidate of a layer, and the layer's channel order.

    Tensors "in rank order" hold the channels ``order[0], order[1], ...``; candidate i computes the
    first ``k_i`` ranks, and ``ops[i - 1]`` rebuilds the others from them.

    Args:
        candidates: the layer's candidates.
        kinds: one of ``"pointwise"``, ``"depthwise"``, ``"scale"`` for each candidate but the first.
        groups: the convolution's; an order keeps the channels of a group together.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, candidates: Candidates, kinds: Sequence[str], groups: int = 1) -> None:
        super().__init__()
        self.channels = candidates.channels
        self.kinds = tuple(kinds)
        self.groups = groups
        total = self.channels[0]
        self.ops = nn.ModuleList(
            KINDS[kind](kept, total - kept) for kind, kept in zip(kinds, self.channels[1:], strict=True)
        )
        self.register_buffer("order", torch.arange(total))
        self.register_buffer("inverse", torch.arange(total), persistent=False)
        self.is_identity = True

    def extra_repr(self) -> str:
        return f"channels={self.channels}"

    def set_order(self, order: Tensor) -> None:
        """Compute the channels in this order, best first; ``order (C_out)`` is a permutation."""
        identity = torch.arange(len(self.order), device=order.device)
        if order.shape != self.order.shape or not torch.equal(order.sort().values, identity):
            raise RedconvertError(f"a channel order must be a permutation of 0 to {len(self.order) - 1}")
        size = len(order) // self.groups
        group = (order // size).view(-1, size)
        if self.groups > 1 and not (group == group[:, :1]).all():
            raise RedconvertError(f"a channel order must keep each of the {self.groups} groups of {size} together")
        self.order.copy_(order)
        self.inverse.copy_(order.argsort())
        self.is_identity = bool(torch.equal(order, identity))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        order = state_dict.get(prefix + "order")
        super()._load_from_state_dict(state_dict, prefix, *args)
        if order is not None and order.shape == self.order.shape:
            self.set_order(order.to(self.order.device))

    def to_ranks(self, y: Tensor) -> Tensor:
        """All channels, from the layer's own order to rank order."""
        return y if self.is_identity else select(y, 1, self.order)

    def from_ranks(self, y: Tensor) -> Tensor:
        """All channels, from rank order to the layer's own."""
        return y if self.is_identity else select(y, 1, self.inverse)

    def op(self, index: int) -> CheapOp:
        """Phi_c of reduced candidate ``index``."""
        return cast(CheapOp, self.ops[index - 1])

    def kept(self, index: int) -> slice | Tensor:
        """Indices of the channels that candidate ``index`` computes, in the layer's own order."""
        ranks = slice(None, self.channels[index])
        return ranks if self.is_identity else self.order[ranks]

    def dropped(self, index: int) -> slice | Tensor:
        """Indices of the others."""
        ranks = slice(self.channels[index], None)
        return ranks if self.is_identity else self.order[ranks]

    def rebuild(self, index: int, y: Tensor) -> Tensor:
        """The channels that candidate ``index`` drops, ``(N, C_out - k, ...)`` in rank order, from y's first k."""
        return self.op(index)(y[:, : self.channels[index]])

    def single(self, y: Tensor, index: int) -> Tensor:
        """Reduced candidate ``index`` alone: its ranks ``(N, k, ...)`` -> ``(N, C_out, ...)`` in the layer's order."""
        return self.from_ranks(torch.cat([y, self.rebuild(index, y)], dim=1))

    def coverage(self, weights: Tensor) -> Tensor:
        """For each rank the weight of the candidates that compute it, ``(N, S_c) -> (N, C_out)``."""
        ranks = torch.arange(self.channels[0], device=weights.device)
        kept = torch.tensor(self.channels, device=weights.device)
        return weights @ (ranks < kept[:, None]).to(weights.dtype)

    def mix(self, y: Tensor, weights: Tensor, first: int = 0, normalized: bool = True) -> Tensor:
        """``sum_i w_i [y_(<k_i), Phi_i(y_(<k_i))]`` over the candidates from ``first`` on.

        Args:
            y: the first ``k_first`` ranks, ``(N, k_first, ...)``.
            weights: ``(N, S_c)``; those before ``first`` must be 0.
            first: the largest candidate that is open.
            normalized: the weights sum to 1, so channels that every candidate computes pass unchanged.

        Returns:
            ``(N, C_out, ...)`` in the layer's own order.
        """
        columns = _columns(weights, y)
        indices = range(first, len(self.channels))
        rebuilt = {i: self.rebuild(i, y) for i in indices if i}
        bounds = sorted({0, self.channels[0], *self.channels[first:]})
        pieces = []
        for low, high in pairwise(bounds):
            direct = [i for i in indices if self.channels[i] >= high]
            terms = [columns[i] * rebuilt[i][:, low - k : high - k] for i in indices if (k := self.channels[i]) <= low]
            if len(direct) == len(indices) and normalized:
                terms = [y[:, low:high]]
            elif direct:
                terms.append(sum(columns[i] for i in direct) * y[:, low:high])
            pieces.append(sum(terms[1:], terms[0]))
        return self.from_ranks(torch.cat(pieces, dim=1))

    @torch.no_grad()
    def start_from_weights(self, weight: Tensor, bias: Tensor | None) -> None:
        """A start that needs no data: least squares between filters, exact for white noise as input.

        For white noise the covariance of two output channels is the product of their filters, and
        channels of different groups, which read different inputs, share nothing. Calibration on
        real inputs replaces this.

        Args:
            weight: the convolution's, ``(C_out, C_in / groups, ...)``, in the layer's own order.
            bias: ``(C_out)`` or none.
        """
        rows = weight.flatten(1).to(torch.float32)[self.order]
        covariance = rows @ rows.T
        group = self.order // (len(rows) // self.groups)
        covariance = covariance * (group[:, None] == group[None, :])
        shift = torch.zeros(len(rows), device=rows.device) if bias is None else bias.to(torch.float32)[self.order]
        for i, kept in enumerate(self.channels[1:], start=1):
            within, across = covariance[:kept, :kept], covariance[kept:, :kept]
            self.op(i).fit(within, across, shift[:kept], shift[kept:], ridge=1e-4)


def _columns(weights: Tensor, like: Tensor) -> list[Tensor]:
    """``(N, S)`` -> S tensors that multiply ``like`` sample by sample."""
    shape = (-1, *(1,) * (like.dim() - 1))
    return [column.to(like.dtype).view(shape) for column in weights.unbind(1)]
