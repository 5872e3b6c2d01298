"""Precision, memory layout, autocast, copies, torch.compile and torch.export."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from reference import build, open_all, randomize, reference, relative_error
from torch import nn

from redconvert import DynamicConv2d, LayerConfig, RedconvertError, forced

CONV3D = {"dims": 3, "shape": (4, 5, 6, 7, 6), "in_channels": 5, "out_channels": 12, "kernel_size": 3, "padding": 1}
CONV2D = {**CONV3D, "dims": 2, "shape": (4, 5, 7, 6)}
FOLDED = {**CONV3D, "dims": 2, "shape": (12, 5, 7, 6), "num_frames": 3}
CONVS = {"3d": CONV3D, "2d": CONV2D, "folded": FOLDED}
LAYOUT = {3: torch.channels_last_3d, 2: torch.channels_last}
MIXED = {"channel": [0, 1, 1, 0], "temporal": [0, 1, 0, 1]}


def decide_for(spec):
    return {"channel": MIXED["channel"]} if spec is CONV2D else MIXED


# -- precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONVS)
@torch.no_grad()
def test_low_precision(name, dtype):
    spec = CONVS[name]
    layer, plain, x = build({**spec, "dtype": dtype})
    for training in (True, False):
        out = layer.train(training)(x)
        assert out.dtype == dtype and torch.equal(out, plain(x))
    layer.eval()
    wide, wide_plain, wide_x = copy.deepcopy(layer).double(), copy.deepcopy(plain).double(), x.double()
    tolerance = 0.01 if dtype == torch.float16 else 0.06
    for i in range(2):
        for j in range(len(layer.candidates.strides)):
            with forced(layer, channel=i, temporal=j):
                wanted = reference(wide, wide_plain, wide_x, i, j)
                assert relative_error(layer(x).double(), wanted) < tolerance
    with forced(layer, **decide_for(spec)), forced(wide, **decide_for(spec)):
        assert relative_error(layer(x).double(), wide(wide_x)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_low_precision_trains(gate, dtype):
    layer, _, x = build({**CONV3D, "dtype": dtype, "config": LayerConfig(gate=gate, search_space=3)})
    randomize(layer)
    layer(x).float().square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("training", [True, False])
def test_autocast(name, training):
    layer, plain, x = build(CONVS[name])
    layer.train(training)
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = layer(x), plain(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)
    randomize(layer, gates=False)
    with forced(layer, **decide_for(CONVS[name])):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
            out.float().square().mean().backward()
        gradient = layer.weight.grad.clone()
        layer.zero_grad()
        full = layer(x)
        full.square().mean().backward()
    assert out.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    assert relative_error(out.float(), full) < 0.06
    assert relative_error(gradient, layer.weight.grad) < 0.1


# -- layout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVS)
@torch.no_grad()
def test_channels_last(name):
    torch.set_num_threads(2)  # on one thread PyTorch's own 1x1x1 convolution leaves channels_last_3d
    try:
        check_channels_last(name)
    finally:
        torch.set_num_threads(1)


def check_channels_last(name):
    spec = {**CONVS[name], "out_channels": 32}  # large enough for PyTorch to take its blocked kernels
    spec["shape"] = {"3d": (4, 16, 6, 24, 24), "2d": (4, 16, 40, 40), "folded": (16, 16, 40, 40)}[name]
    spec.update({"in_channels": 16, **({"num_frames": 4} if name == "folded" else {})})
    layer, plain, x = build(spec)
    randomize(layer, gates=False).eval()
    layout = LAYOUT[spec["dims"]]
    last = x.to(memory_format=layout)
    for decision in (
        {"channel": 0, "temporal": 0},
        {"channel": 1, "temporal": 0},
        *([] if name == "2d" else [{"channel": 0, "temporal": 1}, {"channel": 1, "temporal": 1}]),
        decide_for(CONVS[name]),
    ):
        with forced(layer, **decision):
            for training in (False, True):
                layer.train(training).gate.norm.eval()
                assert relative_error(layer(last), layer(x)) < 1e-5
                assert layer(last).is_contiguous(memory_format=layout), (decision, training)
                assert layer(x).is_contiguous(), (decision, training)
    assert plain(last).is_contiguous(memory_format=layout)


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_batch_of_one_keeps_its_strides(kernel_size):
    """Channels last or contiguous: the stride of an axis of length 1 tells, and the choice of kernel follows it."""
    plain = nn.Conv2d(512, 640, kernel_size)
    layer = DynamicConv2d(512, 640, kernel_size, config=LayerConfig())
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 4, 4, 512).permute(0, 3, 1, 2)
    for training in (False, True):
        out, wanted = layer.train(training)(x), plain(x)
        assert out.stride() == wanted.stride() and torch.equal(out, wanted)


def test_a_slice_of_a_larger_tensor():
    layer, _, x = build(CONV3D)
    randomize(layer).eval()
    wide = torch.randn(4, 10, 6, 7, 12)
    wide[:, ::2, :, :, ::2] = x
    assert relative_error(layer(wide[:, ::2, :, :, ::2]), layer(x)) < 1e-5


# -- copies, unbatched ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["3d", "2d"])
@torch.no_grad()
def test_unbatched(name):
    layer, plain, x = build(CONVS[name])
    for training in (True, False):
        assert torch.equal(layer.train(training)(x[0]), plain(x[0]))
    randomize(layer).eval()
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


@torch.no_grad()
def test_a_folded_layer_is_never_unbatched():
    layer, _, x = build(FOLDED)
    with pytest.raises(RedconvertError, match=r"takes \(N, C, H, W\) with C = 5"):
        layer(x[0])


@pytest.mark.parametrize("name", CONVS)
@torch.no_grad()
def test_copies(name):
    layer, _, x = build(CONVS[name])
    randomize(layer).eval()
    wanted, state = layer(x), layer.state_dict()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and twin.config == layer.config and twin.candidates == layer.candidates
        assert torch.equal(twin(x), wanted)
        assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}
        with forced(twin, channel=[0, 1, 0, 1]):
            assert not torch.equal(twin(x), wanted)
        assert torch.equal(layer(x), wanted)


def test_repr_and_keys():
    layer, plain, _ = build(CONV3D)
    assert "channels=(12, 6), frame_strides=(1, 2), gate='hard'" in repr(layer)
    added = set(layer.state_dict()) - set(plain.state_dict())
    assert {key.split(".")[0] for key in added} == {"gate", "cheap_c", "cheap_t"}
    assert isinstance(layer, nn.Conv3d)


# -- compile and export --------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("name", CONVS)
def test_compile(name, gate):
    torch._dynamo.reset()
    layer, _, x = build({**CONVS[name], "dtype": torch.float64, "config": LayerConfig(search_space=3, gate=gate)})
    open_all(randomize(layer, gates=False))
    layer.gate.norm.eval()
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        for training in (True, False):
            layer.train(training).gate.norm.eval()
            layer.zero_grad()
            point = x.clone().requires_grad_()
            out = run(point)
            out.square().mean().backward()
            results.append([out, point.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    eager, compiled = results[:2], results[2:]
    assert len(eager[0]) == 2 + len(list(layer.parameters()))
    for a, b in zip(eager[0], compiled[0], strict=True):  # training: values and all gradients
        assert relative_error(b, a) < 1e-10
    assert relative_error(compiled[1][0], eager[1][0]) < 1e-10


@torch.no_grad()
def test_compile_of_mixed_decisions():
    torch._dynamo.reset()
    layer, _, x = build({**CONV3D, "dtype": torch.float64, "config": LayerConfig(search_space=3)})
    randomize(layer).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) < 1e-10
    assert len({tuple(row) for row in torch.stack([w.argmax(1) for w in layer._weights(x, x.mean((-2, -1)))], 1)}) > 1


@pytest.mark.parametrize("name", CONVS)
@torch.no_grad()
def test_export(name):
    layer, _, x = build(CONVS[name])
    randomize(layer).eval()
    exported = torch.export.export(layer, (x,))
    assert relative_error(exported.module()(x), layer(x)) < 1e-5
    other = torch.randn_like(x)
    assert relative_error(exported.module()(other), layer(other)) < 1e-5


@torch.no_grad()
def test_export_at_birth_is_exact():
    layer, plain, x = build(CONV3D)
    exported = torch.export.export(layer.eval(), (x,))
    assert relative_error(exported.module()(x), plain(x)) < 1e-6


def test_compiled_subclass_of_the_public_class():
    torch._dynamo.reset()
    layer = DynamicConv2d(3, 8, 3).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
