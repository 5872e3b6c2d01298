"""Two passes where one is not enough: the reduced network answers, and where it is unsure the dense one does."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .cost import dense_macs
from .cost.measure import MacsMeter
from .deploy import deploy
from .errors import RedconvertError
from .inputs import call_with, device_of, each_batch, measuring, move_to
from .layers import DynamicConv, dynamic_layers
from .layers.modes import attributes
from .layers.routing import sample_rows, select

__all__ = ["Cascade", "CascadeCost", "cascade", "margin"]


def margin(scores: Tensor) -> Tensor:
    """How sure scores ``(N, classes)`` are: the first class's probability less that of the second, ``(N)``."""
    best = scores.float().softmax(1).topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


@dataclass(frozen=True)
class CascadeCost:
    """What a `Cascade` costs on average, as shares of the dense network's multiply-adds.

    Where the first network has no dynamic layers, that is the second one.

    Attributes:
        mean: of all samples, ``little + asked_again * big``.
        little: of the first pass; big: of the second.
        asked_again: the share of the samples that take the second pass.
        samples: how many were measured.
    """

    mean: float
    little: float
    big: float
    asked_again: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.mean:.1%} of the dense MACs on average over {self.samples} samples: {self.little:.1%} for all, and "
            f"{self.big:.1%} more for the {self.asked_again:.1%} that are asked again"
        )


class Cascade(nn.Module):
    """``little(x)``, and for the samples of which it is unsure ``big(x)``. For inference; `cascade` makes one.

    ``scores_n = little(x_n)`` where ``confidence(little(x_n)) >= threshold``, else ``big(x_n)``, or of both
    ``blend * little(x_n) + (1 - blend) * big(x_n)``: two that err differently are right more often. `redconvert.report`
    and `redconvert.evaluate.spread_of_macs` count both passes; within `redconvert.disabled` it is ``little``, dense.

    Args:
        little: what `redconvert.convert` or `redconvert.deploy` returned, calibrated and under a budget; or, with a
            ``big``, any network that gives the same scores for less, such as one that `redconvert.freeze` returned.
        big: what answers the others; None: ``little`` with every dynamic layer dense (`redconvert.disabled`), which
            is the original network as long as its weights were not trained.
        threshold: of the confidence: 0 never asks again, above 1 always does.
        confidence: of class scores ``(N, classes)``, in [0, 1], ``(N)``.
        blend: the first answer's share in the second; scores must be alike, as where one network learnt the other's.

    Attributes:
        cost: what `cascade` measured; None otherwise.
        asked_again: which samples of the last batch took the second pass, their indices; None before the first.
    """

    threshold: Tensor
    asked_again: Tensor | None = None

    def __init__(
        self,
        little: nn.Module,
        big: nn.Module | None = None,
        threshold: float = 0.5,
        confidence: Callable[[Tensor], Tensor] = margin,
        cost: CascadeCost | None = None,
        blend: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(blend, int | float) or not 0 <= blend < 1:
            raise RedconvertError(f"blend={blend!r} must be the first answer's share in the second, in [0, 1)")
        self.blend = float(blend)
        self._layers = tuple(_layers(little, big).values())  # in a tuple: they are in `little` already
        self.little, self.big, self.confidence, self.cost = little, big, confidence, cost
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        self.eval()

    def train(self, mode: bool = True) -> Cascade:
        """Refused: train the networks in it."""
        if mode:
            raise RedconvertError("a cascade is for inference: train .little and .big, then make another cascade")
        return super().train(False)

    def extra_repr(self) -> str:
        blend = f", blend={self.blend:g}" if self.blend else ""
        return f"threshold={float(self.threshold):.3g}{blend}, cost={self.cost}"

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The networks' own arguments; class scores ``(N, classes)``."""
        scores = _scores(self.little(*args, **kwargs))
        unsure = (self.confidence(scores) < self.threshold).nonzero().flatten()
        if self._layers and not any(layer.enabled for layer in self._layers):
            unsure = unsure[:0]
        self.asked_again = unsure
        if not len(unsure):
            return scores
        some = _samples((args, kwargs), unsure, len(scores)) if len(unsure) < len(scores) else (args, kwargs)
        # Observers are told of the first pass alone, in which every sample takes part.
        with attributes(self._layers, enabled=False, observers=()) if self.big is None else nullcontext():
            answers = _scores((self.little if self.big is None else self.big)(*some[0], **some[1]))
        answers = answers.to(scores.dtype)
        if self.blend:
            answers = answers.lerp(scores.index_select(0, unsure), self.blend)
        return scores.index_copy(0, unsure, answers)

    def stand_in(self, layer: nn.Module) -> nn.Module:
        """What runs in place of a layer: of a deployed ``little`` another module, for whoever times it."""
        found = getattr(self.little, "stand_in", None)
        return layer if found is None else found(layer)

    def deployed(self, example_inputs: Any, **options: Any) -> Cascade:
        """The same of `redconvert.deploy` of ``little``; a ``big`` of one's own stays as it is."""
        fast = deploy(self.little, example_inputs, **options)
        return Cascade(fast, self.big, float(self.threshold), self.confidence, self.cost, self.blend)


def cascade(
    dynamic: nn.Module,
    batches: Any,
    budget: float,
    *,
    big: nn.Module | None = None,
    confidence: Callable[[Tensor], Tensor] = margin,
    blend: float = 0.0,
) -> Cascade:
    """Ask again where the reduced network is unsure, as often as a budget allows. Nothing is trained.

    Set a budget of the network itself first, well below this one: ``set_budget(dynamic, 0.5, batches)``, then
    ``cascade(dynamic, batches, 0.65)`` lets 15 % of the samples have the dense network's answer.

    Args:
        dynamic: a converted network that takes its reduced candidates, or with ``big`` any other; it is not changed.
        batches: unlabelled, and such that the network was not trained on: it is surer of what it has learnt. Can be
            read several times.
        budget: average multiply-adds of both passes together, as a share of the dense network's; of those of ``big``
            where the first network is not a dynamic one.
        big: another network for the second pass, such as the original of a trained one; what it costs is counted.
        confidence, blend: see `Cascade`.

    Raises:
        RedconvertError: a budget that the first pass alone exceeds, no batches, outputs that are no class scores, or
            neither dynamic layers nor ``big``.
    """
    if isinstance(batches, Iterator):
        raise RedconvertError("batches is an iterator, which can be read only once: pass a list or a DataLoader")
    if not isinstance(budget, int | float) or not budget > 0:
        raise RedconvertError(f"budget={budget!r} must be a positive share of the dense MACs")
    layers = _layers(dynamic, big)
    sure, executed, whole = _first_pass(dynamic, layers, batches, confidence)
    second = whole if big is None else _macs(big, batches)
    whole = whole if layers else second
    little, dense = executed / whole, second / whole
    if budget < little:
        raise RedconvertError(
            f"budget={budget:g} is below what the first pass alone costs, {little:.4f} of the dense MACs: set a lower "
            f"budget of the network first (redconvert.set_budget)"
        )
    threshold = _threshold(sure, (budget - little) / dense)
    again = float((sure < threshold).double().mean())
    cost = CascadeCost(little + again * dense, little, dense, again, len(sure))
    return Cascade(dynamic, big, threshold, confidence, cost, blend)


def _first_pass(
    model: nn.Module, layers: dict[str, DynamicConv], batches: Any, confidence: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float, float]:
    """How sure it is of each sample, ``(samples)``, and its executed and dense MACs per sample."""
    meter, parts = MacsMeter(model, layers), []
    run = meter.run if layers else partial(call_with, model)
    with measuring(model):
        for batch in each_batch(batches):
            parts.append(confidence(_scores(run(move_to(batch, device_of(model))))).double().cpu())
    if layers:
        return torch.cat(parts), statistics.mean(meter.executed), statistics.mean(meter.dense)
    macs = _macs(model, batches)
    return torch.cat(parts), macs, macs


def _macs(model: nn.Module, batches: Any) -> float:
    """Of a network without gates, per sample."""
    first = move_to(next(each_batch(batches)), device_of(model))
    with measuring(model):
        samples = len(_scores(call_with(model, first)))
    return dense_macs(model, first).total / samples


def _layers(little: nn.Module, big: nn.Module | None) -> dict[str, DynamicConv]:
    """The dynamic layers of the first network; it needs some where it is to answer again itself."""
    plain = big is not None and not any(isinstance(module, DynamicConv) for module in little.modules())
    return {} if plain else dynamic_layers(little)


def _threshold(sure: Tensor, share: float) -> float:
    """The largest threshold below which no more than this share of the confidences ``sure (N)``, float64, lies."""
    ordered = torch.cat([sure.sort().values, sure.new_tensor([2.0])])  # nobody is surer than 1
    return float(ordered[int(min(share, 1.0) * len(sure) + 1e-9)])


def _scores(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise RedconvertError(f"a cascade compares class scores (N, classes), and the network returns {shape}")
    return outputs


def _samples(inputs: Any, samples: Tensor, count: int) -> Any:
    """These of ``count`` samples, of every tensor that holds a whole number of rows for each."""

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] % count:
            return leaf
        return select(leaf, 0, sample_rows(samples.to(leaf.device), leaf.shape[0] // count))

    return tree_map(pick, inputs)
