"""The gate (Eq. 4): from a layer's input to one weight per candidate and sample."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

__all__ = ["Gate", "GateWeights", "NoGate", "candidate_weights", "largest_open", "matching", "one_hot", "processes"]

# beta at conversion: tanh(+-1.5) = +-0.9 is decided, yet its slope of 0.18 still lets the gate learn.
BIRTH_BETA = 1.5
# Rows of FC2 have this L1 norm at birth. tanh bounds its input to [-1, 1], so FC2 moves z by at most
# this much and the signs that beta sets hold for every input: the full candidate is open, the others closed.
BIRTH_NORM = 0.75
ROUNDING = 1e-5  # of sums of a few dozen products, amply


class GateWeights(NamedTuple):
    """Weights over the candidates, per sample: ``channel (N, S_c)``, ``temporal (N, S_t)``."""

    channel: Tensor
    temporal: Tensor


class Gate(nn.Module):
    """``z = FC2(tanh(BN(FC1(G(x))))) + beta - threshold`` and ``V = max(tanh z, 0)``, split in time and channel.

    G averages over H and W, so FC1 reads ``C_in * T`` numbers. Clips of another length are average-pooled
    in time to ``num_frames``. The norm uses its running statistics for a training batch of one, and those of
    the batches of all processes where ``torch.distributed`` trains in several. ``threshold`` is 0 until
    `redconvert.set_budget` moves it; no gradient reaches it.

    Args:
        in_channels: C_in of the convolution.
        num_frames: frames T that FC1 reads; 1 for images.
        num_channel, num_temporal: S_c and S_t; an axis with one candidate has nothing to decide and
            takes no output.
        hidden: width of FC1.
        generator: random numbers for the start; none of PyTorch's global ones are used.
    """

    threshold: Tensor

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
        self.register_buffer("threshold", torch.zeros(sum(sizes)))
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
        values = torch.tanh(self.logits(pooled))
        ones = values.new_ones(values.shape[0], 1)
        if self.num_temporal == 1:
            return values, ones
        if self.num_channel == 1:
            return ones, values
        temporal, channel = values.split([self.num_temporal, self.num_channel], dim=1)
        return channel, temporal

    def logits(self, pooled: Tensor) -> Tensor:
        """``z (N, S_t + S_c)``: a candidate is open where it is above 0, which NaN is not."""
        if pooled.shape[2] != self.num_frames:
            pooled = F.adaptive_avg_pool1d(pooled, self.num_frames)
        kind = pooled.device.type
        own = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with own:  # a gate is tiny: it keeps its own precision
            hidden = self.fc1(matching(pooled.flatten(1), self.fc1.weight))
            return self.fc2(torch.tanh(self._normalize(hidden))) + self.beta - self.threshold

    @property
    def reach(self) -> Tensor:
        """How far an input can move z from ``beta - threshold``, ``(S_t + S_c)``: tanh bounds what FC2 reads."""
        weight = self.fc2.weight.detach()
        return weight.abs().sum(1, dtype=torch.promote_types(weight.dtype, torch.float32))

    def settled(self) -> tuple[int, int] | None:
        """The channel and the temporal candidate that it takes whatever it reads; None where that depends on it.

        So it is at birth, and after a budget by layers, which moves thresholds out of the input's reach. The device is
        read.
        """
        middle = (self.beta.float() - self.threshold.float()).detach()
        reach = self.reach.float() * (1 + ROUNDING) + ROUNDING
        bounds = torch.stack([middle - reach, middle + reach], dim=1)
        channel, temporal = (_always(self.axis(name, bounds.T).T.tolist()) for name in ("channel", "temporal"))
        return None if channel is None or temporal is None else (channel, temporal)

    def axis(self, name: str, values: Tensor) -> Tensor:
        """What of ``values (..., S_t + S_c)`` belongs to "channel" or "temporal": a view, empty without that axis."""
        split = self.num_temporal if self.num_temporal > 1 else 0
        return values[..., split:] if name == "channel" else values[..., :split]

    def thresholds(self, name: str) -> Tensor:
        """The thresholds of one axis, to write to."""
        return self.axis(name, self.threshold)

    @torch.no_grad()
    def keep_thresholds(self) -> None:
        """Make the thresholds part of beta: the same decisions, and training goes on from them."""
        self.beta.sub_(self.threshold.to(self.beta.dtype))
        self.threshold.zero_()

    def _normalize(self, hidden: Tensor) -> Tensor:
        norm = self.norm
        if not (self.training and norm.training) or type(norm) is not nn.BatchNorm1d:  # SyncBatchNorm, a user's own
            return norm(hidden)
        if processes() > 1:
            return _norm_over_processes(norm, hidden)
        if hidden.shape[0] > 1:
            return norm(hidden)
        return F.batch_norm(
            hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )


def _always(bounds: list[list[float]]) -> int | None:
    """The largest open candidate, else the last, where that is the same for every z within these bounds."""
    for index, (low, high) in enumerate(bounds[:-1]):
        if low > 0:
            return index
        if high > 0:
            return None
    return max(len(bounds) - 1, 0)


def processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce, there and back: every process's loss depends on every process's value."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        value = value.clone()
        distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient


def _norm_over_processes(norm: Any, hidden: Tensor) -> Tensor:
    """BatchNorm over the batches of all processes; PyTorch's SyncBatchNorm does not run on a CPU."""
    wide = hidden.double()  # E[h^2] - E[h]^2 loses the digits that both share
    ones = torch.ones_like(wide[:, :1])
    count, total, squares = _SumOverProcesses.apply(torch.cat([ones, wide, wide.square()], dim=1).sum(0)).split(
        [1, norm.num_features, norm.num_features]
    )
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    with torch.no_grad():
        norm.num_batches_tracked += 1
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        unbiased = variance * count / (count - 1).clamp_min(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
    normalized = ((wide - mean) * torch.rsqrt(variance + norm.eps)).to(hidden.dtype)
    return normalized * norm.weight + norm.bias


class _OpenValue(torch.autograd.Function):
    """``max(v, 0)`` whose gradient passes below zero too: a closed gate could never open again otherwise."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return values.clamp_min(0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class NoGate(Gate):
    """In the place of a gate where a layer has one candidate on each axis: it follows what another decides."""

    def __init__(self, num_frames: int) -> None:
        nn.Module.__init__(self)
        self.num_frames, self.num_channel, self.num_temporal = num_frames, 1, 1
        for name in ("beta", "threshold"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return pooled.new_ones(len(pooled), 1), pooled.new_ones(len(pooled), 1)

    def logits(self, pooled: Tensor) -> Tensor:
        return pooled.new_empty(len(pooled), 0)

    @property
    def reach(self) -> Tensor:
        return self.threshold


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
    cheapest = one_hot(torch.full_like(total[..., 0], values.shape[-1] - 1, dtype=torch.long), values.shape[-1])
    # The zero that is added carries the gradient of V to a sample whose gates are all closed.
    return torch.where(closed, cheapest.to(weights.dtype) + opened - opened.detach(), weights)


def largest_open(weights: Tensor) -> Tensor:
    """Index of the largest open candidate, ``(N, S) -> (N,)``: the one that has to be computed."""
    return (weights > 0).int().argmax(-1)


def one_hot(index: Tensor, size: int) -> Tensor:
    """``(...)`` -> ``(..., size)``, true at the index. PyTorch's own looks at the values on a CPU."""
    return index.unsqueeze(-1) == torch.arange(size, device=index.device)


def matching(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype of ``like``; where it has it already, a traced graph gets no node for it."""
    return x if x.dtype == like.dtype else x.to(like.dtype)
