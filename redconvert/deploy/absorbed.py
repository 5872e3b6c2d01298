"""Channels that are handed over, in a deployed network: compact where nobody else sees them, and what reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from ..convert.neighbours import is_channelwise
from ..layers import DynamicConv
from ..layers.absorb import Handover
from ..layers.routing import select
from .frames import Frames
from .pack import Filter, to_rows
from .pool import Pool

if TYPE_CHECKING:
    from .unit import Unit

__all__ = ["absorbed_filter", "kept_alone", "link_units", "masked_means", "tell_who_hands_over"]


def absorbed_filter(layer: DynamicConv, filter: Filter, source: int) -> Filter:
    """What a reader convolves with where candidate ``source`` hands over its channels, in their rank order."""
    if not source:
        return filter
    assert layer.cheap_in is not None and layer.reads_from is not None
    weight = filter.weight if isinstance(layer, nn.Conv3d) else filter.weight.squeeze(2)
    with torch.no_grad():
        weight, bias = layer.cheap_in.filter(source, weight, filter.bias, layer.reads_from.kept(source))
    weight = weight if isinstance(layer, nn.Conv3d) else weight.unsqueeze(2)
    return replace(filter, weight=weight.detach(), bias=bias.detach())


def kept_alone(x: Tensor | Frames, handover: Handover, source: int) -> Tensor | Frames:
    """The channels that candidate ``source`` computed, in rank order, whether x holds all of them or those alone."""
    if x.shape[1] == handover.channels[source]:
        return x
    kept = handover.kept(source)
    return x.replaced(select(x.held, 1, kept)) if isinstance(x, Frames) else select(x, 1, kept)


def masked_means(x: Tensor | Frames, handover: Handover, candidates: list[int]) -> Tensor:
    """Means of all channels over H and W, ``(N, T', C)``, zeros where samples have none."""
    held, pooled = (x.held, x.pooled) if isinstance(x, Frames) else (x, None)
    if pooled is None:
        pooled = to_rows(held).flatten(2, 3).mean(2)
    present = handover.present(pooled)
    if candidates.count(candidates[0]) == len(candidates):  # a number, which no device waits for
        present = present[candidates[0]][None]
    else:
        present = present[torch.tensor(candidates, device=pooled.device)]
    return torch.where(present[:, None] > 0, pooled, torch.zeros_like(pooled))


def link_units(units: Iterable[Unit]) -> None:
    """Tell each unit whose layer hands over, or reads, of the other one."""
    sources = {unit.layer.hands_to: unit for unit in units if getattr(unit.layer, "hands_to", None) is not None}
    for unit in units:
        source = sources.get(getattr(unit.layer, "reads_from", None))
        if source is not None:
            unit.reads(source)


def tell_who_hands_over(graph: fx.Graph, units: dict[str, Unit], modules: dict[str, nn.Module]) -> None:
    """Units whose reader gets the computed channels alone: nothing in between minds how many there are."""
    for node in graph.nodes:
        unit = units.get(str(node.target)) if node.op == "call_module" else None
        if unit is not None and unit.reader is not None:
            unit.hands_compact = _reaches(node, unit.reader, units, modules)


def _reaches(node: fx.Node, reader: Unit, units: dict[str, Unit], modules: dict[str, nn.Module]) -> bool:
    dims = 3 if isinstance(reader.layer, nn.Conv3d) else 2
    while len(node.users) == 1:
        before, node = node, next(iter(node.users))
        if node.op == "call_module" and str(node.target) in units:
            return units[str(node.target)] is reader
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and (module._forward_hooks or module._forward_pre_hooks or module.state_dict()):
            return False  # a hook would see how many channels there are, and what has weights has one for each
        if not (isinstance(module, Pool) or is_channelwise(node, before, module, dims)):
            return False
    return False
