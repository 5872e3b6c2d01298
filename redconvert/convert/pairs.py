"""Convolutions that share channels: one hands over what it computed, one reads it, and others follow on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..layers import DynamicConv
from ..layers.absorb import Ties
from .judge import Verdict, accepted, probe
from .neighbours import is_depthwise

__all__ = ["pair", "ties_of_follower"]

# A reader, and who follows, with fewer of their source's MACs save next to nothing, and behind activation and pool
# channels tell less of each other than in front: I3D kept fewer answers with its 7x7x7 stem absorbed by the 1x1x1
# behind the pool.
WORTH_ABSORBING = 0.25


def pair(
    verdicts: tuple[Verdict, ...], modules: Mapping[str, Any], alone: Mapping[str, Verdict] | None = None
) -> tuple[Verdict, ...]:
    """The verdicts, those that ask to be absorbed and can be with the name of their reader.

    ``alone``: what was found of each before any were paired.
    """
    found = {verdict.name: _unpaired(verdict, alone or {}) for verdict in verdicts}
    readers = _readers(found, modules)
    sources = {reader: name for name, reader in readers.items()}
    between = _between(readers, found)
    for name in readers:
        found[name] = _handing_over(found[name], modules[name])
    followed = between | {reader: name for reader, name in sources.items() if not found[reader].converted}
    for name, source in followed.items():
        found[name] = _following(found[name], found[source], modules[name], aside=name in between)
    before = {each for verdict in verdicts if verdict.reader for each in (verdict.name, verdict.reader)}
    for name in {*readers, *sources, *before} - {*followed}:
        verdict = found[name]
        if verdict.config is None:  # measured, and left dense since
            continue
        reads = found[sources[name]].channels if name in sources else None
        ties = Ties(hands_over=name in readers, reads=reads)
        macs = probe(modules[name], verdict.config, verdict.num_frames, verdict.facts, ties)
        lowest = None if verdict.dense_macs is None else macs.lowest
        found[name] = replace(verdict, reader=readers.get(name), lowest_macs=lowest)
    return tuple(found[verdict.name] for verdict in verdicts)


def _readers(found: Mapping[str, Verdict], modules: Mapping[str, Any]) -> dict[str, str]:
    """By name of a convolution that can hand over, that of its reader; none of them stands between two others."""
    readers = {name: reader for name, verdict in found.items() if (reader := _reader(verdict, found, modules))}
    between = _between(readers, found)
    return {name: reader for name, reader in readers.items() if name not in between and reader not in between}


def _between(readers: Mapping[str, str], found: Mapping[str, Verdict]) -> dict[str, str]:
    """By name of a convolution that follows another on the way to its reader, that of the other."""
    return {each: name for name in readers for each in found[name].facts.followers}


def _handing_over(verdict: Verdict, module: nn.Conv2d | nn.Conv3d) -> Verdict:
    """The verdict on a convolution that hands over, also where it would not pay to rebuild behind it."""
    config = verdict.source
    if verdict.converted or config is None:
        return verdict
    planned = DynamicConv.plan_candidates(module, config, verdict.num_frames)
    return replace(
        verdict, converted=True, reason="", config=config, channels=planned.channels, strides=planned.strides
    )


def _unpaired(verdict: Verdict, alone: Mapping[str, Verdict]) -> Verdict:
    """What was found of a convolution by itself, and what measuring changed since."""
    single = alone.get(verdict.name, verdict)
    if verdict.follows is not None:
        verdict = replace(single, times=verdict.times)
    elif verdict.reader is not None and not single.converted and len(verdict.channels) > 1:
        verdict = replace(single, times=verdict.times, source=verdict.config)
    return replace(verdict, reader=None, follows=None)


def _reader(verdict: Verdict, others: Mapping[str, Verdict], modules: Mapping[str, Any]) -> str | None:
    """The convolution that can do without the channels that this one does not compute."""
    name, own = verdict.facts.reader, verdict.config if verdict.converted else verdict.source
    if name is None or own is None or not own.absorb or not own.channel:
        return None
    if len(DynamicConv.plan_candidates(modules[verdict.name], own, verdict.num_frames).channels) == 1:
        return None
    reader = others.get(name)
    config = None if reader is None else reader.config if reader.converted else reader.follower
    if reader is None or config is None or config.gate != "hard":
        return None
    ours, theirs = modules[verdict.name], modules[reader.name]
    alike = isinstance(ours, nn.Conv3d) == isinstance(theirs, nn.Conv3d)
    alike = alike and (not reader.converted or verdict.num_frames == reader.num_frames)
    followers = [others.get(each) for each in verdict.facts.followers]
    if any(each is None or each.follower is None for each in followers):
        return None
    chain = [verdict, reader, *(each for each in followers if each is not None)]
    once = all(each.facts.calls == 1 and not each.aliases for each in chain)
    small = sum(each.dense_macs or 0 for each in chain[1:]) < WORTH_ABSORBING * (verdict.dense_macs or 0)
    return name if alike and once and not small and ours.groups == theirs.groups == 1 else None


def _following(verdict: Verdict, source: Verdict, module: nn.Conv2d | nn.Conv3d, aside: bool) -> Verdict:
    """The verdict on a convolution that carries the channels of ``source``, or reads them, and has no say in it."""
    config = verdict.follower
    assert config is not None
    candidates = DynamicConv.plan_candidates(module, config, source.num_frames).following(is_depthwise(module))
    ties = ties_of_follower(module, source.channels, aside)
    macs = probe(module, config, source.num_frames, verdict.facts, ties)
    verdict = replace(verdict, reason="", num_frames=source.num_frames, follows=source.name)
    return accepted(verdict, config, candidates, macs)


def ties_of_follower(module: Any, channels: Sequence[int], aside: bool = True) -> Ties:
    """Of a convolution that follows another, whose candidates compute so many channels.

    ``aside``: another one reads them, too, and absorbs.
    """
    if is_depthwise(module):
        return Ties(carries=channels)
    return Ties(reads=channels, aside=aside, decides=False)
