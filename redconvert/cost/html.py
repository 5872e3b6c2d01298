"""A report as one self-contained page: no scripts, no outside resources, light and dark."""

from __future__ import annotations

from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from .render import candidate_label, format_count, format_ms, format_share, mix, saved_words, saving

if TYPE_CHECKING:
    from .report import LayerReport, Report

__all__ = ["render_html"]

# Executed beyond this times dense is marked: less than that is the gate of a layer that computes all.
MARKED = 1.01

COLUMNS = (
    *("layer", "convolution", "input", "output", "calls", "dense MACs", "executed", "min", "max", "saved"),
    *("gate", "cheap", "parameters", "added", "decisions", "ms dense", "ms dynamic", "share"),
)


def render_html(report: Report, note: str = "") -> str:
    """The page's text. Every name in it is escaped."""
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    scale = max([1.0, *(max(layer.dense_macs, layer.executed_max) for layer in report.layers)])
    return Template(template).substitute(
        title=escape(f"{report.model}: cost"),
        model=escape(report.model),
        subtitle=_subtitle(report) + (f"<br>{escape(note)}" if note else ""),
        tiles="\n".join(_tiles(report)),
        legend=_legend(report),
        time_note=_time_note(report),
        bars="\n".join(_bar(layer, scale) for layer in report.layers),
        columns="".join(f'<th class="{_alignment(column)}">{escape(column)}</th>' for column in COLUMNS),
        rows="\n".join(map(_table_row, report.layers)),
        total=_total_row(report),
        environment=_environment(report),
    )


def _subtitle(report: Report) -> str:
    ran = sum(layer.calls > 0 for layer in report.layers)
    layers = f"{len(report.layers)} dynamic layers" + (f", {ran} of which ran" if ran < len(report.layers) else "")
    samples = _counted(report.samples, "sample") + " in " + _counted(report.batches, "batch", "batches")
    added = f"{format_count(report.parameters)} parameters and {format_count(report.added_parameters)} added"
    return escape(f"{layers} · {samples} · {added}")


def _tiles(report: Report) -> list[str]:
    low, high = format_count(report.executed_min), format_count(report.executed_max)
    tiles = [
        _tile("Dense", *_unit(report.dense_macs), "per sample, before conversion"),
        _tile(
            "Executed",
            *_unit(report.executed_macs),
            f"{saved_words(report.dense_macs, report.executed_macs)} · {low} to {high}",
        ),
    ]
    if report.dense_ms is not None:
        dense, dynamic = format_ms(report.dense_ms), format_ms(report.dynamic_ms)
        faster = saved_words(report.dense_ms, report.dynamic_ms or 0.0)
        tiles += [
            _tile("Time per batch", f"{dense} → {dynamic}", "ms", f"dense → dynamic, {faster}"),
            _tile("Share realised", format_share(report.share), "", "of the speed-up that the MACs promise"),
        ]
    return tiles


def _tile(label: str, number: str, unit: str, note: str) -> str:
    value = f"{escape(number)} <small>{escape(unit)}</small>"
    return f'<div class="tile"><span>{escape(label)}</span><b>{value}</b><span>{escape(note)}</span></div>'


def _unit(macs: float) -> tuple[str, str]:
    number, _, prefix = format_count(macs).partition(" ")
    return number, f"{prefix}MACs"


def _time_note(report: Report) -> str:
    if report.dense_ms is None:
        return ""
    return " Milliseconds are medians of interleaved runs, per batch; a clock on every layer adds a little to each."


KINDS = {"00": "full", "10": "fewer channels", "01": "fewer frames", "11": "fewer of both"}


def _legend(report: Report) -> str:
    entries = [
        ('style="background:var(--track)"', "dense"),
        ('style="background:var(--bar)"', "executed, average"),
    ]
    if any(layer.executed_min < layer.executed_max for layer in report.layers):
        entries.append(('class="range"', "minimum to maximum"))
    if any(layer.executed_macs > MARKED * layer.dense_macs for layer in report.layers):
        entries.append(('style="background:var(--over)"', "over 1 % more than dense"))
    taken = {_kind(*decision) for layer in report.layers for decision, _ in mix(layer)}
    entries += [(f'class="c{kind}"', f"decision: {words}") for kind, words in KINDS.items() if kind in taken]
    if any(max(decision) > 1 for layer in report.layers for decision, _ in mix(layer)):
        entries.append(('class="c11" style="opacity:0.4"', "paler: fewer still"))
    return "".join(f"<span><i {style}></i>{escape(words)}</span>" for style, words in entries)


def _kind(channel: int, temporal: int) -> str:
    return f"{int(channel > 0)}{int(temporal > 0)}"


def _bar(layer: LayerReport, scale: float) -> str:
    """One row: the dense MACs as a light bar, what was executed as a solid one in it, with its range."""
    over = " over" if layer.executed_macs > MARKED * layer.dense_macs else ""
    parts = [
        f'<span class="dense" style="width:{_percent(layer.dense_macs / scale)}"></span>',
        f'<span class="executed{over}" style="width:{_percent(layer.executed_macs / scale)}"></span>',
    ]
    if layer.executed_min < layer.executed_max:
        left, width = layer.executed_min / scale, (layer.executed_max - layer.executed_min) / scale
        parts.append(f'<span class="whisker" style="left:{_percent(left)};width:{_percent(width)}"></span>')
    name = escape(layer.name or "(root)")
    if not layer.calls:
        numbers = "<em>never ran</em>"
    else:
        numbers = f"{format_count(layer.dense_macs)} <em>→</em> {format_count(layer.executed_macs)}"
    return (
        f'<div class="row"><span class="name mono" title="{name}: {escape(layer.kind)}"><bdi>{name}</bdi></span>'
        f'<span class="plot">{"".join(parts)}</span><span class="number">{numbers}</span>{_mix_strip(layer)}'
        f'<span class="number">{_times(layer)}</span></div>'
    )


def _mix_strip(layer: LayerReport) -> str:
    """The decisions side by side; the further down on an axis, the paler."""
    pieces = []
    for (channel, temporal), part in mix(layer):
        label = escape(f"{candidate_label(layer, channel, temporal)}: {part:.0%}")
        opacity = 0.65 ** max(channel - 1, temporal - 1, 0)
        style = f"flex:{part:.4f};opacity:{opacity:.2f}"
        pieces.append(f'<i class="c{_kind(channel, temporal)}" style="{style}" title="{label}"></i>')
    return f'<span class="mix">{"".join(pieces)}</span>'


def _times(layer: LayerReport) -> str:
    if layer.dense_ms is None:
        return "<em>-</em>"
    return f"{format_ms(layer.dense_ms)} <em>→</em> {format_ms(layer.dynamic_ms)}"


def _alignment(column: str) -> str:
    return "text" if column in ("layer", "convolution", "decisions") else ""


def _table_row(layer: LayerReport) -> str:
    decisions = ", ".join(f"{candidate_label(layer, *decision)} {part:.0%}" for decision, part in mix(layer))
    cells = [
        (layer.kind, "text"),
        (_shape(layer.input_shape), ""),
        (_shape(layer.output_shape), ""),
        (str(layer.calls), ""),
        (f"{layer.dense_macs:,}", ""),
        (f"{layer.executed_macs:,.0f}", ""),
        (f"{layer.executed_min:,}", ""),
        (f"{layer.executed_max:,}", ""),
        (saving(layer.dense_macs, layer.executed_macs), ""),
        (f"{layer.gate_macs:,.0f}", ""),
        (f"{layer.cheap_macs:,.0f}", ""),
        (f"{layer.parameters:,}", ""),
        (f"{layer.added_parameters:,}", ""),
        (decisions or "-", "text"),
        (format_ms(layer.dense_ms), ""),
        (format_ms(layer.dynamic_ms), ""),
        (format_share(layer.share), ""),
    ]
    return f'<tr><th class="mono">{escape(layer.name or "(root)")}</th>{_cells(cells)}</tr>'


def _total_row(report: Report) -> str:
    gate, cheap = (sum(getattr(layer, name) for layer in report.layers) for name in ("gate_macs", "cheap_macs"))
    cells = [
        *[("", "")] * 4,
        (f"{report.dense_macs:,}", ""),
        (f"{report.executed_macs:,.0f}", ""),
        (f"{report.executed_min:,}", ""),
        (f"{report.executed_max:,}", ""),
        (saving(report.dense_macs, report.executed_macs), ""),
        (f"{gate:,.0f}", ""),
        (f"{cheap:,.0f}", ""),
        (f"{report.parameters:,}", ""),
        (f"{report.added_parameters:,}", ""),
        ("", ""),
        (format_ms(report.dense_ms), ""),
        (format_ms(report.dynamic_ms), ""),
        (format_share(report.share), ""),
    ]
    return f"<tr><th>whole network</th>{_cells(cells)}</tr>"


def _cells(cells: list[tuple[str, str]]) -> str:
    return "".join(f'<td class="{kind}">{escape(text)}</td>' for text, kind in cells)


def _environment(report: Report) -> str:
    where = report.environment
    entries = {
        "PyTorch": where["torch"],
        "Device": ", ".join(filter(None, (where["device"], where["device_name"], where["instructions"]))),
        "Threads": where["threads"],
        "Data type": where["dtype"],
        "Batch": ", ".join(map(_shape, where["batch_shape"])),
        "Timed": _counted(report.timed_batches, "batch", "batches") if report.timed_batches else "not timed",
        "Date": where["date"],
    }
    if report.uncounted:
        entries["Not counted"] = ", ".join(report.uncounted)
    return "\n".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in entries.items())


def _percent(part: float) -> str:
    return f"{100 * part:.2f}%"


def _shape(sizes: tuple[int, ...] | list[int] | None) -> str:
    return "\N{MULTIPLICATION SIGN}".join(map(str, sizes)) if sizes else "-"


def _counted(count: int, singular: str, plural: str | None = None) -> str:
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"
