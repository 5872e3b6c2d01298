"""Where fx cannot read a network: each dynamic layer as a unit of its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..layers import dynamic_layers
from .decide import Batch
from .frames import full
from .fuse import filter_of
from .handover import link_units
from .program import on_clips
from .unit import Unit

__all__ = ["in_layers"]


def in_layers(network: nn.Module, batch: Batch, forms: dict[str, dict[str, str]]) -> tuple[Any, dict[str, Unit]]:
    """A twin of the network that shares its tensors and runs each dynamic layer as a unit of its own."""
    layers = dynamic_layers(network).values()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    memo |= {id(layer.hands_to): layer.hands_to for layer in layers if layer.hands_to is not None}
    units: dict[str, Unit] = {}
    for layer in layers:
        filter = filter_of(layer)
        if filter is not None:
            target = f"unit{len(units)}"
            units[target] = Unit(layer, filter, None, "none", batch, forms.get(target))
            memo[id(layer)] = _Alone(units[target])
    link_units(units.values())
    return copy.deepcopy(network, memo).eval(), units


class _Alone(nn.Module):
    """A unit in the place of its layer."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self._unit = (unit,)

    def forward(self, x: Tensor) -> Tensor:
        return full(on_clips(self._unit[0], x))
