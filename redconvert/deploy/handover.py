"""Who reads whose channels in a deployed network, and whether it may get those alone that were computed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from ..convert.neighbours import is_channelwise
from .excite import Excite
from .pool import Pool
from .unit import Unit

__all__ = ["link_units", "tell_who_hands_over"]


def link_units(units: Iterable[Unit]) -> None:
    """Tell each unit whose layer hands over, reads or follows of the other one."""
    sources = {unit.layer.hands_to: unit for unit in units if getattr(unit.layer, "hands_to", None) is not None}
    for unit in units:
        source = sources.get(getattr(unit.layer, "told_by", None))
        if source is not None:
            unit.follow(source)


def tell_who_hands_over(graph: fx.Graph, units: dict[str, Unit], modules: dict[str, nn.Module]) -> None:
    """Units whose reader gets the computed channels alone: nothing in between minds how many there are."""
    for node in graph.nodes:
        unit = units.get(str(node.target)) if node.op == "call_module" else None
        if unit is not None and unit.reader is not None:
            unit.hands_compact = _reaches(node, unit.reader, units, modules)


def _reaches(node: fx.Node, reader: Unit, units: dict[str, Unit], modules: dict[str, nn.Module]) -> bool:
    dims = 3 if isinstance(reader.layer, nn.Conv3d) else 2
    while True:
        users = list(node.users)
        if len(users) == 2:  # squeeze and excitation
            excited = next((each for each in users if isinstance(modules.get(str(each.target)), Excite)), None)
            if excited is None or excited.args[0] is not node or not _knows(excited, node, reader, units, modules):
                return False
            node = excited
            continue
        if len(users) != 1:
            return False
        before, node = node, users[0]
        if node.op == "call_module" and str(node.target) in units:
            unit = units[str(node.target)]
            if unit.source is reader.source and unit.layer.carries is not None:
                continue
            return unit is reader
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and (module._forward_hooks or module._forward_pre_hooks or module.state_dict()):
            return False  # a hook would see how many channels there are, and what has weights has one for each
        if not (isinstance(module, Pool) or is_channelwise(node, before, module, dims)):
            return False


def _knows(
    excited: fx.Node, node: fx.Node, reader: Unit, units: dict[str, Unit], modules: dict[str, nn.Module]
) -> bool:
    """Whether the first convolution that reads the means of a result knows how many channels there are."""
    step, excite = excited.args[1], modules[str(excited.target)]
    first = None
    while isinstance(step, fx.Node) and step is not node:
        module = modules.get(str(step.target)) if step.op == "call_module" else None
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            return False
        first = units.get(str(step.target), first)
        step = step.all_input_nodes[0] if len(step.all_input_nodes) == 1 else None
    if step is not node or first is None or first.source is not reader.source or not isinstance(excite, Excite):
        return False
    excite.handover = reader.layer.reads_from
    return True
