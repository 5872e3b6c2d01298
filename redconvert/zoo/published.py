"""Weights that others published: downloaded or read from a file, and loaded where every name and shape fits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from redconvert.errors import RedconvertError

__all__ = ["find_weights", "load_published"]

State = dict[str, Tensor]


def find_weights(name: str, weights: str | Path, published: Mapping[str, Callable[[], State]]) -> State:
    """The state dict called ``weights``: downloaded through its library, or read from a file of the same content.

    Args:
        name: of the network, for messages.
        weights: a key of ``published``, or the path of a file that `torch.load` reads with ``weights_only=True``.
        published: how each set of weights is downloaded.

    Raises:
        RedconvertError: no such name or file, a download that fails, or a file that holds no state dict.
    """
    if weights in published:
        try:
            return published[str(weights)]()
        except Exception as error:  # of the network, the disk, the hash or the library
            raise RedconvertError(
                f"{name}: weights='{weights}' could not be downloaded: {type(error).__name__}: {error}. "
                f"Where there is no network, give the path of a file that was downloaded elsewhere."
            ) from error
    path = Path(weights)
    if not path.is_file():
        near = difflib.get_close_matches(str(weights).upper(), published, n=1, cutoff=0.4)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        known = ", ".join(f"'{key}'" for key in published) or "no published weights"
        raise RedconvertError(
            f"{name}: weights='{weights}' is neither a known name nor a file. {hint}There is {known}; "
            f"or give the path of a state dict."
        )
    return _read(name, path)


def load_published(name: str, model: nn.Module, state: State, head: str, classifier: str | None = None) -> None:
    """Load ``state`` into ``model``, name by name; nothing is loaded where one of them does not fit.

    Args:
        name: of the network, for messages.
        model: the network.
        state: the weights under the model's own names.
        head: what a network built for features alone does not have; weights under this name are then left out.
        classifier: the layer in it whose outputs are the classes, where it is not all of it. It keeps its random
            weights where it has another number of classes.

    Raises:
        RedconvertError: a missing or surplus name, or another shape.
    """
    own = model.state_dict()
    # Norms of old checkpoints have no counter of batches.
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | state
    if not any(key.startswith(f"{head}.") for key in own):
        state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    for key in (f"{classifier or head}.weight", f"{classifier or head}.bias"):
        if key in own and key in state and state[key].shape[1:] == own[key].shape[1:]:
            state[key] = state[key] if len(state[key]) == len(own[key]) else own[key]
    problems = [f"'{key}' is missing" for key in own if key not in state]
    problems += [f"'{key}' is not of this network" for key in state if key not in own]
    problems += [
        f"'{key}' has shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RedconvertError(f"{name}: the weights are not those of this network: {problems[0]}{more}.")
    model.load_state_dict(state)


def _read(name: str, path: Path) -> State:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise RedconvertError(
            f"{name}: '{path}' is no readable file of weights: {type(error).__name__}: {error}"
        ) from error
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise RedconvertError(f"{name}: '{path}' holds no state dict, names and tensors.")
    return found
