"""Weights from anyone's files into a network: nothing in a file runs, and all is checked before the first change."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .errors import RedconvertError
from .layers import DynamicConv
from .layers.base import ADDED_MODULES

__all__ = ["load_weights", "read_file", "read_state_dict"]

# Where training loops put the state dict among their other things.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
WRAPPED_AT_MOST = 4  # {"model": {"state_dict": ...}} is common; a dict that holds itself has no end

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began its files before 1.6
LEGACY_PICKLES = 4  # the magic number, a version, the system, the object; then raw numbers


# -- reading -------------------------------------------------------------------------------------------


def read_file(path: str | os.PathLike[str], *, trust: bool = False) -> nn.Module | dict[str, Tensor]:
    """What a checkpoint file holds: a state dict or, with ``trust=True``, a pickled network.

    Args:
        path: a ``.safetensors`` file, or what ``torch.save`` wrote. It is told by its content.
        trust: unpickle everything, which runs whatever code the file asks for.

    Returns:
        The network, or its state dict as `read_state_dict` returns it; on the CPU.

    Raises:
        RedconvertError: missing, empty, truncated or foreign files, and those that need ``trust=True``.
    """
    found = _unwrapped(_read(Path(path), trust))
    return found if isinstance(found, nn.Module) else _state_dict(found, f"'{os.fspath(path)}'")


def read_state_dict(path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, under the names that the plain network has.

    A dict around it is taken off (keys ``state_dict``, ``model_state_dict``, ``model_state``, ``model`` and
    ``module``), and so are the prefixes ``module.`` of DistributedDataParallel and ``_orig_mod.`` of torch.compile.

    Args:
        path: a ``.safetensors`` file, or what ``torch.save`` wrote; read with ``weights_only=True``.
        trust: read pickled networks too, which runs whatever code the file asks for.

    Raises:
        RedconvertError: as `read_file`.
    """
    found = read_file(path, trust=trust)
    if isinstance(found, nn.Module):
        return _state_dict(found.state_dict(), f"the network in '{os.fspath(path)}'")
    return found


def _read(path: Path, trust: bool) -> Any:
    if path.is_dir():
        raise RedconvertError(
            f"'{path}' is a folder: give a file in it, or use redconvert.from_pretrained(model, folder)"
        )
    if not path.is_file():
        raise RedconvertError(f"'{path}' is no file: give the path of a checkpoint (.safetensors, .pt, .pth)")
    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY_MAGIC))
    except OSError as error:
        raise RedconvertError(f"'{path}' cannot be read: {error.strerror or error}") from error
    if not head:
        raise RedconvertError(f"'{path}' is empty: it was not written to its end. Fetch it again")
    header = int.from_bytes(head[:8], "little")  # of a safetensors file: its length, then JSON
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and header < path.stat().st_size):
        return read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of old formats is no news to who has such a file
            if trust and head[:1] == b"\x80" and not head.startswith(LEGACY_MAGIC):  # pickle.dump, not torch.save
                with path.open("rb") as file:
                    return pickle.load(file)
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # a file can be damaged in any way
        raise _unreadable(path, error, trust) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All entries of a safetensors file, those included that `save_pretrained` stored once for several names."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
        return with_shared(tensors, parse_shared(metadata.get("shared", "")))
    except Exception as error:
        raise RedconvertError(
            f"'{path}' is no whole safetensors file ({_first_line(error)}): truncated while it was copied, or of "
            f"another format. Fetch it again"
        ) from error


def with_shared(tensors: Mapping[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """``tensors``, and under each name in ``shared`` the one stored under another; KeyError where it is absent."""
    return {**tensors, **{alias: tensors[stored] for alias, stored in shared.items()}}


def format_shared(shared: Mapping[str, str]) -> str:
    """One line per alias, as safetensors keeps only text; names of parameters hold no tabs and line ends."""
    return "\n".join(f"{alias}\t{stored}" for alias, stored in shared.items())


def parse_shared(text: str) -> dict[str, str]:
    pairs = (line.split("\t") for line in text.split("\n") if line)
    return dict(pairs)


def _unreadable(path: Path, error: Exception, trust: bool) -> RedconvertError:
    message = str(error)
    if trust and isinstance(error, AttributeError | ImportError):
        return RedconvertError(
            f"'{path}' holds objects whose classes are not here ({_first_line(error)}): make the code that defines "
            f"them importable, or save its state_dict() where it is"
        )
    scripted = "TorchScript" in message
    if not trust and (scripted or (isinstance(error, pickle.UnpicklingError) and _is_whole_pickle(path))):
        asked = re.search(r"GLOBAL (\S+)", message)
        what = "a TorchScript program" if scripted else f"asks for {asked[1]}" if asked else "more than tensors"
        return RedconvertError(
            f"'{path}' was refused: it holds more than a state dict ({what}), and unpickling that runs code from the "
            f"file. Only if you trust where it comes from: trust=True in Python, --trust on the command line. Else "
            f"ask for a safetensors file, or for what torch.save(model.state_dict(), path) writes"
        )
    return RedconvertError(
        f"'{path}' is no whole checkpoint ({_first_line(error)}): truncated while it was copied, or not written by "
        f"torch.save or safetensors. Fetch it again"
    )


def _is_whole_pickle(path: Path) -> bool:
    """Whether the file, which torch refused, is a pickle to its end; nothing in it runs."""
    if zipfile.is_zipfile(path):
        return True
    try:
        with path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                for _ in pickletools.genops(file):
                    pass
                if not file.peek(1):
                    break
    except Exception:  # not opcodes, or not all of them
        return False
    return True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:200]


def _unwrapped(found: Any) -> Any:
    for _ in range(WRAPPED_AT_MOST):
        inner = [found[key] for key in WRAPPERS if key in found] if isinstance(found, Mapping) else []
        inner = [value for value in inner if isinstance(value, Mapping | nn.Module)]
        if not inner:
            break
        found = inner[0]
    return found


def _state_dict(found: Any, where: str) -> dict[str, Tensor]:
    """Check that it is a state dict, and give its entries the names that the plain network has."""
    if not isinstance(found, Mapping):
        raise RedconvertError(f"{where} holds a {type(found).__name__}, no state dict: save model.state_dict()")
    if not found:
        raise RedconvertError(f"{where} holds an empty state dict: save the one of the whole network")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise RedconvertError(
                f"{where} is no state dict: its entry {key!r} is a {type(value).__name__}, no tensor. It may be deeper "
                f"inside: load it with torch.load, and pass that part"
            )
    names = plain_names(found)
    return {names[key]: value.detach() for key, value in found.items()}


# -- names ---------------------------------------------------------------------------------------------


def without_compile(name: str) -> str:
    """The name without the ``_orig_mod.`` that torch.compile puts in wherever it wrapped a module."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """For each name the one in a network that is neither compiled nor wrapped in DistributedDataParallel."""
    plain = {name: without_compile(name) for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def added_prefixes(layers: Iterable[str]) -> tuple[str, ...]:
    """How the keys begin that conversion adds to these layers (for `str.startswith`); "" is the network itself."""
    return tuple(f"{layer}.{part}.".removeprefix(".") for layer in layers for part in ADDED_MODULES)


# -- loading -------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], *, trust: bool = False) -> None:
    """Load a checkpoint of the original or of the converted network, into either, in place.

    * Of the original into a converted one: gates keep their state, and the cheap operations start again from the
      new weights, as at conversion (in the channel order that the layer has).
    * Of a converted network into the original: what conversion adds is left out.
    * Else every entry is loaded. ``num_batches_tracked``, which old checkpoints lack, may always be missing.

    Args:
        model: a network, converted or not, compiled or wrapped in DistributedDataParallel or not.
        source: a file as `read_state_dict` reads it, or a state dict.
        trust: as in `read_state_dict`.

    Raises:
        RedconvertError: a file that cannot be read, or entries that are missing, unexpected or of another shape.
            The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise RedconvertError(f"load_weights takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(source, Mapping):
        where, found = "the state dict", _state_dict(_unwrapped(source), "the state dict")
    else:
        where, found = f"'{os.fspath(source)}'", read_state_dict(source, trust=trust)
    own = model.state_dict()
    plain = plain_names(own)
    convs = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = plain.get(f"{name}.weight".removeprefix("."))
        if isinstance(module, nn.Conv2d | nn.Conv3d) and weight is not None:
            convs[weight.removesuffix("weight").removesuffix(".")] = module
    layers = {name: module for name, module in convs.items() if isinstance(module, DynamicConv)}
    added = {key for key in plain.values() if key.startswith(added_prefixes(layers))}
    dense = not any(key in added for key in found)
    expected = {plain[key]: tuple(value.shape) for key, value in own.items() if isinstance(value, Tensor)}
    optional = {key for key in expected if key.endswith("num_batches_tracked") or (dense and key in added)}
    if not layers:
        left_out = added_prefixes(convs)
        found = {key: value for key, value in found.items() if key in expected or not key.startswith(left_out)}
    check_fit(expected, found, f"{where} does not fit {type(model).__name__}", optional)
    check_values(model, {key: found[plain[key]] for key in own if plain[key] in found}, where)
    model.load_state_dict({key: found.get(plain[key], value) for key, value in own.items()})
    if dense:
        for layer in set(layers.values()):
            layer.start_cheap()  # rebuild coefficients belong to the weights they were made for


def check_fit(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], what: str, optional: Iterable[str] = ()
) -> None:
    """Every expected entry and no other, each of its shape; ``optional`` ones may be missing."""
    allowed = set(optional)
    problems = {
        "missing": [key for key in expected if key not in found and key not in allowed],
        "unexpected": [key for key in found if key not in expected],
        "wrong shape": [
            f"{key} {tuple(found[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in found and tuple(found[key].shape) != shape
        ],
    }
    listed = [f"{title}: {_some(keys)}" for title, keys in problems.items() if keys]
    if listed:
        raise RedconvertError(
            f"{what}: it is a state dict of another network ({'; '.join(listed)}). Build the network as the saved one "
            f"was built (number of classes, widths, converted layers)"
        )


def check_values(model: nn.Module, found: Mapping[str, Tensor], where: str) -> None:
    """What `check_fit` cannot see, before anything is loaded: no memory, torn ties, orders that are none.

    Args:
        model: the network, converted or not yet.
        found: what will be loaded, by the model's own names.
        where: the source, for messages.
    """
    ties: dict[tuple[Any, ...], str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor) or key not in found:
            continue
        if value.is_meta:
            raise RedconvertError(
                f"{type(model).__name__} is on the meta device, where '{key}' has no memory to load into: "
                f"build it on a real one, or model.to_empty(device='cpu') first"
            )
        first = ties.setdefault(memory_of(value), key)
        if value.numel() and first != key and not _same_values(found[first], found[key]):
            raise RedconvertError(
                f"{type(model).__name__} shares '{first}' with '{key}', but {where} holds different numbers for them: "
                f"it comes from a network that does not share them"
            )
    for key, value in found.items():
        is_order = key.endswith("cheap_c.order") or (key.endswith(".order") and "mixed_in.ops." in key)
        if is_order and value.dim() == 1:
            if not torch.equal(value.sort().values.long(), torch.arange(len(value), device=value.device)):
                raise RedconvertError(f"{where}: '{key}' is no order of channels: 0 to {len(value) - 1}, each once")
        elif key.endswith(".source") and "cheap_c.ops." in key and value.numel():
            order = found.get(f"{key.partition('ops.')[0]}order")
            if order is not None and not 0 <= value.min() <= value.max() < len(order) - len(value):
                raise RedconvertError(f"{where}: '{key}' names channels that this candidate does not compute")


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same numbers in the same memory."""
    pointer = tensor.data_ptr() if tensor.layout is torch.strided else 0
    if not pointer:  # empty, sparse, sharded, on the meta device: never the same
        return (id(tensor),)
    return (tensor.device, pointer, tensor.dtype, tensor.shape, tensor.stride())


def _same_values(a: Tensor, b: Tensor) -> bool:
    same = a is b or (a.shape == b.shape and memory_of(a) == memory_of(b))
    return same or bool(((a == b) | ((a != a) & (b != b))).all())  # NaN equals NaN here


def _some(names: Sequence[str], limit: int = 3) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
