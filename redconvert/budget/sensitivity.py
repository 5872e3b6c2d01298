"""What each reduction does to the answer, of every layer at once, from one backward pass per projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..answers import differentiable
from ..answers import direction as _direction
from ..errors import RedconvertError
from ..inputs import call_with, device_of, each_batch, evaluating, move_to
from ..layers import DynamicConv, Observation, dynamic_layers, forced, observed

__all__ = ["Call", "differentiable_gates", "floating", "harms", "moves_along", "recorder", "sizes"]

CERTAIN = 100.0  # as a threshold: far beyond what a gate can say
Call = tuple[DynamicConv, Observation]


def harms(
    dynamic: nn.Module, batches: Any, *, projections: int = 4, seed: int = 0, progress: Any = None
) -> dict[str, Tensor]:
    """How far each decision of each layer, taken alone, moves the network's outputs.

    A layer's output is ``y_0 + sum_i w_i (y_i - y_0)`` with candidates y_i, so the gradient of an output by w_i is what
    the output gains, to first order, where candidate i takes the place of the full one. For outputs o the expected
    square of the move is ``E_v[(v . do/dw_i)^2]`` over random directions v: one backward pass per direction gives
    it for all layers, candidates and samples. Class scores are moved through their softmax at a temperature T
    (`redconvert.answers.direction`): the expected square is then twice the Kullback-Leibler divergence of the
    answers at that temperature, times T^2. Outputs ``(N, C, ...)`` with C > 1 are taken for class scores; others
    are moved relative to their size. Decision (i, j) of both axes moves an output by the sum of what (i, 0) and (0,
    j) do.

    Args:
        dynamic: a converted network, calibrated; the gates' decisions do not matter.
        batches: unlabelled.
        projections: directions per batch.
        seed: of the directions.
        progress: called after every batch.

    Returns:
        By layer name ``(S_c, S_t)``, float64, entry (0, 0) is 0: averages over samples.
    """
    if projections < 1:
        raise RedconvertError(f"projections={projections} must be at least 1")
    layers = dynamic_layers(dynamic)
    names = {layer: name for name, layer in layers.items()}
    sums = {name: torch.zeros(sizes(layer), dtype=torch.float64) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for batch in each_batch(batches):
        inputs = move_to(batch, device_of(dynamic))
        heard: list[Call] = []
        with differentiable_gates(dynamic, layers), observed(dynamic, recorder(heard)):
            outputs = floating(call_with(dynamic, inputs))
            calls = tuple(heard)  # activation checkpointing runs layers again in the backward passes
            for index in range(projections):
                directions = [_direction(output.detach(), generator) for output in outputs]
                moves = moves_along(outputs, calls, directions, retain_graph=index + 1 < projections)
                for (layer, _), move in moves.items():
                    sums[names[layer]] += move.square().sum(0)
        total += len(outputs[0])
        if progress is not None:
            progress()
    found = {name: value / (projections * total) for name, value in sums.items()}
    bad = next((name for name, value in found.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise RedconvertError(f"layer '{bad}': its effect on the outputs is not finite: check inputs and weights")
    return found


def moves_along(
    outputs: list[Tensor], calls: Iterable[Call], directions: list[Tensor], retain_graph: bool
) -> dict[tuple[DynamicConv, int], Tensor]:
    """What each layer's decisions move along one direction per output, ``(samples, S_c, S_t)`` by layer and number.

    All calls of a layer take the same decision, and all frames of a sample: their moves add up.
    """
    weights = [weight for _, seen in calls for weight in seen.weights if weight.requires_grad]
    gradients = iter(
        torch.autograd.grad(outputs, weights, directions, retain_graph=retain_graph, materialize_grads=True)
    )
    found: dict[tuple[DynamicConv, int], Tensor] = {}
    for layer, seen in calls:
        parts = [next(gradients) if weight.requires_grad else torch.zeros_like(weight) for weight in seen.weights]
        channel, temporal = (part.cpu().double() - part[:, :1].cpu().double() for part in parts)
        move = channel[:, :, None] + temporal[:, None, :]
        if len(move) % len(outputs[0]) == 0:
            move = move.unflatten(0, (len(outputs[0]), -1)).sum(1)
        key = layer, len(move)
        found[key] = found[key] + move if key in found else move
    return found


def sizes(layer: DynamicConv) -> tuple[int, int]:
    return len(layer.candidates.channels), len(layer.candidates.strides)


def floating(outputs: Any) -> list[Tensor]:
    found = differentiable(outputs)
    if not found:
        raise RedconvertError("the network's outputs do not depend on its dynamic layers through any floating tensor")
    return found


@contextmanager
def differentiable_gates(dynamic: nn.Module, layers: dict[str, DynamicConv]) -> Iterator[None]:
    """Every gate fully open with a gradient, in masked mode; all else frozen and as in inference."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(dynamic))
        stack.enter_context(forced(dynamic))  # nothing is
        stack.enter_context(torch.enable_grad())
        for parameter in dynamic.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for layer in layers.values():
            threshold = layer.gate.threshold.clone()
            stack.callback(layer.gate.threshold.copy_, threshold)
            layer.gate.threshold.fill_(CERTAIN)
            for axis in ("channel", "temporal"):
                layer.gate.thresholds(axis)[:1] = -CERTAIN
            layer.gate.beta.requires_grad_(True)
            layer.training = True  # evaluating() puts it back
        yield


def recorder(calls: list[Call]) -> Callable[[DynamicConv, Observation], None]:
    return lambda layer, seen: calls.append((layer, seen))
