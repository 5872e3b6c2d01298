"""What each decision of each layer takes, in milliseconds: the prices of a budget of time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RedconvertError
from ..files import written
from ..layers import DynamicConv

__all__ = ["LayerTimes"]


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one call of a deployed network, layer by layer and decision by decision.

    Attributes:
        dense_ms: of the whole network, with all layers dense.
        rest_ms: of what is in no dynamic layer.
        layers: by name, ``[i][j][s]``: channel candidate i, temporal candidate j and, where the layer reads or
            carries what another hands over, that one's channel candidate s.
        environment: versions, device, threads and date.
    """

    dense_ms: float
    rest_ms: float
    layers: dict[str, list[list[list[float]]]]
    environment: dict[str, Any]

    def prices(self, layers: Mapping[str, DynamicConv]) -> dict[str, dict[tuple[int, int], tuple[float, ...]]]:
        """By layer and decision ``(i, j)``, by s. RedconvertError: these are not the layers that were timed."""
        found = {}
        for name, layer in layers.items():
            counts = len(layer.candidates.channels), len(layer.candidates.strides), _sources(layer)
            table = self.layers.get(name, [])
            if _counts(table) != counts:
                raise RedconvertError(
                    f"times are of another network: layer '{name}' has {counts[0]} channel and {counts[1]} temporal "
                    f"candidates, and its times are of {_counts(table)[:2] if table else 'none'}: measure them again "
                    f"(redconvert.layer_times)"
                )
            found[name] = {(i, j): tuple(by_source) for i, row in enumerate(table) for j, by_source in enumerate(row)}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON, also written to ``path`` where one is given."""
        return written(json.dumps(self.to_dict(), indent=2) + "\n", path)

    @classmethod
    def from_json(cls, text: str | os.PathLike[str]) -> LayerTimes:
        """What `to_json` gave: the text, or the path of a file. RedconvertError: it is neither."""
        try:
            if not isinstance(text, str) or not text.lstrip().startswith("{"):
                text = Path(text).read_text(encoding="utf-8")
            return cls(**json.loads(text))
        except (OSError, ValueError, TypeError) as error:
            raise RedconvertError(f"these are no times that LayerTimes.to_json wrote: {error}") from error

    def __str__(self) -> str:
        lines = [f"{'layer':<40} {'dense':>9}  {'fastest':>9}"]
        for name, table in self.layers.items():
            fastest = min(min(by_source) for row in table for by_source in row)
            lines.append(f"{name:<40} {table[0][0][0]:>6.2f} ms  {fastest:>6.2f} ms")
        return "\n".join([*lines, f"the rest {self.rest_ms:.1f} ms; all of it dense {self.dense_ms:.1f} ms"])


def _sources(layer: DynamicConv) -> int:
    return 1 if layer.told_by is None else len(layer.told_by.channels)


def _counts(table: list[list[list[float]]]) -> tuple[int, int, int]:
    return (len(table), len(table[0]), len(table[0][0])) if table and table[0] else (0, 0, 0)
