"""Names of the zoo on the command line: their own input shapes, presets, frames in the batch, colours."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from redconvert import ConvertConfig, cli, zoo
from redconvert.cli.options import read_config
from redconvert.cli.preprocess import default_normalisation
from redconvert.sources import open_source

Run = Callable[..., tuple[Any, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["redconvert-cli", *arguments])
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        shown = capsys.readouterr()
        return code, shown.out or shown.err

    return call


def test_plan_takes_the_networks_own_shape_and_preset(run: Run) -> None:
    code, out = run("plan", "zoo:corrnet_r2plus1d_18", "--config", "corrnet_r2plus1d_18", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["num_converted"] == 16
    assert plan["verdicts"][0]["facts"]["input_shape"] == [1, 3, 16, 128, 128]
    assert plan["dense_macs"] == pytest.approx(60.5e9, rel=0.001)


def test_frames_in_the_batch_are_known(run: Run) -> None:
    code, out = run("plan", "zoo:tsn_resnet50", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["num_converted"] == 53
    assert {verdict["num_frames"] for verdict in plan["verdicts"]} == {16}
    assert plan["dense_macs"] == pytest.approx(65.4e9, rel=0.001)  # of a clip, not of a frame


def test_inspect_adds_up(run: Run) -> None:
    code, out = run("inspect", "zoo:tpn_resnet50", "--input", "1,3,2,32,32", "--num-frames", "2", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["model"] == "TPNResNet50" and facts["input_shapes"] == [[1, 3, 2, 32, 32]]
    convs = sum(verdict["dense_macs"] for verdict in facts["plan"]["verdicts"])
    assert facts["dense_macs"] == convs + 2048 * 400


def test_a_wrong_name_suggests_the_nearest(run: Run) -> None:
    code, out = run("inspect", "zoo:r2plus1d18")
    assert code == 1 and "Did you mean 'r2plus1d_18'?" in out


def test_config_names_the_presets(run: Run) -> None:
    code, out = run("plan", "zoo:r2plus1d_18", "--config", "r2plus1d")
    assert code == 1 and "could not be read" in out and "r2plus1d_18" in out
    assert read_config(None, None, None, 4, "zoo:tsn_resnet50").num_frames == 4
    assert read_config(None, None, None, None, "zoo:x3d_m") == ConvertConfig()


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_name_opens_and_knows_its_colours(name: str) -> None:
    with torch.device("meta"):
        model = open_source(f"zoo:{name}").model
    mean, std = default_normalisation(f"zoo:{name}", model, video=True)
    assert all(0 < value < 1 for value in (*mean, *std))
    expected = {"i3d_kinetics": 0.5, "yowo_i3d": 0.5, "x3d_m": 0.45, "tsn_resnet50": 0.485, "r2plus1d_18": 0.43216}
    assert mean[0] == expected.get(name, mean[0])
