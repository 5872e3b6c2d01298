"""Depthwise convolutions between two that share channels, and those that read their means: numbers, gradients, MACs."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inverted_residual import Block, make, reference
from torch import nn

import redconvert
from redconvert import RedconvertError
from redconvert.layers import dynamic_layers, observed
from redconvert.layers.absorb import followers, pairs
from redconvert.layers.macs import executed_macs, layer_macs

SE = {"no": None, "mean": False, "pool": True}


def batch(dims, n=3, channels=4, size=6):
    return torch.randn(n, channels, *((4,) * (dims == 3)), size, size, dtype=torch.float64)


def block(x, squeezes=None, names=("a", "b", "c"), **options):
    config = {key: options.pop(key) for key in ("search_space", "shares", "temporal", "channel") if key in options}
    return make(x, Block(x.dim() - 2, squeezes=squeezes, **options).double(), names, temporal=False, **config)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("se", SE)
def test_ties(dims, se):
    """Who follows whom; also in copies; nothing is left after `revert`."""
    x = batch(dims)
    dynamic = block(x, SE[se])
    wanted = {"b": "a"} | ({} if se == "no" else {"se.fc1": "a"})
    for twin in (dynamic, copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
        layers = dynamic_layers(twin)
        assert pairs(layers) == {"a": "c"} and followers(layers) == wanted
        assert twin.b.carries is twin.a.hands_to is twin.c.reads_from is not None
    plain = Block(dims, squeezes=SE[se]).double()
    keys = set(plain.state_dict())
    assert all(key in keys or key.split(".")[-2] != "gate" for key in dynamic.state_dict() if key.startswith("se."))
    redconvert.revert(dynamic)
    assert set(dynamic.state_dict()) == keys
    assert not any(name in vars(dynamic.b) for name in ("carries", "carried", "aside", "gate"))


@given(
    dims=st.sampled_from([2, 3]),
    c=st.tuples(st.integers(1, 5), st.integers(2, 11), st.integers(2, 6)),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    squeezes=st.sampled_from([None, False, True]),
    bias=st.booleans(),
    swish=st.booleans(),
    n=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_as_plain_convolutions_of_the_channels_left(dims, c, kernel, stride, squeezes, bias, swish, n, seed):
    """Sample by sample, in a batch of decisions that differ; whatever stands in the place of the others."""
    torch.manual_seed(seed)
    x = batch(dims, n, c[0])
    dynamic = block(x, squeezes, c=c, kernel=kernel, stride=stride, bias=bias, swish=swish, search_space=3)
    assume(dynamic.a.hands_to is not None)  # some are too small to pay
    count = len(dynamic.a.candidates.channels)
    mixed = [i % count for i in range(n)]
    with torch.no_grad():
        for channel in (*range(count), mixed):
            each = mixed if isinstance(channel, list) else [channel] * n
            with redconvert.forced(dynamic, channel=0):
                dynamic.a.forced = (channel, None)
                found = dynamic(x)
            for sample, source in enumerate(each):
                wanted = reference(dynamic, x[sample : sample + 1], source)
                torch.testing.assert_close(found[sample : sample + 1], wanted)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("se", SE)
def test_training_gives_what_inference_gives(dims, se):
    """With gates that learn and with resting ones, norms in eval mode; compiled, too."""
    x = batch(dims)
    dynamic = block(x, SE[se])
    for channel in (0, 1, [0, 1, 1]):
        with redconvert.forced(dynamic, channel=channel):
            wanted = dynamic.eval()(x).detach()
            dynamic.train()
            dynamic.norm_a.eval(), dynamic.norm_b.eval()
            torch.testing.assert_close(dynamic(x), wanted)
            with redconvert.resting_gates(dynamic):
                torch.testing.assert_close(dynamic(x), wanted)
            if isinstance(channel, int):
                dynamic.eval()
                torch._dynamo.reset()
                compiled = torch.compile(dynamic, backend="eager", fullgraph=True)
                torch.testing.assert_close(compiled(x), wanted)


@pytest.mark.parametrize("rests", [False, True])
def test_norms_see_all_channels_in_training(rests):
    """A norm's statistics are those of the whole convolution, whatever is handed over."""
    x = batch(2)
    dynamic = block(x, True)
    plain = redconvert.revert(copy.deepcopy(dynamic)).train()
    plain(x)
    dynamic.train()
    with redconvert.forced(dynamic, channel=1), redconvert.resting_gates(dynamic) if rests else torch.enable_grad():
        dynamic(x)
    for name in ("norm_a", "norm_b"):
        for kind in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(getattr(dynamic, name), kind), getattr(getattr(plain, name), kind))


@pytest.mark.parametrize("se", SE)
@pytest.mark.parametrize("channel", [0, 1, [0, 1, 1]])
def test_gradients(se, channel):
    """While gates rest: of the input and all that is trained, by finite differences."""
    x = batch(2, channels=3, size=4)
    dynamic = block(x, SE[se], c=(3, 5, 3), kernel=3)
    dynamic.train()
    dynamic.norm_a.eval(), dynamic.norm_b.eval()
    trained = {name: p for name, p in dynamic.named_parameters() if "gate" not in name}

    def run(x, *values):
        with redconvert.forced(dynamic, channel=channel), redconvert.resting_gates(dynamic):
            return torch.func.functional_call(dynamic, dict(zip(trained, values, strict=True)), (x,))

    given_ = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in trained.values())]
    assert torch.autograd.gradcheck(run, given_)


def test_gates_learn_what_each_candidate_would_have_given():
    """The gradient of a source's weights is that of the soft sum over what its reader and its followers give."""
    x = batch(2)
    dynamic = block(x, True)
    dynamic.train()
    dynamic.norm_a.eval(), dynamic.norm_b.eval()
    dynamic.c.forced = (0, None)  # or what its gate reads would count, too
    seen = []
    with observed(dynamic, lambda layer, told: seen.append((layer, told))):
        out = dynamic(x)
        direction = torch.randn_like(out)
        (source,) = [told.weights.channel for layer, told in seen if layer is dynamic.a]
        (found,) = torch.autograd.grad(out, source, direction)
    assert found.abs().sum(0).gt(0).all()  # also of the candidate that nobody takes

    def moved(step):
        """Both candidates mixed, where the reader and the squeezing convolution read."""
        weights = torch.tensor([1.0, step], dtype=torch.float64)
        y = dynamic.norm_b(dynamic.b(torch.relu(dynamic.norm_a(dynamic.a.dense_class.forward(dynamic.a, x)))))
        s = y.mean((2, 3), keepdim=True)
        s = sum(w * dynamic.se.fc1.whole(s, i) for i, w in enumerate(weights))
        y = torch.relu(y * torch.sigmoid(dynamic.se.fc2(torch.relu(s))))
        return sum(w * dynamic.c.whole(y, i) for i, w in enumerate(weights))

    with torch.no_grad():
        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(found[:, 1], (slope * direction).flatten(1).sum(1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_macs_by_hand(dims):
    x = batch(dims, n=2, size=6)
    dynamic = block(x, True, c=(4, 8, 6), stride=2, shares=(0.5,))
    positions, taps = (3**2, 3**2) if dims == 2 else (2 * 3**2, 3**3)
    told = {}
    with redconvert.forced(dynamic, channel=0), observed(dynamic, lambda layer, seen: told.update({layer: seen})):
        dynamic.a.forced = ([0, 1], None)
        dynamic(x)
    assert executed_macs(dynamic.b, told[dynamic.b]) == [8 * taps * positions, 4 * taps * positions]  # no gate
    assert executed_macs(dynamic.se.fc1, told[dynamic.se.fc1]) == [8 * 4, 4 * 4]
    gate = layer_macs(dynamic.c, *told[dynamic.c][:2]).gate
    assert executed_macs(dynamic.c, told[dynamic.c]) == [8 * 6 * positions + gate, 4 * 6 * positions + gate]
    with redconvert.forced(dynamic, channel=0):
        dynamic.a.forced = ([0, 1], None)
        report = redconvert.report(dynamic, x, time=False)
    assert {row.name for row in report.layers} >= {"a", "b", "c", "se.fc1"}
    (row,) = [row for row in report.layers if row.name == "b"]
    assert row.channels == (8, 4) and row.decisions == {(0, 0): 1, (1, 0): 1}


def test_frames_of_the_carrier_are_its_own_choice():
    """It follows in channels, and decides about frames: each sample as if it were alone."""
    x = batch(3, n=4).repeat(1, 1, 2, 1, 1)
    dynamic = make(x, Block(3, squeezes=True).double())
    assert dynamic.b.candidates.strides == (1, 2) and dynamic.se.fc1.candidates.is_static
    with torch.no_grad():
        together = []
        for channel, temporal in itertools.product((0, 1), (0, 1)):
            with redconvert.forced(dynamic, channel=0, temporal=0):
                dynamic.a.forced, dynamic.b.forced = (channel, 0), (None, temporal)
                together.append(dynamic(x[:1]))
        with redconvert.forced(dynamic, channel=0, temporal=0):
            dynamic.a.forced, dynamic.b.forced = ([0, 0, 1, 1], 0), (None, [0, 1, 0, 1])
            found = dynamic(x[:1].expand(4, -1, -1, -1, -1))
    torch.testing.assert_close(found, torch.cat(together))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_follower_alone_says_who_is_missing():
    dynamic = block(batch(2))
    with pytest.raises(RedconvertError, match="'b' reads what 'a' computes"):
        dynamic.b(torch.randn(2, 9, 6, 6, dtype=torch.float64))


def test_two_followers_in_a_row():
    """Two depthwise convolutions, such as kx1 and 1xk."""

    class Two(Block):
        def __init__(self):
            super().__init__(c=(4, 8, 6))
            self.b = nn.Sequential(
                nn.Conv2d(8, 8, (3, 1), 1, (1, 0), groups=8), nn.Conv2d(8, 8, (1, 3), 1, (0, 1), groups=8)
            )

    x = batch(2)
    dynamic = make(x, Two().double(), ("a", "b.0", "b.1", "c"), temporal=False)
    assert followers(dynamic_layers(dynamic)) == {"b.0": "a", "b.1": "a"}
    kept = dynamic.a.cheap_c.order[:4]
    with redconvert.forced(dynamic, channel=0), torch.no_grad():
        dynamic.a.forced = (1, None)
        found = dynamic(x)
        y = torch.relu(dynamic.norm_a(dynamic.a.dense_class.forward(dynamic.a, x)))
        for each in dynamic.b:
            y = each.dense_class.forward(each, y)
        y = torch.relu(dynamic.norm_b(y))[:, kept]
        weight = dynamic.c.weight[:, kept] + dynamic.c.cheap_in.weights[0]
        torch.testing.assert_close(found, torch.nn.functional.conv2d(y, weight, dynamic.c.cheap_in.biases[0]))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_reader_that_decides_nothing(dims, tmp_path):
    """Too few channels to choose from, and it reads those that are there all the same: also saved, frozen, deployed."""
    x = batch(dims, channels=4)
    network = Block(dims, (4, 16, 6), squeezes=True).double().eval()
    dynamic = make(x, copy.deepcopy(network), ("a", "b"), temporal=False, align=8)
    assert dynamic.c.candidates.is_static and pairs(dynamic_layers(dynamic)) == {"a": "c"}
    assert followers(dynamic_layers(dynamic)) == {"b": "a", "se.fc1": "a"}
    redconvert.save_pretrained(dynamic, tmp_path)
    again = redconvert.from_pretrained(copy.deepcopy(network), tmp_path)
    fast = redconvert.deploy(copy.deepcopy(dynamic).float(), x.float())
    with torch.no_grad():
        for channel in (0, 1, [0, 1, 1]):
            each = channel if isinstance(channel, list) else [channel] * 3
            wanted = torch.cat([reference(dynamic, x[i : i + 1], source) for i, source in enumerate(each)])
            with redconvert.forced(dynamic, channel=channel), redconvert.forced(again, channel=channel):
                torch.testing.assert_close(dynamic(x), wanted)
                torch.testing.assert_close(again(x), wanted)
            with redconvert.forced(fast, channel=channel):
                torch.testing.assert_close(fast(x.float()), wanted.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(redconvert.freeze(dynamic, (1, 0))(x), torch.cat([reference(dynamic, x, 1)]))
    dynamic.train()
    dynamic.norm_a.eval(), dynamic.norm_b.eval()
    with redconvert.forced(dynamic, channel=1):
        torch.testing.assert_close(dynamic(x), reference(dynamic, x, 1))
