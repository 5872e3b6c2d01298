"""I3D as IBM's action-recognition-pytorch defines it: GoogLeNet, inflated (Carreira and Zisserman, CVPR 2017;
Chen et al., "Deep Analysis of CNN-based Spatio-temporal Representations for Action Recognition", CVPR 2021).

It differs from DeepMind's `i3d_kinetics` in its padding (PyTorch's, symmetric), its first convolution (temporal stride
1 instead of 2) and its pools (three that halve time). As in torchvision's GoogLeNet, the 5x5 branch is 3x3.

Inflating: a 2D kernel repeated along time and divided by its length, ``w3[t] = w2 / 7`` or ``/ 3``, answers a
clip of equal frames as the 2D network answers one of them (away from the clip's ends, which are padded with zeros).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

from torch import Tensor, nn

from redconvert.errors import require
from redconvert.zoo.i3d_kinetics import BLOCKS, Inception, conv_unit
from redconvert.zoo.layout import UNIT, check_clip
from redconvert.zoo.published import find_weights, load_published
from redconvert.zoo.registry import register_model

__all__ = ["I3DV2", "i3d_v2", "inflate_googlenet"]

_UNITS = {
    "branch1": "branch0",
    "branch2.0": "branch1.conv_a",
    "branch2.1": "branch1.conv_b",
    "branch3.0": "branch2.conv_a",
    "branch3.1": "branch2.conv_b",
    "branch4.1": "branch3.conv",
}
_KEY = re.compile(r"(?:inception(\d)([a-e])\.(branch\d(?:\.\d)?)|(conv\d))\.(conv|bn)\.(\w+)")


class I3DV2(nn.Module):
    """Inflated GoogLeNet for RGB clips.

    Input ``(N, 3, T, H, W)``: float RGB in [-1, 1], made for 16 frames of 256x256 (paper) or 224x224; other sizes work
    too. Output ``(N, num_classes)``: logits. `features` gives ``(N, 1024, T/8, H/32, W/32)``, rounded up.

    55.9 GMACs at 16x256x256, 56.0 with two more for each norm element; 42.8 at 16x224x224. 12.3 M parameters without
    the classifier.

    Args:
        num_classes: number of logits; 0 for a network without ``fc``, which returns its features.
        dropout: probability of dropping a feature in front of ``fc``, in training.

    Raises:
        RedconvertError: (forward) an input of another layout or type; the message says which axis is time.
    """

    example_shape = (1, 3, 16, 256, 256)
    normalisation = UNIT

    def __init__(self, num_classes: int = 400, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=_first_unit(),
                pool1=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
                conv2=conv_unit(64, 64, 1),
                conv3=conv_unit(64, 192, 3),
                pool2=_halving_pool(),
            )
        )
        self.mixed_3b = Inception(192, BLOCKS["3b"])
        self.mixed_3c = Inception(256, BLOCKS["3c"])
        self.pool3 = _halving_pool()
        self.mixed_4b = Inception(480, BLOCKS["4b"])
        self.mixed_4c = Inception(512, BLOCKS["4c"])
        self.mixed_4d = Inception(512, BLOCKS["4d"])
        self.mixed_4e = Inception(512, BLOCKS["4e"])
        self.mixed_4f = Inception(528, BLOCKS["4f"])
        self.pool4 = _halving_pool()
        self.mixed_5b = Inception(832, BLOCKS["5b"])
        self.mixed_5c = Inception(832, BLOCKS["5c"])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes) if num_classes else None
        self._initialise()

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, T, H, W) -> (N, 1024, T/8, H/32, W/32)."""
        x = self.stem(x)
        x = self.pool3(self.mixed_3c(self.mixed_3b(x)))
        x = self.mixed_4d(self.mixed_4c(self.mixed_4b(x)))
        x = self.pool4(self.mixed_4f(self.mixed_4e(x)))
        return self.mixed_5c(self.mixed_5b(x))

    def forward(self, x: Tensor) -> Tensor:
        check_clip("i3d_v2", x, "float RGB in [-1, 1]")
        x = self.features(x)
        return x if self.fc is None else self.fc(self.dropout(x.mean(dim=(2, 3, 4))))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.fc is not None:
            nn.init.normal_(self.fc.weight, 0, 0.001)
            nn.init.zeros_(self.fc.bias)


def _first_unit() -> nn.Sequential:
    """7x7x7 with stride 2 in space alone: (N, 3, T, H, W) -> (N, 64, T, H/2, W/2)."""
    conv = nn.Conv3d(3, 64, 7, (1, 2, 2), 3, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm3d(64, eps=1e-3), relu=nn.ReLU(inplace=True)))


def _halving_pool() -> nn.MaxPool3d:
    return nn.MaxPool3d(3, stride=2, padding=1)


# --- weights -------------------------------------------------------------------------------------------------------


@register_model
def i3d_v2(weights: str | Path | None = None, num_classes: int = 400, dropout: float = 0.2) -> I3DV2:
    """Inflated GoogLeNet, in training mode.

    Args:
        weights: None for random weights; "IMAGENET1K_V1" for torchvision's GoogLeNet, downloaded (50 MB) and inflated:
            a start for training on clips, ``fc`` stays random; or the path of a file with an `I3DV2` state dict.
        num_classes: number of logits. Where it is not a file's, ``fc`` keeps its random weights.
        dropout: probability of dropping a feature in front of ``fc``, in training.

    Raises:
        RedconvertError: weights that cannot be found or do not fit.
    """
    model = I3DV2(num_classes, dropout)
    if weights is not None:
        published = {"IMAGENET1K_V1": lambda: inflate_googlenet(_googlenet_weights(), model)}
        load_published("i3d_v2", model, find_weights("i3d_v2", weights, published), head="fc")
    return model


def inflate_googlenet(state: dict[str, Tensor], model: I3DV2) -> dict[str, Tensor]:
    """The state dict of torchvision's GoogLeNet as one of ``model``, whose own classifier is kept.

    The auxiliary classifiers and the 1000 classes are left out; all else is renamed, and kernels are inflated.
    """
    own = model.state_dict()
    inflated = {key: value for key, value in own.items() if key.startswith("fc.")}
    for key, value in state.items():
        if not key.startswith(("fc.", "aux")):
            name = _our_name(key)
            if value.dim() == 4 and name in own and own[name].dim() == 5:
                frames = own[name].shape[2]
                value = value.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
            inflated[name] = value
    return inflated


def _our_name(key: str) -> str:
    """``inception4a.branch2.1.bn.weight`` -> ``mixed_4b.branch1.conv_b.norm.weight``; other keys stay as they are."""
    match = _KEY.fullmatch(key)
    if match is None:
        return key
    stage, letter, branch, stem, kind, tensor = match.groups()
    # The paper's first block after a pool is b, GoogLeNet's a.
    unit = f"stem.{stem}" if stem else f"mixed_{stage}{chr(ord(letter) + 1)}.{_UNITS[branch]}"
    return f"{unit}.{'norm' if kind == 'bn' else 'conv'}.{tensor}"


def _googlenet_weights() -> dict[str, Tensor]:
    models = require("torchvision.models", extra="zoo", purpose="Weights of GoogLeNet")
    return dict(models.GoogLeNet_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True))
