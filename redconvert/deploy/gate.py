"""The gate of a layer for inference: one pass over its input, two small products, read once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import Decision, GateWeights
from ..layers.absorb import Handover
from ..layers.gate import Gate, candidate_weights
from ..layers.routing import FULL
from . import kernels
from .absorbed import masked_means
from .frames import Frames
from .pack import to_rows
from .tape import read as read_values

__all__ = ["FoldedGate"]


class FoldedGate:
    """``z = W2 tanh(W1 G(x) + b1) + b2``: norm, beta, threshold and pooling in time folded in (Eq. 4).

    Computed in float32. Thresholds are read at every call, so that budgets hold at once; other changes of the gate
    are not seen.
    """

    def __init__(self, gate: Gate, reads: Handover | None = None) -> None:
        self.gate, self.reads = gate, reads
        self.split = gate.num_temporal if gate.num_temporal > 1 else 0  # z holds the temporal candidates first
        self._version = -1
        self._layers: dict[tuple[int, int, int], kernels.GateLayers] = {}
        self._constant: Decision | None = None

    def __call__(
        self, x: Tensor | Frames, sources: list[int] | None = None, read: bool = True
    ) -> tuple[list[Decision], Tensor]:
        """From the layer's input, a decision per sample and z ``(N, S_t + S_c)``. The device is read once.

        ``sources``: of a layer that reads what another hands over, which candidate of that each sample has.
        ``read``: False where nobody follows the decisions: the device is not waited for, and they are FULL.
        """
        held, stride = (x.held, x.stride) if isinstance(x, Frames) else (x, 1)
        compact = sources[0] if sources and self.reads is not None and held.shape[1] < self.reads.channels[0] else 0
        key = (x.shape[2], stride, compact)
        self._read_thresholds()
        layers = self._layers.get(key) or self._fold(*key)
        pooled = x.pooled if isinstance(x, Frames) else None
        if not compact and self.reads is not None and sources is not None and any(sources):
            pooled = masked_means(x, self.reads, sources)
        z = layers(to_rows(held), pooled)
        given = sources or [0] * z.shape[0]
        if not read:
            return [FULL._replace(source=source) for source in given], z
        return [
            Decision(channel, temporal, False, source)
            for (channel, temporal), source in zip(read_values(z, self.choose), given, strict=True)
        ], z

    def choose(self, z: Tensor) -> tuple[tuple[int, int], ...]:
        """The channel and the temporal candidate of each row."""
        split = self.split
        return tuple((_first_open(row[split:]), _first_open(row[:split]) if split else 0) for row in z.tolist())

    @property
    def constant(self) -> Decision | None:
        """What it decides whatever it reads; None where that depends on the input.

        So it is after a budget by layers, which moves thresholds out of the input's reach.
        """
        self._read_thresholds()
        return self._constant

    def _read_thresholds(self) -> None:
        """Whatever was made of other thresholds is made anew."""
        version = self.gate.threshold._version
        if self._version == version:
            return
        self._version = version
        self._layers.clear()
        settled = self.gate.settled()
        self._constant = None if settled is None else Decision(*settled)

    def weights(self, z: Tensor, normalize: bool) -> GateWeights:
        """The weights that the layer itself would report for z."""
        values, ones = torch.tanh(z), z.new_ones(len(z), 1)
        channel, temporal = values[:, self.split :], values[:, : self.split]
        return GateWeights(
            *(candidate_weights(part, normalize) if part.shape[1] else ones for part in (channel, temporal))
        )

    def _fold(self, num_frames: int, stride: int, compact: int) -> kernels.GateLayers:
        """The gate for clips of ``num_frames`` frames, of which every ``stride``-th is held and copied.

        ``compact``: a candidate of the layer that is read, whose channels they hold alone.
        """
        gate, norm = self.gate, self.gate.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
        weight = (gate.fc1.weight.float() * scale[:, None]).detach()
        # (hidden, C * T_gate) -> (hidden, T_gate, C) -> (T * C, hidden) for a clip of T frames
        weight = weight.unflatten(1, (-1, gate.num_frames)).transpose(1, 2)
        if compact and self.reads is not None:
            weight = weight.index_select(2, self.reads.kept(compact))
        if num_frames != gate.num_frames:
            eye = torch.eye(num_frames, dtype=weight.dtype, device=weight.device)
            pooling = F.adaptive_avg_pool1d(eye.unsqueeze(0), gate.num_frames)[0]  # (T, T_gate)
            weight = torch.einsum("tg,hgc->htc", pooling, weight)
        if stride > 1:
            weight = torch.stack([part.sum(1) for part in weight.split(stride, dim=1)], dim=1)
        bias = norm.bias.float() - norm.running_mean.float() * scale
        shift = (gate.beta.float() - gate.threshold.float()).detach()
        second = gate.fc2.weight.detach().float().T.contiguous(), shift.contiguous()
        layers = kernels.GateLayers(weight.flatten(1).T.contiguous(), bias.detach().contiguous(), *second)
        self._layers[num_frames, stride, compact] = layers
        return layers


def _first_open(row: list[float]) -> int:
    """The largest open candidate: the first with z > 0, else the last."""
    for index, z in enumerate(row):
        if z > 0:
            return index
    return max(len(row) - 1, 0)
