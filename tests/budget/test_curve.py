"""Curves of answers against budgets: every number by hand, and the network as it was before."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from budget_networks import CLASSES, Net, batches, conv2, network
from torch import nn

import redconvert
from redconvert.budget import BudgetCurve, CurvePoint, budget_curve, clear_budget, harms, set_budget
from redconvert.errors import BudgetTooLowError, RedconvertError
from redconvert.evaluate import spread_of_macs

BUDGETS = (0.6, 0.9, 0.75)


def labelled(data):
    generator = torch.Generator().manual_seed(3)
    return [(x, torch.randint(CLASSES, (len(x),), generator=generator)) for x in data]


def by_hand(dynamic, test):
    """Agreement, divergence and accuracy of the network as it is."""
    x, y = (torch.cat(each) for each in zip(*test, strict=True))
    with torch.no_grad():
        now = dynamic(x)
        with redconvert.disabled(dynamic):
            dense = dynamic(x)
    p, q = dense.softmax(1), now.softmax(1)
    same = (now.argmax(1) == dense.argmax(1)).double().mean()
    return float(same), float((p * (p / q).log()).sum(1).mean()), float((now.argmax(1) == y).double().mean())


@pytest.mark.parametrize(("gates", "refit"), [(False, False), (False, True), (True, False)])
def test_points_by_hand(gates, refit):
    """Chosen on some samples and measured on others, by layers, and by gates where these tell inputs apart."""
    dynamic, data = network("2d of three", gates=gates), batches("2d of three")
    test = labelled(batches("2d", 4, seed=5))
    before = copy.deepcopy(dynamic.state_dict())
    curve = budget_curve(dynamic, data, BUDGETS, test=test, refit=refit)
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())
    assert [point.budget for point in curve.points] == [0.9, 0.75, 0.6]
    assert (curve.samples, curve.refitted, curve.unreachable, curve.model) == (16, refit, (), "Net")
    for point in curve.points:
        again = copy.deepcopy(dynamic)
        clear_budget(again)
        found = set_budget(again, point.budget, data)
        assert found.by == ("gates" if gates else "layers")
        if refit:
            redconvert.calibrate(again, data, decisions="gates")
        spread = spread_of_macs(again, [x for x, _ in test])
        assert point.share == pytest.approx(spread.mean / float(spread.dense.mean()), rel=1e-9)
        same, apart, right = by_hand(again, test)
        assert point.agreement == pytest.approx(same) and point.accuracy == pytest.approx(right)
        assert point.divergence == pytest.approx(apart, rel=1e-3, abs=1e-7)
    assert curve.points[-1].divergence > curve.points[0].divergence >= 0


@pytest.mark.parametrize("refit", [False, True])
def test_the_network_is_left_at_the_cheapest_that_serves(refit):
    dynamic, data = network("2d of three"), batches("2d of three")
    test = labelled(batches("2d", 4, seed=5))
    before, again = copy.deepcopy(dynamic.state_dict()), copy.deepcopy(dynamic)
    curve = budget_curve(dynamic, data, BUDGETS, test=test, refit=refit, keep=0.0)
    set_budget(again, curve.cheapest(0.0).budget, data, by="layers")
    if refit:
        redconvert.calibrate(again, data, decisions="gates")
    wanted = again.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in dynamic.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())
    dynamic.load_state_dict(before)
    budget_curve(dynamic, data, BUDGETS[:1], test=test, refit=refit, keep=1.0)  # at which an answer changes
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())
    with pytest.raises(RedconvertError, match=r"keep=95 must be a share in \[0, 1\]"):
        budget_curve(dynamic, data, BUDGETS, keep=95)
    x, y = (torch.cat(each) for each in zip(*test, strict=True))
    with redconvert.disabled(dynamic), torch.no_grad():
        assert curve.dense_accuracy == pytest.approx(float((dynamic(x).argmax(1) == y).double().mean()))


def test_a_budget_that_is_there_stays_and_does_not_matter():
    dynamic, data = network("2d"), batches("2d")
    free = budget_curve(dynamic, data, (0.8,))
    set_budget(dynamic, 0.6, data)
    before = copy.deepcopy(dynamic.state_dict())
    assert budget_curve(dynamic, data, (0.8,)) == free
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())


def test_effects_spare_a_pass_and_change_nothing():
    dynamic, data = network("3d"), batches("3d")
    wanted = set_budget(dynamic, 0.7, data)
    clear_budget(dynamic)
    found = set_budget(dynamic, 0.7, data, effects=harms(dynamic, data))
    assert found == wanted
    nothing = {name: torch.zeros_like(each) for name, each in harms(dynamic, data).items()}
    assert set(set_budget(dynamic, 0.7, data, effects=nothing).harms.values()) == {0.0}


class Pixels(Net):
    """A class for every pixel."""

    def forward(self, x):
        for conv in self.convs:
            x = self.between(conv(x))
        return {"aux": x.flatten(1)[:, 0], "out": self.head(x.movedim(1, -1)).movedim(-1, 1)}


def test_every_pixel_is_an_answer():
    torch.manual_seed(0)
    x, model = torch.randn(4, 3, 6, 6), Pixels(conv2(3), conv2(16)).eval()
    dynamic = redconvert.convert(model, redconvert.ConvertConfig(rules=[("*", {})]), example_inputs=x)
    redconvert.calibrate(dynamic, [x])
    labels = torch.randint(CLASSES, (4, 6, 6))
    curve = budget_curve(dynamic, [(x, labels)], (0.7,))
    set_budget(dynamic, 0.7, [x])
    with torch.no_grad():
        now, dense = dynamic(x)["out"].argmax(1), model(x)["out"].argmax(1)
    point = curve.points[0]
    assert point.agreement == pytest.approx(float((now == dense).double().mean()))
    assert point.accuracy == pytest.approx(float((now == labels).double().mean()))
    assert curve.samples == 4


@pytest.mark.parametrize("labels", [None, torch.zeros(4), torch.zeros(4, 2, dtype=torch.long)])
def test_without_labels(labels):
    """Also where what stands beside the inputs is no class index per answer."""
    x = batches("2d")[0]
    curve = budget_curve(network("2d"), [x if labels is None else (x, labels)], (0.8,))
    assert curve.dense_accuracy is None and curve.points[0].accuracy is None
    assert "right" not in str(curve)


def curve_of(*points):
    return BudgetCurve("Net", tuple(CurvePoint(b, s, a, 0.1, 0.5) for b, s, a in points), (0.1,), 10, 0.6, False)


def test_the_cheapest():
    curve = curve_of((0.9, 0.89, 0.99), (0.8, 0.79, 0.93), (0.7, 0.69, 0.95), (0.6, 0.59, 0.7))
    assert curve.cheapest(0.95).budget == 0.7 and curve.cheapest(0.96).budget == 0.9
    with pytest.raises(RedconvertError, match=r"do 99.5% of the answers stay: the most is 99.0%, at 89.0%"):
        curve.cheapest(0.995)


def test_as_text_json_and_picture(tmp_path):
    curve = curve_of((0.9, 0.891, 0.99), (0.6, 0.59, 0.7))
    lines = str(curve).splitlines()
    assert lines[1].split() == ["90.0%", "89.1%", "99.0%", "0.1000", "50.0%"]
    assert lines[3].split() == ["dense", "100.0%", "100.0%", "0.0000", "60.0%"]
    assert lines[4].split()[0] == "10.0%" and lines[5] == "10 samples"
    assert json.loads(curve.to_json())["points"][1]["share"] == 0.59
    pytest.importorskip("matplotlib")
    curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    with pytest.raises(RedconvertError, match="cannot be written"):
        curve.plot(tmp_path / "no" / "curve.png")


def test_what_is_below_the_least():
    dynamic, data = network("2d"), batches("2d")
    curve = budget_curve(dynamic, data, (0.9, 0.05))
    assert [point.budget for point in curve.points] == [0.9] and curve.unreachable == (0.05,)
    with pytest.raises(BudgetTooLowError, match=r"below the least that this network can cost, 0\.\d+"):
        budget_curve(dynamic, data, (0.05, 0.02))


def test_refusals():
    dynamic, data = network("2d"), batches("2d")
    before = copy.deepcopy(dynamic.state_dict())
    with pytest.raises(RedconvertError, match="budgets is empty"):
        budget_curve(dynamic, data, ())
    with pytest.raises(RedconvertError, match=r"budget=1.5 must be a share of the dense MACs in \(0, 1\]"):
        budget_curve(dynamic, data, (0.5, 1.5))
    with pytest.raises(RedconvertError, match="can be read only once"):
        budget_curve(dynamic, iter(data))
    with pytest.raises(RedconvertError, match="can be read only once"):
        budget_curve(dynamic, data, test=iter(data))
    with pytest.raises(RedconvertError, match="has no dynamic layers"):
        budget_curve(nn.Conv2d(3, 3, 1), data)
    body = redconvert.convert(
        nn.Sequential(conv2(3), nn.Flatten(0)), redconvert.ConvertConfig(rules=[("*", {})]), example_inputs=data[0]
    )
    with pytest.raises(RedconvertError, match=r"compares class scores \(N, classes, ...\), and the network returns"):
        budget_curve(body, data)
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())
