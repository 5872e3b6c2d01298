"""One decision on clips of one shape: what convolves them, what rebuilds the rest, looked up once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layers.routing import select
from .frames import Frames, Place, full
from .kernels import Filling
from .pack import PackedConv, from_rows, to_rows
from .pieces import Piece, output_sizes, pieces
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
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

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

    def forget(self) -> None:
        """Drop packed weights; they are packed again if they are needed."""
        for packed in (self.packed, *((self.reduced.mixing, self.reduced.cheap) if self.reduced is not None else ())):
            if packed is not None:
                packed.forget()

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
        if self.reduced is None:
            return self.packed(self.read.padded(x), residual, activation, overwrite, means)
        sizes, parts = self._cuts(x)
        added, relu = None if residual is None else to_rows(residual), activation == "relu"
        place = _room_of(added, overwrite)
        if into is not None:
            place = into.room.part(x.new_empty(1).expand(*sizes, 1), into.first, self.channels)
        if len(parts) == 1:
            out = self._rebuilt(x, added, relu, means, place)
        else:
            out = x.new_empty(*sizes, self.channels) if place is None else place
            for piece in parts:
                some, mean = (None if each is None else piece.of(each) for each in (added, means))
                made = self._rebuilt(piece.cut(x), some, relu, mean, piece.of(out))
                if made.data_ptr() != piece.of(out).data_ptr():
                    piece.of(out).copy_(made)
        return from_rows(out) if activation in FUSED else ACTIVATIONS[activation](from_rows(out))

    def _cuts(self, x: Tensor) -> tuple[tuple[int, int, int, int], list[Piece]]:
        """N, T, H and W of the result, and the pieces in which it is made; looked up once."""
        key = (x.shape, x.dtype, x.is_cpu)
        if key not in self._known:
            sizes = output_sizes(self.read, x)
            frame_bytes = math.prod(sizes[2:]) * len(self.read.filter.weight) * x.element_size()
            self._known[key] = sizes, pieces(self.read, sizes, frame_bytes if x.is_cpu else 0)
        return self._known[key]

    def _rebuilt(
        self, x: Tensor, residual: Tensor | None, relu: bool, means: Tensor | None, place: Tensor | None
    ) -> Tensor:
        """All channels of clips ``(N, C, T', H, W)``, as rows ``(N, T, H, W, C_out)``; so is the residual."""
        reduced = self.reduced
        assert reduced is not None
        if reduced.inputs is not None:
            x = select(x, 1, reduced.inputs)
        if reduced.mixing is not None:
            x = reduced.mixing(x)
        y = self.packed(self.read.padded(x))
        rebuilt = None
        if reduced.cheap is not None:
            source = y if reduced.cheap_source is None else select(y, 1, reduced.cheap_source)
            rebuilt = to_rows(reduced.cheap(source))
        return reduced.assembly(to_rows(y), rebuilt, residual, relu, means, place)


def _room_of(residual: Tensor | None, overwrite: bool) -> Tensor | None:
    """Where a sum may be written: over its residual, but not on a GPU, where a kernel may be tried more than once."""
    return residual if overwrite and residual is not None and not residual.is_cuda else None
