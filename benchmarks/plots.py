"""Pictures of benchmark results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = {
    "rebuilt": "channels rebuilt",
    "absorbed": "channels absorbed",
    "principal": "principal components",
    "principal, sixteenths": "the same, twelve candidates",
    "principal, all layers": "the same, all layers",
    "mixed inputs, all layers": "mixtures of inputs, too",
}
MARKERS = {"dense": "s", "half": "v", "dynamic": "o", "depgraph": "x", "magnitude": "+"}


def accuracy_against_macs(result: dict[str, Any], path: Path) -> None:
    """Every row of a benchmark at the MACs that it executed; of dynamic ones budgets, too, and asking again dashed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(100 * result["original"]["accuracy"], color="gray", linestyle=":", label="pretrained, not finetuned")
    colors = iter(pyplot.get_cmap("tab10" if len(result["summary"]) <= 10 else "tab20").colors)
    for name, row in result["summary"].items():
        marker = next((m for kind, m in MARKERS.items() if name.startswith(kind)), "o")
        color = next(colors)
        axes.errorbar(
            [100 * row["share_of_dense_macs"]],
            [100 * row["accuracy"]],
            yerr=None if row["std"] is None else [100 * row["std"]],
            marker=marker, color=color, linestyle="none", label=name,
        )  # fmt: skip
        first = next(iter(result["rows"][name].values()))
        for key, style, what in (("curve", "-", "thresholds moved"), ("asking_again", "--", "asking the original")):
            if key in first:
                points = sorted((100 * p["share_of_dense_macs"], 100 * p["accuracy"]) for p in first[key].values())
                label = f"{name}, {what}"
                axes.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1, alpha=0.7, label=label)
    schedule = result["schedule"]
    axes.set(xlabel="executed MACs, % of the dense network's", ylabel="right answers on the test set, %")
    axes.set_title(f"{schedule['network']}, {schedule['epochs']} epochs of {schedule['images']:,} images", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def agreement_against_macs(result: dict[str, Any], path: Path, network: str) -> None:
    """How many answers stay as they were at each budget, a line for each way of leaving channels out."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    colors = ("#2f6fb3", "#c4572e", "#3a8f4d", "#8f6bb3", "#b8922f", "#1f2a44")
    for (name, curve), color in zip(result["curves"].items(), colors, strict=False):
        points = [(100 * point["share"], 100 * point["agreement"]) for point in curve["points"]]
        axes.plot(*zip((100, 100), *points, strict=True), marker="o", color=color, label=LABELS.get(name, name))
    axes.axhline(95, color="gray", linestyle=":", linewidth=1)
    axes.legend(fontsize=8)
    axes.set(xlabel="executed MACs, % of the dense network's", ylabel="same top-1 answer as the dense network, %")
    samples = next(iter(result["curves"].values()))["samples"]
    axes.set_title(f"{network} without training, {samples} J-HMDB test clips", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    _save(figure, path)


def cascades_against_macs(result: dict[str, Any], path: Path) -> None:
    """One pass at each budget, and a line for each that asks the dense network again where it is unsure."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    alone = sorted(
        (100 * r["alone"]["share_of_dense_macs"], 100 * r["alone"]["accuracy"]) for r in result["first"].values()
    )
    axes.axhline(100 * result["dense_accuracy"], color="gray", linestyle=":", label="dense")
    for color, (first, row) in zip(
        pyplot.get_cmap("viridis")([0.1, 0.35, 0.6, 0.85]), result["first"].items(), strict=False
    ):
        points = sorted((100 * p["share_of_dense_macs"], 100 * p["accuracy"]) for p in row.values())
        axes.plot(
            *zip(*points, strict=True),
            marker=".",
            color=color,
            label=f"asking again after a pass at {float(first):.0%}",
        )
    axes.plot(*zip(*alone, strict=True), marker="o", color="black", linestyle="--", label="one pass, by layers")
    axes.set(xlabel="executed MACs, % of the dense network's", ylabel="right answers, %")
    axes.set_title(
        f"ResNet-56 without training, {result['test_images']:,} CIFAR-10 test images", loc="left", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def answers_against_time(result: dict[str, Any], path: Path) -> None:
    """What budgets of time and of multiply-adds do to the answers, against the milliseconds that they take."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, color in (("time", "#2f6fb3"), ("multiply-adds", "#c4572e")):
        rows = sorted((row for row in result["rows"] if row["kind"] == kind), key=lambda row: row["ms"])
        ms = [row["ms"] for row in rows]
        label = f"budgets of {kind}"
        left.plot(ms, [row["divergence"] for row in rows], marker="o", color=color, label=label)
        right.plot(ms, [100 * row["agreement"] for row in rows], marker="o", color=color, label=label)
    dense = result["rows"][0]["ms"]
    for axes in (left, right):
        axes.axvline(dense, color="gray", linestyle=":", linewidth=1, label="dense, deployed")
        axes.set_xlabel("milliseconds for one clip, deployed")
        axes.grid(alpha=0.3)
    left.set(yscale="log", ylabel="divergence from the dense network's answers, nats")
    right.set_ylabel("same top-1 answer as the dense network, %")
    left.legend(fontsize=8)
    left.set_title(f"I3D without training, {result['test_clips']} J-HMDB test clips", loc="left", fontsize=10)
    _save(figure, path)


def difficulty_against_depth(result: dict[str, Any], path: Path) -> None:
    """How well what each gate reads finds the hard images, beside the answer's margin."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    found = list(result["gates"].values())
    axes.plot(
        range(1, len(found) + 1), found, marker=".", color="#2f6fb3", label="what the gate of a convolution reads"
    )
    axes.axhline(result["margin"], color="#c4572e", linestyle="--", label="how sure the answer is")
    axes.axhline(0.5, color="gray", linestyle=":", linewidth=1, label="chance")
    axes.set(xlabel="convolution", ylabel="area under the ROC curve", ylim=(0.4, 1))
    axes.set_title(
        f"Which images a pass at {result['budget']:.0%} answers differently, ResNet-56", loc="left", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
