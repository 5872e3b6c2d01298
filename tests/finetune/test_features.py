"""The features' loss: by hand, at birth, its gradients, its refusals, and within `redconvert.finetune`."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from problems import Interrupted, batches, network, run, same_state, state_of, undecided
from torch import Tensor, nn

import redconvert
from redconvert import RedconvertError, frozen_original
from redconvert.finetune import FeatureLoss

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")

BLOCKS = ["blocks.0", "blocks.1"]


def outputs_of(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What these modules put out, with hooks of this test's own."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda m, a, out, name=name: found.update({name: out})) for name in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def by_hand(own: dict[str, Tensor], taught: dict[str, Tensor]) -> Tensor:
    """The equation, channel by channel, in float64."""
    shares = []
    for name, b in taught.items():
        missed = spread = torch.zeros((), dtype=torch.float64)
        for channel in range(b.shape[1]):
            ours, wanted = own[name][:, channel].double(), b[:, channel].double()
            missed = missed + (ours - wanted).square().sum()
            spread = spread + (wanted - wanted.mean()).square().sum()
        shares.append(missed / spread)
    return torch.stack(shares).mean()


def hooks_of(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for each in models for m in each.modules())


# -- the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layers", [None, ["blocks.1"], ["blocks", "head"]])
def test_by_the_equation(dims, layers):
    dynamic = undecided(network(dims)).train()
    teacher, x = frozen_original(dynamic), batches(dims=dims)[0][0]
    features, names = FeatureLoss(dynamic, teacher, layers), layers or BLOCKS
    assert list(features.layers) == names
    wanted = by_hand(outputs_of(dynamic, names, x), outputs_of(teacher, names, x))
    assert float(features()) == pytest.approx(float(wanted), rel=1e-6) and float(wanted) > 0.01


def test_nothing_is_missed_at_birth():
    dynamic, x = network(), batches()[0][0]
    teacher = frozen_original(dynamic)
    features = FeatureLoss(dynamic, teacher)
    for order in ((dynamic, teacher), (teacher, dynamic), (dynamic, dynamic, teacher)):
        for each in order:  # of several passes the last counts
            each(x)
        assert float(features()) == 0.0
    teacher(x)
    with redconvert.forced(dynamic, channel=1):
        dynamic(x)
    assert float(features()) > 0.01


def test_one_where_every_channel_is_its_mean():
    class Means(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((0, 2, 3), keepdim=True).expand_as(x)

    dynamic = network()
    teacher = frozen_original(dynamic)
    dynamic.blocks.append(Means())
    teacher.blocks.append(nn.Identity())
    features = FeatureLoss(dynamic, teacher, ["blocks"])
    dynamic(batches()[0][0]), teacher(batches()[0][0])
    assert float(features()) == pytest.approx(1, rel=1e-6)


def test_its_gradients():
    """Those of the equation; the teacher gets none."""
    dynamic, x = undecided(network()).train(), batches()[0][0]
    teacher, other = frozen_original(dynamic).requires_grad_(), copy.deepcopy(dynamic)
    by_hand(outputs_of(other, BLOCKS, x), outputs_of(frozen_original(dynamic), BLOCKS, x)).backward()
    features = FeatureLoss(dynamic, teacher)
    dynamic(x), teacher(x)
    features().backward()
    for (name, ours), wanted in zip(dynamic.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert all(layer[0].weight.grad.abs().max() > 1e-3 for layer in dynamic.blocks)
    assert dynamic.head.weight.grad is None and all(p.grad is None for p in teacher.parameters())


def test_gates_that_rest():
    """A gate would get a gradient from the features; where it rests it gets none, and the weights the same kind."""
    dynamic, x = undecided(network()).train(), batches()[0][0]
    teacher = frozen_original(dynamic)
    features, gates = FeatureLoss(dynamic, teacher), [block[0].gate.beta for block in dynamic.blocks]
    teacher(x), dynamic(x)
    assert not features.gates_rest
    features().backward()
    assert all(gate.grad.abs().max() > 1e-3 for gate in gates)
    dynamic.zero_grad()
    with redconvert.resting_gates(dynamic):
        assert features.gates_rest
        teacher(x), dynamic(x)
        features().backward()
    assert all(gate.grad is None for gate in gates) and dynamic.blocks[0][0].weight.grad.abs().max() > 1e-3


def test_in_bfloat16():
    dynamic, x = undecided(network()).train(), batches()[0][0]
    teacher, other = frozen_original(dynamic), copy.deepcopy(dynamic)
    features, exact = FeatureLoss(dynamic, teacher), FeatureLoss(other, teacher)
    other(x), teacher(x)
    wanted = exact()
    with torch.autocast("cpu", torch.bfloat16):
        dynamic(x), teacher(x)
        found = features()
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(wanted), rel=0.05)


def test_channels_that_others_leave_out_are_not_compared():
    dynamic = network(absorb=True, cheap="pointwise")
    first, second = (block[0] for block in dynamic.blocks)
    assert first.hands_to is not None and second.reads_from is first.hands_to
    assert FeatureLoss(dynamic, frozen_original(dynamic)).layers == ("blocks.1",)
    for name in ("blocks.0", "blocks.0.0"):
        with pytest.raises(RedconvertError, match=f"'{name}' hands on channels that others leave out"):
            FeatureLoss(dynamic, frozen_original(dynamic), [name])
    assert FeatureLoss(dynamic, frozen_original(dynamic), ["blocks"]).layers == ("blocks",)


def test_hooks_are_gone():
    dynamic = network()
    teacher, before = frozen_original(dynamic), hooks_of(dynamic)
    features = FeatureLoss(dynamic, teacher)
    assert hooks_of(dynamic, teacher) == before + 6
    copied = copy.deepcopy(dynamic)
    copied(batches()[0][0]), teacher(batches()[0][0])
    with pytest.raises(RedconvertError, match=r"'blocks\.0' of the network did not run"):
        features()  # a copy's passes are not the network's
    features.close()
    assert hooks_of(dynamic, teacher) == before
    FeatureLoss(dynamic, teacher)
    gc.collect()
    assert hooks_of(dynamic, teacher) == before


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["blocks.7"], "Net has no module 'blocks.7' to compare features at: take names"),
        ([], "has no block whose channels are all there.*name modules in layers="),
        ("blocks", r"layers='blocks' must be a list of names"),
    ],
)
def test_bad_layers(layers, message):
    dynamic = network()
    teacher, before = frozen_original(dynamic), hooks_of(dynamic)
    with pytest.raises(RedconvertError, match=message):
        FeatureLoss(dynamic, teacher, layers)
    assert hooks_of(dynamic, teacher) == before


def test_what_cannot_be_compared():
    dynamic, x = network(), batches()[0][0]
    teacher = frozen_original(dynamic)
    with pytest.raises(RedconvertError, match="compared with those of a network, not of a function: pass"):
        FeatureLoss(dynamic, lambda x: x)  # type: ignore[arg-type]
    teacher.blocks[1] = nn.Sequential(teacher.blocks[1], nn.MaxPool2d(2))
    features = FeatureLoss(dynamic, teacher)
    dynamic(x)
    with pytest.raises(RedconvertError, match=r"'blocks\.0' of its teacher did not run"):
        features()
    dynamic(x), teacher(x)
    with pytest.raises(RedconvertError, match=r"'blocks\.1' puts out \[\(16, 16, 8, 8\)\] and its teacher \[\(16"):
        features()


# -- in a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_steps_by_hand(weight):
    """Gates learn in the first of two steps, which is without the features."""
    dynamic, (x, labels) = undecided(network()), batches()[0]
    other, teacher, before = copy.deepcopy(dynamic), frozen_original(dynamic), hooks_of(dynamic)
    data, settings = [(x, labels)] * 2, {"efficiency": weight, "target": 0.5, "lr": 1e-9, "gate_every": 2}
    history = run(dynamic, data, data, features=5.0, feature_layers=["blocks.1"], **settings)
    alone = run(copy.deepcopy(other), data, data, **settings)
    missed = by_hand(outputs_of(other.train(), BLOCKS[1:], x), outputs_of(teacher, BLOCKS[1:], x))
    extra = [ours - wanted for ours, wanted in zip(history.losses, alone.losses, strict=True)]
    assert extra == [0, pytest.approx(5 * float(missed), rel=1e-4)]
    assert [step["task"] for step in history.steps] == pytest.approx([step["task"] for step in alone.steps], rel=1e-5)
    assert hooks_of(dynamic) == before
    assert (history.settings["features"], alone.settings["features"]) == (5.0, 0.0)


def test_features_come_nearer():
    """Without labels, where every sample takes half of the channels."""
    shares = {}
    for weight in (0.0, 20.0):
        dynamic = network(cheap="pointwise")
        for layer in redconvert.layers.dynamic_layers(dynamic).values():
            layer.gate.beta.data.copy_(torch.tensor([-1.0, 1.0]))
        teacher = frozen_original(dynamic)
        inputs = [x for x, _ in batches()]
        run(dynamic, inputs, epochs=10, lr=0.02, features=weight, efficiency=0.0, clip=5.0, gate_every=2)
        features = FeatureLoss(dynamic, teacher)
        with torch.no_grad():
            dynamic(inputs[0]), teacher(inputs[0])
            shares[weight] = float(features())
    assert shares[20.0] < 0.8 * shares[0.0]


@pytest.mark.parametrize("dims", [2, 3])
def test_gradient_checkpointing_changes_nothing(dims):
    dynamic = undecided(network(dims, dropout=0.3))
    losses = [
        run(
            copy.deepcopy(dynamic), batches(8, 3, dims), epochs=2, lr=0.05, target=0.6, features=3.0, gate_every=3,
            feature_layers=layers, gradient_checkpointing=again, clip=5.0,
        ).losses
        for layers in (None, ["blocks.0.1", "blocks.1.0"])  # within what is computed again, too
        for again in (False, True)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[2] == pytest.approx(losses[3], rel=1e-6)
    assert losses[0] != losses[2]


def test_interrupted_and_resumed(tmp_path):
    settings = {"epochs": 2, "lr": 0.1, "features": 5.0, "gate_every": 2}
    whole = undecided(network())
    wanted = run(whole, batches(), **settings)
    dynamic = undecided(network())
    before = hooks_of(dynamic)
    with pytest.raises(KeyboardInterrupt):
        run(dynamic, Interrupted(batches()), out=tmp_path, **settings)
    assert hooks_of(dynamic) == before
    history = run(dynamic, batches(), out=tmp_path, **settings)
    assert history.steps == wanted.steps and same_state(dynamic, state_of(whole))
    with pytest.raises(RedconvertError, match=r"is of a run with features=5.0, this one has 4.0"):
        run(dynamic, batches(), out=tmp_path, **settings | {"features": 4.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": -1.0}, "features=-1.0 must be a number of at least 0"),
        ({"features": 1.0, "gate_every": 1}, r"features=1\.0 is left out of steps in which gates learn.*gate_every=8"),
        ({"features": 1.0, "teacher": None}, "features are compared with those of a network, not of a NoneType: pass"),
        ({"features": 1.0, "feature_layers": ["head.9"]}, "no module 'head.9'"),
        ({"feature_layers": ["head"]}, "feature_layers says where, and features=0 that nothing is compared"),
    ],
)
def test_bad_settings(settings, message):
    dynamic = undecided(network())
    state, before = state_of(dynamic), hooks_of(dynamic)
    with pytest.raises(RedconvertError, match=message):
        run(dynamic, batches(), **{"gate_every": 8} | settings)
    assert same_state(dynamic, state) and hooks_of(dynamic) == before
