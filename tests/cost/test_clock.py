"""Clocks: order, warm-up, hooks; times are only compared where they differ by an order of magnitude."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from redconvert import cost
from redconvert.cost import LayerClock, Timing, clock, interleaved, share
from redconvert.errors import RedconvertError


class Sleep(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_interleaved_runs_in_turn():
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert list(times) == ["a", "b"]
    assert [len(timing.samples) for timing in times.values()] == [3, 3]


def test_a_short_run_is_timed_behind_another_one(monkeypatch):
    monkeypatch.setattr(clock, "SHORT", 0.01)
    order: list[str] = []

    def long():
        order.append("long")
        time.sleep(0.02)

    begin = time.perf_counter()
    times = interleaved({"short": lambda: order.append("short"), "long": long}, repeats=2, warmup=1, settle=True)
    assert order == ["short", "long", "short", "short", "long", "short", "short", "long"]
    assert time.perf_counter() - begin > 6 * clock.QUIET + 3 * 0.02
    assert times["short"].maximum < 0.01 and times["long"].minimum >= 0.02


def test_timing():
    assert Timing.of([3.0, 1.0, 2.0, 10.0]) == Timing(2.5, 1.0, 10.0, (3.0, 1.0, 2.0, 10.0))


def test_seconds_and_untimed_contexts():
    entered = []

    @contextmanager
    def slow_context():
        entered.append(True)
        time.sleep(0.05)
        yield
        entered.append(False)

    times = interleaved(
        {"slow": lambda: time.sleep(0.02), "fast": lambda: None}, repeats=3, within={"fast": slow_context}
    )
    assert 0.02 <= times["slow"].minimum <= times["slow"].median <= times["slow"].maximum
    assert times["fast"].median < 0.01
    assert entered == [True, False] * 4


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}, {"functions": {}}])
def test_nothing_to_time(options):
    with pytest.raises(RedconvertError, match="nothing to time"):
        interleaved(**{"functions": {"a": lambda: None}, **options})


def test_layer_clock_times_every_call():
    slow, fast = Sleep(0.02), Sleep(0.0)
    model = nn.Sequential(slow, fast, fast)
    x = torch.ones(1)
    with LayerClock({"slow": slow, "fast": fast}) as layers:
        model(x)
        model(x)
    model(x)  # no longer timed
    assert [len(seconds) for seconds in layers.seconds.values()] == [2, 4]
    assert min(layers.seconds["slow"]) >= 0.02
    assert max(layers.seconds["fast"]) < 0.02
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_layer_clock_survives_errors():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), LayerClock({"linear": model}):
        model(torch.ones(1, 3))
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_share():
    assert share(10.0, 7.0, 100, 50) == pytest.approx(0.6)
    assert share(10.0, 12.0, 100, 60) == pytest.approx(-0.5)
    assert share(10.0, 5.0, 100, 50) == 1.0
    assert share(10.0, 5.0, 100, 100) is None
    assert share(10.0, 5.0, 100, 101) is None
    assert share(0.0, 5.0, 100, 50) is None


def test_waits_for_gpus_only(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    interleaved({"a": lambda: None}, repeats=2, device="cpu")
    assert waited == []
    interleaved({"a": lambda: None}, repeats=2, device="cuda:1")
    assert waited == ["cuda:1"] * 6
    clock.synchronize(None)
    assert len(waited) == 6


def test_public_names():
    assert all(hasattr(cost, name) for name in cost.__all__)
