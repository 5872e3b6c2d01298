"""Asking again where the reduced network is unsure, without training: ResNet-56 on CIFAR-10.

    python benchmarks/cascade.py --data FOLDER --plot cascade.png       # see benchmarks/cifar.py for the folder

The network computes mixtures of filters of mixtures of its inputs (7/8 to a quarter of both), is calibrated on 1,000
training images without labels, and set to each of the budgets `--first`. Then `redconvert.cascade` chooses how unsure
an answer must be for the dense network to be asked, for each of the budgets `--total`, on the last 1,000 test images
without labels: of images that it was trained on the network is too sure. Right answers and costs are those of the
first 4,000 test images. JSON is written after every first budget; one that is in it already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from asking import asking_again
from cifar import HELD_OUT, MIXED, accuracy, calibration_batches, convert, images, resnet56
from common import RESULTS, environment, write
from plots import cascades_against_macs

import redconvert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--first", type=float, nargs="+", default=[0.7, 0.6, 0.5, 0.4], help="of the first pass")
    parser.add_argument("--total", type=float, nargs="+", default=[0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85])
    parser.add_argument("--images", type=int, default=1000, help="for calibration")
    parser.add_argument("--test-images", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "cascade.json")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = resnet56(arguments.data)
    batches = calibration_batches(arguments.data, arguments.images)
    pixels, labels = images(arguments.data, "test")
    test = pixels[: arguments.test_images], labels[: arguments.test_images]
    held_out = list(pixels[-HELD_OUT:].split(100))
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"first": {}}
    result |= {"what": __doc__.split("\n")[0], "images": arguments.images, "test_images": arguments.test_images}
    result.setdefault("dense_accuracy", accuracy(model, *test))
    dynamic = convert(model, **MIXED)
    redconvert.calibrate(dynamic, batches)
    for first in arguments.first:
        if str(first) not in result["first"]:
            little = copy.deepcopy(dynamic)
            redconvert.set_budget(little, first, batches[:2])
            redconvert.calibrate(little, batches, decisions="gates")
            result["first"][str(first)] = row = asking_again(little, held_out, test, arguments.total)
            write(result | environment(arguments.seed), arguments.out)
            print(first, json.dumps(row), flush=True)
    if arguments.plot:
        cascades_against_macs(result, arguments.plot)


if __name__ == "__main__":
    main()
