"""The swap: plain convolutions become dynamic in place, and back."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from ..config import ConvertConfig, LayerConfig
from ..errors import RedconvertError
from ..layers import DynamicConv, DynamicConv2d, DynamicConv3d, dynamic_layers
from ..layers.absorb import ALONE, Ties, link
from ..layers.base import ADDED_ATTRIBUTES, ADDED_MODULES
from .pairs import ties_of_follower
from .plan import make_plan

__all__ = ["convert", "convert_layer", "restore_layer", "revert"]

M = TypeVar("M", bound=nn.Module)


def convert(
    model: M,
    config: ConvertConfig | None = None,
    *,
    example_inputs: Any = None,
    measure: bool = False,
    inplace: bool = False,
) -> M:
    """Make the convolutions of a network dynamic; its outputs stay equal to the bit.

    The result is of the model's own class, with its methods, hooks, train flags and ``state_dict`` keys.
    Convolutions keep their parameters and identity: their class changes, and ``<conv>.gate.*`` and
    ``<conv>.cheap_*.*`` are added. All checks finish before the first change.

    Args:
        model: any network.
        config: what to convert and how.
        example_inputs: what the model takes (see `redconvert.plan`); values do not matter. With them gates
            fit the clip length, unused layers are left out, and the plan knows MACs.
        measure: time each layer on this device, and leave dense what would not gain (see `redconvert.plan`).
        inplace: change ``model`` itself instead of a copy.

    Raises:
        RedconvertError: nothing to convert, or what `redconvert.plan` refuses.
    """
    plan = make_plan(model, config, example_inputs=example_inputs, measure=measure)
    if not plan.converted:
        reasons = sorted({verdict.reason for verdict in plan.skipped})
        why = (
            f"all {len(plan.skipped)} convolutions are skipped: {'; '.join(reasons)}"
            if reasons
            else (
                "it has no Conv2d or Conv3d modules"
                + (f" (functional convolutions: {', '.join(plan.functional)})" if plan.functional else "")
            )
        )
        raise RedconvertError(f"nothing to convert in {plan.model}: {why}")
    target = model if inplace else copied(model)
    modules = dict(target.named_modules())
    handed = {verdict.name: verdict.channels for verdict in plan.converted if verdict.reader is not None}
    channels = {verdict.reader: handed[verdict.name] for verdict in plan.converted if verdict.reader is not None}
    ties = {
        verdict.name: Ties(hands_over=verdict.reader is not None, reads=channels.get(verdict.name))
        if verdict.follows is None
        else ties_of_follower(modules[verdict.name], handed[verdict.follows], aside=verdict.name not in channels)
        for verdict in plan.converted
    }
    done: list[DynamicConv] = []
    try:
        for verdict in plan.converted:
            assert verdict.config is not None
            done.append(
                convert_layer(
                    modules[verdict.name],
                    verdict.config,
                    name=verdict.name,
                    num_frames=verdict.num_frames,
                    gate_frames=verdict.facts.clip_frames,
                    feeds_norm=verdict.facts.feeds_norm,
                    ties=ties[verdict.name],
                )
            )
        for verdict in plan.converted:
            if verdict.reader is not None:
                names = [each.name for each in plan.converted if each.follows == verdict.name]
                followers = [modules[name] for name in names if name != verdict.reader]
                link(modules[verdict.name], modules[verdict.reader], followers)
    except BaseException:
        for layer in done:
            restore_layer(layer)
        raise
    return target


def convert_layer(
    conv: nn.Module,
    config: LayerConfig,
    *,
    name: str = "",
    num_frames: int | None = None,
    gate_frames: int | None = None,
    feeds_norm: bool = False,
    ties: Ties = ALONE,
) -> DynamicConv:
    """Turn one Conv2d or Conv3d dynamic in place; it stays the same object with the same parameters.

    One that shares channels with others, as its ``ties`` say, needs `redconvert.layers.absorb.link` after.
    """
    conv.__class__ = _dynamic_class(type(conv))
    assert isinstance(conv, DynamicConv)
    try:
        conv.make_dynamic(
            config,
            name=name,
            num_frames=num_frames,
            gate_frames=gate_frames,
            ties=ties,
        )
        if feeds_norm:
            conv.feeds_norm = True
    except BaseException:
        restore_layer(conv)
        raise
    return conv


def revert(model: M) -> M:
    """Undo conversion in place: the original modules, to the object, with the weights as they are now."""
    for layer in dynamic_layers(model).values():
        restore_layer(layer)
    return model


def copied(model: M) -> M:
    """A deep copy, or the error that says to convert in place."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RedconvertError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): pass inplace=True"
        ) from error


def restore_layer(layer: DynamicConv) -> None:
    """Make one layer the convolution that it was, in place."""
    dense = layer.dense_class
    for name in ADDED_MODULES:
        layer._modules.pop(name, None)
    for name in ADDED_ATTRIBUTES:
        vars(layer).pop(name, None)
    layer.__class__ = dense


# -- classes -------------------------------------------------------------------------------------------


_SUBCLASSES: dict[type, type[DynamicConv]] = {}


def _dynamic_class(dense: Any) -> type[DynamicConv]:
    """The dynamic class of a convolution class; a subclass keeps its own methods and ``isinstance``."""
    if dense is nn.Conv3d:
        return DynamicConv3d
    if dense is nn.Conv2d:
        return DynamicConv2d
    if not issubclass(dense, nn.Conv2d | nn.Conv3d):
        raise RedconvertError(f"{dense.__name__} is not a Conv2d or Conv3d")
    if dense not in _SUBCLASSES:
        base = DynamicConv3d if issubclass(dense, nn.Conv3d) else DynamicConv2d
        members = {"__reduce__": _reduce, "dense_class": dense}
        _SUBCLASSES[dense] = type(f"Dynamic{dense.__name__}", (base, dense), members)
    return _SUBCLASSES[dense]


def _reduce(self: Any) -> tuple:
    """Pickle and copy by way of the dense class: the dynamic one has no name to import it by."""
    return _empty, (self.dense_class,), self.__getstate__()


def _empty(dense: type) -> nn.Module:
    dynamic = _dynamic_class(dense)
    return dynamic.__new__(dynamic)
