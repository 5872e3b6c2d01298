"""torch.compile: of the masked network, of forced and frozen ones, around a deployed one; and the benchmark's rows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from deploy_networks import Image, Video, dynamic_from, undecided_gates
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import redconvert
from redconvert.deploy.bench import bench

TIGHT = 1e-5
needs_cpp = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler, which Inductor needs on a CPU",
)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def clips() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 3, 8, 16, 16)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def decisions_of(dynamic, x) -> list[set]:
    found: list[set] = []
    with redconvert.observed(dynamic, lambda layer, seen: found.append(set(seen.decisions))):
        dynamic(x)
    return found


# -- masked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cheap", ["pointwise", "principal", "scale", "depthwise"])
@torch.no_grad()
def test_one_graph_serves_every_decision(clips, cheap):
    space = 3 if cheap == "scale" else 2
    dynamic = dynamic_from(Video(), clips, cheap=cheap, blend_frames=True, search_space=space)
    undecided_gates(dynamic)
    assert any(len(each) > 1 for each in decisions_of(dynamic, clips))  # samples decide differently
    compiled = torch.compile(dynamic, fullgraph=True, backend="eager")
    for x in (clips, torch.randn_like(clips), -clips):
        assert error(compiled(x), dynamic(x)) < TIGHT
    redconvert.set_budget(dynamic, 0.8, [clips])
    assert error(compiled(clips), dynamic(clips)) < TIGHT  # thresholds are read at each call
    assert graphs() == 1 and not counters["graph_break"]


@torch.no_grad()
def test_reports_and_budgets_see_through_the_compiler(clips):
    dynamic = dynamic_from(Image(), clips[:, :, 0])
    undecided_gates(dynamic)
    compiled = torch.compile(dynamic, backend="aot_eager")
    x = clips[:, :, 0]
    first = compiled(x)
    ours, theirs = (redconvert.report(each, [x], time=False) for each in (compiled, dynamic))
    assert [layer.to_dict() for layer in ours.layers] == [layer.to_dict() for layer in theirs.layers]
    assert ours.executed_macs == theirs.executed_macs < ours.dense_macs
    assert redconvert.set_budget(compiled, 0.7, [x]).mean <= 0.7
    assert error(compiled(x), dynamic(x)) < TIGHT and not torch.equal(compiled(x), first)
    assert graphs() == 1


@torch.no_grad()
def test_gates_that_stand_on_zero_or_know_nothing(clips):
    dynamic = dynamic_from(Image(), clips[:, :, 0])
    for layer in redconvert.layers.dynamic_layers(dynamic).values():
        layer.gate.fc2.weight.zero_()
        layer.gate.beta.zero_()  # z = 0: closed, so that the cheapest candidate counts
    compiled = torch.compile(dynamic, fullgraph=True, backend="aot_eager")
    assert decisions_of(dynamic, clips[:, :, 0])[0] == {(1, 0, False, 0)}
    assert error(compiled(clips[:, :, 0]), dynamic(clips[:, :, 0])) < TIGHT
    dynamic.stem.gate.beta.fill_(float("nan"))
    assert error(compiled(clips[:, :, 0]), dynamic(clips[:, :, 0])) < TIGHT


@needs_cpp
@pytest.mark.timeout(300)
@torch.no_grad()
def test_inductor(clips):
    network = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
    dynamic = dynamic_from(network, clips, blend_frames=True, rules={"*": {}})
    undecided_gates(dynamic)
    clips += torch.tensor([-2.0, 0.0, 2.0]).view(3, 1, 1, 1, 1)  # so that gates tell them apart
    compiled = torch.compile(dynamic, fullgraph=True)
    for x in (clips, clips.flip(0)):
        assert len(decisions_of(dynamic, x)[0]) > 1
        assert error(compiled(x), dynamic(x)) < TIGHT
    assert graphs() == 1


@torch.no_grad()
def test_forced_candidates_are_computed_alone():
    x = torch.randn(2, 3, 8, 10, 10)
    network = nn.Sequential(nn.Conv3d(3, 10, 3, padding=1), nn.ReLU())
    dynamic = dynamic_from(network, x, cheap="pointwise", rules={"*": {}})
    counted: list[int] = []

    def counting(graph, inputs):
        with FlopCounterMode(display=False) as counter:
            graph(*inputs)
        counted.append(counter.get_total_flops())
        return graph.forward

    compiled = torch.compile(dynamic, fullgraph=True, backend=counting)
    positions, per_output = 2 * 100, 3 * 27
    for (channel, temporal), frames, kept in (((0, 0), 8, 10), ((1, 0), 8, 5), ((0, 1), 4, 10), ((1, 1), 4, 5)):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal):
            assert error(compiled(x), dynamic(x)) < TIGHT
        rebuilt = (10 - kept) * kept  # of each position, from the kept channels
        macs = positions * frames * (kept * per_output + rebuilt)
        assert counted[-1] == 2 * macs  # a MAC is two of PyTorch's FLOPs
    with redconvert.forced(dynamic, channel=1):  # the gate decides on frames
        assert error(compiled(x), dynamic(x)) < TIGHT
    with redconvert.forced(dynamic, channel=[0, 1], temporal=[1, None]):
        assert error(compiled(x), dynamic(x)) < TIGHT
    with redconvert.disabled(dynamic):
        assert error(compiled(x), dynamic(x)) < TIGHT
    assert len(counted) == 7  # one graph per mode


@torch.no_grad()
def test_forced_candidates_of_frames_in_the_batch():
    frames = torch.randn(2 * 5, 3, 18, 18)
    dynamic = dynamic_from(Image(), frames, num_frames=5, blend_frames=True)
    compiled = torch.compile(dynamic, fullgraph=True, backend="eager")
    for channel, temporal in ((1, 1), (0, 1), (None, 1), (1, None), (None, None)):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal):
            assert error(compiled(frames), dynamic(frames)) < TIGHT, (channel, temporal)


# -- deployed ------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A network that holds a deployed one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.head(self.inner(x * 0.5 + 0.1)))


@torch.no_grad()
def test_a_deployed_network_is_left_alone(clips):
    dynamic = dynamic_from(Video(), clips)
    undecided_gates(dynamic)
    fast = redconvert.deploy(dynamic, clips)
    compiled = torch.compile(fast, backend="aot_eager")
    around = Around(fast)
    compiled_around = torch.compile(around, backend="aot_eager")
    for x in (clips, torch.randn_like(clips)):
        assert torch.equal(compiled(x), fast(x))
        assert error(compiled_around(x), around(x)) < TIGHT
    for channel, temporal in ((0, 0), (1, 0), (1, 1), ([0, 1, 0], [1, 1, 0])):
        with redconvert.forced(fast, channel=channel, temporal=temporal):
            assert torch.equal(compiled(clips), fast(clips))
            assert error(compiled_around(clips), around(clips)) < TIGHT
    assert graphs() == 2  # what is before and what is after it
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"a deployed network runs fused|Deployed\.forward"):
        torch.compile(fast, backend="aot_eager", fullgraph=True)(clips)


@torch.no_grad()
def test_a_deployed_network_refuses_to_be_traced(clips):
    fast = redconvert.deploy(dynamic_from(Image(), clips[:, :, 0]), clips[:, :, 0])
    with pytest.raises(redconvert.RedconvertError, match=r"cannot be traced or exported.*redconvert.freeze"):
        torch.export.export(fast, (clips[:, :, 0],), strict=False)
    with pytest.raises(redconvert.RedconvertError, match=r"cannot be traced or exported.*redconvert.freeze"):
        torch.jit.trace(fast, clips[:, :, 0])
    assert fast(clips[:, :, 0]).shape == (3, 5)


def test_importing_does_not_load_dynamo():
    code = "import redconvert, sys; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# -- the benchmark's rows ------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.timeout(300)
def test_rows_of_compiled_networks():
    from torch._inductor import config

    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)
    dynamic = dynamic_from(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1)), x, cheap="pointwise", rules={"*": {}})
    found = bench(dynamic, x, repeats=1, compiled_dynamic=True)
    assert not config.freezing  # a setting of the process, put back
    rows = {row.name: row for row in found.rows}
    names = {name for name in rows if "compiled" in name}
    assert names == {"compiled", "compiled, masked", "compiled, frozen, channels"}
    dense, positions = 144 * 12 * 27, 144
    gate = 3 * positions + dynamic[0].gate.fc1.weight.numel() + dynamic[0].gate.fc2.weight.numel()
    rebuilt = positions * 6 * 6
    assert rows["compiled"].macs == rows["deployed, dense"].macs == dense
    assert rows["compiled, masked"].macs == dense + gate + rebuilt
    assert rows["compiled, frozen, channels"].macs == dense / 2 + rebuilt
    assert rows["deployed, channels"].macs == dense / 2 + rebuilt + gate
    for row in rows.values():
        assert row.ms > 0 and row.setup_s >= 0
        if row.name.startswith("compiled"):
            assert row.setup_s > 20 * row.ms / 1000  # the time to compile is in it
    assert rows["compiled, masked"].kind == "dynamic" and rows["compiled"].kind == "dense"
    assert rows["compiled, masked"].share is None  # it saves nothing, and promises nothing
