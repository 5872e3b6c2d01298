"""One base class for everything that redconvert refuses to do."""

from __future__ import annotations

__all__ = ["BudgetTooLowError", "MissingExtraError", "RedconvertError", "require"]


class RedconvertError(Exception):
    """Says what was wrong, where, and what to do about it.

    Every check that can fail finishes before the first change, so whoever catches this error
    still holds the model, file or folder as it was.
    """


class BudgetTooLowError(RedconvertError):
    """A network cannot cost as little as was asked; the message says how little it can."""


class MissingExtraError(RedconvertError, ImportError):
    """A part of redconvert needs a package that an extra brings."""


def require(module: str, extra: str, purpose: str):
    """Import ``module`` (dotted name), or raise the error that names the extra which brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package '{module.partition('.')[0]}', which could not be imported "
            f"({error}). Install it with: pip install 'redconvert[{extra}]'"
        ) from error
