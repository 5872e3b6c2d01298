"""A clip of which only every R-th frame is held: carried as it is, filled up where somebody needs the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import Filling
from .pack import channels_last, from_rows, to_rows

__all__ = ["GATES", "Frames", "Place", "Room", "full"]

GATES = "gates"  # in the meta of a node: how many of them read it


@dataclass
class Frames:
    """``num_frames`` frames, of which every ``stride``-th is held; those after it are copies of it.

    A stride of 1 is a whole clip, with what is known of it.

    Attributes:
        held: ``(N, C, ceil(num_frames / stride), H, W)``, channels last.
        stride: R.
        num_frames: T.
        pooled: the mean of ``held`` over H and W, ``(N, ceil(num_frames / stride), C)``, where whoever made it knew it.
        filled: all frames, once somebody needed them.
    """

    held: Tensor
    stride: int
    num_frames: int
    pooled: Tensor | None = None
    filled: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.held.shape[:2], self.num_frames, *self.held.shape[3:]))

    def full(self) -> Tensor:
        """All frames, ``(N, C, T, H, W)``; filled up once."""
        if self.stride == 1:
            return self.held
        if not self.filled:
            rows = to_rows(self.held).contiguous()  # it may be a part of a `Room`
            self.filled.append(from_rows(Filling.copies(self.stride, rows)(rows, self.num_frames, None, False)))
        return self.filled[0]

    def means(self) -> Tensor:
        """`pooled`, taken now where it is not known."""
        return to_rows(self.held).flatten(2, 3).mean(2, dtype=torch.float32) if self.pooled is None else self.pooled

    def replaced(self, held: Tensor, pooled: Tensor | None = None) -> Frames:
        """The same after an operation on single frames."""
        return Frames(held, self.stride, self.num_frames, pooled)

    def alike(self, other: object) -> bool:
        """Whether the other holds the same frames."""
        return isinstance(other, Frames) and (other.stride, other.num_frames) == (self.stride, self.num_frames)


@dataclass
class Room:
    """Where the parts of a concatenation are written, one beside the other, by those who can.

    Attributes:
        channels: of all parts.
        rows: ``(N, T, H, W, channels)``, once somebody wrote.
    """

    channels: int
    rows: Tensor | None = None

    def part(self, like: Tensor, first: int, count: int) -> Tensor | None:
        """Room for ``count`` channels from ``first`` on, for positions as in ``like (N, T, H, W, ...)``."""
        if self.rows is None:
            self.rows = like.new_empty(*like.shape[:4], self.channels)
        return self.rows[..., first : first + count] if self.rows.shape[:4] == like.shape[:4] else None

    def joined(self, parts: list[Tensor]) -> Tensor:
        """``torch.cat`` of the parts ``(N, C_i, T, H, W)``, of which those are copied that were not written here."""
        if self.rows is None or self.rows.shape[:4] != to_rows(parts[0]).shape[:4]:
            return channels_last(torch.cat(parts, dim=1))
        first = 0
        for part in parts:
            place = self.rows[..., first : first + part.shape[1]]
            if part.data_ptr() != place.data_ptr():
                place.copy_(to_rows(part))
            first += part.shape[1]
        return from_rows(self.rows)


class Place(NamedTuple):
    """The part of a room from channel ``first`` on."""

    room: Room
    first: int


def full(x: Tensor | Frames) -> Tensor:
    """All frames, whichever way they are carried."""
    return x.full() if isinstance(x, Frames) else x
