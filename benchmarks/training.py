"""The training loop of the benchmarks: the same for every row, and one that a user could write."""

from __future__ import annotations

import copy
import statistics
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import redconvert
from redconvert.cost.measure import static_macs
from redconvert.finetune import FeatureLoss
from redconvert.finetune.parameters import build_optimizer, learning_rate_factor
from redconvert.finetune.run import training_mode
from redconvert.inputs import device_of, move_to


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
    features: float = 0.0,
    fades: bool = False,
    flips: bool = False,
    keep: Path | None = None,
) -> list[dict[str, float]]:
    """SGD with Nesterov momentum, warm-up and cosine; ``(1 - d) CE + d t^2 KL(teacher) + weight * L_e + v * L_f``.

    ``bfloat16`` is for 2D networks: on a CPU with avx512_bf16, torch 2.15 gives I3D's convolutions infinite gradients.
    ``gate_every``: gates learn in every so many-th step, or never (0); in between a step costs what they leave to
    compute. Dropout rests where there is a teacher. ``features``: v, in steps in which gates rest; with ``fades`` it
    goes down with the learning rate. ``flips``: what the teacher says is the mean of its answers for an image and its
    mirror image. Batches are moved to where the network is; on a GPU all are of the same size, and a CUDA graph runs
    them where gates learn in every step. ``keep``: a file that holds where training is after every epoch; a run that
    finds it goes on from there, to the same numbers, and removes it at its end.
    Returns means per epoch; leaves ``model`` in ``eval()``.
    """
    efficiency, missed, device = None, None, device_of(model)
    mirrored = copy.deepcopy(teacher) if flips else None  # whose features nobody listens to
    if weight and gate_every:
        static = static_macs(model, next(iter(loader))[0][:1].to(device))
        efficiency = redconvert.EfficiencyLoss(model, target=target, static_macs=static)
    if features:
        assert teacher is not None
        missed = FeatureLoss(model, teacher)
    optimizer = build_optimizer("sgd", groups_of(model, lr, gate_lr))
    rates, steps, step = [group["lr"] for group in optimizer.param_groups], epochs * len(loader), 0
    captures, graph, held, found = device.type == "cuda" and gate_every == 1, None, [], torch.zeros(2, device=device)
    loss_of = partial(_losses, model, teacher, mirrored, distill, temperature, efficiency, weight, bfloat16, missed)
    history: list[dict[str, float]] = []
    if keep and keep.exists():
        history, step = _found_again(keep, model, optimizer)
    for _ in range(len(history), epochs):
        training_mode(model, freeze_norms, dropout=teacher is None)
        rows = []
        for batch in loader:
            x, y = move_to(batch, device)
            factor = learning_rate_factor(step, steps, warmup=0.05)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            weight_now = features * factor if fades else features
            if captures:
                held = held or [x.clone(), y.clone()]
                held[0].copy_(x)
                held[1].copy_(y)
                graph = graph or redconvert.CapturedPasses(partial(loss_of, weight_now, *held, found), model, optimizer)
                graph()
            else:
                optimizer.zero_grad(set_to_none=True)
                rests = is_dynamic(model) and (not gate_every or (efficiency is not None and step % gate_every > 0))
                with redconvert.resting_gates(model) if rests else nullcontext():
                    loss_of(weight_now, x, y, found)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            rows.append(dict(zip(("task", "cost")[: 1 + (efficiency is not None)], found.tolist(), strict=False)))
            step += 1
        history.append({key: statistics.mean(row[key] for row in rows) for key in rows[0]})
        if keep:
            _write_down(keep, model, optimizer, history, step)
    if keep:
        keep.unlink(missing_ok=True)
    model.eval()
    optimizer.zero_grad(set_to_none=True)
    for each in (efficiency, missed):
        if each is not None:
            each.close()
    return history


def _write_down(path: Path, model: nn.Module, optimizer: Any, history: list[dict[str, float]], step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history, "step": step}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state | {"random": torch.get_rng_state()}, half := path.with_suffix(".half"))
    half.replace(path)  # at once: a kill leaves the old one or the new one


def _found_again(path: Path, model: nn.Module, optimizer: Any) -> tuple[list[dict[str, float]], int]:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])  # the order of the images, and how each is cropped
    return state["history"], state["step"]


def _losses(
    model: nn.Module,
    teacher: Any,
    mirrored: Any,
    distill: float,
    temperature: float,
    efficiency: Any,
    weight: float,
    bfloat16: bool,
    missed: FeatureLoss | None,
    features: float,
    x: Any,
    y: Any,
    found: Tensor,
) -> None:
    """Forward and backward."""
    distill, taught, extra = distill if teacher is not None else 0.0, None, None
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        scores = model(x)
        if distill or missed:
            with torch.no_grad():
                taught = teacher(_fast_layout(x))
                if mirrored is not None:
                    taught = (taught + mirrored(_fast_layout(x.flip(-1)))) / 2
    if missed is not None and missed.gates_rest:
        extra = features * missed()
    backward(scores, y, taught, distill, temperature, efficiency, weight, found, extra)


def backward(
    scores: Tensor,
    y: Any,
    taught: Any,
    distill: float,
    temperature: float,
    efficiency: Any,
    weight: float,
    found: Tensor,
    extra: Tensor | None = None,
) -> None:
    """The loss, ``extra`` added, backward; what is recorded, the task's loss and the mean cost, goes into ``found``."""
    loss = torch.zeros((), device=scores.device)
    if distill < 1:
        loss = loss + (1 - distill) * F.cross_entropy(scores.float(), y)
    if distill:
        loss = loss + distill * redconvert.distillation_loss(scores, taught, temperature)
    found[0] = loss.detach()
    if efficiency is not None:
        loss = loss + weight * efficiency(scores, taught if distill == 1 else y)
        found[1] = efficiency.costs.mean()
    if extra is not None:
        loss = loss + extra
    loss.backward()


def is_dynamic(model: nn.Module) -> bool:
    return any(isinstance(m, redconvert.DynamicConv2d | redconvert.DynamicConv3d) for m in model.modules())


def _fast_layout(x: Tensor) -> Tensor:
    """Channels last on a CPU, whose pools are ten times as fast then."""
    if x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def groups_of(model: nn.Module, lr: float, gate_lr: float) -> list[dict[str, Any]]:
    """`redconvert.parameter_groups`, also for a network without gates."""
    if is_dynamic(model):
        return redconvert.parameter_groups(model, lr, gate_lr)
    split = {True: [], False: []}
    for parameter in model.parameters():
        split[parameter.dim() > 1].append(parameter)
    return [{"params": split[big], "lr": lr, "weight_decay": 5e-4 * big} for big in split]
