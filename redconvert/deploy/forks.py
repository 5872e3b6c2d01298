"""A batch of images whose samples decide differently: it falls apart, and each part goes on alone for a while.

Layer by layer, samples that decide alike would be gathered and scattered around every convolution, three passes over
memory that cost more than is saved. Parts that stay apart pay once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..convert.neighbours import takes_means
from ..layers.absorb import Handover, Source
from ..layers.routing import select
from . import pointwise
from .excite import Excite
from .frames import Frames, full
from .pool import Pool
from .unit import Unit

__all__ = ["Region", "Regions"]

# Treat every sample of a batch alone, too.
_POOLS_AND_NORMS = (nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Region:
    """Steps that samples may take apart, from where they part on.

    Attributes:
        end: the first step that all samples take together again.
        read: nodes made before, that these steps read.
        kept: nodes made by these steps, that are read later.
        unused: nodes that nobody reads from ``end`` on.
    """

    end: int
    read: tuple[fx.Node, ...]
    kept: tuple[fx.Node, ...]
    unused: tuple[fx.Node, ...]


class Regions:
    """Where the samples of a batch may part.

    Args:
        nodes: of all steps, in turn.
        modules: what they call, by target.
        inputs: nodes whose first dimension is the batch's: the network's own.
    """

    def __init__(self, nodes: list[fx.Node], modules: Mapping[str, nn.Module], inputs: Iterable[fx.Node]) -> None:
        self.nodes, self.modules, self.inputs = nodes, modules, set(inputs)
        apart = [self._is_apart(node) for node in nodes]
        self._ends = [next((j for j in range(i, len(nodes)) if not apart[j]), len(nodes)) for i in range(len(nodes))]
        self._apart = {node for node, alone in zip(nodes, apart, strict=True) if alone} | self.inputs
        self._regions: dict[int, Region | None] = {}
        units = [module for module in modules.values() if isinstance(module, Unit)]
        handing = [unit for unit in units if getattr(unit.layer, "hands_to", None) is not None]
        # Whoever reads the channels outside a unit is told of weights, which have a row for each sample of the batch.
        self._tied = any(unit.reader is None for unit in handing)
        told = [getattr(unit.layer, "told_by", None) for unit in units]  # some by layers that are no units
        self._handovers = {unit.layer.hands_to for unit in handing} | {each for each in told if each is not None}
        places = {modules.get(str(node.target)): at for at, node in enumerate(nodes)}
        handing = [unit for unit in handing if unit in places]
        self._spans = [(places[unit], places.get(unit.reader, len(nodes))) for unit in handing]

    def at(self, position: int) -> Region | None:
        """What follows if samples part before the step at this position; None where they may not."""
        if position not in self._regions:
            self._regions[position] = self._region(position)
        return self._regions[position]

    def _region(self, position: int) -> Region | None:
        end = self._end(position)
        steps, earlier = self.nodes[position:end], set(self.nodes[:position]) | self.inputs
        within = {*earlier, *steps}
        read = {node for step in steps for node in step.all_input_nodes if node in earlier}
        if not steps or self._tied or not all(node in self._apart or self._is_batch(node, within) for node in read):
            return None

        def is_read(node: fx.Node) -> bool:
            return any(user not in within for user in node.users)

        kept = tuple(step for step in steps if is_read(step))
        return Region(end, tuple(read), kept, tuple(node for node in within if not is_read(node)))

    def _end(self, position: int) -> int:
        """Up to where samples may go apart: what hands over its channels and who reads them stay together."""
        end = self._ends[position]
        while True:
            torn = [writer for writer, reader in self._spans if position <= writer < end <= reader]
            if not torn:
                return end
            end = min(torn)

    def _is_batch(self, node: fx.Node, within: set[fx.Node]) -> bool:
        """Whether a value has a row per sample, whoever made it: so it is where units and pools alone read it."""
        readers = [self.modules.get(str(user.target)) for user in node.users if user in within]
        return all(isinstance(reader, Unit | Pool) for reader in readers)

    def _is_apart(self, node: fx.Node) -> bool:
        """Whether a step treats every sample alone, and nobody looks on."""
        if node.op == "call_module":
            module = self.modules.get(str(node.target))
            if isinstance(module, Unit | Pool):
                return module.dim == 2 and module.frames_per_sample == 1
            plain = module is not None and not (module._forward_hooks or module._forward_pre_hooks)
            return plain and isinstance(module, (*pointwise.MODULES, *_POOLS_AND_NORMS, Excite))
        pairwise = node.target in pointwise.PAIRWISE and all(isinstance(each, fx.Node) for each in node.args)
        alone = node.target in pointwise.CALLS or pairwise or takes_means(node, None, 2)
        return node.op in ("call_function", "call_method") and alone

    # -- values ----------------------------------------------------------------------------------------

    def fits(self, region: Region, values: Mapping[fx.Node, Any], total: int) -> bool:
        """Whether what these steps read has a row for each of the samples."""
        given = [values[node] for node in region.read]
        return all(isinstance(each, Tensor | Frames) and each.shape[0] == total for each in given)

    def part(self, region: Region, values: Mapping[fx.Node, Any], samples: list[int]) -> dict[fx.Node, Any]:
        """The values that one part goes on with."""
        return {**values, **{node: _rows(values[node], samples) for node in region.read}}

    def pending(self) -> dict[Handover, Source | None]:
        """What layers have been told of the channels that they will read, and have not read yet."""
        return {handover: handover.source for handover in self._handovers}

    def tell(self, pending: Mapping[Handover, Source | None], samples: list[int] | None, total: int) -> None:
        """The same for a part of the samples; None: for all again."""
        for handover, source in pending.items():
            if source is not None and samples is not None and len(source.candidates) == total:
                source = source._replace(candidates=[source.candidates[sample] for sample in samples])
            handover.source = source

    def joined(self, parts: list[Any], groups: list[list[int]]) -> Tensor:
        """The values of all parts, in the order of the samples."""
        order = torch.tensor([sample for group in groups for sample in group])
        return select(torch.cat([full(part) for part in parts]), 0, order.argsort())


def _rows(value: Tensor | Frames, samples: list[int]) -> Tensor | Frames:
    """Of these samples alone; a view where they stand side by side."""
    first, last = samples[0], samples[-1] + 1
    beside = samples == list(range(first, last))

    def pick(x: Tensor) -> Tensor:
        return x[first:last] if beside else select(x, 0, torch.tensor(samples))

    if not isinstance(value, Frames):
        return pick(value)
    return value.replaced(pick(value.held), None if value.pooled is None else pick(value.pooled))
