"""What is computed: one full convolution in training, no more than asked for in inference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import build, is_choice, open_all, randomize, specs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from redconvert import LayerConfig, forced, observed
from redconvert.layers.macs import executed_macs, layer_macs

CONV = {"dims": 3, "shape": (3, 4, 7, 6, 6), "in_channels": 4, "out_channels": 11, "kernel_size": 3, "padding": 1}


class Convolutions(TorchDispatchMode):
    """Records (batch, weight shape, output shape) of every convolution that runs forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.seen.append((args[0].shape[0], tuple(args[1].shape), tuple(out.shape)))
        return out

    def of_kernel(self, kernel: tuple[int, ...]):
        """Those with the layer's own kernel: cheap operations have others in these tests."""
        return [call for call in self.seen if call[1][2:] == kernel]


@pytest.mark.parametrize("cheap", ["pointwise", "scale", "depthwise"])
@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("space", [2, 3, 4])
@pytest.mark.parametrize("feeds_norm", [False, True])
def test_training_runs_one_full_convolution(space, gate, cheap, feeds_norm):
    layer, _, x = build({**CONV, "config": LayerConfig(search_space=space, gate=gate, cheap=cheap)})
    randomize(layer).feeds_norm = feeds_norm
    with Convolutions() as calls:
        layer(x).square().mean().backward()
    assert calls.of_kernel((3, 3, 3)) == [(3, (11, 4, 3, 3, 3), (3, 11, 7, 6, 6))]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(spec=specs(), seed=st.integers(0, 99))
@torch.no_grad()
def test_inference_computes_what_was_asked_for(spec, seed):
    assume(is_choice(spec) and spec["config"].cheap in ("auto", "scale"))
    spec["config"] = LayerConfig(**{**spec["config"].to_dict(), "cheap": "scale"})  # not a convolution itself
    layer, _, x = build(spec, seed)
    randomize(layer).eval()
    full = layer(x).shape
    frames = full[2] if spec["dims"] == 3 else spec.get("num_frames") or 1
    for i, kept in enumerate(layer.candidates.channels):
        for j, stride in enumerate(layer.candidates.strides):
            with forced(layer, channel=i, temporal=j), Convolutions() as calls:
                layer(x)
            (call,) = calls.seen
            computed = math.ceil(frames / stride)
            if spec["dims"] == 3:
                assert call[2] == (full[0], kept, computed, *full[3:])
            else:
                assert call[2] == (full[0] // frames * computed, kept, *full[2:])
            assert call[1] == (kept, *layer.weight.shape[1:])


@torch.no_grad()
def test_mixed_decisions_run_once_each():
    layer, _, x = build({**CONV, "shape": (5, 4, 7, 6, 6)})
    with forced(layer.eval(), channel=[0, 1, 0, 1, 1], temporal=[0, 1, 0, 1, 0]), Convolutions() as calls:
        layer(x)
    assert calls.of_kernel((3, 3, 3)) == [
        (2, (11, 4, 3, 3, 3), (2, 11, 7, 6, 6)),
        (2, (6, 4, 3, 3, 3), (2, 6, 4, 6, 6)),
        (1, (6, 4, 3, 3, 3), (1, 6, 7, 6, 6)),
    ]


@torch.no_grad()
def test_soft_inference_runs_at_the_largest_open_candidate():
    layer, _, x = build({**CONV, "config": LayerConfig(gate="soft", search_space=3)})
    open_all(randomize(layer, gates=False)).eval()
    layer.gate.beta[[0, 3]] = -1.0  # temporal values come first; the full candidates are closed
    layer.gate.fc2.weight.mul_(0.1)
    with Convolutions() as calls:
        layer(x)
    assert calls.of_kernel((3, 3, 3)) == [(3, (6, 4, 3, 3, 3), (3, 6, 4, 6, 6))]


def test_kept_groups_read_their_inputs_alone():
    layer, _, x = build({**CONV, "in_channels": 4, "out_channels": 8, "groups": 4})
    with forced(layer.eval(), channel=1, temporal=0), Convolutions() as calls, torch.no_grad():
        layer(x)
    assert calls.of_kernel((3, 3, 3)) == [(3, (4, 1, 3, 3, 3), (3, 4, 7, 6, 6))]


@pytest.mark.parametrize(
    ("channels", "groups", "config", "wanted"),
    [
        (83, 1, {}, ((83, 42), (1, 2))),
        (230, 1, {"search_space": 3}, ((230, 115, 58), (1, 2, 4))),
        (921, 1, {"search_space": 3, "align": 16}, ((921, 464, 240), (1, 2, 4))),
        (7, 7, {"search_space": 3}, ((7, 4, 2), (1, 2, 4))),
        (12, 3, {"search_space": 3}, ((12, 8, 4), (1, 2, 4))),
        (12, 4, {"align": 4}, ((12,), (1, 2))),  # whole groups of 3 and multiples of 4
        (8, 2, {"temporal": False}, ((8, 4), (1,))),
        (8, 2, {"channel": False, "search_space": 3}, ((8,), (1, 2, 4))),
        (2, 1, {"search_space": 4}, ((2, 1), (1, 2, 4, 8))),
        (1, 1, {}, ((1,), (1, 2))),
    ],
)
def test_candidates(channels, groups, config, wanted):
    config = LayerConfig(**config)
    conv = nn.Conv3d(groups, channels, 1, groups=groups, device="meta")
    layer, _, _ = build(
        {**CONV, "shape": (1,), "in_channels": groups, "out_channels": channels, "groups": groups} | {"config": config}
    )
    found = layer.plan_candidates(conv, config, None)
    assert (found.channels, found.strides) == wanted == (layer.candidates.channels, layer.candidates.strides)


@torch.no_grad()
def test_macs_by_hand():
    """11 of 4 channels, 3x3x3, 7 frames of 6x6; candidate (1, 1): 6 channels, 4 frames, pointwise 5x6."""
    layer, _, x = build({**CONV, "config": LayerConfig(cheap="pointwise"), "gate_frames": 7})
    macs = layer_macs(layer, x.shape, (3, 11, 7, 6, 6))
    assert macs.dense == 11 * 7 * 36 * 4 * 27
    assert macs.gate == 4 * 7 * 36 + 28 * 16 + 16 * 4
    assert macs.conv == ((macs.dense, 11 * 4 * 36 * 108), (6 * 7 * 36 * 108, 6 * 4 * 36 * 108))
    assert macs.cheap == ((0, 2 * 3 * 11 * 36), (30 * 7 * 36, 30 * 4 * 36 + 2 * 3 * 11 * 36))
    assert macs.lowest == macs.gate + macs.conv[1][1] + macs.cheap[1][1]
    seen = []
    with observed(layer, lambda _, o: seen.append(o)), forced(layer.eval(), channel=[0, 1, 1], temporal=[0, 0, 1]):
        layer(x)
    assert executed_macs(layer, seen[0]) == [macs.executed(0, 0), macs.executed(1, 0), macs.executed(1, 1)]
