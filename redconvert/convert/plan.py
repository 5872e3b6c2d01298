"""A verdict per convolution: what conversion would do, and why. Nothing is changed."""

from __future__ import annotations

import fnmatch
import json
import math
import re
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..config import ConvertConfig, LayerConfig, Pattern
from ..errors import RedconvertError
from ..inputs import tensors_in
from ..layers import DynamicConv, DynamicConv2d, DynamicConv3d
from ..layers.conv import ADDED_ATTRIBUTES
from ..layers.macs import LayerMacs, layer_macs
from ..layers.recipes import recipe_of
from .trace import ConvFacts, Trace, trace

__all__ = ["Plan", "Verdict", "check_model", "make_plan", "matches", "obstacle"]

# Shapes that stand in where no example says how large a layer's input is: they only decide min_saving.
NOMINAL_FRAMES, NOMINAL_SIZE = 8, 28

_OTHER_CONVS = (nn.Conv1d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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


@dataclass(frozen=True)
class Plan:
    """What `redconvert.convert` would do: ``print(plan)``, or go through ``plan.verdicts``."""

    model: str
    source: str
    verdicts: tuple[Verdict, ...]
    functional: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def converted(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.converted)

    @property
    def skipped(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if not verdict.converted)

    @property
    def dense_macs(self) -> int | None:
        """MACs of all convolutions per sample; None without example inputs."""
        known = [verdict.dense_macs for verdict in self.verdicts if verdict.dense_macs is not None]
        return sum(known) if known else None

    @property
    def lowest_macs(self) -> int | None:
        """The least that the convolutions can cost per sample, gates and cheap operations counted."""
        known = [
            verdict.lowest_macs if verdict.converted and verdict.lowest_macs is not None else verdict.dense_macs
            for verdict in self.verdicts
            if verdict.dense_macs is not None
        ]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "dense_macs": self.dense_macs,
            "lowest_macs": self.lowest_macs,
            "num_converted": len(self.converted),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        width = max([len(verdict.name) for verdict in self.verdicts], default=4)
        lines = [
            f"{verdict.name:<{width}}  {verdict.kind:<22} {'converted' if verdict.converted else 'skipped':<9} "
            f"{verdict.reason}".rstrip()
            for verdict in self.verdicts
        ]
        lines += [
            f"{name}: a functional convolution, which is not a module and stays dense" for name in self.functional
        ]
        lines.append(f"{self.model}: {len(self.converted)} of {len(self.verdicts)} converted, read by {self.source}")
        return "\n".join(lines)


def make_plan(model: nn.Module, config: ConvertConfig | None = None, *, example_inputs: Any = None) -> Plan:
    """A dry run of `redconvert.convert`: a verdict and a reason for each convolution; nothing is changed.

    Args:
        model: any network.
        config: what to convert and how; the defaults of `ConvertConfig` where None.
        example_inputs: a tuple of positional arguments, a dict of keyword arguments, or the one argument.
            With them the plan knows shapes, MACs and which layers run; the values do not matter.

    Raises:
        RedconvertError: a model that cannot be converted as it is (wrapped in DDP, compiled, scripted,
            already dynamic, lazy or with weights that are not finite), inputs that it does not take, or a
            rule that matches nothing.
    """
    config = config or ConvertConfig()
    if not isinstance(config, ConvertConfig):
        raise RedconvertError(f"config must be a ConvertConfig, not {type(config).__name__}")
    check_model(model)
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Conv1d | nn.modules.conv._ConvTransposeNd):
            aliases.setdefault(module, []).append(name)
    layers = {names[0]: (module, tuple(names[1:])) for module, names in aliases.items()}
    rules = _assign_rules(config, layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network's own warnings come when the user runs it
        traced = trace(model, example_inputs)
    if example_inputs is not None:
        _check_clip(config, traced, example_inputs)
    verdicts = tuple(
        _judge(name, module, names, config, rules[name], traced[name]) for name, (module, names) in layers.items()
    )
    _check_finite(verdicts, layers)
    return Plan(type(model).__name__, traced.source, verdicts, tuple(traced.functional), traced.problem)


# -- checks of the whole -------------------------------------------------------------------------------


def check_model(model: Any) -> None:
    """Refuse what cannot be converted as a whole."""
    if not isinstance(model, nn.Module):
        raise RedconvertError(f"convert takes a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"'{name}'" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise RedconvertError(
                f"{where} is scripted with TorchScript, whose convolutions cannot be exchanged: pass the original "
                f"Python module, before torch.jit"
            )
        if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            raise RedconvertError(
                f"{where} is compiled: convert the module inside (._orig_mod), then compile the result"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel) or (
            type(module).__name__ == "FullyShardedDataParallel"
        ):
            raise RedconvertError(
                f"{where} is wrapped in {type(module).__name__}, which has already registered the parameters: "
                f"convert the module inside (.module), then wrap the result"
            )
        if isinstance(module, DynamicConv):
            raise RedconvertError(
                f"{where} is already a dynamic convolution: this network was converted before. Use it as it is, or "
                f"redconvert.revert() it first"
            )
        if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
            raise RedconvertError(f"{where} is lazy and has no weights yet: run the network once, then convert it")


def _assign_rules(
    config: ConvertConfig, layers: dict[str, tuple[nn.Module, tuple[str, ...]]]
) -> dict[str, tuple[int, LayerConfig | None] | None]:
    """For each layer the number of the first rule that matches it, from 1, and what that rule sets."""
    found: dict[str, tuple[int, LayerConfig | None] | None] = {}
    matched: set[int] = set()
    for name, (module, others) in layers.items():
        hits = [
            number
            for number, (pattern, _) in enumerate(config.rules, start=1)
            if any(matches(pattern, candidate, module) for candidate in (name, *others))
        ]
        matched.update(hits)
        found[name] = (hits[0], config.rules[hits[0] - 1][1]) if hits else None  # type: ignore[assignment]
    for number, (pattern, _) in enumerate(config.rules, start=1):
        if number not in matched:
            shown = ", ".join(list(layers)[:4]) or "none"
            raise RedconvertError(
                f"rule {number} ({pattern!r}) matches none of the {len(layers)} convolutions ({shown}, ...): "
                f"check the pattern, a glob on the whole name or 're:...'"
            )
    return found


def matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether a rule's pattern (glob, ``re:...``, type or callable) means this module."""
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if isinstance(pattern, str):
        if pattern.startswith("re:"):
            return re.fullmatch(pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, pattern)
    return bool(pattern(name, module))


def _check_clip(config: ConvertConfig, traced: Trace, example_inputs: Any) -> None:
    """The example's clip must hold at least one group of the sparsest temporal candidate."""
    if not any(tensor.dim() == 5 for tensor in tensors_in(example_inputs)):
        return  # images, which some networks give a time axis of length 1
    frames = [facts.clip_frames for facts in traced.facts.values() if facts.clip_frames is not None]
    stride = 2 ** (config.search_space - 1)
    if config.temporal and frames and max(frames) < stride:
        raise RedconvertError(
            f"the clip in example_inputs has {max(frames)} frames (axis 2 of (N, C, T, H, W)), fewer than the "
            f"largest temporal stride {stride}: pass longer clips, a smaller search_space, or temporal=False"
        )


def _check_finite(verdicts: tuple[Verdict, ...], layers: dict[str, tuple[nn.Module, tuple[str, ...]]]) -> None:
    for verdict in verdicts:
        module = layers[verdict.name][0]
        for kind, tensor in module.named_parameters(recurse=False):
            if verdict.converted and not tensor.is_meta and not torch.isfinite(tensor.detach()).all():
                raise RedconvertError(
                    f"{kind} of layer '{verdict.name}' holds NaN or infinite values: "
                    f"load sound weights before converting"
                )


# -- one layer -----------------------------------------------------------------------------------------


def _judge(
    name: str,
    module: nn.Module,
    aliases: tuple[str, ...],
    config: ConvertConfig,
    rule: tuple[int, LayerConfig | None] | None,
    facts: ConvFacts,
) -> Verdict:
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
    if chosen.temporal and frames == 1:
        if not chosen.channel:
            return replace(verdict, reason="one output frame: nothing to skip in time")
        chosen, note = replace(chosen, temporal=False), "channels only: one output frame"
    if not chosen.channel and frames is None and isinstance(module, nn.Conv2d):
        return replace(verdict, reason="no time axis: give num_frames, or channel=True")
    candidates = DynamicConv.plan_candidates(module, chosen, num_frames)
    if candidates.is_static:
        return replace(verdict, reason="one output channel" if module.out_channels == 1 else "nothing to choose from")
    macs = _probe(module, chosen, num_frames, facts)
    explicit = rule is not None
    saving = 1 - macs.lowest / macs.dense
    if not explicit and facts.is_output:
        return replace(verdict, reason="the output layer (a rule can include it)")
    if not explicit and saving < config.min_saving:
        what = "depthwise with nothing to save" if module.groups == module.in_channels > 1 else "too small to pay"
        return replace(
            verdict, reason=f"{what}: its lowest candidate saves {saving:.0%}, min_saving is {config.min_saving:.0%}"
        )
    return replace(
        verdict,
        converted=True,
        reason=note,
        config=chosen,
        channels=candidates.channels,
        strides=candidates.strides,
        num_frames=num_frames,
        lowest_macs=None if dense is None else macs.lowest * (facts.calls or 1),
    )


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


def _probe(module: nn.Conv2d | nn.Conv3d, config: LayerConfig, num_frames: int | None, facts: ConvFacts) -> LayerMacs:
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
    if three_d:
        probe: DynamicConv = DynamicConv3d(
            module.in_channels, module.out_channels, **arguments, config=config, gate_frames=shape_in[-3]
        )
    else:
        probe = DynamicConv2d(
            module.in_channels, module.out_channels, **arguments, config=config, num_frames=num_frames
        )
    return layer_macs(probe, shape_in, shape_out)
