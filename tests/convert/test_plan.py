"""Verdicts, MACs and rules."""

from __future__ import annotations

import json

import pytest
import torch
import traps
from torch import nn

import redconvert
from redconvert import ConvertConfig, LayerConfig, RedconvertError
from redconvert.layers import dynamic_layers

CLIP = torch.ones(2, 3, 4, 8, 8)


@pytest.fixture
def model():
    """stem 3x3x3, a block of depthwise and 1x1x1, a 2-channel head."""
    block = nn.ModuleDict({"dw": nn.Conv3d(16, 16, 3, padding=1, groups=16), "pw": nn.Conv3d(16, 32, 1)})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Conv3d(3, 16, 3, padding=1, stride=(1, 2, 2)), block, nn.Linear(32, 2)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(self.block["pw"](self.block["dw"](x).relu()).relu().mean((2, 3, 4)))

    return Net()


def config(*rules, **options):
    return ConvertConfig(rules=rules, **options)


def verdicts(model, config=None, inputs=CLIP):
    return {v.name: v for v in redconvert.plan(model, config, example_inputs=inputs).verdicts}


# -- MACs ----------------------------------------------------------------------------------------------


def test_macs_by_hand(model):
    found = verdicts(model, config(("*", LayerConfig(cheap="scale", gate_hidden=4))))
    positions = 4 * 4 * 4
    assert {name: v.dense_macs for name, v in found.items()} == {
        "stem": 16 * positions * 3 * 27,
        "block.dw": 16 * positions * 27,
        "block.pw": 32 * positions * 16,
    }
    plan = redconvert.plan(model, example_inputs=CLIP)
    assert plan.dense_macs == positions * (16 * 81 + 16 * 27 + 32 * 16)
    # Half the channels of half the frames; one multiply per rebuilt channel, two per rebuilt frame; the gate.
    gate = 3 * 4 * 64 + 12 * 4 + 4 * 4
    assert found["stem"].lowest_macs == 8 * 32 * 81 + 8 * 32 + 2 * 2 * 16 * 16 + gate
    assert found["stem"].channels == (16, 8) and found["stem"].strides == (1, 2)
    assert plan.lowest_macs < plan.dense_macs


def test_macs_of_calls_and_folded_frames():
    shared = redconvert.plan(traps.Shared(), example_inputs=CLIP).verdicts[1]
    assert shared.dense_macs == 2 * (16 * 16 * 27) * (4 * 8 * 8)  # shapes of its first call
    image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    single = redconvert.plan(image, example_inputs=torch.ones(8, 3, 10, 10))
    assert single.dense_macs == 16 * 27 * 64
    clips = redconvert.plan(image, ConvertConfig(num_frames=4), example_inputs=torch.ones(8, 3, 10, 10))
    assert clips.dense_macs == 4 * single.dense_macs
    assert clips.verdicts[0].strides == (1, 2) and single.verdicts[0].strides == (1,)


def test_the_batch_of_the_example_does_not_count(model):
    totals = {redconvert.plan(model, example_inputs=CLIP[:1].repeat(n, 1, 1, 1, 1)).dense_macs for n in (1, 2, 3)}
    assert len(totals) == 1


def test_round_trips(model):
    plan = redconvert.plan(model, example_inputs=CLIP)
    read = json.loads(plan.to_json())
    assert read["dense_macs"] == plan.dense_macs and read["num_converted"] == len(plan.converted)
    assert read["verdicts"][0]["facts"]["output_shape"] == [2, 16, 4, 4, 4]
    assert [v["name"] for v in read["verdicts"]] == ["stem", "block.dw", "block.pw"]
    assert str(plan).splitlines()[-1] == f"Net: {len(plan.converted)} of 3 converted, read by fx"


# -- why not -------------------------------------------------------------------------------------------


def reason(conv, inputs=CLIP, **options):
    network = nn.Sequential(conv, nn.ReLU(), nn.Conv3d(conv.out_channels, 64, 3, padding=1), nn.ReLU())
    if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
        network[2] = nn.Conv2d(conv.out_channels, 64, 3, padding=1)
    found = verdicts(network, ConvertConfig(**options), inputs)["0"]
    return "" if found.converted else found.reason


def test_reasons():
    assert "transposed or 1D" in reason(nn.ConvTranspose3d(3, 8, 3))
    assert reason(nn.Conv3d(3, 1, 3), temporal=False) == "one output channel"
    assert reason(nn.Conv3d(3, 8, 3), temporal=False, align=8) == "nothing to choose from"
    assert reason(nn.Conv3d(3, 8, 3), min_saving=0.9).startswith("too small to pay: its lowest candidate saves")
    assert "depthwise with nothing to save" in reason(nn.Conv3d(3, 3, 1, groups=3), min_saving=0.9)
    assert reason(nn.Conv3d(3, 8, 3)) == ""
    one_frame = torch.ones(2, 3, 1, 8, 8)
    image = nn.Conv2d(3, 16, 3)
    assert "one channel" not in reason(image, torch.ones(2, 3, 8, 8))
    with pytest.raises(RedconvertError, match=r"1 frames.*fewer than the largest temporal stride 2"):
        reason(nn.Conv3d(3, 8, 1), one_frame)


def test_one_output_frame():
    network = nn.Sequential(nn.Conv3d(3, 16, (4, 3, 3)), nn.ReLU())
    (verdict,) = redconvert.plan(network, example_inputs=CLIP).verdicts
    assert verdict.converted and verdict.strides == (1,) and verdict.reason == "channels only: one output frame"
    with pytest.raises(RedconvertError, match=r"nothing to convert.*one output frame: nothing to skip in time"):
        redconvert.convert(network, ConvertConfig(channel=False), example_inputs=CLIP)
    with pytest.raises(RedconvertError, match="no time axis: give num_frames, or channel=True"):
        redconvert.convert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), ConvertConfig(channel=False))


# -- rules ---------------------------------------------------------------------------------------------


def converted(model, *rules, **options):
    return set(dynamic_layers(redconvert.convert(model, config(*rules, min_saving=0, **options), example_inputs=CLIP)))


def test_patterns(model):
    everything = {"stem", "block.dw", "block.pw"}
    assert converted(model) == everything
    assert converted(model, ("stem", None)) == everything - {"stem"}
    assert converted(model, ("block*", None)) == {"stem"}  # * crosses dots
    assert converted(model, ("*.?w", None)) == {"stem"}
    assert converted(model, ("re:block\\.d.", None)) == everything - {"block.dw"}
    assert converted(model, ("re:block\\.(dw|pw)", None)) == {"stem"}
    assert converted(model, (lambda name, m: m.groups > 1, None)) == everything - {"block.dw"}
    assert converted(model, (lambda name, m: name.endswith("pw"), None)) == everything - {"block.pw"}
    subclass = nn.Sequential(traps.Inherits(3, 16), nn.ReLU(), traps.conv3(16, 16), nn.ReLU())
    assert converted(subclass, (traps.Inherits, None)) == {"2"}


def test_the_first_match_wins(model):
    assert converted(model, ("stem", {}), ("*", None)) == {"stem"}
    with pytest.raises(RedconvertError, match="excluded by rule 1"):
        converted(model, ("*", None), ("stem", {}))


def test_settings(model):
    chosen = config(("stem", {"search_space": 3}), ("block.pw", LayerConfig(temporal=False)), align=4, min_saving=0)
    layers = dynamic_layers(redconvert.convert(model, chosen, example_inputs=CLIP))
    assert layers["stem"].candidates.channels == (16, 8, 4) and layers["stem"].config.align == 4  # a mapping changes
    assert layers["block.pw"].candidates.strides == (1,) and layers["block.pw"].config.align == 1  # a config is whole
    assert layers["block.dw"].config == chosen.default


def test_an_explicit_rule_overrides_min_saving(model):
    assert converted(model, ("block.dw", {})) >= {"block.dw"}
    dear = config(("block.dw", {}), min_saving=0.99)
    assert set(dynamic_layers(redconvert.convert(model, dear, example_inputs=CLIP))) == {"block.dw"}


@pytest.mark.parametrize("pattern", ["nowhere", "re:stem.+", nn.Conv2d, lambda name, module: False, "Stem"])
def test_a_rule_that_matches_nothing(model, pattern):
    with pytest.raises(RedconvertError, match=r"rule 2 .*matches none of the 3 convolutions \(stem, block.dw, "):
        redconvert.plan(model, config(("stem", None), (pattern, None)), example_inputs=CLIP)


def test_a_rule_that_others_shadow_is_no_error(model):
    assert converted(model, ("block.*", None), ("block.dw", {})) == {"stem"}
