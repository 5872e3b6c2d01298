"""I3D's Kinetics answers on J-HMDB clips without training: how many stay as they were for fewer multiply-adds.

    python benchmarks/i3d_agreement.py
    python benchmarks/i3d_agreement.py --curves "principal, all layers" --budgets 0.85 0.8 --out other.json

Kinetics weights and classes, 16 frames of 160², calibrated on clips of the training split, answers compared on others
of the test split, channels alone, by layers. JSON is written after every curve; one that is in it already is not
measured again. Data: ``$REDCONVERT_DATA``, or ``../shared/data``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, seconds, write
from plots import agreement_against_macs
from torch import Tensor, nn

import redconvert
from redconvert import zoo
from redconvert.data import JHMDB

# Channels alone, as every second frame alone loses the answers; two layers hold half of the MACs, and
# halves are too coarse for them. Rebuilt, 1x1x1 convolutions save little, as rebuilding costs as much.
LARGE_ALONE = dict.fromkeys(("stem.conv2*", "*branch0*", "*conv_a*", "*branch3*", "logits"))
AGREEING = {
    "rebuilt": {"shares": (0.875, 0.75, 0.6875, 0.625, 0.5625, 0.5, 0.4375), "rules": LARGE_ALONE},
    "absorbed": {"shares": (0.875, 0.75, 0.625, 0.5), "absorb": True, "rules": {"logits": None}},
    "principal": {"cheap": "principal", "shares": (0.875, 0.75, 0.625, 0.5, 0.375, 0.25), "rules": LARGE_ALONE},
    "principal, sixteenths": {
        "cheap": "principal",
        "shares": tuple(i / 16 for i in range(15, 3, -1)),
        "rules": LARGE_ALONE,
    },
    # Mixtures of 1x1x1 filters save where few channels come of many: a product of two thin matrices.
    "principal, all layers": {
        "cheap": "principal",
        "shares": (0.875, 0.75, 0.625, 0.5, 0.375, 0.25),
        "rules": {"logits": None},
    },
    # As large a share of mixtures, read and computed: 7/8 of both cost 0.8 of a 3x3x3 convolution, half 0.26.
    "mixed inputs, all layers": {
        "cheap": "principal",
        "mix_inputs": True,
        "shares": (0.9375, 0.875, 0.8125, 0.75, 0.625, 0.5),
        "rules": {"logits": None},
    },
}


def agreement(arguments: argparse.Namespace, out: Path) -> None:
    """I3D's Kinetics answers on J-HMDB test clips without training: how many top-1 answers stay as they were."""
    test, calibration = center_clips("test", arguments.per_class), center_clips("train", arguments.calibration)
    result: dict[str, Any] = {"what": agreement.__doc__, "input": list(test[0][0].shape), "curves": {}}
    if out.exists():
        result["curves"] = json.loads(out.read_text()).get("curves", {})
    result |= {"calibration_clips": sum(map(len, calibration))}
    base = zoo.create("i3d_kinetics", weights="KINETICS400").eval()
    for name in arguments.curves:
        if name not in result["curves"]:
            result["curves"][name] = _curve(base, AGREEING[name], arguments.budgets, calibration, test)
            write(result | environment(arguments.seed), out)


def _curve(
    base: nn.Module, options: dict[str, Any], budgets: list[float], calibration: list[Tensor], test: list[Tensor]
) -> dict[str, Any]:
    """Calibrated, then solved for again under each budget."""
    dynamic, spent = convert(base, test[0][:1], **options), {}
    spent["dense_pass"] = round(seconds(lambda: [answer(base, clips) for clips in calibration]), 1)
    spent["calibrate"] = round(seconds(lambda: redconvert.calibrate(dynamic, calibration, progress=True)), 1)
    begin = time.perf_counter()
    curve = redconvert.budget_curve(dynamic, calibration, budgets, test=test, refit=True, progress=True)
    spent["curve"] = round(time.perf_counter() - begin, 1)
    print(curve, spent, flush=True)
    return curve.to_dict() | {"shares": options["shares"], "seconds": spent}


def convert(base: nn.Module, clips: Tensor, **options: Any) -> nn.Module:
    """A dynamic copy that decides about channels alone, as a row of AGREEING says."""
    config = redconvert.ConvertConfig(**{"cheap": "pointwise", "temporal": False, **options})
    return redconvert.convert(base, config, example_inputs=clips)


@torch.no_grad()
def answer(model: nn.Module, clips: Tensor) -> Tensor:
    return model(clips)


def center_clips(split: str, per_class: int, after: int = 0) -> list[Tensor]:
    """Batches of 8 clips ``(8, 3, 16, 160, 160)``, one of a video, shuffled, as the first few stand for all.

    Those of each class are the ``per_class`` ones that come after the first ``after``.
    """
    data = JHMDB(split=split, per_class=after + per_class, num_frames=16, size=160, step=2, clips="center")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    kept = [i for i in order if data.labels[:i].count(data.labels[i]) >= after]
    return list(torch.stack([data[i][0] for i in kept]).split(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.85, 0.8, 0.75, 0.7])
    parser.add_argument("--curves", nargs="+", default=list(AGREEING), choices=AGREEING)
    parser.add_argument("--per-class", type=int, default=4, help="test clips of each of the 21 classes; 100: all 268")
    parser.add_argument("--calibration", type=int, default=3, help="training clips of each class to calibrate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "i3d_agreement.json")
    parser.add_argument("--plot", type=Path, help="a picture of the curves")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    agreement(arguments, arguments.out)
    if arguments.plot:
        agreement_against_macs(json.loads(arguments.out.read_text()), arguments.plot, "I3D")


if __name__ == "__main__":
    main()
