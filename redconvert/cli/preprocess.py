"""How pixels reach a network: the mean and the standard deviation that its library trains with."""

from __future__ import annotations

import math

import typer
from torch import nn

__all__ = ["default_normalisation", "three_numbers"]

Colours = tuple[float, float, float]

IMAGENET: tuple[Colours, Colours] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINETICS: tuple[Colours, Colours] = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


def default_normalisation(name: str, network: nn.Module, video: bool) -> tuple[Colours, Colours]:
    """Mean and standard deviation for values in [0, 1], three numbers each, as the model's library has them.

    timm, torchvision and the zoo know them for each model. Where nobody does: ImageNet for images, Kinetics for video.
    """
    library, _, rest = name.partition(":")
    config = getattr(network, "pretrained_cfg", None)  # timm
    if library == "timm" and isinstance(config, dict) and "mean" in config and "std" in config:
        return tuple(config["mean"]), tuple(config["std"])
    if library == "torchvision":
        return _torchvision(rest)
    if library == "zoo":
        return getattr(network, "normalisation", KINETICS if video else IMAGENET)
    return KINETICS if library == "pytorchvideo" or (video and library != "timm") else IMAGENET


def _torchvision(name: str) -> tuple[Colours, Colours]:
    from torchvision.models import get_model_weights

    weights = list(get_model_weights(name))
    if not weights:
        return IMAGENET
    transforms = weights[-1].transforms()  # describes them, downloads nothing
    if not hasattr(transforms, "mean") or not hasattr(transforms, "std"):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # detection networks normalise by themselves
    return tuple(transforms.mean), tuple(transforms.std)


def three_numbers(text: str, option: str) -> Colours:
    """``"0.485,0.456,0.406"`` -> its numbers; one number stands for all three colours."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    positive = option != "--std" or all(value > 0 for value in values)
    if len(values) != 3 or not all(map(math.isfinite, values)) or not positive:
        wanted = "three numbers above 0" if option == "--std" else "three numbers"
        raise typer.BadParameter(f"'{text}' is not {wanted} such as 0.5,0.5,0.5", param_hint=option)
    return values[0], values[1], values[2]
