"""PSPNet: Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, on a dilated ResNet-18 as in CSAILVision's
semantic-segmentation-pytorch.

The encoder has a deep stem (3x3 convolutions to 64, 64 and 128 channels), and its last two stages have dilation 2 and 4
instead of strides: output stride 8. It is timm's. The decoder pools the features to 1x1, 2x2, 3x3 and 6x6 cells.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redconvert.zoo.layout import IMAGENET, check_images
from redconvert.zoo.registry import register_model

__all__ = ["PSPNet", "PyramidPooling", "pspnet_resnet18"]

_CELLS, _WIDTH = (1, 2, 3, 6), 512


class PyramidPooling(nn.Module):
    """Features ``(N, C, H, W)`` -> ``(N, num_classes, H, W)``: context from four pools, beside the features.

    Args:
        in_channels: C.
        num_classes: channels of the output.
        dropout: probability of dropping a channel in front of ``classifier``, in training.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), *_unit(in_channels, _WIDTH, 1)) for cells in _CELLS
        )
        self.fuse = _unit(in_channels + len(_CELLS) * _WIDTH, _WIDTH, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(_WIDTH, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        contexts = [F.interpolate(pool(x), size=size, mode="bilinear", align_corners=False) for pool in self.pools]
        return self.classifier(self.dropout(self.fuse(torch.cat([x, *contexts], dim=1))))


def _unit(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class PSPNet(nn.Module):
    """Semantic segmentation of RGB images.

    Input ``(N, 3, H, W)``: float RGB, usually normalised with mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224,
    0.225). Output ``(N, num_classes, H, W)``: logits, bilinearly enlarged from ``(N, num_classes, H/8, W/8)``. The
    encoder gives ``(N, 512, H/8, W/8)``.

    The encoder takes 10.6 GMACs at 224x224 (10.7 with two more for each norm element), the whole network 20.0.

    Args:
        num_classes: number of logits for each pixel.
        dropout: probability of dropping a channel in front of the classifier, in training.

    Raises:
        RedconvertError: (forward) an input of another layout or type.
    """

    example_shape = (1, 3, 224, 224)
    normalisation = IMAGENET

    def __init__(self, num_classes: int = 150, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = timm.create_model(
            "resnet18", num_classes=0, global_pool="", output_stride=8, stem_type="deep", stem_width=64
        )
        self.decoder = PyramidPooling(512, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        check_images("pspnet_resnet18", x)
        return F.interpolate(self.decoder(self.encoder(x)), size=x.shape[2:], mode="bilinear", align_corners=False)


@register_model
def pspnet_resnet18(num_classes: int = 150, dropout: float = 0.1) -> PSPNet:
    """PSPNet on a dilated ResNet-18, with random weights and in training mode: none are published for this stem.

    Args:
        num_classes: number of logits for each pixel; 150 are ADE20K's.
        dropout: probability of dropping a channel in front of the classifier, in training.
    """
    return PSPNet(num_classes, dropout)
