"""Which outputs of a network are its answer, and what sends a move of it back through the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .inputs import tensors_in

__all__ = ["TEMPERATURE", "differentiable", "direction", "in_backward"]

# Of the answers whose moves count. At 1 the few samples of which a network is unsure decide everything: a sure one's
# softmax hides every move, on the images that were trained on most of all (measured: docs/results.md).
TEMPERATURE = 4.0


def differentiable(outputs: Any) -> list[Tensor]:
    """The tensors in a network's outputs that carry a gradient."""
    return [tensor for tensor in tensors_in(outputs) if tensor.requires_grad and tensor.dim()]


def direction(output: Tensor, generator: torch.Generator) -> Tensor:
    """Random, of covariance ``diag(p) - p p^T`` over the class axis of scores ``(N, classes, ...)``.

    p is their softmax at `TEMPERATURE` T. The expected square of a small move along it is twice the Kullback-Leibler
    divergence of the answers at that temperature, times T^2. Of outputs that are no scores, the direction has
    variance 1 over their mean square.
    """
    noise = torch.randn(output.shape, generator=generator).to(output)
    if output.dim() < 2 or output.shape[1] == 1:
        size = output.square().mean().sqrt()
        return noise / torch.where(size > 0, size, torch.ones_like(size))
    p = (output / TEMPERATURE).softmax(1)
    root = p.sqrt()
    return root * noise - p * (root * noise).sum(1, keepdim=True)


def in_backward() -> bool:
    """Whether a backward pass is running: activation checkpointing runs layers again in it, with the same results."""
    return torch._C._current_graph_task_id() != -1
