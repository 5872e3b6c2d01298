"""A candidate that rebuilds: what is convolved, and how all channels, or all frames, come from that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layers.cheap import Depthwise, Nothing, Pointwise, Scale
from .absorbed import absorbed_filter
from .kernels import Assembly, Filling, multiplies
from .pack import Filter, PackedConv

if TYPE_CHECKING:
    from .unit import Unit

__all__ = ["Reduced", "build_filling", "reduce"]


@dataclass
class Reduced:
    """Channel candidate i: what it convolves with, and how the other channels come from that."""

    filter: Filter
    inputs: Tensor | None  # input channels that the kept groups read; None: all
    mixing: PackedConv | None  # what makes mixtures of the input channels; None: all are read
    cheap: PackedConv | None  # None: one source channel each, which the assembly does
    cheap_source: Tensor | None  # channels that a depthwise operation reads
    assembly: Assembly


def reduce(unit: Unit, channel: int, source: int) -> Reduced:
    """Candidate ``channel`` of a unit, from what candidate ``source`` of the layer that it reads hands over."""
    rebuild, kept = unit.layer.cheap_c, unit.layer.candidates.channels[channel]
    order, op = rebuild.order, rebuild.op(channel)
    inputs = None
    if unit.filter.groups > 1:
        outs, ins = len(order) // unit.filter.groups, unit.filter.weight.shape[1]
        groups = order[:kept:outs] // outs
        inputs = (groups[:, None] * ins + torch.arange(ins, device=order.device)).flatten()
    product = None
    index = torch.arange(len(order), device=order.device)
    scale, shift = unit.scale[order], unit.shift[order]  # in ranks
    cheap = cheap_source = None
    dropped = slice(kept, None)
    if isinstance(op, Nothing):
        index[dropped], scale = 0, scale.clone()
        scale[dropped] = 0
    elif isinstance(op, Scale):
        index[dropped] = op.source
        scale, shift = scale.clone(), scale * 0 + shift
        shift[dropped] += scale[dropped] * op.bias.detach().to(scale.dtype)
        scale[dropped] *= op.weight.detach().to(scale.dtype)
    else:
        weight, bias = op.weight.detach().to(scale.dtype), op.bias.detach().to(scale.dtype)
        shift = shift.clone()
        shift[dropped] += scale[dropped] * bias
        pad, groups_c = (0, 0, 0), 1
        if isinstance(op, Depthwise):
            cheap_source, pad, groups_c = op.source, (0, 1, 1), len(weight)
        assert isinstance(op, Pointwise | Depthwise)
        weight = (
            weight.view(len(weight), -1, 1, *weight.shape[2:]) if weight.dim() == 4 else weight[..., None, None, None]
        )
        if isinstance(op, Pointwise) and multiplies(weight):
            product = weight.flatten(1)
        else:
            cheap = unit.pack(Filter(weight, None, (1, 1, 1), pad, (1, 1, 1), groups_c), f"cheap {channel}")
    inverse = order.argsort()
    assembly = Assembly.build(index[inverse], scale[inverse], shift[inverse], kept, product)
    filter = absorbed_filter(unit.layer, unit.filter, source)
    weight, bias = rebuild.filters(channel, filter.weight, filter.bias)
    mixing, mixed = None, unit.layer.mixed_in
    mixture = None if mixed is None else mixed.op(channel)
    if mixture is not None:
        weight, matrix = mixture.filters(weight), mixture.matrix.to(weight.dtype)[..., None, None, None]
        mixing = unit.pack(Filter(matrix, None, (1, 1, 1), (0, 0, 0), (1, 1, 1), 1), f"mixing {channel}")
    filter = replace(
        filter,
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        groups=max(filter.groups * kept // len(order), 1),
    )
    return Reduced(filter, inputs, mixing, cheap, cheap_source, assembly)


def build_filling(unit: Unit, temporal: int, channels: Tensor | None) -> Filling | None:
    """Phi_t behind a unit's norm, of these channels (None: of all); None where it copies.

    With ``y = scale * conv + shift``, ``w0 conv_s + w1 conv_(s+1) + b`` becomes
    ``w0 y_s + w1 y_(s+1) + scale b + shift (1 - w0 - w1)``.
    """
    phi = unit.layer.cheap_t
    weight, bias = (each[temporal - 1].detach() for each in (phi.weights, phi.biases))
    if bool((weight[:, 0] == 1).all()) and not weight[:, 1].any() and not bias.any():
        return None
    shifted = unit.scale * bias + unit.shift * (1 - weight.sum(1))
    first = Filling.copies(1, weight)
    kept = slice(None) if channels is None else channels
    return Filling(
        torch.cat([first.weight, weight.float()])[..., kept].contiguous(),
        torch.cat([first.bias, shifted.float()])[..., kept].contiguous(),
    )
