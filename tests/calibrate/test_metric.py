"""Channels chosen for the answer: the metric against autograd, the choice against brute force, the whole."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import redconvert
from redconvert.answers import direction
from redconvert.calibrate.metric import AnswerMetric
from redconvert.calibrate.select import greedy_order, greedy_sources
from redconvert.calibrate.statistics import ChannelMoments
from redconvert.layers import dynamic_layers

F64 = torch.float64


def psd(size: int, seed: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(size, rank or size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T


def left(covariance: Tensor, kept: list[int], metric: Tensor) -> float:
    solved = torch.linalg.pinv(covariance[kept][:, kept], hermitian=True)
    return float(((covariance - covariance[:, kept] @ solved @ covariance[kept]) * metric).sum())


class Net(nn.Module):
    """Two convolutions, a norm, and an operation in place right behind each convolution."""

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.norm, self.head, self.blind = nn.BatchNorm2d(12), nn.Linear(12, 4), blind

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.first(x))
        x = torch.relu_(self.norm(self.second(x)))
        scores = self.head(x.mean((2, 3)))
        return scores.argmax(1) if self.blind else scores


def converted(model: nn.Module, **config) -> nn.Module:
    settings = redconvert.ConvertConfig(rules=[("*", {"cheap": "pointwise", **config})])
    return redconvert.convert(
        model.eval(), settings, example_inputs=torch.randn(2, 3, 8, 8).to(next(model.parameters()))
    )


def module_of(item: type) -> ModuleType:
    return sys.modules[item.__module__]


def batches(count: int = 2, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


# -- choice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [None, 2])
def test_each_step_is_the_best_next_one_in_the_metric(seed, rank):
    covariance, metric = psd(8, seed), psd(8, seed + 50, rank)
    order = greedy_order(covariance, metric).tolist()
    assert sorted(order) == list(range(8))
    for step in range(7):
        costs = {c: left(covariance, [*order[:step], c], metric) for c in range(8) if c not in order[:step]}
        assert costs[order[step]] == pytest.approx(min(costs.values()), rel=1e-6, abs=1e-9)


def test_a_diagonal_metric_is_weights():
    covariance, weights = psd(20, 3), torch.rand(20, dtype=F64) + 0.1
    assert torch.equal(greedy_order(covariance, weights), greedy_order(covariance, weights.diag()))
    assert torch.equal(greedy_sources(covariance, weights), greedy_sources(covariance, weights.diag()))


def test_groups_stay_together_in_a_metric():
    order = greedy_order(psd(12, 1), psd(12, 2), groups=4, steps=2)
    assert (order.view(4, 3) // 3 == order.view(4, 3)[:, :1] // 3).all()


# -- metric --------------------------------------------------------------------------------------------


def test_the_metric_is_the_gradients_of_the_answer():
    dynamic = converted(Net().double())
    x, layers = batches(1)[0].double(), dynamic_layers(dynamic)
    metric = AnswerMetric(dynamic, {layer: layer.out_channels for layer in layers.values()}, seed=7)
    handles = [each.register_forward_hook(lambda layer, _, out: metric.watch(layer, out)) for each in layers.values()]
    with torch.no_grad(), metric.differentiating():
        metric.move(dynamic(x))
    for handle in handles:
        handle.remove()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in dynamic.parameters())

    seen: list[Tensor] = []
    plain = Net().double().eval()
    for conv in (plain.first, plain.second):
        conv.register_forward_hook(lambda _, __, out: seen.append(out.clone()) or seen[-1].clone())
    scores = plain(x)
    along = direction(scores.detach(), torch.Generator().manual_seed(7))
    for layer, gradient in zip(layers.values(), torch.autograd.grad(scores, seen, along), strict=True):
        rows = gradient.transpose(0, 1).flatten(1)
        torch.testing.assert_close(metric.sums[layer], rows @ rows.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("count", "moves"), [(0, 1), (1, 4), (4, 4), (10, 3), (32, 1), (100, 1)])
def test_few_samples_are_moved_several_times(monkeypatch, count, moves):
    """`MOVES` in all, or four of each; the mean over the moves, so that the size of the metric stays the same."""
    dynamic = converted(Net().double())
    x, layer = batches(1)[0].double(), dynamic.second
    metric = AnswerMetric(dynamic, {layer: layer.out_channels}, seed=7, batches=count)
    along: list[Tensor] = []
    monkeypatch.setattr(
        module_of(AnswerMetric), "direction", lambda out, g: along.append(direction(out, g)) or along[-1]
    )
    handle = layer.register_forward_hook(lambda layer, _, out: metric.watch(layer, out))
    with torch.no_grad(), metric.differentiating():
        metric.move(dynamic(x))
    handle.remove()
    assert len(along) == moves

    seen: list[Tensor] = []
    plain = Net().double().eval()
    plain.second.register_forward_hook(lambda _, __, out: seen.append(out.clone()) or seen[-1].clone())
    scores, total = plain(x), torch.zeros(12, 12, dtype=F64)
    for each in along:
        (gradient,) = torch.autograd.grad(scores, seen, each, retain_graph=True)
        total += gradient.transpose(0, 1).flatten(1) @ gradient.transpose(0, 1).flatten(1).T / moves
    torch.testing.assert_close(metric.sums[layer], total, rtol=1e-9, atol=1e-12)


def test_where_no_answer_depends_on_a_layer_the_norms_decide():
    dynamic = converted(Net())
    layer = dynamic.first
    metric, moments = (
        AnswerMetric(dynamic, {layer: layer.out_channels}),
        ChannelMoments.empty(12, 12, torch.device("cpu")),
    )
    moments.add(torch.randn(4, 12, 5, 5))
    norms = torch.rand(12, dtype=F64)
    assert metric.weights(layer, norms, moments.covariance) is norms
    metric.sums[layer] += psd(12, 0)
    found = metric.weights(layer, norms, moments.covariance)
    torch.testing.assert_close(found - metric.sums[layer], torch.diag((found - metric.sums[layer]).diagonal()))
    assert float((torch.diag(found - metric.sums[layer]) / norms).std()) < 1e-9


# -- the whole -----------------------------------------------------------------------------------------


def divergence(dynamic: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = dynamic(x).log_softmax(1)
        with redconvert.forced(dynamic, channel=1):
            found = dynamic(x).log_softmax(1)
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


def test_answers_keep_what_the_answer_needs():
    """Six channels of large variance that the head ignores: by their norms they matter, by the answer they do not."""
    model, found = Net(), {"norms": 0.0, "answers": 0.0}
    with torch.no_grad():
        model.second.weight[::2] *= 3
        model.head.weight[:, ::2] = 0
        model.head.weight *= 4
    for draw in range(4):  # of one draw alone chance may choose as well
        data = batches(16)[4 * draw : 4 * draw + 4]
        for importance in found:
            dynamic = converted(model)
            before = dynamic(data[0])
            redconvert.calibrate(dynamic, data, match=False, importance=importance)
            assert torch.equal(dynamic(data[0]), before)
            found[importance] += divergence(dynamic, torch.cat(data))
            kept = dynamic.second.cheap_c.order[:6].remainder(2).sum()
            assert (kept == 6) == (importance == "answers")
    assert found["answers"] < 0.7 * found["norms"]


def test_nothing_else_changes():
    dynamic = converted(Net()).train()
    dynamic.first.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in dynamic.state_dict().items() if "cheap" not in key}
    redconvert.calibrate(dynamic, iter(batches()), match=False)  # read once
    assert dynamic.training and not dynamic._forward_hooks and not dynamic.first._forward_hooks
    assert [p.requires_grad for p in (dynamic.first.weight, dynamic.second.weight)] == [False, True]
    assert all(parameter.grad is None for parameter in dynamic.parameters())
    assert all(torch.equal(dynamic.state_dict()[key], value) for key, value in state.items())


def test_answers_without_gradient():
    """Labels tell nothing of the moves: the norms decide."""
    found = []
    for importance in ("answers", "norms"):
        dynamic = converted(Net(blind=True))
        redconvert.calibrate(dynamic, batches(), importance=importance)
        found.append(dynamic.second.cheap_c.order)
    assert torch.equal(*found)


class Checkpointed(Net):
    """Runs its layers again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_layers_that_run_again_are_counted_once():
    found = []
    for build in (Net, Checkpointed):
        dynamic = converted(build())
        redconvert.calibrate(dynamic, batches(), match=False)
        found.append({key: value for key, value in dynamic.state_dict().items() if "cheap" in key})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


class Undone(Net):
    """Scores that an operation in place has spoilt for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        root = self.norm(self.second(self.first(x))).exp()
        scores = self.head(root.mean((2, 3))).exp()
        total = scores.sum(1, keepdim=True)
        scores.zero_()
        return scores + total


def test_an_answer_that_cannot_be_differentiated_is_named():
    dynamic = converted(Undone())
    order = dynamic.second.cheap_c.order.clone()
    with pytest.raises(redconvert.RedconvertError, match="importance='norms'"):
        redconvert.calibrate(dynamic, batches())
    assert torch.equal(dynamic.second.cheap_c.order, order)
    assert all(parameter.requires_grad for parameter in dynamic.parameters())
    redconvert.calibrate(dynamic, batches(), importance="norms")
    with pytest.raises(redconvert.RedconvertError, match="'answers' or 'norms'"):
        redconvert.calibrate(dynamic, batches(), importance="magic")
