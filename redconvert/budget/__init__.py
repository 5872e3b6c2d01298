"""Budgets without retraining: which layer, or which input, should save."""

from .curve import BudgetCurve, CurvePoint, budget_curve
from .run import Budget, calibrate_gates, clear_budget, keep_budget, set_budget
from .sensitivity import harms

__all__ = [
    "Budget",
    "BudgetCurve",
    "CurvePoint",
    "budget_curve",
    "calibrate_gates",
    "clear_budget",
    "harms",
    "keep_budget",
    "set_budget",
]
