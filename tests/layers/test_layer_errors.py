"""What a layer refuses, and in which words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from redconvert import (
    DynamicConv2d,
    DynamicConv3d,
    LayerConfig,
    Recipe,
    RedconvertError,
    disabled,
    forced,
    observed,
    register,
)
from redconvert.layers import dynamic_layers, recipe_of


@pytest.fixture
def layer():
    return DynamicConv3d(3, 8, 3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 3, 4, 5, 5), r"empty batch, shape \(0, 3, 4, 5, 5\)"),
        ((2, 3, 0, 5, 5), "empty batch"),
        ((2, 4, 4, 5, 5), r"takes \(N, C, T, H, W\) with C = 3, not \(2, 4, 4, 5, 5\)"),
        ((2, 3), r"takes \(N, C, T, H, W\)"),
        ((2, 3, 4, 5, 5, 1), r"takes \(N, C, T, H, W\)"),
        ((2, 3, 2, 5, 5), r"2 frames on axis 2 .* fewer than its kernel \(3, dilation 1\).*longer clips"),
        ((2, 3, 4, 5, 2), r"2 pixels on axis 4 .*larger frames"),
    ],
)
def test_inputs(layer, shape, message, training):
    layer.train(training)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RedconvertError, match=f"layer 'DynamicConv3d'.*{message}"):
        layer(torch.zeros(shape))
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_folded_frames():
    layer = DynamicConv2d(3, 8, 3, num_frames=4)
    assert layer(torch.zeros(8, 3, 5, 5)).shape == (8, 8, 3, 3)
    with pytest.raises(RedconvertError, match=r"N \* 4 frames, and 6 is no multiple"):
        layer(torch.zeros(6, 3, 5, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channel": 2}, r"channel=2\): no layer has this candidate; the largest index is 1"),
        ({"temporal": [0, 3]}, r"temporal=3\): no layer has this candidate"),
        ({"channel": -1}, "count from 0"),
        ({"channel": [0, -1]}, "count from 0"),
        ({"channel": 0.5}, "an index or one index per sample"),
        ({"channel": True}, "an index or one index per sample"),
        ({"temporal": []}, "an index or one index per sample"),
        ({"temporal": "1"}, "an index or one index per sample"),
        ({"temporal": torch.tensor(0.5)}, "an index or one index per sample"),
    ],
)
def test_forced(layer, arguments, message):
    with pytest.raises(RedconvertError, match=message), forced(layer, **arguments):
        pass
    assert "forced" not in vars(layer)


def test_forced_for_another_batch(layer):
    with forced(layer, channel=[0, 1, 0]), pytest.raises(RedconvertError, match="got 3 channel candidates for 2"):
        layer(torch.zeros(2, 3, 4, 5, 5))


def test_nothing_to_decide():
    with pytest.raises(RedconvertError, match="one channel and no time axis"):
        DynamicConv2d(3, 1, 3)
    with pytest.raises(RedconvertError, match="nothing to decide"):
        DynamicConv2d(3, 8, 3, config=LayerConfig(channel=False))


@pytest.mark.parametrize("mode", [disabled, forced, lambda model: observed(model, print), dynamic_layers])
def test_modes_need_dynamic_layers(mode):
    with pytest.raises(RedconvertError, match="Sequential has no dynamic layers"):
        result = mode(nn.Sequential(nn.Conv3d(3, 8, 3)))
        result.__enter__()


def test_register():
    with pytest.raises(RedconvertError, match="a subclass of Conv2d or Conv3d, not Linear"):
        register(nn.Linear)

    class Own(nn.Conv2d):
        def forward(self, input):
            return super().forward(input)

    assert recipe_of(Own) is None
    with pytest.raises(RedconvertError, match=r"decorates a subclass of redconvert.Recipe"):
        register(Own)(object)

    @register(Own)
    class OwnRecipe(Recipe):
        pass

    assert recipe_of(Own) is OwnRecipe
    assert recipe_of(type("Inherits", (Own,), {})) is OwnRecipe
    assert recipe_of(type("Overrides", (Own,), {"forward": lambda self, x: x})) is None
