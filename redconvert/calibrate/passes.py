"""Passes over the batches: the network dense, and reduced beside it, with every layer's result shown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..inputs import call_with, device_of, each_batch, move_to, tensors_in
from ..layers import Decision, DynamicConv, Observation, forced, observed
from ..progress import Step
from .metric import AnswerMetric
from .statistics import raise_together, sum_over_processes

__all__ = ["Collect", "Passes", "Reduced", "count_batches"]

Reduced: TypeAlias = tuple[int | None, int | None]  # candidates of the reduced half; None: as the gates decide
Collect: TypeAlias = Callable[[DynamicConv, Tensor, Tensor, list[Decision]], Tensor | None]


class Passes:
    """Runs the batches of one calibration, as often as it takes.

    Args:
        model: the network; layers: its dynamic ones; batches: unlabelled.
        metric: what is moved back in passes that differentiate; None: none does.

    Attributes:
        samples: of all processes, that the last pass saw.
        step: called after every batch.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, DynamicConv], batches: Any, metric: AnswerMetric | None
    ) -> None:
        self.model, self.layers, self.batches, self.metric = model, layers, batches, metric
        self.samples = 0
        self.step: Step = lambda advance=1, text=None: None

    def run(self, collect: Collect, streams: list[Reduced], differentiating: bool = True) -> None:
        """Run all batches, dense and, side by side with that, reduced once for each of ``streams``.

        ``collect(layer, x, out, decisions)`` sees every result, the dense stream's samples first and then those of the
        reduced ones, which took these decisions; what it returns, if anything, takes the result's place. A dense pass
        that is ``differentiating`` sends moves of the answers back, where there is a metric.
        """
        seen: dict[DynamicConv, list[Decision]] = {}
        handles, error = [], None

        def listen(layer: DynamicConv, call: Observation) -> None:
            seen[layer] = call.decisions[len(call.decisions) // (1 + len(streams)) :]

        for layer in self.layers.values():  # observers are called before hooks
            handles.append(layer.register_forward_hook(lambda m, args, out: collect(m, args[0], out, seen[m])))
        self.samples = 0
        try:
            for batch in each_batch(self.batches):
                inputs = move_to(batch, device_of(self.model))
                count = self._count(inputs)
                with observed(self.model, listen):
                    self._forward(inputs, count, streams, self.metric if differentiating else None)
                self.samples += count
                self.step()
        except Exception as problem:
            error = problem
        finally:
            for handle in handles:
                handle.remove()
        raise_together(error, device_of(self.model))
        self.samples = int(sum_over_processes(torch.tensor(self.samples, device=device_of(self.model))))

    def _forward(self, inputs: Any, count: int, streams: list[Reduced], metric: AnswerMetric | None) -> None:
        if not streams:
            with forced(self.model, channel=0, temporal=0), ExitStack() as stack:
                if metric is not None:
                    stack.enter_context(metric.differentiating())
                outputs = call_with(self.model, inputs)
                if metric is not None:
                    metric.move(outputs)
            return
        channel, temporal = (
            [taken for taken in each for _ in range(count)] for each in zip((0, 0), *streams, strict=True)
        )
        with forced(self.model, channel=channel, temporal=temporal):
            call_with(self.model, _repeated(inputs, 1 + len(streams)))

    def _count(self, inputs: Any) -> int:
        """Samples of a batch: rows, or clips where it is a batch of frames. Clips that the network folds are rows."""
        layer, first = next(iter(self.layers.values())), tensors_in(inputs)[0]
        frames = first.dim() == layer.weight.dim()
        return first.shape[0] // layer.frames_per_sample if frames else first.shape[0]


def _repeated(inputs: Any, times: int) -> Any:
    """Every tensor of the inputs, so many times along the batch axis."""
    return tree_map(lambda leaf: torch.cat([leaf] * times) if isinstance(leaf, Tensor) and leaf.dim() else leaf, inputs)


def count_batches(batches: Any) -> int:
    """How many batches there are; 0 where that is not known."""
    return 1 if isinstance(batches, Tensor | tuple | Mapping) else operator.length_hint(batches)
