"""What a convolution's padding, stride and dilation do to shapes: shared by the whole and the partial one."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from ..errors import RedconvertError

__all__ = ["check_input", "output_size", "pad_input"]

Conv: TypeAlias = Any  # a Conv2d or Conv3d, or a dynamic one, which shares their attributes


def output_size(conv: Conv, axis: int, size: int) -> int:
    """Output length along spatial or time axis ``axis`` (0 is the first after the channels)."""
    before, after = _padding(conv, axis)
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    return (size + before + after - reach) // conv.stride[axis] + 1


def pad_input(conv: Conv, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with what a convolution cannot pad by itself, and the padding that it can.

    ``padding="same"`` is refused by PyTorch for the strided convolutions that skip frames, so its
    amounts are passed as numbers.
    """
    none = (0,) * len(conv.stride)
    if conv.padding_mode != "zeros":
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), none
    if not isinstance(conv.padding, str):
        return x, conv.padding
    amounts = [_padding(conv, axis) for axis in range(len(conv.stride))]
    if all(before == after for before, after in amounts):
        return x, tuple(before for before, _ in amounts)
    return F.pad(x, conv._reversed_padding_repeated_twice), none


def check_input(conv: Conv, x: Tensor, name: str, num_frames: int | None, pads_itself: bool = True) -> None:
    """Refuse what the convolution cannot take, in words that say which layer and why.

    ``pads_itself`` is False where the class pads in a forward of its own.
    """
    dim, where = len(conv.stride) + 2, f"layer '{name}'"
    if x.dim() != dim or x.shape[1] != conv.in_channels:
        axes = "(N, C, T, H, W)" if dim == 5 else "(N, C, H, W)"
        raise RedconvertError(f"{where} takes {axes} with C = {conv.in_channels}, not {tuple(x.shape)}")
    if x.numel() == 0:
        raise RedconvertError(f"{where} got an empty batch, shape {tuple(x.shape)}: give at least one sample")
    if num_frames is not None and x.shape[0] % num_frames:
        raise RedconvertError(
            f"{where} takes batches of N * {num_frames} frames, and {x.shape[0]} is no multiple: "
            f"pass whole clips, or convert with another num_frames"
        )
    for axis, size in enumerate(x.shape[2:] if pads_itself else ()):
        if output_size(conv, axis, size) < 1:
            what = "frames" if dim == 5 and axis == 0 else "pixels"
            raise RedconvertError(
                f"{where}: {size} {what} on axis {axis + 2} of its input {tuple(x.shape)} are fewer than its kernel "
                f"({conv.kernel_size[axis]}, dilation {conv.dilation[axis]}) and stride need: give "
                f"{'longer clips' if what == 'frames' else 'larger frames'}"
            )


def _padding(conv: Conv, axis: int) -> tuple[int, int]:
    """Amounts before and after; PyTorch keeps them from the last axis to the first."""
    amounts = conv._reversed_padding_repeated_twice
    return amounts[-2 - 2 * axis], amounts[-1 - 2 * axis]
