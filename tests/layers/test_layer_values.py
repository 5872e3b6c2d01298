"""Every candidate of every kind of convolution, against loops over a full convolution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import build, expected, is_choice, randomize, reference, relative_error, specs

from redconvert import LayerConfig, RedconvertError, forced

EXACT = 1e-10  # float64
CLOSE = 1e-4  # float32

properties = settings(max_examples=150, deadline=None, derandomize=True)


@properties
@given(spec=specs(), seed=st.integers(0, 99))
def test_at_birth_equal_to_the_bit(spec, seed):
    assume(is_choice(spec))
    layer, plain, x = build(spec, seed)
    with torch.no_grad():
        wanted = plain(x)
        assert torch.equal(layer.train()(x), wanted)
        assert torch.equal(layer.eval()(x), wanted)
    x.requires_grad_()
    assert torch.equal(layer.train()(x), wanted)
    layer.feeds_norm = True
    assert torch.equal(layer(x), wanted)


@properties
@given(spec=specs(), seed=st.integers(0, 99))
@torch.no_grad()
def test_every_forced_candidate(spec, seed):
    assume(is_choice(spec))
    layer, plain, x = build({**spec, "dtype": torch.float64}, seed)
    randomize(layer)
    layer.gate.norm.eval()
    for i in range(len(layer.candidates.channels)):
        for j in range(len(layer.candidates.strides)):
            wanted = reference(layer, plain, x, i, j)
            with forced(layer, channel=i, temporal=j):
                assert relative_error(layer.eval()(x), wanted) < EXACT
                layer.train()
                assert relative_error(layer(x), wanted) < EXACT
                layer.feeds_norm = True
                assert relative_error(layer(x), wanted) < EXACT
                layer.feeds_norm = False


@properties
@given(spec=specs(), seed=st.integers(0, 99))
@torch.no_grad()
def test_forced_candidates_in_float32(spec, seed):
    assume(is_choice(spec))
    layer, plain, x = build(spec, seed)
    randomize(layer).eval()
    for i in range(len(layer.candidates.channels)):
        for j in range(len(layer.candidates.strides)):
            with forced(layer, channel=i, temporal=j):
                assert relative_error(layer(x), reference(layer, plain, x, i, j)) < CLOSE


@properties
@given(spec=specs(), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float64]))
@torch.no_grad()
def test_mixed_decisions_equal_one_by_one(spec, seed, dtype):
    assume(is_choice(spec))
    layer, _, x = build({**spec, "dtype": dtype}, seed)
    randomize(layer).eval()
    together = layer(x)
    frames = spec.get("num_frames") or 1
    alone = torch.cat([layer(clip) for clip in x.split(frames)])
    assert relative_error(together, alone) < (EXACT if dtype == torch.float64 else CLOSE)


@properties
@given(spec=specs(), seed=st.integers(0, 99), normalize=st.booleans())
@torch.no_grad()
def test_own_gates_in_training_and_inference(spec, seed, normalize):
    assume(is_choice(spec))
    config = LayerConfig(**{**spec["config"].to_dict(), "normalize": normalize})
    layer, plain, x = build({**spec, "config": config, "dtype": torch.float64}, seed)
    randomize(layer)
    wanted = expected(layer, plain, x)
    assert relative_error(layer.eval()(x), wanted) < EXACT
    layer.train().gate.norm.eval()
    assert relative_error(layer(x), wanted) < EXACT
    layer.feeds_norm = True
    assert relative_error(layer(x), wanted) < EXACT


def test_the_specs_reach_mixed_decisions():
    """The properties above mean something only if their gates disagree."""
    decisions = set()
    for gate in ("hard", "soft"):
        config = LayerConfig(search_space=3, gate=gate)
        layer, _, x = build(
            {"dims": 3, "shape": (16, 3, 5, 4, 4), "in_channels": 3, "out_channels": 8}
            | {"kernel_size": 3, "padding": 1, "config": config}
        )
        layer.observers = (lambda _, seen: decisions.update(seen.decisions),)
        randomize(layer).eval()(x)
    assert len({d for d in decisions if not d.blend}) >= 4
    assert len({d for d in decisions if d.blend}) >= 3


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1)])
@torch.no_grad()
def test_frames_folded_into_the_batch(frames, kernel):
    """A 2D layer with num_frames is the 3D one whose kernel is one frame deep."""
    config = LayerConfig(search_space=3, cheap="depthwise")
    padding = 1 if kernel[0] == 1 else 0
    layer, _, x = build(
        {"dims": 2, "shape": (3 * frames, 3, 6, 5), "in_channels": 3, "out_channels": 7, "kernel_size": kernel[1:]}
        | {"padding": padding, "num_frames": frames, "config": config, "dtype": torch.float64}
    )
    if frames == 1:
        assert layer.candidates.strides == (1,)
        config = LayerConfig(search_space=3, cheap="depthwise", temporal=False)
    twin, _, _ = build(
        {"dims": 3, "shape": (1, 1, 1, 1, 1), "in_channels": 3, "out_channels": 7, "kernel_size": (1, *kernel[1:])}
        | {"padding": (0, padding, padding), "gate_frames": frames, "config": config, "dtype": torch.float64}
    )
    randomize(layer).eval()
    twin.load_state_dict({k: v.unsqueeze(2) if k == "weight" else v for k, v in layer.state_dict().items()})
    clips = x.unflatten(0, (3, frames)).transpose(1, 2)
    wanted = twin.eval()(clips).transpose(1, 2).flatten(0, 1)
    assert relative_error(layer(x), wanted) < EXACT
    for channel, temporal in [(0, 1), (1, 0), (2, 2), ([0, 1, 2], [2, 1, 0])]:
        temporal = 0 if frames == 1 else temporal
        with forced(layer, channel=channel, temporal=temporal), forced(twin, channel=channel, temporal=temporal):
            wanted = twin(clips).transpose(1, 2).flatten(0, 1)
            assert relative_error(layer(x), wanted) < EXACT


@torch.no_grad()
def test_the_order_of_channels_survives_a_state_dict():
    spec = {"dims": 3, "shape": (2, 3, 4, 5, 5), "in_channels": 3, "out_channels": 9, "kernel_size": 3}
    layer, _, x = build(spec)
    randomize(layer).eval()
    other, _, _ = build(spec, seed=1)
    other.eval().load_state_dict(layer.state_dict())
    with forced(layer, channel=1), forced(other, channel=1):
        assert torch.equal(other(x), layer(x))
    with pytest.raises(RedconvertError, match="permutation of 0 to 8"):
        layer.cheap_c.set_order(torch.zeros(9, dtype=torch.long))


def test_an_order_keeps_groups_together():
    spec = {"dims": 2, "shape": (1, 4, 5, 5), "in_channels": 4, "out_channels": 8, "kernel_size": 3, "groups": 4}
    layer, _, _ = build(spec)
    layer.cheap_c.set_order(torch.tensor([6, 7, 3, 2, 0, 1, 4, 5]))
    with pytest.raises(RedconvertError, match="4 groups of 2 together"):
        layer.cheap_c.set_order(torch.tensor([0, 2, 1, 3, 4, 5, 6, 7]))
    assert layer.cheap_c.order.tolist() == [6, 7, 3, 2, 0, 1, 4, 5]


@torch.no_grad()
def test_white_noise_start():
    """Filters that repeat others are rebuilt exactly by the start that needs no data."""
    layer, plain, x = build(
        {"dims": 3, "shape": (2, 3, 4, 5, 5), "in_channels": 3, "out_channels": 8}
        | {"kernel_size": 3, "config": LayerConfig(cheap="scale"), "dtype": torch.float64}
    )
    layer.weight[4:] = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64).view(4, 1, 1, 1, 1) * layer.weight[:4]
    plain.weight.copy_(layer.weight)
    layer.cheap_c.start_from_weights(layer.weight, layer.bias)
    assert layer.cheap_c.ops[0].source.tolist() == [0, 1, 2, 3]
    with forced(layer.eval(), channel=1, temporal=0):
        assert relative_error(layer(x), plain(x)) < 1e-6
