"""Inverted residual blocks, deployed and frozen: tensors that are smaller all along, and the same numbers."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from inverted_residual import Block, make
from torch import nn

import redconvert
from redconvert.deploy.unit import Unit
from redconvert.layers import DynamicConv, dynamic_layers, observed
from redconvert.layers.macs import layer_macs

pytestmark = pytest.mark.filterwarnings("ignore")
SE = {"no": None, "mean": False, "pool": True}


class Mobile(nn.Module):
    """A stem, two blocks, the second one with a shortcut; ``opaque`` to fx where it looks at values."""

    def __init__(self, dims, squeezes=None, opaque=False, **options):
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.stem = conv(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            [Block(dims, (8, 24, 12), stride=(1, 2, 2) if dims == 3 else 2, squeezes=squeezes, **options)]
        )
        self.blocks.append(Block(dims, (12, 27, 12), squeezes=squeezes, bias=True, **options))
        self.head, self.opaque = nn.Linear(12, 5), opaque

    def forward(self, x):
        if self.opaque and x.sum() > 1e9:
            return x
        x = self.blocks[0](torch.relu(self.stem(x)))
        x = x + self.blocks[1](x)
        return self.head(x.flatten(2).mean(2))


def network(dims, se="no", **options):
    torch.manual_seed(0)
    x = torch.randn((options.pop("samples", 4), 3, 10, 10) if dims == 2 else (3, 3, 6, 8, 8))
    names = [f"blocks.{i}.{name}" for i in range(2) for name in "abc"]
    config = {key: options.pop(key) for key in ("search_space", "num_frames") if key in options}
    return make(x, Mobile(dims, SE[se], **options), names, **config), x


def units(fast):
    found = [each for each in fast.modules() if isinstance(each, Unit) and each.decider is not None]
    return {each.layer.layer_name: each for each in found}


def decisions(x, dims, count=2):
    samples = len(x)
    mixed = [n % count for n in range(samples)]
    return itertools.product([*range(count), mixed], [0, 1, mixed[::-1]] if dims == 3 else [None])


def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("se", SE)
@pytest.mark.parametrize("options", [{}, {"swish": True}, {"opaque": True}, {"kernel": 5, "search_space": 3}])
def test_the_same_numbers(dims, se, options):
    """Under every decision, also one that differs from sample to sample; frozen where it does not."""
    dynamic, x = network(dims, se, **options)
    fast = redconvert.deploy(dynamic, x)
    assert fast.source == ("layers" if options.get("opaque") else "fx")
    handing = [unit for unit in units(fast).values() if unit.layer.hands_to is not None]
    assert {unit.hands_compact for unit in handing} == {not options.get("opaque")}
    results = []
    with torch.no_grad():
        for channel, temporal in decisions(x, dims, options.get("search_space", 2)):
            with redconvert.forced(dynamic, channel=channel, temporal=temporal):
                results.append(dynamic(x))
                assert error(fast(x), results[-1]) < 2e-5
            if isinstance(channel, int) and not isinstance(temporal, list):
                frozen = redconvert.freeze(dynamic, (channel, temporal or 0))
                assert not any(isinstance(each, DynamicConv) for each in frozen.modules())
                assert error(frozen(x), results[-1]) < 2e-5
    assert all(error(each, results[0]) > 1e-3 for each in results[1:])


@pytest.mark.parametrize("dims", [2, 3])
def test_all_tensors_between_are_smaller(dims, monkeypatch):
    """Of 24 and 27 channels 12 and 14 are computed, carried, squeezed, multiplied and read."""
    dynamic, x = network(dims, "pool")
    fast = redconvert.deploy(dynamic, x)
    seen = {}
    for name, unit in units(fast).items():
        unit.register_forward_hook(
            lambda unit, args, out, name=name: seen.update({name: (args[0].shape[1], out.shape[1])})
        )
    with redconvert.forced(dynamic, channel=1), torch.no_grad():
        fast(x[:1])
    half = {0: 12, 1: 14}
    for i in range(2):
        assert seen[f"blocks.{i}.b"] == (half[i], half[i]) and seen[f"blocks.{i}.se.fc1"][0] == half[i]
        assert seen[f"blocks.{i}.a"][1] == seen[f"blocks.{i}.c"][0] == half[i]


def let_gates_decide(dynamic):
    for layer in dynamic.modules():
        if isinstance(layer, DynamicConv) and not layer.candidates.is_static:
            nn.init.normal_(layer.gate.beta, 0, 0.05), nn.init.normal_(layer.gate.fc2.weight)


def test_gates_decide():
    dynamic, x = network(3, "mean")
    let_gates_decide(dynamic)
    fast = redconvert.deploy(dynamic, x)
    with torch.no_grad():
        outputs = [(fast(each), dynamic(each)) for each in (x, 2 * x, -x, x.flip(2))]
    assert all(error(*pair) < 2e-5 for pair in outputs)


@pytest.mark.parametrize("se", SE)
def test_frames_that_are_folded_into_the_batch(se):
    dynamic, x = network(2, se, num_frames=4, samples=8)
    fast = redconvert.deploy(dynamic, x)
    with torch.no_grad():
        for channel, temporal in itertools.product((0, 1, [0, 1]), (0, 1, [1, 0])):
            with redconvert.forced(dynamic, channel=channel, temporal=temporal):
                assert error(fast(x), dynamic(x)) < 2e-5
                if isinstance(channel, int) and isinstance(temporal, int):
                    assert error(redconvert.freeze(dynamic, (channel, temporal))(x), dynamic(x)) < 2e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_compiled_exported_and_trained(dims):
    """Gates decide in graphs of static shapes, too; finetuning with the efficiency loss goes towards its target."""
    dynamic, x = network(dims, "mean")
    let_gates_decide(dynamic)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = dynamic(x)
        assert error(torch.compile(dynamic, backend="eager", fullgraph=True)(x), wanted) < 1e-5
        assert error(torch.export.export(dynamic, (x,)).module()(x), wanted) < 1e-5
    history = redconvert.finetune(dynamic, [x] * 4, epochs=4, lr=1e-3, gate_lr=0.05, target=0.4, gate_every=1)
    assert history.epochs[-1]["cost"] < history.epochs[0]["cost"]


def test_one_that_is_disabled_gets_all_channels():
    dynamic, x = network(2, "pool")
    fast = redconvert.deploy(dynamic, x)
    dynamic.blocks[0].b.enabled = False
    with redconvert.forced(dynamic, channel=1), torch.no_grad():
        assert error(fast(x), dynamic(x)) < 2e-5
    with redconvert.disabled(dynamic), torch.no_grad():
        assert error(fast(x), dynamic(x)) < 2e-5


def test_a_hook_in_between_sees_all_channels():
    """The squeezing pool's hook, say: then nobody hands over a part."""
    dynamic, x = network(2, "pool")
    shapes = []
    dynamic.blocks[0].se.pool.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape[1]))
    fast = redconvert.deploy(dynamic, x)
    shapes.clear()
    with redconvert.forced(dynamic, channel=1), torch.no_grad():
        assert error(fast(x), dynamic(x)) < 2e-5
    assert shapes and set(shapes) == {24}


def test_one_that_is_no_unit_knows_its_channels():
    """A depthwise convolution with padding of its own runs as it is; observers are told the same weights."""
    from timm.layers import Conv2dSame

    class Same(Mobile):
        def __init__(self):
            super().__init__(2, True)
            self.blocks[0].b = Conv2dSame(24, 24, 3, 2, groups=24, bias=False)

    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 9)
    dynamic = make(x, Same(), [f"blocks.{i}.{name}" for i in range(2) for name in "abc"])
    fast = redconvert.deploy(dynamic, x)
    assert "blocks.0.b" not in units(fast) and not units(fast)["blocks.0.a"].hands_compact
    told = []

    def listen(layer, seen):
        told.append((layer.layer_name, seen.decisions, seen.source))

    for channel in (0, 1, [0, 1, 1, 0]):
        with redconvert.forced(dynamic, channel=channel), torch.no_grad():
            assert error(fast(x), dynamic(x)) < 2e-5
            for target in (dynamic, fast):
                with observed(
                    dynamic, lambda layer, seen: told.append((layer.layer_name, seen.decisions, seen.source))
                ):
                    target(x)
    sources = [each for each in told if each[0] == "blocks.0.b"]
    for (_, decisions_, source), (_, theirs, weights) in zip(sources[::2], sources[1::2], strict=True):
        assert decisions_ == theirs and torch.equal(source, weights)


def test_bfloat16():
    dynamic, x = network(2, "pool", swish=True)
    low = copy.deepcopy(dynamic).to(torch.bfloat16)
    fast = redconvert.deploy(low, x.bfloat16())
    with redconvert.forced(low, channel=1), torch.no_grad():
        assert error(fast(x.bfloat16()).float(), low(x.bfloat16()).float()) < 0.05


def test_budgets_know_what_followers_cost():
    """Half of the first convolution's channels halves what follows: a budget that counts on it is met to the unit."""
    dynamic, x = network(2, "pool")
    redconvert.calibrate(dynamic, [x])
    shapes = {}
    with redconvert.forced(dynamic, channel=1):
        report = redconvert.report(dynamic, x, time=False)
        with observed(dynamic, lambda layer, seen: shapes.update({layer.layer_name: seen[:2]})):
            dynamic(x)
    least = report.executed_macs / report.dense_macs
    found = redconvert.set_budget(dynamic, least + 1e-6, [x])
    assert found.mean == pytest.approx(least, abs=1e-7)
    times = redconvert.layer_times(dynamic, x, repeats=1)
    assert {len(times.layers[f"blocks.0.{name}"][0][0]) for name in ("b", "c", "se.fc1")} == {2}
    table = {name: layer_macs(layer, *shapes[name]) for name, layer in dynamic_layers(dynamic).items()}
    layers = {
        name: [
            [[macs.executed(i, j, s) / 1e3 for s in range(len(macs.reads))] for j in range(len(macs.conv[0]))]
            for i in range(len(macs.conv))
        ]
        for name, macs in table.items()
    }
    dense = sum(each[0][0][0] for each in layers.values())
    found = redconvert.set_budget(
        dynamic, 0.6, [x], times=dataclasses.replace(times, dense_ms=dense, rest_ms=0.0, layers=layers)
    )
    assert 0.5 < found.time <= 0.6


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid])
@pytest.mark.parametrize("dims", [2, 3])
def test_an_activation_behind_a_sum(activation, dims):
    """oneDNN knows ReLU alone there: a network with another one is fused all the same."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            conv = nn.Conv3d if dims == 3 else nn.Conv2d
            self.a, self.b, self.act = conv(8, 8, 3, padding=1), conv(8, 8, 3, padding=1), activation()

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))) + x)

    x = 5 * torch.randn(2, 8, *(4,) * (dims == 3), 9, 9)
    dynamic = redconvert.convert(
        Residual().eval(), redconvert.ConvertConfig(min_saving=0, rules=[("*", {})]), example_inputs=x
    )
    fast = redconvert.deploy(dynamic, x)
    assert fast.source == "fx"
    with torch.no_grad():
        assert error(fast(x), dynamic(x)) < 1e-5


def test_a_batch_parts_behind_a_source_that_is_no_unit():
    """Whoever reads its channels in a part of the batch is told of that part's samples."""
    from timm.layers import Conv2dSame

    class Same(Mobile):
        def __init__(self):
            super().__init__(2)
            self.stem, self.blocks[0].a = nn.Identity(), Conv2dSame(8, 24, 1, bias=False)

    torch.manual_seed(0)
    x = torch.randn(4, 8, 9, 9)
    dynamic = make(x, Same(), [f"blocks.{i}.{name}" for i in range(2) for name in "abc"])
    fast = redconvert.deploy(dynamic, x)
    assert "blocks.0.a" not in units(fast) and dynamic.blocks[0].b.carries is not None
    for channel in ([0, 1, 1, 0], [1, 0, 0, 0], 1):
        with redconvert.forced(dynamic, channel=channel), torch.no_grad():
            for _ in range(4):
                assert error(fast(x), dynamic(x)) < 2e-5
