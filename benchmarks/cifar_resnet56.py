"""ResNet-56 and VGG-16 on CIFAR-10: dynamic networks against fixed and pruned ones, at equal epochs.

    python benchmarks/cifar_resnet56.py --data FOLDER                # see benchmarks/cifar.py for what it holds
    python benchmarks/cifar_resnet56.py --data FOLDER --epochs 1 --images 2000 --seeds 0 --rows dense   # quick

Every row starts from the same pretrained weights and trains on the same images with the same schedule, optimizer,
augmentation and loss: half labels, half the pretrained network as a teacher, unless ``--distill`` and
``--temperature`` say otherwise, and the teacher's features in rows that say so (benchmarks/training.py). JSON is
written after every row; a row that is in it already is not run again. ``--plot`` draws accuracy against executed MACs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from asking import asking_again
from cifar import ABSORBED, HELD_OUT, MIXED, accuracy, batches, convert, images, resnet56, vgg16_bn
from common import RESULTS, environment, write
from torch import nn
from training import is_dynamic, train

import redconvert
from redconvert.cost import dense_macs
from redconvert.evaluate import spread_of_macs

NETWORKS = {"resnet56": resnet56, "vgg16_bn": vgg16_bn}
CALIBRATION_IMAGES = 1000
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere it is slower by far than float32
FEATURES = 100.0  # the weight of L_f, next to a teacher's answers at a temperature of 32
PAPERS_WEIGHT = 0.8  # of L_e
# Of a trained network and the original, asked where it is unsure.
TOTALS = (0.35, 0.4, 0.45, 0.48, 0.49, 0.5, 0.55, 0.6, 0.65, 0.7)


@dataclass
class Candidate:
    """A network before training: how it runs, what its gates pay, and whether it asks the original where unsure.

    ``features``: the weight of what it misses of the original's features; ``fades``: it goes down with the learning
    rate. ``efficiency``: the weight of L_e; None: what the schedule says, where there is a target.
    """

    model: nn.Module
    running: Callable[[], AbstractContextManager[Any]] = nullcontext
    target: float | None = None
    asks: bool = False
    features: float = 0.0
    fades: bool = False
    efficiency: float | None = None

    @property
    def learns_costs(self) -> bool:
        return self.target is not None or self.efficiency is not None


# -- rows: how each network comes about ----------------------------------------------------------------


def dense(setting: Setting) -> Candidate:
    return Candidate(copy.deepcopy(setting.original))


def pruned(setting: Setting, share: float, method: str) -> Candidate:
    from pruning import prune

    return Candidate(prune(setting.original, setting.train[0][:1], share, method)[0], asks=True)


def half(setting: Setting, cheap: str, calibrated: bool) -> Candidate:
    """Every 3x3 convolution at half of its channels, for every input."""
    dynamic = setting.convert(cheap=cheap, search_space=2)
    if calibrated:
        redconvert.calibrate(dynamic, setting.calibration, rounds=3)
    return Candidate(dynamic, partial(redconvert.forced, dynamic, channel=1))


def dynamic(setting: Setting, target: float, gate: str = "hard", **config: Any) -> Candidate:
    """Full, half or a quarter of the channels, or what ``config`` says, as each layer's gate decides for each input."""
    network = setting.convert(**{"cheap": "pointwise", "search_space": 3, "gate": gate, **config})
    redconvert.calibrate(network, setting.calibration, rounds=0)
    redconvert.set_budget(network, target, setting.calibration[:2])
    redconvert.calibrate(network, setting.calibration, rounds=1, decisions="gates")
    redconvert.keep_budget(network)
    return Candidate(network, target=target, asks=True)


def budgeted(
    setting: Setting,
    target: float,
    features: float = 0.0,
    fades: bool = False,
    efficiency: float | None = None,
    config: dict[str, Any] = ABSORBED,
) -> Candidate:
    """Full, 3/4, half or 1/4 of the channels, absorbed where one convolution alone reads them; or another ``config``.

    With an ``efficiency`` of its own L_e is Eq. 6, which knows no target: what is right costs what it executes.
    """
    network = setting.convert(**config)
    redconvert.calibrate(network, setting.calibration)
    redconvert.set_budget(network, target, setting.calibration[:3])
    redconvert.calibrate(network, setting.calibration, decisions="gates")
    redconvert.keep_budget(network)
    paid = target if efficiency is None else None
    return Candidate(network, target=paid, asks=True, features=features, fades=fades, efficiency=efficiency)


ROWS: dict[str, Callable[[Setting], Candidate]] = {
    "dense": dense,
    "half: first channels, depthwise": partial(half, cheap="depthwise", calibrated=False),
    "half: calibrated, depthwise": partial(half, cheap="depthwise", calibrated=True),
    "half: first channels, pointwise": partial(half, cheap="pointwise", calibrated=False),
    "half: calibrated, pointwise": partial(half, cheap="pointwise", calibrated=True),
    "dynamic hard 0.6": partial(dynamic, target=0.6),
    "dynamic hard 0.5": partial(dynamic, target=0.5),
    "dynamic hard 0.4": partial(dynamic, target=0.4),
    "dynamic soft 0.5": partial(dynamic, target=0.5, gate="soft"),
    "dynamic absorbed 0.5": partial(budgeted, target=0.5),
    "dynamic absorbed 0.4": partial(budgeted, target=0.4),
    "dynamic absorbed 0.35": partial(budgeted, target=0.35),
    "dynamic absorbed, from 0.5, Eq. 6": partial(budgeted, target=0.5, efficiency=PAPERS_WEIGHT),
    "dynamic absorbed, features 0.5": partial(budgeted, target=0.5, features=FEATURES),
    "dynamic absorbed, features 0.4": partial(budgeted, target=0.4, features=FEATURES),
    "dynamic mixed, features 0.5": partial(budgeted, target=0.5, features=FEATURES, config=MIXED),
    "dynamic mixed, fading features 0.5": partial(budgeted, target=0.5, features=30.0, fades=True, config=MIXED),
    "dynamic mixed, features 0.4": partial(budgeted, target=0.4, features=FEATURES, config=MIXED),
    "depgraph 0.5": partial(pruned, share=0.5, method="depgraph"),
    "depgraph_uniform 0.5": partial(pruned, share=0.5, method="depgraph_uniform"),
    "magnitude 0.5": partial(pruned, share=0.5, method="magnitude"),
    "depgraph 0.4": partial(pruned, share=0.4, method="depgraph"),
}


class Setting:
    """What all rows of one network and seed share."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        torch.manual_seed(seed)
        self.arguments, self.seed = arguments, seed
        self.original = NETWORKS[arguments.network](arguments.data)
        self.train = images(arguments.data, "train")
        pixels, labels = images(arguments.data, "test")
        self.test = pixels[: arguments.test_images], labels[: arguments.test_images]
        # What asks again is told how unsure is too unsure by the last images, without their labels.
        few = min(arguments.test_images, len(pixels) - HELD_OUT)
        self.held_out = list(pixels[-HELD_OUT:].split(100)), (pixels[:few], labels[:few])
        chosen = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(seed))
        self.calibration = list(self.train[0][chosen[:CALIBRATION_IMAGES]].split(100))

    def convert(self, **config: Any) -> nn.Module:
        return convert(self.original, **config)


# -- one row -------------------------------------------------------------------------------------------


def run(setting: Setting, name: str) -> dict[str, Any]:
    """Make a network, train it, and say how good and how expensive it is before and after."""
    begin = time.perf_counter()
    torch.manual_seed(setting.seed)
    candidate = ROWS[name](setting)
    model = candidate.model
    with candidate.running():
        quick = setting.arguments.quick_images
        row: dict[str, Any] = {"bfloat16": BFLOAT16, "start": measure(model, setting, quick)}
        row["prepared_s"] = round(time.perf_counter() - begin, 1)
        row["epochs"] = train_row(candidate, setting, name)
        row["end"] = measure(model, setting)
    if setting.arguments.save:
        keep(model, setting.arguments.save / f"{name} {setting.seed}".replace(" ", "-"))
    if candidate.asks:
        row["asking_again"] = asking_again(model, *setting.held_out, TOTALS, setting.original)
    if candidate.learns_costs:
        row["spread"] = spread(model, setting)
        row["curve"] = {}
        for budget in (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8):
            try:
                redconvert.set_budget(model, budget, setting.calibration[:3], by="gates")
            except redconvert.RedconvertError:  # below what the gates can reach
                continue
            row["curve"][budget] = measure(model, setting, quick)
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def keep(model: nn.Module, folder: Path) -> None:
    """A trained network; a pruned one has a class of its own, and is pickled."""
    if is_dynamic(model):
        redconvert.save_pretrained(model, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model, folder / "network.pt")


def train_row(candidate: Candidate, setting: Setting, name: str) -> list[dict[str, float]]:
    """Labels and teacher; L_e for a dynamic network."""
    arguments = setting.arguments
    weight = arguments.efficiency if candidate.efficiency is None else candidate.efficiency
    return train(
        candidate.model,
        batches(*setting.train, arguments.batch, count=arguments.images, seed=setting.seed),
        epochs=arguments.epochs,
        lr=arguments.lr,
        gate_lr=arguments.gate_lr,
        teacher=copy.deepcopy(setting.original).to(memory_format=torch.channels_last),
        distill=arguments.distill,
        temperature=arguments.temperature,
        weight=weight if candidate.learns_costs else 0.0,
        target=candidate.target,
        bfloat16=BFLOAT16,
        gate_every=arguments.gate_every,
        features=candidate.features,
        fades=candidate.fades,
        flips=arguments.flips,
        keep=arguments.keep and arguments.keep / f"{name} {setting.seed}.pt".replace(" ", "-"),
    )


def measure(model: nn.Module, setting: Setting, count: int | None = None) -> dict[str, float]:
    """Accuracy on the test images (the first ``count``) and the executed share of the original's MACs."""
    model.eval()
    pixels, labels = (each[:count] for each in setting.test)
    if is_dynamic(model):
        found = spread_of_macs(model, list(pixels[: setting.arguments.cost_images].split(100)))
        share = found.mean / found.dense.mean()
    else:
        one = setting.train[0][:1]
        share = dense_macs(model, one).total / dense_macs(setting.original, one).total
    return {"accuracy": accuracy(model, pixels, labels), "share_of_dense_macs": round(float(share), 4)}


def spread(model: nn.Module, setting: Setting) -> dict[str, float]:
    """How the executed MACs differ between test images, as shares of the dense MACs."""
    found = spread_of_macs(model, list(setting.test[0][: setting.arguments.cost_images].split(100)))
    whole = float(found.dense.mean())
    values = {"min": found.min, "mean": found.mean, "max": found.max, "std": found.std}
    return {key: round(float(value) / whole, 4) for key, value in values.items()}


# -- all rows ------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="resnet56")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--gate-lr", type=float, default=0.005)
    parser.add_argument("--gate-every", type=int, default=1, help="gates learn in every so many-th step; 0: never")
    parser.add_argument("--efficiency", type=float, default=20.0)
    parser.add_argument("--distill", type=float, default=0.5, help="the teacher's share of the loss; 1: no labels")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the distillation")
    parser.add_argument("--flips", action="store_true", help="the teacher answers for an image and its mirror image")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="names, or their beginnings")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--quick-images", type=int, default=2000, help="test images before training and on curves")
    parser.add_argument("--cost-images", type=int, default=1000, help="test images whose MACs are counted")
    parser.add_argument("--save", type=Path, help="keep trained networks in this folder")
    parser.add_argument("--keep", type=Path, help="a row that was killed goes on from its last epoch, kept here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="picture of all rows in the JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out = arguments.out or RESULTS / f"cifar_{arguments.network}.json"
    keys = ("network", "epochs", "images", "batch", "lr", "gate_lr", "gate_every", "efficiency", "distill")
    keys += ("temperature", "flips", "test_images")
    schedule = {key: getattr(arguments, key) for key in keys}
    result = json.loads(out.read_text()) if out.exists() else {}
    if {"distill": 0.5, "temperature": 1.0, "flips": False} | result.get("schedule", {}) != schedule:
        result = {"what": __doc__.split("\n")[0], "schedule": schedule, "rows": {}}
    for seed in arguments.seeds:
        setting = None
        for name in ROWS:
            done = result["rows"].setdefault(name, {})
            if str(seed) in done or not any(name.startswith(wanted) for wanted in arguments.rows):
                continue
            setting = setting or Setting(arguments, seed)
            result.setdefault("original", {"accuracy": accuracy(setting.original, *setting.test)})
            done[str(seed)] = run(setting, name)
            result |= environment(seed) | {"summary": summary(result["rows"])}
            write(result, out)
            print(f"{name:<34} seed {seed}: {json.dumps(done[str(seed)]['end'])}", flush=True)
    if arguments.plot:
        from plots import accuracy_against_macs

        accuracy_against_macs(result, arguments.plot)


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds."""
    found = {}
    for name, seeds in rows.items():
        ends = [row["end"] for row in seeds.values()]
        if ends:
            found[name] = over_seeds(ends)
    return found


def over_seeds(ends: list[dict[str, Any]], accuracy: str = "accuracy") -> dict[str, Any]:
    """Mean and spread of what ``accuracy`` names, and the mean cost."""
    right = [end[accuracy] for end in ends]
    return {
        "accuracy": round(statistics.mean(right), 4),
        "std": round(statistics.stdev(right), 4) if len(right) > 1 else None,
        "share_of_dense_macs": round(statistics.mean(end["share_of_dense_macs"] for end in ends), 4),
        "seeds": len(ends),
    }


if __name__ == "__main__":
    main()
