"""A reduced convolution piece by piece: what it computes is rebuilt at once, and never held as a whole.

Channels that were computed are held beside the whole result until the others are rebuilt: where half are, half as much
memory again. Of a piece, some samples or some frames, it is little.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .taps import Reading

__all__ = ["Piece", "output_sizes", "pieces"]

# Bytes of computed channels, and how many pieces: more of them save little more memory, and take up to a tenth longer.
LEAST, MOST = 2**22, 4


class Piece(NamedTuple):
    """Samples and computed frames of a result, and the input frames that they read: ``[first, last)`` each."""

    samples: slice
    frames: slice
    reads: slice

    def of(self, rows: Tensor) -> Tensor:
        """Of a result ``(N, T, ...)`` what belongs to it, in place."""
        return rows[self.samples, self.frames]

    def cut(self, x: Tensor) -> Tensor:
        """The input ``(N, C, T', H, W)`` that it reads, in place."""
        return x[self.samples, :, self.reads]


def output_sizes(read: Reading, x: Tensor) -> tuple[int, int, int, int]:
    """N, T, H and W of what ``read.filter`` makes of x ``(N, C, T', H, W)``."""
    T, H, W = read.filter.output_sizes((x.shape[2] + read.before + read.after, *x.shape[3:]))
    return len(x), T, H, W


def pieces(read: Reading, sizes: tuple[int, int, int, int], frame_bytes: int) -> list[Piece]:
    """As many samples, or frames of one, as hold LEAST bytes, or all of it in MOST pieces.

    Where time is padded a sample stays whole: a piece would need a copy of its input with the padding.

    Args:
        sizes: of the result, see `output_sizes`; frame_bytes: of the channels that are computed of a frame.
    """
    samples, frames = sizes[:2]
    size = max(LEAST, -(-frame_bytes * samples * frames // MOST))
    together = max(size // max(frame_bytes, 1), 1)  # frames
    if together < frames and not read.pads_time:
        parts = list(pairwise([*range(0, frames, together), frames]))
        return [_piece(read, (n, n + 1), part) for n in range(samples) for part in parts]
    bounds = [*range(0, samples, max(together // frames, 1)), samples]
    return [_piece(read, part, (0, frames)) for part in pairwise(bounds)]


def _piece(read: Reading, samples: tuple[int, int], frames: tuple[int, int]) -> Piece:
    f = read.filter
    reads = slice(None)  # with what pads it
    if not read.pads_time:
        first, last = frames[0] * f.stride[0], (frames[1] - 1) * f.stride[0]
        reads = slice(first, last + f.dilation[0] * (f.kernel[0] - 1) + 1)
    return Piece(slice(*samples), slice(*frames), reads)
