"""Gates, cheap operations and the dynamic convolutions made of them."""

from .candidates import Candidates
from .cheap import ChannelRebuild, FrameRebuild
from .conv import DynamicConv, DynamicConv2d, DynamicConv3d, Observation
from .gate import Gate, GateWeights
from .modes import disabled, dynamic_layers, forced, observed
from .recipes import Recipe, recipe_of, register
from .routing import Decision

__all__ = [
    "Candidates",
    "ChannelRebuild",
    "Decision",
    "DynamicConv",
    "DynamicConv2d",
    "DynamicConv3d",
    "FrameRebuild",
    "Gate",
    "GateWeights",
    "Observation",
    "Recipe",
    "disabled",
    "dynamic_layers",
    "forced",
    "observed",
    "recipe_of",
    "register",
]
