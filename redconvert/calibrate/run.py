"""Calibration: a closed-form start for the cheap operations, from a few batches without labels."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..convert import trace
from ..errors import RedconvertError
from ..inputs import call_with, device_of, each_batch, evaluating, move_to, tensors_in
from ..layers import DynamicConv, dynamic_layers, forced
from .select import greedy_order, greedy_sources
from .solve import solve_channels, solve_frames
from .statistics import ChannelMoments, FrameMoments

__all__ = ["CalibratedLayer", "Calibration", "calibrate"]


@dataclass(frozen=True)
class CalibratedLayer:
    """Where the redundancy is: what each candidate of a layer explains of what it does not compute.

    Attributes:
        name: of the layer.
        channels, frame_strides: its candidates.
        channel_explained: for each reduced channel candidate, the share of the dropped channels' variance,
            weighted as in the choice of channels, that Phi_c rebuilds from the kept ones of the same input.
        temporal_explained: for each reduced temporal candidate, the same for the skipped frames.
    """

    name: str
    channels: tuple[int, ...]
    frame_strides: tuple[int, ...]
    channel_explained: tuple[float, ...]
    temporal_explained: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What `redconvert.calibrate` did: ``print`` it, or go through ``layers``."""

    model: str
    layers: tuple[CalibratedLayer, ...]
    samples: int
    rounds: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':<{width}}  {'channels':>16}  explained        {'frames':>10}  explained"]
        for layer in self.layers:
            channels = "/".join(map(str, layer.channels)) if layer.channel_explained else "-"
            frames = "/".join(map(str, layer.frame_strides)) if layer.temporal_explained else "-"
            by_channel, by_frame = (
                " ".join(f"{share:6.1%}" for share in shares)
                for shares in (layer.channel_explained, layer.temporal_explained)
            )
            lines.append(f"{layer.name:<{width}}  {channels:>16}  {by_channel:<15}  {frames:>10}  {by_frame}".rstrip())
        lines.append(f"{self.samples} samples, {self.rounds} rounds, {self.seconds:.1f} s")
        return "\n".join(lines)


def calibrate(
    dynamic: nn.Module, batches: Any, *, rounds: int = 3, ridge: float = 1e-3, progress: bool = False
) -> Calibration:
    """Choose each layer's channels and solve for its cheap operations, in place. Open gates stay exact.

    The first pass collects the channel covariances of every layer at once. The order of channels is greedy:
    each next channel explains most of what is left, weighted by ``(norm weight)^2 / variance`` of the norm
    that follows. Ridge regression then gives Phi_c and Phi_t. But when every layer is reduced, each sees an
    input that the layers before have changed. So each round runs the network twice side by side, dense and
    with every layer at the candidate, and regresses the dense result on what the reduced network computes:
    errors are mended where they arise instead of adding up.

    Args:
        dynamic: what `redconvert.convert` returned.
        batches: unlabelled; an iterable that can be read ``1 + rounds`` times per candidate (a list, a
            DataLoader), or one batch. Under ``torch.distributed`` each process reads its own and moments are summed.
        rounds: of that correction; 0 reads the batches once.
        ridge: of the regressions, relative to the mean variance of the predictors.
        progress: show a bar (needs rich).

    Returns:
        What each candidate explains, per layer: a table of where the redundancy is.

    Raises:
        RedconvertError: no dynamic layers, no batches, a generator with ``rounds > 0``, or activations that
            are not finite; the network is then as it was.
    """
    layers = dynamic_layers(dynamic)
    if rounds < 0 or ridge < 0:
        raise RedconvertError(f"rounds={rounds} and ridge={ridge} must not be negative")
    if rounds and isinstance(batches, Iterator):
        raise RedconvertError(
            "batches is an iterator, which can be read only once: pass a list or a DataLoader, or rounds=0"
        )
    start = time.perf_counter()
    run = _Run(dynamic, layers, batches, ridge)
    with evaluating(dynamic), _undone_on_error(layers), _bar(progress, run.passes(rounds)) as step:
        explained = run.first_pass(step)
        run.rounds(rounds, step)
    return Calibration(
        type(dynamic).__name__,
        tuple(
            CalibratedLayer(name, layer.candidates.channels, layer.candidates.strides, *explained[layer])
            for name, layer in layers.items()
        ),
        run.samples,
        rounds,
        time.perf_counter() - start,
    )


class _Run:
    """One calibration: passes over the batches, with moments per layer."""

    def __init__(self, model: nn.Module, layers: dict[str, DynamicConv], batches: Any, ridge: float) -> None:
        self.model, self.layers, self.batches, self.ridge = model, layers, batches, ridge
        self.samples = 0
        modules, facts = dict(model.named_modules()), trace(model).facts
        norms = {layer: facts[name].norm if name in facts else None for name, layer in layers.items()}
        self.importance = {layer: _importance(layer, modules.get(norm or "")) for layer, norm in norms.items()}

    def passes(self, rounds: int) -> int:
        return 1 + rounds * len(self._reductions())

    def _reductions(self) -> list[tuple[str, int]]:
        """All reduced candidates: ("channel", 1), ..., ("temporal", 1), ..."""
        each = [layer.candidates for layer in self.layers.values()]
        return [
            *(("channel", i) for i in range(1, max(len(c.channels) for c in each))),
            *(("temporal", j) for j in range(1, max(len(c.strides) for c in each))),
        ]

    def first_pass(self, step: Any) -> dict[DynamicConv, tuple[tuple[float, ...], tuple[float, ...]]]:
        """Moments of the dense network; order, Phi_c and Phi_t from them; what they explain."""
        channels: dict[DynamicConv, ChannelMoments] = {}
        frames: dict[DynamicConv, list[FrameMoments]] = {}
        for layer in self.layers.values():
            device, count = layer.weight.device, layer.out_channels
            if layer.cheap_c is not None:
                channels[layer] = ChannelMoments.empty(count, count, device)
            frames[layer] = [FrameMoments.empty(s, count, device) for s in layer.candidates.strides[1:]]

        def collect(layer: DynamicConv, out: Tensor) -> None:
            if layer in channels:
                channels[layer].add(out)
            clips = layer.as_clips(out, layer.frames_per_sample)
            for moments in frames[layer]:
                moments.add(clips, clips)

        self._pass(collect, None)
        step()
        self._finish([*channels.items(), *((layer, each) for layer, all_ in frames.items() for each in all_)])
        explained = {}
        for layer in self.layers.values():
            by_channel = self._solve_layer(layer, channels[layer]) if layer in channels else ()
            by_frame = []
            for j, moments in enumerate(frames[layer], start=1):
                assert layer.cheap_t is not None
                left, total = (solve_frames(layer.cheap_t, j, moments, self.ridge) * self.importance[layer]).sum((1, 2))
                by_frame.append(_share(left, total))
            explained[layer] = by_channel, tuple(by_frame)
        return explained

    def _solve_layer(self, layer: DynamicConv, moments: ChannelMoments) -> tuple[float, ...]:
        cheap, weights = layer.cheap_c, self.importance[layer]
        assert cheap is not None
        choose = greedy_order if cheap.kinds[0] == "pointwise" else greedy_sources
        steps = cheap.channels[1] // (layer.out_channels // layer.groups if layer.groups > 1 else 1)
        cheap.set_order(choose(moments.covariance, weights, layer.groups, steps))
        shares = []
        for i, kept in enumerate(cheap.channels[1:], start=1):
            chosen = moments.select(cheap.order[:kept], cheap.order[kept:])
            left, dropped = solve_channels(cheap.op(i), chosen, self.ridge), weights[cheap.order[kept:]]
            shares.append(_share((left * dropped).sum(), (chosen.target_variance * dropped).sum()))
        return tuple(shares)

    def rounds(self, count: int, step: Any) -> None:
        for _ in range(count):
            for axis, index in self._reductions():
                self._correct(axis, index)
                step()

    def _correct(self, axis: str, index: int) -> None:
        """Regress the dense network's results on what the network reduced to this candidate computes."""
        moments: dict[DynamicConv, Any] = {}
        for layer in self.layers.values():
            candidates, device = layer.candidates, layer.weight.device
            if axis == "channel" and index < len(candidates.channels):
                kept = candidates.channels[index]
                moments[layer] = ChannelMoments.empty(kept, layer.out_channels - kept, device)
            if axis == "temporal" and index < len(candidates.strides):
                moments[layer] = FrameMoments.empty(candidates.strides[index], layer.out_channels, device)

        def collect(layer: DynamicConv, out: Tensor) -> None:
            if layer not in moments:
                return
            dense, reduced = out.chunk(2)
            if layer.cheap_c is not None and axis == "channel":
                cheap = layer.cheap_c
                moments[layer].add(reduced[:, cheap.kept(index)], dense[:, cheap.dropped(index)])
            else:
                frames = layer.frames_per_sample
                moments[layer].add(layer.as_clips(reduced, frames), layer.as_clips(dense, frames))

        self._pass(collect, (axis, index))
        self._finish(list(moments.items()))
        for layer, found in moments.items():
            if axis == "channel":
                assert layer.cheap_c is not None
                solve_channels(layer.cheap_c.op(index), found, self.ridge)
            else:
                assert layer.cheap_t is not None
                solve_frames(layer.cheap_t, index, found, self.ridge)

    def _pass(self, collect: Any, reduced: tuple[str, int] | None) -> None:
        """Run all batches; ``collect(layer, out)`` sees every layer's result, the reduced half second."""
        handles = []
        for layer in self.layers.values():
            handles.append(layer.register_forward_hook(lambda module, _, out: collect(module, out)))
        try:
            for batch in each_batch(self.batches):
                inputs = move_to(batch, device_of(self.model))
                count = self._count(inputs)
                decisions: dict[str, Any] = {"channel": 0, "temporal": 0}
                if reduced is not None:
                    decisions[reduced[0]] = [0] * count + [reduced[1]] * count
                    inputs = _twice(inputs)
                else:
                    self.samples += count
                with forced(self.model, **decisions):
                    call_with(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, inputs: Any) -> int:
        """Samples of a batch: rows, or clips where the layers take frames in the batch."""
        layer = next(iter(self.layers.values()))
        return tensors_in(inputs)[0].shape[0] // layer.frames_per_sample

    def _finish(self, moments: list[tuple[DynamicConv, Any]]) -> None:
        for layer, each in moments:
            each.synchronize()
            if not each.is_finite:
                raise RedconvertError(
                    f"layer '{layer.layer_name}' gives NaN or infinite values on these batches: check inputs and "
                    f"weights"
                )


def _importance(layer: DynamicConv, norm: nn.Module | None) -> Tensor:
    """What a unit of variance of each channel is worth behind the norm that follows: ``weight^2 / variance``."""
    ones = torch.ones(layer.out_channels, dtype=torch.float64, device=layer.weight.device)
    variance = getattr(norm, "running_var", None)
    if not isinstance(variance, Tensor) or len(variance) != layer.out_channels:
        return ones
    weight = getattr(norm, "weight", None)
    scale = weight.detach().double().square() if isinstance(weight, Tensor) else ones
    return scale / (variance.double() + norm.eps)  # type: ignore[union-attr, operator]


def _share(left: Tensor, total: Tensor) -> float:
    return float(1 - left / total) if total > 0 else 1.0


def _twice(inputs: Any) -> Any:
    """Every tensor of the inputs, twice along the batch axis."""
    return tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf, inputs)


@contextmanager
def _undone_on_error(layers: dict[str, DynamicConv]) -> Iterator[None]:
    """Whatever stops a calibration, the cheap operations are then what they were before it."""
    parts = [part for layer in layers.values() for part in (layer.cheap_c, layer.cheap_t) if part is not None]
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    try:
        yield
    except BaseException:
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)
        raise


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Any]:
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("Calibrating", total=total)
        yield lambda: bar.advance(task)
