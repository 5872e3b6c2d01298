"""What calibration alone gives: ResNet-56 with every 3x3 convolution at half of its channels, no training.

    python benchmarks/calibration.py --data FOLDER       # see benchmarks/cifar.py for what the folder holds

Each row converts the same pretrained network, calibrates on the same training images, forces every layer to
its half and counts right answers on the test set. Rows that choose "for the answer" weigh the answers at the
package's temperature, or at the one that they name. JSON is written after every row; a row that is in it already is
not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from unittest.mock import patch

import torch
from cifar import accuracy, convert, images, resnet56
from common import RESULTS, environment, write

import redconvert
from redconvert import answers
from redconvert.calibrate import metric

DRAWS = range(1, 6)  # of calibration images: the first hundred of each thousand
MOVES = {"one move each": 0, "several moves": metric.MOVES}  # of the answers, at least
# name: (cheap operation, calibration images, rounds, matched variance); rounds None: not calibrated. Greedy rows choose
# channels by the norms behind.
ROWS = {
    "first half, depthwise (not calibrated)": ("depthwise", 0, None, False),
    "first half, pointwise (not calibrated)": ("pointwise", 0, None, False),
    "greedy, scale, one pass": ("scale", 1000, 0, False),
    "greedy, pointwise, one pass": ("pointwise", 1000, 0, False),
    "greedy, pointwise, 1 round": ("pointwise", 1000, 1, False),
    "greedy, pointwise, 3 rounds": ("pointwise", 1000, 3, False),
    "greedy, pointwise, 3 rounds, 100 images": ("pointwise", 100, 3, False),
    "greedy, auto, 3 rounds": ("auto", 1000, 3, False),
    "greedy, pointwise, one pass, matched variance": ("pointwise", 1000, 0, True),
    "greedy, pointwise, 3 rounds, matched variance": ("pointwise", 1000, 3, True),
    "greedy, pointwise, 3 rounds, matched variance, 100 images": ("pointwise", 100, 3, True),
    "greedy, auto, 3 rounds, matched variance": ("auto", 1000, 3, True),
    "for the answer, pointwise, one pass, matched variance": ("pointwise", 1000, 0, True),
    "for the answer, pointwise, one pass, matched variance, 100 images": ("pointwise", 100, 0, True),
    "for the answer, principal, one pass": ("principal", 1000, 0, False),
    "for the answer, principal, one pass, matched variance": ("principal", 1000, 0, True),
    "for the answer, principal, one pass, matched variance, 100 images": ("principal", 100, 0, True),
    "for the answer, principal, 1 round, matched variance": ("principal", 1000, 1, True),
    **dict.fromkeys(
        [f"for the answer, principal, 100 images of draw {draw}, {moves}" for draw in DRAWS for moves in MOVES],
        ("principal", 100, 0, True),
    ),
    **dict.fromkeys(
        [f"for the answer, principal, one pass, matched variance, temperature {t}" for t in (1, 2, 8, 1000)],
        ("principal", 1000, 0, True),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.json")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = resnet56(arguments.data)
    train, _ = images(arguments.data, "train")
    chosen = torch.randperm(len(train))
    test, labels = (tensor[: arguments.test_images] for tensor in images(arguments.data, "test"))
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if result.get("test_images") != len(test) or result.get("seed") != arguments.seed:
        result = {
            "what": "ResNet-56, CIFAR-10, every 3x3 convolution at half of its channels, no training",
            "test_images": len(test),
            "dense_accuracy": accuracy(model, test, labels),
            "dense_pass_s": _dense_pass(model, train[chosen[:1000]]),
            "rows": {},
        }
    result |= environment(arguments.seed)
    for name, (cheap, count, rounds, match) in ROWS.items():
        if name in result["rows"]:
            continue
        dynamic = convert(model, cheap=cheap)
        row: dict[str, float] = {}
        if rounds is not None:
            first = 1000 * int(name.partition("draw ")[2][:1] or 0)
            batches = list(train[chosen[first : first + count]].split(100))
            importance = "answers" if name.startswith("for the answer") else "norms"
            named = name.partition("temperature ")[2]
            moves = MOVES.get(name.rpartition(", ")[2], metric.MOVES)
            with (
                patch.object(answers, "TEMPERATURE", float(named or answers.TEMPERATURE)),
                patch.object(metric, "MOVES", moves),
            ):
                found = redconvert.calibrate(dynamic, batches, rounds=rounds, match=match, importance=importance)
            row["calibration_s"] = round(found.seconds, 1)
        with redconvert.forced(dynamic, channel=1):
            row["accuracy"] = accuracy(dynamic, test, labels)
            macs = redconvert.report(dynamic, test[:1], time=False)
        row["share_of_dense_macs"] = round(macs.executed_macs / macs.dense_macs, 4)
        result["rows"][name] = row
        write(result, arguments.out)
        print(f"{name:<58} {row['accuracy']:.2%} at {row['share_of_dense_macs']:.1%} of the MACs", flush=True)


def _dense_pass(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            for x in pixels.split(100):
                model(x)
        seconds.append(time.perf_counter() - start)
    return round(sorted(seconds)[1], 2)


if __name__ == "__main__":
    main()
