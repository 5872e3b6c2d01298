"""A frozen network computes what its policy says, with what the policy leaves of the network and no more."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from frozen_networks import frames, same, state, video
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import build, is_choice, randomize, reference, relative_error, specs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from redconvert import ConvertConfig, LayerConfig, RedconvertError, convert, forced, observed, report
from redconvert.deploy import freeze
from redconvert.deploy.plain import FrozenConv, RebuildFrames
from redconvert.layers import DynamicConv, dynamic_layers
from redconvert.layers.macs import executed_macs

EXACT = 1e-10  # float64
CLOSE = 1e-5  # float32
PAIRS = [(0, 0), (1, 0), (0, 1), (1, 1)]
NETWORKS = {"video": video, "frames": frames}


def pairs_of(layer):
    return [(i, j) for i in range(len(layer.candidates.channels)) for j in range(len(layer.candidates.strides))]


def frozen_layers(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, FrozenConv)}


# -- the layer -----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spec=specs(), seed=st.integers(0, 99))
@torch.no_grad()
def test_every_candidate_of_every_convolution(spec, seed):
    assume(is_choice(spec))
    layer, plain, x = build({**spec, "dtype": torch.float64}, seed)
    randomize(layer).eval()
    for i, j in pairs_of(layer):
        frozen = freeze(layer, (i, j))
        assert relative_error(frozen(x), reference(layer, plain, x, i, j)) < EXACT
        with forced(layer, channel=i, temporal=j):
            assert relative_error(frozen(x), layer(x)) < EXACT
            if spec["dims"] == 3:  # a clip of another length, and one without a batch axis
                longer = torch.cat([x, x[:, :, :1], x], dim=2)
                assert relative_error(frozen(longer), layer(longer)) < EXACT
            if not spec.get("num_frames"):
                assert relative_error(frozen(x[0]), layer(x[:1])[0]) < EXACT


@settings(max_examples=50, deadline=None, derandomize=True)
@given(spec=specs(), seed=st.integers(0, 99))
@torch.no_grad()
def test_float32_in_both_layouts(spec, seed):
    assume(is_choice(spec))
    layer, _, x = build(spec, seed)
    randomize(layer).eval()
    layout = torch.channels_last_3d if spec["dims"] == 3 else torch.channels_last
    for i, j in pairs_of(layer):
        frozen = freeze(layer, (i, j))
        with forced(layer, channel=i, temporal=j):
            assert relative_error(frozen(x), layer(x)) < CLOSE
        assert relative_error(frozen.to(memory_format=layout)(x.to(memory_format=layout)), frozen(x)) < CLOSE


# PyTorch itself leaves channels_last_3d for small 1x1x1 convolutions on one thread.
@pytest.mark.parametrize(
    ("dims", "cheap"),
    [(2, "pointwise"), (2, "principal"), (2, "scale"), (2, "depthwise"), (3, "scale"), (3, "depthwise")],
)
@torch.no_grad()
def test_the_layout_is_kept(dims, cheap):
    layout = torch.channels_last_3d if dims == 3 else torch.channels_last
    spec = {"dims": dims, "shape": (10, 6, 7, 6, 5)[: dims + 2], "in_channels": 6, "out_channels": 12}
    spec |= {"kernel_size": 3, "padding": 1, "config": LayerConfig(cheap=cheap)}
    if dims == 2:
        spec["num_frames"] = 5
    layer, _, x = build(spec)
    frozen = freeze(randomize(layer).eval(), (1, 1))
    assert frozen(x).stride()[-1] == 1
    assert frozen(x.to(memory_format=layout)).stride(1) == 1
    assert frozen.to(memory_format=layout)(x.to(memory_format=layout)).stride(1) == 1


@pytest.mark.parametrize("kind", ["Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
@pytest.mark.parametrize("size", [12, 13])
@torch.no_grad()
def test_convolutions_with_a_forward_of_their_own(kind, size):
    layers = pytest.importorskip("timm.layers")
    for stride, padding in ((1, "SAME"), (2, "SAME"), (2, 1)):
        if kind == "Conv2dSame":
            padding = 0
        conv = getattr(layers, kind)(3, 10, 3, stride=stride, **({} if "Same" not in kind else {"padding": padding}))
        network = convert(nn.Sequential(conv, nn.ReLU()), ConvertConfig(num_frames=3, rules={"*": {}})).double().eval()
        randomize(network[0])
        x = torch.randn(6, 3, size, size).double()
        for i, j in PAIRS:
            with forced(network, channel=i, temporal=j):
                wanted = network(x)
            assert relative_error(freeze(network, (i, j))(x), wanted) < EXACT


# -- the network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("space", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_one_pair_for_all_layers(name, space, gate):
    dynamic, x = NETWORKS[name](search_space=space, gate=gate)
    before = state(dynamic)
    for i in range(space):
        for j in range(space):
            frozen = freeze(dynamic, (i, j))
            assert type(frozen) is type(dynamic) and not any(isinstance(m, DynamicConv) for m in frozen.modules())
            with forced(dynamic, channel=i, temporal=j):
                assert relative_error(frozen(x), dynamic(x)) < EXACT
    assert same(before, state(dynamic))


@torch.no_grad()
def test_a_decision_per_layer():
    dynamic, x = video()
    policy = {"stem.0": (1, 0), "also": (0, 1), "re:d.*": [1, 1], "*": (0, 0)}
    frozen = freeze(dynamic, policy)
    chosen = {name: layer.candidate for name, layer in frozen_layers(frozen).items()}
    assert chosen == {"stem.0": (1, 0), "twice": (0, 1), "down": (1, 1)}
    assert type(frozen.point) is nn.Conv3d and frozen.also is frozen.twice
    with forced(dynamic, channel=0, temporal=0):
        for name, (i, j) in chosen.items():
            dynamic.get_submodule(name).forced = (i, j)
        wanted = dynamic(x)
        for name in chosen:
            dynamic.get_submodule(name).forced = (0, 0)
    assert relative_error(frozen(x), wanted) < EXACT
    first_wins = freeze(dynamic, {"*": (0, 1), "stem.0": (1, 0)})
    assert {layer.candidate for layer in frozen_layers(first_wins).values()} == {(0, 1)}
    assert not frozen_layers(freeze(dynamic, {"point": (0, 0)}))  # what nothing matches stays full


@torch.no_grad()
def test_in_place_everything_stays_where_it_is():
    dynamic, x = video()
    full, weights = dynamic.point, dict(dynamic.named_parameters())
    calls = []
    dynamic.twice.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    dynamic.twice.train()
    objects = dict(dynamic.named_modules(remove_duplicate=False))
    with forced(dynamic, channel=0, temporal=0):
        for name in ("twice", "stem.0"):
            dynamic.get_submodule(name).forced = (1, 1)
        dynamic.twice.eval()
        wanted = dynamic(x)
        dynamic.twice.train()
    count = len(calls)
    frozen = freeze(dynamic, {"twice": (1, 1), "stem.0": (1, 1)}, inplace=True)
    assert frozen is dynamic and frozen.describe() == "the user's own"
    assert frozen.twice is objects["twice"] is frozen.also and frozen.parts[0] is frozen.point is full
    assert type(full) is nn.Conv3d and full.weight is weights["point.weight"] and full.bias is weights["point.bias"]
    assert frozen.twice.training and frozen.twice.conv.training and not frozen.stem[0].conv.training
    assert relative_error(frozen(x), wanted) < EXACT and len(calls) == count + 2
    assert not [key for key in frozen.state_dict() if ".gate." in key or ".cheap_" in key]
    assert frozen.twice.weight is frozen.twice.conv.weight and frozen.twice.out_channels == 14


@torch.no_grad()
def test_frames_alone_keep_the_parameters():
    dynamic, _ = video()
    weight = dynamic.stem[0].weight
    freeze(dynamic, (0, 1), inplace=True)
    assert dynamic.stem[0].conv.weight is weight and dynamic.stem[0].conv.stride == (2, 1, 1)
    assert dynamic.down.conv.stride == (4, 2, 2)


@torch.no_grad()
def test_copies_pickles_and_state_dicts():
    dynamic, x = video()
    frozen = freeze(dynamic, (1, 1))
    again = freeze(video()[0], (1, 1))
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(twin(x), frozen(x)) and type(twin.down) is FrozenConv
    assert not torch.equal(again(x), frozen(x))
    again.load_state_dict(frozen.state_dict())
    for name, layer in frozen_layers(again).items():  # each its own channel order, saved with it
        assert torch.equal(layer.weight, frozen.get_submodule(name).weight)
    assert torch.equal(again(x), frozen(x))


def test_a_frozen_network_can_be_trained():
    dynamic, x = video()
    frozen = freeze(dynamic, (1, 1)).train()
    frozen(x).square().sum().backward()
    used = {name for name, p in frozen.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # Only the computed frames of "down" are read by "point", which skips the others.
    unused = ("spare", "down.expand")
    assert {name for name, _ in frozen.named_parameters() if not name.startswith(unused)} == used
    frozen_weights = dynamic.stem[0].requires_grad_(False)
    assert not any(p.requires_grad for p in freeze(frozen_weights, (1, 1)).parameters())


@torch.no_grad()
def test_frames_that_are_copied_need_no_parameters():
    dynamic, x = video()
    for layer in dynamic_layers(dynamic).values():
        for weight, bias in zip(layer.cheap_t.weights, layer.cheap_t.biases, strict=True):
            weight[:, 0], weight[:, 1], bias[:] = 1, 0, 0
    frozen = freeze(dynamic, (1, 1))
    steps = [module for module in frozen.modules() if isinstance(module, RebuildFrames)]
    assert len(steps) == 5 and not any(list(step.parameters()) for step in steps)
    with forced(dynamic, channel=1, temporal=1):
        assert relative_error(frozen(x), dynamic(x)) < EXACT


@torch.no_grad()
def test_half_precision_follows():
    dynamic, x = video(torch.float32)
    frozen = freeze(dynamic, (1, 1)).to(torch.bfloat16)
    assert frozen(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(freeze(dynamic, (1, 1))(x).float(), freeze(dynamic, (1, 1))(x).float()) == 0


# -- what is left --------------------------------------------------------------------------------------


@torch.no_grad()
def test_parameters_and_macs_by_hand():
    x = torch.randn(2, 4, 7, 6, 5)
    conv = nn.Conv3d(4, 11, (3, 3, 3), padding=1)
    dynamic = convert(conv, ConvertConfig(cheap="pointwise", rules={"*": {}}), example_inputs=x)
    frozen = freeze(randomize(dynamic).eval(), (1, 1))
    # 6 of 11 channels, 4 of 7 frames, 30 positions
    convolution, phi_c, phi_t = 6 * 4 * 27 + 6, 5 * 6 + 5, 2 * 11 + 11
    assert sum(p.numel() for p in frozen.parameters()) == convolution + phi_c + phi_t
    with FlopCounterMode(display=False) as flops:
        frozen(x)
    assert flops.get_total_flops() // 2 == 2 * (6 * 4 * 30 * 4 * 27 + 5 * 6 * 4 * 30)  # two per MAC, two samples


@pytest.mark.parametrize("cheap", ["pointwise", "principal", "depthwise", "scale", "auto", "inputs mixed"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_macs_are_those_that_were_executed_without_the_gates(name, pair, cheap):
    mixed = cheap == "inputs mixed"
    dynamic, x = NETWORKS[name](cheap="principal" if mixed else cheap, mix_inputs=mixed)
    assert mixed == any(layer.mixed_in is not None for layer in dynamic_layers(dynamic).values())
    seen, (i, j) = [], pair
    with observed(dynamic, lambda *call: seen.append(call)), forced(dynamic, channel=i, temporal=j):
        dynamic(x)
    frozen = freeze(dynamic, pair)  # which mixes filters once
    with FlopCounterMode(display=False) as flops:
        frozen(x)
    head = dynamic.head.weight.numel() * (len(x) if name == "frames" else 4)
    assert flops.get_total_flops() // 2 == head + sum(convolved(*call, i, j) for call in seen)


def convolved(layer, seen, i, j):
    """MACs of all samples of a call, less the gates and what is elementwise: Phi_t, and Phi_c by scaling."""
    frames, positions = _frames_and_positions(seen.output_shape)
    in_frames, in_positions = _frames_and_positions(seen.input_shape)
    computed = -(-frames // 2**j)
    gate = layer.in_channels * in_frames * in_positions
    gate += layer.gate.fc1.weight.numel() + layer.gate.fc2.weight.numel()
    elementwise = 2 * (frames - computed) * layer.out_channels * positions
    if i and layer.cheap_c.kinds[0] == "scale":
        elementwise += (layer.out_channels - layer.candidates.channels[1]) * computed * positions
    return sum(executed_macs(layer, seen)) - (gate + elementwise) * len(seen.decisions)


def _frames_and_positions(shape):
    return shape[2] if len(shape) == 5 else 5, shape[-1] * shape[-2]


# -- decisions over batches ----------------------------------------------------------------------------


@torch.no_grad()
def test_the_most_frequent_decision():
    dynamic, x = video()
    counts = {}
    with observed(dynamic, lambda layer, seen: counts.setdefault(layer.layer_name, []).extend(seen.decisions)):
        for batch in (x, x[:3] * 2 + 1):
            dynamic(batch)
    assert any(len(set(each)) > 1 for each in counts.values())
    frozen = freeze(dynamic, batches=[x, (x[:3] * 2 + 1, torch.zeros(3))])
    for name, each in counts.items():
        most = max(each.count(decision) for decision in each)
        best = min(decision[:2] for decision in each if each.count(decision) == most)
        module = frozen.get_submodule(name)
        assert getattr(module, "candidate", (0, 0)) == best, name
        assert isinstance(module, FrozenConv) == (best != (0, 0))
    assert type(frozen.spare) is nn.Conv3d  # it never ran


@torch.no_grad()
def test_of_equally_frequent_ones_that_which_computes_more():
    dynamic, x = video()
    with forced(dynamic, channel=[1, 0, 1, 0], temporal=[0, 1, 0, 1]):
        frozen = freeze(dynamic, batches=[x])
    assert {layer.candidate for layer in frozen_layers(frozen).values()} == {(0, 1)}


@torch.no_grad()
def test_only_constant_decisions():
    dynamic, x = video()
    gate = dynamic.stem[0].gate
    gate.fc2.weight.zero_()
    gate.beta.copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0]))  # always (1, 1)
    norm, hidden = dynamic.down.gate.norm, []
    hook = dynamic.down.gate.fc1.register_forward_hook(lambda module, args, out: hidden.append(out))
    dynamic(x)
    hook.remove()
    norm.running_mean.copy_(hidden[0].mean(0))  # now it tells the samples apart
    norm.running_var.copy_(hidden[0].var(0))
    decisions = {}
    with observed(dynamic, lambda layer, seen: decisions.setdefault(layer.layer_name, set()).update(seen.decisions)):
        wanted = dynamic(x)
    frozen = freeze(dynamic, batches=[x], only_constant=True)
    constant = {name for name, each in decisions.items() if len(each) == 1}
    assert "stem.0" in constant and frozen.stem[0].candidate == (1, 1)
    assert "down" not in constant
    for name in decisions:
        assert isinstance(frozen.get_submodule(name), DynamicConv) == (name not in constant)
    assert isinstance(frozen.spare, DynamicConv)
    assert relative_error(frozen(x), wanted) < EXACT
    assert len(report(frozen, x, time=False).layers) > 0


@torch.no_grad()
def test_soft_gates_that_mix():
    dynamic, x = video(gate="soft")
    before = state(dynamic)
    with pytest.raises(RedconvertError, match="soft gate mixes candidates for some of the batches"):
        freeze(dynamic, batches=[x], inplace=True)
    assert same(before, state(dynamic))
    frozen = freeze(dynamic, batches=[x], only_constant=True)
    assert relative_error(frozen(x), dynamic(x)) < EXACT


@torch.no_grad()
def test_train_flags_and_listeners_stay():
    dynamic, x = video()
    dynamic.train()
    dynamic.stem.eval()
    flags = {name: module.training for name, module in dynamic.named_modules()}
    heard = []
    with observed(dynamic, lambda layer, seen: heard.append(layer)):
        listeners = dynamic.down.observers
        frozen = freeze(dynamic, batches=[x], only_constant=True)
        assert dynamic.down.observers is listeners
    assert {name: module.training for name, module in dynamic.named_modules()} == flags
    heard.clear()
    frozen.eval()(x)
    assert not heard
