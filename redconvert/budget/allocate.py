"""Which layer should save: the least harm for a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Choice", "allocate"]

FRONT = 10_000  # partial choices that are kept: beyond them MACs are told apart to 1/10,000 of their range


@dataclass(frozen=True)
class Choice:
    """A decision for every sample, its harm to the answer and its MACs.

    Attributes:
        macs: where all input channels are there.
        by_source: MACs by channel candidate of the layer that is read, where that one hands over its channels.
    """

    channel: int
    temporal: int
    harm: float
    macs: float
    by_source: tuple[float, ...] = ()

    def cost(self, source: int) -> float:
        return self.by_source[source] if self.by_source else self.macs


class _Step(NamedTuple):
    """Partial choices that end with one layer in one state: what they cost and harm, and how each came about."""

    costs: Tensor
    harm: Tensor
    before: Tensor  # state and index in the step before, and the layer's option: (3, choices)


def allocate(
    options: dict[str, list[Choice]],
    macs: float,
    sources: Mapping[str, str] | None = None,
    followed: Mapping[str, str] | None = None,
) -> dict[str, Choice]:
    """Minimise the sum of harms under ``sum of MACs <= macs``: a knapsack, solved layer after layer.

    Kept are the choices for the layers so far that none beats in both MACs and harm, and that leave the others
    enough. That is exact up to FRONT of them; of more, the best of each share of the MACs stay. What a layer costs
    that reads another's channels depends on that one's choice: fronts are kept for each of its candidates.

    Args:
        options: of each layer.
        macs: the budget.
        sources: by name of the layer that reads, whose channels it reads.
        followed: by name of a layer that stands between two such, whose channels it carries or also reads.

    Returns:
        One choice per layer; the cheapest ones where even those exceed the budget.
    """
    sources, followed = (
        {name: source for name, source in (each or {}).items() if name in options and source in options}
        for each in (sources, followed)
    )
    names, handing = _in_chains(options, sources, followed), set(sources.values())
    told = {**followed, **sources}
    least = [min(choice.cost(s) for choice in options[n] for s in _states(options, told.get(n))) for n in names]
    others = [*accumulate(reversed(least), initial=0.0)][-2::-1]  # what the layers after each need
    zero = torch.zeros(1, dtype=torch.float64)
    steps = [{0: _Step(zero, zero, torch.zeros(3, 1, dtype=torch.long))}]
    for name, reserved in zip(names, others, strict=True):
        ends = None if name in followed else name in handing
        steps.append(_extended(steps[-1], options[name], ends, macs - reserved))
    chosen: dict[str, Choice] = {}
    state, index = 0, -1  # the dearest that fits harms least
    for name, step in zip(reversed(names), reversed(steps), strict=False):
        state, index, option = map(int, step[state].before[:, index])
        chosen[name] = options[name][option]
    return {name: chosen[name] for name in options}


def _in_chains(options: dict[str, list[Choice]], sources: Mapping[str, str], followed: Mapping[str, str]) -> list[str]:
    """Every layer right after the one that it reads, and those that follow that one."""
    readers = {source: reader for reader, source in sources.items()}
    names: list[str] = []
    for name in options:
        link: str | None = name if name not in sources and name not in followed else None
        while link is not None:
            names.append(link)
            names += [follower for follower, source in followed.items() if source == link]
            link = readers.get(link)
    return names


def _states(options: dict[str, list[Choice]], source: str | None) -> set[int]:
    """The channel candidates that a layer may find in front of it."""
    return {0} if source is None else {choice.channel for choice in options[source]}


def _extended(
    before: dict[int, _Step], options: list[Choice], hands_over: bool | None, limit: float
) -> dict[int, _Step]:
    """All choices so far with each option of one more layer, by the state in which they end.

    That is the candidate of a layer that hands over its channels, 0 behind others; None: the state stays.
    """
    found: dict[int, list[_Step]] = {}
    for state, step in before.items():
        index = torch.arange(len(step.costs))
        for number, choice in enumerate(options):
            way = torch.stack([torch.full_like(index, state), index, torch.full_like(index, number)])
            more = _Step(step.costs + choice.cost(state), step.harm + choice.harm, way)
            found.setdefault(state if hands_over is None else choice.channel * hands_over, []).append(more)
    result = {}
    for state, each in found.items():
        costs, harm, ways = (torch.cat([step[part] for step in each], dim=-1) for part in range(3))
        front = _front(costs, harm, limit)
        result[state] = _Step(costs[front], harm[front], ways[:, front])
    return result


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
