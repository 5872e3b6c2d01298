"""The original network as a teacher: finetuning without labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..convert import revert
from ..errors import RedconvertError
from ..inputs import call_with, measuring, tensors_in

__all__ = ["TEMPERATURE", "distillation_loss", "frozen_original", "teach"]

# Of what it was trained on a network is so sure that at 1 its answers say little more than the labels do.
TEMPERATURE = 16.0


def frozen_original(dynamic: nn.Module) -> nn.Module:
    """A dense copy of a converted network as it is now, in ``eval()`` and without gradients: the teacher.

    It does not change while ``dynamic`` trains; `redconvert.disabled` gives the network as it has become.
    """
    try:
        teacher = revert(copy.deepcopy(dynamic))
    except Exception as error:
        raise RedconvertError(
            f"{type(dynamic).__name__} cannot be copied as its own teacher ({type(error).__name__}: {error}): pass "
            f"the original network as teacher=, or teacher=None"
        ) from error
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def teach(teacher: Callable[..., Any], inputs: Any) -> Any:
    """What ``teacher``, a network (in ``eval()``, whatever its flags) or a function, answers to ``inputs``."""
    with measuring(teacher) if isinstance(teacher, nn.Module) else nullcontext():
        return call_with(teacher, inputs)  # type: ignore[arg-type]


def distillation_loss(outputs: Any, wanted: Any, temperature: float = TEMPERATURE) -> Tensor:
    """How far ``outputs`` are from the teacher's, a scalar.

    Class scores ``(N, classes, ...)``: ``t^2 KL(softmax(wanted / t) || softmax(outputs / t))``, averaged over all
    but the class axis; the higher the temperature t, the nearer to a regression of the scores. Several outputs (tuples,
    dicts): the sum over their floating tensors.

    Raises:
        RedconvertError: outputs of other shapes than the teacher's.
    """
    pairs = list(zip(_floating(outputs), _floating(wanted), strict=False))
    if not pairs or any(a.shape != b.shape for a, b in pairs) or len(_floating(outputs)) != len(_floating(wanted)):
        shapes = ([tuple(t.shape) for t in _floating(each)] for each in (outputs, wanted))
        raise RedconvertError("the network gives outputs {} and its teacher {}: they must be alike".format(*shapes))
    return torch.stack([_divergence(a.float(), b.float(), temperature) for a, b in pairs]).sum()


def _divergence(scores: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    if scores.dim() < 2 or scores.shape[1] == 1:  # no classes: regression
        return F.mse_loss(scores, wanted)
    # At a high temperature the terms all but cancel; Metal has no float64.
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    student, teacher = (F.log_softmax(each.to(wide) / temperature, dim=1) for each in (scores, wanted))
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return (temperature**2 * each.mean()).float()


def _floating(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point() and tensor.dim()]
