"""redconvert-cli reduce: files in, a network out that is as cheap as its answers allow."""

import json
import sys
from pathlib import Path

import pytest
import torch

import redconvert
from redconvert.cli.preparing import split
from redconvert.errors import RedconvertError
from redconvert.evaluate import spread_of_macs
from redconvert.layers import dynamic_layers

pytest.importorskip("av")

VIDEO = ("reduce", "nets:video", "--input", "1,3,4,16,16", "--data", "clips", "--out", "saved")
IMAGE = ("reduce", "nets:image", "--input", "1,3,16,16", "--data", "pictures", "--out", "saved")


def opened():
    import nets

    return redconvert.from_pretrained(nets.video(), "saved").eval()


def test_what_is_saved_is_what_was_measured(command):
    """Of three files the second is measured on; the saved network keeps the budget and its answers."""
    code, out, _ = command(*VIDEO, "--budget", 0.75, "--samples", 12, "--no-time", "--json")
    facts = json.loads(out)
    point = facts["curve"]["points"][0]
    assert code == 0 and facts["milliseconds"] is None and facts["chosen"] == 0.75
    assert (facts["curve"]["samples"], len(facts["curve"]["points"])) == (4, 1)
    clips = [redconvert.data.load_clip("clips/b.mkv", 4, 16, 1, (i + 0.5) / 4) for i in range(4)]
    pixels = (torch.stack(clips) * 0.5 + 0.5).mul(255).round() / 255
    x = (pixels - 0.45) / 0.225
    dynamic = opened()
    spread = spread_of_macs(dynamic, [x])
    assert point["share"] == pytest.approx(spread.mean / float(spread.dense.mean()))
    with torch.no_grad():
        now = dynamic(x)
        with redconvert.disabled(dynamic):
            dense = dynamic(x)
    assert point["agreement"] == float((now.argmax(1) == dense.argmax(1)).double().mean())
    apart = (dense.softmax(1) * (dense.log_softmax(1) - now.log_softmax(1))).sum(1).mean()
    assert point["divergence"] == pytest.approx(float(apart), rel=0.05, abs=1e-7)
    assert not torch.allclose(now, dense, atol=1e-4)
    assert [layer.candidates.channels for layer in dynamic_layers(dynamic).values()] == [
        (16, 14, 12, 10, 8),
        (32, 28, 24, 20, 16),
    ]
    assert json.loads(Path("saved/reduce.json").read_text()) == facts


def test_the_cheapest_that_keeps_the_answers(command):
    code, out, _ = command(*VIDEO, "--agreement", 0.01, "--budgets", "0.9,0.7,0.05", "--plot", "curve.png")
    assert code == 0 and Path("curve.png").stat().st_size > 5000
    assert "Taken: " in out and "too low" in out and "Saved: saved; picture: curve.png" in out
    assert "One sample" in out and "deployed, dense" in out and "Measured on" in out
    facts = json.loads(Path("saved/reduce.json").read_text())
    shares = [point["share"] for point in facts["curve"]["points"] if point["agreement"] >= 0.01]
    spread = spread_of_macs(opened(), torch.rand(2, 3, 4, 16, 16))
    assert min(shares) == pytest.approx(spread.mean / float(spread.dense.mean()))
    assert set(facts["milliseconds"]) == {"original", "deployed, dense", "deployed"}
    assert all(value > 0 for value in facts["milliseconds"].values())


def test_budgets_of_the_time(command, monkeypatch):
    """What is taken is the fastest, here by times that are said."""

    def said(dynamic, inputs, progress):
        assert inputs.shape == (1, 3, 4, 16, 16)
        layers = {
            name: [[[0.4**i * 0.5**j] for j in range(2)] for i in range(len(layer.candidates.channels))]
            for name, layer in dynamic_layers(dynamic).items()
        }
        assert [len(table) for table in layers.values()] == [1, 2]  # 16 channels, and 32 or 16
        return redconvert.LayerTimes(2.0, 0.0, layers, {})

    monkeypatch.setattr(sys.modules["redconvert.cli.reduce"], "layer_times", said)
    code, out, _ = command(*VIDEO, "--agreement", 0.01, "--budgets", "0.9,0.5,0.1", "--no-time", "--measure")
    facts = json.loads(Path("saved/reduce.json").read_text())
    times = [point["time"] for point in facts["curve"]["points"]]
    assert code == 0 and "expected time" in out and facts["curve"]["unreachable"] == [0.1]
    assert 0.9 >= times[0] > 0.5 >= times[1] >= 0.35
    assert facts["chosen"] == min(facts["curve"]["points"], key=lambda point: point["time"])["budget"]
    assert facts["times"]["dense_ms"] == 2.0 and "Taken: " in out and "of the time is expected" in out


def test_images(command):
    code, out, _ = command(*IMAGE, "--budget", 0.8, "--no-time", "--search-space", 2)
    assert code == 0 and "Measured on 1 of 4 samples of 3x16x16 from 4 files" in out
    import nets

    saved = redconvert.from_pretrained(nets.image(), "saved")
    assert [layer.candidates.channels for layer in dynamic_layers(saved).values()] == [(16, 8), (32, 16)]


def test_nothing_is_saved_where_no_budget_serves(command, monkeypatch):
    from redconvert.budget import curve

    original = curve.Answers.compare
    monkeypatch.setattr(curve.Answers, "compare", lambda *args: (original(*args)[0], 0.4, 0.1, None))
    code, out, err = command(*VIDEO, "--samples", 6)
    assert code == 1 and not Path("saved").exists()
    assert "at no budget do 95.0% of the answers stay: the most is 40.0%" in err and "Nothing was saved" in err
    assert "same first answer" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", 0.5, "--agreement", 0.9), "exclude each other"),
        (("--budget", 1.5), "--budget: 1.5 must be a share in (0, 1]"),
        (("--agreement", 0), "--agreement: 0 must be a share in (0, 1]"),
        (("--budgets", "a,b"), "--budgets: 'a,b' is not a list such as"),
        (("--budgets", "0.5,2"), "--budgets: 2 must be a share in (0, 1]"),
        (("--budget", 0.01), "below the least that this network can cost"),
        (("--samples", 1), "one is needed to work with and one to measure on"),
        (("--plot", "no/curve.png"), "there is no folder 'no'"),
    ],
)
def test_refusals(command, options, message):
    code, _, err = command(*VIDEO, *options)
    assert code == 1 and message in err and not Path("saved").exists()


def testsplit():
    """By files where there are several; samples of one file by themselves."""
    a, b, c, d, e, f = map(Path, "abcdef")
    assert split([a, a, b, b, c, d, e, f, f]) == ([0, 1, 4, 5, 6], [2, 3, 7, 8])
    assert split([a] * 6) == ([0, 2, 3, 4], [1, 5])
    with pytest.raises(RedconvertError, match="single sample"):
        split([a])
