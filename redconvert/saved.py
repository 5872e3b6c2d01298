"""What a saved network says of each dynamic layer: enough to make it again, and to know it when we see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import LayerConfig
from .convert import convert_layer
from .layers import Candidates, DynamicConv
from .layers.absorb import Ties
from .weights import without_compile

__all__ = ["SavedLayer", "conv_facts", "describe", "unpaired"]


@dataclass(frozen=True)
class SavedLayer:
    """What it takes to make one convolution dynamic again, and to know it when we see it."""

    config: LayerConfig
    num_frames: int | None
    gate_frames: int
    feeds_norm: bool
    conv: dict[str, Any]
    aliases: tuple[str, ...]
    reader: str | None = None  # the layer that absorbs Phi_c
    reads: tuple[int, ...] | None = None  # channels of each candidate of the layer that this one reads
    source: str | None = None  # the layer that this one follows
    carries: tuple[int, ...] | None = None  # channels of each candidate of that layer, of one that is depthwise
    decides: bool = True  # about channels or frames of its own

    def convert(self, conv: nn.Module, name: str) -> DynamicConv:
        return convert_layer(
            conv,
            self.config,
            name=name,
            num_frames=self.num_frames,
            gate_frames=self.gate_frames,
            feeds_norm=self.feeds_norm,
            ties=Ties(
                hands_over=self.reader is not None,
                reads=self.reads,
                carries=self.carries,
                aside=self.source is not None and self.carries is None,
                decides=self.decides,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": LayerConfig.to_dict(self.config),
            "num_frames": self.num_frames,
            "gate_frames": self.gate_frames,
            "feeds_norm": self.feeds_norm,
            "conv": self.conv,
            "aliases": list(self.aliases),
            "reader": self.reader,
            "reads": None if self.reads is None else list(self.reads),
            "source": self.source,
            "carries": None if self.carries is None else list(self.carries),
            "decides": self.decides,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SavedLayer:
        """KeyError, TypeError or ValueError where this is no saved layer."""
        frames = (values["num_frames"], values["gate_frames"])
        if not all(isinstance(value, int) and value > 0 for value in frames if value is not None):
            raise ValueError(f"num_frames and gate_frames are {frames}")
        return cls(
            LayerConfig.from_dict(values["config"]),
            frames[0],
            int(frames[1]),
            bool(values["feeds_norm"]),
            dict(values["conv"]),
            tuple(values["aliases"]),
            *_tied(values, "reader", "reads"),
            *_tied(values, "source", "carries"),
            bool(values.get("decides", True)),
        )


def _tied(values: Mapping[str, Any], name: str, counts: str) -> tuple[str | None, tuple[int, ...] | None]:
    """Another layer's name and numbers of channels, if that is what they are; older saves have neither."""
    other, channels = values.get(name), values.get(counts)
    if not (other is None or isinstance(other, str)):
        raise TypeError(f"{name} is {other!r}")
    if channels is None:
        return other, None
    if not (isinstance(channels, list) and all(isinstance(each, int) and each > 0 for each in channels)):
        raise TypeError(f"{counts} is {channels!r}")
    return other, tuple(channels)


def describe(
    name: str, layer: DynamicConv, model: nn.Module, readers: Mapping[str, str], sources: Mapping[str, str]
) -> SavedLayer:
    """``readers`` and ``sources``: of `redconvert.layers.absorb.pairs` and `followers`."""
    others = [other for other, module in model.named_modules(remove_duplicate=False) if module is layer]
    return SavedLayer(
        layer.config,
        layer.num_frames,
        layer.gate.num_frames,
        layer.feeds_norm,
        conv_facts(layer),
        tuple(without_compile(other) for other in others if other != name),
        without_compile(readers[name]) if name in readers else None,
        layer.cheap_in.channels if layer.cheap_in is not None else None,
        without_compile(sources[name]) if name in sources else None,
        layer.carried,
        not layer.candidates.is_static,
    )


def conv_facts(conv: nn.Module) -> dict[str, Any]:
    """What a convolution must have in common with the saved one."""
    dense = type(conv).dense_class if isinstance(conv, DynamicConv) else type(conv)
    return {
        "type": dense.__name__,
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": list(conv.kernel_size),  # type: ignore[arg-type]
        "groups": conv.groups,
    }


def unpaired(layers: Mapping[str, SavedLayer]) -> str | None:
    """What is wrong with who reads whose channels, in words; None where every pair fits."""
    sources: dict[str, str] = {}
    for name, layer in layers.items():
        if layer.reader is None:
            continue
        reader = layers.get(layer.reader)
        if reader is None or reader.reads is None or layer.reader in sources:
            return f"layer '{name}' names '{layer.reader}' as its reader, which reads others or none"
        if _channels(layer) != reader.reads or reader.conv.get("in_channels") != reader.reads[0]:
            return f"layer '{layer.reader}' reads {reader.reads} channels, and '{name}' does not hand over these"
        sources[layer.reader] = name
    for name, layer in layers.items():
        source = layers.get(layer.source or "")
        if layer.source is None and layer.carries is None:
            continue
        counts = layer.reads if layer.carries is None else layer.carries
        if source is None or source.reader is None or counts != _channels(source):
            return f"layer '{name}' follows '{layer.source}' with {counts} channels, which does not hand over these"
        fits = layer.conv.get("in_channels") == counts[0]
        if not fits or (layer.carries is not None and layer.conv.get("groups") != layer.conv.get("out_channels")):
            return f"layer '{name}' has {layer.conv.get('in_channels')} channels, which '{layer.source}' does not fit"
    tied = {*sources, *(name for name, layer in layers.items() if layer.source is not None)}
    alone = next((name for name, layer in layers.items() if layer.reads is not None and name not in tied), None)
    return None if alone is None else f"layer '{alone}' reads channels that no layer hands over"


def _channels(layer: SavedLayer) -> tuple[int, ...]:
    """How many channels each candidate computes."""
    return Candidates.build(layer.conv["out_channels"], layer.conv["groups"], layer.config, temporal=False).channels
