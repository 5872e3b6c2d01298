"""Mixtures of filters: the least error that so few can make, the dense moments behind them, and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import redconvert
from redconvert import ConvertConfig, RedconvertError
from redconvert.calibrate.mixtures import MixtureMoments
from redconvert.layers import Decision, dynamic_layers
from redconvert.layers.cheap import Pointwise, Principal

CHANNELS = 12


def covariance(seed: int, rank: int = CHANNELS) -> torch.Tensor:
    factor = torch.randn(CHANNELS, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / rank


def whole(op: Principal) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operation makes of all channels, ``P y + b``, written out."""
    P = torch.cat([op.mix, op.weight @ op.mix]).detach()
    return P, torch.cat([op.shift, op.weight @ op.shift + op.bias]).detach()


def error(P: torch.Tensor, S: torch.Tensor, metric: torch.Tensor) -> float:
    rest = torch.eye(CHANNELS, dtype=S.dtype) - P
    return float((metric @ rest @ S @ rest.T).trace())


@pytest.mark.parametrize("kept", [1, 5, 11])
@pytest.mark.parametrize("seed", range(3))
def test_no_map_of_that_rank_errs_less(kept, seed):
    """The error is the sum of the smallest eigenvalues, below that of any other map, and of any chosen channels."""
    S, metric = covariance(seed), covariance(seed + 10)
    means = torch.linspace(-2, 3, CHANNELS, dtype=torch.float64)
    op = Principal(kept, CHANNELS - kept).double()
    left = op.fit_components(S, metric, means)
    P, b = whole(op)
    torch.testing.assert_close(P @ means + b, means)
    root = torch.linalg.cholesky(metric)
    values = torch.linalg.eigvalsh(root.T @ S @ root)
    least = float(values[: CHANNELS - kept].sum())
    assert torch.linalg.matrix_rank(P) == kept and error(P, S, metric) == pytest.approx(least, rel=1e-6)
    rest = torch.eye(CHANNELS, dtype=S.dtype) - P
    torch.testing.assert_close(left, (rest @ S @ rest.T).diagonal())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = P + 0.05 * P @ torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64)
        assert error(other, S, metric) > least
    chosen = torch.cat([torch.eye(kept, dtype=S.dtype), S[kept:, :kept] @ torch.linalg.inv(S[:kept, :kept])])
    assert error(chosen @ torch.eye(kept, CHANNELS, dtype=S.dtype), S, metric) > least


def test_channels_that_repeat_each_other():
    """Of fewer dimensions than mixtures nothing is lost, however dependent the rows are."""
    S = covariance(0, rank=3)
    op = Principal(6, 6).double()
    left = op.fit_components(S, torch.ones(CHANNELS, dtype=torch.float64), torch.zeros(CHANNELS, dtype=torch.float64))
    assert left.max() < 1e-9 * S.diagonal().max() and op.weight.abs().max() < 1e3
    dead = torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64)
    assert op.fit_components(dead, dead, torch.zeros(CHANNELS, dtype=torch.float64)).max() == 0
    assert all(torch.isfinite(each).all() for each in op.state_dict().values())


def test_rescaled_by_hand():
    torch.manual_seed(0)
    op = Principal(5, 7).double()
    for value in op.state_dict().values():
        value.normal_()
    P, b = whole(op)
    scale, shift = torch.rand(12, dtype=torch.float64) + 0.5, torch.randn(12, dtype=torch.float64)
    op.rescale(scale, shift)
    found = whole(op)
    torch.testing.assert_close(found[0], scale[:, None] * P)
    torch.testing.assert_close(found[1], scale * b + shift)


def test_project_filters_and_adjoint_agree():
    torch.manual_seed(0)
    op, conv = Principal(5, 7).double(), nn.Conv2d(3, 12, 3).double()
    op.mix.normal_()
    op.shift.normal_()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y, small = conv(x), op.filters(conv.weight, conv.bias)
    found = nn.functional.conv2d(x, *small)
    torch.testing.assert_close(found, op.project(y))
    g = torch.randn_like(found)
    linear = op.project(y) - op.project(torch.zeros_like(y))
    torch.testing.assert_close((linear * g).sum(), (y * op.spread(g)).sum())
    weight, shift = op.filters(conv.weight, None)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, shift), op.project(y - conv.bias[:, None, None]))


# -- networks ------------------------------------------------------------------------------------------


def network(dims: int = 2) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    body: list[nn.Module] = []
    for c_in, c_out in ((3, 16), (16, 16), (16, 24)):
        body += [conv(c_in, c_out, 3, padding=1), norm(c_out), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.AdaptiveAvgPool3d(1), nn.Flatten())
    x = torch.randn(16, 3, 9, 9) if dims == 2 else torch.randn(6, 3, 4, 9, 9)
    model.train()(x)
    return model.eval(), x


def converted(dims: int = 2, **config) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    model, x = network(dims)
    config = ConvertConfig(rules=[("*", {})], **{"cheap": "principal", "temporal": False, **config})
    dynamic = redconvert.convert(model, config, example_inputs=x)
    redconvert.calibrate(dynamic, [x[::2], x[1::2]])
    return dynamic, model, x


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("shares", [None, (0.75, 0.5, 0.25)])
def test_better_than_channels_at_the_same_cost(dims, shares):
    found = {}
    for cheap in ("principal", "pointwise"):
        dynamic, model, x = converted(dims, cheap=cheap, shares=shares)
        last = len(next(iter(dynamic_layers(dynamic).values())).candidates.channels) - 1
        with torch.no_grad():
            assert torch.equal(dynamic(x), model(x))
            with redconvert.forced(dynamic, channel=last):
                apart = (dynamic(x) - model(x)).square().mean()
                report = redconvert.report(dynamic, x, time=False)
        found[cheap] = float(apart), report.executed_macs
    assert found["principal"][1] == found["pointwise"][1]
    assert found["principal"][0] < 0.9 * found["pointwise"][0]


def test_birth_is_a_choice_of_channels():
    """Before calibration it is pointwise, and grouped convolutions stay with what they had."""
    model, x = network()
    twins = [
        redconvert.convert(model, ConvertConfig(rules=[("*", {})], cheap=cheap), example_inputs=x)
        for cheap in ("principal", "pointwise")
    ]
    with torch.no_grad(), redconvert.forced(twins[0], channel=1), redconvert.forced(twins[1], channel=1):
        torch.testing.assert_close(twins[0](x), twins[1](x))
    grouped = redconvert.convert(
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        ConvertConfig(rules=[("*", {})], cheap="principal"),
        example_inputs=torch.randn(1, 4, 9, 9),
    )
    assert [type(layer.cheap_c.op(1)) is Principal for layer in dynamic_layers(grouped).values()] == [False, True]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("absorb", [False, True])
def test_deployed_frozen_saved_and_budgeted(dims, absorb, same_everywhere):
    dynamic, model, x = converted(dims, shares=(0.75, 0.5), absorb=absorb)
    kinds = [type(layer.cheap_c.op(1)) is Principal for layer in dynamic_layers(dynamic).values()]
    assert kinds == ([False, False, True] if absorb else [True] * 3)
    redconvert.set_budget(dynamic, 0.6, [x])
    redconvert.calibrate(dynamic, [x], decisions="gates")
    same_everywhere(dynamic, model, x, [(1, 0), (2, 0)])
    assert type(redconvert.revert(copy.deepcopy(dynamic))[0]) is type(model[0])


@pytest.mark.parametrize("rests", [False, True])
def test_weights_learn_through_the_mixtures(rests):
    """Reduced for every sample, in both ways of training: the gradient of the filters by finite differences."""
    dynamic, _, x = converted()
    dynamic = dynamic.double()
    x, layers = x.double(), dynamic_layers(dynamic)
    assert all(
        part.dtype == torch.float64
        for layer in layers.values()
        for part in layer.cheap_c.buffers()
        if part.is_floating_point()
    )
    first = layers["0"]
    norms = [module for module in dynamic.modules() if isinstance(module, nn.BatchNorm2d)]

    def loss():
        with redconvert.forced(dynamic, channel=1):
            if not rests:
                return dynamic(x).square().sum()
            with redconvert.resting_gates(dynamic):
                return dynamic(x).square().sum()

    dynamic.train()
    for norm in norms:
        norm.eval()
    loss().backward()
    gradient = first.weight.grad.clone()
    step = torch.randn_like(first.weight)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            first.weight.add_(sign * 1e-6 * step)
            values.append(float(loss()))
            first.weight.sub_(sign * 1e-6 * step)
    assert float((gradient * step).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    assert all(op.mix.requires_grad is False for layer in layers.values() for op in layer.cheap_c.ops)


def test_refusals():
    with pytest.raises(RedconvertError, match=r"cheap='principal' needs gate='hard'"):
        ConvertConfig(cheap="principal", gate="soft")
    assert issubclass(Principal, Pointwise)


# -- behind layers that are reduced --------------------------------------------------------------------


def test_mixtures_make_up_for_changed_inputs():
    """``mix G`` with the least squares of the dense result on what all filters give of the changed input."""
    torch.manual_seed(0)
    dynamic, _, _ = converted()
    layer = dynamic_layers(dynamic)["3"].double()
    layer.cheap_c.set_order(torch.randperm(16))
    op = layer.cheap_c.op(1)
    mix, shift = op.mix.clone(), op.shift.clone()
    given = torch.randn(40, 16, 9, 9, dtype=torch.float64)
    changed = given + 0.3 * torch.randn_like(given) + 0.2 * given.roll(1, dims=1)
    moments = MixtureMoments(layer, 1e-9)
    with torch.no_grad():
        dense, found = (nn.Conv2d.forward(layer, each) for each in (given, changed))
        with redconvert.forced(layer, channel=1):
            reduced = layer(changed)
        both = torch.cat([given, changed]), torch.cat([dense, reduced])
        mended = moments.mend(*both, [Decision(1, 0)] * 40)
    assert torch.equal(mended[:40], dense)
    moments.apply()
    rows = [each.transpose(0, 1).flatten(1)[layer.cheap_c.order] for each in (found, dense)]
    predictors = torch.cat([torch.ones_like(rows[0][:1]), rows[0]])
    G = torch.linalg.lstsq(predictors.T, rows[1].T).solution.T
    torch.testing.assert_close(op.mix, mix @ G[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(op.shift, shift + mix @ G[:, 0], atol=1e-4, rtol=1e-4)
    with torch.no_grad(), redconvert.forced(layer, channel=1):
        assert (layer(changed) - dense).square().mean() < 0.95 * (reduced - dense).square().mean()


def test_unchanged_inputs_change_nothing():
    torch.manual_seed(0)
    dynamic, _, _ = converted()
    layer = dynamic_layers(dynamic)["3"]
    op, x = layer.cheap_c.op(1), torch.randn(20, 16, 9, 9)
    mix, moments = op.mix.clone(), MixtureMoments(layer, 1e-3)
    with torch.no_grad():
        out = layer(x)
    moments.mend(torch.cat([x, x]), torch.cat([out, out]), [Decision(1, 0)] * 20)
    moments.apply()
    torch.testing.assert_close(op.mix, mix, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("match", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_rounds_bring_the_last_layer_nearer(dims, match):
    """On inputs of the same kind; pooling, which averages errors away, is left out."""
    apart = {}
    for rounds in (0, 1):
        dynamic, model, x = converted(dims)
        others = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(1))
        redconvert.calibrate(dynamic, [x[::2], x[1::2]], rounds=rounds, match=match)
        with torch.no_grad(), redconvert.forced(dynamic, channel=1):
            apart[rounds] = float((dynamic[:-2](others) - model[:-2](others)).square().mean())
    assert apart[1] < 0.99 * apart[0]


def test_calibrating_again_starts_anew():
    """Corrections do not add up: soon the same decisions and batches leave the mixtures where they are."""
    dynamic, _, x = converted(shares=(0.5,))
    layers = list(dynamic_layers(dynamic).values())
    for layer in layers:
        layer.gate.thresholds("channel").copy_(torch.tensor([50.0, -50.0]))
    mixtures = []
    for _ in range(5):
        redconvert.calibrate(dynamic, [x], decisions="gates")
        mixtures.append([layer.cheap_c.op(1).mix.clone() for layer in layers])
    for first, before, last in zip(mixtures[0], mixtures[-2], mixtures[-1], strict=True):
        torch.testing.assert_close(last, before, atol=1e-4, rtol=1e-4)
        assert (last - first).norm() < 0.2 * first.norm()  # another strength of the ridge


def test_files_without_components():
    """Before there were any, mixtures were the components."""
    op, other = Principal(3, 2), Principal(3, 2)
    op.mix.normal_()
    op.shift.normal_()
    state = {key: value for key, value in op.state_dict().items() if key not in ("components", "offset")}
    other.load_state_dict(state)
    assert torch.equal(other.components, op.mix) and torch.equal(other.offset, op.shift)


def test_what_gates_do_not_take_stays_as_it_is():
    dynamic, _, x = converted(shares=(0.75, 0.5))
    layers = list(dynamic_layers(dynamic).values())
    before = [[op.mix.clone() for op in layer.cheap_c.ops] for layer in layers]
    for layer in layers:
        layer.gate.thresholds("channel").copy_(torch.tensor([50.0, -50.0, -50.0]))
    redconvert.calibrate(dynamic, [x], decisions="gates")
    for layer, (_, other) in zip(layers, before, strict=True):
        assert torch.equal(layer.cheap_c.op(2).mix, other)
    assert not torch.equal(layers[1].cheap_c.op(1).mix, before[1][0])
