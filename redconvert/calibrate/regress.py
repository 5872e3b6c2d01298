"""Ridge regression that is pulled towards what stood there, as strongly as samples that it has not seen want it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["FOLDS", "best_strength", "products", "ridge_towards"]

STRENGTHS = (1000.0, 100.0, 10.0, 1.0)  # of the ridge, tried on samples that were not solved with
JUDGES = 64  # of the targets, by which the strength is chosen
FOLDS = 2


@torch.no_grad()
def products(targets: Tensor, predictors: Tensor, fold: Tensor) -> Tensor:
    """Sums of ``[y, 1, x] [1, x]^T`` over rows and positions: ``(FOLDS, D + P, P)``, float64, P counting the constant.

    Args:
        targets: y, ``(N, D, positions)``; predictors: x, ``(N, P - 1, positions)``.
        fold: of each row, ``(N)``.
    """
    N, D, positions = targets.shape
    rows, order = targets.new_ones(D + 1 + predictors.shape[1], N, positions), fold.argsort(stable=True)
    for part, place in ((targets, rows[:D]), (predictors, rows[D + 1 :])):
        torch.index_select(part.transpose(0, 1), 1, order, out=place)  # the only copy: each fold is a view of it
    folds = rows.split(torch.bincount(fold, minlength=FOLDS).tolist(), dim=1)
    return torch.stack([(each.flatten(1) @ each[D:].flatten(1).T).double() for each in folds])


def best_strength(sums: Tensor, start: Tensor, least: float) -> float:
    """The ridge with which each fold's solution errs least on the other fold; infinite: the start errs less.

    From the strongest on, as long as a weaker one does better; on some of the targets, which say as much as all.

    Args:
        sums: of `products`; start: ``(D, P)``.
        least: the weakest ridge that is tried, relative to the mean variance of the predictors; 0: it is taken.
    """
    outputs, size = start.shape
    judges = torch.linspace(0, outputs - 1, min(JUDGES, outputs), device=sums.device).long()
    rows = torch.cat([judges, torch.arange(outputs, outputs + size, device=sums.device)])
    folds, start = sums[:, rows].float(), start[judges].float()
    if not least or (folds[:, len(judges), 0] == 0).any():
        return least
    best, error = math.inf, sum(_error(fold, start) for fold in folds)
    for strength in (least * times for times in STRENGTHS):
        solutions = [ridge_towards(start, fold, strength) for fold in folds]
        found = sum(_error(fold, other) for fold, other in zip(folds, reversed(solutions), strict=True))
        if not found < error:  # nor where it is NaN
            break
        best, error = strength, found
    return best


def ridge_towards(start: Tensor, sums: Tensor, strength: float) -> Tensor:
    """The solution ``(D, P)`` of the normal equations in ``sums (D + P, P)``, pulled towards ``start``.

    The first predictor is the constant, which is not pulled. NaN where the equations have no solution.
    """
    if math.isinf(strength):
        return start
    across, within = _averages(sums)
    damping = (strength * within.diagonal()[1:].mean()).expand(len(within)).clone()
    damping[0] = torch.finfo(torch.float32).tiny
    factor, failed = torch.linalg.cholesky_ex(within + damping.diag())
    if failed:
        return torch.full_like(start, math.nan)
    return torch.cholesky_solve((across + start * damping).T, factor).T


def _averages(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean products of targets with the P predictors ``(D, P)``, and of those with each other ``(P, P)``."""
    across, within = sums.tensor_split([len(sums) - sums.shape[1]])
    count = within[0, 0]  # of the constant with itself
    return across / count, within / count


def _error(sums: Tensor, solution: Tensor) -> float:
    """Of what ``sums`` was taken of: its mean squared error, less a constant."""
    across, within = _averages(sums)
    return float(((solution @ within - 2 * across) * solution).sum())
