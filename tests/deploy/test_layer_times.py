"""Times of every decision: which runs they come from, and that the deployed network is what is timed."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch import nn

import redconvert
from redconvert import RedconvertError, layer_times
from redconvert.layers import dynamic_layers
from redconvert.layers.absorb import pairs

CLIP, IMAGE = torch.randn(1, 3, 4, 8, 8), torch.randn(2, 3, 8, 8)


def network(dims: int, shares: tuple[float, ...] = (0.5, 0.25), absorb: bool = True) -> nn.Module:
    torch.manual_seed(0)
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    body: list[nn.Module] = []
    for c_in, c_out in ((3, 16), (16, 16), (16, 8)):
        body += [conv(c_in, c_out, 3, padding=1), norm(c_out), nn.ReLU()]
    pool = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.AdaptiveAvgPool3d(1)
    model = nn.Sequential(*body, pool, nn.Flatten(), nn.Linear(8, 5)).eval()
    config = redconvert.ConvertConfig(rules=[("*", {})], shares=shares, absorb=absorb)
    return redconvert.convert(model, config, example_inputs=IMAGE if dims == 2 else CLIP)


@pytest.fixture
def by_hand(monkeypatch):
    """A clock that does not tick: what a layer takes is said by its decision, and counted how often."""
    seen: Counter = Counter()
    module = sys.modules["redconvert.deploy.times"]
    run = module._run

    def said(fast, layers, policy, inputs):
        seconds, _ = run(fast, layers, policy, inputs)
        assert all(fast.stand_in(layer) is not layer for layer in layers.values())  # their fused selves are timed
        assert set(seconds) == set(layers) and all(each > 0 for each in seconds.values())
        seen.update((name, *taken) for name, taken in policy.items())
        found = {name: 1e-3 * (9 - i) + 1e-4 * (9 - j) + 1e-5 * (9 - s) for name, (i, j, s) in policy.items()}
        return found, sum(found.values()) + 0.007

    monkeypatch.setattr(module, "_run", said)
    return seen


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("absorb", [False, True])
def test_every_decision_behind_every_source(by_hand, dims, absorb):
    dynamic = network(dims, absorb=absorb)
    layers = dynamic_layers(dynamic)
    times = layer_times(dynamic, IMAGE if dims == 2 else CLIP, repeats=2)
    assert len(pairs(layers)) == (2 if absorb else 0)
    assert times.rest_ms == pytest.approx(7.0) and times.dense_ms == pytest.approx(7.0 + 3 * 9.99)
    for name, layer in layers.items():
        sources = 3 if layer.reads_from is not None else 1
        assert (layer.reads_from is not None) == (absorb and name != "0")
        strides = len(layer.candidates.strides)
        assert strides == (2 if dims == 3 else 1)
        wanted = [
            [[(9 - i) + 0.1 * (9 - j) + 0.01 * (9 - s) for s in range(sources)] for j in range(strides)]
            for i in range(3)
        ]
        torch.testing.assert_close(torch.tensor(times.layers[name]), torch.tensor(wanted))
        for i in range(3):
            for j in range(strides):
                assert all(by_hand[name, i, j, s] >= 3 for s in range(sources))
    assert times.prices(layers)["0"][1, 0] == (pytest.approx(8.99),)


def test_layers_of_fewer_candidates(by_hand):
    """They take their cheapest where the others have more."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    rules = [("0", {"shares": (0.75, 0.5, 0.25)}), ("2", {"shares": (0.5,)})]
    config = redconvert.ConvertConfig(rules=rules)
    dynamic = redconvert.convert(nn.Sequential(*body).eval(), config, example_inputs=IMAGE)
    times = layer_times(dynamic, IMAGE, repeats=1)
    assert [len(table) for table in times.layers.values()] == [4, 2]
    assert by_hand["2", 1, 0, 0] == 3 * by_hand["2", 0, 0, 0]


def test_measured():
    """A real clock: what is set by it runs, and forced modes, gates and thresholds are as before."""
    dynamic = network(3)
    before = {key: value.clone() for key, value in dynamic.state_dict().items()}
    times = layer_times(dynamic, CLIP, repeats=2, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())
    assert all(layer.forced == (None, None) for layer in dynamic_layers(dynamic).values())
    assert all(each > 0 for table in times.layers.values() for row in table for one in row for each in one)
    assert times.environment["batch_shape"] == [[1, 3, 4, 8, 8]] and times.environment["threads"] > 0
    again = layer_times(redconvert.deploy(dynamic, CLIP), CLIP, repeats=1)
    assert {name: torch.tensor(t).shape for name, t in again.layers.items()} == {
        name: torch.tensor(t).shape for name, t in times.layers.items()
    }


def test_refusals():
    dynamic = network(2)
    with pytest.raises(RedconvertError, match="repeats=0 must be at least 1"):
        layer_times(dynamic, IMAGE, repeats=0)
    with pytest.raises(RedconvertError, match="no dynamic layers"):
        layer_times(nn.Conv2d(3, 3, 1), IMAGE)
