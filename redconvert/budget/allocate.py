"""Which layer should save: the least harm for a budget."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["Choice", "allocate"]

FRONT = 10_000  # partial choices that are kept: beyond them MACs are told apart to 1/10,000 of their range


@dataclass(frozen=True)
class Choice:
    """A decision for every sample, its harm to the answer and its MACs."""

    channel: int
    temporal: int
    harm: float
    macs: float


def allocate(options: dict[str, list[Choice]], macs: float) -> dict[str, Choice]:
    """Minimise the sum of harms under ``sum of MACs <= macs``: a knapsack, solved layer after layer.

    Kept are the choices for the layers so far that none beats in both MACs and harm, and that leave the others
    enough. That is exact up to FRONT of them; of more, the best of each share of the MACs stay.

    Returns:
        One choice per layer; the cheapest ones where even those exceed the budget.
    """
    least = [min(choice.macs for choice in each) for each in options.values()]
    others = [*accumulate(reversed(least), initial=0.0)][-2::-1]  # what the layers after each need
    costs = harm = torch.zeros(1, dtype=torch.float64)
    steps: list[Tensor] = []
    for each, reserved in zip(options.values(), others, strict=True):
        costs = (costs[:, None] + costs.new_tensor([choice.macs for choice in each])).flatten()
        harm = (harm[:, None] + harm.new_tensor([choice.harm for choice in each])).flatten()
        steps.append(_front(costs, harm, macs - reserved))
        costs, harm = costs[steps[-1]], harm[steps[-1]]
    chosen: dict[str, Choice] = {}
    index = -1  # the dearest that fits harms least
    for (name, each), step in zip(reversed(options.items()), reversed(steps), strict=True):
        index, option = divmod(int(step[index]), len(each))
        chosen[name] = each[option]
    return {name: chosen[name] for name in options}


def _front(costs: Tensor, harm: Tensor, limit: float) -> Tensor:
    """Indices of what nothing cheaper or as cheap beats, by rising costs; the cheapest even above the limit."""
    order = harm.argsort(stable=True)
    order = order[costs[order].argsort(stable=True)]
    fits = costs[order] <= limit
    fits[0] = True
    order = order[fits]
    best = harm[order].cummin(0).values
    keep = torch.ones_like(order, dtype=torch.bool)
    keep[1:] = harm[order][1:] < best[:-1]
    order = order[keep]
    if len(order) <= FRONT:
        return order
    share = (costs[order] - costs[order[0]]) / (costs[order[-1]] - costs[order[0]])
    part = (share * FRONT).long()
    last = torch.ones_like(order, dtype=torch.bool)
    last[:-1] = part[1:] > part[:-1]
    last[0] = True  # the others must stay within the budget
    return order[last]
