"""I3D on J-HMDB: dynamic against dense at equal epochs, and what calibration alone keeps of its answers.

    python benchmarks/jhmdb_i3d.py --agreement      # Kinetics weights, no training: same top-1 for fewer MACs
    python benchmarks/jhmdb_i3d.py                  # finetuned on split 1
    python benchmarks/jhmdb_i3d.py --base-epochs 1 --epochs 1 --per-class 4 --rows dense "both 0.6"   # quick

I3D with its Kinetics weights gets a new head and is finetuned for ``--base-epochs``: the network that a user
would bring. Every row then goes on from it for ``--epochs`` with the same schedule: dense, or dynamic with gates on
channels, frames or both. JSON is written after every row; a row that is in it already is not run again. The networks
stay in ``--work``, and jhmdb_time.py times them. Data: ``$REDCONVERT_DATA``, or ``../shared/data``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, environment, write
from plots import agreement_against_macs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import train

import redconvert
from redconvert import zoo
from redconvert.data import JHMDB, motion
from redconvert.evaluate import clip_1, rank_correlation, spread_of_macs, video_1

CALIBRATION_CLIPS = 64
# For --agreement. Channels alone, as every second frame alone loses the answers; two layers hold half of the MACs, and
# halves are too coarse for them. Rebuilt, 1x1x1 convolutions save little, as rebuilding costs as much.
LARGE_ALONE = dict.fromkeys(("stem.conv2*", "*branch0*", "*conv_a*", "*branch3*", "logits"))
AGREEING = {
    "rebuilt": {"shares": (0.875, 0.75, 0.6875, 0.625, 0.5625, 0.5, 0.4375), "rules": LARGE_ALONE},
    "absorbed": {"shares": (0.875, 0.75, 0.625, 0.5), "absorb": True, "rules": {"logits": None}},
    "principal": {"cheap": "principal", "shares": (0.875, 0.75, 0.625, 0.5, 0.375, 0.25), "rules": LARGE_ALONE},
    "principal, sixteenths": {
        "cheap": "principal",
        "shares": tuple(i / 16 for i in range(15, 3, -1)),
        "rules": LARGE_ALONE,
    },
}
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


class Setting:
    """Data, and the network that rows start from."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        shape = {"num_frames": arguments.frames, "size": arguments.size, "step": arguments.step}
        shared = {**shape, "cache": True, "progress": True, "per_class": arguments.per_class}
        self.train = JHMDB(split="train", **shared)
        self.test = JHMDB(split="test", **shared)
        torch.manual_seed(arguments.seed)
        chosen = torch.randperm(len(self.train))[:CALIBRATION_CLIPS].tolist()
        centre = copy.copy(self.train)
        centre.clips = "center"
        self.calibration = list(torch.stack([centre[i][0] for i in chosen]).split(8))
        self.base = zoo.create("i3d_kinetics", num_classes=len(self.train.classes), weights="KINETICS400")

    def loader(self) -> DataLoader:
        return DataLoader(self.train, self.arguments.batch, shuffle=True, drop_last=True)

    def fit(self, model: nn.Module, epochs: int, **options: Any) -> list[dict[str, float]]:
        torch.manual_seed(self.arguments.seed)
        rates = {"lr": self.arguments.lr, "gate_lr": self.arguments.gate_lr}
        return train(model, self.loader(), epochs=epochs, freeze_norms=True, **{**rates, **options})


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


def prepare(setting: Setting, result: dict[str, Any]) -> None:
    """Finetune the base, or read it back from a run before."""
    file = setting.arguments.work / "base.pt"
    if file.exists() and "base" in result:
        setting.base.load_state_dict(torch.load(file, weights_only=True))
        setting.base.eval()
        return
    epochs = setting.fit(setting.base, setting.arguments.base_epochs, lr=setting.arguments.base_lr)
    result["base"] = {"epochs": epochs, "clip_1": clip_1(setting.base, setting.test).top1}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(setting.base.state_dict(), file)


def run(setting: Setting, name: str) -> dict[str, Any]:
    begin, options = time.perf_counter(), ROWS[name]
    if options is None:
        model = copy.deepcopy(setting.base)
        row: dict[str, Any] = {"epochs": setting.fit(model, setting.arguments.epochs, teacher=setting.base)}
        row |= {"share_of_dense_macs": 1.0}
    else:
        model = dynamic_from(setting.base, options, setting.calibration)
        row = {"start": {"clip_1": clip_1(model, setting.test).top1, **costs(model, setting)}}
        loss = {"distill": options.distill, "weight": options.weight, "target": options.target}
        row["epochs"] = setting.fit(model, setting.arguments.epochs, teacher=setting.base, **loss)
        row |= costs(model, setting)
        redconvert.save_pretrained(model, setting.arguments.work / name)
    row["clip_1"] = clip_1(model, setting.test).top1
    if name in setting.arguments.video:
        row["video_1"] = video_1(model, setting.test, num_clips=2, num_crops=3).top1
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def costs(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """Executed MACs over the test clips, and how they go with motion."""
    clips = [torch.stack([setting.test[i][0] for i in index]) for index in torch.arange(len(setting.test)).split(8)]
    found = spread_of_macs(model, clips)
    moving = torch.cat([motion(each) for each in clips])
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


# -- no training ---------------------------------------------------------------------------------------


def agreement(arguments: argparse.Namespace, out: Path) -> None:
    """I3D's Kinetics answers on J-HMDB test clips without training: how many top-1 answers stay as they were."""
    test, calibration = center_clips("test", 4), center_clips("train", 3)
    result: dict[str, Any] = {"what": agreement.__doc__, "input": list(test[0][0].shape), "curves": {}}
    if out.exists():
        result["curves"] = json.loads(out.read_text()).get("curves", {})
    result |= {"calibration_clips": sum(map(len, calibration))}
    base = zoo.create("i3d_kinetics", weights="KINETICS400").eval()
    for name in arguments.curves:
        if name not in result["curves"]:
            result["curves"][name] = _curve(base, AGREEING[name], arguments.budgets, calibration, test)
            write(result | environment(arguments.seed), out)


def _curve(
    base: nn.Module, options: dict[str, Any], budgets: list[float], calibration: list[Tensor], test: list[Tensor]
) -> dict[str, Any]:
    """Calibrated, then solved for again under each budget."""
    config = redconvert.ConvertConfig(**{"cheap": "pointwise", "temporal": False, **options})
    dynamic = redconvert.convert(base, config, example_inputs=test[0][:1])
    seconds = {"dense_pass": _seconds(lambda: [answer(base, clips) for clips in calibration])}
    seconds["calibrate"] = _seconds(lambda: redconvert.calibrate(dynamic, calibration, progress=True))
    begin = time.perf_counter()
    curve = redconvert.budget_curve(dynamic, calibration, budgets, test=test, refit=True, progress=True)
    seconds["curve"] = round(time.perf_counter() - begin, 1)
    print(curve, seconds, flush=True)
    return curve.to_dict() | {"shares": options["shares"], "seconds": seconds}


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return round(time.perf_counter() - begin, 1)


@torch.no_grad()
def answer(model: nn.Module, clips: Tensor) -> Tensor:
    return model(clips)


def center_clips(split: str, per_class: int) -> list[Tensor]:
    """Batches of 8 clips ``(8, 3, 16, 160, 160)``, one of a video, shuffled, as the first few stand for all."""
    data = JHMDB(split=split, per_class=per_class, num_frames=16, size=160, step=2, clips="center")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return list(torch.stack([data[i][0] for i in order]).split(8))


# -- all rows ------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--agreement", action="store_true", help="no training; Kinetics classes")
    parser.add_argument("--plot", type=Path, help="of --agreement: a picture of its curves")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.85, 0.8, 0.75, 0.7], help="of --agreement")
    parser.add_argument("--curves", nargs="+", default=list(AGREEING), choices=AGREEING, help="of --agreement")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--step", type=int, default=2, help="every how many-th frame of the video")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--base-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--base-lr", type=float, default=0.005)
    parser.add_argument("--gate-lr", type=float, default=0.005)
    parser.add_argument("--per-class", type=int, help="only so many clips of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--video", nargs="*", default=["dense", "both 0.6"], help="rows to measure video-1 of")
    parser.add_argument("--work", type=Path, default=Path("jhmdb-work"), help="folder for the finetuned networks")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    if arguments.agreement:
        out = arguments.out or RESULTS / "i3d_agreement.json"
        agreement(arguments, out)
        if arguments.plot:
            agreement_against_macs(json.loads(out.read_text()), arguments.plot)
        return
    out = arguments.out or RESULTS / "jhmdb_i3d.json"
    keys = ("frames", "step", "size", "batch", "base_epochs", "epochs", "base_lr", "lr", "gate_lr", "per_class", "seed")
    schedule = {key: getattr(arguments, key) for key in keys}
    result = json.loads(out.read_text()) if out.exists() else {}
    if result.get("schedule") != schedule:
        result = {"what": __doc__.split("\n")[0], "schedule": schedule, "rows": {}}
    setting = Setting(arguments)
    prepare(setting, result)
    write(result, out)
    print(f"base: clip-1 {result['base']['clip_1']:.1%}", flush=True)
    for name in arguments.rows:
        if name not in result["rows"]:
            result["rows"][name] = run(setting, name)
            write(result | environment(arguments.seed), out)
            print(
                f"{name:<28} {json.dumps({k: v for k, v in result['rows'][name].items() if k != 'epochs'})}", flush=True
            )


if __name__ == "__main__":
    main()
