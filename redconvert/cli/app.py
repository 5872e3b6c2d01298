"""The program itself: its options before the command, its console, its exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from .. import __version__
from ..errors import RedconvertError

__all__ = ["app", "console", "main", "warn"]

app = typer.Typer(
    help="Turn pretrained video and image networks into dynamic ones, and see what each layer costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# A pipe has no width: long tables need more than the 80 columns that rich assumes then.
console = Console(width=None if sys.stdout.isatty() else 140)


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Options before the command."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. Exit code 1 with one line for what redconvert refuses, 2 for wrong usage; no traceback."""
    try:
        app()
    except RedconvertError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if os.environ.get("REDCONVERT_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error} (REDCONVERT_DEBUG=1 shows where)")


def warn(message: str) -> None:
    """One yellow line on stderr."""
    _line(f"warning: {message}", "yellow")


def _fail(message: str) -> None:
    _line(f"error: {message}", "red")
    sys.exit(1)


def _line(message: str, style: str) -> None:
    Console(stderr=True).print(" ".join(message.split()), style=style, markup=False, soft_wrap=True)
