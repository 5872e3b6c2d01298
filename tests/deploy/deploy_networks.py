"""Small networks that hold every form which deployment treats on its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import redconvert


class Block(nn.Module):
    """1 x 3 x 3 and 3 x 1 x 1, norms, ReLUs and a residual add, like R(2+1)D."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(inputs, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.norm1 = nn.BatchNorm3d(middle)
        self.temporal = nn.Conv3d(middle, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
        self.norm2 = nn.BatchNorm3d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            conv = nn.Conv3d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        x = self.relu(self.norm1(self.spatial(x)))
        x = self.norm2(self.temporal(x))
        x += residual
        return self.relu(x)


class Video(nn.Module):
    """Blocks, branches that are concatenated, a padded max pool, 3 x 3 x 3 convolutions with and without groups."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 13, 3, (1, 2, 2), 1), nn.BatchNorm3d(13), act())
        self.block1 = Block(13, 19, 13)
        self.block2 = Block(13, 24, 20, stride=2)
        self.left = nn.Conv3d(20, 12, 1)
        self.right = nn.Sequential(nn.Conv3d(20, 16, 3, 1, 1, groups=4, bias=False), nn.BatchNorm3d(16), act())
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2))
        self.last = nn.Conv3d(28, 8, 3, 1, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        x = torch.cat([self.left(x), self.right(x)], dim=1)
        x = self.last(self.pool(F.pad(x, (0, 1, 0, 1, 0, 0))))
        return self.head(x.mean((2, 3, 4)))


class Image(nn.Module):
    """A bottleneck with a residual, a depthwise convolution and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.reduce = nn.Sequential(nn.Conv2d(16, 9, 1, bias=False), nn.BatchNorm2d(9), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(9, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.SiLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.expand(self.reduce(x)) + x)
        return self.head(self.pool(self.depthwise(x)).mean((2, 3)))


class Undecided(nn.Module):
    """Control flow on values: fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return (self.two(x) if x.mean() > -1e9 else x).mean((2, 3, 4))


@torch.no_grad()
def shaken(network: nn.Module) -> nn.Module:
    """In ``eval()``, with norms that are not the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(-1, 1.5)
            module.bias.normal_(0, 0.2)
    return network.eval()


@torch.no_grad()
def dynamic_from(network: nn.Module, x: Tensor, *, blend_frames: bool = False, **config: object) -> nn.Module:
    """Converted, with cheap operations, channel orders and gates as after training."""
    dynamic = redconvert.convert(shaken(network), redconvert.ConvertConfig(min_saving=0.0, **config), example_inputs=x)
    for layer in dynamic.modules():
        if not isinstance(layer, redconvert.DynamicConv2d | redconvert.DynamicConv3d):
            continue
        if layer.cheap_c is not None:
            groups = torch.randperm(layer.groups).repeat_interleave(layer.out_channels // layer.groups)
            inner = torch.cat([torch.randperm(layer.out_channels // layer.groups) for _ in range(layer.groups)])
            layer.cheap_c.set_order(groups * (layer.out_channels // layer.groups) + inner)
            for parameter in layer.cheap_c.parameters():
                parameter.normal_(0, 0.3)
            for op in layer.cheap_c.ops:
                if hasattr(op, "mix"):
                    op.mix.normal_(0, 0.3)
                    op.shift.normal_(0, 0.3)
        if layer.mixed_in is not None:
            for op in layer.mixed_in.ops:
                op.order.copy_(torch.randperm(layer.in_channels))
                op.weight.normal_(0, 0.3)
                op.lift.normal_(0, 0.3)
        if layer.cheap_t is not None and blend_frames:
            for parameter in layer.cheap_t.parameters():
                parameter.normal_(0, 0.5)
    return dynamic


# What candidates compute, and of what.
CHEAP = {kind: {"cheap": kind} for kind in ("pointwise", "principal", "scale", "depthwise")}
CHEAP["inputs mixed"] = {"cheap": "principal", "mix_inputs": True}


@torch.no_grad()
def undecided_gates(dynamic: nn.Module) -> None:
    """Gates that decide differently from input to input."""
    for layer in dynamic.modules():
        if isinstance(layer, redconvert.DynamicConv2d | redconvert.DynamicConv3d):
            layer.gate.beta.zero_()
            layer.gate.fc2.weight.normal_(0, 2)
            layer.gate.fc1.weight.normal_(0, 3)
