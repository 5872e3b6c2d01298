"""Images whose samples decide differently go on apart, and the results are those of the eager network."""

from __future__ import annotations

import pytest
import torch
from deploy_networks import dynamic_from, undecided_gates
from torch import Tensor, nn

import redconvert
from redconvert.deploy.program import Program
from redconvert.deploy.unit import Unit

TIGHT = 2e-5


class Bottlenecks(nn.Module):
    """Blocks with residuals; in between, if asked for, what mixes the samples of a batch."""

    def __init__(self, mixes: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.mixes, self.bias = mixes, bias
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.ModuleList(self._block() for _ in range(3))
        self.relu, self.head = nn.ReLU(), nn.Linear(16, 5)

    def _block(self) -> nn.Sequential:
        parts: list[nn.Module] = []
        for before, after, kernel in ((16, 8, 1), (8, 8, 3), (8, 16, 1)):
            parts += [nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(after)]
            parts += [nn.ReLU()] if after == 8 else []
        return nn.Sequential(*parts)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        x = self.stem(x)
        if self.bias:
            x = x + bias
        for index, block in enumerate(self.blocks):
            x = self.relu(block(x) + x)
            if self.mixes and index == 1:
                x = x - x.mean(0, keepdim=True)
        return self.head(x.mean((2, 3)).view(rows, -1))


def deployed(network: nn.Module, inputs: object, **config: object) -> tuple[nn.Module, redconvert.Deployed]:
    dynamic = dynamic_from(network, inputs, **config)
    for layer in redconvert.layers.dynamic_layers(dynamic).values():
        if layer.cheap_in is not None:
            for parameter in layer.cheap_in.parameters():
                nn.init.normal_(parameter, 0, 0.1)
    return dynamic, redconvert.deploy(dynamic, inputs)


@pytest.fixture
def watched(monkeypatch):
    """The parts that batches fell into, and how often samples were gathered by a single unit instead."""
    parts: list[list[list[int]]] = []
    gathered: list[Unit] = []
    part, in_groups = Program._part, Unit._in_groups
    monkeypatch.setattr(Program, "_part", lambda *given: (parts.append(given[3]), part(*given))[1])
    monkeypatch.setattr(Unit, "_in_groups", lambda *given: (gathered.append(given[0]), in_groups(*given))[1])
    return parts, gathered


def check(dynamic: nn.Module, fast: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        found, wanted = fast(*inputs), dynamic(*inputs)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < TIGHT


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("search_space", [2, 3])
def test_gates_that_differ_from_sample_to_sample_and_from_layer_to_layer(absorb, search_space, watched):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 32, 32) + torch.randn(6, 3, 1, 1)
    dynamic, fast = deployed(Bottlenecks(), x, absorb=absorb, search_space=search_space)
    undecided_gates(dynamic)
    fast = redconvert.deploy(dynamic, x)
    parts, gathered = watched
    parts.clear()
    check(dynamic, fast, x)
    assert len(parts) > 1 and not gathered  # parts part again
    assert sorted(sample for group in parts[0] for sample in group) == list(range(6))


@pytest.mark.parametrize("absorb", [False, True])
def test_candidates_by_sample(absorb, watched):
    torch.manual_seed(1)
    x = torch.randn(5, 3, 32, 32)
    dynamic, fast = deployed(Bottlenecks(), x, absorb=absorb)
    parts, gathered = watched
    with redconvert.forced(dynamic, channel=[0, 1, 1, 0, 1]):
        check(dynamic, fast, x)
    assert parts == [[[0, 3], [1, 2, 4]]] and not gathered  # once, for the whole network
    with redconvert.forced(dynamic, channel=[1, 1, 1, None, 0]):
        check(dynamic, fast, x)
    with redconvert.forced(dynamic, channel=1):
        parts.clear()
        check(dynamic, fast, x)
        assert not parts


def test_the_batch_is_whole_again_where_samples_are_mixed(watched):
    torch.manual_seed(2)
    x = torch.randn(4, 3, 32, 32)
    dynamic, fast = deployed(Bottlenecks(mixes=True), x)
    parts, gathered = watched
    with redconvert.forced(dynamic, channel=[0, 1, 0, 1]):
        check(dynamic, fast, x)
    assert parts == [[[0, 2], [1, 3]]] * 2 and not gathered  # before and behind the mean over samples


def test_what_has_no_row_per_sample_is_not_cut(watched):
    torch.manual_seed(3)
    inputs = torch.randn(4, 3, 32, 32), torch.randn(1, 16, 1, 1)
    dynamic, fast = deployed(Bottlenecks(bias=True), inputs)
    _, gathered = watched
    with redconvert.forced(dynamic, channel=[0, 1, 0, 1]):
        check(dynamic, fast, *inputs)
    assert gathered and fast.batch.forks is False
    gathered.clear()
    with redconvert.forced(dynamic, channel=[0, 1, 0, 1]):  # as many rows as samples
        check(dynamic, fast, inputs[0], inputs[1].repeat(4, 1, 1, 1))
    assert not gathered


def test_observers_hear_of_the_whole_batch(watched):
    torch.manual_seed(4)
    x = torch.randn(4, 3, 32, 32)
    dynamic, fast = deployed(Bottlenecks(), x, absorb=True)
    undecided_gates(dynamic)
    fast = redconvert.deploy(dynamic, x)
    told: list[list[list[redconvert.layers.Decision]]] = []
    for network in (dynamic, fast):
        seen: list[list[redconvert.layers.Decision]] = []
        with redconvert.observed(network, lambda _, o, seen=seen: seen.append(o.decisions)), torch.no_grad():
            network(x)
        told.append(sorted(seen))
    assert told[0] == told[1]
    parts, _ = watched
    parts.clear()
    check(dynamic, fast, x)
    assert parts
