"""Networks that users write or take from other libraries: converted bit-equal, and trained one step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import user_networks as nets
from networks import snapshot, unchanged
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from user_networks import Case, image

import redconvert
from redconvert.inputs import as_arguments
from redconvert.layers import DynamicConv, dynamic_layers

CASES: dict[str, Case] = {
    "functional U-Net": Case(
        lambda: (nets.FunctionalUNet(), image(2, 3, 16, 16)),
        converted=(5, 6),
        skipped={"up1": "transposed or 1D"},
        functional=("conv2d()",) * 3,
    ),
    "Siamese": Case(lambda: (nets.Siamese(), (image(2, 3, 16, 16), image(2, 3, 16, 16).flip(3))), converted=(2, 2)),
    "recurrent": Case(lambda: (nets.Recurrent(), image(2, 3, 3, 16, 16)), converted=(3, 3), source="fx in parts"),
    "weight normalisation": Case(
        lambda: (nets.WeightNorm(), image(2, 3, 12, 12)), converted=(2, 3), skipped={"second": "parametrised (weight)"}
    ),
    "checkpointed": Case(lambda: (nets.Checkpointed(), image(2, 3, 4, 8, 8)), converted=(4, 4)),
    "VideoMAE": Case(nets.video_mae, converted=(1, 1), source="forward"),
    "BiT": Case(nets.bit, converted=(9, 9), source="fx in parts"),
    "Unet": Case(nets.unet, converted=(30, 31), skipped={"segmentation_head.0": "the output layer"}),
    "PSPNet": Case(
        nets.pspnet,
        converted=(37, 87),
        source="fx in parts",
        untaught=15,
        skipped={"encoder._conv_head": "unused", "encoder._blocks.0._se_reduce": "too small to pay"},
    ),
    "Faster R-CNN": Case(
        nets.faster_rcnn,
        converted=(5, 6),
        source="fx in parts",
        skipped={"rpn.head.cls_logits": "too small to pay"},
        loss=nets.detection_loss,
    ),
}


def call(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(1)
    args, kwargs = as_arguments(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs))
    return model(*args, **kwargs)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor that the network returns in ``eval()``."""
    result = call(model.eval(), inputs)
    leaves = tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def squares(model: nn.Module, inputs: Any) -> Tensor:
    result = call(model, inputs)
    leaves = tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return sum(leaf.square().mean() for leaf in leaves if isinstance(leaf, Tensor))  # type: ignore[return-value]


def step(model: nn.Module, case: Case, inputs: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss in ``train()`` and every parameter's gradient; buffers stay as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train().zero_grad()
    torch.manual_seed(2)
    loss = (case.loss or squares)(model, inputs)
    loss.backward()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_converts_and_trains(name):
    case = CASES[name]
    model, inputs = case.build()
    dense = outputs(model, inputs)
    assert all(tensor.isfinite().all() and tensor.numel() for tensor in dense)
    assert any(tensor.is_floating_point() and tensor.unique().numel() > 1 for tensor in dense)
    before = snapshot(model)

    plan = redconvert.plan(model, example_inputs=inputs)
    assert (len(plan.converted), len(plan.verdicts)) == case.converted
    assert (plan.source, plan.functional) == (case.source, case.functional)
    reasons = {verdict.name: verdict.reason for verdict in plan.skipped}
    for layer, reason in case.skipped.items():
        assert reason in reasons[layer]

    dynamic = redconvert.convert(model, example_inputs=inputs)
    assert type(dynamic) is type(model) and unchanged(model, before)
    assert [key for key in dynamic.state_dict() if key in before["state"]] == list(before["state"])
    assert same(outputs(dynamic, inputs), dense)
    with redconvert.forced(dynamic, channel=1):
        assert not same(outputs(dynamic, inputs), dense)

    check_one_step(model, dynamic, case, inputs)

    redconvert.revert(dynamic)
    assert {path: type(module) for path, module in dynamic.named_modules()} == before["classes"]


def check_one_step(model: nn.Module, dynamic: nn.Module, case: Case, inputs: Any) -> None:
    """The loss of the dense network to the bit, its gradients, gradients for every gate, and an update that helps."""
    loss, dense = step(copy.deepcopy(model), case, inputs)
    with redconvert.forced(dynamic, channel=0, temporal=0):
        full_loss, full = step(dynamic, case, inputs)
    assert torch.equal(full_loss, loss)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in dense.values()) >= 4
    # A convolution before a batch norm has a bias whose gradient is nothing but rounding.
    largest = max(gradient.abs().max() for gradient in dense.values() if gradient is not None)
    for key, gradient in dense.items():
        assert (full[key] is None) == (gradient is None), key
        if gradient is not None:
            assert (full[key] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6 * largest, key

    free_loss, free = step(dynamic, case, inputs)
    assert torch.equal(free_loss, loss)
    assert all(gradient.isfinite().all() for gradient in free.values() if gradient is not None)
    layers = list(dynamic_layers(dynamic))
    taught = [layer for layer in layers if dense[f"{layer}.weight"] is not None]
    assert len(layers) - len(taught) == case.untaught
    for layer in taught:
        assert free[f"{layer}.gate.beta"].abs().max() > 0, layer
        assert free[f"{layer}.weight"].abs().max() > 0, layer

    gradients = [gradient for gradient in free.values() if gradient is not None]
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
    torch.optim.SGD(dynamic.parameters(), lr=float(1e-3 * loss / norm**2)).step()
    assert step(dynamic, case, inputs)[0] < loss


def test_shared_trunk_is_converted_once():
    model, inputs = CASES["Siamese"].build()
    plan = redconvert.plan(model, example_inputs=inputs)
    assert [verdict.facts.calls for verdict in plan.verdicts] == [2, 2]
    dynamic = redconvert.convert(model, example_inputs=inputs).eval()
    # Each call decides for itself: only the second input's trunk is reduced where the batch says so.
    seen: list[int] = []
    with redconvert.layers.observed(dynamic, lambda layer, what: seen.append(len(what.decisions))):
        dynamic(*inputs)
    assert seen == [2] * 4


def test_a_loop_counts_every_step():
    model, inputs = CASES["recurrent"].build()
    plan = redconvert.plan(model, example_inputs=inputs)
    calls = {verdict.name: verdict.facts.calls for verdict in plan.verdicts}
    assert calls == {"stem.0": 3, "gates": 3, "candidate": 3}
    # 3 steps of 32 x 32 x 9 weights at 8 x 8 positions.
    (gates,) = [verdict for verdict in plan.verdicts if verdict.name == "gates"]
    assert gates.dense_macs == 3 * 32 * 32 * 9 * 64


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("whole", [True, False])
def test_torchscript_is_refused(whole):
    """All of it, or a part inside a Python network: the message names it, and the network still runs."""
    siamese = nets.Siamese().eval()
    if whole:
        model: nn.Module = torch.jit.script(siamese)
        inputs: Any = (image(2, 3, 16, 16), image(2, 3, 16, 16))
        where = "the model is scripted"
    else:
        model, inputs = nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(siamese.trunk)), image(2, 3, 16, 16)
        where = "'1' is scripted"
    dense = call(model, inputs)
    for attempt in (redconvert.plan, redconvert.convert):
        with pytest.raises(redconvert.RedconvertError, match=f"{where} with TorchScript.*before torch.jit"):
            attempt(model, example_inputs=inputs)
    assert torch.equal(call(model, inputs), dense)
    assert not any(isinstance(module, DynamicConv) for module in model.modules())


def test_images_with_a_time_axis_inside():
    """A 2D input that the network itself gives a time axis of length 1 is no clip that is too short."""

    class Lifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 16, (1, 3, 3), padding=(0, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.unsqueeze(2)).relu()

    model, x = Lifts().eval(), image(2, 3, 8, 8)
    (verdict,) = redconvert.plan(model, example_inputs=x).converted
    assert (verdict.reason, verdict.channels, verdict.strides) == ("channels only: one output frame", (16, 8), (1,))
    dynamic = redconvert.convert(model, example_inputs=x)
    assert torch.equal(dynamic(x), model(x))
    with redconvert.forced(dynamic, channel=1):
        assert not torch.equal(dynamic(x), model(x))
