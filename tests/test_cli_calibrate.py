"""redconvert-cli calibrate: files in, a dynamic network on disk out."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cli_files import images, np, write_image, write_video
from torch import nn

import redconvert
from redconvert.cli.preprocess import default_normalisation
from redconvert.cli.samples import Batches, Item, choose, find_files, read_samples
from redconvert.errors import RedconvertError
from redconvert.sources import open_source

pytest.importorskip("av")


@pytest.fixture
def run(command):
    return lambda *arguments: command("calibrate", *arguments)


VIDEO = ("nets:video", "--input", "1,3,4,16,16", "--data", "clips", "--out", "saved")
IMAGE = ("nets:image", "--input", "1,3,16,16", "--data", "pictures", "--out", "saved")


# -- the command ---------------------------------------------------------------------------------------


def test_videos_give_what_python_gives(run):
    code, out, _ = run(*VIDEO, "--samples", 3, "--rounds", 1, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["files"] == 3 and facts["unreadable"] == {}
    assert facts["mean"] == [0.45] * 3 and facts["std"] == [0.225] * 3
    assert facts["calibration"]["samples"] == 3 and facts["calibration"]["rounds"] == 1

    import nets

    clips = [redconvert.data.load_clip(path, 4, 16) for path in ("clips/a.avi", "clips/b.mkv", "clips/deep/c.avi")]
    pixels = (torch.stack(clips) * 0.5 + 0.5).mul(255).round() / 255
    dynamic = redconvert.convert(nets.video(), example_inputs=torch.rand(1, 3, 4, 16, 16))
    wanted = redconvert.calibrate(dynamic, [(pixels - 0.45) / 0.225], rounds=1)
    for layer, told in zip(wanted.layers, facts["calibration"]["layers"], strict=True):
        assert told["name"] == layer.name
        assert told["channel_explained"] == pytest.approx(layer.channel_explained, rel=1e-3)
        assert told["temporal_explained"] == pytest.approx(layer.temporal_explained, rel=1e-3)
    saved = redconvert.from_pretrained(nets.video(), "saved")
    with torch.no_grad(), redconvert.forced(saved, channel=1), redconvert.forced(dynamic.eval(), channel=1):
        torch.testing.assert_close(saved.eval()(pixels), dynamic(pixels), rtol=1e-3, atol=1e-4)


def test_images_and_the_table(run):
    code, out, _ = run(*IMAGE, "--batch-size", 3, "--mean", "0.5", "--std", "0.5,0.25,0.5", "--plot", "bars.png")
    assert code == 0
    assert "4 samples of 3x16x16 from 4 files" in out and "mean 0.5,0.5,0.5 and std 0.5,0.25,0.5; 0 rounds" in out
    assert "16/8" in out and "32/16" in out and out.count("%") == 2
    assert Path("bars.png").read_bytes().startswith(b"\x89PNG") and Path("saved/config.json").is_file()


def test_a_glob_and_frames_in_the_batch(run):
    files = ("clips/a.avi", "clips/b.mkv")
    options = ("--out", "saved", "--num-frames", 4, "--input", "4,3,16,16", "--samples", 2, "--json")
    code, out, _ = run("nets:image", "--data", *files, *options)
    calibration = json.loads(out)["calibration"]
    assert code == 0 and calibration["samples"] == 2
    assert [layer["frame_strides"] for layer in calibration["layers"]] == [[1, 2], [1, 2]]


def test_weights_are_loaded(run):
    model = open_source("nets:image").model
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.save(model.state_dict(), "weights.pt")
    code, _, _ = run(*IMAGE, "--rounds", 0, "--weights", "weights.pt", "--json")
    assert code == 0
    assert torch.equal(redconvert.from_pretrained(open_source("nets:image").model, "saved")[0].weight, model[0].weight)


def test_unreadable_files_are_left_out_and_told(run):
    Path("pictures/broken.png").write_bytes(b"no image")
    code, out, err = run(*IMAGE, "--rounds", 0, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["calibration"]["samples"] == 4
    assert list(facts["unreadable"]) == ["pictures/broken.png"]
    assert err.startswith("warning: 1 of the files could not be read") and "broken.png" in err


def test_a_library_without_weights_warns(run):
    pytest.importorskip("timm")
    code, _, err = run(
        "timm:resnet10t", "--input", "1,3,32,32", "--data", "pictures", "--out", "saved", "--rounds", 0, "--json"
    )
    assert code == 0 and "timm:resnet10t has random weights" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*VIDEO[:4], "none", "--out", "saved"), ("there is no 'none'",)),
        ((*VIDEO[:4], "pictures", "--out", "saved"), ("no file in 'pictures' is one of .mp4",)),
        ((*VIDEO[:4], "nets.py", "--out", "saved"), ("'nets.py' is none of .mp4",)),
        ((*IMAGE[:4], "empty", "--out", "saved"), ("none of 1 files could be read", "empty/x.png")),
        ((*IMAGE[:-1], "pictures"), ("'pictures' holds other files",)),
        ((*IMAGE[:-1], "nets.py"), ("'nets.py' is a file",)),
        ((*IMAGE, "--plot", "no/where.png"), ("no folder 'no'",)),
        ((*IMAGE, "--importance", "magic"), ("--importance", "'magic'")),
        ((*IMAGE, "--device", "warp"), ("--device", "'warp'")),
        ((*IMAGE, "--weights", "gone.pt"), ("gone.pt",)),
        (("nets:grey", "--input", "1,1,16,16", *IMAGE[3:]), ("takes 1x1x16x16", "redconvert.calibrate")),
    ],
)
def test_refusals_are_one_line_and_write_nothing(run, arguments, words):
    Path("empty").mkdir()
    Path("empty/x.png").write_text("no image")
    code, out, err = run(*arguments)
    assert code == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not Path("saved").exists() and sorted(path.name for path in Path("pictures").iterdir())[0] == "a.png"


@pytest.mark.parametrize(
    "option", [("--mean", "1,2"), ("--mean", "a,b,c"), ("--std", "0,1,1"), ("--std", "nan"), ("--samples", "0")]
)
def test_wrong_numbers_are_exit_code_2(run, option):
    code, _, err = run(*IMAGE, *option)
    assert code == 2 and option[0] in err


def test_an_older_save_is_replaced(run):
    for rounds in (0, 1):
        code, _, _ = run(*IMAGE, "--rounds", rounds, "--json")
        assert code == 0
    assert len(list(Path("saved").glob("*.safetensors"))) == 1


# -- samples -------------------------------------------------------------------------------------------


def test_samples_are_spread_over_files_and_over_videos():
    files = [Path(f"{i}.mp4") for i in range(10)]
    assert [item.path.stem for item in choose(files, 5)] == ["0", "2", "4", "6", "8"]
    assert [item.position for item in choose(files[:1], 4)] == [0.125, 0.375, 0.625, 0.875]
    assert len(choose(files[:1], 100)) == 8  # no more of one video
    mixed = choose([Path("a.png"), Path("b.mp4")], 4)
    assert [(item.path.name, item.position) for item in mixed] == [
        ("a.png", 0.5),
        *(("b.mp4", position) for position in (1 / 6, 0.5, 5 / 6)),
    ]


def test_files_are_found_once_hidden_ones_never(tmp_path):
    for name in ("b.mp4", "a.AVI", ".c.mp4", "d.txt"):
        (tmp_path / name).touch()
    found = find_files([tmp_path, tmp_path / "b.mp4"], (".mp4", ".avi"))
    assert [path.name for path in found] == ["a.AVI", "b.mp4"]


def test_an_image_of_the_size_is_read_to_the_bit(tmp_path):
    path = write_image(tmp_path / "a.png", 16, 16)
    (clip,) = read_samples([Item(path)], 1, 16, 16).clips
    assert torch.equal(clip, torch.from_numpy(np.array(images.open(path))).permute(2, 0, 1)[:, None])
    (wide,) = read_samples([Item(write_image(tmp_path / "b.png", 40, 50))], 1, 16, 24).clips
    assert wide.shape == (3, 1, 16, 24)


def test_a_video_is_load_clip_in_whole_numbers(tmp_path):
    path = write_video(tmp_path / "a.avi")
    (clip,) = read_samples([Item(path, 1.0)], 4, 16, 16, step=2).clips
    wanted = redconvert.data.load_clip(path, 4, 16, 2, 1.0)
    assert clip.dtype == torch.uint8 and clip.shape == (3, 4, 16, 16)
    assert (clip.float() / 127.5 - 1 - wanted).abs().max() <= 0.5 / 127.5 + 1e-6


def test_batches_can_be_read_again_and_fill_lists():
    clips = [torch.full((3, 8, 2, 2), 51 * i, dtype=torch.uint8) for i in range(5)]
    clips[0][:] = torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1)
    batches = Batches(clips, [(1, 3, 2, 2, 2), (1, 3, 8, 2, 2)], 2, (0.2, 0.2, 0.2), (0.4, 0.2, 0.1))
    assert len(batches) == 3 and [len(fast) for ((_, fast),) in batches] == [2, 2, 1] == [len(x[1]) for (x,) in batches]
    ((slow, fast),), *_ = batches
    assert torch.equal(slow[0, 0, :, 0, 0], fast[0, 0, [0, 7], 0, 0])
    torch.testing.assert_close(fast[1, :, 0, 0, 0], torch.tensor([0.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    rows = Batches(clips, [(8, 3, 2, 2)], 2, (0.0,) * 3, (1.0,) * 3)
    (first,) = next(iter(rows))
    assert first.shape == (16, 3, 2, 2)
    torch.testing.assert_close(first[:8, 0, 0, 0], torch.arange(8) / 255)


def test_normalisation_is_the_librarys():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    del torchvision
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    plain = nn.Identity()
    cases = {
        ("torchvision:resnet18", False): imagenet,
        ("torchvision:r3d_18", True): ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),
        ("torchvision:fasterrcnn_resnet50_fpn", False): ((0, 0, 0), (1, 1, 1)),
        ("pytorchvideo:x3d_m", True): ((0.45,) * 3, (0.225,) * 3),
        ("my.module:net", False): imagenet,
    }
    for (name, video), wanted in cases.items():
        assert default_normalisation(name, plain, video) == wanted
    with torch.device("meta"):
        network = open_source("zoo:i3d_kinetics").model
    assert default_normalisation("zoo:i3d_kinetics", network, True) == ((0.5,) * 3, (0.5,) * 3)
    for name, wanted in (("resnet10t", imagenet), ("tf_efficientnet_lite0", ((0.5,) * 3, (0.5,) * 3))):
        assert default_normalisation(f"timm:{name}", timm.create_model(name), False) == wanted


def test_a_package_that_is_missing_is_no_unreadable_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(RedconvertError, match="needs the package 'PIL'"):
        read_samples([Item(write_image_without_pillow(tmp_path))], 1, 16, 16)


def write_image_without_pillow(folder: Path) -> Path:
    path = folder / "a.png"
    path.touch()
    return path
