"""What conversion refuses: with the reason, and the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import traps
from networks import snapshot, unchanged
from torch import nn

import redconvert
from redconvert import ConvertConfig, RedconvertError
from redconvert.convert import rewrite

CLIP = torch.ones(traps.X3)


def small():
    return nn.Sequential(traps.conv3(), nn.BatchNorm3d(16), nn.ReLU(), nn.Dropout(), traps.conv3(16, 16), nn.ReLU())


def poisoned(value):
    model = small()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0, 0] = value
    return model


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def distributed():
    """A DDP module without a process group: only its type is looked at."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = small()
    return wrapped


REFUSED = {
    "no convolutions": (lambda: nn.Sequential(nn.Linear(3, 3)), "nothing to convert in Sequential: it has no Conv2d"),
    "all skipped": (lambda: nn.Sequential(traps.conv3()), "all 1 convolutions are skipped: the output layer"),
    "NaN": (lambda: poisoned(float("nan")), "weight of layer '4' holds NaN or infinite"),
    "infinite": (lambda: poisoned(float("inf")), "weight of layer '4' holds NaN or infinite"),
    "twice": (lambda: redconvert.convert(small()), "'0' is already a dynamic convolution.*revert"),
    "DataParallel": (lambda: nn.DataParallel(small()), r"the model is wrapped in DataParallel.*\.module"),
    "DDP": (distributed, r"the model is wrapped in DistributedDataParallel.*\(\.module\), then wrap"),
    "DDP inside": (lambda: Wrapper(distributed()), "'inner' is wrapped in DistributedDataParallel"),
    "compiled": (lambda: torch.compile(small()), r"the model is compiled: convert the module inside \(\._orig_mod\)"),
    "compiled inside": (lambda: Wrapper(torch.compile(small())), "'inner' is compiled"),
    "scripted": (lambda: torch.jit.script(small()), "the model is scripted with TorchScript"),
    "traced": (lambda: torch.jit.trace(small().eval(), CLIP), "the model is scripted with TorchScript"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv3d(8, 3)), "'0' is lazy and has no weights yet"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models(name):
    build, words = REFUSED[name]
    model = build()
    before = None if name == "lazy" else snapshot(model)
    for call in (redconvert.plan, redconvert.convert, lambda m: redconvert.convert(m, inplace=True)):
        if call is redconvert.plan and name in ("no convolutions", "all skipped"):
            assert call(model).converted == ()
            continue
        with pytest.raises(RedconvertError, match=words):
            call(model)
        assert before is None or unchanged(model, before)


@pytest.mark.parametrize("model", [None, 3, "resnet50", torch.ones(3), nn.Conv3d, {}])
def test_not_a_module(model):
    with pytest.raises(RedconvertError, match=r"convert takes a torch\.nn\.Module, not "):
        redconvert.convert(model)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.ones(2, 4, 4, 8, 8), r"does not run on example_inputs \(2, 4, 4, 8, 8\)"),
        ((CLIP, CLIP), "does not run on example_inputs"),
        ({"clip": CLIP}, "does not run on example_inputs .*'clip'"),
        ([CLIP], "does not run on example_inputs"),
        ("clip.mp4", "does not run on example_inputs"),
        (torch.ones(2, 3, 1, 8, 8), r"1 frames \(axis 2 .*fewer than the largest temporal stride 2"),
    ],
)
def test_example_inputs(inputs, words):
    model = small()
    model[3].eval()
    before = snapshot(model)
    with pytest.raises(RedconvertError, match=words):
        redconvert.convert(model, example_inputs=inputs, inplace=True)
    assert unchanged(model, before)


def test_clips_shorter_than_the_search_space():
    model = small()
    with pytest.raises(
        RedconvertError, match=r"4 frames .*fewer than the largest temporal stride 8.*smaller search_sp"
    ):
        redconvert.convert(model, ConvertConfig(search_space=4), example_inputs=CLIP)
    redconvert.convert(model, ConvertConfig(search_space=4, temporal=False), example_inputs=CLIP)


def test_folded_frames():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    before = snapshot(model)
    config = ConvertConfig(num_frames=4)
    with pytest.raises(RedconvertError, match="layer '0' gets a batch of 6, no multiple of num_frames=4"):
        redconvert.convert(model, config, example_inputs=torch.ones(6, 3, 8, 8), inplace=True)
    assert unchanged(model, before)
    dynamic = redconvert.convert(model, config, example_inputs=torch.ones(8, 3, 8, 8))
    assert dynamic[0].num_frames == 4 and dynamic[0].candidates.strides == (1, 2)


@pytest.mark.parametrize("config", [{"search_space": 2}, 3, redconvert.LayerConfig()])
def test_configs(config):
    with pytest.raises(RedconvertError, match="config must be a ConvertConfig, not"):
        redconvert.convert(small(), config)


def test_nan_in_what_stays_dense_is_no_matter():
    model = poisoned(float("nan"))
    dynamic = redconvert.convert(model, ConvertConfig(rules={"4": None}), example_inputs=CLIP)
    assert isinstance(dynamic[0], redconvert.DynamicConv3d) and type(dynamic[4]) is nn.Conv3d


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_half_way_is_undone(monkeypatch, error):
    """Memory can run out, and users press Ctrl-C: what was swapped is swapped back."""
    model = small()
    before, wanted = snapshot(model), model.eval()(CLIP)
    before["training"] = {name: module.training for name, module in model.named_modules()}
    real = redconvert.DynamicConv3d.make_dynamic

    def fail_on_the_second(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if kwargs.get("name") == "4":
            raise error("out of memory")

    monkeypatch.setattr(redconvert.DynamicConv3d, "make_dynamic", fail_on_the_second)
    with pytest.raises(error):
        redconvert.convert(model, inplace=True)
    assert unchanged(model, before)
    assert torch.equal(model(CLIP), wanted)


def test_convert_layer_alone():
    conv = traps.conv3()
    state = copy.deepcopy(conv.state_dict())
    weight = conv.weight
    assert rewrite.convert_layer(conv, redconvert.LayerConfig()) is conv
    assert conv.weight is weight and isinstance(conv, redconvert.DynamicConv3d)
    assert list(redconvert.revert(conv).state_dict()) == list(state)
    with pytest.raises(RedconvertError, match="Linear is not a Conv2d or Conv3d"):
        rewrite.convert_layer(nn.Linear(3, 3), redconvert.LayerConfig())
