"""What a layer decides in a deployed network: what is forced or settled, or else what its gate says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..layers import Decision, DynamicConv, GateWeights
from ..layers.routing import FULL
from .frames import Frames
from .gate import FoldedGate

if TYPE_CHECKING:
    from .unit import Unit

__all__ = ["Batch", "Decider", "Seen"]


class Seen(NamedTuple):
    """What one call of a unit decided, for the observers of its layer."""

    input_shape: torch.Size
    output_shape: torch.Size
    decisions: list[Decision]
    weights: GateWeights
    source: Tensor | None = None


@dataclass
class Batch:
    """Which samples of the user's batch run now, of how many, and what the units saw of them.

    ``samples``: None for all. ``forks``: those that decide differently may go on apart. ``always_ask``: gates run even
    where everything is forced, for benchmarks of the whole. ``gates_run``: some do, so whoever has a clip at hand
    averages it for them.
    """

    samples: list[int] | None = None
    total: int = 1
    forks: bool = False
    always_ask: bool = False
    gates_run: bool = True
    seen: dict[Unit, list[Seen]] = field(default_factory=dict)


class Decider:
    """Decides for the samples that run, as the layer's modes, its thresholds and its gate say.

    Attributes:
        baked: the decision that the gate always takes, so that it need not be asked; None where it is.
    """

    def __init__(self, layer: DynamicConv, batch: Batch) -> None:
        self.layer, self.batch = layer, batch
        self.gate = FoldedGate(layer.gate, layer.told_by)
        self.baked: Decision | None = None

    def __call__(self, x: Tensor | Frames) -> tuple[list[Decision], Tensor | None]:
        """One decision per sample, and what the gate said where it was asked."""
        layer, num_samples = self.layer, x.shape[0]
        if not layer.enabled:
            return [FULL] * num_samples, None
        sources = None if layer.told_by is None else layer.told_by.take(num_samples, layer.layer_name).candidates
        if layer.forced == (None, None):
            known = self.known()
            if known is None:
                return self.gate(x, sources)
            if not sources:
                return [known] * num_samples, None
            return [known._replace(source=source) for source in sources], None
        axes = self._forced(num_samples)
        free = any(index is None for axis in axes for index in axis)
        asked = (free or self.batch.always_ask) and not layer.candidates.is_static
        gated, z = self.gate(x, sources, free) if asked else ([FULL] * num_samples, None)
        return [
            Decision(g.channel if i is None else i, g.temporal if j is None else j, False, source)
            for g, i, j, source in zip(gated, *axes, sources or [0] * num_samples, strict=True)
        ], z

    def known(self) -> Decision | None:
        """The decision of every input, where the gate need not be asked; None where it must be.

        Observers are told what gates say, and benchmarks time them, unless they are baked.
        """
        if self.layer.candidates.is_static:
            return FULL
        if self.baked is not None or self.layer.observers or self.batch.always_ask:
            return self.baked
        return self.gate.constant

    def asks(self) -> bool:
        """Whether its gate is asked about inputs to come, by what is known before."""
        layer = self.layer
        if not layer.enabled or layer.candidates.is_static:
            return False
        if layer.forced == (None, None):
            return self.known() is None
        counts = len(layer.candidates.channels), len(layer.candidates.strides)
        open_axes = [each for each, count in zip(layer.forced, counts, strict=True) if count > 1]
        return any(each is None or (isinstance(each, list) and None in each) for each in open_axes)

    def weights(self, decisions: list[Decision], z: Tensor | None) -> GateWeights:
        """The weights that the layer itself would report: the gate's, or 1 for what was forced."""
        candidates, found, device = self.layer.candidates, [], self.layer.weight.device
        gated = None if z is None else self.gate.weights(z, self.layer.config.normalize)
        sizes = (len(candidates.channels), len(candidates.strides))
        for axis, (size, wanted) in enumerate(zip(sizes, self._forced(len(decisions)), strict=True)):
            taken = torch.tensor([decision[axis] for decision in decisions], device=device)
            rows = one_hot(taken, size).to(self.layer.gate.beta.dtype)
            free = torch.tensor([index is None for index in wanted], device=device)
            found.append(rows if gated is None else torch.where(free[:, None], gated[axis], rows))
        return GateWeights(*found)

    def _forced(self, num_samples: int) -> list[list[int | None]]:
        """What `redconvert.forced` asks of these samples, on the channel and the temporal axis."""
        layer, total = self.layer, max(self.batch.total, num_samples)
        samples = self.batch.samples or range(num_samples)
        axes: list[list[int | None]] = []
        counts = len(layer.candidates.channels), len(layer.candidates.strides)
        for axis, wanted, count in zip(("channel", "temporal"), layer.forced, counts, strict=True):
            if wanted is None:
                axes.append([None if count > 1 else 0] * num_samples)  # of one candidate there is no choice
            elif isinstance(wanted, int):
                axes.append([layer.candidates.nearest(axis, wanted)] * num_samples)
            else:
                candidates = layer.forced_candidates(axis, total)
                axes.append([candidates[sample] for sample in samples])
        return axes
