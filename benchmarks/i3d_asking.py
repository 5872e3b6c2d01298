"""I3D on J-HMDB without training: a reduced first pass that asks the dense network where it is unsure.

    python benchmarks/i3d_asking.py
    python benchmarks/i3d_asking.py --first 0.65 --total 0.75 --per-class 4 --out other.json    # 84 test clips

Kinetics weights and classes, clips as in benchmarks/i3d_agreement.py, mixtures of filters and inputs. Calibrated and
set to each of the budgets `--first` on clips of the training split. Then `redconvert.cascade` chooses, for each of the
budgets `--total`, how unsure an answer must be for the dense network to be asked, on other clips of the training split.
"Accuracy" is how many of the dense network's answers to the clips of the test split stay. JSON is written after every
first budget; one that is in it already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from asking import answers, asking_again
from common import RESULTS, environment, write
from i3d_agreement import AGREEING, center_clips, convert

import redconvert
from redconvert import zoo
from redconvert.budget import harms


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    calibration = center_clips("train", arguments.calibration)
    held_out = center_clips("train", arguments.held_out, after=arguments.calibration)
    test = torch.cat(center_clips("test", arguments.per_class))
    counts = {"calibration": sum(map(len, calibration)), "held_out": sum(map(len, held_out)), "test": len(test)}
    out = arguments.out
    result = json.loads(out.read_text()) if out.exists() else {"first": {}}
    result |= {"what": __doc__.split("\n")[0], "clips": counts, "input": list(test.shape[1:]), "row": arguments.row}
    base = zoo.create("i3d_kinetics", weights="KINETICS400").eval()
    original = answers(base, test, size=8).argmax(1)
    dynamic = convert(base, test[:1], **AGREEING[arguments.row])
    redconvert.calibrate(dynamic, calibration, progress=True)
    effects = harms(dynamic, calibration)
    for first in arguments.first:
        if str(first) not in result["first"]:
            little = copy.deepcopy(dynamic)
            redconvert.set_budget(little, first, calibration, by="layers", effects=effects, progress=True)
            redconvert.calibrate(little, calibration, decisions="gates", progress=True)
            row = asking_again(little, held_out, (test, original), arguments.total, size=8)
            result["first"][str(first)] = row
            write(result | environment(arguments.seed), out)
            print(first, json.dumps(row), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", default="mixed inputs, all layers", choices=AGREEING)
    parser.add_argument("--first", type=float, nargs="+", default=[0.7, 0.65, 0.6], help="of the first pass")
    parser.add_argument("--total", type=float, nargs="+", default=[0.7, 0.75, 0.8, 0.85])
    parser.add_argument("--per-class", type=int, default=100, help="test clips of each of the 21 classes; 100: all 268")
    parser.add_argument("--calibration", type=int, default=3, help="training clips of each class to calibrate on")
    parser.add_argument("--held-out", type=int, default=4, help="more of them, to choose how unsure is too unsure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "i3d_asking.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
