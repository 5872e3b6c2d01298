"""Training step of a dynamic network against the dense one: time and peak memory.

    python benchmarks/training_cost.py                      # the setting of docs/results.md
    python benchmarks/training_cost.py --steps 3 --size 56  # quick

R(2+1)D-18 on random clips, SGD with momentum. Time: all networks in turn in one process (A B C A B C ...),
medians. Memory: a process per network and state, its peak resident size over what it held before the
first step. "birth" is right after conversion, where every gate is open; "mixed" draws each sample's decision
at random in every layer; "half" takes half of the channels everywhere, and where gates rest they only decide.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

# Big blocks stay with the process between steps, or the kernel clears fresh pages at every step.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
# name: (candidates, decisions, whether channels are absorbed, whether gates rest)
STATES = {
    "dense": (0, None, False, False),
    "2 candidates, birth": (2, None, False, False),
    "3 candidates, birth": (3, None, False, False),
    "2 candidates, mixed": (2, "mixed", False, False),
    "3 candidates, mixed": (3, "mixed", False, False),
    "2 candidates, half": (2, "half", False, False),
    "2 candidates, half, gates rest": (2, "half", False, True),
    "2 candidates, half, absorbed": (2, "half", True, False),
    "2 candidates, half, absorbed, gates rest": (2, "half", True, True),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_cost.json")
    parser.add_argument("--memory-of", choices=STATES, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(state: str, arguments: argparse.Namespace):
    """A training step as a function without arguments."""
    import torch
    import torchvision

    import redconvert

    torch.manual_seed(arguments.seed)
    model = torchvision.models.video.r2plus1d_18(num_classes=400)
    clips = torch.randn(arguments.batch, 3, arguments.frames, arguments.size, arguments.size)
    labels = torch.randint(0, 400, (arguments.batch,))
    candidates, decisions, absorb, rests = STATES[state]
    if candidates:
        config = redconvert.ConvertConfig(search_space=candidates, absorb=absorb, temporal=decisions != "half")
        model = redconvert.convert(model, config, example_inputs=clips, inplace=True)
        if decisions == "mixed":
            open_at_random(model)
        elif decisions == "half":
            close_full_candidates(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with redconvert.resting_gates(model) if rests else nullcontext():
            torch.nn.functional.cross_entropy(model(clips), labels).backward()
        optimizer.step()

    return step


def open_at_random(model) -> None:
    """Let FC2 outweigh beta: each sample opens some candidates and closes others."""
    import torch

    from redconvert.layers import dynamic_layers

    for layer in dynamic_layers(model).values():
        torch.nn.init.normal_(layer.gate.fc2.weight, std=2.0)
        torch.nn.init.zeros_(layer.gate.beta)


def close_full_candidates(model) -> None:
    """Every layer at its cheapest candidate, for every sample."""
    import torch

    from redconvert.layers import dynamic_layers

    for layer in dynamic_layers(model).values():
        with torch.no_grad():
            layer.gate.beta.copy_(-layer.gate.beta)


def measure_memory(state: str, arguments: argparse.Namespace) -> int:
    """Peak resident bytes of three steps beyond what the process held before them."""
    step = build(state, arguments)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def measure_time(arguments: argparse.Namespace) -> dict[str, list[float]]:
    steps = {state: build(state, arguments) for state in STATES}
    seconds: dict[str, list[float]] = {state: [] for state in STATES}
    for repeat in range(arguments.steps + 1):
        for state, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                seconds[state].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    arguments = parse_arguments()
    if arguments.memory_of:
        print(measure_memory(arguments.memory_of, arguments))
        return
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

    from common import environment, write

    own = [sys.executable, __file__, "--batch", str(arguments.batch), "--frames", str(arguments.frames)]
    own += ["--size", str(arguments.size), "--seed", str(arguments.seed)]
    plain = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    plain["MALLOC_MMAP_THRESHOLD_"] = "65536"
    # Memory is measured where every block over 64 KB is given back at once: the peak is then what lives.
    peaks = {}
    for state in STATES:
        command = [*own, "--memory-of", state]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        peaks[state] = int(shown.stdout.split()[-1])
    seconds = measure_time(arguments)
    dense_time, dense_peak = statistics.median(seconds["dense"]), peaks["dense"]
    rows = {
        state: {
            "step_ms": round(1e3 * statistics.median(seconds[state]), 1),
            "step_ms_min_max": [round(1e3 * bound, 1) for bound in (min(seconds[state]), max(seconds[state]))],
            "time_against_dense": round(statistics.median(seconds[state]) / dense_time, 3),
            "peak_mb": round(peaks[state] / 1e6),
            "peak_against_dense": round(peaks[state] / dense_peak, 3),
        }
        for state in STATES
    }
    result = {
        "what": "training step, torchvision r2plus1d_18, SGD with momentum",
        "input": [arguments.batch, 3, arguments.frames, arguments.size, arguments.size],
        "rows": rows,
        "three_against_two_candidates": {
            kind: {
                "time": round(rows[f"3 candidates, {kind}"]["step_ms"] / rows[f"2 candidates, {kind}"]["step_ms"], 3),
                "peak": round(rows[f"3 candidates, {kind}"]["peak_mb"] / rows[f"2 candidates, {kind}"]["peak_mb"], 3),
            }
            for kind in ("birth", "mixed")
        },
        **environment(arguments.seed),
    }
    write(result, arguments.out)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
