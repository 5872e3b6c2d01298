"""A batch of mixed decisions in two Triton kernels that read the decisions on the device.

The host never waits for a decision, so a CUDA graph can capture the whole. Tiles that a decision drops return at
once. Not yet measured on a GPU, and off by default: numerics are tested on a CPU with Triton's interpreter, in
float32 and float16; bfloat16 is refused (it came out wrong in the interpreter, for a reason not yet found).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RedconvertError, require
from ..layers.cheap import Pointwise, Scale
from .pack import from_rows, to_rows
from .unit import Unit

__all__ = ["TritonUnit", "device_decisions", "serves"]

TILE = {"BP": 32, "BC": 32, "BK": 32}  # positions, channels, depth of a product: not tuned
TYPES = (torch.float32, torch.float16)


def serves(unit: Unit) -> bool:
    """Whether `TritonUnit` computes what this unit does: dynamic 1x1x1 or 1x3x3, without groups or dilation."""
    f, layer = unit.filter, unit.layer
    if unit.decider is None or unit.dim != 3 or f.groups != 1 or unit.activation not in ("relu", "none"):
        return False
    geometry = f.kernel in ((1, 1, 1), (1, 3, 3)) and f.stride[0] == 1 and f.padding[0] == 0
    square = f.stride[1] == f.stride[2] and f.padding[1] == f.padding[2] and f.dilation == (1, 1, 1)
    ops = [layer.cheap_c.op(i) for i in range(1, len(layer.candidates.channels))]
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
    reads_all = layer.mixed_in is None
    return geometry and square and zeros and reads_all and all(type(op) in (Pointwise, Scale) for op in ops)


def device_decisions(z: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Channel and temporal candidates ``(N)``, int64, of ``z (N, S_t + S_c)``: the first with z > 0, else the last.

    ``split`` is S_t, 0 where only channels are decided. The host does not wait.
    """

    def first_open(part: Tensor) -> Tensor:
        if part.shape[1] == 0:
            return torch.zeros(len(part), dtype=torch.int64, device=part.device)
        is_open = (part > 0).to(torch.int32)
        is_open[:, -1] = 1
        return is_open.argmax(1)

    return first_open(z[:, split:]), first_open(z[:, :split])


@dataclass(frozen=True)
class Tables:
    """What every candidate needs, on the device, channels in rank order; S candidates, R the largest frame stride."""

    weight: Tensor  # (taps, C_in, C)
    bias: Tensor  # (C)
    kept: Tensor  # (S_c), int32
    strides: Tensor  # (S_t), int32
    source: Tensor  # (S_c, C), int32: of one-source channels
    slope: Tensor  # (S_c, C)
    offset: Tensor  # (S_c, C)
    dense: Tensor  # (S_c, C, C): pointwise, from rank to rank; one number where no candidate is
    mixed: Tensor  # (S_c), int32: 1 for pointwise
    blend: Tensor  # (S_t, R, 2, C)
    blend_bias: Tensor  # (S_t, R, C)
    order: Tensor  # (C), int32
    scale: Tensor  # (C)
    shift: Tensor  # (C)
    pointwise: bool
    blends: bool


class TritonUnit:
    """`Unit.run` for mixed decisions that stay on the device; weights are read when this is made.

    Raises:
        RedconvertError: the unit is not one that `serves` names.
        MissingExtraError: triton is not installed.
    """

    def __init__(self, unit: Unit) -> None:
        if not serves(unit):
            raise RedconvertError(
                f"Triton kernels do not compute {unit.layer}: they serve dynamic 1x1x1 and 1x3x3 Conv3d layers with "
                "pointwise or scale operations. Ask serves(unit) first, and use the unit itself otherwise."
            )
        require("triton", "gpu", "A convolution that reads decisions on the device")
        self.unit, self.tables = unit, _tables(unit)

    def __call__(
        self, x: Tensor, channel: Tensor, temporal: Tensor, residual: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``x (N, C_in, T, H, W)``, ``channel`` and ``temporal (N)`` on its device -> ``(N, C, T, Ho, Wo)``.

        ``scratch (N, T, Ho, Wo, C)``, of x's type: takes what is computed, in rank order, and no more.
        """
        from . import triton_kernels as kernels

        if x.dtype not in TYPES:
            raise RedconvertError(f"Triton kernels take float32 and float16, not {x.dtype}: convert the clip")
        shape = self.unit._output_shape(x.shape)
        N, C, T, Ho, Wo = shape
        if residual is not None and residual.shape != shape:
            raise RedconvertError(
                f"the residual is {tuple(residual.shape)}, the output {tuple(shape)}: make them alike"
            )
        t, f, rows = self.tables, self.unit.filter, to_rows(x).contiguous()
        y = rows.new_empty(N, T, Ho, Wo, C) if scratch is None else scratch
        out = torch.empty_like(y)
        grid = (N * T, -(-Ho * Wo // TILE["BP"]), -(-C // TILE["BC"]))
        decided = (channel, temporal, t.kept, t.strides)
        launch: Any = kernels.convolve[grid]
        sizes = (T, x.shape[3], x.shape[4], Ho, Wo, x.shape[1], C)
        launch(rows, t.weight.to(x.dtype), t.bias, y, *decided, *sizes, KERNEL=f.kernel[1], STRIDE=f.stride[1],
               PAD=f.padding[1], **TILE)  # fmt: skip
        added = out if residual is None else to_rows(residual).contiguous()
        launch = kernels.finish[grid]
        rebuild = (t.source, t.slope, t.offset, t.dense, t.mixed, t.blend, t.blend_bias, t.order, t.scale, t.shift)
        launch(y, out, added, *decided, *rebuild, T, Ho * Wo, C, t.blend.shape[1], DENSE=t.pointwise, BLEND=t.blends,
               RESIDUAL=residual is not None, RELU=self.unit.activation == "relu", **TILE)  # fmt: skip
        return from_rows(out)


@torch.no_grad()
def _tables(unit: Unit) -> Tables:
    layer, f = unit.layer, unit.filter
    order, candidates = layer.cheap_c.order, layer.candidates
    C, device = len(order), order.device

    def integers(values: Any) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    ops = [layer.cheap_c.op(i) for i in range(1, len(candidates.channels))]
    mixed = [0, *(int(isinstance(op, Pointwise)) for op in ops)]
    source = torch.arange(C, dtype=torch.int32, device=device).repeat(len(mixed), 1)
    slope, offset = torch.ones(len(mixed), C, device=device), torch.zeros(len(mixed), C, device=device)
    dense = torch.zeros(len(mixed), C, C, device=device) if any(mixed) else torch.zeros(1, device=device)
    for i, op in enumerate(ops, start=1):
        kept = candidates.channels[i]
        offset[i, kept:] = op.bias.float()
        if mixed[i]:
            dense[i, :kept, kept:] = op.weight.float().T
        else:
            source[i, kept:], slope[i, kept:] = op.source.int(), op.weight.float()
    weight = f.weight[order].permute(2, 3, 4, 1, 0).flatten(0, 2).contiguous()
    bias = torch.zeros(C, device=device) if f.bias is None else f.bias[order].float()
    blend, blend_bias = _blends(unit, order)
    blends = any(unit._filling(j) is not None for j in range(1, len(candidates.strides)))
    return Tables(
        weight, bias, integers(candidates.channels), integers(candidates.strides), source, slope, offset, dense,
        integers(mixed), blend, blend_bias, order.int(), unit.scale[order].float().contiguous(),
        unit.shift[order].float().contiguous(), any(mixed), blends,
    )  # fmt: skip


def _blends(unit: Unit, order: Tensor) -> tuple[Tensor, Tensor]:
    """Phi_t before the norm, for each temporal candidate and place behind a computed frame."""
    strides, phi = unit.layer.candidates.strides, unit.layer.cheap_t
    weight = torch.zeros(len(strides), max(strides), 2, len(order), device=order.device)
    weight[:, :, 0] = 1
    bias = torch.zeros(len(strides), max(strides), len(order), device=order.device)
    for j, stride in enumerate(strides[1:], start=1):
        weight[j, 1:stride] = phi.weights[j - 1].float()[..., order]
        bias[j, 1:stride] = phi.biases[j - 1].float()[..., order]
    return weight, bias
