"""redconvert-cli bench: time against MACs on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..convert import convert
from ..errors import RedconvertError
from ..files import write_text_atomic
from .app import app, console
from .opening import inputs_and_plan, open_network
from .options import (
    Absorb,
    AsJson,
    ConfigFile,
    Input,
    Measure,
    MixInputs,
    Model,
    NumFrames,
    Rules,
    SearchSpace,
    Trust,
    read_config,
)

__all__ = ["bench"]

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@app.command()
def bench(
    model: Model,
    inputs: Input = None,
    as_json: AsJson = False,
    repeats: Annotated[int, typer.Option(help="Timed runs of each form, in turn with all others.", min=1)] = 5,
    measured: Measure = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
    compiled_dynamic: Annotated[
        bool, typer.Option("--compile-dynamic", help="Time the masked and the frozen network in torch.compile too.")
    ] = False,
    align: Annotated[int | None, typer.Option(help="Round channel counts up to a multiple of this.", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of time against MACs.")] = None,
    trust: Trust = False,
    rule: Rules = None,
    config: ConfigFile = None,
    search_space: SearchSpace = None,
    absorb: Absorb = False,
    mix_inputs: MixInputs = False,
    num_frames: NumFrames = None,
) -> None:
    """Milliseconds of the deployed network, dense and reduced, beside the dense forms that could run instead."""
    from torch.utils._pytree import tree_map

    from ..deploy.bench import bench as measure

    if dtype not in TYPES:
        raise RedconvertError(f"--dtype {dtype} is none of {', '.join(TYPES)}")
    settings = read_config(config, rule, search_space, num_frames, absorb=absorb, mix_inputs=mix_inputs)
    settings = settings if align is None else replace(settings, align=align)
    network = open_network(model, trust).eval()
    example, _ = inputs_and_plan(network, settings, inputs, as_json)
    dynamic = convert(network, settings, example_inputs=example, measure=measured).to(TYPES[dtype])
    cast = tree_map(lambda x: x.to(TYPES[dtype]) if torch.is_floating_point(x) else x, example)
    options: dict[str, Any] = {"repeats": repeats, "compiled": compiled, "compiled_dynamic": compiled_dynamic}
    found = measure(dynamic, cast, **options, progress=not as_json)
    if out is not None:
        write_text_atomic(out, found.to_json())
    if plot is not None:
        found.plot(plot)
    if as_json:
        print(found.to_json(), end="")
        return
    console.print(found.table())
    for loser in found.losers[:4]:
        console.print(f"loses {loser['lost_ms']:.2f} ms: {loser['layer']} ({loser['kind']})", highlight=False)
