"""TPN: Yang et al., "Temporal Pyramid Network for Action Recognition", CVPR 2020.

The pyramid takes res4 and res5 (C4 and C5 channels):

    1. spatial modulation: res4 to the size and width of res5, by a 1x3x3 convolution with stride 2;
    2. temporal modulation: each to 1024 channels by a grouped 3x1x1 convolution, and to a common number of frames by a
       max pool;
    3. top-down: level 4 gets level 5 added;
    4. bottom-up: level 5 gets a 3x1x1 convolution of level 4 added. As in the authors' code this takes the level 4 that
       step 3 has changed: a cascade, where the paper's figure has both flows start from step 2;
    5. fusion: the levels after 3, and those after 4, are each fused, and then both with each other, to 2048 channels.

ResNet-50's levels, 8 frames each, are pooled to one, and fused to 2048 channels each, as the authors configure it. The
authors have no R(2+1)D. It halves time between res4 and res5, so here res4 is pooled by 2; fusing the levels to 1024
channels each then meets the GFLOPs that VA-RED2 gives. The paper's auxiliary head (a loss on res4) is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from redconvert.zoo.layout import IMAGENET, KINETICS, check_clip
from redconvert.zoo.published import find_weights, load_published
from redconvert.zoo.r2plus1d import R2Plus1D
from redconvert.zoo.registry import register_model
from redconvert.zoo.tsn import PUBLISHED, frames_of, resnet50_weights

__all__ = ["TPNR2Plus1D", "TPNResNet50", "TemporalPyramid", "tpn_r2plus1d_18", "tpn_resnet50"]

_WIDTH, _OUT, _GROUPS = 1024, 2048, 32


def _unit(in_channels: int, out_channels: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution in space, norm, ReLU: (N, in_channels, T, H, W) -> (N, out_channels, T, H/stride, W/stride)."""
    kernel, strides, padding = (1, size, size), (1, stride, stride), (0, size // 2, size // 2)
    conv = nn.Conv3d(in_channels, out_channels, kernel, strides, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True))


class TemporalModulation(nn.Module):
    """(N, C, T, H, W) -> (N, 1024, T/rate, H, W), rounded up."""

    def __init__(self, in_channels: int, rate: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, _WIDTH, (3, 1, 1), padding=(1, 0, 0), groups=_GROUPS, bias=False)
        self.pool = nn.MaxPool3d((rate, 1, 1), ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


class LevelFusion(nn.Module):
    """Both levels, (N, 1024, T, H, W) each, -> (N, out_channels, T, H, W)."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.level4 = _unit(_WIDTH, _WIDTH, groups=_GROUPS)
        self.level5 = _unit(_WIDTH, _WIDTH, groups=_GROUPS)
        self.fuse = _unit(2 * _WIDTH, out_channels)

    def forward(self, level4: Tensor, level5: Tensor) -> Tensor:
        return self.fuse(torch.cat([self.level4(level4), self.level5(level5)], dim=1))


class TemporalPyramid(nn.Module):
    """res4 ``(N, C4, T4, 2H, 2W)`` and res5 ``(N, C5, T5, H, W)`` -> ``(N, 2048, T, H, W)``.

    Args:
        channels: C4 and C5.
        rates: of the max pools in time, T4/T and T5/T.
        fused: channels of the levels' fusions.
    """

    def __init__(self, channels: tuple[int, int], rates: tuple[int, int], fused: int) -> None:
        super().__init__()
        self.spatial = _unit(*channels, size=3, stride=2)
        self.temporal4 = TemporalModulation(channels[1], rates[0])
        self.temporal5 = TemporalModulation(channels[1], rates[1])
        self.down = nn.Conv3d(_WIDTH, _WIDTH, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.top_down = LevelFusion(fused)
        self.bottom_up = LevelFusion(fused)
        self.fuse = _unit(2 * fused, _OUT)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, res4: Tensor, res5: Tensor) -> Tensor:
        level5 = self.temporal5(res5)
        level4 = self.temporal4(self.spatial(res4)) + level5
        descending = self.top_down(level4, level5)
        level5 = level5 + self.down(level4)
        return self.fuse(torch.cat([descending, self.bottom_up(level4, level5)], dim=1))


class TPNR2Plus1D(nn.Module):
    """R(2+1)D-18 with a temporal pyramid, for RGB clips.

    Input ``(N, 3, T, H, W)``: float RGB, made for 8 or 16 frames of 128x128; other sizes work too. Output
    ``(N, num_classes)``: logits. Into the pyramid go ``(N, 256, T/4, H/8, W/8)`` and ``(N, 512, T/8, H/16, W/16)``.

    28.4 and 56.9 GMACs at 8 and 16 frames of 128x128, 28.5 and 57.0 with two more for each norm element.

    Args:
        num_classes: number of logits.
        dropout: probability of dropping a feature in front of ``fc``, in training.

    Raises:
        RedconvertError: (forward) an input of another layout or type; the message says which axis is time.
    """

    example_shape = (1, 3, 16, 128, 128)
    normalisation = KINETICS

    def __init__(self, num_classes: int = 400, dropout: float = 0.5) -> None:
        super().__init__()
        self.backbone = R2Plus1D(1)
        del self.backbone.fc, self.backbone.avgpool
        self.neck = TemporalPyramid((256, 512), rates=(2, 1), fused=1024)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(_OUT, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_clip("tpn_r2plus1d_18", x)
        trunk = self.backbone
        res4 = trunk.layer3(trunk.layer2(trunk.layer1(trunk.stem(x))))
        x = self.neck(res4, trunk.layer4(res4))
        return self.fc(self.dropout(x.mean(dim=(2, 3, 4))))


class TPNResNet50(nn.Module):
    """ResNet-50 on frames with a temporal pyramid.

    Input ``(N, 3, T, H, W)``: float RGB, for ImageNet weights normalised with mean (0.485, 0.456, 0.406) and deviation
    (0.229, 0.224, 0.225); made for 8 frames of 224x224, other sizes work too. Output ``(N, num_classes)``: logits.
    The ResNet's batch is ``N*T`` frames, clip by clip, so `redconvert.ConvertConfig` takes ``num_frames=T``. Into the
    pyramid go ``(N, 1024, T, H/16, W/16)`` and ``(N, 2048, T, H/32, W/32)``.

    41.2 GMACs at 8x224x224.

    Args:
        num_classes: number of logits.
        dropout: probability of dropping a feature in front of ``fc``, in training.

    Raises:
        RedconvertError: (forward) an input of another layout or type; the message says which axis is time.
    """

    example_shape = (1, 3, 8, 224, 224)
    normalisation = IMAGENET

    def __init__(self, num_classes: int = 400, dropout: float = 0.5) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet50", num_classes=0)
        self.neck = TemporalPyramid((1024, 2048), rates=(8, 8), fused=2048)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(_OUT, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_clip("tpn_resnet50", x)
        num_frames = x.size(2)
        res4, res5 = self._levels(frames_of(x))
        x = self.neck(_clips(res4, num_frames), _clips(res5, num_frames))
        return self.fc(self.dropout(x.mean(dim=(2, 3, 4))))

    def _levels(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        trunk: Any = self.backbone
        x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(frames))))
        res4 = trunk.layer3(trunk.layer2(trunk.layer1(x)))
        return res4, trunk.layer4(res4)


def _clips(frames: Tensor, num_frames: int) -> Tensor:
    """(N*T, C, H, W) -> (N, C, T, H, W)."""
    return frames.unflatten(0, (-1, num_frames)).transpose(1, 2)


@register_model
def tpn_r2plus1d_18(num_classes: int = 400, dropout: float = 0.5) -> TPNR2Plus1D:
    """TPN on R(2+1)D-18, with random weights (none are published) and in training mode.

    Args:
        num_classes: number of logits.
        dropout: probability of dropping a feature in front of ``fc``, in training.
    """
    return TPNR2Plus1D(num_classes, dropout)


@register_model
def tpn_resnet50(weights: str | Path | None = None, num_classes: int = 400, dropout: float = 0.5) -> TPNResNet50:
    """TPN on the frames of ResNet-50, in training mode.

    Args:
        weights: None for random weights; ImageNet's for the ResNet, as `redconvert.zoo.tsn.tsn_resnet50` takes them:
            the pyramid and ``fc`` stay random.
        num_classes: number of logits.
        dropout: probability of dropping a feature in front of ``fc``, in training.

    Raises:
        RedconvertError: weights that cannot be found or do not fit.
    """
    model = TPNResNet50(num_classes, dropout)
    if weights is not None:
        state = resnet50_weights(find_weights("tpn_resnet50", weights, PUBLISHED))
        own = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
        load_published("tpn_resnet50", model, {**state, **own}, head="fc")
    return model
