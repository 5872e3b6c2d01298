"""A verdict per convolution: what conversion would do, and why. Nothing is changed."""

from __future__ import annotations

import fnmatch
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..config import ConvertConfig, LayerConfig, Pattern
from ..errors import RedconvertError
from ..inputs import tensors_in
from ..layers import DynamicConv
from .judge import Verdict, judge, reconsider
from .pairs import pair
from .trace import Trace, trace

__all__ = ["Plan", "check_model", "make_plan", "matches"]

_OTHER_CONVS = (nn.Conv1d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
            f"{verdict.remark}".rstrip()
            for verdict in self.verdicts
        ]
        lines += [
            f"{name}: a functional convolution, which is not a module and stays dense" for name in self.functional
        ]
        lines.append(f"{self.model}: {len(self.converted)} of {len(self.verdicts)} converted, read by {self.source}")
        return "\n".join(lines)


def make_plan(
    model: nn.Module,
    config: ConvertConfig | None = None,
    *,
    example_inputs: Any = None,
    measure: bool = False,
    progress: bool = False,
) -> Plan:
    """A dry run of `redconvert.convert`: a verdict and a reason for each convolution; nothing is changed.

    Args:
        model: any network.
        config: what to convert and how; the defaults of `ConvertConfig` where None.
        example_inputs: a tuple of positional arguments, a dict of keyword arguments, or the one argument.
            With them the plan knows shapes, MACs and which layers run; the values do not matter.
        measure: time each layer's candidates on this device, as `redconvert.deploy` would run them, and leave
            dense what does not save ``min_saving`` of its time, whatever it saves of the MACs. Takes about as
            long as fifty runs of the network; layers that a rule names stay as the rule wants them.
        progress: show a bar while measuring (needs rich).

    Raises:
        RedconvertError: a model that cannot be converted as it is (wrapped in DDP, compiled, scripted,
            already dynamic, lazy or with weights that are not finite), inputs that it does not take, or a
            rule that matches nothing.
    """
    config = config or ConvertConfig()
    if measure and example_inputs is None:
        raise RedconvertError("measure=True times layers on the shapes that they get: give example_inputs")
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
        judge(name, module, names, config, rules[name], traced[name]) for name, (module, names) in layers.items()
    )
    _check_finite(verdicts, layers)
    modules = {name: module for name, (module, _) in layers.items()}
    alone = {verdict.name: verdict for verdict in verdicts}
    verdicts = pair(verdicts, modules)
    if measure:
        verdicts = pair(_measured(verdicts, layers, config, rules, progress), modules, alone)
    return Plan(type(model).__name__, traced.source, verdicts, tuple(traced.functional), traced.problem)


def _measured(
    verdicts: tuple[Verdict, ...],
    layers: dict[str, tuple[Any, tuple[str, ...]]],
    config: ConvertConfig,
    rules: Mapping[str, Any],
    progress: bool,
) -> tuple[Verdict, ...]:
    from ..deploy.measure import time_candidates  # upwards: only what deploy runs tells what a layer will take

    chosen = [verdict for verdict in verdicts if verdict.converted and verdict.facts.input_shape is not None]
    times = time_candidates({verdict.name: (layers[verdict.name][0], verdict) for verdict in chosen}, progress)
    return tuple(
        reconsider(
            verdict, layers[verdict.name][0], times[verdict.name], config.min_saving, rules[verdict.name] is not None
        )
        if verdict.name in times
        else verdict
        for verdict in verdicts
    )


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
