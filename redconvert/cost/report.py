"""The report: MACs and milliseconds of a converted network, layer by layer, dense against dynamic."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import RedconvertError
from ..files import written
from ..inputs import device_of, each_batch, evaluating, move_to, unwrapped
from ..layers import DynamicConv, dynamic_layers
from .clock import share
from .measure import LayerRecord, MacsMeter, Stopwatch, describe_environment
from .render import describe_conv, render_csv, render_table, render_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerReport", "Report", "report"]

UNIT = "one multiply-add = one FLOP"


@dataclass(frozen=True)
class LayerReport:
    """One dynamic layer. MACs are per sample, summed over the layer's calls in a forward pass.

    Attributes:
        name: in the model; a shared layer stands under its first name.
        kind: of the convolution, in words.
        input_shape, output_shape: of its first call, batch included; None where it never ran.
        calls: per forward pass.
        channels: how many each channel candidate computes.
        frame_strides: temporal candidate j computes every ``frame_strides[j]``-th frame.
        dense_macs: of the convolution it was.
        executed_macs: average over samples, with gate and cheap operations.
        executed_min, executed_max: of the samples.
        gate_macs, cheap_macs: averages, parts of executed_macs.
        parameters: of the convolution.
        added_parameters: of gate and cheap operations.
        decisions: how often (channel candidate, temporal candidate) was the largest open one.
        dense_ms, dynamic_ms: of all calls in a forward pass, per batch; None where not timed.
        share: of the promised speed-up that was realised; None where not timed or no MACs were saved.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    calls: int
    channels: tuple[int, ...]
    frame_strides: tuple[int, ...]
    dense_macs: int
    executed_macs: float
    executed_min: int
    executed_max: int
    gate_macs: float
    cheap_macs: float
    parameters: int
    added_parameters: int
    decisions: dict[tuple[int, int], int]
    dense_ms: float | None = None
    dynamic_ms: float | None = None
    share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; decisions as a list of ``{"channel", "temporal", "count"}``."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in _fields(self).items()}
        values["decisions"] = [{"channel": i, "temporal": j, "count": n} for (i, j), n in self.decisions.items()]
        return values


@dataclass(frozen=True)
class Report:
    """What a converted network costs. MACs are per sample and count the whole network.

    Attributes:
        model: name of its class.
        layers: its dynamic layers.
        samples, batches: how many were counted.
        timed_batches: how many of the batches, the first ones, were timed.
        dense_macs: of the network before conversion (average, where samples differ in shape).
        executed_macs: average over samples; executed_min, executed_max: of the samples.
        parameters: of the network before conversion.
        added_parameters: of gates and cheap operations.
        dense_ms, dynamic_ms: of a forward pass, per batch as given: the median of interleaved runs.
        share: of the promised speed-up that was realised, `redconvert.cost.share`, on the timed batches.
        uncounted: operators that may multiply and are in no MACs here.
        environment: torch, device, device_name, instructions (of a CPU: AVX2, AVX512), threads, dtype, batch_shape,
            date.
    """

    model: str
    layers: tuple[LayerReport, ...]
    samples: int
    batches: int
    timed_batches: int
    dense_macs: int
    executed_macs: float
    executed_min: int
    executed_max: int
    parameters: int
    added_parameters: int
    dense_ms: float | None
    dynamic_ms: float | None
    share: float | None
    uncounted: tuple[str, ...]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {**_fields(self), "uncounted": list(self.uncounted), "unit": UNIT}
        del values["layers"]
        return {**values, "layers": [layer.to_dict() for layer in self.layers]}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON, also written to ``path`` where one is given. RedconvertError: it cannot be written."""
        return written(json.dumps(self.to_dict(), indent=2) + "\n", path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line per layer, also written to ``path`` where one is given. RedconvertError: it cannot be written."""
        return written(render_csv(self), path)

    def to_html(self, path: str | os.PathLike[str] | None = None, *, note: str = "") -> str:
        """One self-contained page, also written to ``path`` where one is given. RedconvertError: it cannot be.

        ``note`` stands under the title: what the reader should know of how this was run.
        """
        from .html import render_html

        return written(render_html(self, note), path)

    def table(self) -> Table:
        """For rich's consoles; needs rich."""
        return render_table(self)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return render_text(self)


def report(
    model: nn.Module,
    batches: Any,
    *,
    time: bool = True,
    repeats: int = 5,
    timed_batches: int = 2,
    progress: bool = False,
) -> Report:
    """Run a converted network and say what it costs, dense against dynamic.

    Every sample of every batch is counted. The first ``timed_batches`` are also timed: the network as it
    was (`redconvert.disabled`) and as it is, in turn, ``repeats`` times each after one warm-up, then the
    same again with a clock on every layer. The network runs in ``eval()``, and is left as it was.

    Args:
        model: what `redconvert.convert` returned.
        batches: an iterable of batches, labels are ignored; or one batch: a tensor, tuple or dict.
        time: measure milliseconds too.
        repeats: timed runs of either side.
        timed_batches: how many batches are timed.
        progress: show a bar (needs rich).

    Raises:
        RedconvertError: no dynamic layers, no batches, or a batch that is none.
    """
    layers = dynamic_layers(model)
    if repeats < 1 or timed_batches < 1:
        raise RedconvertError(
            f"repeats={repeats} and timed_batches={timed_batches} must be at least 1; "
            f"to leave out the time, pass time=False"
        )
    meter, watch = MacsMeter(model, layers), Stopwatch(model, layers, repeats)
    environment: dict[str, Any] = {}
    with evaluating(model):
        for index, batch in enumerate(_with_progress(each_batch(batches), batches, progress)):
            batch = move_to(batch, device_of(model))
            environment = environment or describe_environment(model, batch)
            meter.run(batch)
            if time and index < timed_batches:
                watch.run(batch)
    return _assemble(model, layers, meter, watch, environment)


def _assemble(
    model: nn.Module,
    layers: dict[str, DynamicConv],
    meter: MacsMeter,
    watch: Stopwatch,
    environment: dict[str, Any],
) -> Report:
    timed = sum(meter.batch_sizes[: watch.batches])
    reports = tuple(_layer_report(name, layers[name], record, watch, timed) for name, record in meter.records.items())
    added = sum(layer.added_parameters for layer in reports)
    return Report(
        model=type(unwrapped(model)).__name__,
        layers=reports,
        samples=len(meter.dense),
        batches=len(meter.batch_sizes),
        timed_batches=watch.batches,
        dense_macs=round(_mean(meter.dense)),
        executed_macs=_mean(meter.executed),
        executed_min=round(min(meter.executed)),
        executed_max=round(max(meter.executed)),
        parameters=sum(p.numel() for p in model.parameters()) - added,
        added_parameters=added,
        dense_ms=_milliseconds(watch.dense, watch),
        dynamic_ms=_milliseconds(watch.dynamic, watch),
        share=share(watch.dense, watch.dynamic, sum(meter.dense[:timed]), sum(meter.executed[:timed])),
        uncounted=meter.uncounted,
        environment=environment,
    )


def _layer_report(name: str, layer: DynamicConv, record: LayerRecord, watch: Stopwatch, timed: int) -> LayerReport:
    dense, dynamic = watch.layers[name]
    added = sum(p.numel() for part in layer.added_modules() for p in part.parameters())
    return LayerReport(
        name=name,
        kind=describe_conv(layer),
        input_shape=tuple(record.first.input_shape) if record.first else None,
        output_shape=tuple(record.first.output_shape) if record.first else None,
        calls=record.calls,
        channels=layer.carried or layer.candidates.channels,
        frame_strides=layer.candidates.strides,
        dense_macs=round(_mean(record.dense)),
        executed_macs=_mean(record.executed),
        executed_min=round(min(record.executed, default=0)),
        executed_max=round(max(record.executed, default=0)),
        gate_macs=_mean(record.gate),
        cheap_macs=_mean(record.cheap),
        parameters=sum(p.numel() for p in layer.parameters()) - added,
        added_parameters=added,
        decisions=dict(sorted(record.decisions.items())),
        dense_ms=_milliseconds(dense, watch),
        dynamic_ms=_milliseconds(dynamic, watch),
        share=share(dense, dynamic, sum(record.dense[:timed]), sum(record.executed[:timed])),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _milliseconds(seconds: float, watch: Stopwatch) -> float | None:
    return 1000 * seconds / watch.batches if watch.batches and seconds else None


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _with_progress(inputs: Iterable[Any], batches: Any, progress: bool) -> Iterable[Any]:
    if not progress:
        return inputs
    from rich.progress import track

    single = isinstance(batches, Tensor | tuple | dict)
    total = 1 if single else len(batches) if hasattr(batches, "__len__") else None
    return track(inputs, "Counting", total=total, transient=True)
