"""DynamicConv2d and DynamicConv3d (Eq. 1-5, 7): convolutions that decide how much of themselves to compute."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import LayerConfig
from ..errors import RedconvertError
from .candidates import Candidates
from .cheap import ChannelRebuild, FrameRebuild, resolve_cheap
from .gate import Gate, GateWeights, candidate_weights
from .geometry import check_input, output_size
from .masked import CheckpointedMix, pool
from .recipes import Recipe, recipe_of
from .routing import FULL, Decision, decide, group_samples, route, sample_rows, select
from .static import run_static

__all__ = ["DynamicConv", "DynamicConv2d", "DynamicConv3d", "Observation"]

DEFAULT_GATE_FRAMES = 8  # where no example says how long clips are
ADDED_MODULES = ("gate", "cheap_c", "cheap_t")
ADDED_ATTRIBUTES = (  # all that make_dynamic and the modes set on a convolution
    *("config", "candidates", "num_frames", "layer_name", "feeds_norm", "forced", "enabled", "observers"),
    *ADDED_MODULES,  # an absent cheap operation is a plain None
)
Forced = list[int | None] | int | None  # a candidate for all samples, one per sample, or None: the gate decides
SAMPLED_SIZE = 4  # the rebuild loss is an average: about this many rows and columns of a frame tell it


class Observation(NamedTuple):
    """What one call of a dynamic convolution decided, for whoever listens in ``layer.observers``.

    ``decisions`` holds one per sample; ``weights`` are the gate's, with their graph. Shapes are those
    of the whole call, frames folded into the batch included.
    """

    input_shape: torch.Size
    output_shape: torch.Size
    weights: GateWeights
    decisions: list[Decision]


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
    num_frames: int | None
    layer_name: str

    # Defaults on the class, so that a converted module holds them only while they differ.
    enabled: bool = True
    feeds_norm: bool = False
    forced: tuple[Forced, Forced] = (None, None)
    observers: tuple[Callable[[DynamicConv, Observation], None], ...] = ()

    def make_dynamic(
        self,
        config: LayerConfig,
        *,
        name: str = "",
        num_frames: int | None = None,
        gate_frames: int | None = None,
    ) -> None:
        """Add gate and cheap operations to a plain convolution whose class has been set to this one.

        Args:
            config: how to decide.
            name: the layer's, for messages; it also seeds the gate's start.
            num_frames: frames per clip where time is folded into the batch of a 2D convolution.
            gate_frames: frames that the layer saw in an example.
        """
        self.config, self.num_frames, self.layer_name = config, num_frames, name or type(self).__name__
        self.candidates = self.plan_candidates(self, config, num_frames)
        if self.candidates.is_static:
            raise RedconvertError(f"layer '{self.layer_name}' has one channel and no time axis: nothing to decide")
        self.cheap_c = self.cheap_t = None
        if len(self.candidates.channels) > 1:
            per_output = self.weight[0].numel()
            kinds = [resolve_cheap(config.cheap, kept, per_output) for kept in self.candidates.channels[1:]]
            self.cheap_c = ChannelRebuild(self.candidates, kinds, self.groups).to(self.weight.device)
            self.start_cheap()
        if len(self.candidates.strides) > 1:
            self.cheap_t = FrameRebuild(self.candidates)
        has_time = isinstance(self, nn.Conv3d) or num_frames is not None
        frames = (config.gate_frames or gate_frames or num_frames or DEFAULT_GATE_FRAMES) if has_time else 1
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
        """Begin Phi_c again from the convolution's weights, where they are numbers."""
        weight = self.recipe.weight(self)
        if self.cheap_c is not None and not weight.is_meta and torch.isfinite(weight).all():
            self.cheap_c.start_from_weights(weight, self.bias)

    @staticmethod
    def plan_candidates(conv: nn.Module, config: LayerConfig, num_frames: int | None) -> Candidates:
        """The candidates that ``conv``, a Conv2d or Conv3d, would get."""
        temporal = isinstance(conv, nn.Conv3d) or (num_frames or 1) > 1
        return Candidates.build(conv.out_channels, conv.groups, config, temporal=temporal)  # type: ignore[arg-type]

    def added_modules(self) -> list[nn.Module]:
        """What conversion added: the gate and the cheap operations."""
        return [part for part in (self.gate, self.cheap_c, self.cheap_t) if part is not None]

    def cheap_parameters(self) -> Iterator[nn.Parameter]:
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
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return run_static(self, input)
        check_input(self, input, self.layer_name, self.num_frames, self.recipe.pad is Recipe.pad)
        input, pooled = pool(input)
        weights = self._weights(input, pooled)
        decisions = decide(weights, soft=self.config.gate == "soft")
        if self.training:
            y = self.dense_class.forward(self, input)
            out = CheckpointedMix.apply(self, decisions, y, *weights, *self.cheap_parameters())
        else:
            groups = group_samples(decisions)
            out = route(groups, lambda decision, n: self._sparse(input, weights, decision, n), input)
        for observer in self.observers:
            observer(self, Observation(input.shape, out.shape, weights, decisions))
        return out

    @property
    def recipe(self) -> type[Recipe]:
        """How the convolution pads and which weight it uses."""
        return recipe_of(self.dense_class) or Recipe

    @property
    def frames_per_sample(self) -> int:
        """Rows of the batch that one sample takes."""
        return self.num_frames or 1

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

    def _sparse(self, x: Tensor, weights: GateWeights, decision: Decision, samples: Tensor | None) -> Tensor:
        """Compute only what ``decision`` asks for, for these samples (None: all)."""
        if samples is not None:
            x = select(x, 0, sample_rows(samples, self.frames_per_sample))
            weights = GateWeights(*(w.index_select(0, samples) for w in weights))
        if decision == FULL:
            return self.dense_class.forward(self, x)
        y = self._convolve(x, decision.channel, decision.temporal)
        return self._finish(y, weights, decision, self._output_frames(x))

    def _finish(self, y: Tensor, weights: GateWeights, decision: Decision, num_frames: int) -> Tensor:
        """From what ``_convolve`` returns for ``decision`` to the layer's output."""
        i, j, blend = decision
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

    def mix(self, y: Tensor, weights: GateWeights) -> Tensor:
        """The soft sum over all candidates (Eq. 5), from the full convolution ``y``: static shapes."""
        if self.cheap_c is not None:
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

    def rebuild_loss(self, y: Tensor, weights: GateWeights) -> Tensor | None:
        """Mean squared error of the closed candidates' rebuilding, over y's variance; trains them alone.

        A closed candidate has weight 0, and so no gradient from the soft sum. ``y`` carries no graph.
        """
        if not self.config.rebuild_weight:
            return None
        if not (self.cheap_c is not None and "depthwise" in self.cheap_c.kinds):  # that one needs neighbours
            down, across = (max(1, size // SAMPLED_SIZE) for size in y.shape[-2:])
            y = y[..., ::down, ::across].contiguous()
        terms = []
        scale = y.detach().var() + torch.finfo(y.dtype).tiny
        if self.cheap_c is not None:
            # The frames that every temporal candidate computes: larger search spaces then cost no more.
            sampled = self.as_clips(y, self.frames_per_sample)[:, :, :: self.candidates.strides[-1]]
            ranks = self.cheap_c.to_ranks(self.from_clips(sampled))
            for i, kept in enumerate(self.candidates.channels[1:], start=1):
                error = (self.cheap_c.rebuild(i, ranks) - ranks[:, kept:]).square().flatten(1).mean(1)
                closed = (weights.channel[:, i] == 0).repeat_interleave(len(ranks) // len(weights.channel))
                terms.append((error * closed).mean())
        if self.cheap_t is not None:
            z = self.as_clips(y, self.frames_per_sample)
            for j, stride in enumerate(self.candidates.strides[1:], start=1):
                rebuilt = self.cheap_t.single(z[:, :, ::stride], j, z.shape[2])
                error = (rebuilt - z).square().flatten(1).mean(1)
                terms.append((error * (weights.temporal[:, j] == 0)).mean())
        return self.config.rebuild_weight * sum(terms[1:], terms[0]) / scale

    # -- the convolution, whole or in part -------------------------------------------------------------

    def _convolve(self, x: Tensor, channel: int, temporal: int) -> Tensor:
        """The first k channels in rank order (all of them: in the layer's own), at every R-th output frame."""
        kept, groups = self.candidates.channels[channel], self.groups
        weight, bias, order = self.recipe.weight(self), self.bias, None
        if self.cheap_c is not None and channel:
            order = None if self.cheap_c.is_identity else self.cheap_c.order[:kept]
            weight = weight[:kept] if order is None else weight.index_select(0, order)
            if bias is not None:
                bias = bias[:kept] if order is None else bias.index_select(0, order)
        if kept < self.out_channels and groups > 1:  # whole groups, and the inputs they read
            per_group_out, per_group_in = self.out_channels // groups, self.in_channels // groups
            groups = kept // per_group_out
            if order is None:
                x = x[:, : groups * per_group_in]
            else:
                kept_groups = order[::per_group_out] // per_group_out
                x = select(x, 1, sample_rows(kept_groups, per_group_in))
        return self._partial(x, weight, bias, groups, self.candidates.strides[temporal])

    def _partial(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, frame_stride: int) -> Tensor:
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


class DynamicConv3d(DynamicConv, nn.Conv3d):
    """A Conv3d that decides per sample how many output channels and frames to compute.

    ``(N, C_in, T, H, W) -> (N, C_out, T_o, H_o, W_o)``, like `torch.nn.Conv3d`, whose arguments come first.
    Candidate (i, j) convolves ``k_i`` channels at every ``2^j``-th frame, rebuilds the other channels with
    Phi_c and the other frames with Phi_t; the gate's weights choose (``gate="hard"``) or mix
    (``gate="soft"``) them: ``out = sum_j w_t,j E_j(sum_i w_c,i Phi_i(conv(x)))``. At birth the full candidate
    has weight 1, and the layer equals the Conv3d to the bit.

    Args:
        config: how to decide.
        gate_frames: frames that the gate sees.
    """

    dense_class = nn.Conv3d

    def __init__(self, *args, config: LayerConfig | None = None, gate_frames: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.make_dynamic(config or LayerConfig(), gate_frames=gate_frames)

    def _output_frames(self, x: Tensor) -> int:
        return output_size(self, 0, x.shape[2])

    def _partial(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, frame_stride: int) -> Tensor:
        x, padding = self.recipe.pad(self, x)
        stride = (self.stride[0] * frame_stride, *self.stride[1:])
        return F.conv3d(x, weight, bias, stride, padding, self.dilation, groups)


class DynamicConv2d(DynamicConv, nn.Conv2d):
    """A Conv2d that decides per sample how many output channels to compute, and frames with ``num_frames``.

    ``(N, C_in, H, W) -> (N, C_out, H_o, W_o)``, like `torch.nn.Conv2d`, whose arguments come first. With
    ``num_frames=T`` the batch is ``N * T`` frames, clip after clip, and decisions are per clip. The maths
    is that of `DynamicConv3d`.

    Args:
        config: how to decide.
        num_frames: frames per clip where the batch holds ``N * num_frames`` frames.
    """

    dense_class = nn.Conv2d

    def __init__(self, *args, config: LayerConfig | None = None, num_frames: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.make_dynamic(config or LayerConfig(), num_frames=num_frames)

    def _per_clip(self, pooled: Tensor) -> Tensor:
        if self.num_frames is None:
            return pooled.unsqueeze(2)
        return pooled.unflatten(0, (-1, self.num_frames)).transpose(1, 2)

    def as_clips(self, y: Tensor, frames: int) -> Tensor:
        return y.unflatten(0, (-1, frames)).transpose(1, 2)

    def from_clips(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2).flatten(0, 1)

    def _output_frames(self, x: Tensor) -> int:
        return self.frames_per_sample

    def _partial(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, frame_stride: int) -> Tensor:
        if frame_stride > 1:
            rows = torch.arange(x.shape[0], device=x.device).view(-1, self.frames_per_sample)
            x = select(x, 0, rows[:, ::frame_stride].flatten())
        x, padding = self.recipe.pad(self, x)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)
