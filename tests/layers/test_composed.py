"""A reduced candidate that trains as one convolution: against the same candidate in parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import anything
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import redconvert
from redconvert import DynamicConv2d, DynamicConv3d, LayerConfig
from redconvert.layers import composed

CONV = {2: DynamicConv2d, 3: DynamicConv3d}


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Wherever it can; what is called returns to parts."""
    monkeypatch.setattr(composed, "BALANCE", {"cpu": math.inf})
    return lambda: monkeypatch.setattr(composed, "BALANCE", {"cpu": -math.inf})


def layer_of(dims=3, c=(9, 7), stride=1, num_frames=None, **config):
    """A layer in float64 with any numbers in all that was added to it."""
    options = {"search_space": 3, "cheap": "principal", "gate_hidden": 3, "rebuild_weight": 0, **config}
    extra = {"num_frames": num_frames} if num_frames else {}
    layer = CONV[dims](*c, 3, stride=stride, padding=1, config=LayerConfig(**options), **extra).double()
    anything(layer)
    return layer.train()


def step(layer, x, captured=False):
    """Output, and the gradients of input and parameters, of a step in which the gate rests."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    layer.capturable = captured
    with redconvert.resting_gates(nn.ModuleList([layer])):
        out = layer(x)
    layer.capturable = False
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    return out.detach(), {"x": x.grad, **gradients}


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from([2, 3]),
    c=st.tuples(st.integers(8, 13), st.integers(2, 9)),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    kind=st.sampled_from(["principal", "pointwise", "scale"]),
    mixes=st.booleans(),
    captured=st.booleans(),
    decision=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    temporal=st.booleans(),
    samples=st.integers(1, 3),
)
def test_as_in_parts(dims, c, stride, bias, kind, mixes, captured, decision, temporal, samples):
    frames = 4 if dims == 2 and temporal else None
    layer = layer_of(dims, c, stride, frames, cheap=kind, mix_inputs=mixes, temporal=temporal)
    if not bias:
        layer.bias = None
    layer.forced = decision
    x = torch.randn(samples * (frames or 1), c[0], *((5, 6) if dims == 2 else (5, 5, 6)), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "BALANCE", {"cpu": math.inf})
        reduced = layer.candidates.nearest("channel", decision[0]) > 0
        assert composed.composes(layer.eval(), decision[0]) is False
        with redconvert.resting_gates(nn.ModuleList([layer.train()])):
            assert composed.composes(layer, layer.candidates.nearest("channel", decision[0])) is reduced
        out, gradients = step(layer, x, captured)
        patch.setattr(composed, "BALANCE", {"cpu": -math.inf})
        wanted, wanted_gradients = step(layer, x, captured)
    torch.testing.assert_close(out, wanted)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], msg=lambda text, name=name: f"{name}: {text}")


def test_samples_that_decide_differently(parts):
    layer = layer_of(3, mix_inputs=True)
    layer.forced = [1, 0, 2, 1], [0, 1, 1, 0]
    x = torch.randn(4, 9, 4, 5, 5, dtype=torch.float64)
    out, gradients = step(layer, x)
    parts()
    wanted, wanted_gradients = step(layer, x)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)


def test_a_reader_of_what_is_handed_over(parts):
    """Its own channels are rebuilt by its filters, of the input channels that are there."""

    class Net(nn.Sequential):
        def __init__(self):
            norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(6)]
            super().__init__(nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 6, 3), norms[1], nn.ReLU())
            self.append(nn.Conv2d(6, 5, 1))

    config = redconvert.ConvertConfig(shares=(0.5,), cheap="pointwise", absorb=True, rebuild_weight=0)
    model = redconvert.convert(Net(), config, example_inputs=torch.zeros(1, 3, 12, 12)).double().train()
    reader = model[3]
    assert reader.reads_from is not None and reader.rebuilds
    with torch.no_grad():
        for part in (reader.cheap_c, reader.cheap_in):
            for value in part.parameters():
                value.normal_()
    x, found = torch.randn(2, 3, 12, 12, dtype=torch.float64), []
    for again in (False, True):
        if again:
            parts()
        model.zero_grad(set_to_none=True)
        with redconvert.forced(model, channel=1), redconvert.resting_gates(model):
            out = model(x)
        out.square().sum().backward()
        found.append((out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["principal", "depthwise"])
def test_passes(kind):
    """One convolution of all channels forward, its two gradients backward; a depthwise Phi_c stays a part."""
    layer = layer_of(2, (8, 6), cheap=kind, shares=(0.5,))
    layer.forced = (1, None)
    with FlopCounterMode(display=False) as counter:
        step(layer, torch.randn(2, 8, 5, 5, dtype=torch.float64))
    found = counter.get_flop_counts()["Global"]
    dense = 2 * 2 * 25 * 9 * 8 * 6
    counts = [found[op] for op in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)]
    if kind == "principal":
        assert counts == [dense, 2 * dense]
    else:
        assert counts[0] == dense // 2 + 2 * 2 * 25 * 9 * 3


def test_mixed_precision():
    """Filters are composed in float32, and convolved with in bfloat16."""
    layer = layer_of(2, (8, 6), shares=(0.5,), mix_inputs=True).float()
    layer.forced = (1, None)
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = step(layer, x)
    assert out.dtype == torch.bfloat16 and {g.dtype for g in gradients.values()} == {torch.float32}
    with redconvert.resting_gates(nn.ModuleList([layer])):
        filters, bias = composed.compose(layer, 1, layer.weight, layer.bias)
    assert filters.dtype == torch.float32
    wanted = nn.functional.conv2d(x.bfloat16(), filters.bfloat16(), bias.bfloat16(), padding=1)
    torch.testing.assert_close(out, wanted.detach())


def test_where_passes_cost_more_than_is_saved(monkeypatch):
    """Of 64 channels half saves 9 * 64 * 64 / 2 - 32 * 32 multiply-adds at each position, for four passes over 64."""
    monkeypatch.setattr(composed, "BALANCE", {"cpu": 30})
    layer = layer_of(2, (64, 64), shares=(0.5,))
    saved = 9 * 64 * 64 / 2 - 32 * 32
    with redconvert.resting_gates(nn.ModuleList([layer])):
        for balance, wanted in ((30, False), (saved / 256 - 1, False), (saved / 256, True)):
            monkeypatch.setattr(composed, "BALANCE", {"cpu": balance})
            assert composed.composes(layer, 1) is wanted
    mixing = layer_of(2, (64, 64), shares=(0.5,), mix_inputs=True, stride=2)  # of all four input positions of an output
    saved = 9 * (64 * 64 - 32 * 32) - 32 * 32 - 4 * 32 * 32
    with redconvert.resting_gates(nn.ModuleList([mixing])):
        for balance, wanted in ((saved / (256 + 4 * 256) - 1, False), (saved / (256 + 4 * 256), True)):
            monkeypatch.setattr(composed, "BALANCE", {"cpu": balance})
            assert composed.composes(mixing, 1) is wanted
