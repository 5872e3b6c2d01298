"""redconvert-cli: what a network costs, what would become dynamic, calibration, time, export, and a demo on a video."""

from . import bench, calibrate, demo, export, look  # each registers its commands
from .app import app, main

__all__ = ["app", "bench", "calibrate", "demo", "export", "look", "main"]
