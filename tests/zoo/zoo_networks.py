"""The paper's networks at sizes that a test can afford."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from redconvert import ConvertConfig, zoo
from redconvert.presets import presets

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A network, its test input and what to expect.

    Attributes:
        shape: of the input; two samples, so that norms of single positions can train.
        output: shape of what it returns.
        options: of its builder, beside num_classes.
        rules: in front of the preset's, for the lifecycle alone.
    """

    name: str
    shape: tuple[int, ...]
    output: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    rules: tuple[Any, ...] = ()

    def build(self) -> nn.Module:
        return zoo.create(self.name, num_classes=CLASSES, **self.options)

    def empty(self) -> nn.Module:
        """The same with memory that nobody has written to."""
        with torch.device("meta"):
            model = self.build()
        return model.to_empty(device="cpu")

    def inputs(self, seed: int = 1) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))

    def preset(self) -> ConvertConfig:
        """Its preset, for as many frames as the test's clips have."""
        config = presets[self.name]
        return config if config.num_frames is None else replace(config, num_frames=self.shape[2])

    def config(self) -> ConvertConfig:
        config = self.preset()
        return replace(config, rules=(*self.rules, *config.rules))


# ResNet-50's widest layers: calibrating 1024 and 2048 channels takes seconds each, for nothing that is new here.
_WIDE = (("re:backbone\\.layer[34]\\..*(conv3|downsample\\.0)", None),)
# Stages that another network here has too.
_LATE = (("backbone.layer[34].*", None),)
_LONG = (("backbone.blocks.3.*", None),)
_BOXES = 5 * (5 + CLASSES)

CASES = {
    case.name: case
    for case in (
        Case("r2plus1d_18", (2, 3, 8, 32, 32), (2, CLASSES)),
        Case("i3d_v2", (2, 3, 8, 32, 32), (2, CLASSES)),
        Case("x3d_m", (2, 3, 4, 32, 32), (2, CLASSES), rules=(("blocks.4.*", None),)),
        Case("tpn_r2plus1d_18", (2, 3, 8, 32, 32), (2, CLASSES), rules=_LATE),
        Case("tpn_resnet50", (2, 3, 4, 32, 32), (2, CLASSES), rules=_LATE),
        Case("corrnet_r2plus1d_18", (2, 3, 8, 16, 16), (2, CLASSES), {"num_frames": 8}, (("layer[34].*", None),)),
        Case("tsn_resnet50", (2, 3, 4, 32, 32), (2, CLASSES), rules=_WIDE),
        Case("pspnet_resnet18", (2, 3, 32, 32), (2, CLASSES, 32, 32)),
        Case("yowo_i3d", (2, 3, 8, 32, 32), (2, _BOXES, 1, 1), {"freeze_backbone": True}),
        Case("yowo_x3d_m", (2, 3, 4, 32, 32), (2, _BOXES, 1, 1), {"freeze_backbone": True}, _LONG),
    )
}
