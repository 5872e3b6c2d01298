"""What calibrate, reduce and finetune begin with: a dynamic network, and samples of its inputs from --data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint import from_pretrained, load_weights
from ..config import ConvertConfig
from ..convert import convert
from ..errors import RedconvertError, require
from ..inputs import tensors_in
from .app import warn
from .opening import inputs_and_plan, open_network
from .preprocess import default_normalisation, three_numbers
from .progress import tracked
from .samples import IMAGES, VIDEOS, Batches, Samples, choose, find_files, read_samples

__all__ = ["Prepared", "Source", "check_share", "check_targets", "prepare", "say_saved", "say_where", "split"]

TEST_EVERY = 4  # of the files (or, of a single file, of the samples) one is kept to measure on


@dataclass(frozen=True)
class Source:
    """The options that say which network, which files, and how those become its inputs."""

    model: str
    data: list[Path]
    weights: str | None
    samples: int
    step: int
    mean: str | None
    std: str | None
    device: str | None
    inputs: list[str] | None
    trust: bool
    dynamic: Path | None = None  # a saved network to go on from


@dataclass(frozen=True)
class Prepared:
    """A dynamic network and what was read for it.

    Attributes:
        read: the samples; `batches` gives them as the network takes them.
        facts: for ``--json`` and the last lines.
    """

    dynamic: nn.Module
    read: Samples
    shapes: list[tuple[int, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict[str, Any]

    def batches(self, size: int, chosen: list[int] | None = None) -> Batches:
        """Batches of these samples; None: of all."""
        clips = self.read.clips if chosen is None else [self.read.clips[i] for i in chosen]
        return Batches(clips, self.shapes, size, self.mean, self.std)


def prepare(source: Source, settings: ConvertConfig, quiet: bool) -> Prepared:
    """Open, convert and move the network, and read the samples. RedconvertError: one of them cannot be."""
    texts = ((source.mean, "--mean"), (source.std, "--std"))
    colours = [three_numbers(text, name) if text else None for text, name in texts]
    network = _open(source.model, source.weights, source.trust, quiet=source.dynamic is not None)
    example, _ = inputs_and_plan(network, settings, source.inputs, quiet)
    wanted = _wanted(source.model, example, settings)
    files = find_files(source.data, wanted.suffixes)
    defaults = default_normalisation(source.model, network, video=len(wanted.shapes[0]) == 5)
    mean, std = (given or default for given, default in zip(colours, defaults, strict=True))
    read = read_samples(
        choose(files, source.samples),
        wanted.frames,
        wanted.height,
        wanted.width,
        source.step,
        lambda items: tracked(items, "Reading samples", quiet),
    )
    if read.problems:
        path, why = next(iter(read.problems.items()))
        warn(f"{len(read.problems)} of the files could not be read and are left out, the first '{path}': {why}")
    if source.dynamic is None:
        dynamic = convert(network, settings, example_inputs=example, inplace=True)
    else:
        dynamic = from_pretrained(network, source.dynamic, inplace=True)
    _move(dynamic, source.device)
    facts = {
        "name": source.model,
        "input_shapes": [list(shape) for shape in wanted.shapes],
        "mean": list(mean),
        "std": list(std),
        "files": len(files),
        "unreadable": {str(path): why for path, why in read.problems.items()},
    }
    return Prepared(dynamic, read, wanted.shapes, tuple(mean), tuple(std), facts)


def say_where(facts: dict[str, Any], samples: int) -> str:
    """What was read, for the last lines: ``"64 samples of 3x16x112x112 from 9 files, (x - mean) / std with ..."``."""
    mean, std = (",".join(f"{value:g}" for value in facts[key]) for key in ("mean", "std"))
    shapes = " + ".join("x".join(map(str, shape[1:])) for shape in facts["input_shapes"])
    return f"{samples} samples of {shapes} from {facts['files']} files, (x - mean) / std with mean {mean} and std {std}"


def say_saved(folder: str, plot: str | None) -> str:
    """Where the network is and how to go on with it, for the last line."""
    picture = f"; picture: {plot}" if plot else ""
    return (
        f"Saved: {folder}{picture}. In Python: dynamic = redconvert.from_pretrained(model, {folder!r}), then "
        f"redconvert.deploy(dynamic, inputs)."
    )


class _Wanted(NamedTuple):
    """What the network takes: its inputs' shapes, what one sample is, and which files hold such."""

    shapes: list[tuple[int, ...]]
    frames: int
    height: int
    width: int
    suffixes: tuple[str, ...]


def _wanted(name: str, example: Any, settings: ConvertConfig) -> _Wanted:
    shapes = [tuple(tensor.shape) for tensor in tensors_in(example)]
    video = len(shapes[0]) == 5
    alike = len({(len(shape), shape[-2:]) for shape in shapes}) == 1 and (video or len(shapes) == 1)
    if not alike or len(shapes[0]) not in (4, 5) or any(shape[1] != 3 for shape in shapes):
        raise RedconvertError(
            f"{name} takes {' + '.join('x'.join(map(str, shape)) for shape in shapes)}: files give only RGB images "
            f"(N,3,H,W) and clips (N,3,T,H,W) of one height and width; call redconvert.calibrate in Python"
        )
    height, width = shapes[0][-2:]
    if video:
        return _Wanted(shapes, max(shape[2] for shape in shapes), height, width, VIDEOS)
    if settings.num_frames:
        return _Wanted(shapes, settings.num_frames, height, width, VIDEOS)
    return _Wanted(shapes, 1, height, width, (*IMAGES, *VIDEOS))  # the frames of videos are images too


def _open(model: str, weights: str | None, trust: bool, quiet: bool) -> nn.Module:
    library, _, rest = model.partition(":")
    if weights is not None and library == "zoo" and not Path(weights).exists():
        from .. import zoo

        return zoo.create(rest, weights=weights)
    network = open_network(model, trust)
    if weights is not None:
        load_weights(network, weights, trust=trust)
    elif not quiet and library in ("timm", "torchvision", "pytorchvideo", "zoo") and not Path(model).exists():
        warn(f"{model} has random weights, so this calibrates noise: give --weights FILE")
    return network


def check_share(value: float, option: str) -> float:
    if not 0 < value <= 1:
        raise RedconvertError(f"{option}: {value:g} must be a share in (0, 1]")
    return value


def split(paths: Sequence[Path]) -> tuple[list[int], list[int]]:
    """Samples to work with and samples to measure on, of different files where there are several."""
    files = list(dict.fromkeys(paths))
    place = {path: index for index, path in enumerate(files)}
    groups = [place[path] for path in paths] if len(files) > 1 else list(range(len(paths)))
    test = [i for i, group in enumerate(groups) if group % TEST_EVERY == 1]
    if not test:
        raise RedconvertError("--data gives a single sample: one is needed to work with and one to measure on")
    return [i for i in range(len(paths)) if i not in set(test)], test


def check_targets(out: Path, plot: Path | None, mark: str | None = None) -> None:
    """Before minutes of work: can the results be written? A folder that holds the file ``mark`` is ours."""
    if out.exists() and not out.is_dir():
        raise RedconvertError(f"--out: '{out}' is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (mark and (out / mark).exists()):
        try:
            ours = json.loads((out / "config.json").read_text(encoding="utf-8"))["format"] == "redconvert"
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise RedconvertError(f"--out: '{out}' holds other files: give a new folder, or one of save_pretrained")
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise RedconvertError(f"--out: '{existing}' is not yours to write to: give another folder")
    if plot is not None:
        require("matplotlib.figure", extra="plot", purpose="--plot")
        if not plot.absolute().parent.is_dir():
            raise RedconvertError(f"--plot: there is no folder '{plot.parent}'")


def _move(network: nn.Module, device: str | None) -> None:
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network.to(target)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise RedconvertError(f"--device: cannot move the network to '{target}': {error}") from error
