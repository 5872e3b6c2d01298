"""COVERAGE.md from the rows of a coverage run."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

__all__ = ["family_shares", "summary", "table"]

MANY = 10  # convolutions from which a network counts as convolutional
Row = dict[str, Any]

INTRODUCTION = """# Coverage

Every network of timm, torchvision and pytorchvideo's hub, built with random weights, converted by
`redconvert.convert` with its defaults, and compared. *Converted and equal* means: outputs in `eval()` are equal to
the bit (`torch.equal`) to those of the original, and finite and not constant; with every layer at its reduced
candidate they differ, so the layers decide; every key of the `state_dict` is kept, in its order; and
`redconvert.revert` gives the original classes, keys and outputs back.

`make coverage` makes this page and [benchmarks/results/coverage.json](benchmarks/results/coverage.json), which holds a
row per network: its input, how it was read, what was skipped and why, MACs, seconds. MACs are those of Conv2d and
Conv3d, at that small input; linear layers, attention, Conv1d and transposed convolutions are not counted and stay
dense. *Lowest* is what the convolutions cost with every layer at its cheapest candidate.
"""


def table(rows: list[Row], missing: int = 0) -> str:
    """The page: a summary, what did not pass by name, then a table by family for each library.

    Args:
        rows: of the networks that were run.
        missing: how many were not; the page says so.
    """
    parts = [INTRODUCTION, _unfinished(len(rows), missing), _summary_table(rows), _failures(rows), _skips(rows)]
    for library in ("timm", "torchvision", "pytorchvideo"):
        chosen = [row for row in rows if row["library"] == library]
        if chosen:
            parts.append(f"## {library}\n\n{_family_table(chosen)}")
    return "\n".join(filter(None, parts))


def _unfinished(run: int, missing: int) -> str:
    return f"**Unfinished**: {missing:,} of {run + missing:,} networks have not been run yet.\n" if missing else ""


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """How many networks there are, with many convolutions, with few, without any, and how many of them passed."""
    rows = list(rows)
    many = [row for row in rows if row.get("convs", MANY) >= MANY]
    few = [row for row in rows if 0 < row.get("convs", MANY) < MANY]
    without = [row for row in rows if row.get("convs") == 0]
    return {
        "networks": len(rows),
        "many": len(many),
        "many_passed": sum(row["status"] == "ok" for row in many),
        "few": len(few),
        "few_passed": sum(row["status"] == "ok" for row in few),
        "without": len(without),
        "without_told": sum(row["status"] == "nothing to convert" for row in without),
    }


def family_shares(rows: Iterable[Row]) -> dict[str, float]:
    """By family, the median share of convolution MACs in converted layers, of networks with many convolutions."""
    shares = defaultdict(list)
    for row in rows:
        if row.get("convs", 0) >= MANY and "covered" in row:
            shares[row["family"]].append(row["covered"])
    return {name: statistics.median(values) for name, values in shares.items()}


def _summary_table(rows: list[Row]) -> str:
    lines = [
        f"| library | networks | with {MANY} convolutions or more | converted and equal "
        "| with fewer | converted and equal | with none | told so |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for library in ("timm", "torchvision", "pytorchvideo"):
        numbers = summary(row for row in rows if row["library"] == library)
        lines.append(f"| {library} | " + " | ".join(str(number) for number in numbers.values()) + " |")
    shares = family_shares(row for row in rows if row["library"] == "timm")
    if shares:
        median = statistics.median(shares.values())
        lines += [
            "",
            f"Share of convolution MACs in converted layers, median over timm's {len(shares)} families: {median:.1%}.",
        ]
    traced = Counter(row["traced"] for row in rows if "traced" in row)
    lines += ["", f"Read by: {', '.join(f'{source} {count}' for source, count in traced.most_common())}."]
    return "\n".join(lines) + "\n"


def _failures(rows: list[Row]) -> str:
    failed = [row for row in rows if not _passed(row)]
    if not failed:
        return "Nothing failed.\n"
    lines = ["## Not converted", "", "| network | convolutions | what | why |", "| --- | --- | --- | --- |"]
    for row in sorted(failed, key=lambda row: row["model"]):
        why = row.get("error", "").replace("|", "/")
        lines.append(f"| {row['model']} | {row.get('convs', '?')} | {row['status']} | {why} |")
    return "\n".join(lines) + "\n"


def _passed(row: Row) -> bool:
    return row["status"] == "ok" or (row["status"] == "nothing to convert" and row.get("convs") == 0)


def _skips(rows: list[Row]) -> str:
    """Why convolutions stay dense."""
    layers: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for row in rows:
        layers.update(row.get("skipped", {}))
        networks.update(row.get("skipped", {}).keys())
    total = sum(row.get("converted", 0) for row in rows) + layers.total()
    lines = [
        f"## Skipped layers: {layers.total():,} of {total:,}",
        "",
        "| reason | layers | networks |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {reason} | {count:,} | {networks[reason]:,} |" for reason, count in layers.most_common()]
    return "\n".join(lines) + "\n"


def _family_table(rows: list[Row]) -> str:
    families = defaultdict(list)
    for row in rows:
        families[row["family"]].append(row)
    lines = [
        "| family | networks | passed | convolutions | converted | share of their MACs | lowest MACs | read by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_family_line(name, families[name]) for name in sorted(families)]
    return "\n".join(lines) + "\n"


def _family_line(name: str, rows: list[Row]) -> str:
    convs, converted = (sum(row.get(key, 0) for row in rows) for key in ("convs", "converted"))
    with_macs = [row for row in rows if row.get("conv_macs")]
    share = f"{statistics.median(row['covered'] for row in with_macs):.1%}" if with_macs else ""
    lowest = f"{statistics.median(row['lowest_macs'] / row['conv_macs'] for row in with_macs):.1%}" if with_macs else ""
    traced = ", ".join(source for source, _ in Counter(row["traced"] for row in rows if "traced" in row).most_common())
    passed = sum(map(_passed, rows))
    return f"| {name} | {len(rows)} | {passed} | {convs:,} | {converted:,} | {share} | {lowest} | {traced} |"
