"""A dynamic network on disk: config.json says which layers are dynamic and how, safetensors holds the numbers.

The two files change together. Weights are written first, into a file named after their content; config.json, which
names that file, is replaced last. Whoever is killed in between leaves the old pair.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from .convert import ConvFacts, revert
from .convert.judge import obstacle
from .convert.plan import check_model
from .convert.rewrite import copied
from .errors import RedconvertError
from .files import write_bytes_atomic, write_text_atomic
from .inputs import unwrapped
from .layers import DynamicConv, dynamic_layers
from .layers.absorb import followers, link, pairs
from .saved import SavedLayer, conv_facts, describe, unpaired
from .weights import (
    check_fit,
    check_values,
    format_shared,
    load_weights,
    memory_of,
    read_file,
    read_safetensors,
    read_state_dict,
    with_shared,
    without_compile,
)

__all__ = ["from_pretrained", "load_weights", "read_file", "read_state_dict", "save_pretrained"]

FORMAT, VERSION = "redconvert", 1
CONFIG = "config.json"
# Ours to remove once no config names them; a user's model-00001-of-00002.safetensors is not.
WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")
LEFT_BEHIND = re.compile(rf"\.({WEIGHTS.pattern}|config\.json)\.[0-9a-f]+\.tmp")  # by a writer that was killed

M = TypeVar("M", bound=nn.Module)


# -- saving --------------------------------------------------------------------------------------------


def save_pretrained(dynamic: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted network: ``config.json`` and ``model-<hash>.safetensors``.

    Killed at any moment, the folder holds either the whole old network or the whole new one. One process may
    write to a folder at a time. Gradients, train flags and what `forced` or `disabled` set are not saved.

    Args:
        dynamic: what `redconvert.convert` returned, trained or not; torch.compile and DistributedDataParallel around
            it are left out.
        folder: made where there is none; an older save in it is replaced.

    Raises:
        RedconvertError: no dynamic layers, an entry that is no plain tensor, someone else's ``config.json`` in the
            folder, or a folder that cannot be written to.
    """
    if not isinstance(dynamic, nn.Module):
        raise RedconvertError(f"save_pretrained takes a converted torch.nn.Module, not {type(dynamic).__name__}")
    model = unwrapped(dynamic)
    converted = dynamic_layers(model)
    ties = pairs(converted), followers(converted)
    layers = {without_compile(name): describe(name, layer, model, *ties) for name, layer in converted.items()}
    tensors, shared = _for_disk(model)
    target = Path(folder)
    _prepare(target)
    content = to_safetensors(tensors, metadata={"format": "pt", "shared": format_shared(shared)})
    digest = hashlib.sha256(content).hexdigest()
    weights = f"model-{digest[:16]}.safetensors"
    from . import __version__

    config = {
        "format": FORMAT,
        "version": VERSION,
        "redconvert": __version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "weights": weights,
        "sha256": digest,
        "layers": {name: layer.to_dict() for name, layer in layers.items()},
        "shared": shared,
    }
    write_bytes_atomic(target / weights, content)
    _sync(target)  # the weights' name must be on the disk before a config that holds it
    write_text_atomic(target / CONFIG, json.dumps(config, indent=2) + "\n")
    _sync(target)
    _remove_old(target, keep=weights)


def _for_disk(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict on the CPU, each tensor in memory of its own, and which names are another's tensor."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for raw, value in model.state_dict().items():
        key = without_compile(raw)
        if not isinstance(value, Tensor) or value.is_meta:
            what = "on the meta device, without numbers" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise RedconvertError(f"'{key}' of {type(model).__name__} is {what}: only real tensors can be saved")
        owner = owners.setdefault(memory_of(value), key)
        if owner != key and value.numel():
            shared[key] = owner
            continue
        try:
            copy = value.detach().cpu().contiguous()
            if copy.untyped_storage().nbytes() != copy.nbytes:  # a part of a larger one: safetensors wants it whole
                copy = copy.clone()
        except Exception as error:
            raise RedconvertError(
                f"'{key}' of {type(model).__name__} cannot be saved ({type(error).__name__}: {error}): give plain "
                f"tensors, sharded and sparse ones gathered first"
            ) from error
        tensors[key] = copy
    return tensors, shared


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RedconvertError(f"'{folder}' cannot be made ({error.strerror or error}): give another folder") from error
    if (folder / CONFIG).exists():
        try:
            ours = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise RedconvertError(f"'{folder / CONFIG}' was not written by redconvert: save to another folder")


def _sync(folder: Path) -> None:
    """Bring renames to the disk in their order, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _remove_old(folder: Path, keep: str) -> None:
    for path in folder.iterdir():
        ours = WEIGHTS.fullmatch(path.name) or LEFT_BEHIND.fullmatch(path.name)
        if ours and path.name != keep:
            try:
                path.unlink()
            except OSError:  # the new network is whole; a leftover only takes room
                continue


# -- loading -------------------------------------------------------------------------------------------


def from_pretrained(model: M, folder: str | os.PathLike[str], *, inplace: bool = False) -> M:
    """Make the same layers dynamic as in a saved network, and load its weights; nothing is traced or run.

    Args:
        model: the network as it was before conversion, freshly built; its own weights do not matter.
        folder: what `save_pretrained` wrote.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The dynamic network, of the model's own class and on its device.

    Raises:
        RedconvertError: no such save, a damaged one, one of a newer redconvert, or one of another network. The model
            is then as it was.
    """
    source = Path(folder)
    saved = _read_config(source)
    layers = _read_layers(source, saved)
    check_model(model)
    convs = _check_layers(model, layers, source)
    state = _read_weights(source, saved)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, layer in layers.items():
        added = _added_shapes(convs[name], layer, name)
        expected |= {
            f"{prefix}.{key}".removeprefix("."): shape
            for prefix in (name, *layer.aliases)
            for key, shape in added.items()
        }
    check_fit(expected, state, f"'{source}' does not fit {type(model).__name__}")
    check_values(model, state, f"'{source}'")

    target = model if inplace else copied(model)
    modules = dict(target.named_modules())
    try:
        for name, layer in layers.items():
            layer.convert(modules[name], name)
        for name, layer in layers.items():
            if layer.reader is not None:
                following = [modules[other] for other, each in layers.items() if each.source == name]
                link(modules[name], modules[layer.reader], following)
    except BaseException:
        if any(isinstance(module, DynamicConv) for module in target.modules()):
            revert(target)
        raise
    target.load_state_dict(state)
    return target


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise RedconvertError(f"there is no '{path}': give a folder that redconvert.save_pretrained wrote")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RedconvertError(f"'{path}' cannot be read as JSON ({error}): save the network again") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise RedconvertError(f"'{path}' was not written by redconvert.save_pretrained: give a folder that was")
    version = saved.get("version")
    if isinstance(version, int) and version > VERSION:
        raise RedconvertError(
            f"'{path}' has format version {version}, and this redconvert reads up to {VERSION}: upgrade it "
            f"(pip install -U redconvert; the file was written by {saved.get('redconvert', 'a newer one')})"
        )
    if version != VERSION:
        raise _damaged(path, f"its version is {version!r}")
    return saved


def _damaged(path: Path, why: str) -> RedconvertError:
    return RedconvertError(f"'{path}' is damaged ({why}): fetch it or save the network again")


def _read_layers(folder: Path, saved: dict[str, Any]) -> dict[str, SavedLayer]:
    try:
        layers = {name: SavedLayer.from_dict(values) for name, values in saved["layers"].items()}
    except (RedconvertError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / CONFIG, f"layers: {type(error).__name__}: {error}") from error
    if not layers:
        raise _damaged(folder / CONFIG, "it names no layers")
    problem = unpaired(layers)
    if problem is not None:
        raise _damaged(folder / CONFIG, problem)
    return layers


def _read_weights(folder: Path, saved: dict[str, Any]) -> dict[str, Tensor]:
    name, shared = saved.get("weights"), saved.get("shared")
    if not isinstance(name, str) or Path(name).name != name or not isinstance(shared, dict):
        raise _damaged(folder / CONFIG, f"its weights are {name!r}, shared {type(shared).__name__}")
    path = folder / name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RedconvertError(
            f"'{path}', which '{folder / CONFIG}' names, cannot be read ({error.strerror or error}): copy both files"
        ) from error
    if digest != saved.get("sha256"):
        raise RedconvertError(f"'{path}' is not what was saved (truncated or changed since): fetch it or save it again")
    try:
        return with_shared(read_safetensors(path), shared)
    except (KeyError, TypeError) as error:
        raise _damaged(folder / CONFIG, f"shared: {error} is not in {name}") from error


def _check_layers(model: nn.Module, layers: dict[str, SavedLayer], folder: Path) -> dict[str, nn.Module]:
    """The model's convolutions under the saved names, if each is what it was when it was saved."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    modules = {found[0]: module for module, found in names.items()}
    what = f"'{folder}' is not of this {type(model).__name__}"
    absent = [name for name in layers if not isinstance(modules.get(name), nn.Conv2d | nn.Conv3d)]
    if absent:
        rest = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise RedconvertError(
            f"{what}: it has no Conv2d or Conv3d '{absent[0]}'{rest}. Build the network that was saved"
        )
    for name, layer in layers.items():
        conv = modules[name]
        facts = conv_facts(conv)
        different = [
            f"{key} {facts[key]} instead of {layer.conv.get(key)}" for key in facts if facts[key] != layer.conv.get(key)
        ]
        if different:
            raise RedconvertError(
                f"{what}: layer '{name}' has {', '.join(different)}. Build the network that was saved"
            )
        if set(names[conv][1:]) != set(layer.aliases):
            raise RedconvertError(
                f"{what}: layer '{name}' is also called {names[conv][1:] or 'nothing else'}, the saved one "
                f"{list(layer.aliases) or 'nothing else'}. Share the same layers as the network that was saved"
            )
        reason = obstacle(conv, ConvFacts())  # type: ignore[arg-type]
        if reason:
            raise RedconvertError(f"{what}: layer '{name}' cannot become dynamic: {reason}")
    return {name: modules[name] for name in layers}


def _added_shapes(conv: nn.Module, layer: SavedLayer, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of what conversion adds to this convolution, from one like it without numbers."""
    kind: Any = nn.Conv3d if isinstance(conv, nn.Conv3d) else nn.Conv2d
    size: Any = conv.kernel_size
    probe = kind(conv.in_channels, conv.out_channels, size, groups=conv.groups, bias=False, device="meta")
    state = layer.convert(probe, name).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if key != "weight"}
