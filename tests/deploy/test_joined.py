"""Concatenations: parts written side by side, means taken once, and parts that hold different frames."""

from __future__ import annotations

from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import nn

import redconvert
from redconvert.deploy import frames, kernels, program
from redconvert.layers import dynamic_layers


def conv(before, after, size):
    return nn.Sequential(nn.Conv3d(before, after, size, padding=size // 2), nn.BatchNorm3d(after), nn.ReLU())


class Inception(nn.Module):
    """Three branches side by side, twice; what the first block gives is read by three gates and a pool."""

    def __init__(self, last_activation=nn.ReLU):
        super().__init__()
        self.stem = conv(3, 16, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    conv(before, 16, 1),
                    nn.Sequential(conv(before, 8, 1), conv(8, 24, 3)),
                    nn.Sequential(nn.MaxPool3d(3, 1, 1), conv(before, 20, 1)),
                ]
            )
            for before in (16, 60)
        )
        for branches in self.blocks:
            branches[1][1][2] = last_activation()
        self.head = nn.Linear(60, 5)

    def forward(self, x):
        x = self.stem(x)
        for first, second, third in self.blocks:
            x = torch.cat([first(x), second(x), third(x)], dim=1)
        return self.head(x.mean((2, 3, 4)))


def made(**options):
    torch.manual_seed(0)
    model = Inception(**options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(2, 3, 4, 9, 7)
    dynamic = redconvert.convert(model, redconvert.ConvertConfig(min_saving=0, cheap="pointwise"), example_inputs=x)
    redconvert.calibrate(dynamic, [x])
    return dynamic.eval(), redconvert.deploy(dynamic, x), x


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Hardswish])
def test_answers_are_those_of_the_dynamic_network(activation):
    dynamic, fast, x = made(last_activation=activation)
    with torch.no_grad():
        for channel, temporal in product((0, 1), (0, 1)):
            with redconvert.forced(dynamic, channel=channel, temporal=temporal):
                wanted = dynamic(x)
            with redconvert.forced(fast, channel=channel, temporal=temporal):
                torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_branches_that_decide_differently(seed):
    """Some computed, some rebuilt, some with half of the frames, for each sample and layer at random."""
    dynamic, fast, x = made()
    generator = torch.Generator().manual_seed(seed)
    for layer in dynamic_layers(dynamic).values():
        layer.forced = tuple(torch.randint(0, 2, (2,), generator=generator).tolist() for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), dynamic(x), rtol=1e-4, atol=1e-5)


def test_gates_that_ask():
    """Decisions by the gates themselves: the means that they are told are those that they would have taken."""
    dynamic, fast, x = made()
    for layer in dynamic_layers(dynamic).values():
        nn.init.normal_(layer.gate.fc2.weight, std=3.0)
        layer.gate.beta.data.zero_()
    fast = redconvert.deploy(dynamic, x)
    seen, told = [], []
    with torch.no_grad(), redconvert.observed(dynamic, lambda _, call: seen.append(call.decisions)):
        wanted = dynamic(x)
    with torch.no_grad(), redconvert.observed(fast, lambda _, call: told.append(call.decisions)):
        torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-5)
    assert sorted(map(str, seen)) == sorted(map(str, told)) and len({str(each) for each in seen}) > 1


@pytest.mark.skipif(kernels.compiled() is None, reason="no C compiler: nothing is written in place")
def test_rebuilt_parts_need_no_concatenation():
    _, fast, x = made()
    with torch.no_grad(), redconvert.forced(fast, channel=1, temporal=0):
        fast(x)
        with patch.object(frames.torch, "cat", side_effect=AssertionError("concatenated")):
            fast(x[:1])


def test_means_are_taken_once():
    """Two gates read the first block, whose parts know no means: of each part one is taken, not two."""
    _, fast, x = made()
    for module in fast.modules():
        if hasattr(module, "batch"):
            module.batch.always_ask = True
    with torch.no_grad(), redconvert.forced(fast, channel=0, temporal=0):
        fast(x[:1])
        with patch.object(program.Frames, "means", autospec=True, side_effect=program.Frames.means) as means:
            fast(x[:1])
    assert means.call_count == 3


def test_a_room():
    room = frames.Room(5)
    rows = torch.randn(1, 2, 3, 4, 2)
    place = room.part(rows, 1, 2)
    place.copy_(rows)
    assert room.part(torch.randn(1, 1, 3, 4, 2), 3, 2) is None
    parts = [torch.randn(1, 1, 2, 3, 4), place.permute(0, 4, 1, 2, 3), torch.randn(1, 2, 2, 3, 4)]
    wanted = torch.cat(parts, dim=1)
    assert torch.equal(room.joined(parts), wanted)
    assert torch.equal(frames.Room(5).joined(parts), wanted)
