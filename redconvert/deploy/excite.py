"""Squeeze and excitation: the mean of a clip, where somebody knows it, and its product with a number per channel."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.absorb import Handover
from ..layers.routing import select
from . import vectors
from .decide import Batch
from .frames import Frames, full
from .pack import to_rows

__all__ = ["Excite", "Squeeze"]


class Squeeze(nn.Module):
    """``x.mean(dims, keepdim)``; over T, H and W of a clip that knows its means it costs nothing."""

    def __init__(self, dims: tuple[int, ...], keepdim: bool) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def extra_repr(self) -> str:
        return f"{self.dims}, keepdim={self.keepdim}"

    def forward(self, x: Tensor | Frames) -> Tensor:
        known = isinstance(x, Frames) and x.pooled is not None and x.num_frames % x.stride == 0
        if known and sorted(dim % 5 for dim in self.dims) == [2, 3, 4]:
            means = x.pooled.mean(1).to(x.held.dtype)  # type: ignore[union-attr]
            return means[:, :, None, None, None] if self.keepdim else means
        return full(x).mean(self.dims, self.keepdim)


class Excite(nn.Module):
    """``act(x * scale)`` in one pass, where scale is one number per sample and channel.

    Attributes:
        feeds_gate: a dynamic unit reads the result, and wants to know its means.
        handover: of the convolution whose channels x holds, those alone that were computed; None: it holds all.
    """

    def __init__(self, activation: str, batch: Batch) -> None:
        super().__init__()
        self.activation, self.batch, self.feeds_gate = activation, batch, False
        self.handover: Handover | None = None

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

    def forward(self, x: Tensor | Frames, scale: Tensor | Frames, overwrite: bool = False) -> Tensor | Frames:
        """``overwrite``: the result may take the place of x in memory."""
        held, by = x.held if isinstance(x, Frames) else x, full(scale)
        if self.handover is not None and held.shape[1] < by.shape[1]:
            by = select(by, 1, self.handover.kept(self.handover.channels.index(held.shape[1])))
        clip = held.unsqueeze(2) if held.dim() == 4 else held
        if not self._serves(clip, by):
            return vectors.ACTIVATIONS[self.activation](full(x) * by)
        pooled = None
        if self.feeds_gate and self.batch.gates_run and held.dim() == 5:
            pooled = clip.new_zeros(clip.shape[0], clip.shape[2], clip.shape[1])
        out = vectors.rescale(clip, by, self.activation, overwrite, pooled).view_as(held)
        if isinstance(x, Frames):
            return x.replaced(out, pooled)
        return out if pooled is None else Frames(out, 1, out.shape[2], pooled)

    def _serves(self, clip: Tensor, by: Tensor) -> bool:
        per_channel = by.shape[:2] == clip.shape[:2] and by.numel() == clip.shape[0] * clip.shape[1]
        fast = vectors.runs_in_c(clip, clip.shape[1]) and by.dtype == clip.dtype
        return per_channel and fast and self.activation in vectors.CODES and to_rows(clip).is_contiguous()
