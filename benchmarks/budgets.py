"""Budgets without training: one decision per layer against gates in closed form, ResNet-56 on CIFAR-10.

    python benchmarks/budgets.py --data FOLDER       # see benchmarks/cifar.py for what the folder holds

Full, half or a quarter of the channels of every 3x3 convolution, calibrated on 1,000 training images without labels.
For each budget: right answers on the first 2,000 test images after the budget, and after one more round of calibration
under it, and what the test images cost. "absorbed", "principal" and "both" are by layers, too, with ``absorb=True``,
``cheap="principal"`` and with both, 3/4, half or a quarter of the channels, and all images for the second calibration;
"mixed" is "principal" with mixtures of inputs, in eighths. JSON is written after every row; a row that is in it already
is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from cifar import ABSORBED, MIXED, accuracy, calibration_batches, convert, images, resnet56
from common import RESULTS, environment, write
from torch import Tensor, nn

import redconvert
from redconvert.budget import calibrate_gates
from redconvert.evaluate import spread_of_macs

HALVES = {"cheap": "pointwise", "search_space": 3}
BY_LAYERS = {
    "absorbed": ABSORBED,
    "principal": {"cheap": "principal", "shares": ABSORBED["shares"]},
    "both": {**ABSORBED, "cheap": "principal"},
    "mixed": MIXED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.6, 0.7, 0.5])
    parser.add_argument("--images", type=int, default=1000, help="for calibration")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "budgets.json")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = resnet56(arguments.data)
    batches = calibration_batches(arguments.data, arguments.images)
    test = tuple(each[: arguments.test_images] for each in images(arguments.data, "test"))
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    result |= {"what": __doc__.split("\n")[0], "images": arguments.images, "test_images": arguments.test_images}
    result.setdefault("dense_accuracy", accuracy(model, *test))
    for name in ("layers", "inputs", *BY_LAYERS):
        left = [budget for budget in arguments.budgets if f"{name} {budget:g}" not in result["rows"]]
        if not left:
            continue
        network = convert(model, **BY_LAYERS.get(name, HALVES))
        redconvert.calibrate(network, batches)
        if name == "inputs":
            calibrate_gates(network, batches)
        for budget in left:
            row = run(copy.deepcopy(network), budget, name, batches, test)
            result["rows"][f"{name} {budget:g}"] = row
            write(result | environment(arguments.seed), arguments.out)
            print(name, budget, json.dumps(row), flush=True)


def run(
    dynamic: nn.Module, budget: float, name: str, batches: list[Tensor], test: tuple[Tensor, ...]
) -> dict[str, float]:
    by: Any = "gates" if name == "inputs" else "layers"
    redconvert.set_budget(dynamic, budget, batches[: 2 if by == "layers" else 1], by=by)
    row = {"before_recalibration": accuracy(dynamic, *test)}
    if name in BY_LAYERS:
        redconvert.calibrate(dynamic, batches, decisions="gates")
    else:
        redconvert.calibrate(dynamic, batches[:3], rounds=1, decisions="gates")
    row["accuracy"] = accuracy(dynamic, *test)
    found = spread_of_macs(dynamic, list(test[0][:500].split(100)))
    whole = float(found.dense.mean())
    costs = {"share_of_dense_macs": found.mean, "min": found.min, "max": found.max, "std": found.std}
    return row | {key: round(float(value) / whole, 4) for key, value in costs.items()}


if __name__ == "__main__":
    main()
