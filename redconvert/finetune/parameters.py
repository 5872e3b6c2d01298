"""Which parameter learns how fast: groups for an optimizer, and the learning rate over time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import RedconvertError
from ..layers import dynamic_layers

__all__ = ["build_optimizer", "learning_rate_factor", "parameter_groups"]

OPTIMIZERS = ("sgd", "adamw")


def parameter_groups(
    dynamic: nn.Module, lr: float, gate_lr: float | None = None, weight_decay: float = 5e-4
) -> list[dict[str, Any]]:
    """Three groups for any PyTorch optimizer: weights, vectors (norms, biases) and gates; frozen ones left out.

    Args:
        dynamic: a converted network.
        lr: of weights and vectors, cheap operations included.
        gate_lr: of the gates; ``lr`` where none is given.
        weight_decay: of the weights alone. A decayed gate would drift open or shut without a reason.
    """
    gates = {id(p) for layer in dynamic_layers(dynamic).values() for p in layer.gate.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "vectors": [], "gates": []}
    for parameter in dynamic.parameters():
        kind = "gates" if id(parameter) in gates else "weights" if parameter.dim() > 1 else "vectors"
        if parameter.requires_grad:
            groups[kind].append(parameter)
    rates = {"weights": lr, "vectors": lr, "gates": lr if gate_lr is None else gate_lr}
    return [
        {"name": kind, "params": params, "lr": rates[kind], "weight_decay": weight_decay if kind == "weights" else 0.0}
        for kind, params in groups.items()
        if params
    ]


def build_optimizer(name: str, groups: list[dict[str, Any]], momentum: float = 0.9) -> torch.optim.Optimizer:
    """``"sgd"`` (Nesterov) or ``"adamw"`` over `parameter_groups`."""
    if not groups:
        raise RedconvertError("every parameter of the network is frozen: nothing to finetune")
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0)
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=(momentum, 0.999))
    raise RedconvertError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Warm-up over the first share ``warmup`` of ``steps``, then half a cosine to 0. ``step`` counts from 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))
