"""Networks for inference: fast here, with one policy baked in, or as files for other runtimes."""

from .bench import Bench, bench
from .engine import Deployed, deploy
from .export import export_onnx
from .frozen import freeze
from .times import layer_times

__all__ = ["Bench", "Deployed", "bench", "deploy", "export_onnx", "freeze", "layer_times"]
