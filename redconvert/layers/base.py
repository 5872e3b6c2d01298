"""What DynamicConv2d and DynamicConv3d share (Eq. 1-5, 7): how much of themselves they compute, and how."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import LayerConfig
from ..errors import RedconvertError
from .absorb import ALONE, Absorbed, Handover, Source, Ties, carry, mask_absent
from .candidates import Candidates
from .cheap import resolve_cheap
from .composed import compose, composes
from .frames import FrameRebuild
from .gate import Gate, GateWeights, NoGate, candidate_weights
from .geometry import check_input
from .masked import pool
from .mixtures import InputMixtures, mixture_counts
from .rebuild import ChannelRebuild
from .recipes import Recipe, recipe_of
from .routing import FULL, Decision, decide, group_samples, route, sample_rows, select
from .static import run_static
from .training import convolve_learning, resting, run_masked

__all__ = ["DynamicConv", "Observation"]

DEFAULT_GATE_FRAMES = 8  # where no example says how long clips are
ADDED_MODULES = ("gate", "cheap_c", "cheap_t", "cheap_in", "mixed_in")
ADDED_ATTRIBUTES = (  # all that make_dynamic and the modes set on a convolution
    *("config", "candidates", "num_frames", "layer_name", "feeds_norm", "forced", "enabled", "learns", "observers"),
    *("hands_to", "reads_from", "carries", "carried", "aside", "capturable", "settled"),
    *ADDED_MODULES,  # an absent cheap operation is a plain None
)
Forced = list[int | None] | int | None  # a candidate for all samples, one per sample, or None: the gate decides


class Observation(NamedTuple):
    """What one call of a dynamic convolution decided, for whoever listens in ``layer.observers``.

    ``decisions`` holds one per sample; ``weights`` are the gate's, with their graph. Shapes are those
    of the whole call, frames folded into the batch included. ``source`` holds the weights over the candidates of
    the convolution whose channels this one reads, where that one hands over what it computed.
    """

    input_shape: torch.Size
    output_shape: torch.Size
    weights: GateWeights
    decisions: list[Decision]
    source: Tensor | None = None


class DynamicConv(nn.Module):
    """What DynamicConv2d and DynamicConv3d share. Use those."""

    # Of the convolution this is mixed into.
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    weight: Tensor
    bias: Tensor | None
    dense_class: Any  # what this convolution was; its forward is the full candidate

    config: LayerConfig
    candidates: Candidates
    gate: Gate
    cheap_c: ChannelRebuild | None
    cheap_t: FrameRebuild | None
    cheap_in: Absorbed | None
    mixed_in: InputMixtures | None
    num_frames: int | None
    layer_name: str

    # Defaults on the class, so that a converted module holds them only while they differ.
    enabled: bool = True
    learns: bool = True  # its gate; in training, one that rests decides and gets no gradient
    feeds_norm: bool = False
    forced: tuple[Forced, Forced] = (None, None)
    observers: tuple[Callable[[DynamicConv, Observation], None], ...] = ()
    capturable: bool = False  # it looks at no value: shapes are static
    settled: tuple[int, int] | None = None  # while capturable: what its gate decides of any input
    hands_to: Handover | None = None  # its channels are not rebuilt: whoever reads them does without
    reads_from: Handover | None = None
    carries: Handover | None = None  # depthwise, between the two: it computes the channels that are there
    carried: tuple[int, ...] | None = None  # how many those are, by candidate of the layer that hands over
    aside: bool = False  # it reads what another reads, too, and absorbs

    def make_dynamic(
        self,
        config: LayerConfig,
        *,
        name: str = "",
        num_frames: int | None = None,
        gate_frames: int | None = None,
        ties: Ties = ALONE,
    ) -> None:
        """Add gate and cheap operations to a plain convolution whose class has been set to this one.

        Args:
            config: how to decide.
            name: the layer's, for messages; it also seeds the gate's start.
            num_frames: frames per clip where time is folded into the batch of a 2D convolution.
            gate_frames: frames that the layer saw in an example.
            ties: what it shares with other layers.
        """
        self.config, self.num_frames, self.layer_name = config, num_frames, name or type(self).__name__
        self.candidates = self.plan_candidates(self, config, num_frames)
        if ties.carries is not None:
            self.carried = tuple(ties.carries)
        if ties.aside:
            self.aside = True
        if ties.carries is not None or not ties.decides:
            self.candidates = self.candidates.following(carries=ties.carries is not None)
        elif self.candidates.is_static:
            raise RedconvertError(f"layer '{self.layer_name}' has one channel and no time axis: nothing to decide")
        self.cheap_c = self.cheap_t = self.cheap_in = self.mixed_in = None
        if len(self.candidates.channels) > 1:
            per_output = self.weight[0].numel()
            cheap = "none" if ties.hands_over else config.cheap
            kinds = [resolve_cheap(cheap, kept, per_output, self.groups) for kept in self.candidates.channels[1:]]
            self.cheap_c = ChannelRebuild(self.candidates, kinds, self.groups).to(self.weight.device)
            self.start_cheap()
        if len(self.candidates.strides) > 1:
            self.cheap_t = FrameRebuild(self.candidates)
        if ties.reads is not None:
            self.cheap_in = Absorbed(ties.reads, self.out_channels, self.kernel_size)
        elif config.mix_inputs and self.cheap_c is not None and not ties.hands_over:
            counts = mixture_counts(self, self.candidates.channels, config.align)
            self.mixed_in = None if counts is None else InputMixtures(counts)
        has_time = isinstance(self, nn.Conv3d) or num_frames is not None
        frames = (config.gate_frames or gate_frames or num_frames or DEFAULT_GATE_FRAMES) if has_time else 1
        if self.candidates.is_static:
            self.gate = NoGate(frames)
        else:
            self.gate = Gate(
                self.in_channels,
                frames,
                len(self.candidates.channels),
                len(self.candidates.strides),
                config.gate_hidden,
                torch.Generator().manual_seed(zlib.crc32(self.layer_name.encode())),
            )
        for part in self.added_modules():
            part.to(device=self.weight.device, dtype=self.weight.dtype).train(self.training)

    @torch.no_grad()
    def start_cheap(self) -> None:
        """Begin Phi_c again from the convolution's weights, where they are numbers, and what it reads as at birth."""
        weight = self.recipe.weight(self)
        if self.cheap_c is not None and not weight.is_meta and torch.isfinite(weight).all():
            self.cheap_c.start_from_weights(weight, self.bias)
        for part in (self.cheap_in, self.mixed_in):
            if part is not None:
                part.start()

    @staticmethod
    def plan_candidates(conv: nn.Module, config: LayerConfig, num_frames: int | None) -> Candidates:
        """The candidates that ``conv``, a Conv2d or Conv3d, would get."""
        temporal = isinstance(conv, nn.Conv3d) or (num_frames or 1) > 1
        return Candidates.build(conv.out_channels, conv.groups, config, temporal=temporal)  # type: ignore[arg-type]

    def added_modules(self) -> list[nn.Module]:
        """What conversion added: the gate and the cheap operations."""
        return [part for name in ADDED_MODULES if (part := getattr(self, name)) is not None]

    def cheap_parameters(self) -> Iterator[nn.Parameter]:
        """Of what rebuilds this layer's own channels and frames."""
        for part in (self.cheap_c, self.cheap_t):
            if part is not None:
                yield from part.parameters()

    def extra_repr(self) -> str:
        dynamic = f"channels={self.candidates.channels}, frame_strides={self.candidates.strides}"
        return f"{super().extra_repr()}, {dynamic}, gate={self.config.gate!r}"

    # -- forward ---------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return self.dense_class.forward(self, input)
        dim = 5 if isinstance(self, nn.Conv3d) else 4
        if input.dim() == dim - 1 and self.num_frames is None:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        captured = self.capturable and (self.training or not self.observers)  # who observes inference reads decisions
        if captured or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return run_static(self, input)
        check_input(self, input, self.layer_name, self.num_frames, self.recipe.pad is Recipe.pad)
        source = self._source(input)
        rests = self.training and not self.learns
        if self.candidates.is_static:
            weights, decisions = self._nothing_to_decide(input)
        else:
            with torch.no_grad() if rests else nullcontext():
                same, pooled = pool(input)
                if source is not None and self.told_by is not None:
                    pooled = mask_absent(pooled, self.told_by, source.candidates, self.frames_per_sample)
                weights = self._weights(same, pooled)
            input = input if rests else same
            decisions = decide(weights, soft=self.config.gate == "soft")
        if source is not None:
            decisions = [d._replace(source=i) for d, i in zip(decisions, source.candidates, strict=True)]
        if self.hands_to is not None:
            self.hands_to.source = Source(weights.channel, [decision.channel for decision in decisions])
        if self.training and not rests:
            out = run_masked(self, input, source, weights, decisions)
        else:
            computed, learned = resting(self, decisions) if rests else (decisions, 0)
            groups = group_samples(computed)
            out = route(groups, lambda decision, n: self._sparse(input, weights, decision, n, learned), input)
        self.tell(input, out, weights, decisions, source and source.weights)
        return out

    def tell(
        self, x: Tensor, out: Tensor, weights: GateWeights, decisions: list[Decision], source: Tensor | None
    ) -> None:
        """Tell whoever listens of one call."""
        seen = Observation(x.shape, out.shape, weights, decisions, source)
        for observer in self.observers:
            observer(self, seen)

    def _source(self, x: Tensor) -> Source | None:
        """What the layer that hands over says of these samples."""
        if self.told_by is None:
            return None
        return self.told_by.take(x.shape[0] // self.frames_per_sample, self.layer_name)

    @property
    def told_by(self) -> Handover | None:
        """What says which channels are there, of a layer that reads or carries those of another."""
        return self.reads_from or self.carries

    @property
    def recipe(self) -> type[Recipe]:
        """How the convolution pads and which weight it uses."""
        return recipe_of(self.dense_class) or Recipe

    @property
    def frames_per_sample(self) -> int:
        """Rows of the batch that one sample takes."""
        return self.num_frames or 1

    def _nothing_to_decide(self, x: Tensor) -> tuple[GateWeights, list[Decision]]:
        num_samples = x.shape[0] // self.frames_per_sample
        ones = self.gate.beta.new_ones(num_samples, 1)
        return GateWeights(ones, ones), [FULL] * num_samples

    def _weights(self, x: Tensor, pooled: Tensor) -> GateWeights:
        """The gate's weights per sample; ``pooled`` is G(x), frames folded into the batch like x's."""
        num_samples = x.shape[0] // self.frames_per_sample
        if any(index is None or (isinstance(index, list) and None in index) for index in self.forced):
            values = self.gate(self._per_clip(pooled))
            gated = GateWeights(*(candidate_weights(value, self.config.normalize) for value in values))
        else:  # gates do not run where everything is forced
            gated = GateWeights(x.new_empty(0), x.new_empty(0))
        return GateWeights(
            self._force("channel", gated.channel, num_samples, x),
            self._force("temporal", gated.temporal, num_samples, x),
        )

    def forced_candidates(self, axis: str, num_samples: int) -> list[int | None]:
        """Which candidate of "channel" or "temporal" `forced` asks of each sample; None: the gate decides."""
        index = self.forced[("channel", "temporal").index(axis)]
        listed = index if isinstance(index, list) else [index]
        if num_samples % len(listed):
            raise RedconvertError(
                f"layer '{self.layer_name}': forced() got {len(listed)} {axis} candidates for {num_samples} samples"
            )
        wanted = [None if i is None else self.candidates.nearest(axis, i) for i in listed]
        # A network that folds frames into its batch asks once per sample.
        return [i for i in wanted for _ in range(num_samples // len(listed))]

    def _force(self, axis: str, gated: Tensor, num_samples: int, x: Tensor) -> Tensor:
        """``gated (N, S)`` with the rows replaced that `forced` names a candidate for."""
        if self.forced[("channel", "temporal").index(axis)] is None:
            return gated  # an exporter would take a number of samples that is counted up to for a constant
        per_sample = self.forced_candidates(axis, num_samples)
        if all(i is None for i in per_sample):
            return gated
        count = len(self.candidates.channels if axis == "channel" else self.candidates.strides)
        rows = F.one_hot(torch.tensor([i or 0 for i in per_sample], device=x.device), count).to(self.gate.beta.dtype)
        if None not in per_sample:
            return rows
        free = torch.tensor([i is None for i in per_sample], device=x.device)
        return torch.where(free[:, None], gated, rows)

    def _sparse(
        self, x: Tensor, weights: GateWeights, decision: Decision, samples: Tensor | None, learned: int = 0
    ) -> Tensor:
        """Compute only what ``decision`` asks for, for these samples (None: all)."""
        if samples is not None:
            x = select(x, 0, sample_rows(samples, self.frames_per_sample))
            weights = GateWeights(*(w.index_select(0, samples) for w in weights))
        if decision == FULL:
            return self.whole(x, learned=learned)
        composed = not decision.blend and composes(self, decision.channel)
        y = self._convolve(x, decision.channel, decision.temporal, decision.source, learned, composed)
        if composed:
            decision = decision._replace(channel=0)
        return self._finish(y, weights, decision, self._output_frames(x))

    def compute(self, x: Tensor, decision: Decision) -> Tensor:
        """What inference returns for samples that all take one decision, in which nothing is mixed."""
        if decision == FULL:
            return self.dense_class.forward(self, x)
        ones = x.new_ones(x.shape[0] // self.frames_per_sample, 1)
        y = self._convolve(x, decision.channel, decision.temporal, decision.source)
        return self._finish(y, GateWeights(ones, ones), decision, self._output_frames(x))

    def _finish(self, y: Tensor, weights: GateWeights, decision: Decision, num_frames: int) -> Tensor:
        """From what ``_convolve`` returns for ``decision`` to the layer's output."""
        i, j, blend, _ = decision
        normalized, frames = self.config.normalize, y.shape[0] // weights.channel.shape[0]
        if self.cheap_c is not None and blend:
            rows = weights.channel.repeat_interleave(frames, dim=0)
            y = self.cheap_c.mix(y if i else self.cheap_c.to_ranks(y), rows, i, normalized)
        elif self.cheap_c is not None and i:
            y = self.cheap_c.single(y, i)
        if self.cheap_t is not None:
            z = self.as_clips(y, frames)
            z = self.cheap_t.mix(z, weights.temporal, num_frames, j) if blend else self.cheap_t.single(z, j, num_frames)
            y = self.from_clips(z)
        return y

    @property
    def rebuilds(self) -> bool:
        """Whether this layer rebuilds the channels that it does not compute, and hands over none."""
        return self.cheap_c is not None and self.hands_to is None

    @property
    def derives(self) -> bool:
        """Whether what its candidates rebuild follows from the full convolution's result: not where they read less."""
        return self.rebuilds and self.mixed_in is None

    def mix(self, y: Tensor, weights: GateWeights) -> Tensor:
        """The soft sum over all candidates (Eq. 5), from the full convolution ``y``: static shapes."""
        if self.derives:
            y = self.mix_channels(y, weights.channel)
        if self.cheap_t is not None:
            z = self.as_clips(y, self.frames_per_sample)
            y = self.from_clips(self.cheap_t.mix(z, weights.temporal, z.shape[2]))
        return y

    def mix_channels(self, y: Tensor, weights: Tensor) -> Tensor:
        """The channel part of the soft sum; ``y`` and the result are in the layer's own order."""
        assert self.cheap_c is not None
        rows = weights.repeat_interleave(self.frames_per_sample, dim=0)
        return self.cheap_c.mix(self.cheap_c.to_ranks(y), rows, 0, self.config.normalize)

    # -- the convolution, whole or in part -------------------------------------------------------------

    def whole(self, x: Tensor, source: int = 0, learned: int = 0) -> Tensor:
        """The full convolution; see `_convolve`."""
        if not source and (not learned or self.groups > 1):
            return self.dense_class.forward(self, x)
        return self._convolve(x, 0, 0, source, learned)

    def _convolve(
        self, x: Tensor, channel: int, temporal: int, source: int = 0, learned: int = 0, composed: bool = False
    ) -> Tensor:
        """What a candidate computes, in rank order (all channels: in the layer's own), at every R-th output frame.

        ``source``: the candidate of the layer that is read, which handed over no more than its channels.
        ``learned``: of all channels, computed in training, those of this candidate alone get gradients.
        ``composed``: what the candidate makes of it, all channels, by the filters of `compose`.
        """
        convolve: Any = F.conv3d if isinstance(self, nn.Conv3d) else F.conv2d
        if source and self.carries is not None:  # zeros in the place of the others, which nobody reads
            x, weight, bias, there = carry(self, x, source)
            x, stride, padding = self._strided(x, self.candidates.strides[temporal])
            y = convolve(x, weight, bias, stride, padding, self.dilation, len(there))
            return y.new_zeros(len(y), self.out_channels, *y.shape[2:]).index_copy(1, there, y)
        kept, groups = self.candidates.channels[channel], self.groups
        weight, bias, order = self.recipe.weight(self), self.bias, None
        if source:
            assert self.cheap_in is not None and self.reads_from is not None
            there = self.reads_from.kept(source)
            weight, bias = self.cheap_in.filter(source, weight, bias, there)
            x = select(x, 1, there)
        if composed:
            kept, (weight, bias) = self.out_channels, compose(self, channel, weight, bias)
        elif self.cheap_c is not None and channel:
            order = None if self.cheap_c.is_identity else self.cheap_c.order[:kept]
            weight, bias = self.cheap_c.filters(channel, weight, bias)
        if kept < self.out_channels and groups > 1:  # whole groups, and the inputs they read
            per_group_out, per_group_in = self.out_channels // groups, self.in_channels // groups
            groups = kept // per_group_out
            if order is None:
                x = x[:, : groups * per_group_in]
            else:
                kept_groups = order[::per_group_out] // per_group_out
                x = select(x, 1, sample_rows(kept_groups, per_group_in))
        x, stride, padding = self._strided(x, self.candidates.strides[temporal])
        if self.mixed_in is not None and channel and not composed:
            x, weight = self.mixed_in.read(channel, x), self.mixed_in.filters(channel, weight)
        if learned and groups == 1:
            assert self.cheap_c is not None and not channel
            trained = self.cheap_c.order[: self.candidates.channels[learned]]
            return convolve_learning(x, weight, bias, stride, padding, self.dilation, trained)
        return convolve(x, weight, bias, stride, padding, self.dilation, groups)

    def _strided(self, x: Tensor, frame_stride: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        """What to convolve for every ``frame_stride``-th output frame: the input, stride and padding."""
        raise TypeError("use DynamicConv2d or DynamicConv3d")

    def _per_clip(self, pooled: Tensor) -> Tensor:
        """G(x) as ``(N, C_in, T)``."""
        return pooled

    def as_clips(self, y: Tensor, frames: int) -> Tensor:
        """``y``, with ``frames`` rows per sample, as ``(N, C, T, H, W)``: a view."""
        return y

    def from_clips(self, z: Tensor) -> Tensor:
        return z

    def _output_frames(self, x: Tensor) -> int:
        return 1
