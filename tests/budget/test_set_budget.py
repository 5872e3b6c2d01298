"""Budgets: what they reach, counted by hand; what they leave alone; what is refused."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from budget_networks import CLASSES, CLIPS, KINDS, Net, batches, conv3, decisions, network, spread_gates
from torch import Tensor, nn

import redconvert
from redconvert.budget import Budget, clear_budget, harms, set_budget
from redconvert.cost.measure import MacsMeter
from redconvert.layers import dynamic_layers, observed
from redconvert.layers.macs import layer_macs

HEAD = 16 * CLASSES


def thresholds(dynamic: nn.Module) -> Tensor:
    return torch.cat([layer.gate.threshold for layer in dynamic_layers(dynamic).values()])


def logits(dynamic: nn.Module, x: Tensor) -> Tensor:
    """What every gate says, beta and threshold included."""
    found, handles = [], []
    for layer in dynamic_layers(dynamic).values():
        gate = layer.gate
        hook = lambda module, args, out, gate=gate: found.append((out + gate.beta - gate.threshold).flatten())  # noqa: E731
        handles.append(gate.fc2.register_forward_hook(hook))
    with torch.no_grad():
        dynamic(x)
    for handle in handles:
        handle.remove()
    return torch.cat(found)


def counted(dynamic: nn.Module, data: list[Tensor]) -> list[float]:
    """The executed share of every sample, by the meter of reports."""
    meter = MacsMeter(dynamic, dynamic_layers(dynamic))
    with torch.no_grad():
        for batch in data:
            meter.run(batch)
    return [executed / dense for executed, dense in zip(meter.executed, meter.dense, strict=True)]


def by_hand(dynamic: nn.Module, x: Tensor) -> tuple[dict[str, dict[tuple[int, int], int]], dict[str, int]]:
    """MACs of all samples of ``x`` together, by layer: of each decision, and dense."""
    table: dict[str, dict[tuple[int, int], int]] = {}
    dense: dict[str, int] = {}
    names = {layer: name for name, layer in dynamic_layers(dynamic).items()}

    def listen(layer, seen) -> None:
        macs, name, count = layer_macs(layer, seen.input_shape, seen.output_shape), names[layer], len(seen.decisions)
        own = table.setdefault(name, {})
        for i, row in enumerate(macs.conv):
            for j in range(len(row)):
                own[i, j] = own.get((i, j), 0) + macs.executed(i, j) * count
        dense[name] = dense.get(name, 0) + macs.dense * count

    with torch.no_grad(), observed(dynamic, listen):
        dynamic(x)
    return table, dense


# -- by layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "share"), [*((kind, 0.4) for kind in KINDS), ("3d of three", 0.0), ("3d of three", 1.0), ("twice", 0.7)]
)
def test_the_best_constant_decisions(kind, share):
    """Against every combination of decisions, with MACs and harms counted apart."""
    dynamic, data = network(kind), batches(kind)
    table, dense = by_hand(dynamic, data[0])
    heads = {"folded": 16, "frames in the batch": 16}.get(kind, 4) * HEAD  # rows that the head sees
    whole, samples = sum(dense.values()) + heads, 4
    least = heads + sum(min(each.values()) for each in table.values())
    most = heads + sum(each[0, 0] for each in table.values())
    allowed = least + share * (most - least)
    budget = min(allowed / whole * (1 + 1e-9), 1.0)
    effects = harms(dynamic, data)
    found = set_budget(dynamic, budget, data)
    assert found.by == "layers" and found.asked == budget and found.samples == 2 * samples
    assert found.mean <= budget + 1e-6
    assert found.lowest == pytest.approx(found.mean) == found.highest
    assert found.std == pytest.approx(0, abs=1e-7)

    taken: dict[str, tuple[int, ...]] = {}
    for x in [*data, 5 * data[0] + 3]:  # no input can change it
        for name, each in decisions(dynamic, x).items():
            assert len({taken.setdefault(name, each[0]), *each}) == 1
    executed = heads + sum(table[name][each] for name, each in taken.items())
    assert found.mean == pytest.approx(executed / whole, rel=1e-5)
    assert counted(dynamic, data) == pytest.approx([found.mean] * 8, rel=1e-5)

    fitting = [
        sum(float(effects[name][each]) for name, each in zip(table, choice, strict=True))
        for choice in itertools.product(*table.values())
        if heads + sum(table[name][each] for name, each in zip(table, choice, strict=True)) <= budget * whole
    ]
    assert found.harms is not None and list(found.harms) == list(table)
    assert 2 * sum(found.harms.values()) == pytest.approx(min(fitting), rel=1e-6, abs=1e-12)
    for name, each in taken.items():
        assert 2 * found.harms[name] == pytest.approx(float(effects[name][each]))
    if kind == "unused":
        assert not dynamic_layers(dynamic)["spare"].gate.threshold.any()


@pytest.mark.parametrize("kind", ["2d of three", "2d soft", "3d", "twice"])
@pytest.mark.parametrize("trained", [False, True])
def test_gates_stay_within_reach(kind, trained):
    """No input moves a gate over its threshold, none is further from it than inputs move it and a margin."""
    dynamic, data = network(kind, gates=trained), batches(kind)
    set_budget(dynamic, 0.6, data, by="layers")
    reach = max(float(layer.gate.fc2.weight.detach().abs().sum(1).max()) for layer in dynamic_layers(dynamic).values())
    for x in [*data, 100 * torch.randn_like(data[0])]:
        z = logits(dynamic, x).abs()
        assert z.min() >= 0.25 - 1e-5 and z.max() <= 2 * reach + 0.25 + 1e-5
        assert trained or z.max() <= 1.75 + 1e-5  # tanh has a slope of 0.11 there
    taken = decisions(dynamic, data[0])
    dynamic.train()  # gates are normalised by the batch then
    assert decisions(dynamic, data[0]) == taken
    if trained:
        return
    loss = redconvert.EfficiencyLoss(dynamic)
    out = dynamic(data[0])
    (out.square().mean() + loss(out, out.argmax(1))).backward()
    for name, layer in dynamic_layers(dynamic).items():
        for axis, index in zip(("channel", "temporal"), taken[name][0], strict=True):
            gradient = layer.gate.axis(axis, layer.gate.beta.grad)
            closed = [i for i in range(len(gradient)) if i != index]  # the open one, w = V / V, has none
            assert (gradient[closed].abs() > 1e-6).all()


# -- by gates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_threshold_for_all_gates(kind):
    dynamic, data = network(kind, gates=True), [torch.cat(batches(kind, count=3))]
    state = {key: value.clone() for key, value in dynamic.state_dict().items() if "threshold" not in key}
    budgets = (0.75, 0.9, 0.75, 0.6) if kind in ("2d of three", "3d") else (0.9, 0.75)
    found = {}
    for budget in budgets:
        result = set_budget(dynamic, budget, data, by="gates")
        assert result.by == "gates" and result.harms is None and result.samples == 12
        assert result.lowest <= result.mean <= budget
        assert budget - result.mean <= (1.1 - result.lowest) / 12  # a step of one sample, from all to nothing
        assert found.setdefault(budget, result) == result  # nothing adds up
    ordered = [found[budget] for budget in sorted(found)]
    assert sorted(ordered, key=lambda result: result.mean) == ordered
    assert sorted(ordered, key=lambda result: -result.threshold) == ordered
    assert all(torch.equal(dynamic.state_dict()[key], value) for key, value in state.items())

    costs = counted(dynamic, data)
    assert result.mean == pytest.approx(sum(costs) / 12, rel=1e-5)
    assert (result.lowest, result.highest) == pytest.approx((min(costs), max(costs)), rel=1e-5)
    assert result.std == pytest.approx(float(torch.tensor(costs).std()), rel=1e-3)
    others = decisions(dynamic, torch.cat(batches(kind, count=3, seed=9)))
    assert result.std > 0.01 and any(len(set(each)) > 1 for each in others.values())
    for layer in dynamic_layers(dynamic).values():
        for axis in ("channel", "temporal"):
            each = layer.gate.thresholds(axis)
            assert (each[:-1] == torch.tensor(result.threshold)).all() and not each[-1:].any()


def test_the_threshold_is_the_lowest_that_meets_the_budget():
    dynamic, data = network("2d of three", gates=True), batches("2d of three", count=3)
    result = set_budget(dynamic, 0.7, data)
    assert result.by == "gates"
    for layer in dynamic_layers(dynamic).values():
        layer.gate.thresholds("channel")[:-1] -= 1e-3
    assert sum(counted(dynamic, data)) / 12 > 0.7


def test_gates_that_say_much_are_moved_as_far():
    """The range of thresholds is that of the gates, however far training has moved them."""
    dynamic, data = network("2d", gates=True), batches("2d")
    with torch.no_grad():
        for layer in dynamic_layers(dynamic).values():
            layer.gate.beta.add_(40)
    assert set_budget(dynamic, 0.7, data, by="gates").mean <= 0.7
    assert 30 < set_budget(dynamic, 0.7, data, by="gates").threshold < 50


# -- both ----------------------------------------------------------------------------------------------


def test_auto():
    dynamic, data = network("2d"), batches("2d")
    assert set_budget(dynamic, 0.7, data).by == set_budget(dynamic, 0.8, data).by == "layers"
    spread_gates(dynamic)
    assert set_budget(dynamic, 0.7, data).by == set_budget(dynamic, 0.8, data).by == "gates"


@pytest.mark.parametrize("by", ["gates", "layers"])
@pytest.mark.parametrize("kind", ["3d of three", "2d soft"])
def test_clear_budget(kind, by):
    dynamic, data = network(kind, gates=True), batches(kind)
    with torch.no_grad():
        wanted, state = dynamic(data[0]), {key: value.clone() for key, value in dynamic.state_dict().items()}
        first = set_budget(dynamic, 0.6, data, by=by)
        assert not torch.equal(dynamic(data[0]), wanted)
        moved = thresholds(dynamic).clone()
        assert set_budget(dynamic, 0.6, data, by=by) == first and torch.equal(thresholds(dynamic), moved)
        clear_budget(dynamic)
        assert torch.equal(dynamic(data[0]), wanted)
    assert all(torch.equal(value, state[key]) for key, value in dynamic.state_dict().items())


@pytest.mark.parametrize("by", ["gates", "layers"])
def test_thresholds_are_saved(by, tmp_path):
    dynamic, data = network("3d", gates=True), batches("3d")
    found = set_budget(dynamic, 0.7, data, by=by)
    redconvert.save_pretrained(dynamic, tmp_path)
    loaded = redconvert.from_pretrained(Net(conv3(3), conv3(16)).eval(), tmp_path)
    assert torch.equal(thresholds(loaded), thresholds(dynamic)) and thresholds(loaded).any()
    assert sum(counted(loaded, data)) / 8 == pytest.approx(found.mean, rel=1e-5)
    assert torch.equal(loaded(data[0]), dynamic(data[0]))


@pytest.mark.parametrize("by", ["gates", "layers"])
def test_nothing_else_changes(by):
    dynamic, data = network("3d", gates=True).train(), batches("3d")
    dynamic.convs[0].eval()
    listener = lambda layer, seen: None  # noqa: E731
    dynamic.convs[1].observers = (listener,)
    flags = [module.training for module in dynamic.modules()]
    attributes = [sorted(vars(module)) for module in dynamic.modules()]
    state = {key: value.clone() for key, value in dynamic.state_dict().items() if "threshold" not in key}
    with redconvert.forced(dynamic, channel=1, temporal=1):  # costs are those of the gates all the same
        found = set_budget(dynamic, 0.7, data, by=by)
        assert dynamic.convs[0].forced == (1, 1)
    assert [module.training for module in dynamic.modules()] == flags
    assert [sorted(vars(module)) for module in dynamic.modules()] == attributes
    assert dynamic.convs[1].observers == (listener,) and not dynamic._forward_pre_hooks
    assert all(torch.equal(dynamic.state_dict()[key], value) for key, value in state.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in dynamic.parameters())
    assert not thresholds(dynamic).requires_grad
    assert set_budget(dynamic.eval(), 0.7, data, by=by) == found


@pytest.mark.parametrize("by", ["gates", "layers"])
def test_what_a_batch_may_be(by):
    dynamic, data = network("2d", gates=True), batches("2d")
    wanted = set_budget(dynamic, 0.7, data, by=by)
    labels = torch.zeros(4, dtype=torch.long)
    assert set_budget(dynamic, 0.7, [(x, labels, "name") for x in data], by=by) == wanted
    assert set_budget(dynamic, 0.7, [{"x": x, "labels": labels} for x in data], by=by) == wanted
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(data), labels.repeat(2)), 4)
    assert set_budget(dynamic, 0.7, loader, by=by) == wanted
    assert set_budget(dynamic, 0.7, torch.cat(data), by=by).samples == 8
    single = set_budget(dynamic, 0.7, data[0][:1], by=by)
    assert single.samples == 1 and single.std == 0 and single.mean <= 0.7


def test_the_result_can_be_read():
    dynamic, data = network("2d"), batches("2d")
    found = set_budget(dynamic, 0.7, data)
    assert json.loads(found.to_json()) == found.to_dict()
    assert str(found).startswith(f"{found.mean:.1%} of the dense MACs on average over 8 samples (asked: 70.0%)")
    assert str(found).endswith("set by layers")
    assert Budget(0.5, 0.4, 0.3, 0.6, 0.1, "gates", 3, threshold=1.5).to_dict()["threshold"] == 1.5


def test_a_bar(capsys):
    pytest.importorskip("rich")
    dynamic, data = network("2d"), batches("2d")
    assert set_budget(dynamic, 0.7, data, progress=True) == set_budget(dynamic, 0.7, data)
    assert capsys.readouterr().out == ""


# -- refusals ------------------------------------------------------------------------------------------


def refused(dynamic: nn.Module, *args, match: str | None, error=redconvert.RedconvertError, **kwargs) -> str:
    """The message; thresholds, train flags and listeners are as they were."""
    for layer in dynamic_layers(dynamic).values():
        layer.gate.threshold.normal_()
    before, flags = thresholds(dynamic).clone(), [module.training for module in dynamic.modules()]
    with pytest.raises(error, match=match) as caught:
        set_budget(dynamic, *args, **kwargs)
    assert torch.equal(thresholds(dynamic), before)
    assert [module.training for module in dynamic.modules()] == flags
    assert not any(layer.observers for layer in dynamic_layers(dynamic).values())
    return str(caught.value)


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan"), "0.6", None])
def test_budgets_that_are_no_shares(budget):
    refused(network("2d"), budget, batches("2d"), match=r"in \(0, 1\]")


@pytest.mark.parametrize("kind", ["2d of three", "3d"])
@pytest.mark.parametrize("by", ["gates", "layers"])
def test_a_budget_below_the_least(kind, by):
    """The message names the least, and asking for that is granted."""
    dynamic, data = network(kind, gates=True), batches(kind)
    message = refused(dynamic, 0.01, data, by=by, match="below the least")
    table, dense = by_hand(dynamic, data[0])
    each = [min(macs.values()) if by == "layers" else macs[max(macs)] for macs in table.values()]
    least = (sum(each) + 4 * HEAD) / (sum(dense.values()) + 4 * HEAD)
    named = float(re.search(r"can cost, (\d\.\d+) of", message).group(1))
    assert least <= named <= least + 1.01e-4
    assert least - 1e-6 <= set_budget(dynamic, named, data, by=by).mean <= named
    refused(dynamic, least - 1e-4, data, by=by, match="below the least")


def test_batches_that_are_none():
    dynamic, data = network("2d"), batches("2d")
    refused(dynamic, 0.7, iter(data), match="only once")
    refused(dynamic, 0.7, (x for x in data), match="only once")
    refused(dynamic, 0.7, [], match="batches is empty")
    refused(dynamic, 0.7, ["text"], match="batch")
    refused(dynamic, 0.7, data, by="magic", match="'layers' or 'inputs'")
    with pytest.raises(redconvert.RedconvertError, match="no dynamic layers"):
        set_budget(nn.Conv2d(3, 3, 3), 0.7, data)


class Breaks(nn.Module):
    """A head that fails from its n-th call on."""

    def __init__(self, head: nn.Module, calls: int) -> None:
        super().__init__()
        self.head, self.left = head, calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left <= 0:
            raise ZeroDivisionError
        return self.head(x)


@pytest.mark.parametrize("by", ["gates", "layers"])
@pytest.mark.parametrize("call", [1, 2, 4, 6, 8])
def test_an_error_in_the_network(by, call):
    dynamic, data = network("2d", gates=True).train(), batches("2d")
    dynamic.head = Breaks(dynamic.head, call)
    refused(dynamic, 0.7, data, by=by, match=None, error=ZeroDivisionError)
    assert all(parameter.requires_grad for parameter in dynamic.parameters())


def test_clips_of_another_length_than_the_example():
    dynamic = network("3d")
    x = torch.randn(CLIPS[0], 3, 8, 6, 6)
    found = set_budget(dynamic, 0.7, [x])
    table, dense = by_hand(dynamic, x)
    taken = {name: each[0] for name, each in decisions(dynamic, x).items()}
    executed = 4 * HEAD + sum(table[name][each] for name, each in taken.items())
    assert found.mean == pytest.approx(executed / (sum(dense.values()) + 4 * HEAD), rel=1e-5)
