"""Matched mean and variance of rebuilt channels: against the dense network, layer behind layer."""

import itertools
import sys

import pytest
import torch
from torch import nn

import redconvert
from redconvert.calibrate.match import HIGHEST_SCALE
from redconvert.layers import dynamic_layers
from redconvert.layers.cheap import Scale


def network(width: int = 16, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    widths, layers = [3, width, width, width], []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def batches() -> list[torch.Tensor]:
    return list(torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(1)).split(8))


def moments(model: nn.Module, **decision: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance of every dynamic layer's channels over all batches."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in dynamic_layers(model)}
    handles = [
        layer.register_forward_hook(lambda module, _, out, name=name: found[name].append(out))
        for name, layer in dynamic_layers(model).items()
    ]
    with torch.no_grad(), redconvert.forced(model, **decision):
        for x in batches():
            model(x)
    for handle in handles:
        handle.remove()
    stacked = {name: torch.cat(outs) for name, outs in found.items()}
    return {name: (y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)) for name, y in stacked.items()}


def redundant(seed: int = 0) -> nn.Sequential:
    """The second half of each layer's filters nearly repeats the first: rebuilding explains most of it."""
    model = network(seed=seed)
    with torch.no_grad():
        for conv in model[::3]:
            conv.weight[8:] = conv.weight[:8].flip(0) + 0.3 * conv.weight[8:]
    return model


@pytest.mark.parametrize("cheap", ["pointwise", "principal", "scale", "depthwise"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_means_and_variances_are_the_dense_ones(cheap, rounds):
    config = redconvert.ConvertConfig(cheap=cheap, search_space=2)
    dynamic = redconvert.convert(redundant(), config, example_inputs=batches()[0])
    redconvert.calibrate(dynamic, [torch.cat(batches())], rounds=rounds)
    dense, reduced = moments(dynamic, channel=0), moments(dynamic, channel=1)
    for name, layer in dynamic_layers(dynamic).items():
        dropped = layer.cheap_c.dropped(1)
        wanted, found = ((mean[dropped], variance[dropped]) for mean, variance in (dense[name], reduced[name]))
        torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(found[1], wanted[1], atol=0, rtol=1e-3)


def test_what_nothing_explains_is_not_blown_up():
    config = redconvert.ConvertConfig(cheap="scale", search_space=2)  # of independent filters
    dynamic = redconvert.convert(network(), config, example_inputs=batches()[0])
    redconvert.calibrate(dynamic, [torch.cat(batches())], rounds=0, match=False)
    plain = moments(dynamic, channel=1)
    redconvert.calibrate(dynamic, [torch.cat(batches())], rounds=0)
    dense, reduced = moments(dynamic, channel=0), moments(dynamic, channel=1)
    dropped = dynamic_layers(dynamic)["0"].cheap_c.dropped(1)
    wanted = torch.minimum(HIGHEST_SCALE**2 * plain["0"][1], dense["0"][1])[dropped]
    torch.testing.assert_close(reduced["0"][1][dropped], wanted, atol=1e-6, rtol=1e-3)
    assert (wanted < 0.99 * dense["0"][1][dropped]).any()


def test_several_batches_come_close_to_one():
    """Of the same channels, which random moves of the answers would choose anew for each."""
    config = redconvert.ConvertConfig(cheap="pointwise")
    results = []
    for given in (batches(), [torch.cat(batches())]):
        dynamic = redconvert.convert(network(), config, example_inputs=batches()[0])
        redconvert.calibrate(dynamic, given, rounds=0, importance="norms")
        results.append(moments(dynamic, channel=1))
    for (_, one), (_, other) in zip(results[0].values(), results[1].values(), strict=True):
        assert torch.allclose(one, other, rtol=0.1)


@pytest.mark.parametrize("absorb", [False, True])
def test_candidates_together_are_mended_as_one_by_one(monkeypatch, absorb):
    """One dense stream beside three reduced ones, beside two and one, and beside each alone: the same numbers."""
    config = redconvert.ConvertConfig(cheap="pointwise", shares=(0.75, 0.5, 0.25), absorb=absorb)
    found = []
    for streams in (4, 2, 1):
        monkeypatch.setattr(sys.modules["redconvert.calibrate.run"], "STREAMS", streams)
        dynamic = redconvert.convert(redundant(), config, example_inputs=batches()[0])
        seen = []
        handle = dynamic.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
        redconvert.calibrate(dynamic, batches())
        handle.remove()
        found.append((dynamic.state_dict(), sum(seen)))
    state, samples = found[0]
    assert any("cheap_c.ops.2" in key for key in state)
    for other, _ in found[1:]:
        for key, value in state.items():
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-5)
    # Beside the first pass, and one more for what is absorbed: four streams of 24, then five, then six.
    assert [count for _, count in found] == [samples, samples + 24, samples + 48]


def test_without_matching_variances_shrink():
    dynamic = redconvert.convert(network(), redconvert.ConvertConfig(cheap="pointwise"), example_inputs=batches()[0])
    redconvert.calibrate(dynamic, batches(), rounds=0, match=False)
    dense, reduced = moments(dynamic, channel=0), moments(dynamic, channel=1)
    for name, layer in dynamic_layers(dynamic).items():
        dropped = layer.cheap_c.dropped(1)
        assert (reduced[name][1][dropped] / dense[name][1][dropped]).mean() < 0.9


def test_scale_is_bounded_and_open_gates_stay_exact():
    model = network()
    dynamic = redconvert.convert(model, redconvert.ConvertConfig(cheap="pointwise"), example_inputs=batches()[0])
    redconvert.calibrate(dynamic, batches(), rounds=0, match=False)
    before = {name: layer.cheap_c.op(1).weight.clone() for name, layer in dynamic_layers(dynamic).items()}
    redconvert.calibrate(dynamic, batches(), rounds=0)
    first = next(iter(before))
    ratio = dynamic_layers(dynamic)[first].cheap_c.op(1).weight / before[first]
    assert ratio.max() <= HIGHEST_SCALE + 1e-5 and ratio.min() >= 1 - 1e-3
    assert torch.equal(dynamic(batches()[0]), model(batches()[0]))


def test_gates_decide_what_is_mended():
    """Samples that stay whole take no part, and a candidate that nobody takes is left alone."""
    config = redconvert.ConvertConfig(cheap="pointwise", search_space=3)
    dynamic = redconvert.convert(network(), config, example_inputs=batches()[0])
    redconvert.calibrate(dynamic, batches(), rounds=0, match=False)
    for layer in dynamic_layers(dynamic).values():
        layer.gate.threshold.copy_(torch.tensor([9.0, -9.0, 9.0]))  # always candidate 1
    before = {key: value.clone() for key, value in dynamic.state_dict().items()}
    result = redconvert.calibrate(dynamic, batches(), rounds=1, decisions="gates")
    changed = {key for key, value in dynamic.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{i}.cheap_c.ops.0.{part}" for i in (0, 3, 6) for part in ("weight", "bias")}
    for layer in result.layers:
        assert layer.channel_explained[0] is not None and layer.channel_explained[1] is None
    assert "-" in str(result) and result.samples == 24


def test_refusals():
    dynamic = redconvert.convert(network(), example_inputs=batches()[0])
    with pytest.raises(redconvert.RedconvertError, match=r"'candidates' or 'gates', not 'all'"):
        redconvert.calibrate(dynamic, batches(), decisions="all")
    with pytest.raises(redconvert.RedconvertError, match=r"read only once: pass a list .* match=False"):
        redconvert.calibrate(dynamic, iter(batches()), rounds=0)


def test_a_constant_channel_rebuilds_nothing():
    """Rounding leaves a covariance where there is no variance; divided by it, the weights were infinite."""
    op = Scale(kept=2, dropped=1)
    within = torch.diag(torch.tensor([0.0, 4.0], dtype=torch.float64))
    across = torch.tensor([[1e-17, 2.0]], dtype=torch.float64)
    means = torch.tensor([7.0, 3.0], dtype=torch.float64)
    coefficients = op.fit(within, across, means, torch.tensor([1.0], dtype=torch.float64), ridge=1e-3)
    assert coefficients.tolist() == [[0.0, 0.5]]
    assert (op.source.item(), op.weight.item(), op.bias.item()) == (1, 0.5, 1 - 0.5 * 3)
