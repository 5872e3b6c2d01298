"""From a few unlabelled batches to a good start: which channels to compute, and how to rebuild the rest."""

from .plot import plot_explained
from .result import CalibratedLayer, Calibration
from .run import calibrate

__all__ = ["CalibratedLayer", "Calibration", "calibrate", "plot_explained"]
