"""`redconvert.set_budget`: one network, any budget, by moving the thresholds of its gates."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..cost.measure import count_samples, static_macs
from ..cost.times import LayerTimes
from ..errors import BudgetTooLowError, RedconvertError
from ..finetune.loss import EfficiencyLoss
from ..inputs import call_with, device_of, each_batch, measuring, move_to, unwrapped
from ..layers import DynamicConv, Observation, dynamic_layers, forced, observed
from ..layers.absorb import followers, pairs
from ..layers.gate import Gate
from ..layers.macs import layer_macs
from ..layers.modes import undone_on_error
from ..progress import Step, progress_bar
from .allocate import Choice, allocate
from .difficulty import measure_difficulty
from .gates import write_gates
from .sensitivity import harms

__all__ = [
    "Budget",
    "calibrate_gates",
    "check_budget",
    "clear_budget",
    "is_constant",
    "keep_budget",
    "set_budget",
]

STEPS = 14  # of the bisection: the threshold is then known to 1/1000
# MACs by decision; of a layer that reads what another hands over, by that one's candidate.
Prices: TypeAlias = dict[tuple[int, int], tuple[float, ...]]
MARGIN = 0.25  # the least distance of a gate that always decides the same from its threshold


@dataclass(frozen=True)
class Budget:
    """What `set_budget` reached. Costs are shares of the dense network's multiply-adds.

    Attributes:
        asked: the budget; of the time, where `time` is known.
        mean, lowest, highest, std: of the executed cost over the samples.
        by: "gates", "layers" or "inputs".
        samples: how many were measured.
        threshold: by gates and inputs, what every gate was moved by.
        harms: by layers, half of what `redconvert.budget.harms` expects of each layer's choice.
        time: by layers and times, the expected share of the dense network's time, deployed.
    """

    asked: float
    mean: float
    lowest: float
    highest: float
    std: float
    by: str
    samples: int
    threshold: float | None = None
    harms: dict[str, float] | None = None
    time: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        asked = f"asked: {self.asked:.1%}" + ("" if self.time is None else " of the time")
        expected = "" if self.time is None else f", expected to take {self.time:.1%} of the dense time"
        return (
            f"{self.mean:.1%} of the dense MACs on average over {self.samples} samples ({asked}), "
            f"{self.lowest:.1%} to {self.highest:.1%}, standard deviation {self.std:.1%}, set by {self.by}{expected}"
        )


def set_budget(
    dynamic: nn.Module,
    budget: float,
    batches: Any,
    *,
    by: Literal["auto", "gates", "layers", "inputs"] = "auto",
    effects: Mapping[str, Tensor] | None = None,
    times: LayerTimes | None = None,
    progress: bool = False,
) -> Budget:
    """Move the gates' thresholds so that the average executed MACs meet a budget. Nothing is trained.

    - ``by="gates"``, for a network whose gates were finetuned: one number is subtracted from what every gate says of
      all but the cheapest candidates, found by bisection. Inputs keep their different costs: one network gives
      the whole curve of accuracy against cost.
    - ``by="layers"``, for one that was only calibrated: each layer gets one decision for all inputs, such that
      the answers change least for the budget (`redconvert.budget.harms`). No input can change it, yet untrained
      gates end nearer to their thresholds than at conversion, so that finetuning can go on from there.
    - ``by="inputs"``, also for one that was only calibrated: the gates themselves are written in closed form, to say
      how much a reduction would harm this input, as far as the averages that a gate reads tell
      (`redconvert.budget.gates.write_gates`). Then as by gates; other budgets need ``by="gates"`` alone. Where
      many samples are at hand, `redconvert.budget.calibrate_gates` reads them all, and ``by="gates"`` a few. A start
      for training that differs by input; on CIFAR-10 without training it is about as good as by layers, not better.

    The thresholds are a buffer, saved with the network; another call replaces them, `clear_budget` removes them.

    Args:
        dynamic: what `redconvert.convert` returned, in place.
        budget: wished average of executed over dense MACs of the whole network, in (0, 1].
        batches: unlabelled; an iterable that can be read several times.
        by: "auto" takes "layers" where every gate decides the same for all inputs.
        effects: by layers, what `redconvert.budget.harms` gave before, which spares measuring it again.
        times: of `redconvert.layer_times`: the budget is then a share of the dense network's time, deployed, and layers
            are chosen by the milliseconds that they save.
        progress: show a bar (needs rich).

    Returns:
        What was reached, and how it spreads over inputs.

    Raises:
        BudgetTooLowError: a budget below what the search space allows; the message says what that is.
        RedconvertError: no batches, an iterator that can be read only once, ``by="inputs"`` with soft gates, times of
            another network, or together with gates or inputs. Gates are then as they were.
    """
    check_budget(budget)
    if by not in ("auto", "gates", "layers", "inputs"):
        raise RedconvertError(f"by must be 'auto', 'gates', 'layers' or 'inputs', not {by!r}")
    if times is not None and by not in ("auto", "layers"):
        raise RedconvertError(
            f"times are the prices of layers: leave them out, or set the budget by='layers', not {by!r}"
        )
    with _running(dynamic, batches, progress, "Setting the budget") as run:
        clear_budget(run.model)
        if by == "auto":
            by = "layers" if times is not None or is_constant(run.model, batches) else "gates"
        if by == "inputs":
            run.write_gates()
        return run.by_layers(budget, effects, times) if by == "layers" else run.by_gates(budget, by)


def calibrate_gates(dynamic: nn.Module, batches: Any, *, progress: bool = False) -> None:
    """Write the gates of a calibrated network in closed form, as ``set_budget(by="inputs")`` does, and no budget.

    Every gate is then open for every input, and ``set_budget(by="gates")``, for which a few of the batches do, closes
    them at one price for the whole network. See `redconvert.budget.gates.write_gates`.

    Args:
        dynamic: what `redconvert.convert` returned, in place; with ``gate="hard"``.
        batches: unlabelled; an iterable that can be read several times. The more samples, the better gates can tell.
        progress: show a bar (needs rich).

    Raises:
        RedconvertError: as `set_budget` does; gates are then as they were.
    """
    with _running(dynamic, batches, progress, "Calibrating the gates") as run:
        run.write_gates()
        clear_budget(run.model)


@contextmanager
def _running(dynamic: nn.Module, batches: Any, progress: bool, what: str) -> Iterator[_Run]:
    """Passes over the batches; after an error the gates are as they were."""
    if isinstance(batches, Iterator):
        raise RedconvertError("batches is an iterator, which can be read only once: pass a list or a DataLoader")
    dynamic = unwrapped(dynamic)
    layers = dynamic_layers(dynamic)
    with undone_on_error(layer.gate for layer in layers.values()), ExitStack() as stack:
        stack.enter_context(forced(dynamic))  # nothing is: gates decide
        step = stack.enter_context(progress_bar(progress, what))
        meter = EfficiencyLoss(dynamic)
        stack.callback(meter.close)
        meter.static_macs = static_macs(dynamic, move_to(next(each_batch(batches)), device_of(dynamic)))
        yield _Run(dynamic, layers, batches, meter, step)


def check_budget(budget: float) -> None:
    """RedconvertError: it is no share."""
    if not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise RedconvertError(f"budget={budget!r} must be a share of the dense MACs in (0, 1]")


def is_constant(dynamic: nn.Module, batches: Any) -> bool:
    """Whether every gate decides the same for all inputs."""
    decisions: dict[DynamicConv, set[Any]] = {}
    with (
        measuring(dynamic),
        observed(dynamic, lambda layer, seen: decisions.setdefault(layer, set()).update(seen.decisions)),
    ):
        for batch in each_batch(batches):
            call_with(dynamic, move_to(batch, device_of(dynamic)))
    return all(len(each) == 1 for each in decisions.values())


def clear_budget(dynamic: nn.Module) -> None:
    """Put every threshold back to 0: gates decide as they were trained to."""
    for layer in dynamic_layers(dynamic).values():
        layer.gate.threshold.zero_()


def keep_budget(dynamic: nn.Module) -> None:
    """Make the present thresholds part of the gates' own bias, as before training in a loop of your own.

    Decisions stay as they are; the next `set_budget` and `clear_budget` then start from here. `redconvert.finetune`
    does it by itself.
    """
    for layer in dynamic_layers(dynamic).values():
        layer.gate.keep_thresholds()


class _Run:
    """Passes over the batches that know what each sample costs."""

    def __init__(
        self, model: nn.Module, layers: dict[str, DynamicConv], batches: Any, meter: EfficiencyLoss, step: Step
    ) -> None:
        self.model, self.layers, self.batches, self.meter, self.step = model, layers, batches, meter, step

    def costs(self, listener: Callable[[DynamicConv, Observation], None] = lambda layer, seen: None) -> Tensor:
        """Executed share of every sample, under the present thresholds."""
        found, seen = [], []
        with measuring(self.model), observed(self.model, listener), observed(self.model, lambda _, o: seen.append(o)):
            for batch in each_batch(self.batches):
                seen.clear()
                inputs = move_to(batch, device_of(self.model))
                call_with(self.model, inputs)
                found.append(self.meter.cost(count_samples(inputs, next(iter(seen), None))).cpu().double())
        self.step()
        return torch.cat(found)

    # -- one threshold for all gates -------------------------------------------------------------------

    def by_gates(self, budget: float, by: str = "gates") -> Budget:
        widest = max(
            float((layer.gate.beta.detach().abs() + (layer.gate.reach + MARGIN)).max())
            for layer in self.layers.values()
            if not layer.candidates.is_static
        )
        lowest = self._shifted(widest)
        if lowest.mean() > budget:
            raise self._too_low(budget, float(lowest.mean()))
        low, high, costs = -widest, widest, lowest
        for _ in range(STEPS):
            middle = (low + high) / 2
            found = self._shifted(middle)
            if found.mean() > budget:
                low = middle
            else:
                high, costs = middle, found
        self._shift(high)
        return self._result(budget, costs, by=by, threshold=high)

    def _shifted(self, by: float) -> Tensor:
        self._shift(by)
        return self.costs()

    def _shift(self, by: float) -> None:
        for layer in self.layers.values():
            for axis in ("channel", "temporal"):
                layer.gate.thresholds(axis)[:-1] = by

    # -- gates that say what an input is worth ----------------------------------------------------------

    def write_gates(self) -> None:
        soft = next((name for name, layer in self.layers.items() if layer.config.gate == "soft"), None)
        if soft is not None:
            raise RedconvertError(
                f"layer '{soft}' mixes its open candidates (gate='soft'), and gates in closed form open several: "
                f"set the budget by='layers', or convert with gate='hard'"
            )
        macs, _ = self._price_list()
        found = measure_difficulty(self.model, self.layers, self.batches, self.step)
        tables = {name: torch.tensor(_grid(table), dtype=torch.float64) for name, (_, table) in macs.items()}
        write_gates(self.layers, found, tables)

    # -- one decision per layer ------------------------------------------------------------------------

    def by_layers(
        self, budget: float, effects: Mapping[str, Tensor] | None = None, times: LayerTimes | None = None
    ) -> Budget:
        macs, dense = self._price_list()
        prices, fixed = {name: table for name, (_, table) in macs.items()}, self.meter.static_macs
        if times is not None:
            prices, fixed, dense = times.prices({n: self.layers[n] for n in prices}), times.rest_ms, times.dense_ms
        least = fixed + sum(min(map(min, table.values())) for table in prices.values())
        if least > budget * dense:
            raise self._too_low(budget, least / dense, "MACs" if times is None else "time")
        effects = harms(self.model, self.batches) if effects is None else effects
        self.step()
        options = {
            name: [Choice(i, j, float(effects[name][i, j]), costs[0], costs) for (i, j), costs in table.items()]
            for name, table in prices.items()
        }
        sources = {reader: source for source, reader in pairs(self.layers).items()}
        followed = followers(self.layers)
        chosen = allocate(options, budget * dense - fixed, sources, followed)
        told = {**followed, **sources}
        read = {name: chosen[told[name]].channel if told.get(name) in chosen else 0 for name in chosen}
        spent = fixed + sum(choice.cost(read[name]) for name, choice in chosen.items())
        if spent > budget * dense * (1 + 1e-9):  # no choice of a source suits all that are told of it
            raise self._too_low(budget, spent / dense, "MACs" if times is None else "time")
        for name, choice in chosen.items():
            _decide(self.layers[name].gate, choice)
        found = {name: choice.harm / 2 for name, choice in chosen.items()}
        expected = None if times is None else spent / dense
        return self._result(budget, self.costs(), by="layers", harms=found, time=expected)

    def _price_list(self) -> tuple[dict[str, tuple[float, Prices]], float]:
        """By layer that runs: dense MACs per sample, and those of each decision. And the dense MACs of the network."""
        calls: dict[str, list[Observation]] = {}
        names = {layer: name for name, layer in self.layers.items()}
        samples = len(self.costs(lambda layer, seen: calls.setdefault(names[layer], []).append(seen)))
        macs = {name: self._macs(name, seen, samples) for name, seen in calls.items()}
        return macs, self.meter.static_macs + sum(whole for whole, _ in macs.values())

    def _macs(self, name: str, calls: list[Observation], samples: int) -> tuple[float, Prices]:
        """Per sample, over all calls of a layer: dense, and by decision."""
        layer, dense = self.layers[name], 0.0
        counts = len(layer.candidates.channels), len(layer.candidates.strides)
        table = {(i, j): Counter[int]() for i in range(counts[0]) for j in range(counts[1])}
        for seen in calls:
            each, share = layer_macs(layer, seen.input_shape, seen.output_shape), len(seen.decisions) / samples
            dense += each.dense * share
            for (i, j), costs in table.items():
                costs.update({source: each.executed(i, j, source) * share for source in range(len(each.reads))})
        return dense, {decision: tuple(costs.values()) for decision, costs in table.items()}

    # -- results ---------------------------------------------------------------------------------------

    def _result(self, asked: float, costs: Tensor, **more: Any) -> Budget:
        mean, low, high = float(costs.mean()), float(costs.min()), float(costs.max())
        std = float(costs.std()) if len(costs) > 1 else 0.0
        return Budget(asked, mean, low, high, std, samples=len(costs), **more)

    def _too_low(self, budget: float, least: float, what: str = "MACs") -> BudgetTooLowError:
        least = math.ceil(least * 1e4) / 1e4  # upwards: a budget of what is printed is met
        return BudgetTooLowError(
            f"budget={budget:g} is below the least that this network can cost, {least:.4f} of its dense {what}: ask "
            f"for more, or convert with a larger search_space or fewer layers skipped"
        )


@torch.no_grad()
def _decide(gate: Gate, choice: Choice) -> None:
    """Thresholds under which every input opens this candidate alone, as near to the gates as they may come."""
    reach = gate.reach + MARGIN
    for axis, index in (("channel", choice.channel), ("temporal", choice.temporal)):
        thresholds = gate.thresholds(axis)
        thresholds.copy_(gate.axis(axis, gate.beta + reach))
        thresholds[index : index + 1] = gate.axis(axis, gate.beta - reach)[index : index + 1]


def _grid(table: Prices) -> list[list[float]]:
    """``{(i, j): MACs}`` as rows, all input channels being there."""
    rows: dict[int, list[float]] = {}
    for (i, _), costs in sorted(table.items()):
        rows.setdefault(i, []).append(costs[0])
    return list(rows.values())
