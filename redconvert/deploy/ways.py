"""A reduced candidate in parts or as one convolution: whichever takes less time here, so that none loses any.

Parts compute less. But they are more passes over memory, which small or wide layers feel more than multiply-adds: a
convolution whose filters hold all of it (`compose`) is then faster, and takes what the dense one takes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..layers.composed import BALANCE, compose, saved_per_pass
from .absorbed import absorbed_filter
from .pack import Filter
from .tape import unrecorded

if TYPE_CHECKING:
    from torch import Tensor

    from .path import Path, Value
    from .unit import Unit

__all__ = ["WAYS", "Undecided", "whole_filter"]

WAYS = ("parts", "whole")
PLAUSIBLE = 2.0  # times the balance at which both take as long in training: beyond it parts are not even doubted
TRIALS = 4  # of each way, the first of which packs weights and counts for nothing
CLEARLY = 0.97  # parts often know the means that a gate would have to take


def whole_filter(unit: Unit, channel: int, source: int) -> Filter | None:
    """What gives all channels of candidate ``channel`` at once, norm included; None where parts are faster for sure.

    Other devices than a CPU, which are not timed here, keep to parts.
    """
    layer = unit.layer
    saved = saved_per_pass(layer, channel) if layer.weight.is_cpu else None
    if saved is None or saved > PLAUSIBLE * BALANCE["cpu"]:
        return None
    filter = absorbed_filter(layer, unit.filter, source)
    with torch.no_grad():
        weight, bias = compose(layer, channel, filter.weight, filter.bias)
        return replace(filter, weight=weight, bias=bias).scaled(unit.scale, unit.shift)


@dataclass(frozen=True, eq=False)
class Undecided:
    """Two paths to the same result, until the first call has timed both.

    Attributes:
        parts, whole: the paths.
        key: of the packed convolution that does the whole.
    """

    parts: Path
    whole: Path
    key: str

    def faster(self, x: Tensor, residual: Value | None, activation: str, pools: bool) -> str:
        """Which of WAYS takes less time for this call, see `Path`; the other one's packed weights are dropped."""
        paths = dict(zip(WAYS, (self.parts, self.whole), strict=True))
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        with unrecorded():
            for _ in range(TRIALS):
                for way, found in times.items():
                    begin = time.perf_counter()
                    paths[way](x, residual, activation, pools=pools)  # trials overwrite nothing
                    found.append(time.perf_counter() - begin)
        parts, whole = (min(found[1:]) for found in times.values())
        way, other = ("whole", "parts") if whole < CLEARLY * parts else ("parts", "whole")
        paths[other].forget()
        return way
