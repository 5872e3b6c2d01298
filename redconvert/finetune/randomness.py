"""Random numbers that depend on the position in a run alone: a resumed run then draws the same ones."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["own_randomness", "renew_loader", "seed_position"]


def seed_position(seed: int, *position: int) -> None:
    """Seed Python, NumPy (where loaded) and PyTorch by ``seed`` and a position such as epoch, batch, process."""
    mixed = _mixed(seed, *position)
    random.seed(mixed)
    torch.manual_seed(mixed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(mixed)


def _mixed(*numbers: int) -> int:
    return zlib.crc32(repr(numbers).encode())  # hash() of -1 is that of -2


def renew_loader(loader: Any, seed: int, *position: int) -> None:
    """Forget what a loader has drawn: its generators begin anew, and workers that would live on are replaced."""
    seen: list[Any] = []
    todo = [loader]
    while todo:
        part = todo.pop()
        if part is None or any(part is each for each in seen):
            continue
        seen.append(part)
        if isinstance(getattr(part, "generator", None), torch.Generator):
            part.generator.manual_seed(_mixed(seed, *position))
        todo += [getattr(part, name, None) for name in ("base_dataloader", "batch_sampler", "sampler")]
        if isinstance(part, torch.utils.data.DataLoader) and vars(part).get("_iterator") is not None:
            part._iterator = None  # persistent workers


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the global generators, and that of ``device``, as they were."""
    plain = random.getstate()
    numpy = sys.modules["numpy"].random if "numpy" in sys.modules else None
    state = numpy.get_state() if numpy else None
    own = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    try:
        with torch.random.fork_rng(**own):
            yield
    finally:
        random.setstate(plain)
        if numpy:
            numpy.set_state(state)
