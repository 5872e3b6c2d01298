"""DynamicConv2d and DynamicConv3d: convolutions that decide how much of themselves to compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import LayerConfig
from .base import DynamicConv
from .geometry import output_size
from .routing import select

__all__ = ["DynamicConv2d", "DynamicConv3d"]


class DynamicConv3d(DynamicConv, nn.Conv3d):
    """A Conv3d that decides per sample how many output channels and frames to compute.

    ``(N, C_in, T, H, W) -> (N, C_out, T_o, H_o, W_o)``, like `torch.nn.Conv3d`, whose arguments come first.
    Candidate (i, j) convolves ``k_i`` channels at every ``2^j``-th frame, rebuilds the other channels with
    Phi_c and the other frames with Phi_t; the gate's weights choose (``gate="hard"``) or mix
    (``gate="soft"``) them: ``out = sum_j w_t,j E_j(sum_i w_c,i Phi_i(conv(x)))``. At birth the full candidate
    has weight 1, and the layer equals the Conv3d to the bit.

    Args:
        config: how to decide.
        gate_frames: frames that the gate sees.
    """

    dense_class = nn.Conv3d

    def __init__(self, *args, config: LayerConfig | None = None, gate_frames: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.make_dynamic(config or LayerConfig(), gate_frames=gate_frames)

    def _output_frames(self, x: Tensor) -> int:
        return output_size(self, 0, x.shape[2])

    def _strided(self, x: Tensor, frame_stride: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        x, padding = self.recipe.pad(self, x)
        return x, (self.stride[0] * frame_stride, *self.stride[1:]), padding


class DynamicConv2d(DynamicConv, nn.Conv2d):
    """A Conv2d that decides per sample how many output channels to compute, and frames with ``num_frames``.

    ``(N, C_in, H, W) -> (N, C_out, H_o, W_o)``, like `torch.nn.Conv2d`, whose arguments come first. With
    ``num_frames=T`` the batch is ``N * T`` frames, clip after clip, and decisions are per clip. The maths
    is that of `DynamicConv3d`.

    Args:
        config: how to decide.
        num_frames: frames per clip where the batch holds ``N * num_frames`` frames.
    """

    dense_class = nn.Conv2d

    def __init__(self, *args, config: LayerConfig | None = None, num_frames: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.make_dynamic(config or LayerConfig(), num_frames=num_frames)

    def _per_clip(self, pooled: Tensor) -> Tensor:
        if self.num_frames is None:
            return pooled.unsqueeze(2)
        return pooled.unflatten(0, (-1, self.num_frames)).transpose(1, 2)

    def as_clips(self, y: Tensor, frames: int) -> Tensor:
        return y.unflatten(0, (-1, frames)).transpose(1, 2)

    def from_clips(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2).flatten(0, 1)

    def _output_frames(self, x: Tensor) -> int:
        return self.frames_per_sample

    def _strided(self, x: Tensor, frame_stride: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        if frame_stride > 1:
            rows = torch.arange(x.shape[0], device=x.device).view(-1, self.frames_per_sample)
            x = select(x, 0, rows[:, ::frame_stride].flatten())
        x, padding = self.recipe.pad(self, x)
        return x, self.stride, padding
