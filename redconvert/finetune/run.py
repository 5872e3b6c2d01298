"""One finetuning run: position, steps, validation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cost.measure import describe_environment, static_macs
from ..errors import RedconvertError
from ..inputs import move_to, take_inputs
from ..layers import DynamicConv, resting_gates
from ..progress import progress_bar
from .history import History
from .objective import Objective, Terms
from .parameters import OPTIMIZERS, build_optimizer, learning_rate_factor, parameter_groups
from .randomness import renew_loader, seed_position
from .state import RunFile

__all__ = ["Run", "Settings", "length_of", "training_mode"]

Norm = nn.modules.batchnorm._BatchNorm
PRECISIONS = (None, "no", "bf16", "fp16")
ENDED = object()


@dataclass(frozen=True)
class Settings:
    """What shapes the numbers of a run: it goes on only where these are the same."""

    epochs: int
    lr: float
    gate_lr: float
    target: float | None
    efficiency: float
    optimizer: str
    momentum: float
    weight_decay: float
    warmup: float
    distill: float
    temperature: float
    clip: float | None
    accumulate: int
    mixed_precision: str | None
    freeze_norms: bool
    seed: int
    teacher: str | None
    batches: int
    gate_every: int = 1
    dropout: bool = True
    processes: int = 1
    features: float = 0.0
    feature_layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("accumulate", 1), ("gate_every", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise RedconvertError(f"{name}={getattr(self, name)!r} must be an integer of at least {least}")
        for name in ("lr", "gate_lr", "efficiency", "weight_decay", "features"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RedconvertError(f"{name}={getattr(self, name)!r} must be a number of at least 0")
        if self.features and self.gate_every == 1:
            raise RedconvertError(
                f"features={self.features!r} is left out of steps in which gates learn, as it would open them whatever "
                f"that costs, and with gate_every=1 they always do: pass gate_every=8, or 0 where they need not learn"
            )
        for name in ("temperature", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise RedconvertError(f"{name}={getattr(self, name)!r} must be positive")
        for name in ("distill", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise RedconvertError(f"{name}={getattr(self, name)!r} must be in [0, 1]")
        if not 0 <= self.momentum < 1:
            raise RedconvertError(f"momentum={self.momentum!r} must be in [0, 1)")
        if self.mixed_precision not in PRECISIONS:
            raise RedconvertError(f"mixed_precision must be one of {PRECISIONS}, not {self.mixed_precision!r}")
        if self.teacher not in (None, "original", "own"):
            raise RedconvertError(f"teacher must be 'original', a network, a function or None, not {self.teacher!r}")
        if self.optimizer not in OPTIMIZERS:
            raise RedconvertError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")


class Run:
    """One finetuning: its parts, its position, its history."""

    def __init__(
        self, dynamic: nn.Module, settings: Settings, objective: Objective, accelerator: Any, file: RunFile
    ) -> None:
        self.dynamic, self.settings, self.objective = dynamic, settings, objective
        self.accelerator, self.file = accelerator, file
        self.history = History(asdict(settings))
        self.network: nn.Module = dynamic

    def prepare(self, train: Any, val: Any) -> None:
        """Device, wrappers, shares of the data, and what the rest of the network costs."""
        accelerator, settings = self.accelerator, self.settings
        groups = parameter_groups(self.dynamic, settings.lr, settings.gate_lr, settings.weight_decay)
        self.dynamic.to(accelerator.device)
        self.optimizer = build_optimizer(settings.optimizer, groups, settings.momentum)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        if isinstance(self.objective.teacher, nn.Module):
            self.objective.teacher.to(accelerator.device)
        first = self._first(train)
        self.objective.efficiency.static_macs = static_macs(self.dynamic, first)
        self.network, self.optimizer = accelerator.prepare(self.dynamic, self.optimizer)
        self.train, self.val = (self._share(loader) for loader in (train, val))
        self.history.environment = describe_environment(self.dynamic, first) | {"processes": accelerator.num_processes}
        self.steps = settings.epochs * math.ceil(length_of(self.train) / settings.accumulate)

    def _first(self, train: Any) -> Any:
        seed_position(self.settings.seed)
        try:
            with _at("batch 0"):
                return move_to(take_inputs(next(iter(train))), self.accelerator.device)
        except StopIteration:
            raise RedconvertError("train is empty: give at least one batch (drop_last drops a short one)") from None

    def _share(self, loader: Any) -> Any:
        if isinstance(loader, torch.utils.data.DataLoader):
            return self.accelerator.prepare(loader)
        if loader is not None and self.accelerator.num_processes > 1:
            raise RedconvertError("several processes share a DataLoader between them: pass one instead of a list")
        return loader

    def go(self, resume: bool, save_every: int | None, progress: bool) -> None:
        position = self.file.load(self.dynamic, self.optimizer, self.accelerator.scaler) if resume else None
        begin, skip = (position["epoch"], position["batch"]) if position else (0, 0)
        if position:
            self.history.steps, self.history.epochs = position["steps"], position["epochs"]
        total = self.settings.epochs * length_of(self.train)
        self._drop_gradients()  # of whatever the network did before
        try:
            self._all_epochs(begin, skip, save_every, total, progress)
        finally:
            self._drop_gradients()
        if self.file.path is not None and self.accelerator.is_main_process:
            self.history.save(self.file.path.with_name("history.json"))

    def _drop_gradients(self) -> None:
        for parameter in self.dynamic.parameters():
            parameter.grad = None

    def _all_epochs(self, begin: int, skip: int, save_every: int | None, total: int, progress: bool) -> None:
        with progress_bar(progress and self.accelerator.is_main_process, "finetuning", total) as bar:
            bar(begin * length_of(self.train))
            for epoch in range(begin, self.settings.epochs):
                self._train_epoch(epoch, skip if epoch == begin else 0, save_every, bar)
                self._validate(epoch)
                self._save(epoch + 1, 0)

    def _train_epoch(self, epoch: int, skip: int, save_every: int | None, bar: Any) -> None:
        start, accumulate = time.perf_counter(), self.settings.accumulate
        training_mode(self.dynamic, self.settings.freeze_norms, self.settings.dropout)
        per_epoch = math.ceil(length_of(self.train) / accumulate)
        for index, batch in self._batches(self.train, epoch):
            bar(1, self._describe(epoch))
            if index < skip:  # read again what was done already, so that what follows is the same
                continue
            done = index // accumulate
            last = index + 1 == length_of(self.train)
            self._step(batch, epoch, index, epoch * per_epoch + done, update=last or (index + 1) % accumulate == 0)
            if save_every and (index + 1) % (save_every * accumulate) == 0 and not last:
                self._save(epoch, index + 1)
        rows = self.history.steps[epoch * length_of(self.train) :]
        self.history.epochs.append(
            {"epoch": epoch + 1}
            | {key: sum(row[key] for row in rows) / len(rows) for key in ("loss", "task", "cost")}
            | {"seconds": round(time.perf_counter() - start, 2)}
        )

    def _batches(self, loader: Any, epoch: int) -> Iterator[tuple[int, Any]]:
        """Batches with their index; the random numbers of each depend on seed, epoch and index alone."""
        seed, rank, length = self.settings.seed, self.accelerator.process_index, length_of(loader)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(abs(epoch))
        renew_loader(loader, seed, epoch)
        ahead = 1 if isinstance(loader, torch.utils.data.DataLoader) else 0  # accelerate reads one batch in advance
        source = iter(loader)
        for index in range(length):
            # Samplers draw their order with the first batch: alike in all processes.
            seed_position(seed, epoch, index, rank if index else 0)
            with _at(f"batch {index + ahead}" if index or not ahead else "batch 0 or 1", _name(epoch)):
                batch = next(source, ENDED)
            if batch is ENDED:
                raise RedconvertError(
                    f"a loader ended after {index} of the {length} batches that its length says: correct its __len__"
                    if index
                    else "a loader is empty: give at least one batch (drop_last drops a short one)"
                )
            seed_position(seed, epoch, index, rank, 1)  # dropout does not depend on prefetching
            yield index, move_to(batch, self.accelerator.device)
        next(source, ENDED)  # accelerate forgets a loader only when it has seen its end

    def _step(self, batch: Any, epoch: int, index: int, step: int, update: bool) -> None:
        factor = learning_rate_factor(step, self.steps, self.settings.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        statistics = [buffer.clone() for buffer in self.dynamic.buffers()]
        every = self.settings.gate_every
        learning = every > 0 and step % every == 0
        try:
            with (
                nullcontext() if update else self.accelerator.no_sync(self.network),
                nullcontext() if learning else resting_gates(self.dynamic),
            ):
                with self.accelerator.autocast(), _at(f"batch {index}", _name(epoch)):
                    terms = self.objective(self.network, batch)
                self._check_finite("loss", terms.loss, epoch, index)
                self.accelerator.backward(terms.loss / self.settings.accumulate)
            if update:
                self._update(epoch, index)
        except BaseException:
            for buffer, before in zip(self.dynamic.buffers(), statistics, strict=True):
                buffer.copy_(before)  # the forward pass has moved the statistics of norms
            raise
        self._record(terms, self.settings.lr * factor)

    def _update(self, epoch: int, index: int) -> None:
        if self.settings.clip is not None:
            norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        if self.accelerator.scaler is None:  # which skips steps that are too large
            self._check_finite("gradient's norm", norm, epoch, index)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _check_finite(self, what: str, value: Tensor, epoch: int, index: int) -> None:
        mean = self.accelerator.reduce(value.detach().float().clone(), "mean")
        if not torch.isfinite(mean):
            kept = f"The last good state is in '{self.file.path}'" if self.file.path else "No out= was given"
            if self.file.path and not self.file.path.exists():
                kept = f"'{self.file.path}' was not written yet"
            raise RedconvertError(
                f"the {what} is {float(mean)} at batch {index} of {_name(epoch)}; training stopped and the network is "
                f"as it was before this batch. {kept}. Look at that batch, or lower lr={self.settings.lr:g}"
            )

    def _record(self, terms: Terms, lr: float) -> None:
        values = torch.stack([terms.loss.detach().float(), terms.task.float(), terms.costs.float().mean()])
        loss, task, cost = self.accelerator.reduce(values, "mean").tolist()
        self.history.steps.append({"loss": loss, "task": task, "cost": cost, "lr": lr})
        if self.accelerator.trackers:
            self.accelerator.log(self.history.steps[-1], step=len(self.history.steps))

    def _validate(self, epoch: int) -> None:
        if self.val is None:
            return
        tasks, costs, rights = [], [], []
        for index, batch in self._batches(self.val, -1 - epoch):
            with self.accelerator.autocast(), _at(f"batch {index}", _name(-1 - epoch)):
                terms = self.objective.evaluate(self.network, batch)
            tasks.append(self._gathered(terms.task.expand(len(terms.costs))))
            costs.append(self._gathered(terms.costs))
            if terms.right is not None:
                rights.append(self._gathered(terms.right))
        row = self.history.epochs[-1]
        row |= {"val_loss": float(torch.cat(tasks).mean()), "val_cost": float(torch.cat(costs).mean())}
        if rights:
            row["val_accuracy"] = float(torch.cat(rights).mean())
        if self.accelerator.trackers:
            self.accelerator.log({k: v for k, v in row.items() if k.startswith("val_")}, step=len(self.history.steps))

    def _gathered(self, values: Tensor) -> Tensor:
        """Of all processes, without the samples that fill up the last batch."""
        return values if self.accelerator.num_processes == 1 else self.accelerator.gather_for_metrics(values)

    def _save(self, epoch: int, batch: int) -> None:
        if self.file.path is None or not self.accelerator.is_main_process:
            return
        rows = {"steps": self.history.steps, "epochs": self.history.epochs}
        self.file.save(self.dynamic, self.optimizer, self.accelerator.scaler, {"epoch": epoch, "batch": batch, **rows})
        self.history.save(self.file.path.with_name("history.json"))

    def _describe(self, epoch: int) -> str:
        text = f"epoch {epoch + 1}/{self.settings.epochs}"
        if self.history.steps:
            text += "  loss {loss:.3f}  cost {cost:.0%}".format(**self.history.steps[-1])
        return text


def training_mode(model: nn.Module, freeze_norms: bool, dropout: bool) -> None:
    """``model.train()``, but for its own batch norms (gates keep theirs) and for dropout, where these are to rest."""
    model.train()
    layers = [module for module in model.modules() if isinstance(module, DynamicConv)]
    gates = {module for layer in layers for module in layer.gate.modules()}
    for module in model.modules():
        rests = isinstance(module, nn.modules.dropout._DropoutNd) and not dropout
        if rests or (freeze_norms and isinstance(module, Norm) and module not in gates):
            module.eval()


def length_of(loader: Any) -> int:
    """How many batches ``loader`` holds; an error where it does not say, or holds none."""
    try:
        length = len(loader)
    except TypeError as error:
        raise RedconvertError(
            f"{type(loader).__name__} has no length, which the learning rate's schedule needs: pass a DataLoader over "
            f"a data set with a length, or a list of batches"
        ) from error
    if isinstance(loader, Tensor | dict | str | tuple):
        raise RedconvertError(f"pass a DataLoader or a list of batches, not one {type(loader).__name__}")
    if not length:
        raise RedconvertError("a loader is empty: give at least one batch (drop_last drops a short one)")
    return length


def _name(epoch: int) -> str:
    return f"epoch {epoch + 1}" if epoch >= 0 else f"the validation after epoch {-epoch}"


@contextmanager
def _at(*where: str) -> Iterator[None]:
    """Name the place in what is refused there."""
    place = " of ".join(where)
    try:
        yield
    except RedconvertError as error:
        raise RedconvertError(f"{place}: {error}") from error
    except RuntimeError as error:
        if "equal size" not in str(error) and "resize storage" not in str(error):
            raise
        raise RedconvertError(
            f"{place}: samples of different sizes cannot become one batch. Cut clips to one length and frames to one "
            f"size in the data set (redconvert.data does), or give the loader a collate_fn "
            f"({str(error).splitlines()[-1]})"
        ) from error
