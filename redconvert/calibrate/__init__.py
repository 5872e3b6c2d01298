"""From a few unlabelled batches to a good start: which channels to compute, and how to rebuild the rest."""

from .run import CalibratedLayer, Calibration, calibrate

__all__ = ["CalibratedLayer", "Calibration", "calibrate"]
