"""J-HMDB on a made-up folder whose every pixel is known, and on the real one."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from redconvert.data import JHMDB, load_clip, read_video, to_clip
from redconvert.data.crops import placed_square, random_run, random_square
from redconvert.data.jhmdb import data_root
from redconvert.errors import RedconvertError

av = pytest.importorskip("av")

HEIGHT, WIDTH = 16, 24


def picture(frame: int) -> torch.Tensor:
    """Red is the frame, green the row, blue the column, all times 5: ``(H, W, 3)``."""
    rows = torch.arange(HEIGHT).view(-1, 1).expand(HEIGHT, WIDTH)
    columns = torch.arange(WIDTH).view(1, -1).expand(HEIGHT, WIDTH)
    return torch.stack([torch.full((HEIGHT, WIDTH), frame), rows, columns], dim=2).mul(5).to(torch.uint8)


def write_video(path: Path, num_frames: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        for frame in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(frame).numpy(), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; for training a/1 and a/2 (12 frames) and b/1 (5 frames), for testing b/2 (12 frames)."""
    table = "clip,label,split,num_frames\n"
    for name, split, num_frames in (
        ("b/1", "train", 5),
        ("b/2", "test", 12),
        ("a/1", "train", 12),
        ("a/2", "train", 12),
    ):
        write_video(tmp_path / "small" / f"{name}.mp4", num_frames)
        table += f"{name}.mp4,{name[0]},{split},{num_frames}\n"
    (tmp_path / "small" / "split1.csv").write_text(table)
    return tmp_path


def small(root: Path, split: Any = "train", **options: Any) -> JHMDB:
    return JHMDB(root, split, **({"folder": "small", "num_frames": 4, "size": 8, "short_side": 16} | options))


def where(clip: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    """The frames, rows and columns of the video that an unscaled clip is made of."""
    values = (clip * 127.5 + 127.5).div(5).round().int()
    return values[0, :, 0, 0].tolist(), values[1, 0, :, 0].tolist(), values[2, 0, 0].tolist()


# --- items ---------------------------------------------------------------------------------------------------------


def test_items_in_order_of_class(root: Path) -> None:
    train, test = small(root), small(root, "test")
    assert (train.names, train.labels, train.classes) == (["a/1", "a/2", "b/1"], [0, 0, 1], ["a", "b"])
    assert (test.names, test.labels, len(test)) == (["b/2"], [1], 1)
    assert test.classes == train.classes
    assert (train.clips, test.clips) == ("random", "center")
    assert small(root, per_class=1).names == ["a/1", "b/1"]
    assert torch.equal(train.frames(0), torch.stack([picture(frame) for frame in range(12)]))


def test_the_middle_of_time_and_picture(root: Path) -> None:
    clip, label = small(root, "test")[0]
    assert (clip.dtype, clip.shape, label) == (torch.float32, (3, 4, 8, 8), 1)
    assert where(clip) == ([4, 5, 6, 7], [*range(4, 12)], [*range(8, 16)])
    assert where(small(root, "test", step=3)[0][0])[0] == [1, 4, 7, 10]
    assert where(small(root, clips="center", num_frames=8)[2][0])[0] == [0, 1, 2, 3, 4, 0, 1, 2]  # of five frames
    normal = small(root, "test", mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))[0][0]
    assert torch.allclose(normal[2], ((clip[2] + 1) / 2 - 1) / 0.25, atol=1e-6)


def test_short_side_is_what_load_clip_means_by_it(root: Path) -> None:
    videos = small(root, "test", size=8, short_side=8)  # the picture at half its size
    whole = load_clip(videos.path(0), 4, 8, short_side=8, fps=None)  # scaled first and cut then: other edges
    torch.testing.assert_close(videos[0][0][..., 1:-1], whole[..., 1:-1])


def test_random_clips_reach_everything_and_nothing_else(root: Path) -> None:
    torch.manual_seed(0)
    videos = small(root, jitter=(1.0, 1.0), cache=True)
    seen = [where(videos[0][0]) for _ in range(400)]
    starts, tops = Counter(frames[0] for frames, _, _ in seen), Counter(rows[0] for _, rows, _ in seen)
    lefts = Counter(min(columns) for _, _, columns in seen)
    assert sorted(starts) == list(range(9)) and sorted(tops) == list(range(9)) and sorted(lefts) == list(range(17))
    assert all(frames == list(range(frames[0], frames[0] + 4)) for frames, _, _ in seen)
    assert all(rows == list(range(rows[0], rows[0] + 8)) for _, rows, _ in seen)
    mirrored = [columns[0] > columns[-1] for _, _, columns in seen]
    assert 150 < sum(mirrored) < 250
    assert all(sorted(columns) == list(range(min(columns), min(columns) + 8)) for _, _, columns in seen)
    assert not any(columns[0] > columns[-1] for columns in (where(small(root, flip=0)[0][0])[2] for _ in range(10)))
    assert where(small(root, num_frames=8)[2][0])[0] == [0, 1, 2, 3, 4, 0, 1, 2]  # too short: looped from its beginning


def test_jitter_draws_the_side_of_the_square() -> None:
    torch.manual_seed(0)
    frames = torch.zeros(1, 100, 150, 3, dtype=torch.uint8)
    sides = Counter(random_square(frames, 80, (1.0, 2.0)).shape[1:3] for _ in range(300))
    assert {height == width for height, width in sides} == {True}
    heights = sorted(height for height, _ in sides.elements())
    assert (heights[0], heights[-1]) == (40, 80)
    assert abs(heights[150] - 80 / 1.5) < 3  # the median of 80 / j


def test_places_along_the_long_side() -> None:
    wide = torch.arange(24).view(1, 1, 24, 1).expand(1, 16, 24, 3)
    assert [int(placed_square(wide, 16, along)[0, 0, 0, 0]) for along in (0.0, 0.5, 1.0)] == [0, 4, 8]
    tall = wide.transpose(1, 2)
    assert [int(placed_square(tall, 10, along)[0, 0, 0, 0]) for along in (0.0, 0.5, 1.0)] == [0, 7, 14]
    assert placed_square(tall, 99).shape == (1, 16, 16, 3)


def test_random_runs_start_anywhere() -> None:
    torch.manual_seed(0)
    starts = Counter(tuple(random_run(torch.arange(7), 3, 2).tolist()) for _ in range(60))
    assert sorted(starts) == [(0, 2, 4), (1, 3, 5), (2, 4, 6)]


def test_seed_decides(root: Path) -> None:
    videos = small(root)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(torch.stack([videos[index][0] for index in (0, 1, 2)]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("cache", [False, True])
def test_works_in_workers_and_through_pickle(root: Path, cache: bool) -> None:
    videos = small(root, cache=cache)
    torch.manual_seed(3)
    loader = DataLoader(videos, batch_size=3, num_workers=1)
    (first, labels), (second, _) = next(iter(loader)), next(iter(loader))
    assert first.shape == (3, 3, 4, 8, 8) and labels.tolist() == [0, 0, 1]
    assert not torch.equal(first, second)  # other random numbers in the next epoch
    torch.manual_seed(3)
    assert torch.equal(next(iter(loader))[0], first)
    again = pickle.loads(pickle.dumps(videos))
    torch.manual_seed(4)
    expected = videos[0][0]
    torch.manual_seed(4)
    assert torch.equal(again[0][0], expected)


@pytest.mark.parametrize("cache", [False, True])
def test_clips_are_made_where_they_are_asked_for(root: Path, cache: bool) -> None:
    videos = small(root, cache=cache, device="meta")  # what is computed there has a shape alone
    assert videos[0][0].is_meta and videos[0][0].shape == (3, 4, 8, 8)
    assert videos.views(2, 3)[0][0].is_meta and videos.views(2, 3)[0][0].shape == (6, 3, 4, 8, 8)
    assert not videos.frames(0).is_meta
    batch, labels = next(iter(DataLoader(videos, batch_size=3)))
    assert batch.is_meta and labels.tolist() == [0, 0, 1]


def test_cache_decodes_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counting(path: Path) -> torch.Tensor:
        read.append(path)
        return read_video(path)

    monkeypatch.setattr("redconvert.data.jhmdb.read_video", counting)
    videos = small(root, cache=True, progress=True)
    assert read == [videos.path(index) for index in range(3)]
    assert [len(videos[index][0]) for index in range(3)] == [3, 3, 3]
    lazy = small(root)
    assert len(read) == 3
    assert lazy[1][0].shape == (3, 4, 8, 8) and read[3:] == [lazy.path(1)]


# --- views ---------------------------------------------------------------------------------------------------------


def test_views_are_even_in_time_and_along_the_long_side(root: Path) -> None:
    views, label = small(root, "test").views(num_clips=3, num_crops=3)[0]
    assert views.shape == (9, 3, 4, 8, 8) and label == 1
    places = [where(view) for view in views]
    assert [frames[0] for frames, _, _ in places] == [0, 0, 0, 4, 4, 4, 8, 8, 8]
    assert [columns[0] for _, _, columns in places] == [0, 8, 16] * 3
    assert {rows[0] for _, rows, _ in places} == {4}


def test_one_view_is_the_centre_clip(root: Path) -> None:
    videos = small(root, "test")
    assert torch.equal(videos.views(1, 1)[0][0][0], videos[0][0])
    assert torch.equal(small(root).views(1, 1)[0][0][0], small(root, clips="center")[0][0])  # random or not
    assert len(small(root).views()) == 3 and small(root).views()[2][0].shape[0] == 30


# --- the real ones -------------------------------------------------------------------------------------------------


def test_the_first_split(data_dir: Path) -> None:
    train, test = JHMDB(data_dir, "train"), JHMDB(data_dir, "test")
    assert (len(train), len(test), len(train.classes)) == (660, 268, 21)
    assert not set(train.names) & set(test.names)
    assert train.classes[:3] == ["brush_hair", "catch", "clap"] and train.classes == test.classes
    assert set(train.labels) == set(test.labels) == set(range(21))
    assert all(
        train.classes[label] == name.split("/")[0] for name, label in zip(train.names, train.labels, strict=True)
    )
    assert len(JHMDB(data_dir, "train", per_class=2)) == 42


@pytest.mark.parametrize(("folder", "size", "frame"), [("jhmdb_128", 112, (128, 170)), ("jhmdb", 224, (240, 320))])
def test_real_clips(data_dir: Path, folder: str, size: int, frame: tuple[int, int]) -> None:
    torch.manual_seed(0)
    videos = JHMDB(data_dir, "train", folder=folder, size=size)
    for index in (0, 333, 659):
        frames = videos.frames(index)
        assert frames.dtype == torch.uint8 and frames.shape[1:] == (*frame, 3) and 15 <= len(frames) <= 40
        clip, label = videos[index]
        assert clip.shape == (3, 16, size, size) and label == videos.labels[index]
        assert -1 <= clip.min() < -0.9 and 0.1 < clip.max() <= 1


def test_the_middle_of_a_real_clip_is_not_scaled(data_dir: Path) -> None:
    videos = JHMDB(data_dir, "test")
    frames = videos.frames(0)  # 40 of them
    assert torch.equal(videos[0][0], to_clip(frames[12:28, 8:120, 29:141], 112))
    assert torch.equal(videos[0][0], load_clip(videos.path(0), 16, 112, fps=None))


def test_finds_the_data_by_itself(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDCONVERT_DATA", str(data_dir))
    assert data_root() == data_dir and len(JHMDB(split="test")) == 268


# --- refusals ------------------------------------------------------------------------------------------------------


def test_refuses_absent_folders_and_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDCONVERT_DATA", str(root / "nowhere"))
    with pytest.raises(RedconvertError, match=r"nowhere' is absent\. Give root=.*REDCONVERT_DATA"):
        JHMDB()
    with pytest.raises(RedconvertError, match=r"jhmdb_128' is absent\. Give root="):
        JHMDB(root)
    (root / "small" / "a" / "2.mp4").unlink()
    with pytest.raises(RedconvertError, match=r"1 of 3 clips are absent, the first is '.*small/a/2\.mp4'"):
        small(root)
    assert len(small(root, "test")) == 1
    (root / "small" / "split1.csv").rename(root / "split1.csv")
    with pytest.raises(RedconvertError, match=r"neither '.*small/split1\.csv' nor '.*jhmdb/split1\.csv' is there"):
        small(root)
    (root / "jhmdb").mkdir()
    (root / "split1.csv").rename(root / "jhmdb" / "split1.csv")
    assert len(small(root, "test")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, r"split='val'; it is 'train' or 'test'"),
        ({"clips": "centre"}, r"clips='centre'; it is 'random' or 'center'"),
        ({"num_frames": 0}, r"num_frames=0; it must be at least 1"),
        ({"size": 0, "short_side": None}, r"size=0; it must be at least 1"),
        ({"step": 0}, r"step=0; it must be at least 1"),
        ({"short_side": 7}, r"short_side=7; it must be at least 8"),
        ({"per_class": 0}, r"per_class=0; it must be at least 1"),
        ({"flip": 1.5}, r"flip=1\.5; it is a probability"),
        ({"jitter": (0.4, 1.0)}, r"jitter=\(0\.4, 1\.0\).*room for size=8"),
        ({"jitter": (1.2, 1.0)}, r"jitter="),
        ({"mean": (0.1, 0.2)}, r"mean="),
    ],
)
def test_refuses_bad_arguments(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RedconvertError, match=message):
        small(root, **options)[0]


def test_refuses_no_views(root: Path) -> None:
    with pytest.raises(RedconvertError, match=r"num_clips=0 and num_crops=3 must be at least 1"):
        small(root).views(0)
