"""Networks for inference: one policy baked in, and files for other runtimes."""

from .export import export_onnx
from .frozen import freeze

__all__ = ["export_onnx", "freeze"]
