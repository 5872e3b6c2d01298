"""Candidates by shares: counts by hand, refusals, and a round trip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import redconvert
from redconvert import ConvertConfig, LayerConfig, RedconvertError
from redconvert.calibrate.plot import _label
from redconvert.layers import Candidates


@pytest.mark.parametrize(
    ("channels", "groups", "align", "wanted"),
    [(64, 1, 1, (64, 48, 40, 16)), (10, 1, 1, (10, 8, 7, 3)), (64, 1, 16, (64, 48, 16)), (12, 4, 1, (12, 9, 3))],
)
def test_counts(channels, groups, align, wanted):
    config = LayerConfig(shares=(0.75, 0.625, 0.25), align=align)
    assert Candidates.build(channels, groups, config, temporal=True) == Candidates(wanted, (1, 2))


def test_halves_are_the_default():
    for count in range(1, 70):
        each = [
            Candidates.build(count, 1, LayerConfig(search_space=3, shares=s), temporal=False)
            for s in (None, (0.5, 0.25))
        ]
        assert each[0] == each[1]


@pytest.mark.parametrize("shares", [(), (1.0,), (0.5, 0.5), (0.5, 0.75), (0.5, 0.0), "0.5", (True,), ("a",), 1.5])
def test_shares_that_do_not_fall(shares):
    with pytest.raises(RedconvertError, match="must fall from below 1"):
        LayerConfig(shares=shares)


def test_a_network_of_three_quarters(tmp_path):
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).eval()  # noqa: E731
    model, x = build(), torch.randn(2, 3, 9, 9)
    config = ConvertConfig(shares=[0.75, 0.5], cheap="pointwise", rules=[("*", {})])
    assert ConvertConfig.from_json(config.to_json()) == config and config.shares == (0.75, 0.5)
    dynamic = redconvert.convert(model, config, example_inputs=x)
    assert dynamic[1].candidates.channels == (16, 12, 8)
    result = redconvert.calibrate(dynamic, x)
    assert [_label(result.layers, "channels", i) for i in (0, 1)] == ["75% computed", "50% computed"]
    redconvert.save_pretrained(dynamic, tmp_path)
    again = redconvert.from_pretrained(build(), tmp_path)
    with torch.no_grad(), redconvert.forced(dynamic, channel=1), redconvert.forced(again, channel=1):
        assert torch.equal(again(x), dynamic(x)) and not torch.equal(dynamic(x), model(x))
    assert again[1].config.shares == (0.75, 0.5)
