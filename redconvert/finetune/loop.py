"""`redconvert.finetune`: gates, cheap operations and weights learn together, on any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..checkpoint import save_pretrained
from ..errors import RedconvertError
from ..layers import dynamic_layers
from .devices import new_accelerator, tracking, unwrapped
from .distill import TEMPERATURE, frozen_original
from .features import FeatureLoss
from .history import History
from .loss import EfficiencyLoss
from .memory import recomputed
from .objective import Objective
from .randomness import own_randomness
from .run import Run, Settings, length_of
from .state import RunFile

__all__ = ["finetune"]


def finetune(
    dynamic: nn.Module,
    train: Any,
    val: Any = None,
    *,
    epochs: int,
    lr: float = 0.01,
    gate_lr: float | None = None,
    gate_every: int = 1,
    target: float | None = None,
    efficiency: float | None = None,
    teacher: Literal["original"] | Callable[..., Any] | None = "original",
    distill: float = 0.5,
    temperature: float = TEMPERATURE,
    features: float = 0.0,
    feature_layers: Sequence[str] | None = None,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    correct: Callable[[Any, Any], Tensor] | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup: float = 0.05,
    clip: float | None = None,
    accumulate: int = 1,
    mixed_precision: str | None = None,
    gradient_checkpointing: bool = False,
    freeze_norms: bool = False,
    dropout: bool | None = None,
    out: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = True,
    trackers: Sequence[str] | str = (),
    accelerator: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train a converted network, in place, to be as good as it was for fewer multiply-adds.

    The loss is ``(1 - d) CE(labels) + d KL(teacher) + weight * L_e + v * L_f``, see `EfficiencyLoss` and
    `FeatureLoss`. Without labels the teacher alone is followed. Runs on `accelerate`: any device, and several
    processes with ``accelerate launch``.

    Args:
        dynamic: what `redconvert.convert` returned, calibrated or not.
        train: a DataLoader (several processes each read their share of it), or a list of batches, ``(inputs, labels)``
            or inputs alone.
        val: the same, read after every epoch.
        epochs: passes over ``train``.
        lr: peak learning rate; it warms up over the share ``warmup`` of all steps, then falls to 0 as half a cosine.
        gate_lr: of the gates; ``lr`` where None. Gates and vectors have no weight decay.
        gate_every: gates learn in every so many-th optimizer step, 0: never. In between they only decide, and a step
            costs what they leave to compute, see `resting_gates`.
        target: average executed MACs as a share of the dense network's, in (0, 1]; None: Eq. 6 without a target.
        efficiency: weight of L_e. None: 0.8 for Eq. 6, the paper's; 20 with a target, whose square is small near it.
            0 leaves it out.
        teacher: "original": a frozen dense copy of the network as it is now; or a network or function; or None.
        distill: d, the teacher's share of the task loss where there are labels.
        temperature: of the distillation, see `distillation_loss`.
        features: v, the weight of what the network misses of its teacher's features (L_f); 0 leaves it out, 100 is a
            good start. Steps in which gates learn are without it, as it would open them: set ``gate_every``.
        feature_layers: names of the modules to compare at; None: the blocks, see `FeatureLoss`.
        criterion: ``(outputs, labels) -> scalar`` instead of cross entropy.
        correct: ``(outputs, labels) -> (N)`` booleans for Eq. 6, for outputs that are not class scores.
        optimizer: "sgd" (Nesterov) or "adamw"; ``momentum`` is its first coefficient.
        clip: largest norm of the gradient.
        accumulate: batches per optimizer step.
        mixed_precision: None (what ``accelerate launch`` says), "no", "bf16" or "fp16".
        gradient_checkpointing: keep only the inputs of each block and compute it again in the backward pass.
        freeze_norms: keep the statistics of the network's own batch norms, as small video batches need.
        dropout: whether the network's dropout layers drop. None: only without a teacher, which answers without; what
            they drop would keep the answers apart.
        out: folder for ``history.json``, ``resume.pt``, ``teacher.pt`` (the original) and, at the end, ``model/``
            (`save_pretrained`).
        save_every: optimizer steps between writes of ``resume.pt``; None: after each epoch.
        resume: go on from ``out/resume.pt`` where there is one. Call with the same data and arguments as before;
            random numbers depend on seed and position alone (a loader's own generator is seeded with them), so the
            losses are those of a run that was never killed.
        trackers: of accelerate, "tensorboard" for one; they write to ``out``.
        accelerator: your own Accelerator instead of a new one, which takes its settings from these arguments.
        progress: show a bar (needs rich).

    Returns:
        Losses and costs per step, validation per epoch.

    Raises:
        RedconvertError: no batches, labels that are no classes, a loss that is not finite (the message names batch
            and last good state), a bad setting, an ``out`` that cannot be written or that holds another run.
    """
    layers = dynamic_layers(dynamic)
    if efficiency is None:
        efficiency = 0.8 if target is None else 20.0
    kind = teacher if isinstance(teacher, str) else None if teacher is None else "own"
    settings = Settings(
        epochs, lr, lr if gate_lr is None else gate_lr, target, efficiency, optimizer, momentum, weight_decay,
        warmup, distill, temperature, clip, accumulate, mixed_precision, freeze_norms, seed, kind, length_of(train),
        gate_every, teacher is None if dropout is None else dropout, features=features,
        feature_layers=None if feature_layers is None else tuple(feature_layers),
    )  # fmt: skip
    if feature_layers is not None and not features:
        raise RedconvertError("feature_layers says where, and features=0 that nothing is compared: give it a weight")
    if save_every is not None and save_every < 1:
        raise RedconvertError(f"save_every={save_every!r} must be at least 1, or None: after each epoch")
    meter = EfficiencyLoss(dynamic, target=target, correct=correct)
    with ExitStack() as stack:
        stack.callback(meter.close)
        stack.enter_context(_train_flags(dynamic))
        file = RunFile(out)
        if accelerator is None:
            accelerator = stack.enter_context(new_accelerator(mixed_precision, trackers, out, seed))
        settings = replace(
            settings, mixed_precision=_agreed(accelerator, mixed_precision), processes=accelerator.num_processes
        )
        file.settings = asdict(settings)
        stack.enter_context(own_randomness(accelerator.device))
        taught: Any = teacher
        for layer in layers.values():
            layer.gate.keep_thresholds()  # a later budget starts from what the gates have learnt
        if teacher == "original":
            taught = frozen_original(dynamic)
            file.keep_teacher(taught, resume, write=accelerator.is_main_process)
        missed = None
        if features:
            missed = FeatureLoss(dynamic, taught, feature_layers)
            stack.callback(missed.close)
        share = 0.0 if taught is None else distill
        objective = Objective(taught, share, temperature, criterion, meter, efficiency, missed, features)
        run = Run(dynamic, settings, objective, accelerator, file)
        stack.enter_context(unwrapped(dynamic))
        run.prepare(train, val)
        if gradient_checkpointing:
            stack.enter_context(recomputed(dynamic))
        if trackers:
            stack.enter_context(tracking(accelerator, asdict(settings)))
        run.go(resume, save_every, progress)
        if out is not None and accelerator.is_main_process:
            save_pretrained(dynamic, Path(out) / "model")
        accelerator.wait_for_everyone()
    return run.history


def _agreed(accelerator: Any, mixed_precision: str | None) -> str:
    """The precision that the run has; an Accelerator of the user's own must not say otherwise."""
    if accelerator.gradient_accumulation_steps != 1:
        raise RedconvertError(
            f"the accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}: leave it at 1 "
            f"and pass accumulate= to finetune"
        )
    if mixed_precision not in (None, accelerator.mixed_precision):
        raise RedconvertError(
            f"mixed_precision={mixed_precision!r}, but the accelerator has {accelerator.mixed_precision!r}: pass None"
        )
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        raise RedconvertError(
            f"mixed_precision={accelerator.mixed_precision!r} does nothing on {accelerator.device}: take 'no' or 'bf16'"
        )
    return accelerator.mixed_precision


@contextmanager
def _train_flags(model: nn.Module) -> Iterator[None]:
    """Put every module's train flag back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
