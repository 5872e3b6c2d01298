"""ResNet-56 on CIFAR-10 on one GPU: dynamic, pruned and dense networks side by side, at equal epochs.

    python benchmarks/cifar_gpu.py prepare --data FOLDER --work WORK            # CPU: convert, calibrate, prune
    python benchmarks/cifar_gpu.py train --data FOLDER --work WORK --out WORK   # GPU: all rows, step by step in turn
    python benchmarks/cifar_gpu.py finish --data FOLDER --work WORK             # CPU: MACs, spread, asking again; JSON

Networks so small keep a GPU waiting for launches, and Python for the GPU: each row's forward and backward pass is a
CUDA graph (`redconvert.CapturedPasses`), and each row has a stream of its own. All rows of a seed see the same batches
and the same teacher's answers. Where a budget by layers has settled the gates they rest; the rows with "gates learn"
train them in every step, with the efficiency loss. ``--device cpu`` runs the same without graphs, to try it out.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from asking import asking_again
from cifar import MIXED, accuracy, images, resnet56
from cifar_resnet56 import FEATURES, TOTALS, Setting, budgeted, dynamic, measure, over_seeds, spread, summary
from cifar_resnet56 import ROWS as STARTS
from common import RESULTS, environment, write
from side_by_side import Batches, Runner, side_by_side, timed, trial
from torch import Tensor, nn
from training import is_dynamic

import redconvert
from redconvert.finetune.parameters import learning_rate_factor

MIXTURES = {"cheap": "principal", "shares": (0.75, 0.5, 0.25)}

# How each network comes about, and the rows that train it; ``lr``: times that of the others.
PREPARED = {
    "dense": STARTS["dense"],
    "depgraph 0.5": STARTS["depgraph 0.5"],
    "depgraph 0.4": STARTS["depgraph 0.4"],
    "absorbed 0.5": lambda setting: budgeted(setting, 0.5),
    "absorbed 0.4": lambda setting: budgeted(setting, 0.4),
    "mixed 0.5": lambda setting: budgeted(setting, 0.5, config=MIXED),
    "mixed 0.4": lambda setting: budgeted(setting, 0.4, config=MIXED),
    "principal 0.5": lambda setting: dynamic(setting, 0.5, **MIXTURES),
    "rebuilt 0.5": lambda setting: dynamic(setting, 0.5),
}
UNLABELLED = {"features": FEATURES, "distill": 1.0, "temperature": 32.0}
LABELLED = {"features": 30.0, "fades": True, "distill": 0.05, "temperature": 32.0}
ROWS: dict[str, dict[str, Any]] = {
    "dense": {"seeds": (0, 1, 2)},
    "depgraph 0.5": {"seeds": (0, 1, 2)},
    "absorbed 0.5": {"seeds": (0, 1, 2)},
    "absorbed 0.4": {"seeds": (0, 1, 2)},
    "depgraph 0.4": {"seeds": (0,)},
    "principal 0.5": {"seeds": (0,)},
    "absorbed 0.5, no labels": {"seeds": (0,), "distill": 1.0},
    "absorbed 0.5, features": {"seeds": (0, 1, 2), **UNLABELLED},
    "mixed 0.5, features": {"seeds": (0, 1, 2), **UNLABELLED},
    "mixed 0.5, labels": {"seeds": (0, 1, 2), **LABELLED},
    "mixed 0.4, features": {"seeds": (0,), **UNLABELLED},
    "absorbed 0.5, higher lr": {"seeds": (0,), "lr": 2.5},
    "depgraph 0.5, higher lr": {"seeds": (0,), "lr": 2.5},
    "rebuilt 0.5, gates learn": {"seeds": (0,), "learns": True, "target": 0.5},
}


# -- prepare -------------------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> None:
    """Every network before training, into WORK; what is there already is not made again."""
    setting = Setting(arguments, seed=0)
    for name, start in PREPARED.items():
        folder = arguments.work / name.replace(" ", "-")
        if folder.exists() or not any(row.startswith(name) for row in arguments.rows):
            continue
        begin = time.perf_counter()
        torch.manual_seed(0)
        model = start(setting).model
        found = measure(model, setting, arguments.quick_images)
        if is_dynamic(model):
            redconvert.save_pretrained(model, folder)
        else:
            folder.mkdir(parents=True)
            torch.save(model, folder / "network.pt")
        found["prepared_s"] = round(time.perf_counter() - begin, 1)
        write(found, folder / "start.json")
        print(f"{name}: {found}", flush=True)


def load(arguments: argparse.Namespace, row: str) -> nn.Module:
    """What `prepare` left for a row."""
    folder = arguments.work / row.split(",")[0].replace(" ", "-")
    if (folder / "network.pt").exists():
        return torch.load(folder / "network.pt", weights_only=False, map_location="cpu")  # pruned: a class of its own
    return redconvert.from_pretrained(resnet56(arguments.data), folder)


# -- train ---------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """All rows, epoch by epoch; a row that cannot be captured is left out, with its reason."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device, begin = torch.device(arguments.device), time.perf_counter()
    out: dict[str, Any] = {"schedule": schedule(arguments), "rows": {}, **environment(0, device)}
    pixels, labels = (each[: arguments.images].to(device) for each in images(arguments.data, "train"))
    test = [each[: arguments.test_images].to(device) for each in images(arguments.data, "test")]
    test[0] = test[0].contiguous(memory_format=torch.channels_last)
    teacher = resnet56(arguments.data).to(device, memory_format=torch.channels_last).requires_grad_(False)
    seeds = sorted({seed for name in arguments.rows for seed in ROWS[name]["seeds"] if seed in arguments.seeds})
    with torch.no_grad():
        given = {seed: Batches(pixels, labels, teacher, arguments, seed) for seed in seeds}
    runners: list[Runner] = []
    loaded: dict[str, nn.Module] = {}
    for seed in seeds:  # the first seed of every row before the second of any
        for name in arguments.rows:
            if seed in ROWS[name]["seeds"] and (seed == seeds[0] or name in arguments.repeated):
                try:
                    start = name.split(",")[0]
                    loaded[start] = loaded.get(start) or load(arguments, name)
                    runners.append(Runner(name, seed, ROWS[name], copy.deepcopy(loaded[start]), given[seed], arguments))
                except Exception as error:
                    out["rows"].setdefault(name, {})[str(seed)] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
                    print(f"{name} {seed}: {error}", flush=True)
    out["ready_s"] = round(time.perf_counter() - begin, 1)
    count = len(pixels) // arguments.batch
    out["replay_ms"] = {f"{each.name} {each.seed}": timed(each) for each in runners} if device.type == "cuda" else {}
    if arguments.seconds:
        step_s = trial(runners, list(given.values()))
        arguments.epochs = max(1, int(arguments.seconds / (step_s * count)))
        out |= {"schedule": schedule(arguments), "trial_step_s": round(step_s, 4)}
    steps, step, epoch_s = arguments.epochs * count, 0, []
    print(json.dumps({key: out[key] for key in ("ready_s", "replay_ms", "schedule")}), flush=True)
    history: dict[str, list[Any]] = {f"{each.name} {each.seed}": [] for each in runners}
    for epoch in range(arguments.epochs):
        start = time.perf_counter()
        sums = {id(each): torch.zeros_like(each.losses) for each in runners}
        for _ in range(count):
            side_by_side(runners, list(given.values()), step, learning_rate_factor(step, steps, warmup=0.05))
            for runner in runners:
                sums[id(runner)] += runner.losses
            step += 1
        for runner in runners:
            found = (sums[id(runner)] / count).tolist()
            history[f"{runner.name} {runner.seed}"].append([round(value, 4) for value in found])
        epoch_s.append(round(time.perf_counter() - start, 1))
        out |= {"epoch_s": epoch_s, "history": history}
        print(f"epoch {epoch + 1}: {epoch_s[-1]} s", {k: v[-1] for k, v in history.items()}, flush=True)
        write(out, arguments.out / "train.json")
    for runner in runners:
        found = {"accuracy": runner.accuracy(*test)}
        out["rows"].setdefault(runner.name, {})[str(runner.seed)] = found
        print(runner.name, runner.seed, found, flush=True)
    keep(runners, loaded, arguments.out)
    out["seconds"] = round(time.perf_counter() - begin, 1)
    write(out, arguments.out / "train.json")


def keep(runners: list[Runner], loaded: dict[str, nn.Module], folder: Path) -> None:
    """What training changed of the dynamic networks, a file each: the others are done with."""
    for runner in (each for each in runners if each.dynamic):
        before = loaded[runner.name.split(",")[0]].state_dict()
        now = {key: value.cpu() for key, value in runner.model.state_dict().items()}
        changed = {key: value for key, value in now.items() if not torch.equal(value, before[key])}
        torch.save(changed, trained_file(folder, runner.name, runner.seed))


def trained_file(folder: Path, name: str, seed: int | str) -> Path:
    return folder / f"{name} {seed}.pt".replace(",", "").replace(" ", "-")


def schedule(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("epochs", "images", "batch", "lr", "gate_lr", "efficiency", "distill", "temperature", "test_images")
    keys += ("flips", "bfloat16")
    return {key: getattr(arguments, key) for key in keys}


# -- finish --------------------------------------------------------------------------------------------


def finish(arguments: argparse.Namespace) -> None:
    """From the trained weights: accuracy, executed MACs, their spread, and asking the original where unsure."""
    trained = json.loads((arguments.work / "train.json").read_text())
    out = arguments.out or RESULTS / "cifar_resnet56_gpu.json"
    setting = Setting(arguments, seed=0)
    result = json.loads(out.read_text()) if out.exists() else {"what": __doc__.split("\n")[0], "rows": {}}
    result |= {key: trained[key] for key in ("schedule", "device", "torch", "date", "epoch_s", "replay_ms")}
    result["schedule"]["network"], result["losses"] = arguments.network, trained["history"]
    result.setdefault("original", {"accuracy": accuracy(setting.original, *setting.test)})
    for name, seeds in trained["rows"].items():
        start = json.loads((arguments.work / name.split(",")[0].replace(" ", "-") / "start.json").read_text())
        for seed, found in seeds.items():
            done = result["rows"].setdefault(name, {})
            if seed in done or "failed" in found:
                continue
            file = trained_file(arguments.work, name, seed)
            state = torch.load(file, weights_only=True) if file.exists() else None
            end = {"accuracy": found["accuracy"], "share_of_dense_macs": start["share_of_dense_macs"]}
            done[seed] = {"start": start, "end": end} | (look(arguments, setting, name, state) if state else {})
            result["summary"] = summary(result["rows"])
            write(result, out)
            print(name, seed, done[seed]["end"], flush=True)
    asked = {name: blended(rows) for name, rows in result["rows"].items() if "spread" in rows.get("0", {})}
    write(result | {"asking_summary": asked, "finished_on": environment(0)}, out)
    if arguments.plot:
        from plots import accuracy_against_macs

        accuracy_against_macs(result, arguments.plot)


def look(arguments: argparse.Namespace, setting: Setting, name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """A trained dynamic network on the CPU."""
    model = load(arguments, name)
    model.load_state_dict(state, strict=False)
    return {
        "end": measure(model.eval(), setting),
        "spread": spread(model, setting),
        "asking_again": asking_again(model, *setting.held_out, TOTALS, setting.original),
    }


def blended(rows: dict[str, Any]) -> dict[str, Any]:
    """Of asking again with both answers blended, by total budget."""
    found = {}
    for total in sorted({total for row in rows.values() for total in row["asking_again"]} - {"alone"}):
        each = [row["asking_again"][total] for row in rows.values() if total in row["asking_again"]]
        found[total] = over_seeds(each, "blended")
    return found


# -- all of it -----------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["prepare", "train", "finish"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="train: a folder; finish: a JSON file")
    parser.add_argument("--plot", type=Path, help="finish: draw accuracy against executed MACs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="train: as many epochs as fit, by the time of the first steps")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--gate-lr", type=float, default=0.01)
    parser.add_argument("--efficiency", type=float, default=20.0)
    parser.add_argument("--distill", type=float, default=0.9, help="the teacher's share of the loss")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--flips", action="store_true", help="the teacher answers for an image and its mirror image")
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--repeated", nargs="*", default=list(ROWS), help="rows that run with more than the first seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--quick-images", type=int, default=2000)
    parser.add_argument("--cost-images", type=int, default=1000)
    arguments = parser.parse_args()
    arguments.network = "resnet56"
    return arguments


def main() -> None:
    arguments = parse_arguments()
    {"prepare": prepare, "train": train, "finish": finish}[arguments.stage](arguments)


if __name__ == "__main__":
    main()
