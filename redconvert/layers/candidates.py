"""The decisions that a dynamic convolution can take, and which channels and frames each computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import LayerConfig

__all__ = ["Candidates"]


@dataclass(frozen=True)
class Candidates:
    """Channel candidate i computes ``channels[i]`` channels, temporal candidate j every ``strides[j]``-th frame.

    Both start with the full candidate, ``channels[0] == C_out`` and ``strides[0] == 1``, and are strictly
    ordered from the most to the least work. An axis without choice has one entry.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def build(cls, out_channels: int, groups: int, config: LayerConfig, *, temporal: bool) -> Candidates:
        """k_i = ceil(C_out / 2^i), or of ``config.shares``, rounded up to whole groups and `align`; strides 2^j."""
        channels = [out_channels]
        if config.channel:
            block = math.lcm(config.align, out_channels // groups if groups > 1 else 1)
            for share in config.shares or [2.0**-i for i in range(1, config.search_space)]:
                count = min(out_channels, block * math.ceil(math.ceil(out_channels * share - 1e-9) / block))
                if count < channels[-1]:
                    channels.append(count)
        strides = [2**j for j in range(config.search_space)] if config.temporal and temporal else [1]
        return cls(tuple(channels), tuple(strides))

    def following(self, carries: bool) -> Candidates:
        """Those of a layer that has the channels another decides about: frames alone, if it ``carries`` them."""
        return Candidates(self.channels[:1], self.strides if carries else (1,))

    @property
    def is_static(self) -> bool:
        """Whether there is nothing to decide."""
        return len(self.channels) == len(self.strides) == 1

    def frames(self, temporal: int, num_frames: int) -> int:
        """How many of ``num_frames`` output frames temporal candidate ``temporal`` computes."""
        return -(-num_frames // self.strides[temporal])

    def nearest(self, axis: str, index: int) -> int:
        """``index``, or the cheapest candidate of an axis ("channel" or "temporal") that has fewer."""
        return min(index, len(self.channels if axis == "channel" else self.strides) - 1)
