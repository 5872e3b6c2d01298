"""Least squares for the weights with which a reader does without channels (`redconvert.layers.Absorbed`)."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import Decision, DynamicConv
from ..layers.cheap import Pointwise
from .mending import MendedLayer
from .regress import FOLDS, best_strength, products, ridge_towards
from .solve import solve_channels
from .statistics import ChannelMoments

__all__ = ["AbsorbedMoments", "start_absorbed"]

LARGEST = 3000  # predictors (channels times taps) up to which a regression on patches is worth its memory
POSITIONS = (64, 512)  # of one sample's output that are read: at least, at most
ROWS_ENOUGH = 32  # of all samples, for each predictor: with these, fewer of a sample do
ROWS_PER_PREDICTOR = 1  # before fewer rows the start stands


@torch.no_grad()
def start_absorbed(reader: DynamicConv, index: int, moments: ChannelMoments, ridge: float) -> Tensor:
    """Rebuild the absent channels of the reader's input linearly, position by position, and fold that into its weight.

    With ``x_d ~ P x_k + e`` it is ``D = W_d P`` and ``d = sum of W_d e`` over taps.

    Args:
        reader: the layer whose `Absorbed` is set.
        index: candidate of its source.
        moments: predictors are the channels that the candidate hands over, targets the others.
        ridge: of the regression, relative to the mean variance of the predictors.

    Returns:
        The unexplained variance of each absent channel, ``(D)``.
    """
    assert reader.reads_from is not None and reader.cheap_in is not None
    kept = reader.reads_from.channels[index]
    op = Pointwise(kept, reader.in_channels - kept).to(moments.count)  # float64, on its device
    left = solve_channels(op, moments, ridge)
    absent = reader.recipe.weight(reader).double().index_select(1, reader.reads_from.rebuild.order[kept:])
    correction = torch.einsum("od...,dk->ok...", absent, op.weight)
    shift = absent.flatten(2).sum(2) @ op.bias
    _set(reader, index, correction, shift)
    return left


class AbsorbedMoments(MendedLayer):
    """Of one reader: its dense results, regressed on patches of the channels that are there.

    ``W_i`` and ``b_i`` minimise ``E |y - W_i * x_k - b_i|^2`` at sampled output positions, y from the dense network and
    x_k from the reduced one, or from the dense one, too. A ridge pulls towards what stood there at first: a network of
    many channels has more predictors than a few dozen clips show different things. Its strength is the one with which
    the solution of each half of the samples does best on the other half; where none does any good, the start stays.

    Args:
        layer: the reader; ridge, norm: see `MendedLayer`.
        samples: how many will come, which says how many positions of each are enough; 0: nobody knows.
        dense: whether `add_dense` will be called, or `mend`. Channels of the candidates are nested, and so are sums
            over patches of the dense network's: those of the largest candidate hold all others.
    """

    def __init__(
        self,
        layer: DynamicConv,
        ridge: float,
        norm: nn.Module | None = None,
        *,
        samples: int = 0,
        dense: bool = False,
        seed: int = 0,
    ) -> None:
        assert layer.reads_from is not None
        super().__init__(layer, ridge, norm)
        self.expected, self.generator = samples, torch.Generator().manual_seed(seed)
        taps = layer.weight[0, 0].numel()
        sizes = {i: 1 + kept * taps for i, kept in enumerate(layer.reads_from.channels) if i}
        sizes = {i: size for i, size in sizes.items() if size <= LARGEST}
        # Rows: targets, the constant, patches; columns: the constant, patches.
        self.stored = [self._zeros(size) for size in ([*sizes.values()][:1] if dense else sizes.values())]
        each = len(sizes) * self.stored if dense else self.stored
        self.sums = {
            i: sums[:, : layer.out_channels + size, :size] for (i, size), sums in zip(sizes.items(), each, strict=True)
        }
        self.start = {i: self._weights(i) for i in self.sums}
        self.strength: dict[int, float] = {}

    def add_dense(self, x: Tensor, y: Tensor) -> None:
        """Add one call of the dense network, ``(N, C_in, ...)`` and ``(N, C_out, ...)``, to all candidates."""
        for sums in self.stored:
            sums += self._products(min(self.sums), x, y)

    def apply(self) -> None:
        self.strength.clear()  # chosen anew, with all that was seen
        super().apply()

    def _candidate(self, decision: Decision) -> int:
        return 0 if decision.blend else decision.source

    def _predictors(self, x: Tensor, decision: Decision) -> Tensor:
        return x

    def _add(self, index: int, predictors: Tensor, wanted: Tensor) -> None:
        self.sums[index] += self._products(index, predictors, wanted)

    def _result(self, predictors: Tensor, decision: Decision) -> Tensor:
        return self.layer.compute(predictors, decision)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(
            FOLDS, self.layer.out_channels + size, size, dtype=torch.float64, device=self.layer.weight.device
        )

    @torch.no_grad()
    def _weights(self, index: int) -> Tensor:
        """b_i and W_i as they stand, ``(C_out, 1 + k * taps)``."""
        layer = self.layer
        assert layer.reads_from is not None and layer.cheap_in is not None
        weight, bias = layer.cheap_in.filter(
            index, layer.recipe.weight(layer).double(), layer.bias, layer.reads_from.kept(index)
        )
        return torch.cat([bias[:, None].double(), weight.flatten(1)], dim=1)

    @torch.no_grad()
    def _products(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Sum of ``[y, 1, p] [1, p]^T`` over sampled positions, p the patches of candidate ``index``'s channels.

        One for every second sample, one for the others: ``(2, C_out + 1 + k * taps, 1 + k * taps)``.
        """
        assert self.layer.reads_from is not None
        x = x.detach().index_select(1, self.layer.reads_from.kept(index)).float()
        patches, positions = _patches(self.layer, x, y, self._positions(index, y), self.generator)
        targets = y.detach().flatten(2).index_select(2, positions).float()
        return products(targets, patches, self._fold(len(x), x.device))

    def _positions(self, index: int, y: Tensor) -> int:
        """How many: products of patches are to cost no more than the convolution."""
        total, size = y[0, 0].numel(), self.sums[index].shape[2]
        least, most = POSITIONS
        least = min(least, -(-ROWS_ENOUGH * size // self.expected)) if self.expected else least
        return min(total, max(least, min(most, total * self.layer.out_channels // size)))

    @torch.no_grad()
    def _solve(self, index: int) -> None:
        layer, start = self.layer, self.start[index]
        count, size = self._count(index), start.shape[1]
        if count < ROWS_PER_PREDICTOR * size:
            return
        assert layer.reads_from is not None
        if index not in self.strength:
            self.strength[index] = best_strength(self.sums[index], start, self.ridge)
        solution = ridge_towards(start, self.sums[index].sum(0), self.strength[index])
        if torch.isfinite(solution).all():
            own = layer.recipe.weight(layer).double().index_select(1, layer.reads_from.kept(index))
            bias = 0 if layer.bias is None else layer.bias.double()
            _set(layer, index, solution[:, 1:].view_as(own) - own, solution[:, 0] - bias)
            self.solved[index] = count


@torch.no_grad()
def _set(reader: DynamicConv, index: int, correction: Tensor, shift: Tensor) -> None:
    assert reader.cheap_in is not None
    reader.cheap_in.weights[index - 1].copy_(correction)
    reader.cheap_in.biases[index - 1].copy_(shift)


def _patches(layer: DynamicConv, x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What ``layer`` reads of ``x (N, k, ...)`` at ``count`` random positions of its result y.

    Returns:
        ``(N, k * taps, count)``, taps as in the weight, and the positions in ``y.flatten(2)``.
    """
    x, padding = layer.recipe.pad(layer, x)
    x = F.pad(x, [amount for size in reversed(padding) for amount in (size, size)])
    dims = x.dim() - 2
    total = y[0, 0].numel()
    positions = torch.randperm(total, generator=generator)[:count].sort().values
    where = torch.stack(torch.unravel_index(positions, tuple(y.shape[2:])), dim=1)  # (count, dims)
    taps = torch.tensor(list(product(*(range(size) for size in layer.kernel_size))))  # (taps, dims)
    stride, dilation = torch.tensor(layer.stride), torch.tensor(layer.dilation)
    places = where[:, None] * stride + taps[None] * dilation  # (count, taps, dims)
    x = x.contiguous()
    steps = torch.tensor([x.stride(2 + d) for d in range(dims)])
    index = (places * steps).sum(-1).flatten().to(x.device)
    found = x.flatten(2).index_select(2, index).unflatten(2, (len(positions), len(taps)))
    return found.permute(0, 1, 3, 2).flatten(1, 2), positions.to(x.device)
