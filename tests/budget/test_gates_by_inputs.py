"""Gates in closed form: rates and regressions against their definitions, then what a network does with them."""

from __future__ import annotations

import pytest
import torch
from budget_networks import KINDS, Net, batches, conv2, decisions, network
from torch import Tensor

import redconvert
from redconvert import RedconvertError, clear_budget, set_budget
from redconvert.budget import calibrate_gates
from redconvert.budget.difficulty import measure_difficulty
from redconvert.budget.gates import _predictor, _rates
from redconvert.layers import dynamic_layers

F64 = torch.float64
HARD = [kind for kind in KINDS if "soft" not in kind]


def gates(dynamic) -> Tensor:
    states = [layer.gate.state_dict() for layer in dynamic_layers(dynamic).values()]
    return torch.cat([value.flatten().double() for state in states for value in state.values()])


# -- parts ---------------------------------------------------------------------------------------------


def test_the_largest_candidate_above_the_price_is_the_best():
    torch.manual_seed(0)
    for _ in range(50):
        harm = torch.cat([torch.zeros(1), torch.rand(3)]).double()
        macs = torch.rand(4, dtype=F64).sort(descending=True).values
        rates = _rates(harm, macs)
        for price in (0.01, 0.1, 0.5, 2.0, 10.0):
            opened = [i for i in range(3) if rates[i] > price] + [3]
            assert opened[0] == int((harm + price * macs).argmin())


def test_a_candidate_that_saves_nothing_is_never_worth_closing_for():
    rates = _rates(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 6.0, 3.0]))
    assert rates.tolist() == [1.0, pytest.approx(1 / 3)]
    assert _rates(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 5.0])).tolist() == [float("inf")]


@pytest.mark.parametrize("features", [6, 200])
def test_difficulty_is_predicted_as_far_as_it_can_be(features):
    """A linear target, with more samples than features and with fewer."""
    torch.manual_seed(1)
    x = torch.randn(100, features, dtype=F64) * torch.logspace(0, 2, features, dtype=F64) + 5
    y = 0.3 * (x[:, 0] - 5) if features == 6 else x[:, :40].sum(1) / 40
    found = _predictor(x[:80], y[:80])
    said = found.slope * torch.tanh(x @ found.weight - found.mean)
    assert float(said[:80].exp().mean().log()) == pytest.approx(found.log_mean, abs=1e-9)
    correlation = torch.corrcoef(torch.stack([said[80:], y[80:]]))[0, 1]
    assert correlation > (0.95 if features == 6 else 0.2)


@pytest.mark.parametrize("x", [torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), torch.ones(40, 3)])
def test_what_tells_nothing_predicts_nothing(x):
    y = torch.randn(40, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = _predictor(x, y)
    assert found.slope == 0 and found.log_mean == 0 and not found.weight.any()


def test_harms_are_moves_over_leads():
    """All that follows is linear: the moves towards the runners-up, from running each decision."""
    dynamic = network("2d of three", dtype=F64, between=lambda x: x)
    x = torch.cat(batches("2d of three", dtype=F64))
    found = measure_difficulty(dynamic, dynamic_layers(dynamic), [x[:4], x[4:]])
    with torch.no_grad():
        full = dynamic(x)
        order = full.argsort(1, descending=True)[:, :4]
        leads = (full.gather(1, order)[:, :1] - full.gather(1, order))[:, 1:]
        bearable = (leads + 0.1 * leads[:, 0].mean()).square()
        relative = []
        for name, layer in dynamic_layers(dynamic).items():
            for i in (1, 2):
                with redconvert.forced(layer, channel=i):
                    move = (dynamic(x) - full).gather(1, order)
                harm = ((move[:, 1:] - move[:, :1]).square() / bearable).sum(1)
                assert float(found.harms[name][i, 0]) == pytest.approx(float(harm.mean()), rel=1e-6)
                if i == 1:
                    relative.append(harm / harm.mean())
    torch.testing.assert_close(found.channel, torch.stack(relative).mean(0).log(), rtol=1e-6, atol=1e-6)
    assert not found.temporal.any() and found.pooled["convs.0"].shape == (8, 3)
    torch.testing.assert_close(found.pooled["convs.0"], x.mean((2, 3)).float())
    assert found.rows["convs.1"].tolist() == list(range(8))


def test_rows_of_layers_that_are_called_twice_and_of_frames():
    for kind, wanted in (("twice", [0, 1, 2, 3] * 2), ("frames in the batch", [n // 4 for n in range(16)])):
        dynamic = network(kind)
        found = measure_difficulty(dynamic, dynamic_layers(dynamic), batches(kind))
        assert found.rows["convs.1"].tolist() == wanted + [n + 4 for n in wanted]
        assert len(found.pooled["convs.1"]) == 2 * len(wanted) and len(found.channel) == 8


# -- the whole -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HARD)
def test_a_calibrated_network_gets_gates(kind):
    dynamic, data = network(kind), batches(kind, count=6)
    with torch.no_grad():
        wanted = dynamic(data[0])
        found = set_budget(dynamic, 0.85, data, by="inputs")
        assert found.by == "inputs" and found.samples == 24 and found.mean <= 0.85 and found.threshold > 0
        assert set_budget(dynamic, 0.85, data, by="inputs") == found  # from whatever gates there were
        lower = set_budget(dynamic, 0.75, data, by="gates")
        assert lower.mean <= 0.75 and lower.threshold > found.threshold
        clear_budget(dynamic)
        assert torch.equal(dynamic(data[0]), wanted)
        assert all(set(each) == {(0, 0)} for each in decisions(dynamic, data[1]).values())


def test_gates_without_a_budget_are_open():
    one, two = network("3d of three"), network("3d of three")
    data = batches("3d of three", count=6)
    set_budget(two, 0.5, data[:1])  # thresholds that must go
    for dynamic in (one, two):
        calibrate_gates(dynamic, data)
        assert all(set(each) == {(0, 0)} for each in decisions(dynamic, data[1]).values())
    assert torch.equal(gates(one), gates(two))
    assert set_budget(one, 0.8, data, by="gates").mean == set_budget(two, 0.8, data, by="inputs").mean
    assert torch.equal(gates(one), gates(two))
    with pytest.raises(RedconvertError, match="only once"):
        calibrate_gates(one, iter(data))


def test_hard_inputs_cost_more():
    """Images with a lead of nothing, and bright ones that are as the class wants them."""
    dynamic = network("2d")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 3, 6, 6, generator=generator)
    x[::2] += 3 * torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    found = measure_difficulty(dynamic, dynamic_layers(dynamic), x)
    result = set_budget(dynamic, 0.8, x, by="inputs")
    shares = {}
    for name, each in decisions(dynamic, x).items():
        shares[name] = torch.tensor([1.0 - index for index, _ in each])
    full = torch.stack(list(shares.values())).sum(0)
    even, odd = (float(found.channel[start::2].mean()) for start in (0, 1))
    assert result.std > 0.02 and abs(even - odd) > 0.5
    assert (full[::2].mean() - full[1::2].mean()) * (even - odd) > 0.05


def test_gates_are_saved_and_kept(tmp_path):
    dynamic, data = network("2d"), batches("2d", count=4)
    found = set_budget(dynamic, 0.8, data, by="inputs")
    taken = decisions(dynamic, torch.cat(data))
    redconvert.save_pretrained(dynamic, tmp_path)
    loaded = redconvert.from_pretrained(Net(conv2(3), conv2(16), conv2(16)).eval(), tmp_path)
    assert decisions(loaded, torch.cat(data)) == taken
    redconvert.keep_budget(dynamic)
    assert decisions(dynamic, torch.cat(data)) == taken
    assert set_budget(dynamic, 1.0, data, by="gates").mean >= found.mean


def test_soft_gates_and_budgets_too_low_are_refused():
    soft = network("2d soft")
    before = gates(soft)
    with pytest.raises(RedconvertError, match="gate='hard'"):
        set_budget(soft, 0.8, batches("2d soft"), by="inputs")
    assert torch.equal(gates(soft), before)
    dynamic = network("2d", gates=True)
    before = gates(dynamic)
    with pytest.raises(RedconvertError, match="below the least"):
        set_budget(dynamic, 0.05, batches("2d"), by="inputs")
    assert torch.equal(gates(dynamic), before)


def test_outputs_that_are_no_scores():
    dynamic = network("2d", classes=1)
    found = set_budget(dynamic, 0.8, batches("2d", count=4), by="inputs")
    assert found.mean <= 0.8


def test_an_answer_that_is_not_finite():
    dynamic = network("2d")
    before = gates(dynamic)
    with pytest.raises(RedconvertError, match="not finite"):
        set_budget(dynamic, 0.8, [torch.full((4, 3, 6, 6), float("nan"))], by="inputs")
    assert torch.equal(gates(dynamic), before)
