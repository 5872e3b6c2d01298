"""`redconvert.freeze`: one policy baked into plain, smaller convolutions without gates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

from torch import nn

from ..convert.plan import matches
from ..convert.rewrite import copied, restore_layer
from ..errors import RedconvertError
from ..inputs import call_with, device_of, each_batch, evaluating, move_to, unwrapped
from ..layers import Decision, DynamicConv, Observation, dynamic_layers, observed
from ..layers.absorb import told
from .bake import Parts, bake
from .plain import FrozenConv

__all__ = ["freeze"]

M = TypeVar("M", bound=nn.Module)
Pair: TypeAlias = tuple[int, int]
Policy: TypeAlias = Pair | Mapping[str, Pair]


def freeze(
    dynamic: M,
    policy: Policy | None = None,
    *,
    batches: Any = None,
    only_constant: bool = False,
    inplace: bool = False,
) -> M:
    """Bake one policy into a plain network of the user's own class, without gates: a fixed, smaller network.

    A layer at its full candidate becomes the convolution that it was, with the same parameters. Any other becomes a
    `FrozenConv`: a smaller ``nn.Conv2d`` or ``nn.Conv3d`` (k_i channels, the frame stride in its stride), Phi_c, the
    channel order and Phi_t as static operations. The result agrees with ``redconvert.forced`` on the dynamic network,
    takes clips of any length, and can be compiled, traced, exported, trained and pickled like any network. Phi_t that
    only copies frames has no parameters left.

    Args:
        dynamic: what `redconvert.convert` returned.
        policy: the candidate indices ``(channel, temporal)`` of all layers (one that has fewer takes its cheapest), or
            a mapping from a layer's name, a glob or ``"re:..."`` to them, first match first; layers that nothing
            matches stay full.
        batches: instead of a policy: unlabelled batches, over which each layer's most frequent decision is baked (of
            equally frequent ones that which computes more). Layers that do not run become plain and full.
        only_constant: with ``batches``: bake only layers that decide the same for every sample, and leave the others,
            and those that do not run, dynamic.
        inplace: change ``dynamic`` itself instead of a copy; its layers stay the same objects.

    Raises:
        RedconvertError: no dynamic network, both or neither of ``policy`` and ``batches``, a name that matches no
            layer, an index that no layer has, or soft gates that mix candidates over ``batches`` (a mixture is no
            single candidate: give a policy). Nothing is changed then.
    """
    if not isinstance(dynamic, nn.Module):
        raise RedconvertError(f"freeze takes a network that redconvert.convert returned, not {type(dynamic).__name__}")
    if (policy is None) == (batches is None):
        raise RedconvertError("freeze takes either a policy or batches, over which the gates decide: give one of them")
    if only_constant and batches is None:
        raise RedconvertError("only_constant=True needs batches, over which decisions can be seen to change")
    dynamic = unwrapped(dynamic)  # type: ignore[assignment]
    for name, layer in dynamic_layers(dynamic).items():
        _check_stored(name, layer)
    chosen = _by_policy(dynamic, policy) if policy is not None else _by_gates(dynamic, batches, only_constant)
    target = dynamic if inplace else _copied(dynamic)
    layers = dynamic_layers(target)
    sources = {name: chosen[source][0] for name, source in told(layers).items() if source in chosen}
    baked = {layers[name]: bake(layers[name], *pair, sources.get(name, 0)) for name, pair in chosen.items()}
    for layer, parts in baked.items():  # nothing below can fail
        _swap(layer, parts)
    return target


def _check_stored(name: str, layer: DynamicConv) -> None:
    if layer._parameters.get("weight") is None:
        raise RedconvertError(
            f"the weight of layer '{name}' is computed by a hook or a parametrisation (pruning, weight_norm), not "
            f"stored: make it permanent first, as torch.nn.utils.prune.remove does"
        )
    if layer.weight.is_meta:
        raise RedconvertError(f"layer '{name}' is on the meta device and has no numbers to bake: load weights first")


# -- which candidate -----------------------------------------------------------------------------------


def _by_policy(dynamic: nn.Module, policy: Policy) -> dict[str, Pair]:
    layers = dynamic_layers(dynamic)
    rules = policy.items() if isinstance(policy, Mapping) else [("*", policy)]
    names: dict[nn.Module, list[str]] = {}
    for name, module in dynamic.named_modules(remove_duplicate=False):  # a shared layer has several
        names.setdefault(module, []).append(name)
    wanted: dict[str, Pair] = {}
    for pattern, value in rules:
        if not isinstance(pattern, str):
            raise RedconvertError(f"a policy maps layer names or globs to (channel, temporal), not {pattern!r}")
        pair = _checked(value)
        _check_pattern(pattern)
        hits = [name for name, layer in layers.items() if any(matches(pattern, n, layer) for n in names[layer])]
        if not hits:
            shown = ", ".join(list(layers)[:4])
            raise RedconvertError(
                f"policy: '{pattern}' matches none of the {len(layers)} dynamic layers ({shown}, ...): check the name, "
                f"a glob on the whole name or 're:...'"
            )
        _check_exists(pattern, pair, [layers[name] for name in hits])
        for name in hits:
            wanted.setdefault(name, pair)
    return {name: _nearest(layer, wanted.get(name, (0, 0))) for name, layer in layers.items()}


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern[3:] if pattern.startswith("re:") else "")
    except re.error as error:
        raise RedconvertError(f"policy: '{pattern}' is not a regular expression: {error}") from error


def _checked(value: Any) -> Pair:
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in pair):
        raise RedconvertError(
            f"policy: {value!r} is not a pair (channel, temporal) of candidate indices, which count from 0"
        )
    return pair


def _check_exists(pattern: str, pair: Pair, layers: list[DynamicConv]) -> None:
    counts = [(len(layer.candidates.channels), len(layer.candidates.strides)) for layer in layers]
    for axis, index, highest in zip(("channel", "temporal"), pair, map(max, zip(*counts, strict=True)), strict=True):
        if index > 0 and index >= highest:
            raise RedconvertError(
                f"policy: no layer that '{pattern}' matches has {axis} candidate {index}; the largest index is "
                f"{highest - 1}"
            )


def _nearest(layer: DynamicConv, pair: Pair) -> Pair:
    return layer.candidates.nearest("channel", pair[0]), layer.candidates.nearest("temporal", pair[1])


def _by_gates(dynamic: nn.Module, batches: Any, only_constant: bool) -> dict[str, Pair]:
    """Each layer's most frequent decision over the batches, or its only one."""
    layers = dynamic_layers(dynamic)
    counts: dict[DynamicConv, Counter[Decision]] = {layer: Counter() for layer in layers.values()}

    def listen(layer: DynamicConv, seen: Observation) -> None:
        counts[layer].update(decision._replace(source=0) for decision in seen.decisions)

    with evaluating(dynamic), observed(dynamic, listen):
        for batch in each_batch(batches):
            call_with(dynamic, move_to(batch, device_of(dynamic)))
    chosen: dict[str, Pair] = {}
    for name, layer in layers.items():
        decisions = counts[layer]
        mixed = any(decision.blend for decision in decisions)
        if only_constant and (mixed or len(decisions) != 1):
            continue
        if mixed:
            raise RedconvertError(
                f"layer '{name}': its soft gate mixes candidates for some of the batches, and a mixture is no single "
                f"candidate. Give a policy instead, or only_constant=True to leave such layers dynamic"
            )
        # Sorted from the most work on: max takes the first of equally frequent ones.
        most = max(sorted(decisions), key=decisions.__getitem__, default=Decision(0, 0))
        chosen[name] = (most.channel, most.temporal)
    return _whole_chains(layers, chosen)


def _whole_chains(layers: Mapping[str, DynamicConv], chosen: dict[str, Pair]) -> dict[str, Pair]:
    """Without those that are tied to a layer that stays dynamic: what one hands over, the other has to know."""
    ties = told(layers).items()
    while broken := {each for tie in ties if len(chosen.keys() & tie) == 1 for each in tie}:
        chosen = {name: candidate for name, candidate in chosen.items() if name not in broken}
    return chosen


def _copied(dynamic: M) -> M:
    """A deep copy, without those who observe the layers."""
    layers = dynamic_layers(dynamic).values()
    observers = {layer: vars(layer).pop("observers") for layer in layers if "observers" in vars(layer)}
    try:
        return copied(dynamic)
    finally:
        for layer, listeners in observers.items():
            layer.observers = listeners


def _swap(layer: DynamicConv, parts: Parts | None) -> None:
    """In place, so that hooks, aliases and references from anywhere stay."""
    restore_layer(layer)
    if parts is None:
        return
    layer.__class__ = FrozenConv  # type: ignore[assignment]
    layer._parameters.clear()
    layer._modules.clear()
    for name, part in parts._asdict().items():
        setattr(layer, name, part)
    for part in layer.children():
        part.train(layer.training)
