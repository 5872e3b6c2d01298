"""R(2+1)D: Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018.

Each 3D convolution from ci to co channels is a spatial one (1x3x3, ci to M) and a temporal one (3x1x1, M to co), where

    M = floor(27 * ci * co / (9 * ci + 3 * co))

gives the pair as many weights as the 3D convolution had. The original takes ci and co of each convolution; torchvision
takes those of the block's first convolution for both, and 45 instead of 83 in the stem. The blocks are torchvision's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models.video import R2Plus1D_18_Weights
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

from redconvert.errors import RedconvertError
from redconvert.zoo.layout import KINETICS, check_clip
from redconvert.zoo.published import find_weights, load_published
from redconvert.zoo.registry import register_model

__all__ = ["R2Plus1D", "midplanes_of", "r2plus1d_18"]

MIDPLANES = ("original", "torchvision")
_STEM_MIDPLANES = 83  # floor(3 * 7 * 7 * 3 * 64 / (7 * 7 * 3 + 3 * 64)), the same rule for the stem's 3x7x7

_PUBLISHED = {"KINETICS400_V1": lambda: dict(R2Plus1D_18_Weights.KINETICS400_V1.get_state_dict(check_hash=True))}


def midplanes_of(in_channels: int, out_channels: int) -> int:
    """M, the channels between the spatial and the temporal convolution."""
    return 27 * in_channels * out_channels // (9 * in_channels + 3 * out_channels)


class OriginalConv2Plus1D(Conv2Plus1D):
    """A (2+1)D convolution as wide as the original's, whatever its block asks for."""

    def __init__(self, in_planes: int, out_planes: int, midplanes: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__(in_planes, out_planes, midplanes_of(in_planes, out_planes), stride, padding)


class OriginalStem(nn.Sequential):
    """1x7x7 and 3x1x1, 3-83-64 channels: (N, 3, T, H, W) -> (N, 64, T, H/2, W/2)."""

    def __init__(self) -> None:
        middle = _STEM_MIDPLANES
        super().__init__(
            nn.Conv3d(3, middle, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            nn.Conv3d(middle, 64, (3, 1, 1), 1, (1, 0, 0), bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(inplace=True),
        )


class R2Plus1D(VideoResNet):
    """R(2+1)D-18 for RGB clips.

    Input ``(N, 3, T, H, W)``: float RGB, for torchvision's weights normalised with mean (0.43216, 0.394666, 0.37645)
    and deviation (0.22803, 0.22145, 0.216989); made for 8, 16 or 32 frames of 128x128 (torchvision's: 16 of 112x112),
    other sizes work too. Output ``(N, num_classes)``: logits. Between the stages: ``(N, 64, T, H/2, W/2)``,
    ``(N, 128, T/2, H/4, W/4)``, ``(N, 256, T/4, H/8, W/8)``, ``(N, 512, T/8, H/16, W/16)``.

    27.5, 55.0 and 110.1 GMACs at 8, 16 and 32 frames of 128x128, and 27.6, 55.2 and 110.4 with two more for each norm
    element; 33.3 M parameters with 200 classes. State dict keys are torchvision's.

    Args:
        num_classes: number of logits.
        midplanes: "original" or "torchvision", the widths between spatial and temporal convolutions.

    Raises:
        RedconvertError: (forward) an input of another layout or type; the message says which axis is time.
    """

    example_shape = (1, 3, 16, 128, 128)
    normalisation = KINETICS

    def __init__(self, num_classes: int = 400, midplanes: str = "original") -> None:
        if midplanes not in MIDPLANES:
            raise RedconvertError(f"r2plus1d_18: midplanes must be 'original' or 'torchvision', not {midplanes!r}")
        original = midplanes == "original"
        conv: Any = OriginalConv2Plus1D if original else Conv2Plus1D
        stem = OriginalStem if original else R2Plus1dStem
        super().__init__(BasicBlock, [conv] * 4, [2, 2, 2, 2], stem, num_classes)
        self.midplanes = midplanes

    def forward(self, x: Tensor) -> Tensor:
        check_clip("r2plus1d_18", x)
        return super().forward(x)


@register_model
def r2plus1d_18(weights: str | Path | None = None, num_classes: int = 400, midplanes: str = "original") -> R2Plus1D:
    """R(2+1)D-18, in training mode.

    Args:
        weights: None for random weights; "KINETICS400_V1" for torchvision's, downloaded (120 MB, top-1 67.5 %); or the
            path of a file with such a state dict. They fit ``midplanes="torchvision"``.
        num_classes: number of logits. Where it is not the weights', ``fc`` keeps its random weights.
        midplanes: "original", as in the paper (33.3 M parameters), or "torchvision" (31.3 M).

    Raises:
        RedconvertError: weights that cannot be found or do not fit, or torchvision's for the original's widths.
    """
    model = R2Plus1D(num_classes, midplanes)
    if weights is None:
        return model
    if weights in _PUBLISHED and midplanes != "torchvision":
        raise RedconvertError(
            f"r2plus1d_18: weights='{weights}' are torchvision's, whose middle widths differ from the original's (45 "
            f"channels in the stem instead of 83, for one), so they cannot be loaded into it. Pass "
            f"midplanes='torchvision' to get the network that they fit; none are published for the original's widths."
        )
    load_published("r2plus1d_18", model, find_weights("r2plus1d_18", weights, _PUBLISHED), head="fc")
    return model
