"""save_pretrained and from_pretrained: equal to the bit, whole at any moment, refusals before the first change."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redconvert import ConvertConfig, LayerConfig, RedconvertError, convert, files, forced
from redconvert.checkpoint import from_pretrained, read_state_dict, save_pretrained
from redconvert.convert import convert_layer
from redconvert.layers import DynamicConv, dynamic_layers

torch.set_num_threads(1)

CLIP = (3, 2, 4, 9, 9)


class Video(nn.Module):
    """A shared conv, tied linears, groups, a buffer, and a tail that stays dense."""

    def __init__(self, width: int = 8, classes: int = 5, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.stem = nn.Conv3d(2, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(width)
        self.first = nn.Sequential(nn.Conv3d(width, width, 3, padding=1, groups=2), nn.ReLU())
        self.second = nn.ModuleDict({"again": self.first[0]})
        self.squeeze = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, width, bias=False)
        self.expand.weight = self.squeeze.weight
        self.head = nn.Linear(width, classes)
        self.register_buffer("scale", torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(self.stem(x)))
        x = (self.second["again"](x) * self.scale).mean((2, 3, 4))
        return self.head(self.expand(self.squeeze(x)))


class Frames(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Gates that decide by the input, random cheap operations, and a channel order as calibration leaves it."""
    generator = torch.Generator().manual_seed(seed)
    for layer in dynamic_layers(model).values():
        with torch.no_grad():
            layer.gate.beta.normal_(generator=generator)
            layer.gate.fc2.weight.normal_(0, 2, generator=generator)
            for parameter in layer.cheap_parameters():
                parameter.normal_(generator=generator)
        if layer.cheap_c is not None:
            size = layer.out_channels // layer.groups
            groups = torch.randperm(layer.groups, generator=generator)
            layer.cheap_c.set_order((groups[:, None] * size + torch.arange(size)).flatten().flip(0))
    return model


def dynamic_video(seed: int = 0, **options: Any) -> Video:
    model = Video(seed=seed).eval()
    return shaken(convert(model, ConvertConfig(min_saving=0, **options), example_inputs=torch.zeros(CLIP)))


def assert_same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    assert type(a) is type(b)
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with torch.no_grad():
        assert torch.equal(a.eval()(x), b.eval()(x))
        last = max(len(layer.candidates.strides) for layer in dynamic_layers(a).values()) - 1
        for channel, temporal in ((1, 0), (0, last), (1, last)):
            with forced(a, channel=channel, temporal=temporal), forced(b, channel=channel, temporal=temporal):
                assert torch.equal(a(x), b(x))
    for name, layer in dynamic_layers(a).items():
        other = dynamic_layers(b)[name]
        assert other.config == layer.config and other.candidates == layer.candidates
        assert vars(other).get("feeds_norm") == vars(layer).get("feeds_norm")
        if layer.cheap_c is not None:
            assert other.cheap_c.is_identity == layer.cheap_c.is_identity
            assert torch.equal(other.cheap_c.inverse, layer.cheap_c.inverse)


# --- what comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gate": "soft", "search_space": 3, "cheap": "depthwise"}, {"gate_frames": 3}])
def test_round_trip_is_equal_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = dynamic_video(**options)
    save_pretrained(saved, tmp_path / "new" / "folder")
    fresh = Video(seed=9)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    loaded = from_pretrained(fresh, tmp_path / "new" / "folder")
    assert_same(saved, loaded, torch.randn(CLIP))
    assert loaded.first[0] is loaded.second["again"] and loaded.expand.weight is loaded.squeeze.weight
    assert loaded.stem.feeds_norm and "feeds_norm" not in vars(loaded.first[0])
    assert not loaded.first[0].cheap_c.is_identity
    # The network that was passed in is as it was.
    assert not any(isinstance(module, DynamicConv) for module in fresh.modules())
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_in_place_keeps_the_objects(tmp_path: Path) -> None:
    saved = dynamic_video()
    save_pretrained(saved, tmp_path)
    fresh = Video(seed=9)
    stem, weight = fresh.stem, fresh.stem.weight
    loaded = from_pretrained(fresh, tmp_path, inplace=True)
    assert loaded is fresh and loaded.stem is stem and loaded.stem.weight is weight
    assert_same(saved, loaded, torch.randn(CLIP))


def test_frames_in_the_batch(tmp_path: Path) -> None:
    saved = convert(Frames(), ConvertConfig(num_frames=4, min_saving=0, rules={"0": None}))
    save_pretrained(shaken(saved), tmp_path)
    loaded = from_pretrained(Frames(), tmp_path)
    assert_same(saved, loaded, torch.randn(8, 3, 9, 9))
    assert list(dynamic_layers(loaded)) == ["2"] and loaded[2].num_frames == 4


def test_a_network_that_is_one_convolution(tmp_path: Path) -> None:
    saved = shaken(convert_layer(nn.Conv2d(3, 8, 3), LayerConfig()))
    save_pretrained(saved, tmp_path)
    assert_same(saved, from_pretrained(nn.Conv2d(3, 8, 3), tmp_path), torch.randn(2, 3, 9, 9))


def test_layouts_and_views(tmp_path: Path) -> None:
    saved = dynamic_video().to(memory_format=torch.channels_last_3d)
    saved.scale = torch.arange(4.0)[2]  # a part of a larger memory
    save_pretrained(saved, tmp_path)
    assert_same(saved, from_pretrained(Video().to(memory_format=torch.channels_last_3d), tmp_path), torch.randn(CLIP))
    saved.head.weight = nn.Parameter(saved.head.weight.detach().T.contiguous().T)
    save_pretrained(saved, tmp_path)
    assert torch.equal(from_pretrained(Video(), tmp_path).head.weight, saved.head.weight)


def test_nan_weights_come_back(tmp_path: Path) -> None:
    saved = dynamic_video()
    saved.head.bias.data[0] = torch.nan
    saved.squeeze.weight.data[0, 0] = torch.inf
    save_pretrained(saved, tmp_path)
    loaded = from_pretrained(Video(), tmp_path)
    assert loaded.head.bias.isnan().tolist() == [True, False, False, False, False]


def test_compiled_and_wrapped_networks_are_saved_plain(tmp_path: Path) -> None:
    saved = dynamic_video()
    plain = list(saved.state_dict())
    saved.first = torch.compile(saved.first)
    save_pretrained(nn.DataParallel(torch.compile(saved)), tmp_path)
    loaded = from_pretrained(Video(), tmp_path)
    assert list(loaded.state_dict()) == plain
    assert torch.equal(loaded.first[0].gate.beta, saved.second["again"].gate.beta)


def test_torchvision(tmp_path: Path) -> None:
    video = pytest.importorskip("torchvision.models.video")
    x = torch.randn(1, 3, 4, 16, 16)
    saved = shaken(convert(video.r2plus1d_18(num_classes=3), example_inputs=x))
    save_pretrained(saved, tmp_path)
    assert_same(saved, from_pretrained(video.r2plus1d_18(num_classes=3), tmp_path), x)


# --- the files -----------------------------------------------------------------------------------------------------


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    saved = dynamic_video()
    (tmp_path / "model-00001-of-00002.safetensors").write_text("someone else's")
    save_pretrained(saved, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "model-00001-of-00002.safetensors", config["weights"])
    }
    assert (config["format"], config["version"], config["model"]) == ("redconvert", 1, "Video")
    assert list(config["layers"]) == ["stem", "first.0"]
    assert config["layers"]["first.0"]["aliases"] == ["second.again"]
    assert config["layers"]["first.0"]["conv"] == {
        **{"type": "Conv3d", "in_channels": 8, "out_channels": 8, "kernel_size": [3, 3, 3], "groups": 2}
    }
    assert config["shared"]["expand.weight"] == "squeeze.weight"
    assert config["shared"]["second.again.gate.beta"] == "first.0.gate.beta"
    # The weights alone are a state dict too, shared ones under all names.
    state = read_state_dict(tmp_path / config["weights"])
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in saved.state_dict().items()}


def test_saving_again_replaces_the_old_network(tmp_path: Path) -> None:
    save_pretrained(dynamic_video(0), tmp_path)
    (tmp_path / ".config.json.0badcafe.tmp").write_text("of a writer that was killed")
    save_pretrained(second := dynamic_video(1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(second, from_pretrained(Video(), tmp_path), torch.randn(CLIP))


@pytest.mark.parametrize("moment", ["weights", "config.json"])
def test_an_interrupted_save_leaves_the_old_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save_pretrained(first := dynamic_video(0), tmp_path)
    real = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if (Path(target).name == "config.json") == (moment == "config.json"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(dynamic_video(1), tmp_path)
    assert_same(first, from_pretrained(Video(), tmp_path), torch.randn(CLIP))
    save_pretrained(second := dynamic_video(1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(second, from_pretrained(Video(), tmp_path), torch.randn(CLIP))


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_checkpoint import dynamic_video
from redconvert import checkpoint
calls, real = 0, {{name: getattr(os, name) for name in ("fsync", "replace", "unlink")}}
def counted(name):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == {moment}:
            os._exit(7)
        return real[name](*args, **kwargs)
    return call
model = dynamic_video(1)
for name in real:
    setattr(os, name, counted(name))
checkpoint.save_pretrained(model, {folder!r})
"""


def test_a_killed_process_leaves_a_whole_network(tmp_path: Path) -> None:
    first, second, x = dynamic_video(0), dynamic_video(1), torch.randn(CLIP)
    outcomes = []
    for moment in (2, 3, 6, 7):  # before and after the replace of the weights, and that of the config
        folder = tmp_path / str(moment)
        save_pretrained(first, folder)
        code = KILLED.format(tests=str(Path(__file__).parent), moment=moment, folder=str(folder))
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120)
        assert done.returncode == 7
        loaded = from_pretrained(Video(), folder).eval()
        with torch.no_grad():
            outcomes.append("old" if torch.equal(loaded(x), first(x)) else "new")
            assert outcomes[-1] == "old" or torch.equal(loaded(x), second(x))
    assert outcomes == ["old", "old", "old", "new"]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(dynamic_video(), tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder: Path, **values: Any) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return config


def assert_refuses(match: str, model: nn.Module, folder: Path) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(RedconvertError, match=match):
        from_pretrained(model, folder, inplace=True)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[key].is_meta or torch.equal(after[key], before[key]) for key in before)


def test_refuses_what_is_no_save(tmp_path: Path, folder: Path) -> None:
    assert_refuses(r"there is no .*none/config\.json", Video(), tmp_path / "none")
    for text, match in (
        ("{", "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
        ("[1]", "was not written by"),
        ('{"format": "bert"}', "was not written by"),
        ('{"format": "redconvert", "version": 2, "redconvert": "9.1"}', r"upgrade.*9\.1"),
        ('{"format": "redconvert", "version": "x"}', "damaged"),
        ('{"format": "redconvert", "version": 1}', "damaged"),
        ('{"format": "redconvert", "version": 1, "layers": {}}', "no layers"),
        ('{"format": "redconvert", "version": 1, "layers": {"stem": 3}}', "damaged"),
        ('{"format": "redconvert", "version": 1, "layers": ["stem"]}', "damaged"),
    ):
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        assert_refuses(match, Video(), folder)


@pytest.mark.parametrize(("field", "value"), [("search_space", 1), ("gate", 3), ("unheard_of", 1)])
def test_refuses_damaged_layers(folder: Path, field: str, value: Any) -> None:
    layers = edit(folder)["layers"]
    layers["stem"]["config"][field] = value
    edit(folder, layers=layers)
    assert_refuses(f"damaged.*{field}", Video(), folder)


def test_refuses_damaged_weights(folder: Path) -> None:
    config = edit(folder)
    path = folder / config["weights"]
    content = path.read_bytes()
    for other in (content[:-1], content[:50], b"", content + b"x", content[:-1] + b"~"):
        path.write_bytes(other)
        assert_refuses("not what was saved", Video(), folder)
    path.write_bytes(content[:-9])
    edit(folder, sha256=hashlib.sha256(content[:-9]).hexdigest())
    assert_refuses("no whole safetensors file", Video(), folder)
    path.unlink()
    assert_refuses("cannot be read.*copy both", Video(), folder)
    edit(folder, weights="../elsewhere")
    assert_refuses("damaged.*elsewhere", Video(), folder)
    edit(folder, weights=config["weights"], shared=3)
    assert_refuses("damaged", Video(), folder)


def test_refuses_a_broken_list_of_shared_weights(folder: Path) -> None:
    edit(folder, shared={"expand.weight": "nowhere"})
    assert_refuses("damaged.*nowhere", Video(), folder)


def test_refuses_other_networks(folder: Path) -> None:
    assert_refuses(r"head\.weight \(5, 8\) instead of \(6, 8\)", Video(classes=6), folder)
    assert_refuses(r"'stem' has out_channels 12 instead of 8", Video(width=12), folder)
    assert_refuses("no Conv2d or Conv3d 'stem' .and 1 more", Frames(), folder)
    other = Video()
    other.second["again"] = nn.Conv3d(8, 8, 3, padding=1, groups=2)
    assert_refuses("'first.0' is also called nothing else", other, folder)
    other = Video()
    other.extra = nn.Linear(2, 2)
    assert_refuses(r"another network .missing: extra\.weight, extra\.bias\)", other, folder)
    other = Video()
    del other.norm
    assert_refuses(r"unexpected: norm\.\w+, norm\.\w+, norm\.\w+ and 2 more", other, folder)
    other = Video()
    other.stem = nn.Conv2d(2, 8, 3, bias=False)
    assert_refuses("'stem' has type Conv2d instead of Conv3d", other, folder)
    other = Video()
    nn.utils.parametrizations.weight_norm(other.stem)
    assert_refuses("'stem'", other, folder)


def test_refuses_networks_that_are_not_fresh(folder: Path) -> None:
    assert_refuses("already a dynamic convolution", dynamic_video(), folder)
    assert_refuses("wrapped in DataParallel", nn.DataParallel(Video()), folder)
    assert_refuses("meta device", Video().to("meta"), folder)
    with pytest.raises(RedconvertError, match=r"torch\.nn\.Module, not dict"):
        from_pretrained({}, folder)  # type: ignore[type-var]


def test_refuses_to_tie_what_was_not_tied(tmp_path: Path) -> None:
    model = dynamic_video()
    model.expand.weight = nn.Parameter(model.expand.weight.detach() + 1)
    save_pretrained(model, tmp_path)
    assert_refuses("shares 'squeeze.weight' with 'expand.weight'", Video(), tmp_path)


def test_refuses_to_save_what_cannot_come_back(tmp_path: Path) -> None:
    with pytest.raises(RedconvertError, match="no dynamic layers"):
        save_pretrained(Video(), tmp_path / "a")
    with pytest.raises(RedconvertError, match="not int"):
        save_pretrained(3, tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(RedconvertError, match="'scale' of Video is on the meta device"):
        save_pretrained(dynamic_video().to("meta"), tmp_path / "a")
    model = dynamic_video()
    model.register_buffer("scale", torch.eye(3).to_sparse())
    with pytest.raises(RedconvertError, match="'scale' of Video cannot be saved"):
        save_pretrained(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_refuses_folders_of_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RedconvertError, match="not written by redconvert: save to another folder"):
        save_pretrained(dynamic_video(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(RedconvertError, match="cannot be made"):
        save_pretrained(dynamic_video(), tmp_path / "config.json" / "deeper")
