"""export: a network, dynamic or with one policy baked in, as one ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..checkpoint import from_pretrained
from ..config import ConvertConfig
from ..deploy import export_onnx, freeze
from ..errors import RedconvertError
from ..inputs import tensors_in
from ..layers import DynamicConv
from .app import app, console
from .opening import inputs_and_plan, open_network
from .options import AsJson, Input, Model, Trust, read_shape
from .progress import spinner

__all__ = ["export"]


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The ONNX file.")],
    dynamic: Annotated[
        Path | None, typer.Option(help="Folder of calibrate or save_pretrained for MODEL.", show_default=False)
    ] = None,
    channel: Annotated[
        int | None, typer.Option(min=0, help="Bake this channel candidate into every layer.", show_default=False)
    ] = None,
    temporal: Annotated[
        int | None, typer.Option(min=0, help="Bake this temporal candidate into every layer.", show_default=False)
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the size of the batch open.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare with onnxruntime before the file is written.")] = True,
    inputs: Input = None,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Write ONNX: with --channel or --temporal a plain smaller network, else gates that decide in the file."""
    network = open_network(model, trust)
    example = _example(network, inputs, as_json)
    if dynamic is not None:
        network = from_pretrained(network, dynamic, inplace=True)
    form = "dynamic" if any(isinstance(module, DynamicConv) for module in network.modules()) else "dense"
    policy = None if channel is temporal is None else (channel or 0, temporal or 0)
    if policy is not None:
        if form == "dense":
            raise RedconvertError(f"{model} is no dynamic network, so it has no candidates: give --dynamic FOLDER")
        network, form = freeze(network, policy, inplace=True), "frozen"
    with spinner("Exporting", as_json):
        export_onnx(network, example, out, dynamic_batch=dynamic_batch, verify=verify)
    facts = {
        "name": model,
        "out": str(out),
        "form": form,
        "policy": policy,
        "bytes": out.stat().st_size,
        "verified": verify,
        "input_shapes": [list(tensor.shape) for tensor in tensors_in(example)],
    }
    _show(facts, as_json)


def _example(network: nn.Module, inputs: list[str] | None, quiet: bool) -> Any:
    """Example inputs: given, or guessed."""
    from ..sources import tensors_of

    if not inputs:
        return inputs_and_plan(network, ConvertConfig(), None, quiet)[0]
    shapes = tuple(read_shape(text) for text in inputs)
    return tensors_of(shapes[0] if len(shapes) == 1 else shapes)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    forms = {
        "dense": "the network as it is",
        "dynamic": "gates decide per sample, and everything is computed",
        "frozen": f"candidates {facts['policy']} baked in",
    }
    shapes = " + ".join("x".join(map(str, shape)) for shape in facts["input_shapes"])
    checked = ", checked with onnxruntime" if facts["verified"] else ""
    console.print(f"{facts['name']}, {shapes}: {forms[facts['form']]}{checked}.")
    console.print(f"Saved: {facts['out']} ({facts['bytes'] / 1e6:.1f} MB)")
