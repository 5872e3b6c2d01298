"""What each candidate of a convolution takes on this device, timed as a deployed network runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.judge import CandidateTimes, Verdict
from ..convert.pairs import ties_of_follower
from ..convert.rewrite import convert_layer
from ..cost import interleaved
from ..layers import Handover, forced
from ..layers.absorb import Ties
from ..progress import progress_bar
from .decide import Batch
from .frames import full
from .fuse import filter_of
from .program import on_clips
from .replay import Tape
from .unit import Unit

__all__ = ["time_candidates"]

# Runs of each candidate: small layers are repeated until a candidate had this many seconds.
REPEATS, MOST_REPEATS, SECONDS = 5, 50, 0.05


def time_candidates(
    layers: Mapping[str, tuple[nn.Conv2d | nn.Conv3d, Verdict]], progress: bool = False
) -> dict[str, CandidateTimes]:
    """Times by layer, of convolutions to be converted whose input shape is known; those alike are timed once.

    A gate runs with every candidate, rebuilding is included but for channels that a reader absorbs, and frames are
    filled up, as whoever reads them may need all of them. Clips on a CPU are timed one at a time, as they are
    deployed. Nothing is changed.
    """
    keys = {name: _alike(conv, verdict) for name, (conv, verdict) in layers.items()}
    first = {key: name for name, key in reversed(keys.items())}
    found: dict[Any, CandidateTimes] = {}
    with progress_bar(progress, "Timing candidates", total=len(first)) as step:
        for key, name in first.items():
            found[key] = _timed(*layers[name])
            step()
    return {name: found[key] for name, key in keys.items()}


def _alike(conv: nn.Conv2d | nn.Conv3d, verdict: Verdict) -> tuple[Any, ...]:
    """All that the time of a layer depends on."""
    config = tuple(sorted(verdict.config.to_dict().items())) if verdict.config is not None else None
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    kind = (type(conv), conv.in_channels, conv.out_channels, conv.bias is None, conv.weight.dtype, conv.weight.device)
    facts = verdict.facts
    shapes = (facts.input_shape, facts.clip_frames, verdict.num_frames)
    return (
        *kind,
        *geometry,
        config,
        verdict.reader is not None,
        verdict.follows is not None,
        facts.feeds_norm,
        *shapes,
    )


@torch.no_grad()
def _timed(conv: nn.Conv2d | nn.Conv3d, verdict: Verdict) -> CandidateTimes:
    assert verdict.config is not None and verdict.facts.input_shape is not None
    dense = copy.deepcopy(conv).eval()
    absorbed = verdict.reader is not None
    dynamic = convert_layer(
        copy.deepcopy(dense),
        verdict.config,
        num_frames=verdict.num_frames,
        gate_frames=verdict.facts.clip_frames,
        ties=Ties(hands_over=absorbed) if verdict.follows is None else ties_of_follower(conv, verdict.channels),
    )
    if absorbed:
        assert dynamic.cheap_c is not None
        dynamic.hands_to = Handover(verdict.name, dynamic.cheap_c)
    activation = "relu" if verdict.facts.feeds_norm else "none"
    x = _example(conv, verdict.facts.input_shape)
    run_dense, run_dynamic = (_deployed(each, activation, x) for each in (dense, dynamic))
    calls: dict[str, Callable[[], Any]] = {"dense": _recorded(run_dense, x)}
    within: dict[str, Any] = {}
    axes = {"channel": len(verdict.channels), "temporal": len(verdict.strides)}
    for axis, count in axes.items():
        for i in range(1, count):
            calls[f"{axis} {i}"] = _recorded(run_dynamic, x)
            within[f"{axis} {i}"] = partial(forced, dynamic, **{"channel": 0, "temporal": 0, axis: i})
    once = interleaved(calls, repeats=1, warmup=2, device=x.device, within=within)  # packs weights, chooses forms
    slowest = max(timing.median for timing in once.values())
    repeats = min(MOST_REPEATS, max(REPEATS, int(SECONDS / slowest)))
    found = interleaved(calls, repeats=repeats, warmup=0, device=x.device, within=within)
    ms = {name: round(1000 * timing.median, 4) for name, timing in found.items()}
    per_axis = [tuple(ms[f"{axis} {i}"] for i in range(1, count)) for axis, count in axes.items()]
    return CandidateTimes(ms["dense"], *per_axis)


def _deployed(conv: nn.Module, activation: str, x: Tensor) -> Callable[[], Any]:
    """A call of the layer as `deploy` would run it; as it is where it would stay so."""
    filter = filter_of(conv)
    if filter is None:
        return lambda: conv(x)
    unit = Unit(conv, filter, None, activation, Batch(always_ask=True))
    unit.hands_compact = getattr(conv, "hands_to", None) is not None
    return lambda: full(on_clips(unit, x))


def _recorded(run: Callable[[], Any], x: Tensor) -> Callable[[], Any]:
    """The same calls without what Python looks up, as in a deployed network; on a CPU."""
    return partial(Tape(), [x], run) if x.is_cpu else run


def _example(conv: nn.Conv2d | nn.Conv3d, shape: tuple[int, ...]) -> Tensor:
    """Noise in the shape that the layer got, channels last."""
    clips = isinstance(conv, nn.Conv3d)
    if len(shape) < len(conv.kernel_size) + 2:  # without a batch axis
        shape = (1, *shape)
    if clips and conv.weight.device.type == "cpu":
        shape = (1, *shape[1:])
    layout = torch.channels_last_3d if clips else torch.channels_last
    x = torch.randn(shape, dtype=torch.float32).to(conv.weight.device, conv.weight.dtype)
    return x.contiguous(memory_format=layout)
