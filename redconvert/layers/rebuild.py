"""All of Phi_c of one layer: its channel order, and what each candidate computes and rebuilds.

One object knows every candidate, so that one call mixes them (Eq. 5): candidates are nested, and whatever all of them
share is passed on untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import RedconvertError
from .candidates import Candidates
from .cheap import KINDS, CheapOp, Principal
from .routing import select

__all__ = ["ChannelRebuild"]


class ChannelRebuild(nn.Module):
    """Phi_c for each channel candidate of a layer, and the layer's channel order.

    Tensors "in rank order" hold the channels ``order[0], order[1], ...``; candidate i computes the
    first ``k_i`` ranks, and ``ops[i - 1]`` rebuilds the others from them.

    Args:
        candidates: the layer's candidates.
        kinds: one of ``"pointwise"``, ``"principal"``, ``"depthwise"``, ``"scale"`` for each candidate but the first.
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

    @property
    def is_principal(self) -> bool:
        """Whether candidates compute mixtures of the channels instead of some of them."""
        return "principal" in self.kinds

    def filters(self, index: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What candidate ``index`` convolves with, of the layer's own filters ``(C_out, ...)``."""
        op = self.op(index)
        if isinstance(op, Principal):
            ranks = weight if self.is_identity else weight.index_select(0, self.order)
            return op.filters(ranks, bias if bias is None or self.is_identity else bias.index_select(0, self.order))
        kept = self.kept(index)
        if isinstance(kept, slice):
            return weight[kept], None if bias is None else bias[kept]
        return weight.index_select(0, kept), None if bias is None else bias.index_select(0, kept)

    def compose(self, index: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Filters of all channels, in the layer's own order, that give at once what candidate ``index`` gives.

        Args:
            weight: what it convolves with, ``(k, ...)``; bias: ``(k)`` or none.
        """
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        dropped = self.op(index).compose(weight, bias)
        whole = (torch.cat(pair) for pair in zip((weight, bias), dropped, strict=True))
        weight, bias = (each if self.is_identity else each.index_select(0, self.inverse) for each in whole)
        return weight, bias

    def computed(self, index: int, ranks: Tensor) -> Tensor:
        """What candidate ``index`` computes, from all channels in rank order."""
        op = self.op(index)
        return op.project(ranks) if isinstance(op, Principal) else ranks[:, : self.channels[index]]

    def taken(self, index: int, y: Tensor) -> Tensor:
        """The same from all channels in the layer's own order."""
        if self.is_principal:
            return self.computed(index, self.to_ranks(y))
        kept = self.channels[index]
        return y[:, :kept] if self.is_identity else select(y, 1, self.order[:kept])

    def changed(self, index: int) -> slice | Tensor:
        """Where candidate ``index`` differs from the full convolution: the dropped channels, or all in rank order."""
        if not self.is_principal:
            return self.dropped(index)
        return slice(None) if self.is_identity else self.order

    def rebuild(self, index: int, y: Tensor) -> Tensor:
        """The channels that candidate ``index`` drops, ``(N, C_out - k, ...)`` in rank order, from y's first k."""
        return self.op(index)(y[:, : self.channels[index]])

    def single(self, y: Tensor, index: int) -> Tensor:
        """Reduced candidate ``index`` alone: its ranks ``(N, k, ...)`` -> ``(N, C_out, ...)`` in the layer's order."""
        return self.from_ranks(torch.cat([y, self.rebuild(index, y)], dim=1))

    def _whole(self, index: int, ranks: Tensor) -> Tensor:
        """What candidate ``index`` makes of all channels, all in rank order."""
        computed = self.computed(index, ranks)
        return torch.cat([computed, self.rebuild(index, computed)], dim=1)

    def coverage(self, weights: Tensor) -> Tensor:
        """For each rank the weight of the candidates that compute it, ``(N, S_c) -> (N, C_out)``."""
        if self.is_principal:  # no reduced one computes a channel
            return weights[:, :1].expand(-1, self.channels[0])
        ranks = torch.arange(self.channels[0], device=weights.device)
        computed = torch.stack([ranks < kept for kept in self.channels])  # no numbers are copied to the device
        return weights @ computed.to(weights.dtype)

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
        if self.is_principal:
            assert first == 0, "mixtures need all channels"
            reduced = (columns[i] * self._whole(i, y) for i in range(1, len(self.channels)))
            return self.from_ranks(sum(reduced, columns[0] * y))
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
            within, across, op = covariance[:kept, :kept], covariance[kept:, :kept], self.op(i)
            if isinstance(op, Principal):
                op.choose()
            op.fit(within, across, shift[:kept], shift[kept:], ridge=1e-4)


def _columns(weights: Tensor, like: Tensor) -> list[Tensor]:
    """``(N, S)`` -> S tensors that multiply ``like`` sample by sample."""
    shape = (-1, *(1,) * (like.dim() - 1))
    return [column.to(like.dtype).view(shape) for column in weights.unbind(1)]
