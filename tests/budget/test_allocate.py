"""Allocation against every combination there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redconvert.budget import allocate as module
from redconvert.budget.allocate import Choice, allocate


@st.composite
def instances(draw) -> tuple[dict[str, list[Choice]], int]:
    """Layers whose first choice computes everything and harms nothing, and a budget that can be met."""
    options = {}
    for name in "abcde"[: draw(st.integers(1, 5))]:
        others = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), min_size=0, max_size=4))
        options[name] = [Choice(0, 0, 0.0, draw(st.integers(1, 60)))]
        options[name] += [Choice(i, 0, harm, macs) for i, (harm, macs) in enumerate(others, start=1)]
    least = sum(min(choice.macs for choice in each) for each in options.values())
    return options, draw(st.integers(int(least), int(least) + 100))


def total(choices, what: str) -> float:
    return sum(getattr(choice, what) for choice in choices)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(instance=instances())
def test_no_combination_is_better(instance):
    options, budget = instance
    found = allocate(options, budget)
    assert list(found) == list(options) and all(found[name] in options[name] for name in options)
    fitting = [each for each in itertools.product(*options.values()) if total(each, "macs") <= budget]
    least = min(total(each, "harm") for each in fitting)
    cheapest = min(total(each, "macs") for each in fitting if total(each, "harm") == least)
    assert (total(found.values(), "harm"), total(found.values(), "macs")) == (least, cheapest)


def layers(count: int) -> dict[str, list[Choice]]:
    """Many layers of every size, with harms that have nothing to do with it."""
    return {
        str(n): [
            Choice(i, j, ((n * 7919 + 31 * i + 17 * j) % 101) * (i + j) / 101, (n % 13 + 1) * 1e7 / 2 ** (i + j) + n)
            for i in range(3)
            for j in range(3)
        ]
        for n in range(count)
    }


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
@pytest.mark.parametrize("front", [200, 10_000])
def test_many_layers_are_within_the_gap_of_the_lagrangian(share, front, monkeypatch):
    """``min_c harm + price (macs - budget)`` is a lower bound for every price."""
    monkeypatch.setattr(module, "FRONT", front)
    options = layers(50)
    budget = share * sum(each[0].macs for each in options.values()) + (1 - share) * 0.07e9
    found = allocate(options, budget)
    bound = max(
        sum(min(c.harm + price * c.macs for c in each) for each in options.values()) - price * budget
        for price in (1e-9 * 1.1**k for k in range(120))
    )
    harm = total(found.values(), "harm")
    dearest = max(choice.harm for each in options.values() for choice in each)
    assert total(found.values(), "macs") <= budget
    assert bound - 1e-9 <= harm <= bound + dearest * (0.2 if front == 10_000 else 1)


def test_tight_and_loose():
    options = layers(40)
    cheapest = {name: min(each, key=lambda c: c.macs) for name, each in options.items()}
    least, whole = total(cheapest.values(), "macs"), sum(each[0].macs for each in options.values())
    assert allocate(options, least) == allocate(options, least / 2) == cheapest
    loose = allocate(options, whole)
    assert total(loose.values(), "harm") == 0 and total(loose.values(), "macs") <= whole
    assert allocate({}, 1.0) == {}


def test_a_saving_that_harms_nothing_is_always_taken():
    options = {"a": [Choice(0, 0, 0.0, 8), Choice(1, 0, 0.0, 3), Choice(2, 0, 1.0, 2)]}
    assert allocate(options, 100)["a"].macs == 3
    assert allocate(options, 2.5)["a"].macs == 2
