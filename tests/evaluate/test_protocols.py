"""Protocols on networks whose answers are the pixels they are given."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from redconvert.errors import RedconvertError
from redconvert.evaluate import clip_1, video_1


class Answers(nn.Module):
    """The first values of a clip are its logits; remembers how many samples came at once, and in which mode."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.classes, self.calls = classes, []
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        return self.drop(x.flatten(1)[:, : self.classes] * self.scale)


def clips_with(logits: Tensor) -> Tensor:
    """``(..., 3, 1, 2, 2)``: clips that `Answers` reads these logits from."""
    clips = torch.zeros(*logits.shape[:-1], 12)
    clips[..., : logits.shape[-1]] = logits
    return clips.unflatten(-1, (3, 1, 2, 2))


LOGITS = torch.tensor(
    [
        [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],  # 0, then 5, 4, 3, 2; never 1
        [0.0, 8.0, 1.0, 2.0, 3.0, 4.0],  # 1
        [5.0, 4.0, 3.0, 2.0, 1.0, 0.0],  # 0, 1, 2, 3, 4; never 5
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],  # 5, 4, 3, 2, 1; never 0
    ]
)
LABELS = torch.tensor([0, 1, 4, 0])  # right, right, fifth, sixth


def test_clip_1_by_hand() -> None:
    model = Answers().train()
    model.drop.eval()
    data = TensorDataset(clips_with(LOGITS), LABELS)
    result = clip_1(model, data, batch_size=3)
    assert (result.protocol, result.top1, result.top5, result.samples) == ("clip-1", 0.5, 0.75, 4)
    assert result.right.tolist() == [True, True, False, False] and torch.equal(result.labels, LABELS)
    assert torch.equal(result.probabilities, LOGITS.softmax(1))
    assert model.calls == [(3, False), (1, False)]
    assert model.training and not model.drop.training
    right = [True, True, False, False]
    assert result.to_dict() == {"protocol": "clip-1", "top1": 0.5, "top5": 0.75, "samples": 4, "right": right}
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert str(result) == "clip-1: top-1 50.0%, top-5 75.0% of 4 videos"


@pytest.mark.parametrize("progress", [False, True])
def test_clip_1_reads_loaders_lists_and_generators(progress: bool) -> None:
    data = TensorDataset(clips_with(LOGITS), LABELS)
    expected = clip_1(Answers(), data)
    batches = [(clips_with(LOGITS[:3]), LABELS[:3]), [clips_with(LOGITS[3:]), LABELS[3:].tolist()]]
    for given in (DataLoader(data, batch_size=2), batches, iter(batches)):
        result = clip_1(Answers(), given, progress=progress)
        assert result.to_dict() == expected.to_dict() and torch.equal(result.probabilities, expected.probabilities)


def test_networks_of_two_inputs_and_of_few_classes() -> None:
    class Pathways(Answers):
        def forward(self, paths: list[Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(paths[0]) - super().forward(paths[1])

    slow, fast = clips_with(LOGITS), clips_with(torch.ones(4, 6))
    result = clip_1(Pathways(3), [([slow, fast], torch.tensor([1, 1, 1, 2]))])
    assert result.right.tolist() == [False, True, False, True]
    assert (result.top1, result.top5) == (0.5, 1.0)  # three classes are among the first five


def test_video_1_averages_softmax_over_views_by_hand() -> None:
    # One view is very sure of 0, two lean towards 1: the mean of softmax says 1, the mean of logits would say 0.
    views = torch.tensor([[[10.0, 0.0], [0.0, 2.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 1.0], [0.0, -1.0]]])
    model = Answers(2)
    result = video_1(model, [(clips_with(views), torch.tensor([1, 0]))], batch_size=4)
    e = torch.e
    sure, lean, mild = 1 / (1 + e**-10), 1 / (1 + e**2), 1 / (1 + e)
    expected = [(sure + 2 * lean) / 3, (2 * mild + (1 - mild)) / 3]
    assert result.probabilities[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[0] < 0.5 and views[0].mean(0).argmax() == 0
    assert result.right.tolist() == [True, False] and (result.protocol, result.top1) == ("video-1", 0.5)
    assert model.calls == [(4, False), (2, False)]  # six views, four at once


class Videos(Dataset[tuple[Tensor, int]]):
    """Has views, as JHMDB: view v of video i has the logits of row i + v."""

    def __init__(self, num_views: int = 1) -> None:
        self.num_views = num_views
        self.asked: tuple[int, int] | None = None

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        views = clips_with(LOGITS[index : index + self.num_views])
        return (views if self.num_views > 1 else views[0]), int(LABELS[index])

    def views(self, num_clips: int, num_crops: int) -> Videos:
        self.asked = (num_clips, num_crops)
        return Videos(num_clips * num_crops)


def test_video_1_asks_the_data_set_for_views() -> None:
    videos = Videos()
    result = video_1(Answers(), videos, num_clips=3, num_crops=1)
    assert videos.asked == (3, 1)
    for i in (0, 1):
        torch.testing.assert_close(result.probabilities[i], LOGITS[i : i + 3].softmax(1).mean(0))
    assert torch.equal(clip_1(Answers(), videos).probabilities, LOGITS[:2].softmax(1))
    video_1(Answers(), videos)
    assert videos.asked == (10, 3)


def test_one_view_is_clip_1_on_real_clips(data_dir: Any) -> None:
    pytest.importorskip("av")
    from redconvert.data import JHMDB

    torch.manual_seed(0)
    videos = JHMDB(data_dir, "test", per_class=1, size=32, short_side=128, num_frames=4)
    model = nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, 21))
    one, many = clip_1(model, videos), video_1(model, videos, num_clips=2, num_crops=3)
    assert (one.samples, many.samples) == (21, 21)
    single = video_1(model, videos, num_clips=1, num_crops=1)
    torch.testing.assert_close(single.probabilities, one.probabilities)
    views = videos.views(2, 3)[5][0]
    torch.testing.assert_close(many.probabilities[5], model(views).softmax(1).mean(0).detach())


def test_train_flags_come_back_after_an_error() -> None:
    model = Answers().train()
    with pytest.raises(RedconvertError):
        clip_1(model, [(clips_with(LOGITS), LABELS + 3)])
    assert model.training and model.drop.training


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"clip-1: no data"),
        (3, r"the data are a int; give a data set"),
        (torch.zeros(4, 3, 1, 2, 2), r"the data are a Tensor"),
        ([torch.zeros(4, 3, 1, 2, 2)], r"pair \(inputs, labels\).*a Tensor"),
        (
            [(clips_with(LOGITS), LOGITS)],
            r"pair .*a tuple of \[torch\.float32 \(4, 3, 1, 2, 2\), torch\.float32 \(4, 6\)\]",
        ),
        ([(clips_with(LOGITS), LABELS[:3])], r"gave \(4, 6\) for 3 samples; it must give \(3, classes\)"),
        ([(clips_with(LOGITS), LABELS + 2)], r"labels from 2 to 6, but the network has 6 classes"),
        ([(clips_with(LOGITS), LABELS - 1)], r"labels from -1 to 3"),
    ],
)
def test_clip_1_refuses(data: Any, message: str) -> None:
    with pytest.raises(RedconvertError, match=message):
        clip_1(Answers(), data)


def test_video_1_refuses() -> None:
    with pytest.raises(RedconvertError, match=r"views \(4, 3, 1, 2, 2\); it takes \(N, views, 3, T, H, W\).*clip_1"):
        video_1(Answers(), [(clips_with(LOGITS), LABELS)])
    with pytest.raises(RedconvertError, match=r"batch_size=0"):
        video_1(Answers(), [], batch_size=0)
    with pytest.raises(RedconvertError, match=r"video-1: no data"):
        video_1(Answers(), [])


def test_outputs_that_are_no_logits() -> None:
    class Dict(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"out": x}

    with pytest.raises(RedconvertError, match=r"the network gave dict for 4 samples"):
        clip_1(Dict(), [(clips_with(LOGITS), LABELS)])
