"""Answers that stay for fewer multiply-adds, without training: what the benchmarks of one network each share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, seconds, write
from plots import agreement_against_macs
from torch import Tensor, nn

import redconvert
from redconvert.data import JHMDB


def parser(description: str, curves: Iterable[str], out: str, calibration: int, per_class: int) -> Any:
    """Options of every such script; the numbers are the clips of each class to calibrate on and to test on."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.85, 0.8, 0.75, 0.7])
    made.add_argument("--curves", nargs="+", default=list(curves), choices=list(curves))
    made.add_argument("--per-class", type=int, default=per_class, help="of each of the 21 classes, to test; 100: all")
    made.add_argument("--calibration", type=int, default=calibration, help="of each class, to calibrate on")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=RESULTS / out)
    made.add_argument("--plot", type=Path, help="a picture of the curves")
    return made


def shuffled(data: JHMDB, chosen: Iterable[int] | None = None) -> Tensor:
    """Clips ``(N, C, T, H, W)``, the same order in every run, as the first few stand for all."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    kept = set(order if chosen is None else chosen)
    return torch.stack([data[i][0] for i in order if i in kept])


def run(
    base: nn.Module,
    configs: Mapping[str, redconvert.ConvertConfig],
    calibration: list[Tensor],
    test: list[Tensor],
    arguments: argparse.Namespace,
    said: dict[str, Any],
    network: str,
) -> None:
    """Every curve that was asked for and is not in the JSON yet, which is written after each, and the picture."""
    result: dict[str, Any] = {**said, "calibration": sum(map(len, calibration)), "curves": {}}
    if arguments.out.exists():
        result["curves"] = json.loads(arguments.out.read_text()).get("curves", {})
    for name in arguments.curves:
        if name not in result["curves"]:
            result["curves"][name] = _curve(base, configs[name], arguments.budgets, calibration, test)
            write(result | environment(arguments.seed), arguments.out)
    if arguments.plot:
        agreement_against_macs(result, arguments.plot, network)


def _curve(
    base: nn.Module,
    config: redconvert.ConvertConfig,
    budgets: list[float],
    calibration: list[Tensor],
    test: list[Tensor],
) -> dict[str, Any]:
    """Calibrated, then solved for again under each budget."""
    dynamic = redconvert.convert(base, config, example_inputs=test[0][:1])
    spent = {"calibrate": seconds(lambda: redconvert.calibrate(dynamic, calibration, progress=True))}
    found: list[redconvert.BudgetCurve] = []

    def measure() -> None:
        options: dict[str, Any] = {"test": test, "refit": True, "progress": True}
        found.append(redconvert.budget_curve(dynamic, calibration, budgets, **options))

    spent["curve"] = seconds(measure)
    spent = {key: round(value, 1) for key, value in spent.items()}
    print(found[0], spent, flush=True)
    return found[0].to_dict() | {"shares": config.shares, "seconds": spent}
