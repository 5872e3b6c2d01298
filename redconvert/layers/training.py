"""How a dynamic convolution trains: with gates that learn, or at the price of inference while they rest.

A gate learns from what every candidate would have given, so that all of them are computed. One that rests
(`redconvert.resting_gates`) only decides: what its decisions ask for is computed alone, in parts or as one
convolution (`composed`), whichever takes less time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .absorb import Source, read_dense
from .gate import GateWeights, matching, one_hot
from .masked import CheckpointedMix
from .routing import Decision, group_samples, route, sample_rows, select

if TYPE_CHECKING:
    from .base import DynamicConv

__all__ = ["convolve_learning", "resting", "run_masked", "trained_candidate"]


def run_masked(
    layer: DynamicConv, x: Tensor, source: Source | None, weights: GateWeights, decisions: list[Decision]
) -> Tensor:
    """From the full convolution to what inference would return, with the gradient of the soft sum."""
    learned = _learned(layer, decisions)
    if layer.mixed_in is not None:
        y = _Candidates.apply(layer, [d.channel for d in decisions], x, weights.channel, *_convolving(layer))
    else:
        read = source is not None and layer.carries is None
        y = read_dense(layer, x, source, learned) if read else layer.whole(x, learned=learned)  # type: ignore[arg-type]
    if not layer.derives:  # done with channels: whoever reads what is handed over leaves some out
        if layer.cheap_t is None:
            return y
        opened = one_hot(torch.zeros_like(weights.channel[:, 0], dtype=torch.long), weights.channel.shape[1])
        weights = GateWeights(opened.to(weights.channel.dtype), weights.temporal)
    own = [d._replace(channel=d.channel if layer.derives else 0, source=0) for d in decisions]
    return CheckpointedMix.apply(layer, own, y, *weights, *layer.cheap_parameters())


def resting(layer: DynamicConv, decisions: list[Decision]) -> tuple[list[Decision], int]:
    """What to compute, and the candidate whose channels alone get gradients (0: all), while gates rest.

    That is what inference computes. Only a layer that hands over, or carries, computes all of its channels, for the
    statistics of the norm behind it; those that nobody reads get no gradient, and where they are handed over cost no
    backward pass.
    """
    if layer.carries is not None:
        return [d._replace(source=0) for d in decisions], 0
    if layer.hands_to is None:
        return decisions, 0
    return [d._replace(channel=0) for d in decisions], _learned(layer, decisions)


def _learned(layer: DynamicConv, decisions: list[Decision]) -> int:
    """Of the largest channel candidate that a sample takes: channels that only larger ones compute get no gradient."""
    return trained_candidate(layer, min(d.channel for d in decisions))


def trained_candidate(layer: DynamicConv, channel: int) -> int:
    """The candidate whose channels alone get gradients where ``channel`` is taken; 0, all, where it mixes them."""
    return 0 if layer.cheap_c is None or layer.cheap_c.is_principal else channel


def convolve_learning(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    learned: Tensor,
) -> Tensor:
    """A convolution without groups, all of whose gradients but those of the output channels ``learned`` are zero.

    That is for the caller to know; the backward pass then costs what these channels cost.
    """
    if torch.is_autocast_enabled(x.device.type):  # which ends inside a function of its own
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    return _Learning.apply(x, matching(weight, x), bias, geometry, learned)


class _Learning(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, geometry, learned: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, learned)
        ctx.geometry, ctx.has_bias = geometry, bias is not None
        convolve = F.conv2d if x.dim() == 4 else F.conv3d
        with torch.autocast(x.device.type, enabled=False):
            return convolve(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, learned = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        gradient, part = select(gradient, 1, learned), weight.index_select(0, learned)
        sizes, transposed = [len(learned)] if ctx.has_bias else None, (False, [0] * len(ctx.geometry[0]))
        by_x, by_weight, by_bias = torch.ops.aten.convolution_backward(
            gradient, x, part, sizes, *ctx.geometry, *transposed, 1, wanted
        )
        if by_weight is not None:
            by_weight = torch.zeros_like(weight).index_copy_(0, learned, by_weight.to(weight.dtype))
        if by_bias is not None:
            by_bias = by_bias.new_zeros(len(weight)).index_copy_(0, learned, by_bias)
        return by_x, by_weight, by_bias, None, None


def _convolving(layer: DynamicConv) -> list[nn.Parameter]:
    """All that a channel candidate computes with."""
    parts = [part for part in (layer.cheap_c, layer.mixed_in) if part is not None]
    own = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    return [*own, *(parameter for part in parts for parameter in part.parameters())]  # type: ignore[list-item]


class _Candidates(torch.autograd.Function):
    """Each sample's own channel candidate; the gradient is that of the soft sum ``sum_i w_i candidate_i(x)``.

    For candidates that read different inputs. The input alone is kept: the backward pass computes every candidate
    again, one at a time.
    """

    @staticmethod
    def forward(ctx, layer: DynamicConv, candidates: list[int], x: Tensor, weights: Tensor, *parameters: Tensor):
        kind = x.device.type
        ctx.layer, ctx.autocast = layer, (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        ctx.save_for_backward(x, weights, *parameters)

        def compute(decision: Decision, samples: Tensor | None) -> Tensor:
            rows = x if samples is None else select(x, 0, sample_rows(samples, layer.frames_per_sample))
            return layer.compute(rows, decision)

        return route(group_samples([Decision(index, 0) for index in candidates]), compute, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weights, *parameters = ctx.saved_tensors
        layer, (enabled, dtype) = ctx.layer, ctx.autocast
        _, _, by_x, by_weights, *by_parameters = ctx.needs_input_grad
        rows = weights.repeat_interleave(layer.frames_per_sample, dim=0).to(gradient.dtype)
        wanted = [parameter for parameter, needed in zip(parameters, by_parameters, strict=True) if needed]
        total: list[Tensor] = []
        dots = torch.zeros(len(rows), weights.shape[1], dtype=gradient.dtype, device=gradient.device)
        for index, taken in enumerate((weights > 0).any(0).tolist()):
            if not (taken or by_weights):
                continue
            point = x.detach().requires_grad_(by_x)
            with torch.set_grad_enabled(taken), torch.autocast(x.device.type, dtype=dtype, enabled=enabled):
                out = layer.compute(point, Decision(index, 0))
            if by_weights:
                dots[:, index] = (gradient * out.detach()).flatten(1).sum(1)
            inputs = [point, *wanted] if by_x else wanted
            if taken and inputs:
                pulled = gradient * rows[:, index].view(-1, *(1,) * (gradient.dim() - 1))
                # Zeros, not None, of what no sample computed with: data parallel training waits for every parameter.
                found = torch.autograd.grad(out, inputs, pulled.to(out.dtype), materialize_grads=True)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        per_sample = dots.to(weights.dtype).unflatten(0, (-1, layer.frames_per_sample)).sum(1) if by_weights else None
        gradients = iter(total or [torch.zeros_like(each) for each in ([x, *wanted] if by_x else wanted)])
        by_input = next(gradients) if by_x else None
        return None, None, by_input, per_sample, *(next(gradients) if needed else None for needed in by_parameters)
