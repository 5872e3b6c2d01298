"""README and documentation: their Python runs as it stands, their command lines exist, their errors are the code's."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from redconvert.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
SIZES = {"budgets": 48}  # of clips: where time is saved, layers must take some
WITH_PYTHON = {
    "README",
    "index",
    "concepts",
    "layers",
    "calibrate",
    "budgets",
    "finetune",
    "deploy",
    "machines",
    "own_conv",
}
NEEDS = {"finetune": ["accelerate"], "machines": ["accelerate"], "deploy": ["onnx", "onnxscript", "onnxruntime"]}


def blocks_of(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def python_pages():
    return [page for page in PAGES if page.stem in WITH_PYTHON and page.parent.name != "api"]


class Network(nn.Module):
    """Stands for the reader's ``model``."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv3d(16, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU())

    def forward(self, x):
        return self.body(self.stem(x)).mean((2, 3, 4))


@pytest.fixture
def names(tmp_path, monkeypatch, request):
    """What the pages take for given."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = getattr(request.node, "callspec", None)
    size = SIZES.get(page.params["page"].stem, 12) if page else 12
    clips = torch.randn(2, 3, 8, size, size)
    train = [(clips, torch.tensor([0, 31])), (clips.flip(0), torch.tensor([31, 0]))]
    more = {"clips": clips, "more_clips": torch.randn(2, 3, 8, size, size), "train": train}
    return {"model": Network().eval(), **more, "torch": torch, "F": nn.functional}


def run(page, names):
    for number, block in enumerate(blocks_of(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_every_page_with_python_runs():
    assert {page.stem for page in python_pages()} == WITH_PYTHON
    assert all(page in python_pages() for page in PAGES if blocks_of(page, "python"))


@pytest.mark.parametrize("page", [page for page in python_pages() if page != README], ids=lambda page: page.stem)
def test_python_blocks_run(page, names):
    for package in NEEDS.get(page.stem, []):
        pytest.importorskip(package, reason=f"{page.name} needs it")
    assert blocks_of(page, "python")
    run(page, names)


def test_readme_does_what_it_says(names, tmp_path, capsys):
    blocks = blocks_of(README, "python")
    reverting = next(number for number, block in enumerate(blocks) if "revert" in block)
    for number, block in enumerate(blocks):
        exec(compile(block, str(README), "exec"), names)
        if number == reverting:
            assert type(names["dynamic"].body[0]) is nn.Conv3d
    assert "MACs dense" in capsys.readouterr().out
    assert (tmp_path / "folder" / "config.json").is_file()
    assert len(names["history"].steps) == 4 and names["efficiency"].costs.shape == (2,)


def command_lines():
    """Every ``redconvert-cli`` call of a console block, with its page."""
    for page in PAGES:
        for block in blocks_of(page, "console"):
            for line in block.splitlines():
                if line.startswith("$ redconvert-cli"):
                    yield page.name, line.removeprefix("$ ")


@pytest.mark.parametrize(("page", "line"), list(command_lines()))
def test_command_lines_parse(page, line):
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, arguments)  # options, required ones and types; nothing is run
    assert context.params and not context.args


def test_command_lines_that_do_not_parse_are_found():
    command = typer.main.get_command(app).commands["plan"]
    with pytest.raises(Exception, match=r"(?i)no such option"):
        command.make_context("plan", ["timm:resnet50", "--rules", "x"])
    assert len(list(command_lines())) >= 12


def messages():
    """Every text of the package, with … for what is filled in."""
    for path in (ROOT / "redconvert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_quoted_errors_are_those_of_the_code():
    quoted = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(quoted) >= 30
    texts = set(messages())
    for message in quoted:
        assert len(message.replace("…", "")) > 15, message
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), flags=re.DOTALL)
        assert any(pattern.fullmatch(text) for text in texts), f"no error says: {message}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    targets = re.findall(
        r"\]\(([^)#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    )
    for target in targets:
        assert target.startswith("http") or (page.parent / target).exists(), target
    assert page != README or len(targets) >= 5


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_coverage_page_with_and_without_its_file(tmp_path):
    class Config:
        config_file_path = str(tmp_path / "mkdocs.yml")

    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    without = hooks().on_page_markdown(text, None, Config)
    assert "make coverage" in without and "<!--" not in without
    (tmp_path / "COVERAGE.md").write_text("# Coverage\n\nSee [rows](benchmarks/rows.json), [us](https://a.b).\n")
    found = hooks().on_page_markdown(text, None, Config)
    assert found == "# Coverage\n\n\nSee `rows`, [us](https://a.b).\n\n"


def test_site_builds_without_warnings(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the extra 'docs' is absent")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 20
    for page in pages:  # nothing is fetched from elsewhere
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?:[^\" >]+)", page.read_text("utf-8"))
        assert fetched == [], page.name
