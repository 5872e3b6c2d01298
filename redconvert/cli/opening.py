"""From MODEL and --input to a network, its inputs and a plan."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import ConvertConfig
from ..convert import Plan, make_plan
from ..errors import RedconvertError
from .options import read_shape
from .progress import spinner

__all__ = ["inputs_and_plan", "open_network"]


def open_network(model: str, trust: bool) -> nn.Module:
    """The network that MODEL names; an error where that is weights alone."""
    from ..sources import open_source

    network = open_source(model, trust=trust).model
    if network is None:
        raise RedconvertError(f"'{model}' holds weights without an architecture: give the network, or use inspect")
    return network


def inputs_and_plan(
    network: Any, settings: ConvertConfig, inputs: list[str] | None, quiet: bool, measure: bool = False
) -> tuple[Any, Plan]:
    """Example inputs, given or guessed, and the plan they give."""
    from ..sources import guess_inputs, tensors_of

    shapes = tuple(read_shape(text) for text in inputs or ())
    options = {"measure": measure, "progress": measure and not quiet}
    with spinner("Reading the network", quiet or measure):  # one thing moves at a time
        if not shapes:
            return guess_inputs(network, settings, **options)
        example = tensors_of(shapes[0] if len(shapes) == 1 else shapes)
        return example, make_plan(network, settings, example_inputs=example, **options)
