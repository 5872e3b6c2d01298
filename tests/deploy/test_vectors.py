"""The float32 passes of vectors.c, and what is made of them, compute what PyTorch computes."""

from __future__ import annotations

import pytest
import torch
from deploy_networks import dynamic_from, undecided_gates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import redconvert
from redconvert.deploy import vectors
from redconvert.deploy.excite import Excite, Squeeze
from redconvert.deploy.kernels import compiled
from redconvert.deploy.pack import channels_last
from redconvert.deploy.unit import Unit

ACTS = {"none": lambda x: x, "relu": torch.relu, "swish": F.silu, "relu6": F.relu6, "hardswish": F.hardswish}
needs_a_compiler = pytest.mark.skipif(compiled() is None, reason="no C compiler: PyTorch alone serves")


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@needs_a_compiler
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    padded=st.booleans(),
    size=st.tuples(st.integers(5, 7), st.integers(5, 9), st.integers(5, 20)),
    channels=st.sampled_from([16, 17, 31, 48, 70]),
    activation=st.sampled_from(sorted(ACTS)),
)
@settings(max_examples=80, deadline=None)
def test_depthwise(kernel, stride, padded, size, channels, activation):
    torch.manual_seed(channels)
    x = channels_last(torch.randn(2, channels, *size))
    padding = tuple(k // 2 for k in kernel) if padded else (0, 0, 0)
    weight, bias = torch.randn(*kernel, channels), torch.randn(channels)
    filters = weight.permute(3, 0, 1, 2).unsqueeze(1)
    wanted = ACTS[activation](F.conv3d(x, filters, bias, stride, padding, groups=channels))
    pooled = torch.zeros(2, wanted.shape[2], channels)
    found = vectors.depthwise(x, weight, bias, stride, padding, activation, pooled)
    assert found.shape == wanted.shape and error(found, wanted) < 1e-5
    assert torch.allclose(pooled, wanted.mean((3, 4)).transpose(1, 2), atol=1e-5)


@needs_a_compiler
@given(
    channels=st.integers(16, 70),
    frames=st.integers(1, 9),
    width=st.integers(1, 7),
    activation=st.sampled_from(sorted(ACTS)),
    overwrite=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_rescale(channels, frames, width, activation, overwrite):
    torch.manual_seed(channels)
    x, scale = channels_last(torch.randn(2, channels, frames, 3, width)), torch.randn(2, channels, 1, 1, 1)
    wanted = ACTS[activation](x * scale)
    pooled = torch.zeros(2, frames, channels)
    found = vectors.rescale(x, scale, activation, overwrite, pooled)
    assert (found.data_ptr() == x.data_ptr()) == overwrite
    assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)
    assert torch.allclose(pooled, wanted.mean((3, 4)).transpose(1, 2), atol=1e-5)


@needs_a_compiler
def test_swish_of_every_magnitude():
    exponents = torch.linspace(-37, 37, 16 * 500)
    values = torch.cat([10.0**exponents, -(10.0**exponents), torch.zeros(16), torch.linspace(-100, 100, 16 * 500)])
    x = channels_last(values.view(1, 16, 1, 1, -1))
    found = vectors.rescale(x, torch.ones(1, 16), "swish")
    assert torch.allclose(found, F.silu(x), rtol=1e-5, atol=1e-30)
    assert vectors.rescale(torch.full_like(x, float("nan")), torch.ones(1, 16), "swish").isnan().all()


def test_twins(monkeypatch):
    torch.manual_seed(0)
    x, scale, weight = channels_last(torch.randn(2, 20, 4, 5, 6)), torch.randn(2, 20), torch.randn(3, 3, 3, 20)

    def results() -> list[Tensor]:
        pooled = torch.zeros(2, 2, 4, 20)
        y = vectors.depthwise(x, weight, scale[0], (1, 1, 2), (1, 1, 1), "swish", pooled[0])
        return [y, vectors.rescale(x, scale, "relu", pooled=pooled[1]), pooled]

    first = results()
    monkeypatch.setattr(vectors, "compiled", lambda: None)
    for found, wanted in zip(results(), first, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


class Excited(nn.Module):
    """Blocks like X3D's: a depthwise convolution, squeeze and excitation or nothing, swish spelled out, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 24, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.expand = nn.ModuleList(nn.Conv3d(24, 40, 1) for _ in range(2))
        self.depthwise = nn.ModuleList(nn.Conv3d(40, 40, 3, 1, 1, groups=40, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm3d(40) for _ in range(2))
        self.project = nn.ModuleList(nn.Conv3d(40, 24, 1) for _ in range(2))
        self.squeeze = nn.Sequential(nn.Conv3d(40, 8, 1), nn.ReLU(), nn.Conv3d(8, 40, 1), nn.Sigmoid())
        self.nothing = nn.Identity()
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in range(2):
            y = torch.relu(self.expand[block](x))
            y = self.nothing(self.norms[block](self.depthwise[block](y)))
            if block == 0:
                y = y * self.squeeze(y.mean([2, 3, 4], keepdim=True))
            y = y * torch.sigmoid(y)
            x = torch.relu(self.project[block](y) + x)
        return self.head(x.mean((2, 3, 4)))


def test_squeeze_and_excitation():
    torch.manual_seed(0)
    clips = torch.randn(2, 3, 6, 16, 16)
    dynamic = dynamic_from(Excited(), clips)
    fast = redconvert.deploy(dynamic, clips)
    kinds = [type(unit) for unit in fast.units.values()]
    assert fast.source == "fx" and kinds.count(Excite) == 1 and kinds.count(Squeeze) == 2  # and the head
    activations = {unit.layer: unit.activation for unit in fast.units.values() if isinstance(unit, Unit)}
    assert activations[dynamic.depthwise[0]] == "none" and activations[dynamic.depthwise[1]] == "swish"
    for form in ("conv", "channels"):
        for packed in (packed for unit in fast.units.values() for packed in getattr(unit, "_packs", {}).values()):
            packed.form = form if form in packed.forms() else packed.form
        for channel in range(2):
            for temporal in range(2):
                with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
                    assert error(fast(clips), dynamic(clips)) < 2e-5, (form, channel, temporal)
    undecided_gates(dynamic)
    for enabled in (True, False):  # oneDNN
        with torch.backends.mkldnn.flags(enabled=enabled), torch.no_grad():
            fast = redconvert.deploy(dynamic, clips)
            assert fast.source == "fx" and error(fast(clips), dynamic(clips)) < 2e-5


class Scaling(nn.Module):
    """Products that are none with a number per channel, or whose factor is needed again."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv3d(3, 16, 1), nn.Conv3d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        everywhere = torch.sigmoid(self.two(x)) * x  # not the swish of x
        per_channel = torch.sigmoid(x.mean((2, 3, 4), keepdim=True)) * x
        per_frame = x * torch.sigmoid(x.mean((1, 3, 4), keepdim=True))
        gate = torch.sigmoid(x)
        return (everywhere + torch.relu(per_channel) + per_frame + x * gate + gate + x).mean((3, 4))


def test_products_that_look_like_excitation():
    torch.manual_seed(0)
    clips = torch.randn(2, 3, 4, 6, 6)
    dynamic = dynamic_from(Scaling(), clips)
    fast = redconvert.deploy(dynamic, clips)
    assert fast.source == "fx"
    for channel, temporal in ((0, 0), (1, 1)):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(clips), dynamic(clips)) < 2e-5


class Pathways(nn.Module):
    """Puts its features into the list that it is given, as SlowFast does."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Conv3d(3, 16, 3, padding=1), nn.Conv3d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool3d([1, 3, 3], [1, 2, 2], [0, 1, 1])

    def forward(self, x: list[Tensor]) -> Tensor:
        assert isinstance(x, list)
        x[0] = torch.relu(self.slow(x[0]))
        x[1] = self.pool(torch.relu(self.fast(x[1])))
        return torch.cat([each.mean((2, 3, 4)) for each in x], dim=1)


def test_a_list_of_pathways():
    torch.manual_seed(0)
    clips = [torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 8, 8, 8)]
    dynamic = dynamic_from(Pathways(), clips)
    fast = redconvert.deploy(dynamic, clips)
    assert fast.source == "fx"
    for channel, temporal in ((0, 0), (1, 1)):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(clips), redconvert.inputs.call_with(dynamic, clips)) < 2e-5
    assert [each.shape[1] for each in clips] == [3, 3]
    with pytest.raises(redconvert.RedconvertError, match="a list of 2 tensors"):
        fast(clips[0])
    without_example = redconvert.deploy(dynamic)  # which does not say that a list will come
    assert without_example.source == "layers"
    with torch.no_grad():
        assert error(without_example(clips), fast(clips)) < 2e-5


def test_a_list_of_pathways_is_benchmarked():
    torch.manual_seed(0)
    clips = [torch.randn(1, 3, 4, 8, 8), torch.randn(1, 3, 8, 8, 8)]
    rows = {
        row.name: row
        for row in redconvert.bench(dynamic_from(Pathways(), clips), clips, repeats=1, compiled=False).rows
    }
    assert {"eager", "channels last", "deployed, dense", "deployed, channels and frames"} <= rows.keys()
    dense = 27 * 3 * (16 * 4 + 8 * 8) * 64
    assert rows["eager"].macs == rows["deployed, dense"].macs == dense
    assert dense / 4 < rows["deployed, channels and frames"].macs < dense / 2
