"""Which layers the presets make dynamic, on networks without numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import redconvert
from redconvert import ConvertConfig, zoo
from redconvert.presets import presets


def planned(name: str, shape: tuple[int, ...], num_frames: int | None = None) -> redconvert.Plan:
    model = zoo.create(name, num_classes=5)
    config = presets[name] if num_frames is None else replace(presets[name], num_frames=num_frames)
    return redconvert.plan(model, config, example_inputs=torch.zeros(shape))


def test_every_network_of_the_zoo_has_one() -> None:
    assert sorted(presets) == zoo.list_models() and len(presets) == 11
    assert all(isinstance(config, ConvertConfig) for config in presets.values())
    for config in presets.values():
        assert ConvertConfig.from_json(config.to_json()) == config


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(redconvert.RedconvertError, match=r"no preset 'r2plus1d18'\. Did you mean 'r2plus1d_18'"):
        presets["r2plus1d18"]
    assert "r2plus1d18" not in presets and "r2plus1d_18" in presets
    assert presets.get("r2plus1d18") is None


@pytest.mark.parametrize(("name", "frames"), [("r2plus1d_18", 8), ("tpn_r2plus1d_18", 8), ("corrnet_r2plus1d_18", 16)])
def test_spatial_convolutions_of_r2plus1d(name: str, frames: int) -> None:
    plan = planned(name, (1, 3, frames, 16, 16))
    assert len(plan.converted) == 16
    assert {verdict.kind for verdict in plan.converted} == {"Conv3d 1x3x3"}
    assert all(verdict.config.temporal and verdict.config.channel for verdict in plan.converted[:12])


def test_a_changed_preset_changes_every_layer() -> None:
    model = zoo.create("r2plus1d_18", num_classes=5)
    config = replace(presets["r2plus1d_18"], search_space=3)
    plan = redconvert.plan(model, config, example_inputs=torch.zeros(1, 3, 32, 16, 16))
    assert len(plan.converted) == 16 and all(len(verdict.channels) == 3 for verdict in plan.converted)


def test_every_convolution_of_i3d() -> None:
    assert len(planned("i3d_v2", (1, 3, 8, 64, 64)).skipped) == 0
    assert [verdict.name for verdict in planned("i3d_kinetics", (1, 3, 16, 32, 32)).skipped] == ["logits"]


def test_every_convolution_of_x3d_but_squeeze_and_excitation() -> None:
    skipped = planned("x3d_m", (1, 3, 8, 64, 64)).skipped
    assert len(skipped) == 30 and all(".norm_b.1.block." in verdict.name for verdict in skipped)


def test_frames_in_the_batch() -> None:
    for name, frames in (("tsn_resnet50", 16), ("tpn_resnet50", 8)):
        assert presets[name].num_frames == frames
        plan = planned(name, (1, 3, 4, 32, 32), num_frames=4)
        assert len(plan.converted) == 53 and all(verdict.num_frames == 4 for verdict in plan.converted)
        assert all(verdict.name.startswith("neck.") for verdict in plan.skipped)


def test_channels_alone_in_pspnet() -> None:
    plan = planned("pspnet_resnet18", (1, 3, 64, 64))
    assert [verdict.name for verdict in plan.skipped] == ["decoder.classifier"]
    assert not any(verdict.config.temporal for verdict in plan.converted)


@pytest.mark.parametrize("name", ["yowo_i3d", "yowo_x3d_m"])
def test_yowos_head_stays_dense(name: str) -> None:
    plan = planned(name, (1, 3, 4, 32, 32))
    dense = [verdict.name for verdict in plan.skipped if verdict.name.startswith("head.")]
    assert len(dense) == 5 and len(plan.converted) >= 50
