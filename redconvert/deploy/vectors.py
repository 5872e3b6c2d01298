"""Passes that vectors.c does in float32, and their twins in PyTorch: depthwise convolution, a product per channel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import Triple, compiled, contiguous, pool_into
from .tape import launch

__all__ = ["ACTIVATIONS", "CODES", "depthwise", "rescale", "runs_in_c"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu_,
    "relu6": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "swish": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
}
CODES = {"none": 0, "relu": 1, "swish": 2, "relu6": 3, "hardswish": 4}  # activations that vectors.c knows
LANES, PERIOD = 16, 16384  # as in vectors.c


def runs_in_c(like: Tensor, channels: int) -> bool:
    """Whether these functions run in C for so many channels of this dtype and device, or pass after pass in PyTorch."""
    fits = like.device.type == "cpu" and like.dtype == torch.float32 and LANES <= channels <= PERIOD // LANES
    return fits and compiled() is not None


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Triple,
    padding: Triple,
    activation: str = "none",
    pooled: Tensor | None = None,
) -> Tensor:
    """``act(conv(x) + bias)``, one filter per channel: ``x (N, C, T, H, W)`` -> ``(N, C, T_o, H_o, W_o)``.

    Both in channels-last memory; ``weight (kt, kh, kw, C)`` contiguous; ``activation`` one of CODES. ``pooled
    (N, T_o, C)``, zeros, takes the mean of the result over H and W.
    """
    library = compiled() if runs_in_c(x, x.shape[1]) else None
    rows, kernel = x.permute(0, 2, 3, 4, 1), tuple(weight.shape[:3])
    if library is None:
        y = F.conv3d(x, weight.permute(3, 0, 1, 2).unsqueeze(1), bias, stride, padding, groups=x.shape[1])
        out = pool_into(pooled, ACTIVATIONS[activation](y).permute(0, 2, 3, 4, 1).contiguous())
    else:
        geometry = zip(x.shape[2:], kernel, stride, padding, strict=True)
        sizes = [(n + 2 * p - k) // s + 1 for n, k, s, p in geometry]
        out = x.new_empty(len(x), *sizes, x.shape[1])
        shapes, window = (ctypes.c_int64 * 7)(*rows.shape[:4], *sizes), (ctypes.c_int64 * 9)(*kernel, *stride, *padding)
        inputs = (*contiguous(rows), shapes, window, *contiguous(weight, bias))
        sums = None if pooled is None else out.new_empty(*out.shape[:3], out.shape[4])
        launch(library.depthwise_f32, *inputs, CODES[activation], x.shape[1], *contiguous(out, sums, pooled))
    return out.permute(0, 4, 1, 2, 3)


def rescale(x: Tensor, scale: Tensor, activation: str, overwrite: bool = False, pooled: Tensor | None = None) -> Tensor:
    """``act(x * scale)`` for ``x (N, C, T, H, W)`` in channels-last memory and ``scale`` of as many numbers as N * C.

    ``activation`` is one of CODES; ``overwrite``: the result takes the place of x. ``pooled`` as in `depthwise`.
    """
    library = compiled() if runs_in_c(x, x.shape[1]) else None
    rows, by = x.permute(0, 2, 3, 4, 1), scale.reshape(len(x), 1, 1, 1, -1)
    if library is None:
        out = pool_into(pooled, ACTIVATIONS[activation](rows * by))
    else:
        N, T, H, W, C = rows.shape
        out = rows if overwrite else torch.empty_like(rows)
        sizes = N, T, H * W, C
        launch(library.rescale_f32, *contiguous(rows, by), CODES[activation], *sizes, *contiguous(out, pooled))
    return out.permute(0, 4, 1, 2, 3)
