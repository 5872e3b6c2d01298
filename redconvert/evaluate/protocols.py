"""The paper's accuracies: clip-1, one clip per video, and video-1, the mean answer over many clips of each."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import RedconvertError
from ..inputs import call_with, device_of, measuring, move_to, tensors_in
from ..progress import progress_bar

__all__ = ["Accuracy", "clip_1", "video_1"]


@dataclass(frozen=True, eq=False)
class Accuracy:
    """What a protocol found.

    Attributes:
        protocol: "clip-1" or "video-1".
        top1, top5: share of samples whose label is the first, or among the first five, from 0 to 1; with fewer than
            five classes top5 is 1.
        samples: number of videos.
        right: ``(samples,)`` bool: the first answer is the label.
        labels: ``(samples,)`` int64.
        probabilities: ``(samples, classes)`` float32, on the CPU: softmax, its mean over views in video-1.
    """

    protocol: str
    top1: float
    top5: float
    samples: int
    right: Tensor
    labels: Tensor
    probabilities: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``right`` as a list, without ``labels`` and ``probabilities``."""
        values = {name: getattr(self, name) for name in ("protocol", "top1", "top5", "samples")}
        return {**values, "right": self.right.tolist()}

    def __str__(self) -> str:
        return f"{self.protocol}: top-1 {self.top1:.1%}, top-5 {self.top5:.1%} of {self.samples} videos"


def clip_1(
    model: nn.Module, data: Any, *, batch_size: int = 8, num_workers: int = 0, progress: bool = False
) -> Accuracy:
    """Top-1 and top-5 of one clip per video. The network runs in ``eval()`` and is left as it was.

    Args:
        model: gives ``(N, classes)``.
        data: a data set of ``(clip, label)``, as `redconvert.data.JHMDB` for testing, or an iterable of batches
            ``(clips, labels)`` such as a DataLoader; clips are what the network takes, labels ``(N,)`` indices.
        batch_size, num_workers: of the DataLoader that a data set is read with.
        progress: show a bar (needs rich).

    Raises:
        RedconvertError: no data, a batch that is no such pair, labels that are no classes, or outputs of another shape.
    """
    found: list[tuple[Tensor, Tensor]] = []
    batches = _batches(data, batch_size, num_workers)
    with measuring(model), progress_bar(progress, "clip-1", _length(batches)) as step:
        for batch in batches:
            inputs, labels = _pair(batch)
            found.append((_probabilities(model, inputs, len(labels)), labels))
            step()
    return _accuracy("clip-1", found)


def video_1(
    model: nn.Module,
    data: Any,
    *,
    num_clips: int = 10,
    num_crops: int = 3,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = False,
) -> Accuracy:
    """Top-1 and top-5 per video: softmax of several views, clips through time by crops across, averaged.

    The network runs in ``eval()`` and is left as it was.

    Args:
        model: gives ``(N, classes)`` for ``(N, 3, T, H, W)``.
        data: a data set with ``views(num_clips, num_crops)``, as `redconvert.data.JHMDB` has it; or one whose items are
            ``(views, label)``, or an iterable of batches ``(N, views, 3, T, H, W), (N,)``: those say themselves how
            many views there are.
        num_clips: through time.
        num_crops: of each, across the picture.
        batch_size: how many views go through the network at once.
        num_workers: of the DataLoader that a data set is read with, one video at a time.
        progress: show a bar (needs rich).

    Raises:
        RedconvertError: as in :func:`clip_1`, or batches without an axis of views.
    """
    if batch_size < 1:
        raise RedconvertError(f"video_1: batch_size={batch_size}; it must be at least 1.")
    if hasattr(data, "views"):
        data = data.views(num_clips, num_crops)
    found: list[tuple[Tensor, Tensor]] = []
    batches = _batches(data, 1, num_workers)
    with measuring(model), progress_bar(progress, "video-1", _length(batches)) as step:
        for batch in batches:
            inputs, labels = _pair(batch)
            found.append((_mean_over_views(model, inputs, len(labels), batch_size), labels))
            step()
    return _accuracy("video-1", found)


def _mean_over_views(model: nn.Module, views: Any, num_videos: int, batch_size: int) -> Tensor:
    if not isinstance(views, Tensor) or views.dim() != 6 or len(views) != num_videos:
        shape = tuple(views.shape) if isinstance(views, Tensor) else type(views).__name__
        raise RedconvertError(
            f"video_1: a batch of {num_videos} labels has the views {shape}; it takes (N, views, 3, T, H, W). "
            "Give a data set with views(), as redconvert.data.JHMDB, or use clip_1 for single clips."
        )
    parts = [_probabilities(model, part, len(part)) for part in views.flatten(0, 1).split(batch_size)]
    return torch.cat(parts).unflatten(0, views.shape[:2]).mean(1)


def _probabilities(model: nn.Module, inputs: Any, count: int) -> Tensor:
    logits = call_with(model, move_to(inputs, device_of(model)))
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RedconvertError(f"the network gave {shape} for {count} samples; it must give ({count}, classes) logits.")
    return logits.float().softmax(1).cpu()


def _accuracy(protocol: str, found: list[tuple[Tensor, Tensor]]) -> Accuracy:
    if not found:
        raise RedconvertError(f"{protocol}: no data. Give at least one batch (an iterator can be used only once).")
    probabilities, labels = torch.cat([p for p, _ in found]), torch.cat([y for _, y in found])
    classes = probabilities.shape[1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise RedconvertError(
            f"{protocol}: labels from {int(labels.min())} to {int(labels.max())}, but the network has {classes} "
            "classes, counted from 0. Give one whose last layer fits the data."
        )
    best = probabilities.topk(min(5, classes), dim=1).indices == labels[:, None]
    right = best[:, 0]
    top1, top5 = (float(hits.double().mean()) for hits in (right, best.any(1)))
    return Accuracy(protocol, top1, top5, len(labels), right, labels, probabilities)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch, labels on the CPU."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and tensors_in(batch[0]):
        labels = torch.as_tensor(batch[1])
        if labels.dim() == 1 and len(labels) and not labels.is_floating_point():
            return batch[0], labels.cpu()
    raise RedconvertError(
        "a batch is a pair (inputs, labels), labels (N,) whole numbers, as a DataLoader over (clip, label) gives; "
        f"this one is {_describe(batch)}."
    )


def _describe(batch: Any) -> str:
    if not isinstance(batch, tuple | list):
        return f"a {type(batch).__name__}"
    parts = (f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in batch)
    return f"a {type(batch).__name__} of [{', '.join(parts)}]"


def _batches(data: Any, batch_size: int, num_workers: int) -> Iterable[Any]:
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=batch_size, num_workers=num_workers)
    if isinstance(data, Iterable) and not isinstance(data, Tensor | dict | str):
        return data
    raise RedconvertError(f"the data are a {type(data).__name__}; give a data set, a DataLoader or a list of batches.")


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sized) else None
