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
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from cifar import accuracy, convert, images, resnet56
from common import RESULTS, environment, seconds, write
from torch import Tensor, nn

import redconvert
from redconvert import answers
from redconvert.calibrate import metric


@dataclass(frozen=True)
class Row:
    """How a network is calibrated.

    Attributes:
        cheap: operation.
        images: for calibration.
        rounds: None: not calibrated.
        matched: whether mean and variance are.
        importance: what channels are chosen by: the norms behind, or the answer.
        temperature: at which answers count.
        moves: of all answers together, at least.
        draw: of calibration images, a thousand apart.
        share: of the channels that every layer computes.
        mixed: whether it reads mixtures of its input channels, as large a share of them.
    """

    cheap: str
    images: int = 1000
    rounds: int | None = 0
    matched: bool = True
    importance: Literal["norms", "answers"] = "answers"
    temperature: float = answers.TEMPERATURE
    moves: int = metric.MOVES
    draw: int = 0
    share: float = 0.5
    mixed: bool = False


by_norms = partial(Row, importance="norms")
ROWS = {
    "first half, depthwise (not calibrated)": Row("depthwise", rounds=None),
    "first half, pointwise (not calibrated)": Row("pointwise", rounds=None),
    "greedy, scale, one pass": by_norms("scale", matched=False),
    "greedy, pointwise, one pass": by_norms("pointwise", matched=False),
    "greedy, pointwise, 1 round": by_norms("pointwise", rounds=1, matched=False),
    "greedy, pointwise, 3 rounds": by_norms("pointwise", rounds=3, matched=False),
    "greedy, pointwise, 3 rounds, 100 images": by_norms("pointwise", 100, 3, matched=False),
    "greedy, auto, 3 rounds": by_norms("auto", rounds=3, matched=False),
    "greedy, pointwise, one pass, matched variance": by_norms("pointwise"),
    "greedy, pointwise, 3 rounds, matched variance": by_norms("pointwise", rounds=3),
    "greedy, pointwise, 3 rounds, matched variance, 100 images": by_norms("pointwise", 100, 3),
    "greedy, auto, 3 rounds, matched variance": by_norms("auto", rounds=3),
    "for the answer, pointwise, one pass, matched variance": Row("pointwise"),
    "for the answer, pointwise, one pass, matched variance, 100 images": Row("pointwise", 100),
    "for the answer, principal, one pass": Row("principal", matched=False),
    "for the answer, principal, one pass, matched variance": Row("principal"),
    "for the answer, principal, one pass, matched variance, 100 images": Row("principal", 100),
    "for the answer, principal, 1 round, matched variance": Row("principal", rounds=1),
    # Half of both is a quarter: these cost no more than half of the channels above.
    "for the answer, principal, mixed inputs, 11/16 of both, one pass, matched variance": (
        Row("principal", share=11 / 16, mixed=True)
    ),
    "for the answer, principal, mixed inputs, 11/16 of both, 1 round, matched variance": (
        Row("principal", share=11 / 16, mixed=True, rounds=1)
    ),
    "for the answer, principal, mixed inputs, 11/16 of both, matched variance, 100 images": (
        Row("principal", 100, share=11 / 16, mixed=True)
    ),
    **{
        f"for the answer, principal, 100 images of draw {draw}, {name}": Row("principal", 100, moves=moves, draw=draw)
        for draw in range(1, 6)
        for name, moves in (("one move each", 0), ("several moves", metric.MOVES))
    },
    **{
        f"for the answer, principal, one pass, matched variance, temperature {t}": Row("principal", temperature=t)
        for t in (1, 2, 8, 1000)
    },
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
    for name, row in ROWS.items():
        if name in result["rows"]:
            continue
        dynamic, found = convert(model, cheap=row.cheap, shares=(row.share,), mix_inputs=row.mixed), {}
        if row.rounds is not None:
            first = 1000 * row.draw
            calibration = _calibrate(dynamic, row, list(train[chosen[first : first + row.images]].split(100)))
            found["calibration_s"] = round(calibration.seconds, 1)
        with redconvert.forced(dynamic, channel=1):
            found["accuracy"] = accuracy(dynamic, test, labels)
            macs = redconvert.report(dynamic, test[:1], time=False)
        found["share_of_dense_macs"] = round(macs.executed_macs / macs.dense_macs, 4)
        result["rows"][name] = found
        write(result, arguments.out)
        print(f"{name:<58} {found['accuracy']:.2%} at {found['share_of_dense_macs']:.1%} of the MACs", flush=True)


def _calibrate(dynamic: nn.Module, row: Row, batches: list[Tensor]) -> redconvert.Calibration:
    settings = {"rounds": row.rounds, "match": row.matched, "importance": row.importance}
    with patch.object(answers, "TEMPERATURE", row.temperature), patch.object(metric, "MOVES", row.moves):
        return redconvert.calibrate(dynamic, batches, **settings)


@torch.no_grad()
def _dense_pass(model: nn.Module, pixels: Tensor) -> float:
    spent = [seconds(lambda: [model(x) for x in pixels.split(100)]) for _ in range(3)]
    return round(statistics.median(spent), 2)


if __name__ == "__main__":
    main()
