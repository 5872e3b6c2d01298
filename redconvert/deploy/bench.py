"""Time against MACs: a deployed network beside the dense forms that its user could run instead."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from ..cost import Timing, interleaved, report
from ..cost.clock import share
from ..cost.measure import describe_environment
from ..errors import RedconvertError, require
from ..files import written
from ..inputs import call_with, device_of, tensors_in
from ..layers import disabled, dynamic_layers, forced
from ..progress import progress_bar
from .engine import Deployed, deploy
from .forms import Form, dense_forms, dynamic_forms, possible_decisions

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Bench", "Rival", "Row", "asked", "bench", "decisions"]

SLOWEST = 8  # layers that are named
LABEL_WIDTH, LABEL_HEIGHT = 0.3, 0.027  # of a picture's text, in its units
Call = Callable[[], Any]


@dataclass(frozen=True)
class Rival:
    """Another network or runtime to time in the same run: what to call, its MACs per sample, and its kind."""

    call: Call
    macs: float
    kind: str = "pruned"
    setup_s: float = 0.0


@dataclass(frozen=True)
class Row:
    """One form of the network.

    Attributes:
        name: what ran; kind: "dense", "dynamic" or "pruned".
        ms, ms_min, ms_max: per batch, median and range of the interleaved runs.
        macs: per sample, executed.
        ratio: of the fastest dense form's time.
        share: of the promised speed-up that was realised, against the fastest dense form; None where none was.
        peak_mb: most memory that the call held at once beside weights and inputs; None where it cannot be seen.
        setup_s: seconds until the first result.
    """

    name: str
    kind: str
    ms: float
    ms_min: float
    ms_max: float
    macs: float
    ratio: float
    share: float | None
    peak_mb: float | None
    setup_s: float


@dataclass(frozen=True)
class Bench:
    """What `bench` found; ``print`` it, or write it."""

    model: str
    rows: tuple[Row, ...]
    fastest_dense: str
    losers: tuple[dict[str, Any], ...]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON, also written to ``path`` where one is given."""
        return written(json.dumps(self.to_dict(), indent=2) + "\n", path)

    def table(self) -> Table:
        """For rich's consoles."""
        from rich.table import Table

        shapes = ", ".join("x".join(map(str, shape)) for shape in self.environment["batch_shape"])
        table = Table(
            title=f"{self.model}, {shapes}, {self.environment['dtype']}, {self.environment['threads']} threads"
        )
        for name in ("form", "ms", "range", "of fastest dense", "MACs", "share", "peak MB", "setup s"):
            table.add_column(name, justify="left" if name == "form" else "right")
        for row in self.rows:
            marked = f"[bold]{row.name}[/bold]" if row.name == self.fastest_dense else row.name
            table.add_row(
                *(marked, f"{row.ms:.1f}", f"{row.ms_min:.1f}-{row.ms_max:.1f}", f"{row.ratio:.2f}"),
                *(f"{row.macs / 1e9:.2f} G", "" if row.share is None else f"{row.share:.2f}"),
                *("" if row.peak_mb is None else f"{row.peak_mb:.0f}", f"{row.setup_s:.1f}"),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(self.table())
        return console.export_text()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Time against MACs, both as shares of the fastest dense form's, with the line of a share of 1."""
        pyplot = require("matplotlib.pyplot", "plot", "the picture of a benchmark")
        figure, axes = pyplot.subplots(figsize=(8, 6), layout="constrained")
        dense = next(row.macs for row in self.rows if row.name == self.fastest_dense)
        axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="a share of 1")
        for kind, marker in (("dense", "s"), ("pruned", "x"), ("dynamic", "o")):
            chosen = [row for row in self.rows if row.kind == kind]
            if chosen:
                axes.plot([r.macs / dense for r in chosen], [r.ratio for r in chosen], marker, label=kind)
        for x, y, text in _spread_labels([(row.macs / dense, row.ratio, row.name) for row in self.rows]):
            axes.text(x + 0.015, y, text, fontsize=7, verticalalignment="center")
        axes.set(xlabel="MACs, of dense", ylabel="time, of the fastest dense form", title=self.model)
        axes.set_xlim(0, 1.25)
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _spread_labels(labels: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Labels at (x, y), moved up where one beside would hide them."""
    placed: list[tuple[float, float, str]] = []
    for x, y, text in sorted(labels, key=lambda label: label[1]):
        near = [other for left, other, _ in placed if abs(left - x) < LABEL_WIDTH]
        placed.append((x, max([y, *(other + LABEL_HEIGHT for other in near)]), text))
    return placed


def bench(
    dynamic: nn.Module,
    example_inputs: Any,
    *,
    repeats: int = 5,
    compiled: bool = True,
    compiled_dynamic: bool = False,
    rivals: Mapping[str, Rival] | None = None,
    progress: bool = False,
) -> Bench:
    """Time a converted network, deployed, in turn with its dense forms.

    Dense: in PyTorch as it was, in channels-last memory, with norms folded, compiled (on a CPU with freezing), and
    deployed. Dynamic: deployed, with every layer forced to the same candidates, and in batches larger than one with
    candidates that differ from sample to sample; gates run in all of these rows, though what they say is
    not followed. Forms that a network cannot take are left out, with a line on stderr.

    Args:
        dynamic: what `redconvert.convert` returned; it is left as it was.
        example_inputs: what it takes; the batch is timed as it is.
        repeats: timed runs of each form, after two that are not.
        compiled: torch.compile takes its time to set up (``setup_s``); False leaves it out.
        compiled_dynamic: also compile the dynamic network itself, which computes everything and masks, and the network
            frozen to each decision. `torch.compile` does nothing to the deployed one, so it has no row for that.
        rivals: others to time in the same run.
        progress: show a bar (needs rich).
    """
    if repeats < 1:
        raise RedconvertError(f"repeats={repeats} must be at least 1")
    dynamic_layers(dynamic)
    with torch.no_grad(), progress_bar(progress, "Benchmark") as step:
        calls: dict[str, Call] = {}
        setup: dict[str, float] = {}
        macs: dict[str, float] = {}
        kinds: dict[str, str] = {}

        def add(forms: Iterable[tuple[str, Form]], kind: str) -> None:
            for name, form in forms:
                calls[name], setup[name], macs[name], kinds[name] = form.call, form.setup_s, form.macs or 0.0, kind
                step()

        add(dense_forms(dynamic, example_inputs, compiled), "dense")
        begin = time.perf_counter()
        fast = deploy(dynamic, example_inputs)
        deploying = time.perf_counter() - begin
        within: dict[str, Call] = {}
        for name, mode, executed in decisions(fast, example_inputs):
            label = f"deployed, {name}"
            calls[label], within[label], macs[label] = (lambda: call_with(fast, example_inputs)), mode, executed
            kinds[label] = "dense" if name == "dense" else "dynamic"
            setup[label] = deploying + _first_call(calls[label], mode)
        dense = macs["deployed, dense"]
        if compiled_dynamic:
            add(dynamic_forms(dynamic, example_inputs, _one(example_inputs), dense), "dynamic")
        macs = {name: found or dense for name, found in macs.items()}
        for name, rival in (rivals or {}).items():
            calls[name], macs[name], kinds[name], setup[name] = rival.call, rival.macs, rival.kind, rival.setup_s
        step()
        times = interleaved(calls, repeats=repeats, warmup=2, device=device_of(dynamic), within=within, settle=True)
        peaks = {name: _peak(call, within.get(name, nullcontext)) for name, call in calls.items()}
        losers = _losers(fast, example_inputs)
    return _assemble(dynamic, example_inputs, times, macs, kinds, peaks, setup, losers)


def decisions(fast: Deployed, inputs: Any) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]], float]]:
    """Names, modes and executed MACs per sample, of those that the network's candidates allow."""
    possible, one = possible_decisions(fast), _one(inputs)
    costs: dict[tuple[int, int], float] = {}
    for decision in possible.values():
        with forced(fast.network, channel=decision[0], temporal=decision[1]):
            found = report(fast.network, [(one,)], time=False)
        costs[decision], dense = found.executed_macs, found.dense_macs
    yield "dense", lambda: disabled(fast), dense
    for name, (i, j) in possible.items():
        yield name, lambda i=i, j=j: asked(fast, i, j), costs[i, j]  # type: ignore[misc]
    rows = max(tensor.shape[0] for tensor in tensors_in(inputs) if tensor.dim())
    if rows > 1:
        mixed = list(islice(cycle(possible.values()), rows))
        channel, temporal = ([decision[axis] for decision in mixed] for axis in (0, 1))
        average = sum(costs[decision] for decision in mixed) / rows
        yield "mixed", lambda: asked(fast, channel, temporal), average


def _one(inputs: Any) -> Any:
    """The first sample."""
    return tree_map(lambda leaf: leaf[:1] if isinstance(leaf, torch.Tensor) else leaf, inputs)


@contextmanager
def asked(fast: Deployed, channel: Any, temporal: Any) -> Iterator[None]:
    """Forced, though every gate runs: its time belongs to the dynamic network."""
    with forced(fast, channel=channel, temporal=temporal):
        fast.batch.always_ask = True
        try:
            yield
        finally:
            fast.batch.always_ask = False


def _first_call(call: Call, mode: Callable[[], AbstractContextManager[Any]]) -> float:
    begin = time.perf_counter()
    with mode():
        call()
    return time.perf_counter() - begin


def _peak(call: Call, mode: Callable[[], AbstractContextManager[Any]]) -> float | None:
    """MB that PyTorch's allocator held at once during a call; None where nothing was seen (another runtime)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise
    with mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6 if peak else None


def _losers(fast: Deployed, inputs: Any) -> tuple[dict[str, Any], ...]:
    """The layers that lose most of the promised time when every layer takes half of its channels, or frames."""
    candidates = [layer.candidates for layer in dynamic_layers(fast).values()]
    axis = "channel" if max(len(each.channels) for each in candidates) > 1 else "temporal"
    with forced(fast, **{axis: 1}):
        found = report(fast, [(inputs,)], repeats=3, timed_batches=1)
    rows: list[dict[str, Any]] = []
    for layer in found.layers:
        if layer.dense_ms and layer.dynamic_ms and layer.dense_macs:
            lost = layer.dynamic_ms - layer.dense_ms * layer.executed_macs / layer.dense_macs
            rows.append({"layer": layer.name, "kind": layer.kind, "lost_ms": round(lost, 3), "share": layer.share})
    return tuple(sorted(rows, key=lambda row: -row["lost_ms"])[:SLOWEST])


def _assemble(
    dynamic: nn.Module,
    inputs: Any,
    times: Mapping[str, Timing],
    macs: Mapping[str, float],
    kinds: Mapping[str, str],
    peaks: Mapping[str, float | None],
    setup: Mapping[str, float],
    losers: tuple[dict[str, Any], ...],
) -> Bench:
    fastest = min((name for name in times if kinds[name] == "dense"), key=lambda name: times[name].median)
    base = times[fastest].median
    rows = tuple(
        Row(
            name=name,
            kind=kinds[name],
            ms=round(1000 * found.median, 3),
            ms_min=round(1000 * found.minimum, 3),
            ms_max=round(1000 * found.maximum, 3),
            macs=macs[name],
            ratio=found.median / base,
            share=share(base, found.median, macs[fastest], macs[name]),
            peak_mb=peaks[name],
            setup_s=round(setup[name], 2),
        )
        for name, found in times.items()
    )
    return Bench(type(dynamic).__name__, rows, fastest, losers, describe_environment(dynamic, inputs))
