"""Frozen networks traced, compiled and exported; and what freeze refuses, with nothing changed."""

from __future__ import annotations

import pytest
import torch
from frozen_networks import Frames, Video, frames, same, state, video
from reference import relative_error
from torch.nn.utils import prune

from redconvert import RedconvertError
from redconvert.deploy import freeze
from redconvert.deploy.plain import RebuildFrames

EXACT = 1e-10  # float64
NETWORKS = {"video": video, "frames": frames}


# -- other ways to run it ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_traced_compiled_and_scripted_by_example(name):
    dynamic, x = NETWORKS[name]()
    frozen = freeze(dynamic, (1, 1))
    wanted = frozen(x)
    assert relative_error(torch.fx.symbolic_trace(frozen)(x), wanted) < EXACT
    assert relative_error(torch.jit.trace(frozen, x)(x), wanted) < EXACT
    torch._dynamo.reset()
    assert relative_error(torch.compile(frozen, fullgraph=True, backend="aot_eager")(x), wanted) < EXACT


@torch.no_grad()
def test_exported_with_any_batch_and_clip_length():
    frozen = freeze(video()[0], (1, 1))
    batch, clip = torch.export.Dim("batch", max=64), torch.export.Dim("clip", min=5, max=64)
    x = torch.randn(3, 3, 9, 12, 10).double()
    exported = torch.export.export(frozen, (x,), dynamic_shapes=({0: batch, 2: clip},)).module()
    for shape in ((3, 3, 9, 12, 10), (2, 3, 5, 12, 10), (5, 3, 16, 12, 10), (1, 3, 7, 12, 10)):
        x = torch.randn(shape).double()
        assert relative_error(exported(x), frozen(x)) < EXACT


# -- refusals ------------------------------------------------------------------------------------------


BAD = {
    "neither": ({}, "either a policy or batches"),
    "both": ({"policy": (1, 0), "batches": [torch.zeros(1)]}, "either a policy or batches"),
    "unknown": ({"policy": {"stem.9": (1, 0)}}, r"'stem.9' matches none of the 5 dynamic layers \(stem.0, "),
    "unknown later": ({"policy": {"stem.0": (1, 0), "*x": (1, 0)}}, "matches none"),
    "regex": ({"policy": {"re:[": (1, 0)}}, "not a regular expression"),
    "name": ({"policy": {3: (1, 0)}}, "maps layer names or globs"),
    "channel": ({"policy": (2, 0)}, r"has channel candidate 2; the largest index is 1"),
    "temporal": ({"policy": {"down": (0, 5)}}, r"has temporal candidate 5; the largest index is 1"),
    "negative": ({"policy": (-1, 0)}, "not a pair"),
    "one": ({"policy": 1}, "not a pair"),
    "three": ({"policy": (1, 0, 0)}, "not a pair"),
    "bool": ({"policy": (True, False)}, "not a pair"),
    "only": ({"policy": (1, 0), "only_constant": True}, "needs batches"),
    "empty": ({"batches": []}, "batches is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_change_nothing(case):
    dynamic, _ = video()
    before, (arguments, message) = state(dynamic), BAD[case]
    with pytest.raises(RedconvertError, match=message):
        freeze(dynamic, **arguments, inplace=True)
    assert same(before, state(dynamic))


def test_what_is_no_dynamic_network():
    with pytest.raises(RedconvertError, match="Video has no dynamic layers"):
        freeze(Video(), (1, 0))
    with pytest.raises(RedconvertError, match="not function"):
        freeze(test_refusals_change_nothing, (1, 0))
    with pytest.raises(RedconvertError, match="Video has no dynamic layers"):
        freeze(freeze(video()[0], (1, 1)), (1, 1))


def test_weights_that_are_not_stored():
    dynamic, _ = video()
    prune.l1_unstructured(dynamic.down, "weight", amount=0.5)
    with pytest.raises(RedconvertError, match="weight of layer 'down' is computed"):
        freeze(dynamic, (1, 1))
    with pytest.raises(RedconvertError, match="meta device"):
        freeze(video()[0].to("meta"), (1, 1))


@torch.no_grad()
def test_a_failure_half_way_changes_nothing(monkeypatch):
    dynamic, _ = video()
    before, count = state(dynamic), []

    def fail(*args):
        count.append(args)
        raise KeyError("the last of the parts")

    monkeypatch.setattr(RebuildFrames, "__init__", fail)
    with pytest.raises(KeyError):
        freeze(dynamic, (1, 1), inplace=True)
    assert count and same(before, state(dynamic))


@torch.no_grad()
def test_a_batch_of_parts_of_clips():
    dynamic, x = frames()
    with pytest.raises(RedconvertError, match=r"takes batches \(N \* 5, C, H, W\) of whole clips"):
        freeze(dynamic, (1, 1))(x[:7])
    assert isinstance(dynamic, Frames)
