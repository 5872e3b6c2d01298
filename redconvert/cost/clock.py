"""Time: medians of interleaved runs, and the time of each layer's calls. All in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import RedconvertError

__all__ = ["LayerClock", "Timing", "interleaved", "share"]

QUIET = 0.02  # seconds after which threads that spin have gone to sleep
SHORT = 0.15  # seconds of a run that its caches and threads matter to


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs; ``samples`` in the order in which they ran."""

    median: float
    minimum: float
    maximum: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        return cls(statistics.median(samples), min(samples), max(samples), tuple(samples))


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str | None = None,
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    settle: bool = False,
) -> dict[str, Timing]:
    """Time functions in turn, A B A B ..., so that a machine that slows down slows all of them.

    Args:
        functions: what to time, by name.
        repeats: timed runs of each.
        warmup: untimed runs of each before.
        device: wait for this device before and after each run, where it is a GPU.
        within: by name, a context to enter before each run and leave after it, both untimed.
        settle: wait before each run, and make a short one untimed: threads of another runtime that spin would take
            its cores from it, and what ran before its caches, as nobody does to a network that serves alone.

    Raises:
        RedconvertError: nothing to time, or fewer than one repeat.
    """
    if not functions or repeats < 1 or warmup < 0:
        raise RedconvertError(
            f"nothing to time: {len(functions)} functions, repeats={repeats}, warmup={warmup}; "
            "give a function, repeats >= 1 and warmup >= 0"
        )
    samples: dict[str, list[float]] = {name: [] for name in functions}
    last: dict[str, float] = {}
    for run in range(warmup + repeats):
        for name, function in functions.items():
            with (within or {}).get(name, nullcontext)():
                synchronize(device)
                if settle:
                    time.sleep(QUIET)
                    if last.get(name, SHORT) < SHORT:
                        function()
                        synchronize(device)
                start = time.perf_counter()
                function()
                synchronize(device)
                last[name] = elapsed = time.perf_counter() - start
            if run >= warmup:
                samples[name].append(elapsed)
    return {name: Timing.of(runs) for name, runs in samples.items()}


class LayerClock:
    """Times every call of some modules: ``with LayerClock({"stem": model.stem}) as clock: model(x)``.

    ``clock.seconds["stem"]`` holds the seconds of each call, in order. On a GPU every call waits for the
    device, so the sum of the layers exceeds the time of the network without a clock.

    Args:
        modules: by name. A module within another counts towards both.
        device: where they run.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device | str | None = None) -> None:
        self.modules, self.device = dict(modules), device
        self.seconds: dict[str, list[float]] = {name: [] for name in modules}
        self._handles: list[Any] = []

    def __enter__(self) -> LayerClock:
        for name, module in self.modules.items():
            started: list[float] = []  # a stack: a module may call itself
            self._handles += [
                module.register_forward_pre_hook(self._starter(started)),
                module.register_forward_hook(self._stopper(name, started)),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _starter(self, started: list[float]) -> Callable[..., None]:
        def start(module: nn.Module, args: Any) -> None:
            synchronize(self.device)
            started.append(time.perf_counter())

        return start

    def _stopper(self, name: str, started: list[float]) -> Callable[..., None]:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            synchronize(self.device)
            self.seconds[name].append(time.perf_counter() - started.pop())

        return stop


def share(t_dense: float, t_dynamic: float, macs_dense: float, macs_dynamic: float) -> float | None:
    """The share of the promised speed-up that was realised: ``(1 - t_dyn/t_dense) / (1 - MACs_dyn/MACs_dense)``.

    1 where time falls as MACs do, negative where the dynamic network is slower. None where no MACs were saved,
    or there is nothing to compare with.
    """
    if t_dense <= 0 or macs_dense <= 0 or macs_dynamic >= macs_dense:
        return None
    return (1 - t_dynamic / t_dense) / (1 - macs_dynamic / macs_dense)


def synchronize(device: torch.device | str | None) -> None:
    """Wait until ``device`` has done what it was given, where it is a GPU."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
