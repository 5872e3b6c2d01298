"""What the trained dynamic networks of jhmdb_i3d.py take per clip, each clip as its gates decide.

    python benchmarks/jhmdb_time.py --work jhmdb-work

Real weights, real clips, real decisions: the finetuned I3D compiled with freezing, deployed dense, and deployed
dynamic, on test clips one at a time, in turn in one process. Set the allocator variables of CONTRIBUTING.md and stop
other work.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write
from torch import Tensor, nn

import redconvert
from redconvert import zoo
from redconvert.cost import interleaved
from redconvert.cost.clock import share
from redconvert.data import JHMDB
from redconvert.deploy.forms import compiled_network, in_channels_last

CLIPS, REPEATS = 32, 3


def time_row(base: nn.Module, folder: Path, clips: list[Tensor]) -> dict[str, Any]:
    """Milliseconds per clip of each form, averages over clips of medians of repeats, and what was realised."""
    dynamic = redconvert.from_pretrained(base, folder).eval()
    macs = redconvert.report(dynamic, clips, time=False)
    fast = redconvert.deploy(dynamic, clips[0])
    compiled = compiled_network(*in_channels_last(copy.deepcopy(base), clips[0]))
    seconds: dict[str, list[float]] = {}
    for clip in clips:
        calls: dict[str, Callable[[], Any]] = {
            "compiled": lambda clip=clip: compiled(clip),  # type: ignore[misc]
            "deployed, dense": lambda clip=clip: fast(clip),  # type: ignore[misc]
            "deployed, dynamic": lambda clip=clip: fast(clip),  # type: ignore[misc]
        }
        within = {"deployed, dense": lambda: redconvert.disabled(fast)}
        for name, timing in interleaved(calls, repeats=REPEATS, within=within).items():
            seconds.setdefault(name, []).append(timing.median)
    ms = {name: round(1000 * statistics.mean(each), 2) for name, each in seconds.items()}
    realised = share(ms["compiled"], ms["deployed, dynamic"], macs.dense_macs, macs.executed_macs)
    return {
        "ms": ms,
        "ms_range": [round(1000 * edge(seconds["deployed, dynamic"]), 2) for edge in (min, max)],
        "share_of_dense_macs": round(macs.executed_macs / macs.dense_macs, 4),
        "share": None if realised is None else round(realised, 3),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("jhmdb-work"), help="folder of jhmdb_i3d.py")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--step", type=int, default=2)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--out", type=Path, default=RESULTS / "jhmdb_time.json")
    arguments = parser.parse_args()
    test = JHMDB(split="test", num_frames=arguments.frames, step=arguments.step, size=arguments.size)
    chosen = torch.linspace(0, len(test) - 1, CLIPS).int().tolist()
    clips = [test[index][0][None].contiguous(memory_format=torch.channels_last_3d) for index in chosen]
    base = zoo.create("i3d_kinetics", num_classes=len(test.classes))
    base.load_state_dict(torch.load(arguments.work / "base.pt", map_location="cpu", weights_only=True))
    base.eval()
    head = {"what": __doc__.split("\n")[0], "input": list(clips[0].shape), "clips": len(clips), **environment(0)}
    rows: dict[str, Any] = {}
    for folder in sorted(arguments.work.iterdir()):
        if folder.is_dir():
            rows[folder.name] = time_row(base, folder, clips)
            print(folder.name, json.dumps(rows[folder.name]), flush=True)
            write({**head, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
