"""What a CUDA graph may capture: the numbers of eager training, with no value read and none sent to the device."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from test_layer_training import flops, network, step
from torch.utils._python_dispatch import TorchDispatchMode

import redconvert

HOST = {  # what waits for the device, and what copies numbers to it
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}


class NoHost(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in HOST, function
        return function(*args, **(kwargs or {}))


def undecided(**config):
    """A network whose gates differ from sample to sample."""
    model, x = network(search_space=3, **config)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.gate.fc2.weight.normal_(std=3)
            layer.gate.beta.normal_()
    return model, x


def settle(model, a=(1, 0), b=(2, 1)):
    """Thresholds out of the inputs' reach, so that these candidates are taken."""
    for layer, (channel, temporal) in ((model.a, a), (model.b, b)):
        for axis, index in (("channel", channel), ("temporal", temporal)):
            found = layer.gate.thresholds(axis)
            if len(found):
                found.fill_(-100)
                found[:index] = 100


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("cheap", ["auto", "principal"])
def test_learning_gates(dims, absorb, cheap):
    """Eager masked training and this one: outputs, every gradient, and the norm's statistics."""
    model, x = undecided(dims=dims, absorb=absorb, cheap=cheap)
    seen = []
    with redconvert.observed(model, lambda layer, observation: seen.append(observation)):
        wanted, wanted_gradients, wanted_statistics = step(model, x)
    assert len({*seen[0].decisions, *seen[1].decisions}) > 2
    with redconvert.capturable(model), NoHost():
        out, gradients, statistics = step(model, x)
    assert torch.allclose(out, wanted, atol=1e-10)
    for found, expected in zip(statistics, wanted_statistics, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)
    for name, gradient in wanted_gradients.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-8), name


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_settled_gates_that_rest(dims, absorb):
    """One candidate alone is computed, in training and in inference."""
    model, x = network(dims, absorb, search_space=3)
    settle(model)
    with redconvert.resting_gates(model):
        wanted, wanted_gradients, wanted_statistics = step(model, x)
        cost = flops(copy.deepcopy(model), x)
        with redconvert.capturable(model), NoHost():
            out, gradients, statistics = step(model, x)
            assert flops(copy.deepcopy(model), x) == cost
    assert torch.allclose(out, wanted, atol=1e-10)
    for found, expected in zip(statistics, wanted_statistics, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)
    assert {n for n, g in gradients.items() if g.any()} == {n for n, g in wanted_gradients.items() if g.any()}
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], atol=1e-9), name
    model.eval()
    with redconvert.capturable(model), NoHost(), torch.no_grad():
        found = model(x)
    with torch.no_grad():
        assert torch.allclose(found, model(x), atol=1e-10)


@pytest.mark.parametrize("absorb", [True, False])
def test_the_efficiency_loss(absorb):
    """Its value and the gates' gradients, without a table that is copied to the device once more."""
    model, x = undecided(absorb=absorb)
    found = {}
    for kind in ("eager", "capturable"):
        network = copy.deepcopy(model)
        loss = redconvert.EfficiencyLoss(network, target=0.3)
        if kind == "eager":
            value = loss(network(x))
        else:
            with redconvert.capturable(network):
                loss(network(x))  # tables are made
                with NoHost():
                    value = loss(network(x))
        value.backward()
        found[kind] = value.item(), {n: p.grad for n, p in network.named_parameters() if ".gate." in n}
    assert found["eager"][0] == pytest.approx(found["capturable"][0], rel=1e-6)
    for name, gradient in found["eager"][1].items():
        assert torch.allclose(gradient, found["capturable"][1][name], atol=1e-7), name
    assert any(gradient.abs().max() > 1e-3 for gradient in found["eager"][1].values())


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("gates", ["settled", "one of them", "undecided"])
def test_costs_while_gates_rest(absorb, gates):
    """What the efficiency loss records, and what whoever observes inference is told, as outside."""
    model, x = undecided(absorb=absorb)
    if gates != "undecided":
        settle(model)
    if gates == "one of them":
        model.b.gate.threshold.zero_()
    found = {}
    for kind in ("eager", "capturable"):
        net = copy.deepcopy(model)  # training moves the norms' statistics
        loss = redconvert.EfficiencyLoss(net)
        with redconvert.resting_gates(net), redconvert.capturable(net) if kind == "capturable" else nullcontext():
            found[kind] = [loss.cost(len(net(x)))]
            seen = []
            with redconvert.observed(net.eval(), lambda layer, call, seen=seen: seen.append(call.decisions)):
                net(x)
            found[kind].append(seen)
    torch.testing.assert_close(found["capturable"][0], found["eager"][0])
    assert found["capturable"][1] == found["eager"][1]


def test_which_gates_are_settled():
    model, _ = network(search_space=3)
    assert model.a.gate.settled() == (0, 0)  # at birth
    settle(model)
    assert model.a.gate.settled() == (1, 0) and model.b.gate.settled() == (2, 1)
    model.a.gate.thresholds("temporal").zero_()
    with torch.no_grad():
        model.a.gate.fc2.weight.fill_(1.0)
    assert model.a.gate.settled() is None
    with redconvert.capturable(model):
        assert model.a.settled is None and model.b.settled == (2, 1)
    assert "capturable" not in vars(model.a) and "settled" not in vars(model.b)
