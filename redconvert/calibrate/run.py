"""Calibration: a closed-form start for the cheap operations, from a few batches without labels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..answers import in_backward
from ..convert.trace import trace
from ..errors import RedconvertError
from ..inputs import measuring, unwrapped
from ..layers import Decision, DynamicConv, dynamic_layers
from ..layers.absorb import pairs
from ..layers.modes import undone_on_error
from ..progress import progress_bar
from .absorb import AbsorbedMoments, start_absorbed
from .match import MatchedVariance
from .metric import AnswerMetric
from .mixtures import MixtureMoments
from .passes import Passes, Reduced, count_batches
from .reduced import ROWS_PER_CHANNEL, ReducedMoments
from .result import CalibratedLayer, Calibration
from .select import greedy_order, greedy_sources
from .solve import filter_metric, solve_channels, solve_frames, solve_inputs, solve_principal
from .statistics import ChannelMoments, FrameMoments, norm_slope, sum_over_processes

__all__ = ["calibrate"]

GATES: Reduced = (None, None)
STREAMS = 4  # reduced ones beside a dense one: more would hold more at once than the first pass, which differentiates
Explained: TypeAlias = tuple[tuple[float | None, ...], tuple[float | None, ...]]


def calibrate(
    dynamic: nn.Module,
    batches: Any,
    *,
    rounds: int = 0,
    match: bool = True,
    decisions: Literal["candidates", "gates"] = "candidates",
    importance: Literal["answers", "norms"] = "answers",
    ridge: float = 1e-3,
    progress: bool = False,
) -> Calibration:
    """Choose each layer's channels and solve for its cheap operations, in place. Open gates stay exact.

    The first pass collects the channel covariances of every layer at once. The order of channels is greedy:
    each next channel explains most of what is left, as far as it moves the answer: errors e of the channels cost
    ``E[(g . e)^2]``, g being gradients of the network's outputs along random directions. Ridge regression then gives
    Phi_c and Phi_t. But when every layer is reduced, each sees an input that the layers before have changed, and a
    regression shrinks what it predicts. So a last pass runs the network twice side by side, dense and with every
    layer at the candidate, and gives the rebuilt channels back the mean and variance of the dense network's, which
    the norms behind expect. Rounds before it regress the dense result on what the reduced network computes: errors
    are mended where they arise instead of adding up. So are those of mixtures of filters (``cheap="principal"``) and of
    weights that absorb channels, always, where gates decide.

    Args:
        dynamic: what `redconvert.convert` returned; torch.compile and DistributedDataParallel around it are left out.
        batches: unlabelled; an iterable that can be read ``1 + rounds`` times per candidate (a list, a
            DataLoader), or one batch. Under ``torch.distributed`` each process reads its own, as many as it has, and
            moments are summed: all processes end with the same numbers.
        rounds: of that correction. Worth it where nothing is matched or gates decide, and for mixtures of filters.
            Else, with every layer reduced and matched, they gained nothing on ResNet-56. 0 with ``match=False`` reads
            the batches once.
        match: whether, at the end, mean and variance are matched, and weights that absorb channels are solved for on
            patches of what the reduced network computes.
        decisions: what the reduced network computes in rounds and matching. "candidates": every layer at the same
            candidate, one after the other. "gates": what the gates decide, after `redconvert.set_budget` or
            training; channel orders then stay as they are, and so do candidates that hardly a sample takes.
        importance: what errors of the channels cost when they are chosen. "answers": what they do to the outputs,
            from one backward pass per batch, a few of each where there are few samples, for which the activations of
            a batch must fit into memory. "norms":
            ``(norm weight)^2 / variance`` of the norm that follows, without gradients.
        ridge: of the regressions, relative to the mean variance of the predictors; of those on patches the least that
            is tried.
        progress: show a bar on stderr (needs rich).

    Returns:
        What each candidate explains, per layer: a table of where the redundancy is.

    Raises:
        RedconvertError: no dynamic layers, no batches, a generator that would be read twice, activations that
            are not finite, or an error in another process; the network is then as it was.
    """
    dynamic = unwrapped(dynamic)
    layers = dynamic_layers(dynamic)
    if rounds < 0 or ridge < 0:
        raise RedconvertError(f"rounds={rounds} and ridge={ridge} must not be negative")
    if decisions not in ("candidates", "gates"):
        raise RedconvertError(f"decisions must be 'candidates' or 'gates', not {decisions!r}")
    if importance not in ("answers", "norms"):
        raise RedconvertError(f"importance must be 'answers' or 'norms', not {importance!r}")
    if (rounds or match) and isinstance(batches, Iterator):
        raise RedconvertError(
            "batches is an iterator, which can be read only once: pass a list or a DataLoader, or rounds=0, match=False"
        )
    start = time.perf_counter()
    run = _Run(dynamic, layers, batches, ridge, importance)
    reductions = run.candidates() if decisions == "candidates" else [GATES]
    matched = [reduced for reduced in reductions if match and reduced[0] != 0]
    mended = _mending([each for each in reductions if each[0] != 0], rounds, match, run)
    streams = [matched[i : i + STREAMS] for i in range(0, len(matched), STREAMS)]
    passes = (decisions == "candidates") + rounds * len(reductions) + len(mended) + len(streams)
    with (
        measuring(dynamic),
        undone_on_error(part for layer in layers.values() for part in layer.added_modules()),
        progress_bar(progress, "Calibrating", passes * count_batches(batches) or None) as run.passes.step,
    ):
        explained = run.first_pass() if decisions == "candidates" else {}
        for reduced in rounds * reductions:
            found = run.regress(reduced)
            explained = found if decisions == "gates" else explained
        for each in mended:
            run.mend(each)
        for together in streams:
            run.match(together)
    nothing = {layer: run.unknown(layer) for layer in layers.values()}
    return Calibration(
        type(dynamic).__name__,
        tuple(
            CalibratedLayer(
                name,
                layer.candidates.channels,
                layer.candidates.strides,
                *(nothing | explained)[layer],
                input_explained=run.kept.get(layer, ()),
            )
            for name, layer in layers.items()
        ),
        run.passes.samples,
        rounds,
        time.perf_counter() - start,
    )


class _Run:
    """One calibration: passes over the batches, with moments per layer."""

    def __init__(
        self, model: nn.Module, layers: dict[str, DynamicConv], batches: Any, ridge: float, importance: str
    ) -> None:
        self.layers, self.ridge = layers, ridge
        self.readers = {layers[source]: layers[reader] for source, reader in pairs(layers).items()}
        self.asides = [layer for layer in layers.values() if layer.aside]
        self.inputs = {layer: layer.mixed_in for layer in layers.values() if layer.mixed_in is not None}
        sizes: dict[nn.Module, int] = {layer: layer.out_channels for layer in layers.values()}
        sizes |= {mixed: layer.in_channels for layer, mixed in self.inputs.items()}
        asked = importance == "answers"
        self.metric = AnswerMetric(model, sizes, batches=count_batches(batches)) if asked else None
        self.passes = Passes(model, layers, batches, self.metric)
        modules, facts = dict(model.named_modules()), trace(model).facts
        norms = {layer: facts[name].norm if name in facts else None for name, layer in layers.items()}
        self.norms = {layer: modules.get(norm or "") for layer, norm in norms.items()}
        self.mixing = [layer for layer in layers.values() if layer.rebuilds and layer.cheap_c.is_principal]  # type: ignore[union-attr]
        shortcuts = {layer: facts[name].shortcut if name in facts else None for name, layer in layers.items()}
        changing = [*self.readers.values(), *self.asides, *self.mixing]
        self.shortcuts = {layer: modules.get(shortcuts[layer] or "") for layer in changing}
        self.kept: dict[DynamicConv, tuple[float, ...]] = {}  # by mixtures of inputs, as `solve_inputs` says
        # What a unit of variance of each channel is worth behind the norm that follows: weight^2 / variance.
        # Summed, since running statistics drift apart in data-parallel training, and the choice must be the same.
        self.importance = {
            layer: sum_over_processes(norm_slope(layer, norm).square()) for layer, norm in self.norms.items()
        }

    def candidates(self) -> list[Reduced]:
        """Every reduced candidate, one axis at a time."""
        each = [layer.candidates for layer in self.layers.values()]
        return [
            *((i, 0) for i in range(1, max(len(c.channels) for c in each))),
            *((0, j) for j in range(1, max(len(c.strides) for c in each))),
        ]

    @staticmethod
    def unknown(layer: DynamicConv) -> Explained:
        return (None,) * (len(layer.candidates.channels) - 1), (None,) * (len(layer.candidates.strides) - 1)

    def first_pass(self) -> dict[DynamicConv, Explained]:
        """Moments of the dense network; order, Phi_c and Phi_t from them; what they explain."""
        channels: dict[DynamicConv, ChannelMoments] = {}
        inputs: dict[DynamicConv, ChannelMoments] = {}
        frames: dict[DynamicConv, list[FrameMoments]] = {}
        for layer in self.layers.values():
            device, count = layer.weight.device, layer.out_channels
            if layer.cheap_c is not None:
                channels[layer] = ChannelMoments.empty(count, count, device)
            if layer in self.inputs:
                inputs[layer] = ChannelMoments.empty(layer.in_channels, layer.in_channels, device)
            frames[layer] = [FrameMoments.empty(s, count, device) for s in layer.candidates.strides[1:]]

        # Channels that are handed over count where they are missed: in the input of their reader.
        watched: dict[nn.Module, tuple[nn.Module, ChannelMoments]] = {
            **{reader: (layer, channels[layer]) for layer, reader in self.readers.items()},
            **{layer: (mixed, inputs[layer]) for layer, mixed in self.inputs.items()},
        }

        def add(layer: DynamicConv, out: Tensor) -> None:
            if layer in channels and layer.hands_to is None:
                channels[layer].add(out)
            clips = layer.as_clips(out, layer.frames_per_sample).detach()
            for moments in frames[layer]:
                moments.add(clips, clips)

        def collect(layer: DynamicConv, _: Tensor, out: Tensor, __: Any) -> Tensor | None:
            if not in_backward():
                add(layer, out)
            watched = self.metric is not None and layer in channels and layer.hands_to is None
            return self.metric.watch(layer, out) if watched else None  # type: ignore[union-attr]

        def collect_read(reader: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            key, moments = watched[reader]
            if not in_backward():
                moments.add(args[0])
            seen = None if self.metric is None else self.metric.watch(key, args[0])
            return None if seen is None else (seen, *args[1:])

        with ExitStack() as stack:
            for reader in watched:
                stack.callback(reader.register_forward_pre_hook(collect_read).remove)
            self.passes.run(collect, [])
        if self.metric is not None:
            self.metric.synchronize()
        self._finish(
            [*channels.items(), *inputs.items(), *((layer, each) for layer, all_ in frames.items() for each in all_)]
        )
        explained: dict[DynamicConv, Explained] = {}
        for layer in self.layers.values():
            by_channel = self._solve_layer(layer, channels[layer]) if layer in channels else ()
            by_frame = tuple(self._solve_frames(layer, j, moments) for j, moments in enumerate(frames[layer], start=1))
            explained[layer] = by_channel, by_frame
            if layer in inputs:
                self.kept[layer] = self._solve_inputs(layer, inputs[layer])
        return explained

    def _solve_inputs(self, layer: DynamicConv, moments: ChannelMoments) -> tuple[float, ...]:
        second = moments.within / moments.count  # not centred: what pads the borders is 0
        metric = filter_metric(layer.recipe.weight(layer), self.importance[layer])
        if self.metric is not None:
            metric = self.metric.weights(self.inputs[layer], metric, second)
        return solve_inputs(self.inputs[layer], second, metric)

    def _solve_layer(self, layer: DynamicConv, moments: ChannelMoments) -> tuple[float, ...]:
        cheap, weights = layer.cheap_c, self.importance[layer]
        assert cheap is not None
        if layer.hands_to is not None:
            weights = torch.ones_like(weights)  # the norm lies in front
        if self.metric is not None:
            weights = self.metric.weights(layer, weights, moments.covariance)
        choose = greedy_order if cheap.kinds[0] in ("pointwise", "principal", "none") else greedy_sources
        steps = cheap.channels[1] // (layer.out_channels // layer.groups if layer.groups > 1 else 1)
        cheap.set_order(choose(moments.covariance, weights, layer.groups, steps))
        if cheap.is_principal:
            worth, total = self.importance[layer], moments.target_variance
            lefts = solve_principal(cheap, moments, weights)
            return tuple(_share((left * worth).sum(), (total * worth).sum()) for left in lefts)
        return tuple(
            self._solve_channels(layer, i, moments.select(cheap.order[:kept], cheap.order[kept:]))
            for i, kept in enumerate(cheap.channels[1:], start=1)
        )

    def _solve_channels(self, layer: DynamicConv, index: int, moments: ChannelMoments) -> float:
        assert layer.cheap_c is not None
        weights = self.importance[layer][layer.cheap_c.dropped(index)]
        if layer in self.readers:
            weights = torch.ones_like(weights)
            left = start_absorbed(self.readers[layer], index, moments, self.ridge)
        else:
            left = solve_channels(layer.cheap_c.op(index), moments, self.ridge)
        return _share((left * weights).sum(), (moments.target_variance * weights).sum())

    def _solve_frames(self, layer: DynamicConv, index: int, moments: FrameMoments) -> float | None:
        assert layer.cheap_t is not None
        left, total = (solve_frames(layer.cheap_t, index, moments, self.ridge) * self.importance[layer]).sum((1, 2))
        return _share(left, total) if moments.has_data else None

    def regress(self, reduced: Reduced) -> dict[DynamicConv, Explained]:
        """Regress the dense network's results on what the reduced one computes."""
        found = {layer: ReducedMoments(layer) for layer in self.layers.values()}

        def collect(layer: DynamicConv, _: Tensor, out: Tensor, decisions: list[Decision]) -> None:
            dense, reduced = out.chunk(2)
            found[layer].add(dense, reduced, decisions)

        self.passes.run(collect, [reduced])
        self._finish([(layer, each) for layer, moments in found.items() for each in moments.all()])
        least = ROWS_PER_CHANNEL if reduced == GATES else 0
        explained = {}
        for layer, moments in found.items():
            channels, frames = (list(each) for each in self.unknown(layer))
            for i, by_channel in () if layer in self.mixing else moments.channels.items():  # those are mended
                if by_channel.count > least * len(by_channel.sum_x):
                    channels[i - 1] = self._solve_channels(layer, i, by_channel)
            for j, by_frame in moments.frames.items():
                if (by_frame.moments[..., 0, 0] > least).all():
                    frames[j - 1] = self._solve_frames(layer, j, by_frame)
            explained[layer] = tuple(channels), tuple(frames)
        return explained

    def mend(self, reduced: Reduced | None) -> None:
        """Solve for the weights of readers and for mixtures of filters: each behind those that are mended.

        None: for readers, of the dense network.
        """
        found: dict[DynamicConv, AbsorbedMoments | MixtureMoments] = {
            reader: AbsorbedMoments(
                reader, self.ridge, self.norms[reader], samples=self.passes.samples, dense=reduced is None
            )
            for reader in (*self.readers.values(), *self.asides)
        }
        if reduced is not None:
            mixing = (layer for layer in self.mixing if layer not in found)
            found |= {layer: MixtureMoments(layer, self.ridge, self.norms[layer]) for layer in mixing}
        heads, inputs = set(self.shortcuts.values()), dict[Any, Tensor]()

        def mend(layer: DynamicConv, x: Tensor, out: Tensor, decisions: list[Decision]) -> Tensor | None:
            if layer in heads:
                inputs[layer] = x  # an input of a residual block, which the block's last layer adds to its result
            if layer not in found:
                return None
            if reduced is not None:
                return found[layer].mend(x, out, decisions, inputs.pop(self.shortcuts[layer], None))
            found[layer].add_dense(x, out)  # type: ignore[union-attr]
            return None

        self.passes.run(mend, [] if reduced is None else [reduced], differentiating=False)
        self._finish(list(found.items()))
        for each in found.values():
            each.apply()

    def match(self, streams: list[Reduced]) -> None:
        """Give rebuilt channels the dense network's mean and variance, each layer behind those that are mended.

        One dense stream serves several reduced ones.
        """
        found = {layer: MatchedVariance(layer) for layer in self.layers.values() if layer.rebuilds}

        def mend(layer: DynamicConv, _: Tensor, out: Tensor, decisions: list[Decision]) -> Tensor | None:
            return found[layer].mend(out, [0 if d.blend else d.channel for d in decisions]) if layer in found else None

        self.passes.run(mend, streams)
        for each in found.values():
            each.apply()

    def _finish(self, moments: list[tuple[DynamicConv, Any]]) -> None:
        """Sum over processes, and look only then: all find the same, and raise alike."""
        for layer, each in moments:
            each.synchronize()
            if not each.is_finite:
                raise RedconvertError(
                    f"layer '{layer.layer_name}' gives NaN or infinite values on these batches: check inputs and "
                    f"weights"
                )


def _mending(reductions: list[Reduced], rounds: int, match: bool, run: _Run) -> list[Reduced | None]:
    """The passes that solve for readers and mixtures: of the dense network first, unless gates decide what is reduced.

    Where a budget will reduce some layers alone, that is what the others will see; with every layer reduced it is not,
    which is what rounds are for.
    """
    absorbs, gated = bool(run.readers) and match, reductions == [GATES]
    if not reductions or not (absorbs or (run.mixing and (match or rounds))):
        return []
    return [*([None] if absorbs and not gated else []), *(reductions if gated or rounds else [])]


def _share(left: Tensor, total: Tensor) -> float:
    return float(1 - left / total) if total > 0 else 1.0
