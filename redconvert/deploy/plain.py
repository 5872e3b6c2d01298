"""What a baked convolution consists of: plain modules whose graph is the same for every input.

A reduced candidate is ``take -> conv -> rebuild -> expand``: the frames and channels that the smaller convolution
reads, the convolution itself, Phi_c with the channel order, Phi_t. Every step can be scripted into a graph: shapes
decide nothing but how many frames are rebuilt. Functions that look at the memory layout are opaque to ``torch.fx``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import wrap
from torch.nn import functional as F

from ..errors import RedconvertError
from ..layers.routing import memory_format, select

__all__ = [
    "FrozenConv",
    "JoinChannels",
    "MixChannels",
    "Pad",
    "RebuildFrames",
    "RecipePad",
    "ScaleChannels",
    "TakeChannels",
    "TakeFrames",
    "Zeros",
]


class FrozenConv(nn.Module):
    """One reduced candidate of a dynamic convolution, baked by `redconvert.freeze`.

    ``(N, C_in, T, H, W) -> (N, C_out, T_o, H_o, W_o)``, or the same without T, like the convolution that it was. It
    keeps that one's hooks, train flag and attributes (``in_channels``, ``stride``, ...), which describe the whole.

    Attributes:
        take: what ``conv`` reads of the input.
        conv: a smaller ``nn.Conv2d`` or ``nn.Conv3d``, ``k`` channels at every R-th frame.
        rebuild: Phi_c and the channel order, ``k -> C_out`` channels.
        expand: Phi_t, or None where every frame is computed.
        candidate: the (channel, temporal) indices that were baked.
    """

    take: nn.Module
    conv: nn.Conv2d | nn.Conv3d
    rebuild: nn.Module
    expand: RebuildFrames | None
    candidate: tuple[int, int]

    @property
    def weight(self) -> Tensor:
        """The filters that are left, for code that asks a convolution for its dtype or device."""
        return self.conv.weight

    def extra_repr(self) -> str:
        return f"candidate={self.candidate}"

    def forward(self, input: Tensor) -> Tensor:
        x = self.take(input)
        y = self.rebuild(self.conv(x))
        if self.expand is None:
            return y
        return self.expand(y, self.expand.frames_of(x, self.conv))


# -- what the convolution reads ------------------------------------------------------------------------


class TakeFrames(nn.Module):
    """Every ``stride``-th of the ``num_frames`` frames per clip that are folded into the batch."""

    def __init__(self, num_frames: int, stride: int) -> None:
        super().__init__()
        self.num_frames, self.stride = num_frames, stride

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        return take_frames(x, self.num_frames, self.stride)


class TakeChannels(nn.Module):
    """The channels ``index`` of a ``dims``-dimensional convolution's input or output."""

    index: Tensor

    def __init__(self, index: Tensor, dims: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return take_channels(x, self.index, self.dims)


class MixChannels(nn.Module):
    """The channels ``kept`` with what ``conv``, a 1x1 convolution, makes of the channels ``dropped`` added to them."""

    kept: Tensor
    dropped: Tensor

    def __init__(self, kept: Tensor, dropped: Tensor, conv: nn.Module, dims: int) -> None:
        super().__init__()
        self.register_buffer("kept", kept.clone())
        self.register_buffer("dropped", dropped.clone())
        self.conv, self.dims = conv, dims

    def forward(self, x: Tensor) -> Tensor:
        return take_channels(x, self.kept, self.dims) + self.conv(take_channels(x, self.dropped, self.dims))


class Pad(nn.Module):
    """``F.pad`` by constant amounts: what a convolution cannot pad by itself."""

    def __init__(self, amounts: list[int], mode: str) -> None:
        super().__init__()
        self.amounts, self.mode = list(amounts), mode

    def extra_repr(self) -> str:
        return f"{self.amounts}, mode={self.mode!r}"

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts, mode=self.mode)


class RecipePad(nn.Module):
    """The padding of a class with a forward of its own, by its `redconvert.Recipe`.

    ``left``, the padding that the recipe leaves to the convolution, must not depend on the input.
    """

    def __init__(self, recipe: Any, conv: Any) -> None:
        super().__init__()
        self.recipe = recipe
        self.geometry = SimpleNamespace(**{k: v for k, v in vars(conv).items() if _is_geometry(v)})
        sizes = [2 * d * k + s for d, k, s in zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)]
        probe = torch.empty(1, conv.in_channels, *sizes, device="meta")
        self.left = tuple(recipe.pad(self.geometry, probe)[1])

    def forward(self, x: Tensor) -> Tensor:
        x, left = self.recipe.pad(self.geometry, x)
        if tuple(left) != self.left:
            raise RedconvertError(
                f"{self.recipe.__name__}.pad leaves {tuple(left)} to the convolution here and {self.left} elsewhere: a "
                f"frozen convolution needs a recipe that pads with F.pad whatever depends on the input"
            )
        return x


def _is_geometry(value: Any) -> bool:
    return isinstance(value, int | float | str | tuple | list)


# -- Phi_c ---------------------------------------------------------------------------------------------


class JoinChannels(nn.Module):
    """``[y, op(y)]`` in the layer's own channel order: ``index (C_out)`` into them, None where they are in it."""

    index: Tensor | None

    def __init__(self, op: nn.Module, index: Tensor | None, dims: int) -> None:
        super().__init__()
        self.op, self.dims = op, dims
        self.register_buffer("index", index)

    def forward(self, y: Tensor) -> Tensor:
        joined = torch.cat([y, self.op(y)], dim=-1 - self.dims)
        return joined if self.index is None else take_channels(joined, self.index, self.dims)


class Zeros(nn.Module):
    """As many channels of zeros: those that nobody reads."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.channels, self.dims = channels, dims

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def forward(self, y: Tensor) -> Tensor:
        return y.new_zeros((*y.shape[: -1 - self.dims], self.channels, *y.shape[-self.dims :]))


class ScaleChannels(nn.Module):
    """Phi_c of one scaled source channel each, and the order, in one gather and one multiply-add.

    Output channel c is ``scale_c * y[source_c] + shift_c``; computed channels have scale 1 and shift 0, and those that
    are rebuilt have ``weight (D)`` and ``bias (D)``.

    Args:
        source: ``(C_out)``, which computed channel each output channel reads.
        place: ``(C_out)``, each output channel's index into ``[computed, rebuilt]``.
    """

    source: Tensor
    place: Tensor

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, source: Tensor, place: Tensor, dims: int) -> None:
        super().__init__()
        self.weight, self.bias, self.dims = weight, bias, dims
        self.kept = len(source) - len(weight)
        self.register_buffer("source", source)
        self.register_buffer("place", place)

    def forward(self, y: Tensor) -> Tensor:
        shape = (-1, *(1,) * self.dims)
        scale = torch.cat([self.weight.new_ones(self.kept), self.weight]).index_select(0, self.place)
        shift = torch.cat([self.bias.new_zeros(self.kept), self.bias]).index_select(0, self.place)
        picked = take_channels(y, self.source, self.dims)
        return torch.addcmul(shift.to(y.dtype).view(shape), picked, scale.to(y.dtype).view(shape))


# -- Phi_t ---------------------------------------------------------------------------------------------


class RebuildFrames(nn.Module):
    """Phi_t: the dropped frames from the computed ones on both sides, see `redconvert.layers.FrameRebuild`.

    Args:
        weight: ``(R - 1, 2, C)``; None where dropped frames are copies of the one before.
        bias: ``(R - 1, C)``, or None likewise.
        stride: R.
        num_frames: frames per clip that are folded into the batch; None where the convolution is 3D.
    """

    def __init__(
        self, weight: nn.Parameter | None, bias: nn.Parameter | None, stride: int, num_frames: int | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.stride, self.num_frames = stride, num_frames

    def extra_repr(self) -> str:
        kind = "copies" if self.weight is None else "from both sides"
        return f"stride={self.stride}, {kind}" + (f", num_frames={self.num_frames}" if self.num_frames else "")

    def frames_of(self, x: Tensor, conv: Any) -> Any:
        """How many frames the whole convolution has for ``x``, the smaller one's input: an int or a symbol."""
        if self.num_frames is not None:
            return self.num_frames
        reach = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
        return (x.shape[-3] + 2 * conv.padding[0] - reach) // (conv.stride[0] // self.stride) + 1

    def forward(self, y: Tensor, num_frames: Any) -> Tensor:
        return rebuild_frames(y, self.weight, self.bias, self.stride, num_frames, self.num_frames is not None)


# -- functions that look at the memory layout ----------------------------------------------------------


@wrap
def take_channels(x: Tensor, index: Tensor, dims: int) -> Tensor:
    """``x.index_select`` over the channels, in the layout of ``x``; without a batch axis too.

    In graphs over flattened rows: a permutation right behind a concatenation of two convolutions is folded into
    the next convolution by OpenVINO 2026.4, wrongly.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return x.flatten(-2).index_select(-dims, index).unflatten(-1, x.shape[-2:])
    if x.dim() == dims + 2:
        return select(x, 1, index)
    return x.index_select(-1 - dims, index)


@wrap
def take_frames(x: Tensor, num_frames: int, stride: int) -> Tensor:
    """``(N * num_frames, C, H, W) -> (N * ceil(num_frames / stride), C, H, W)``, in the layout of ``x``."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced and (x.dim() != 4 or x.shape[0] % num_frames):
        raise RedconvertError(
            f"a frozen layer takes batches (N * {num_frames}, C, H, W) of whole clips, not {tuple(x.shape)}"
        )
    if num_frames % stride == 0:
        return x[::stride]  # nothing is copied
    last = _is_channels_last(x)
    rows = x.movedim(1, -1) if last else x
    rows = rows.unflatten(0, (-1, num_frames))[:, ::stride].flatten(0, 1)
    return rows.movedim(-1, 1) if last else rows


@wrap
def rebuild_frames(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, stride: int, num_frames: Any, folded: bool
) -> Tensor:
    """Computed frames and what Phi_t makes of them, in turn: ``num_frames`` per clip, in the layout of ``y``.

    Frame ``s + d`` is ``weight[d-1, 0] * y_s + weight[d-1, 1] * y_(s+R) + bias[d-1]``; the last group reads y_s twice.
    """
    if isinstance(num_frames, torch.SymInt):
        return _gathered_frames(y, weight, bias, stride, num_frames)
    last = _is_channels_last(y)
    if folded:
        y = y.unflatten(0, (-1, -(-num_frames // stride)))
    channel, time = (-3, -4) if folded else (-4, -3)
    if last:  # (..., T, H, W, C), contiguous
        y, time = y.movedim(channel, -1), -4
    frames = [y] * stride
    if weight is not None and bias is not None:
        frames = [y, *_rebuilt(y, weight.to(y.dtype), bias.to(y.dtype), time, -1 if last else channel)]
    out = torch.stack(frames, dim=time).flatten(time - 1, time)
    out = _in_time(out, time, slice(num_frames))  # the last group may be shorter
    out = out.flatten(0, 1) if folded else out
    return out.movedim(-1, channel) if last else out


def _in_time(y: Tensor, time: int, frames: slice) -> Tensor:
    return y[..., frames, :, :] if time == -3 else y[..., frames, :, :, :]


def _rebuilt(y: Tensor, weight: Tensor, bias: Tensor, time: int, channel: int) -> list[Tensor]:
    following = torch.cat([_in_time(y, time, slice(1, None)), _in_time(y, time, slice(-1, None))], dim=time)
    shape = (-1, *(1,) * (-1 - channel))
    return [
        torch.addcmul(torch.addcmul(b.view(shape), y, w[0].view(shape)), following, w[1].view(shape))
        for w, b in zip(weight.unbind(0), bias.unbind(0), strict=True)
    ]


def _gathered_frames(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, stride: int, num_frames: torch.SymInt
) -> Tensor:
    """The same for clips of a length that an exported graph leaves open: no slice whose bound has to be proved."""
    frame = torch.arange(num_frames, device=y.device)
    left, offset = frame // stride, frame % stride
    out = y.index_select(-3, left)
    if weight is None or bias is None:
        return out
    right = y.index_select(-3, (left + 1).clamp(max=y.shape[-3] - 1))
    copied = torch.stack([torch.ones_like(bias[0]), torch.zeros_like(bias[0])])  # of what was computed
    weight = torch.cat([copied[None], weight]).to(y.dtype).index_select(0, offset)  # (T, 2, C)
    bias = torch.cat([copied[1:], bias]).to(y.dtype).index_select(0, offset)
    from_left, from_right, shift = (w.T[..., None, None] for w in (weight[:, 0], weight[:, 1], bias))
    return torch.addcmul(torch.addcmul(shift, out, from_left), right, from_right)


def _is_channels_last(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and memory_format(x) != torch.contiguous_format
