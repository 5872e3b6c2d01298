"""MACs against numbers written out by hand, and against PyTorch's own counter."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from redconvert.config import LayerConfig
from redconvert.cost import count, dense_macs, executed_macs, layer_macs
from redconvert.layers import DynamicConv2d, DynamicConv3d, forced, observed


def counted(model: nn.Module, *args, **kwargs) -> int:
    """MACs that PyTorch's counter sees when the model runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


class Network(nn.Module):
    """A module made of one function and the modules it is given."""

    def __init__(self, run, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


# -- dense networks ------------------------------------------------------------------------------------


def test_hand_counted_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8x8 -> 4x4
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    macs = dense_macs(model, torch.randn(2, 3, 8, 8))
    stem, grouped, head = 2 * 8 * 4 * 4 * (3 * 9), 2 * 8 * 4 * 4 * (2 * 9), 2 * 8 * 5
    assert macs.by_module == {"": stem + grouped + head, "0": stem, "1": 0, "2": 0, "3": grouped} | {
        "4": 0,
        "5": 0,
        "6": head,
    }
    assert macs.total == stem + grouped + head
    assert (macs.source, macs.unsupported) == ("fvcore", ())


@pytest.mark.parametrize("source", ["fvcore", "flop_counter"])
def test_modules_include_what_they_contain(source, monkeypatch):
    if source == "flop_counter":
        monkeypatch.setattr(count, "_from_fvcore", lambda *args: 1 / 0)
    inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model = nn.Sequential(inner, inner[1], nn.Linear(4, 2), nn.Identity())  # inner[1] is shared: it runs twice
    macs = dense_macs(model, torch.randn(1, 3))
    assert macs.source == source
    assert macs.by_module[""] == macs.total == 12 + 16 + 16 + 8
    assert macs.by_module["0.0"] == 12
    assert macs.by_module["0.1"] == 32
    assert macs.by_module["2"] == 8
    assert macs.by_module["3"] == 0


def video_resnet():
    from torchvision.models.video import r2plus1d_18

    return r2plus1d_18(), torch.randn(1, 3, 4, 32, 32)


def x3d_m():
    from pytorchvideo.models.x3d import create_x3d

    # X3D-M's widths and depths; the head's pooling is made for the input size.
    return create_x3d(input_clip_length=4, input_crop_size=64, depth_factor=2.2), torch.randn(1, 3, 4, 64, 64)


def resnet50():
    import timm

    return timm.create_model("resnet50"), torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("build", [video_resnet, x3d_m, resnet50])
def test_agrees_with_pytorchs_counter_to_the_unit(build):
    model, x = build()
    macs = dense_macs(model, x)
    assert macs.source == "fvcore"
    assert macs.total == counted(model.eval(), x) > 0
    assert macs.by_module == count._from_flop_counter(model, x).by_module


def attend(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("model", "shapes", "expected"),
    [
        (nn.ConvTranspose2d(4, 6, 3, stride=2), [(2, 4, 5, 5)], 2 * 5 * 5 * 4 * 6 * 9),
        (nn.Conv1d(4, 6, 3), [(2, 4, 9)], 2 * 7 * 4 * 6 * 3),
        (nn.Conv3d(4, 6, 3, padding="same"), [(1, 4, 3, 5, 5)], 3 * 5 * 5 * 4 * 6 * 27),
        (nn.Conv2d(4, 6, 3, padding="valid"), [(1, 4, 5, 5)], 3 * 3 * 4 * 6 * 9),
        (Network(lambda self, a, b: a @ b), [(3, 4, 5), (5, 6)], 3 * 4 * 5 * 6),
        (Network(lambda self, a, b: a @ b), [(4, 5), (3, 5, 6)], 3 * 4 * 5 * 6),
        (Network(lambda self, a, b: torch.mm(a, b)), [(4, 5), (5, 6)], 4 * 5 * 6),
        (Network(lambda self, a, b: torch.bmm(a, b)), [(2, 4, 5), (2, 5, 6)], 2 * 4 * 5 * 6),
        (Network(lambda self, c, a, b: torch.addmm(c, a, b)), [(6,), (4, 5), (5, 6)], 4 * 5 * 6),
        (Network(lambda self, c, a, b: torch.baddbmm(c, a, b)), [(2, 4, 6), (2, 4, 5), (2, 5, 6)], 2 * 4 * 5 * 6),
        (Network(lambda self, a, b: torch.einsum("nctv,vw->nctw", a, b)), [(2, 3, 4, 5), (5, 6)], 2 * 3 * 4 * 5 * 6),
        (Network(lambda self, a, b: torch.einsum("...ij,...kj->...ik", a, b)), [(2, 4, 5), (2, 6, 5)], 2 * 4 * 5 * 6),
        # 2 * 2 heads, 3 queries, 7 keys: 5 for each score and 4 for each value
        (Network(attend), [(2, 2, 3, 5), (2, 2, 7, 5), (2, 2, 7, 4)], 2 * 2 * 3 * 7 * (5 + 4)),
    ],
)
def test_operators(model, shapes, expected):
    tensors = tuple(torch.randn(shape) for shape in shapes)
    macs = dense_macs(model, tensors)
    assert macs.source == "fvcore"
    assert macs.total == counted(model, *tensors) == expected


def test_attention_modules_are_not_one_unknown_operator():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    enabled = torch.backends.mha.get_fastpath_enabled()
    projections, mlp, attention = 5 * 8 * (3 * 8 + 8), 5 * 2 * 8 * 16, 2 * 5 * 5 * (4 + 4)
    assert dense_macs(layer, torch.randn(1, 5, 8)).total == projections + mlp + attention
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_unsupported_operators_are_named():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    model = Network(lambda self, x: Double.apply(self.lstm(torch.sigmoid(x) + 1)[0]), lstm=nn.LSTM(3, 4))
    assert dense_macs(model, torch.randn(5, 1, 3)).unsupported == ("aten::lstm", "prim::PythonOp.Double")


def test_dict_outputs_and_outputs_that_nobody_reads():
    def run(self, x):
        self.b(x)  # tracing alone would drop it
        return {"out": [self.a(x)], "size": 3}

    model = Network(run, a=nn.Linear(3, 4), b=nn.Linear(3, 5))
    assert dense_macs(model, torch.randn(2, 3)).by_module == {"": 54, "a": 24, "b": 30}


@pytest.mark.parametrize(
    "inputs",
    [
        [torch.randn(1, 3), torch.randn(2, 3)],
        ([torch.randn(1, 3), torch.randn(2, 3)],),
        {"pathways": [torch.randn(1, 3), torch.randn(2, 3)], "scale": 2.0},
    ],
)
def test_lists_and_keywords(inputs):
    model = Network(lambda self, pathways, scale=1: scale * torch.cat([self.a(p) for p in pathways]), a=nn.Linear(3, 4))
    macs = dense_macs(model, inputs)
    assert (macs.total, macs.source) == (3 * 3 * 4, "fvcore")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_falls_back_where_tracing_fails():
    def run(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("not like this")
        return self.a(x)

    model = Network(run, a=nn.Linear(3, 4), b=nn.ModuleList([nn.Identity()]))
    model.a.register_forward_hook(hook := lambda *args: None)
    macs = dense_macs(model, torch.randn(2, 3))
    assert (macs.total, macs.source) == (24, "flop_counter")
    assert macs.by_module == {"": 24, "a": 24, "b": 0, "b.0": 0}
    # fvcore leaves its hooks behind when it fails
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert len(hooks) == 1 and list(model.a._forward_hooks.values()) == [hook]
    assert not torch.jit.is_tracing()


def test_the_networks_own_error_is_passed_on():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        dense_macs(nn.Linear(3, 4), torch.randn(2, 5))


def test_leaves_the_network_as_it_was(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        dense_macs(model, torch.randn(2, 3, 4, 4))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert not caplog.records
    assert torch.is_grad_enabled()


def test_dynamic_layers_count_as_the_convolutions_they_were():
    model = nn.Sequential(DynamicConv3d(3, 8, 3, padding=1), DynamicConv3d(8, 4, 1))
    with forced(model, channel=1, temporal=1):
        macs = dense_macs(model, torch.randn(2, 3, 4, 5, 5))
    assert macs.by_module["0"] == 2 * 8 * 4 * 5 * 5 * 3 * 27
    assert macs.by_module["1"] == 2 * 4 * 4 * 5 * 5 * 8
    assert macs.total == macs.by_module["0"] + macs.by_module["1"]
    assert all(layer.enabled for layer in model)


# -- dynamic layers ------------------------------------------------------------------------------------


def test_layer_macs_by_hand():
    layer = DynamicConv3d(3, 8, 3, padding=1, config=LayerConfig(cheap="pointwise", gate_hidden=16), gate_frames=4)
    macs = layer_macs(layer, (2, 3, 5, 6, 7), (2, 8, 5, 6, 7))
    assert macs.dense == 8 * 5 * (6 * 7) * (3 * 27)
    assert macs.gate == 3 * 5 * 6 * 7 + 3 * 4 * 16 + 16 * 4
    assert macs.conv == (
        (8 * 5 * 42 * 81, 8 * 3 * 42 * 81),  # every second of 5 frames is 3
        (4 * 5 * 42 * 81, 4 * 3 * 42 * 81),
    )
    assert macs.cheap == (
        (0, 2 * 2 * 42 * 8),  # 2 frames rebuilt from both sides
        (4 * 4 * 5 * 42, 4 * 4 * 3 * 42 + 2 * 2 * 42 * 8),  # 4 channels, each from 4
    )


THREE = {"cheap": "pointwise", "search_space": 3}
CASES = {
    "pointwise": (DynamicConv3d, (4, 8, 3), {"padding": 1}, (2, 4, 6, 5, 5), {"cheap": "pointwise"}),
    "depthwise": (DynamicConv3d, (4, 8, 3), {"padding": "same"}, (2, 4, 5, 5, 5), {"cheap": "depthwise"}),
    "strided": (DynamicConv3d, (4, 13, (3, 1, 1)), {"stride": (2, 1, 1)}, (2, 4, 19, 3, 3), THREE),
    "groups": (DynamicConv3d, (8, 8, 3), {"groups": 4}, (2, 8, 7, 4, 4), {"cheap": "pointwise"}),
    "aligned": (DynamicConv3d, (4, 24, 3), {"padding": 1}, (2, 4, 4, 4, 4), {"cheap": "pointwise", "align": 8}),
    "image": (DynamicConv2d, (4, 10, 3), {"stride": 2, "padding": 1}, (2, 4, 7, 7), {"cheap": "pointwise"}),
    "folded": (DynamicConv2d, (4, 8, 3), {"num_frames": 3}, (6, 4, 7, 7), {"cheap": "depthwise"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_decision_runs_what_is_counted(case):
    """PyTorch's counter sees the partial convolution and Phi_c, which is a convolution in these cases; not Phi_t."""
    kind, args, options, shape, config = CASES[case]
    layer = kind(*args, **options, config=LayerConfig(**config)).eval()
    x = torch.randn(shape)
    channels, strides = layer.candidates.channels, layer.candidates.strides
    samples = shape[0] // layer.frames_per_sample
    with torch.no_grad():
        output = layer(x)
    macs = layer_macs(layer, x.shape, output.shape)
    frames = output.shape[2] if output.dim() == 5 else layer.frames_per_sample
    elements = output.numel() // samples // frames  # of one frame
    for i in range(len(channels)):
        for j in range(len(strides)):
            with forced(layer, channel=i, temporal=j):  # on both axes: the gate does not run
                ran = counted(layer, x)
            rebuild_frames = 2 * (frames - len(range(0, frames, strides[j]))) * elements
            assert ran == samples * (macs.conv[i][j] + macs.cheap[i][j] - rebuild_frames), (i, j)
    assert macs.dense == macs.conv[0][0]


def test_scale_costs_one_mac_per_rebuilt_element():
    layer = DynamicConv2d(3, 7, 1, config=LayerConfig(cheap="auto"))
    macs = layer_macs(layer, (1, 3, 5, 5), (1, 7, 5, 5))
    assert macs.cheap == ((0,), (3 * 25,))
    assert macs.conv == ((7 * 25 * 3,), (4 * 25 * 3,))


def test_executed_macs_per_sample():
    layer = DynamicConv3d(3, 8, 3, padding=1, config=LayerConfig(cheap="pointwise"), gate_frames=4).eval()
    x = torch.randn(4, 3, 4, 6, 6)
    taken = []
    with observed(layer, lambda _, seen: taken.append(executed_macs(layer, seen))), torch.no_grad():
        layer(x)
        with forced(layer, channel=[0, 1, 0, 1], temporal=[0, 0, 1, 1]):
            layer(x)
    macs = layer_macs(layer, x.shape, (4, 8, 4, 6, 6))
    assert taken[0] == [macs.gate + macs.dense] * 4
    assert taken[1] == [macs.gate + macs.conv[i][j] + macs.cheap[i][j] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]


def test_executed_macs_of_a_blend():
    config = LayerConfig(gate="soft", cheap="pointwise", search_space=3)
    layer = DynamicConv3d(2, 8, 3, padding=1, config=config, gate_frames=4).eval()
    with torch.no_grad():
        layer.gate.fc2.weight.zero_()
        # time (computes 1 of 1, 2, 4) comes first: only every second frame; channels 8 and 2 are open, 4 is not
        layer.gate.beta.copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]))
        taken = []
        with observed(layer, lambda _, seen: taken.append((seen.decisions, executed_macs(layer, seen)))):
            layer(torch.randn(1, 2, 4, 5, 5))
    [(decisions, executed)] = taken
    assert decisions == [(0, 1, True, 0)]
    convolution = 8 * 2 * 25 * (2 * 27)
    rebuild_channels = 2 * 6 * 2 * 25  # 6 channels from 2, on the 2 frames that are computed
    rebuild_frames = 2 * (4 - 2) * 25 * 8
    gate = 2 * 4 * 25 + 2 * 4 * 16 + 16 * 6
    assert executed == [convolution + rebuild_channels + rebuild_frames + gate]
