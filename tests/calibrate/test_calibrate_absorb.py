"""Weights that absorb channels: least squares on patches, and what it does to a network."""

import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import redconvert
from redconvert import RedconvertError
from redconvert.calibrate.absorb import AbsorbedMoments, _patches
from redconvert.layers import Decision, DynamicConv, dynamic_layers


def network(dims=2, source=8, reader=6, **options):
    """Two convolutions with a norm and ReLU between; the second absorbs what the first leaves out."""
    torch.manual_seed(0)
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    model = nn.Sequential(conv(3, source, 3, padding=1), norm(source), nn.ReLU(), conv(source, reader, 3, **options))
    model[1].running_mean.normal_(std=0.1)
    return nn.Sequential(model, nn.Flatten(), nn.LazyLinear(4)).eval()


def converted(model, x, **config):
    model(x)
    settings = {"absorb": True, "temporal": False, "min_saving": 0, **config}
    rules = [("0.3", {"channel": True, "shares": (0.5,)})]
    return redconvert.convert(model, redconvert.ConvertConfig(rules=rules, **settings), example_inputs=x)


def pair(model):
    layers = dynamic_layers(model)
    return layers["0.0"], layers["0.3"]


@settings(max_examples=30, deadline=None)
@given(
    dims=st.sampled_from([2, 3]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    count=st.integers(1, 200),
)
def test_patches_are_what_the_convolution_reads(dims, kernel, stride, padding, dilation, count):
    """The weight times the patches is the convolution at those positions."""
    conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(3, 4, kernel, stride, padding, dilation).double()
    x = torch.randn(2, 3, *(5, 6, 7)[:dims], dtype=torch.float64)
    with torch.no_grad():
        y = conv(x)
        layer = copy.deepcopy(conv)
        layer = redconvert.convert(nn.Sequential(layer), redconvert.ConvertConfig(rules=[("0", {})], temporal=False))[0]
        patches, positions = _patches(layer, x, y, count, torch.Generator().manual_seed(0))
        found = torch.einsum("ok,nkp->nop", conv.weight.flatten(1), patches) + conv.bias[:, None]
    assert len(positions) == min(count, y[0, 0].numel()) == len(set(positions.tolist()))
    torch.testing.assert_close(found, y.flatten(2)[:, :, positions])


def test_channels_that_repeat_cost_nothing():
    """Half of the channels are multiples of the others: without them the answers are the same."""
    x = torch.randn(16, 3, 6, 6)
    model = network(padding=0)
    model(x)
    with torch.no_grad():
        for part in (model[0][0].weight, model[0][0].bias):
            part[4:] = 2 * part[:4]
        norm = model[0][1]
        norm.running_mean[4:], norm.running_var[4:] = 2 * norm.running_mean[:4], 4 * norm.running_var[:4] - 3 * norm.eps
        norm.weight[4:] = 3 * norm.weight[:4]
        norm.bias[4:] = 3 * norm.bias[:4]
        wanted = model(x)
    dynamic = converted(model, x)
    source, _ = pair(dynamic)
    found = redconvert.calibrate(dynamic, [x], match=False)
    assert found.layers[0].channel_explained[0] > 1 - 1e-3  # the ridge takes its share
    with torch.no_grad(), redconvert.forced(dynamic, channel=[1] * 16):
        source.forced = ([1] * 16, 0)
        pair(dynamic)[1].forced = (0, 0)
        error = (dynamic(x) - wanted).square().mean() / wanted.var()
    assert error < 1e-4


@pytest.mark.parametrize("dims", [2, 3])
def test_patches_do_better_than_positions(dims):
    """The regression on patches explains more of the dense result than channels rebuilt position by position."""
    x = torch.randn(32, 3, *(4, 8, 8)[3 - dims :])
    model = network(dims, padding=1)
    dynamic = converted(model, x)
    source, reader = pair(dynamic)
    with torch.no_grad():
        wanted = model[0](x)

    def error():
        with torch.no_grad():
            source.forced, reader.forced = (1, 0), (0, 0)
            found = (dynamic[0](x) - wanted).square().mean() / wanted.var()
            del source.forced, reader.forced
        return float(found)

    at_birth = error()
    redconvert.calibrate(dynamic, [x], match=False)
    start = error()
    redconvert.calibrate(dynamic, [x])
    patched = error()
    assert start < 0.8 * at_birth
    assert patched < 0.9 * start


def test_least_squares_reach_the_optimum():
    """Without a ridge, the solution is that of `torch.linalg.lstsq` on all patches."""
    x = torch.randn(64, 3, 7, 7)
    model = network(padding=1)
    dynamic = converted(model, x)
    source, reader = pair(dynamic)
    with torch.no_grad():
        read = dynamic[0][:3](x)
        dense = dynamic[0](x)
    moments = AbsorbedMoments(reader, ridge=0.0)
    kept = reader.reads_from.kept(1)
    source.hands_to.source = None
    decisions = [Decision(0, 0, False, 1)] * 64
    for start in (0, 32):  # in two batches
        part = slice(start, start + 32)
        moments.mend(torch.cat([read[part]] * 2), torch.cat([dense[part]] * 2), decisions[part])
    moments.apply()
    rows = nn.functional.unfold(read[:, kept], 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()
    best = torch.linalg.lstsq(rows, dense.flatten(2).transpose(1, 2).flatten(0, 1).double()).solution.T
    weight, bias = reader.cheap_in.filter(1, reader.weight, reader.bias, kept)
    torch.testing.assert_close(weight.flatten(1).double(), best[:, :-1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(bias.double(), best[:, -1], atol=1e-4, rtol=1e-3)
    assert source.hands_to is reader.reads_from


@pytest.mark.parametrize("dims", [2, 3])
def test_sums_of_smaller_candidates_are_part_of_the_largest_ones(dims):
    """Of the dense network one matrix is kept: what each candidate sees of it is what it would have summed itself."""
    x = torch.randn(6, 3, 4, 4, 4)[(..., *(0,) * (3 - dims))]
    dynamic = converted(network(dims, padding=1), x, search_space=3)
    source, reader = pair(dynamic)
    read = torch.randn(6, 8, *x.shape[2:])
    with torch.no_grad():
        wanted = nn.functional.conv2d if dims == 2 else nn.functional.conv3d
        y = wanted(read, reader.weight, reader.bias, padding=1)
    shared, own = AbsorbedMoments(reader, 1e-3, dense=True), AbsorbedMoments(reader, 1e-3)
    for part in (slice(0, 3), slice(3, 6)):
        shared.add_dense(read[part], y[part])
    assert len(shared.stored) == 1 and len(own.stored) == len(shared.sums) == 2
    for index, kept in enumerate(source.cheap_c.channels[1:], start=1):
        size = 1 + kept * 3**dims
        direct = own._products(index, read, y)
        assert shared.sums[index].shape == direct.shape == (2, 6 + size, size)
        torch.testing.assert_close(shared.sums[index].sum(0), direct.sum(0), atol=1e-3, rtol=1e-5)
        assert float(shared.sums[index][:, 6, 0].sum()) == y[:, 0].numel()


def test_the_strength_is_the_best_of_all():
    """The search from the strongest ridge on stops where trying every one would find the least error."""
    module = sys.modules["redconvert.calibrate.regress"]
    for seed, noise in ((0, 0.0), (1, 0.3), (2, 3.0), (3, 30.0)):
        torch.manual_seed(seed)
        dynamic = converted(network(source=24, padding=1), torch.randn(2, 3, 6, 6))
        _, reader = pair(dynamic)
        moments = AbsorbedMoments(reader, 1e-3, dense=True)
        read = torch.randn(12, 24, 6, 6)
        with torch.no_grad():
            y = nn.functional.conv2d(read, reader.weight, reader.bias, padding=1)
        moments.add_dense(read, y + noise * torch.randn_like(y))
        folds, start = moments.sums[1].float(), moments.start[1].float()
        errors = {torch.inf: sum(module._error(fold, start) for fold in folds)}
        for times in module.STRENGTHS:
            each = [module.ridge_towards(start, fold, 1e-3 * times) for fold in folds]
            errors[1e-3 * times] = module._error(folds[0], each[1]) + module._error(folds[1], each[0])
        assert module.best_strength(moments.sums[1], moments.start[1], 1e-3) == min(errors, key=errors.get)


def test_open_gates_stay_exact():
    x = torch.randn(8, 3, 6, 6)
    model = network()
    dynamic = converted(model, x)
    redconvert.calibrate(dynamic, [x])
    assert torch.equal(dynamic(x), model(x))
    assert not torch.equal(dynamic_layers(dynamic)["0.0"].cheap_c.order, torch.arange(8))


def test_gates_decide_which_weights_are_solved():
    """decisions="gates": only the candidate that the source takes is touched."""
    x = torch.randn(32, 3, 6, 6)
    dynamic = converted(network(), x, search_space=3)
    redconvert.calibrate(dynamic, [x])
    source, reader = pair(dynamic)
    before = [weight.clone() for weight in reader.cheap_in.weights]
    source.gate.threshold.copy_(torch.tensor([50.0, -50.0, 50.0]))
    redconvert.calibrate(dynamic, [2 * x], decisions="gates")
    assert not torch.equal(reader.cheap_in.weights[0], before[0])
    assert torch.equal(reader.cheap_in.weights[1], before[1])


def test_errors_leave_the_weights():
    x = torch.randn(8, 3, 6, 6)
    dynamic = converted(network(), x)
    before = copy.deepcopy(dynamic.state_dict())
    with pytest.raises(RedconvertError, match="NaN or infinite"):
        redconvert.calibrate(dynamic, [x, x * float("nan")])
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())


def test_large_regressions_stay_with_the_start(monkeypatch):
    """Above LARGEST predictors the normal equations are not kept."""
    monkeypatch.setattr(sys.modules["redconvert.calibrate.absorb"], "LARGEST", 10)
    x = torch.randn(8, 3, 6, 6)
    dynamic = converted(network(), x)
    source, reader = pair(dynamic)
    assert AbsorbedMoments(reader, 1e-3).sums == {}
    redconvert.calibrate(dynamic, [x], match=False)
    start = reader.cheap_in.weights[0].clone()
    redconvert.calibrate(dynamic, [x])
    assert torch.equal(reader.cheap_in.weights[0], start)
    assert isinstance(source, DynamicConv)
    assert start.abs().sum() > 0


def test_few_samples_do_no_harm(monkeypatch):
    """With more predictors than samples the least ridge fits noise; the one that the other half likes does not."""
    few, others = torch.randn(4, 3, 6, 6), torch.randn(256, 3, 6, 6)
    model = network(source=24, padding=1)
    model(few)
    with torch.no_grad():
        wanted = model[0](others)

    def error(match):
        dynamic = converted(model, few)
        redconvert.calibrate(dynamic, [few], match=match)
        source, reader = pair(dynamic)
        source.forced, reader.forced = (1, 0), (0, 0)
        with torch.no_grad():
            return float((dynamic[0](others) - wanted).square().mean() / wanted.var())

    start, chosen = error(match=False), error(match=True)
    module = sys.modules["redconvert.calibrate.absorb"]
    monkeypatch.setattr(module, "best_strength", lambda sums, start, least: least)
    assert chosen < 1.02 * start
    assert error(match=True) > 1.2 * start
