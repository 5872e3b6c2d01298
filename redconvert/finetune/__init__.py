"""Finetuning: the efficiency loss, the teacher, its features, the loop; each works alone in your own loop."""

from .captured import CapturedPasses
from .distill import distillation_loss, frozen_original
from .features import FeatureLoss
from .history import History
from .loop import finetune
from .loss import EfficiencyLoss
from .parameters import parameter_groups

__all__ = [
    "CapturedPasses",
    "EfficiencyLoss",
    "FeatureLoss",
    "History",
    "distillation_loss",
    "finetune",
    "frozen_original",
    "parameter_groups",
]
