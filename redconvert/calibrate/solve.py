"""Least squares for the cheap operations, from moments alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import ChannelRebuild, FrameRebuild, InputMixtures
from ..layers.cheap import CheapOp, Principal
from .statistics import ChannelMoments, FrameMoments

__all__ = ["filter_metric", "solve_channels", "solve_frames", "solve_inputs", "solve_principal"]


def solve_channels(op: CheapOp, moments: ChannelMoments, ridge: float) -> Tensor:
    """Set Phi_c to the regression of the dropped channels on the kept ones; see `CheapOp.fit`.

    Args:
        op: what rebuilds the D dropped channels from the k kept ones.
        moments: predictors are the kept channels, targets the dropped ones.
        ridge: strength, relative to the mean variance of the predictors.

    Returns:
        The unexplained variance of each dropped channel, ``(D)``.
    """
    within, across = moments.covariance, moments.cross_covariance
    coefficients = op.fit(within, across, moments.sum_x / moments.count, moments.sum_y / moments.count, ridge)
    explained = 2 * (coefficients * across).sum(1) - ((coefficients @ within) * coefficients).sum(1)
    return (moments.target_variance - explained).clamp_min(0)


def solve_principal(cheap: ChannelRebuild, moments: ChannelMoments, metric: Tensor) -> list[Tensor]:
    """Set every candidate to the principal components; see `Principal.fit_components`.

    Args:
        cheap: a layer's Phi_c with ``"principal"`` operations, its order chosen.
        moments: of all channels, which are predictors and targets.
        metric: what their errors cost, ``(C, C)`` or ``(C)``; both in the layer's own order.

    Returns:
        By candidate the unexplained variance of each channel, ``(C)``, in the layer's own order.
    """
    ranks = moments.select(cheap.order, cheap.order)
    metric = metric[cheap.order] if metric.dim() == 1 else metric[cheap.order][:, cheap.order]
    ops = [op for op in cheap.ops if isinstance(op, Principal)]
    lefts = [op.fit_components(ranks.covariance, metric, ranks.sum_x / ranks.count) for op in ops]
    return [left[cheap.inverse] for left in lefts]


def filter_metric(filters: Tensor, importance: Tensor) -> Tensor:
    """What errors of the input channels cost, as far as the filters ``(C_out, C_in, ...)`` tell: ``(C_in, C_in)``.

    They move output channel o at each tap by ``W_o e``, which costs ``importance_o`` per square. Taps count alone.
    """
    rows = (filters.detach().double() * importance.sqrt().view(-1, *(1,) * (filters.dim() - 1))).transpose(0, 1)
    return rows.flatten(1) @ rows.flatten(1).T


def solve_inputs(mixed: InputMixtures, moments: Tensor, metric: Tensor) -> tuple[float, ...]:
    """Set every candidate's mixtures of inputs to the principal components; see `InputMixture.fit`.

    Args:
        mixed: of a layer.
        moments: of its input channels, ``E[x x^T]``, ``(C, C)``; metric: what their errors cost, ``(C, C)``.

    Returns:
        By reduced candidate the share that it keeps of what the input channels do in that metric.
    """
    ops = [mixed.op(index) for index in range(1, len(mixed.channels))]
    return tuple(1.0 if op is None else float(1 - op.fit(moments, metric)) for op in ops)


@torch.no_grad()
def solve_frames(cheap: FrameRebuild, index: int, moments: FrameMoments, ridge: float) -> Tensor:
    """Per channel and offset, regress a skipped frame on the computed frames on both sides and a constant.

    The ridge pulls towards the copy of the frame before, which is what the operation is without data.

    Args:
        cheap: the layer's Phi_t, of which temporal candidate ``index`` is set.
        index: of the candidate.
        moments: of its stride.
        ridge: strength, relative to the mean variance of the two frames.

    Returns:
        Unexplained and total variance of the skipped frames, ``(2, R - 1, C)``.
    """
    m = moments.moments
    mean = m[..., 0, 1:] / m[..., 0, 0, None].clamp_min(1)
    covariance = m[..., 1:, 1:] / m[..., 0, 0, None, None].clamp_min(1) - mean[..., :, None] * mean[..., None, :]
    within, across, variance = covariance[..., :2, :2], covariance[..., 2, :2], covariance[..., 2, 2]
    damping = ridge * within.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    copy = torch.tensor([1.0, 0.0], dtype=m.dtype, device=m.device)
    eye = torch.eye(2, dtype=m.dtype, device=m.device)
    solution = torch.linalg.solve(within + damping[..., None, None] * eye, across + damping[..., None] * copy)
    error = variance - 2 * (solution * across).sum(-1) + ((within @ solution[..., None])[..., 0] * solution).sum(-1)
    cheap.weights[index - 1].copy_(solution.transpose(1, 2))
    cheap.biases[index - 1].copy_(mean[..., 2] - (solution * mean[..., :2]).sum(-1))
    return torch.stack([error.clamp_min(0), variance.clamp_min(0)])
