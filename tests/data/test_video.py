from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redconvert.data import load_clip, read_video, resize_center_crop, sample_clip, to_clip
from redconvert.data import video as video_module
from redconvert.errors import MissingExtraError, RedconvertError

av = pytest.importorskip("av")

NUM_FRAMES, HEIGHT, WIDTH = 12, 24, 40


def grey(index: int) -> int:
    return 16 * index + 20


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames, lossless; frame i is grey with the value 16i + 20."""
    path = tmp_path_factory.mktemp("video") / "grey.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        for index in range(NUM_FRAMES):
            image = np.full((HEIGHT, WIDTH, 3), grey(index), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def sound_only(tmp_path: Path) -> Path:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(frames: torch.Tensor) -> list[int]:
    assert frames.dtype == torch.uint8
    assert frames.shape[1:] == (HEIGHT, WIDTH, 3)
    assert (frames == frames[:, :1, :1, :1]).all()
    return frames[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({}, range(12)),
        ({"num_frames": 3}, [0, 1, 2]),
        ({"num_frames": 3, "start": 4, "step": 2}, [4, 6, 8]),
        ({"start": 5, "step": 3}, [5, 8, 11]),
        ({"num_frames": 9, "start": 10}, [10, 11]),
    ],
)
def test_reads_the_right_frames(video: Path, options: dict[str, int], indices: list[int]) -> None:
    assert greys(read_video(video, **options)) == [grey(i) for i in indices]


def test_colour_order_is_rgb(tmp_path: Path) -> None:
    path = tmp_path / "red.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 8, "bgr0"
        image = np.zeros((8, 16, 3), np.uint8)
        image[..., 0] = 200
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert read_video(path)[0, 3, 5].tolist() == [200, 0, 0]


def test_stops_as_soon_as_it_has_enough(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, decoded = video_module._open_video, []

    class Counting:
        def __init__(self, container: Any) -> None:
            self.container = container

        def decode(self, stream: Any) -> Iterator[Any]:
            for frame in self.container.decode(stream):
                decoded.append(frame)
                yield frame

    @contextmanager
    def counting(path: Path) -> Iterator[tuple[Any, Any]]:
        with real(path) as (container, stream):
            yield Counting(container), stream

    monkeypatch.setattr(video_module, "_open_video", counting)
    assert len(read_video(video, num_frames=2, start=1, step=3)) == 2
    assert len(decoded) == 5


def test_reads_part_of_a_compressed_video(data_dir: Path) -> None:
    source = data_dir / "kinetics_clips" / "biking.mpg"
    frames = read_video(source, num_frames=2, start=3)
    assert frames.shape == (2, 240, 320, 3)
    assert torch.equal(frames, read_video(source, num_frames=5)[3:])


def test_reads_a_file_whose_title_is_not_utf8(data_dir: Path) -> None:
    assert read_video(data_dir / "kinetics_clips" / "cartwheel.avi", num_frames=1).shape == (1, 240, 320, 3)


@pytest.mark.parametrize(
    ("num_frames", "step", "position", "expected"),
    [
        (4, 1, "center", [3, 4, 5, 6]),
        (4, 1, 0.0, [0, 1, 2, 3]),
        (4, 1, 1.0, [6, 7, 8, 9]),
        (3, 2, "center", [2, 4, 6]),
        (10, 1, "center", list(range(10))),
        (12, 1, "center", [*range(10), 0, 1]),
        (4, 4, 1.0, [0, 4, 8, 2]),
    ],
)
def test_sample_clip(num_frames: int, step: int, position: float, expected: list[int]) -> None:
    video = torch.arange(10).view(10, 1, 1, 1)
    assert sample_clip(video, num_frames, step, position).flatten().tolist() == expected


def test_resize_scales_the_short_side_and_crops_the_middle() -> None:
    # A ramp over the width: column c has the value c. Half as large, columns 2c and 2c + 1 give about 2c + 0.5.
    frames = torch.arange(40, dtype=torch.uint8).view(1, 1, 40, 1).expand(2, 24, 40, 3)
    out = resize_center_crop(frames, 12)
    assert out.shape == (3, 2, 12, 12)
    columns = torch.arange(4, 16) * 2 + 0.5
    torch.testing.assert_close(out, columns.expand(3, 2, 12, 12))


def test_short_side_leaves_a_margin() -> None:
    frames = torch.arange(40, dtype=torch.uint8).view(1, 1, 40, 1).expand(1, 24, 40, 3)
    out = resize_center_crop(frames, 8, short_side=24)  # not scaled: the middle 8 of 24 and of 40
    assert torch.equal(out, torch.arange(16.0, 24.0).expand(3, 1, 8, 8))


def test_tall_video() -> None:
    frames = torch.randint(0, 256, (1, 50, 20, 3), dtype=torch.uint8)
    assert torch.equal(resize_center_crop(frames, 20)[:, 0], frames[0, 15:35].permute(2, 0, 1).float())


def test_other_devices_scale_several_frames_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(0, 256, (7, 20, 30, 3), dtype=torch.uint8)
    assert resize_center_crop(frames.to("meta"), 12, 16).shape == (3, 7, 12, 12)
    monkeypatch.setattr("redconvert.data.video.together_on", lambda device: 3)
    several = resize_center_crop(frames, 12, 16)
    monkeypatch.undo()
    assert torch.equal(several, resize_center_crop(frames, 12, 16))


def test_to_clip_normalises() -> None:
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 8, 8, 3)
    assert to_clip(frames, 8)[:, :, 0, 0].tolist() == [[-1.0, 1.0]] * 3
    clip = to_clip(frames, 8, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    assert clip[:, :, 0, 0].tolist() == [[0.0, 1.0], [-1.0, 1.0], [-4.0, 0.0]]


def indices(clip: torch.Tensor) -> list[int]:
    """Which of the grey video's frames a clip is made of."""
    levels = (clip[0, :, 0, 0] * 127.5 + 127.5 - 20) / 16
    return levels.round().int().tolist()


def test_load_clip(video: Path) -> None:
    clip = load_clip(video, num_frames=4, size=16, fps=None)
    assert clip.shape == (3, 4, 16, 16)
    expected = torch.tensor([grey(i) / 127.5 - 1 for i in (4, 5, 6, 7)])
    torch.testing.assert_close(clip, expected.view(1, 4, 1, 1).expand_as(clip))


def test_load_clip_repeats_a_short_video(video: Path) -> None:
    assert indices(load_clip(video, num_frames=30, size=8, fps=None)) == [i % 12 for i in range(30)]
    assert indices(load_clip(video, num_frames=9, size=8, fps=5)) == [0, 2, 4, 6, 8, 10, 0, 2, 4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [  # ten frames per second in the file
        ({"num_frames": 8}, [4, 4, 4, 5, 5, 6, 6, 6]),  # 25
        ({"num_frames": 4, "fps": 5}, [2, 4, 6, 8]),
        ({"num_frames": 4, "fps": 4}, [2, 4, 7, 9]),
        ({"num_frames": 4, "fps": 4, "position": 0.0}, [0, 2, 5, 7]),
        ({"num_frames": 4, "fps": 4, "position": 1.0}, [4, 6, 9, 11]),
        ({"num_frames": 3, "fps": 20, "step": 4}, [3, 5, 7]),
        ({"num_frames": 2, "fps": 10 / 3, "step": 2}, [2, 8]),
    ],
)
def test_load_clip_resamples_in_time(video: Path, options: dict[str, Any], expected: list[int]) -> None:
    assert indices(load_clip(video, size=8, **options)) == expected


def test_load_clip_without_a_known_rate(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_module, "_length_and_rate", lambda path: (12, None))
    assert indices(load_clip(video, num_frames=4, size=8)) == [4, 5, 6, 7]


@pytest.mark.parametrize("counted", [15, 40])
def test_load_clip_counts_again_where_packets_are_no_frames(
    video: Path, monkeypatch: pytest.MonkeyPatch, counted: int
) -> None:
    monkeypatch.setattr(video_module, "_length_and_rate", lambda path: (counted, None))
    assert indices(load_clip(video, num_frames=4, size=8, position=1.0)) == [8, 9, 10, 11]
    assert indices(load_clip(video, num_frames=14, size=8)) == [*range(12), 0, 1]


def test_load_clip_is_the_recipe_of_the_kinetics_weights(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data_dir / "kinetics_clips" / "segway_3.mp4"  # 327 frames, 30000/1001 per second
    real, kept = video_module._decode, []

    def listening(*args: Any) -> Any:
        frames, decoded = real(*args)
        kept.append((sorted(frames), decoded))
        return frames, decoded

    monkeypatch.setattr(video_module, "_decode", listening)
    assert load_clip(path, size=8).shape == (3, 64, 8, 8)
    rate = 30000 / 1001
    start = int(327 - 64 * rate / 25) // 2
    # No other frame is held, and none is decoded behind the clip.
    assert kept == [([start + int(i * rate / 25) for i in range(64)], start + int(63 * rate / 25) + 1)]


@pytest.mark.parametrize("name", ["segway_1.mp4", "biking.mpg", "juggling_1.avi"])
def test_load_clip_is_the_steps_one_by_one(data_dir: Path, name: str) -> None:
    path = data_dir / "kinetics_clips" / name
    expected = to_clip(sample_clip(read_video(path), 6, 2, 0.7), 28, short_side=32)
    assert torch.equal(load_clip(path, 6, 28, step=2, position=0.7, fps=None), expected)


def test_load_clip_at_the_end_of_a_file_with_a_packet_too_many(data_dir: Path) -> None:
    path = data_dir / "kinetics_clips" / "cartwheel.avi"
    expected = to_clip(read_video(path)[-3:], 28, short_side=32)
    assert torch.equal(load_clip(path, 3, 28, position=1.0, fps=None), expected)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_video, load_clip])
def test_refuses_what_is_not_a_video(read, tmp_path: Path, sound_only: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RedconvertError, match=r"nowhere\.mp4' is no file"):
        read(tmp_path / "nowhere.mp4")
    with pytest.raises(RedconvertError, match="is no file"):
        read(tmp_path)
    junk = tmp_path / "junk.mp4"
    junk.write_bytes(b"this is not a video" * 100)
    with pytest.raises(RedconvertError, match=r"junk\.mp4' could not be read as a video"):
        read(junk)
    with pytest.raises(RedconvertError, match="no video stream"):
        read(sound_only)


def test_refuses_a_video_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "empty.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 8, "bgr0"
        container.start_encoding()
    with pytest.raises(RedconvertError, match="no frame in it"):
        read_video(path)
    with pytest.raises(RedconvertError, match="no frame in it"):
        load_clip(path)


def test_refuses_a_start_behind_the_end(video: Path) -> None:
    with pytest.raises(RedconvertError, match="has 12 frames, so none at start=12"):
        read_video(video, start=12)


def test_load_clip_refuses_bad_numbers(video: Path) -> None:
    for name, value in (("fps", 0), ("fps", -25.0), ("fps", float("nan")), ("fps", float("inf")), ("num_frames", 0)):
        with pytest.raises(RedconvertError, match=f"load_clip: {name}="):
            load_clip(video, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(RedconvertError, match="load_clip: step=0"):
        load_clip(video, step=0)


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"start": -1}, {"step": 0}])
def test_read_video_refuses_bad_numbers(video: Path, options: dict[str, int]) -> None:
    with pytest.raises(RedconvertError, match=f"{next(iter(options))}=.*at least"):
        read_video(video, **options)


def test_sample_clip_refuses_bad_arguments() -> None:
    frames = torch.zeros(5, 2, 2, 3)
    for options in ({"position": 1.5}, {"position": "middle"}, {"step": 0}, {"num_frames": 0}):
        with pytest.raises(RedconvertError, match=next(iter(options))):
            sample_clip(frames, **({"num_frames": 2} | options))  # type: ignore[arg-type]
    with pytest.raises(RedconvertError, match="no frames"):
        sample_clip(frames[:0], 2)


def test_resize_and_to_clip_refuse_bad_arguments() -> None:
    frames = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    for bad in (frames.float(), frames[0], frames.permute(0, 3, 1, 2), frames[:0]):
        with pytest.raises(RedconvertError, match="time is axis 0"):
            resize_center_crop(bad, 4)
    with pytest.raises(RedconvertError, match="short_side=3"):
        resize_center_crop(frames, 4, short_side=3)
    with pytest.raises(RedconvertError, match="mean="):
        to_clip(frames, 4, mean=(0.1, 0.2))


def test_missing_pyav_names_the_extra(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"redconvert\[video\]"):
        read_video(video)


LOGGING = """
import logging, sys
import av.logging
from redconvert.data import load_clip

av.logging.set_level(av.logging.DEBUG)  # what decodes ahead says a lot, through Python
logging.getLogger("libav").setLevel(100)
for _ in range(60):
    load_clip(sys.argv[1], num_frames=2, size=8, position=0.0)
"""


def test_closing_a_video_does_not_wait_for_threads_that_wait_for_python(tmp_path: Path) -> None:
    noise, path = np.random.default_rng(0), tmp_path / "noise.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = 160, 128
        for _ in range(40):
            image = noise.integers(0, 255, (128, 160, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    subprocess.run([sys.executable, "-c", LOGGING, str(path)], check=True, timeout=60)
