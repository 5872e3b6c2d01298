"""Networks that share, hide, repeat, subclass or compute their convolutions."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import traps
from networks import equal, run, snapshot, unchanged
from torch import nn
from torch.nn.utils import parametrizations, prune

import redconvert
from redconvert.layers import DynamicConv, dynamic_layers

torch.manual_seed(0)
CLIP = torch.randn(traps.X3)
IMAGE = torch.randn(traps.X2)


def converted_names(model, inputs=CLIP):
    return [verdict.name for verdict in redconvert.plan(model, example_inputs=inputs).converted]


def reason(model, name, inputs=CLIP):
    (verdict,) = [v for v in redconvert.plan(model, example_inputs=inputs).verdicts if v.name == name]
    return verdict.reason


@pytest.mark.parametrize(
    "build",
    [
        traps.Shared,
        traps.Unused,
        traps.Functional,
        traps.ListIn,
        traps.DictOut,
        traps.PlainList,
        traps.Checkpointed,
        lambda: traps.Checkpointed(reentrant=True),
        traps.Branches,
        traps.FlatBranches,
        traps.Remembers,
        traps.InPlace,
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_equal_to_the_bit(build, inplace):
    model = build()
    inputs = [CLIP, CLIP] if isinstance(model, traps.ListIn) else CLIP
    dense = run(copy.deepcopy(model), inputs), run(copy.deepcopy(model), inputs, training=True)
    before = snapshot(model)
    plan = redconvert.plan(model, example_inputs=inputs)
    assert unchanged(model, before)
    dynamic = redconvert.convert(model, example_inputs=inputs, inplace=inplace)
    assert (dynamic is model) == inplace and type(dynamic) is type(model)
    if not inplace:
        assert unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), before["rng"])
    assert len(plan.converted) == len(dynamic_layers(dynamic))
    twin = copy.deepcopy(dynamic)
    assert equal(run(twin, inputs), dense[0])
    assert equal(run(copy.deepcopy(dynamic), inputs, training=True), dense[1])
    assert equal(run(pickle.loads(pickle.dumps(dynamic)), inputs), dense[0])
    if inplace:
        redconvert.revert(model)
        torch.set_rng_state(before["rng"])
        assert unchanged(model, before)


def test_a_shared_convolution():
    model = traps.Shared()
    (_, verdict) = redconvert.plan(model, example_inputs=CLIP).verdicts
    assert (verdict.name, verdict.aliases, verdict.facts.calls) == ("first", ("second",), 2)
    dynamic = redconvert.convert(model, example_inputs=CLIP)
    assert dynamic.first is dynamic.second and isinstance(dynamic.first, DynamicConv)
    state = dynamic.state_dict()
    assert state["first.gate.beta"].data_ptr() == state["second.gate.beta"].data_ptr()
    assert list(dynamic_layers(dynamic)) == ["stem", "first"]
    # A rule on either name is a rule on the layer.
    config = redconvert.ConvertConfig(rules={"second": None})
    assert list(dynamic_layers(redconvert.convert(model, config, example_inputs=CLIP))) == ["stem"]


def test_called_twice_trains():
    dynamic = redconvert.convert(traps.Shared(), example_inputs=CLIP)
    with redconvert.forced(dynamic, channel=[0, 1], temporal=[1, 0]):
        dynamic(CLIP).square().sum().backward()
    assert dynamic.first.weight.grad.abs().max() > 0


def test_unused_needs_an_example():
    model = traps.Unused()
    assert "unused: the forward pass never calls it" in reason(model, "unused")
    assert converted_names(model) == ["used"]
    # fx reads the graph without an example, and knows too.
    assert [v.name for v in redconvert.plan(model).converted] == ["used"]


def test_a_subclass_with_an_inherited_forward():
    model = nn.Sequential(traps.Inherits(3, 16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    dense = run(model, CLIP)
    dynamic = redconvert.convert(model, example_inputs=CLIP)
    for network in (dynamic, pickle.loads(pickle.dumps(dynamic)), copy.deepcopy(dynamic)):
        conv = network[0]
        assert isinstance(conv, traps.Inherits) and isinstance(conv, redconvert.DynamicConv3d)
        assert conv.describe() == "3->16 kept"
        assert equal(run(network, CLIP), dense)
        with redconvert.forced(network, channel=1):
            assert not equal(run(network, CLIP), dense)
    assert type(redconvert.revert(dynamic)[0]) is traps.Inherits


def test_an_own_forward():
    model = nn.Sequential(traps.Own(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    assert "own forward: Own is more than a Conv2d" in reason(model, "0", IMAGE)
    assert converted_names(model, IMAGE) == ["2"]


def test_a_registered_recipe():
    @redconvert.register(traps.Taught)
    class TaughtRecipe(redconvert.Recipe):
        @staticmethod
        def weight(conv):
            return conv.weight / 2

    model = nn.Sequential(traps.Taught(3, 16, 3), nn.ReLU()).eval()
    dense = run(model, IMAGE)
    dynamic = redconvert.convert(model, example_inputs=IMAGE)
    assert isinstance(dynamic[0], traps.Taught)
    assert equal(run(dynamic, IMAGE), dense)
    with redconvert.forced(dynamic, channel=1):
        reduced = run(dynamic, IMAGE)["out"]
    assert torch.allclose(reduced[:, :8], dense["out"][:, :8], atol=1e-6)
    assert not torch.allclose(reduced[:, 8:], dense["out"][:, 8:], atol=1e-6)


@pytest.mark.parametrize(
    ("normalise", "words"),
    [
        (nn.utils.weight_norm, "computed by a hook"),
        (nn.utils.spectral_norm, "computed by a hook"),
        (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), "computed by a hook"),
        (parametrizations.weight_norm, r"parametrised \(weight\)"),
        (parametrizations.spectral_norm, r"parametrised \(weight\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_stay(normalise, words):
    model = nn.Sequential(normalise(traps.conv3()), nn.ReLU(), traps.conv3(16, 16), nn.ReLU()).eval()
    dense = run(model, CLIP)
    before = snapshot(model)
    plan = redconvert.plan(model, example_inputs=CLIP)
    assert [v.name for v in plan.converted] == ["2"]
    assert re.search(words, plan.verdicts[0].reason)
    assert unchanged(model, before)
    dynamic = redconvert.convert(model, example_inputs=CLIP, inplace=True)
    assert equal(run(dynamic, CLIP), dense)


def test_a_replaced_forward():
    model = nn.Sequential(traps.conv3(), nn.ReLU(), traps.conv3(16, 16), nn.ReLU())
    model[0].forward = lambda x: nn.Conv3d.forward(model[0], x) * 2
    assert "replaced on the instance" in reason(model, "0")


def test_functional_convolutions_are_named():
    plan = redconvert.plan(traps.Functional(), example_inputs=CLIP)
    assert plan.functional == ("conv3d()",)
    assert "a functional convolution, which is not a module and stays dense" in str(plan)
    with pytest.raises(redconvert.RedconvertError, match=r"no Conv2d or Conv3d modules .functional.*conv3d\(\)"):
        redconvert.convert(traps.OnlyFunctional(), example_inputs=CLIP)


def test_convolutions_in_a_plain_list_stay():
    dynamic = redconvert.convert(traps.PlainList(), example_inputs=CLIP)
    assert list(dynamic_layers(dynamic)) == ["seen"]
    assert type(dynamic.hidden[0]) is nn.Conv3d


def test_keyword_inputs_and_dict_outputs():
    model = traps.DictOut()
    plan = redconvert.plan(model, example_inputs={"x": CLIP, "scale": 2.0})
    facts = {v.name: v.facts for v in plan.verdicts}
    assert facts["conv"].input_shape == traps.X3 and facts["conv"].output_shape == (2, 16, 4, 8, 8)
    assert facts["head"].calls == 1 and not facts["conv"].feeds_norm


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_trains(reentrant):
    """Gradients through torch.utils.checkpoint are those without it."""
    torch.manual_seed(0)
    dynamic = redconvert.convert(traps.Checkpointed(reentrant), example_inputs=CLIP)
    assert dynamic.stem.feeds_norm and not dynamic.conv.feeds_norm
    gradients = []
    for through in (dynamic.forward, lambda x: dynamic.block(x).mean((2, 3, 4))):
        dynamic.zero_grad()
        with redconvert.forced(dynamic, channel=[0, 1], temporal=[1, 1]):
            through(CLIP.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad.clone() for p in dynamic.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) >= 10
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_in_place_consumers_train():
    model = traps.InPlace()
    dynamic = redconvert.convert(model, example_inputs=CLIP)
    assert not any(layer.feeds_norm for layer in dynamic_layers(dynamic).values())
    gradients = []
    with redconvert.forced(dynamic, channel=0, temporal=0):
        for network in (model, dynamic):
            network(CLIP).square().sum().backward()
            gradients.append([network.first.weight.grad, network.second.weight.grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_name_of_a_part_that_conversion_adds():
    """A subclass that already uses a name which conversion needs is not overwritten in silence."""
    model = nn.Sequential(traps.Inherits(3, 16), nn.ReLU()).eval()
    model[0].gate = nn.Linear(2, 2)
    with pytest.raises(redconvert.RedconvertError, match=r"nothing to convert.*'gate'"):
        redconvert.convert(model, example_inputs=CLIP)
