"""The coverage run itself: it goes on where it was, survives its workers, and calls failures by their name."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import coverage_check
import coverage_models
import pytest
import torch
from coverage_check import check, reason_class
from coverage_models import Candidate, fill
from coverage_table import family_shares, summary, table
from torch import Tensor, nn

import redconvert
from redconvert.layers import DynamicConv

BENCHMARKS = Path(coverage_check.__file__).parent
NAMES = [f"timm:{name}" for name in ("resnet18", "resnet34", "resnet50", "vgg11")]

# A worker that needs no network: it notes every name, and some names are trouble.
STUB = """
import json, sys, time
log = open(sys.argv[1], "a")
held = []
for line in sys.stdin:
    name = line.strip()
    print(name, file=log, flush=True)
    if name.endswith("resnet34") and sys.argv[2] == "dies":
        sys.exit(3)
    while name.endswith("resnet34") and sys.argv[2] == "loops":
        pass
    while name.endswith("resnet34") and sys.argv[2] == "eats":
        held.append(bytearray(b"x") * 20_000_000)
        time.sleep(0.02)
    row = {"model": name, "library": "timm", "status": "ok", "convs": 20, "converted": 19, "seconds": 1.0}
    print(json.dumps(row), flush=True)
"""


@pytest.fixture(scope="module")
def run() -> Any:
    """benchmarks/coverage.py, under a name that no package has."""
    spec = importlib.util.spec_from_file_location("coverage_run", BENCHMARKS / "coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stubbed(run, tmp_path, monkeypatch):
    """Call ``main`` with a stub for its workers; returns the rows, and the names that workers saw."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(run, "all_names", lambda: NAMES)

    def call(*arguments: str, trouble: str = "none") -> tuple[dict[str, Any], list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        monkeypatch.setattr(run, "WORKER", (sys.executable, str(tmp_path / "stub.py"), str(log), trouble))
        run.main([*arguments, "--out", str(tmp_path / "rows.json"), "--page", str(tmp_path / "page.md")])
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        return {row["model"]: row for row in rows}, log.read_text().split()

    return call


# -- the run ---------------------------------------------------------------------------------------------


def test_goes_on_where_it_was(stubbed, tmp_path):
    rows, seen = stubbed("--limit", "2")
    assert list(rows) == seen == NAMES[:2]
    assert "**Unfinished**: 2 of 4 networks" in (tmp_path / "page.md").read_text()
    first = (tmp_path / "rows.json").read_text()
    rows, seen = stubbed()
    assert list(rows) == NAMES and seen == NAMES[2:]
    assert rows[NAMES[0]] == json.loads(first)["rows"][0]
    assert stubbed()[1] == []
    assert stubbed("--rerun", "all", "--only", "*resnet*", "--jobs", "2")[1].__len__() == 3
    page = (tmp_path / "page.md").read_text()
    assert "| timm | 4 | 4 | 4 | 0 | 0 | 0 | 0 |" in page and "Nothing failed." in page
    assert "Unfinished" not in page


@pytest.mark.parametrize(
    ("trouble", "status", "options"),
    [("dies", "died", ()), ("loops", "time", ("--seconds", "0.5")), ("eats", "memory", ("--memory", "0.2"))],
)
def test_a_worker_in_trouble_costs_one_row(stubbed, tmp_path, trouble, status, options):
    rows, seen = stubbed(*options, trouble=trouble)
    assert seen == NAMES
    assert {name: row["status"] for name, row in rows.items()} == {
        name: status if name == NAMES[1] else "ok" for name in NAMES
    }
    assert rows[NAMES[1]]["family"] == "resnet"
    if trouble == "dies":
        assert rows[NAMES[1]]["error"] == "the worker process ended with 3"
    assert f"| {NAMES[1]} | ? | {status} |" in (tmp_path / "page.md").read_text()
    # Only that one again, and now it passes.
    rows, seen = stubbed("--rerun", "failed")
    assert seen == [NAMES[1]] and rows[NAMES[1]]["status"] == "ok"


def test_rows_are_whole_at_any_time(run, tmp_path, monkeypatch):
    results = run.Results(tmp_path / "rows.json")
    results.add({"model": "timm:b", "status": "ok"})
    before = (tmp_path / "rows.json").read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(redconvert.RedconvertError, match="No space left"):
        results.add({"model": "timm:a", "status": "ok"})
    assert (tmp_path / "rows.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    monkeypatch.undo()
    results.write()
    assert list(run.Results(tmp_path / "rows.json").rows) == ["timm:a", "timm:b"]


def test_names_have_families_and_an_order():
    names = coverage_models.all_names()
    assert len(names) == len(set(names)) > 1400
    families = {name: coverage_models.family(name) for name in names}
    assert families["timm:tf_efficientnet_b0"] == "efficientnet"
    assert families["torchvision:raft_small"] == "optical flow"
    assert families["pytorchvideo:x3d_m"] == "hub"
    small = names.index("timm:resnet18")
    assert small < names.index("timm:convnext_xxlarge") < names.index("timm:vit_tiny_patch16_224")


# -- one network -----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.conv, self.gamma = nn.Conv2d(3, 16, 3), nn.Parameter(torch.zeros(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.gamma[:, None, None] * self.conv(x)).relu().mean((2, 3))) * self.scale


def checked(monkeypatch: pytest.MonkeyPatch, build: Any) -> dict[str, Any]:
    """The row of a network that ``build`` makes; its inputs are images of 8 x 8, at the second attempt."""

    def make(name: str, options: dict[str, Any]) -> nn.Module:
        torch.manual_seed(0)
        network = build()
        fill(network)
        return network.eval()

    candidates = [Candidate((1, 3, size, size), lambda size=size: torch.rand(1, 3, size, size)) for size in (2, 8)]
    monkeypatch.setattr(coverage_check, "build", make)
    monkeypatch.setattr(coverage_check, "candidates", lambda name: candidates)
    return check("timm:resnet18")


def test_a_row(monkeypatch):
    row = checked(monkeypatch, Net)
    assert (row["status"], row["convs"], row["converted"], row["skipped"]) == ("ok", 1, 1, {})
    assert row["input"] == (1, 3, 8, 8)  # 3 x 3 weights do not fit on 2 x 2
    assert row["conv_macs"] == 16 * 3 * 9 * 36
    assert (row["traced"], row["covered"], row["copied"], row["reverted"]) == ("fx", 1.0, True, True)
    assert json.loads(json.dumps(row))["family"] == "resnet"


def test_closed_branches_are_opened():
    """Zero initialisation would make every output the same."""
    net = Net()
    net.conv.weight.data.zero_()
    fill(net)
    assert net.gamma.min() >= 0.5 and net.conv.weight.std() > 0.05
    assert not torch.equal(net.conv.weight[0], net.conv.weight[1])


@pytest.mark.parametrize(
    ("build", "status", "error"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "nothing to convert", "it has no Conv2d"),
        (lambda: nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU()), "nothing to convert", "one output channel"),
        (lambda: Net(scale=0.0), "proves nothing", None),
        (lambda: Net(scale=float("inf")), "proves nothing", None),
        (lambda: torch.jit.script(Net()), "refused", "scripted with TorchScript"),
        (lambda: {}["weights"], "not built", "KeyError: 'weights'"),
        (lambda: torch.empty(1 << 60), "memory", "allocate memory"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_failures_by_name(monkeypatch, build, status, error):
    row = checked(monkeypatch, build)
    assert row["status"] == status, row
    assert error is None or error in row["error"]


def test_another_output_is_noticed(monkeypatch):
    forward = DynamicConv.forward

    def wrong(self: DynamicConv, x: Tensor) -> Tensor:
        return forward(self, x) * (1 + 2**-20)

    monkeypatch.setattr(DynamicConv, "forward", wrong)
    assert checked(monkeypatch, Net)["status"] == "not equal"


def test_a_layer_that_never_decides_is_noticed(monkeypatch):
    monkeypatch.setattr(DynamicConv, "forward", lambda self, x: self.dense_class.forward(self, x))
    row = checked(monkeypatch, Net)
    assert (row["equal"], row["status"]) == (True, "proves nothing")


# -- the page --------------------------------------------------------------------------------------------


def row(model: str, family: str, convs: int, status: str = "ok", covered: float | None = None) -> dict[str, Any]:
    result = {"model": model, "library": "timm", "family": family, "convs": convs, "status": status}
    if covered is not None:
        result |= {"covered": covered, "converted": 3, "conv_macs": 1000, "lowest_macs": 520, "traced": "fx"}
        result |= {"skipped": {"too small to pay": convs - 3}}
    return result


ROWS = [
    row("timm:a", "one", 10, covered=0.8),
    row("timm:b", "one", 12, covered=0.9),
    row("timm:c", "two", 30, covered=0.95),
    row("timm:d", "two", 40, "not equal", covered=0.97),
    row("timm:e", "three", 4, covered=0.1),
    row("timm:f", "three", 0, "nothing to convert"),
]


def test_the_summary():
    assert summary(ROWS) == {
        "networks": 6,
        "many": 4,
        "many_passed": 3,
        "few": 1,
        "few_passed": 1,
        "without": 1,
        "without_told": 1,
    }
    assert family_shares(ROWS) == pytest.approx({"one": 0.85, "two": 0.96})
    page = table(ROWS)
    assert "median over timm's 2 families: 90.5%" in page
    assert "| timm:d | 40 | not equal |  |" in page
    assert "| too small to pay | 81 | 5 |" in page
    assert "| two | 2 | 1 | 70 | 6 | 96.0% | 52.0% | fx |" in page


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        ("too small to pay: its lowest candidate saves -4%, min_saving is 10%", "too small to pay"),
        ("the output layer (a rule can include it)", "the output layer"),
        ("own forward: Own is more than a Conv2d (redconvert.register teaches it)", "own forward: Own"),
        ("parametrised (weight): its weight is computed, not stored", "parametrised"),
    ],
)
def test_reasons_are_counted_without_their_numbers(reason, short):
    assert reason_class(reason) == short
