"""Progress bars on stderr, for whoever asked for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .errors import require

__all__ = ["Step", "progress_bar"]


class Step(Protocol):
    """What a loop calls as it goes."""

    def __call__(self, advance: int = 1, text: str | None = None) -> None: ...


def _silent(advance: int = 1, text: str | None = None) -> None:
    pass


@contextmanager
def progress_bar(shown: bool, text: str, total: int | None = None) -> Iterator[Step]:
    """A rich bar where ``shown``, gone when the work is done; without ``total`` it counts steps."""
    if not shown:
        yield _silent
        return
    rich = require("rich.progress", "train", "a progress bar")
    console = require("rich.console", "train", "a progress bar").Console(stderr=True)
    timing = rich.TimeElapsedColumn() if total is None else rich.TimeRemainingColumn()
    columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), timing)
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda advance=1, text=None: bar.update(task, advance=advance, description=text)
