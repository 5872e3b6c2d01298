"""ReducedMoments: with constant decisions the regressions of calibration, else each candidate from its own samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redconvert import DynamicConv2d, DynamicConv3d, LayerConfig, calibrate, disabled, forced, observed
from redconvert.calibrate.reduced import ReducedMoments
from redconvert.calibrate.solve import solve_channels, solve_frames
from redconvert.calibrate.statistics import ChannelMoments, FrameMoments
from redconvert.layers import Decision, DynamicConv

F64, CPU = torch.float64, torch.device("cpu")
KINDS: dict[str, Any] = {
    "2d": (lambda config: DynamicConv2d(3, 8, 3, config=config), (6, 3, 9, 9)),
    "3d": (lambda config: DynamicConv3d(3, 8, 3, padding=1, config=config), (6, 3, 9, 7, 7)),
    "folded": (lambda config: DynamicConv2d(3, 8, 3, config=config, num_frames=5), (30, 3, 8, 8)),
    "groups": (lambda config: DynamicConv3d(4, 8, 3, padding=1, groups=4, config=config), (6, 4, 9, 7, 7)),
}


def build(kind: str, **options: Any) -> tuple[DynamicConv, Tensor, Tensor]:
    """A layer with random cheap operations, an input, and what reductions before the layer have made of it."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layer = make(LayerConfig(search_space=3, gate_hidden=8, **options)).double().eval()
    size = layer.out_channels // layer.groups if layer.groups > 1 else 1
    blocks = torch.arange(layer.out_channels).view(-1, size)
    with torch.no_grad():
        for parameter in layer.cheap_parameters():
            parameter.normal_()
        layer.cheap_c.set_order(blocks[torch.randperm(len(blocks))].flatten())
    x = torch.randn(shape, dtype=F64) + 1
    return layer, x, x + 0.5 * torch.randn(shape, dtype=F64)


@torch.no_grad()
def run(layer: DynamicConv, x: Tensor, changed: Tensor) -> tuple[Tensor, Tensor, list[Decision]]:
    """Dense results, reduced ones under the present modes, and decisions."""
    seen: list[Any] = []
    with disabled(layer):
        dense = layer(x)
    with observed(layer, lambda _, each: seen.append(each)):
        reduced = layer(changed)
    return dense, reduced, seen[0].decisions


def refined(layer: DynamicConv, *results: tuple[Tensor, Tensor, list[Decision]]) -> DynamicConv:
    """A copy, its cheap operations solved from whatever there is."""
    new = copy.deepcopy(layer)
    moments = ReducedMoments(new)
    for result in results:
        moments.add(*result)
    for i, each in moments.channels.items():
        if each.count:
            solve_channels(new.cheap_c.op(i), each, 1e-3)
    for j, each in moments.frames.items():
        if each.has_data:
            solve_frames(new.cheap_t, j, each, 1e-3)
    return new


def parts(layer: DynamicConv) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in layer.named_parameters() if "cheap" in name}


def changed_parts(one: DynamicConv, other: DynamicConv) -> set[str]:
    """As "c1" for Phi_c of channel candidate 1, "t2" for Phi_t of temporal candidate 2."""
    before, found = parts(one), set()
    for name, value in parts(other).items():
        if not torch.equal(value, before[name]):
            axis, number = name.removeprefix("cheap_").split(".")[0], next(p for p in name.split(".") if p.isdigit())
            found.add(f"{axis}{int(number) + 1}")
    return found


def clips(layer: DynamicConv, y: Tensor) -> Tensor:
    return y if y.dim() == 5 else y.unflatten(0, (-1, layer.num_frames or 1)).transpose(1, 2)


def hand_solved(layer: DynamicConv, dense: Tensor, reduced: Tensor, channel: int, temporal: int) -> DynamicConv:
    """The regressions of one decision, from moments that are collected here."""
    new = copy.deepcopy(layer)
    dense, reduced = clips(layer, dense), clips(layer, reduced)
    stride, order = 2**temporal, layer.cheap_c.order
    if channel:
        kept = layer.candidates.channels[channel]
        moments = ChannelMoments.empty(kept, layer.out_channels - kept, CPU)
        for t in range(0, dense.shape[2], stride):
            moments.add(reduced[:, order[:kept], t], dense[:, order[kept:], t])
        solve_channels(new.cheap_c.op(channel), moments, 1e-3)
    if temporal:
        frames = FrameMoments.empty(stride, layer.out_channels, CPU)
        frames.add(reduced, dense)
        solve_frames(new.cheap_t, temporal, frames, 1e-3)
    return new


def close(one: DynamicConv, other: DynamicConv) -> bool:
    return all(torch.allclose(value, parts(other)[name], rtol=1e-8) for name, value in parts(one).items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cheap", ["pointwise", "scale", "depthwise"])
@pytest.mark.parametrize(("channel", "temporal"), [(1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (2, 1)])
def test_constant_decisions(kind, cheap, channel, temporal):
    if kind == "2d":
        temporal = 0  # it has no time
        channel = channel or 1
    layer, x, changed = build(kind, cheap=cheap)
    with forced(layer, channel=channel, temporal=temporal):
        results = run(layer, x, changed)
    found = refined(layer, results)
    assert close(found, hand_solved(layer, *results[:2], channel, temporal))
    wanted = {name for name, index in ((f"c{channel}", channel), (f"t{temporal}", temporal)) if index}
    assert changed_parts(layer, found) == wanted
    with torch.no_grad(), forced(found, channel=channel, temporal=temporal):
        assert (found(changed) - results[0]).square().mean() < (results[1] - results[0]).square().mean()


def test_channels_are_learned_from_computed_frames_alone():
    """What Phi_t put into the other frames does not matter to Phi_c."""
    layer, x, changed = build("3d")
    with forced(layer, channel=1, temporal=1):
        dense, reduced, decisions = run(layer, x, changed)
    found = refined(layer, (dense, reduced, decisions))
    for y in (dense, reduced):
        y[:, :, 1::2] = 1e3 * torch.randn_like(y[:, :, 1::2])
    again = refined(layer, (dense, reduced, decisions))
    assert all(
        torch.equal(value, parts(again)[name]) for name, value in parts(found).items() if name.startswith("cheap_c")
    )
    assert not close(found, again)  # but the skipped frames are what Phi_t is to return


def test_mixed_decisions_are_told_apart():
    layer, x, changed = build("folded")
    channel, temporal = [0, 1, 2, 1, 0, 1], [0, 1, 0, 0, 1, 2]
    with forced(layer, channel=channel, temporal=temporal):
        results = run(layer, x, changed)
    found = refined(layer, results)
    assert changed_parts(layer, found) == {"c1", "c2", "t1", "t2"}
    dense, reduced = clips(layer, results[0]), clips(layer, results[1])
    order, wanted = layer.cheap_c.order, copy.deepcopy(layer)
    for i, rows in ((1, {1: 2, 3: 1, 5: 4}), (2, {2: 1})):
        kept = layer.candidates.channels[i]
        moments = ChannelMoments.empty(kept, 8 - kept, CPU)
        for row, stride in rows.items():
            moments.add(reduced[[row]][:, order[:kept], ::stride], dense[[row]][:, order[kept:], ::stride])
        solve_channels(wanted.cheap_c.op(i), moments, 1e-3)
    for j, rows in ((1, [1, 4]), (2, [5])):
        frames = FrameMoments.empty(2**j, 8, CPU)
        frames.add(reduced[rows], dense[rows])
        solve_frames(wanted.cheap_t, j, frames, 1e-3)
    assert close(found, wanted)


def test_batches_add_up():
    layer, x, changed = build("3d")
    with forced(layer, channel=1, temporal=2):
        whole = run(layer, x, changed)
    halves = [(whole[0][rows], whole[1][rows], whole[2][rows]) for rows in (slice(0, 2), slice(2, 6))]
    assert close(refined(layer, whole), refined(layer, *halves))
    assert len(ReducedMoments(layer).all()) == 4


def test_what_nobody_took_stays():
    layer, x, changed = build("3d")
    with forced(layer, channel=0, temporal=0):
        assert changed_parts(layer, refined(layer, run(layer, x, changed))) == set()
    with forced(layer, channel=[None] * 6, temporal=[None] * 6):  # gates at birth: everything
        assert changed_parts(layer, refined(layer, run(layer, x, changed))) == set()
    with forced(layer, channel=1, temporal=2):
        short = run(layer, x[:, :, :4], changed[:, :, :4])  # no frame has neighbours on both sides
        assert changed_parts(layer, refined(layer, short)) == {"c1"}


def decide(layer: DynamicConv, channel: int, temporal: int) -> None:
    """Gates that open this candidate for every input."""
    layer.gate.threshold.fill_(100)
    for axis, index in (("channel", channel), ("temporal", temporal)):
        layer.gate.thresholds(axis)[index] = -100


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
def test_calibration_where_gates_decide(folded):
    """A round is the regression of every layer's dense results on those of the network that the gates reduce."""
    torch.manual_seed(0)
    config = LayerConfig(search_space=3, gate_hidden=8)
    if folded:
        layers = [DynamicConv2d(c, 8, 3, padding=1, config=config, num_frames=5) for c in (3, 8)]
        x = torch.randn(20, 3, 6, 6, dtype=F64)
    else:
        layers = [DynamicConv3d(c, 8, 3, padding=1, config=config) for c in (3, 8)]
        x = torch.randn(4, 3, 5, 6, 6, dtype=F64)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).double().eval()
    decisions = [(1, 1), (2, 0)]
    results: list[list[Tensor]] = [[], []]
    for layer, decision, found in zip(layers, decisions, results, strict=True):
        decide(layer, *decision)
        layer.register_forward_hook(lambda module, args, out, found=found: found.append(out))
    with disabled(model):
        model(x)
    model(x)
    wanted = [hand_solved(layer, *found, *each) for layer, found, each in zip(layers, results, decisions, strict=True)]
    before = [copy.deepcopy(layer) for layer in layers]
    calibrate(model, [x], decisions="gates", rounds=1, match=False)
    assert close(layers[0], wanted[0]) and close(layers[1], wanted[1])
    assert changed_parts(before[0], layers[0]) == {"c1", "t1"} and changed_parts(before[1], layers[1]) == {"c2"}


@torch.no_grad()
@pytest.mark.parametrize(("size", "enough"), [(3, False), (4, True)])
def test_calibration_waits_for_enough_positions(size, enough):
    """More than ten per predictor: 4 channels and 3 computed frames of 3x3, or 4x4, positions."""
    layer = build("3d")[0]
    model, before = nn.Sequential(layer), copy.deepcopy(layer)
    decide(layer, 1, 1)
    x = torch.randn(1, 3, 5, size, size, dtype=F64)
    calibrate(model, [x], decisions="gates", rounds=1, match=False)
    assert changed_parts(before, layer) == ({"c1", "t1"} if enough else {"t1"})


def test_mixtures_of_a_soft_gate_are_left_out():
    layer, x, changed = build("3d", gate="soft")
    with torch.no_grad():
        layer.gate.beta.fill_(0.5)
        nn.init.normal_(layer.gate.fc2.weight, std=0.01)
    results = run(layer, x, changed)
    assert all(decision.blend for decision in results[2])
    assert changed_parts(layer, refined(layer, results)) == set()
    with forced(layer, channel=[1, 1, 1, None, None, None], temporal=[0, 0, 0, None, None, None]):
        mixed = run(layer, x, changed)
    with forced(layer, channel=1, temporal=0):
        alone = run(layer, x[:3], changed[:3])
    assert close(refined(layer, mixed), refined(layer, alone))


@pytest.mark.parametrize("axis", ["channel", "temporal"])
def test_layers_with_one_axis(axis):
    other = "temporal" if axis == "channel" else "channel"
    torch.manual_seed(0)
    layer = DynamicConv3d(3, 8, 3, padding=1, config=LayerConfig(**{other: False})).double().eval()
    x = torch.randn(4, 3, 6, 7, 7, dtype=F64)
    with forced(layer, **{axis: 1}):
        results = run(layer, x, 2 * x)
    moments = ReducedMoments(layer)
    assert len(moments.all()) == 1
    assert changed_parts(layer, refined(layer, results)) == {"c1" if axis == "channel" else "t1"}
