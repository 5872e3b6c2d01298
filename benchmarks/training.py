"""The training loop of the benchmarks: the same for every row, and one that a user could write."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import redconvert
from redconvert.cost.measure import static_macs
from redconvert.finetune.parameters import build_optimizer, learning_rate_factor
from redconvert.finetune.run import training_mode


def train(
    model: nn.Module,
    loader: DataLoader,
    *,
    epochs: int,
    lr: float,
    gate_lr: float,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    temperature: float = 1.0,
    weight: float = 0.0,
    target: float | None = None,
    freeze_norms: bool = False,
    clip: float = 5.0,
    bfloat16: bool = False,
    gate_every: int = 1,
) -> list[dict[str, float]]:
    """SGD with Nesterov momentum, warm-up and cosine; ``(1 - d) CE + d t^2 KL(teacher) + weight * L_e``.

    ``bfloat16`` is for 2D networks: on a CPU with avx512_bf16, torch 2.15 gives I3D's convolutions infinite gradients.
    ``gate_every``: gates learn in every so many-th step; in between a step costs what they leave to compute. Dropout
    rests where there is a teacher.
    Returns means per epoch; leaves ``model`` in ``eval()``.
    """
    efficiency = None
    if weight:
        static = static_macs(model, next(iter(loader))[0][:1])
        efficiency = redconvert.EfficiencyLoss(model, target=target, static_macs=static)
    optimizer = build_optimizer("sgd", _groups(model, lr, gate_lr))
    rates, steps, step = [group["lr"] for group in optimizer.param_groups], epochs * len(loader), 0
    history = []
    for _ in range(epochs):
        training_mode(model, freeze_norms, dropout=teacher is None)
        rows = []
        for x, y in loader:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor(step, steps, warmup=0.05)
            with nullcontext() if efficiency is None or step % gate_every == 0 else redconvert.resting_gates(model):
                row, loss = _losses(model, x, y, teacher, distill, temperature, efficiency, weight, bfloat16)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rows.append(row)
            step += 1
        history.append({key: statistics.mean(row[key] for row in rows) for key in rows[0]})
    model.eval()
    if efficiency is not None:
        efficiency.close()
    return history


def _losses(
    model: nn.Module,
    x: Any,
    y: Any,
    teacher: Any,
    distill: float,
    temperature: float,
    efficiency: Any,
    weight: float,
    bfloat16: bool,
) -> tuple[dict[str, float], Tensor]:
    """What is recorded, and what is minimised."""
    distill = distill if teacher is not None else 0.0
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        scores = model(x)
        if distill:
            with torch.no_grad():
                taught = teacher(x.contiguous(memory_format=layout))
    loss = torch.zeros(())
    if distill < 1:
        loss = loss + (1 - distill) * F.cross_entropy(scores.float(), y)
    if distill:
        loss = loss + distill * redconvert.distillation_loss(scores, taught, temperature)
    row = {"task": loss.item()}
    if efficiency is not None:
        loss = loss + weight * efficiency(scores, taught if distill == 1 else y)
        row["cost"] = efficiency.costs.mean().item()
    return row, loss


def _groups(model: nn.Module, lr: float, gate_lr: float) -> list[dict[str, Any]]:
    """`redconvert.parameter_groups`, also for a network without gates."""
    if any(isinstance(m, redconvert.DynamicConv2d | redconvert.DynamicConv3d) for m in model.modules()):
        return redconvert.parameter_groups(model, lr, gate_lr)
    split = {True: [], False: []}
    for parameter in model.parameters():
        split[parameter.dim() > 1].append(parameter)
    return [{"params": split[big], "lr": lr, "weight_decay": 5e-4 * big} for big in split]
