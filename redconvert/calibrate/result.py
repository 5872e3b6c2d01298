"""What a calibration found: the table of where the redundancy is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CalibratedLayer", "Calibration"]


@dataclass(frozen=True)
class CalibratedLayer:
    """Where the redundancy is: what each candidate of a layer explains of what it does not compute.

    Attributes:
        name: of the layer.
        channels, frame_strides: its candidates.
        channel_explained: for each reduced channel candidate, the share of the dropped channels' variance,
            weighted as in the choice of channels, that Phi_c rebuilds from the kept ones; None where the gates let
            too few samples take it (``decisions="gates"``).
        temporal_explained: for each reduced temporal candidate, the same for the skipped frames; None where the
            layer's clips are so short that no skipped frame lies between two computed ones: there it stays a copy.
        input_explained: for each reduced channel candidate, the share of what the layer's input channels do to the
            answer that its mixtures of them keep; empty where it reads all, or where order and mixtures stay as they
            were (``decisions="gates"``).
    """

    name: str
    channels: tuple[int, ...]
    frame_strides: tuple[int, ...]
    channel_explained: tuple[float | None, ...]
    temporal_explained: tuple[float | None, ...]
    input_explained: tuple[float, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """What `redconvert.calibrate` did: ``print`` it, or go through ``layers``."""

    model: str
    layers: tuple[CalibratedLayer, ...]
    samples: int
    rounds: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        mixes = any(layer.input_explained for layer in self.layers)
        header = f"{'layer':<{width}}  {'channels':>16}  explained        {'frames':>10}  explained"
        lines = [header + "        of inputs" * mixes]
        for layer in self.layers:
            channels = "/".join(map(str, layer.channels)) if layer.channel_explained else "-"
            frames = "/".join(map(str, layer.frame_strides)) if layer.temporal_explained else "-"
            by_channel, by_frame, by_input = (
                " ".join("     -" if share is None else f"{share:6.1%}" for share in shares)
                for shares in (layer.channel_explained, layer.temporal_explained, layer.input_explained)
            )
            line = f"{layer.name:<{width}}  {channels:>16}  {by_channel:<15}  {frames:>10}  {by_frame:<15}  {by_input}"
            lines.append(line.rstrip())
        lines.append(f"{self.samples} samples, {self.rounds} rounds, {self.seconds:.1f} s")
        return "\n".join(lines)
