"""MACs sample by sample against hand counts, and Spearman against values worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from redconvert import LayerConfig, forced
from redconvert.errors import RedconvertError
from redconvert.evaluate import rank_correlation, spread_of_macs
from redconvert.layers import DynamicConv3d

CONFIG = LayerConfig(cheap="pointwise", gate_hidden=4)
FRAME = 6 * 6
GATE = 3 * 4 * FRAME + 3 * 4 * 4 + 4 * 4  # average, FC1, FC2
HEAD = 8 * 5
DENSE = 8 * 4 * FRAME * 81 + HEAD
# (channel, temporal) -> MACs: convolution + Phi_c + Phi_t + gate + head
COST = {
    (0, 0): 8 * 4 * FRAME * 81 + GATE + HEAD,
    (1, 0): 4 * 4 * FRAME * 81 + 4 * 4 * 4 * FRAME + GATE + HEAD,
    (0, 1): 8 * 2 * FRAME * 81 + 2 * 2 * FRAME * 8 + GATE + HEAD,
    (1, 1): 4 * 2 * FRAME * 81 + 4 * 4 * 2 * FRAME + 2 * 2 * FRAME * 8 + GATE + HEAD,
}
TAKEN = [(0, 1), (0, 0), (1, 1), (1, 0)]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = DynamicConv3d(3, 8, 3, padding=1, config=CONFIG, gate_frames=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((2, 3, 4)))


def clips(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 4, 6, 6)


@pytest.mark.parametrize("progress", [False, True])
def test_every_sample_is_counted_on_its_own(progress: bool) -> None:
    model = Tiny().train()
    costs = [COST[decision] for decision in TAKEN]
    loader = DataLoader(TensorDataset(clips(8), torch.arange(8)), batch_size=4)
    with forced(model, channel=[i for i, _ in TAKEN], temporal=[j for _, j in TAKEN]):
        spread = spread_of_macs(model, loader, progress=progress)
    assert spread.macs.tolist() == costs * 2 and spread.dense.tolist() == [DENSE] * 8
    assert spread.samples == 8 and spread.mean == sum(costs) / 4
    assert (spread.min, spread.max) == (COST[1, 1], COST[0, 0])
    assert spread.std == pytest.approx(math.sqrt(sum((cost - spread.mean) ** 2 for cost in costs) / 4))
    assert spread.cheapest(3) == [2, 6, 0] and spread.dearest(3) == [1, 5, 3]
    assert model.training and all(not module._forward_hooks for module in model.modules())


def test_quantiles_and_json() -> None:
    model = Tiny()
    with forced(model, channel=[i for i, _ in TAKEN], temporal=[j for _, j in TAKEN]):
        spread = spread_of_macs(model, clips())
    low, second, third, high = sorted(COST.values())
    assert (spread.quantile(0), spread.quantile(1)) == (low, high)
    assert spread.quantile(0.5) == (second + third) / 2
    assert spread.quantile(0.25) == pytest.approx(low + 0.75 * (second - low))
    values = spread.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["macs"] == [COST[decision] for decision in TAKEN]
    assert values["quantiles"]["0.5"] == spread.quantile(0.5)
    assert values["share"] == pytest.approx(sum(COST.values()) / (4 * DENSE))
    assert str(spread).startswith(f"GMACs of 4 samples: mean {spread.mean / 1e9:.3f}, std ")


def test_gates_that_agree_have_no_spread() -> None:
    spread = spread_of_macs(Tiny(), [clips(2), (clips(1), torch.zeros(1))])
    assert spread.macs.tolist() == [COST[0, 0]] * 3
    assert (spread.std, spread.cheapest(2), spread.dearest(2)) == (0.0, [0, 1], [0, 1])


def test_macs_go_along_with_what_decides_them() -> None:
    model, channel = Tiny(), [0, 1, 0, 1, 1, 0]
    with forced(model, channel=channel, temporal=0):
        spread = spread_of_macs(model, clips(6))
    assert rank_correlation(spread.macs, channel) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 15], 0.5),  # ranks 1 2 3 and 1 3 2: 1 - 6 * 2 / (3 * 8)
        ([1, 2, 3, 4], [math.exp(x) for x in (1, 2, 3, 4)], 1.0),
        ([1, 2, 3, 4], [0.4, 0.3, 0.2, -9.0], -1.0),
        # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: centred -1.5 0 0 1.5 and -1.5 -0.5 0.5 1.5, so 4.5 / sqrt(4.5 * 5).
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
        # Ranks 2, 2, 2, 4.5, 4.5 and 3.5, 3.5, 1, 2, 5: centred -1 -1 -1 1.5 1.5 and 0.5 0.5 -2 -1 2.
        ([0, 0, 0, 7, 7], [5, 5, 1, 3, 9], 2.5 / math.sqrt(7.5 * 9.5)),
    ],
)
def test_rank_correlation_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(torch.tensor(b), a) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_without_an_order_is_nan() -> None:
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_refusals() -> None:
    with pytest.raises(RedconvertError, match="3 and 2 values"):
        rank_correlation([1, 2, 3], [1, 2])
    with pytest.raises(RedconvertError, match="at least 2"):
        rank_correlation([1], [1])
    with pytest.raises(RedconvertError, match="no dynamic layers"):
        spread_of_macs(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(RedconvertError, match="batches is empty"):
        spread_of_macs(Tiny(), [])
    with pytest.raises(RedconvertError, match=r"quantile\(1\.5\)"):
        spread_of_macs(Tiny(), clips(1)).quantile(1.5)
