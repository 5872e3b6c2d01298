"""A deployed network computes what the eager one computes, for every decision, and follows its modes and budgets."""

from __future__ import annotations

import copy
import os
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from deploy_networks import CHEAP, Image, Undecided, Video, dynamic_from, undecided_gates
from torch import Tensor, nn

import redconvert
from redconvert.deploy import kernels
from redconvert.deploy.bench import _peak
from redconvert.deploy.pack import PackedConv

TIGHT = 2e-5


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture
def clips() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 3, 8, 16, 16)


@pytest.mark.parametrize("blend_frames", [False, True], ids=["copies", "blends"])
@pytest.mark.parametrize("cheap", CHEAP)
def test_every_decision_of_a_video_network(clips, cheap, blend_frames):
    dynamic = dynamic_from(Video(), clips, **CHEAP[cheap], blend_frames=blend_frames, search_space=3)
    fast = redconvert.deploy(dynamic, clips)
    assert fast.source == "fx"
    for channel in range(3):
        for temporal in range(3):
            with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
                assert error(fast(clips), dynamic(clips)) < TIGHT, (channel, temporal)


@pytest.mark.parametrize("frames", [5, 6, 7, 9])
@pytest.mark.parametrize("blend_frames", [False, True], ids=["copies", "blends"])
def test_clips_of_other_lengths_than_it_was_deployed_with(clips, frames, blend_frames):
    dynamic = dynamic_from(Video(), clips, blend_frames=blend_frames)
    fast = redconvert.deploy(dynamic, clips)
    other = torch.randn(2, 3, frames, 20, 12)
    for channel, temporal in ((0, 0), (0, 1), (1, 1)):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(other), dynamic(other)) < TIGHT, (channel, temporal)


def test_gates_and_samples_decide_as_in_the_eager_network(clips):
    dynamic = dynamic_from(Video(), clips, blend_frames=True)
    undecided_gates(dynamic)
    fast = redconvert.deploy(dynamic, clips)
    told: dict[str, dict[str, list]] = {"eager": {}, "deployed": {}}
    outputs: list[Tensor] = []
    for name, network in (("eager", dynamic), ("deployed", fast)):
        seen = told[name]
        listen = partial(lambda seen, layer, o: seen.setdefault(layer.layer_name, []).append(o), seen)
        with redconvert.observed(network, listen), torch.no_grad():
            outputs.append(network(clips))
    assert error(outputs[1], outputs[0]) < TIGHT
    assert told["eager"].keys() == told["deployed"].keys()
    assert len({tuple(each[0].decisions) for each in told["eager"].values()}) > 3  # they do differ
    for name, calls in told["eager"].items():
        for ours, theirs in zip(told["deployed"][name], calls, strict=True):
            assert ours.decisions == theirs.decisions
            assert (ours.input_shape, ours.output_shape) == (theirs.input_shape, theirs.output_shape)
            for mine, his in zip(ours.weights, theirs.weights, strict=True):
                assert torch.allclose(mine, his, atol=1e-5)


def test_candidates_per_sample(clips):
    dynamic = dynamic_from(Video(), clips)
    fast = redconvert.deploy(dynamic, clips)
    with redconvert.forced(dynamic, channel=[0, 1, None], temporal=[1, None, 0]), torch.no_grad():
        assert error(fast(clips), dynamic(clips)) < TIGHT
    fast.one_by_one = False  # as on a GPU: the samples that decide alike run together
    with redconvert.forced(dynamic, channel=[0, 1, 0], temporal=[1, 0, 1]), torch.no_grad():
        assert error(fast(clips), dynamic(clips)) < TIGHT


@pytest.mark.parametrize("cheap", CHEAP)
def test_an_image_network(cheap):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 18, 18)
    dynamic = dynamic_from(Image(), x, **CHEAP[cheap])
    fast = redconvert.deploy(dynamic, x)
    for channel in (0, 1, [0, 1, 1, 0]):
        with redconvert.forced(dynamic, channel=channel), torch.no_grad():
            assert error(fast(x), dynamic(x)) < TIGHT
    with redconvert.disabled(dynamic), torch.no_grad():
        assert error(fast(x), dynamic(x)) < TIGHT


def test_frames_folded_into_the_batch():
    torch.manual_seed(0)
    frames = torch.randn(2 * 4, 3, 18, 18)
    dynamic = dynamic_from(Image(), frames, num_frames=4, blend_frames=True)
    fast = redconvert.deploy(dynamic, frames)
    for channel, temporal in ((0, 0), (1, 0), (0, 1), (1, 1), ([0, 1], [1, 0])):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(frames), dynamic(frames)) < TIGHT, (channel, temporal)


def test_copies_are_carried_and_temporal_taps_merged(clips, monkeypatch):
    """8 frames, every second one computed: spatial convolutions see 4, 3 x 1 x 1 have 2 taps."""
    dynamic = dynamic_from(Video(), clips)
    fast = redconvert.deploy(dynamic)
    ran: list[tuple[tuple[int, ...], int]] = []
    original = PackedConv.__call__

    def spy(self, x, *args, **kwargs):
        ran.append((self.filter.kernel, x.shape[2]))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(PackedConv, "__call__", spy)
    with redconvert.forced(dynamic, channel=0, temporal=1):
        fast(clips[:1])
    assert ran[:3] == [((3, 3, 3), 8), ((1, 3, 3), 4), ((2, 1, 1), 5)]  # one frame of zeros before the four


def test_report_budget_and_efficiency_loss_see_the_deployed_network(clips):
    dynamic = dynamic_from(Video(), clips)
    undecided_gates(dynamic)
    fast = redconvert.deploy(dynamic, clips)
    ours, theirs = (redconvert.report(each, [clips], time=False) for each in (fast, dynamic))
    assert ours.executed_macs == theirs.executed_macs and ours.dense_macs == theirs.dense_macs
    assert [layer.to_dict() for layer in ours.layers] == [layer.to_dict() for layer in theirs.layers]
    costs = []
    for network in (fast, dynamic):
        loss = redconvert.EfficiencyLoss(network, target=0.5)
        with torch.no_grad():
            costs.append(float(loss(network(clips))))
        loss.close()
    assert costs[0] == pytest.approx(costs[1], rel=1e-5)
    before = fast(clips)
    reached = redconvert.set_budget(fast, 0.75, [clips])
    assert reached.mean <= 0.75
    assert not torch.equal(fast(clips), before)  # thresholds are read at each call
    with torch.no_grad():
        assert error(fast(clips), dynamic(clips)) < TIGHT


def test_report_times_the_units(clips):
    dynamic = dynamic_from(Video(), clips)
    found = redconvert.report(redconvert.deploy(dynamic, clips), [clips], repeats=1)
    assert found.model == "Video"
    assert all(layer.dense_ms > 0 and layer.dynamic_ms > 0 for layer in found.layers)


def test_a_network_that_fx_cannot_trace_is_deployed_layer_by_layer(clips):
    dynamic = dynamic_from(Undecided(), clips)
    fast = redconvert.deploy(dynamic, clips)
    assert fast.source == "layers" and "control flow" in fast.problem
    for channel, temporal in ((0, 0), (1, 1), ([0, 1, 1], [1, 1, 0])):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(clips), dynamic(clips)) < TIGHT
    assert {id(p) for p in fast.parameters()} == {id(p) for p in dynamic.parameters()}  # nothing was copied


def test_soft_gates_and_hooked_layers_run_as_they_are(clips):
    dynamic = dynamic_from(Video(), clips, gate="soft")
    undecided_gates(dynamic)
    with torch.no_grad():
        assert error(redconvert.deploy(dynamic, clips)(clips), dynamic(clips)) < TIGHT
    hard = dynamic_from(Video(), clips)
    hard.block1.spatial.register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        assert error(redconvert.deploy(hard, clips)(clips), hard(clips)) < TIGHT


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16(clips, supported, monkeypatch):
    """Also on a CPU without AVX-512, where oneDNN refuses bfloat16: float32 inside, rounded."""
    from redconvert.deploy import pack

    monkeypatch.setattr(pack, "BFLOAT16", supported and pack.BFLOAT16)
    dynamic = dynamic_from(Video(), clips).to(torch.bfloat16)
    fast = redconvert.deploy(dynamic, clips.bfloat16())
    exact = copy.deepcopy(dynamic).float()
    for channel, temporal in ((0, 0), (1, 1)):
        modes = [redconvert.forced(each, channel=channel, temporal=temporal) for each in (dynamic, exact)]
        with modes[0], modes[1], torch.no_grad():
            assert error(fast(clips.bfloat16()).float(), exact(clips)) < 0.05


def test_without_a_compiler_everything_runs_in_pytorch(clips, monkeypatch):
    from redconvert.deploy import kernels

    monkeypatch.setattr(kernels, "compiled", lambda: None)
    dynamic = dynamic_from(Video(), clips, blend_frames=True)
    fast = redconvert.deploy(dynamic, clips)
    for channel, temporal in ((0, 0), (1, 0), (1, 1)):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(clips), dynamic(clips)) < TIGHT


def test_forms_are_kept_in_memory_and_on_disk(clips, tmp_path):
    dynamic = dynamic_from(Video(), clips)
    with redconvert.forced(dynamic, channel=1, temporal=1):
        fast = redconvert.deploy(dynamic, clips)
        forms = fast.forms()
        again = redconvert.deploy(dynamic, clips, forms=forms)
    assert forms and again.forms() == forms
    fast.save(tmp_path)
    loaded = redconvert.from_pretrained(Video(), tmp_path).eval()
    with redconvert.forced(loaded, channel=1, temporal=1), redconvert.forced(dynamic, channel=1, temporal=1):
        back = redconvert.deploy(loaded, clips, forms=tmp_path)
        assert torch.equal(back(clips), fast(clips))
    assert back.forms() == forms
    (tmp_path / "deploy.json").write_text('{"unit0": {"0": "upside down"}}')
    with pytest.raises(redconvert.RedconvertError, match="holds no forms"):
        redconvert.deploy(dynamic, clips, forms=tmp_path)
    with pytest.raises(redconvert.RedconvertError, match="cannot be read"):
        redconvert.deploy(dynamic, clips, forms=tmp_path / "nowhere")


def test_gates_that_never_change_their_mind_are_not_asked(clips, monkeypatch):
    from redconvert.deploy.gate import FoldedGate

    dynamic = dynamic_from(Video(), clips)
    undecided_gates(dynamic)
    with torch.no_grad():
        dynamic.left.gate.beta.fill_(100.0)  # always open
    decisions: dict[nn.Module, set] = {}
    with (
        redconvert.observed(dynamic, lambda layer, o: decisions.setdefault(layer.gate, set()).update(o.decisions)),
        torch.no_grad(),
    ):
        dynamic(clips)
    undecided = {gate for gate, found in decisions.items() if len(found) > 1}
    assert undecided and dynamic.left.gate not in undecided
    fast = redconvert.deploy(dynamic, clips, bake=[clips])
    asked = []
    original = FoldedGate.__call__

    def ask(self, x, sources=None):
        asked.append(self.gate)
        return original(self, x, sources)

    monkeypatch.setattr(FoldedGate, "__call__", ask)
    with torch.no_grad():
        assert error(fast(clips), dynamic(clips)) < TIGHT
    assert set(asked) == undecided
    with redconvert.forced(dynamic, channel=1, temporal=1), torch.no_grad():
        assert error(fast(clips), dynamic(clips)) < TIGHT


class Summing(nn.Module):
    """Adds that must not be fused: a sum with itself, with a number, one spread out, and one whose source changes."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(8, 8, 3, padding=1) for _ in range(5))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a = self.convs[0](x)
        b = self.convs[1](a + a) + 1.5
        c = self.convs[2](b) + b.mean((3, 4), keepdim=True)
        d = self.convs[3](c)
        c.mul_(0.5)  # the input of convs[3], changed between it and the add
        d = self.relu(d + c)
        e = self.convs[4](d)
        d += e  # in place, and read again
        return (d * e).mean((2, 3, 4))


def test_adds_that_look_like_residuals(clips):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 6, 6)
    dynamic = dynamic_from(Summing(), x)
    fast = redconvert.deploy(dynamic, x)
    assert fast.source == "fx"
    for channel, temporal in ((0, 0), (1, 1)):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(x.clone()), dynamic(x.clone())) < TIGHT


def test_refusals(clips):
    dynamic = dynamic_from(Video(), clips)
    fast = redconvert.deploy(dynamic, clips)
    with pytest.raises(redconvert.RedconvertError, match="no dynamic layers"):
        redconvert.deploy(Video())
    with pytest.raises(redconvert.RedconvertError, match="deployed already"):
        redconvert.deploy(fast)
    with pytest.raises(redconvert.RedconvertError, match="for inference"):
        fast.train()
    with pytest.raises(redconvert.RedconvertError, match=r"deployed in torch\.float32 and its input is torch\.float64"):
        fast(clips.double())
    with pytest.raises(redconvert.RedconvertError, match="move or cast"):
        fast.double()
    with pytest.raises(redconvert.RedconvertError, match="empty batch"):
        fast(clips[:0])


class Bottlenecks(nn.Module):
    """64 channels to 16 and back, added to what came in, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv3d(3, 64, 1), nn.ReLU()
        self.down = nn.ModuleList(nn.Conv3d(64, 16, 1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv3d(16, 64, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for down, up in zip(self.down, self.up, strict=True):
            x = self.relu(up(self.relu(down(x))) + x)
        return x.mean((2, 3, 4))


@pytest.mark.parametrize("decision", [(1, 0), (0, 1), (1, 1)], ids=["channels", "frames", "both"])
def test_sums_take_the_place_of_what_was_added(decision):
    """In memory, by hand: the residual, 64 channels, what the last layer reads, 16, and what it computes."""
    if kernels.compiled() is None:
        pytest.skip("no C compiler: PyTorch's passes write anew")
    x = torch.randn(2, 3, 4, 16, 16)
    config = redconvert.ConvertConfig(cheap="pointwise", min_saving=0, rules={"stem": None, "down.*": None})
    dynamic = redconvert.convert(Bottlenecks().eval(), config, example_inputs=x)
    redconvert.calibrate(dynamic, [x])  # skipped frames are blended, and so written
    fast, recorded = (redconvert.deploy(dynamic, x, record=record) for record in (False, True))
    channel, temporal = decision
    with redconvert.forced(dynamic, channel=channel, temporal=temporal), torch.no_grad():
        assert error(fast(x), dynamic(x)) < TIGHT
        computed = (32 if channel else 64) / (2 if temporal else 1)
        rebuilt = 64 / 2 if channel and temporal else 0  # of the frames that are computed, before the others are filled
        each = 4 * x[0, 0].numel()  # bytes of a channel; clips run one by one
        held = _peak(lambda: fast(x), nullcontext) / each * 1e6
        for _ in range(3):
            recorded(x)
        assert _peak(lambda: recorded(x), nullcontext) / each * 1e6 <= held  # what was read last is let go at once
    assert held == pytest.approx(64 + 16 + computed + rebuilt, abs=3)  # means of gates are small


def test_a_compiler_that_is_there_compiles():
    """Or all tests of the C passes would be left out."""
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler")
    if os.environ.get("REDCONVERT_COMPILE") == "0":
        pytest.skip("REDCONVERT_COMPILE=0")
    assert kernels.compiled() is not None


def test_a_compiler_that_fails_says_so(tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'vectors.c:1: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REDCONVERT_COMPILE", raising=False)
    with pytest.warns(RuntimeWarning, match="vectors.c:1: no such thing"):
        assert kernels.compiled.__wrapped__() is None
