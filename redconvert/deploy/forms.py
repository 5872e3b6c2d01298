"""The forms of a network that `bench` times beside the deployed one: dense, and what `torch.compile` makes of it."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..convert import revert
from ..inputs import call_with, evaluating
from ..layers import DynamicConv, Observation, dynamic_layers, forced, observed
from ..layers.macs import LayerMacs, layer_macs
from .frozen import freeze

__all__ = [
    "DECISIONS",
    "Form",
    "compiled_network",
    "dense_forms",
    "dynamic_forms",
    "frozen_macs",
    "in_channels_last",
    "possible_decisions",
]

DECISIONS = {"all open": (0, 0), "channels": (1, 0), "frames": (0, 1), "channels and frames": (1, 1)}
Call = Callable[[], Any]


@dataclass(frozen=True)
class Form:
    """What to call, how many seconds passed until its first result, and MACs per sample where they are not dense."""

    call: Call
    setup_s: float
    macs: float | None = None


def dense_forms(dynamic: nn.Module, inputs: Any, compiled: bool) -> Iterator[tuple[str, Form]]:
    """The original network: as it was, in channels-last memory, with norms folded, compiled. What fails is left out."""
    eager = revert(copy.deepcopy(dynamic)).eval()
    last, laid_out = in_channels_last(copy.deepcopy(eager), inputs)
    made: dict[str, tuple[Callable[[], Any], Any]] = {
        "eager": (lambda: eager, inputs),
        "channels last": (lambda: last, laid_out),
        "folded": (lambda: _folded(last), laid_out),
    }
    if compiled:
        made["compiled"] = (lambda: compiled_network(last, laid_out), laid_out)
    for name, (make, given) in made.items():
        yield from _started(name, make, given, None)


def dynamic_forms(dynamic: nn.Module, inputs: Any, one: Any, dense_macs: float) -> Iterator[tuple[str, Form]]:
    """The dynamic network compiled: masked, where gates decide and everything is computed, and frozen to each decision.

    Args:
        one: an input of one sample, to count MACs with; those of the dense network are ``dense_macs``.
    """
    networks: dict[str, tuple[Callable[[], nn.Module], float]] = {
        "masked": (lambda: copy.deepcopy(dynamic), dense_macs + _added(dynamic, one, (0, 0), _masked))
    }
    for name, decision in possible_decisions(dynamic).items():
        if decision != (0, 0):
            macs = frozen_macs(dynamic, one, decision, dense_macs)
            networks[f"frozen, {name}"] = partial(freeze, dynamic, decision), macs
    for name, (build, macs) in networks.items():
        network, given = in_channels_last(build().eval(), inputs)
        make = partial(compiled_network, network, given)
        yield from _started(f"compiled, {name}", make, given, macs)


def frozen_macs(dynamic: nn.Module, one: Any, decision: tuple[int, int], dense_macs: float) -> float:
    """Of one sample through the network frozen to a decision; those of the dense network are ``dense_macs``."""

    def count(macs: LayerMacs) -> float:
        i, j = min(decision[0], len(macs.conv) - 1), min(decision[1], len(macs.conv[0]) - 1)
        return macs.convolved(i, j, min(decision[0], len(macs.reads) - 1)) + macs.cheap[i][j] - macs.dense

    return dense_macs + _added(dynamic, one, decision, count)


def _masked(macs: LayerMacs) -> float:
    """What the masked mode adds to the convolution: the gate, cheap operations, and readings of fewer channels."""
    readings = sum(macs.convolved(0, 0, source) for source in range(1, len(macs.reads)))
    return macs.gate + readings + sum(row[0] for row in macs.cheap[1:]) + sum(macs.cheap[0][1:])


def _added(dynamic: nn.Module, one: Any, decision: tuple[int, int], count: Callable[[LayerMacs], float]) -> float:
    """The sum over all calls of all layers for one sample."""
    found: list[float] = []

    def listen(layer: DynamicConv, seen: Observation) -> None:
        found.append(count(layer_macs(layer, seen.input_shape, seen.output_shape)))

    with forced(dynamic, channel=decision[0], temporal=decision[1]), observed(dynamic, listen), evaluating(dynamic):
        call_with(dynamic, one)
    return sum(found)


def possible_decisions(dynamic: nn.Module) -> dict[str, tuple[int, int]]:
    """Those of DECISIONS that at least one layer can take."""
    candidates = [layer.candidates for layer in dynamic_layers(dynamic).values()]
    axes = max(len(each.channels) for each in candidates) > 1, max(len(each.strides) for each in candidates) > 1
    return {name: (i, j) for name, (i, j) in DECISIONS.items() if (axes[0] or not i) and (axes[1] or not j)}


def _started(name: str, make: Callable[[], Any], given: Any, macs: float | None) -> Iterator[tuple[str, Form]]:
    begin = time.perf_counter()
    try:
        network = make()
        call_with(network, given)
    except Exception as error:  # fx or the compiler cannot read it
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return
    yield name, Form(lambda: call_with(network, given), time.perf_counter() - begin, macs)


def _folded(network: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(copy.deepcopy(network))


def compiled_network(network: nn.Module, inputs: Any) -> Any:
    """Compiled and called once, since freezing (on a CPU) is a setting of the process that is to hold here alone."""
    from torch._inductor import config

    found: Any = torch.compile(network)
    with config.patch(freezing=not any(p.is_cuda for p in network.parameters())):
        call_with(found, inputs)
    return found


def in_channels_last(network: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """The network, which is changed, and what it takes, both in channels-last memory."""
    clips = any(isinstance(module, nn.Conv3d) for module in network.modules())
    layout, dim = (torch.channels_last_3d, 5) if clips else (torch.channels_last, 4)

    def lay(leaf: Any) -> Any:
        fits = isinstance(leaf, torch.Tensor) and leaf.dim() == dim
        return leaf.contiguous(memory_format=layout) if fits else leaf

    return network.to(memory_format=layout), tree_map(lay, inputs)
