"""What calibration costs beyond running the network: ResNet-56 on 1,000 images, I3D on 63 clips.

    python benchmarks/calibration_time.py --cifar FOLDER    # see benchmarks/cifar.py for what the folder holds

A calibration is a few passes over the batches, forward and backward, and reduced beside dense, and what is
collected and solved for meanwhile. Time in the network's own layers is told apart from the rest, which is also given
in passes of the dense network over the same batches. Rows say on how many threads: run it with OMP_NUM_THREADS=1 and
with as many as there are cores. Clips: ``$REDCONVERT_DATA``, or ``../shared/data``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from asking import answers
from cifar import convert, images, resnet56
from common import RESULTS, environment, seconds, write
from i3d_agreement import AGREEING, center_clips
from i3d_agreement import convert as convert_i3d
from torch import Tensor, nn

import redconvert
from redconvert import zoo
from redconvert.calibrate.metric import AnswerMetric
from redconvert.calibrate.passes import Passes
from redconvert.calibrate.statistics import ChannelMoments


class Stopwatch:
    """Seconds within any of the functions that it wraps; a call within another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - begin

        return timed


@contextmanager
def watching() -> Iterator[tuple[Stopwatch, Stopwatch]]:
    """Stopwatches of whole passes, and of what is collected within them."""
    passes, collecting = Stopwatch(), Stopwatch()
    original = Passes.run

    def watched_pass(self: Any, collect: Any, *args: Any, **kwargs: Any) -> None:
        original(self, collecting.wrapped(collect), *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Passes, "run", passes.wrapped(watched_pass)))
        for owner, name in ((AnswerMetric, "_add"), (ChannelMoments, "add")):
            stack.enter_context(patch.object(owner, name, collecting.wrapped(getattr(owner, name))))
        yield passes, collecting


def measure(base: nn.Module, dynamic: nn.Module, batches: list[Tensor], rounds: int) -> dict[str, float]:
    dense = statistics.median(seconds(lambda: [answers(base, batch) for batch in batches]) for _ in range(3))
    with watching() as (passes, collecting):
        whole = redconvert.calibrate(dynamic, batches, rounds=rounds).seconds
    beyond = whole - passes.seconds + collecting.seconds
    return {
        "samples": sum(map(len, batches)),
        "rounds": rounds,
        "dense_pass_s": round(dense, 2),
        "calibration_s": round(whole, 2),
        "collecting_s": round(collecting.seconds, 2),
        "solving_s": round(whole - passes.seconds, 2),
        "beyond_s": round(beyond, 2),
        "beyond_in_dense_passes": round(beyond / dense, 2),
    }


def resnet_rows(folder: Path, seed: int) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    base, (pixels, _) = resnet56(folder), images(folder, "train")
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:1000]
    batches = list(pixels[chosen].split(100))
    for name, options in {
        "pointwise": {"cheap": "pointwise"},
        "principal": {"cheap": "principal"},
        "absorbed": {"cheap": "pointwise", "absorb": True},
        "mixed inputs": {"cheap": "principal", "mix_inputs": True},
    }.items():
        yield f"ResNet-56, {name}", lambda options=options: measure(base, convert(base, **options), batches, 0)
    yield "ResNet-56, principal, 1 round", lambda: measure(base, convert(base, cheap="principal"), batches, 1)


def i3d_rows() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    base, batches = zoo.create("i3d_kinetics", weights="KINETICS400").eval(), center_clips("train", 3)
    half = {"shares": (0.5,)}
    for name, options in {
        "rebuilt": AGREEING["rebuilt"] | half,
        "principal, all layers": AGREEING["principal, all layers"] | half,
        "principal, all layers, six candidates": AGREEING["principal, all layers"],
    }.items():
        make = partial(convert_i3d, base, batches[0][:1], **options)
        yield f"I3D, {name}", lambda make=make: measure(base, make(), batches, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cifar", type=Path, help="leave it out for I3D alone")
    parser.add_argument("--networks", nargs="+", choices=["resnet56", "i3d"], default=["resnet56", "i3d"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration_time.json")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    result["what"] = __doc__.split("\n")[0]
    rows = []
    if arguments.cifar and "resnet56" in arguments.networks:
        rows += resnet_rows(arguments.cifar, arguments.seed)
    if "i3d" in arguments.networks:
        rows += i3d_rows()
    threads = torch.get_num_threads()
    for name, run in ((f"{name}, {threads} thread{'s' * (threads > 1)}", run) for name, run in rows):
        if name not in result["rows"]:
            result["rows"][name] = run()
            write(result | environment(arguments.seed), arguments.out)
            print(f"{name:<44} {json.dumps(result['rows'][name])}", flush=True)


if __name__ == "__main__":
    main()
