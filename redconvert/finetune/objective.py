"""The loss of one batch: labels, teacher, its features, and efficiency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RedconvertError
from ..inputs import call_with, evaluating, take_inputs, take_labels
from .distill import distillation_loss, teach
from .features import FeatureLoss
from .loss import EfficiencyLoss, rows_of

__all__ = ["Objective", "Terms"]

IGNORED = -100  # by cross entropy


class Terms(NamedTuple):
    """Of one batch: the loss that is minimised, its part without efficiency, and per sample cost and correctness.

    ``right`` is the share of right answers per sample (labels, or the teacher's); None for outputs that are no scores.
    """

    loss: Tensor
    task: Tensor
    costs: Tensor
    right: Tensor | None


class Objective:
    """``(1 - d) criterion(outputs, labels) + d distillation(outputs, teacher) + weight * L_e + v * L_f``.

    Args:
        teacher: a network or function; None: labels alone.
        distill: d. Without labels in a batch it is 1, without a teacher 0.
        temperature: of the distillation.
        criterion: ``(outputs, labels) -> scalar``; cross entropy where None.
        efficiency: prices the passes of the network that trains.
        weight: of the efficiency loss; 0 measures costs alone.
        features: compares the network with the teacher on the way; None: answers alone.
        features_weight: v.
    """

    def __init__(
        self,
        teacher: Callable[..., Any] | None,
        distill: float,
        temperature: float,
        criterion: Callable[[Any, Any], Tensor] | None,
        efficiency: EfficiencyLoss,
        weight: float,
        features: FeatureLoss | None = None,
        features_weight: float = 0.0,
    ) -> None:
        self.teacher, self.distill, self.temperature = teacher, distill, temperature
        self.criterion, self.efficiency, self.weight = criterion, efficiency, weight
        self.features, self.features_weight = features, features_weight

    def __call__(self, network: nn.Module, batch: Any) -> Terms:
        """Run ``network`` on a batch and price its answer.

        Raises:
            RedconvertError: no labels and no teacher, or labels that are no classes of the network.
        """
        inputs, labels = take_inputs(batch), take_labels(batch)
        if labels is None and self.teacher is None:
            raise RedconvertError("the batch has no labels and there is no teacher: pass (inputs, labels) or a teacher")
        asks = self.distill or labels is None or self.features is not None
        taught = teach(self.teacher, inputs) if self.teacher is not None and asks else None
        outputs = call_with(network, inputs)
        task = self._task(outputs, labels, taught)
        loss = task + self._missed()
        right = _right(outputs, taught if labels is None else labels)
        if self.weight and torch.is_grad_enabled():
            loss = loss + self.weight * self.efficiency(
                outputs, taught if labels is None or self.distill == 1 else labels
            )
            assert self.efficiency.costs is not None
            return Terms(loss, task.detach(), self.efficiency.costs, right)
        with torch.no_grad():
            costs = self.efficiency.cost(rows_of(outputs))
        return Terms(loss, task.detach(), costs, right)

    def evaluate(self, network: nn.Module, batch: Any) -> Terms:
        """The same in ``eval()`` and without gradients."""
        with evaluating(network):
            terms = self(network, batch)
        return terms

    def _missed(self) -> Tensor | float:
        """What the network misses of the teacher's features, in steps in which gates rest: it would open them."""
        if self.features is None:
            return 0.0
        if torch.is_grad_enabled() and self.features.gates_rest:
            return self.features_weight * self.features()
        self.features.forget()
        return 0.0

    def _task(self, outputs: Any, labels: Any, taught: Any) -> Tensor:
        d = self.distill if labels is not None else 1.0
        terms = []
        if d < 1:
            terms.append((1 - d) * (self.criterion or cross_entropy)(outputs, labels))
            if not isinstance(terms[0], Tensor) or terms[0].dim():
                raise RedconvertError(f"criterion(outputs, labels) must return a scalar tensor, not {terms[0]!r:.80}")
        if taught is not None and d > 0:
            terms.append(d * distillation_loss(outputs, taught, self.temperature))
        return torch.stack(terms).sum()


def cross_entropy(outputs: Any, labels: Any) -> Tensor:
    """With labels that are classes of the network: others would stop a GPU with an assertion."""
    check_labels(outputs, labels)
    return F.cross_entropy(outputs, labels if labels.is_floating_point() else labels.long())


def check_labels(outputs: Any, labels: Any) -> None:
    """Class indices ``(N, ...)``, or what has the shape of the scores; -100 is left out, as in cross entropy."""
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        raise RedconvertError("the network's output is not scores (N, classes, ...): pass criterion=(outputs, labels)")
    if not isinstance(labels, Tensor):
        raise RedconvertError(f"labels must be a tensor, not {type(labels).__name__}: pass criterion=(outputs, labels)")
    indices = not labels.is_floating_point()
    if labels.shape != (outputs.shape[:1] + outputs.shape[2:] if indices else outputs.shape):
        raise RedconvertError(f"labels of shape {tuple(labels.shape)} do not fit scores {tuple(outputs.shape)}")
    counted = labels[labels != IGNORED] if indices else labels.new_empty(0)
    if not counted.numel():
        return
    low, high = (int(bound) for bound in counted.aminmax())
    if low < 0 or high >= outputs.shape[1]:
        raise RedconvertError(
            f"labels run from {low} to {high}, but the network scores {outputs.shape[1]} classes, 0 to "
            f"{outputs.shape[1] - 1}: map the labels or replace the network's head before conversion"
        )


def _right(outputs: Any, wanted: Any) -> Tensor | None:
    """Share of right answers per sample; ``wanted`` is classes or scores."""
    if not isinstance(outputs, Tensor) or not isinstance(wanted, Tensor) or outputs.dim() < 2:
        return None
    classes = wanted.argmax(1) if wanted.shape == outputs.shape else wanted
    if classes.shape != outputs.shape[:1] + outputs.shape[2:]:
        return None
    return (outputs.detach().argmax(1) == classes).float().view(len(outputs), -1).mean(1)
