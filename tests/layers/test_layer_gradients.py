"""Gradients: of the soft sum, of the gate, from the first step, and at the price of one convolution."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import (
    as_clips,
    build,
    expected,
    from_clips,
    gate_values,
    is_choice,
    open_all,
    randomize,
    relative_error,
    soft_reference,
    specs,
    to_weights,
)
from torch import nn

from redconvert import DynamicConv2d, DynamicConv3d, LayerConfig, RedconvertError
from redconvert.layers.static import mixed

SMALL = {"in_channels": 2, "out_channels": 4, "kernel_size": 2, "dtype": torch.float64}
CASES = {
    "3d-pointwise": {"dims": 3, "shape": (3, 2, 3, 3, 3), "cheap": "pointwise"},
    "3d-depthwise": {"dims": 3, "shape": (2, 2, 3, 3, 3), "cheap": "depthwise"},
    "3d-scale-three": {"dims": 3, "shape": (2, 2, 4, 2, 3), "cheap": "scale", "search_space": 3},
    "3d-groups": {"dims": 3, "shape": (2, 4, 3, 2, 2), "groups": 2, "in_channels": 4, "cheap": "scale"},
    "3d-temporal": {"dims": 3, "shape": (2, 2, 4, 2, 2), "channel": False},
    "3d-unnormalised": {"dims": 3, "shape": (2, 2, 3, 2, 2), "normalize": False, "search_space": 3},
    "3d-principal": {"dims": 3, "shape": (3, 2, 3, 3, 3), "cheap": "principal", "search_space": 3},
    "2d": {"dims": 2, "shape": (3, 2, 3, 3), "cheap": "pointwise"},
    "2d-principal": {"dims": 2, "shape": (6, 2, 3, 3), "num_frames": 3, "cheap": "principal", "normalize": False},
    "2d-folded": {"dims": 2, "shape": (6, 2, 3, 3), "num_frames": 3, "cheap": "depthwise"},
    "2d-folded-unnormalised": {"dims": 2, "shape": (6, 2, 2, 2), "num_frames": 3, "normalize": False},
}


def case(name: str, **config):
    spec = {**SMALL, **CASES[name]}
    keys = ("cheap", "search_space", "channel", "normalize")
    config = {**{key: spec.pop(key) for key in keys if key in spec}, "gate_hidden": 3, **config}
    if spec["dims"] == 3:
        spec["gate_frames"] = 2
    return build({**spec, "config": LayerConfig(**config)})


def pull(out, inputs, seed=0):
    """The gradients that a fixed random direction gives to ``inputs``; zeros where there is none."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(out, inputs, direction.to(out.dtype), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if "principal" not in name])
def test_gradcheck(name, training):
    layer, _, x = case(name, gate="soft", rebuild_weight=0)
    open_all(randomize(layer, gates=False)).train(training)
    x.requires_grad_()
    parameters = list(layer.parameters())
    weights = [to_weights(v) for v in gate_values(layer, x.detach())]
    assert all((w > 0).all() for w in weights)

    def run(*_):  # gradcheck changes the tensors that it is given in place
        return layer(x)

    assert torch.autograd.gradcheck(run, (x, *parameters))
    layer.feeds_norm = True
    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("feeds_norm", [False, True])
@pytest.mark.parametrize("rebuild_weight", [0, 0.1])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(spec=specs(), seed=st.integers(0, 99))
def test_backward_is_that_of_the_plain_soft_sum(feeds_norm, rebuild_weight, spec, seed):
    """CheckpointedMix against autograd through every candidate, hard and soft, with whatever gates are open."""
    assume(is_choice(spec))
    config = LayerConfig(**{**spec["config"].to_dict(), "rebuild_weight": rebuild_weight})
    layer, _, x = build({**spec, "config": config, "dtype": torch.float64}, seed)
    randomize(layer).train().gate.norm.eval()
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    layer.feeds_norm = feeds_norm
    out = layer(x)
    plain = mixed(layer, x, layer._weights(x, x.mean((-2, -1))))
    assert relative_error(out, plain) < 1e-10
    names = ["input", *dict(layer.named_parameters())]
    for name, value, wanted in zip(names, pull(out, inputs), pull(plain, inputs), strict=True):
        assert relative_error(value, wanted) < 1e-9, name


@pytest.mark.parametrize(
    ("name", "gate"),
    [(name, gate) for name in CASES for gate in ("soft", "hard") if gate == "hard" or "princ" not in name],
)
def test_gradient_of_the_reference(name, gate):
    """All candidates open: value of the largest one (hard) or of the sum (soft), gradient of the sum in both."""
    layer, plain, x = case(name, gate=gate, rebuild_weight=0)
    open_all(randomize(layer, gates=False)).train().gate.norm.eval()
    plain.weight, plain.bias = layer.weight, layer.bias
    x.requires_grad_()
    values = gate_values(layer, x)
    normalize = layer.config.normalize
    weights = tuple(v / v.sum(1, keepdim=True) if normalize and v.shape[1] > 1 else v for v in values)
    soft = soft_reference(layer, plain, x, weights)
    out = layer(x)
    assert relative_error(out, plain(x) if gate == "hard" else soft) < 1e-10
    inputs = [x, *layer.parameters()]
    for value, wanted in zip(pull(out, inputs), pull(soft, inputs), strict=True):
        assert relative_error(value, wanted) < 1e-9


@pytest.mark.parametrize(
    ("cheap", "gate"),
    [*itertools.product(["pointwise", "depthwise", "scale"], ["soft", "hard"]), ("principal", "hard")],
)
@pytest.mark.parametrize("space", [2, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_parameter_learns_from_the_first_step(dims, space, gate, cheap):
    config = LayerConfig(search_space=space, gate=gate, cheap=cheap)
    shape = (4, 3, 6, 5, 5) if dims == 3 else (24, 3, 5, 5)
    frames = {"gate_frames": 6} if dims == 3 else {"num_frames": 6}
    layer, _, x = build(
        {"dims": dims, "shape": shape, "in_channels": 3, "out_channels": 8, "kernel_size": 3, "config": config} | frames
    )
    out = layer(x)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_frozen_parts_get_no_gradient():
    layer, _, x = build({"dims": 3, "shape": (2, 3, 4, 5, 5), "in_channels": 3, "out_channels": 8, "kernel_size": 3})
    wanted = {}
    for frozen in (None, "weight", "cheap_c", "cheap_t", "gate"):
        twin = copy.deepcopy(layer)
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(frozen is None or not name.startswith(frozen))
        twin(x).square().sum().backward()
        for name, parameter in twin.named_parameters():
            if frozen is None:
                wanted[name] = parameter.grad
            elif name.startswith(frozen):
                assert parameter.grad is None, name
            else:
                assert torch.allclose(parameter.grad, wanted[name], rtol=1e-5, atol=1e-6), (frozen, name)


@pytest.mark.parametrize("training", [True, False])
def test_closed_gates_open_again(training):
    """V passes its gradient below zero: descent on the full candidate's weight opens it."""
    layer, _, x = build({"dims": 3, "shape": (4, 3, 4, 5, 5), "in_channels": 3, "out_channels": 8, "kernel_size": 3})
    with torch.no_grad():
        layer.gate.beta.fill_(-1.5)
    layer.train(training)
    seen = []
    layer.observers = (lambda _, observation: seen.append(observation),)
    layer(x)
    assert {tuple(d) for d in seen[0].decisions} == {(1, 1, False, 0)}  # all closed: the cheapest
    assert torch.equal(seen[0].weights.channel, torch.tensor([[0.0, 1.0]] * 4))
    for w in seen[0].weights:
        assert w[:, 1].gt(0).all()
        gradient = torch.autograd.grad(w[:, 0].sum(), layer.gate.beta, retain_graph=True)[0]
        assert gradient.abs().max() > 0.1
    optimizer = torch.optim.SGD(layer.gate.parameters(), lr=0.2)
    for _ in range(100):
        seen.clear()
        layer(x)
        optimizer.zero_grad()
        (-sum(w[:, 0].sum() for w in seen[0].weights)).backward()
        optimizer.step()
    assert {tuple(d)[:2] for d in seen[0].decisions} == {(0, 0)}


@pytest.mark.parametrize("conv", [DynamicConv2d, DynamicConv3d])
def test_an_output_changed_in_place(conv):
    """feeds_norm promises that nobody does; where somebody does it is an error, not a wrong gradient."""
    layer = conv(3, 8, 3)
    x = torch.randn(2, 3, *[5] * (3 if conv is DynamicConv3d else 2))
    layer.feeds_norm = True
    out = nn.ReLU(inplace=True)(layer(x))
    with pytest.raises(RedconvertError, match=r"changed in place.*feeds_norm = False"):
        out.sum().backward()
    layer.feeds_norm = False
    layer.zero_grad()
    nn.ReLU(inplace=True)(layer(x)).sum().backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    nn.ReLU()(layer(x)).sum().backward()
    assert torch.equal(gradient, layer.weight.grad)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_training_moves_the_loss(gate):
    """Sixty steps with random decisions: a dynamic layer learns to imitate a fixed one."""
    layer, _, x = build(
        {"dims": 3, "shape": (8, 3, 4, 6, 6), "in_channels": 3, "out_channels": 8, "kernel_size": 3}
        | {"config": LayerConfig(search_space=3, gate=gate)}
    )
    randomize(layer)
    target = nn.Conv3d(3, 8, 3)(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_reference_agrees_with_itself():
    """The helper that folds clips undoes the one that unfolds them, and gates match Eq. 4."""
    layer, plain, x = case("2d-folded", gate="soft")
    randomize(layer).eval()
    assert torch.equal(from_clips(layer, as_clips(layer, x)), x)
    assert relative_error(layer(x), expected(layer, plain, x)) < 1e-10
