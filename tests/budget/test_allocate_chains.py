"""The knapsack where a layer's cost depends on what the layer in front of it chose."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import redconvert
from redconvert.budget.allocate import Choice, allocate
from redconvert.layers import dynamic_layers


@st.composite
def problems(draw):
    """Up to five layers, some of which read the one before, with up to one each that follows that one."""
    count = draw(st.integers(1, 5))
    sizes = [draw(st.integers(1, 3)) for _ in range(count)]
    sources, followed, options = {}, {}, {}

    def add(name, size, states):
        options[name] = []
        for i in range(size):
            costs = sorted((draw(st.integers(1, 40)) for _ in range(states)), reverse=True)
            harm = float(draw(st.integers(0, 50))) if i else 0.0
            options[name].append(Choice(i, 0, harm, costs[0], tuple(map(float, costs))))

    for n, size in enumerate(sizes):
        states = 1
        if n and draw(st.booleans()):
            sources[f"l{n}"], states = f"l{n - 1}", sizes[n - 1]
            if draw(st.booleans()):
                followed[f"f{n}"] = f"l{n - 1}"
                add(f"f{n}", draw(st.integers(1, 2)), states)
        add(f"l{n}", size, states)
    return options, sources, followed, draw(st.integers(1, 150))


def cost(chosen, told):
    return sum(choice.cost(chosen[told[name]].channel if name in told else 0) for name, choice in chosen.items())


@settings(max_examples=200, deadline=None)
@given(problems())
def test_no_choice_is_better(problem):
    options, sources, followed, budget = problem
    found, sources = allocate(options, budget, sources, followed), {**sources, **followed}
    every = [dict(zip(options, each, strict=True)) for each in product(*options.values())]
    fitting = [each for each in every if cost(each, sources) <= budget]
    if not fitting:
        return
    best = min(sum(choice.harm for choice in each.values()) for each in fitting)
    assert cost(found, sources) <= budget
    assert sum(choice.harm for choice in found.values()) == best


def test_a_source_elsewhere_counts_for_nothing():
    """A layer whose source did not run is priced as if all channels were there."""
    options = {"a": [Choice(0, 0, 0.0, 8.0, (8.0, 4.0)), Choice(1, 0, 1.0, 4.0, (4.0, 2.0))]}
    assert allocate(options, 5.0, {"a": "absent"})["a"].channel == 1
    assert allocate(options, 8.0, {"a": "absent"})["a"].channel == 0


def test_a_budget_over_chains_is_met():
    """By layers, the executed MACs end below the budget and above it less one step."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3 if n == 0 else 16, 16, 3, padding=1) for n in range(5)]
    body = [part for conv in convs for part in (conv, nn.BatchNorm2d(16), nn.ReLU())]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.randn(16, 3, 12, 12)
    config = redconvert.ConvertConfig(absorb=True, search_space=3, temporal=False)
    dynamic = redconvert.convert(model, config, example_inputs=x)
    assert sum(layer.hands_to is not None for layer in dynamic_layers(dynamic).values()) == 4
    redconvert.calibrate(dynamic, [x])
    for budget in (0.8, 0.5, 0.25):
        found = redconvert.set_budget(dynamic, budget, [x], by="layers")
        assert budget - 0.1 < found.mean <= budget
        report = redconvert.report(dynamic, [x], time=False)
        assert abs(report.executed_macs / report.dense_macs - found.mean) < 1e-6
