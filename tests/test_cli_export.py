"""redconvert-cli export: one ONNX file from a network and a folder of save_pretrained."""

import json
import sys

import pytest
import torch
from torch import nn

import redconvert
from redconvert import cli
from redconvert.deploy import freeze

pytest.importorskip("onnx", reason="the extra 'export' is absent")
pytest.importorskip("onnxscript", reason="the extra 'export' is absent")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is absent")

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
"""
SHAPE = (1, 3, 4, 8, 8)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run redconvert-cli export in a folder with nets.py; (code, out, err)."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("nets", None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["redconvert-cli", "export", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def saved(tmp_path):
    """A dynamic network in folder 'saved', as save_pretrained leaves it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    dynamic = redconvert.convert(network, redconvert.ConvertConfig(rules={"*": {}}), example_inputs=torch.randn(SHAPE))
    redconvert.save_pretrained(dynamic, tmp_path / "saved")
    return dynamic.eval()


@torch.no_grad()
def test_a_frozen_network(run, tmp_path):
    dynamic = saved(tmp_path)
    arguments = ("nets:net", "--dynamic", "saved", "--channel", 1, "--input", "1,3,4,8,8", "--out", "a.onnx")
    code, out, err = run(*arguments, "--dynamic-batch", "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and (facts["form"], facts["policy"]) == ("frozen", [1, 0])
    assert facts["bytes"] == (tmp_path / "a.onnx").stat().st_size and facts["input_shapes"] == [list(SHAPE)]
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    x = torch.randn(3, *SHAPE[1:])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert torch.allclose(found, freeze(dynamic, (1, 0))(x), atol=1e-5)
    assert not torch.allclose(found, dynamic(x), atol=1e-3)


def test_dynamic_and_dense(run, tmp_path):
    saved(tmp_path)
    code, out, _ = run("nets:net", "--dynamic", "saved", "--input", "2,3,4,8,8", "--out", "a.onnx")
    assert code == 0 and "gates decide per sample" in out and "checked with onnxruntime" in out
    code, out, _ = run("nets:net", "--input", "2,3,4,8,8", "--out", "b.onnx", "--no-verify")
    assert code == 0 and "the network as it is." in out
    assert (tmp_path / "a.onnx").stat().st_size > (tmp_path / "b.onnx").stat().st_size


def test_refusals(run, tmp_path):
    saved(tmp_path)
    code, _, err = run("nets:net", "--input", "2,3,4,8,8", "--out", "a.onnx", "--channel", 1)
    assert code == 1 and "give --dynamic FOLDER" in err
    code, _, err = run("nets:net", "--dynamic", "saved", "--input", "2,3,4,8,8", "--out", "a.onnx", "--channel", 7)
    assert code == 1 and "has channel candidate 7" in err
    code, _, err = run("nets:net", "--input", "2,3,4,8,8", "--out", "no/a.onnx")
    assert code == 1 and "no such folder" in err
    assert not list(tmp_path.glob("*.onnx"))
