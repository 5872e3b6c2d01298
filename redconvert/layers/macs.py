"""Multiply-adds of a dynamic convolution, per sample and decision: the formulas, from shapes alone.

One multiply-add is one FLOP, as in the paper and in fvcore.

- convolution: ``k_i * frames_j * H_o * W_o * C_in / groups * prod(kernel_size)``;
- Phi_c: its weights once per computed frame and position;
- Phi_t: two per rebuilt element, ``(T_o - frames_j) * C_out * H_o * W_o * 2``;
- absorbed: where the layer that is read hands over ``k_s`` channels, ``C_in`` is ``k_s``; the weights for that, and
  mixtures of filters, are made once, not per input; a depthwise convolution between the two computes ``k_s`` channels;
- mixtures of input channels: B once per input position that is read, and ``C_in`` is how many there are;
- gate: FC1 and FC2, and one per input element for the average over H and W (fvcore counts pooling so).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .base import DynamicConv, Observation

__all__ = ["LayerMacs", "executed_macs", "layer_macs"]


@dataclass(frozen=True)
class LayerMacs:
    """MACs of one call, per sample.

    Attributes:
        dense: the plain convolution.
        gate: the gate.
        conv: ``conv[i][j]`` is the convolution alone under channel candidate i and temporal candidate j.
        cheap: ``cheap[i][j]``, what Phi_c and Phi_t add to it.
        reads: input channels by candidate of the layer that is read; all of them where nothing is handed over.
    """

    dense: int
    gate: int
    conv: tuple[tuple[int, ...], ...]
    cheap: tuple[tuple[int, ...], ...]
    reads: tuple[int, ...] = (1,)

    def convolved(self, channel: int, temporal: int, source: int = 0) -> int:
        """The convolution alone, of the channels that candidate ``source`` of the layer that is read hands over."""
        return self.conv[channel][temporal] * self.reads[source] // self.reads[0]

    def executed(self, channel: int, temporal: int, source: int = 0) -> int:
        """All of one decision: gate, convolution and cheap operations."""
        return self.gate + self.convolved(channel, temporal, source) + self.cheap[channel][temporal]

    @property
    def lowest(self) -> int:
        """The least that a decision can cost, whatever the layer that is read does."""
        return min(self.executed(i, j, len(self.reads) - 1) for i, row in enumerate(self.conv) for j in range(len(row)))


def layer_macs(layer: DynamicConv, input_shape: Sequence[int], output_shape: Sequence[int]) -> LayerMacs:
    """MACs of ``layer`` per sample, from the shapes of one call (batch and folded frames included)."""
    frames, positions = _frames_and_positions(layer, output_shape)
    per_output, mixed = layer.weight[0].numel(), layer.mixed_in
    in_frames = input_shape[2] if len(input_shape) == 5 else layer.frames_per_sample
    in_positions = math.prod(input_shape[-2:])
    conv: list[list[int]] = []
    cheap: list[list[int]] = []
    for i, kept in enumerate(layer.candidates.channels):
        rebuild_channels = layer.cheap_c.op(i).macs_per_position if layer.cheap_c is not None and i else 0
        conv.append([])
        cheap.append([])
        for j in range(len(layer.candidates.strides)):
            computed = layer.candidates.frames(j, frames)
            macs = kept * computed * positions * per_output
            conv[-1].append(macs if mixed is None else macs * mixed.channels[i] // layer.in_channels)
            rebuild_frames = 2 * (frames - computed) * layer.out_channels
            cheap[-1].append(positions * (computed * rebuild_channels + rebuild_frames))
            if mixed is not None:
                read = in_frames if isinstance(layer, nn.Conv3d) else computed
                cheap[-1][-1] += mixed.macs_per_position(i) * read * in_positions
    pooled = layer.in_channels * in_frames * in_positions
    decides = not layer.candidates.is_static
    gate = pooled + layer.gate.fc1.weight.numel() + layer.gate.fc2.weight.numel() if decides else 0
    return LayerMacs(
        dense=conv[0][0],
        gate=gate,
        conv=tuple(map(tuple, conv)),
        cheap=tuple(map(tuple, cheap)),
        reads=layer.carried or ((layer.in_channels,) if layer.cheap_in is None else layer.cheap_in.channels),
    )


def executed_macs(layer: DynamicConv, seen: Observation) -> list[int]:
    """MACs that each sample of one observed call executed.

    Where a soft gate blends candidates, the convolution runs once at the largest open one, and the cheap
    operations of every other open candidate run too.
    """
    macs = layer_macs(layer, seen.input_shape, seen.output_shape)
    result = []
    for sample, (i, j, blend, source) in enumerate(seen.decisions):
        executed = macs.executed(i, j, source)
        if blend:
            executed += _blended(layer, seen, sample, i, j)
        result.append(executed)
    return result


def _blended(layer: DynamicConv, seen: Observation, sample: int, channel: int, temporal: int) -> int:
    """Cheap operations of the open candidates beyond the largest ones."""
    frames, positions = _frames_and_positions(layer, seen.output_shape)
    computed = layer.candidates.frames(temporal, frames)
    extra = 0
    for i, weight in enumerate(seen.weights.channel[sample].tolist()):
        if layer.cheap_c is not None and i > channel and weight > 0:
            extra += layer.cheap_c.op(i).macs_per_position * computed * positions
    for j, weight in enumerate(seen.weights.temporal[sample].tolist()):
        if j > temporal and weight > 0:
            extra += 2 * (frames - layer.candidates.frames(j, frames)) * layer.out_channels * positions
    return extra


def _frames_and_positions(layer: DynamicConv, output_shape: Sequence[int]) -> tuple[int, int]:
    """Output frames per sample, and output positions per frame."""
    frames = output_shape[2] if isinstance(layer, nn.Conv3d) else layer.frames_per_sample
    return frames, math.prod(output_shape[-2:])
