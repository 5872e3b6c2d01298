"""Budgets of time against budgets of multiply-adds: I3D with its Kinetics weights, deployed, without training.

    python benchmarks/time_budgets.py --plot time_budgets.png

The network is calibrated on clips of J-HMDB without labels (mixtures of channels, counts in sixteens),
`redconvert.layer_times` times every decision, and both kinds of budget are set by the same effects on the answers. Each
is then timed in the deployed network, interleaved in one process, and its answers to other clips are compared with
the dense network's. Data: ``$REDCONVERT_DATA``, or ``../shared/data``. Set the allocator variables of CONTRIBUTING.md
and stop other work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write
from i3d_agreement import AGREEING, center_clips
from plots import answers_against_time
from torch import Tensor, nn

import redconvert
from redconvert import zoo
from redconvert.budget import harms
from redconvert.cost import interleaved
from redconvert.layers import dynamic_layers
from redconvert.layers.modes import remembered

CONFIG = AGREEING["principal"] | {"temporal": False, "align": 16}
BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)


@torch.no_grad()
def scores(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(batch) for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calibration-clips", type=int, default=3, help="of each of 21 classes")
    parser.add_argument("--test-clips", type=int, default=4, help="of each class")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calibrated", type=Path, help="folder: keep the calibrated network, or read it from there")
    parser.add_argument("--out", type=Path, default=RESULTS / "time_budgets.json")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    calibration, test = center_clips("train", arguments.calibration_clips), center_clips("test", arguments.test_clips)
    dynamic = calibrated(arguments.calibrated, calibration)
    one = test[0][:1]
    begin = time.perf_counter()
    times = redconvert.layer_times(dynamic, one, progress=True)
    result: dict[str, Any] = {
        "what": __doc__.split("\n")[0],
        "input": list(one.shape[1:]),
        "calibration_clips": sum(map(len, calibration)),
        "test_clips": sum(map(len, test)),
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in CONFIG.items()},
        "measuring_s": round(time.perf_counter() - begin, 1),
        "dense_ms_by_layers": times.dense_ms,
    }
    rows = measured(dynamic, calibration, test, times, one, arguments.repeats)
    write(result | {"rows": rows} | environment(0), arguments.out)
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.plot:
        answers_against_time(json.loads(arguments.out.read_text()), arguments.plot)


def calibrated(folder: Path | None, calibration: list[Tensor]) -> nn.Module:
    base = zoo.create("i3d_kinetics", weights="KINETICS400").eval()
    if folder is not None and folder.exists():
        return redconvert.from_pretrained(base, folder).eval()
    dynamic = redconvert.convert(base, redconvert.ConvertConfig(**CONFIG), example_inputs=calibration[0][:1])
    redconvert.calibrate(dynamic, calibration, progress=True)
    if folder is not None:
        redconvert.save_pretrained(dynamic, folder)
    return dynamic


def measured(
    dynamic: nn.Module,
    calibration: list[Tensor],
    test: list[Tensor],
    times: redconvert.LayerTimes,
    one: Tensor,
    repeats: int,
) -> list[dict[str, Any]]:
    """Every budget of both kinds: what it costs and what its answers are."""
    gates = [layer.gate for layer in dynamic_layers(dynamic).values()]
    effects, fast = harms(dynamic, calibration[:4]), redconvert.deploy(dynamic, one)
    with redconvert.disabled(dynamic):
        dense = scores(fast, test).log_softmax(1)
    states: dict[str, Callable[[], None]] = {}
    rows: list[dict[str, Any]] = []
    for kind, prices in (("multiply-adds", None), ("time", times)):
        for budget in BUDGETS:
            try:
                found = redconvert.set_budget(
                    dynamic, budget, calibration[:1], by="layers", effects=effects, times=prices
                )
            except redconvert.RedconvertError:  # below what the network can cost
                continue
            logs = scores(fast, test).log_softmax(1)
            apart = (dense.exp() * (dense - logs)).sum(1)
            states[f"{kind} {budget}"] = remembered(gates)
            row = {"kind": kind, "budget": budget, "share_of_dense_macs": round(found.mean, 4)}
            row |= {"expected_time": found.time, "expected_divergence": round(sum((found.harms or {}).values()), 5)}
            row |= {"agreement": round(float((logs.argmax(1) == dense.argmax(1)).double().mean()), 4)}
            rows.append(row | {"divergence": round(float(apart.mean()), 5)})

    @contextmanager
    def under(put: Callable[[], None]) -> Iterator[None]:
        put()
        yield

    within: dict[str, Any] = {name: lambda put=put: under(put) for name, put in states.items()}
    within["dense"] = lambda: redconvert.disabled(dynamic)
    calls: dict[str, Callable[[], Any]] = dict.fromkeys(within, lambda: fast(one))
    found = interleaved(calls, repeats=repeats, warmup=2, within=within)
    for row in rows:
        row["ms"] = round(1000 * found[f"{row['kind']} {row['budget']}"].median, 2)
        row["of_dense_time"] = round(row["ms"] / (1000 * found["dense"].median), 4)
    return [{"kind": "dense", "ms": round(1000 * found["dense"].median, 2)}, *rows]


if __name__ == "__main__":
    main()
