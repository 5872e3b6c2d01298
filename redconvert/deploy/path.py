"""One decision on clips of one shape: what convolves them, what rebuilds the rest, looked up once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.routing import select
from .frames import Frames, Place, full
from .kernels import Filling
from .pack import PackedConv, from_rows, to_rows
from .reduced import Reduced
from .taps import Reading
from .vectors import ACTIVATIONS

__all__ = ["FUSED", "Path", "Value"]

FUSED = ("relu", "none")  # activations that every pass over memory knows
Value = Tensor | Frames


@dataclass(frozen=True, eq=False)
class Path:
    """What a decision computes of clips that hold so many frames.

    Attributes:
        read: the frames that are computed, and of which of those held.
        packed: what convolves them.
        reduced: how the other channels come about; None where all are computed, or the others are nobody's.
        filling: how the skipped frames do; None where they stay copies.
        channels: of the result.
    """

    read: Reading
    packed: PackedConv
    reduced: Reduced | None
    filling: Filling | None
    channels: int

    def __call__(
        self,
        x: Tensor,
        residual: Value | None,
        activation: str,
        overwrite: bool = False,
        pools: bool = False,
        into: Place | None = None,
    ) -> Value:
        """``act(norm(conv(x)) [+ residual])`` of the frames held, ``x (N, C, T', H, W)``, channels last.

        ``overwrite`` and ``into``: as in `Unit`; ``pools``: somebody wants the means of the result over H and W.
        """
        stride, num_frames = self.read.stride, self.read.num_frames
        if self.filling is not None or not self._fits(residual):
            return self._filled(x, residual, activation, pools, overwrite)
        if residual is not None and isinstance(residual, Frames):
            residual = residual.held if stride > 1 else residual.full()
        gives = pools and (self.packed.gives_means() if self.reduced is None else activation in FUSED)
        means = self._room_for_means(x, -(-num_frames // stride)) if gives else None
        y = self._compute(x, residual, activation, overwrite, means, into)
        return y if stride == 1 and means is None else Frames(y, stride, num_frames, means)

    def _fits(self, residual: Value | None) -> bool:
        """Whether a residual holds the frames that are computed."""
        if residual is None or self.read.stride == 1:
            return True
        held = (self.read.stride, self.read.num_frames)
        return isinstance(residual, Frames) and (residual.stride, residual.num_frames) == held

    def _filled(
        self, x: Tensor, residual: Value | None, activation: str, pools: bool, overwrite: bool = False
    ) -> Value:
        """All frames, of which the skipped ones are written in the pass that adds the residual."""
        stride, num_frames = self.read.stride, self.read.num_frames
        y = to_rows(self._compute(x, None, "none"))
        filling, fuses = self.filling or Filling.copies(stride, y), activation in FUSED
        means = self._room_for_means(x, num_frames) if pools and fuses else None
        rows = None if residual is None else to_rows(full(residual))
        place = _room_of(rows, overwrite)
        out = from_rows(filling(y, num_frames, rows, activation == "relu", means, place))
        out = out if fuses else ACTIVATIONS[activation](out)
        return out if means is None else Frames(out, 1, num_frames, means)

    def _room_for_means(self, x: Tensor, num_frames: int) -> Tensor:
        return torch.zeros(x.shape[0], num_frames, self.channels, dtype=torch.float32, device=x.device)

    def _compute(
        self,
        x: Tensor,
        residual: Tensor | None,
        activation: str,
        overwrite: bool = False,
        means: Tensor | None = None,
        into: Place | None = None,
    ) -> Tensor:
        """The frames that are computed, with norm, residual and activation; all channels, where it is reduced."""
        reduced, read = self.reduced, self.read
        if reduced is None:
            return self.packed(read.padded(x), residual, activation, overwrite, means)
        if reduced.inputs is not None:
            x = select(x, 1, reduced.inputs)
        if reduced.mixing is not None:
            x = reduced.mixing(x)
        y = self.packed(read.padded(x))
        rebuilt = None
        if reduced.cheap is not None:
            source = y if reduced.cheap_source is None else select(y, 1, reduced.cheap_source)
            rebuilt = to_rows(reduced.cheap(source))
        added = None if residual is None else to_rows(residual)
        rows, relu = to_rows(y), activation == "relu"
        place = _room_of(added, overwrite) if into is None else into.room.part(rows, into.first, self.channels)
        out = from_rows(reduced.assembly(rows, rebuilt, added, relu, means, place))
        return out if activation in FUSED else ACTIVATIONS[activation](out)


def _room_of(residual: Tensor | None, overwrite: bool) -> Tensor | None:
    """Where a sum may be written: over its residual, but not on a GPU, where a kernel may be tried more than once."""
    return residual if overwrite and residual is not None and not residual.is_cuda else None
