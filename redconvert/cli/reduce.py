"""reduce: from a network and unlabelled files to one that is as cheap as its answers allow, without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

from ..budget import BudgetCurve, CurvePoint, budget_curve
from ..calibrate import calibrate
from ..checkpoint import save_pretrained
from ..cost.clock import interleaved
from ..deploy import deploy, layer_times
from ..errors import RedconvertError
from ..files import write_text_atomic
from ..inputs import call_with, device_of, each_batch, evaluating, move_to
from ..layers import disabled
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
from .preparing import Prepared, Source, check_share, check_targets, prepare, say_saved, say_where, split
from .progress import shown

__all__ = ["reduce"]

BUDGETS = "0.95,0.9,0.85,0.8,0.7,0.6"
# Of the channels, where the options name no candidates: without training halves are too coarse.
CANDIDATES: dict[str, Any] = {"shares": (0.875, 0.75, 0.625, 0.5), "cheap": "principal"}
ALIGN = 16  # of budgets of time: kernels take so many channels at once, and fewer are no faster


@app.command()
def reduce(
    model: Model,
    data: Data,
    out: Out,
    more: More = None,
    agreement: Annotated[
        float | None,
        typer.Option(help="Take the fewest MACs at which this share of the answers stays.", show_default="0.95"),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Or take this share of the dense MACs, whatever happens to the answers.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="To try, as shares of the dense MACs.")] = BUDGETS,
    weights: Weights = None,
    samples: SampleCount = 128,
    batch_size: BatchSize = 8,
    step: FrameStep = 1,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the answers that stay against MACs.")] = None,
    time: Annotated[bool, typer.Option(help="Time the result too, deployed.")] = True,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Budgets are of the time here, deployed, not of the MACs.", show_default=False),
    ] = False,
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
    """Make a network as cheap as its answers allow, without training, from unlabelled videos or images; save it.

    Layers compute all, 7/8, 3/4, 5/8 or half as many channels, as mixtures, and all or half of their frames, unless
    --config or --search-space says otherwise. With --mix-inputs they read mixtures, too, which keeps more answers for
    the same MACs, but takes more time. With --measure the network becomes as fast as its answers allow: shares are of
    the dense network's time on this machine, both deployed.
    """
    settings = read_config(config, rule, search_space, num_frames, model, absorb, mix_inputs)
    if config is None and search_space is None:
        settings = replace(settings, **CANDIDATES, align=ALIGN if measure else settings.align)
    check_targets(out, plot)
    wanted = _shares(budgets) if budget is None else [check_share(budget, "--budget")]
    if agreement is not None and budget is not None:
        raise RedconvertError("--agreement and --budget exclude each other: the one asks for the other")
    stay = 0.95 if agreement is None else check_share(agreement, "--agreement")
    source = Source(model, [*data, *(more or ())], weights, samples, step, mean, std, device, inputs, trust)
    ready = prepare(source, settings, as_json)
    kept, tested = split(ready.read.paths)
    fit, test = ready.batches(batch_size, kept), ready.batches(batch_size, tested)
    calibrate(ready.dynamic, fit, progress=shown(as_json))
    stay = stay if budget is None else 0.0
    one = next(each_batch(ready.batches(1, tested)))
    times = layer_times(ready.dynamic, one, progress=shown(as_json)) if measure else None
    curve = budget_curve(
        ready.dynamic, fit, wanted, test=test, refit=True, keep=stay, times=times, progress=shown(as_json)
    )
    if plot is not None:
        curve.plot(plot)
    chosen = _cheapest(curve, stay, model, as_json)
    save_pretrained(ready.dynamic, out)
    facts = ready.facts | {"out": str(out), "plot": None if plot is None else str(plot), "chosen": chosen.budget}
    facts["curve"], facts["times"] = curve.to_dict(), None if times is None else times.to_dict()
    facts["milliseconds"] = _milliseconds(ready.dynamic, one) if time else None
    write_text_atomic(out / "reduce.json", json.dumps(facts, indent=2) + "\n")
    _show(curve, chosen, ready, facts, as_json)


def _shares(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RedconvertError(f"--budgets: '{text}' is not a list such as {BUDGETS}") from error
    return [check_share(value, "--budgets") for value in values]


def _cheapest(curve: BudgetCurve, agreement: float, name: str, quiet: bool) -> CurvePoint:
    try:
        return curve.cheapest(agreement)
    except RedconvertError as error:
        if not quiet:
            console.print(_table(curve, name))
        raise RedconvertError(f"{error}. Nothing was saved") from error


def _milliseconds(dynamic: nn.Module, inputs: Any) -> dict[str, float]:
    """Of one sample: as the network was, in plain PyTorch, and deployed, dense and reduced."""
    inputs = move_to(inputs, device_of(dynamic))
    fast = deploy(dynamic, inputs)
    with evaluating(dynamic), torch.inference_mode():
        times = interleaved(
            {
                "original": lambda: call_with(dynamic, inputs),
                "deployed, dense": lambda: call_with(fast, inputs),
                "deployed": lambda: call_with(fast, inputs),
            },
            within={"original": lambda: disabled(dynamic), "deployed, dense": lambda: disabled(dynamic)},
            device=device_of(dynamic),
        )
    return {name: round(1000 * timing.median, 3) for name, timing in times.items()}


def _table(curve: BudgetCurve, name: str, chosen: CurvePoint | None = None) -> Table:
    table = Table(title=f"{name}: answers that stay, without training", title_justify="left")
    timed = any(point.time is not None for point in curve.points)
    for header in ("budget", *(["expected time"] if timed else []), "MACs", "same first answer", "divergence, nats"):
        table.add_column(header, justify="right")
    for point in curve.points:
        row = [f"{point.budget:.0%}", f"{point.share:.1%}", f"{point.agreement:.1%}", f"{point.divergence:.4f}"]
        if timed:
            row.insert(1, "" if point.time is None else f"{point.time:.1%}")
        table.add_row(*row, style="bold" if point == chosen else None)
    for budget in curve.unreachable:
        table.add_row(f"{budget:.0%}", "too low", style="dim")
    return table


def _show(curve: BudgetCurve, chosen: CurvePoint, ready: Prepared, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console.print(_table(curve, facts["name"], chosen))
    where = say_where(facts, len(ready.read.clips))
    console.print(f"Measured on {curve.samples} of {where}; calibrated with the others.")
    of_time = "" if chosen.time is None else f"{chosen.time:.1%} of the time is expected, "
    console.print(
        f"Taken: {of_time}{chosen.share:.1%} of the MACs, {chosen.agreement:.1%} of the answers stay.", style="bold"
    )
    if facts["milliseconds"]:
        times = ", ".join(f"{name} {value:.1f} ms" for name, value in facts["milliseconds"].items())
        console.print(f"One sample, {torch.get_num_threads()} threads: {times}.")
    console.print(say_saved(facts["out"], facts["plot"]))
