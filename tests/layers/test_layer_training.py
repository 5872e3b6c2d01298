"""Training while gates rest: the numbers of masked training, at the price of what is decided."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import redconvert
from redconvert import ConvertConfig
from redconvert.layers import composed
from redconvert.layers.training import convolve_learning

CONFIG = {"min_saving": 0, "gate_hidden": 4, "rebuild_weight": 0}


class Net(nn.Module):
    """Two convolutions with a norm between, of which the second alone reads the first."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if dims == 3 else (nn.Conv2d, nn.BatchNorm2d)
        self.a, self.norm, self.b = conv(3, 8, 3, padding=1), norm(8), conv(8, 6, 3, padding=1)

    def forward(self, x):
        return self.b(F.relu(self.norm(self.a(x)))).flatten(2).mean(2)


def network(dims=3, absorb=True, **config):
    """Converted, in float64, with any cheap operations and channel orders, in ``train()``."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, *[4, 5, 5][-dims:], dtype=torch.float64)
    rules = (("a", {}), ("b", {}))
    model = redconvert.convert(
        Net(dims).double(), ConvertConfig(absorb=absorb, rules=rules, **CONFIG, **config), example_inputs=x
    )
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.cheap_c.set_order(torch.randperm(layer.out_channels))
            for part in (layer.cheap_c, layer.cheap_t, layer.cheap_in):
                for parameter in part.parameters() if part is not None else ():
                    parameter.normal_()
    return model.train(), x


def step(model, x):
    """The result, every gradient, and the norm's statistics."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    gradients = {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients, (model.norm.running_mean, model.norm.running_var)


DECISIONS = {
    "alike": (1, 2, 1, 0),
    "dropped frames": (2, 1, 1, 1),
    "every sample its own": ([0, 1, 2, 1], [2, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0]),
}


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("decisions", DECISIONS.values(), ids=DECISIONS)
def test_as_masked_training(dims, absorb, decisions):
    """Where decisions are forced a gate has no gradient, and masked training computes everything for nothing."""
    model, x = network(dims, absorb, search_space=3)
    model.a.forced, model.b.forced = (decisions[0], decisions[2]), (decisions[1], decisions[3])
    wanted, wanted_gradients, wanted_statistics = step(model, x)
    with redconvert.resting_gates(model):
        out, gradients, statistics = step(model, x)
    assert torch.allclose(out, wanted, atol=1e-10)
    for found, expected in zip(statistics, wanted_statistics, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)  # also of channels that nobody reads
    trained = {name for name, gradient in wanted_gradients.items() if gradient.abs().max() > 0}
    assert {"x", "a.weight", "b.weight", "norm.weight"} <= trained <= set(gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], atol=1e-9), name


def test_gates_decide_and_get_no_gradient():
    model, x = network(search_space=3)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.gate.fc2.weight.normal_(std=3)
            layer.gate.beta.normal_()
    seen = []
    with redconvert.observed(model, lambda layer, observation: seen.append(observation)):
        out, gradients, _ = step(model, x)
        with redconvert.resting_gates(model):
            resting, found, _ = step(model, x)
    assert torch.allclose(resting, out, atol=1e-10)
    assert [s.decisions for s in seen[:2]] == [s.decisions for s in seen[2:]]
    assert len({*seen[0].decisions, *seen[1].decisions}) > 2
    assert all(s.weights.channel.requires_grad for s in seen[:2])
    assert not any(w.requires_grad for s in seen[2:] for w in s.weights)
    gates = {name for name in gradients if ".gate." in name}
    assert gates and not gates & set(found)
    assert model.a.learns and "learns" not in vars(model.a)


def test_compiled():
    """Nothing is saved there, but gates get no gradient, and the others the same."""
    model, x = network(2, search_space=3, temporal=False)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.gate.beta.copy_(torch.tensor([-1.0, 1.0, -1.0]))
    with redconvert.resting_gates(model):
        _, wanted, _ = step(model, x)
        x.requires_grad_()
        torch.compile(model, backend="eager", fullgraph=True)(x).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not [name for name in gradients if ".gate." in name]
    for name in ("a.weight", "b.weight", "b.cheap_in.weights.0", "norm.weight"):
        assert torch.allclose(gradients[name], wanted[name], atol=1e-9), name


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).square().sum().backward()
    found = counter.get_flop_counts()["Global"]
    kinds = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
    return [found[kind] for kind in kinds]


def test_what_a_step_costs(monkeypatch):
    """Of a and b half of the channels each: b is rebuilt from three, and a computes for the norm what nobody reads."""
    monkeypatch.setattr(composed, "BALANCE", {"cpu": 0})
    model, x = network(2, shares=(0.5,), cheap="pointwise")
    model.a.forced = model.b.forced = (1, None)
    positions = 2 * 4 * 5 * 5  # a multiply-add counts two
    a, b, rebuilt = 3 * 8 * 9 * positions, 4 * 3 * 9 * positions, 3 * 3 * positions
    with redconvert.resting_gates(model):
        assert flops(model, x) == [a + b + rebuilt, a // 2 + 2 * b + 2 * rebuilt]  # the input needs no gradient
        monkeypatch.setattr(composed, "BALANCE", {"cpu": 1000})  # b's filters rebuild what they do not compute
        assert flops(model, x) == [a + 2 * b, a // 2 + 4 * b]
    # Masked: all of b's channels, with and without those of a that are not there; but backward, only what is taken.
    assert flops(model, x) == [a + 8 * 6 * 9 * positions + 2 * b + rebuilt, a // 2 + 2 * b]


def test_backward_passes_compute_no_channel_that_no_sample_takes():
    model, x = network(2, absorb=False, shares=(0.5,), cheap="pointwise")
    a, b = (2 * 4 * 25 * 9 * c_in * c_out for c_in, c_out in ((3, 8), (8, 6)))
    for forced, wanted in ((0, a + 2 * b), (1, a // 2 + b)):
        model.a.forced = model.b.forced = (forced, None)
        assert flops(model, x)[1] == wanted


@settings(max_examples=25, deadline=None)
@given(
    dims=st.sampled_from([2, 3]),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    data=st.data(),
)
def test_gradients_of_some_channels(dims, channels, kernel, stride, bias, data):
    """Those of a plain convolution whose other output channels nothing reads."""
    learned = torch.tensor(data.draw(st.permutations(range(channels[1]))))[: data.draw(st.integers(1, channels[1]))]
    x = torch.randn(2, channels[0], *[5] * dims, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels[1], channels[0], *[kernel] * dims, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(channels[1], dtype=torch.float64, requires_grad=True) if bias else None
    geometry = ([stride] * dims, [kernel // 2] * dims, [1] * dims)
    out = convolve_learning(x, weight, shift, *geometry, learned)
    plain = (F.conv2d if dims == 2 else F.conv3d)(x, weight, shift, *geometry)
    assert torch.equal(out, plain)
    inputs = [x, weight] + ([shift] if bias else [])
    direction = torch.randn_like(plain[:, learned])
    found = torch.autograd.grad(out[:, learned], inputs, direction)
    wanted = torch.autograd.grad(plain[:, learned], inputs, direction)
    assert all(torch.allclose(f, w, atol=1e-10) for f, w in zip(found, wanted, strict=True))


def test_gradients_of_some_channels_in_bfloat16():
    x, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(8, 4, 3, 3, requires_grad=True)
    learned, geometry = torch.tensor([5, 0, 2]), ((1, 1), (1, 1), (1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        out = convolve_learning(x, weight, None, *geometry, learned)
        plain = F.conv2d(x, weight, None, *geometry)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    out[:, learned].sum().backward()
    wanted = torch.autograd.grad(plain[:, learned].sum(), weight)[0]
    assert weight.grad.dtype == torch.float32
    assert torch.allclose(weight.grad, wanted, rtol=0.02, atol=0.05)
