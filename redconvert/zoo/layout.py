"""Inputs of the zoo's networks: their layout, and what to do about another one."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor

from redconvert.errors import RedconvertError

__all__ = ["IMAGENET", "KINETICS", "UNIT", "Normalisation", "check_clip", "check_images"]

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and deviation, for [0, 1]

IMAGENET: Normalisation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINETICS: Normalisation = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # torchvision's
UNIT: Normalisation = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # gives [-1, 1]


def check_clip(name: str, x: Tensor, values: str = "float RGB", num_frames: int | None = None) -> None:
    """Raise unless x is a float ``(N, 3, T, H, W)``; no check while tracing, where shapes may be symbols.

    Args:
        name: of the network, for the message.
        x: its input.
        values: what the numbers are, for the message.
        num_frames: how long the clip must be; None for any length.

    Raises:
        RedconvertError: another layout, type or length; the message says which axis is time.
    """
    if _is_symbolic(x):
        return
    shape = tuple(x.shape)
    if x.dim() != 5 or shape[1] != 3 or min(shape[2:]) < 1:
        raise RedconvertError(
            f"{name}: the input has shape {shape}; it takes (N, 3, T, H, W), time is axis 2, colour is axis 1. "
            f"{_clip_hint(shape)}"
        )
    _check_float(name, x, values)
    if num_frames is not None and shape[2] != num_frames:
        raise RedconvertError(
            f"{name}: the clip has {shape[2]} frames (axis 2 of {shape}), and this network was built for {num_frames}: "
            f"pass {num_frames} frames, or build it with num_frames={shape[2]}."
        )


def check_images(name: str, x: Tensor, values: str = "float RGB") -> None:
    """Raise unless x is a float ``(N, 3, H, W)``; no check while tracing.

    Raises:
        RedconvertError: another layout or type.
    """
    if _is_symbolic(x):
        return
    shape = tuple(x.shape)
    if x.dim() != 4 or shape[1] != 3 or min(shape[2:]) < 1:
        hint = "Give it four axes and three colours."
        if x.dim() == 5:
            hint = "It has no time axis: for the frames of (N, 3, T, H, W) use x.transpose(1, 2).flatten(0, 1)."
        elif x.dim() == 4 and shape[3] == 3:
            hint = "This looks like channels last, (N, H, W, 3): use x.permute(0, 3, 1, 2)."
        elif x.dim() == 3 and shape[0] == 3:
            hint = "This looks like one image (3, H, W): use x.unsqueeze(0)."
        raise RedconvertError(
            f"{name}: the input has shape {shape}; it takes images (N, 3, H, W), colour is axis 1. {hint}"
        )
    _check_float(name, x, values)


def _is_symbolic(x: Tensor) -> bool:
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling()


def _check_float(name: str, x: Tensor, values: str) -> None:
    if not x.is_floating_point():
        raise RedconvertError(
            f"{name}: the input is {x.dtype}; it takes {values}. redconvert.data.to_clip makes that from uint8 frames."
        )


def _clip_hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 5 and shape[4] == 3:
        return "This looks like channels last, (N, T, H, W, 3): use x.permute(0, 4, 1, 2, 3)."
    if len(shape) == 5 and shape[2] == 3:
        return "This looks like (N, T, 3, H, W): use x.transpose(1, 2)."
    if len(shape) == 4 and shape[0] == 3:
        return "This looks like one clip (3, T, H, W): use x.unsqueeze(0)."
    if len(shape) == 4 and shape[1] == 3:
        return "This looks like frames (T, 3, H, W): use x.transpose(0, 1).unsqueeze(0)."
    if len(shape) == 4 and shape[3] == 3:
        return "This looks like frames (T, H, W, 3): use x.permute(3, 0, 1, 2).unsqueeze(0)."
    return "Give it five axes, three colours, and at least one frame."
