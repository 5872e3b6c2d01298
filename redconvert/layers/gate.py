"""The gate (Eq. 4): from a layer's input to one weight per candidate and sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Gate", "GateWeights", "candidate_weights", "largest_open"]

# beta at conversion: tanh(+-1.5) = +-0.9 is decided, yet its slope of 0.18 still lets the gate learn.
BIRTH_BETA = 1.5
# Rows of FC2 have this L1 norm at birth. tanh bounds its input to [-1, 1], so FC2 moves z by at most
# this much and the signs that beta sets hold for every input: the full candidate is open, the others closed.
BIRTH_NORM = 0.75


class GateWeights(NamedTuple):
    """Weights over the candidates, per sample: ``channel (N, S_c)``, ``temporal (N, S_t)``."""

    channel: Tensor
    temporal: Tensor


class Gate(nn.Module):
    """``z = FC2(tanh(BN(FC1(G(x))))) + beta`` and ``V = max(tanh z, 0)``, split in time and channel values.

    G averages over H and W, so FC1 reads ``C_in * T`` numbers. Clips of another length are average-pooled
    in time to ``num_frames``. The norm uses its running statistics for a training batch of one.

    Args:
        in_channels: C_in of the convolution.
        num_frames: frames T that FC1 reads; 1 for images.
        num_channel, num_temporal: S_c and S_t; an axis with one candidate has nothing to decide and
            takes no output.
        hidden: width of FC1.
        generator: random numbers for the start; none of PyTorch's global ones are used.
    """

    def __init__(
        self,
        in_channels: int,
        num_frames: int,
        num_channel: int,
        num_temporal: int,
        hidden: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.num_channel = num_channel
        self.num_temporal = num_temporal
        features = in_channels * num_frames
        sizes = [size for size in (num_temporal, num_channel) if size > 1]
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global generator
            self.fc1 = nn.Linear(features, hidden, bias=False)  # the norm would remove it
            self.fc2 = nn.Linear(hidden, sum(sizes), bias=False)  # beta is its bias
        self.norm = nn.BatchNorm1d(hidden)
        self.beta = nn.Parameter(torch.cat([torch.tensor([1.0] + [-1.0] * (size - 1)) for size in sizes]) * BIRTH_BETA)
        bound = features**-0.5
        with torch.no_grad():
            self.fc1.weight.uniform_(-bound, bound, generator=generator)
            self.fc2.weight.uniform_(-1, 1, generator=generator)
            self.fc2.weight.mul_(BIRTH_NORM / self.fc2.weight.abs().sum(dim=1, keepdim=True))

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}, num_channel={self.num_channel}, num_temporal={self.num_temporal}"

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled input ``(N, C_in, T)`` -> ``tanh z``: channel ``(N, S_c)``, temporal ``(N, S_t)``.

        An axis with one candidate gets ones.
        """
        if pooled.shape[2] != self.num_frames:
            pooled = F.adaptive_avg_pool1d(pooled, self.num_frames)
        with torch.autocast(pooled.device.type, enabled=False):  # a gate is tiny: it keeps its own precision
            hidden = self.fc1(pooled.flatten(1).to(self.fc1.weight.dtype))
            if self.training and hidden.shape[0] == 1:
                norm = self.norm
                hidden = F.batch_norm(
                    hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
                )
            else:
                hidden = self.norm(hidden)
            values = torch.tanh(self.fc2(torch.tanh(hidden)) + self.beta)
        ones = values.new_ones(values.shape[0], 1)
        if self.num_temporal == 1:
            return values, ones
        if self.num_channel == 1:
            return ones, values
        temporal, channel = values.split([self.num_temporal, self.num_channel], dim=1)
        return channel, temporal


class _OpenValue(torch.autograd.Function):
    """``max(v, 0)`` whose gradient passes below zero too: a closed gate could never open again otherwise."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return values.clamp_min(0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def candidate_weights(values: Tensor, normalize: bool = True) -> Tensor:
    """``w = V / sum(V)`` over the last axis, with ``V = max(values, 0)``; ``(N, S) -> (N, S)``.

    Where every V is 0 the cheapest candidate, the last, has weight 1. ``normalize=False`` returns V.
    """
    if values.shape[-1] == 1:
        return values
    opened = _OpenValue.apply(values.nan_to_num(nan=-1.0))  # a gate that cannot say is closed
    total = opened.sum(-1, keepdim=True)
    closed = total <= 0
    weights = opened / torch.where(closed, torch.ones_like(total), total) if normalize else opened
    cheapest = F.one_hot(torch.full_like(total[..., 0], values.shape[-1] - 1, dtype=torch.long), values.shape[-1])
    # The zero that is added carries the gradient of V to a sample whose gates are all closed.
    return torch.where(closed, cheapest.to(weights.dtype) + opened - opened.detach(), weights)


def largest_open(weights: Tensor) -> Tensor:
    """Index of the largest open candidate, ``(N, S) -> (N,)``: the one that has to be computed."""
    return (weights > 0).int().argmax(-1)
