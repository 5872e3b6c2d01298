"""calibrate: from a network and unlabelled files to a dynamic network on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from torch import nn

from ..calibrate import Calibration, plot_explained
from ..calibrate import calibrate as calibrate_network
from ..checkpoint import load_weights, save_pretrained
from ..config import ConvertConfig
from ..convert import convert
from ..errors import RedconvertError, require
from ..inputs import tensors_in
from .app import app, console, warn
from .opening import inputs_and_plan, open_network
from .options import Absorb, AsJson, ConfigFile, Input, Model, NumFrames, Rules, SearchSpace, Trust, read_config
from .preprocess import default_normalisation, three_numbers
from .progress import shown, tracked
from .samples import IMAGES, VIDEOS, Batches, choose, find_files, read_samples
from .tables import calibration_table

__all__ = ["calibrate"]


@app.command()
def calibrate(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option("--data", help="Folder, searched through, or file: videos or images without labels. Repeat it."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the dynamic network, as save_pretrained writes it.")],
    more: Annotated[
        list[Path] | None, typer.Argument(help="More of --data, so that --data clips/*.mp4 works.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A checkpoint for MODEL; for zoo: also what its builder knows, KINETICS400.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Clips or images, spread over the files.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Of them at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=0, help="Of correction against the reduced network.")] = 0,
    importance: Annotated[
        str, typer.Option(help="Channels are chosen for the 'answers', or for the 'norms', which takes less memory.")
    ] = "answers",
    step: Annotated[int, typer.Option(min=1, help="From frame to frame of a clip, in 25ths of a second.")] = 1,
    mean: Annotated[
        str | None, typer.Option(help="Of each colour, for values in [0, 1]: 0.5,0.5,0.5.", show_default="the model's")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Likewise.", show_default="the model's")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1.", show_default="cuda, else cpu")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw what each layer's candidates explain.")] = None,
    inputs: Input = None,
    as_json: AsJson = False,
    trust: Trust = False,
    rule: Rules = None,
    config: ConfigFile = None,
    search_space: SearchSpace = None,
    absorb: Absorb = False,
    num_frames: NumFrames = None,
) -> None:
    """Convert a network, give its cheap operations a start from unlabelled videos or images, and save it."""
    settings = read_config(config, rule, search_space, num_frames, model, absorb)
    colours = three_numbers(mean, "--mean") if mean else None, three_numbers(std, "--std") if std else None
    _check_targets(out, plot)
    wanted_importance = _importance(importance)
    network = _open(model, weights, trust)
    example, _ = inputs_and_plan(network, settings, inputs, as_json)
    wanted = _wanted(model, example, settings)
    files = find_files([*data, *(more or ())], wanted.suffixes)
    defaults = default_normalisation(model, network, video=len(wanted.shapes[0]) == 5)
    chosen_mean, chosen_std = colours[0] or defaults[0], colours[1] or defaults[1]
    read = read_samples(
        choose(files, samples),
        wanted.frames,
        wanted.height,
        wanted.width,
        step,
        lambda items: tracked(items, "Reading samples", as_json),
    )
    if read.problems:
        path, why = next(iter(read.problems.items()))
        warn(f"{len(read.problems)} of the files could not be read and are left out, the first '{path}': {why}")
    dynamic = convert(network, settings, example_inputs=example, inplace=True)
    _move(dynamic, device)
    batches = Batches(read.clips, wanted.shapes, batch_size, chosen_mean, chosen_std)
    result = calibrate_network(dynamic, batches, rounds=rounds, importance=wanted_importance, progress=shown(as_json))
    save_pretrained(dynamic, out)
    if plot is not None:
        plot_explained(result, plot)
    facts = {
        "name": model,
        "out": str(out),
        "plot": None if plot is None else str(plot),
        "input_shapes": [list(shape) for shape in wanted.shapes],
        "mean": list(chosen_mean),
        "std": list(chosen_std),
        "files": len(files),
        "unreadable": {str(path): why for path, why in read.problems.items()},
    }
    _show(result, facts, as_json)


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


def _open(model: str, weights: str | None, trust: bool) -> nn.Module:
    library, _, rest = model.partition(":")
    if weights is not None and library == "zoo" and not Path(weights).exists():
        from .. import zoo

        return zoo.create(rest, weights=weights)
    network = open_network(model, trust)
    if weights is not None:
        load_weights(network, weights, trust=trust)
    elif library in ("timm", "torchvision", "pytorchvideo", "zoo") and not Path(model).exists():
        warn(f"{model} has random weights, so this calibrates noise: give --weights FILE")
    return network


def _importance(text: str) -> Literal["answers", "norms"]:
    if text not in ("answers", "norms"):
        raise RedconvertError(f"--importance: '{text}' must be answers or norms")
    return "answers" if text == "answers" else "norms"


def _check_targets(out: Path, plot: Path | None) -> None:
    """Before minutes of work: can the results be written?"""
    if out.exists() and not out.is_dir():
        raise RedconvertError(f"--out: '{out}' is a file: give a folder")
    if out.is_dir() and any(out.iterdir()):
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


def _show(result: Calibration, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts | {"calibration": result.to_dict()}, indent=2))
        return
    console.print(calibration_table(result, title=facts["name"]))
    mean, std = (",".join(f"{value:g}" for value in facts[key]) for key in ("mean", "std"))
    shapes = " + ".join("x".join(map(str, shape[1:])) for shape in facts["input_shapes"])
    console.print(
        f"{result.samples} samples of {shapes} from {facts['files']} files, (x - mean) / std with mean {mean} and std "
        f"{std}; {result.rounds} rounds, {result.seconds:.1f} s. Every gate is still open."
    )
    console.print(f"Saved: {facts['out']}" + (f"; picture: {facts['plot']}" if facts["plot"] else ""))
