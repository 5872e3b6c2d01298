"""From a video file to a clip: decode, choose frames, resize, crop, normalise. PyAV is imported where it is used."""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from redconvert.errors import RedconvertError, require

__all__ = ["load_clip", "read_video", "resize_center_crop", "sample_clip", "to_clip"]

Position = Literal["center"] | float


def read_video(path: str | Path, *, num_frames: int | None = None, start: int | None = None, step: int = 1) -> Tensor:
    """Decode frames ``start``, ``start + step``, ... of a video, and stop as soon as they are there.

    Only the frames that are kept are converted to RGB and held in memory.

    Args:
        path: the video file; its first video stream is read.
        num_frames: at most this many frames; None reads to the end. A video that ends sooner gives fewer.
        start: index of the first frame; None is 0.
        step: distance between two kept frames, in frames.

    Returns:
        uint8 RGB ``(T, H, W, 3)``, T at least 1. A frame of another size is scaled to that of the first.

    Raises:
        RedconvertError: no such file, not a video, no video stream, damaged, or no frame at or after ``start``.
    """
    first = 0 if start is None else start
    _require_at_least("read_video", start=(first, 0), step=(step, 1))
    if num_frames is not None:
        _require_at_least("read_video", num_frames=(num_frames, 1))
    stop = sys.maxsize if num_frames is None else first + (num_frames - 1) * step + 1
    frames, decoded = _decode(path, range(first, stop, step), stop)
    if not frames:
        raise RedconvertError(f"'{path}' has {decoded} frames, so none at start={first}. Choose a smaller start.")
    return torch.stack(list(frames.values()))


def _decode(path: str | Path, wanted: Container[int], stop: int) -> tuple[dict[int, Tensor], int]:
    """The wanted frames in front of ``stop`` by index, uint8 ``(H, W, 3)``, and how many were decoded."""
    frames: dict[int, Tensor] = {}
    decoded = 0
    size: tuple[int, int] | None = None
    with _open_video(path) as (container, stream):
        # One for all frames: frame.to_ndarray(format="rgb24") sets one up each time, which takes longer than decoding.
        to_rgb = require("av.video.reformatter", extra="video", purpose="Reading a video").VideoReformatter()
        for index, frame in enumerate(islice(container.decode(stream), stop)):
            decoded = index + 1
            if index in wanted:
                height, width = size = size or (frame.height, frame.width)
                picture = to_rgb.reformat(frame, width=width, height=height, format="rgb24")
                frames[index] = torch.from_numpy(picture.to_ndarray())
    if not decoded:
        raise RedconvertError(f"'{path}' has a video stream but no frame in it. Check or re-encode the file.")
    return frames, decoded


def sample_clip(video: Tensor, num_frames: int, step: int = 1, position: Position = "center") -> Tensor:
    """Choose ``num_frames`` frames, each ``step`` after the one before.

    A video shorter than ``(num_frames - 1) * step + 1`` frames is repeated from its beginning as often as it takes:
    frame i of the clip is then frame ``i * step mod T`` of the video, wherever ``position`` is.

    Args:
        video: ``(T, ...)``, any type; time is axis 0.
        num_frames: frames of the clip.
        step: distance between two of them, in frames of the video.
        position: where the clip lies: 0.0 at the beginning, 1.0 at the end, "center" (0.5) in the middle.

    Returns:
        ``(num_frames, ...)``, same type.

    Raises:
        RedconvertError: an empty video, or an argument out of its range.
    """
    total = video.shape[0] if video.dim() else 0
    if not total:
        raise RedconvertError(f"sample_clip: the video has shape {tuple(video.shape)}, no frames on axis 0 (time).")
    start = _clip_start(total, num_frames, step, position)
    indices = (start + step * torch.arange(num_frames, device=video.device)) % total
    return video[indices]


def resize_center_crop(frames: Tensor, size: int, short_side: int | None = None) -> Tensor:
    """Scale the short side (bilinear, antialiased), then cut the ``size`` x ``size`` square in the middle.

    Args:
        frames: uint8 ``(T, H, W, 3)``.
        size: side of the square, in pixels.
        short_side: what the short side is scaled to, in pixels, at least ``size``; None is ``size``.

    Returns:
        float32 ``(3, T, size, size)``, values in [0, 255].

    Raises:
        RedconvertError: frames of another layout or type, or a size out of its range.
    """
    short_side = size if short_side is None else short_side
    _require_at_least("resize_center_crop", size=(size, 1), short_side=(short_side, size))
    if frames.dim() != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8 or not frames.numel():
        raise RedconvertError(
            f"resize_center_crop: the frames are {frames.dtype} {tuple(frames.shape)}; "
            "it takes uint8 (T, H, W, 3), time is axis 0, as read_video gives."
        )
    height, width = frames.shape[1:3]
    scale = short_side / min(height, width)
    scaled = (round(height * scale), round(width * scale))
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    out = torch.empty(3, len(frames), size, size, device=frames.device)
    together = together_on(frames.device)
    for t in range(0, len(frames), together):
        images = frames[t : t + together].permute(0, 3, 1, 2).float()
        images = F.interpolate(images, scaled, mode="bilinear", align_corners=False, antialias=True)
        out[:, t : t + together] = images[..., top : top + size, left : left + size].transpose(0, 1)
    return out


def together_on(device: torch.device) -> int:
    """How many frames are scaled in one go. A whole video in float may not fit in memory; one fits in a CPU's cache."""
    return 1 if device.type == "cpu" else 16


def to_clip(
    frames: Tensor,
    size: int,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    short_side: int | None = None,
) -> Tensor:
    """Resize, crop and normalise: ``(x / 255 - mean) / std``; the defaults give [-1, 1].

    Args:
        frames: uint8 ``(T, H, W, 3)``.
        size: side of the square, in pixels.
        mean: subtracted, one number or one per colour, for values in [0, 1].
        std: divided by, likewise.
        short_side: as in :func:`resize_center_crop`.

    Returns:
        float32 ``(3, T, size, size)``; add a batch axis with ``[None]`` for a network.

    Raises:
        RedconvertError: frames of another layout or type, a size out of its range, or a ``mean`` or ``std`` that is
            neither 1 nor 3 numbers.
    """
    means, stds = _per_colour(mean, "mean", frames), _per_colour(std, "std", frames)
    return resize_center_crop(frames, size, short_side).div_(255).sub_(means).div_(stds)


def load_clip(
    path: str | Path,
    num_frames: int = 64,
    size: int = 224,
    step: int = 1,
    position: Position = "center",
    short_side: int | None = None,
    fps: float | None = 25.0,
) -> Tensor:
    """One clip of a video file, as ``i3d_kinetics`` takes it: :func:`sample_clip`, then :func:`to_clip`.

    The defaults are DeepMind's recipe for the Kinetics weights: the video at 25 frames per second, its short side
    at 256 pixels, the 224x224 square in the middle, values in [-1, 1].

    Frame i of the clip is the file's frame ``start + floor(i * step * rate / fps)``, the nearest one that is not later
    than its time; a file with fewer frames per second repeats some. A file that does not say its rate is taken as it
    is, and one with a varying rate at its average.

    Only the frames of the clip are kept, those behind it are not decoded, so memory is that of one clip however long
    the video is. The video's length is its number of packets; only in a file that holds fewer frames than that and is
    read to the end is it counted again. A short video is repeated, as :func:`sample_clip` says.

    Args:
        path: the video file.
        num_frames: frames of the clip.
        size: side of the square, in pixels.
        step: distance between two frames of the clip, in frames of the video at ``fps``: 2 sees twice the time.
        position: where the clip lies in the video, as in :func:`sample_clip`.
        short_side: what the short side is scaled to before the crop; None is ``size * 256 / 224``, rounded: I3D's
            weights were trained and tested on 224x224 crops of videos with a short side of 256.
        fps: frames per second that the clip is made of; None takes the file's own frames, whatever their rate.

    Returns:
        float32 RGB ``(3, num_frames, size, size)`` in [-1, 1].

    Raises:
        RedconvertError: a rate that is not positive, or what :func:`read_video`, :func:`sample_clip` and
            :func:`to_clip` refuse.
    """
    short_side = round(size * 256 / 224) if short_side is None else short_side
    _require_at_least("load_clip", size=(size, 1), short_side=(short_side, size))
    if fps is not None and not 0 < fps < math.inf:
        raise RedconvertError(f"load_clip: fps={fps}; it must be above 0, or None for the file's own frames.")
    total, rate = _length_and_rate(path)
    stride = Fraction(1)  # of one frame at fps, in the file's
    if fps is not None and rate is not None:
        stride = rate / (Fraction(fps).limit_denominator(10_000) or Fraction(fps))  # 29.97... is 30000/1001
    indices = _clip_indices(max(total, 1), stride, num_frames, step, position)
    frames, decoded = _decode(path, frozenset(indices), max(indices) + 1)
    if decoded <= max(indices):  # a packet is not always a frame; now the length is known
        indices = _clip_indices(decoded, stride, num_frames, step, position)
        if not frames.keys() >= set(indices):
            frames, _ = _decode(path, frozenset(indices), max(indices) + 1)
    kept = sorted(frames)
    place = {index: i for i, index in enumerate(kept)}
    clip = to_clip(torch.stack([frames[index] for index in kept]), size, short_side=short_side)
    return clip[:, [place[index] for index in indices]]


def _clip_indices(total: int, stride: Fraction, num_frames: int, step: int, position: Position) -> list[int]:
    """The file's frames that make up a clip: of its ``total`` frames every ``stride``-th is one to choose from."""
    _require_at_least("load_clip", num_frames=(num_frames, 1), step=(step, 1))
    span = math.floor((num_frames - 1) * step * stride) + 1
    start = _clip_start(total, span, 1, position)
    available = math.ceil(total / stride)  # before a short video begins again
    return [start + math.floor(i * step % available * stride) for i in range(num_frames)]


def _clip_start(total: int, num_frames: int, step: int, position: Position) -> int:
    """Index of the first frame of a clip in a video of ``total`` frames; 0 where the video is too short."""
    _require_at_least("sample_clip", num_frames=(num_frames, 1), step=(step, 1))
    fraction = 0.5 if position == "center" else position
    if isinstance(fraction, str) or not 0.0 <= fraction <= 1.0:
        raise RedconvertError(f"sample_clip: position={position!r}; it is 'center' or a number from 0.0 to 1.0.")
    spare = total - ((num_frames - 1) * step + 1)
    return int(max(spare, 0) * fraction)


def _length_and_rate(path: str | Path) -> tuple[int, Fraction | None]:
    """Number of packets with data, and frames per second where the file says them.

    A packet is a frame, found without decoding: many files' headers lack the count.
    """
    with _open_video(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        return sum(packet.size > 0 for packet in container.demux(stream)), rate if rate and rate > 0 else None


@contextmanager
def _open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its first video stream; PyAV's errors, on opening or later, come out as ours."""
    av = require("av", extra="video", purpose="Reading a video")
    if not Path(path).is_file():
        raise RedconvertError(f"'{path}' is no file. Give the path of a video.")
    try:
        # Old AVI files carry titles that are not UTF-8; they must not stop us from reading the pictures.
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise RedconvertError(f"'{path}' has no video stream (sound only?). Give a file with pictures.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            try:
                yield container, stream
            finally:  # threads that decode ahead may log through Python, and closing would wait for them with the GIL
                stream.codec_context.flush_buffers()
    except av.FFmpegError as error:
        raise RedconvertError(
            f"'{path}' could not be read as a video: {error}. "
            "Check that it plays, or re-encode it (ffmpeg -i IN OUT.mp4)."
        ) from error


def _per_colour(value: float | Sequence[float], name: str, like: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float32, device=like.device).flatten()
    if tensor.numel() not in (1, 3):
        raise RedconvertError(f"to_clip: {name}={value!r}; it is one number, or three for red, green and blue.")
    return tensor.view(-1, 1, 1, 1)


def _require_at_least(where: str, **limits: tuple[int, int]) -> None:
    for name, (value, least) in limits.items():
        if value < least:
            raise RedconvertError(f"{where}: {name}={value}; it must be at least {least}.")
