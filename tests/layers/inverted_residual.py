"""Inverted residual blocks: 1x1, depthwise, squeeze and excitation, 1x1; and what they compute, in plain operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import redconvert
from redconvert.layers import DynamicConv


class Squeeze(nn.Module):
    """``x * sigmoid(fc2(relu(fc1(mean x))))``, as the libraries write it."""

    def __init__(self, conv: type, channels: int, pooled: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv(channels, 4, 1), conv(4, channels, 1)
        dims = len(self.fc1.kernel_size)
        self.axes = tuple(range(2, 2 + dims))
        self.pool = (nn.AdaptiveAvgPool3d if dims == 3 else nn.AdaptiveAvgPool2d)(1) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean(self.axes, keepdim=True) if self.pool is None else self.pool(x)
        s = torch.sigmoid(self.fc2(torch.relu(self.fc1(s))))
        return x * s if self.pool is None else s * x


class Block(nn.Module):
    """``c(act(se(norm(b(act(norm(a(x))))))))``, a and c 1x1, b depthwise."""

    def __init__(self, dims=2, c=(4, 9, 6), kernel=3, stride=1, squeezes=None, bias=False, swish=False) -> None:
        super().__init__()
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if dims == 3 else (nn.Conv2d, nn.BatchNorm2d)
        self.a, self.norm_a = conv(c[0], c[1], 1, bias=bias), norm(c[1])
        self.b = conv(c[1], c[1], kernel, stride, kernel // 2, groups=c[1], bias=bias)
        self.norm_b = norm(c[1])
        self.se = None if squeezes is None else Squeeze(conv, c[1], squeezes)
        self.c = conv(c[1], c[2], 1, bias=bias)
        self.swish = swish
        for each in (self.norm_a, self.norm_b):
            nn.init.uniform_(each.weight, 0.5, 1.5), nn.init.normal_(each.bias, 0, 0.3)
            each.running_mean.normal_(0, 0.2), each.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        y = y if self.se is None else self.se(y)
        return self.c(y * torch.sigmoid(y) if self.swish else F.relu(y))


def make(x: Tensor, network: nn.Module, names=("a", "b", "c"), **config) -> nn.Module:
    """Converted, with numbers in all that conversion added, and channels in any order."""
    rules = tuple((name, {}) for name in names)
    settings = redconvert.ConvertConfig(**{"absorb": True, "min_saving": 0, "gate_hidden": 4, **config}, rules=rules)
    dynamic = redconvert.convert(network.eval(), settings, example_inputs=x)
    for layer in dynamic.modules():
        if isinstance(layer, DynamicConv):
            parts = [part for part in (layer.cheap_in, layer.cheap_c, layer.cheap_t) if part is not None]
            for parameter in (parameter for part in parts for parameter in part.parameters()):
                nn.init.normal_(parameter, 0, 0.2)
            if layer.cheap_c is not None:
                layer.cheap_c.set_order(torch.randperm(layer.out_channels))
    return dynamic.eval()


def reference(block: nn.Module, x: Tensor, source: int) -> Tensor:
    """What a block gives where candidate ``source`` of its first convolution is taken; all frames, all of c's channels.

    Channels that are not computed are not looked at: they hold 123.
    """
    conv = F.conv3d if x.dim() == 5 else F.conv2d
    a, b, c = block.a, block.b, block.c
    kept, count = a.cheap_c.order[: a.candidates.channels[source]], a.out_channels

    def among_all(part: Tensor) -> Tensor:
        out = part.new_full((len(part), count, *part.shape[2:]), 123.0)
        out[:, kept] = part
        return out

    def corrected(layer: DynamicConv, y: Tensor) -> Tensor:
        weight, bias = layer.weight[:, kept], layer.bias
        if source:
            weight = weight + layer.cheap_in.weights[source - 1]
            bias = layer.cheap_in.biases[source - 1] + (0 if bias is None else bias)
        return conv(y[:, kept], weight, bias)

    y = F.relu(block.norm_a(among_all(conv(x, a.weight[kept], None if a.bias is None else a.bias[kept]))))
    bias = None if b.bias is None else b.bias[kept]
    y = block.norm_b(among_all(conv(y[:, kept], b.weight[kept], bias, b.stride, b.padding, groups=len(kept))))
    if block.se is not None:
        s = corrected(block.se.fc1, y.mean(block.se.axes, keepdim=True))
        y = y * torch.sigmoid(block.se.fc2(torch.relu(s)))
    return corrected(c, F.silu(y) if block.swish else F.relu(y))
