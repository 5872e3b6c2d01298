"""Sparse mode: each sample's convolution runs only what its gates ask for; equal decisions run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .gate import GateWeights, largest_open

__all__ = ["FULL", "Decision", "decide", "group_samples", "memory_format", "route", "sample_rows", "select"]


D = TypeVar("D")


class Decision(NamedTuple):
    """The largest open candidate on each axis, and whether smaller ones are mixed in (``gate="soft"``).

    ``source`` is no choice of the layer's own: the channel candidate of the layer that it reads, where that one
    hands over only what it computed.
    """

    channel: int
    temporal: int
    blend: bool = False
    source: int = 0


FULL = Decision(0, 0)


def decide(weights: GateWeights, soft: bool) -> list[Decision]:
    """One decision per sample. The device is read once, for the whole batch."""
    rows = [largest_open(weights.channel), largest_open(weights.temporal)]
    if soft:
        alone = [w.gather(1, index[:, None]).squeeze(1) == 1 for w, index in zip(weights, rows, strict=True)]
        open_count = sum((w > 0).sum(1) for w in weights)
        rows.append(~(alone[0] & alone[1] & (open_count == 2)))
    return [Decision(row[0], row[1], bool(row[2]) if soft else False) for row in torch.stack(rows, dim=1).tolist()]


def group_samples(decisions: Sequence[D]) -> dict[D, list[int]]:
    """Which samples take which decision (or candidate), in the order in which decisions first appear."""
    groups: dict[D, list[int]] = {}
    for sample, decision in enumerate(decisions):
        groups.setdefault(decision, []).append(sample)
    return groups


def route(
    groups: dict[Decision, list[int]],
    compute: Callable[[Decision, Tensor | None], Tensor],
    x: Tensor,
) -> Tensor:
    """Run ``compute(decision, samples)`` once per decision and put the results back in the batch's order.

    ``samples`` is the index tensor of the group, or None where the whole batch agrees: then nothing is
    gathered or scattered. Otherwise the result is in the layout of ``x``, or of the first group's result
    where ``x`` is contiguous (PyTorch leaves ``channels_last`` for small groups).
    """
    if len(groups) == 1:
        return compute(next(iter(groups)), None)
    total = sum(map(len, groups.values()))
    out: Tensor | None = None
    for decision, samples in groups.items():
        index = torch.tensor(samples, device=x.device)
        part = compute(decision, index)
        if out is None:
            shape = (total * (part.shape[0] // len(samples)), *part.shape[1:])
            layout = memory_format(part if x.is_contiguous() else x)
            out = torch.empty(shape, dtype=part.dtype, device=x.device, memory_format=layout)
        rows = sample_rows(index, part.shape[0] // len(samples))
        out = out.index_copy(0, rows, part) if part.requires_grad else out.index_copy_(0, rows, part)
    assert out is not None
    return out


def sample_rows(samples: Tensor, frames: int) -> Tensor:
    """Rows of a batch of ``N * frames`` frames that belong to these samples."""
    if frames == 1:
        return samples
    return (samples[:, None] * frames + torch.arange(frames, device=samples.device)).flatten()


def select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """``x.index_select(dim, index)`` over the batch (0) or the channels (1), in the layout of ``x``.

    PyTorch's own returns every layout as contiguous, and is four times slower on channels of ``channels_last``.
    """
    if torch.compiler.is_compiling() or memory_format(x) == torch.contiguous_format:
        return x.index_select(dim, index)
    rows = x.movedim(1, -1)  # contiguous, channels last
    if dim == 0:
        picked = rows.index_select(0, index)
    else:
        picked = rows.reshape(-1, x.shape[1]).index_select(1, index).view(*rows.shape[:-1], len(index))
    return picked.movedim(-1, 1)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that ``x`` is in, for results that keep it."""
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d if not x.is_contiguous() else torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last if not x.is_contiguous() else torch.contiguous_format
    return torch.contiguous_format
