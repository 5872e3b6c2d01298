"""Where the time of a deployed network goes: convolutions, rebuilding, gates, padding, and the rest.

    python benchmarks/deploy_profile.py                     # R(2+1)D-18, I3D, ResNet-50, batch 1; rebuilt, absorbed
    python benchmarks/deploy_profile.py --networks x3d_m

The functions that do the work are timed in place, each without what it calls; a table per network says for every
decision how many milliseconds each part takes. In float32 the pass that rebuilds channels computes Phi_c too. The
stopwatch itself costs some microseconds per call. Set the allocator variables of CONTRIBUTING.md and stop other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, environment, seconds, write
from latency import NETWORKS
from rich.console import Console
from rich.table import Table

import redconvert
from redconvert.deploy import decide, excite, kernels, pack, pool, program, taps, unit
from redconvert.deploy.bench import decisions

REPEATS = 7
PARTS: dict[str, tuple[type, str]] = {
    "convolutions": (pack.PackedConv, "__call__"),
    "rebuild channels": (kernels.Assembly, "__call__"),
    "fill frames": (kernels.Filling, "__call__"),
    "gates": (decide.FoldedGate, "__call__"),
    "pad frames": (taps.Reading, "padded"),
    "pools": (pool.Pool, "forward"),
    "scale channels": (excite.Excite, "forward"),
    "units, else": (unit.Unit, "forward"),
    "network, else": (program.Program, "__call__"),
}


class Stopwatch:
    """Seconds by part, each without the parts within it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._within = [0.0]
        self.cheap: set[int] = set()  # Phi_c's convolutions, which count as a part of their own

    @contextmanager
    def on(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part, (owner, method) in PARTS.items():
                stack.enter_context(patch.object(owner, method, self._timed(part, getattr(owner, method))))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(owner: Any, *args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            begin = time.perf_counter()
            result = function(owner, *args, **kwargs)
            elapsed = time.perf_counter() - begin
            own = elapsed - self._within.pop()
            self._within[-1] += elapsed
            self.seconds["Phi_c" if id(owner) in self.cheap else part] += own
            return result

        return timed


@torch.no_grad()
def profile(name: str, absorb: bool) -> dict[str, dict[str, float]]:
    """By decision: GMACs, and milliseconds of the whole call (a median, without stopwatch) and of each part."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name](1)
    config = redconvert.ConvertConfig(align=16, absorb=absorb)
    dynamic = redconvert.convert(model.eval(), config, example_inputs=inputs)
    fast = redconvert.deploy(dynamic, inputs)
    found: dict[str, dict[str, float]] = {}
    for label, mode, macs in decisions(fast, inputs):
        with mode():
            for _ in range(3):
                fast(inputs)
            whole = [seconds(lambda: fast(inputs)) for _ in range(REPEATS)]
            watch = Stopwatch()
            watch.cheap = {id(reduced.cheap) for each in fast.units.values() for reduced in _reduced(each)}
            with watch.on():
                for _ in range(REPEATS):
                    fast(inputs)
        parts = {part: round(1000 * spent / REPEATS, 2) for part, spent in watch.seconds.most_common()}
        found[label] = {"GMACs": round(macs / 1e9, 2), "whole": round(1000 * statistics.median(whole), 2), **parts}
    return found


def _reduced(each: Any) -> list[Any]:
    return list(each._reduced.values()) if isinstance(each, unit.Unit) else []


def show(name: str, found: dict[str, dict[str, float]]) -> None:
    table = Table("part", *found, title=f"{name}: milliseconds")
    for part in dict.fromkeys(part for parts in found.values() for part in parts):
        table.add_row(part, *(f"{parts[part]:.2f}" if part in parts else "" for parts in found.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["r2plus1d_18", "i3d", "resnet50"], choices=NETWORKS)
    parser.add_argument("--out", type=Path, default=RESULTS / "deploy_profile.json")
    arguments = parser.parse_args()
    networks: dict[str, Any] = {}
    for name in arguments.networks:
        for absorb in (False, True):
            label = f"{name}, absorbed" if absorb else name
            networks[label] = profile(name, absorb)
            show(label, networks[label])
            write({"what": __doc__.split("\n")[0], **environment(0), "networks": networks}, arguments.out)


if __name__ == "__main__":
    main()
