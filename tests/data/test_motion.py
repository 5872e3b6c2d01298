from __future__ import annotations

from pathlib import Path

import pytest
import torch

from redconvert.data import JHMDB, motion
from redconvert.errors import RedconvertError


def test_is_the_mean_change_from_frame_to_frame() -> None:
    clips = torch.zeros(3, 3, 4, 2, 2)
    clips[1, :, 2:] = 6.0  # one of three steps is 6
    clips[2, 0, 1] = -3.0  # one of three colours goes down by 3 and comes back: two of nine steps
    assert motion(clips).tolist() == pytest.approx([0.0, 2.0, 2 * 3 / 9])
    assert motion(clips[1]).item() == 2.0


def test_uint8_does_not_wrap_and_counts_grey_levels() -> None:
    clips = torch.tensor([250, 5], dtype=torch.uint8).view(1, 1, 2, 1, 1).expand(2, 3, 2, 4, 4)
    assert motion(clips).tolist() == [245.0, 245.0]
    assert (motion(clips / 127.5 - 1) * 127.5).tolist() == pytest.approx([245.0, 245.0])
    assert motion(clips.double()).dtype == torch.float64 and motion(clips.half()).dtype == torch.float32


def test_real_clips_differ_widely(data_dir: Path) -> None:
    pytest.importorskip("av")
    videos = JHMDB(data_dir, "test", per_class=1)
    moved = {videos.classes[label]: 127.5 * float(motion(clip)) for clip, label in videos}
    order = sorted(moved, key=lambda name: moved[name])
    assert len(order) == 21 and order[0] == "swing_baseball" and order[-1] == "kick_ball"
    assert 0.2 < moved["swing_baseball"] < 1 and 10 < moved["kick_ball"] < 20  # a still camera, a moving one


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 3, 1, 4, 4), (4, 4), (2, 0, 4, 4, 4), (1, 1, 3, 4, 4, 4)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(RedconvertError, match=r"motion: the clips have shape .*at least 2 frames"):
        motion(torch.zeros(shape))
