"""A reduced network that asks its original where it is unsure: how often it is right, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from training import is_dynamic

import redconvert
from redconvert.cascade import margin
from redconvert.cost import dense_macs
from redconvert.evaluate import spread_of_macs

BLEND = 0.3  # of the first answer in that of a network that is asked again and right more often


def asking_again(
    little: nn.Module,
    held_out: list[Tensor],
    test: tuple[Tensor, Tensor],
    totals: Sequence[float],
    big: nn.Module | None = None,
    size: int = 500,
) -> dict[str, Any]:
    """The first pass alone, and `redconvert.cascade` at each total budget that it leaves room for.

    Args:
        little: a dynamic network, or a pruned one.
        held_out: batches without labels that choose the thresholds; not those tested on.
        totals: shares of the dense multiply-adds; so are the costs, which are those of the samples tested on.
        big: what is asked again; None: the network itself, dense.
        size: samples that run at once.
    """
    inputs, labels = test
    alone = _share_of_macs(little, inputs[:500].split(size), big)
    first = answers(little, inputs, size)
    row: dict[str, Any] = {
        "alone": {"accuracy": right(first.argmax(1), labels), "share_of_dense_macs": round(alone, 4)}
    }
    with redconvert.disabled(little) if big is None else nullcontext():
        second = answers(little if big is None else big, inputs, size)
    sure = margin(first)
    for total in totals:
        if total <= alone:
            continue
        threshold = float(redconvert.cascade(little, held_out, total, big=big).threshold)
        again = sure < threshold
        asked = float(again.double().mean())
        # What the cascade gives, with fewer passes: the second answer alone, and blended with the first.
        chosen, blended = (
            torch.where(again, scores.argmax(1), first.argmax(1)) for scores in (second, second.lerp(first, BLEND))
        )
        row[str(total)] = {
            "accuracy": right(chosen, labels),
            "blended": right(blended, labels),
            "share_of_dense_macs": round(alone + asked, 4),
            "asked_again": round(asked, 4),
            "threshold": round(threshold, 4),
        }
    return row


def _share_of_macs(little: nn.Module, batches: Sequence[Tensor], big: nn.Module | None) -> float:
    """Mean executed multiply-adds of the first pass, as a share of the dense network's."""
    if is_dynamic(little):
        spread = spread_of_macs(little, list(batches))
        return spread.mean / float(spread.dense.mean())
    if big is None:
        raise ValueError("a network without dynamic layers has no dense form of its own to ask: pass big")
    return dense_macs(little, batches[0][:1]).total / dense_macs(big, batches[0][:1]).total


@torch.no_grad()
def answers(model: nn.Module, inputs: Tensor, size: int = 500) -> Tensor:
    """Scores ``(N, classes)``, so many samples at once."""
    return torch.cat([model(x) for x in inputs.split(size)])


def right(chosen: Tensor, labels: Tensor) -> float:
    """Share of chosen classes ``(N)`` that are the labels."""
    return float((chosen == labels).double().mean())
