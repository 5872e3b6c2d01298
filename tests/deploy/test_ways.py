"""A reduced candidate in parts or as one convolution: the same numbers, and the faster way."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from deploy_networks import CHEAP, Image, Video, dynamic_from

import redconvert
from redconvert.deploy import ways
from redconvert.deploy.unit import Unit

NETWORKS = {"images": (Image, (3, 3, 18, 18)), "clips": (Video, (2, 3, 7, 18, 18))}


@pytest.fixture
def timed(monkeypatch):
    """Both ways are timed by a clock that says which one is faster."""
    monkeypatch.setattr(ways, "PLAUSIBLE", math.inf)
    seconds = {"parts": 1.0, "whole": 1.0}
    now = itertools.count()

    class Clock:
        begun = 0.0

        def perf_counter(self):
            order = next(now) % 4  # parts begin, parts end, whole begin, whole end
            self.begun += seconds[ways.WAYS[order // 2]] * (order % 2)
            return self.begun

    monkeypatch.setattr(ways, "time", Clock())
    return seconds


def chosen(fast):
    """By unit and the key of its whole convolution: the way that was chosen."""
    units = [unit for unit in fast.modules() if isinstance(unit, Unit)]
    return {(unit, key): way for unit in units for key, way in unit._ways.items()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [*CHEAP.values(), {"absorb": True, "cheap": "pointwise"}], ids=[*CHEAP, "absorbed"])
@pytest.mark.parametrize("way", ways.WAYS)
def test_the_same_numbers(timed, name, options, way):
    """Under every decision, frames copied, blended or carried, residuals added: those of the dynamic network."""
    timed[way] = 0.5
    make, shape = NETWORKS[name]
    x = torch.randn(shape)
    dynamic = dynamic_from(make(), x[:1], **options)
    fast = redconvert.deploy(dynamic, x)
    for channel, temporal in itertools.product(range(2), range(1 + (name == "clips"))):
        with redconvert.forced(fast, channel=channel, temporal=temporal), torch.no_grad():
            torch.testing.assert_close(fast(x), dynamic(x), atol=1e-4, rtol=1e-4)
    assert {*chosen(fast).values()} == ({way} if options["cheap"] != "depthwise" else set())


def test_bfloat16(timed):
    timed["whole"] = 0.5
    x = torch.randn(2, 3, 18, 18)
    dynamic = dynamic_from(Image(), x[:1], **CHEAP["inputs mixed"]).to(torch.bfloat16)
    fast = redconvert.deploy(dynamic, x.bfloat16())
    with redconvert.forced(fast, channel=1), torch.no_grad():
        found, wanted = fast(x.bfloat16()).float(), dynamic(x.bfloat16()).float()
    assert chosen(fast) and (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize(("whole", "wanted"), [(0.9, "whole"), (0.98, "parts"), (1.1, "parts")])
def test_the_faster_way_is_kept_with_the_network(timed, tmp_path, whole, wanted):
    """A little faster is not enough; what was chosen is saved, and not timed again."""
    timed["whole"] = whole
    x = torch.randn(2, 3, 18, 18)
    fast = redconvert.deploy(dynamic_from(Image(), x[:1], cheap="pointwise"), x)
    with redconvert.forced(fast, channel=1), torch.no_grad():
        fast(x)
        assert {*chosen(fast).values()} == {wanted}
        fast.save(tmp_path)
        saved = json.loads((tmp_path / "deploy.json").read_text())
        assert wanted in {form for forms in saved.values() for form in forms.values()}
        timed["whole"] = 2.0 if wanted == "whole" else 0.1  # another clock, which nobody reads
        again = redconvert.deploy(fast.network, x, forms=tmp_path)
        again(x)
    assert {*chosen(again).values()} == {wanted}
    assert all(again.forms()[unit].items() <= forms.items() for unit, forms in fast.forms().items())
    for unit, key in chosen(fast):  # weights of the other way are not kept
        parts, whole = unit._packs[key.removesuffix(", whole")], unit._packs.get(key)
        assert bool(parts._packed) is (wanted == "parts")
        assert (whole is not None and bool(whole._packed)) is (wanted == "whole")
    if wanted == "parts":  # nor are its filters composed again
        assert not any(key.endswith(", whole") for unit, _ in chosen(again) for key in unit._packs)


def test_parts_are_not_doubted_where_they_save_much(monkeypatch):
    """Of 256 channels half saves 90 multiply-adds for each number that parts read and write more."""
    monkeypatch.setattr(ways, "PLAUSIBLE", 2.0)
    found = {}
    for channels in (16, 256):
        net = torch.nn.Sequential(
            torch.nn.Conv2d(channels, channels, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(channels, 4, 1)
        )
        x = torch.randn(1, channels, 6, 6)
        config = redconvert.ConvertConfig(rules=[("0", {"cheap": "pointwise", "shares": (0.5,), "temporal": False})])
        fast = redconvert.deploy(redconvert.convert(net.eval(), config, example_inputs=x), x)
        with redconvert.forced(fast, channel=1), torch.no_grad():
            fast(x)
        found[channels] = len(chosen(fast))
    assert found == {16: 1, 256: 0}
