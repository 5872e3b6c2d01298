"""Networks with absorbed channels on disk: what comes back is the same to the bit, and damage is told."""

import json

import pytest
import torch
from torch import nn

import redconvert
from redconvert import RedconvertError
from redconvert.layers import dynamic_layers


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU()),
        *(nn.Conv3d(8, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU()),
        *(nn.Conv3d(6, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 4)),
    ).eval()


@pytest.fixture
def saved(tmp_path):
    """A chain of two pairs with random numbers in all that conversion added, its clip and its folder."""
    x = torch.randn(3, 3, 4, 6, 6)
    config = redconvert.ConvertConfig(absorb=True, search_space=3, min_saving=0)
    dynamic = redconvert.convert(network(), config, example_inputs=x)
    for layer in dynamic_layers(dynamic).values():
        for part in layer.added_modules()[1:]:
            for parameter in part.parameters():
                nn.init.normal_(parameter)
        layer.cheap_c.set_order(torch.randperm(layer.out_channels))
    redconvert.save_pretrained(dynamic, tmp_path)
    return dynamic, x, tmp_path


def test_equal_to_the_bit(saved):
    dynamic, x, folder = saved
    again = redconvert.from_pretrained(network(), folder)
    layers = dynamic_layers(again)
    assert layers["0"].hands_to is layers["3"].reads_from is not None
    assert layers["3"].hands_to is layers["6"].reads_from is not None
    with torch.no_grad():
        for channel in ([0, 1, 2], [2, 0, 1], 1, 2):
            for temporal in (0, 1):
                with (
                    redconvert.forced(dynamic, channel=channel, temporal=temporal),
                    redconvert.forced(again, channel=channel, temporal=temporal),
                ):
                    assert torch.equal(again(x), dynamic(x))


def test_saves_without_pairs_load(tmp_path):
    """Those of versions that knew none."""
    x = torch.randn(1, 3, 4, 6, 6)
    dynamic = redconvert.convert(network(), example_inputs=x)
    redconvert.save_pretrained(dynamic, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for layer in config["layers"].values():
        del layer["reader"], layer["reads"], layer["config"]["absorb"]
    path.write_text(json.dumps(config))
    again = redconvert.from_pretrained(network(), tmp_path)
    assert all(layer.hands_to is None is layer.reads_from for layer in dynamic_layers(again).values())
    with redconvert.forced(dynamic, channel=1), redconvert.forced(again, channel=1):
        assert torch.equal(again(x), dynamic(x))


@pytest.mark.parametrize(
    ("layer", "entry", "value", "words"),
    [
        ("0", "reader", "5", "names '5' as its reader"),
        ("0", "reader", "6", "does not hand over these"),
        ("0", "reader", ["3"], "reader is"),
        ("0", "reader", None, "no layer hands over"),
        ("3", "reads", None, "names '3' as its reader"),
        ("3", "reads", [8, 5, 2], "does not hand over these"),
        ("3", "reads", [8, "4", 2], "reads is"),
        ("3", "reads", 8, "reads is"),
    ],
)
def test_damaged_pairs(saved, layer, entry, value, words):
    _, _, folder = saved
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["layers"][layer][entry] = value
    path.write_text(json.dumps(config))
    model = network()
    with pytest.raises(RedconvertError, match=words):
        redconvert.from_pretrained(model, folder, inplace=True)
    assert not any(isinstance(module, redconvert.DynamicConv3d) for module in model.modules())


# -- with others that follow ---------------------------------------------------------------------------


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


def mobile():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), Squeeze(), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).eval()


@pytest.fixture
def followed(tmp_path):
    x = torch.randn(2, 3, 6, 6)
    dynamic = redconvert.convert(mobile(), redconvert.ConvertConfig(absorb=True, min_saving=0), example_inputs=x)
    for layer in dynamic_layers(dynamic).values():
        for parameter in layer.cheap_in.parameters() if layer.cheap_in is not None else ():
            nn.init.normal_(parameter)
    dynamic[0].cheap_c.set_order(torch.randperm(8))
    redconvert.save_pretrained(dynamic, tmp_path)
    return dynamic, x, tmp_path


def test_followers_come_back(followed):
    dynamic, x, folder = followed
    again = redconvert.from_pretrained(mobile(), folder)
    layers = dynamic_layers(again)
    assert layers["2"].carries is layers["3.fc1"].reads_from is layers["5"].reads_from is layers["0"].hands_to
    assert layers["3.fc1"].aside and not layers["5"].aside
    for channel in (0, 1, [0, 1]):
        with redconvert.forced(dynamic, channel=channel), redconvert.forced(again, channel=channel):
            assert torch.equal(again(x), dynamic(x))


@pytest.mark.parametrize(
    ("layer", "entry", "value", "words"),
    [
        ("2", "source", "5", "follows '5' with"),
        ("2", "source", None, "follows 'None' with"),
        ("2", "carries", [8, 3], "follows '0' with"),
        ("2", "carries", "8", "carries is"),
        ("2", "source", 0, "source is"),
        ("3.fc1", "source", None, "no layer hands over"),
        ("3.fc1", "reads", None, "follows '0' with None"),
        ("5", "carries", [8, 4], "follows 'None' with"),
    ],
)
def test_damaged_followers(followed, layer, entry, value, words):
    _, _, folder = followed
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["layers"][layer][entry] = value
    path.write_text(json.dumps(config))
    with pytest.raises(RedconvertError, match=words):
        redconvert.from_pretrained(mobile(), folder)
