"""Finetuning: the efficiency loss, the teacher, the loop; every part works alone in a loop of your own."""

from .captured import CapturedPasses
from .distill import distillation_loss, frozen_original
from .history import History
from .loop import finetune
from .loss import EfficiencyLoss
from .parameters import parameter_groups

__all__ = [
    "CapturedPasses",
    "EfficiencyLoss",
    "History",
    "distillation_loss",
    "finetune",
    "frozen_original",
    "parameter_groups",
]
