"""Clips in channels-last memory, as the tensors that forms of a convolution take: views of the same memory."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_clips", "as_images", "as_rows", "channels_last", "from_rows", "to_rows"]


def channels_last(x: Tensor) -> Tensor:
    """``x (N, C, ...)`` in channels-last memory, also where sizes of 1 leave the layout open."""
    if x.dim() == 5:  # most are, and looking is faster than asking PyTorch
        _, C, T, H, W = x.shape
        if x.stride() == (C * T * H * W, 1, C * H * W, C * W, C):
            return x
    order = (0, *range(2, x.dim()), 1)
    return x.permute(order).contiguous().permute(0, x.dim() - 1, *range(1, x.dim() - 1))


def to_rows(x: Tensor) -> Tensor:
    """Channels-last ``(N, C, T, H, W)`` as ``(N, T, H, W, C)``: a view."""
    return x.permute(0, 2, 3, 4, 1)


def from_rows(rows: Tensor) -> Tensor:
    """And back: a view."""
    return rows.permute(0, 4, 1, 2, 3)


def as_images(form: str, x: Tensor) -> Tensor:
    """Clips as the tensor that a form convolves: a view."""
    if form == "frames":
        return x.squeeze(2) if x.shape[2] == 1 else to_rows(x).flatten(0, 1).permute(0, 3, 1, 2)
    if form == "line":
        return to_rows(x).flatten(2, 3).permute(0, 3, 1, 2)
    return x


def as_rows(x: Tensor) -> Tensor:
    """Clips as one row per position: a view."""
    return to_rows(x).flatten(0, 3)


def as_clips(form: str, y: Tensor, x: Tensor) -> Tensor:
    """What a form returned for clips x as clips: a view."""
    if form == "frames":
        if x.shape[2] == 1:
            return y.unsqueeze(2)
        return from_rows(y.permute(0, 2, 3, 1).unflatten(0, (*x.shape[:1], -1)))
    if form == "line":
        return from_rows(y.permute(0, 2, 3, 1).unflatten(2, x.shape[3:]))
    return y
