"""How long conversion takes, tracing included.

    python benchmarks/conversion.py

Each network is converted five times from a fresh copy; the first conversion, which also imports what
tracing needs, stands apart from the median of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from common import RESULTS, environment, write

import redconvert
from redconvert.sources import open_source, tensors_of

NETWORKS = {
    "pytorchvideo:x3d_m": (1, 3, 16, 224, 224),
    "torchvision:r2plus1d_18": (1, 3, 16, 112, 112),
    "zoo:i3d_kinetics": (1, 3, 64, 224, 224),
    "timm:resnet50": (1, 3, 224, 224),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "conversion.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = {}
    for name, shape in NETWORKS.items():
        model, example = open_source(name).model, tensors_of(shape)
        assert model is not None
        seconds = []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            dynamic = redconvert.convert(model, example_inputs=example)
            seconds.append(time.perf_counter() - start)
        layers = sum(isinstance(m, redconvert.DynamicConv2d | redconvert.DynamicConv3d) for m in dynamic.modules())
        first, median = round(seconds[0], 3), round(statistics.median(seconds[1:]), 3)
        rows[name] = {"input": list(shape), "layers": layers, "first_s": first, "median_s": median}
    result = {
        "what": "redconvert.convert(model, example_inputs=...), tracing included",
        "rows": rows,
        **environment(seed=0),
    }
    write(result, arguments.out)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
