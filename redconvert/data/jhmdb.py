"""J-HMDB-21: 928 clips of 21 actions, 15 to 40 frames each, the official first split."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from redconvert.data.crops import placed_square, random_run, random_square
from redconvert.data.video import read_video, sample_clip, to_clip
from redconvert.errors import RedconvertError
from redconvert.progress import progress_bar

__all__ = ["JHMDB", "JHMDBViews", "data_root"]

Row = dict[str, str]


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: ``root``, else ``$REDCONVERT_DATA``, else ``../shared/data`` beside the checkout.

    Raises:
        RedconvertError: it is no folder.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(root if root is not None else os.environ.get("REDCONVERT_DATA", beside))
    if not folder.is_dir():
        raise RedconvertError(
            f"the data folder '{folder}' is absent. Give root=, the folder that holds 'jhmdb', or set REDCONVERT_DATA."
        )
    return folder


class JHMDB(Dataset[tuple[Tensor, int]]):
    """Items are ``(clip, label)``: float32 ``(3, num_frames, size, size)`` in [-1, 1], and the index of the class.

    Clips for training take a random run of frames and a random square, and half of them are mirrored, all from torch's
    global generator: the same seed gives the same clips. Clips for testing are the middle of time and picture. A video
    with too few frames is looped.

    Args:
        root: the folder that holds ``folder``; None as in :func:`data_root`.
        split: "train" (660 clips) or "test" (268).
        num_frames: frames of a clip.
        size: side of the square that the network sees, in pixels.
        step: distance between two frames of a clip, in frames of the video.
        short_side: what the picture's short side would be, in pixels, where the square is ``size``; None is
            ``size * 256 / 224``, rounded: 128 for 112, so that "jhmdb_128" is not scaled.
        clips: "random" or "center"; None is "random" for training and "center" for testing.
        jitter: lowest and highest ``short_side`` of random clips, as multiples of it.
        flip: how likely a random clip is mirrored left to right.
        mean, std: ``(x / 255 - mean) / std``, one number or one per colour.
        folder: "jhmdb_128" (170x128) or "jhmdb" (320x240). ``split1.csv`` is read from it, or else from "jhmdb".
        per_class: only the first so many clips of every class; None takes all.
        cache: decode all clips now and keep their frames, uint8: 1.4 GB for the training split of "jhmdb_128", 0.6 GB
            for the other. Without it each item is decoded when it is asked for.
        device: where clips are cropped and scaled. With ``cache`` a GPU does that as fast as a network there learns,
            without other processes. Frames stay in the CPU's memory, and random numbers come from its generator.
        progress: show a bar meanwhile (needs rich).

    Attributes:
        classes: the 21 names, sorted; labels are indices into them.
        names: "class/number" of each item.
        labels: of each item.

    Raises:
        RedconvertError: an absent folder, table or clip, or an argument out of its range.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "test"] = "train",
        *,
        num_frames: int = 16,
        size: int = 112,
        step: int = 1,
        short_side: int | None = None,
        clips: Literal["random", "center"] | None = None,
        jitter: tuple[float, float] = (1.0, 1.25),
        flip: float = 0.5,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        folder: str = "jhmdb_128",
        per_class: int | None = None,
        cache: bool = False,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> None:
        self.clips = clips or ("random" if split == "train" else "center")
        self.num_frames, self.size, self.step = num_frames, size, step
        self.short_side = round(size * 256 / 224) if short_side is None else short_side
        self.jitter, self.flip, self.mean, self.std = jitter, flip, mean, std
        self.device = device
        _check_choice("split", split, ("train", "test"))
        _check_choice("clips", self.clips, ("random", "center"))
        self._check_numbers(per_class)
        self.folder = data_root(root) / folder
        rows = _read_table(self.folder)
        self.classes = sorted({row["label"] for row in rows})
        rows = _first_of_each([row for row in rows if row["split"] == split], per_class)
        self.names = [row["clip"].removesuffix(".mp4") for row in rows]
        self.labels = [self.classes.index(row["label"]) for row in rows]
        self._check_files()
        self._cache = self._decode_all(progress) if cache else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames = self.frames(index)
        return self._random_clip(frames) if self.clips == "random" else self._clip(frames), self.labels[index]

    def path(self, index: int) -> Path:
        """Where the video of an item is."""
        return self.folder / f"{self.names[index]}.mp4"

    def frames(self, index: int) -> Tensor:
        """The video of an item, whole and as it is: uint8 ``(T, H, W, 3)``. Do not write to it."""
        return read_video(self.path(index)) if self._cache is None else self._cache[index]

    def views(self, num_clips: int = 10, num_crops: int = 3) -> JHMDBViews:
        """The same videos, each as many clips, for `redconvert.evaluate.video_1`."""
        return JHMDBViews(self, num_clips, num_crops)

    def views_of(self, index: int, num_clips: int, num_crops: int) -> Tensor:
        """``(num_clips * num_crops, 3, num_frames, size, size)``: evenly through time, and along the long side."""
        frames = self.frames(index)
        places = [(when, where) for when in _evenly(num_clips) for where in _evenly(num_crops)]
        return torch.stack([self._clip(frames, when, where) for when, where in places])

    def _clip(self, frames: Tensor, when: float = 0.5, where: float = 0.5) -> Tensor:
        run = sample_clip(frames, self.num_frames, self.step, when).to(self.device)
        return to_clip(placed_square(run, self._side(frames), where), self.size, self.mean, self.std)

    def _random_clip(self, frames: Tensor) -> Tensor:
        run = random_run(frames, self.num_frames, self.step).to(self.device)
        return to_clip(random_square(run, self._side(frames), self.jitter, self.flip), self.size, self.mean, self.std)

    def _side(self, frames: Tensor) -> float:
        """Of the square, in pixels of the video: cut first and scaled then, only what is seen is scaled."""
        return self.size / self.short_side * min(frames.shape[1:3])

    def _decode_all(self, progress: bool) -> list[Tensor]:
        videos = []
        with progress_bar(progress, "Decoding J-HMDB", len(self)) as step:
            for index in range(len(self)):
                videos.append(read_video(self.path(index)))
                step()
        return videos

    def _check_files(self) -> None:
        absent = [path for path in map(self.path, range(len(self))) if not path.is_file()]
        if absent:
            raise RedconvertError(
                f"JHMDB: {len(absent)} of {len(self)} clips are absent, the first is '{absent[0]}'. "
                "Copy the folder again."
            )

    def _check_numbers(self, per_class: int | None) -> None:
        least = {"num_frames": 1, "size": 1, "step": 1, "short_side": self.size}
        values = [(name, getattr(self, name), low) for name, low in least.items()]
        for name, value, low in [*values, ("per_class", 1 if per_class is None else per_class, 1)]:
            if value < low:
                raise RedconvertError(f"JHMDB: {name}={value}; it must be at least {low}.")
        if not 0.0 <= self.flip <= 1.0:
            raise RedconvertError(f"JHMDB: flip={self.flip}; it is a probability, from 0.0 to 1.0.")
        smallest, largest = self.jitter
        if not self.size / self.short_side <= smallest <= largest:
            raise RedconvertError(
                f"JHMDB: jitter={self.jitter}; it is the lowest and the highest multiple of "
                f"short_side={self.short_side}, and the lowest must leave room for size={self.size}."
            )


class JHMDBViews(Dataset[tuple[Tensor, int]]):
    """Items are ``(views, label)``: several clips of one video, ``(num_clips * num_crops, 3, T, H, W)``.

    The clips are spread evenly from the first to the last that the video has room for (one clip is the middle); the
    crops of each lie evenly along the picture's long side (three are left, middle and right). Nothing is random.

    Raises:
        RedconvertError: fewer than one clip or crop.
    """

    def __init__(self, videos: JHMDB, num_clips: int = 10, num_crops: int = 3) -> None:
        if num_clips < 1 or num_crops < 1:
            raise RedconvertError(f"JHMDB: num_clips={num_clips} and num_crops={num_crops} must be at least 1.")
        self.videos, self.num_clips, self.num_crops = videos, num_clips, num_crops

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.videos.views_of(index, self.num_clips, self.num_crops), self.videos.labels[index]


def _evenly(count: int) -> list[float]:
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


def _read_table(folder: Path) -> list[Row]:
    """The rows of ``split1.csv``: clip, label, split, num_frames."""
    if not folder.is_dir():
        raise RedconvertError(
            f"JHMDB: the folder '{folder}' is absent. Give root=, the folder that holds 'jhmdb' and 'jhmdb_128'."
        )
    tables = [folder / "split1.csv", folder.parent / "jhmdb" / "split1.csv"]
    for table in tables:
        if table.is_file():
            with table.open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
    raise RedconvertError(
        f"JHMDB: neither '{tables[0]}' nor '{tables[1]}' is there; it lists the clips and their split."
    )


def _first_of_each(rows: list[Row], per_class: int | None) -> list[Row]:
    groups = groupby(sorted(rows, key=itemgetter("label")), key=itemgetter("label"))
    return [row for _, group in groups for row in list(group)[:per_class]]


def _check_choice(name: str, value: str, choices: tuple[str, str]) -> None:
    if value not in choices:
        raise RedconvertError(f"JHMDB: {name}={value!r}; it is '{choices[0]}' or '{choices[1]}'.")
