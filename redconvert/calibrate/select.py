"""Which channels to compute: the order in which each next channel explains most of what is left."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["greedy_order", "greedy_sources"]

LOOKS = 32  # gains of greedy_sources that are brought up to date at once


def greedy_order(covariance: Tensor, weights: Tensor, groups: int = 1, steps: int | None = None) -> Tensor:
    """Pivoted Cholesky, whole groups of channels at a time, for the least error in the metric of ``weights``.

    Each step takes the group whose channels explain most of the weighted variance that the channels
    before leave unexplained, as linear regression sees it: for channel c with residual covariance R and metric W, that
    is ``(R W R)_cc / R_cc`` (``sum_d w_d R_dc^2 / R_cc`` for weights w), and for a group the sum over its channels.

    Args:
        covariance: of the channels, ``(C, C)``.
        weights: importance of each channel, ``(C)``, or of their errors together, ``(C, C)``, positive semi-definite:
            what errors e cost is ``e^T W e``.
        groups: the convolution's; channels of a group are taken together.
        steps: how many groups are chosen greedily; the others follow by index.

    Returns:
        A permutation of the channels, ``(C)``, best first.
    """
    channels = len(covariance)
    scale, metric = _standard(weights)
    weighted = covariance * torch.outer(scale, scale)
    size = channels // groups if groups > 1 else 1
    units = channels // size
    steps, diagonal = min(steps or units, units), weights.dim() == 1
    # What is left is R = weighted - factor factor^T. R itself, C^2 numbers, would have to be rewritten for each of the
    # C channels; only its diagonal and the squared length of each of its columns are needed, and those can be updated.
    factor = weighted.new_zeros(channels, steps * size)
    variance = weighted.diagonal().clone()
    squares = ((metric @ weighted) * weighted).sum(0)
    whole = (metric * weighted).sum()  # the error before anything is kept
    floor = 1e-9 * variance.mean().clamp_min(torch.finfo(weighted.dtype).tiny)
    chosen = torch.zeros(units, dtype=torch.bool, device=covariance.device)
    order: list[int] = []
    rank = 0
    for _ in range(steps):
        # Rounding in the updates must not make a channel better than it can be: gain <= trace of W R. Where W is
        # diagonal, and so the identity by now, that is the sum of what is left, and R_cc <= gain.
        most, least = (variance.sum(), variance) if diagonal else (whole.clamp_min(0), torch.zeros_like(variance))
        gain = (squares / variance.clamp_min(floor)).minimum(most).maximum(least)
        gain = torch.where(variance > floor, gain, torch.zeros_like(gain)).view(units, size).sum(1)
        unit = int(torch.where(chosen, -1.0, gain).argmax())
        chosen[unit] = True
        order.append(unit)
        for channel in range(unit * size, (unit + 1) * size):
            if variance[channel] > floor:
                done = factor[:, :rank]
                column = weighted[channel] - done @ done[channel]
                column = column / column[channel].sqrt()
                costs = metric @ column
                product = weighted @ costs - done @ (done.T @ costs)  # R W column
                squares += column.square() * (column @ costs) - 2 * column * product
                whole -= column @ costs
                variance -= column.square()
                factor[:, rank] = column
                rank += 1
    return _channels_of(order, size, units, covariance.device)


def greedy_sources(covariance: Tensor, weights: Tensor, groups: int = 1, steps: int | None = None) -> Tensor:
    """The order where each dropped channel is rebuilt from its single best kept one (``cheap="scale"``).

    Each step takes the group that raises ``sum_d w_d max_s cov_ds^2 / var_s`` over the chosen s most.
    Arguments and result are those of `greedy_order`; of a metric only its diagonal counts.
    """
    weights = weights.diagonal() if weights.dim() == 2 else weights
    channels = len(covariance)
    size = channels // groups if groups > 1 else 1
    units = channels // size
    variance = covariance.diagonal()
    floor = 1e-9 * variance.mean().clamp_min(torch.finfo(variance.dtype).tiny)
    explained = weights[:, None] * covariance.square() / variance.clamp_min(floor)  # of row d by column s
    explained = torch.where(variance > floor, explained, torch.zeros_like(explained))
    by_unit = explained.view(channels, units, size).amax(2).T.contiguous()  # row: what a group explains of each channel
    best = torch.zeros(channels, dtype=covariance.dtype, device=covariance.device)
    chosen = torch.zeros(units, dtype=torch.bool, device=covariance.device)
    # What a group adds can only shrink as others are chosen: an old gain bounds it from above, and whichever gain is
    # new and still the largest is the best one. Few of the others need a look, at C numbers each.
    gains = by_unit.sum(1)
    order: list[int] = []
    for _ in range(min(steps or units, units)):
        new = torch.zeros_like(chosen)
        while not new[unit := int(torch.where(chosen, -1.0, gains).argmax())]:
            look = torch.where(chosen, -1.0, gains).topk(min(LOOKS, units)).indices
            look[0] = unit  # of equal ones, the first
            gains[look] = (by_unit[look] - best).clamp_min(0).sum(1)
            new[look] = True
        chosen[unit] = True
        order.append(unit)
        best = torch.maximum(best, by_unit[unit])
    return _channels_of(order, size, units, covariance.device)


def _standard(weights: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each channel, and the metric of the scaled channels, whose diagonal is 1."""
    if weights.dim() == 1:
        return weights.clamp_min(0).sqrt(), torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
    scale = weights.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    metric = weights * torch.outer(inverse, inverse)
    return scale, metric


def _channels_of(order: list[int], size: int, units: int, device: torch.device) -> Tensor:
    """The channels of the chosen groups, then those of the others by index."""
    others = sorted(set(range(units)) - set(order))
    first = torch.tensor(order + others, device=device) * size
    return (first[:, None] + torch.arange(size, device=device)).flatten()
