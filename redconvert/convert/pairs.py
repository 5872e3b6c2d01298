"""Convolutions that share channels: one hands over what it computed, one reads it, and others follow on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..layers import DynamicConv
from .judge import Verdict, accepted, probe
from .neighbours import is_depthwise

__all__ = ["follower_options", "pair"]

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
    readers = {name: reader for name, verdict in found.items() if (reader := _reader(verdict, found, modules))}
    between = {each: name for name in readers for each in found[name].facts.followers}
    readers = {name: reader for name, reader in readers.items() if name not in between and reader not in between}
    between = {each: name for name in readers for each in found[name].facts.followers}
    sources = {reader: name for name, reader in readers.items()}
    for name in readers:
        if (config := found[name].source) is not None and not found[name].converted:
            candidates = DynamicConv.plan_candidates(modules[name], config, found[name].num_frames)
            macs = probe(modules[name], config, found[name].num_frames, found[name].facts, hands_over=True)
            found[name] = accepted(replace(found[name], reason=""), config, candidates, macs)
    followed = between | {reader: name for reader, name in sources.items() if not found[reader].converted}
    for name, source_name in followed.items():
        found[name] = _following(found[name], found[source_name], modules[name], aside=name in between)
    before = {each for verdict in verdicts if verdict.reader for each in (verdict.name, verdict.reader)}
    for name in {*readers, *sources, *before} - {*followed}:
        verdict, source = found[name], found.get(sources.get(name, ""))
        if verdict.config is None:  # measured, and left dense since
            continue
        reads = None if source is None else source.channels
        macs = probe(modules[name], verdict.config, verdict.num_frames, verdict.facts, name in readers, reads)
        lowest = None if verdict.dense_macs is None else macs.lowest
        found[name] = replace(verdict, reader=readers.get(name), lowest_macs=lowest)
    return tuple(found[verdict.name] for verdict in verdicts)


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
    options = follower_options(module, source.channels, aside)
    macs = probe(module, config, source.num_frames, verdict.facts, **options)
    verdict = replace(verdict, reason="", num_frames=source.num_frames, follows=source.name)
    return accepted(verdict, config, candidates, macs)


def follower_options(module: Any, channels: Sequence[int], aside: bool = True) -> dict[str, Any]:
    """How a convolution becomes one that follows another, whose candidates compute so many channels.

    ``aside``: another one reads them, too, and absorbs.
    """
    if is_depthwise(module):
        return {"carries": channels}
    return {"reads": channels, "aside": aside, "decides": False}
