"""Rows of a benchmark on a GPU: set up one by one, timed in turn, written as they come."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from redconvert.cost.clock import share
from redconvert.deploy import gpu_passes

FEW, KERNELS = 5, 12  # runs of a row when it is set up, kernels in a profile
LEAST = 10.0  # seconds that rows are timed in turn, also after the deadline
Mode = Callable[[], AbstractContextManager[Any]]
Call = Callable[[], Any]


@dataclass
class Row:
    """What to call inside which mode, and what was found of it."""

    name: str
    kind: str
    call: Call
    mode: Mode
    macs: float
    found: dict[str, Any] = field(default_factory=dict)


class LimitError(Exception):
    """No time is left for another row."""


@dataclass
class Run:
    """The rows of one network and batch."""

    result: dict[str, Any]  # of this run, inside what is written
    save: Callable[[], None]
    device: torch.device
    repeats: int
    deadline: float
    rows: list[Row] = field(default_factory=list)

    def add(
        self, name: str, kind: str, macs: float, make: Callable[[], tuple[Call, Mode]], peak: Call | None = None
    ) -> None:
        """Set a row up and time it a few times; what fails is written down. ``peak``: whose memory counts."""
        if time.monotonic() > self.deadline:
            raise LimitError
        begin = time.perf_counter()
        try:
            call, mode = make()
            with mode():
                call()
            synchronize(self.device)
            row = Row(name, kind, call, mode, macs)
            row.found["setup_s"] = round(time.perf_counter() - begin, 2)
            row.found["peak_mb"] = self._peak(peak or call, mode)
            self._time([row], FEW)
            self.rows.append(row)
        except Exception as error:
            self.result.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:1000]
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        self.write()

    def profile(self, label: str, call: Call, mode: Mode) -> None:
        """Which kernels take the time, as text."""
        self.note("profiles", label, lambda: kernels_of(call, mode, self.device))

    def note(self, what: str, label: str, function: Callable[[], Any]) -> None:
        """Anything else that is found out."""
        if time.monotonic() > self.deadline:
            raise LimitError
        self.result.setdefault(what, {})[label] = attempted(function)
        self.save()

    def finish(self) -> None:
        """All rows in turn; fewer times where they are slow and little time is left."""
        a_round = sum(row.found["ms"] for row in self.rows) / 1000
        left = max(self.deadline - time.monotonic(), LEAST)
        self._time(self.rows, min(self.repeats, max(FEW, int(left / max(a_round, 1e-9)))))
        for row in self.rows:
            row.found["interleaved"] = True
        self.write()

    def write(self) -> None:
        dense = [row for row in self.rows if row.kind == "dense"]
        fastest = min(dense, key=lambda row: row.found["ms"], default=None)
        self.result["fastest_dense"] = fastest.name if fastest else None
        self.result["rows"] = [_written(row, fastest) for row in self.rows]
        self.result["broken_kernels"] = sorted(gpu_passes._broken)
        self.save()

    def _time(self, rows: list[Row], repeats: int) -> None:
        times: dict[str, list[float]] = {row.name: [] for row in rows}
        for repeat in range(1 + repeats):
            for row in rows:
                with row.mode():
                    seconds = seconds_of(row.call, self.device)
                if repeat:
                    times[row.name].append(seconds)
        for row in rows:
            runs = [1000 * each for each in times[row.name]]
            row.found |= {"ms": statistics.median(runs), "ms_min": min(runs), "ms_max": max(runs), "runs": repeats}

    def _peak(self, call: Call, mode: Mode) -> float | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with mode():
            call()
        synchronize(self.device)
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def _written(row: Row, fastest: Row | None) -> dict[str, Any]:
    found = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.found.items()}
    against = {}
    if fastest is not None:
        ms = fastest.found["ms"]
        part = share(ms, row.found["ms"], fastest.macs, row.macs)
        against = {"ratio": round(row.found["ms"] / ms, 4), "share": None if part is None else round(part, 4)}
    return {"name": row.name, "kind": row.kind, "macs": row.macs, **found, **against}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Call, device: torch.device) -> float:
    """By the device's own clock, where it is a GPU: from an idle device to an idle device."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def in_graph(call: Call) -> Call:
    """A CUDA graph of a dense network's call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def untuned() -> Iterator[None]:
    """cuDNN takes the kernel that it thinks best. Not for shapes that are timed: what it took, it takes ever after."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def kernels_of(call: Call, mode: Mode, device: torch.device) -> str:
    """The kernels that take most of the time, as text."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + [activity.CUDA] * (device.type == "cuda")
    with mode():
        call()
        synchronize(device)
        with torch.profiler.profile(activities=activities) as found:
            call()
            synchronize(device)
    on_gpu = device.type == "cuda"
    which = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in found.key_averages() if not on_gpu or "CUDA" in str(event.device_type)]
    events.sort(key=lambda event: -getattr(event, which))
    total = sum(getattr(event, which) for event in events) or 1
    lines = [
        f"{getattr(event, which) / total:6.1%} {getattr(event, which):9.1f} us {event.count:4d} x {event.key[:110]}"
        for event in events[:KERNELS]
    ]
    return "\n".join([f"{total:.1f} us in {sum(event.count for event in events)} kernels", *lines])


def attempted(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1000]
