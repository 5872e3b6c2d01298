"""Channels that are handed over: deployed and frozen networks give what the dynamic one gives."""

import copy
import itertools
import sys

import pytest
import torch
from torch import nn

import redconvert
from redconvert.deploy.plain import FrozenConv
from redconvert.layers import DynamicConv, observed

pytestmark = pytest.mark.filterwarnings("ignore")


class Chain(nn.Module):
    """conv-norm-activation, several times; ``opaque`` to fx where it looks at values."""

    def __init__(self, dim, widths, pool=False, bias=False, norm=True, activation=nn.ReLU, opaque=False):
        super().__init__()
        conv, batch_norm, max_pool = (
            (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d) if dim == 2 else (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)
        )
        parts = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            parts += [conv(before, after, 3, padding=1, bias=bias)]
            parts += [batch_norm(after)] if norm else []
            parts += [activation()]
            parts += [max_pool(2)] if pool and index == 0 else []
        self.features, self.opaque = nn.Sequential(*parts), opaque
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x):
        if self.opaque and x.sum() > 1e9:
            return x
        return self.head(self.features(x).flatten(2).mean(2))


def make(dim, widths, x, candidates=2, **options):
    """A dynamic network whose pairs are tied, with numbers everywhere and channels in any order."""
    torch.manual_seed(0)
    frames = options.pop("num_frames", None)
    network = Chain(dim, widths, **options).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
            norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, 0, 0.2)
    config = redconvert.ConvertConfig(absorb=True, search_space=candidates, min_saving=0, num_frames=frames)
    dynamic = redconvert.convert(network, config, example_inputs=x)
    pairs = 0
    for layer in layers_of(dynamic):
        if layer.cheap_in is not None:
            pairs += 1
            for parameter in layer.cheap_in.parameters():
                nn.init.normal_(parameter, 0, 0.1)
        if layer.cheap_c is not None:
            layer.cheap_c.set_order(torch.randperm(layer.out_channels))
        if layer.cheap_t is not None:
            for parameter in layer.cheap_t.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    assert pairs >= len(widths) - 3 and pairs
    return dynamic


def layers_of(network):
    return [layer for layer in network.modules() if isinstance(layer, DynamicConv)]


def let_gates_decide(dynamic):
    for layer in layers_of(dynamic):
        nn.init.normal_(layer.gate.beta, 0, 0.05), nn.init.normal_(layer.gate.fc2.weight)


def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def watched(network, target, x):
    seen = {}
    with observed(network, lambda layer, told: seen.setdefault(layer.layer_name, []).append(told)):
        return target(x), seen


CASES = {
    "images": (2, [3, 20, 24], (4, 3, 10, 10), {}),
    "three with a pool": (2, [3, 21, 27, 33], (4, 3, 10, 10), {"pool": True, "candidates": 3}),
    "clips": (3, [3, 21, 27, 33], (3, 3, 6, 8, 8), {"pool": True, "candidates": 3}),
    "bias, an odd number of frames": (3, [3, 20, 24], (3, 3, 5, 7, 7), {"bias": True, "norm": False}),
    "folded frames": (2, [3, 20, 24, 28], (12, 3, 8, 8), {"num_frames": 4, "bias": True}),
    "swish": (3, [3, 20, 24], (2, 3, 4, 7, 7), {"activation": nn.SiLU}),
    "an activation that is not fused": (2, [3, 20, 24], (3, 3, 7, 7), {"activation": nn.ELU}),
    "in layers, images": (2, [3, 20, 24], (3, 3, 7, 7), {"opaque": True}),
    "in layers, clips": (3, [3, 20, 24, 28], (2, 3, 4, 7, 7), {"opaque": True}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("compiler", [True, False], ids=["C", "torch"])
def test_same_numbers(name, compiler, monkeypatch):
    dim, widths, shape, options = CASES[name]
    if not compiler:
        monkeypatch.setattr(sys.modules["redconvert.deploy.kernels"], "compiled", lambda: None)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    dynamic = make(dim, widths, x, **options)
    fast = redconvert.deploy(dynamic, x)
    assert fast.source == ("layers" if options.get("opaque") else "fx")
    count, samples = options.get("candidates", 2), shape[0] // options.get("num_frames", 1)
    mixed = [n % count for n in range(samples)]
    timed = any(len(layer.candidates.strides) > 1 for layer in layers_of(dynamic))
    frames = [*range(count), mixed[::-1]] if timed else [None]
    results = []
    for channel, temporal in itertools.product([*range(count), mixed], frames):
        with redconvert.forced(dynamic, channel=channel, temporal=temporal):
            wanted, told = watched(dynamic, dynamic, x)
            found, said = watched(dynamic, fast, x)
            assert error(found, wanted) < 1e-5
            with torch.no_grad():
                assert error(fast(x), wanted) < 1e-5
        results.append(wanted)
        for layer, (theirs,) in told.items():
            (ours,) = said[layer]
            assert (ours.input_shape, ours.output_shape, ours.decisions) == (*theirs[:2], theirs.decisions)
            assert (ours.source is None) == (theirs.source is None)
            assert ours.source is None or torch.allclose(ours.source, theirs.source)
    assert error(results[-1], results[0]) > 1e-3  # decisions do change the numbers


@pytest.mark.parametrize("name", ["images", "three with a pool", "clips", "folded frames", "in layers, clips"])
def test_gates_decide(name):
    dim, widths, shape, options = CASES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    dynamic = make(dim, widths, x, **options)
    let_gates_decide(dynamic)
    fast, taken = redconvert.deploy(dynamic, x, check=False), set()
    for seed in range(4):
        x = (1 + seed) * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        wanted, told = watched(dynamic, dynamic, x)
        found, said = watched(dynamic, fast, x)
        assert error(found, wanted) < 1e-5
        for layer, (theirs,) in told.items():
            assert said[layer][0].decisions == theirs.decisions
            taken |= {decision.source for decision in theirs.decisions}
            if theirs.source is not None:
                torch.testing.assert_close(said[layer][0].source, theirs.source, atol=1e-5, rtol=1e-4)
    assert len(taken) > 1


def test_only_what_was_computed_is_handed_on():
    x = torch.randn(2, 3, 8, 8)
    dynamic = make(2, [3, 20, 24], x)
    fast, widths = redconvert.deploy(dynamic, x), []
    source, reader = (unit for unit in fast.units.values())
    run = type(reader).run
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            type(reader), "run", lambda self, x, *a, **k: (widths.append(x.shape[1]), run(self, x, *a, **k))[1]
        )
        with redconvert.forced(dynamic, channel=1):
            fast(x)
        with redconvert.forced(dynamic, channel=[0, 1]):
            fast(x)
        with redconvert.forced(dynamic, channel=0):
            fast(x)
    assert source.hands_compact and not reader.hands_compact
    assert widths == [3, 10, 3, 20, 3, 10, 3, 20]  # samples that decide differently go through both apart


def test_disabled_baked_saved_and_reported(tmp_path):
    x = torch.randn(3, 3, 4, 8, 8)
    dynamic = make(3, [3, 20, 24, 28], x)
    let_gates_decide(dynamic)
    fast = redconvert.deploy(dynamic, x, check=False)
    with torch.no_grad():
        with redconvert.forced(dynamic, channel=1), redconvert.disabled(dynamic):
            assert error(fast(x), dynamic(x)) < 1e-5
        baked = redconvert.deploy(dynamic, x, bake=[x], check=False)
        assert error(baked(x), dynamic(x)) < 1e-5
        with redconvert.forced(dynamic, channel=1):
            wanted, found = (redconvert.report(each, x, time=False) for each in (dynamic, fast))
            assert found.executed_macs == wanted.executed_macs < 0.5 * found.dense_macs
        fast.save(tmp_path)
        plain = redconvert.revert(copy.deepcopy(dynamic))
        again = redconvert.deploy(redconvert.from_pretrained(plain, tmp_path), x, forms=tmp_path, check=False)
        known = fast.forms()
        assert all(known[unit].items() >= forms.items() for unit, forms in again.forms().items())
        assert error(again(x), dynamic(x)) < 1e-5


FROZEN = ["images", "three with a pool", "clips", "folded frames"]


@pytest.mark.parametrize("name", FROZEN)
def test_frozen(name):
    dim, widths, shape, options = CASES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    dynamic = make(dim, widths, x, **options)
    timed = any(len(layer.candidates.strides) > 1 for layer in layers_of(dynamic))
    count = options.get("candidates", 2)
    names = {layer.layer_name: layer for layer in layers_of(dynamic)}
    policies = [{"*": (i, j)} for i in range(count) for j in range(count if timed else 1)]
    policies += [dict.fromkeys(list(names)[:1], (1, 0)), dict.fromkeys(list(names)[1:], (1, 0))]
    for policy in policies:
        frozen = redconvert.freeze(dynamic, policy)
        for layer_name, layer in names.items():
            layer.forced = policy.get(layer_name, policy.get("*", (0, 0)))
        with torch.no_grad():
            assert error(frozen(x), dynamic(x)) < 1e-5
            again = torch.export.export(frozen, (x,), strict=False).module()
            assert error(again(x), frozen(x)) < 1e-5
    assert any(isinstance(module, FrozenConv) for module in frozen.modules())


def test_frozen_by_gates():
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    dynamic = make(2, [3, 20, 24, 28], x)
    source, middle, last = layers_of(dynamic)
    with torch.no_grad():
        for layer, bias in ((source, -9.0), (middle, 9.0), (last, -9.0)):  # 9: the full candidate
            layer.gate.beta.copy_(torch.tensor([bias, -bias]))
        assert not layers_of(redconvert.freeze(dynamic, batches=[x], only_constant=True))
        last.forced = [0, 1] * 8, None
        frozen = redconvert.freeze(dynamic, batches=[x], only_constant=True)
        assert len(layers_of(frozen)) == 3  # they hang together
        assert error(frozen(x), dynamic(x)) < 1e-5


def test_frozen_as_onnx(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    x = torch.randn(2, 3, 8, 8)
    frozen = redconvert.freeze(make(2, [3, 20, 24], x), (1, 0))
    redconvert.export_onnx(frozen, x, tmp_path / "frozen.onnx", verify=True)
    assert (tmp_path / "frozen.onnx").stat().st_size > 0
