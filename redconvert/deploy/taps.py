"""Convolving clips of which few frames are held: which of them a convolution reads, and the same on those alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pack import Filter, from_rows, to_rows

__all__ = ["Reading", "out_frames", "reading"]


@dataclass(frozen=True)
class Reading:
    """How an output's computed frames come from a clip that holds every R-th frame.

    Attributes:
        filter: what convolves the frames held.
        stride: of the output: it holds every ``stride``-th of its frames.
        num_frames: of the whole output.
        before, after: frames of zeros around the input, where the two differ and ``filter`` pads none itself; a
            negative ``after`` are frames that no output reads.
    """

    filter: Filter
    stride: int
    num_frames: int
    before: int = 0
    after: int = 0

    @property
    def pads_time(self) -> bool:
        """Whether outputs read frames that are not there."""
        return bool(self.filter.padding[0] or self.before or self.after)

    def padded(self, x: Tensor) -> Tensor:
        """The input ``(N, C, T', H, W)`` that ``filter`` takes."""
        if not (self.before or self.after):
            return x
        rows = to_rows(x)[:, : x.shape[2] + min(self.after, 0)]
        N, T, H, W, C = rows.shape
        out = rows.new_empty(N, self.before + T + max(self.after, 0), H, W, C)
        out[:, : self.before] = 0
        out[:, self.before : self.before + T] = rows
        out[:, self.before + T :] = 0
        return from_rows(out)


def out_frames(filter: Filter, num_frames: int) -> int:
    """Output frames of a convolution over ``num_frames``."""
    reach = filter.dilation[0] * (filter.kernel[0] - 1) + 1
    return (num_frames + 2 * filter.padding[0] - reach) // filter.stride[0] + 1


def reading(filter: Filter, skip: int, num_frames: int, held: int, keeps: bool) -> Reading | None:
    """The convolution of a clip that holds every ``held``-th frame, for every ``skip``-th output frame.

    Args:
        filter: of the layer.
        skip: 2^j of its temporal candidate.
        num_frames: of the whole input.
        held: R of the input; 1 where all frames are there.
        keeps: the layer's own skipped frames become copies, or it skips none.

    Returns:
        None where all frames of the input are needed.
    """
    total, step = out_frames(filter, num_frames), filter.stride[0] * skip
    if held == 1:
        return Reading(_restrided(filter, step), skip, total)
    alone = filter.kernel[0] == 1 and filter.padding[0] == 0
    if alone and step % held == 0:  # reads no frame that is not held
        return Reading(_restrided(filter, step // held), skip, total)
    if alone and keeps and held % step == 0:  # copies in, copies out
        return Reading(_restrided(filter, 1), held // filter.stride[0], total)
    if filter.dilation[0] == 1 and num_frames % held == 0 and step % held == 0:
        return _merged(filter, skip, num_frames, held)
    return None


def _merged(filter: Filter, skip: int, num_frames: int, held: int) -> Reading:
    """Taps on copies of one frame add up: 3 taps over pairs are 2 taps over the frames held.

    Output ``skip * m`` reads the input frames ``stride * skip * m - p + d`` for taps d, which are copies of the held
    frames ``(stride * skip / R) m + floor((d - p) / R)``.
    """
    total, step = out_frames(filter, num_frames), filter.stride[0] * skip // held
    offsets = [(tap - filter.padding[0]) // held for tap in range(filter.kernel[0])]
    first, last = offsets[0], offsets[-1]
    taps = [
        filter.weight[:, :, [tap for tap, offset in enumerate(offsets) if offset == wanted]].sum(2)
        for wanted in range(first, last + 1)
    ]
    before = -first
    outputs = -(-total // skip)
    after = (outputs - 1) * step + last - (num_frames // held - 1)
    alike = before == after
    narrower = replace(
        filter,
        weight=torch.stack(taps, dim=2),
        stride=(step, *filter.stride[1:]),
        padding=(before if alike else 0, *filter.padding[1:]),
    )
    return Reading(narrower, skip, total, 0 if alike else before, 0 if alike else after)


def _restrided(filter: Filter, stride: int) -> Filter:
    return replace(filter, stride=(stride, *filter.stride[1:]))
