"""X3D-M: Feichtenhofer, "X3D: Expanding Architectures for Efficient Video Recognition", CVPR 2020.

The network is pytorchvideo's, block by block and name by name. Two things differ. It gives logits, where pytorchvideo's
gives softmax probabilities in training too. And its head averages over all of T, H and W; pytorchvideo's takes windows
as large as the clip that it was built for, so the two are equal at that size, and this one takes others too.
"""

from __future__ import annotations

from pathlib import Path

from pytorchvideo.models.hub.x3d import checkpoint_paths
from pytorchvideo.models.net import Net
from pytorchvideo.models.x3d import create_x3d
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url

from redconvert.zoo.layout import check_clip
from redconvert.zoo.published import find_weights, load_published
from redconvert.zoo.registry import register_model

__all__ = ["X3D", "x3d_m"]

_HEAD = 5  # behind the stem and four stages

_PUBLISHED = {
    "KINETICS400": lambda: load_state_dict_from_url(checkpoint_paths["x3d_m"], map_location="cpu")["model_state"]
}


class X3D(Net):
    """X3D-M for RGB clips.

    Input ``(N, 3, T, H, W)``: float RGB, for pytorchvideo's weights normalised with mean 0.45 and deviation 0.225; made
    for 16 frames of 224x224 (256x256 in the paper of VA-RED2), other sizes work too. Output ``(N, num_classes)``:
    logits. `features` gives ``(N, 192, T, H/32, W/32)``: time is never reduced.

    6.19 GMACs at 16x256x256, 6.40 with two more for each norm element; 4.73 at 16x224x224. 3.8 M parameters. State dict
    keys are pytorchvideo's.

    Args:
        num_classes: number of logits; 0 for a network without head, which returns its features.
        dropout: probability of dropping a feature in front of the classifier, in training.

    Raises:
        RedconvertError: (forward) an input of another layout or type; the message says which axis is time.
    """

    example_shape = (1, 3, 16, 256, 256)
    normalisation = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)

    def __init__(self, num_classes: int = 400, dropout: float = 0.5) -> None:
        built = create_x3d(
            input_clip_length=16,
            input_crop_size=224,
            model_num_class=max(num_classes, 1),
            dropout_rate=dropout,
            head_activation=None,
        )
        super().__init__(blocks=built.blocks if num_classes else built.blocks[:_HEAD])
        if num_classes:
            self.blocks[_HEAD].pool.pool = nn.AdaptiveAvgPool3d(1)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, T, H, W) -> (N, 192, T, H/32, W/32)."""
        for block in self.blocks[:_HEAD]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        check_clip("x3d_m", x)
        x = self.features(x)
        for head in self.blocks[_HEAD:]:
            x = head(x)
        return x


@register_model
def x3d_m(weights: str | Path | None = None, num_classes: int = 400, dropout: float = 0.5) -> X3D:
    """X3D-M, in training mode.

    Args:
        weights: None for random weights; "KINETICS400" for pytorchvideo's, downloaded (31 MB, top-1 75.9 %); or the
            path of a file with such a state dict.
        num_classes: number of logits. Where it is not the weights', the classifier keeps its random weights.
        dropout: probability of dropping a feature in front of the classifier, in training.

    Raises:
        RedconvertError: weights that cannot be found or do not fit.
    """
    model = X3D(num_classes, dropout)
    if weights is not None:
        state = find_weights("x3d_m", weights, _PUBLISHED)
        load_published("x3d_m", model, state, head=f"blocks.{_HEAD}", classifier=f"blocks.{_HEAD}.proj")
    return model
