"""A reduced candidate in parts or as one convolution: whichever takes less time here, so that none loses any.

Parts compute less. But they are more passes over memory, which small or wide layers feel more than multiply-adds: a
convolution whose filters hold all of it (`compose`) is then faster, and takes what the dense one takes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..layers.training import BALANCE, compose, saved_per_pass
from .absorbed import absorbed_filter
from .frames import Place
from .pack import Filter
from .path import Path, Value

if TYPE_CHECKING:
    from torch import Tensor

    from .unit import Unit

__all__ = ["WAYS", "Either", "whole_filter"]

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


@dataclass(eq=False)
class Either:
    """Two paths to the same result, of which the first call takes the faster one.

    Attributes:
        parts, whole: the paths; way: the one that is taken, None until both were timed.
    """

    parts: Path
    whole: Path
    way: str | None = None

    def __call__(
        self,
        x: Tensor,
        residual: Value | None,
        activation: str,
        overwrite: bool = False,
        pools: bool = False,
        into: Place | None = None,
    ) -> Value:
        """See `Path`."""
        if self.way is None:
            self.way = self._faster(x, residual, activation, pools)
        return self._path(self.way)(x, residual, activation, overwrite, pools, into)

    def _path(self, way: str) -> Path:
        return self.parts if way == "parts" else self.whole

    def _faster(self, x: Tensor, residual: Value | None, activation: str, pools: bool) -> str:
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(TRIALS):
            for way, found in times.items():
                begin = time.perf_counter()
                self._path(way)(x, residual, activation, False, pools)  # trials overwrite nothing
                found.append(time.perf_counter() - begin)
        parts, whole = (min(found[1:]) for found in times.values())
        faster = "whole" if whole < CLEARLY * parts else "parts"
        self._path("parts" if faster == "whole" else "whole").forget()
        return faster
