"""disabled, forced and observed: what they do, and that they put everything back."""

from __future__ import annotations

import copy

import pytest
import torch
import traps
from networks import equal, run, snapshot, unchanged
from torch import nn

import redconvert
from redconvert import disabled, forced, observed
from redconvert.layers import dynamic_layers

torch.manual_seed(0)
CLIP = torch.randn(traps.X3)


@pytest.fixture
def pair():
    """A network, and its conversion with gates and cheap operations at random."""
    model = nn.Sequential(traps.conv3(), nn.BatchNorm3d(16), nn.ReLU(), nn.Dropout(), traps.conv3(16, 16), nn.ReLU())
    dynamic = redconvert.convert(model, example_inputs=CLIP)
    for layer in dynamic_layers(dynamic).values():
        for part in layer.added_modules():
            for parameter in part.parameters():
                nn.init.normal_(parameter)
        layer.gate.beta.data.fill_(-1)
    return model, dynamic


def test_disabled_is_the_original_to_the_bit(pair):
    model, dynamic = pair
    assert not equal(run(dynamic, CLIP), run(model, CLIP))
    with disabled(dynamic) as teacher:
        assert teacher is dynamic
        assert equal(run(dynamic, CLIP), run(model, CLIP))
        assert equal(run(copy.deepcopy(dynamic), CLIP, training=True), run(copy.deepcopy(model), CLIP, training=True))
    assert not equal(run(dynamic, CLIP), run(model, CLIP))


@pytest.mark.parametrize(
    "mode",
    [
        disabled,
        lambda model: forced(model, channel=1),
        lambda model: forced(model, channel=[0, 1], temporal=torch.tensor([1, 0])),
        lambda model: observed(model, lambda layer, seen: None),
    ],
)
def test_everything_is_put_back(pair, mode):
    _, dynamic = pair
    before, wanted = snapshot(dynamic), run(dynamic, CLIP)
    with mode(dynamic):
        pass
    with pytest.raises(ZeroDivisionError), mode(dynamic):
        raise ZeroDivisionError
    with mode(dynamic), mode(dynamic):
        inner = run(dynamic, CLIP)
    with mode(dynamic):
        assert equal(run(dynamic, CLIP), inner)
    before["rng"] = torch.get_rng_state()
    assert unchanged(dynamic, before) and equal(run(dynamic, CLIP), wanted)


def test_nesting(pair):
    model, dynamic = pair
    with forced(dynamic, channel=1, temporal=1):
        cheapest = run(dynamic, CLIP)
        with forced(dynamic, channel=0, temporal=0):
            assert equal(run(dynamic, CLIP), run(model, CLIP))
        assert equal(run(dynamic, CLIP), cheapest)
        with disabled(dynamic):
            assert equal(run(dynamic, CLIP), run(model, CLIP))
        assert equal(run(dynamic, CLIP), cheapest)
        with pytest.raises(redconvert.RedconvertError), forced(dynamic, channel=7):
            pass
        assert equal(run(dynamic, CLIP), cheapest)


def test_one_axis_is_left_to_the_gates(pair):
    _, dynamic = pair
    seen = []
    with observed(dynamic, lambda layer, observation: seen.append(observation)):
        run(dynamic, CLIP)
        with forced(dynamic, channel=0):
            run(dynamic, CLIP)
    free, half = seen[0], seen[2]
    assert [d.temporal for d in half.decisions] == [d.temporal for d in free.decisions]
    assert torch.equal(half.weights.temporal, free.weights.temporal)
    assert [d.channel for d in half.decisions] == [0, 0]


def test_per_sample(pair):
    _, dynamic = pair
    singles = []
    for sample, (channel, temporal) in enumerate([(1, 0), (0, 1)]):
        with forced(dynamic, channel=channel, temporal=temporal):
            singles.append(run(dynamic, CLIP[sample : sample + 1])["out"])
    with forced(dynamic, channel=[1, 0], temporal=[0, 1]):
        assert torch.allclose(run(dynamic, CLIP)["out"], torch.cat(singles), rtol=1e-4, atol=1e-5)


FOUR = torch.randn(4, *traps.X3[1:]) + torch.randn(4, 3, 1, 1, 1)


@pytest.mark.parametrize(
    ("channel", "temporal"),
    [([1, None, 0, None], None), ([None, 1, 1, 0], [0, None, 1, None]), (0, [None, None, 1, 0]), ([None] * 4, 1)],
)
def test_samples_that_are_left_to_their_gates(pair, channel, temporal):
    """What each sample returns alone, forced or free."""
    _, dynamic = pair
    alone, decisions = [], []
    rows = [[index] * 4 if not isinstance(index, list) else index for index in (channel, temporal)]
    with observed(dynamic, lambda layer, seen: decisions.append(seen.decisions)):
        for sample, (i, j) in enumerate(zip(*rows, strict=True)):
            with forced(dynamic, channel=i, temporal=j):
                alone.append(run(dynamic, FOUR[sample : sample + 1])["out"])
        with forced(dynamic, channel=channel, temporal=temporal):
            together = run(dynamic, FOUR)["out"]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    single = [[each for [each] in decisions[layer:8:2]] for layer in (0, 1)]
    assert decisions[8:] == single
    for layer in single:
        for axis, wanted in enumerate(rows):
            assert all(index in (None, decision[axis]) for index, decision in zip(wanted, layer, strict=True))


def test_all_left_to_the_gates_is_no_mode_at_all(pair):
    _, dynamic = pair
    wanted = run(dynamic, FOUR)
    with forced(dynamic, channel=[None] * 4, temporal=[None] * 4):
        assert equal(run(dynamic, FOUR), wanted)
    with forced(dynamic, channel=[None] * 4):
        assert equal(run(dynamic, FOUR), wanted)


def test_weights_of_free_and_forced_samples(pair):
    """Free ones are the gate's, with its gradient; forced ones are 0 and 1, without."""
    _, dynamic = pair
    layer, seen = dynamic[0], []
    with observed(layer, lambda _, observation: seen.append(observation.weights)):
        layer(FOUR)
        with forced(layer, channel=[None, 1, None, 0], temporal=[1, None, None, None]):
            layer(FOUR)
    free, mixed = seen
    assert torch.equal(mixed.channel[[0, 2]], free.channel[[0, 2]])
    assert torch.equal(mixed.temporal[1:], free.temporal[1:])
    assert mixed.channel[[1, 3]].tolist() == [[0, 1], [1, 0]] and mixed.temporal[0].tolist() == [0, 1]
    for rows, reached in (([1, 3], False), ([0, 2], True)):
        (gradient,) = torch.autograd.grad(mixed.channel[rows, 0].sum(), layer.gate.beta, retain_graph=True)
        assert bool(gradient.any()) == reached


def test_frames_in_the_batch_are_forced_by_the_clip():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    x = torch.randn(8, 3, 8, 8)
    config = redconvert.ConvertConfig(num_frames=4, search_space=3, rules=[("*", {})])
    dynamic = redconvert.convert(model, config, example_inputs=x)
    seen = []
    with observed(dynamic, lambda layer, observation: seen.append([tuple(d)[:2] for d in observation.decisions])):
        with forced(dynamic, channel=[None, 2], temporal=[1, None]):
            run(dynamic, x)
        message = "8 channel candidates for 2 samples"
        with pytest.raises(redconvert.RedconvertError, match=message), forced(dynamic, channel=[None] * 8):
            run(dynamic, x)
    assert seen == [[(0, 1), (2, 0)]] * 2


@pytest.mark.parametrize("wrong", [[None, -1], [None, 2], [None, "1"], [0.5, None], []])
def test_lists_that_are_refused(pair, wrong):
    _, dynamic = pair
    with pytest.raises(redconvert.RedconvertError, match="forced"), forced(dynamic, channel=wrong):
        pass
    message = "3 temporal candidates for 4 samples"
    with pytest.raises(redconvert.RedconvertError, match=message), forced(dynamic, temporal=[None, 1, None]):
        run(dynamic, FOUR)


def test_observed(pair):
    _, dynamic = pair
    names = {layer: name for name, layer in dynamic_layers(dynamic).items()}
    first, second = [], []
    with observed(dynamic, lambda layer, seen: first.append((names[layer], seen))):
        run(dynamic, CLIP)
        with observed(dynamic, lambda layer, seen: second.append(names[layer])):
            run(dynamic, CLIP)
    run(dynamic, CLIP)
    assert [name for name, _ in first] == ["0", "4", "0", "4"] and second == ["0", "4"]
    seen = first[1][1]
    assert seen.input_shape == (2, 16, 4, 8, 8) and seen.output_shape == (2, 16, 4, 8, 8)
    assert seen.weights.channel.shape == (2, 2) and len(seen.decisions) == 2


def test_observed_weights_carry_their_graph(pair):
    _, dynamic = pair
    seen = []
    with observed(dynamic, lambda layer, observation: seen.append(observation.weights.channel)):
        dynamic.train()(CLIP)
    seen[0][:, 0].sum().backward()
    assert dynamic[0].gate.beta.grad.abs().max() > 0
