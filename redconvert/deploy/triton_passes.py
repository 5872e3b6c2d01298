"""Passes over memory on a GPU, in Triton. Imported only when asked for: importing this needs triton.

What is read is float16, bfloat16 or float32, what is summed float32. Channels lie side by side in memory, so a clip
is a matrix of positions times channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["assemble", "bias_residual_relu", "fill", "gate_output", "gate_sums", "max_pool", "mix"]


@triton.jit
def finished(value, residual, at, mask, RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    """``act(value + residual)``; NaN stays NaN, as in PyTorch."""
    if RESIDUAL:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)
    return value


@triton.jit
def bias_residual_relu(
    y, bias, residual, out, size, channels,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = act(y + bias + residual)``, element by element: rows need not begin at even addresses."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    value = tl.load(y + i, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + i % channels, mask=inside, other=0.0)
    value = finished(value, residual, i, inside, RESIDUAL, RELU)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def assemble(
    computed, rebuilt, residual, out, source, scale, shift, rows, kept, dropped, channels, out_stride, blocks,
    REBUILT: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``out[p, c] = act(scale[c] * in[p, source[c]] + shift[c] + residual[p, c])``, ``in = [computed, rebuilt]``.

    Blocks of channels of the same rows follow each other, so that those are read once from memory.
    """
    p = (tl.program_id(0) // blocks).to(tl.int64) * BP + tl.arange(0, BP)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    known, here = c < channels, (p < rows)[:, None]
    s = tl.load(source + c, mask=known, other=0)
    is_kept = here & (known & (s < kept))[None, :]
    value = tl.load(computed + p[:, None] * kept + s[None, :], mask=is_kept, other=0.0).to(tl.float32)
    if REBUILT:
        is_rebuilt = here & (known & (s >= kept))[None, :]
        value += tl.load(rebuilt + p[:, None] * dropped + (s - kept)[None, :], mask=is_rebuilt, other=0.0).to(
            tl.float32
        )
    value *= tl.load(scale + c, mask=known, other=0.0)[None, :]
    value += tl.load(shift + c, mask=known, other=0.0)[None, :]
    inside = here & known[None, :]
    value = finished(value, residual, p[:, None] * channels + c[None, :], inside, RESIDUAL, RELU)
    tl.store(out + p[:, None] * out_stride + c[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def mix(
    computed, matrix, residual, out, shift, rows, kept, channels, out_stride, blocks,
    STEPS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out = act(computed @ matrix + shift + residual)``: channel order, norm and Phi_c are all in the matrix."""
    p = (tl.program_id(0) // blocks).to(tl.int64) * BP + tl.arange(0, BP)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    known, here = c < channels, (p < rows)[:, None]
    value = tl.zeros((BP, BC), dtype=tl.float32)
    for step in range(STEPS):
        k = step * BK + tl.arange(0, BK)
        a = tl.load(computed + p[:, None] * kept + k[None, :], mask=here & (k < kept)[None, :], other=0.0)
        table = matrix + k[:, None] * channels + c[None, :]
        b = tl.load(table, mask=(k < kept)[:, None] & known[None, :], other=0.0)
        value = tl.dot(a, b, value)
    value += tl.load(shift + c, mask=known, other=0.0)[None, :]
    inside = here & known[None, :]
    value = finished(value, residual, p[:, None] * channels + c[None, :], inside, RESIDUAL, RELU)
    tl.store(out + p[:, None] * out_stride + c[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def fill(
    y, weight, bias, residual, out, held, frames, size, channels, blocks,
    R: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The R frames that come from a computed one and its follower (Phi_t); ``size`` is that of a frame, H W C."""
    frame = tl.program_id(0) // blocks
    n, s = frame // held, frame % held
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside, c = i < size, i % channels
    following = tl.minimum(s + 1, held - 1) - s
    one = tl.load(y + frame.to(tl.int64) * size + i, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(y + (frame + following).to(tl.int64) * size + i, mask=inside, other=0.0).to(tl.float32)
    for d in tl.static_range(R):
        here = inside & (s * R + d < frames)
        first = tl.load(weight + 2 * d * channels + c, mask=inside, other=0.0)
        second = tl.load(weight + (2 * d + 1) * channels + c, mask=inside, other=0.0)
        value = first * one + second * two + tl.load(bias + d * channels + c, mask=inside, other=0.0)
        at = (n * frames + s * R + d).to(tl.int64) * size + i
        value = finished(value, residual, at, here, RESIDUAL, RELU)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def max_pool(
    x, out, rows, channels, T, H, W, To, Ho, Wo, st, sh, sw, pt, ph, pw, outside, blocks,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The largest of every window; positions beyond the edge count as ``outside``."""
    p = (tl.program_id(0) // blocks) * BP + tl.arange(0, BP)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    inside = (p < rows)[:, None] & (c < channels)[None, :]
    w, h, t, n = p % Wo, p // Wo % Ho, p // (Wo * Ho) % To, p // (Wo * Ho * To)
    best = tl.full((BP, BC), float("-inf"), dtype=tl.float32)
    for tap in range(KT * KH * KW):
        ti = t * st - pt + tap // (KH * KW)
        hi = h * sh - ph + tap // KW % KH
        wi = w * sw - pw + tap % KW
        there = (ti >= 0) & (ti < T) & (hi >= 0) & (hi < H) & (wi >= 0) & (wi < W)
        at = (((n * T + ti) * H + hi) * W + wi).to(tl.int64) * channels
        value = tl.load(x + at[:, None] + c[None, :], mask=inside & there[:, None], other=0.0).to(tl.float32)
        value = tl.where(there[:, None], value, outside)
        best = tl.where((value > best) | (value != value), value, best)
    to = out + p.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(to, best.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_sums(
    x, w1, sums, T, positions, channels, stride, hidden, splits, blocks,
    STEPS: tl.constexpr, HIDDEN: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What a part of a frame, some positions and channels, adds to the gate's hidden layer: one row of ``sums``."""
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks % splits
    frame = tl.program_id(0) // blocks // splits
    c, h = block * BC + tl.arange(0, BC), tl.arange(0, HIDDEN)
    rows = x + frame.to(tl.int64) * positions * stride
    total = tl.zeros((BP, BC), dtype=tl.float32)
    for step in range(STEPS):
        p = (split * STEPS + step) * BP + tl.arange(0, BP)
        inside = (p < positions)[:, None] & (c < channels)[None, :]
        total += tl.load(rows + p[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / positions
    table = w1 + ((frame % T) * channels + c)[:, None] * hidden + h[None, :]
    weight = tl.load(table, mask=(c < channels)[:, None] & (h < hidden)[None, :], other=0.0)
    tl.store(sums + tl.program_id(0) * HIDDEN + h, tl.sum(mean[:, None] * weight, axis=0))


@triton.jit
def gate_output(
    sums, b1, w2, b2, z, parts, hidden, outs,
    STEPS: tl.constexpr, HIDDEN: tl.constexpr, OUTS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """``z = tanh(sum(sums) + b1) w2 + b2`` of one sample, in an order that never changes."""
    n, h, o = tl.program_id(0), tl.arange(0, HIDDEN), tl.arange(0, OUTS)
    total = tl.zeros((BP, HIDDEN), dtype=tl.float32)
    for step in range(STEPS):
        p = step * BP + tl.arange(0, BP)
        total += tl.load(sums + (n * parts + p)[:, None] * HIDDEN + h[None, :], mask=(p < parts)[:, None], other=0.0)
    value = tl.sum(total, axis=0) + tl.load(b1 + h, mask=h < hidden, other=0.0)
    value = 1 - 2 / (tl.exp(2 * value) + 1)  # tanh
    table = w2 + h[:, None] * outs + o[None, :]
    weight = tl.load(table, mask=(h < hidden)[:, None] & (o < outs)[None, :], other=0.0)
    found = tl.sum(value[:, None] * weight, axis=0) + tl.load(b2 + o, mask=o < outs, other=0.0)
    tl.store(z + n * outs + o, found, mask=o < outs)
