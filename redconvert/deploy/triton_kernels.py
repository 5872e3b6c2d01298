"""The two Triton kernels of `triton_conv`. Imported only when asked for: importing this needs triton.

Not yet measured, nor compiled, on a GPU: their numerics are tested with Triton's interpreter on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["convolve", "finish"]


@triton.jit
def convolve(
    x, weight, bias, y, channel, temporal, kept, strides, T, H, W, Ho, Wo, inputs, channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y (N*T, Ho*Wo, C)``, C in rank order: one tile of it, or nothing where the decision drops the tile.

    ``x (N*T, H, W, C_in)``, ``weight (KERNEL^2, C_in, C)``.
    """
    frame = tl.program_id(0).to(tl.int64)
    n, t = frame // T, frame % T
    k = tl.load(kept + tl.load(channel + n))
    every = tl.load(strides + tl.load(temporal + n))
    first = tl.program_id(2) * BC
    if (first >= k) | (t % every != 0):
        return
    p, c = tl.program_id(1) * BP + tl.arange(0, BP), first + tl.arange(0, BC)
    acc = tl.zeros((BP, BC), dtype=tl.float32)
    for tap in range(KERNEL * KERNEL):
        h, w = (p // Wo) * STRIDE - PAD + tap // KERNEL, (p % Wo) * STRIDE - PAD + tap % KERNEL
        inside = (p < Ho * Wo) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        rows = x + ((frame * H + h) * W + w) * inputs
        for start in range(0, inputs, BK):
            ci = start + tl.arange(0, BK)
            a = tl.load(rows[:, None] + ci[None, :], mask=inside[:, None] & (ci < inputs)[None, :], other=0.0)
            taps = weight + (tap * inputs + ci)[:, None] * channels + c[None, :]
            b = tl.load(taps, mask=(ci < inputs)[:, None] & (c < k)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    acc += tl.load(bias + c, mask=c < k, other=0.0)[None, :]
    to = y + (frame * Ho * Wo + p)[:, None] * channels + c[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=(p < Ho * Wo)[:, None] & (c < k)[None, :])


@triton.jit
def all_channels(y, frame, p, c, k, i, source, slope, offset, dense, mixed, positions, channels,
                 DENSE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Ranks c of a computed frame, ``(BP, BC)``: as computed, or Phi_c of the first k ranks."""
    rows = y + (frame * positions + p) * channels
    valid = (p < positions)[:, None]
    one = (c < channels) & ((c < k) | (mixed == 0))
    from_ = tl.load(source + i * channels + c, mask=c < channels, other=0)
    value = tl.load(rows[:, None] + from_[None, :], mask=valid & one[None, :], other=0.0).to(tl.float32)
    value *= tl.load(slope + i * channels + c, mask=c < channels, other=0.0)[None, :]
    if DENSE:  # noqa: SIM102 - known when compiled, unlike the next
        if mixed != 0:
            for start in range(0, k, BK):
                ranks = start + tl.arange(0, BK)
                a = tl.load(rows[:, None] + ranks[None, :], mask=valid & (ranks < k)[None, :], other=0.0)
                table = dense + (i * channels + ranks)[:, None] * channels + c[None, :]
                mask = (ranks < k)[:, None] & ((c >= k) & (c < channels))[None, :]
                b = tl.load(table, mask=mask, other=0.0)
                value += tl.dot(a, b.to(a.dtype), input_precision="ieee")
    return value + tl.load(offset + i * channels + c, mask=c < channels, other=0.0)[None, :]


@triton.jit
def finish(
    y, out, residual, channel, temporal, kept, strides, source, slope, offset, dense, mixed, blend, blend_bias,
    order, scale, shift, T, positions, channels, longest,
    DENSE: tl.constexpr, BLEND: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out (N*T, positions, C)`` in the layer's own order: Phi_c, Phi_t, norm, residual, ReLU of one tile."""
    frame = tl.program_id(0).to(tl.int64)
    n, t = frame // T, frame % T
    i, j = tl.load(channel + n), tl.load(temporal + n)
    k, every, rebuilds = tl.load(kept + i), tl.load(strides + j), tl.load(mixed + i)
    p, c = tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2) * BC + tl.arange(0, BC)
    here = t // every * every
    value = all_channels(y, n * T + here, p, c, k, i, source, slope, offset, dense, rebuilds, positions, channels,
                         DENSE, BP, BC, BK)  # fmt: skip
    if BLEND:  # noqa: SIM102 - known when compiled, unlike the next
        if t != here:
            last = (T - 1) // every * every
            then = tl.minimum(here + every, last)
            follower = all_channels(y, n * T + then, p, c, k, i, source, slope, offset, dense, rebuilds, positions,
                                    channels, DENSE, BP, BC, BK)  # fmt: skip
            row = j * longest + t - here
            w0 = tl.load(blend + row * 2 * channels + c, mask=c < channels, other=0.0)
            w1 = tl.load(blend + (row * 2 + 1) * channels + c, mask=c < channels, other=0.0)
            b = tl.load(blend_bias + row * channels + c, mask=c < channels, other=0.0)
            value = w0[None, :] * value + w1[None, :] * follower + b[None, :]
    inside = (p < positions)[:, None] & (c < channels)[None, :]
    value = value * tl.load(scale + c, mask=c < channels, other=0.0)[None, :]
    value += tl.load(shift + c, mask=c < channels, other=0.0)[None, :]
    place = tl.load(order + c, mask=c < channels, other=0)
    to = (frame * positions + p)[:, None] * channels + place[None, :]
    if RESIDUAL:
        value += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(out + to, value.to(out.dtype.element_ty), mask=inside)
