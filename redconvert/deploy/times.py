"""`redconvert.layer_times`: what every decision of every layer takes where the network is deployed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from ..cost import LayerClock
from ..cost.clock import synchronize
from ..cost.measure import describe_environment
from ..cost.times import LayerTimes
from ..errors import RedconvertError
from ..inputs import call_with, device_of, move_to, unwrapped
from ..layers import DynamicConv, dynamic_layers
from ..layers.absorb import pairs, told
from ..layers.modes import attributes
from ..progress import progress_bar
from .engine import Deployed, deploy

__all__ = ["layer_times"]

Taken: TypeAlias = tuple[int, int, int]  # channel candidate, temporal candidate, channel candidate of what is read


@torch.no_grad()
def layer_times(dynamic: nn.Module, example_inputs: Any, *, repeats: int = 5, progress: bool = False) -> LayerTimes:
    """Time each layer's decisions in the deployed network, here: what ``set_budget(times=...)`` chooses by.

    Multiply-adds are not milliseconds: a layer that is bound by memory, or that rebuilds much, saves less time than
    work. The whole network runs with all layers at one candidate after the other, each layer under its own clock; a
    layer that reads what another hands over meets each of that one's candidates. Gates are left out, as a budget by
    layers leaves nothing to ask them. Weights of all candidates are packed for it, and freed at the end. Stop other
    work meanwhile, and give inputs of the size and the batch that will be used.

    Args:
        dynamic: what `redconvert.convert` returned; it is not changed. Calibrate it first: copied frames, as at
            conversion, are faster than blended ones.
        example_inputs: what the network takes.
        repeats: timed runs of each candidate; medians are taken.
        progress: show a bar on stderr (needs rich).

    Raises:
        RedconvertError: no dynamic layers, fewer than one repeat, or whatever `deploy` refuses.
    """
    if repeats < 1:
        raise RedconvertError(f"repeats={repeats} must be at least 1")
    fast = dynamic if isinstance(dynamic, Deployed) else deploy(unwrapped(dynamic), example_inputs, check=False)
    layers, inputs = dynamic_layers(fast.network), move_to(example_inputs, device_of(fast.network))
    policies = list(_policies(layers))
    samples: dict[str, dict[Taken, list[float]]] = {name: defaultdict(list) for name in layers}
    rest = []
    with progress_bar(progress, "Timing decisions", (repeats + 1) * len(policies)) as step:
        for run, policy in itertools.product(range(repeats + 1), policies):
            seconds, whole = _run(fast, layers, policy, inputs)
            if run:  # the first packs weights and chooses forms
                for name, found in seconds.items():
                    samples[name][policy[name]].append(found)
                if not any(map(any, policy.values())):
                    rest.append(whole - sum(seconds.values()))
            step()
    rest_ms = round(1000 * max(statistics.median(rest), 0.0), 5)
    tables = {name: _table(samples[name]) for name in layers}
    dense_ms = rest_ms + sum(table[0][0][0] for table in tables.values())
    return LayerTimes(round(dense_ms, 5), rest_ms, tables, describe_environment(fast.network, inputs))


def _policies(layers: Mapping[str, DynamicConv]) -> Iterator[dict[str, Taken]]:
    """What all layers take at once, such that each meets all of its decisions, and of those it reads."""
    readers, sources = pairs(layers), told(layers)
    odd = {name: _depth(name, sources) % 2 for name in layers}
    channels = range(max(len(layer.candidates.channels) for layer in layers.values()))
    strides = range(max(len(layer.candidates.strides) for layer in layers.values()))
    for j, (first, second) in itertools.product(strides, itertools.product(channels, channels if readers else (None,))):
        wanted = {name: second if odd[name] else first for name in layers}
        taken = {name: layers[name].candidates.nearest("channel", wanted[name] or 0) for name in layers}
        yield {
            name: (taken[name], layer.candidates.nearest("temporal", j), taken.get(sources.get(name, ""), 0))
            for name, layer in layers.items()
        }


def _depth(name: str, sources: Mapping[str, str]) -> int:
    """How many layers hand over before this one in its chain."""
    return 1 + _depth(sources[name], sources) if name in sources else 0


def _run(
    fast: Deployed, layers: Mapping[str, DynamicConv], policy: Mapping[str, Taken], inputs: Any
) -> tuple[dict[str, float], float]:
    """Seconds in each layer, and of the whole call."""
    modules = {name: fast.stand_in(layer) for name, layer in layers.items()}
    with _taking(layers, policy), LayerClock(modules, device_of(fast.network)) as clock:
        start = time.perf_counter()
        call_with(fast, inputs)
        synchronize(clock.device)
        whole = time.perf_counter() - start
    return {name: sum(seconds) for name, seconds in clock.seconds.items()}, whole


@contextmanager
def _taking(layers: Mapping[str, DynamicConv], policy: Mapping[str, Taken]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(attributes([layer], forced=policy[name][:2]))
        yield


def _table(samples: Mapping[Taken, list[float]]) -> list[list[list[float]]]:
    """Medians in milliseconds, ``[i][j][s]``."""
    counts = [range(max(taken[axis] for taken in samples) + 1) for axis in range(3)]
    return [
        [[round(1000 * statistics.median(samples[i, j, s]), 5) for s in counts[2]] for j in counts[1]]
        for i in counts[0]
    ]
