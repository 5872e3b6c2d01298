"""A network whose one argument is a list of tensors, as one that takes them one by one: that fx can follow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["count_pathways", "spread"]


class _Spread(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class _Two(_Spread):
    def forward(self, first: Tensor, second: Tensor) -> Any:
        return self.network([first, second])


class _Three(_Spread):
    def forward(self, first: Tensor, second: Tensor, third: Tensor) -> Any:
        return self.network([first, second, third])


_BY_COUNT = {2: _Two, 3: _Three}


def count_pathways(example_inputs: Any) -> int:
    """How many tensors the list holds that is a network's one argument; 0 where `spread` has no use."""
    listed = isinstance(example_inputs, list) and all(isinstance(each, Tensor) for each in example_inputs)
    return len(example_inputs) if listed and len(example_inputs) in _BY_COUNT else 0


def spread(network: nn.Module, pathways: int) -> nn.Module:
    """The network with ``pathways`` arguments instead of a list of them; for 0 the network."""
    return _BY_COUNT[pathways](network) if pathways else network
