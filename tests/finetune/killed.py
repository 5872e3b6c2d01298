"""A finetuning run that ends itself, without a word, before a given batch or while it writes its state.

``python killed.py FOLDER SAVE_EVERY WORKERS MOMENT``; the moment is a batch or write:COUNT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from problems import Planted, batches, network, run, undecided
from torch.utils.data import DataLoader

import redconvert.files
from redconvert import History
from redconvert.finetune.objective import Objective

EPOCHS, BATCHES = 2, 5


def finetuned(folder: Path | None, save_every: int | None = None, workers: int = 0, **settings) -> History:
    """Ten batches in five steps, with everything that draws random numbers: order, augmentation, dropout."""
    dynamic = undecided(network(dropout=0.5))
    train = DataLoader(Planted(38, augment=True), batch_size=8, shuffle=True, num_workers=workers)
    settings = {"epochs": EPOCHS, "lr": 0.05, "target": 0.6, "dropout": True, **settings}
    return run(dynamic, train, batches(8, 1), out=folder, save_every=save_every, **settings)


def end_before(batch: int) -> None:
    """Count training batches, and go."""
    call, count = Objective.__call__, 0

    def counted(self, network, given):
        nonlocal count
        if torch.is_grad_enabled():
            if count == batch:
                os._exit(9)
            count += 1
        return call(self, network, given)

    Objective.__call__ = counted


def end_while_writing(count: int) -> None:
    """In the middle of the count-th resume.pt: half of it is in the file beside it."""
    replace = os.replace

    def replaced(source, target):
        nonlocal count
        if Path(target).name == "resume.pt":
            count -= 1
            if not count:
                content = Path(source).read_bytes()
                Path(source).write_bytes(content[: len(content) // 2])
                os._exit(9)
        replace(source, target)

    redconvert.files.os.replace = replaced


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, every, loaders, moment = sys.argv[1:]
    if moment.startswith("write:"):
        end_while_writing(int(moment.removeprefix("write:")))
    else:
        end_before(int(moment))
    finetuned(Path(out), int(every) or None, int(loaders))
    sys.exit("was not killed")
