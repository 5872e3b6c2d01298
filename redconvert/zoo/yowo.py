"""YOWO: Köpüklü et al., "You Only Watch Once: A Unified CNN Architecture for Real-Time Spatiotemporal Action
Localization" (arXiv 1911.06644), with its 3D branch alone, as VA-RED2 uses it. Written from the papers.

The backbone sees the clip and gives a map for its last frame. Channel attention mixes the map's C channels by how alike
they are: with the map as F (C x HW),

    M = softmax(F F^T) over each row,    out = alpha * M F + F,

where alpha is learnt and starts at 0. Each of the map's cells then predicts 5 boxes. The widths of the head
(1024 throughout, 3x3 on either side of the attention) are those that meet the paper's GFLOPs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from redconvert.errors import RedconvertError
from redconvert.zoo.layout import check_clip
from redconvert.zoo.registry import create, register_model

__all__ = ["ANCHORS", "YOWO", "ChannelAttention", "yowo_i3d", "yowo_x3d_m"]

Anchors = tuple[tuple[float, float], ...]

# Widths and heights of 5 boxes, in shares of the frame: k-means (by overlap) of the people in J-HMDB's training clips.
ANCHORS = ((0.14, 0.40), (0.20, 0.63), (0.29, 0.75), (0.44, 0.87), (0.65, 0.92))
_WIDTH = 1024
_BOX = 5  # x, y, width, height, confidence


class ChannelAttention(nn.Module):
    """(N, C, H, W) -> (N, C, H, W); the identity at first."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        features = x.flatten(2)
        alike = torch.matmul(features, features.transpose(1, 2)).softmax(dim=2)
        return self.alpha * torch.matmul(alike, features).unflatten(2, (x.size(2), x.size(3))) + x


def _unit(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class YOWO(nn.Module):
    """Action localisation in the last frame of an RGB clip.

    Input ``(N, 3, T, H, W)``: float RGB, normalised as the backbone takes it, made for 16 frames of 224x224; other
    sizes work too. Output ``(N, A * (num_classes + 5), H/32, W/32)`` for A anchors: for each of them tx, ty, tw, th,
    confidence, and the classes' scores. `decode` makes boxes of it.

    44.0 (I3D) and 5.76 (X3D-M) GMACs at 16x224x224 with 24 classes, 43.9 and 5.75 in the paper.

    Args:
        backbone: ``(N, 3, T, H, W)`` -> ``(N, channels, T', H/32, W/32)``; its frames are averaged.
        channels: of the backbone's output.
        num_classes: of actions; 21 are J-HMDB's, 24 UCF101-24's.
        anchors: widths and heights, in shares of the frame.
        freeze_backbone: as `freeze_backbone` does.
        name: for messages.

    Raises:
        RedconvertError: (forward) an input of another layout or type; the message says which axis is time.
    """

    example_shape = (1, 3, 16, 224, 224)

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        num_classes: int = 24,
        anchors: Anchors = ANCHORS,
        freeze_backbone: bool = False,
        name: str = "yowo",
    ) -> None:
        super().__init__()
        if not anchors or not all(len(pair) == 2 and min(pair) > 0 for pair in anchors):
            raise RedconvertError(f"{name}: anchors must be pairs of a width and a height above 0, not {anchors!r}")
        self.name, self.num_classes = name, num_classes
        self.backbone = backbone
        self.normalisation = backbone.normalisation
        self.head = nn.Sequential(
            _unit(channels, _WIDTH, 1),
            _unit(_WIDTH, _WIDTH, 3),
            ChannelAttention(),
            _unit(_WIDTH, _WIDTH, 3),
            _unit(_WIDTH, _WIDTH, 1),
            nn.Conv2d(_WIDTH, len(anchors) * (num_classes + _BOX), 1),
        )
        self.register_buffer("anchors", torch.tensor(anchors))
        self.frozen = False
        if freeze_backbone:
            self.freeze_backbone()

    def forward(self, x: Tensor) -> Tensor:
        check_clip(self.name, x)
        return self.head(self.backbone(x).mean(dim=2))

    def freeze_backbone(self) -> None:
        """The backbone's parameters get no gradient, and its norms keep their statistics in ``train()`` too.

        Before or after `redconvert.convert`: gates and cheap operations, which conversion adds, are not frozen.
        """
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv3d | nn.BatchNorm3d):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
        self.frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> YOWO:
        super().train(mode)
        if self.frozen:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.eval()
        return self

    def decode(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores from what the network returned, H x W cells and A anchors.

            x = (cell + sigmoid(tx)) / W,    width = anchor * exp(tw),    score = sigmoid(confidence) * softmax(classes)

        Args:
            outputs: ``(N, A * (num_classes + 5), H, W)``.

        Returns:
            Boxes ``(N, A*H*W, 4)``: left, top, right, bottom in shares of the frame, not clipped to it; and scores
            ``(N, A*H*W, num_classes)``.
        """
        anchors: Tensor = self.anchors  # type: ignore[assignment]
        height, width = outputs.shape[2:]
        cells = outputs.unflatten(1, (len(anchors), -1)).permute(0, 1, 3, 4, 2)  # (N, A, H, W, classes + 5)
        columns = torch.arange(width, device=outputs.device)
        rows = torch.arange(height, device=outputs.device)[:, None]
        x = (cells[..., 0].sigmoid() + columns) / width
        y = (cells[..., 1].sigmoid() + rows) / height
        half = cells[..., 2:4].exp() * anchors[:, None, None] / 2
        boxes = torch.stack([x - half[..., 0], y - half[..., 1], x + half[..., 0], y + half[..., 1]], dim=-1)
        scores = cells[..., 4:5].sigmoid() * cells[..., _BOX:].softmax(dim=-1)
        return boxes.flatten(1, 3), scores.flatten(1, 3)


@register_model
def yowo_i3d(
    num_classes: int = 24,
    backbone_weights: str | Path | None = None,
    anchors: Anchors = ANCHORS,
    freeze_backbone: bool = False,
) -> YOWO:
    """YOWO on `i3d_v2`, in training mode.

    Args:
        num_classes: of actions; 21 are J-HMDB's, 24 UCF101-24's.
        backbone_weights: as `redconvert.zoo.i3d_v2.i3d_v2` takes them; the head's are random.
        anchors: widths and heights, in shares of the frame.
        freeze_backbone: train the head alone and, of a converted network, gates and cheap operations.

    Raises:
        RedconvertError: weights that cannot be found or do not fit, or anchors that are no pairs of positive numbers.
    """
    backbone = create("i3d_v2", weights=backbone_weights, num_classes=0)
    return YOWO(backbone, 1024, num_classes, anchors, freeze_backbone, "yowo_i3d")


@register_model
def yowo_x3d_m(
    num_classes: int = 24,
    backbone_weights: str | Path | None = None,
    anchors: Anchors = ANCHORS,
    freeze_backbone: bool = False,
) -> YOWO:
    """YOWO on `x3d_m`, in training mode.

    Args:
        num_classes: of actions; 21 are J-HMDB's, 24 UCF101-24's.
        backbone_weights: as `redconvert.zoo.x3d.x3d_m` takes them, for example "KINETICS400"; the head's are random.
        anchors: widths and heights, in shares of the frame.
        freeze_backbone: train the head alone and, of a converted network, gates and cheap operations.

    Raises:
        RedconvertError: weights that cannot be found or do not fit, or anchors that are no pairs of positive numbers.
    """
    backbone = create("x3d_m", weights=backbone_weights, num_classes=0)
    return YOWO(backbone, 192, num_classes, anchors, freeze_backbone, "yowo_x3d_m")
