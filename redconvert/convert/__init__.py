"""From a network to a dynamic one: read it, judge each convolution, swap."""

from .plan import Plan, Verdict, make_plan
from .rewrite import convert, convert_layer, revert
from .trace import ConvFacts, Trace, trace

__all__ = ["ConvFacts", "Plan", "Trace", "Verdict", "convert", "convert_layer", "make_plan", "revert", "trace"]
