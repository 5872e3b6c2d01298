"""Tiny networks and data sets that can be learnt, and what finetuning computes written out by hand."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

import redconvert
from redconvert.layers import DynamicConv, Observation, dynamic_layers
from redconvert.layers.macs import layer_macs

CLASSES = 4


class Net(nn.Module):
    """Two convolutions with batch norms, and a linear head."""

    def __init__(self, dims: int = 2, norms: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        conv: Any = (nn.Conv2d, nn.Conv3d)[dims - 2]
        norm: Any = (nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2] if norms else lambda c: nn.GroupNorm(4, c)
        self.blocks = nn.Sequential(
            nn.Sequential(conv(3, 16, 3, padding=1), norm(16), nn.ReLU()),
            nn.Sequential(conv(16, 16, 3, padding=1), norm(16), nn.ReLU()),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.blocks(x).flatten(2).mean(2)))


def shape_of(dims: int = 2) -> tuple[int, ...]:
    return (3, 8, 8) if dims == 2 else (3, 4, 6, 6)


def network(dims: int = 2, norms: bool = True, dropout: float = 0.0, seed: int = 0, **config: Any) -> Net:
    """A converted network whose running statistics are those of noise."""
    torch.manual_seed(seed)
    model = Net(dims, norms, dropout)
    model(torch.randn(16, *shape_of(dims)))
    config = redconvert.ConvertConfig(**config)
    return redconvert.convert(model.eval(), config, example_inputs=torch.randn(2, *shape_of(dims)))


def undecided(dynamic: nn.Module, scale: float = 1.0) -> nn.Module:
    """Gates that decide differently for different samples."""
    with torch.no_grad():
        for layer in dynamic_layers(dynamic).values():
            layer.gate.beta.normal_(std=0.1 * scale)
            layer.gate.fc2.weight.normal_(std=scale)
    return dynamic


class Planted(torch.utils.data.Dataset):
    """Class c brightens channel c % 3 and, in half of the classes, the upper rows. Optionally shifted at random."""

    def __init__(self, size: int = 48, dims: int = 2, augment: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.arange(size) % CLASSES
        self.inputs = torch.randn(size, *shape_of(dims), generator=generator)
        for x, label in zip(self.inputs, self.labels.tolist(), strict=True):
            x[label % 3] += 1
            if label == 3:
                x[..., :3, :] += 1
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.inputs[index]
        if self.augment:
            x = x.roll(random.randrange(3), -1) + 0.1 * torch.randn(x.shape)
        return x, self.labels[index]


def batches(size: int = 16, count: int = 3, dims: int = 2) -> list[Any]:
    data = Planted(size * count, dims)
    return list(zip(data.inputs.split(size), data.labels.split(size), strict=True))


def costs_by_hand(dynamic: nn.Module, x: Any, static: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of one forward pass: its output, and per sample the executed share, from layer_macs and the decisions."""
    seen: list[tuple[DynamicConv, Observation]] = []
    with redconvert.observed(dynamic, lambda layer, observation: seen.append((layer, observation))):
        out = dynamic(x)
    executed, dense = [static] * len(out), static
    for layer, observation in seen:
        macs = layer_macs(layer, observation.input_shape, observation.output_shape)
        per_sample = len(observation.decisions) // len(out)
        dense += macs.dense * per_sample
        for row, (i, j, *_) in enumerate(observation.decisions):
            executed[row // per_sample] += macs.executed(i, j)
    return out, torch.tensor(executed, dtype=torch.float64) / dense


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)


def run(dynamic: nn.Module, train: Any, val: Any = None, **settings: Any) -> redconvert.History:
    """`redconvert.finetune` without a bar."""
    return redconvert.finetune(dynamic, train, val, **{"epochs": 1, "progress": False, **settings})


class Interrupted(list):
    """Batches that stop in the second of two epochs of three: one is read to measure costs."""

    reads = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.reads += 1
            if self.reads == 6:
                raise KeyboardInterrupt
            yield batch
