"""What moves on stderr while a command works; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, track

__all__ = ["shown", "spinner", "tracked"]


def shown(quiet: bool) -> bool:
    """Whether anything moves."""
    return not quiet and sys.stderr.isatty()


def spinner(text: str, quiet: bool) -> Progress:
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not shown(quiet),
    )
    progress.add_task(text)
    return progress


def tracked(names: Any, text: str, quiet: bool) -> Any:
    return track(list(names), text, console=Console(stderr=True), transient=True, disable=not shown(quiet))
