"""redconvert: turn a pretrained video or image network into one that decides, per input, how much to compute."""

from .calibrate import Calibration, calibrate
from .checkpoint import from_pretrained, load_weights, save_pretrained
from .config import ConvertConfig, LayerConfig
from .convert import Plan, convert, revert
from .convert import make_plan as plan
from .cost import Report, report
from .errors import RedconvertError
from .layers import DynamicConv2d, DynamicConv3d, Recipe, disabled, forced, observed, register

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "ConvertConfig",
    "DynamicConv2d",
    "DynamicConv3d",
    "LayerConfig",
    "Plan",
    "Recipe",
    "RedconvertError",
    "Report",
    "__version__",
    "calibrate",
    "convert",
    "disabled",
    "forced",
    "from_pretrained",
    "load_weights",
    "observed",
    "plan",
    "register",
    "report",
    "revert",
    "save_pretrained",
]
