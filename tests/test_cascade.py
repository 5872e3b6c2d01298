"""Two passes where one is not enough: who is asked again, what that costs, and whose answers come out."""

import copy

import pytest
import torch
from torch import nn

import redconvert
from redconvert import Cascade, RedconvertError, cascade
from redconvert.cascade import margin
from redconvert.evaluate import spread_of_macs


class Net(nn.Module):
    """Images or clips to five classes, with answers of different certainty."""

    def __init__(self, dims=2):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.body = nn.Sequential(conv(3, 16, 3, padding=1), norm(16), nn.ReLU(), conv(16, 16, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return 20 * self.head(self.body(x).flatten(2).mean(2))


def images(n=24, dims=2):
    return torch.randn(n, 3, *[6] * dims, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 2, n).view(
        -1, *[1] * (dims + 1)
    )


def network(dims=2, budget=0.6):
    torch.manual_seed(0)
    model, x = Net(dims).eval(), images(dims=dims)
    config = redconvert.ConvertConfig(min_saving=0, cheap="pointwise", temporal=False)
    dynamic = redconvert.convert(model, config, example_inputs=x).eval()
    redconvert.calibrate(dynamic, [x])
    redconvert.set_budget(dynamic, budget, [x])
    return model, dynamic, x


def test_margin_by_hand():
    scores = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -9.0]])
    p = scores.softmax(1)
    assert torch.allclose(margin(scores), torch.stack([p[0, 1] - p[0, 2], torch.tensor(0.0)]))


def test_who_is_asked_again():
    model, dynamic, x = network()
    found = cascade(dynamic, [x], 0.9)
    little, dense = dynamic(x), model(x)
    sure = margin(little)
    unsure = sure < found.threshold
    assert 0 < unsure.sum() < len(x)
    assert sure[unsure].max() < sure[~unsure].min()
    out = found(x)
    assert torch.equal(out[~unsure], little[~unsure])
    assert torch.allclose(out[unsure], dense[unsure], atol=1e-5)
    assert not torch.allclose(little[unsure], dense[unsure], atol=1e-3)
    assert torch.allclose(found(x[:1])[0], out[0], atol=1e-5)


def test_cost_by_hand():
    model, dynamic, x = network()
    spread = spread_of_macs(dynamic, [x])
    little, batches = spread.mean / float(spread.dense.mean()), [x[:10], x[10:]]
    sure = torch.cat([margin(dynamic(batch)) for batch in batches])  # of larger batches the last digits may differ
    for budget in (little, 0.8, 0.9, little + 1, 5.0):
        found = cascade(dynamic, batches, budget)
        again = int((sure < found.threshold).sum())
        assert again == min(int((budget - little) * len(x) + 1e-9), len(x))
        cost = found.cost
        assert (cost.samples, cost.big) == (24, 1.0)
        assert cost.asked_again == pytest.approx(again / 24)
        assert cost.mean == pytest.approx(little + again / 24) and cost.mean <= budget + 1e-9
    assert torch.allclose(found(x), model(x), atol=1e-5)
    assert f"{cost.mean:.1%} of the dense MACs" in str(cost) and cost.to_dict()["little"] == cost.little


def test_another_network_answers():
    """Its own cost is counted, by hand here: a smaller one."""
    _, dynamic, x = network()
    big = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    found = cascade(dynamic, [x], 0.7, big=big)
    pixels, rest = 36, 16 * 5
    dense = pixels * (3 * 16 * 9 + 16 * 16 * 9) + rest
    assert found.cost.big == pytest.approx((pixels * 3 * 16 * 9 + rest) / dense, rel=1e-6)
    unsure = margin(dynamic(x)) < found.threshold
    assert 0 < unsure.sum() < 24
    assert torch.allclose(found(x)[unsure], big(x)[unsure], atol=1e-6)


def test_a_frozen_network_asks_its_original():
    """The same samples as of the dynamic network that it was; costs by hand are shares of the original."""
    model, dynamic, x = network()
    frozen = redconvert.freeze(dynamic, (1, 0))
    with redconvert.forced(dynamic, channel=1):
        little = dynamic(x)
    found = cascade(frozen, [x[:10], x[10:]], 0.9, big=model)
    half, dense = 36 * (8 * 3 * 9 + 8 * 8 + 8 * 16 * 9 + 8 * 8) + 16 * 5, 36 * (16 * 3 * 9 + 16 * 16 * 9) + 16 * 5
    again = int((0.9 - half / dense) * 24)
    assert (found.cost.little, found.cost.big) == (pytest.approx(half / dense), 1.0)
    assert found.cost.asked_again == again / 24 and 0 < again < 24
    out = found(x)
    unsure = torch.zeros(24, dtype=torch.bool).index_fill(0, margin(little).argsort()[:again], True)
    assert torch.equal(found.asked_again, unsure.nonzero().flatten())
    assert torch.allclose(out[~unsure], little[~unsure], atol=1e-4)
    assert torch.allclose(out[unsure], model(x)[unsure], atol=1e-4)
    twin = Cascade(frozen, model, float(found.threshold))
    assert torch.equal(twin(x), out)


@pytest.mark.parametrize("deployed", [False, True])
def test_both_answers_together(deployed):
    """Of those who are asked again; the others' are untouched."""
    model, dynamic, x = network()
    found = cascade(dynamic, [x], 0.9, blend=0.3)
    plain = cascade(dynamic, [x], 0.9)
    assert found.cost == plain.cost and float(found.threshold) == float(plain.threshold)
    found = found.deployed(x) if deployed else found
    little, dense, out = dynamic(x), model(x), found(x)
    unsure = torch.zeros(len(x), dtype=torch.bool).index_fill(0, found.asked_again, True)
    assert 0 < unsure.sum() < len(x)  # one lies on the threshold: deployed, it may fall to either side
    assert torch.allclose(out[~unsure], little[~unsure], atol=1e-3)
    assert torch.allclose(out[unsure], 0.3 * little[unsure] + 0.7 * dense[unsure], atol=1e-3)
    assert not torch.allclose(out[unsure], dense[unsure], atol=1e-2)
    assert "blend=0.3" in str(found) and "blend" not in str(plain)
    for bad in (1.0, -0.1, "half"):
        with pytest.raises(RedconvertError, match=r"must be the first answer's share"):
            cascade(dynamic, [x], 0.9, blend=bad)


@pytest.mark.parametrize("deployed", [False, True])
def test_reports_count_both_passes(deployed):
    """Sample by sample, by hand; layers are those of the first pass, and "dense" is one pass."""
    model, dynamic, x = network()
    first = spread_of_macs(dynamic, [x])
    dense = 36 * (3 * 16 * 9 + 16 * 16 * 9) + 16 * 5
    found = cascade(dynamic, [x], 0.9)
    found = found.deployed(x) if deployed else found
    spread = spread_of_macs(found, [x])
    unsure = margin(found.little(x)) < found.threshold
    assert 0 < unsure.sum() < 24
    assert torch.equal(spread.macs, first.macs + dense * unsure) and torch.equal(spread.dense, first.dense)
    report = redconvert.report(found, x, repeats=1)
    assert report.dense_macs == dense and report.executed_macs == pytest.approx(spread.mean)
    assert (report.executed_min, report.executed_max) == (spread.min, spread.max)
    assert [layer.calls for layer in report.layers] == [1, 1] and all(layer.dynamic_ms for layer in report.layers)
    found(x)
    assert torch.equal(found.asked_again, unsure.nonzero().flatten())
    with redconvert.disabled(found):
        assert torch.allclose(found(x), model(x), atol=1e-5) and not len(found.asked_again)


def test_reports_count_another_network():
    _, dynamic, x = network()
    big = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    found = cascade(dynamic, [x], 0.7, big=big)
    spread, first = spread_of_macs(found, [x]), spread_of_macs(dynamic, [x])
    unsure = margin(dynamic(x)) < found.threshold
    assert torch.equal(spread.macs, first.macs + (36 * 3 * 16 * 9 + 16 * 5) * unsure)
    assert spread.mean / float(spread.dense.mean()) == pytest.approx(found.cost.mean)


@pytest.mark.parametrize("dims", [2, 3])
def test_deployed(dims):
    model, dynamic, x = network(dims)
    found = cascade(dynamic, [x], 0.85)
    found.threshold.sub_(1e-4)  # one lies on it: deployed, it might fall to either side
    fast = found.deployed(x)
    assert isinstance(fast.little, redconvert.Deployed) and fast.cost == found.cost
    assert torch.allclose(fast(x), found(x), atol=1e-4)
    assert not torch.allclose(fast(x), dynamic(x), atol=1e-3)
    redconvert.clear_budget(dynamic)  # shared: the deployed network follows
    assert torch.allclose(fast(x), model(x), atol=1e-4)


def test_arguments_of_every_kind():
    """Keyword arguments, and rows that are frames of a sample."""
    _, dynamic, x = network()

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = dynamic

        def forward(self, frames, scale=None):
            return self.net(frames).unflatten(0, (-1, 2)).mean(1) * scale

    folded, scale = Folded().eval(), torch.linspace(0.1, 1, 12)[:, None]
    little = folded(x, scale=scale)
    threshold = float(margin(little).median())
    out = Cascade(folded, threshold=threshold)(x, scale=scale)
    with redconvert.disabled(dynamic):
        dense = folded(x, scale=scale)
    unsure = margin(little) < threshold
    assert 0 < unsure.sum() < 12
    assert torch.allclose(out, torch.where(unsure[:, None], dense, little), atol=1e-5)


def test_it_is_saved_like_any_module(tmp_path):
    _, dynamic, x = network()
    found = cascade(dynamic, [x], 0.85)
    twin = Cascade(copy.deepcopy(dynamic))
    assert not torch.equal(twin(x), found(x))
    twin.load_state_dict(found.state_dict())
    assert torch.equal(twin(x), found(x))


def test_refusals():
    model, dynamic, x = network()
    with pytest.raises(RedconvertError, match=r"budget=0.1 is below what the first pass alone costs, 0\.\d+"):
        cascade(dynamic, [x], 0.1)
    with pytest.raises(RedconvertError, match="can be read only once"):
        cascade(dynamic, iter([x]), 0.9)
    with pytest.raises(RedconvertError, match="must be a positive share"):
        cascade(dynamic, [x], 0)
    with pytest.raises(RedconvertError, match="has no dynamic layers"):
        cascade(model, [x], 0.9)
    with pytest.raises(RedconvertError, match="batches is empty"):
        cascade(dynamic, [], 0.9)
    with pytest.raises(RedconvertError, match="for inference"):
        Cascade(dynamic).train()
    body = redconvert.convert(model.body, redconvert.ConvertConfig(min_saving=0), example_inputs=x)
    with pytest.raises(RedconvertError, match=r"the network returns \(24, 16, 6, 6\)"):
        Cascade(body)(x)
