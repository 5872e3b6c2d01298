"""One convolution with what follows it, for inference: decide, convolve what was decided, rebuild in one pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import Decision, DynamicConv
from ..layers.absorb import Source
from ..layers.routing import FULL, group_samples, route, select
from .absorbed import absorbed_filter, kept_alone, spread_out
from .decide import Batch, Decider, Seen
from .frames import Frames, Place, full
from .kernels import Filling
from .pack import Filter, PackedConv
from .path import Path, Value
from .reduced import Reduced, build_filling, reduce
from .taps import reading
from .vectors import ACTIVATIONS
from .ways import Undecided, whole_filter

__all__ = ["Fork", "Unit"]


class Fork(NamedTuple):
    """What a unit returns instead of a result where samples decide differently and may part: who goes with whom."""

    groups: list[list[int]]


class Unit(nn.Module):
    """``act(norm(conv(x)) [+ residual])``, dense or dynamic, on channels-last clips ``(N, C, T, H, W)``.

    Args:
        conv: a Conv2d or Conv3d, or a dynamic one; it keeps its weights, and its decisions and modes are followed.
        filter: what it convolves with.
        norm: scale and shift per channel of the norm behind it; None for none.
        activation: a key of ACTIVATIONS.
        batch: shared by all units of a network.
        forms: of packed convolutions, by key, where they were timed before.

    Attributes:
        feeds_gate: a dynamic unit reads the result, and wants to know its means.
        feeds_mean: somebody else wants to know them.
        reader, source: the unit that reads the channels which this one hands over, and whose channels it reads or
            carries.
        hands_compact: the reader gets what was computed alone, where all samples computed the same channels.
        decider: of a dynamic layer; None for a dense one.
    """

    def __init__(
        self,
        conv: nn.Module,
        filter: Filter,
        norm: tuple[Tensor, Tensor] | None,
        activation: str,
        batch: Batch,
        forms: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.dim = 3 if isinstance(conv, nn.Conv3d) else 2
        self._conv = (conv,)  # in a tuple: the module stays where it is in the network
        ones = torch.ones(len(filter.weight), dtype=filter.weight.dtype, device=filter.weight.device)
        self.scale, self.shift = norm if norm is not None else (ones, torch.zeros_like(ones))
        self.filter, self.activation, self.batch, self.forms = filter, activation, batch, forms or {}
        self.folded = filter if norm is None else filter.scaled(*norm)
        self.decider = Decider(conv, batch) if isinstance(conv, DynamicConv) else None
        self.feeds_gate = self.feeds_mean = self.hands_compact = False
        self._linked: dict[str, Unit] = {}  # in a dictionary: they are no parts of this one
        self._followers: list[Unit] = []  # who reads and who carries
        self._said: tuple[list[Decision], Tensor | None] = [], None
        self._packs: dict[str, PackedConv] = {}
        self._shapes: dict[torch.Size, torch.Size] = {}
        self._paths: dict[tuple[Decision, bool, int, int], Path | Undecided | None] = {}
        self._ways: dict[str, str] = {}  # parts or whole, by the key of the latter's packed convolution
        self._filters: dict[tuple[int, int, bool], Filter] = {}
        self._reduced: dict[tuple[int, int], Reduced] = {}
        self._fillings: dict[tuple[int, int, int], Filling | None] = {}

    @property
    def layer(self) -> Any:
        """The convolution that this unit computes."""
        return self._conv[0]

    @property
    def channels(self) -> int:
        """C_out, and C_in below: of the whole convolution."""
        return len(self.filter.weight)

    @property
    def in_channels(self) -> int:
        return self.filter.weight.shape[1] * self.filter.groups

    @property
    def reader(self) -> Unit | None:
        return self._linked.get("reader")

    @property
    def source(self) -> Unit | None:
        return self._linked.get("source")

    def follow(self, source: Unit) -> None:
        """Tie this unit to the one whose channels it has."""
        self._linked["source"] = source
        source._followers.append(self)
        if self.layer.carries is None and not self.layer.aside:
            source._linked["reader"] = self

    @property
    def frames_per_sample(self) -> int:
        """Rows of an image batch that are one clip."""
        return getattr(self.layer, "frames_per_sample", 1)

    def extra_repr(self) -> str:
        return f"{self.layer}, activation={self.activation!r}"

    def chosen_forms(self) -> dict[str, str]:
        """The form of each convolution that was packed, by key."""
        ways = {_choice(key): way for key, way in self._ways.items()}
        return {key: packed.form for key, packed in self._packs.items() if packed.form is not None} | ways

    # -- decide ----------------------------------------------------------------------------------------

    def forward(
        self,
        x: Value,
        residual: Value | None = None,
        overwrite: bool = False,
        into: Place | None = None,
        forks: bool = False,
    ) -> Value | Fork:
        """``overwrite``: the result may take the residual's place in memory; ``into``: it may be written there.

        ``forks``: whoever calls knows what to do with a `Fork`.
        """
        if self.decider is None:
            return self.run(x, residual, FULL, overwrite)
        decisions, z = self.decider(x)
        alone = self._hand_over(decisions, z)
        first = decisions[0]
        if len(decisions) == 1 or decisions.count(first) == len(decisions):
            out = self.run(x, residual, first, overwrite, alone, into)
        elif forks and self.batch.forks:
            return Fork(list(group_samples(decisions).values()))
        else:
            out = self._in_groups(x, residual, decisions, alone)
        if self.layer.observers:
            given, made = _with_channels(x.shape, self.in_channels), _with_channels(out.shape, self.channels)
            weights = self.decider.weights(decisions, z)
            self.batch.seen.setdefault(self, []).append(Seen(given, made, decisions, weights, self._source_weights()))
        return out

    def known(self) -> Decision | None:
        """What it decides whatever it reads; None where its gate must be asked."""
        return FULL if self.decider is None else self.decider.known()

    def _in_groups(self, x: Value, residual: Value | None, decisions: list[Decision], alone: bool) -> Tensor:
        """Samples that decide alike together."""
        whole, added = full(x), None if residual is None else full(residual)

        def part(decision: Decision, samples: Tensor | None) -> Tensor:
            some = [None if each is None else select(each, 0, samples) for each in (whole, added)]  # type: ignore[arg-type]
            return full(self.run(some[0], some[1], decision, alone=alone))  # type: ignore[arg-type]

        return route(group_samples(decisions), part, whole)

    def _hand_over(self, decisions: list[Decision], z: Tensor | None) -> bool:
        """Tell the reader what it will get; whether that is the computed channels alone."""
        handover = self.layer.hands_to
        if handover is None or self.decider is None:
            return False
        self._said = decisions, z
        reader, candidates = self.reader, [decision.channel for decision in decisions]
        # Units ask for weights only where somebody looks; a follower may be none.
        looks = reader is None or self.layer.observers
        told = self.decider.weights(decisions, z).channel if looks else self.filter.weight
        handover.source = Source(told, candidates)
        alike = candidates.count(candidates[0]) == len(candidates)
        return self.hands_compact and alike and all(unit.layer.enabled for unit in self._followers)

    def _source_weights(self) -> Tensor | None:
        """The weights over the candidates of the layer that hands over."""
        if self.layer.told_by is None:
            return None
        source = self.source
        if source is None or source.decider is None:
            return self.layer.told_by.source.weights
        return source.decider.weights(*source._said).channel

    # -- compute ---------------------------------------------------------------------------------------

    def run(
        self,
        x: Value,
        residual: Value | None,
        decision: Decision,
        overwrite: bool = False,
        alone: bool = False,
        into: Place | None = None,
    ) -> Value:
        """One decision for all samples of x; ``alone``: only the channels that it computes."""
        if decision.source:
            handover, compact = self.layer.told_by, x.shape[1] < self.in_channels
            x = kept_alone(x, handover, decision.source)
            if self.layer.carries is not None and residual is None:
                y = self._run(x, None, decision, self.activation)
                return y if compact else spread_out(y, handover, decision.source)
        if residual is not None and residual.shape != self._output_shape(x.shape):  # one of them is spread out
            y = full(self._run(x, None, decision, "none", alone=alone)) + full(residual)
            return ACTIVATIONS[self.activation](y)
        return self._run(x, residual, decision, self.activation, overwrite, alone, into)

    def _output_shape(self, shape: torch.Size) -> torch.Size:
        if shape not in self._shapes:
            self._shapes[shape] = torch.Size((shape[0], self.channels, *self.filter.output_sizes(shape[2:])))
        return self._shapes[shape]

    def _run(
        self,
        x: Value,
        residual: Value | None,
        decision: Decision,
        activation: str,
        overwrite: bool = False,
        alone: bool = False,
        into: Place | None = None,
    ) -> Value:
        held, stride, num_frames = (x.held, x.stride, x.num_frames) if isinstance(x, Frames) else (x, 1, x.shape[2])
        key = (decision, alone and decision.channel > 0, stride, num_frames)
        path = self._paths[key] if key in self._paths else self._path(*key)
        if path is None:  # needs frames that are not held
            return self._run(full(x), residual, decision, activation, overwrite, alone, into)
        pools = self.feeds_mean or self._pools()
        if isinstance(path, Undecided):
            path = self._paths[key] = self._decided(path, path.faster(held, residual, activation, pools))
        return path(held, residual, activation, overwrite, pools, into)

    def _pools(self) -> bool:
        """Whether a gate will read the mean of the result; on a GPU they average themselves."""
        return self.feeds_gate and self.batch.gates_run and not self.filter.weight.is_cuda

    def _path(self, decision: Decision, alone: bool, stride: int, num_frames: int) -> Path | Undecided | None:
        """What a decision does with clips that hold every ``stride``-th frame; None where it needs all of them."""
        i, j = decision.channel, decision.temporal
        base = self._base(i, decision.source, alone)
        skip = self.layer.candidates.strides[j] if self.decider is not None else 1
        clips = skip, num_frames, stride, self._filling(j) is None
        read = reading(base, *clips)
        path: Path | Undecided | None = None
        if read is not None:
            key = _key(decision, alone, read.filter)
            channel, reduced = (i, None) if alone else (0, self._reduce(i, decision.source) if i else None)
            kept = self._kept(channel, decision.source)
            channels = self.channels if kept is None else len(kept)
            filling = self._filling(j, channel, decision.source)
            path = Path(read, self.pack(read.filter, key), reduced, filling, channels)
            if reduced is not None:
                path = self._or_whole(path, decision, clips, f"{key}, whole")
        self._paths[decision, alone, stride, num_frames] = path
        return path

    def _or_whole(
        self, parts: Path, decision: Decision, clips: tuple[int, int, int, bool], key: str
    ) -> Path | Undecided:
        """A path, or one that convolves the same frames once, as was found before; both, where that is to be found."""
        way = self._ways.get(key) or self.forms.get(_choice(key))
        if way is not None:
            self._ways[key] = way
        filter = None if way == "parts" else whole_filter(self, decision.channel, decision.source)
        if filter is None:
            return parts
        read = reading(filter, *clips)
        assert read is not None
        whole = replace(parts, read=read, packed=self.pack(read.filter, key), reduced=None)
        return Undecided(parts, whole, key) if way is None else whole

    def _decided(self, paths: Undecided, way: str) -> Path:
        self._ways[paths.key] = way
        if way == "whole":
            return paths.whole
        self._packs.pop(paths.key)  # parts may serve other paths, too, and stay
        return paths.parts

    def _base(self, channel: int, source: int, alone: bool) -> Filter:
        """What a decision convolves with: the norm is in it where nothing stands between."""
        if not (channel or source):
            return self.folded
        if channel and not alone:
            return self._reduce(channel, source).filter
        key = (channel, source, alone)
        if key not in self._filters:
            if self.layer.carries is not None:
                self._filters[key] = absorbed_filter(self.layer, self.folded, source)
                return self._filters[key]
            filter = absorbed_filter(self.layer, self.filter, source).scaled(self.scale, self.shift)
            self._filters[key] = filter.pick(self.layer.hands_to.kept(channel)) if channel else filter
        return self._filters[key]

    def pack(self, filter: Filter, key: str) -> PackedConv:
        """Kept by key: a convolution is packed once, however it is reached."""
        if key not in self._packs:
            self._packs[key] = PackedConv(
                filter, self.forms.get(key), images=self.dim == 2 and self.frames_per_sample == 1
            )
        return self._packs[key]

    # -- what decisions need, made when they are first taken -------------------------------------------

    def _kept(self, channel: int, source: int) -> Tensor | None:
        """The channels that are computed alone: handed over or carried; None: all are there in the end."""
        if channel:
            return self.layer.hands_to.kept(channel)
        return self.layer.carries.kept(source) if source and self.layer.carries is not None else None

    def _filling(self, temporal: int, channel: int = 0, source: int = 0) -> Filling | None:
        if not temporal:
            return None
        key = (temporal, channel, source if self.layer.carries is not None else 0)
        if key not in self._fillings:
            self._fillings[key] = build_filling(self, temporal, self._kept(channel, source))
        return self._fillings[key]

    def _reduce(self, channel: int, source: int) -> Reduced:
        if (channel, source) not in self._reduced:
            self._reduced[channel, source] = reduce(self, channel, source)
        return self._reduced[channel, source]


def _with_channels(shape: torch.Size, channels: int) -> torch.Size:
    return torch.Size((shape[0], channels, *shape[2:]))


def _key(decision: Decision, alone: bool, filter: Filter) -> str:
    """Taps, stride and padding in time tell the convolutions of one candidate apart."""
    read = f" of {decision.source}" if decision.source else ""
    what = f"{decision.channel}{' alone' * alone}{read}"
    return f"{what}: {filter.kernel[0]} taps, stride {filter.stride[0]}, padding {filter.padding[0]}"


def _choice(key: str) -> str:
    """What a choice between the whole and its parts is called among the forms."""
    return f"{key} or parts"
