"""The command line as a user runs it: exit codes, one clear line, JSON that adds up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import redconvert
from redconvert import cli
from redconvert.sources import guess_architecture, open_source

FACTORY = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))

def number():
    return 3

def broken():
    raise ValueError("no luck")
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run redconvert-cli in this process, in a folder that holds the module ``nets``; (exit code, out, err)."""
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("nets", None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["redconvert-cli", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def fails(result, *words):
    code, out, err = result
    assert code == 1
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err


def test_inspect_json_counts_what_the_shapes_say(run):
    code, out, _ = run("inspect", "nets:small", "--input", "2,3,8,8", "--json")
    facts = json.loads(out)
    first, second, linear = 16 * 3 * 9 * 64, 32 * 16 * 9 * 64, 32 * 5
    assert code == 0
    assert facts["dense_macs"] == first + second + linear
    assert facts["convolutions"] == 2 and facts["converted"] == 2
    assert facts["parameters"] == 16 * 27 + 16 + 32 * 144 + 32 + 32 * 5 + 5
    saved = sum(v["dense_macs"] - v["lowest_macs"] for v in facts["plan"]["verdicts"])
    assert facts["lowest_macs"] == facts["dense_macs"] - saved


def test_inspect_table_names_each_layer_and_its_verdict(run):
    code, out, _ = run("inspect", "nets:small", "--input", "1,3,8,8", "--rule", "0=skip")
    assert code == 0
    assert "skipped: excluded by rule 1" in out
    assert "1 of 2 convolutions would become dynamic" in out
    assert "16/8" not in out and "32/16" in out


def test_inspect_guesses_an_input(run):
    code, out, _ = run("inspect", "nets:small", "--json")
    assert code == 0 and json.loads(out)["input_shapes"] == [[1, 3, 224, 224]]


def test_inspect_writes_a_page(run, tmp_path):
    code, _, _ = run("inspect", "nets:small", "--input", "1,3,8,8", "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and "cheapest candidate" in page and "<script" not in page


def test_plan_follows_rules_and_config(run, tmp_path):
    (tmp_path / "config.json").write_text(redconvert.ConvertConfig(search_space=3).to_json())
    code, out, _ = run("plan", "nets:small", "--input", "1,3,8,8", "--config", "config.json", "--json")
    verdicts = json.loads(out)["verdicts"]
    assert code == 0
    assert [v["channels"] for v in verdicts] == [[16, 8, 4], [32, 16, 8]]
    assert verdicts[0]["config"]["search_space"] == 3


def test_state_dict_of_a_known_architecture_is_recognised(tmp_path):
    model = pytest.importorskip("torchvision").models.resnet18()
    found = guess_architecture(model.state_dict())
    assert found is not None and found[0] == "torchvision:resnet18"
    assert torch.equal(found[1].conv1.weight, model.conv1.weight)


def test_state_dict_of_an_unknown_architecture_is_listed(run, tmp_path):
    torch.save(nn.Sequential(nn.Conv3d(3, 7, 3), nn.Linear(2, 2)).state_dict(), tmp_path / "w.pt")
    code, out, _ = run("inspect", "w.pt", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["architecture"] is None
    assert facts["convolutions"] == {"0.weight": [7, 3, 3, 3, 3]}
    assert facts["numbers"] == 7 * 81 + 7 + 6


def test_saved_network_is_shown(run, tmp_path):
    model = redconvert.convert(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()))
    redconvert.save_pretrained(model, tmp_path / "saved")
    code, out, _ = run("inspect", "saved")
    assert code == 0 and "1 dynamic layers of a Sequential" in out


def test_a_pickled_module_needs_trust(run, tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), tmp_path / "module.pt")
    fails(run("inspect", "module.pt"), "--trust")
    code, out, _ = run("inspect", "module.pt", "--trust", "--input", "1,3,16,16", "--json")
    assert code == 0 and json.loads(out)["convolutions"] == 1


def test_bad_files_are_one_line(run, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.zeros(1000)}, whole)
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[:700])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "half.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    for name in ("text.pt", "half.pt", "empty.pt", "half.safetensors", "missing.pt"):
        fails(run("inspect", name), name)
    (tmp_path / "folder").mkdir()
    fails(run("inspect", "folder"), "folder", "config.json")


def test_names_that_do_not_exist_suggest_the_nearest(run):
    pytest.importorskip("timm")
    fails(run("inspect", "timm:resnet5"), "resnet50")
    fails(run("inspect", "torchvision:r2plus1d"), "r2plus1d_18")
    fails(run("inspect", "zoo:i3d_kinetic"), "i3d_kinetics")
    fails(run("inspect", "timm:"), "lacks the model's name")


def test_factories_that_fail_say_how(run):
    fails(run("inspect", "nets:number"), "returned int")
    fails(run("inspect", "nets:broken"), "no luck")
    fails(run("inspect", "nets:missing"), "has no 'missing'")
    fails(run("inspect", "no.such.module:f"), "no.such.module")


def test_a_network_that_does_not_run_on_the_input(run):
    fails(run("inspect", "nets:small", "--input", "1,4,8,8"), "does not run on example_inputs")
    fails(run("plan", "nets:small", "--rule", "nothing*=skip", "--input", "1,3,8,8"), "rule 1", "matches none")


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect",),
        ("inspect", "nets:small", "--input", "1,a,3"),
        ("inspect", "nets:small", "--input", "0,3,8,8"),
        ("plan", "nets:small", "--rule", "x"),
        ("plan", "nets:small", "--rule", "x=maybe"),
        ("inspect", "nets:small", "--unknown"),
        ("demo", "--num-frames", "1"),
        ("nothing",),
    ],
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2 and "Traceback" not in err


def test_torchvision_names_never_download():
    pytest.importorskip("torchvision")
    model = open_source("torchvision:deeplabv3_resnet50").model
    assert type(model).__name__ == "DeepLabV3"


def test_entry_point_prints_the_version():
    shown = subprocess.run(
        [sys.executable, "-m", "redconvert.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == redconvert.__version__


def test_demo_end_to_end(run, kinetics_weights, tmp_path):
    code, out, _ = run("demo", "--num-frames", "16", "--size", "64", "--out", "result", "--json")
    results = json.loads(out)
    assert code == 0
    assert results["outputs_equal_to_the_bit"] is True
    assert results["layers_converted"] == 57
    assert len(results["top5"]) == 5
    assert sum(row["probability"] for row in results["top5"]) <= 1.0001
    costs = {name: row["share_of_dense_macs"] for name, row in results["what_if"].items()}
    assert 0.45 < costs["half of the channels"] < 0.6
    assert 0.45 < costs["half of the frames"] < 0.6
    assert 0.22 < costs["half of both"] < 0.35
    assert results["report"]["dense_macs"] > 1e9
    pages = sorted(Path("result").glob("*.html"))
    assert [page.name for page in pages] == [
        "report.html",
        "what-if-half-of-both.html",
        "what-if-half-of-the-channels.html",
        "what-if-half-of-the-frames.html",
    ]


def test_demo_refuses_what_is_no_video(run, kinetics_weights, tmp_path):
    (tmp_path / "note.mp4").write_text("no video")
    fails(run("demo", "--video", "note.mp4"), "note.mp4")
    fails(run("demo", "--video", "gone.mp4"), "gone.mp4")


def test_absorb_says_who_reads(run):
    code, out, _ = run("plan", "torchvision:resnet18", "--absorb", "--input", "1,3,64,64", "--json")
    assert code == 0
    verdicts = {each["name"]: each for each in json.loads(out)["verdicts"]}
    assert verdicts["layer1.0.conv1"]["reader"] == "layer1.0.conv2"
    assert verdicts["layer1.0.conv2"]["reader"] is None
    assert sum(each["reader"] is not None for each in verdicts.values()) == 8
