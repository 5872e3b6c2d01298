"""TSN: Wang et al., "Temporal Segment Networks: Towards Good Practices for Deep Action Recognition", ECCV 2016.

A ResNet-50 looks at each frame by itself, and the consensus is the mean of the frames' logits. The ResNet is timm's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import timm
from torch import Tensor, nn

from redconvert.zoo.layout import IMAGENET, check_clip
from redconvert.zoo.published import State, find_weights, load_published
from redconvert.zoo.registry import register_model

__all__ = ["PUBLISHED", "TSN", "frames_of", "resnet50_weights", "tsn_resnet50"]

# timm's names of ResNet-50's weights: its own recipe, and torchvision's two.
_TAGS = {"A1_IN1K": "a1_in1k", "IMAGENET1K_V1": "tv_in1k", "IMAGENET1K_V2": "tv2_in1k"}


def _download(tag: str) -> State:
    return dict(timm.create_model(f"resnet50.{tag}", pretrained=True).state_dict())


PUBLISHED = {name: partial(_download, tag) for name, tag in _TAGS.items()}


def frames_of(clips: Tensor) -> Tensor:
    """(N, C, T, H, W) -> (N*T, C, H, W): the frames of the first clip, then those of the second."""
    return clips.transpose(1, 2).flatten(0, 1)


class TSN(nn.Module):
    """ResNet-50 on frames, with segment consensus.

    Input ``(N, 3, T, H, W)``: float RGB, for ImageNet weights normalised with mean (0.485, 0.456, 0.406) and deviation
    (0.229, 0.224, 0.225); made for 16 frames (segments) of 224x224, other sizes work too. Output ``(N, num_classes)``:
    logits, averaged over the frames. The ResNet's batch is ``N*T`` frames, clip by clip: pass ``num_frames=T`` to
    `redconvert.ConvertConfig`, and gates decide per clip.

    65.4 GMACs at 16x224x224, 65.8 with two more for each norm element. 23.9 M parameters with 200 classes.

    Args:
        num_classes: number of logits.
        dropout: probability of dropping a feature in front of ``fc``, in training.

    Raises:
        RedconvertError: (forward) an input of another layout or type; the message says which axis is time.
    """

    example_shape = (1, 3, 16, 224, 224)
    normalisation = IMAGENET

    def __init__(self, num_classes: int = 400, dropout: float = 0.5) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet50", num_classes=0)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_clip("tsn_resnet50", x)
        logits = self.fc(self.dropout(self.backbone(frames_of(x))))
        return logits.unflatten(0, (-1, x.size(2))).mean(dim=1)


@register_model
def tsn_resnet50(weights: str | Path | None = None, num_classes: int = 400, dropout: float = 0.5) -> TSN:
    """TSN on ResNet-50, in training mode.

    Args:
        weights: None for random weights; ImageNet's, a start for training on clips: "A1_IN1K" (timm's), "IMAGENET1K_V1"
            or "IMAGENET1K_V2" (torchvision's), downloaded through timm (102 MB); or the path of a file with a ResNet-50
            state dict.
        num_classes: number of logits. Where it is not the weights', ``fc`` keeps its random weights.
        dropout: probability of dropping a feature in front of ``fc``, in training.

    Raises:
        RedconvertError: weights that cannot be found or do not fit.
    """
    model = TSN(num_classes, dropout)
    if weights is not None:
        state = resnet50_weights(find_weights("tsn_resnet50", weights, PUBLISHED))
        load_published("tsn_resnet50", model, state, head="fc")
    return model


def resnet50_weights(state: State) -> State:
    """A ResNet-50's state dict under the names of a network whose backbone it is; its classifier stays ``fc``."""
    return {key if key.startswith("fc.") else f"backbone.{key}": value for key, value in state.items()}
