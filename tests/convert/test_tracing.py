"""How networks are read, what is learnt of each convolution, and that reading leaves no trace."""

from __future__ import annotations

import pytest
import torch
import traps
from networks import snapshot, unchanged
from torch import nn

import redconvert
from redconvert.convert import trace

CLIP = torch.ones(traps.X3)


def facts_of(model, inputs=CLIP):
    plan = redconvert.plan(model, example_inputs=inputs)
    return plan, {verdict.name: verdict.facts for verdict in plan.verdicts}


def test_fx():
    model = nn.Sequential(traps.conv3(), nn.BatchNorm3d(16), nn.ReLU(), traps.conv3(16, 16), nn.ReLU())
    plan, facts = facts_of(model)
    assert plan.source == "fx" and plan.problem is None
    assert facts["0"].norm == "1" and facts["0"].feeds_norm and not facts["0"].is_output
    assert facts["3"].norm is None and not facts["3"].feeds_norm
    assert (facts["3"].calls, facts["3"].input_shape) == (1, (2, 16, 4, 8, 8))
    dynamic = redconvert.convert(model, example_inputs=CLIP)
    assert (dynamic[0].feeds_norm, dynamic[3].feeds_norm) == (True, False)
    assert (dynamic[0].gate.num_frames, dynamic[3].gate.num_frames) == (4, 4)
    assert redconvert.convert(model)[0].gate.num_frames == 8  # without an example


def test_two_readers_are_no_norm():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = traps.conv3(), nn.BatchNorm3d(16)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    _, facts = facts_of(Residual())
    assert not facts["conv"].feeds_norm and facts["conv"].norm is None


def test_fx_in_parts():
    plan, facts = facts_of(traps.Branches())
    assert plan.source == "fx in parts" and "Proxy" in plan.problem
    assert facts["body.0"].norm == "body.1" and facts["body.0"].source == "fx in parts"
    assert not facts["body.3"].feeds_norm and not facts["body.3"].is_output
    assert facts["body.3"].calls == 1 and facts["body.3"].output_shape == (2, 16, 4, 8, 8)
    assert facts["rare"].calls == 0
    assert "(2 of 3" in f"({len(plan.converted)} of {len(plan.verdicts)}" and "read by fx in parts" in str(plan)


def test_one_forward_pass():
    plan, facts = facts_of(traps.FlatBranches())
    assert plan.source == "forward" and {fact.source for fact in facts.values()} == {"forward"}
    assert facts["second"].input_shape == (2, 16, 4, 8, 8) and not facts["second"].feeds_norm
    assert len(plan.converted) == 2


def test_the_module_tree():
    plan, facts = facts_of(traps.FlatBranches(), inputs=None)
    assert plan.source == "module tree" and facts["first"].calls is None and facts["first"].input_shape is None
    assert len(plan.converted) == 2 and plan.dense_macs is None and plan.lowest_macs is None


def test_the_output_layer():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.pool = traps.conv3(), nn.Conv3d(16, 8, 1), nn.AdaptiveAvgPool3d(1)

        def forward(self, x):
            return self.pool(self.head(self.conv(x).relu())).flatten(1).softmax(1)

    plan, facts = facts_of(Head())
    assert facts["head"].is_output and not facts["conv"].is_output
    assert [v.reason for v in plan.skipped] == ["the output layer (a rule can include it)"]
    config = redconvert.ConvertConfig(rules={"head": {}})
    assert len(redconvert.plan(Head(), config, example_inputs=CLIP).converted) == 2


def test_subclasses_are_leaves():
    """r3d_18's convolutions are a subclass outside torch.nn, through which plain fx traces."""
    model = nn.Sequential(traps.Inherits(3, 16), nn.BatchNorm3d(16))
    _, facts = facts_of(model)
    assert facts["0"].norm == "1" and facts["0"].source == "fx"


@pytest.mark.parametrize(
    "build",
    [traps.Remembers, traps.Branches, traps.FlatBranches, traps.Uncopiable, lambda: traps.Uncopiable(branch=True)],
)
@pytest.mark.parametrize("inputs", [None, CLIP])
@pytest.mark.parametrize("training", [True, False])
def test_reading_leaves_no_trace(build, inputs, training):
    model = build().train(training)
    if hasattr(model, "drop"):
        model.drop.train(not training)  # flags are the user's, module by module
    before, values = snapshot(model), dict(vars(model))
    plan = redconvert.plan(model, example_inputs=inputs)
    assert unchanged(model, before)
    assert len(plan.converted) >= 1
    assert vars(model) == values
    assert getattr(model, "last", None) is None and getattr(model, "history", []) == []
    assert all(type(t) in (nn.Parameter, torch.Tensor) for t in [*model.parameters(), *model.buffers()])


def test_a_network_that_cannot_be_copied():
    with pytest.raises(redconvert.RedconvertError, match=r"Uncopiable cannot be copied.*pass inplace=True"):
        redconvert.convert(traps.Uncopiable(), example_inputs=CLIP)
    model = traps.Uncopiable()
    assert redconvert.convert(model, example_inputs=CLIP, inplace=True) is model
    assert isinstance(model.conv, redconvert.DynamicConv3d)


@pytest.mark.parametrize("build", [traps.Remembers, traps.FlatBranches])
def test_hooks_do_not_see_the_reading(build):
    model = build()
    seen = []
    model.register_forward_hook(lambda *_: seen.append("after"))
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    first = next(m for m in model.modules() if isinstance(m, nn.Conv3d))
    first.register_forward_pre_hook(lambda *_: seen.append("conv"))
    dynamic = redconvert.convert(model, example_inputs=CLIP)
    assert build is traps.FlatBranches or seen == []
    seen.clear()
    dynamic(CLIP)
    assert seen == ["before", "conv", "after"]


def test_the_inputs_are_not_changed():
    clips = [CLIP.clone(), CLIP.clone()]
    kept = list(clips)
    redconvert.convert(traps.ListIn(), example_inputs=clips)
    assert clips[0] is kept[0] and clips[1] is kept[1] and torch.equal(clips[0], CLIP)


def test_a_large_network_is_read_without_numbers():
    """Weights on the meta device have shapes alone: enough for a plan."""
    model = nn.Sequential(nn.Conv3d(512, 4096, 3, padding=1, device="meta"), nn.ReLU())
    plan = redconvert.plan(model, example_inputs=torch.empty(1, 512, 8, 14, 14, device="meta"))
    assert plan.dense_macs == 4096 * 8 * 196 * 512 * 27 and len(plan.converted) == 1


def test_trace_by_itself():
    result = trace(nn.Sequential(traps.conv3()), CLIP)
    assert result["0"].calls == 1 and result["nowhere"].calls is None
