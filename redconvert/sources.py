"""Names on the command line: a file, a folder, or `library:model` -> a network or its weights."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConvertConfig
from .convert import Plan, make_plan
from .errors import RedconvertError, require

__all__ = ["Source", "guess_architecture", "guess_inputs", "open_source"]

# Tried in this order where no --input is given; SlowFast takes a list of two clips.
VIDEO_INPUTS: tuple[Any, ...] = (
    (1, 3, 16, 112, 112),
    (1, 3, 16, 224, 224),
    (1, 3, 32, 224, 224),
    ((1, 3, 8, 224, 224), (1, 3, 32, 224, 224)),
)
IMAGE_INPUTS: tuple[Any, ...] = ((1, 3, 224, 224), (1, 3, 32, 32), (1, 3, 384, 384))


@dataclass(frozen=True)
class Source:
    """What a name stands for: a network, a state dict, or the config of a saved dynamic network.

    Attributes:
        name: as given.
        kind: ``"model"``, ``"state dict"`` or ``"saved network"``.
        model: the network, or None.
        tensors: the state dict, or None.
        saved: the config of a folder of `redconvert.save_pretrained`, or None.
    """

    name: str
    kind: str
    model: nn.Module | None = None
    tensors: dict[str, Tensor] | None = None
    saved: dict[str, Any] | None = None


def open_source(name: str, *, trust: bool = False) -> Source:
    """Resolve a path, ``timm:``, ``torchvision:``, ``pytorchvideo:`` or ``zoo:`` name, or ``module.path:factory``.

    Args:
        name: what the user wrote.
        trust: allow files and modules that run code when they are loaded.

    Raises:
        RedconvertError: nothing of that name, or a file that is not what it should be.
    """
    path = Path(name)
    if path.is_dir():
        return _saved_network(path)
    library, colon, rest = name.partition(":")
    if path.exists() or not colon or os.sep in library:
        return _file(path, trust)
    if not rest:
        raise RedconvertError(f"'{name}' lacks the model's name after the colon")
    builders: dict[str, Callable[[str], nn.Module]] = {
        "timm": _timm,
        "torchvision": _torchvision,
        "pytorchvideo": _pytorchvideo,
        "zoo": _zoo,
    }
    model = builders[library](rest) if library in builders else _factory(library, rest)
    return Source(name, "model", model=model)


def _file(path: Path, trust: bool) -> Source:
    from .checkpoint import read_file

    if not path.exists():
        raise RedconvertError(
            f"there is no file '{path}', and it is no model name either: those are timm:NAME, torchvision:NAME, "
            f"pytorchvideo:NAME, zoo:NAME and module.path:factory"
        )
    found = read_file(path, trust=trust)
    if isinstance(found, nn.Module):
        return Source(str(path), "model", model=found)
    return Source(str(path), "state dict", tensors=found)


def _saved_network(folder: Path) -> Source:
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RedconvertError(f"folder '{folder}' holds no readable config.json of redconvert: {error}") from error
    if not isinstance(saved, dict) or saved.get("format") != "redconvert":
        raise RedconvertError(f"'{folder / 'config.json'}' was not written by redconvert.save_pretrained")
    return Source(str(folder), "saved network", saved=saved)


# -- libraries -----------------------------------------------------------------------------------------


def _timm(name: str) -> nn.Module:
    timm = require("timm", extra="zoo", purpose=f"timm:{name}")
    _check_known("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=False)


def _torchvision(name: str) -> nn.Module:
    models = require("torchvision.models", extra="zoo", purpose=f"torchvision:{name}")
    _check_known("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # the default would download ImageNet weights
    return builder(**options)


def _pytorchvideo(name: str) -> nn.Module:
    hub = require("pytorchvideo.models.hub", extra="zoo", purpose=f"pytorchvideo:{name}")
    known = [key for key, value in vars(hub).items() if inspect.isfunction(value) and not key.startswith("_")]
    _check_known("pytorchvideo", name, known)
    return getattr(hub, name)(pretrained=False)


def _zoo(name: str) -> nn.Module:
    from . import zoo

    return zoo.create(name)


def _check_known(library: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        raise RedconvertError(
            f"{library} has no model '{name}'" + (f"; did you mean {', '.join(near)}?" if near else "")
        )


def _factory(module_path: str, attribute: str) -> nn.Module:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_path)
    except ImportError as error:
        raise RedconvertError(f"'{module_path}' could not be imported: {error}") from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise RedconvertError(f"module '{module_path}' has no '{attribute}'")
    try:
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise RedconvertError(f"{module_path}:{attribute}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise RedconvertError(f"{module_path}:{attribute}() returned {type(model).__name__}, not a torch.nn.Module")
    return model


# -- guesses -------------------------------------------------------------------------------------------


def guess_inputs(model: nn.Module, config: ConvertConfig, **options: Any) -> tuple[Any, Plan]:
    """The first input shape that the network runs on, as tensors, and the plan it gives.

    Networks of the zoo name the shape that they were made for; the others are tried with the usual ones. ``options``:
    of `redconvert.plan`.

    Raises:
        RedconvertError: it runs on none of them.
    """
    video = any(isinstance(module, nn.Conv3d) for module in model.modules())
    named = getattr(model, "example_shape", None)
    own: tuple[Any, ...] = (named,) if _is_shape(named) else ()
    for shape in own + (VIDEO_INPUTS if video else IMAGE_INPUTS):
        inputs = tensors_of(shape)
        try:
            return inputs, make_plan(model, config, example_inputs=inputs, **options)
        except RedconvertError as error:
            if "does not run on example_inputs" not in str(error):
                raise
    raise RedconvertError(
        f"{type(model).__name__} runs on none of the usual inputs: give the shape it takes, for example "
        f"--input {'1,3,16,112,112' if video else '1,3,224,224'} (repeat --input for a list)"
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(size, int) and size > 0 for size in value)


def tensors_of(shape: Sequence[Any]) -> Any:
    """A random tensor of this shape, or a list of them for a tuple of shapes; the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(shape[0], int):
        return torch.rand(tuple(shape), generator=generator)
    return [torch.rand(tuple(part), generator=generator) for part in shape]


def guess_architecture(
    tensors: dict[str, Tensor], progress: Callable[[Iterable[str]], Iterable[str]] = iter
) -> tuple[str, nn.Module] | None:
    """The torchvision or zoo builder whose state dict has exactly these names and shapes, with the weights loaded."""
    wanted = {key: tuple(value.shape) for key, value in tensors.items()}
    names = [f"zoo:{name}" for name in _zoo_names()]
    try:
        from torchvision import models

        dimension = 5 if any(value.dim() == 5 for value in tensors.values()) else 4
        video = set(models.list_models(module=models.video))
        plain = [name for name in models.list_models(exclude="quantized_*") if (name in video) == (dimension == 5)]
        names += [f"torchvision:{name}" for name in plain]
    except ImportError:
        pass
    for name in progress(names):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of initialisation: nothing is initialised here
                skeleton = open_source(name).model
        except Exception:
            continue  # some builders cannot be built without numbers
        assert skeleton is not None
        if {key: tuple(value.shape) for key, value in skeleton.state_dict().items()} == wanted:
            model = open_source(name).model
            assert model is not None
            model.load_state_dict(tensors)
            return name, model
    return None


def _zoo_names() -> list[str]:
    from . import zoo

    return zoo.list_models()
