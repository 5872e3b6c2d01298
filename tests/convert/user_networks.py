"""Networks as users write them: small, trainable, each with its own way to hide or repeat convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """A network with what it takes and what conversion makes of it.

    Attributes:
        build: the network and its example inputs.
        converted: convolution modules that become dynamic, of how many.
        source: how the plan reads it.
        skipped: by name, a part of the reason.
        loss: of the network in ``train()``.
        functional: functional convolutions that the plan names.
        untaught: converted layers that run but have no part in the loss.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    converted: tuple[int, int]
    source: str = "fx"
    skipped: dict[str, str] = field(default_factory=dict)
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    functional: tuple[str, ...] = ()
    untaught: int = 0


def unit(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class FunctionalUNet(nn.Module):
    """A U-Net whose skip connections and head are functional convolutions with parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = unit(3, 16), unit(16, 24, 2), unit(24, 32, 2)
        self.up1 = nn.ConvTranspose2d(32, 24, 2, 2)
        self.merge1, self.merge2 = unit(48, 24), unit(40, 16)
        self.skip1 = nn.Parameter(torch.randn(24, 24, 1, 1) / 5)
        self.skip2 = nn.Parameter(torch.randn(16, 1, 3, 3) / 3)
        self.head = nn.Parameter(torch.randn(2, 16, 1, 1) / 4)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(one)
        y = self.up1(self.bottom(two))
        y = self.merge1(torch.cat([y, F.conv2d(two, self.skip1)], dim=1))
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        y = self.merge2(torch.cat([y, torch.conv2d(one, self.skip2, padding=1, groups=16)], dim=1))
        return F.conv2d(y, self.head)


class Siamese(nn.Module):
    """Two inputs go through one trunk; their distance is the result."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(unit(3, 16), unit(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return F.pairwise_distance(self.trunk(one), self.trunk(other))


class Recurrent(nn.Module):
    """A convolutional GRU over the frames of a clip ``(N, T, C, H, W)``: the same convolutions at every step."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.stem = unit(3, width, 2)
        self.gates, self.candidate = nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.Conv2d(2 * width, width, 3, 1, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, clip: Tensor) -> Tensor:
        state = None
        for frame in clip.unbind(1):
            x = self.stem(frame)
            state = torch.zeros_like(x) if state is None else state
            reset, update = self.gates(torch.cat([x, state], dim=1)).sigmoid().chunk(2, dim=1)
            new = self.candidate(torch.cat([x, reset * state], dim=1)).tanh()
            state = update * state + (1 - update) * new
        assert state is not None
        return self.head(state.mean((2, 3)))


class WeightNorm(nn.Module):
    """Every second convolution stores its weight as direction and length."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 1, 1)
        self.second = parametrizations.weight_norm(nn.Conv2d(16, 16, 3, 1, 1))
        self.third = nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.first, self.second, self.third):
            x = F.elu(conv(x))
        return self.head(x.mean((2, 3)))


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward pass; their dropout must draw the same numbers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv3d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Dropout3d(0.2))
            for _ in range(3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean((2, 3, 4)))


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


# -- networks of libraries -------------------------------------------------------------------------------


def video_mae() -> tuple[nn.Module, Any]:
    """transformers' VideoMAE: one Conv3d, the patch embedding; it takes keywords and returns a dataclass."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=5,
    )
    return VideoMAEForVideoClassification(config), {"pixel_values": image(2, 4, 3, 32, 32)}


def bit() -> tuple[nn.Module, Any]:
    """transformers' BiT: weight-standardised convolutions, "SAME" padding in a module of their own."""
    from transformers import BitConfig, BitForImageClassification

    config = BitConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], global_padding="SAME", num_groups=8, num_labels=5
    )
    return BitForImageClassification(config), {"pixel_values": image(2, 3, 33, 33)}


def unet() -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, classes=3), image(2, 3, 32, 32)


def pspnet() -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    return smp.PSPNet("efficientnet-b0", encoder_weights=None, classes=3, psp_dropout=0.0), image(2, 3, 48, 48)


def faster_rcnn() -> tuple[nn.Module, Any]:
    """torchvision's detector on a small trunk: a list of images of different sizes.

    The threshold is 0, or random weights would detect nothing and there would be nothing to compare.
    """
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    trunk = nn.Sequential(unit(3, 16, 2), unit(16, 32, 2), unit(32, 32, 2))
    trunk.out_channels = 32  # type: ignore[assignment]
    model = detection.FasterRCNN(
        trunk,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_head=TwoMLPHead(32 * 7 * 7, 64),
        box_predictor=FastRCNNPredictor(64, 4),
        min_size=64,
        max_size=96,
        box_score_thresh=0.0,
    )
    return model, ([image(3, 64, 80).sigmoid(), image(3, 72, 64).sigmoid()],)


def detection_loss(model: nn.Module, inputs: Any) -> Tensor:
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 60.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in inputs[0]]
    return sum(model(*inputs, targets).values())  # type: ignore[return-value]
