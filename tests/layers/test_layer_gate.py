"""The gate: Eq. 4, its weights, its norm, clips of other lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import build, gate_values, open_all, randomize, relative_error, to_weights
from torch.nn import functional as F

from redconvert import DynamicConv3d, LayerConfig, disabled, forced
from redconvert.layers.gate import Gate, candidate_weights, largest_open

CONV = {"dims": 3, "shape": (4, 3, 6, 5, 5), "in_channels": 3, "out_channels": 8, "kernel_size": 3}


def observe(layer):
    seen = []
    layer.observers = (lambda _, observation: seen.append(observation),)
    return seen


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_weights(rows):
    values = torch.tensor(rows, dtype=torch.float64)
    assert torch.allclose(candidate_weights(values), to_weights(values), atol=1e-12)
    assert torch.allclose(candidate_weights(values).sum(1), torch.ones(len(rows), dtype=torch.float64))
    assert torch.allclose(candidate_weights(values, normalize=False), to_weights(values, normalize=False))
    largest = [next((i for i, v in enumerate(row) if v > 0), 2) for row in rows]
    assert largest_open(candidate_weights(values)).tolist() == largest


def test_weights_of_known_values():
    values = torch.tensor([[0.6, 0.2, -0.3], [-0.1, 0.5, 0.5], [-0.2, -0.1, -0.9], [0.9, -0.5, -0.1]])
    wanted = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert torch.allclose(candidate_weights(values), wanted)
    assert torch.equal(candidate_weights(values)[3], wanted[3])  # x / x is 1 to the bit
    unnormalised = torch.tensor([[0.6, 0.2, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.9, 0.0, 0.0]])
    assert torch.equal(candidate_weights(values, normalize=False), unnormalised)
    assert torch.equal(candidate_weights(torch.tensor([[float("nan")] * 2])), torch.tensor([[0.0, 1.0]]))
    assert torch.equal(candidate_weights(torch.tensor([[-0.4], [0.2]])), torch.tensor([[-0.4], [0.2]]))  # no choice


@pytest.mark.parametrize("values", [[0.5, -0.5], [-0.5, -0.3], [-0.3, 0.4]])
def test_gradient_below_zero(values):
    """Unnormalised, V is its own gradient everywhere; normalised, the quotient rule with V's gradient 1."""
    v = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    direction = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(candidate_weights(v, normalize=False), v, direction)
    assert torch.equal(gradient, direction)
    (gradient,) = torch.autograd.grad(candidate_weights(v), v, direction)
    opened = v.detach().clamp_min(0)
    total = opened.sum()
    wanted = direction if total == 0 else direction / total - (direction * opened).sum() / total**2
    assert torch.allclose(gradient, wanted)


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 9])
@torch.no_grad()
def test_clips_of_another_length(frames):
    """Average-pooled in time to the gate's length; decisions agree with Eq. 4 written out."""
    layer, _, _ = build({**CONV, "gate_frames": 4, "padding": 1, "dtype": torch.float64})
    randomize(layer).eval()
    seen = observe(layer)
    x = torch.randn(5, 3, frames, 5, 5, dtype=torch.float64)
    assert layer(x).shape == (5, 8, frames, 5, 5)
    for weights, values in zip(seen[0].weights, gate_values(layer, x), strict=True):
        assert torch.allclose(weights, to_weights(values), atol=1e-12)


@torch.no_grad()
def test_a_training_batch_of_one():
    layer, _, x = build(CONV)
    randomize(layer)
    seen, state = observe(layer), {k: v.clone() for k, v in layer.gate.norm.state_dict().items()}
    layer.train()(x[:1])
    layer.eval()(x[:1])
    for trained, evaluated in zip(seen[0].weights, seen[1].weights, strict=True):
        assert torch.equal(trained, evaluated)
    assert all(torch.equal(v, state[k]) for k, v in layer.gate.norm.state_dict().items())
    layer.train()(x)
    assert layer.gate.norm.num_batches_tracked == state["num_batches_tracked"] + 1
    assert not torch.equal(layer.gate.norm.running_mean, state["running_mean"])


@torch.no_grad()
def test_the_norm_in_training():
    """Two and more samples are normalised with their own statistics (Eq. 4)."""
    gate = Gate(3, 2, 3, 2, hidden=4, generator=torch.Generator().manual_seed(0)).double()
    for parameter in gate.parameters():
        parameter.normal_()
    pooled = torch.randn(5, 3, 2, dtype=torch.float64)
    hidden = pooled.reshape(5, 6) @ gate.fc1.weight.T
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    hidden = hidden * gate.norm.weight + gate.norm.bias
    values = torch.tanh(torch.tanh(hidden) @ gate.fc2.weight.T + gate.beta)
    channel, temporal = gate.train()(pooled)
    assert torch.allclose(temporal, values[:, :2]) and torch.allclose(channel, values[:, 2:])


@torch.no_grad()
def test_birth_holds_for_every_input():
    """Signs at birth do not depend on the input, however large, nor on the running statistics."""
    layer, plain, x = build({**CONV, "config": LayerConfig(search_space=3)})
    for scale in (1e-8, 1.0, 1e8):
        layer.gate.norm.running_mean.normal_(std=scale)
        with torch.no_grad():
            assert torch.equal(layer.eval()(scale * x), plain(scale * x))
            assert torch.equal(layer.train()(scale * x), plain(scale * x))
    x[0, 0, 0, 0, 0] = float("nan")
    seen = observe(layer.eval())
    assert torch.equal(layer(x)[1:], plain(x)[1:])
    assert [tuple(d) for d in seen[0].decisions[1:]] == [(0, 0, False, 0)] * 3


def test_the_start_depends_on_the_name_alone():
    state = torch.get_rng_state()
    gates = []
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        torch.manual_seed(seed)
        conv = torch.nn.Conv3d(3, 8, 3)
        conv.__class__ = DynamicConv3d
        before = torch.get_rng_state()
        conv.make_dynamic(LayerConfig(), name=name)
        assert torch.equal(torch.get_rng_state(), before)
        gates.append(conv.gate.state_dict())
    torch.set_rng_state(state)
    assert all(torch.equal(gates[0][key], gates[1][key]) for key in gates[0])
    assert not torch.equal(gates[0]["fc1.weight"], gates[2]["fc1.weight"])


@torch.no_grad()
def test_soft_value():
    """Two candidates on each axis with known weights: the sum of four layers."""
    layer, _, x = build({**CONV, "config": LayerConfig(gate="soft"), "dtype": torch.float64})
    open_all(randomize(layer, gates=False)).eval()
    channel, temporal = (v / v.sum(1, keepdim=True) for v in gate_values(layer, x))
    wanted = torch.zeros_like(layer(x))
    for i in range(2):
        for j in range(2):
            with forced(layer, channel=i, temporal=j):
                wanted += (channel[:, i] * temporal[:, j]).view(-1, 1, 1, 1, 1) * layer(x)
    assert relative_error(layer(x), wanted) < 1e-10
    layer.train().gate.norm.eval()
    assert relative_error(layer(x), wanted) < 1e-10


@pytest.mark.parametrize("gate", ["hard", "soft"])
@torch.no_grad()
def test_all_closed_is_the_cheapest(gate):
    layer, _, x = build({**CONV, "config": LayerConfig(search_space=3, gate=gate)})
    randomize(layer, gates=False).gate.beta.fill_(-1.5)
    for training in (True, False):
        layer.train(training)
        with forced(layer, channel=2, temporal=2):
            wanted = layer(x)
        assert torch.equal(layer(x), wanted)


@torch.no_grad()
def test_autocast_leaves_the_gate_alone():
    layer, _, x = build(CONV)
    randomize(layer).eval()
    seen = observe(layer)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert all(torch.equal(a, b) for a, b in zip(seen[0].weights, seen[1].weights, strict=True))
    assert seen[1].weights.channel.dtype == torch.float32


@torch.no_grad()
def test_disabled_does_not_run_the_gate():
    layer, plain, x = build(CONV)
    randomize(layer)
    layer.gate.forward = None
    with disabled(layer):
        assert torch.equal(layer(x), F.conv3d(x, plain.weight, plain.bias))
    with forced(layer, channel=1, temporal=1):  # nor does forcing both axes
        layer.eval()(x)
