"""The planner that times: what a candidate takes decides, and nothing is changed by asking."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import redconvert
from redconvert import ConvertConfig
from redconvert.convert.judge import CandidateTimes, Verdict, reconsider
from redconvert.deploy import measure
from redconvert.layers import dynamic_layers

CLIP = torch.randn(2, 3, 8, 12, 12)


def clips_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv3d(16, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def first_verdict(**config) -> tuple[Verdict, nn.Module]:
    model = clips_network()
    plan = redconvert.plan(model, ConvertConfig(**config), example_inputs=CLIP)
    return plan.verdicts[1], model[3]


@pytest.fixture
def timed(monkeypatch):
    """Times by the hand of the test: what each layer was asked for, and what it shall take."""
    found = {}

    def time_candidates(layers, progress=False):
        found["asked"] = list(layers)
        return {name: found["times"](name) for name in layers}

    monkeypatch.setattr(measure, "time_candidates", time_candidates)
    return found


def test_the_fastest_candidate_counts():
    times = CandidateTimes(4.0, (3.0, 2.0), (5.0,))
    assert times.saving("channel") == 0.5 and times.saving("temporal") == -0.25
    assert CandidateTimes(4.0, (3.0,)).saving("temporal") is None


def test_what_pays_on_both_axes_stays():
    verdict, conv = first_verdict()
    found = reconsider(verdict, conv, CandidateTimes(4.0, (3.0,), (3.5,)), 0.1, False)
    assert found.converted and (found.channels, found.strides) == ((16, 8), (1, 2)) and found.reason == verdict.reason
    assert found.lowest_macs == verdict.lowest_macs and found.times.dense_ms == 4.0


@pytest.mark.parametrize(
    "times, channels, strides, reason",
    [
        (CandidateTimes(4.0, (3.0,), (3.92,)), (16, 8), (1,), "channels only, measured: frames save 2% of 4.00 ms"),
        (CandidateTimes(4.0, (4.8,), (2.0,)), (16,), (1, 2), "frames only, measured: channels save -20% of 4.00 ms"),
    ],
)
def test_an_axis_that_does_not_pay_is_given_up(times, channels, strides, reason):
    verdict, conv = first_verdict()
    found = reconsider(verdict, conv, times, 0.1, False)
    assert found.converted and (found.channels, found.strides) == (channels, strides)
    assert found.reason == f"{reason}, min_saving is 10%"
    assert found.config.channel == (len(channels) > 1) and found.config.temporal == (len(strides) > 1)
    axis = {"temporal": False} if len(strides) == 1 else {"channel": False}
    alone, _ = first_verdict(**axis)
    assert found.lowest_macs == alone.lowest_macs > verdict.lowest_macs


def test_a_layer_that_does_not_pay_stays_dense():
    verdict, conv = first_verdict()
    found = reconsider(verdict, conv, CandidateTimes(1.0, (0.95,), (1.5,)), 0.1, False)
    assert not found.converted and found.config is None and found.lowest_macs is None and found.channels == ()
    assert found.reason == "measured: channels save 5% and frames save -50% of 1.00 ms, min_saving is 10%"
    assert found.dense_macs == verdict.dense_macs and found.times.channel_ms == (0.95,)


def test_a_rule_has_the_last_word():
    verdict, conv = first_verdict()
    found = reconsider(verdict, conv, CandidateTimes(1.0, (2.0,), (2.0,)), 0.1, True)
    assert found.converted and found.reason == verdict.reason and found.times.channel_ms == (2.0,)


def test_convert_follows_the_times(timed):
    model = clips_network()
    fast, slow = CandidateTimes(1.0, (0.5,), (0.5,)), CandidateTimes(1.0, (1.1,), (1.1,))
    timed["times"] = lambda name: slow if name == "3" else fast
    dynamic = redconvert.convert(model, example_inputs=CLIP, measure=True)
    assert timed["asked"] == ["0", "3", "6"]
    assert list(dynamic_layers(dynamic)) == ["0", "6"]
    assert torch.equal(dynamic(CLIP), model(CLIP))


def test_only_what_would_be_converted_is_timed(timed):
    timed["times"] = lambda name: CandidateTimes(1.0, (0.5,), (0.5,))
    config = ConvertConfig(rules={"3": None})
    plan = redconvert.plan(clips_network(), config, example_inputs=CLIP, measure=True)
    assert timed["asked"] == ["0", "6"] and [verdict.name for verdict in plan.converted] == ["0", "6"]
    assert '"dense_ms": 1.0' in plan.to_json()


def test_timing_needs_shapes():
    with pytest.raises(redconvert.RedconvertError, match="give example_inputs"):
        redconvert.plan(clips_network(), measure=True)


def test_layers_alike_are_timed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "_timed", lambda conv, verdict: calls.append(verdict.name) or verdict.name)
    plan = redconvert.plan(model := clips_network(), example_inputs=CLIP)
    layers = {verdict.name: (model.get_submodule(verdict.name), verdict) for verdict in plan.converted}
    assert measure.time_candidates(layers) == {"0": "0", "3": "3", "6": "3"} and sorted(calls) == ["0", "3"]


@pytest.mark.parametrize(
    "layer, shape, config, counts",
    [
        (nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), bias=False), (2, 8, 5, 7, 7), {}, (1, 1)),
        (nn.Conv3d(8, 8, 3, groups=2), (1, 8, 8, 9, 9), {"search_space": 3}, (1, 2)),
        (nn.Conv2d(8, 16, 3, stride=2), (3, 8, 9, 9), {}, (1, 0)),
        (nn.Conv2d(8, 16, 1), (6, 8, 5, 5), {"num_frames": 3}, (1, 1)),
        (nn.Conv2d(8, 16, 3, padding="same"), (1, 8, 5, 5), {}, (1, 0)),
        (nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), (1, 8, 5, 5), {"gate": "soft"}, (1, 0)),
        (nn.Conv2d(8, 16, 3, dtype=torch.bfloat16), (1, 8, 9, 9), {}, (1, 0)),
    ],
)
def test_every_kind_of_layer_can_be_timed(layer, shape, config, counts):
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(1)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind, x = type(layer), torch.randn(shape, dtype=layer.weight.dtype)
    plan = redconvert.plan(model, ConvertConfig(**config, min_saving=0.0), example_inputs=x, measure=True)
    (verdict,) = plan.verdicts
    assert verdict.times is not None and verdict.times.dense_ms > 0
    assert (len(verdict.times.channel_ms), len(verdict.times.temporal_ms)) == counts
    assert min(verdict.times.channel_ms + verdict.times.temporal_ms) > 0
    assert type(model[0]) is kind and model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_on_this_machine_a_large_layer_pays_and_a_tiny_one_does_not():
    large = nn.Conv3d(96, 96, 3, padding=1)
    tiny = nn.Conv3d(96, 8, 1)
    model = nn.Sequential(large, nn.ReLU(), tiny, nn.ReLU(), nn.Flatten(1)).eval()
    x, found = torch.randn(1, 96, 8, 14, 14), []
    for _ in range(4):  # whoever else computes on this machine may spoil some
        plan = redconvert.plan(model, example_inputs=x, measure=True)
        savings = [plan.verdicts[0].times.saving(axis) for axis in ("channel", "temporal")]
        found.append((min(savings) > 0.1, [verdict.name for verdict in plan.converted]))
    assert (True, ["0"]) in found


def test_absorbed_channels_are_not_rebuilt(monkeypatch):
    """A source is timed as it runs: its candidates hand on what they compute alone, and pairs stay pairs."""
    model = nn.Sequential(
        *(nn.Conv3d(8, 64, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(64), nn.ReLU()),
        *(nn.Conv3d(64, 48, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(48), nn.ReLU()),
    ).eval()
    x, widths = torch.randn(1, 8, 8, 28, 28), set()
    monkeypatch.setattr(measure, "full", lambda y: widths.add(y.shape[1]))
    rules = [("0", {}), ("3", {})]  # whatever the clock says
    config = ConvertConfig(absorb=True, temporal=False, rules=rules)
    first, second = redconvert.plan(model, config, example_inputs=x, measure=True).verdicts
    assert (first.reader, second.reader) == ("3", None)
    assert len(first.times.channel_ms) == len(second.times.channel_ms) == 1
    assert widths == {64, 32, 48}  # of the second layer all, since it rebuilds
