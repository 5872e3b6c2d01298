"""From one candidate of a dynamic layer to the plain modules that compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import DynamicConv, Recipe
from ..layers.cheap import Depthwise, Nothing, OneSource, Pointwise
from .plain import (
    JoinChannels,
    MixChannels,
    Pad,
    RebuildFrames,
    RecipePad,
    ScaleChannels,
    TakeChannels,
    TakeFrames,
    Zeros,
)

__all__ = ["Parts", "bake"]


class Parts(NamedTuple):
    """What a `FrozenConv` holds."""

    take: nn.Module
    conv: nn.Module
    rebuild: nn.Module
    expand: nn.Module | None
    candidate: tuple[int, int]


@torch.no_grad()
def bake(layer: DynamicConv, channel: int, temporal: int, source: int = 0) -> Parts | None:
    """The parts of one candidate; None where it is the full one. The layer is not changed.

    ``source``: the candidate of the layer that is read, which hands over no more than its channels.
    """
    if channel == temporal == source == 0:
        return None
    computed, dropped = _ranks(layer, channel)
    pads, padding = _padding(layer)
    takes = _channels_to_read(layer, source) if source else _channels_to_take(layer, computed)
    steps = [*_frames_to_take(layer, temporal), *takes, *_mixing(layer, channel), *pads]
    return Parts(
        take=_chain(steps),
        conv=_smaller(layer, channel, computed, temporal, padding, source),
        rebuild=_spread(layer, source) if layer.carries and source else _rebuild(layer, channel, computed, dropped),
        expand=_expand(layer, temporal),
        candidate=(channel, temporal),
    )


def _ranks(layer: DynamicConv, channel: int) -> tuple[Tensor, Tensor]:
    """Ranks of the computed and of the dropped channels, each sorted by the layer's own order.

    Sorted, more of them are neighbours in memory, and the channel order is undone by fewer jumps.
    """
    kept = layer.candidates.channels[channel]
    order = _order(layer)
    return order[:kept].argsort(), kept + order[kept:].argsort()


def _order(layer: DynamicConv) -> Tensor:
    return (
        torch.arange(layer.out_channels, device=layer.weight.device) if layer.cheap_c is None else layer.cheap_c.order
    )


def _is_range(index: Tensor) -> bool:
    return bool((index == torch.arange(len(index), device=index.device)).all())


def _chain(steps: list[nn.Module]) -> nn.Module:
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps) if steps else nn.Identity()


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=like.requires_grad)


# -- the convolution -----------------------------------------------------------------------------------


def _frames_to_take(layer: DynamicConv, temporal: int) -> list[nn.Module]:
    """Where frames are folded into the batch, the convolution cannot skip them by its stride."""
    if not temporal or layer.num_frames is None:
        return []
    return [TakeFrames(layer.num_frames, layer.candidates.strides[temporal])]


def _channels_to_take(layer: DynamicConv, computed: Tensor) -> list[nn.Module]:
    """Whole groups are computed, and read only the inputs of their own."""
    if layer.groups == 1 or len(computed) == layer.out_channels:
        return []
    per_out, per_in = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    groups = _order(layer)[computed][::per_out] // per_out
    index = (groups[:, None] * per_in + torch.arange(per_in, device=groups.device)).flatten()
    return [TakeChannels(index, len(layer.stride))]


def _channels_to_read(layer: DynamicConv, source: int) -> list[nn.Module]:
    """What the layer that hands over computed."""
    assert layer.told_by is not None
    return [TakeChannels(_in_place(layer.told_by.kept(source)), len(layer.stride))]


def _mixing(layer: DynamicConv, channel: int) -> list[nn.Module]:
    """Mixtures of the input channels, where the candidate reads those."""
    op = None if layer.mixed_in is None else layer.mixed_in.op(channel)
    if op is None:
        return []
    dims, (kept, dropped) = len(layer.stride), op.weight.shape
    conv = _conv_class(layer)(dropped, kept, 1, bias=False, device="meta")
    conv = _filled(conv, _parameter(op.weight.to(layer.weight.dtype)[(..., *(None,) * dims)], op.weight), None)
    return [MixChannels(op.kept, op.dropped, conv, dims)]


def _in_place(kept: Tensor) -> Tensor:
    """Sorted: neighbours in memory stay neighbours."""
    return kept.sort().values


def _padding(layer: DynamicConv) -> tuple[list[nn.Module], tuple[int, ...]]:
    """What has to be padded before the convolution, and the padding that it does itself."""
    recipe, ones, mode = layer.recipe, (1,) * len(layer.stride), str(layer.padding_mode)
    amounts: list[int] = layer._reversed_padding_repeated_twice  # type: ignore[assignment]
    if recipe.pad is not Recipe.pad:
        step = RecipePad(recipe, layer)
        return [step], step.left
    if mode != "zeros":
        return [Pad(amounts, mode)], (0,) * len(ones)
    probe = torch.empty(1, layer.in_channels, *ones, device="meta")
    padded, left = recipe.pad(layer, probe)
    return [] if padded is probe else [Pad(amounts, "constant")], tuple(left)


def _smaller(
    layer: DynamicConv, channel: int, computed: Tensor, temporal: int, padding: tuple[int, ...], source: int
) -> nn.Module:
    """A plain convolution of these ranks; for candidate 0 of all channels, with the layer's own parameters."""
    weight, bias = layer.weight, layer.bias
    full = layer.recipe.weight(layer)
    if source and layer.carries is not None:
        there = _in_place(layer.carries.kept(source))
        full, bias = full[there], None if bias is None else _parameter(bias[there], weight)
    elif source:
        full, bias = _absorbed(layer, full, source)
    if channel and layer.cheap_c is not None:
        full, kept_bias = layer.cheap_c.filters(channel, full, bias)
        full = full.index_select(0, computed)
        bias = None if kept_bias is None else _parameter(kept_bias.index_select(0, computed), weight)
        full = full if layer.mixed_in is None else layer.mixed_in.filters(channel, full)
    stride = list(layer.stride)
    if layer.num_frames is None:
        stride[0] *= layer.candidates.strides[temporal]
    groups = layer.groups * len(full) // layer.out_channels if layer.groups > 1 else 1
    conv = _conv_class(layer)(
        full.shape[1] * groups,
        len(full),
        layer.kernel_size,
        tuple(stride),
        padding,
        layer.dilation,
        groups,
        bias=bias is not None,
        device="meta",
    )
    return _filled(conv, weight if full is weight else _parameter(full, weight), bias)


def _absorbed(layer: DynamicConv, weight: Tensor, source: int) -> tuple[Tensor, nn.Parameter]:
    """W_i, its inputs sorted like those that are taken, and b_i."""
    assert layer.cheap_in is not None and layer.reads_from is not None
    kept = layer.reads_from.kept(source)
    weight, bias = layer.cheap_in.filter(source, weight, layer.bias, kept)
    return weight.index_select(1, kept.argsort()), _parameter(bias, layer.weight)


def _filled(conv: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A convolution made without numbers gets them."""
    conv.weight, conv.bias = weight, bias
    return conv


def _conv_class(layer: DynamicConv) -> Callable[..., nn.Module]:
    return nn.Conv3d if isinstance(layer, nn.Conv3d) else nn.Conv2d


# -- Phi_c and Phi_t -----------------------------------------------------------------------------------


def _rebuild(layer: DynamicConv, channel: int, computed: Tensor, dropped: Tensor) -> nn.Module:
    """Phi_c and the way back from ``[computed, dropped]`` to the layer's own channel order."""
    if layer.cheap_c is None or not channel:
        return nn.Identity()
    op, dims, dtype = layer.cheap_c.op(channel), len(layer.stride), layer.weight.dtype
    rows = dropped - len(computed)
    place = _order(layer)[torch.cat([computed, dropped])].argsort()
    index = None if _is_range(place) else place
    if isinstance(op, Nothing):
        return JoinChannels(Zeros(len(dropped), dims), index, dims)
    bias = _parameter(op.bias[rows].to(dtype), op.bias)
    if isinstance(op, Pointwise):
        weight = _parameter(op.weight[rows][:, computed].to(dtype)[(..., *(None,) * dims)], op.weight)
        conv = _conv_class(layer)(len(computed), len(dropped), 1, device="meta")
        return JoinChannels(_filled(conv, weight, bias), index, dims)
    assert isinstance(op, OneSource)
    weight = _parameter(op.weight[rows].to(dtype), op.weight)
    source = computed.argsort()[op.source[rows]]  # among the computed ones as they are sorted now
    if isinstance(op, Depthwise):
        return JoinChannels(_depthwise(layer, weight, bias, source, len(computed)), index, dims)
    sources = torch.cat([torch.arange(len(computed), device=source.device), source])
    return ScaleChannels(weight, bias, sources[place], place, dims)


def _spread(layer: DynamicConv, source: int) -> nn.Module:
    """Channels that are carried, in their places, and zeros in those of the others."""
    assert layer.carries is not None
    kept, dims = layer.carries.kept(source), len(layer.stride)
    absent = torch.ones(layer.out_channels, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    place = torch.cat([_in_place(kept), absent.nonzero().flatten()]).argsort()
    return JoinChannels(Zeros(layer.out_channels - len(kept), dims), place, dims)


def _depthwise(layer: DynamicConv, weight: nn.Parameter, bias: nn.Parameter, source: Tensor, kept: int) -> nn.Module:
    kernel, padding = (3, 3), (1, 1)
    if isinstance(layer, nn.Conv3d):
        weight = nn.Parameter(weight.data.unsqueeze(2), requires_grad=weight.requires_grad)
        kernel, padding = (1, *kernel), (0, *padding)  # type: ignore[assignment]
    count = len(source)
    conv = _conv_class(layer)(count, count, kernel, padding=padding, groups=count, device="meta")
    _filled(conv, weight, bias)
    if count == kept and _is_range(source):
        return conv
    return nn.Sequential(TakeChannels(source, len(layer.stride)), conv)


def _expand(layer: DynamicConv, temporal: int) -> nn.Module | None:
    if layer.cheap_t is None or not temporal:
        return None
    stride, dtype = layer.candidates.strides[temporal], layer.weight.dtype
    weight, bias = layer.cheap_t.weights[temporal - 1], layer.cheap_t.biases[temporal - 1]
    if bool((weight[:, 0] == 1).all()) and not weight[:, 1].any() and not bias.any():
        return RebuildFrames(None, None, stride, layer.num_frames)
    return RebuildFrames(
        _parameter(weight.to(dtype), weight), _parameter(bias.to(dtype), bias), stride, layer.num_frames
    )
