"""Convolution classes with a forward of their own: those that libraries bring, and those that a user teaches."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from networks import NETWORKS, equal, run
from torch import Tensor, nn
from torch.nn import functional as F

import redconvert
from redconvert.layers import dynamic_layers


class CausalConv3d(nn.Conv3d):
    """A user's own: frames see only the past, and the weight is scaled by a learnt gain per channel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0))
        weight = self.weight * self.gain.view(-1, 1, 1, 1, 1)
        return F.conv3d(x, weight, self.bias, self.stride, (0, *self.padding[1:]), self.dilation, self.groups)


# What the user writes to teach it; a test counts the lines.
@redconvert.register(CausalConv3d)
class CausalRecipe(redconvert.Recipe):
    @staticmethod
    def weight(conv: CausalConv3d) -> Tensor:
        return conv.weight * conv.gain.view(-1, 1, 1, 1, 1)

    @staticmethod
    def pad(conv: CausalConv3d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return F.pad(x, (0, 0, 0, 0, conv.kernel_size[0] - 1, 0)), (0, *conv.padding[1:])


class CausalNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = CausalConv3d(3, 16, 3, padding=1), CausalConv3d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3, 4)))


def test_a_users_convolution_takes_under_20_lines():
    assert len(inspect.getsource(CausalRecipe).splitlines()) < 20
    torch.manual_seed(0)
    model, clip = CausalNet().eval(), torch.randn(2, 3, 6, 8, 8)
    dynamic = redconvert.convert(model, example_inputs=clip)
    assert list(dynamic_layers(dynamic)) == ["first", "second"]
    assert isinstance(dynamic.first, CausalConv3d) and equal(run(dynamic, clip), run(model, clip))
    assert equal(run(dynamic, clip, training=True), run(model, clip, training=True))

    # Reduced: the first 8 channels at every second frame are the dense ones, the others are not.
    with redconvert.forced(dynamic, channel=1, temporal=1), torch.no_grad():
        reduced, dense = dynamic.first(clip), model.first(clip)
    assert torch.allclose(reduced[:, :8, ::2], dense[:, :8, ::2], atol=1e-6)
    assert not torch.allclose(reduced[:, 8:, ::2], dense[:, 8:, ::2], atol=1e-3)
    assert not torch.allclose(reduced[:, :8, 1::2], dense[:, :8, 1::2], atol=1e-3)

    # What the recipe adds to the weight learns, also where the layer is reduced.
    with redconvert.forced(dynamic.train(), channel=1, temporal=1):
        dynamic(clip).square().sum().backward()
    assert dynamic.first.gain.grad.abs().max() > 0 and dynamic.second.weight.grad.abs().max() > 0
    assert type(redconvert.revert(dynamic).first) is CausalConv3d


# -- libraries -------------------------------------------------------------------------------------------


_TIMM, _SMP = "timm.layers", "segmentation_models_pytorch.encoders._efficientnet"
LIBRARY_CONVS: dict[str, tuple[str, str, int, dict[str, Any]]] = {  # module, class, kernel size, further arguments
    "StdConv2d": (f"{_TIMM}.std_conv", "StdConv2d", 3, {"stride": 2, "padding": 1, "bias": True}),
    "StdConv2dSame": (f"{_TIMM}.std_conv", "StdConv2dSame", 4, {"stride": 2}),
    "ScaledStdConv2d": (f"{_TIMM}.std_conv", "ScaledStdConv2d", 3, {"padding": 1}),
    "ScaledStdConv2dSame": (f"{_TIMM}.std_conv", "ScaledStdConv2dSame", 3, {"stride": 2}),
    "Conv2dSame": (f"{_TIMM}.conv2d_same", "Conv2dSame", 5, {"stride": 2}),
    "Conv2dSame, grouped": (f"{_TIMM}.conv2d_same", "Conv2dSame", 3, {"groups": 2, "dilation": 2}),
    "Conv2dSameExport": (f"{_TIMM}.conv2d_same", "Conv2dSameExport", 3, {"stride": 2}),
    "dynamic padding": (_SMP, "Conv2dDynamicSamePadding", 3, {"stride": 2}),
    "static padding": (_SMP, "Conv2dStaticSamePadding", 3, {"stride": 2, "image_size": (11, 14)}),
    "BiT": ("transformers.models.bit.modeling_bit", "WeightStandardizedConv2d", 3, {"stride": 2}),
    "BiT, symmetric": ("transformers.models.bit.modeling_bit", "WeightStandardizedConv2d", 3, {"padding": None}),
}


@pytest.mark.parametrize("name", LIBRARY_CONVS)
def test_kept_channels_are_the_dense_ones(name):
    """Half of the channels, through the recipe, against the class's own forward; odd sizes pad unevenly."""
    torch.manual_seed(0)
    module, kind, kernel_size, options = LIBRARY_CONVS[name]
    conv = getattr(importlib.import_module(module), kind)(6, 16, kernel_size, **options)
    model, x = nn.Sequential(conv, nn.ReLU()).eval(), torch.randn(2, 6, 11, 14)
    for parameter in conv.parameters():
        nn.init.uniform_(parameter, -1.0, 1.0)  # gains and biases that show
    with torch.no_grad():
        dense = conv(x)
        dynamic = redconvert.convert(model, example_inputs=x)[0]
        assert isinstance(dynamic, redconvert.DynamicConv2d) and isinstance(dynamic, type(conv))
        assert torch.equal(dynamic(x), dense)
        with redconvert.forced(dynamic, channel=1):
            reduced = dynamic(x)
    assert reduced.shape == dense.shape
    assert torch.allclose(reduced[:, :8], dense[:, :8], rtol=1e-4, atol=1e-5)
    assert (reduced[:, 8:] - dense[:, 8:]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "kind", "converted"),
    [("nf_resnet50", "ScaledStdConv2d", (53, 53)), ("tf_efficientnet_lite0", "Conv2dSame", (3, 5))],
)
def test_no_convolution_is_skipped_for_its_class(name, kind, converted):
    """NFNets, and EfficientNets with TensorFlow's padding, whose two others are depthwise and save too little."""
    model, x = NETWORKS[name]()
    plan = redconvert.plan(model, example_inputs=x)
    special = [verdict for verdict in plan.verdicts if kind in verdict.kind]
    assert (sum(verdict.converted for verdict in special), len(special)) == converted
    assert all("own forward" not in verdict.reason for verdict in plan.verdicts)


def test_an_unknown_class_is_skipped_and_says_how_to_teach_it():
    class Halved(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model = nn.Sequential(Halved(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    (skipped,) = redconvert.plan(model, example_inputs=torch.ones(1, 3, 9, 9)).skipped
    assert skipped.reason == "own forward: Halved is more than a Conv2d (redconvert.register teaches it)"
