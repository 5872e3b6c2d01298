"""Which inputs are hard: how far each sample's answer is moved, against how far it may be moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..answers import direction
from ..errors import RedconvertError
from ..inputs import call_with, device_of, each_batch, move_to
from ..layers import DynamicConv, observed
from .sensitivity import Call, differentiable_gates, floating, moves_along, recorder, sizes

__all__ = ["Difficulty", "measure_difficulty"]

RIVALS = 3  # runners-up of a sample's first class that a move may bring to the front
LEAST_LEAD = 0.1  # of the mean lead, is added to each: the answer of a sample without any is not all that counts


@dataclass
class Difficulty:
    """What reducing does, sample by sample.

    Attributes:
        harms: by layer ``(S_c, S_t)``, the mean over samples of the squared move over the squared lead.
        channel, temporal: log of each sample's harm over the mean sample's, averaged over layers, ``(N)``; 0 without
            that axis.
        pooled: by layer that ran what its gate read, ``(rows, C_in * T)``, a row per call, or several.
        rows: by layer the sample that each row belongs to, ``(rows)``.
    """

    harms: dict[str, Tensor]
    channel: Tensor
    temporal: Tensor
    pooled: dict[str, Tensor]
    rows: dict[str, Tensor]


def measure_difficulty(
    dynamic: nn.Module,
    layers: dict[str, DynamicConv],
    batches: Any,
    progress: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> Difficulty:
    """How far each decision of each layer, taken alone, moves each sample's answer, over what the answer can bear.

    The harm of a decision to a sample is ``sum_k (v_k . do/dw)^2 / lead_k^2``: the move towards its k-th runner-up over
    how far its first class leads. Unlike the divergence it does not vanish for confident answers, whose
    softmax hides every move, so it compares samples. Outputs that are no class scores ``(N, classes)`` are moved
    along random directions (`redconvert.answers.direction`).
    """
    generator = torch.Generator().manual_seed(seed)
    names = {layer: name for name, layer in layers.items()}
    moves: dict[str, list[Tensor]] = {name: [] for name in layers}  # (N, K, S_c, S_t) per batch
    pooled: dict[str, list[Tensor]] = {name: [] for name in layers}
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    leads: list[Tensor] = []
    for batch in each_batch(batches):
        heard: list[Call] = []
        with differentiable_gates(dynamic, layers), observed(dynamic, recorder(heard)), _listening(layers) as read:
            outputs = floating(call_with(dynamic, move_to(batch, device_of(dynamic))))
            calls, samples = tuple(heard), torch.arange(len(outputs[0])) + sum(map(len, leads))
            for name, each in read.items():
                pooled[name] += each
                rows[name] += [samples.repeat_interleave(len(one) // len(samples)) for one in each]
            rivals = _rivals(outputs, generator)
            leads.append(torch.stack([lead for _, lead in rivals], 1))
            found: dict[str, list[Tensor]] = {name: [] for name in layers}
            for index, (directions, _) in enumerate(rivals):
                along = moves_along(outputs, calls, directions, retain_graph=index + 1 < len(rivals))
                for (layer, decided), move in along.items():
                    if decided != len(samples):
                        raise RedconvertError(
                            f"layer '{names[layer]}' decides for {decided} rows where the network answers for "
                            f"{len(samples)} samples: set the budget by='layers'"
                        )
                    found[names[layer]].append(move)
            for name, each in found.items():
                empty = torch.zeros(len(samples), len(rivals), *sizes(layers[name]), dtype=torch.float64)
                moves[name].append(torch.stack(each, 1) if each else empty)
        progress()
    return _summary(moves, torch.cat(leads), *({n: torch.cat(e) for n, e in by.items() if e} for by in (pooled, rows)))


def _summary(
    moves: dict[str, list[Tensor]], leads: Tensor, pooled: dict[str, Tensor], rows: dict[str, Tensor]
) -> Difficulty:
    bearable = (leads + LEAST_LEAD * leads[:, :1].mean()).square()[:, :, None, None]
    harms = {name: (torch.cat(each).square() / bearable).sum(1) for name, each in moves.items()}
    bad = next((name for name, harm in harms.items() if not torch.isfinite(harm).all()), None)
    if bad is not None:
        raise RedconvertError(f"layer '{bad}': its effect on the outputs is not finite: check inputs and weights")
    channel = [harm[:, 1, 0] for harm in harms.values() if harm.shape[1] > 1]
    temporal = [harm[:, 0, 1] for harm in harms.values() if harm.shape[2] > 1]
    zero = torch.zeros(len(leads), dtype=torch.float64)
    return Difficulty(
        {name: harm.mean(0) for name, harm in harms.items()},
        _common(channel) if channel else zero,
        _common(temporal) if temporal else zero,
        pooled,
        rows,
    )


def _common(harms: list[Tensor]) -> Tensor:
    """What all layers have in common, as one layer's harm to one sample is mostly chance: the log of their mean."""
    relative = torch.stack([harm / harm.mean() for harm in harms if harm.mean() > 0] or [torch.ones_like(harms[0])])
    return relative.mean(0).clamp_min(1e-6).log()


def _rivals(outputs: list[Tensor], generator: torch.Generator) -> list[tuple[list[Tensor], Tensor]]:
    """Directions per output, and for each the samples' leads ``(N)``, float64."""
    scores = outputs[0].detach()
    if len(outputs) > 1 or scores.dim() != 2 or scores.shape[1] < 2:
        ones = torch.ones(len(scores), dtype=torch.float64)
        return [([direction(output.detach(), generator) for output in outputs], ones) for _ in range(RIVALS)]
    best, order = scores.topk(min(1 + RIVALS, scores.shape[1]), 1)
    first = F.one_hot(order[:, 0], scores.shape[1])
    return [
        ([(F.one_hot(order[:, k], scores.shape[1]) - first).to(scores)], (best[:, 0] - best[:, k]).double().cpu())
        for k in range(1, order.shape[1])
    ]


@contextmanager
def _listening(layers: dict[str, DynamicConv]) -> Iterator[dict[str, list[Tensor]]]:
    """What gates read, a tensor ``(rows, C_in * T)`` per call."""
    read: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, x: Tensor, frames: int) -> None:
        x = x.detach().float()
        read[name].append((x if x.shape[2] == frames else F.adaptive_avg_pool1d(x, frames)).flatten(1).cpu())

    handles = [
        layer.gate.register_forward_pre_hook(lambda gate, args, name=name: keep(name, args[0], gate.num_frames))
        for name, layer in layers.items()
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
