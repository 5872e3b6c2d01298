"""A convolution that hands over what it computed, and its reader: against plain convolutions of the channels left."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import redconvert
from redconvert import ConvertConfig, EfficiencyLoss, RedconvertError
from redconvert.layers.absorb import _Taken
from redconvert.layers.gate import candidate_weights
from redconvert.layers.macs import executed_macs


class Pair(nn.Module):
    """conv, norm, activation, conv, and a mean: 2D or 3D."""

    def __init__(self, dims=3, c=(3, 7, 6), kernel=3, stride=1, padding=1, bias=True) -> None:
        super().__init__()
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if dims == 3 else (nn.Conv2d, nn.BatchNorm2d)
        self.a = conv(c[0], c[1], kernel, stride=stride, padding=padding, bias=bias)
        self.norm, self.act = norm(c[1]), nn.ReLU(inplace=True)
        self.b = conv(c[1], c[2], kernel, padding=padding, bias=bias)
        self.checkpointed = False

    def block(self, x):
        return self.b(self.act(self.norm(self.a(x))))

    def forward(self, x):
        y = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return y.flatten(2).mean(2) if not torch.jit.is_tracing() else y


def make(x, dims=3, norm_eval=True, order=True, **options):
    """A converted pair in float64 with any corrections, cheap operations and order; and the plain one."""
    config = {key: options.pop(key) for key in ("search_space", "shares", "temporal") if key in options}
    plain = Pair(dims, **options).double()
    nn.init.normal_(plain.norm.weight)
    nn.init.normal_(plain.norm.bias)
    plain.norm.running_mean.normal_()
    rules = {"rules": (("a", {}), ("b", {}))}
    settings_ = ConvertConfig(absorb=True, min_saving=0, gate_hidden=4, rebuild_weight=0, **config, **rules)
    model = redconvert.convert(plain, settings_, example_inputs=x)
    assert model.a.hands_to is model.b.reads_from is not None
    with torch.no_grad():
        for part in (model.b.cheap_in, model.b.cheap_c, model.b.cheap_t, model.a.cheap_t):
            for parameter in part.parameters() if part is not None else ():
                parameter.normal_()
        if order:
            model.a.cheap_c.set_order(torch.randperm(model.a.out_channels))
    return model.eval(), plain.eval()


def frames(layer, y, j):
    """Every R-th frame, and those between from both sides."""
    if layer.cheap_t is None or j == 0:
        return y
    stride, out = layer.candidates.strides[j], []
    weight, bias = layer.cheap_t.weights[j - 1], layer.cheap_t.biases[j - 1]
    for t in range(y.shape[2]):
        left = t // stride * stride
        if t == left:
            out.append(y[:, :, t])
            continue
        right = left + stride if left + stride < y.shape[2] else left
        d = t - left - 1
        shape = (1, -1, 1, 1)
        out.append(
            weight[d, 0].view(shape) * y[:, :, left] + weight[d, 1].view(shape) * y[:, :, right] + bias[d].view(shape)
        )
    return torch.stack(out, 2)


def read(layer, h, s):
    """The reader's full convolution of the channels that candidate s hands over."""
    conv = F.conv3d if isinstance(layer, nn.Conv3d) else F.conv2d
    weight, bias = layer.weight, layer.bias
    if s:
        kept = layer.reads_from.rebuild.order[: layer.reads_from.rebuild.channels[s]]
        weight = torch.zeros_like(layer.weight)
        weight[:, kept] = layer.weight[:, kept] + layer.cheap_in.weights[s - 1]
        bias = layer.cheap_in.biases[s - 1] + (0 if layer.bias is None else layer.bias)
    return conv(h, weight, bias, layer.stride, layer.padding)


def own(layer, y, i):
    """The reader's own channel candidate."""
    if layer.cheap_c is None or i == 0:
        return y
    order, kept = layer.cheap_c.order, layer.candidates.channels[i]
    out = y.clone()
    out[:, order[kept:]] = layer.cheap_c.op(i)(y[:, order[:kept]])
    return out


def reference(model, x, source, channel, source_t=0, temporal=0):
    h = F.relu(model.norm(frames(model.a, nn_conv(model.a, x), source_t)))
    if source:
        absent = model.a.cheap_c.order[model.a.candidates.channels[source] :]
        h = h.index_fill(1, absent, 123.0)  # what is there must not matter
    y = frames(model.b, own(model.b, read(model.b, h, source), channel), temporal)
    return y.flatten(2).mean(2)


def nn_conv(layer, x):
    return (F.conv3d if isinstance(layer, nn.Conv3d) else F.conv2d)(
        x, layer.weight, layer.bias, layer.stride, layer.padding
    )


def force(layer, channel, temporal=None):
    layer.forced = (channel, temporal)


def clips(n=3, t=4):
    return torch.randn(n, 3, t, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("dims", [2, 3])
def test_equal_at_birth(dims):
    x = torch.randn(2, 3, *[6] * dims)
    plain = Pair(dims)
    config = ConvertConfig(absorb=True, min_saving=0, rules=(("b", {}),))
    model = redconvert.convert(plain, config, example_inputs=x)
    added = set(model.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) < set(model.state_dict())
    assert {"b.cheap_in.weights.0", "b.cheap_in.biases.0"} <= added
    assert all(key.split(".")[1] in ("gate", "cheap_c", "cheap_t", "cheap_in") for key in added)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.a.hands_to is twin.b.reads_from is not None
        assert twin.a.hands_to.rebuild is twin.a.cheap_c
        for training in (False, True):
            dense = copy.deepcopy(plain).train(training)
            assert torch.equal(twin.train(training)(x), dense(x))
            assert torch.equal(twin.norm.running_mean, dense.norm.running_mean)
    reverted = redconvert.revert(copy.deepcopy(model))
    assert type(reverted.a) is type(plain.a)
    assert list(reverted.state_dict()) == list(plain.state_dict())
    assert not {"hands_to", "reads_from", "cheap_in"} & (set(vars(reverted.a)) | set(vars(reverted.b)))


@pytest.mark.parametrize("space", [2, 3])
def test_every_path(space):
    x = clips()
    model, _ = make(x, search_space=space)
    for s, sj, i, j in itertools.product(range(space), repeat=4):
        force(model.a, s, sj)
        force(model.b, i, j)
        assert torch.allclose(model(x), reference(model, x, s, i, sj, j), atol=1e-10), (s, sj, i, j)


MIXED = ([0, 1, 2, 1], [2, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0])


def mixed_case():
    x = clips(4)
    model, _ = make(x, search_space=3)
    force(model.a, MIXED[0], MIXED[2])
    force(model.b, MIXED[1], MIXED[3])
    rows = zip(*MIXED, strict=True)
    wanted = [reference(model, x[n : n + 1], s, i, sj, j) for n, (s, i, sj, j) in enumerate(rows)]
    return model, x, torch.cat(wanted).detach()


def test_mixed_batches():
    model, x, wanted = mixed_case()
    assert torch.allclose(model(x), wanted, atol=1e-10)
    model.train().norm.eval()
    assert torch.allclose(model(x), wanted, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_mixed_batches_compiled(training):
    model, x, wanted = mixed_case()
    model.train(training).norm.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), wanted, atol=1e-10)


def test_exported_with_gates_that_decide():
    x = clips(4)
    model, _ = open_by_gates(x)
    taken = []
    with redconvert.observed(model, lambda layer, seen: taken.append(seen.decisions)):
        eager = model(x)
    assert len({d.channel for d in taken[0]}) > 1  # the batch is mixed
    exported = torch.export.export(model, (x,), strict=False).module()
    assert torch.allclose(exported(x), eager, atol=1e-10)
    wanted = [
        reference(model, x[n : n + 1], a.channel, b.channel, a.temporal, b.temporal)
        for n, (a, b) in enumerate(zip(*taken, strict=True))
    ]
    assert torch.allclose(eager, torch.cat(wanted), atol=1e-10)


def open_by_gates(x, **options):
    model, plain = make(x, **options)
    with torch.no_grad():
        for layer in (model.a, model.b):
            nn.init.normal_(layer.gate.fc2.weight, std=3)
            layer.gate.beta.zero_()
    return model, plain


def test_the_gate_reads_zeros():
    x = clips(3)
    model, _ = make(x, search_space=3)
    seen = []
    model.b.gate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    force(model.a, [0, 1, 2])
    h = F.relu(model.norm(nn_conv(model.a, x))).mean((-2, -1))
    for n, s in enumerate([0, 1, 2]):
        h[n, model.a.cheap_c.order[model.a.candidates.channels[s] :]] = 0
    for training in (False, True):
        model.train(training).norm.eval()
        model(x)
        assert torch.allclose(seen.pop(), h, atol=1e-12)


def test_gradients_are_those_of_the_soft_sum():
    x = clips(3).requires_grad_()
    model, _ = open_by_gates(x.detach(), search_space=3, temporal=False)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.gate.fc2.weight.mul_(0.02)
            layer.gate.beta.copy_(torch.tensor([0.4, 0.6, 0.9]))
    model.train()
    model.norm.eval()
    for layer in (model.a, model.b):
        layer.gate.norm.eval()
    out = model(x)
    w = candidate_weights(model.a.gate(x.mean((-2, -1)))[0])
    assert (w > 0).all()  # all open: the full one is taken, and all have a gradient
    h = F.relu(model.norm(nn_conv(model.a, x)))
    y = sum(w[:, s].view(-1, 1, 1, 1, 1) * read(model.b, h, s) for s in range(3))
    v = candidate_weights(model.b.gate(h.mean((-2, -1)))[0])
    # Straight-through: the reader's own gate sees the value that was taken, y_0, and W, x, D the soft sum.
    taken = y + (read(model.b, h, 0) - y).detach()
    soft = sum(v[:, i].view(-1, 1, 1, 1, 1) * own(model.b, taken, i) for i in range(3))
    soft = soft.flatten(2).mean(2)
    direction = torch.randn_like(out)
    named = [("x", x), *model.named_parameters()]
    inputs = [value for _, value in named]
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(out, inputs, direction, **options)
    wanted = torch.autograd.grad(soft, inputs, direction, **options)
    for (name, _), g, e in zip(named, found, wanted, strict=True):
        assert torch.allclose(g, e, atol=1e-9), name
    moved = {name for (name, _), g in zip(named, found, strict=True) if g.abs().max() > 0}
    assert {"b.cheap_in.weights.0", "b.cheap_in.biases.1", "a.gate.beta", "b.gate.beta", "a.weight"} <= moved


def test_gradcheck_of_taken():
    """With all samples at weight (1, 0), (0, 1) the hard value is the soft one."""
    weights = torch.eye(2, dtype=torch.float64).requires_grad_()
    results = [torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    out = _Taken.apply(weights, [0, 1], 2, *results)
    assert torch.equal(out, torch.cat([results[0][:2], results[1][2:]]))
    assert torch.autograd.gradcheck(lambda *r: _Taken.apply(weights, [0, 1], 2, *r), results)
    g = torch.randn_like(out)
    soft = sum(weights.repeat_interleave(2, 0)[:, k].view(-1, 1, 1) * results[k] for k in range(2))
    assert torch.allclose(torch.autograd.grad(out, weights, g)[0], torch.autograd.grad(soft, weights, g)[0])


def test_checkpointed_blocks():
    x = clips(3)
    model, _ = mixed_case()[:2]
    force(model.a, [0, 1, 2])
    force(model.b, [1, 0, 2])
    model.train()
    model.norm.eval()
    grads = []
    for model.checkpointed in (False, True):
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_disabled_and_alone():
    x = clips(2)
    model, plain = make(x)
    force(model.a, 1)
    with redconvert.disabled(model):
        assert torch.equal(model(x), plain(x))
    fresh, _ = make(x)
    with pytest.raises(RedconvertError, match=r"'b' reads what 'a' computes"):
        fresh.b(torch.randn(2, 7, 4, 5, 5, dtype=torch.float64))


def test_macs_and_the_efficiency_loss_by_hand():
    x = clips(2)
    model, _ = make(x, temporal=False)
    positions, gates = 4 * 25, (3 * 100 + 12 * 4 + 4 * 2, 7 * 100 + 28 * 4 + 4 * 2)
    cheap = positions * model.b.cheap_c.op(1).macs_per_position
    kept = (7, 4), (6, 3)

    def macs(s, i):
        a = gates[0] + kept[0][s] * 27 * 3 * positions
        return a, gates[1] + kept[1][i] * 27 * kept[0][s] * positions + (cheap if i else 0)

    loss = EfficiencyLoss(model, target=0.5)
    dense = (7 * 27 * 3 + 6 * 27 * 7) * positions
    dense += loss.static_macs
    for s, i in itertools.product(range(2), repeat=2):
        force(model.a, s)
        force(model.b, i)
        seen = []
        with redconvert.observed(model, lambda layer, o, seen=seen: seen.append(executed_macs(layer, o))):
            model(x)
        assert seen == [[value] * 2 for value in macs(s, i)]
        with torch.no_grad():
            model(x)
            cost = loss.cost(2)
        wanted = (sum(macs(s, i)) + loss.static_macs) / dense
        assert cost.tolist() == pytest.approx([wanted] * 2, rel=1e-6)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.forced = (None, None)
            layer.gate.beta.copy_(torch.tensor([0.4, 0.9]))
    model.train()
    for layer in (model.a, model.b):
        layer.gate.norm.eval()
    seen = []
    with redconvert.observed(model, lambda layer, o: seen.append(o.weights.channel)):
        model(x)
    beta = model.a.gate.beta
    found = torch.autograd.grad(loss.cost(2).sum(), beta, retain_graph=True)[0]
    w, v = seen
    soft = sum(w[:, s] * v[:, i] * sum(macs(s, i)) for s in range(2) for i in range(2)) / dense
    wanted = torch.autograd.grad(soft.sum(), beta)[0]
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert found.abs().max() > 0


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    dims=st.sampled_from([2, 3]),
    c=st.tuples(st.just(3), st.integers(2, 9), st.integers(2, 9)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    space=st.integers(2, 3),
    shares=st.sampled_from([None, (0.75, 0.3)]),
    data=st.data(),
)
def test_any_pair(dims, c, kernel, stride, padding, bias, batch, space, shares, data):
    x = torch.randn(batch, 3, *[9] * dims, dtype=torch.float64)
    options = {"c": c, "kernel": kernel, "stride": stride, "padding": padding, "bias": bias}
    model, _ = make(x, dims=dims, search_space=space, shares=shares, **options)
    counts = [len(layer.candidates.channels) for layer in (model.a, model.b)]
    picks = [[data.draw(st.integers(0, n - 1)) for _ in range(batch)] for n in counts]
    force(model.a, picks[0], 0)
    force(model.b, picks[1], 0)
    wanted = torch.cat([reference(model, x[n : n + 1], s, i) for n, (s, i) in enumerate(zip(*picks, strict=True))])
    assert torch.allclose(model(x), wanted, atol=1e-9)
    model.train()
    model.norm.eval()
    assert torch.allclose(model(x), wanted, atol=1e-9)


def test_a_teacher_between_forward_and_recomputation():
    """A dense pass of the same network in between does not change what a checkpointed reader computes again."""
    x = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
    model, _ = make(x)
    for layer in (model.a, model.b):
        layer.training = True

    def gradients(checkpointed):
        model.zero_grad()
        with redconvert.forced(model, channel=[0, 1], temporal=0):
            read = torch.relu(model.norm(model.a(x)))
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(model.b, read, use_reentrant=False)
                with torch.no_grad(), redconvert.disabled(model):
                    model(x)
            else:
                y = model.b(read)
            y.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)
