"""What a dynamic convolution must return, written again from DESIGN.md: a full convolution, then plain loops."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from redconvert import DynamicConv2d, DynamicConv3d, LayerConfig
from redconvert.layers import DynamicConv

Spec = dict[str, Any]


# -- layers --------------------------------------------------------------------------------------------


def build(spec: Spec, seed: int = 0) -> tuple[DynamicConv, nn.Module, Tensor]:
    """The dynamic layer that ``spec`` describes, the plain one with its weights, and an input."""
    torch.manual_seed(seed)
    spec = dict(spec)
    dims, shape, dtype = spec.pop("dims"), spec.pop("shape"), spec.pop("dtype", torch.float32)
    dynamic = {key: spec.pop(key) for key in ("config", "gate_frames", "num_frames") if key in spec}
    plain = (nn.Conv3d if dims == 3 else nn.Conv2d)(**spec)
    layer = (DynamicConv3d if dims == 3 else DynamicConv2d)(**spec, **dynamic)
    layer.load_state_dict(plain.state_dict(), strict=False)
    return layer.to(dtype), plain.to(dtype), torch.randn(shape).to(dtype)


def randomize(layer: DynamicConv, *, gates: bool = True, order: bool = True) -> DynamicConv:
    """Cheap operations with any numbers, channels in any order, and gates that differ from sample to sample."""
    with torch.no_grad():
        for parameter in layer.cheap_parameters():
            parameter.normal_()
        if gates:
            nn.init.normal_(layer.gate.fc2.weight)
            layer.gate.beta.zero_()
            layer.gate.norm.running_mean.normal_(std=0.1)
        if layer.cheap_c is not None and order:
            layer.cheap_c.set_order(any_order(layer))
            for op in layer.cheap_c.ops:
                if hasattr(op, "source"):
                    op.source.random_(0, layer.candidates.channels[-1])
                if hasattr(op, "mix"):
                    op.mix.normal_()
                    op.shift.normal_()
    return layer


def any_order(layer: DynamicConv) -> Tensor:
    """A permutation of the channels that keeps groups whole."""
    size = layer.out_channels // layer.groups if layer.groups > 1 else 1
    blocks = torch.arange(layer.out_channels).view(-1, size)
    return blocks[torch.randperm(len(blocks))].flatten()


def open_all(layer: DynamicConv) -> DynamicConv:
    """Gates that open every candidate for every input, each by another amount."""
    with torch.no_grad():
        layer.gate.fc2.weight.uniform_(-1, 1)
        layer.gate.fc2.weight.mul_(0.2 / layer.gate.fc2.weight.abs().sum(1, keepdim=True))
        layer.gate.beta.copy_(torch.linspace(0.4, 0.9, len(layer.gate.beta)))
    return layer


@st.composite
def specs(draw, dims: int | None = None, num_frames: bool = True) -> Spec:
    """Convolutions of every shape that PyTorch takes, with inputs that they take."""
    dims = dims or draw(st.sampled_from([2, 3]))
    groups = draw(st.sampled_from(["one", "one", "two", "depthwise", "multiplier"]))
    if groups == "one":
        count, c_in, c_out = 1, draw(st.integers(1, 13)), draw(st.integers(2, 13))
    elif groups == "two":
        count, c_in, c_out = 2, 2 * draw(st.integers(1, 6)), 2 * draw(st.integers(1, 6))
    else:
        count = c_in = draw(st.integers(2, 7))
        c_out = c_in * (draw(st.integers(2, 3)) if groups == "multiplier" else 1)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    padding: Any = draw(st.sampled_from(["same", "valid", 0, 1, "tuple"]))
    stride = (1,) * dims if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    if padding == "tuple":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    clips, frames = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    size = [draw(st.integers(3, 7)) for _ in range(2)]
    amounts = _amounts(padding, kernel, dilation)
    sizes = ([frames, *size] if dims == 3 else size)[:]
    for axis in range(dims):  # large enough for the kernel, and for what reflects or wraps round
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        room = amounts[axis] + 1 if mode in ("reflect", "circular") else 1
        sizes[axis] = max(sizes[axis], reach - 2 * (amounts[axis] if padding != "same" else 0), room)
    temporal, channel = draw(st.sampled_from([(True, True), (True, True), (True, False), (False, True)]))
    folded = frames if dims == 2 and num_frames and draw(st.booleans()) else None
    if dims == 2 and (folded or 1) == 1:
        channel = True
    gate = draw(st.sampled_from(["hard", "soft"]))
    kinds = ["auto", "pointwise", "depthwise", "scale", *(["principal", "principal"] if gate == "hard" else [])]
    config = LayerConfig(
        search_space=draw(st.integers(2, 3)),
        temporal=temporal,
        channel=channel,
        gate=gate,
        cheap=draw(st.sampled_from(kinds)),
        align=draw(st.sampled_from([1, 1, 2, 4])),
        gate_hidden=8,
    )
    spec: Spec = {
        "dims": dims,
        "shape": (clips * (folded or 1), c_in, *sizes),
        "in_channels": c_in,
        "out_channels": c_out,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": count,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
        "config": config,
    }
    if dims == 3:
        spec["gate_frames"] = draw(st.sampled_from([None, 1, 3]))
    elif folded:
        spec["num_frames"] = folded
    return spec


def _amounts(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    if padding == "valid":
        return [0] * len(kernel)
    if padding == "same":
        return [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return list(padding) if isinstance(padding, tuple) else [padding] * len(kernel)


def is_choice(spec: Spec) -> bool:
    """Whether the layer has anything to decide (one channel, or an alignment that leaves none, has not)."""
    conv = (nn.Conv3d if spec["dims"] == 3 else nn.Conv2d)(
        spec["in_channels"], spec["out_channels"], 1, groups=spec["groups"], device="meta"
    )
    return not DynamicConv.plan_candidates(conv, spec["config"], spec.get("num_frames")).is_static


# -- the reference -------------------------------------------------------------------------------------


def as_clips(layer: DynamicConv, y: Tensor) -> Tensor:
    """``(N, C, T, H, W)`` whatever the layer is."""
    if y.dim() == 5:
        return y
    frames = layer.num_frames or 1
    return torch.stack([y[start : start + frames].transpose(0, 1) for start in range(0, len(y), frames)])


def from_clips(layer: DynamicConv, z: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv3d):
        return z
    return torch.cat([clip.transpose(0, 1) for clip in z])


def phi_c(op: nn.Module, kept: Tensor) -> Tensor:
    """The dropped channels from the kept ones, ``(N, k, T, H, W) -> (N, D, T, H, W)``."""
    kind, bias = type(op).__name__, op.bias[None, :, None, None, None]
    if kind in ("Pointwise", "Principal"):
        return torch.einsum("dk,nkthw->ndthw", op.weight, kept) + bias
    source = torch.stack([kept[:, int(index)] for index in op.source], dim=1)
    if kind == "Scale":
        return op.weight[None, :, None, None, None] * source + bias
    assert kind == "Depthwise"
    padded, (height, width) = F.pad(source, (1, 1, 1, 1)), source.shape[-2:]
    return bias + sum(
        op.weight[None, :, 0, row, column, None, None, None] * padded[..., row : row + height, column : column + width]
        for row in range(3)
        for column in range(3)
    )


def channel_candidate(layer: DynamicConv, y: Tensor, i: int) -> Tensor:
    """Keep the first k_i channels in the layer's order, or mixtures, and rebuild the others; clips in, clips out."""
    if i == 0:
        return y
    order, kept, op = layer.cheap_c.order.tolist(), layer.candidates.channels[i], layer.cheap_c.ops[i - 1]
    computed = y[:, order[:kept]]
    if type(op).__name__ == "Principal":
        computed = torch.einsum("kc,ncthw->nkthw", op.mix, y[:, order]) + op.shift[:, None, None, None]
    rebuilt = phi_c(op, computed)
    columns = {channel: computed[:, rank] for rank, channel in enumerate(order[:kept])}
    columns.update({channel: rebuilt[:, rank] for rank, channel in enumerate(order[kept:])})
    return torch.stack([columns[channel] for channel in range(y.shape[1])], dim=1)


def frame_candidate(layer: DynamicConv, z: Tensor, j: int) -> Tensor:
    """Keep every 2^j-th frame, rebuild the others from the computed frames on both sides; clips in, clips out."""
    if j == 0:
        return z
    total, stride = z.shape[2], 2**j
    weight, bias = layer.cheap_t.weights[j - 1], layer.cheap_t.biases[j - 1]
    frames = []
    for t in range(total):
        left, offset = t - t % stride, t % stride
        right = left + stride if left + stride < total else left
        if offset:
            before, after = weight[offset - 1, 0], weight[offset - 1, 1]
            frame = before[:, None, None] * z[:, :, left] + after[:, None, None] * z[:, :, right]
            frames.append(frame + bias[offset - 1][:, None, None])
        else:
            frames.append(z[:, :, t])
    return torch.stack(frames, dim=2)


def reference(layer: DynamicConv, plain: nn.Module, x: Tensor, i: int, j: int) -> Tensor:
    """What candidate (i, j) returns."""
    y = as_clips(layer, plain(x))
    return from_clips(layer, frame_candidate(layer, channel_candidate(layer, y, i), j))


def soft_reference(layer: DynamicConv, plain: nn.Module, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """``sum_j w_j E_j(sum_i w_i Phi_i(conv(x)))`` with the given weights ``(N, S_c), (N, S_t)``."""
    y = as_clips(layer, plain(x))
    channel, temporal = (w[..., None, None, None, None] for w in weights)
    z = sum(channel[:, i] * channel_candidate(layer, y, i) for i in range(channel.shape[1]))
    out = sum(temporal[:, j] * frame_candidate(layer, z, j) for j in range(temporal.shape[1]))
    return from_clips(layer, out)


def gate_values(layer: DynamicConv, x: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 with the norm's running statistics: ``tanh z`` as channel ``(N, S_c)`` and temporal ``(N, S_t)``."""
    gate, pooled = layer.gate, as_clips(layer, x).mean((-2, -1))
    if pooled.shape[2] != gate.num_frames:
        pooled = F.adaptive_avg_pool1d(pooled, gate.num_frames)
    norm = gate.norm
    hidden = pooled.reshape(len(pooled), -1) @ gate.fc1.weight.T
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    values = torch.tanh(torch.tanh(hidden) @ gate.fc2.weight.T + gate.beta)
    ones = values.new_ones(len(values), 1)
    counts = len(layer.candidates.channels), len(layer.candidates.strides)
    temporal = values[:, : counts[1]] if counts[1] > 1 else ones
    channel = values[:, -counts[0] :] if counts[0] > 1 else ones
    return channel, temporal


def to_weights(values: Tensor, normalize: bool = True) -> Tensor:
    """``V / sum V`` with ``V = max(values, 0)``; the cheapest where all are closed. An axis with one has weight 1."""
    rows = []
    for row in values:
        opened = row.clamp_min(0)
        if opened.sum() == 0:
            opened = torch.zeros_like(row)
            opened[-1] = 1
        elif normalize and len(row) > 1:
            opened = opened / opened.sum()
        rows.append(opened)
    return torch.stack(rows)


def expected(layer: DynamicConv, plain: nn.Module, x: Tensor) -> Tensor:
    """What the layer returns for its own gates."""
    weights = tuple(to_weights(values, layer.config.normalize) for values in gate_values(layer, x))
    if layer.config.gate == "soft":
        return soft_reference(layer, plain, x, weights)
    hard = []
    for w in weights:
        largest = [next(index for index, value in enumerate(row) if value > 0) for row in w]
        hard.append(F.one_hot(torch.tensor(largest), w.shape[1]).to(w.dtype))
    return soft_reference(layer, plain, x, tuple(hard))


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    assert value.shape == wanted.shape and value.dtype == wanted.dtype
    scale = wanted.abs().max().clamp_min(1e-30)
    return float((value - wanted).abs().max() / scale)


@torch.no_grad()
def anything(layer):
    """Any numbers, orders and sources in all that was added to a convolution but its gate."""
    for part in (layer.cheap_c, layer.cheap_t, layer.mixed_in):
        for value in [*part.parameters(), *part.buffers()] if part is not None else ():
            if value.is_floating_point():
                value.normal_()
    layer.cheap_c.set_order(torch.randperm(layer.out_channels))
    for op in layer.cheap_c.ops:
        if hasattr(op, "source"):
            op.source.random_(0, layer.candidates.channels[-1])
    for op in layer.mixed_in.ops if layer.mixed_in is not None else ():
        op.order.copy_(torch.randperm(layer.in_channels))
