"""The notebooks and the loop in examples/ run, on a copy and in their short setting, and end with sensible figures."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the examples and of what they import from the checkout."""
    for folder in ("examples", "benchmarks"):
        shutil.copytree(EXAMPLES.parent / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "examples"


def run(place: Path, name: str, environment: dict[str, str], values: str) -> tuple[dict, list]:
    """Execute a notebook in the short setting; the values of an expression at its end, and all its outputs."""
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebooks]'")
    pytest.importorskip("ipykernel", reason="pip install -e '.[notebooks]'")
    pytest.importorskip("accelerate", reason="pip install -e '.[train]'")
    book = nbformat.read(place / name, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(f"import json; print(json.dumps({values}))"))
    resources = {"metadata": {"path": str(place)}}
    client = nbclient.NotebookClient(book, timeout=540, kernel_name="python3", resources=resources)
    client.execute(env={**os.environ, **environment, "REDCONVERT_SHORT": "1", "OMP_NUM_THREADS": "1"})
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return json.loads(outputs.pop().text), outputs


def pictures(outputs: list) -> int:
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs)


def said(outputs: list) -> str:
    """What was printed; nothing may have come as a warning."""
    streams = [output for output in outputs if output.output_type == "stream"]
    assert not [output.text for output in streams if output.name == "stderr"]
    return "".join(output.text for output in streams)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resnet_on_cifar(place):
    folder = os.environ.get("REDCONVERT_CIFAR")
    if folder is None or not (Path(folder) / "package").is_dir():
        pytest.skip("no CIFAR-10: see the first cell of the notebook, and set REDCONVERT_CIFAR")
    values = """{
        "dense": dense_accuracy, "half": [half_share, half_accuracy], "untrained": untrained_curve,
        "asked": asked_curve, "costs": [step["cost"] for step in history.steps], "sure": sure.tolist(),
        "final": [final_share, final_accuracy], "layers": len(calibration.layers),
    }"""
    found, outputs = run(
        place, "finetune_resnet_cifar.ipynb", {"REDCONVERT_CIFAR": str(Path(folder).resolve())}, values
    )
    assert found["dense"] == pytest.approx(0.945, abs=0.005)  # of the first 200 test images
    assert found["layers"] == 55
    assert found["half"][0] == pytest.approx(0.393, abs=0.005)  # between two convolutions half of a half
    assert found["untrained"][1][0] == pytest.approx(0.6, abs=0.005) and found["untrained"][1][1] > 0.75
    assert len(found["costs"]) == 2 and found["costs"][-1] == pytest.approx(0.6, abs=0.05)
    assert found["final"][0] == pytest.approx(0.6, abs=0.02) and found["final"][1] > 0.7
    (alone, _), (asked, right) = found["asked"]
    assert alone == pytest.approx(0.6, abs=0.005) and asked == pytest.approx(0.7, abs=0.04)
    assert right > found["untrained"][1][1]
    assert len(found["sure"]) == 200 and min(found["sure"]) >= 0 and max(found["sure"]) <= 1
    assert pictures(outputs) == 5
    assert said(outputs).count("equal to the bit: True") == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_i3d_on_jhmdb(place, data_dir, kinetics_weights):
    pytest.importorskip("av", reason="pip install -e '.[video]'")
    if not (data_dir / "jhmdb_128").is_dir():
        pytest.skip(f"no J-HMDB in {data_dir}; set REDCONVERT_DATA")
    values = """{
        "agreement": [agreement(before), agreement(after)], "top1": [dense.top1, before.top1, after.top1],
        "clips": dense.samples, "costs": [step["cost"] for step in history.steps], "correlation": correlation,
        "losses": [step["task"] for step in history.steps], "shares": shares.tolist(), "moving": moving.tolist(),
    }"""
    found, outputs = run(place, "finetune_i3d_jhmdb.ipynb", {"REDCONVERT_DATA": str(data_dir)}, values)
    assert found["clips"] == len(found["shares"]) == len(found["moving"]) == 21
    assert min(found["agreement"]) > 0.3 and max(found["agreement"]) <= 1
    assert all(0 <= right <= 1 for right in found["top1"])
    assert max(found["losses"]) < 1  # the divergence from the teacher starts small
    assert found["costs"][-1] == pytest.approx(0.7, abs=0.05)
    assert sum(found["shares"]) / 21 == pytest.approx(70, abs=3)
    assert min(found["moving"]) > 0
    if len(set(found["shares"])) > 1:  # else there is nothing that could go with motion
        assert -1 <= found["correlation"] <= 1
    else:
        assert math.isnan(found["correlation"])
    assert pictures(outputs) == 4
    assert "equal to the bit: True" in said(outputs) and "GMACs dense" in said(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_without_data_the_first_cell_says_what_to_do(place, tmp_path, name):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebooks]'")
    nothing = {"REDCONVERT_CIFAR": str(tmp_path / "absent"), "REDCONVERT_DATA": str(tmp_path / "absent")}
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"set REDCONVERT_|pip install"):
        run(place, name, nothing, "{}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_kept_outputs(path):
    """Executed once in order, with pictures, without warnings, errors or places of the machine; and small."""
    text = path.read_text(encoding="utf-8")
    book = json.loads(text)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(len(cell["source"]) <= 16 for cell in cells)
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert pictures(outputs) >= 4 and len(text) < 600_000
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    written = json.dumps([cell["source"] for cell in book["cells"]] + [o.get("text", "") for o in outputs])
    assert not re.search(r"/(home|root|work|tmp|Users)/|[A-Z]:\\\\", written)


@pytest.mark.slow
def test_your_own_loop(place):
    command = [sys.executable, "your_own_loop.py", "--epochs", "2"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    dense, dynamic = (
        float(re.search(rf"^{name}: ([\d.]+)% right", done.stdout, re.M)[1]) for name in ("dense", "dynamic")
    )
    assert dense > 60 and dynamic > 40
    costs = [int(cost) for cost in re.findall(r"^epoch \d+: loss [\d.]+, (\d+)%", done.stdout, re.M)]
    assert len(costs) == 2 and costs[1] < costs[0] <= 105
    budgets = re.findall(r"^([\d.]+)% of the dense MACs on average .* \(asked: ([\d.]+)%\)", done.stdout, re.M)
    assert len(budgets) == 3
    for reached, asked in budgets:
        assert float(reached) <= float(asked) + 0.05
