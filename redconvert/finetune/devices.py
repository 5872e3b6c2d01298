"""Accelerate for one run, without traces of it afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import MissingExtraError, RedconvertError, require

__all__ = ["new_accelerator", "tracking", "unwrapped"]


@contextmanager
def new_accelerator(
    mixed_precision: str | None, trackers: Sequence[str] | str, out: str | Path | None, seed: int
) -> Iterator[Any]:
    """An Accelerator with these settings.

    Accelerate keeps its settings for the whole process, so that those of the first Accelerator bind all later ones:
    they are set aside meanwhile.
    """
    accelerate = require("accelerate", "train", "finetune")
    if trackers and out is None:
        raise RedconvertError("trackers write to a folder: give out=")
    wanted = [trackers] if isinstance(trackers, str) else list(trackers)
    shared = [accelerate.state.AcceleratorState._shared_state, accelerate.state.GradientState._shared_state]
    before = [dict(state) for state in shared]
    try:
        for state in shared:
            state.clear()
        try:
            accelerator = accelerate.Accelerator(
                mixed_precision=mixed_precision,
                log_with=wanted or None,
                project_dir=None if out is None else str(out),
                dataloader_config=accelerate.utils.DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
                # A network may hold convolutions that a forward pass does not use.
                kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
            )
        except ValueError as error:  # fp16 on a CPU, an unknown tracker
            raise RedconvertError(f"accelerate refuses these settings: {error}") from error
        found = [str(tracker) for tracker in accelerator.log_with]
        for tracker in wanted:
            if isinstance(tracker, str) and tracker not in ("all", *found):
                raise MissingExtraError(f"trackers: {tracker!r} is not installed; pip install {tracker}")
        yield accelerator
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)


@contextmanager
def tracking(accelerator: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Trackers that are closed at the end; accelerate's ``end_training`` would end the process group too."""
    accelerator.init_trackers("redconvert", {key: value for key, value in settings.items() if value is not None})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Take off what ``Accelerator.prepare`` sets on a network: it would pass for prepared in the next run."""
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)
