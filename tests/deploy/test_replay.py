"""Recorded passes: the same numbers as without, whatever gates decide, and no recording where it would not hold."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from deploy_networks import CHEAP, Image, Video, dynamic_from, undecided_gates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import redconvert
from redconvert.deploy import replay
from redconvert.deploy.bench import _peak
from redconvert.deploy.program import Program
from redconvert.deploy.replay import Tape

pytestmark = pytest.mark.filterwarnings("ignore")


def both(dynamic, x, **options):
    """The network deployed twice, in the same forms: with and without recording."""
    slow = redconvert.deploy(dynamic, x, record=False, **options)
    return redconvert.deploy(dynamic, x, forms=slow.forms(), **options), slow


def clips(samples=2, frames=6, size=20):
    return torch.randn(samples, 3, frames, size, size)


def assert_alike(fast, slow, inputs, passes=4):
    """The same to the bit."""
    for x in inputs:
        for _ in range(passes):
            assert torch.equal(fast(x), slow(x))


@pytest.fixture
def runs(monkeypatch):
    """Counts passes that run step by step."""
    counted = []
    real = Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda self, *a, **k: counted.append(1) or real(self, *a, **k))
    return counted


# -- the same numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHEAP)
@pytest.mark.parametrize(("absorb", "blend_frames"), [(False, False), (True, True)])
def test_decisions_of_a_video_network(kind, absorb, blend_frames, runs):
    torch.manual_seed(0)
    x = clips()
    dynamic = dynamic_from(Video(), x, blend_frames=blend_frames, absorb=absorb, search_space=3, **CHEAP[kind])
    fast, slow = both(dynamic, x)
    for channel, temporal in ((0, 0), (1, 0), (0, 2), (2, 1), ([0, 2], [1, 0])):
        with redconvert.forced(fast, channel=channel, temporal=temporal):
            assert_alike(fast, slow, [x, clips()], passes=2)
            runs.clear()
            fast(clips())
            assert not runs  # played
    assert fast.replays.problem is None and all(tape.problem is None for tape in fast.replays._tapes.values())


@pytest.mark.parametrize("mix", [False, True])
def test_images_in_batches_that_decide_differently(mix, runs):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 30, 30)
    dynamic = dynamic_from(Image(), x, cheap="principal", mix_inputs=mix, search_space=3)
    fast, slow = both(dynamic, x)
    for channel in (0, 1, 2, [0, 1, 2, 1, 0], [2, 2, 0, 0, 1]):
        with redconvert.forced(fast, channel=channel):
            assert_alike(fast, slow, [x, torch.randn_like(x)], passes=2)
            runs.clear()
            fast(torch.randn_like(x))
            assert not runs


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(2, 7),
    st.integers(9, 24),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.randoms(use_true_random=False),
)
def test_shapes_types_and_decisions(samples, frames, size, dtype, random):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype = torch.float32
    torch.manual_seed(random.randrange(1000))
    x = clips(samples, frames, size).to(dtype)
    dynamic = dynamic_from(Video(), clips(1, frames, size), absorb=random.random() < 0.5).to(dtype)
    fast, slow = both(dynamic, x, check=False)
    with redconvert.forced(fast, channel=random.randrange(2), temporal=random.randrange(2)):
        for _ in range(4):
            x = torch.randn_like(x)
            assert torch.equal(fast(x), slow(x))
    assert len(fast.replays) >= 1


def test_inputs_that_lie_differently_in_memory(runs):
    torch.manual_seed(0)
    x = clips(3)
    fast, slow = both(dynamic_from(Video(), x), x)
    strided = torch.randn(6, 3, 6, 20, 40)[1::2, :, :, :, ::2]
    for given_x in (
        x,
        x.contiguous(memory_format=torch.channels_last_3d),
        strided,
        x[:1],
        x[2:],
        x.expand(3, 3, 6, 20, 20),
    ):
        assert_alike(fast, slow, [given_x])
    runs.clear()
    fast(x[2:])
    fast(torch.randn(3, 3, 6, 20, 20)[1:2])
    assert not runs  # the same shape and strides, elsewhere in memory


def test_results_stay_as_they_are_in_the_next_pass():
    torch.manual_seed(0)
    x = clips(1)
    fast = redconvert.deploy(dynamic_from(Video(), x), x)
    kept = [(fast(each), each) for each in [clips(1) for _ in range(6)]]
    again = [(out.clone(), fast(each)) for out, each in kept]
    assert all(torch.equal(*pair) for pair in again)


# -- gates -------------------------------------------------------------------------------------------------


def test_gates_that_differ_from_input_to_input(runs):
    torch.manual_seed(0)
    x = clips(1)
    dynamic = dynamic_from(Video(), x, absorb=True)
    undecided_gates(dynamic)
    fast, slow = both(dynamic, x)
    inputs = [clips(1) * scale for scale in (0.1, 0.5, 1, 2, 4, 8)]
    assert_alike(fast, slow, inputs, passes=3)
    assert len(fast.replays) > 1
    runs.clear()
    for each in inputs:
        assert torch.equal(fast(each), slow(each))
    assert len(runs) == len(inputs)  # those of the one that records nothing


def test_a_decision_that_nobody_recorded(runs):
    torch.manual_seed(0)
    x = clips(1)
    dynamic = dynamic_from(Video(), x)
    undecided_gates(dynamic)
    fast, slow = both(dynamic, x)
    for _ in range(3):
        fast(x)
    runs.clear()
    others = [clips(1) * 5 for _ in range(6)]
    assert all(torch.equal(fast(each), slow(each)) for each in others)
    assert len(runs) > len(others)  # some were met for the first time


def test_thresholds_that_move(runs):
    torch.manual_seed(0)
    x = clips(1)
    dynamic = dynamic_from(Video(), x)
    fast, slow = both(dynamic, x)
    for budget in (0.9, 0.7, 0.9):
        redconvert.set_budget(fast, budget, [x])
        assert_alike(fast, slow, [x, clips(1)])
    runs.clear()
    fast(x)
    assert not runs


def test_who_never_decides_alike_is_left_alone(monkeypatch):
    monkeypatch.setattr(replay, "BRANCHES", 2)
    monkeypatch.setattr(replay, "PATIENCE", 3)
    torch.manual_seed(0)
    x = clips(1)
    dynamic = dynamic_from(Video(), x, search_space=3)
    undecided_gates(dynamic)
    fast, slow = both(dynamic, x)
    for _ in range(30):
        each = clips(1) * 6
        assert torch.equal(fast(each), slow(each))
    (tape,) = fast.replays._tapes.values()
    assert "decide differently" in tape.problem and len(fast.replays) == 0


def test_baked_gates_are_played_without_asking(runs):
    torch.manual_seed(0)
    x = clips(1)
    dynamic = dynamic_from(Video(), x)
    undecided_gates(dynamic)
    fast, slow = both(dynamic, x, bake=[x])
    assert_alike(fast, slow, [x])
    for other in (dynamic.stem[0], dynamic.last):
        before = len(fast.replays)
        fast.bake({other: redconvert.layers.Decision(1, 0)})
        slow.bake({other: redconvert.layers.Decision(1, 0)})
        assert before and not len(fast.replays)
        assert_alike(fast, slow, [x])


# -- who looks on ------------------------------------------------------------------------------------------


def test_observers_and_hooks_miss_nothing(runs):
    torch.manual_seed(0)
    x = clips(1)
    dynamic = dynamic_from(Video(), x)
    fast = redconvert.deploy(dynamic, x)
    for _ in range(3):
        fast(x)
    runs.clear()
    seen = []
    with redconvert.layers.observed(fast.network, lambda layer, seen_now: seen.append(layer)):
        fast(x)
    hook = fast.stand_in(dynamic.last).register_forward_hook(lambda *_: seen.append("hook"))
    fast(x)
    hook.remove()
    every = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("every"))
    fast(x)
    every.remove()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        fast(x)
    assert len(runs) == 4 and "hook" in seen and "every" in seen and len(seen) > 8 and counter.get_total_flops() > 0
    fast(x)
    assert len(runs) == 4


def test_other_settings_are_other_recordings():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 30, 30)
    fast, slow = both(dynamic_from(Image(), x), x)
    assert_alike(fast, slow, [x])
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(fast, slow, [x])
    with torch.inference_mode():
        assert_alike(fast, slow, [x])
    with torch.backends.mkldnn.flags(enabled=False):
        assert_alike(fast, slow, [x])
    assert_alike(fast, slow, [x])


def test_as_little_is_held_as_without():
    """Of a pass: the most bytes that live at once, as PyTorch's allocator counts them."""
    torch.manual_seed(0)
    x = clips(1, 8, 40)
    fast, slow = both(dynamic_from(Video(), x, absorb=True), x)
    with redconvert.forced(fast, channel=1):
        for _ in range(3):
            fast(x), slow(x)
        peaks = [_peak(partial(each, x), nullcontext) for each in (fast, slow)]
    assert 0 < peaks[0] <= peaks[1] * 1.01


# -- what is not recorded ----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A convolution and something that no recording may hold."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.last, self.what = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 4, 1), what
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        y = self.conv(x)
        return self.last(self.what(self, x, y)).mean((2, 3))


ODD = {
    "noise": lambda self, x, y: F.dropout(y, 0.5, training=True),
    "a mask": lambda self, x, y: y + y[y > 0].sum(),
    "a value": lambda self, x, y: y * y.mean().item(),
    "a list": lambda self, x, y: y * torch.as_tensor(y.mean((1, 2, 3)).tolist())[:, None, None, None],
    "its input": lambda self, x, y: y + x.mul_(0.5).mean(),
    "its state": lambda self, x, y: y + torch.Tensor.add_(self.count, y.mean()),
}


@pytest.mark.parametrize("what", ODD)
def test_what_no_recording_may_hold(what):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)
    network = Odd(ODD[what]).eval()
    dynamic = redconvert.convert(network, redconvert.ConvertConfig(min_saving=0.0), example_inputs=x)
    fast, slow = both(dynamic, x.clone(), check=False)
    for _ in range(6):
        x, found = torch.randn(1, 3, 12, 12), []
        for each in (fast, slow):
            torch.manual_seed(7)
            dynamic.count.zero_()
            found.append(each(x.clone()))
        assert torch.equal(*found)
    assert fast.source == "layers" or len(fast.replays) == 0  # in layers nothing is ever recorded


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)

    def forward(self, a, b, scale=1.0):
        return {"sum": self.conv(a) * scale + self.conv(b), "first": (a, scale)}


def test_several_inputs_and_results():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 3, 12, 12)
    b = b.clone()
    dynamic = redconvert.convert(
        TwoInputs().eval(), redconvert.ConvertConfig(min_saving=0.0), example_inputs=(a.clone(), b)
    )
    fast, slow = both(dynamic, (a.clone(), b))
    for scale in (1.0, 2.0):
        for _ in range(4):
            a, b = torch.randn(1, 3, 12, 12), torch.randn(1, 3, 12, 12)
            found, wanted = fast(a, b, scale=scale), slow(a, b, scale=scale)
            assert torch.equal(found["sum"], wanted["sum"]) and torch.equal(found["first"][0], a)
            assert found["first"][1] == scale
    played = len(fast.replays)
    assert played == 2  # a number is as good as a tensor's shape
    for _ in range(4):  # one memory for both
        assert torch.equal(fast(a, a)["sum"], slow(a, a)["sum"])
    assert len(fast.replays) == played


def test_a_pass_that_fails_leaves_nothing_behind():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 30, 30)
    fast, slow = both(dynamic_from(Image(), x), x)
    for _ in range(3):
        with pytest.raises(Exception):  # noqa: B017 - whatever PyTorch says of four channels
            fast(torch.randn(1, 4, 30, 30))
    assert_alike(fast, slow, [x])


def test_a_tape_keeps_no_tensors_of_its_passes():
    torch.manual_seed(0)
    x = clips(1, 8, 40)
    fast = redconvert.deploy(dynamic_from(Video(), x), x)
    for _ in range(3):
        fast(x)
    before = held()
    for _ in range(3):
        fast(clips(1, 8, 40))
    assert held() <= before
    assert isinstance(next(iter(fast.replays._tapes.values())), Tape)


def held():
    gc.collect()
    return sum(
        each.numel() for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.layout == torch.strided
    )
