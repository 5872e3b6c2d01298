"""Budgets of time: the least harm that so many milliseconds allow, found by trying everything."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from budget_networks import batches, conv2, decisions, network
from torch import nn

import redconvert
from redconvert import LayerTimes, RedconvertError, set_budget
from redconvert.budget import budget_curve, harms
from redconvert.errors import BudgetTooLowError
from redconvert.layers import dynamic_layers
from redconvert.layers.absorb import pairs


def invented(dynamic: nn.Module, seed: int = 0) -> LayerTimes:
    """Times that have nothing to do with multiply-adds."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in dynamic_layers(dynamic).items():
        sources = 1 if layer.reads_from is None else len(layer.reads_from.channels)
        shape = len(layer.candidates.channels), len(layer.candidates.strides), sources
        found = torch.rand(shape, generator=generator, dtype=torch.float64).mul(0.6).add(0.1)
        found[0, 0] = 1.2  # dense is slowest, wherever its input comes from
        layers[name] = found.tolist()
    return LayerTimes(0.5 + 1.2 * len(layers), 0.5, layers, {"device": "invented"})


def everything(dynamic: nn.Module, data: list, times: LayerTimes) -> list[tuple[float, float, tuple]]:
    """Milliseconds, harm and decisions of every way to decide."""
    layers, effects, found = dynamic_layers(dynamic), harms(dynamic, data), []
    sources = {reader: source for source, reader in pairs(layers).items()}
    axes = [
        list(itertools.product(range(len(e.candidates.channels)), range(len(e.candidates.strides))))
        for e in layers.values()
    ]
    for combination in itertools.product(*axes):
        chosen = dict(zip(layers, combination, strict=True))
        ms = times.rest_ms + sum(
            times.layers[name][i][j][chosen[sources[name]][0] if name in sources else 0]
            for name, (i, j) in chosen.items()
        )
        found.append((ms, sum(float(effects[name][decision]) for name, decision in chosen.items()), combination))
    return found


def absorbing() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    body = [conv2(3), nn.BatchNorm2d(16), nn.ReLU(), conv2(16), nn.BatchNorm2d(16), nn.ReLU(), conv2(16), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    config = redconvert.ConvertConfig(rules=[("*", {})], shares=(0.5, 0.25), absorb=True)
    data = batches("2d")
    dynamic = redconvert.convert(model, config, example_inputs=data[0])
    redconvert.calibrate(dynamic, data)
    assert len(pairs(dynamic_layers(dynamic))) == 2
    return dynamic, data


@pytest.mark.parametrize("kind", ["2d", "2d of three", "3d", "time alone", "groups", "folded", "twice", "absorbed"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_the_least_harm_for_the_time(kind, share):
    dynamic, data = absorbing() if kind == "absorbed" else (network(kind), batches(kind))
    times = invented(dynamic)
    ways = everything(dynamic, data, times)
    least, most = min(way[0] for way in ways), max(way[0] for way in ways)
    budget = (least + share * (most - least)) / times.dense_ms
    fitting = [way for way in ways if way[0] <= budget * times.dense_ms]
    assert 0 < len(fitting) < len(ways)
    best = min(fitting, key=lambda way: way[1])
    found = set_budget(dynamic, budget, data, times=times)
    taken = decisions(dynamic, data[0])
    assert tuple(next(iter(taken[name]))[:2] for name in times.layers) == best[2]
    assert found.time == pytest.approx(best[0] / times.dense_ms) and found.time <= budget
    assert 2 * sum(found.harms.values()) == pytest.approx(best[1], rel=1e-6)
    assert found.by == "layers" and f"expected to take {found.time:.1%} of the dense time" in str(found)


def test_multiply_adds_choose_otherwise():
    """The layer that costs most multiply-adds is free here, and stays whole."""
    dynamic, data = network("2d"), batches("2d")
    layers = dynamic_layers(dynamic)
    times = LayerTimes(3.0, 0.0, {name: [[[1.0]], [[0.5]]] for name in layers}, {})
    times.layers["convs.1"] = [[[1.0]], [[1.0]]]
    found = set_budget(dynamic, 0.67, data, times=times)
    chosen = {name: taken[0][0] for name, taken in decisions(dynamic, data[0]).items()}
    assert chosen == {"convs.0": 1, "convs.1": 0, "convs.2": 1} and found.time == pytest.approx(2 / 3)


def test_curve_of_times():
    dynamic, data = network("2d"), batches("2d")
    times = invented(dynamic)
    curve = budget_curve(dynamic, data, (0.9, 0.7, 0.01), times=times, keep=0.0)
    assert [point.budget for point in curve.points] == [0.9, 0.7] and curve.unreachable == (0.01,)
    for point in curve.points:
        assert point.cost == point.time <= point.budget
    now = set_budget(dynamic, 0.7, data, times=times)
    assert curve.points[1].time == now.time and curve.points[1].share == pytest.approx(now.mean)
    assert str(curve).splitlines()[0].split()[-1] == "time"
    assert str(curve).splitlines()[2].split()[-1] == f"{now.time:.1%}"


def test_a_curve_keeps_the_one_that_takes_least_time():
    dynamic, data = network("2d"), batches("2d")
    names = list(dynamic_layers(dynamic))
    # What saves most multiply-adds takes longest.
    times = LayerTimes(4.0, 1.0, {name: [[[1.0]], [[0.2 + 0.3 * i]]] for i, name in enumerate(names)}, {})
    curve = budget_curve(dynamic, data, (0.85, 0.65), times=times, keep=0.0)
    assert curve.cheapest(0.0) == min(curve.points, key=lambda point: point.time)
    assert set_budget(dynamic, 0.65, data, times=times).time == curve.cheapest(0.0).time


def test_as_json_and_text(tmp_path):
    times = invented(network("3d"))
    again = LayerTimes.from_json(times.to_json(tmp_path / "times.json"))
    assert again == times and LayerTimes.from_json(tmp_path / "times.json") == times
    assert json.loads(times.to_json())["rest_ms"] == 0.5
    assert str(times).splitlines()[-1] == f"the rest 0.5 ms; all of it dense {times.dense_ms:.1f} ms"
    for bad in ("{}", "[1]", "{", tmp_path / "none.json"):
        with pytest.raises(RedconvertError, match="no times that LayerTimes"):
            LayerTimes.from_json(bad)


def test_refusals():
    dynamic, data = network("2d"), batches("2d")
    before = {key: value.clone() for key, value in dynamic.state_dict().items()}
    times = invented(dynamic)
    least = min(way[0] for way in everything(dynamic, data, times)) / times.dense_ms
    with pytest.raises(BudgetTooLowError, match=rf"{math.ceil(1e4 * least) / 1e4:.4f} of its dense time"):
        set_budget(dynamic, 0.01, data, times=times)
    with pytest.raises(RedconvertError, match=r"by='layers', not 'gates'"):
        set_budget(dynamic, 0.8, data, by="gates", times=times)
    with pytest.raises(RedconvertError, match=r"'convs.2' has 2 channel and 1 temporal candidates, .* of none"):
        set_budget(dynamic, 0.8, data, times=LayerTimes(1.0, 0.1, dict(list(times.layers.items())[:2]), {}))
    with pytest.raises(RedconvertError, match=r"'convs.0' has 2 channel and 1 temporal .* are of \(3, 1\)"):
        set_budget(dynamic, 0.8, data, times=invented(network("2d of three")))
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())
