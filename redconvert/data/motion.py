"""How much a clip moves: what a network that adapts to its input should notice first."""

from __future__ import annotations

import torch
from torch import Tensor

from redconvert.errors import RedconvertError

__all__ = ["motion"]


def motion(clips: Tensor) -> Tensor:
    """Mean absolute difference between consecutive frames, over colours, frames and pixels.

    Args:
        clips: ``(N, 3, T, H, W)``, or one ``(3, T, H, W)``, of any number type; T at least 2.

    Returns:
        float ``(N,)``, or ``()`` for one clip, in the units of the values: grey levels of 255 for uint8. Times 127.5 it
        is grey levels for clips in [-1, 1].

    Raises:
        RedconvertError: another number of axes, a single frame, or an empty clip.
    """
    if clips.dim() not in (4, 5) or clips.shape[-3] < 2 or not clips.numel():
        raise RedconvertError(
            f"motion: the clips have shape {tuple(clips.shape)}; it takes (N, 3, T, H, W) or (3, T, H, W), "
            "time is the third axis from the end and has at least 2 frames."
        )
    values = clips if clips.dtype == torch.float64 else clips.float()
    return values.diff(dim=-3).abs().mean(dim=(-4, -3, -2, -1))
