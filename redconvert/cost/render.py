"""A report as text: the table on a terminal, the lines of a CSV file, and numbers as people write them."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers import DynamicConv

if TYPE_CHECKING:
    from rich.table import Table

    from .report import LayerReport, Report

__all__ = [
    "candidate_label",
    "describe_conv",
    "format_count",
    "format_ms",
    "format_share",
    "headline",
    "mix",
    "render_csv",
    "render_table",
    "render_text",
    "saving",
    "short_label",
]

MIN_WIDTH = 100
NAME_WIDTH = 22  # of layers, where the column has to be narrow
COLUMNS = ("layer", "dense", "executed", "min - max", "saved", "ms", "ms dyn.", "share", "decisions")


def describe_conv(layer: DynamicConv) -> str:
    """``"Conv3d 3x3x3, stride 1x2x2, groups 4"``: what a convolution is, without what is 1."""
    words = [f"Conv{len(layer.kernel_size)}d {_times(layer.kernel_size)}"]
    if isinstance(layer, nn.Conv2d) and layer.num_frames is not None:
        words.append(f"{layer.num_frames} frames")
    words += [
        f"{name} {_times(getattr(layer, name))}" for name in ("stride", "dilation") if set(getattr(layer, name)) != {1}
    ]
    if layer.groups > 1:
        words.append(f"groups {layer.groups}")
    return ", ".join(words)


def format_count(value: float) -> str:
    """Three or more digits and the power of ten: 1234567 -> ``"1.23 M"``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return f"{value:.0f}"


def format_ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 999.5 else 1 if value >= 99.95 else 2}f}"


def format_share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def saving(dense: float, executed: float) -> str:
    """The part of the MACs that was saved, in percent; negative where gates cost more than they save."""
    return f"{100 * (1 - executed / dense):.1f} %" if dense else "-"


def saved_words(dense: float, executed: float) -> str:
    """For sentences: ``"21.5 % saved"``, or ``"0.1 % more"``."""
    if executed > dense:
        return f"{100 * (executed / dense - 1):.1f} % more" if dense else "-"
    return f"{saving(dense, executed)} saved"


def candidate_label(layer: LayerReport, channel: int, temporal: int) -> str:
    """``"full"``, ``"32/64 ch"``, ``"1/2 fr"`` or ``"32/64 ch 1/2 fr"``."""
    words = [f"{layer.channels[channel]}/{layer.channels[0]} ch"] if channel else []
    words += [f"1/{layer.frame_strides[temporal]} fr"] if temporal else []
    return " ".join(words) or "full"


def short_label(layer: LayerReport, channel: int, temporal: int) -> str:
    """``"full"``, ``"32ch"``, ``"fr/2"`` or ``"32ch fr/2"``: the same for narrow columns."""
    words = [f"{layer.channels[channel]}ch"] if channel else []
    words += [f"fr/{layer.frame_strides[temporal]}"] if temporal else []
    return " ".join(words) or "full"


def mix(layer: LayerReport) -> list[tuple[tuple[int, int], float]]:
    """Which part of the decisions each candidate has, from the most work to the least."""
    total = sum(layer.decisions.values())
    return [(decision, count / total) for decision, count in sorted(layer.decisions.items()) if count]


def render_csv(report: Report) -> str:
    """One line per layer; shapes as ``1x3x8x8``, decisions as ``channel/temporal:count``, separated by spaces."""
    rows = [_csv_row(layer.to_dict()) for layer in report.layers]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def render_table(report: Report, *, title: bool = True) -> Table:
    """A rich table: the totals above, a line per layer."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    if title:
        table.title = Text("\n".join(headline(report)))
    for index, column in enumerate(COLUMNS):
        outer = index in (0, len(COLUMNS) - 1)
        table.add_column(column, justify="left" if outer else "right", no_wrap=not outer, overflow="fold")
    table.columns[0].min_width = min(NAME_WIDTH, max(len(layer.name) for layer in report.layers))
    for row in _rows(report):
        table.add_row(*map(Text, row))  # Text: names may hold square brackets, rich's markup
    return table


def render_text(report: Report) -> str:
    """The table as plain text, at least 100 characters wide."""
    lines = headline(report)
    try:
        from rich.console import Console
    except ImportError:
        return "\n".join([*lines, "", *_plain_table(report)])
    text = io.StringIO()
    width = max(MIN_WIDTH, shutil.get_terminal_size((MIN_WIDTH, 24)).columns)
    console = Console(file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(render_table(report, title=False))
    return "\n".join([*lines, *(line.rstrip() for line in text.getvalue().rstrip().splitlines())])


def _plain_table(report: Report) -> list[str]:
    rows = [COLUMNS, *_rows(report)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (0, len(COLUMNS) - 1)
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return [lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])]


def headline(report: Report) -> list[str]:
    """The totals, and where they were measured, in two to four lines."""
    low, high = format_count(report.executed_min), format_count(report.executed_max)
    lines = [
        f"{report.model}: {format_count(report.dense_macs)}MACs dense, {format_count(report.executed_macs)}MACs "
        f"executed ({low} - {high}, {saved_words(report.dense_macs, report.executed_macs)}), "
        f"{report.samples} samples"
    ]
    if report.dense_ms is not None:
        lines.append(
            f"{format_ms(report.dense_ms)} ms dense, {format_ms(report.dynamic_ms)} ms dynamic per batch, "
            f"share of the promised speed-up {format_share(report.share)}"
        )
    where = report.environment
    lines.append(
        f"MACs per sample, gates and cheap operations included; torch {where['torch']}, {where['device']} "
        f"({where['threads']} threads), {where['dtype']}, batch {_shapes(where['batch_shape'])}"
    )
    if report.uncounted:
        lines.append(f"not counted: {', '.join(report.uncounted)}")
    return lines


def _rows(report: Report) -> list[tuple[str, ...]]:
    return [_row(layer) for layer in report.layers] + [
        (
            "(network)",
            format_count(report.dense_macs),
            format_count(report.executed_macs),
            _span(report),
            saving(report.dense_macs, report.executed_macs),
            format_ms(report.dense_ms),
            format_ms(report.dynamic_ms),
            format_share(report.share),
            "",
        )
    ]


def _row(layer: LayerReport) -> tuple[str, ...]:
    decisions = ", ".join(f"{short_label(layer, *decision)} {part:.0%}" for decision, part in mix(layer))
    if not layer.calls:
        return (layer.name, *["-"] * 7, "never ran")
    return (
        layer.name if layer.calls == 1 else f"{layer.name} ({layer.calls} calls)",
        format_count(layer.dense_macs),
        format_count(layer.executed_macs),
        _span(layer),
        saving(layer.dense_macs, layer.executed_macs),
        format_ms(layer.dense_ms),
        format_ms(layer.dynamic_ms),
        format_share(layer.share),
        decisions,
    )


def _span(counted: LayerReport | Report) -> str:
    """Minimum and maximum of the samples, empty where all cost the same."""
    if counted.executed_min == counted.executed_max:
        return ""
    return f"{format_count(counted.executed_min)} - {format_count(counted.executed_max)}"


def _csv_row(values: dict[str, Any]) -> dict[str, Any]:
    row = dict(values)
    for name in ("input_shape", "output_shape"):
        row[name] = _times(row[name]) if row[name] else ""
    for name in ("channels", "frame_strides"):
        row[name] = " ".join(map(str, row[name]))
    row["decisions"] = " ".join(f"{d['channel']}/{d['temporal']}:{d['count']}" for d in row["decisions"])
    return row


def _times(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _shapes(shapes: list[list[int]]) -> str:
    return ", ".join(map(_times, shapes))
