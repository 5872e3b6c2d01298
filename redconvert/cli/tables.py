"""How plans, costs and files look on the console."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from ..calibrate import Calibration
from ..convert import CandidateTimes, Plan
from .app import console

__all__ = ["calibration_table", "plan_table", "print_facts", "print_verdicts", "show_saved", "show_tensors"]


def print_facts(facts: dict[str, Any], plan: Plan) -> None:
    from ..cost.render import format_count

    dense, lowest = facts["dense_macs"], facts["lowest_macs"]
    shapes = " + ".join("x".join(map(str, shape)) for shape in facts["input_shapes"])
    console.print(
        f"[bold]{plan.model}[/bold], {format_count(facts['parameters'])} parameters, input {shapes}: "
        f"[bold]{format_count(dense)}MACs[/bold] per sample. The lowest that the search space allows is "
        f"[bold]{format_count(lowest)}MACs[/bold], {1 - lowest / dense if dense else 0:.0%} less, gates included."
    )
    print_verdicts(plan)
    if "html" in facts:
        console.print(f"Page: {facts['html']}")


def print_verdicts(plan: Plan) -> None:
    console.print(
        f"{len(plan.converted)} of {len(plan.verdicts)} convolutions would become dynamic (read by {plan.source}"
        + (f"; fx: {plan.problem}" if plan.problem else "")
        + ")."
    )
    for name in plan.functional:
        console.print(f"{name} is a functional convolution: it is not a module and stays dense.")


def plan_table(plan: Plan, title: str) -> Table:
    from ..cost.render import format_count

    measured = any(verdict.times is not None for verdict in plan.verdicts)
    table = Table(title=title, title_justify="left", header_style="bold")
    for header in ("layer", "convolution", "output"):
        table.add_column(header, overflow="fold")
    for header in ("MACs", "lowest"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("channels", "frames", *(("time", "saved") if measured else ()), "verdict"):
        table.add_column(header, overflow="fold")
    for verdict in plan.verdicts:
        shape = verdict.facts.output_shape
        table.add_row(
            verdict.name,
            verdict.kind,
            "x".join(map(str, shape[1:])) if shape else "",
            "" if verdict.dense_macs is None else format_count(verdict.dense_macs),
            "" if verdict.lowest_macs is None else format_count(verdict.lowest_macs),
            "/".join(map(str, verdict.channels)) if len(verdict.channels) > 1 else "",
            "/".join(f"1:{stride}" if stride > 1 else "all" for stride in verdict.strides)
            if len(verdict.strides) > 1
            else "",
            *(_time_and_savings(verdict.times) if measured else ()),
            (f"converted; {verdict.remark}" if verdict.remark else "converted")
            if verdict.converted
            else f"skipped: {verdict.reason}",
            style=None if verdict.converted else "dim",
        )
    return table


def _time_and_savings(times: CandidateTimes | None) -> tuple[str, str]:
    """Milliseconds dense, and what the fastest candidate of each axis saves of them."""
    if times is None:
        return "", ""
    savings = [times.saving(axis) for axis in ("channel", "temporal")]
    return f"{times.dense_ms:.2f} ms", " / ".join(f"{saving:.0%}" for saving in savings if saving is not None)


def calibration_table(calibration: Calibration, title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    mixes = any(layer.input_explained for layer in calibration.layers)
    for header in ("layer", "channels", "explained", *(["of inputs"] if mixes else []), "frames", "explained"):
        table.add_column(header, justify="left" if header == "layer" else "right", overflow="fold")
    for layer in calibration.layers:
        row = [layer.name]
        row += _explained(layer.channels, layer.channel_explained)
        row += [_explained(layer.channels, layer.input_explained)[1]] if mixes else []
        row += _explained(layer.frame_strides, layer.temporal_explained)
        table.add_row(*row)
    return table


def _explained(candidates: tuple[int, ...], shares: tuple[float | None, ...]) -> tuple[str, str]:
    if not shares:
        return "", ""
    return "/".join(map(str, candidates)), " ".join("-" if share is None else f"{share:.1%}" for share in shares)


def show_saved(name: str, saved: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(saved, indent=2))
        return
    layers = saved.get("layers", {})
    table = Table(title=f"{name}: saved by redconvert {saved.get('redconvert', '?')}", title_justify="left")
    columns = ("search_space", "channel", "temporal", "gate", "cheap")
    for header in ("layer", *columns):
        table.add_column(header)
    for layer, values in layers.items():
        table.add_row(layer, *(str(values.get("config", values).get(column, "")) for column in columns))
    console.print(table)
    console.print(
        f"{len(layers)} dynamic layers of a {saved.get('model', 'network')}. Build that network in Python and call "
        f"redconvert.from_pretrained(model, {name!r})."
    )


def show_tensors(name: str, tensors: dict[str, Any], as_json: bool) -> None:
    convs = {key: list(value.shape) for key, value in tensors.items() if value.dim() in (4, 5) and "weight" in key}
    total = sum(value.numel() for value in tensors.values())
    if as_json:
        print(json.dumps({"name": name, "architecture": None, "numbers": total, "convolutions": convs}, indent=2))
        return
    table = Table(title=f"{name}: a state dict of no known architecture", title_justify="left")
    for header in ("weight", "out x in/groups x kernel", "numbers"):
        table.add_column(header, justify="right" if header == "numbers" else "left")
    for key, shape in convs.items():
        table.add_row(key, "x".join(map(str, shape)), f"{tensors[key].numel():,}")
    console.print(table)
    console.print(
        f"{len(convs)} convolution weights, {total:,} numbers in all. For MACs and verdicts, name the network: "
        f"redconvert-cli inspect module.path:factory"
    )
