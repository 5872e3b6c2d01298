"""Networks that train side by side on one GPU: each a CUDA graph on a stream of its own, all on the same batches."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from typing import Any

import torch
from cifar import augment
from torch import Tensor, nn
from training import backward, groups_of, is_dynamic

import redconvert
from redconvert.cost.measure import static_macs
from redconvert.finetune import FeatureLoss
from redconvert.finetune.parameters import build_optimizer

CLIP = 5.0  # of the gradient's norm


class Batches:
    """Augmented batches of one seed on the device, and what the teacher says of them, in the same memory each time."""

    def __init__(self, pixels: Tensor, labels: Tensor, teacher: nn.Module, arguments: Any, seed: int):
        self.flips = arguments.flips
        self.pixels, self.labels, self.teacher, self.size = pixels, labels, teacher, arguments.batch
        self.generator = torch.Generator(pixels.device).manual_seed(seed)
        self.x = pixels[: self.size].clone(memory_format=torch.channels_last)
        self.y, self.taught = labels[: self.size].clone(), self.answers()
        self.order = torch.empty(0)

    def next(self, step: int) -> None:
        """Another shuffle at the beginning of an epoch, then batch after batch; the last incomplete one is dropped."""
        count = len(self.pixels) // self.size
        if step % count == 0:
            self.order = torch.randperm(len(self.pixels), generator=self.generator, device=self.pixels.device)
        chosen = self.order[step % count * self.size :][: self.size]
        self.x.copy_(augment(self.pixels[chosen], generator=self.generator))
        self.y.copy_(self.labels[chosen])
        self.taught.copy_(self.answers())

    def answers(self) -> Tensor:
        """The teacher's, with ``flips`` the mean of those of an image and of its mirror image."""
        scores = self.teacher(self.x)
        return (scores + self.teacher(self.x.flip(3))) / 2 if self.flips else scores


class Runner:
    """One row and seed: a network, its optimizer, and its forward and backward pass as a CUDA graph.

    ``row``: what it has of its own: ``distill`` and ``temperature``; ``learns`` and ``target``, where its gates learn;
    ``features``, the weight of L_f, and ``fades``, whether that goes down with the learning rate; ``lr``, times that of
    the others.
    """

    def __init__(
        self, name: str, seed: int, row: dict[str, Any], model: nn.Module, given: Batches, arguments: Any
    ) -> None:
        self.name, self.seed, self.given, self.arguments = name, seed, given, arguments
        self.distill, self.learns = row.get("distill", arguments.distill), row.get("learns", False)
        self.temperature = row.get("temperature", arguments.temperature)
        device = given.x.device
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.dynamic = is_dynamic(model)
        self.efficiency = None
        if self.learns:
            static = static_macs(self.model, given.x[:1])
            self.efficiency = redconvert.EfficiencyLoss(self.model, target=row["target"], static_macs=static)
        self.features, self.fades = row.get("features", 0.0), row.get("fades", False)
        self.weight = torch.tensor(self.features, device=device)  # the graph reads it there
        if self.features:  # a teacher of its own, whose features lie where this row's graph left them
            self.teacher = copy.deepcopy(given.teacher)
            self.missed = FeatureLoss(self.model, self.teacher)
        lr = arguments.lr * row.get("lr", 1.0)
        self.optimizer = build_optimizer("sgd", groups_of(self.model, lr, arguments.gate_lr))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.losses = torch.zeros(2, device=device)  # the task's, and the costs' mean
        self.graph: redconvert.CapturedPasses | None = None
        if self.stream is not None:
            options = {"stream": self.stream, "rests": not self.learns}
            self.graph = redconvert.CapturedPasses(self._passes, self.model, self.optimizer, **options)

    def step(self, rate: float) -> None:
        """Replay the passes, clip, update; nothing waits for the device."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream())
            if self.fades:
                self.weight.fill_(self.features * rate)
            if self.graph is not None:
                self.graph()
            else:
                self.optimizer.zero_grad(set_to_none=True)
                rests = self.dynamic and not self.learns
                with redconvert.resting_gates(self.model) if rests else nullcontext():
                    self._passes()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=True)
            for group, initial in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = initial * rate
            self.optimizer.step()

    def _passes(self) -> None:
        """``(1 - d) CE + d t^2 KL + weight * L_e + v * L_f``, forward and backward; gradients end in ``.grad``."""
        given, arguments, extra = self.given, self.arguments, None
        with torch.autocast(given.x.device.type, torch.bfloat16, enabled=arguments.bfloat16):
            scores = self.model(given.x)
            if self.features:
                with torch.no_grad():
                    self.teacher(given.x)
        if self.features:
            extra = self.weight * self.missed()
        backward(
            scores.float(),
            given.y,
            given.taught,
            self.distill,
            self.temperature,
            self.efficiency,
            arguments.efficiency,
            self.losses,
            extra,
        )

    @torch.no_grad()
    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Of right answers in inference, decisions followed."""
        torch.backends.cudnn.allow_tf32 = False
        self.model.eval()
        answers = torch.cat([self.model(x).argmax(1) for x in pixels.split(1000)])
        return round(float((answers == labels).double().mean()), 5)


def side_by_side(runners: list[Runner], given: list[Batches], step: int, rate: float) -> None:
    """One step of every row."""
    with torch.no_grad():
        for each in given:
            each.next(step)
    for runner in runners:
        runner.step(rate)
    for runner in runners:  # the batches' memory is written again only when all have read it
        if runner.stream is not None:
            torch.cuda.default_stream().wait_stream(runner.stream)


def trial(runners: list[Runner], given: list[Batches], steps: int = 20) -> float:
    """Seconds of a step of all rows, at a rate of 0; the norms' statistics are put back, momenta begin again."""
    before = [copy.deepcopy(runner.model.state_dict()) for runner in runners]
    for step in range(2 * steps):
        if step == steps:
            synchronize()
            begin = time.perf_counter()
        side_by_side(runners, given, step, 0.0)
    synchronize()
    seconds = (time.perf_counter() - begin) / steps
    for runner, state in zip(runners, before, strict=True):
        runner.model.load_state_dict(state)
        runner.optimizer.state.clear()
    synchronize()
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(runner: Runner, repeats: int = 10) -> float:
    """Milliseconds of a forward and backward pass alone; the norms' statistics are put back."""
    before = copy.deepcopy(runner.model.state_dict())
    synchronize()
    begin = time.perf_counter()
    with torch.cuda.stream(runner.stream):
        for _ in range(repeats):
            runner.graph()  # type: ignore[misc]
    synchronize()
    seconds = (time.perf_counter() - begin) / repeats
    runner.model.load_state_dict(before)
    synchronize()
    return round(1000 * seconds, 3)
