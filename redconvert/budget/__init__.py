"""Budgets without retraining: which layer, or which input, should save."""

from .run import Budget, calibrate_gates, clear_budget, keep_budget, set_budget
from .sensitivity import harms

__all__ = ["Budget", "calibrate_gates", "clear_budget", "harms", "keep_budget", "set_budget"]
