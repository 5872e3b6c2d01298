"""redconvert: turn a pretrained video or image network into one that decides, per input, how much to compute."""

from . import zoo
from .budget import Budget, BudgetCurve, budget_curve, clear_budget, keep_budget, set_budget
from .calibrate import Calibration, calibrate
from .cascade import Cascade, cascade
from .checkpoint import from_pretrained, load_weights, save_pretrained
from .config import ConvertConfig, LayerConfig
from .convert import Plan, convert, revert
from .convert import make_plan as plan
from .cost import LayerTimes, Report, report
from .deploy import Bench, Deployed, bench, deploy, export_onnx, freeze, layer_times
from .errors import RedconvertError
from .finetune import (
    CapturedPasses,
    EfficiencyLoss,
    FeatureLoss,
    History,
    distillation_loss,
    finetune,
    frozen_original,
    parameter_groups,
)
from .layers import (
    DynamicConv2d,
    DynamicConv3d,
    Recipe,
    capturable,
    disabled,
    forced,
    observed,
    register,
    resting_gates,
)
from .presets import presets

__version__ = "0.1.0"

__all__ = [
    "Bench",
    "Budget",
    "BudgetCurve",
    "Calibration",
    "CapturedPasses",
    "Cascade",
    "ConvertConfig",
    "Deployed",
    "DynamicConv2d",
    "DynamicConv3d",
    "EfficiencyLoss",
    "FeatureLoss",
    "History",
    "LayerConfig",
    "LayerTimes",
    "Plan",
    "Recipe",
    "RedconvertError",
    "Report",
    "__version__",
    "bench",
    "budget_curve",
    "calibrate",
    "capturable",
    "cascade",
    "clear_budget",
    "convert",
    "deploy",
    "disabled",
    "distillation_loss",
    "export_onnx",
    "finetune",
    "forced",
    "freeze",
    "from_pretrained",
    "frozen_original",
    "keep_budget",
    "layer_times",
    "load_weights",
    "observed",
    "parameter_groups",
    "plan",
    "presets",
    "register",
    "report",
    "resting_gates",
    "revert",
    "save_pretrained",
    "set_budget",
    "zoo",
]
