"""Candidates that read mixtures of the input channels: against plain convolutions of the input as they see it."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import anything
from torch import nn
from torch.nn import functional as F

import redconvert
from redconvert import ConvertConfig, DynamicConv2d, DynamicConv3d, LayerConfig, RedconvertError
from redconvert.layers import Decision, InputMixtures
from redconvert.layers.gate import candidate_weights
from redconvert.layers.macs import layer_macs
from redconvert.layers.mixtures import InputMixture, mixture_counts

CONV = {2: (nn.Conv2d, DynamicConv2d, F.conv2d), 3: (nn.Conv3d, DynamicConv3d, F.conv3d)}


def layer_of(dims=3, c=(9, 7), kernel=3, stride=1, padding=1, num_frames=None, **config):
    """A layer in float64 with any mixtures, orders and cheap operations, whose gate decides."""
    options = {"search_space": 3, "cheap": "principal", "mix_inputs": True, "gate_hidden": 3, "rebuild_weight": 0}
    extra = {"num_frames": num_frames} if num_frames else {}
    layer = CONV[dims][1](
        *c, kernel, stride=stride, padding=padding, config=LayerConfig(**{**options, **config}), **extra
    ).double()
    anything(layer)
    with torch.no_grad():
        nn.init.normal_(layer.gate.fc2.weight)
        layer.gate.beta.zero_()
    return layer.eval()


def seen(layer, x, i):
    """``A (x_k + B x_d)`` channel by channel."""
    mixed, kept = layer.mixed_in, layer.mixed_in.channels[i]
    if i == 0:
        return x
    op = mixed.ops[i - 1]
    order = op.order.tolist()
    read = [x[:, order[r]] + sum(op.weight[r, d] * x[:, order[kept + d]] for d in range(len(order) - kept))
            for r in range(kept)]  # fmt: skip
    out = torch.stack([sum(op.lift[c, r] * read[r] for r in range(kept)) for c in range(len(order))], dim=1)
    return out[:, [order.index(c) for c in range(len(order))]]


def candidate(layer, x, i):
    """The full convolution of what candidate i sees, and what it makes of that, of all frames."""
    convolve = F.conv3d if isinstance(layer, nn.Conv3d) else F.conv2d
    y = convolve(seen(layer, x, i), layer.weight, layer.bias, layer.stride, layer.padding)
    return layer.cheap_c.single(layer.cheap_c.taken(i, y), i) if i else y


def reference(layer, x, i, j=0):
    y = candidate(layer, x, i)
    if not j or layer.cheap_t is None:
        return y
    z = layer.as_clips(y, layer.frames_per_sample)
    return layer.from_clips(layer.cheap_t.single(z[:, :, :: layer.candidates.strides[j]], j, z.shape[2]))


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from([2, 3]),
    c=st.tuples(st.integers(8, 13), st.integers(2, 9)),
    kernel=st.sampled_from([2, 3]),
    stride=st.sampled_from([1, 2]),
    batch=st.integers(1, 3),
    frames=st.integers(2, 5),
    cheap=st.sampled_from(["principal", "pointwise", "scale"]),
    folded=st.booleans(),
    seed=st.integers(0, 5),
)
def test_equals_the_dense_convolution_of_what_it_sees(dims, c, kernel, stride, batch, frames, cheap, folded, seed):
    torch.manual_seed(seed)
    num_frames = frames if dims == 2 and folded else None
    layer = layer_of(dims, c, kernel, stride, num_frames=num_frames, cheap=cheap)
    x = torch.randn(batch * (num_frames or 1), c[0], *([frames, 5, 6] if dims == 3 else [5, 6]), dtype=torch.float64)
    sizes = len(layer.candidates.channels), len(layer.candidates.strides)
    decisions = [Decision((n + 1) % sizes[0], n % sizes[1]) for n in range(batch)]
    layer.forced = ([d.channel for d in decisions], [d.temporal for d in decisions])
    parts = x.split(num_frames or 1)
    wanted = torch.cat(
        [reference(layer, part, d.channel, d.temporal) for part, d in zip(parts, decisions, strict=True)]
    )
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.train()(x), wanted)  # masked: the same values
    with redconvert.resting_gates(layer):
        torch.testing.assert_close(layer(x), wanted)
    layer.eval().capturable = True  # static shapes
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("temporal", [False, True])
def test_gradients_are_those_of_the_soft_sum(dims, temporal):
    torch.manual_seed(0)
    layer = layer_of(dims, num_frames=4 if dims == 2 and temporal else None, temporal=temporal)
    x = torch.randn(*((8 if temporal else 3, 9, 5, 5) if dims == 2 else (3, 9, 4, 5, 5)), dtype=torch.float64)
    x.requires_grad_()
    with torch.no_grad():
        layer.gate.fc2.weight.mul_(0.02)
        layer.gate.beta.copy_(torch.tensor([0.7, 0.5, 0.9, 0.4, 0.6, 0.9][: len(layer.gate.beta)]))
    layer.train().gate.norm.eval()
    out = layer(x)
    gate = candidate_weights(layer.gate(layer._per_clip(x.mean((-2, -1))))[0])
    assert (gate > 0).all()
    frames = layer.frames_per_sample
    rows = gate.repeat_interleave(frames, dim=0)
    shape = (-1, *(1,) * (out.dim() - 1))
    soft = sum(rows[:, i].view(shape) * candidate(layer, x, i) for i in range(3))
    if temporal:
        # Straight-through: Phi_t, in value, reads what was taken, the full candidate.
        soft = soft + (candidate(layer, x, 0) - soft).detach()
        times = candidate_weights(layer.gate(layer._per_clip(x.mean((-2, -1))))[1])
        z = layer.as_clips(soft, frames)
        soft = layer.from_clips(layer.cheap_t.mix(z, times, z.shape[2]))
    direction = torch.randn_like(out)
    named = [("x", x), *layer.named_parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    found, wanted = (torch.autograd.grad(y, [value for _, value in named], direction, **options) for y in (out, soft))
    for (name, _), g, e in zip(named, found, wanted, strict=True):
        torch.testing.assert_close(g, e, msg=name)
    moved = {name for (name, _), g in zip(named, found, strict=True) if g.abs().max() > 0}
    assert {"x", "weight", "gate.beta", "mixed_in.ops.0.weight", "mixed_in.ops.1.weight"} <= moved
    layer.capturable = True  # the same from static shapes
    static = torch.autograd.grad(layer(x), [value for _, value in named], direction, **options)
    for (name, _), g, e in zip(named, static, wanted, strict=True):
        torch.testing.assert_close(g, e, msg=name)


def test_gradcheck_of_reduced_candidates():
    torch.manual_seed(0)
    layer = layer_of(2, (8, 4), 2, padding=0).train()
    layer.gate.norm.eval()
    x = torch.randn(3, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    layer.forced = ([0, 1, 2], 0)
    for rests in (False, True):
        layer.learns = not rests
        parameters = [p for name, p in layer.named_parameters() if not name.startswith("gate")]
        assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *parameters))


def test_macs_by_hand():
    """C_in 16 -> 12 or 8 mixtures, C_out 8 -> 6 or 4 channels, stride 2: 10x10 positions read, 5x5 written."""
    layer = layer_of(3, (16, 8), (1, 3, 3), (1, 2, 2), (0, 1, 1), shares=(0.75, 0.5))
    macs = layer_macs(layer, (1, 16, 4, 10, 10), (1, 8, 4, 5, 5))
    assert macs.dense == 8 * 16 * 9 * 4 * 25
    assert [row[0] for row in macs.conv] == [macs.dense, 6 * 12 * 9 * 100, 4 * 8 * 9 * 100]
    mixing, rebuilding = (12 * 4 * 400, 8 * 8 * 400), (6 * 2 * 100, 4 * 4 * 100)
    assert [row[0] for row in macs.cheap] == [0, mixing[0] + rebuilding[0], mixing[1] + rebuilding[1]]
    # Half of the frames: a 3D convolution reads mixtures of all of them.
    assert [row[1] for row in macs.conv] == [value // 2 for value in (row[0] for row in macs.conv)]
    rebuilt = 2 * 2 * 8 * 25
    assert macs.cheap[1][1] == mixing[0] + rebuilding[0] // 2 + rebuilt
    folded = layer_of(2, (16, 8), 3, num_frames=4, shares=(0.75, 0.5))
    macs = layer_macs(folded, (4, 16, 10, 10), (4, 8, 10, 10))
    assert macs.cheap[1][1] == 2 * 100 * (12 * 4 + 6 * 2 + 2 * 8)  # here frames are left out before


def test_who_reads_mixtures():
    counts = {
        "plain": (nn.Conv2d(16, 8, 3), (16, 8, 4)),
        "few channels": (nn.Conv2d(3, 8, 3), None),
        "1x1": (nn.Conv2d(16, 8, 1), None),
        "grouped": (nn.Conv2d(16, 8, 3, groups=2), None),
        "in time": (nn.Conv3d(16, 8, (3, 1, 1)), (16, 8, 4)),
    }
    for name, (conv, wanted) in counts.items():
        assert mixture_counts(conv, (8, 4, 2), 1) == wanted, name
    assert mixture_counts(nn.Conv2d(16, 8, 3), (8, 4, 2), 8) == (16, 8, 8)
    assert mixture_counts(nn.Conv2d(16, 8, 3), (8, 4), 16) is None
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Sigmoid())
    config = ConvertConfig(rules=[("*", {})], mix_inputs=True, absorb=True)
    paired = redconvert.convert(model, config, example_inputs=torch.randn(1, 16, 9, 9))
    assert paired[0].hands_to is not None and paired[0].mixed_in is None and paired[2].mixed_in is None
    with pytest.raises(RedconvertError, match="mix_inputs=True needs gate='hard'"):
        ConvertConfig(mix_inputs=True, gate="soft")
    with pytest.raises(RedconvertError, match="mix_inputs must be True or False"):
        ConvertConfig(mix_inputs=1)


@pytest.mark.parametrize("kept", [1, 5, 11])
def test_no_mixtures_of_that_rank_err_less(kept):
    """The error that is left is the sum of the smallest eigenvalues, whatever order the channels are in."""
    generator = torch.Generator().manual_seed(kept)
    factors = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
    S, metric = factors @ factors.transpose(1, 2)
    op = InputMixture(kept, 12 - kept).double()
    left = op.fit(S, metric)
    P = (op.lift @ torch.cat([torch.eye(kept, dtype=S.dtype), op.weight], dim=1))[op.order.argsort()]
    P = P[:, op.order.argsort()]
    assert op.weight.abs().max() < 3  # none is made of the small difference of large ones
    rest = torch.eye(12, dtype=S.dtype) - P
    root = torch.linalg.cholesky(metric)
    least = torch.linalg.eigvalsh(root.T @ S @ root)[: 12 - kept].sum()
    torch.testing.assert_close((metric @ rest @ S @ rest.T).trace(), least)
    torch.testing.assert_close(left, least / (metric * S).sum())
    dead = torch.zeros_like(S)
    assert torch.isfinite(op.fit(dead, dead)) and all(torch.isfinite(v).all() for v in op.state_dict().values())


# -- networks ------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, dims=3) -> None:
        super().__init__()
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if dims == 3 else (nn.Conv2d, nn.BatchNorm2d)
        self.a, self.n = conv(3, 16, 3, padding=1), norm(16)
        self.b, self.m = conv(16, 24, 3, padding=1, stride=2, bias=False), norm(24)
        self.c, self.f = conv(24, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.m(self.b(F.relu(self.n(self.a(x))))))
        return self.f(F.relu(self.c(x)).flatten(2).mean(2))


def networks(dims=3, **config):
    torch.manual_seed(0)
    model = Net(dims)
    x = torch.randn(6, 3, *([6, 12, 12] if dims == 3 else [12, 12]))
    model.train()(x)
    settings_ = {"mix_inputs": True, "cheap": "principal", "shares": (0.75, 0.5), "rules": [("*", {})]}
    dynamic = redconvert.convert(model.eval(), ConvertConfig(**{**settings_, **config}), example_inputs=x)
    return dynamic, model, x


def test_equal_at_birth_and_reverted():
    dynamic, model, x = networks()
    assert [layer.mixed_in is not None for layer in (dynamic.a, dynamic.b, dynamic.c)] == [False, True, True]
    assert isinstance(dynamic.b.mixed_in, InputMixtures) and dynamic.b.mixed_in.channels == (16, 12, 8)
    for twin in (dynamic, copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
        for training in (False, True):
            assert torch.equal(twin.train(training)(x), copy.deepcopy(model).train(training)(x))
    reverted = redconvert.revert(copy.deepcopy(dynamic))
    assert list(reverted.state_dict()) == list(model.state_dict()) and type(reverted.b) is nn.Conv3d


@pytest.mark.parametrize("config", [{}, {"absorb": True}])
def test_weights_of_the_original_start_it_again(config):
    """And those of the converted network load into the original."""
    dynamic, model, x = networks(2, temporal=False, **config)
    birth = copy.deepcopy(dynamic.state_dict())
    redconvert.calibrate(dynamic, [x])
    part = dynamic.c.cheap_in if config else dynamic.b.mixed_in
    assert any(value.any() for value in part.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        redconvert.load_weights(dynamic, model.state_dict())
        assert torch.equal(dynamic(x), model(x)) and not any(value.any() for value in part.parameters())
        prefix = "c.cheap_in." if config else "b.mixed_in."
        kept = {key: value for key, value in dynamic.state_dict().items() if key.startswith(prefix)}
        assert kept and all(torch.equal(value, birth[key]) for key, value in kept.items())
        other = Net(2).eval()
        redconvert.load_weights(other, dynamic.state_dict())
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("importance", ["answers", "norms"])
@pytest.mark.parametrize("dims", [2, 3])
def test_calibrated_deployed_frozen_and_saved(dims, importance, same_everywhere):
    dynamic, model, x = networks(dims, temporal=dims == 3)
    table = redconvert.calibrate(dynamic, [x[::2], x[1::2]], importance=importance)
    assert [len(layer.input_explained) for layer in table.layers] == [0, 2, 2]
    shown = [" ".join(f"{share:6.1%}" for share in layer.input_explained) for layer in table.layers]
    lines = str(table).splitlines()
    assert lines[0].endswith("of inputs") and all(
        line.endswith(share) for line, share in zip(lines[1:4], shown, strict=True)
    )
    assert all(1 > high > low > 0 for high, low in (layer.input_explained for layer in table.layers[1:]))
    redconvert.set_budget(dynamic, 0.6, [x])
    redconvert.calibrate(dynamic, [x], decisions="gates")
    policies = itertools.product((1, 2), (0, 1) if dims == 3 else (0,))
    for frozen, wanted in same_everywhere(dynamic, model, x, policies):
        exported = torch.export.export(frozen, (x,)).module()
        torch.testing.assert_close(exported(x), wanted, atol=1e-5, rtol=1e-4)


def test_mixtures_of_dependent_channels_lose_nothing():
    """An input of few dimensions comes back whole, whatever the filters are."""
    dynamic, model, x = networks(2, temporal=False, cheap="pointwise")
    with torch.no_grad():  # 16 channels, all of them mixtures of 3, and no ReLU between
        basis = torch.randn(16, 3).abs()
        x = torch.randn(8, 3, 12, 12).abs()
        for net in (dynamic, model):
            net.a.weight.zero_()
            net.a.weight[:, :, 1, 1] = basis
            net.a.bias.zero_()
            net.n.reset_parameters()
        redconvert.calibrate(dynamic, [x])
        h = F.relu(model.n(model.a(x)))
        apart = dynamic.b.mixed_in.seen(2, h) - h
    assert apart.abs().max() < 1e-4 * h.abs().max()


def test_better_than_outputs_alone_at_the_same_cost():
    """Filters that share what they look for: of two ways to the same MACs the one that uses both is nearer."""
    found = {}
    for name, config in {
        "both": {"shares": (0.625,), "mix_inputs": True},  # 0.39 + mixing
        "outputs": {"shares": (0.4,), "mix_inputs": False},
    }.items():
        dynamic, model, x = networks(2, temporal=False, rules=[("a", None), ("*", {})], **config)
        with torch.no_grad():
            for net in (dynamic, model):
                generator = torch.Generator().manual_seed(1)
                for conv in (net.b, net.c):
                    count = conv.in_channels
                    mixing = torch.randn(count, count, generator=generator) / torch.arange(1, count + 1)
                    conv.weight.copy_(torch.einsum("oihw,ji->ojhw", conv.weight, mixing))
            redconvert.calibrate(dynamic, [x])
            with redconvert.forced(dynamic, channel=1):
                apart = (dynamic(x) - model(x)).square().mean()
                found[name] = float(apart), redconvert.report(dynamic, x, time=False).executed_macs
    assert found["both"][1] == pytest.approx(found["outputs"][1], rel=0.05)
    assert found["both"][0] < found["outputs"][0]


def test_trains_under_autocast_and_gates_learn():
    dynamic, _, x = networks(2, temporal=False)
    dynamic.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dynamic(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in dynamic.parameters())
    with redconvert.forced(dynamic, channel=1):
        dynamic.zero_grad()
        dynamic(x).square().mean().backward()
    assert dynamic.b.mixed_in.ops[0].weight.grad.abs().max() > 0
    assert dynamic.b.mixed_in.ops[1].weight.grad.abs().max() == 0
