"""How a convolution class computes: the registry through which classes with their own forward become dynamic.

A recipe says which weight a class convolves with and how it pads; the rest is a plain convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RedconvertError
from .geometry import pad_input

__all__ = ["Recipe", "recipe_of", "register"]

R = TypeVar("R", bound="type[Recipe]")


class Recipe:
    """What ``conv.forward(x)`` does before it calls ``F.conv2d`` or ``F.conv3d``. Subclass and `register`."""

    @staticmethod
    def weight(conv: Any) -> Tensor:
        """The weight that is convolved with, ``(C_out, C_in / groups, ...)``, from the stored one."""
        return conv.weight

    @staticmethod
    def pad(conv: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input, padded as far as the convolution cannot pad it itself, and the padding that is left."""
        return pad_input(conv, x)


_RECIPES: dict[str, type[Recipe]] = {"torch.nn.modules.conv.Conv2d": Recipe, "torch.nn.modules.conv.Conv3d": Recipe}


def register(conv_type: type | str) -> Callable[[R], R]:
    """Teach redconvert a Conv2d or Conv3d subclass that has a ``forward`` of its own.

    Args:
        conv_type: the class, or its full name where importing it would cost too much.

    The decorated `Recipe` must reproduce what the class computes; conversion runs the class's own forward
    for the full candidate, so only reduced candidates rely on the recipe.
    """
    if isinstance(conv_type, type) and not issubclass(conv_type, nn.Conv2d | nn.Conv3d):
        raise RedconvertError(f"register takes a subclass of Conv2d or Conv3d, not {conv_type.__name__}")

    def decorate(recipe: R) -> R:
        if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
            raise RedconvertError(f"register decorates a subclass of redconvert.Recipe, not {recipe!r}")
        _RECIPES[conv_type if isinstance(conv_type, str) else _full_name(conv_type)] = recipe
        return recipe

    return decorate


def recipe_of(conv_class: type) -> type[Recipe] | None:
    """The recipe for the forward that this class runs, inherited or its own; None where it is not known."""
    runs: Any = conv_class.forward  # type: ignore[attr-defined]
    # The farthest base that has it. Not through vars(): dynamo cannot read that in every version of PyTorch.
    owner = [base for base in conv_class.__mro__[:-1] if getattr(base, "forward", None) is runs][-1]
    return _RECIPES.get(_full_name(owner))


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# -- what libraries bring --------------------------------------------------------------------------------


class _Standardized(Recipe):
    """Weight standardisation: each filter to mean 0 and variance 1, then to the layer's gain."""

    @staticmethod
    def weight(conv: Any) -> Tensor:
        gain = (conv.gain * conv.scale).flatten() if hasattr(conv, "gain") else None
        rows = conv.weight.reshape(1, conv.out_channels, -1)
        rows = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps)
        return rows.reshape_as(conv.weight)


def _same_padded(conv: Any, x: Tensor) -> Tensor:
    """TensorFlow's "SAME": the output has ceil(size / stride) positions, an odd amount goes to the end."""
    amounts: list[int] = []
    for axis in (1, 0):  # F.pad counts from the last axis
        size, stride = x.shape[2 + axis], conv.stride[axis]
        reach = (math.ceil(size / stride) - 1) * stride + conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        total = max(reach - size, 0)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts)


class _Same(Recipe):
    @staticmethod
    def pad(conv: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return _same_padded(conv, x), (0, 0)


class _StandardizedSame(_Standardized):
    @staticmethod
    def pad(conv: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return (_same_padded(conv, x) if conv.same_pad else x), conv.padding


class _StandardizedBit(_Standardized):
    """transformers' BiT keeps its "SAME" padding in a module of its own, or needs none."""

    @staticmethod
    def pad(conv: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return (x if conv.pad is None else conv.pad(x)), conv.padding


class _StaticSame(Recipe):
    """segmentation_models_pytorch's EfficientNet: "SAME" padding worked out once, for one image size."""

    @staticmethod
    def pad(conv: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return conv.static_padding(x), conv.padding


for _name in ("StdConv2d", "ScaledStdConv2d"):
    register(f"timm.layers.std_conv.{_name}")(_Standardized)
    register(f"timm.layers.std_conv.{_name}Same")(_StandardizedSame)
for _name in ("Conv2dSame", "Conv2dSameExport"):
    register(f"timm.layers.conv2d_same.{_name}")(_Same)
register("segmentation_models_pytorch.encoders._efficientnet.Conv2dDynamicSamePadding")(_Same)
register("segmentation_models_pytorch.encoders._efficientnet.Conv2dStaticSamePadding")(_StaticSame)
register("transformers.models.bit.modeling_bit.WeightStandardizedConv2d")(_StandardizedBit)
