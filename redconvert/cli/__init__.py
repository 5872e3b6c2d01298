"""redconvert-cli: what a network costs, what would become dynamic, calibration, and a demo on a real video."""

from . import calibrate, demo, export, look  # each registers its commands
from .app import app, main

__all__ = ["app", "calibrate", "demo", "export", "look", "main"]
