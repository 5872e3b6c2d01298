"""What errors of a layer's channels do to the answer: the metric in which channels are chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..answers import differentiable, direction
from ..errors import RedconvertError
from ..inputs import device_of
from ..layers.gate import processes
from .statistics import gram, process_rank, sum_over_processes

__all__ = ["AnswerMetric"]

# Moves of answers, over all samples, that tell channels apart. A hundred images want more than one each, a thousand do
# not (measured: docs/results.md). Sixteen of each told no more than four, and each is a backward pass.
MOVES, MOST_OF_EACH = 256, 4
NORMS_SHARE = 1e-3  # of the norms' importance: it decides between channels that the answer does not tell apart


class AnswerMetric:
    """Of each layer: ``W = sum of g g^T`` over samples and positions, g the gradient of a random move of the answer.

    An error e of the channels at a position moves the answer by ``g . e``, so ``E[e^T W e]`` is, to first order and for
    errors of different positions that are independent, twice the divergence of the answers, at the temperature of
    `redconvert.answers.direction`. What the layers behind do not read costs nothing, and errors that cancel behind
    cost little: the norm's own scale tells neither. One backward pass per batch, through the activations alone, or
    a few where there are fewer samples than `MOVES`.

    Args:
        model: the network.
        sizes: how many channels each module has whose activations will be watched: layers, and mixtures of inputs.
        seed: of the moves.
        batches: how many will come in all, 0 where that is not known: then each sample's answer is moved once.
    """

    def __init__(self, model: nn.Module, sizes: Mapping[nn.Module, int], seed: int = 0, batches: int = 0) -> None:
        self.model, self.batches = model, batches
        self.generator = torch.Generator().manual_seed(seed + process_rank())
        device = device_of(model)
        self.sums = {key: torch.zeros(size, size, dtype=torch.float64, device=device) for key, size in sizes.items()}

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Gradients reach the layers' results and nothing else."""
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for parameter, needed in before:
                parameter.requires_grad_(needed)

    def watch(self, key: nn.Module, out: Tensor) -> Tensor | None:
        """Add up the gradient of a layer's result, or input; what is returned takes its place."""
        if not torch.is_grad_enabled() or not out.is_floating_point():
            return None
        if not out.requires_grad:
            out = out.detach().requires_grad_().clone()  # no leaf: an operation in place may follow
        out.register_hook(lambda gradient: self._add(key, gradient))
        return out

    def move(self, outputs: Any) -> None:
        """Send random moves of each sample's answer back through the network."""
        found = differentiable(outputs)
        if not found:
            return
        samples = self.batches * processes() * len(found[0])
        moves = min(max(round(MOVES / samples), 1), MOST_OF_EACH) if samples else 1
        try:
            for index in range(moves):
                directions = [direction(output.detach(), self.generator) / math.sqrt(moves) for output in found]
                torch.autograd.backward(found, directions, retain_graph=index + 1 < moves)
        except RuntimeError as error:
            raise RedconvertError(
                f"the network's answers cannot be differentiated ({error}): calibrate with importance='norms'"
            ) from error

    def weights(self, key: nn.Module, norms: Tensor, covariance: Tensor) -> Tensor:
        """The metric of its channels, after `synchronize`: ``(C, C)``, or the norms' where no answer depends on them.

        Args:
            norms: what errors cost by the norm that follows, ``(C)`` or ``(C, C)``.
            covariance: of the channels, ``(C, C)``.
        """
        metric, norms_metric = self.sums[key], norms.diag() if norms.dim() == 1 else norms
        size, scale = (metric * covariance).sum(), (norms_metric * covariance).sum()
        if not (torch.isfinite(size) and size > 0 and scale > 0):
            return norms
        return metric + norms_metric * (NORMS_SHARE * size / scale)

    def synchronize(self) -> None:
        """Sum over processes, where there are several."""
        for value in self.sums.values():
            sum_over_processes(value)

    def _add(self, key: nn.Module, gradient: Tensor) -> None:
        self.sums[key] += gram(gradient)
