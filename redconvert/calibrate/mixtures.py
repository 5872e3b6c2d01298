"""Mixtures of filters that make up for what the layers before have changed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..layers import Decision, DynamicConv
from ..layers.cheap import Principal
from .mending import MendedLayer
from .regress import FOLDS, best_strength, products, ridge_towards

__all__ = ["MixtureMoments"]


class MixtureMoments(MendedLayer):
    """Of one layer with ``"principal"`` operations: its dense result, regressed on what it would give, reduced nowhere.

    The layers before hand it another input, so that all of its own filters would give y' instead of the dense y. ``G``
    and ``c`` minimise ``E |y - G y' - c|^2``, pulled towards no change (`regress`), and candidates then compute the
    components of ``G y' + c``: their mixtures become ``components G``, as many filters as before.

    Args:
        layer, ridge, norm: see `MendedLayer`.
    """

    def __init__(self, layer: DynamicConv, ridge: float, norm: nn.Module | None = None) -> None:
        super().__init__(layer, ridge, norm)
        assert layer.cheap_c is not None
        self.cheap, C, device = layer.cheap_c, layer.out_channels, layer.weight.device
        self.ops = [cast(Principal, op) for op in self.cheap.ops]
        shape = FOLDS, 2 * C + 1, C + 1
        self.sums = {i: torch.zeros(shape, dtype=torch.float64, device=device) for i in range(1, 1 + len(self.ops))}
        self.stored = list(self.sums.values())
        self.unchanged = torch.eye(C + 1, dtype=torch.float64, device=device)[1:]

    def _candidate(self, decision: Decision) -> int:
        return 0 if decision.temporal or decision.blend else decision.channel

    def _predictors(self, x: Tensor, decision: Decision) -> Tensor:
        if self.layer.mixed_in is not None:
            x = self.layer.mixed_in.seen(decision.channel, x)
        return self.cheap.to_ranks(self.layer.whole(x, decision.source))

    def _add(self, index: int, predictors: Tensor, wanted: Tensor) -> None:
        targets, found = (each.detach().flatten(2).float() for each in (self.cheap.to_ranks(wanted), predictors))
        self.sums[index] += products(targets, found, self._fold(len(found), found.device))

    def _result(self, predictors: Tensor, decision: Decision) -> Tensor:
        i = decision.channel
        return self.cheap.single(self.cheap.computed(i, predictors), i)

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
