"""The zoo's list of names: a network is one builder function with ``@register_model`` above it."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from redconvert.errors import RedconvertError, require

__all__ = ["create", "list_models", "register_model"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}

# Built on other packages, so their modules are imported when the network is: name -> (module, packages it needs).
_LAZY: dict[str, tuple[str, tuple[str, ...]]] = {
    "corrnet_r2plus1d_18": ("corrnet", ("torchvision",)),
    "i3d_v2": ("i3d_v2", ()),
    "pspnet_resnet18": ("pspnet", ("timm",)),
    "r2plus1d_18": ("r2plus1d", ("torchvision",)),
    "tpn_r2plus1d_18": ("tpn", ("torchvision", "timm")),
    "tpn_resnet50": ("tpn", ("torchvision", "timm")),
    "tsn_resnet50": ("tsn", ("timm",)),
    "x3d_m": ("x3d", ("pytorchvideo",)),
    "yowo_i3d": ("yowo", ()),
    "yowo_x3d_m": ("yowo", ("pytorchvideo",)),
}


def register_model(builder: Builder) -> Builder:
    """Decorator: make ``builder`` available to :func:`create` under its function name.

    Raises:
        RedconvertError: another function already has that name.
    """
    name = builder.__name__
    if name in _LAZY and builder.__module__ != _module_of(name):
        raise RedconvertError(
            f"register_model: the zoo already has a model '{name}'. Rename the new function in {builder.__module__}."
        )
    if _BUILDERS.get(name, builder) is not builder:
        raise RedconvertError(
            f"register_model: the zoo already has a model '{name}' (from {_BUILDERS[name].__module__}). "
            f"Rename the new function in {builder.__module__}."
        )
    _BUILDERS[name] = builder
    return builder


def list_models() -> list[str]:
    """The names that :func:`create` takes, sorted."""
    return sorted({*_BUILDERS, *_LAZY})


def create(name: str, **options: Any) -> nn.Module:
    """Build the network called ``name``; ``options`` go to its builder (``weights``, ``num_classes``, ...).

    Raises:
        RedconvertError: no such name (the message gives the nearest one), a package that it needs and that is not
            installed (the message names the extra), or an option that the builder does not take.
    """
    builder = _find(name)
    signature = inspect.signature(builder)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise RedconvertError(f"create('{name}'): {error}. Its options are {signature}.") from error
    return builder(**options)


def _find(name: str) -> Callable[..., nn.Module]:
    if name in _LAZY and name not in _BUILDERS:
        for package in _LAZY[name][1]:
            require(package, extra="zoo", purpose=f"The zoo's '{name}'")
        importlib.import_module(_module_of(name))
    if name not in _BUILDERS:
        near = difflib.get_close_matches(str(name).lower(), list_models(), n=1, cutoff=0.4)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise RedconvertError(f"The zoo has no model '{name}'. {hint}It has: {', '.join(list_models())}.")
    return _BUILDERS[name]


def _module_of(name: str) -> str:
    return f"redconvert.zoo.{_LAZY[name][0]}"
