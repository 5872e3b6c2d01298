"""The harm of each decision: against what the outputs do, in closed form and by the divergence of the answers."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from budget_networks import CLASSES, KINDS, batches, linear, network, spread_gates
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import redconvert
from redconvert import forced
from redconvert.answers import TEMPERATURE
from redconvert.budget import harms, sensitivity
from redconvert.layers import dynamic_layers

F64 = torch.float64


@torch.no_grad()
def moves(dynamic: nn.Module, name: str, x: Tensor) -> dict[tuple[int, int], Tensor]:
    """What each decision of one layer does to the outputs, ``(N, classes)``; both axes: the sum of what each does."""
    layer, full = dynamic_layers(dynamic)[name], dynamic(x)
    found = {}
    for i in range(len(layer.candidates.channels)):
        for j in range(len(layer.candidates.strides)):
            parts = []
            for decision in ({"channel": i, "temporal": 0}, {"channel": 0, "temporal": j}):
                with forced(layer, **decision):
                    parts.append(dynamic(x) - full)
            found[i, j] = parts[0] + parts[1]
    return found


def fisher(scores: Tensor, move: Tensor, temperature: float = 1.0) -> float:
    """``move^T (diag(p) - p p^T) move``, summed over positions and averaged over samples."""
    p = (scores.detach() / temperature).softmax(1)
    return float(((p * move.square()).sum(1) - (p * move).sum(1).square()).sum() / len(p))


@pytest.fixture
def exact(monkeypatch):
    """The columns of a root of the covariance, one after the other: CLASSES projections are the expectation."""
    index = count()

    def column(output: Tensor, generator: torch.Generator) -> Tensor:
        p = output.softmax(1)
        k = next(index) % CLASSES
        unit = torch.zeros_like(p)
        unit[:, k] = 1
        return (unit - p) * p[:, k : k + 1].sqrt() * CLASSES**0.5

    monkeypatch.setattr(sensitivity, "_direction", column)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form(kind, exact):
    """All that follows is linear, so the first order is all there is."""
    dynamic = network(kind, dtype=F64, between=linear)
    x = torch.cat(batches(kind, dtype=F64))
    found = harms(dynamic, [x], projections=CLASSES)
    assert list(found) == list(dynamic_layers(dynamic))
    for name, layer in dynamic_layers(dynamic).items():
        assert found[name].shape == (len(layer.candidates.channels), len(layer.candidates.strides))
        assert found[name].dtype == F64 and found[name][0, 0] == 0
        for (i, j), move in moves(dynamic, name, x).items():
            assert float(found[name][i, j]) == pytest.approx(fisher(dynamic(x), move), rel=1e-6, abs=1e-14)
    if kind == "unused":
        assert found["spare"].count_nonzero() == 0


def test_random_directions():
    """Of covariance ``diag(p) - p p^T`` with p at the temperature, and so in the whole."""
    scores = torch.tensor([[0.3, -1.0, 2.0]], dtype=F64).expand(40_000, 3)
    directions = sensitivity._direction(scores, torch.Generator().manual_seed(0))
    p = (scores[0] / TEMPERATURE).softmax(0)
    assert torch.allclose(directions.T @ directions / 40_000, p.diag() - torch.outer(p, p), atol=0.005)
    dynamic, x = network("2d of three", dtype=F64, between=linear), batches("2d of three", dtype=F64)[0]
    found = harms(dynamic, [x], projections=300)["convs.1"]
    for (i, j), move in moves(dynamic, "convs.1", x).items():
        assert float(found[i, j]) == pytest.approx(fisher(dynamic(x), move, TEMPERATURE), rel=0.2)


def test_scores_of_every_position_add_up():
    """``(N, classes, H, W)``: the divergences of all pixels together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, CLASSES, 1)).double().eval()
    x = torch.randn(3, 3, 6, 6, dtype=F64)
    config = redconvert.ConvertConfig(rules=[("0", {}), ("*", None)])
    dynamic = redconvert.convert(model, config, example_inputs=x)
    wanted = fisher(dynamic(x), moves(dynamic, "0", x)[1, 0], TEMPERATURE)  # a mean over samples of sums over pixels
    assert float(harms(dynamic, [x], projections=200)["0"][1, 0]) == pytest.approx(wanted, rel=0.2)


def test_outputs_that_are_no_scores():
    """Squared moves over the mean square of the outputs."""
    dynamic = network("2d", dtype=F64, between=linear, classes=1)
    x = torch.cat(batches("2d", dtype=F64))
    found = harms(dynamic, [x], projections=150)
    for name in found:
        wanted = moves(dynamic, name, x)[1, 0].square().mean() / dynamic(x).detach().square().mean()
        assert float(found[name][1, 0]) == pytest.approx(float(wanted), rel=0.2)


@pytest.mark.parametrize("kind", ["2d", "3d", "folded", "twice"])
def test_twice_the_divergence_of_the_answers(kind, exact):
    """Behind ReLUs, where a reduction is small: filters that the kept ones explain but for 0.3 %."""
    dynamic = network(kind, dtype=F64)
    x = torch.cat(batches(kind, dtype=F64))
    with torch.no_grad():
        for layer in dynamic_layers(dynamic).values():
            kept, dropped, op = layer.cheap_c.kept(1), layer.cheap_c.dropped(1), layer.cheap_c.op(1)
            coefficients = op.weight
            if hasattr(op, "source"):
                coefficients = torch.zeros(len(op.bias), op.source.max() + 1, dtype=F64)
                coefficients.scatter_(1, op.source[:, None], op.weight[:, None])
                kept = kept[: coefficients.shape[1]]
            layer.weight[dropped] = 1.003 * (coefficients @ layer.weight[kept].flatten(1)).view_as(
                layer.weight[dropped]
            )
            layer.bias[dropped] = coefficients @ layer.bias[kept] + op.bias
    found, full = harms(dynamic, [x], projections=CLASSES), dynamic(x).detach().log_softmax(1)
    for name, layer in dynamic_layers(dynamic).items():
        with torch.no_grad(), forced(layer, channel=1, temporal=0):
            divergence = (full.exp() * (full - dynamic(x).log_softmax(1))).sum(1).mean()
        assert divergence > 1e-12
        assert float(found[name][1, 0]) == pytest.approx(2 * float(divergence), rel=0.05)


def test_batches_are_averaged_over_samples(exact):
    dynamic, (first, second) = network("2d", dtype=F64), batches("2d", dtype=F64)
    both = harms(dynamic, [first, second[:1]], projections=CLASSES)
    for name, value in harms(dynamic, [first], projections=CLASSES).items():
        one = harms(dynamic, [second[:1]], projections=CLASSES)[name]
        assert torch.allclose(both[name], (4 * value + one) / 5)


def test_a_batch_of_one(exact):
    dynamic = network("2d", dtype=F64, between=linear)
    x = batches("2d", dtype=F64)[0][:1]
    for name, value in harms(dynamic, [x], projections=CLASSES).items():
        assert float(value[1, 0]) == pytest.approx(fisher(dynamic(x), moves(dynamic, name, x)[1, 0]))


def test_a_batch_of_one_number():
    dynamic = network("2d", dtype=F64, between=linear, classes=1)
    x = batches("2d", dtype=F64)[0][:1]
    found = harms(dynamic, [x], projections=1)
    relative = {name: moves(dynamic, name, x)[1, 0].square() / dynamic(x).detach().square() for name in found}
    noise = [float(found[name][1, 0] / relative[name]) for name in found]
    assert noise == pytest.approx([noise[0]] * 3) and noise[0] > 0  # the square of one random number


def test_outputs_of_zero_are_moved_as_they_are():
    dynamic = network("2d", between=linear, classes=1)
    with torch.no_grad():
        dynamic.head.weight.zero_()
        dynamic.head.bias.zero_()
    assert all(value.count_nonzero() == 0 for value in harms(dynamic, batches("2d")).values())


def test_gates_do_not_matter():
    dynamic, data = network("3d of three"), batches("3d of three")
    wanted = harms(dynamic, data)
    spread_gates(dynamic)
    for layer in dynamic_layers(dynamic).values():
        layer.gate.threshold.normal_()
    with forced(dynamic, channel=1, temporal=2):
        found = harms(dynamic, data)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = harms(dynamic, data, seed=1)
    assert not any(torch.equal(other[name], wanted[name]) for name in wanted)


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails):
    dynamic = network("3d", gates=True).train()
    layers = list(dynamic_layers(dynamic).values())
    dynamic.convs[0].eval()
    dynamic.head.bias.requires_grad_(False)
    layers[1].gate.beta.requires_grad_(False)
    layers[0].gate.threshold.fill_(0.5)
    listener = lambda layer, seen: None  # noqa: E731
    layers[1].observers = (listener,)
    state = {key: value.clone() for key, value in dynamic.state_dict().items()}
    trained = [p.requires_grad for p in dynamic.parameters()]
    flags = [m.training for m in dynamic.modules()]
    attributes = [sorted(vars(m)) for m in dynamic.modules()]
    head = dynamic.head
    if fails:
        dynamic.head = Failing()
        with pytest.raises(ZeroDivisionError):
            harms(dynamic, batches("3d"))
        dynamic.head = head
    else:
        with forced(dynamic, channel=1):
            harms(dynamic, batches("3d"))
            assert all(layer.forced == (1, None) for layer in layers)
    assert all(torch.equal(value, state[key]) for key, value in dynamic.state_dict().items())
    assert [p.requires_grad for p in dynamic.parameters()] == trained
    assert [m.training for m in dynamic.modules()] == flags
    assert [sorted(vars(m)) for m in dynamic.modules()] == attributes
    assert all(layer.forced == (None, None) for layer in layers) and layers[1].observers == (listener,)
    assert all(p.grad is None for p in dynamic.parameters()) and torch.is_grad_enabled()
    assert not any(layer.gate.threshold.requires_grad for layer in layers)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_activation_checkpointing_counts_nothing_twice():
    dynamic, data = network("2d"), batches("2d")
    wanted = harms(dynamic, data)
    found = harms(Checkpointed(dynamic), data)
    assert all(torch.allclose(found[f"inner.{name}"], wanted[name]) for name in wanted)


def test_refusals():
    dynamic, data = network("2d"), batches("2d")
    with pytest.raises(redconvert.RedconvertError, match="projections=0"):
        harms(dynamic, data, projections=0)
    with pytest.raises(redconvert.RedconvertError, match="empty"):
        harms(dynamic, [])
    with pytest.raises(redconvert.RedconvertError, match="no dynamic layers"):
        harms(nn.Conv2d(3, 3, 3), data)
    with pytest.raises(redconvert.RedconvertError, match="not finite"):
        harms(dynamic, [data[0] * float("nan")])
    with pytest.raises(redconvert.RedconvertError, match="do not depend"), redconvert.disabled(dynamic):
        harms(dynamic, data)
