"""Public networks, converted: the same class, keys, parameters and hooks, and outputs equal to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import NETWORKS, equal, run, snapshot, unchanged
from torch import nn

import redconvert
from redconvert.layers import DynamicConv, dynamic_layers

CONVERTED = {  # how many of how many convolutions, with the defaults and example inputs
    "r2plus1d_18": (37, 37),
    "r3d_18": (20, 20),
    "s3d": (77, 78),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_converted_equals_original(name):
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    model.eval()
    dense = run(model, inputs)
    trained = copy.deepcopy(model)
    dense_trained = run(trained, inputs, training=True)
    before = snapshot(model)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())

    plan = redconvert.plan(model, example_inputs=inputs)
    assert unchanged(model, before)
    calls: list[str] = []
    hooked = plan.converted[0].name
    handle = model.get_submodule(hooked).register_forward_hook(lambda *_: calls.append("hook"))
    model.register_forward_pre_hook(lambda *_: calls.append("model"))

    dynamic = redconvert.convert(model, example_inputs=inputs, inplace=True)
    assert dynamic is model and type(model) is before["classes"][""]
    layers = dynamic_layers(model)
    assert [v.name for v in plan.converted] == list(layers) and len(layers) >= 10
    if name in CONVERTED:
        assert (len(layers), len(plan.verdicts)) == CONVERTED[name]

    # Keys: those of before, and gates and cheap operations of the converted layers.
    assert [key for key in model.state_dict() if key in set(keys)] == keys
    for key in set(model.state_dict()) - set(keys):
        layer = max((n for n in layers if key.startswith(f"{n}.")), key=len)
        assert key[len(layer) + 1 :].startswith(("gate.", "cheap_c.", "cheap_t."))
    missing, unexpected = model.load_state_dict(before["state"], strict=False)
    added = set(model.state_dict()) - set(keys)
    assert not unexpected  # PyTorch's norms fill in num_batches_tracked where a checkpoint has none
    assert set(missing) == {key for key in added if not key.endswith("gate.norm.num_batches_tracked")}
    now = dict(model.named_parameters())
    assert all(now[key] is parameter for key, parameter in parameters.items())
    for path, cls in before["classes"].items():
        assert isinstance(model.get_submodule(path), cls)

    # Values: inference, training, and buffers after training.
    assert equal(run(model, inputs), dense)
    assert calls == ["model", "hook"]
    handle.remove()
    twin = _without_hooks(copy.deepcopy(model))
    if name != "x3d_m":  # pytorchvideo's own holds lambdas
        twin = pickle.loads(pickle.dumps(twin))
    assert type(twin) is type(model)
    assert equal(run(twin, inputs, training=True), dense_trained)
    state = twin.state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())
    assert equal(run(twin, inputs), run(trained, inputs))
    assert calls == ["model", "hook"]

    # And back.
    assert redconvert.revert(model) is model
    assert list(model.state_dict()) == keys
    model._forward_pre_hooks.clear()
    torch.set_rng_state(before["rng"])
    assert unchanged(model, before)
    assert equal(run(model, inputs), dense)


def _without_hooks(model: nn.Module) -> nn.Module:
    """Lambdas do not pickle."""
    model._forward_pre_hooks.clear()
    return model


@pytest.mark.parametrize("name", ["r2plus1d_18", "slowfast", "resnet50"])
def test_reduced_decisions_change_the_answer(name):
    """Equality above would also hold for layers that never decide: they do, in eval and in training."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    dynamic = redconvert.convert(model.eval(), example_inputs=inputs)
    dense = run(model, inputs)
    with redconvert.forced(dynamic, channel=1, temporal=1 if name != "resnet50" else 0):
        reduced = run(dynamic, inputs)
        for layer in dynamic_layers(dynamic).values():
            layer.gate.norm.eval()
    assert not equal(reduced, dense)
    assert equal(run(dynamic, inputs), dense)


@pytest.mark.parametrize("name", ["r3d_18", "nf_resnet50", "x3d_m"])
def test_a_training_step(name):
    """Without the gates' own pull on their inputs, each parameter gets the gradient that it had before."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    dynamic = redconvert.convert(model, example_inputs=inputs)

    def gradients(network: nn.Module) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(2)
        network.zero_grad()
        network.train()(inputs).square().mean().backward()
        return {key: parameter.grad for key, parameter in network.named_parameters()}

    dense = gradients(model)
    with redconvert.forced(dynamic, channel=0, temporal=0):
        full = gradients(dynamic)
    for key, gradient in dense.items():
        assert (full[key] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-8, key
    assert all(full[key] is None for key in full if ".gate." in key)
    for key, gradient in gradients(dynamic).items():
        assert gradient is not None and gradient.isfinite().all(), key
        if name == "r3d_18":  # the others close their residual branches
            assert (gradient != 0).any(), key


def test_no_dynamic_layer_is_left_after_revert():
    model, inputs = NETWORKS["resnet50"]()
    dynamic = redconvert.convert(model, example_inputs=inputs)
    assert dynamic is not model and not any(isinstance(m, DynamicConv) for m in model.modules())
    redconvert.revert(dynamic)
    assert [type(m) for m in dynamic.modules()] == [type(m) for m in model.modules()]
    with pytest.raises(redconvert.RedconvertError, match="no dynamic layers"):
        redconvert.revert(dynamic)
