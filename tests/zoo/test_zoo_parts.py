"""What the paper's networks are made of, against slow definitions; and what they refuse."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import redconvert
from redconvert import zoo
from redconvert.errors import MissingExtraError, RedconvertError
from redconvert.zoo.corrnet import Correlation
from redconvert.zoo.registry import register_model
from redconvert.zoo.yowo import ChannelAttention

# --- blocks --------------------------------------------------------------------------------------------------------


def test_correlation_by_loops() -> None:
    layer = Correlation(channels=4, num_frames=3, groups=2, kernel=3, dilation=2).requires_grad_(False)
    x = torch.randn(2, 4, 3, 5, 6)
    found = layer(x)
    assert found.shape == (2, 9 * 2, 3, 5, 6)
    for n, t, i, j, g, dy, dx in [
        (0, 0, 2, 3, 0, 0, 0),
        (1, 1, 0, 0, 1, 1, 1),
        (0, 2, 4, 5, 1, 0, 2),
        (1, 2, 2, 2, 0, 2, 1),
    ]:
        row, column = i + 2 * (dy - 1), j + 2 * (dx - 1)
        total = 0.0
        if 0 <= row < 5 and 0 <= column < 6:
            for c in (2 * g, 2 * g + 1):
                total += layer.weight[c, t, dy, dx] * x[n, c, max(t - 1, 0), i, j] * x[n, c, t, row, column] / 2
        assert float(found[n, (dy * 3 + dx) * 2 + g, t, i, j]) == pytest.approx(float(total), abs=1e-6)


def test_channel_attention() -> None:
    layer, x = ChannelAttention(), torch.randn(2, 3, 2, 2)
    assert torch.equal(layer(x), x)
    layer.alpha.data.fill_(0.5)
    rows = x[1].flatten(1)
    mixed = torch.stack([sum(((row @ rows.T).softmax(0))[k] * rows[k] for k in range(3)) for row in rows])
    assert torch.allclose(layer(x)[1].flatten(1), 0.5 * mixed + rows, atol=1e-6)


def test_yowo_decodes_boxes_by_hand() -> None:
    with torch.device("meta"):
        model = zoo.create("yowo_i3d", num_classes=2, anchors=((0.5, 0.25), (0.1, 0.2)))
    model.anchors = torch.tensor([[0.5, 0.25], [0.1, 0.2]])
    outputs = torch.zeros(1, 2 * 7, 2, 4)
    outputs[0, 2, 1, 3] = 2.0  # tw of anchor 0 in cell (1, 3)
    outputs[0, 4, 1, 3] = 1.0  # its confidence
    outputs[0, 6, 1, 3] = 3.0  # its second class
    boxes, scores = model.decode(outputs)
    assert boxes.shape == (1, 16, 4) and scores.shape == (1, 16, 2)
    wide = 0.5 * torch.e**2
    expected = [3.5 / 4 - wide / 2, 1.5 / 2 - 0.125, 3.5 / 4 + wide / 2, 1.5 / 2 + 0.125]
    assert boxes[0, 7].tolist() == pytest.approx(expected)
    sure = torch.tensor(1.0).sigmoid() * torch.tensor([0.0, 3.0]).softmax(0)
    assert scores[0, 7].tolist() == pytest.approx(sure.tolist())
    assert boxes[0, 8].tolist() == pytest.approx([0.125 - 0.05, 0.25 - 0.1, 0.125 + 0.05, 0.25 + 0.1])


def test_a_frozen_backbone_keeps_weights_and_statistics_but_not_its_gates() -> None:
    model = zoo.create("yowo_i3d", num_classes=2, freeze_backbone=True)
    clip = torch.randn(2, 3, 4, 32, 32)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    dynamic = redconvert.convert(model, redconvert.ConvertConfig(rules={"head.*": None}), example_inputs=clip)
    dynamic.train()(clip).square().mean().backward()
    state = dynamic.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    learning = {key for key, p in dynamic.backbone.named_parameters() if p.requires_grad}
    assert learning and all(".gate." in key or ".cheap_" in key for key in learning)
    assert all(p.requires_grad for p in dynamic.head.parameters())
    assert dynamic.head[0][1].running_mean.abs().max() > 0


def test_psp_encoder_is_dilated() -> None:
    model = zoo.create("pspnet_resnet18").eval()
    with torch.inference_mode():
        assert model.encoder(torch.zeros(1, 3, 64, 48)).shape == (1, 512, 8, 6)
    dilations = [m.dilation[0] for m in model.encoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert dilations == [1] * 3 + [1] * 8 + [1, 2, 2, 2] + [2, 4, 4, 4]


def test_frames_of_a_clip_stay_together() -> None:
    model = zoo.create("tsn_resnet50", num_classes=3).eval()
    clips = torch.randn(2, 3, 2, 32, 32)
    with torch.inference_mode():
        together, alone = model(clips), torch.cat([model(clips[:1]), model(clips[1:])])
    assert torch.allclose(together, alone, atol=1e-5)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("r2plus1d18", "r2plus1d_18"), ("X3D-M", "x3d_m"), ("psp_resnet18", "pspnet_resnet18"), ("tsn", "tsn_resnet50")],
)
def test_an_unknown_name_suggests_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(RedconvertError, match=f"Did you mean '{near}'"):
        zoo.create(wrong)


@pytest.mark.parametrize("name", ["r2plus1d_18", "i3d_v2", "x3d_m", "tpn_resnet50", "tsn_resnet50", "yowo_x3d_m"])
def test_another_layout_says_which_axis_is_time(name: str) -> None:
    with torch.device("meta"):
        model = zoo.create(name)
        with pytest.raises(RedconvertError, match=rf"{name}: .*time is axis 2.*transpose\(1, 2\)"):
            model(torch.empty(1, 8, 3, 32, 32))
        with pytest.raises(RedconvertError, match=rf"{name}: the input is torch.uint8"):
            model(torch.empty(1, 3, 8, 32, 32, dtype=torch.uint8))


def test_images_and_clip_lengths() -> None:
    with torch.device("meta"):
        with pytest.raises(RedconvertError, match=r"pspnet_resnet18: .*no time axis.*flatten\(0, 1\)"):
            zoo.create("pspnet_resnet18")(torch.empty(1, 3, 8, 32, 32))
        with pytest.raises(RedconvertError, match=r"has 8 frames \(axis 2 of .*num_frames=8"):
            zoo.create("corrnet_r2plus1d_18")(torch.empty(1, 3, 8, 32, 32))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("r2plus1d_18", {"midplanes": "mine"}, "midplanes must be"),
        ("corrnet_r2plus1d_18", {"num_frames": 0}, "num_frames=0"),
        ("yowo_i3d", {"anchors": ((1.0, -1.0),)}, "anchors must be pairs"),
        ("x3d_m", {"classes": 3}, "Its options are"),
    ],
)
def test_wrong_options(name: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(RedconvertError, match=says):
        zoo.create(name, **options)


@pytest.mark.parametrize(("name", "package"), [("x3d_m", "pytorchvideo"), ("tsn_resnet50", "timm")])
def test_a_missing_package_names_the_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    monkeypatch.delitem(zoo.registry._BUILDERS, name, raising=False)
    with pytest.raises(MissingExtraError, match=rf"'{name}' needs the package '{package}'.*redconvert\[zoo\]"):
        zoo.create(name)


def test_a_name_of_the_zoo_cannot_be_taken() -> None:
    def x3d_m() -> nn.Module:
        return nn.Identity()

    with pytest.raises(RedconvertError, match="already has a model 'x3d_m'"):
        register_model(x3d_m)
