"""Tiny networks that a budget is set for, with batches for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import redconvert
from redconvert.layers import dynamic_layers

CLASSES = 5


class Net(nn.Module):
    """Convolutions, what comes between them, a mean over all positions, and a linear head."""

    def __init__(self, *convs: nn.Module, between: Callable[[Tensor], Tensor] = torch.relu, classes: int = CLASSES):
        super().__init__()
        self.convs, self.between = nn.ModuleList(convs), between
        self.head = nn.Linear(convs[-1].out_channels, classes)

    def features(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.between(conv(x))
        return x.flatten(2).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Frames(Net):
    """Clips whose frames are in the batch: their scores are averaged."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(0, (-1, 4)).mean(1)


class Clips(Frames):
    """The same, and the network itself moves time into the batch: each frame is decided alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2).flatten(0, 1))


class Twice(Net):
    """Each convolution but the first is called on two inputs."""

    def features(self, x: Tensor) -> Tensor:
        x = self.between(self.convs[0](x))
        for conv in list(self.convs)[1:]:
            x = self.between(conv(x)) + self.between(conv(2 * x.flip(-1) + 1))
        return x.flatten(2).mean(2)


class Unused(Net):
    """A convolution that runs while the network is converted, and not afterwards."""

    def __init__(self, *convs: nn.Module, **options: Any) -> None:
        super().__init__(*convs, **options)
        self.spare, self.spared = conv2(3, 3), False

    def features(self, x: Tensor) -> Tensor:
        return super().features(x if self.spared else self.spare(x))


def conv2(c_in: int, c_out: int = 16, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


def conv3(c_in: int, c_out: int = 16, **options: Any) -> nn.Conv3d:
    return nn.Conv3d(c_in, c_out, 3, padding=1, **options)


def linear(x: Tensor) -> Tensor:
    return x


IMAGES, CLIPS = (4, 3, 6, 6), (4, 3, 5, 6, 6)
KINDS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "2d": (lambda **o: Net(conv2(3), conv2(16), conv2(16), **o), IMAGES, {}),
    "2d of three": (lambda **o: Net(conv2(3), conv2(16), **o), IMAGES, {"search_space": 3}),
    "2d soft": (lambda **o: Net(conv2(3), conv2(16), **o), IMAGES, {"search_space": 3, "gate": "soft"}),
    "3d": (lambda **o: Net(conv3(3), conv3(16), **o), CLIPS, {}),
    "3d of three": (lambda **o: Net(conv3(3), conv3(16), **o), CLIPS, {"search_space": 3}),
    "3d soft": (lambda **o: Net(conv3(3), conv3(16), **o), CLIPS, {"gate": "soft"}),
    "time alone": (lambda **o: Net(conv3(3), conv3(16), **o), CLIPS, {"channel": False, "search_space": 3}),
    "groups": (lambda **o: Net(conv2(4, groups=4), conv2(16, groups=16), **o), (4, 4, 6, 6), {"search_space": 3}),
    "folded": (lambda **o: Frames(conv2(3), conv2(16), **o), (16, 3, 6, 6), {"num_frames": 4}),
    "frames in the batch": (lambda **o: Clips(conv2(3), conv2(16), **o), (4, 3, 4, 6, 6), {}),
    "twice": (lambda **o: Twice(conv2(3), conv2(16), **o), IMAGES, {}),
    "unused": (lambda **o: Unused(conv2(3), conv2(16), **o), IMAGES, {}),
}


def network(kind: str, *, gates: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A converted and calibrated network; with ``gates``, one whose gates decide by the input."""
    dynamic = copy.deepcopy(_network(kind, dtype, tuple(options.items())))
    torch.manual_seed(1)
    if gates:
        spread_gates(dynamic)
    return dynamic


@functools.cache
def _network(kind: str, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    build, shape, config = KINDS[kind]
    torch.manual_seed(0)
    model = build(**dict(options)).to(dtype).eval()
    config = redconvert.ConvertConfig(rules=[("*", {})], gate_hidden=8, **config)
    dynamic = redconvert.convert(model, config, example_inputs=torch.randn(shape).to(dtype))
    redconvert.calibrate(dynamic, batches(kind, dtype=dtype), rounds=0, match=False)
    dynamic.spared = True
    return dynamic


def spread_gates(dynamic: nn.Module) -> None:
    for layer in dynamic_layers(dynamic).values():
        with torch.no_grad():
            layer.gate.fc1.weight.mul_(8)
            layer.gate.fc2.weight.normal_()
            layer.gate.beta.normal_(std=0.3)


def batches(kind: str, count: int = 2, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """Samples that differ in their means, which is what gates see."""
    shape = KINDS[kind][1]
    generator = torch.Generator().manual_seed(seed)
    means = (shape[0], shape[1], *(1 for _ in shape[2:]))
    return [
        (torch.randn(shape, generator=generator) + torch.randn(means, generator=generator)).to(dtype)
        for _ in range(count)
    ]


def decisions(dynamic: nn.Module, x: Any) -> dict[str, list[tuple[int, ...]]]:
    """By layer, of every sample."""
    names = {layer: name for name, layer in dynamic_layers(dynamic).items()}
    found: dict[str, list[tuple[int, ...]]] = {}

    def listen(layer, seen) -> None:
        found.setdefault(names[layer], []).extend(tuple(each)[:2] for each in seen.decisions)

    with torch.no_grad(), redconvert.observed(dynamic, listen):
        dynamic(x)
    return found
