"""The public face: what it names, and what importing it costs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import redconvert

OPTIONAL = (
    *("accelerate", "av", "cv2", "matplotlib", "numpy.f2py", "PIL", "pytorchvideo", "rich", "scipy", "timm"),
    *("torchmetrics", "torchvision", "typer"),
)
EXPORT = ("onnx", "onnxscript", "onnxruntime", "openvino", "transformers")  # PyTorch looks for some of these itself

BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""

CONVERT = """
import redconvert, torch
from torch import nn
model = nn.Sequential(nn.Conv3d(3, 16, 3), nn.BatchNorm3d(16), nn.ReLU()).eval()
x = torch.randn(2, 3, 4, 8, 8)
dynamic = redconvert.convert(model, example_inputs=x)
assert torch.equal(dynamic(x), model(x))
print("converted")
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_optional():
    loaded = json.loads(python("import redconvert, sys, json; print(json.dumps(sorted(sys.modules)))"))
    found = [name for name in loaded if name.split(".")[0] in OPTIONAL + EXPORT]
    alone = json.loads(python("import torch, sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert [name for name in found if name not in alone] == []


def test_works_without_them():
    assert python(BLOCKED.format(blocked=set(OPTIONAL)) + CONVERT).strip() == "converted"


@pytest.mark.parametrize("name", redconvert.__all__)
def test_names(name):
    value = getattr(redconvert, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    documentation = inspect.getdoc(value) or ""
    assert len(documentation.split()) >= 5, name
    if inspect.isfunction(value):
        first = documentation.split("\n")[0]
        assert first.endswith((".", ":")) or len(first) > 20
        hints = inspect.signature(value)
        assert all(p.annotation is not inspect.Parameter.empty for p in hints.parameters.values()), name


def test_all_is_sorted_and_complete():
    assert list(redconvert.__all__) == sorted(redconvert.__all__)
    public = {name for name, value in vars(redconvert).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public <= set(redconvert.__all__)
