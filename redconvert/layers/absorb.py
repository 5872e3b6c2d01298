"""Phi_c behind the norm and the activation, absorbed by the one convolution that reads the channels.

A convolution that *hands over* computes k of its C channels and rebuilds none. Its *reader*, behind norm, activation
and pooling, has a weight of its own for each candidate: ``W_i = W[:, kept_i] + D_i`` and ``b_i = b + d_i``. The linear
operation that would rebuild channels costs nothing there, and the reader computes with k input channels instead of C.

Others may *follow*: a depthwise convolution between the two carries the channels that are there, each computed from
itself; and one that reads the channels' means, in squeeze and excitation, does without the others, as the reader does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import RedconvertError
from .gate import matching
from .routing import group_samples, sample_rows, select

if TYPE_CHECKING:
    from .base import DynamicConv
    from .rebuild import ChannelRebuild

__all__ = [
    "ALONE",
    "Absorbed",
    "Choice",
    "Handover",
    "Source",
    "Ties",
    "carry",
    "followers",
    "link",
    "mask_absent",
    "pairs",
    "pooled_static",
    "read_dense",
    "static_source",
    "told",
]

Choice = int | Tensor  # the candidate of all samples, or which are open, (N, S): the largest of them counts


class Source(NamedTuple):
    """What a reader is told of one call: the weights over its source's candidates ``(N, S)``, and which was taken."""

    weights: Tensor
    candidates: list[int]


class Ties(NamedTuple):
    """What a layer shares with others, said when it is made; `link` ties them to each other after.

    Attributes:
        hands_over: it rebuilds no channels.
        reads: how many channels each candidate of the layer computes whose channels this one reads.
        carries: the same, of a depthwise convolution that stands between those two and has all of the channels.
        aside: another one reads the channels, too, and absorbs.
        decides: about its own channels and frames; one that carries decides about frames alone.
    """

    hands_over: bool = False
    reads: Sequence[int] | None = None
    carries: Sequence[int] | None = None
    aside: bool = False
    decides: bool = True


ALONE = Ties()


class Handover:
    """What ties a convolution to its reader: the order of the channels, and what each sample has of them now.

    Both hold the same one. Of a call nothing is copied or saved. What a call left stays until the next one, also
    through passes of the disabled network: activation checkpointing runs a reader again, perhaps without its source.
    """

    def __init__(self, name: str, rebuild: ChannelRebuild) -> None:
        self.name, self.rebuild = name, rebuild
        self.source: Source | None = None
        self.static: tuple[Choice, Tensor | None] | None = None  # what compilers and exporters see: no values

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "source": None, "static": None}

    @property
    def channels(self) -> tuple[int, ...]:
        """How many channels each candidate hands over."""
        return self.rebuild.channels

    def kept(self, index: int) -> Tensor:
        """Which channels candidate ``index`` hands over."""
        return self.rebuild.order[: self.channels[index]]

    def present(self, like: Tensor) -> Tensor:
        """Which channels are there under each candidate, ``(S, C)``: ones and zeros."""
        # Not compared with a tensor of numbers: whoever captures a CUDA graph may copy none to the device.
        return torch.stack([self.rebuild.inverse < kept for kept in self.channels]).to(like.dtype)

    def take(self, num_samples: int, reader: str) -> Source:
        """What the source said of this call."""
        if self.source is None or len(self.source.candidates) != num_samples:
            raise RedconvertError(
                f"layer '{reader}' reads what '{self.name}' computes, which did not run before it on these "
                f"{num_samples} samples: run the whole network, or convert with absorb=False"
            )
        return self.source


class Absorbed(nn.Module):
    """What a reader adds to its weights where channels are missing: D_i ``(C_out, k_i, ...)`` and d_i ``(C_out)``.

    Zero at birth: the reader then does without the channels. `redconvert.calibrate` solves for them.

    Args:
        channels: k_i of the source's candidates, the full one first.
        out_channels, kernel_size: of the reader.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, kernel_size: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        shapes = [(out_channels, kept, *kernel_size) for kept in self.channels[1:]]
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(out_channels)) for _ in shapes)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"

    @torch.no_grad()
    def start(self) -> None:
        """As at birth."""
        for parameter in self.parameters():
            parameter.zero_()

    def filter(self, index: int, weight: Tensor, bias: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
        """W_i and b_i from the reader's weight ``(C_out, C_in, ...)`` and bias."""
        correction, shift = (matching(each[index - 1], weight) for each in (self.weights, self.biases))
        return weight.index_select(1, kept) + correction, shift if bias is None else bias + shift


def link(source: DynamicConv, reader: DynamicConv, followers: Iterable[DynamicConv] = ()) -> None:
    """Let ``source`` hand over its channels to ``reader``, and ``followers`` know of it; all were made for it."""
    assert source.cheap_c is not None
    source.hands_to = reader.reads_from = Handover(source.layer_name, source.cheap_c)
    for layer in followers:
        if layer.aside:
            layer.reads_from = source.hands_to
        else:
            layer.carries = source.hands_to


def pairs(layers: Mapping[str, DynamicConv]) -> dict[str, str]:
    """By name of a layer that hands over, the name of the one that reads, where both are among these."""
    reading = {name: layer for name, layer in layers.items() if layer.reads_from is not None and not layer.aside}
    readers = {layer.reads_from: name for name, layer in reading.items()}
    return {name: readers[layer.hands_to] for name, layer in layers.items() if layer.hands_to in readers}


def followers(layers: Mapping[str, DynamicConv]) -> dict[str, str]:
    """By name of a layer that follows, that of the one that hands over, where both are among these."""
    sources = {layer.hands_to: name for name, layer in layers.items() if layer.hands_to is not None}
    following = {name: layer for name, layer in layers.items() if layer.carries is not None or layer.aside}
    return {name: sources[layer.told_by] for name, layer in following.items() if layer.told_by in sources}


def told(layers: Mapping[str, DynamicConv]) -> dict[str, str]:
    """By name of a layer that reads or follows, that of the one that hands over, where both are among these."""
    return {reader: source for source, reader in pairs(layers).items()} | followers(layers)


def carry(layer: DynamicConv, x: Tensor, source: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What a carrier convolves of candidate ``source``: its channels, their filters and biases, and which they are."""
    assert layer.carries is not None
    there = layer.carries.kept(source)
    bias = None if layer.bias is None else layer.bias.index_select(0, there)
    return select(x, 1, there), layer.recipe.weight(layer).index_select(0, there), bias, there


def mask_absent(pooled: Tensor, handover: Handover, candidates: Sequence[int], frames: int) -> Tensor:
    """A gate reads zeros where channels are missing; ``pooled (rows, C, ...)``, ``frames`` rows per sample."""
    if not any(candidates):
        return pooled
    rows = torch.tensor(candidates, device=pooled.device).repeat_interleave(frames)
    return _masked(pooled, handover.present(pooled)[rows])


def _masked(pooled: Tensor, mask: Tensor) -> Tensor:
    return pooled * mask.view(*mask.shape, *(1,) * (pooled.dim() - 2))


def read_dense(layer: DynamicConv, x: Tensor, source: Source, learned: int = 0) -> Tensor:
    """The reader's full convolution in training: of the channels that each sample has; all gradients are soft.

    Of its own channels those beyond the candidate ``learned`` get no gradient.
    """
    handover, frames = layer.reads_from, layer.frames_per_sample
    assert handover is not None
    # A candidate that no sample takes has weight 0: its value moves the gates, and nothing else.
    taken = (source.weights > 0).any(0).tolist()
    results = []
    for index in range(len(handover.channels)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and taken[index]):
            results.append(layer.whole(x, index, learned))
    return _Taken.apply(source.weights, source.candidates, frames, *results)


class _Taken(torch.autograd.Function):
    """Each sample's own result; the gradient is that of ``sum_i w_i results_i``."""

    @staticmethod
    def forward(ctx, weights: Tensor, candidates: list[int], frames: int, *results: Tensor) -> Tensor:
        ctx.frames = frames
        ctx.save_for_backward(weights, *results)
        out = results[0].clone()
        for index, samples in group_samples(candidates).items():
            if index:
                rows = sample_rows(torch.tensor(samples, device=out.device), frames)
                out[rows] = results[index][rows]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        weights, *results = ctx.saved_tensors
        rows = weights.repeat_interleave(ctx.frames, dim=0).to(gradient.dtype)
        shape = (-1, *(1,) * (gradient.dim() - 1))
        found = [
            gradient * rows[:, index].view(shape) if needed else None
            for index, needed in enumerate(ctx.needs_input_grad[3:])
        ]
        by_weight = None
        if ctx.needs_input_grad[0]:
            dots = torch.stack([(gradient * each).flatten(1).sum(1) for each in results], dim=1)
            by_weight = dots.to(weights.dtype).unflatten(0, (-1, ctx.frames)).sum(1)
        return by_weight, None, None, *found


# -- static shapes -------------------------------------------------------------------------------------


def pooled_static(layer: DynamicConv, x: Tensor) -> Tensor:
    """G(x) for the gate, with zeros where channels are missing, whatever is known of them."""
    pooled = x.mean((-2, -1))
    if layer.told_by is None:
        return pooled
    choice, present = _static(layer)[0], layer.told_by.present(pooled)
    if isinstance(choice, int):
        mask = present[choice : choice + 1]
    else:
        opened = nn.functional.pad((choice[:, :-1] > 0).int(), (0, 1), value=1)  # where none is, the cheapest
        index = opened.argmax(-1)
        mask = present.index_select(0, index)
        if layer.frames_per_sample > 1:
            mask = mask.repeat_interleave(layer.frames_per_sample, dim=0)
    return _masked(pooled, mask)


def static_source(layer: DynamicConv) -> tuple[Choice, Tensor | None]:
    """The candidate that the source hands over, and the weights over all of them where gradients need them."""
    return (0, None) if layer.told_by is None else _static(layer)


def _static(layer: DynamicConv) -> tuple[Choice, Tensor | None]:
    assert layer.told_by is not None
    if layer.told_by.static is None:
        raise RedconvertError(
            f"layer '{layer.layer_name}' reads what '{layer.told_by.name}' computes: compile or export the whole "
            f"network, or convert with absorb=False"
        )
    return layer.told_by.static
