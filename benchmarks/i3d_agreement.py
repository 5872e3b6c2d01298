"""I3D's Kinetics answers on J-HMDB clips without training: how many stay as they were for fewer multiply-adds.

    python benchmarks/i3d_agreement.py
    python benchmarks/i3d_agreement.py --curves "principal, all layers" --budgets 0.85 0.8 --out other.json

Kinetics weights and classes, 16 frames of 160², calibrated on clips of the training split, answers compared on others
of the test split, channels alone, by layers. JSON is written after every curve; one that is in it already is not
measured again. Data: ``$REDCONVERT_DATA``, or ``../shared/data``.
"""

from __future__ import annotations

from typing import Any

import curves
import torch
from torch import Tensor, nn

import redconvert
from redconvert import zoo
from redconvert.data import JHMDB

# Channels alone, as every second frame alone loses the answers; two layers hold half of the MACs, and
# halves are too coarse for them. Rebuilt, 1x1x1 convolutions save little, as rebuilding costs as much.
LARGE_ALONE = dict.fromkeys(("stem.conv2*", "*branch0*", "*conv_a*", "*branch3*", "logits"))
AGREEING: dict[str, dict[str, Any]] = {
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
    "mixed inputs, sixteenths": {
        "cheap": "principal",
        "mix_inputs": True,
        "shares": tuple(i / 16 for i in range(15, 7, -1)),
        "rules": {"logits": None},
    },
}


def config(**options: Any) -> redconvert.ConvertConfig:
    """Decides about channels alone, as a row of AGREEING says."""
    return redconvert.ConvertConfig(**{"cheap": "pointwise", "temporal": False, **options})


def convert(base: nn.Module, clips: Tensor, **options: Any) -> nn.Module:
    return redconvert.convert(base, config(**options), example_inputs=clips)


def center_clips(split: str, per_class: int, after: int = 0) -> list[Tensor]:
    """Batches of 8 clips ``(8, 3, 16, 160, 160)``, one of a video, shuffled.

    Those of each class are the ``per_class`` ones that come after the first ``after``.
    """
    data = JHMDB(split=split, per_class=after + per_class, num_frames=16, size=160, step=2, clips="center")
    late = [i for i, label in enumerate(data.labels) if data.labels[:i].count(label) >= after]
    return list(curves.shuffled(data, late).split(8))


def main() -> None:
    arguments = curves.parser(__doc__.split("\n")[0], AGREEING, "i3d_agreement.json", 3, 4).parse_args()
    torch.manual_seed(arguments.seed)
    calibration, test = (
        center_clips(split, count) for split, count in (("train", arguments.calibration), ("test", arguments.per_class))
    )
    base = zoo.create("i3d_kinetics", weights="KINETICS400").eval()
    said = {"what": __doc__.split("\n")[0], "input": list(test[0][0].shape)}
    configs = {row: config(**options) for row, options in AGREEING.items()}
    curves.run(base, configs, calibration, test, arguments, said, "I3D")


if __name__ == "__main__":
    main()
