"""finetune: a reduced network learns to answer as the original does, from unlabelled files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..budget import CurvePoint, set_budget
from ..budget.curve import Answers
from ..calibrate import calibrate
from ..errors import RedconvertError, require
from ..evaluate import spread_of_macs
from ..files import write_text_atomic
from ..finetune import History
from ..finetune import finetune as train
from ..finetune.state import NAME
from ..layers import dynamic_layers
from .app import app, console, warn
from .options import (
    AsJson,
    BatchSize,
    Data,
    Device,
    FrameStep,
    Input,
    Mean,
    Model,
    More,
    NumFrames,
    SampleCount,
    Std,
    Trust,
    read_config,
)
from .preparing import Prepared, Source, check_share, check_targets, prepare, say_saved, say_where, split
from .progress import shown
from .samples import Batches

__all__ = ["finetune"]

GATE_EVERY, CLIP = 8, 5.0  # gates that a budget by layers has settled need not learn
FULL = 0.995  # of the dense MACs: a network that computes this much has no budget yet


@app.command()
def finetune(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the run: its state, history.json, and the network in model/.")],
    dynamic: Annotated[Path, typer.Option(help="What reduce or calibrate saved: the network to go on from.")],
    more: More = None,
    target: Annotated[
        float | None,
        typer.Option(help="Executed MACs, as a share of the dense network's.", show_default="what it executes now"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the samples.")] = 3,
    lr: Annotated[float, typer.Option(help="Peak learning rate of SGD with Nesterov momentum.")] = 0.005,
    features: Annotated[
        float, typer.Option(min=0, help="Weight of what the blocks' outputs miss of the original's; 100 is a start.")
    ] = 0.0,
    flip: Annotated[bool, typer.Option(help="Mirror every second sample; the teacher sees the same.")] = True,
    samples: SampleCount = 256,
    batch_size: BatchSize = 8,
    step: FrameStep = 1,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    plot: Annotated[Path | None, typer.Option(help="Draw loss, cost and answers that stay.")] = None,
    inputs: Input = None,
    as_json: AsJson = False,
    trust: Trust = False,
    num_frames: NumFrames = None,
) -> None:
    """Train a reduced network to answer as the original does, from unlabelled videos or images.

    The original network is the teacher, so no labels are needed. Killed, the same command goes on where it stopped.
    """
    if target is not None:
        check_share(target, "--target")
    check_targets(out, plot, mark=NAME)
    require("accelerate", extra="train", purpose="finetune")
    source = Source(model, [*data, *(more or ())], None, samples, step, mean, std, device, inputs, trust, dynamic)
    ready = prepare(source, read_config(None, None, None, num_frames, model), as_json)
    kept, tested = split(ready.read.paths)
    test = ready.batches(batch_size, tested)
    answers = Answers(ready.dynamic, test)
    target = _set_target(ready.dynamic, target, ready.batches(batch_size, kept), as_json)
    before = CurvePoint(target, *answers.compare(ready.dynamic))
    layers = dynamic_layers(ready.dynamic).values()
    history = train(
        ready.dynamic,
        _loader(ready, kept, batch_size, flip),
        test,
        epochs=epochs,
        lr=lr,
        gate_every=GATE_EVERY if any(each.gate.settled() is None for each in layers) else 0,
        features=features,
        target=target,
        clip=CLIP,
        freeze_norms=True,
        out=out,
        progress=shown(as_json),
    )
    after = CurvePoint(target, *answers.compare(ready.dynamic))
    if after.divergence > before.divergence:
        warn(
            f"on samples that were not trained on, the answers are further from the original's than before "
            f"({after.divergence:.4f} nats, not {before.divergence:.4f}): give more samples than {len(kept)}, or a "
            f"smaller --lr"
        )
    if plot is not None:
        history.plot(plot)
    facts = ready.facts | {"out": str(out), "plot": None if plot is None else str(plot), "samples": len(kept)}
    facts |= {"tested": len(tested), "before": before.to_dict(), "after": after.to_dict(), "epochs": history.epochs}
    write_text_atomic(out / "finetune.json", json.dumps(facts, indent=2) + "\n")
    _show(history, before, after, ready, facts, as_json)


def _set_target(dynamic: nn.Module, target: float | None, batches: Batches, quiet: bool) -> float:
    """What the network executes, or a budget that is set for the target."""
    spread = spread_of_macs(dynamic, batches)
    now = float(spread.mean / spread.dense.mean())
    if target is None and now > FULL:
        raise RedconvertError(
            f"the network executes {now:.1%} of its dense MACs, so there is nothing to make up for: give --target, or "
            f"--dynamic of redconvert-cli reduce"
        )
    if target is None:
        return round(now, 4)
    if target < now - 0.01:
        set_budget(dynamic, target, batches, progress=shown(quiet))
        calibrate(dynamic, batches, decisions="gates", progress=shown(quiet))
    return target


def _loader(ready: Prepared, kept: Sequence[int], batch_size: int, flip: bool) -> DataLoader[Any]:
    """Shuffled batches; random numbers come from torch's global generator, which `finetune` seeds."""
    batches = ready.batches(batch_size)

    def collate(indices: list[int]) -> tuple[list[Tensor] | Tensor]:
        clips = batches.normalised([ready.read.clips[i] for i in indices])
        if flip:
            mirrored = torch.rand(len(clips)) < 0.5
            clips[mirrored] = clips[mirrored].flip(-1)
        return (batches.inputs(clips),)

    return DataLoader(kept, batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]


def _show(
    history: History, before: CurvePoint, after: CurvePoint, ready: Prepared, facts: dict[str, Any], as_json: bool
) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title=f"{facts['name']}: finetuned without labels", title_justify="left")
    for header in ("epoch", "MACs", "same first answer", "divergence, nats", "loss"):
        table.add_column(header, justify="right")
    table.add_row("before", *_cells(before), "")
    for row in history.epochs[:-1]:
        table.add_row(
            f"{row['epoch']:.0f}", f"{row['val_cost']:.1%}", f"{row['val_accuracy']:.1%}", "", f"{row['loss']:.4f}"
        )
    last = history.epochs[-1]
    table.add_row(f"{last['epoch']:.0f}", *_cells(after), f"{last['loss']:.4f}", style="bold")
    console.print(table)
    console.print(f"Measured on {facts['tested']} of {say_where(facts, len(ready.read.clips))}; trained on the others.")
    console.print(say_saved(str(Path(facts["out"]) / "model"), facts["plot"]))


def _cells(point: CurvePoint) -> tuple[str, str, str]:
    return f"{point.share:.1%}", f"{point.agreement:.1%}", f"{point.divergence:.4f}"
