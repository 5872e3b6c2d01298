"""The efficiency loss (Eq. 6): values from layer_macs, gradients from the soft cost, and whom it listens to."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from problems import batches, costs_by_hand, network, undecided
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import redconvert
from redconvert import EfficiencyLoss, LayerConfig, RedconvertError
from redconvert.layers import DynamicConv2d, dynamic_layers
from redconvert.layers.macs import executed_macs, layer_macs

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")


def mixed(dims: int = 2, **config) -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose samples decide differently, in float64, with inputs and labels."""
    dynamic = undecided(network(dims, **config)).double().train()
    x = batches(8, 1, dims)[0][0].double()
    with torch.no_grad():
        dynamic.head.bias -= dynamic(x).mean(0)
        labels = dynamic(x).argmax(1)
    labels[::3] = (labels[::3] + 1) % 4
    return dynamic, x, labels


def soft_cost(dynamic: nn.Module, x: Tensor, num_samples: int) -> Tensor:
    """``sum_ij w_c,i w_t,j MACs_ij`` over the dense MACs, per sample, written with loops."""
    seen = []
    with redconvert.observed(dynamic, lambda layer, observation: seen.append((layer, observation))):
        dynamic(x)
    total, dense = torch.zeros(num_samples, dtype=torch.float64), 0
    for layer, observation in seen:
        macs = layer_macs(layer, observation.input_shape, observation.output_shape)
        dense += macs.dense
        for i in range(len(macs.conv)):
            for j in range(len(macs.conv[0])):
                weight = observation.weights.channel[:, i] * observation.weights.temporal[:, j]
                total = total + weight * macs.executed(i, j)
    return total / dense


# -- value ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_the_value_is_what_was_executed(dims):
    dynamic, x, labels = mixed(dims, search_space=3)
    out, costs = costs_by_hand(dynamic, x)
    assert len(costs.unique()) > 2  # samples decide differently
    right = out.argmax(1) == labels
    assert 0 < right.sum() < len(right)
    loss = EfficiencyLoss(dynamic)
    value = loss(dynamic(x), labels)
    assert value.dtype == torch.float64 and value.shape == ()
    assert float(value) == pytest.approx(float((costs * right).mean()), rel=1e-12)
    torch.testing.assert_close(loss.costs, costs, rtol=1e-12, atol=0)
    assert not loss.costs.requires_grad


def test_the_parameters_of_equation_6():
    dynamic, x, labels = mixed()
    out, costs = costs_by_hand(dynamic, x)
    right = out.argmax(1) == labels
    loss = EfficiencyLoss(dynamic, mu_0=1.5, p=2.0, otherwise=0.25)
    wanted = torch.where(right, (1.5 * costs) ** 2, torch.full_like(costs, 0.25)).mean()
    assert float(loss(dynamic(x), labels)) == pytest.approx(float(wanted), rel=1e-12)


def test_who_is_correct():
    dynamic, x, _labels = mixed()
    out, costs = costs_by_hand(dynamic, x)
    scores = out.detach().roll(1, 0)
    agree = scores.argmax(1) == out.argmax(1)
    assert 0 < agree.sum() < len(agree)
    loss = EfficiencyLoss(dynamic)
    assert float(loss(dynamic(x), scores)) == pytest.approx(float((costs * agree).mean()), rel=1e-12)
    chosen = torch.arange(8) % 3 == 0
    loss = EfficiencyLoss(dynamic, correct=lambda outputs, given: chosen if given == "anything" else None)
    assert float(loss(dynamic(x), "anything")) == pytest.approx(float((costs * chosen).mean()), rel=1e-12)
    loss = EfficiencyLoss(dynamic, correct=lambda outputs, given: [True] * 8)
    assert float(loss({"scores": dynamic(x)})) == pytest.approx(float(costs.mean()), rel=1e-12)


def test_a_target_and_static_macs():
    dynamic, x, _ = mixed()
    _, costs = costs_by_hand(dynamic, x, static=50_000)
    _, without = costs_by_hand(dynamic, x)
    assert ((costs - 1).abs() < (without - 1).abs()).all()  # what always runs dilutes the saving
    loss = EfficiencyLoss(dynamic, target=0.4, static_macs=50_000)
    assert float(loss(dynamic(x))) == pytest.approx((float(costs.mean()) - 0.4) ** 2, rel=1e-12)
    torch.testing.assert_close(loss.costs, costs, rtol=1e-12, atol=0)


def test_blended_candidates_count():
    dynamic, x, labels = mixed(3, gate="soft")
    seen = []
    with redconvert.observed(dynamic, lambda layer, observation: seen.append((layer, observation))):
        out = dynamic(x)
    assert any(decision.blend for _, observation in seen for decision in observation.decisions)
    executed = sum(torch.tensor(executed_macs(*each), dtype=torch.float64) for each in seen)
    dense = sum(layer_macs(layer, o.input_shape, o.output_shape).dense for layer, o in seen)
    wanted = (executed / dense * (out.argmax(1) == labels)).mean()
    assert float(EfficiencyLoss(dynamic)(dynamic(x), labels)) == pytest.approx(float(wanted), rel=1e-12)


def test_frames_folded_into_the_batch():
    """Four frames a clip: one decision per clip with num_frames, one per frame without; costs are those of clips."""

    class Clips(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    x = torch.randn(6, 4, 3, 8, 8)
    for num_frames, decided in ((4, 6), (None, 24)):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4))
        config = redconvert.ConvertConfig(num_frames=num_frames)
        dynamic = undecided(redconvert.convert(Clips(inner), config, example_inputs=x)).train()
        loss = EfficiencyLoss(dynamic, target=0.5)
        _, costs = costs_by_hand(dynamic, x)
        value = loss(dynamic(x))
        assert len(costs) == 6 and len(costs.unique()) > 1
        torch.testing.assert_close(loss.costs.double(), costs, rtol=1e-6, atol=0)
        assert float(value) == pytest.approx((float(costs.mean()) - 0.5) ** 2, rel=1e-5)
        seen = []
        with redconvert.observed(dynamic, lambda _, observation, seen=seen: seen.append(len(observation.decisions))):
            dynamic(x)
        assert seen == [decided] * 2
        dynamic.inner[4] = nn.Identity()  # an output row for each frame: every frame has its clip's average
        out = dynamic.inner(x.flatten(0, 1))
        torch.testing.assert_close(loss.cost(len(out)).mean().double(), costs.mean(), rtol=1e-5, atol=0)


def test_a_layer_that_runs_twice_pays_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Conv2d(3, 16, 3, padding=1), DynamicConv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.again(self.first(x)).relu()).mean((2, 3))

    dynamic = undecided(Twice()).train()
    x, labels = batches(8, 1)[0]
    out, costs = costs_by_hand(dynamic, x)
    loss = EfficiencyLoss(dynamic)
    value = loss(dynamic(x), labels)
    assert float(value) == pytest.approx(float((costs * (out.argmax(1) == labels)).mean()), rel=1e-6)
    macs = layer_macs(dynamic.again, (8, 16, 8, 8), (8, 16, 8, 8))
    shares = {round(macs.executed(i, 0) / macs.dense / 2 + macs.executed(j, 0) / macs.dense / 2, 5)
              for i in range(2) for j in range(2)}  # fmt: skip
    assert {round(cost, 5) for cost in loss.costs.tolist()} <= shares and len(loss.costs.unique()) > 1


# -- gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("target", [None, 0.4])
def test_the_gradient_is_that_of_the_soft_cost(dims, target):
    """Chain rule by hand: L_e's derivative at the hard cost times the soft cost's gradient, all by autograd."""
    dynamic, x, labels = mixed(dims)
    gates = [p for layer in dynamic_layers(dynamic).values() for p in layer.gate.parameters()]
    soft = soft_cost(dynamic, x, 8)
    out, hard = costs_by_hand(dynamic, x)
    right = (out.argmax(1) == labels).double()
    # p = 2: d/dc (1.5 c)^2 = 4.5 c; with a target 2 (mean - target) / N
    slope = 4.5 * hard * right / 8 if target is None else torch.full_like(hard, 2 * (float(hard.mean()) - target) / 8)
    wanted = torch.autograd.grad((slope * soft).sum(), gates, allow_unused=True)
    loss = EfficiencyLoss(dynamic, target=target, mu_0=1.5, p=2.0)
    found = torch.autograd.grad(loss(dynamic(x), labels), gates, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in found if g is not None) > 1e-4
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


def test_the_soft_cost_by_finite_differences():
    """Of both candidates open: then the weights are smooth in beta."""
    layer = DynamicConv2d(3, 8, 3, config=LayerConfig(gate_hidden=2)).double().train()
    x, beta = torch.randn(4, 3, 8, 8, dtype=torch.float64), layer.gate.beta
    with torch.no_grad():
        beta.copy_(torch.tensor([0.4, 0.9]))
        layer.gate.fc2.weight.mul_(0.1)
    loss = EfficiencyLoss(layer, target=0.3)
    slope = 2 * (float(loss(layer(x)).sqrt()))
    assert slope > 0.1
    value = loss(layer(x))
    (found,) = torch.autograd.grad(value, beta)
    for index in range(2):
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                beta[index] += step
                ends.append(float(soft_cost(layer, x, 4).mean()))
                beta[index] -= step
        assert float(found[index]) == pytest.approx(slope * (ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_half_precision_does_not_reach_the_costs():
    """MACs of more than 65504, the largest float16, under autocast."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    dynamic = undecided(redconvert.convert(model, example_inputs=torch.randn(2, 3, 16, 16))).train()
    x, loss = torch.randn(4, 3, 16, 16), EfficiencyLoss(dynamic, target=0.3)
    gates = [layer.gate.beta for layer in dynamic_layers(dynamic).values()]
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            out = dynamic(x)
            value = loss(out)
        assert value.dtype == torch.float32 and torch.isfinite(value)
        gradients = torch.autograd.grad(value, gates)
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dims", [2, 3])
def test_activation_checkpointing_changes_nothing(dims):
    def passes(model: nn.Module, again: bool) -> tuple[float, list[Tensor]]:
        model = copy.deepcopy(model)
        loss = EfficiencyLoss(model)
        run = (lambda block, x: checkpoint(block, x, use_reentrant=False)) if again else (lambda block, x: block(x))
        model.blocks.forward = lambda x: run(model.blocks[1], run(model.blocks[0], x))
        out = model(x)
        value = nn.functional.cross_entropy(out, labels) + loss(out, labels)
        value.backward()
        return float(value), [p.grad for p in model.parameters()], loss

    dynamic, x, labels = mixed(dims)
    (value, gradients, _), (other, others, loss) = (passes(dynamic, again) for again in (False, True))
    assert value == other
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    with pytest.raises(RedconvertError, match="saw no forward pass"):  # the second run is not a new pass
        loss.cost(8)


# -- whom it listens to --------------------------------------------------------------------------------


def test_only_the_last_forward_pass_counts():
    dynamic, x, labels = mixed()
    loss = EfficiencyLoss(dynamic)
    wanted = float(loss(dynamic(x), labels))
    dynamic(torch.randn_like(x))
    out = dynamic(x)
    assert float(loss(out, labels)) == wanted
    with pytest.raises(RedconvertError, match="saw no forward pass"):
        loss(out, labels)


def test_a_backward_pass_does_not_clear_the_next_forward():
    """The whole network under a checkpoint, and the next pass made before the backward pass of this one."""
    dynamic, x, labels = mixed()
    loss = EfficiencyLoss(dynamic)
    out = checkpoint(dynamic, x, use_reentrant=False)
    first = loss(out, labels)
    out = dynamic(x)
    first.backward()
    assert float(loss(out, labels)) == float(first)


def test_two_losses_on_one_network():
    dynamic, x, labels = mixed()
    one, two = EfficiencyLoss(dynamic), EfficiencyLoss(dynamic, target=0.5)
    out = dynamic(x)
    assert float(one(out, labels)) != float(two(out))
    assert torch.equal(one.costs, two.costs)
    one.close()
    out = dynamic(x)
    assert float(two(out)) == pytest.approx((float(two.costs.mean()) - 0.5) ** 2, rel=1e-12)
    with pytest.raises(RedconvertError, match="saw no forward pass"):
        one(out, labels)
    assert all(len(layer.observers) == 1 for layer in dynamic_layers(dynamic).values())


@pytest.mark.parametrize("inside", [True, False])
def test_a_wrapped_module(inside):
    dynamic, x, labels = mixed()
    wrapped = nn.Sequential(nn.Identity(), dynamic)
    loss = EfficiencyLoss(wrapped if inside else dynamic)
    _, costs = costs_by_hand(dynamic, x)
    for _ in range(2):
        loss(wrapped(x), labels)
        torch.testing.assert_close(loss.costs, costs, rtol=1e-12, atol=0)


def test_closing_and_garbage_collection_detach():
    dynamic, x, _labels = mixed()
    for close in (True, False):
        loss = EfficiencyLoss(dynamic)
        dynamic(x)
        assert all(vars(layer)["observers"] for layer in dynamic_layers(dynamic).values())
        if close:
            loss.close()
            loss.close()
        else:
            del loss
            gc.collect()
        assert not any("observers" in vars(layer) for layer in dynamic_layers(dynamic).values())
        assert not dynamic._forward_pre_hooks


def test_closing_within_observed_is_for_good():
    """`observed` puts back the observers that it found, the closed loss among them: it must not collect any more."""
    dynamic, x, _ = mixed()
    loss = EfficiencyLoss(dynamic)
    tape = loss._tape
    with redconvert.observed(dynamic, lambda *_: None):
        loss.close()
    dynamic(x)
    assert tape.calls == []


def test_copies_and_pickles_are_silent():
    dynamic, x, labels = mixed()
    loss = EfficiencyLoss(dynamic)
    wanted = float(loss(dynamic(x), labels))
    out = dynamic(x)
    for other in (copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
        assert torch.equal(other(x), out)
        assert all(observer.__self__.calls == [] for each in dynamic_layers(other).values()
                   for observer in each.observers)  # fmt: skip
        own = EfficiencyLoss(other)
        assert float(own(other(x), labels)) == wanted
    assert float(loss(out, labels)) == wanted


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_targets_outside_0_to_1(target):
    dynamic = network()
    with pytest.raises(RedconvertError, match=r"target=.* must be a share of the dense MACs in \(0, 1\]"):
        EfficiencyLoss(dynamic, target=target)
    assert not any("observers" in vars(layer) for layer in dynamic_layers(dynamic).values())


def test_what_it_cannot_price():
    dynamic, x, labels = mixed()
    with pytest.raises(RedconvertError, match="no dynamic layers"):
        EfficiencyLoss(nn.Linear(2, 2))
    with pytest.raises(RedconvertError, match="must be positive"):
        EfficiencyLoss(dynamic, p=0)
    loss = EfficiencyLoss(dynamic)
    with pytest.raises(RedconvertError, match="saw no forward pass"):
        loss(torch.zeros(8, 4), labels)
    with pytest.raises(RedconvertError, match="takes the network's outputs"):
        loss("text", labels)
    with torch.no_grad():
        out = dynamic(x)
    with pytest.raises(RedconvertError, match="no gate of the network carries a gradient"):
        loss(out, labels)
    with pytest.raises(RedconvertError, match="pass labels"):
        loss(dynamic(x))
    with pytest.raises(RedconvertError, match=r"labels of shape \(3,\) do not fit"):
        loss(dynamic(x), labels[:3])
    loss = EfficiencyLoss(dynamic, correct=lambda outputs, given: (outputs.argmax(1) == given)[:, None])
    with pytest.raises(RedconvertError, match=r"one boolean for each of the 8 samples, not shape \(8, 1\)"):
        loss(dynamic(x), labels)
