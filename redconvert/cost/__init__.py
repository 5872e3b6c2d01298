"""What a network costs: MACs, milliseconds, and the report that sets them side by side."""

from ..layers.macs import LayerMacs, executed_macs, layer_macs
from .clock import LayerClock, Timing, interleaved, share
from .count import DenseMacs, dense_macs
from .report import LayerReport, Report, report
from .times import LayerTimes

__all__ = [
    "DenseMacs",
    "LayerClock",
    "LayerMacs",
    "LayerReport",
    "LayerTimes",
    "Report",
    "Timing",
    "dense_macs",
    "executed_macs",
    "interleaved",
    "layer_macs",
    "report",
    "share",
]
