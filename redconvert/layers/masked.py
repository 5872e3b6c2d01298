"""Masked mode: one full convolution serves all candidates, and every gradient is that of the soft sum.

Eager training saves no intermediate of the mixture: its backward pass recomputes it, one layer at a
time, so that step time and memory hardly grow with the search space (Appendix B, shared weights).
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import RedconvertError
from .cheap import Principal
from .gate import GateWeights
from .overwrite import Overwritten, overwrite, restore
from .routing import Decision

if TYPE_CHECKING:
    from .base import DynamicConv

__all__ = ["CheckpointedMix", "attach", "pool", "rebuild_loss", "replace_value"]

SAMPLED_SIZE = 4  # the rebuild loss is an average: about this many rows and columns of a frame tell it


class CheckpointedMix(torch.autograd.Function):
    """Forward: what inference would compute. Backward: the derivative of the soft sum, recomputed.

    Where the tracer has seen that the layer's output only feeds norms, nothing changes that tensor in
    place, and it stands in for the full convolution: only what reduced samples overwrite is kept aside.
    """

    @staticmethod
    def forward(
        ctx, layer: DynamicConv, decisions: list[Decision], y: Tensor, channel: Tensor, temporal: Tensor, *parameters
    ):
        ctx.layer = layer
        if layer.feeds_norm:
            out = y
            ctx.mark_dirty(y)
        else:
            out = y.clone()
        overwritten = overwrite(layer, out, GateWeights(channel, temporal), decisions)
        if not layer.feeds_norm:
            overwritten = []  # y itself is kept
        ctx.overwritten = [(rows, decision, len(before)) for rows, decision, before in overwritten]
        ctx.save_for_backward(y, channel, temporal, *(piece for item in overwritten for piece in item.before))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        layer: DynamicConv = ctx.layer
        try:
            y, channel, temporal, *pieces = ctx.saved_tensors
        except RuntimeError as error:
            raise RedconvertError(
                f"layer '{layer.layer_name}': its output was changed in place, which conversion did not foresee. "
                f"Set feeds_norm = False on this layer. ({error})"
            ) from error
        y = y.detach()  # a saved result carries this very node as its graph
        if pieces:
            y, kept = y.clone(), iter(pieces)
            restore(layer, y, [Overwritten(r, d, list(islice(kept, count))) for r, d, count in ctx.overwritten])
        weights = GateWeights(channel, temporal)
        parameters = list(layer.cheap_parameters())
        pull = _Pullback(layer, y, weights, gradient)
        gradients = [pull.input_gradient, *pull.gate_gradients, *pull.parameter_gradients(parameters)]
        add_rebuild_gradient(layer, y, weights, parameters, gradients)
        return None, None, *gradients


class _Pullback:
    """The derivative of ``layer.mix(y, weights)`` without its intermediate results.

    With Z the channel mixture and E the mixed frame matrix, the result is ``E Z``. Every derivative but
    that of y is a product of a small tensor with second moments, so no tensor of y's size is made for it:

    - ``dE = g Z^T`` over the positions of each sample and channel;
    - ``dPhi_i = w_i g'_d y_k^T`` over the frames and positions of each sample, with ``g' = E^T g``.

    Where a sample's weights are (1, 0, ...), E and the channel mixture are identities.
    """

    def __init__(self, layer: DynamicConv, y: Tensor, weights: GateWeights, gradient: Tensor) -> None:
        self.layer = layer
        self.channel = weights.channel.detach().requires_grad_()
        self.temporal = weights.temporal.detach().requires_grad_()
        self.dots: Tensor | None = None  # <y_c, g'_c> per sample and channel, in the layer's own order
        self.values: list[Tensor] = []  # scalars whose derivative by gates and cheap operations is sought
        if layer.cheap_t is not None:
            gradient = self._frames(y, weights, gradient)
        if layer.derives:
            gradient = self._channels(y, weights, gradient)
        self.input_gradient = gradient
        with torch.enable_grad():
            self.total = sum(self.values[1:], self.values[0])

    @property
    def gate_gradients(self) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(self.total, [self.channel, self.temporal], retain_graph=True, materialize_grads=True)
        )

    def parameter_gradients(self, parameters: list[torch.nn.Parameter]) -> list[Tensor | None]:
        wanted = [p for p in parameters if p.requires_grad]
        if not wanted:
            return [None] * len(parameters)
        found = iter(torch.autograd.grad(self.total, wanted, materialize_grads=True))
        return [next(found) if p.requires_grad else None for p in parameters]

    def _frames(self, y: Tensor, weights: GateWeights, gradient: Tensor) -> Tensor:
        """Moments for E, and ``g' = E^T g``."""
        layer, cheap = self.layer, self.layer.cheap_t
        assert cheap is not None
        z = y
        if layer.derives and not _only_full(weights.channel):
            z = layer.mix_channels(y, weights.channel)
        z = layer.as_clips(z, layer.frames_per_sample)
        g = layer.as_clips(gradient, layer.frames_per_sample).flatten(3)
        moments, sums = torch.matmul(g, z.flatten(3).transpose(2, 3)), g.sum(3)
        if _only_full(weights.channel) and _only_full(weights.temporal):
            self.dots = moments.diagonal(dim1=2, dim2=3).sum(2)  # then z is y, and g' is g
        with torch.enable_grad():
            matrix, bias = cheap.mixed_matrix(self.temporal, z.shape[2])
            self.values.append((matrix * moments).sum() + (bias * sums).sum())
        if _only_full(weights.temporal):
            return gradient
        pulled = torch.matmul(matrix.detach().to(g.dtype).transpose(2, 3), g)
        return layer.from_clips(pulled.unflatten(3, z.shape[3:]))

    def _channels(self, y: Tensor, weights: GateWeights, gradient: Tensor) -> Tensor:
        """Moments for each Phi_i, and the gradient of y."""
        layer, cheap = self.layer, self.layer.cheap_c
        assert cheap is not None
        full = _only_full(weights.channel)
        y, g = cheap.to_ranks(y), cheap.to_ranks(gradient)
        with torch.enable_grad():
            rows = self.channel.repeat_interleave(layer.frames_per_sample, dim=0)
            shape = (-1, *(1,) * (y.dim() - 1))
            pulled = None if full else g * cheap.coverage(rows.detach().to(g.dtype)).view(*g.shape[:2], *shape[2:])
            covered = cheap.coverage(self.channel)
            # Channels that every candidate computes: their weight is always 1, unless weights are not normalised.
            fixed = cheap.channels[-1] if layer.config.normalize and not cheap.is_principal else 0
            self.values.append((covered * self._dots(y, g))[:, fixed:].sum())
            for i, kept in enumerate(cheap.channels[1:], start=1):
                op, computed = cheap.op(i), cheap.computed(i, y).detach()
                paired = op.pairing(computed, g[:, kept:])
                if isinstance(op, Principal):
                    paired = paired + (computed * g[:, :kept]).flatten(1).sum(1).to(paired.dtype)
                self.values.append((rows[:, i] * paired).sum())
                if pulled is None:
                    continue
                weighted = g * rows[:, i].detach().to(g.dtype).view(shape)
                found = op.adjoint(weighted[:, kept:], computed)
                if isinstance(op, Principal):
                    pulled += op.spread(found + weighted[:, :kept])
                else:
                    pulled[:, :kept] += found
        return gradient if pulled is None else cheap.from_ranks(pulled.detach())

    def _dots(self, y: Tensor, gradient: Tensor) -> Tensor:
        """``<y_c, g_c>`` per sample and rank, ``(N, C_out)``; y and gradient are in rank order."""
        cheap, frames = self.layer.cheap_c, self.layer.frames_per_sample
        assert cheap is not None
        if self.dots is not None:
            return self.dots if cheap.is_identity else self.dots[:, cheap.order]
        rows = torch.matmul(y.flatten(2).unsqueeze(2), gradient.flatten(2).unsqueeze(3)).flatten(1)
        return rows.to(self.channel.dtype).unflatten(0, (-1, frames)).sum(1)


def _only_full(weights: Tensor) -> bool:
    """Whether every sample's weights are (1, 0, ...): the mixture is then the identity."""
    return bool((weights[:, 0] == 1).all() and (weights[:, 1:] == 0).all())


def add_rebuild_gradient(layer: DynamicConv, y: Tensor, weights: GateWeights, parameters, gradients) -> None:
    """Add to ``gradients``, whose tail belongs to ``parameters``, that of the closed candidates' rebuild loss."""
    trained = [(i, p) for i, p in enumerate(parameters, start=len(gradients) - len(parameters)) if p.requires_grad]
    if not trained:
        return
    with torch.enable_grad():
        loss = rebuild_loss(layer, y, weights)
    if loss is None:
        return
    extra = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
    for (i, _), gradient in zip(trained, extra, strict=True):
        if gradient is not None:
            gradients[i] = gradients[i] + gradient


def rebuild_loss(layer: DynamicConv, y: Tensor, weights: GateWeights) -> Tensor | None:
    """Mean squared error of the closed candidates' rebuilding, over y's variance; trains them alone.

    A closed candidate has weight 0, and so no gradient from the soft sum. ``y`` carries no graph.
    """
    if not layer.config.rebuild_weight:
        return None
    if not (layer.derives and "depthwise" in layer.cheap_c.kinds):  # type: ignore[union-attr]  # that one needs neighbours
        down, across = (max(1, size // SAMPLED_SIZE) for size in y.shape[-2:])
        y = y[..., ::down, ::across].contiguous()
    terms = []
    scale = y.detach().var() + torch.finfo(y.dtype).tiny
    if layer.derives:
        assert layer.cheap_c is not None
        # The frames that every temporal candidate computes: larger search spaces then cost no more.
        sampled = layer.as_clips(y, layer.frames_per_sample)[:, :, :: layer.candidates.strides[-1]]
        ranks = layer.cheap_c.to_ranks(layer.from_clips(sampled))
        for i, kept in enumerate(layer.candidates.channels[1:], start=1):
            rebuilt = layer.cheap_c.rebuild(i, layer.cheap_c.computed(i, ranks))
            error = (rebuilt - ranks[:, kept:]).square().flatten(1).mean(1)
            closed = (weights.channel[:, i] == 0).repeat_interleave(len(ranks) // len(weights.channel))
            terms.append((error * closed).mean())
    if layer.cheap_t is not None:
        z = layer.as_clips(y, layer.frames_per_sample)
        for j, stride in enumerate(layer.candidates.strides[1:], start=1):
            rebuilt = layer.cheap_t.single(z[:, :, ::stride], j, z.shape[2])
            error = (rebuilt - z).square().flatten(1).mean(1)
            terms.append((error * (weights.temporal[:, j] == 0)).mean())
    return layer.config.rebuild_weight * sum(terms[1:], terms[0]) / scale


class _Pool(torch.autograd.Function):
    """``x`` and its average over H and W: their gradients meet in one pass over memory."""

    @staticmethod
    def forward(ctx, x: Tensor):
        ctx.positions = x.shape[-2] * x.shape[-1]
        same = torch.ops.aten.alias(x)  # view_as would give a batch of one other strides, and so another kernel
        return same, x.mean((-2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, pooled: Tensor):
        return torch.add(gradient, pooled[..., None, None], alpha=1 / ctx.positions)


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` for the convolution, and G(x) for the gate: its average over the last two axes."""
    return _Pool.apply(x)


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
