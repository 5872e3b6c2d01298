"""What torch.export, onnxruntime and OpenVINO compute is what PyTorch computes."""

from __future__ import annotations

import sys

import pytest
import torch
from frozen_networks import frames, video
from reference import randomize, relative_error
from torch import nn

from redconvert import ConvertConfig, RedconvertError, convert, files, forced, observed
from redconvert.deploy import export_onnx, freeze
from redconvert.errors import MissingExtraError
from redconvert.layers import dynamic_layers

onnx = pytest.importorskip("onnx", reason="the extra 'export' is absent")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is absent")
pytest.importorskip("onnxscript", reason="the extra 'export' is absent")

CLOSE = 1e-4


class Small(nn.Module):
    """Two convolutions; a keyword of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 7, 1)

    def forward(self, clips: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        out = self.second(torch.relu(self.first(clips))).mean((2, 3, 4))
        return out if scale is None else out * scale


def small(**config):
    """A dynamic `Small` whose gates tell samples apart."""
    x = torch.randn(4, 3, 5, 8, 8)
    dynamic = convert(Small(), ConvertConfig(**{"rules": {"*": {}}, **config}), example_inputs=x).eval()
    for layer in dynamic_layers(dynamic).values():
        _spread(randomize(layer), dynamic, x)
    return dynamic, x


@torch.no_grad()
def _spread(layer, network, x):
    hidden = []
    hook = layer.gate.fc1.register_forward_hook(lambda module, args, out: hidden.append(out))
    network(x)
    hook.remove()
    layer.gate.norm.running_mean.copy_(hidden[0].mean(0))
    layer.gate.norm.running_var.copy_(hidden[0].var(0))


def onnx_outputs(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [slot.name for slot in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, given)]


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


# -- small networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["hard", "soft"])
@torch.no_grad()
def test_masked(tmp_path, gate):
    dynamic, x = small(gate=gate, rules={"*": {}} if gate == "hard" else {"second": None, "*": {}})
    layers = len(dynamic_layers(dynamic))
    decisions = []
    with observed(dynamic, lambda layer, seen: decisions.append({decision[:2] for decision in seen.decisions})):
        wanted = dynamic(x)
    assert all(len(each) > 1 for each in decisions)
    export_onnx(dynamic, x, tmp_path / "a.onnx", dynamic_batch=True, verify=True)
    for clips in (x, torch.randn(3, *x.shape[1:]), x[:1]):
        wanted = dynamic(clips)
        assert relative_error(onnx_outputs(tmp_path / "a.onnx", clips)[0], wanted) < CLOSE
    found = operators(tmp_path / "a.onnx")  # the gates decide in the file; a hard one asks only whether z > 0
    assert found.count("Tanh") == (layers if gate == "hard" else 2 * layers)
    assert gate == "soft" or found.count("Greater") == layers


@torch.no_grad()
def test_masked_with_frames_in_the_batch(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    x = torch.randn(12, 3, 8, 8)
    dynamic = convert(network, ConvertConfig(num_frames=3, rules={"*": {}}), example_inputs=x).eval()
    _spread(randomize(dynamic[0]), dynamic, x)
    export_onnx(dynamic, x, tmp_path / "a.onnx", dynamic_batch=True)
    for batch in (x, torch.randn(6, 3, 8, 8), x[:3]):
        assert relative_error(onnx_outputs(tmp_path / "a.onnx", batch)[0], dynamic(batch)) < CLOSE


@pytest.mark.parametrize("build", [video, frames])
@torch.no_grad()
def test_frozen(tmp_path, build):
    (dynamic, x), pair = build(torch.float32), (1, 1)
    frozen = freeze(dynamic, pair)
    export_onnx(frozen, x, tmp_path / "a.onnx", dynamic_batch=True)
    with forced(dynamic, channel=pair[0], temporal=pair[1]):
        for batch in (x, torch.randn(10 if build is frames else 3, *x.shape[1:])):
            assert relative_error(onnx_outputs(tmp_path / "a.onnx", batch)[0], dynamic(batch)) < CLOSE
    found = operators(tmp_path / "a.onnx")
    assert "Where" not in found and "MatMul" not in found  # no masks, no mixing
    convolutions = [module for module in frozen.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    calls = len(convolutions) + (sum(m is frozen.twice for m in frozen.modules()) if build is video else 0)
    assert found.count("Conv") <= calls + 1  # "twice" runs twice, its 1x1 convolution too; "spare" never
    stored = sum(onnx.numpy_helper.to_array(each).size for each in onnx.load(tmp_path / "a.onnx").graph.initializer)
    assert stored < 1.2 * sum(p.numel() for p in frozen.parameters()) + 500


@torch.no_grad()
def test_keywords_and_what_stays(tmp_path):
    dynamic, x = small()
    dynamic.train()
    dynamic.second.eval()
    frozen = freeze(dynamic, {"first": (1, 1)})
    flags = [module.training for module in frozen.modules()]
    inputs = {"clips": x, "scale": torch.rand(7)}
    export_onnx(frozen, inputs, tmp_path / "a.onnx", verify=True)
    assert [module.training for module in frozen.modules()] == flags
    found = onnx_outputs(tmp_path / "a.onnx", x, inputs["scale"])[0]
    assert relative_error(found, frozen.eval()(**inputs)) < CLOSE
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize(("build", "by_way_of"), [(video, "PyTorch"), (frames, "PyTorch"), (frames, "ONNX")])
@torch.no_grad()
def test_openvino_takes_a_frozen_network(tmp_path, build, by_way_of):
    openvino = pytest.importorskip("openvino", reason="the extra 'openvino' is absent")
    dynamic, x = build(torch.float32)
    frozen = freeze(dynamic, (1, 1))
    if by_way_of == "ONNX":
        export_onnx(frozen, x, tmp_path / "a.onnx")
        source = openvino.Core().read_model(tmp_path / "a.onnx")
    else:
        source = openvino.convert_model(frozen, example_input=x)
    compiled = openvino.compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert relative_error(torch.from_numpy(compiled(x.numpy())[0]), frozen(x)) < CLOSE


# -- refusals ------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    yield path
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_forced_networks(old):
    dynamic, x = small()
    with (
        forced(dynamic, channel=1),
        pytest.raises(RedconvertError, match=r"inside redconvert.forced.*redconvert.freeze"),
    ):
        export_onnx(dynamic, x, old)


def test_one_path_of_the_sparse_mode(old, monkeypatch):
    dynamic, x = small()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    with pytest.raises(RedconvertError, match=r"torch.export cannot read Small: .*redconvert.freeze"):
        export_onnx(dynamic, x, old)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(old, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*redconvert\[export\]"):
        export_onnx(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2), old, verify=True)


class Unreadable(nn.Module):
    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0] * 2, -1) + torch.ones(int(x.shape[0]) * 2, 1) if x.shape[0] == 4 else x


def test_networks_that_cannot_be_written(old):
    with pytest.raises(RedconvertError, match=r"torch.export cannot read Unreadable"):
        export_onnx(Unreadable(), torch.ones(2, 2), old)
    with pytest.raises(RedconvertError, match=r"FixedBatch works for batches of 4 alone \(input 'x'\)"):
        export_onnx(FixedBatch(), torch.ones(2, 2), old, dynamic_batch=True)
    with pytest.raises(RedconvertError, match=r"takes a torch.nn.Module in Python, not TopLevelTracedModule"):
        export_onnx(torch.jit.trace(nn.ReLU(), torch.ones(1)), torch.ones(1), old)


def test_results_that_differ_are_not_written(old, monkeypatch):
    dynamic, x = small()
    frozen = freeze(dynamic, (1, 1))
    session = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda self, *args: [1.01 * value for value in session(self, *args)]
    )
    with pytest.raises(RedconvertError, match=r"gives another output 0 than PyTorch, by 0.01"):
        export_onnx(frozen, x, old, verify=True)


def test_a_killed_write_and_a_missing_folder(old, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    network, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with pytest.raises(RedconvertError, match="no such folder"):
        export_onnx(network, x, old.parent / "nowhere" / "a.onnx")
    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(network, x, old)


# -- real networks -------------------------------------------------------------------------------------


def _r2plus1d():
    models = pytest.importorskip("torchvision").models.video
    return models.r2plus1d_18(), torch.randn(2, 3, 8, 32, 32)


def _x3d_s():
    models = pytest.importorskip("pytorchvideo.models.x3d")
    network = models.create_x3d(input_clip_length=13, input_crop_size=64, head_activation=None)
    return network, torch.randn(2, 3, 13, 64, 64)


def _resnet50():
    return pytest.importorskip("torchvision").models.resnet50(), torch.randn(2, 3, 64, 64)


REAL = {"r2plus1d_18": (_r2plus1d, (1, 1)), "x3d_s": (_x3d_s, (1, 1)), "resnet50": (_resnet50, (1, 0))}


def real(name):
    build, pair = REAL[name]
    network, x = build()
    dynamic = convert(network.eval(), example_inputs=x)
    with torch.no_grad():
        for layer in dynamic_layers(dynamic).values():
            layer.gate.beta.zero_()
            nn.init.normal_(layer.gate.fc2.weight)
            if layer.cheap_c is not None and layer.groups == 1:
                layer.cheap_c.set_order(torch.randperm(layer.out_channels))
            for parameter in layer.cheap_parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        for norm in (m for m in dynamic.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.momentum = 1.0
        dynamic.train()(x)  # norms of these inputs: answers depend on them, and gates tell them apart
    return dynamic.eval(), x, pair


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", ["frozen", "masked"])
@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_real_networks(tmp_path, name, form):
    dynamic, x, pair = real(name)
    network = freeze(dynamic, pair) if form == "frozen" else dynamic
    exported = torch.export.export(network, (x,), strict=False).module()
    export_onnx(network, x, tmp_path / "a.onnx")
    decisions, other = [], torch.randn_like(x)
    with observed(dynamic, lambda layer, seen: decisions.append({decision[:2] for decision in seen.decisions})):
        dynamic(x)
    assert sum(len(each) > 1 for each in decisions) > len(decisions) / 4
    assert relative_error(network(other), network(x)) > 0.01
    for clips in (x, other):
        wanted = network(clips)
        assert relative_error(exported(clips), wanted) < CLOSE
        assert relative_error(onnx_outputs(tmp_path / "a.onnx", clips)[0], wanted) < CLOSE


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_real_frozen_networks_in_openvino(name):
    openvino = pytest.importorskip("openvino", reason="the extra 'openvino' is absent")
    dynamic, x, pair = real(name)
    frozen = freeze(dynamic, pair)
    compiled = openvino.compile_model(
        openvino.convert_model(frozen, example_input=x), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    assert relative_error(torch.from_numpy(compiled(x.numpy())[0]), frozen(x)) < CLOSE
