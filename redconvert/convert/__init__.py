"""From a network to a dynamic one: read it, judge each convolution, swap."""

from .judge import CandidateTimes, Verdict
from .plan import Plan, make_plan
from .rewrite import convert, convert_layer, revert
from .trace import ConvFacts, Trace, trace

__all__ = [
    "CandidateTimes",
    "ConvFacts",
    "Plan",
    "Trace",
    "Verdict",
    "convert",
    "convert_layer",
    "make_plan",
    "revert",
    "trace",
]
