"""Looking without changing: inspect and plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ConvertConfig
from ..convert import Plan, convert
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
from .progress import spinner, tracked
from .tables import plan_table, print_facts, print_verdicts, show_saved, show_tensors

__all__ = ["inspect", "plan"]


@app.command()
def inspect(
    model: Model,
    inputs: Input = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with a bar per layer.")] = None,
    trust: Trust = False,
    rule: Rules = None,
    config: ConfigFile = None,
    search_space: SearchSpace = None,
    absorb: Absorb = False,
    mix_inputs: MixInputs = False,
    num_frames: NumFrames = None,
) -> None:
    """Layers, MACs, what would become dynamic and why not the rest, and the lowest MACs it could cost."""
    from ..sources import guess_architecture, open_source

    settings = read_config(config, rule, search_space, num_frames, model, absorb, mix_inputs)
    source = open_source(model, trust=trust)
    if source.saved is not None:
        show_saved(source.name, source.saved, as_json)
        return
    network, name = source.model, source.name
    if network is None:
        assert source.tensors is not None
        found = guess_architecture(source.tensors, lambda names: tracked(names, "Comparing architectures", as_json))
        if found is None:
            show_tensors(source.name, source.tensors, as_json)
            return
        name, network = f"{source.name} ({found[0]})", found[1]
    example, plan = inputs_and_plan(network, settings, inputs, as_json)
    facts = _facts(name, network, plan, example, as_json)
    if html is not None:
        _write_page(network, settings, example, html)
        facts["html"] = str(html)
    if as_json:
        print(json.dumps(facts | {"plan": plan.to_dict()}, indent=2))
        return
    console.print(plan_table(plan, title=name))
    print_facts(facts, plan)


@app.command()
def plan(
    model: Model,
    inputs: Input = None,
    measure: Measure = False,
    as_json: AsJson = False,
    trust: Trust = False,
    rule: Rules = None,
    config: ConfigFile = None,
    search_space: SearchSpace = None,
    absorb: Absorb = False,
    mix_inputs: MixInputs = False,
    num_frames: NumFrames = None,
) -> None:
    """A dry run of convert: the verdict and the reason for each convolution."""
    settings = read_config(config, rule, search_space, num_frames, model, absorb, mix_inputs)
    _, made = inputs_and_plan(open_network(model, trust), settings, inputs, as_json, measure)
    if as_json:
        print(made.to_json())
    else:
        console.print(plan_table(made, title=model))
        print_verdicts(made)


def _facts(name: str, network: Any, plan: Plan, example: Any, quiet: bool) -> dict[str, Any]:
    from ..cost import dense_macs
    from ..inputs import tensors_in

    with spinner("Counting multiply-adds", quiet):
        counted = dense_macs(network, example)
    samples = tensors_in(example)[0].shape[0]
    dense = counted.total // samples
    saved = (plan.dense_macs or 0) - (plan.lowest_macs or 0)
    return {
        "name": name,
        "model": plan.model,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "input_shapes": [list(tensor.shape) for tensor in tensors_in(example)],
        "read_by": plan.source,
        "dense_macs": dense,
        "lowest_macs": dense - saved,
        "convolutions": len(plan.verdicts),
        "converted": len(plan.converted),
    }


def _write_page(network: Any, settings: ConvertConfig, example: Any, path: Path) -> None:
    from ..cost import report
    from ..layers import dynamic_layers, forced

    dynamic = convert(network, settings, example_inputs=example)
    candidates = [layer.candidates for layer in dynamic_layers(dynamic).values()]
    channel = max(len(each.channels) for each in candidates) - 1
    temporal = max(len(each.strides) for each in candidates) - 1
    with forced(dynamic, channel=channel, temporal=temporal):
        cheapest = report(dynamic, (example,) if isinstance(example, list) else example, time=False)
    cheapest.to_html(path, note="Every layer at its cheapest candidate: the lowest MACs that the search space allows.")
