"""One convolution: whether it becomes dynamic and how, by its kind, its MACs and, where asked for, its time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..config import ConvertConfig, LayerConfig
from ..errors import RedconvertError
from ..layers import DynamicConv, DynamicConv2d, DynamicConv3d
from ..layers.absorb import ALONE, Ties
from ..layers.base import ADDED_ATTRIBUTES
from ..layers.candidates import Candidates
from ..layers.macs import LayerMacs, layer_macs
from ..layers.recipes import recipe_of
from .neighbours import is_depthwise
from .trace import ConvFacts

__all__ = ["CandidateTimes", "Verdict", "accepted", "judge", "obstacle", "probe", "reconsider"]

# Shapes that stand in where no example says how large a layer's input is: they only decide min_saving.
NOMINAL_FRAMES, NOMINAL_SIZE = 8, 28

_AXES = {"channel": "channels", "temporal": "frames"}

Rule = tuple[int, LayerConfig | None]


@dataclass(frozen=True)
class CandidateTimes:
    """Milliseconds of one call of a layer: dense, and per axis each candidate that computes less."""

    dense_ms: float
    channel_ms: tuple[float, ...] = ()
    temporal_ms: tuple[float, ...] = ()

    def saving(self, axis: str) -> float | None:
        """The largest share of the dense time that a candidate of this axis saves; None where it has none."""
        found = self.channel_ms if axis == "channel" else self.temporal_ms
        return 1 - min(found) / self.dense_ms if found else None


@dataclass(frozen=True)
class Verdict:
    """What conversion does with one convolution.

    Attributes:
        name: where ``named_modules`` finds it first; ``aliases``: its other names, if it is shared.
        kind: for example ``"Conv3d 3x3x3"``.
        converted: whether it becomes dynamic.
        reason: why not, or what to know.
        config: how it decides; None where it is skipped.
        facts: what tracing learnt.
        channels, strides: its candidates.
        num_frames: frames folded into its batch.
        dense_macs, lowest_macs: per sample and forward pass, gate and cheap operations counted in the
            lowest; None where no example says at which shapes it runs.
        times: of its candidates on this device, where they were measured.
        reader: name of the convolution that absorbs its Phi_c and reads what was computed alone.
        follows: name of the convolution whose channels it carries to their reader, being depthwise, or reads, deciding
            about none of its own.
        follower: how it would decide as such; None where it may not be one.
        source: how it would decide if nothing had to be rebuilt behind it, where it does not pay else.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    converted: bool
    reason: str
    config: LayerConfig | None
    facts: ConvFacts
    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    num_frames: int | None = None
    dense_macs: int | None = None
    lowest_macs: int | None = None
    times: CandidateTimes | None = None
    reader: str | None = None
    follows: str | None = None
    follower: LayerConfig | None = None
    source: LayerConfig | None = None

    @property
    def remark(self) -> str:
        """What to know of it, in words: the reason, who absorbs its channels, and whose it goes along with."""
        absorbed = f"absorbed by {self.reader}" if self.reader else ""
        follows = f"has the channels of {self.follows}" if self.follows else ""
        return "; ".join(filter(None, (self.reason, absorbed, follows)))


# -- one layer -----------------------------------------------------------------------------------------


def judge(
    name: str,
    module: nn.Module,
    aliases: tuple[str, ...],
    config: ConvertConfig,
    rule: Rule | None,
    facts: ConvFacts,
) -> Verdict:
    """What conversion would do with one convolution. ``rule``: the first that matches it, and its number from 1."""
    size = "x".join(map(str, module.kernel_size))  # type: ignore[arg-type]
    verdict = Verdict(name, aliases, f"{type(module).__name__} {size}", False, "", None, facts)
    if not isinstance(module, nn.Conv2d | nn.Conv3d):
        return replace(verdict, reason="transposed or 1D: not a convolution over frames or images that can be reduced")
    dense = _dense_macs(module, facts, config)
    verdict = replace(verdict, dense_macs=dense)
    reason = obstacle(module, facts)
    if reason:
        return replace(verdict, reason=reason)
    if rule is not None and rule[1] is None:
        return replace(verdict, reason=f"excluded by rule {rule[0]}")
    chosen = rule[1] if rule is not None and rule[1] is not None else config.default
    num_frames = config.num_frames if isinstance(module, nn.Conv2d) else None
    if num_frames is not None and facts.input_shape is not None and facts.input_shape[0] % num_frames:
        raise RedconvertError(
            f"layer '{name}' gets a batch of {facts.input_shape[0]}, no multiple of num_frames={num_frames}: pass "
            f"whole clips in example_inputs, or exclude the layer with a rule"
        )
    note = ""
    frames = _output_frames(module, facts, num_frames)
    if chosen.gate == "hard" and chosen.channel and (is_depthwise(module) or module.groups == 1):
        verdict = replace(verdict, follower=replace(chosen, temporal=chosen.temporal and frames != 1))
    if chosen.temporal and frames == 1:
        if not chosen.channel:
            return replace(verdict, reason="one output frame: nothing to skip in time")
        chosen, note = replace(chosen, temporal=False), "channels only: one output frame"
    if not chosen.channel and frames is None and isinstance(module, nn.Conv2d):
        return replace(verdict, reason="no time axis: give num_frames, or channel=True")
    candidates = DynamicConv.plan_candidates(module, chosen, num_frames)
    if candidates.is_static:
        return replace(verdict, reason="one output channel" if module.out_channels == 1 else "nothing to choose from")
    if rule is None and facts.is_output:
        return replace(verdict, reason="the output layer (a rule can include it)", follower=None)
    macs = probe(module, chosen, num_frames, facts)
    saving = 1 - macs.lowest / macs.dense
    if rule is None and saving < config.min_saving:
        what = "depthwise with nothing to save" if module.groups == module.in_channels > 1 else "too small to pay"
        reason = f"{what}: its lowest candidate saves {saving:.0%}, min_saving is {config.min_saving:.0%}"
        handing = probe(module, chosen, num_frames, facts, Ties(hands_over=True)) if chosen.absorb else macs
        pays = 1 - handing.lowest / handing.dense >= config.min_saving
        return replace(verdict, reason=reason, num_frames=num_frames, source=chosen if pays else None)
    return accepted(replace(verdict, reason=note, num_frames=num_frames), chosen, candidates, macs)


def accepted(verdict: Verdict, chosen: LayerConfig, candidates: Candidates, macs: LayerMacs) -> Verdict:
    """The verdict that a convolution is converted so."""
    return replace(
        verdict,
        converted=True,
        config=chosen,
        channels=candidates.channels,
        strides=candidates.strides,
        lowest_macs=None if verdict.dense_macs is None else macs.lowest * (verdict.facts.calls or 1),
    )


def reconsider(
    verdict: Verdict, module: nn.Conv2d | nn.Conv3d, times: CandidateTimes, min_saving: float, asked_for: bool
) -> Verdict:
    """The verdict on a convolution to be converted, now that its candidates were timed.

    An axis whose fastest candidate saves less than ``min_saving`` of the dense time is given up, and with both of
    them the layer. ``asked_for``: a rule names the layer, which then stays as the rule wants it.
    """
    verdict = replace(verdict, times=times)
    assert verdict.config is not None
    offered = {axis: times.saving(axis) for axis in _AXES}
    savings = {axis: saving for axis, saving in offered.items() if saving is not None}
    failed = [axis for axis in savings if savings[axis] < min_saving]
    if asked_for or not failed:
        return verdict
    found = " and ".join(f"{_AXES[axis]} save {savings[axis]:.0%}" for axis in failed)
    reason = f"measured: {found} of {times.dense_ms:.2f} ms, min_saving is {min_saving:.0%}"
    if len(failed) == len(savings):
        dense = Verdict(verdict.name, verdict.aliases, verdict.kind, False, reason, None, verdict.facts)
        follower = None if verdict.follower is None else replace(verdict.follower, temporal=False)
        return replace(dense, dense_macs=verdict.dense_macs, times=times, follower=follower)
    (left,) = savings.keys() - failed
    kept = replace(verdict.config, channel=left == "channel", temporal=left == "temporal")
    candidates = DynamicConv.plan_candidates(module, kept, verdict.num_frames)
    macs = probe(module, kept, verdict.num_frames, verdict.facts)
    return accepted(replace(verdict, reason=f"{_AXES[left]} only, {reason}"), kept, candidates, macs)


def obstacle(module: nn.Conv2d | nn.Conv3d, facts: ConvFacts) -> str | None:
    """Why this convolution cannot become dynamic whatever the rules say."""
    base = nn.Conv3d if isinstance(module, nn.Conv3d) else nn.Conv2d
    if parametrize.is_parametrized(module):
        return f"parametrised ({', '.join(module.parametrizations)}): its weight is computed, not stored"  # type: ignore[arg-type]
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a hook (weight_norm, spectral_norm, pruning), not stored"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if recipe_of(type(module)) is None:
        return f"own forward: {type(module).__name__} is more than a {base.__name__} (redconvert.register teaches it)"
    taken = [name for name in ADDED_ATTRIBUTES if hasattr(module, name)]
    if taken:
        return f"{type(module).__name__} has a '{taken[0]}' of its own, a name that conversion needs"
    if facts.calls == 0:
        return "unused: the forward pass never calls it (in eval mode)"
    return None


def _output_frames(module: nn.Module, facts: ConvFacts, num_frames: int | None) -> int | None:
    """Output frames per sample; None where unknown, or where there is no time axis."""
    if isinstance(module, nn.Conv2d):
        return num_frames
    return None if facts.output_shape is None else facts.output_shape[-3]


def _dense_macs(module: nn.Conv2d | nn.Conv3d, facts: ConvFacts, config: ConvertConfig) -> int | None:
    """Per sample and forward pass; a sample is a clip where frames are folded into the batch."""
    if facts.output_shape is None:
        return 0 if facts.calls == 0 else None
    positions = math.prod(facts.output_shape[-len(module.kernel_size) :])
    per_sample = (config.num_frames or 1) if isinstance(module, nn.Conv2d) else 1
    per_output = module.in_channels // module.groups * math.prod(module.kernel_size)
    return module.out_channels * positions * per_output * per_sample * (facts.calls or 1)


def probe(
    module: nn.Conv2d | nn.Conv3d,
    config: LayerConfig,
    num_frames: int | None,
    facts: ConvFacts,
    ties: Ties = ALONE,
) -> LayerMacs:
    """MACs of the dynamic layer that this convolution would become, from a copy without numbers."""
    three_d = isinstance(module, nn.Conv3d)
    shape_in, shape_out = facts.input_shape, facts.output_shape
    if shape_in is None or shape_out is None:
        batch = (num_frames or 1,) if not three_d else (1,)
        size = (NOMINAL_FRAMES, NOMINAL_SIZE, NOMINAL_SIZE) if three_d else (NOMINAL_SIZE, NOMINAL_SIZE)
        out = [max(1, axis // stride) for axis, stride in zip(size, module.stride, strict=True)]
        shape_in, shape_out = (*batch, module.in_channels, *size), (*batch, module.out_channels, *out)
    arguments: dict[str, Any] = {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "groups": module.groups,
        "bias": module.bias is not None,
        "device": "meta",
    }
    kind: Any = nn.Conv3d if three_d else nn.Conv2d
    probe = kind(module.in_channels, module.out_channels, **arguments)
    probe.__class__ = DynamicConv3d if three_d else DynamicConv2d
    gate_frames = shape_in[-3] if three_d else None
    probe.make_dynamic(config, num_frames=num_frames, gate_frames=gate_frames, ties=ties)
    return layer_macs(probe, shape_in, shape_out)
