"""redconvert-cli finetune: a reduced network and unlabelled files in, one that answers as the original does out."""

import json
from pathlib import Path

import pytest
import torch

import redconvert
from redconvert.evaluate import spread_of_macs

pytest.importorskip("av")
pytest.importorskip("accelerate")

SHAPE = ("--input", "1,3,4,16,16", "--data", "clips")
REDUCE = ("reduce", "nets:vivid", *SHAPE, "--out", "small", "--budget", 0.6, "--no-time")
FINETUNE = ("finetune", "nets:vivid", *SHAPE, "--dynamic", "small", "--out", "run")


def opened(folder):
    import nets

    return redconvert.from_pretrained(nets.vivid(), folder).eval()


@pytest.fixture
def reduced(command):
    assert command(*REDUCE)[0] == 0
    return command


def test_answers_come_nearer(command):
    """Of a network that was reduced without being calibrated."""
    import nets

    x = torch.randn(4, 3, 4, 16, 16)
    poor = redconvert.convert(nets.vivid(), example_inputs=x).eval()
    redconvert.set_budget(poor, 0.6, [x])
    redconvert.save_pretrained(poor, "small")
    code, out, _ = command(*FINETUNE, "--epochs", 10, "--lr", 0.02, "--batch-size", 4, "--plot", "run.png", "--json")
    facts = json.loads(out)
    before, after = facts["before"], facts["after"]
    assert code == 0 and (facts["samples"], facts["tested"]) == (16, 8)
    assert after["divergence"] < 0.5 * before["divergence"]
    assert before["share"] < 0.61 and after["share"] == pytest.approx(before["share"], abs=0.02)
    dynamic = opened("run/model")
    spread = spread_of_macs(dynamic, torch.rand(2, 3, 4, 16, 16))
    assert spread.mean / float(spread.dense.mean()) == pytest.approx(after["share"], abs=0.02)
    assert len(facts["epochs"]) == 10 and Path("run.png").stat().st_size > 5000
    assert json.loads(Path("run/finetune.json").read_text()) == facts


def test_it_goes_on_where_it_stopped(reduced, monkeypatch):
    """The same command after an error in the middle gives the network of a run that was never stopped."""
    options = ("--epochs", 2, "--batch-size", 4, "--json")
    whole = json.loads(reduced(*FINETUNE, *options)[1])
    again = (*FINETUNE[:-1], "other", *options)
    validate = redconvert.finetune.__globals__["Run"]._validate

    def stop(self, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        validate(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(redconvert.finetune.__globals__["Run"], "_validate", stop)
        assert reduced(*again)[0] != 0
    assert Path("other/resume.pt").exists() and not Path("other/model").exists()
    resumed = json.loads(reduced(*again)[1])
    assert [row["loss"] for row in resumed["epochs"]] == [row["loss"] for row in whole["epochs"]]
    first, second = (opened(f"{folder}/model").state_dict() for folder in ("run", "other"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_target_below_what_it_executes(reduced):
    """The budget is set first; the table says what came of it."""
    code, out, _ = reduced(*FINETUNE, "--target", 0.5, "--epochs", 1, "--no-flip")
    assert code == 0 and "finetuned without labels" in out and "Saved: run/model" in out
    spread = spread_of_macs(opened("run/model"), torch.rand(2, 3, 4, 16, 16))
    assert spread.mean / float(spread.dense.mean()) <= 0.52


def test_images(command):
    shape = ("--input", "1,3,16,16", "--data", "pictures")
    assert command("calibrate", "nets:image", *shape, "--out", "open")[0] == 0
    options = ("finetune", "nets:image", *shape, "--dynamic", "open", "--out", "run", "--epochs", 1)
    code, _, err = command(*options)
    assert code == 1 and "nothing to make up for: give --target" in err
    code, out, _ = command(*options, "--target", 0.7)
    assert code == 0 and "Measured on 1 of 4 samples of 3x16x16" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", 1.5), "--target: 1.5 must be a share in (0, 1]"),
        (("--target", 0.01), "below the least that this network can cost"),
        (("--dynamic", "clips"), "config.json"),
        (("--out", "pictures"), "holds other files"),
        (("--samples", 1), "one is needed to work with and one to measure on"),
        (("--lr", -1), "lr=-1"),
    ],
)
def test_refusals(reduced, options, message):
    code, _, err = reduced(*FINETUNE, *options)
    assert code == 1 and message in err
    assert not Path("run/model").exists()


def test_a_run_of_other_settings(reduced):
    """Its folder is not written over."""
    assert reduced(*FINETUNE, "--epochs", 1)[0] == 0
    code, _, err = reduced(*FINETUNE, "--epochs", 2)
    assert code == 1 and "epochs" in err


def test_the_original_features(reduced):
    """With a weight on them the blocks end nearer to the original's than without."""
    import nets

    x, missed = torch.rand(8, 3, 4, 16, 16), []
    for folder, features in (("plain", 0), ("near", 100)):
        options = ("--epochs", 4, "--batch-size", 4, "--lr", 0.01, "--features", features)
        assert reduced(*FINETUNE[:-1], folder, *options)[0] == 0
        dynamic, original = opened(f"{folder}/model"), nets.vivid().eval()
        compare = redconvert.FeatureLoss(dynamic, original)
        with torch.no_grad():
            dynamic(x), original(x)
            missed.append(float(compare()))
    assert missed[1] < 0.8 * missed[0]
