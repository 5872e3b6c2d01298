"""CorrNet: Wang et al., "Video Modeling with Correlation Networks", CVPR 2020, on R(2+1)D-18.

A correlation block behind each of res2, res3 and res4 compares each frame with the one before. With features
x (C channels), a learnt filter w and offsets o on a K x K grid that is dilated by D, the response of group g is

    r[g, o, t, p] = mean over the channels c of g of  w[c, t, o] * x[c, t-1, p] * x[c, t, p + o],

where the first frame is compared with itself. The block is ``relu(x + norm(conv(r)))``, with r from C/4 channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redconvert.errors import RedconvertError
from redconvert.zoo.layout import check_clip
from redconvert.zoo.r2plus1d import R2Plus1D
from redconvert.zoo.registry import register_model

__all__ = ["CorrNet", "Correlation", "CorrelationBlock", "corrnet_r2plus1d_18"]

_KERNEL, _DILATION, _GROUPS = 7, 2, 32


class Correlation(nn.Module):
    """The responses r: (N, C, T, H, W) -> (N, K*K*groups, T, H, W).

    Args:
        channels: C.
        num_frames: T; the filter has a weight for each frame.
        groups: over whose channels a response is averaged; no more than C.
        kernel: K, odd.
        dilation: D.
    """

    def __init__(
        self, channels: int, num_frames: int, groups: int, kernel: int = _KERNEL, dilation: int = _DILATION
    ) -> None:
        super().__init__()
        if channels % groups or not kernel % 2:
            raise RedconvertError(
                f"Correlation: groups={groups} must divide the {channels} channels, and kernel={kernel} must be odd"
            )
        self.groups, self.kernel, self.dilation = groups, kernel, dilation
        self.out_channels = kernel * kernel * groups
        self.weight = nn.Parameter(torch.empty(channels, num_frames, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([x[:, :, :1], x[:, :, :-1]], dim=2)
        reach = self.kernel // 2 * self.dilation
        windows = F.pad(x, (reach,) * 4).unfold(3, x.size(3), self.dilation).unfold(4, x.size(4), self.dilation)
        # (N, C, T, K, K, H, W), then the mean over each group's channels.
        response = windows * before[:, :, :, None, None] * self.weight[:, :, :, :, None, None]
        response = response.unflatten(1, (self.groups, -1)).mean(dim=2)
        return response.permute(0, 3, 4, 1, 2, 5, 6).flatten(1, 3)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel={self.kernel}, dilation={self.dilation}, groups={self.groups}"


class CorrelationBlock(nn.Module):
    """Encode, correlate, decode, add: (N, C, T, H, W) -> (N, C, T, H, W).

    Args:
        channels: C, a multiple of 4.
        num_frames: T.
    """

    def __init__(self, channels: int, num_frames: int) -> None:
        super().__init__()
        narrow = channels // 4
        self.encode = nn.Sequential(
            nn.Conv3d(channels, narrow, 1, bias=False), nn.BatchNorm3d(narrow), nn.ReLU(inplace=True)
        )
        self.correlation = Correlation(narrow, num_frames, min(_GROUPS, narrow))
        self.decode = nn.Sequential(
            nn.Conv3d(self.correlation.out_channels, channels, 1, bias=False), nn.BatchNorm3d(channels)
        )
        self.relu = nn.ReLU(inplace=True)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.decode(self.correlation(self.encode(x))))


class CorrNet(R2Plus1D):
    """R(2+1)D-18 with correlation blocks behind res2, res3 and res4, for RGB clips.

    Input ``(N, 3, T, H, W)``: float RGB, T as ``num_frames`` says, made for 16 frames of 128x128; other heights and
    widths work too. Output ``(N, num_classes)``: logits. The correlation runs at ``(N, 16, T, H/2, W/2)``,
    ``(N, 32, T/2, H/4, W/4)`` and ``(N, 64, T/4, H/8, W/8)``; res2's 16 channels are 16 groups, the others have 32.

    60.5 GMACs at 16x128x128, 60.8 with two more for each norm element; the correlations' products, 0.15 G more, are
    not counted.

    Args:
        num_classes: number of logits.
        num_frames: T, which the filters fix.

    Raises:
        RedconvertError: (forward) an input of another layout, type or length; the message says which axis is time.
    """

    def __init__(self, num_classes: int = 400, num_frames: int = 16) -> None:
        if num_frames < 1:
            raise RedconvertError(f"corrnet_r2plus1d_18: num_frames={num_frames} must be at least 1")
        super().__init__(num_classes)
        self.num_frames = num_frames
        self.example_shape = (1, 3, num_frames, 128, 128)
        self.corr1 = CorrelationBlock(64, num_frames)
        self.corr2 = CorrelationBlock(128, -(-num_frames // 2))
        self.corr3 = CorrelationBlock(256, -(-num_frames // 4))

    def forward(self, x: Tensor) -> Tensor:
        check_clip("corrnet_r2plus1d_18", x, num_frames=self.num_frames)
        x = self.corr1(self.layer1(self.stem(x)))
        x = self.corr3(self.layer3(self.corr2(self.layer2(x))))
        return self.fc(self.avgpool(self.layer4(x)).flatten(1))


@register_model
def corrnet_r2plus1d_18(num_classes: int = 400, num_frames: int = 16) -> CorrNet:
    """CorrNet on R(2+1)D-18, with random weights (none are published) and in training mode.

    Args:
        num_classes: number of logits.
        num_frames: how long the clips are; the correlation's filters have a weight for each frame.
    """
    return CorrNet(num_classes, num_frames)
