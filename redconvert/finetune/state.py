"""A run that can be killed at any step: its state in one file, the old one or the new one."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RedconvertError
from ..files import write_bytes_atomic

__all__ = ["RunFile"]

NAME = "resume.pt"
TEACHER = "teacher.pt"
ADVICE = "pass resume=False to start again (the file is then replaced), or another out="
DAMAGED = (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError)


class RunFile:
    """``folder/resume.pt``: network, optimizer, position and history of one finetuning run.

    ``folder/teacher.pt`` holds the network as it was at the beginning, whose answers a resumed run still needs.

    Args:
        folder: made where there is none; None: nothing is written.

    Attributes:
        settings: what must be the same for a run to go on, plain types.

    Raises:
        RedconvertError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.path = None if folder is None else Path(folder) / NAME
        self.settings: dict[str, Any] = {}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            probe = self.path.with_name(f".{NAME}.probe")
            probe.touch()
            for old in (probe, *self.path.parent.glob(f".{NAME}.*.tmp")):  # of runs that were killed while writing
                old.unlink(missing_ok=True)  # several processes do this at once
        except OSError as error:
            raise RedconvertError(
                f"cannot write to '{self.path.parent}': {error.strerror or error}. Give out= a folder that you may "
                f"write to"
            ) from error

    def keep_teacher(self, teacher: nn.Module, resume: bool, write: bool) -> None:
        """Give ``teacher`` the weights with which the run began, or write them where it begins now.

        So a run goes on as it would have even if the network at hand has been trained since.

        Args:
            resume: read, where there is a run to go on with.
            write: whether this process is the one that writes.
        """
        if self.path is None:
            return
        path = self.path.with_name(TEACHER)
        if resume and self.path.exists() and path.exists():
            state = _read(path)
            _check_fit(path, teacher, state)
            teacher.load_state_dict(state)
        elif write:
            write_bytes_atomic(path, _serialized(teacher.state_dict()))

    def save(self, model: nn.Module, optimizer: Any, scaler: Any, position: dict[str, Any]) -> None:
        """Write everything; whoever is killed meanwhile leaves the file of before."""
        if self.path is None:
            return
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        state = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        write_bytes_atomic(self.path, _serialized({"settings": self.settings, "position": position, **state}))

    def load(self, model: nn.Module, optimizer: Any, scaler: Any) -> dict[str, Any] | None:
        """Put network and optimizer back and return the position; None where there is nothing to go on from.

        Raises:
            RedconvertError: the file is damaged, or of another network or other settings. The network is as it was.
        """
        if self.path is None or not self.path.exists():
            return None
        saved = _read(self.path)
        try:
            settings, position, state = saved["settings"], saved["position"], saved["model"]
            own_optimizer, own_scaler = saved["optimizer"], saved["scaler"]
        except DAMAGED as error:
            raise RedconvertError(f"'{self.path}' is not of a finetuning run ({error}): {ADVICE}") from error
        changed = [key for key in self.settings if self.settings[key] != settings.get(key)]
        if changed:
            key = changed[0]
            raise RedconvertError(
                f"'{self.path}' is of a run with {key}={settings.get(key)!r}, this one has {self.settings[key]!r}: "
                f"{ADVICE}"
            )
        _check_fit(self.path, model, state)
        try:
            optimizer.load_state_dict(own_optimizer)
        except ValueError as error:
            raise RedconvertError(f"'{self.path}' trains other parameters ({error}): {ADVICE}") from error
        if scaler is not None and own_scaler:
            scaler.load_state_dict(own_scaler)
        model.load_state_dict(state)
        return position


def _serialized(state: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise RedconvertError(f"'{path}' cannot be read ({str(error).partition(chr(10))[0]}): {ADVICE}") from error


def _check_fit(path: Path, model: nn.Module, state: dict[str, Any]) -> None:
    own = model.state_dict()
    wrong = [key for key in {**own, **state} if _shape(own, key) != _shape(state, key)]
    if wrong:
        raise RedconvertError(f"'{path}' is of another network ('{wrong[0]}' differs): {ADVICE}")


def _shape(state: dict[str, Any], key: str) -> tuple[int, ...] | None:
    return tuple(getattr(state[key], "shape", ())) if key in state else None
