"""What every benchmark writes beside its figures, and where."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment(seed: int, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Versions, device (a GPU's name), what the CPU computes with (AVX2, AVX512), seed and date of this run."""
    device = torch.device(device)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
    }


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def write(result: dict[str, Any], path: Path) -> None:
    """As JSON; the folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
