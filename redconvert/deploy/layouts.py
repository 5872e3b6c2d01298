"""Clips in channels-last memory, as the tensors that forms of a convolution take: most are views of the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "as_rows",
    "blocked_filter",
    "channels_last",
    "from_rows",
    "in_blocks",
    "to_rows",
    "views",
]

View = Callable[[Tensor], Tensor]


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


def views(form: str, shape: Sequence[int]) -> tuple[View, View]:
    """From clips of this shape to the tensor that a form convolves, and from its result to clips: both are views."""
    N, _, T, H, W = shape
    if form == "frames" and T == 1:
        return lambda x: x.squeeze(2), lambda y: y.unsqueeze(2)
    if form == "frames":
        return (
            lambda x: x.transpose(1, 2).flatten(0, 1),
            lambda y: y.view(N, -1, *y.shape[1:]).transpose(1, 2),
        )
    if form == "line":
        return lambda x: x.flatten(3), lambda y: y.view(*y.shape[:3], H, W)
    return _itself, _itself


def as_rows(x: Tensor) -> Tensor:
    """Clips as one row per position: a view."""
    return to_rows(x).flatten(0, 3)


def _itself(x: Tensor) -> Tensor:
    return x


def in_blocks(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Blocks of ``stride`` positions of ``x (N, C, T, H, W)`` as channels, ``(N, C * prod(stride), ...)``: a copy.

    A convolution over it with `blocked_filter`, of stride 1 and not padded, is the one over x: with ``d = s q + r`` for
    each tap, ``sum_d w_d x_(s o + d) = sum_q sum_r w_(s q + r) x_(s (o + q) + r)``.
    """
    pads: list[int] = []
    for size, k, s, p in reversed(list(zip(x.shape[2:], kernel, stride, padding, strict=True))):
        blocks = (size + 2 * p - k) // s + -(-k // s)
        pads += [p, blocks * s - size - p]
    t, h, w = stride
    x = F.pad(x, pads)
    N, C, T, H, W = x.shape
    parts = x.reshape(N, C, T // t, t, H // h, h, W // w, w).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return from_rows(parts.reshape(N, T // t, H // h, W // w, C * t * h * w))


def blocked_filter(weight: Tensor, stride: Sequence[int]) -> Tensor:
    """``weight (C_out, C_in, kt, kh, kw)`` for `in_blocks`: ``(C_out, C_in * prod(stride), ceil(kt / t), ...)``."""
    pads = [amount for k, s in zip(weight.shape[:1:-1], stride[::-1], strict=True) for amount in (0, -k % s)]
    weight = F.pad(weight, pads)
    t, h, w = stride
    O, C, T, H, W = weight.shape  # noqa: E741
    parts = weight.reshape(O, C, T // t, t, H // h, h, W // w, w).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return parts.reshape(O, C * t * h * w, T // t, H // h, W // w)
