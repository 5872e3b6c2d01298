"""A picture of where the redundancy is: what each layer's candidates explain of what they do not compute."""

from __future__ import annotations

import os
from typing import Any

from ..errors import require
from ..files import write_picture
from .run import CalibratedLayer, Calibration

__all__ = ["plot_explained"]

TITLES = {"channels": "of the dropped channels", "inputs": "of the mixed inputs", "frames": "of the skipped frames"}
COLOURS = ("#2f6fb3", "#e08a1e", "#6a9a3b", "#8c5aa8")  # one per reduced candidate, the largest first
ROW, MARGIN, WIDTH = 0.2, 1.3, 4.2  # inches: of a layer, above and below all layers, of an axis


def plot_explained(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Draw a bar per layer and reduced candidate, layers from top to bottom: of channels, of mixed inputs, of frames.

    Args:
        calibration: what `redconvert.calibrate` returned.
        path: the file to write; its suffix (.png, .svg, .pdf) says what.

    Raises:
        RedconvertError: matplotlib is missing, or the file cannot be written as what its suffix says.
    """
    figures = require("matplotlib.figure", extra="plot", purpose="Drawing what a calibration explains")
    layers = calibration.layers
    axes = [axis for axis in TITLES if any(_shares(layer, axis) for layer in layers)]
    # No pyplot: it would keep the figure, and choose a window where there is one.
    figure = figures.Figure(
        figsize=(2.2 + WIDTH * len(axes), MARGIN + max(1.0, ROW * len(layers))), layout="constrained"
    )
    figure.suptitle(f"{calibration.model}: variance that the cheap operations explain", fontsize=10)
    for place, (axis, plot) in enumerate(zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True)):
        _draw(plot, layers, axis, names=place == 0)
    bars = {label: bar for plot in figure.axes for bar, label in zip(*plot.get_legend_handles_labels(), strict=True)}
    figure.legend(bars.values(), bars.keys(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    write_picture(path, figure)


def _draw(plot: Any, layers: tuple[CalibratedLayer, ...], axis: str, names: bool) -> None:
    count = max(len(_shares(layer, axis)) for layer in layers)
    for i in range(count):
        shares = {y: _shares(layer, axis)[i] for y, layer in enumerate(layers) if i < len(_shares(layer, axis))}
        shown = {y: share for y, share in shares.items() if share is not None}
        plot.barh(
            [y + ((i + 0.5) / count - 0.5) * 0.8 for y in shown],
            list(shown.values()),
            height=0.8 / count,
            color=COLOURS[i % len(COLOURS)],
            label=_label(layers, axis, i),
        )
    plot.set_yticks(range(len(layers)), [layer.name for layer in layers] if names else [], fontsize=7)
    plot.set_ylim(len(layers) - 0.4, -0.6)
    plot.set_xlim(0, 1)
    plot.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"], fontsize=7)
    plot.set_title(TITLES[axis], fontsize=8)
    plot.tick_params(axis="y", length=0)
    plot.grid(axis="x", linewidth=0.4, color="#cccccc")
    plot.set_axisbelow(True)
    plot.spines[["top", "right", "left"]].set_visible(False)


def _label(layers: tuple[CalibratedLayer, ...], axis: str, index: int) -> str:
    """What a reduced candidate computes: 1/2, 1/4, ..., or the percentage of the config's own shares."""
    if axis != "frames":
        widest = max(
            (layer for layer in layers if len(_shares(layer, axis)) > index), key=lambda each: each.channels[0]
        )
        share = widest.channels[index + 1] / widest.channels[0]
        if abs(share - 2.0 ** -(index + 1)) > 1 / widest.channels[0]:
            return f"{share:.0%} computed"
    return f"1/{2 ** (index + 1)} computed"


def _shares(layer: CalibratedLayer, axis: str) -> tuple[float | None, ...]:
    by_axis = (layer.channel_explained, layer.input_explained, layer.temporal_explained)
    return dict(zip(TITLES, by_axis, strict=True))[axis]
