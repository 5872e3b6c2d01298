"""Folders of videos and images -> unlabelled batches of the shapes that a network takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import load_clip, resize_center_crop
from ..errors import MissingExtraError, RedconvertError, require

__all__ = ["Batches", "Item", "Samples", "choose", "find_files", "read_samples"]

VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov")
IMAGES = (".png", ".jpg", ".jpeg")
PER_VIDEO = 8  # clips of one video at most: more would overlap and be decoded again from its beginning


@dataclass(frozen=True)
class Item:
    """A sample to read: a file, and where in it a clip lies, 0.0 at the beginning to 1.0 at the end."""

    path: Path
    position: float = 0.5


@dataclass(frozen=True)
class Samples:
    """What was read: uint8 ``(3, T, H, W)`` each, a quarter of the memory of floats; their files; files that failed."""

    clips: list[Tensor]
    paths: list[Path]
    problems: dict[Path, str]


class Batches:
    """The samples, normalised, in batches of what the network takes. Can be read again and again.

    Args:
        clips: uint8 ``(3, T, H, W)`` each.
        shapes: of the network's inputs; clips fill them as `Batches.inputs` says.
        batch_size: samples per batch.
        mean, std: three numbers each, for values in [0, 1].
    """

    def __init__(
        self,
        clips: list[Tensor],
        shapes: Sequence[Sequence[int]],
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.clips, self.shapes, self.batch_size = clips, shapes, batch_size
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return math.ceil(len(self.clips) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[list[Tensor] | Tensor]]:
        for start in range(0, len(self.clips), self.batch_size):
            yield (self.inputs(self.normalised(self.clips[start : start + self.batch_size])),)

    def normalised(self, clips: list[Tensor]) -> Tensor:
        """uint8 ``(3, T, H, W)`` each -> ``(N, 3, T, H, W)``."""
        return torch.stack(clips).float().div_(255).sub_(self.mean).div_(self.std)

    def inputs(self, clips: Tensor) -> list[Tensor] | Tensor:
        """``(N, 3, T, H, W)`` -> what the network takes: frames in the batch of a 2D one, a list of shorter clips."""
        if len(self.shapes) > 1:
            frames = clips.shape[2]
            return [clips[:, :, torch.linspace(0, frames - 1, shape[2]).long()] for shape in self.shapes]
        return clips if len(self.shapes[0]) == 5 else clips.transpose(1, 2).flatten(0, 1)


def find_files(sources: Iterable[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files with these suffixes: those named, and those anywhere in the folders named, sorted.

    Raises:
        RedconvertError: a path that does not exist, a file of another kind, or none at all.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = [path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file()]
            found += sorted(path for path in inside if not path.name.startswith("."))
        elif not source.exists():
            raise RedconvertError(f"--data: there is no '{source}'")
        elif source.suffix.lower() not in suffixes:
            raise RedconvertError(f"--data: '{source}' is none of {', '.join(suffixes)}, which this network takes")
        else:
            found.append(source)
    if not found:
        places = ", ".join(f"'{source}'" for source in sources)
        raise RedconvertError(f"--data: no file in {places} is one of {', '.join(suffixes)}, which this network takes")
    return list(dict.fromkeys(found))


def choose(files: Sequence[Path], count: int) -> list[Item]:
    """At most ``count`` samples, spread over the files; several clips of each video where files are few."""
    videos = sum(path.suffix.lower() in VIDEOS for path in files)
    wanted = count - (len(files) - videos)
    each = min(PER_VIDEO, max(1, math.ceil(wanted / videos))) if videos else 1
    items = []
    for path in files:
        clips = each if path.suffix.lower() in VIDEOS else 1
        items += [Item(path, (i + 0.5) / clips) for i in range(clips)]
    kept = min(count, len(items))
    return [items[i * len(items) // kept] for i in range(kept)]


def read_samples(
    items: Iterable[Item], num_frames: int, height: int, width: int, step: int = 1, progress: Callable = iter
) -> Samples:
    """Read every item as ``num_frames`` frames of ``height`` x ``width`` pixels; an image is one frame.

    Short sides are scaled to 256/224 of the size and the middle is cut out, as usual in testing; images that are
    smaller are not enlarged beyond the size.

    Raises:
        RedconvertError: nothing could be read.
    """
    clips, paths, problems = [], [], {}
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    for item in progress(list(items)):
        try:
            clip = (
                _image(item.path, side) if item.path.suffix.lower() in IMAGES else _clip(item, num_frames, side, step)
            )
        except MissingExtraError:
            raise
        except RedconvertError as error:
            problems[item.path] = str(error)
            continue
        paths.append(item.path)
        clips.append(clip[:, :, top : top + height, left : left + width].round().to(torch.uint8))
    if not clips:
        path, why = next(iter(problems.items()))
        raise RedconvertError(f"--data: none of {len(problems)} files could be read; '{path}': {why}")
    return Samples(clips, paths, problems)


def _clip(item: Item, num_frames: int, side: int, step: int) -> Tensor:
    clip = load_clip(item.path, num_frames, side, step, item.position)
    return clip.add_(1).mul_(127.5)  # load_clip gives [-1, 1]


def _image(path: Path, side: int) -> Tensor:
    images = require("PIL.Image", extra="zoo", purpose="Reading images")
    numpy = require("numpy", extra="zoo", purpose="Reading images")
    try:
        with images.open(path) as image:
            pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, DecompressionBombError
        raise RedconvertError(f"'{path}' could not be read as an image: {error}") from error
    short = min(max(side, min(pixels.shape[:2])), round(side * 256 / 224))
    return resize_center_crop(pixels[None], side, short)
