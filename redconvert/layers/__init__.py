"""Gates, cheap operations and the dynamic convolutions made of them."""

from .absorb import Absorbed, Handover
from .base import DynamicConv, Observation
from .candidates import Candidates
from .conv import DynamicConv2d, DynamicConv3d
from .frames import FrameRebuild
from .gate import Gate, GateWeights
from .mixtures import InputMixtures
from .modes import capturable, disabled, dynamic_layers, forced, observed, resting_gates
from .rebuild import ChannelRebuild
from .recipes import Recipe, recipe_of, register
from .routing import Decision

__all__ = [
    "Absorbed",
    "Candidates",
    "ChannelRebuild",
    "Decision",
    "DynamicConv",
    "DynamicConv2d",
    "DynamicConv3d",
    "FrameRebuild",
    "Gate",
    "GateWeights",
    "Handover",
    "InputMixtures",
    "Observation",
    "Recipe",
    "capturable",
    "disabled",
    "dynamic_layers",
    "forced",
    "observed",
    "recipe_of",
    "register",
    "resting_gates",
]
