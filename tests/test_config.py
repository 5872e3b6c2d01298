"""Configs: validated, frozen, and the same in Python and JSON."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from redconvert import ConvertConfig, LayerConfig, RedconvertError

LAYERS = st.builds(
    LayerConfig,
    search_space=st.integers(2, 4),
    temporal=st.booleans(),
    channel=st.just(True),
    gate=st.sampled_from(["hard", "soft"]),
    cheap=st.sampled_from(["auto", "pointwise", "depthwise", "scale"]),
    align=st.integers(1, 32),
    normalize=st.booleans(),
    gate_hidden=st.integers(1, 64),
    gate_frames=st.none() | st.integers(1, 64),
    rebuild_weight=st.floats(0, 10),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    default=LAYERS,
    rules=st.lists(st.tuples(st.text(min_size=1).filter(lambda t: t[:3] != "re:"), st.none() | LAYERS), max_size=3),
    num_frames=st.none() | st.integers(1, 64),
    min_saving=st.floats(0, 0.99),
)
def test_json_round_trip(default, rules, num_frames, min_saving):
    config = ConvertConfig(**default.to_dict(), rules=rules, num_frames=num_frames, min_saving=min_saving)
    read = ConvertConfig.from_json(config.to_json())
    assert read == config and read.default == default and read.rules == tuple(rules)
    assert LayerConfig.from_dict(default.to_dict()) == default


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConvertConfig().search_space = 3
    assert hash(LayerConfig()) == hash(LayerConfig())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search_space": 1}, "search_space must be an integer of at least 2, not 1"),
        ({"search_space": 2.0}, "search_space must be an integer"),
        ({"search_space": True}, "search_space must be an integer"),
        ({"align": 0}, "align must be an integer of at least 1"),
        ({"gate_hidden": 0}, "gate_hidden must be"),
        ({"gate_frames": 0}, "gate_frames must be"),
        ({"temporal": 1}, "temporal must be True or False, not 1"),
        ({"normalize": "no"}, "normalize must be True or False"),
        ({"gate": "firm"}, "gate must be one of hard, soft, not 'firm'"),
        ({"cheap": None}, "cheap must be one of auto, pointwise, principal, depthwise, scale"),
        ({"rebuild_weight": -1}, "rebuild_weight must be a number >= 0"),
        ({"rebuild_weight": float("nan")}, "rebuild_weight must be a number >= 0"),
        ({"rebuild_weight": float("inf")}, "rebuild_weight must be a number >= 0"),
        ({"temporal": False, "channel": False}, "needs temporal=True or channel=True; .* maps them to None"),
    ],
)
def test_layer_fields(options, words):
    for cls in (LayerConfig, ConvertConfig):
        with pytest.raises(RedconvertError, match=words):
            cls(**options)
        with pytest.raises(RedconvertError, match=words):
            cls.from_dict(options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 0}, "num_frames must be an integer of at least 1"),
        ({"min_saving": 1}, r"min_saving must be a share in \[0, 1\), not 1"),
        ({"min_saving": "10%"}, "min_saving must be a share"),
        ({"rules": "stem"}, "rules must be .* pairs or a mapping, not 'stem'"),
        ({"rules": 3}, "rules must be"),
        ({"rules": ["stem"]}, "a rule is a .pattern, setting. pair, not 'stem'"),
        ({"rules": [("stem",)]}, "a rule is a"),
        ({"rules": [(3, None)]}, "unknown rule pattern 3: give a glob"),
        ({"rules": [(None, None)]}, "unknown rule pattern None"),
        ({"rules": [("re:(", None)]}, r"rule 're:\(' is not a regular expression: "),
        ({"rules": [("stem", 3)]}, "rule 'stem' maps to 3; give a LayerConfig, a mapping or None"),
        ({"rules": [("stem", {"serch_space": 3})]}, "LayerConfig has no field 'serch_space'; it has search_space"),
        ({"rules": [("stem", {"gate": "firm"})]}, "gate must be one of"),
    ],
)
def test_network_fields(options, words):
    with pytest.raises(RedconvertError, match=words):
        ConvertConfig(**options)


def test_rules():
    config = ConvertConfig(align=8, rules={"stem": None, "layer*": {"search_space": 3}})
    assert config.rules == (("stem", None), ("layer*", LayerConfig(align=8, search_space=3)))
    assert ConvertConfig(rules=[["stem", None]]).rules == (("stem", None),)
    for pattern in (nn.Conv3d, lambda name, module: True):
        with pytest.raises(RedconvertError, match="cannot be written as JSON: use a glob"):
            ConvertConfig(rules=[(pattern, None)]).to_json()


def test_bad_json():
    with pytest.raises(RedconvertError, match="the config is not JSON"):
        ConvertConfig.from_json("{")
    with pytest.raises(RedconvertError, match="must be a JSON object, not list"):
        ConvertConfig.from_json("[]")
    with pytest.raises(RedconvertError, match="ConvertConfig has no field 'size'; it has"):
        ConvertConfig.from_json('{"size": 3}')
