"""Where a clip is taken from a video: a run of frames and a square of the picture, drawn or placed."""

from __future__ import annotations

import torch
from torch import Tensor

from redconvert.data.video import sample_clip

__all__ = ["placed_square", "random_run", "random_square"]


def random_run(video: Tensor, num_frames: int, step: int = 1) -> Tensor:
    """``num_frames`` frames, each ``step`` after the one before, every possible start as likely as the others.

    Args:
        video: ``(T, ...)``; one with too few frames is looped, as :func:`sample_clip` does.

    Returns:
        ``(num_frames, ...)``, same type.
    """
    spare = len(video) - ((num_frames - 1) * step + 1)
    start = int(torch.randint(max(spare, 0) + 1, ()))
    return sample_clip(video[start:], num_frames, step, 0.0)


def random_square(frames: Tensor, side: float, jitter: tuple[float, float] = (1.0, 1.0), flip: float = 0.0) -> Tensor:
    """A square somewhere in the picture, the same in all frames.

    Its side is ``side / j`` pixels with j drawn uniformly from ``jitter``: the picture is enlarged j times, so to say.

    Args:
        frames: ``(T, H, W, C)``.
        flip: how likely it is mirrored left to right.

    Returns:
        ``(T, S, S, C)``, a view or a mirrored copy.
    """
    low, high = jitter
    pixels = _pixels(frames, side / (low + (high - low) * float(torch.rand(()))))
    top = int(torch.randint(frames.shape[1] - pixels + 1, ()))
    left = int(torch.randint(frames.shape[2] - pixels + 1, ()))
    square = frames[:, top : top + pixels, left : left + pixels]
    return square.flip(2) if float(torch.rand(())) < flip else square


def placed_square(frames: Tensor, side: float, along: float = 0.5) -> Tensor:
    """The square at ``along`` of the long side (0.0 its beginning, 1.0 its end), in the middle of the short one.

    Args:
        frames: ``(T, H, W, C)``.
        side: of the square, in pixels; rounded, and at most the short side.

    Returns:
        ``(T, S, S, C)``, a view.
    """
    height, width = frames.shape[1:3]
    pixels = _pixels(frames, side)
    down, across = (0.5, along) if width >= height else (along, 0.5)
    top, left = int((height - pixels) * down), int((width - pixels) * across)
    return frames[:, top : top + pixels, left : left + pixels]


def _pixels(frames: Tensor, side: float) -> int:
    return max(1, min(round(side), *frames.shape[1:3]))
