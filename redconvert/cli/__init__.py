"""redconvert-cli: what a network costs, what would become dynamic, calibration, budgets, time, export, a demo."""

from . import bench, calibrate, demo, export, finetune, look, reduce  # each registers its commands
from .app import app, main

__all__ = ["app", "bench", "calibrate", "demo", "export", "finetune", "look", "main", "reduce"]
