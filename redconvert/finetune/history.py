"""What a finetuning run did, step by step and epoch by epoch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import require
from ..files import write_text_atomic

__all__ = ["History"]


@dataclass
class History:
    """The figures of a run. Costs are shares of the dense network's multiply-adds.

    Attributes:
        settings: what the run was asked for.
        environment: versions, device, processes, date.
        steps: per training batch ``{"loss", "task", "cost", "lr"}``; task is the loss without the efficiency term.
        epochs: per epoch ``{"epoch", "loss", "cost", "seconds"}``, and with validation ``"val_loss"``,
            ``"val_accuracy"`` (of the labels, or agreement with the teacher where there are none), ``"val_cost"``.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Of every batch."""
        return [step["loss"] for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: str | Path) -> None:
        """As JSON; the old file or the new one, never half of it."""
        write_text_atomic(path, self.to_json() + "\n")

    def plot(self, path: str | Path | None = None) -> Any:
        """Loss and cost over batches, validation over epochs: a matplotlib figure, written to ``path`` if given."""
        pyplot = require("matplotlib.pyplot", "plot", "History.plot")
        figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
        for axis, key, title in ((axes[0], "task", "task loss"), (axes[1], "cost", "executed share of MACs")):
            axis.plot([step[key] for step in self.steps], linewidth=0.8)
            axis.set(xlabel="batch", title=title)
        axes[1].set_ylim(0, 1.05)
        target = self.settings.get("target")
        if target is not None:
            axes[1].axhline(target, linestyle="--", color="gray", label=f"target {target:g}")
            axes[1].legend()
        rows = [row for row in self.epochs if "val_accuracy" in row]
        axes[2].plot([row["epoch"] for row in rows], [row["val_accuracy"] for row in rows], marker="o")
        axes[2].set(xlabel="epoch", title="validation accuracy")
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def __str__(self) -> str:
        names = {"epoch": "epoch", "loss": "loss", "cost": "cost", "val_accuracy": "val acc", "val_cost": "val cost"}
        lines = ["  ".join(f"{title:>8}" for title in names.values())]
        for row in self.epochs:
            cells = [f"{row[key]:8.4g}" if key in row else f"{'-':>8}" for key in names]
            lines.append("  ".join(cells))
        return "\n".join(lines)
