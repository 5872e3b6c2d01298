"""The zoo's list of names: a network is one builder function with ``@register_model`` above it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from redconvert.errors import RedconvertError

__all__ = ["create", "list_models", "register_model"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Builder) -> Builder:
    """Decorator: make ``builder`` available to :func:`create` under its function name.

    Raises:
        RedconvertError: another function already has that name.
    """
    name = builder.__name__
    if _BUILDERS.get(name, builder) is not builder:
        raise RedconvertError(
            f"register_model: the zoo already has a model '{name}' (from {_BUILDERS[name].__module__}). "
            f"Rename the new function in {builder.__module__}."
        )
    _BUILDERS[name] = builder
    return builder


def list_models() -> list[str]:
    """The names that :func:`create` takes, sorted."""
    return sorted(_BUILDERS)


def create(name: str, **options: Any) -> nn.Module:
    """Build the network called ``name``; ``options`` go to its builder (``weights``, ``num_classes``, ...).

    Raises:
        RedconvertError: no such name (the message gives the nearest one), or an option that the builder does not take.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(str(name).lower(), _BUILDERS, n=1, cutoff=0.4)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise RedconvertError(f"The zoo has no model '{name}'. {hint}It has: {', '.join(list_models())}.")
    builder = _BUILDERS[name]
    signature = inspect.signature(builder)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise RedconvertError(f"create('{name}'): {error}. Its options are {signature}.") from error
    return builder(**options)
