"""What to convert and how: two frozen, validated dataclasses with a JSON round trip."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from .errors import RedconvertError

__all__ = ["ConvertConfig", "LayerConfig", "Pattern", "Rule"]

GATES = ("hard", "soft")
CHEAP = ("auto", "pointwise", "principal", "depthwise", "scale")

Pattern: TypeAlias = str | type | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class LayerConfig:
    """How one convolution becomes dynamic.

    Args:
        search_space: number of candidates on each axis; candidate i computes ``ceil(C_out / 2**i)``
            channels, candidate j every ``2**j``-th frame. At least 2.
        temporal: decide how many frames to compute (needs a time axis).
        channel: decide how many output channels to compute.
        gate: ``"hard"`` runs the largest open candidate alone, with the gradient of the soft sum;
            ``"soft"`` is the paper's weighted sum of all open candidates.
        cheap: how dropped channels are rebuilt from the kept ones: ``"pointwise"`` (a 1x1 convolution),
            ``"depthwise"`` (3x3 on one source channel each), ``"scale"`` (one source channel each), or
            ``"auto"``: pointwise where it costs at most 10 % of what it saves, else scale. ``"principal"`` is
            pointwise from mixtures of the filters, which calibration makes span the principal components of the
            result: the best without training. Needs ``gate="hard"``; grouped convolutions take ``"auto"``.
        absorb: where one convolution alone reads the channels, behind norm, activation or pooling, do not rebuild them:
            that convolution computes from those that are there, with a weight of its own for each candidate
            (`redconvert.layers.Absorbed`). It saves input channels, too. Depthwise convolutions between the two compute
            the channels that are there, and squeeze and excitation reads those. Needs ``gate="hard"``.
        mix_inputs: reduced candidates read mixtures of the input channels, too: as large a share of them as of their
            own channels they compute (`redconvert.layers.InputMixtures`), so that a share s costs little more than
            s^2. Calibration chooses them. Needs ``gate="hard"``; convolutions in groups, of fewer than 8 channels, 1x1,
            and those that `absorb` ties to each other read all.
        shares: of its channels that the reduced candidates compute, falling, as in ``(0.75, 0.5)``, rounded up.
            ``None``: 1/2, 1/4, ... as ``search_space`` says, which then counts candidates in time alone.
        align: channel counts are rounded up to a multiple of this (kernels work in blocks of 8 or 16).
        normalize: divide the gate's values by their sum. ``False`` is the paper's sum; with
            ``gate="soft"`` it gives up exactness at conversion.
        gate_hidden: width of the gate's hidden layer.
        gate_frames: frames that the gate sees; clips are average-pooled in time to this length.
            ``None``: as many as the layer saw in ``example_inputs``, or 8 where there were none.
        rebuild_weight: closed candidates learn to rebuild what they would drop: the gradient of this
            weight times their normalised squared error is added for the cheap operations alone.
    """

    search_space: int = 2
    temporal: bool = True
    channel: bool = True
    gate: str = "hard"
    cheap: str = "auto"
    absorb: bool = False
    mix_inputs: bool = False
    shares: Sequence[float] | None = None
    align: int = 1
    normalize: bool = True
    gate_hidden: int = 16
    gate_frames: int | None = None
    rebuild_weight: float = 0.1

    def __post_init__(self) -> None:
        _check_int(self, "search_space", minimum=2)
        _check_int(self, "align", minimum=1)
        _check_int(self, "gate_hidden", minimum=1)
        if self.gate_frames is not None:
            _check_int(self, "gate_frames", minimum=1)
        for name in ("temporal", "channel", "normalize", "absorb", "mix_inputs"):
            if not isinstance(getattr(self, name), bool):
                raise RedconvertError(f"{name} must be True or False, not {getattr(self, name)!r}")
        _check_choice(self, "gate", GATES)
        _check_choice(self, "cheap", CHEAP)
        if self.cheap == "principal" and self.gate == "soft":
            raise RedconvertError(
                "cheap='principal' needs gate='hard': what one candidate computes says nothing of what others do"
            )
        if self.absorb and self.gate == "soft":
            raise RedconvertError(
                "absorb=True needs gate='hard': a soft gate mixes candidates, and their sum has all channels"
            )
        if self.mix_inputs and self.gate == "soft":
            raise RedconvertError(
                "mix_inputs=True needs gate='hard': a soft gate mixes candidates, and each would read another input"
            )
        if self.shares is not None:
            object.__setattr__(self, "shares", _checked_shares(self.shares))
        if not isinstance(self.rebuild_weight, int | float) or not 0 <= self.rebuild_weight < float("inf"):
            raise RedconvertError(f"rebuild_weight must be a number >= 0, not {self.rebuild_weight!r}")
        if not (self.temporal or self.channel):
            raise RedconvertError(
                "a dynamic layer needs temporal=True or channel=True; to leave layers alone, give a rule "
                "that maps them to None"
            )

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(LayerConfig)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerConfig:
        return cls(**_known_fields(cls, values))


Rule: TypeAlias = tuple[Pattern, LayerConfig | Mapping[str, Any] | None]


@dataclass(frozen=True)
class ConvertConfig(LayerConfig):
    """How a whole network becomes dynamic: the default for every convolution, and the exceptions.

    Args:
        num_frames: for 2D networks whose batch is ``N * num_frames`` frames (TSN): decide per clip.
        rules: ordered ``(pattern, setting)`` pairs, the first match wins. A pattern is a glob on the
            layer's name (``*`` crosses dots), ``"re:..."`` (a regular expression that must match the
            whole name), a module type, or a callable ``(name, module) -> bool``. A setting is a
            `LayerConfig`, a mapping of the fields to change, or ``None``: leave the layer as it is.
        min_saving: leave a convolution dense unless its lowest candidate saves at least this share of
            its MACs, gate and cheap operations counted.

    The remaining fields are those of `LayerConfig`.
    """

    num_frames: int | None = None
    rules: Sequence[Rule] = ()
    min_saving: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames is not None:
            _check_int(self, "num_frames", minimum=1)
        if not isinstance(self.min_saving, int | float) or not 0 <= self.min_saving < 1:
            raise RedconvertError(f"min_saving must be a share in [0, 1), not {self.min_saving!r}")
        if isinstance(self.rules, Mapping):  # {"stem.*": None} reads well, and dicts keep their order
            object.__setattr__(self, "rules", tuple(self.rules.items()))
        if isinstance(self.rules, str) or not isinstance(self.rules, Sequence):
            raise RedconvertError(f"rules must be (pattern, setting) pairs or a mapping, not {self.rules!r}")
        object.__setattr__(self, "rules", tuple(self._checked_rule(rule) for rule in self.rules))

    @property
    def default(self) -> LayerConfig:
        """What a convolution that no rule matches gets."""
        return LayerConfig.from_dict(self.to_layer_dict())

    def to_layer_dict(self) -> dict[str, Any]:
        return LayerConfig.to_dict(self)

    def _checked_rule(self, rule: Any) -> tuple[Pattern, LayerConfig | None]:
        if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
            raise RedconvertError(f"a rule is a (pattern, setting) pair, not {rule!r}")
        pattern, setting = rule
        if not (isinstance(pattern, str | type) or callable(pattern)):
            raise RedconvertError(
                f"unknown rule pattern {pattern!r}: give a glob, 're:...', a module type or a callable (name, module)"
            )
        if isinstance(pattern, str) and pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise RedconvertError(f"rule {pattern!r} is not a regular expression: {error}") from error
        if isinstance(setting, Mapping):
            setting = LayerConfig.from_dict({**self.to_layer_dict(), **setting})
        if not (setting is None or isinstance(setting, LayerConfig)):
            raise RedconvertError(f"rule {pattern!r} maps to {setting!r}; give a LayerConfig, a mapping or None")
        return pattern, setting

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. Rules by type or callable have no JSON form and are refused."""
        for pattern, _ in self.rules:
            if not isinstance(pattern, str):
                raise RedconvertError(
                    f"rule {pattern!r} cannot be written as JSON: use a glob or 're:...' pattern for configs on disk"
                )
        rules = [
            [pattern, layer.to_dict() if isinstance(layer, LayerConfig) else None] for pattern, layer in self.rules
        ]
        return {
            **self.to_layer_dict(),
            "num_frames": self.num_frames,
            "rules": rules,
            "min_saving": self.min_saving,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvertConfig:
        return cls(**_known_fields(cls, values))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ConvertConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RedconvertError(f"the config is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise RedconvertError(f"the config must be a JSON object, not {type(values).__name__}")
        return cls.from_dict(values)


def _checked_shares(shares: Any) -> tuple[float, ...]:
    """As a tuple, of which a JSON list makes one again."""
    numbers = list(shares) if isinstance(shares, Sequence) and not isinstance(shares, str) else [shares]
    plain = all(isinstance(each, int | float) and not isinstance(each, bool) for each in numbers)
    if not plain or not numbers or any(not low < high for high, low in itertools.pairwise([1, *numbers, 0])):
        raise RedconvertError(f"shares must fall from below 1 to above 0, as in (0.75, 0.5), not {shares!r}")
    return tuple(float(each) for each in numbers)


def _known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise RedconvertError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(known)}")
    return dict(values)


def _check_int(config: Any, name: str, minimum: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise RedconvertError(f"{name} must be an integer of at least {minimum}, not {value!r}")


def _check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    if getattr(config, name) not in choices:
        raise RedconvertError(f"{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}")
