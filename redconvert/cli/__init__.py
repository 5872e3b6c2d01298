"""redconvert-cli: what a network costs, what would become dynamic, calibration, time, and a demo on a real video."""

from . import bench, calibrate, demo, look  # each registers its commands
from .app import app, main

__all__ = ["app", "bench", "calibrate", "demo", "look", "main"]
