"""I3D on J-HMDB: dynamic against dense at equal epochs.

    python benchmarks/jhmdb_i3d.py                  # finetuned on split 1
    python benchmarks/jhmdb_i3d.py --base-epochs 1 --epochs 1 --per-class 4 --rows dense "both 0.6"   # quick
    python benchmarks/jhmdb_i3d.py --device cuda --frames 16 --size 112 --batch 16 --base-epochs 10 --epochs 6 \
        --base-lr 0.01 --lr 0.004 --gate-lr 0.05 --seeds 0 1 2 --jobs 5 --out benchmarks/results/jhmdb_i3d_gpu.json

I3D with its Kinetics weights gets a new head and is finetuned for ``--base-epochs``: the network that a user
would bring. Every row then goes on from it for ``--epochs`` with the same schedule: dense, or dynamic with gates on
channels, frames or both. JSON is written after every row; a row that is in it already is not run again. The networks
stay in ``--work``, and jhmdb_time.py times them. Data: ``$REDCONVERT_DATA``, or ``../shared/data``.

With several seeds each has its own base; rows are under ``seeds`` in the JSON, and averages under ``mean``. One process
leaves a GPU waiting, as dynamic layers read their gates' decisions: with ``--jobs`` several rows train at a time. On a
GPU convolutions are in TF32, PyTorch's default, and sums of products in float32, as calibration needs them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from common import RESULTS, environment, write
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import train

import redconvert
from redconvert import zoo
from redconvert.data import JHMDB, motion
from redconvert.evaluate import clip_1, rank_correlation, spread_of_macs, video_1

CALIBRATION_CLIPS = 64
VIDEOS = 2  # at a time for video-1, of 6 views each
ABSORBED_SHARES = (0.75, 0.5)  # what is left out between two layers is saved twice: halves alone are coarse


class Row(NamedTuple):
    """How a dynamic network is made and trained."""

    axes: str = "both"
    target: float | None = 0.6  # of the efficiency loss; None: Eq. 6 as it stands
    weight: float = 20.0  # of the efficiency loss
    distill: float = 0.5  # share of the teacher in the task loss
    absorb: bool = False


ROWS: dict[str, Row | None] = {
    "dense": None,
    "both 0.6": Row(),
    "channel 0.6": Row("channel"),
    "temporal 0.6": Row("temporal"),
    "both 0.6, absorbed": Row(absorb=True),
    "both 0.6, no labels": Row(distill=1.0),
    "both, no efficiency loss": Row(weight=0.0),
    "both, Eq. 6": Row(target=None, weight=0.8),
}

COMPARED = ("dense", "both 0.6")  # with every seed before other rows begin


class Setting:
    """Data, and the network that rows start from."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.arguments, self.seed, self.work = arguments, seed, folder(arguments, seed)
        self.train, self.test = decoded(arguments, "train"), decoded(arguments, "test")
        torch.manual_seed(seed)
        chosen = torch.randperm(len(self.train))[:CALIBRATION_CLIPS].tolist()
        centre = copy.copy(self.train)
        centre.clips = "center"
        self.calibration = list(torch.stack([centre[i][0] for i in chosen]).split(8))
        base = zoo.create("i3d_kinetics", num_classes=len(self.train.classes), weights="KINETICS400")
        self.base = base.to(arguments.device)

    def loader(self) -> DataLoader:
        return DataLoader(self.train, self.arguments.batch, shuffle=True, drop_last=True)

    def fit(self, model: nn.Module, epochs: int, **options: Any) -> list[dict[str, float]]:
        torch.manual_seed(self.seed)
        rates = {key: getattr(self.arguments, key) for key in ("lr", "gate_lr", "gate_every")}
        return train(model, self.loader(), epochs=epochs, freeze_norms=True, **{**rates, **options})

    def clip_1(self, model: nn.Module) -> float:
        return clip_1(model, self.test, batch_size=self.arguments.batch).top1


def decoded(arguments: argparse.Namespace, split: Literal["train", "test"]) -> JHMDB:
    """The clips of a split, in memory; decoded once in a process."""
    if split not in _DECODED:
        shape = {"num_frames": arguments.frames, "size": arguments.size, "step": arguments.step}
        kept = {"cache": True, "device": arguments.device, "progress": True}
        _DECODED[split] = JHMDB(split=split, **shape, **kept, per_class=arguments.per_class)
    return _DECODED[split]


_DECODED: dict[str, JHMDB] = {}


def dynamic_from(base: nn.Module, row: Row, calibration: list[Tensor]) -> nn.Module:
    """Converted, calibrated, and set to a budget: the start of every dynamic row."""
    config = redconvert.ConvertConfig(
        cheap="pointwise",
        channel=row.axes != "temporal",
        temporal=row.axes != "channel",
        shares=ABSORBED_SHARES if row.absorb else None,
        absorb=row.absorb,
    )
    dynamic = redconvert.convert(base, config, example_inputs=calibration[0][:1])
    redconvert.calibrate(dynamic, calibration, rounds=0)
    redconvert.set_budget(dynamic, row.target or 1.0, calibration[:3])
    redconvert.calibrate(dynamic, calibration, rounds=1, decisions="gates")
    redconvert.keep_budget(dynamic)
    return dynamic


# -- training ------------------------------------------------------------------------------------------


def prepare(setting: Setting) -> dict[str, Any]:
    """Finetune the base."""
    begin = time.perf_counter()
    epochs = setting.fit(setting.base, setting.arguments.base_epochs, lr=setting.arguments.base_lr)
    setting.work.mkdir(parents=True, exist_ok=True)
    torch.save(setting.base.state_dict(), setting.work / "base.pt")
    seconds = round(time.perf_counter() - begin, 1)
    return {"epochs": epochs, "clip_1": setting.clip_1(setting.base), "seconds": seconds}


def run(setting: Setting, name: str) -> dict[str, Any]:
    begin, options = time.perf_counter(), ROWS[name]
    file = setting.work / "base.pt"
    setting.base.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    setting.base.eval()
    if options is None:
        model = copy.deepcopy(setting.base)
        row: dict[str, Any] = {"epochs": setting.fit(model, setting.arguments.epochs, teacher=setting.base)}
        row |= {"share_of_dense_macs": 1.0}
    else:
        model = dynamic_from(setting.base, options, setting.calibration)
        row = {"start": {"clip_1": setting.clip_1(model), **costs(model, setting)}}
        loss = {"distill": options.distill, "weight": options.weight, "target": options.target}
        row["epochs"] = setting.fit(model, setting.arguments.epochs, teacher=setting.base, **loss)
        row |= costs(model, setting)
        redconvert.save_pretrained(model, setting.work / name)
    row["clip_1"] = setting.clip_1(model)
    if name in setting.arguments.video:
        views = DataLoader(setting.test.views(num_clips=2, num_crops=3), batch_size=VIDEOS)
        row["video_1"] = video_1(model, views, batch_size=6 * VIDEOS).top1
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def costs(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """Executed MACs over the test clips, and how they go with motion."""
    batches = torch.arange(len(setting.test)).split(setting.arguments.batch)
    clips = [torch.stack([setting.test[i][0] for i in index]) for index in batches]
    found = spread_of_macs(model, clips)
    moving = torch.cat([motion(each).cpu() for each in clips])
    whole = float(found.dense.mean())
    shares = {key: round(getattr(found, key) / whole, 4) for key in ("min", "max", "std")}
    correlation = rank_correlation(found.macs, moving)
    names = setting.test.names
    return {
        "share_of_dense_macs": round(found.mean / whole, 4),
        "spread": shares,
        "rank_correlation_with_motion": None if correlation != correlation else round(correlation, 3),
        "cheapest": [names[i] for i in found.cheapest(3)],
        "dearest": [names[i] for i in found.dearest(3)],
    }


# -- all rows ------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--step", type=int, default=2, help="every how many-th frame of the video")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--base-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--base-lr", type=float, default=0.005)
    parser.add_argument("--gate-lr", type=float, default=0.005)
    parser.add_argument("--gate-every", type=int, default=1, help="gates learn in every so many-th step")
    parser.add_argument("--per-class", type=int, help="only so many clips of each class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu", help="where the networks are, and the clips")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train at a time")
    parser.add_argument("--seconds", type=float, help="start no row that would not end by then, as long as the others")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--video", nargs="*", default=[*COMPARED], help="rows to measure video-1 of")
    parser.add_argument("--work", type=Path, default=Path("jhmdb-work"), help="folder for the finetuned networks")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.begin = time.monotonic()
    return arguments


def train_all(arguments: argparse.Namespace, out: Path) -> bool:
    """The bases, then the rows as `in_turn` has them. Whether none failed."""
    seeds = arguments.seeds
    head = {"what": __doc__.split("\n")[0], "schedule": schedule(arguments)}
    found = read(out, head["schedule"], seeds)
    rows = [(seed, name) for seed, name in in_turn(arguments.rows, seeds) if name not in found[seed]["rows"]]
    there = [seed for seed in seeds if "base" in found[seed] and (folder(arguments, seed) / "base.pt").exists()]
    bases: list[Task] = [(seed, None) for seed in seeds if seed not in there and seed in {seed for seed, _ in rows}]
    failed = 0
    with pool(arguments) as executor:
        for tasks in (bases, rows):
            for (seed, name), result in finished(executor, arguments, tasks):
                if name is None:
                    found[seed]["base"] = result
                elif result:
                    found[seed]["rows"][name] = result
                failed += result is None
                write(head | layout(found) | environment(seeds[0], arguments.device), out)
    return not failed


Task: TypeAlias = tuple[int, str | None]  # a seed and a row; None: its base


def in_turn(rows: Sequence[str], seeds: Sequence[int]) -> list[tuple[int, str]]:
    """What is compared first, for every seed; then the others, seed by seed."""
    compared = [(seed, name) for name in rows if name in COMPARED for seed in seeds]
    return compared + [(seed, name) for seed in seeds for name in rows if name not in COMPARED]


def pool(arguments: argparse.Namespace) -> AbstractContextManager[Executor | None]:
    """Processes of their own, which all decode the clips now; None where one at a time will do."""
    if arguments.jobs == 1:
        return nullcontext()
    executor = ProcessPoolExecutor(arguments.jobs, get_context("spawn"))  # CUDA does not survive a fork
    for _ in range(arguments.jobs):
        executor.submit(decode, arguments)
    return executor


def decode(arguments: argparse.Namespace) -> None:
    for split in ("train", "test"):
        decoded(arguments, split)


def finished(
    executor: Executor | None, arguments: argparse.Namespace, tasks: Sequence[Task]
) -> Iterator[tuple[Task, dict[str, Any] | None]]:
    """Tasks and what came of them, in the order in which they end."""
    if executor is None:
        yield from ((task, attempt(arguments, *task)) for task in tasks)
        return
    futures = {executor.submit(attempt, arguments, *task): task for task in tasks}
    for future in as_completed(futures):
        yield futures[future], None if future.exception() else future.result()


def attempt(arguments: argparse.Namespace, seed: int, name: str | None) -> dict[str, Any] | None:
    """One base or row. Nothing in it: there was no time; None: it failed, and the others may go on."""
    begin = time.monotonic()
    if name is not None and arguments.seconds and begin + max(_TOOK, default=0) > arguments.begin + arguments.seconds:
        return {}
    try:
        setting = Setting(arguments, seed)
        result = prepare(setting) if name is None else run(setting, name)
    except Exception:
        traceback.print_exc()
        return None
    if name is not None:
        _TOOK.append(time.monotonic() - begin)
    shown = {key: value for key, value in result.items() if key != "epochs"}
    since = f"{time.monotonic() - arguments.begin:.0f} s"
    print(f"{since}, seed {seed}: {name or 'base':<28} {json.dumps(shown)}", flush=True)
    return result


_TOOK: list[float] = []  # seconds of the rows that this process has run


def schedule(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("frames", "step", "size", "batch", "base_epochs", "epochs", "base_lr", "lr", "gate_lr", "per_class")
    values = {key: getattr(arguments, key) for key in keys}
    if arguments.gate_every > 1:
        values["gate_every"] = arguments.gate_every
    return values if len(arguments.seeds) > 1 else values | {"seed": arguments.seeds[0]}


def folder(arguments: argparse.Namespace, seed: int) -> Path:
    """Of a seed's networks."""
    return arguments.work / f"seed{seed}" if len(arguments.seeds) > 1 else arguments.work


# -- the file ------------------------------------------------------------------------------------------


def read(out: Path, schedule: dict[str, Any], seeds: list[int]) -> dict[int, dict[str, Any]]:
    """By seed, what a run before with the same schedule found."""
    result = json.loads(out.read_text()) if out.exists() else {}
    if result.get("schedule") != schedule:
        result = {}
    each = result.get("seeds", {}) if len(seeds) > 1 else {str(seeds[0]): result}
    kept = {seed: each.get(str(seed), {}) for seed in seeds}
    return {
        seed: {"rows": {}} | {key: old[key] for key in ("base", "rows") if key in old} for seed, old in kept.items()
    }


def layout(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One seed: its base and rows. Several: these by seed, and averages over the seeds that have a row."""
    if len(found) == 1:
        return next(iter(found.values()))
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in found.values():
        for name, row in result["rows"].items():
            rows.setdefault(name, []).append(row)
    return {"mean": {name: mean(each) for name, each in rows.items()}, "seeds": {str(s): found[s] for s in found}}


def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key in ("clip_1", "video_1", "share_of_dense_macs") if all(key in row for row in rows)]
    averages = {key: round(statistics.mean(row[key] for row in rows), 4) for key in keys}
    right = [row["clip_1"] for row in rows]
    return {"seeds": len(rows), **averages, "clip_1_range": [round(edge(right), 4) for edge in (min, max)]}


def main() -> None:
    arguments = parse_arguments()
    if not train_all(arguments, arguments.out or RESULTS / "jhmdb_i3d.json"):
        sys.exit("a row failed, see above")


if __name__ == "__main__":
    main()
