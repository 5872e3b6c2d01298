"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from .errors import RedconvertError

__all__ = ["write_bytes_atomic", "write_picture", "write_text_atomic", "written"]


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8; see `write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode())


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """``text``, also in a file where a path is given; see `write_bytes_atomic`."""
    if path is not None:
        write_text_atomic(path, text)
    return text


def write_picture(path: str | os.PathLike[str], figure: Any) -> None:
    """A matplotlib figure, of the kind that the path's suffix says. RedconvertError: it cannot be written so."""
    try:
        figure.savefig(os.fspath(path), dpi=150)
    except (OSError, ValueError) as error:
        raise RedconvertError(
            f"the picture '{os.fspath(path)}' cannot be written ({error}): give a .png, .svg or .pdf in an existing "
            f"folder"
        ) from error


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside ``path`` and rename it: whoever is killed half-way leaves the old file.

    Raises:
        RedconvertError: the path cannot be written.
    """
    target = Path(os.path.realpath(path))  # through a link, not over it
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if target.exists() and not target.is_file():  # /dev/stdout, a pipe; a folder refuses by itself
            target.write_bytes(content)
            return
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RedconvertError(
            f"cannot write '{os.fspath(path)}': {error.strerror or error}. Give a file in an existing folder "
            f"that you may write to"
        ) from error
