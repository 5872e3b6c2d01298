"""Masked mode: one full convolution serves all candidates, and every gradient is that of the soft sum.

Eager training saves no intermediate of the mixture: its backward pass recomputes it, one layer at a
time, so that step time and memory hardly grow with the search space (Appendix B, shared weights).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import RedconvertError
from .gate import GateWeights
from .routing import FULL, Decision, group_samples, sample_rows

if TYPE_CHECKING:
    from .conv import DynamicConv

__all__ = ["CheckpointedMix", "attach", "replace_value"]


class CheckpointedMix(torch.autograd.Function):
    """Forward: what inference would compute. Backward: the derivative of the soft sum, recomputed.

    Where the tracer has seen that the layer's output only feeds norms, nothing changes that tensor in
    place, and it stands in for the full convolution: only the rows of reduced samples are kept aside.
    """

    @staticmethod
    def forward(
        ctx, layer: DynamicConv, decisions: list[Decision], y: Tensor, channel: Tensor, temporal: Tensor, *parameters
    ):
        ctx.layer, ctx.rows, aside = layer, None, None
        reduced = [n for n, decision in enumerate(decisions) if decision != FULL]
        weights = GateWeights(channel, temporal)
        if not layer.feeds_norm:
            out = mixed_rows(layer, y, weights, decisions) if reduced else y.clone()
            ctx.save_for_backward(y, channel, temporal)
            return out
        if reduced:
            samples = torch.tensor(reduced, device=y.device)
            ctx.rows = sample_rows(samples, layer.frames_per_sample)
            aside = y[ctx.rows]
            subset = GateWeights(channel[samples], temporal[samples])
            y[ctx.rows] = mixed_rows(layer, aside, subset, [decisions[n] for n in reduced])
        ctx.mark_dirty(y)
        ctx.save_for_backward(y, channel, temporal, *(() if aside is None else (aside,)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        layer: DynamicConv = ctx.layer
        try:
            y, channel, temporal, *aside = ctx.saved_tensors
        except RuntimeError as error:
            raise RedconvertError(
                f"layer '{layer.layer_name}': its output was changed in place, which conversion did not foresee. "
                f"Set feeds_norm = False on this layer. ({error})"
            ) from error
        if aside:
            y = y.clone()
            y[ctx.rows] = aside[0]
        parameters = list(layer.cheap_parameters())
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (y, channel, temporal)]
            mixed = layer.mix(inputs[0], GateWeights(*inputs[1:]))
            wanted = inputs + [p for p in parameters if p.requires_grad]
            found = iter(torch.autograd.grad(mixed, wanted, gradient, allow_unused=True, materialize_grads=True))
            gradients = [next(found) for _ in inputs]
            gradients += [next(found) if p.requires_grad else None for p in parameters]  # type: ignore[misc]
            add_rebuild_gradient(layer, y, GateWeights(channel, temporal), parameters, gradients)
        return None, None, *gradients


def mixed_rows(layer: DynamicConv, y: Tensor, weights: GateWeights, decisions: list[Decision]) -> Tensor:
    """What inference would return for these samples, from their full convolution ``y``."""
    groups = group_samples(decisions)
    out = torch.empty_like(y)
    for decision, samples in groups.items():
        if len(groups) == 1:
            return layer.value_from_full(y, weights, decision)
        index = torch.tensor(samples, device=y.device)
        rows = sample_rows(index, layer.frames_per_sample)
        subset = GateWeights(weights.channel[index], weights.temporal[index])
        out[rows] = layer.value_from_full(y[rows], subset, decision)
    return out


def add_rebuild_gradient(layer: DynamicConv, y: Tensor, weights: GateWeights, parameters, gradients) -> None:
    """Add to ``gradients``, whose tail belongs to ``parameters``, that of the closed candidates' rebuild loss."""
    loss = layer.rebuild_loss(y, weights)
    trained = [(i, p) for i, p in enumerate(parameters, start=len(gradients) - len(parameters)) if p.requires_grad]
    if loss is None or not trained:
        return
    extra = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
    for (i, _), gradient in zip(trained, extra, strict=True):
        if gradient is not None:
            gradients[i] = gradients[i] + gradient


class _ReplaceValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def replace_value(soft: Tensor, hard: Tensor) -> Tensor:
    """Straight-through: the value of ``hard``, the gradient of ``soft``."""
    return _ReplaceValue.apply(soft, hard)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return out.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, torch.ones_like(ctx.saved_tensors[0])


def attach(out: Tensor, loss: Tensor) -> Tensor:
    """``out`` unchanged; its backward pass also minimises ``loss`` (a scalar)."""
    return _Attach.apply(out, loss)
