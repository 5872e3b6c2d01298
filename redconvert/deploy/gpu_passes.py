"""The passes of `kernels` on a GPU, each one kernel: Triton's where it is installed and works, else PyTorch's."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "assemble",
    "attempt",
    "bias_residual_relu",
    "fill",
    "gate",
    "max_pool",
    "mix",
    "mixes",
    "row_stride",
    "runs",
]

TYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST = 2**31 - 2**16  # elements that are counted in 32 bits
BLOCK, ROWS, COLUMNS = 1024, 32, 64  # elements, positions and channels of one program
TILE, STEPS, WIDEST = 4096, 8, 64  # of a gate: elements in one step, steps of a program, units of its layers
_broken: set[str] = set()  # kernels that did not compile or run here

Triple = tuple[int, int, int]


def runs(x: Tensor) -> bool:
    """Whether Triton serves tensors like x; it launches on the current device alone."""
    return x.is_cuda and x.dtype in TYPES and _installed() and x.get_device() == torch.cuda.current_device()


def mixes(weight: Tensor) -> bool:
    """Whether `mix` is to compute with Phi_c: tensor cores multiply in half precision."""
    return runs(weight) and weight.dtype != torch.float32 and "mix" not in _broken


def attempt(name: str, function: Callable[..., Tensor], *args: Any) -> Tensor | None:
    """What a function of this module gives; None, and a warning, where its kernel does not run on this machine."""
    if name in _broken:
        return None
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's: PyTorch serves just as well, in more passes
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise
        _broken.add(name)
        warnings.warn(f"the Triton kernel '{name}' does not run here, PyTorch does: {error!r:.500}", stacklevel=2)
        return None


def bias_residual_relu(y: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(y + bias + residual)`` in place of ``y (..., C)``, contiguous; ``bias (C)`` float32, residual like y."""
    from . import triton_passes

    size, channels = y.numel(), y.shape[-1]
    if size >= LARGEST:
        raise ValueError(f"{size} elements in one pass")
    flags = {"BIAS": bias is not None, "RESIDUAL": residual is not None, "RELU": relu}
    launch: Any = triton_passes.bias_residual_relu[(_blocks(size, BLOCK),)]
    launch(y, _or(bias, y), _or(residual, y), y, size, channels, **flags, BLOCK=BLOCK)
    return y


def assemble(
    computed: Tensor,
    rebuilt: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    out: Tensor,
    table: tuple[Tensor, ...],
) -> Tensor:
    """`Assembly` into ``out (N, T, H, W, C_out)``, whose positions may lie apart; table: source, scale, shift."""
    from . import triton_passes

    rows, channels = math.prod(out.shape[:4]), out.shape[-1]
    blocks = _blocks(channels, COLUMNS)
    sizes = (rows, computed.shape[-1], 0 if rebuilt is None else rebuilt.shape[-1], channels, out.stride(3), blocks)
    flags = {"REBUILT": rebuilt is not None, "RESIDUAL": residual is not None, "RELU": relu}
    launch: Any = triton_passes.assemble[(_blocks(rows, ROWS) * blocks,)]
    given = (computed, _or(rebuilt, computed), _or(residual, computed), out)
    launch(*given, *table, *sizes, **flags, BP=ROWS, BC=COLUMNS)
    return out


def mix(computed: Tensor, matrix: Tensor, residual: Tensor | None, relu: bool, out: Tensor, shift: Tensor) -> Tensor:
    """``act(computed @ matrix + shift + residual)`` into ``out (N, T, H, W, C_out)``; ``matrix (k, C_out)``."""
    from . import triton_passes

    rows, kept, channels = math.prod(out.shape[:4]), computed.shape[-1], out.shape[-1]
    wide, deep = (128 if channels > 64 else 64 if channels > 32 else 32), (64 if kept > 32 else 32)
    blocks = _blocks(channels, wide)
    launch: Any = triton_passes.mix[(_blocks(rows, 128) * blocks,)]
    launch(
        computed, matrix, _or(residual, computed), out, shift, rows, kept, channels, out.stride(3), blocks,
        STEPS=_blocks(kept, deep), RESIDUAL=residual is not None, RELU=relu, BP=128, BC=wide, BK=deep,
        num_warps=8 if wide > 64 else 4,
    )  # fmt: skip
    return out


def fill(y: Tensor, weight: Tensor, bias: Tensor, num_frames: int, residual: Tensor | None, relu: bool) -> Tensor:
    """`Filling` of ``y (N, T', H, W, C)``: ``(N, num_frames, H, W, C)``."""
    from . import triton_passes

    N, held, H, W, C = y.shape
    out = y.new_empty(N, num_frames, H, W, C)
    blocks = _blocks(H * W * C, BLOCK)
    launch: Any = triton_passes.fill[(N * held * blocks,)]
    flags = {"R": len(weight), "RESIDUAL": residual is not None, "RELU": relu}
    given = (y, weight, bias, _or(residual, y), out)
    launch(*given, held, num_frames, H * W * C, C, blocks, **flags, BLOCK=BLOCK)
    return out


def max_pool(x: Tensor, kernel: Triple, stride: Triple, before: Triple, sizes: list[int], outside: float) -> Tensor:
    """Max pooling of ``x (N, T, H, W, C)``, contiguous, into frames, rows and columns of these ``sizes``."""
    from . import triton_passes

    C = x.shape[4]
    out = x.new_empty(x.shape[0], *sizes, C)
    rows, blocks = math.prod(out.shape[:4]), _blocks(C, COLUMNS)
    launch: Any = triton_passes.max_pool[(_blocks(rows, ROWS) * blocks,)]
    window = dict(zip(("KT", "KH", "KW"), kernel, strict=True))
    geometry = (*x.shape[1:4], *sizes, *stride, *before, outside, blocks)
    launch(x, out, rows, C, *geometry, **window, BP=ROWS, BC=COLUMNS)
    return out


def row_stride(x: Tensor) -> int | None:
    """Elements from one position of ``x (N, T, H, W, C)`` to the next; None where no number says that."""
    _, T, H, W, C = x.shape
    if x.is_contiguous():  # whatever the strides of sizes of 1
        return C
    step = x.stride(3)
    return step if x.stride() == (T * H * W * step, H * W * step, W * step, step, 1) else None


def gate(x: Tensor, stride: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """`GateLayers` of ``x (N, T, H, W, C)``, whose positions lie ``stride`` elements apart: ``z (N, outs)``.

    In two kernels and without atomics, so that equal inputs give equal decisions.
    """
    from . import triton_passes

    N, T, H, W, C = x.shape
    hidden, outs = w2.shape
    width = min(max(_power(C), 16), 64)
    height = TILE // width
    steps, blocks = min(STEPS, _blocks(H * W, height)), _blocks(C, width)
    splits = _blocks(H * W, steps * height)
    parts, padded = T * splits * blocks, max(_power(hidden), 16)
    sums, z = b2.new_empty(N * parts, padded), b2.new_empty(N, outs)
    launch: Any = triton_passes.gate_sums[(N * parts,)]
    sizes = (T, H * W, C, stride, hidden, splits, blocks)
    launch(x, w1, sums, *sizes, STEPS=steps, HIDDEN=padded, BP=height, BC=width)
    launch = triton_passes.gate_output[(N,)]
    launch(sums, b1, w2, b2, z, parts, hidden, outs, STEPS=_blocks(parts, 64), HIDDEN=padded, OUTS=_power(outs), BP=64)
    return z


def _power(size: int) -> int:
    """The power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for what is not read."""
    return other if tensor is None else tensor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
