"""One convolution with what follows it, for inference: decide, convolve what was decided, rebuild in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ..layers import Decision, DynamicConv, GateWeights
from ..layers.cheap import Depthwise, Pointwise, Scale
from ..layers.routing import FULL, group_samples, route, select
from .decide import FoldedGate
from .frames import Frames, full
from .kernels import Assembly, Filling
from .pack import Filter, PackedConv, from_rows, to_rows
from .taps import Reading, reading
from .vectors import ACTIVATIONS

__all__ = ["Batch", "Seen", "Unit"]

Value = Tensor | Frames


class Seen(NamedTuple):
    """What one call of a unit decided, for the observers of its layer."""

    input_shape: torch.Size
    output_shape: torch.Size
    decisions: list[Decision]
    weights: GateWeights


@dataclass
class Batch:
    """Which samples of the user's batch run now, and what the units saw of them.

    ``always_ask``: gates run even where everything is forced, for benchmarks of the whole. ``gates_run``: some do, so
    whoever has a clip at hand averages it for them.
    """

    first: int = 0
    total: int = 1
    always_ask: bool = False
    gates_run: bool = True
    seen: dict[Unit, list[Seen]] = field(default_factory=dict)


@dataclass
class Reduced:
    """Channel candidate i: what it convolves with, and how the other channels come from that."""

    filter: Filter
    inputs: Tensor | None  # input channels that the kept groups read; None: all
    cheap: PackedConv | None  # None: one source channel each, which the assembly does
    cheap_source: Tensor | None  # channels that a depthwise operation reads
    assembly: Assembly


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
        baked: the decision that the gate always takes, so that it need not be asked; None where it is.
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
        self.gate = FoldedGate(conv.gate) if isinstance(conv, DynamicConv) else None
        self.feeds_gate = self.feeds_mean = False
        self.baked: Decision | None = None
        self._packs: dict[str, PackedConv] = {}
        self._shapes: dict[torch.Size, torch.Size] = {}
        self._convolutions: dict[Any, tuple[Reading, PackedConv] | None] = {}
        self._reduced: dict[int, Reduced] = {}
        self._fillings: dict[int, Filling | None] = {}

    @property
    def layer(self) -> Any:
        """The convolution that this unit computes."""
        return self._conv[0]

    @property
    def frames_per_sample(self) -> int:
        """Rows of an image batch that are one clip."""
        return getattr(self.layer, "frames_per_sample", 1)

    def extra_repr(self) -> str:
        return f"{self.layer}, activation={self.activation!r}"

    def chosen_forms(self) -> dict[str, str]:
        """The form of each convolution that was packed, by key."""
        return {key: packed.form for key, packed in self._packs.items() if packed.form is not None}

    # -- decide ----------------------------------------------------------------------------------------

    def forward(self, x: Value, residual: Value | None = None, overwrite: bool = False) -> Value:
        """``overwrite``: the result may take the residual's place in memory."""
        if self.gate is None:
            return self.run(x, residual, FULL, overwrite)
        decisions, z = self.decide(x)
        groups = group_samples(decisions)
        if len(groups) == 1:
            out = self.run(x, residual, decisions[0], overwrite)
        else:
            whole, added = full(x), None if residual is None else full(residual)

            def part(decision: Decision, samples: Tensor | None) -> Tensor:
                some = [None if each is None else select(each, 0, samples) for each in (whole, added)]  # type: ignore[arg-type]
                return full(self.run(some[0], some[1], decision))  # type: ignore[arg-type]

            out = route(groups, part, whole)
        if self.layer.observers:
            self.batch.seen.setdefault(self, []).append(
                Seen(x.shape, out.shape, decisions, self._weights(decisions, z))
            )
        return out

    def decide(self, x: Value) -> tuple[list[Decision], Tensor | None]:
        """One decision per sample, and what the gate said where it was asked."""
        layer, num_samples = self.layer, x.shape[0]
        if self.gate is None or not layer.enabled:
            return [FULL] * num_samples, None
        if layer.forced == (None, None):
            return self.gate(x) if self.baked is None else ([self.baked] * num_samples, None)
        axes = self._forced(num_samples)
        asked = self.batch.always_ask or any(index is None for axis in axes for index in axis)
        gated, z = self.gate(x) if asked else ([FULL] * num_samples, None)
        rows = zip(gated, *axes, strict=True)
        return [Decision(g.channel if i is None else i, g.temporal if j is None else j) for g, i, j in rows], z

    def _forced(self, num_samples: int) -> list[list[int | None]]:
        """What `redconvert.forced` asks of these samples, on the channel and the temporal axis."""
        layer, first, total = self.layer, self.batch.first, max(self.batch.total, num_samples)
        axes: list[list[int | None]] = []
        for axis, wanted in zip(("channel", "temporal"), layer.forced, strict=True):
            if wanted is None:
                axes.append([None] * num_samples)
            elif isinstance(wanted, int):
                axes.append([layer.candidates.nearest(axis, wanted)] * num_samples)
            else:
                axes.append(layer.forced_candidates(axis, total)[first : first + num_samples])
        return axes

    def _weights(self, decisions: list[Decision], z: Tensor | None) -> GateWeights:
        """The weights that the layer itself would report: the gate's, or 1 for what was forced."""
        assert self.gate is not None
        candidates, found = self.layer.candidates, []
        gated = None if z is None else self.gate.weights(z, self.layer.config.normalize)
        sizes = (len(candidates.channels), len(candidates.strides))
        for axis, (size, wanted) in enumerate(zip(sizes, self._forced(len(decisions)), strict=True)):
            taken = torch.tensor([decision[axis] for decision in decisions], device=self.filter.weight.device)
            rows = one_hot(taken, size).to(self.layer.gate.beta.dtype)
            free = torch.tensor([index is None for index in wanted], device=rows.device)
            found.append(rows if gated is None else torch.where(free[:, None], gated[axis], rows))
        return GateWeights(*found)

    # -- compute ---------------------------------------------------------------------------------------

    def run(self, x: Value, residual: Value | None, decision: Decision, overwrite: bool = False) -> Value:
        """One decision for all samples of x."""
        if residual is not None and residual.shape != self._output_shape(x.shape):  # one of them is spread out
            y = full(self._run(x, None, decision, "none")) + full(residual)
            return ACTIVATIONS[self.activation](y)
        return self._run(x, residual, decision, self.activation, overwrite)

    def _output_shape(self, shape: torch.Size) -> torch.Size:
        if shape not in self._shapes:
            f = self.filter
            geometry = zip(shape[2:], f.kernel, f.stride, f.padding, f.dilation, strict=True)
            sizes = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry]
            self._shapes[shape] = torch.Size((shape[0], len(f.weight), *sizes))
        return self._shapes[shape]

    def _run(
        self, x: Value, residual: Value | None, decision: Decision, activation: str, overwrite: bool = False
    ) -> Value:
        i, j = decision.channel, decision.temporal
        found = self._convolution(x, i, j)
        if found is None:  # needs frames that are not held
            x = full(x)
            found = self._convolution(x, i, j)
        assert found is not None
        read, packed = found
        held = x.held if isinstance(x, Frames) else x
        filling = self._filling(j)
        frames = Frames(held, read.stride, read.num_frames)
        fits = residual is None or read.stride == 1 or frames.alike(residual)
        fuses = activation in ("relu", "none")
        if filling is None and fits:
            added = residual.held if isinstance(residual, Frames) and read.stride > 1 else residual
            gives = fuses if i else packed.gives_means()
            means = self._means(x.shape[0], -(-read.num_frames // read.stride)) if gives else None
            added = None if added is None else full(added)
            y = self._compute(held, read, packed, i, added, activation, overwrite, means)
            return y if read.stride == 1 and means is None else frames.replaced(y, means)
        y = to_rows(self._compute(held, read, packed, i, None, "none"))
        filling = filling or Filling.copies(read.stride, y)
        means = self._means(x.shape[0], read.num_frames) if fuses else None
        rows = None if residual is None else to_rows(full(residual))
        out = from_rows(filling(y, read.num_frames, rows, activation == "relu", means))
        out = out if fuses else ACTIVATIONS[activation](out)
        return out if means is None else Frames(out, 1, read.num_frames, means)

    def _means(self, num_clips: int, num_frames: int) -> Tensor | None:
        """Room for the mean over H and W of what comes out, where a gate will read it."""
        if not (self.feeds_mean or (self.feeds_gate and self.batch.gates_run)):
            return None
        weight = self.filter.weight
        return torch.zeros(num_clips, num_frames, len(weight), dtype=torch.float32, device=weight.device)

    def _convolution(self, x: Value, channel: int, temporal: int) -> tuple[Reading, PackedConv] | None:
        """What convolves x for a decision; None where all frames of x are needed."""
        held = x.stride if isinstance(x, Frames) else 1
        key = (channel, temporal, held, x.shape[2])
        if key not in self._convolutions:
            base = self._reduce(channel).filter if channel else self.folded
            skip = self.layer.candidates.strides[temporal] if self.gate is not None else 1
            read = reading(base, skip, x.shape[2], held, self._filling(temporal) is None)
            self._convolutions[key] = (read, self._pack(read.filter, _key(channel, read.filter))) if read else None
        return self._convolutions[key]

    def _pack(self, filter: Filter, key: str) -> PackedConv:
        """Kept by key: a convolution is packed once, however it is reached."""
        if key not in self._packs:
            self._packs[key] = PackedConv(
                filter, self.forms.get(key), images=self.dim == 2 and self.frames_per_sample == 1
            )
        return self._packs[key]

    def _compute(
        self,
        x: Tensor,
        read: Reading,
        packed: PackedConv,
        channel: int,
        residual: Tensor | None,
        activation: str,
        overwrite: bool = False,
        means: Tensor | None = None,
    ) -> Tensor:
        """The frames that are computed, with all channels, norm, residual and activation."""
        if not channel:
            return packed(read.padded(x), residual, activation, overwrite, means)
        reduced = self._reduce(channel)
        if reduced.inputs is not None:
            x = select(x, 1, reduced.inputs)
        y = packed(read.padded(x))
        rebuilt = None
        if reduced.cheap is not None:
            source = y if reduced.cheap_source is None else select(y, 1, reduced.cheap_source)
            rebuilt = to_rows(reduced.cheap(source))
        added = None if residual is None else to_rows(residual)
        out = from_rows(reduced.assembly(to_rows(y), rebuilt, added, activation == "relu", means))
        return out if activation == "relu" else ACTIVATIONS[activation](out)

    # -- what decisions need, made when they are first taken -------------------------------------------

    def _filling(self, temporal: int) -> Filling | None:
        """Phi_t behind the norm; None where it copies, or there is none.

        With ``y = scale * conv + shift``, ``w0 conv_s + w1 conv_(s+1) + b`` becomes
        ``w0 y_s + w1 y_(s+1) + scale b + shift (1 - w0 - w1)``.
        """
        if not temporal:
            return None
        if temporal not in self._fillings:
            phi = self.layer.cheap_t
            weight, bias = (each[temporal - 1].detach() for each in (phi.weights, phi.biases))
            found = None
            if not (bool((weight[:, 0] == 1).all()) and not weight[:, 1].any() and not bias.any()):
                shifted = self.scale * bias + self.shift * (1 - weight.sum(1))
                first = Filling.copies(1, weight)
                found = Filling(
                    torch.cat([first.weight, weight.float()]).contiguous(), torch.cat([first.bias, shifted.float()])
                )
            self._fillings[temporal] = found
        return self._fillings[temporal]

    def _reduce(self, channel: int) -> Reduced:
        if channel not in self._reduced:
            self._reduced[channel] = self._make_reduced(channel)
        return self._reduced[channel]

    def _make_reduced(self, channel: int) -> Reduced:
        rebuild, kept = self.layer.cheap_c, self.layer.candidates.channels[channel]
        order, op = rebuild.order, rebuild.op(channel)
        inputs = None
        if self.filter.groups > 1:
            outs, ins = len(order) // self.filter.groups, self.filter.weight.shape[1]
            groups = order[:kept:outs] // outs
            inputs = (groups[:, None] * ins + torch.arange(ins, device=order.device)).flatten()
        source = torch.arange(len(order), device=order.device)
        scale, shift = self.scale[order], self.shift[order]  # in ranks
        cheap = cheap_source = None
        dropped = slice(kept, None)
        weight, bias = op.weight.detach().to(scale.dtype), op.bias.detach().to(scale.dtype)
        if isinstance(op, Scale):
            source[dropped] = op.source
            scale, shift = scale.clone(), scale * 0 + shift
            shift[dropped] += scale[dropped] * bias
            scale[dropped] *= weight
        else:
            pad, groups_c = (0, 0, 0), 1
            if isinstance(op, Depthwise):
                cheap_source, pad, groups_c = op.source, (0, 1, 1), len(weight)
            assert isinstance(op, Pointwise | Depthwise)
            weight = (
                weight.view(len(weight), -1, 1, *weight.shape[2:])
                if weight.dim() == 4
                else weight[..., None, None, None]
            )
            cheap = self._pack(Filter(weight, bias, (1, 1, 1), pad, (1, 1, 1), groups_c), f"cheap {channel}")
        inverse = order.argsort()
        assembly = Assembly.build(source[inverse], scale[inverse], shift[inverse], kept)
        return Reduced(self.filter.pick(order[:kept]), inputs, cheap, cheap_source, assembly)


def _key(channel: int, filter: Filter) -> str:
    """Taps, stride and padding in time tell the convolutions of one candidate apart."""
    return f"{channel}: {filter.kernel[0]} taps, stride {filter.stride[0]}, padding {filter.padding[0]}"
