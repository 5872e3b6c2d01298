"""Small dynamic networks with channel orders, cheap operations and gates of any numbers."""

from __future__ import annotations

import copy

import torch
from reference import randomize
from torch import Tensor, nn

from redconvert import ConvertConfig, convert
from redconvert.layers import dynamic_layers


class Video(nn.Module):
    """A convolution that is used twice, odd channels, groups, time strides; hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 14, 3, padding=1, bias=False), nn.BatchNorm3d(14), nn.ReLU())
        self.twice = nn.Conv3d(14, 14, 3, padding=1, groups=2)
        self.also = self.twice
        self.down = nn.Conv3d(14, 9, (3, 3, 3), stride=(2, 2, 2), padding=1)
        self.point = nn.Conv3d(9, 17, 1)
        self.head = nn.Linear(17, 5)
        self.parts = [self.point]  # a reference that is no child

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.twice(x)) + torch.tanh(self.also(x))
        return self.head(self.parts[0](torch.relu(self.down(x))).mean((2, 3, 4)))

    def describe(self) -> str:
        return "the user's own"


class Frames(nn.Module):
    """A 2D network on clips whose frames are folded into the batch: ``(N * 5, 3, H, W)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, padding_mode="reflect"), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 11, 3, stride=2))
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.deep(self.first(x)).mean((2, 3)))
        return x.unflatten(0, (-1, 5)).mean(1)


CLIP = (4, 3, 7, 12, 10)
FOLDED = (4 * 5, 3, 12, 10)


def video(dtype: torch.dtype = torch.float64, **config) -> tuple[nn.Module, Tensor]:
    """A dynamic `Video` in ``eval()``, and clips."""
    dynamic, x = _dynamic(Video(), torch.randn(CLIP), {"rules": {"*": {}}, **config}, dtype)
    dynamic.spare = copy.deepcopy(dynamic.point)  # a dynamic layer that never runs
    return dynamic, x


def frames(dtype: torch.dtype = torch.float64, **config) -> tuple[nn.Module, Tensor]:
    """A dynamic `Frames` in ``eval()``, and frames of clips."""
    return _dynamic(Frames(), torch.randn(FOLDED), {"rules": {"*": {}}, "num_frames": 5, **config}, dtype)


def _dynamic(model: nn.Module, x: Tensor, config: dict, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    dynamic = convert(model, ConvertConfig(**config), example_inputs=x)
    for layer in dynamic_layers(dynamic).values():
        randomize(layer)
    return dynamic.eval().to(dtype), x.to(dtype)


def state(network):
    """All that a refused freeze must leave: classes, attributes, tensors."""
    return [
        (name, type(module), sorted(vars(module)), {k: v.clone() for k, v in module.state_dict().items()})
        for name, module in network.named_modules()
    ]


def same(before, after):
    return all(
        a[:3] == b[:3] and a[3].keys() == b[3].keys() and all(torch.equal(a[3][k], b[3][k]) for k in a[3])
        for a, b in zip(before, after, strict=True)
    )
