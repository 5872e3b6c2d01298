"""calibrate: from a network and unlabelled files to a dynamic network on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..calibrate import Calibration, plot_explained
from ..calibrate import calibrate as calibrate_network
from ..checkpoint import save_pretrained
from ..errors import RedconvertError
from .app import app, console
from .options import (
    Absorb,
    AsJson,
    BatchSize,
    ConfigFile,
    Data,
    Device,
    FrameStep,
    Input,
    Mean,
    MixInputs,
    Model,
    More,
    NumFrames,
    Out,
    Rules,
    SampleCount,
    SearchSpace,
    Std,
    Trust,
    Weights,
    read_config,
)
from .preparing import Source, check_targets, prepare, say_where
from .progress import shown
from .tables import calibration_table

__all__ = ["calibrate"]


@app.command()
def calibrate(
    model: Model,
    data: Data,
    out: Out,
    more: More = None,
    weights: Weights = None,
    samples: SampleCount = 64,
    batch_size: BatchSize = 8,
    rounds: Annotated[int, typer.Option(min=0, help="Of correction against the reduced network.")] = 0,
    importance: Annotated[
        str, typer.Option(help="Channels are chosen for the 'answers', or for the 'norms', which takes less memory.")
    ] = "answers",
    step: FrameStep = 1,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    plot: Annotated[Path | None, typer.Option(help="Draw what each layer's candidates explain.")] = None,
    inputs: Input = None,
    as_json: AsJson = False,
    trust: Trust = False,
    rule: Rules = None,
    config: ConfigFile = None,
    search_space: SearchSpace = None,
    absorb: Absorb = False,
    mix_inputs: MixInputs = False,
    num_frames: NumFrames = None,
) -> None:
    """Convert a network, give its cheap operations a start from unlabelled videos or images, and save it."""
    settings = read_config(config, rule, search_space, num_frames, model, absorb, mix_inputs)
    check_targets(out, plot)
    wanted = _importance(importance)
    source = Source(model, [*data, *(more or ())], weights, samples, step, mean, std, device, inputs, trust)
    ready = prepare(source, settings, as_json)
    result = calibrate_network(
        ready.dynamic, ready.batches(batch_size), rounds=rounds, importance=wanted, progress=shown(as_json)
    )
    save_pretrained(ready.dynamic, out)
    if plot is not None:
        plot_explained(result, plot)
    _show(result, ready.facts | {"out": str(out), "plot": None if plot is None else str(plot)}, as_json)


def _importance(text: str) -> Literal["answers", "norms"]:
    if text not in ("answers", "norms"):
        raise RedconvertError(f"--importance: '{text}' must be answers or norms")
    return "answers" if text == "answers" else "norms"


def _show(result: Calibration, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts | {"calibration": result.to_dict()}, indent=2))
        return
    console.print(calibration_table(result, title=facts["name"]))
    console.print(
        f"{say_where(facts, result.samples)}; {result.rounds} rounds, {result.seconds:.1f} s. Every gate is still open."
    )
    console.print(f"Saved: {facts['out']}" + (f"; picture: {facts['plot']}" if facts["plot"] else ""))
