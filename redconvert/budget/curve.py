"""How many answers stay as they were at each budget: the curve that a budget is chosen from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibrate import calibrate
from ..cost.measure import MacsMeter
from ..cost.times import LayerTimes
from ..errors import BudgetTooLowError, RedconvertError, require
from ..files import write_picture
from ..inputs import call_with, device_of, each_labelled_batch, measuring, move_to, tensors_in, unwrapped
from ..layers import disabled, dynamic_layers
from ..layers.modes import remembered, undone_on_error
from ..progress import progress_bar
from .run import check_budget, clear_budget, is_constant, set_budget
from .sensitivity import harms

__all__ = ["Answers", "BudgetCurve", "CurvePoint", "budget_curve"]

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class CurvePoint:
    """A network at one budget. What is counted is every answer: of a segmentation each pixel's.

    Attributes:
        budget: what was asked for.
        share: executed multiply-adds, as a share of the dense network's; a mean over the samples.
        agreement: how many first classes are those of the dense network.
        divergence: of the dense network's probabilities from these, Kullback-Leibler, in nats.
        accuracy: how many first classes are the label; None without labels.
        time: the expected share of the dense network's time, where the budget is one of time.
    """

    budget: float
    share: float
    agreement: float
    divergence: float
    accuracy: float | None
    time: float | None = None

    @property
    def cost(self) -> float:
        """What the budget is of: the time where that is known, else the multiply-adds."""
        return self.share if self.time is None else self.time

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BudgetCurve:
    """What `budget_curve` measured.

    Attributes:
        model: name of its class.
        points: from the largest budget to the smallest.
        unreachable: budgets below what the network can cost.
        samples: how many each point is measured on.
        dense_accuracy: of the dense network; None without labels.
        refitted: whether the cheap operations were solved for again at every budget.
    """

    model: str
    points: tuple[CurvePoint, ...]
    unreachable: tuple[float, ...]
    samples: int
    dense_accuracy: float | None
    refitted: bool

    @property
    def _timed(self) -> bool:
        return any(point.time is not None for point in self.points)

    def cheapest(self, agreement: float) -> CurvePoint:
        """The cheapest point at which so many answers stay; RedconvertError: there is none."""
        enough = [point for point in self.points if point.agreement >= agreement]
        if not enough:
            best = max(self.points, key=lambda point: point.agreement)
            raise RedconvertError(
                f"at no budget do {agreement:.1%} of the answers stay: the most is {best.agreement:.1%}, at "
                f"{best.cost:.1%} of the dense {'time' if self._timed else 'MACs'}. Ask for less, or try larger budgets"
            )
        return min(enough, key=lambda point: point.cost)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Answers that stay, and right ones where labels are known, against executed multiply-adds, or time."""
        figures = require("matplotlib.figure", extra="plot", purpose="The picture of a budget curve")
        figure = figures.Figure(figsize=(6.5, 4), layout="constrained")  # no pyplot: it would keep the figure
        axes = figure.subplots()
        shares = [100.0, *(100 * point.cost for point in self.points)]
        axes.plot(shares, [100.0, *(100 * point.agreement for point in self.points)], marker="o", label="that stay")
        if self.dense_accuracy is not None:
            right = [self.dense_accuracy, *(point.accuracy or 0.0 for point in self.points)]
            axes.plot(shares, [100 * share for share in right], marker="s", label="that are right")
            axes.legend(fontsize=8)
        what = "answers that stay, %" if self.dense_accuracy is None else "answers, %"
        cost = "expected time" if self._timed else "executed MACs"
        axes.set(xlabel=f"{cost}, % of the dense network's", ylabel=what)
        axes.set_ylim(top=101)
        axes.set_title(f"{self.model}, {self.samples} samples", loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        write_picture(path, figure)

    def __str__(self) -> str:
        labelled, timed = self.dense_accuracy is not None, self._timed
        head = f"{'budget':>7}  {'MACs':>6}  {'same answer':>11}  {'divergence':>10}"
        lines = [head + "   right" * labelled + "    time" * timed]
        for point in self.points:
            line = f"{point.budget:7.1%}  {point.share:6.1%}  {point.agreement:11.1%}  {point.divergence:10.4f}"
            line += f"  {point.accuracy:6.1%}" if point.accuracy is not None else ""
            lines.append(line + (f"  {point.time:6.1%}" if point.time is not None else ""))
        if labelled:
            lines.append(f"{'dense':>7}  {1:6.1%}  {1:11.1%}  {0:10.4f}  {self.dense_accuracy:6.1%}")
        lines += [f"{budget:7.1%}  is below what the network can cost" for budget in self.unreachable]
        return "\n".join([*lines, f"{self.samples} samples"])


def budget_curve(
    dynamic: nn.Module,
    batches: Any,
    budgets: Sequence[float] = BUDGETS,
    *,
    test: Any = None,
    refit: bool = False,
    keep: float | None = None,
    times: LayerTimes | None = None,
    progress: bool = False,
) -> BudgetCurve:
    """Try budgets and say how many answers stay those of the dense network.

    Without ``keep`` the network stays as it was.

    ``redconvert.set_budget`` at each budget, then a pass over ``test`` that compares the first class and the
    probabilities of every sample with those of the network within `redconvert.disabled`.

    Args:
        dynamic: what `redconvert.convert` returned, calibrated; it gives class scores ``(N, classes, ...)``.
        batches: for choosing what is reduced, without labels; can be read several times.
        budgets: shares of the dense multiply-adds, in (0, 1]; with ``times`` of the dense network's time.
        test: batches to measure on that were not used for calibration, with labels or without; None: ``batches``. The
            dense network's answers to them are kept in memory.
        refit: solve for the cheap operations again at every budget, given what is reduced then
            (``redconvert.calibrate(decisions="gates")`` on ``batches``). Better answers, and a calibration's time for
            each budget.
        keep: leave the network at the cheapest budget at which this share of the answers stays, that of
            ``curve.cheapest(keep)``; where there is none it stays as it was.
        times: see `set_budget`.
        progress: show a bar (needs rich).

    Raises:
        RedconvertError: no batches, outputs that are no class scores, a budget outside (0, 1], budgets that are all
            below what the network can cost, or whatever `set_budget` refuses.
    """
    dynamic = unwrapped(dynamic)
    layers = dynamic_layers(dynamic)
    for budget in budgets:
        check_budget(budget)
    wanted = sorted(set(map(float, budgets)), reverse=True)
    if not wanted:
        raise RedconvertError("budgets is empty: give shares of the dense MACs, such as (0.9, 0.8, 0.7)")
    for given in (batches, test):
        if isinstance(given, Iterator):
            raise RedconvertError("batches is an iterator, which can be read only once: pass a list or a DataLoader")
    if keep is not None and not 0 <= keep <= 1:
        raise RedconvertError(f"keep={keep!r} must be a share in [0, 1]")
    points, unreachable = [], []
    parts = [part for layer in layers.values() for part in layer.added_modules()]
    with undone_on_error(parts) as undo, progress_bar(progress, "Trying budgets", len(wanted) + 1) as step:
        answers = Answers(dynamic, batches if test is None else test)
        clear_budget(dynamic)
        effects = harms(dynamic, batches) if times is not None or is_constant(dynamic, batches) else None
        by: Literal["gates", "layers"] = "gates" if effects is None else "layers"
        step()
        taken, least = undo, math.inf
        for budget in wanted:
            undo()
            try:
                found = set_budget(dynamic, budget, batches, by=by, effects=effects, times=times)
            except BudgetTooLowError as error:
                unreachable.append(budget)
                too_low = error
            else:
                if refit:
                    calibrate(dynamic, batches, decisions="gates")
                points.append(point := CurvePoint(budget, *answers.compare(dynamic), found.time))
                if keep is not None and point.agreement >= keep and point.cost < least:
                    taken, least = remembered(parts), point.cost
            step()
        taken()
    if not points:
        raise too_low
    name = type(dynamic).__name__
    return BudgetCurve(name, tuple(points), tuple(unreachable), answers.samples, answers.accuracy, refit)


class Answers:
    """The dense network's answers, and how another's compare."""

    def __init__(self, dynamic: nn.Module, batches: Any) -> None:
        self.batches, self.dense = batches, list[Tensor]()
        right: list[Tensor] = []
        self.labelled, self.samples = True, 0
        with measuring(dynamic), disabled(dynamic):
            for inputs, labels in each_labelled_batch(batches):
                scores = _scores(call_with(dynamic, move_to(inputs, device_of(dynamic))))
                self.dense.append(scores)
                self.samples += len(scores)
                self.labelled = self.labelled and _fits(labels, scores)
                if self.labelled:
                    right.append((scores.argmax(1) == labels.cpu()).flatten())
        self.accuracy = _mean(right) if self.labelled else None

    def compare(self, dynamic: nn.Module) -> tuple[float, float, float, float | None]:
        """Share of MACs, agreement, divergence and accuracy of the network as it is now."""
        meter = MacsMeter(dynamic, dynamic_layers(dynamic))
        same, apart, right = [], [], []
        with measuring(dynamic):
            for (inputs, labels), dense in zip(each_labelled_batch(self.batches), self.dense, strict=True):
                scores = _scores(meter.run(move_to(inputs, device_of(dynamic))))
                same.append((scores.argmax(1) == dense.argmax(1)).flatten())
                logs, theirs = scores.log_softmax(1), dense.log_softmax(1)
                apart.append((theirs.exp() * (theirs - logs)).sum(1).flatten())
                if self.labelled:
                    right.append((scores.argmax(1) == labels.cpu()).flatten())
        share = sum(meter.executed) / sum(meter.dense)
        return share, _mean(same), max(_mean(apart), 0.0), _mean(right) if self.labelled else None


def _scores(outputs: Any) -> Tensor:
    """Class scores ``(N, classes, ...)``, the first such tensor of the outputs, on the CPU in float32."""
    for tensor in tensors_in(outputs):
        if tensor.is_floating_point() and tensor.dim() >= 2 and tensor.shape[1] > 1:
            return tensor.float().cpu()
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(outputs)) or type(outputs).__name__
    raise RedconvertError(f"a budget curve compares class scores (N, classes, ...), and the network returns {shapes}")


def _fits(labels: Any, scores: Tensor) -> bool:
    """Whether they are class indices, one for each answer."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return labels.shape == scores.argmax(1).shape


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())
