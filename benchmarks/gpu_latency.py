"""Time against MACs on a GPU: deployed dynamic networks beside every dense form, in CUDA graphs and without.

    python benchmarks/gpu_latency.py                                       # R(2+1)D-18, I3D, ResNet-50, batch 8 and 32
    python benchmarks/gpu_latency.py --networks i3d --batches 8 --compile  # torch.compile(mode="reduce-overhead") too
    python benchmarks/gpu_latency.py --device cpu --smoke --out x.json     # its logic, on tiny inputs

Dense rows: PyTorch eager, channels-last, with norms folded, that in a CUDA graph, compiled, and the deployed network
dense. Dynamic rows: deployed, every layer forced to the same candidates, gates asked though not followed; "settled" are
rows whose gates need not be asked (as after a budget by layers). "Absorbed" is converted with ``absorb=True``; "mixed"
gives each sample another decision and is never captured. Rows "graph" are captured. Weights are random: time does not
depend on them. Every row is timed a few times when it is set up, and in turn with all others at the end of its network
and batch (``interleaved``); ``share`` is against the fastest dense row. Peak memory is that of a pass without a graph.
JSON is written after every row; after --seconds no further row starts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write
from gpu_rows import Call, LimitError, Mode, Run, in_graph, limited, untuned
from torch import Tensor, nn

import redconvert
from redconvert.deploy.bench import asked
from redconvert.deploy.forms import dense_forms, in_channels_last, possible_decisions

SIZES = {"r2plus1d_18": (3, 16, 112, 112), "i3d": (3, 16, 224, 224), "resnet50": (3, 224, 224)}
TINY = {"r2plus1d_18": (3, 4, 32, 32), "i3d": (3, 8, 64, 64), "resnet50": (3, 64, 64)}


def network_of(name: str) -> nn.Module:
    import torchvision

    if name == "i3d":
        return redconvert.zoo.create("i3d_kinetics").eval()
    make = torchvision.models.video.r2plus1d_18 if name == "r2plus1d_18" else torchvision.models.resnet50
    return make().eval()


# -- what is timed -------------------------------------------------------------------------------------


def compiled(network: nn.Module, inputs: Tensor, seconds: float) -> Call:
    """With ``mode="reduce-overhead"``: fused passes, in CUDA graphs."""
    fast = torch.compile(network, mode="reduce-overhead")

    def call() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(inputs)

    with limited(seconds):
        for _ in range(3):
            call()
    return call


class Dynamic:
    """A converted network, deployed: its rows, by decision."""

    def __init__(
        self, model: nn.Module, config: redconvert.ConvertConfig, one: Tensor, inputs: Tensor, forms: dict[str, Any]
    ) -> None:
        converted = redconvert.convert(model, config, example_inputs=one)
        self.inputs, self.one = inputs, inputs[:1]
        self.network = converted.to(inputs.device, inputs.dtype)
        self.fast = redconvert.deploy(self.network, forms=forms or None)
        self.possible = possible_decisions(self.network)
        self._macs: dict[tuple[int, int], float] = {}

    def call(self) -> Any:
        return self.fast(self.inputs)

    def uncaptured(self) -> Any:
        """The same where a graph would be replayed."""
        return self.fast._forward((self.inputs,), {})

    def macs(self, decision: tuple[int, int]) -> float:
        """Executed, per sample."""
        if decision not in self._macs:
            with untuned(), redconvert.forced(self.network, channel=decision[0], temporal=decision[1]):
                found = redconvert.report(self.network, [(self.one,)], time=False)
            self._macs[decision], self.dense_macs = found.executed_macs, found.dense_macs
        return self._macs[decision]

    def add(self, run: Run, label: str, decision: tuple[int, int], *, asks: bool = True, graph: bool = True) -> None:
        """A row of one decision for all layers and samples."""
        if decision not in self.possible.values():
            return
        i, j = decision
        self._add(run, label, "dynamic", self.macs(decision), lambda: self._mode(i, j, asks), graph)

    def add_dense(self, run: Run, graph: bool = True) -> None:
        self.macs((0, 0))
        self._add(run, "deployed, dense", "dense", self.dense_macs, lambda: redconvert.disabled(self.fast), graph)

    def add_mixed(self, run: Run, label: str) -> None:
        """Every sample another decision."""
        mixed = list(islice(cycle(self.possible.values()), len(self.inputs)))
        channel, temporal = ([decision[axis] for decision in mixed] for axis in (0, 1))
        macs = statistics.mean(self.macs(decision) for decision in mixed)
        self._add(run, label, "dynamic", macs, lambda: asked(self.fast, channel, temporal), False)

    def _mode(self, i: int, j: int, asks: bool) -> AbstractContextManager[Any]:
        return asked(self.fast, i, j) if asks else redconvert.forced(self.fast, channel=i, temporal=j)

    def _add(self, run: Run, label: str, kind: str, macs: float, mode: Mode, graph: bool) -> None:
        if not graph:
            run.add(label, kind, macs, lambda: (self.uncaptured, mode))
        elif run.device.type == "cuda":

            def make() -> tuple[Call, Mode]:
                with mode():
                    self.fast.capture(self.inputs)
                return self.call, mode

            run.add(f"{label}, graph", kind, macs, make, self.uncaptured)


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def numerics(model: nn.Module, config: redconvert.ConvertConfig, one: Tensor, device: torch.device) -> dict[str, float]:
    """The largest difference of any output, of the largest output, between deployed and eager dynamic networks."""
    dynamic = redconvert.convert(model, config, example_inputs=one).to(device)
    x = one.to(device).repeat(2, *[1] * (one.dim() - 1))
    decisions: dict[str, tuple[Any, Any]] = {**possible_decisions(dynamic), "mixed": ([0, 1], [0, 0])}
    found: dict[str, float] = {}
    wanted: dict[str, Tensor] = {}
    for kind in (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,):
        fast, short = redconvert.deploy(dynamic.to(kind)), str(kind).removeprefix("torch.")
        for name, (channel, temporal) in decisions.items():
            with redconvert.forced(dynamic, channel=channel, temporal=temporal):
                ours, theirs = fast(x.to(kind)), dynamic(x.to(kind))
            found[f"{name}, {short}"] = difference(ours, theirs)
            found[f"{name}, {short} against eager float32"] = difference(ours, wanted.setdefault(name, theirs))
    return found


def measure(name: str, batch: int, options: argparse.Namespace, run: Run, forms: dict[str, Any]) -> None:
    """The rows of one network and batch, those that matter most first."""
    torch.manual_seed(options.seed)
    model, size = network_of(name), (TINY if options.smoke else SIZES)[name]
    one, inputs = torch.randn(1, *size), torch.randn(batch, *size).to(run.device, getattr(torch, options.dtype))
    made: dict[str, Dynamic] = {}

    def dynamic(label: str, absorb: bool, align: int) -> Dynamic:
        config = redconvert.ConvertConfig(absorb=absorb, align=align)
        made[label] = Dynamic(model, config, one, inputs, forms.get(label, {}))
        return made[label]

    def finish() -> None:
        for label, each in made.items():
            forms[label] = each.fast.forms()
            names = [form for unit in forms[label].values() for form in unit.values()]
            run.result.setdefault("forms", {})[label] = Counter(names)
        run.finish()

    absorbing = dynamic("absorbed", True, options.aligns[0])
    run.profile("deployed, dense", absorbing.uncaptured, lambda: redconvert.disabled(absorbing.fast))
    run.profile("absorbed, channels", absorbing.uncaptured, lambda: asked(absorbing.fast, 1, 0))
    absorbing.add_dense(run)
    absorbing.add(run, "absorbed, channels", (1, 0))
    plain = dynamic("rebuilt", False, options.aligns[0])
    add_dense(run, plain.network, inputs, absorbing.dense_macs)
    absorbing.add(run, "absorbed, channels, settled", (1, 0), asks=False)
    absorbing.add(run, "absorbed, channels and frames", (1, 1))
    absorbing.add(run, "absorbed, channels and frames, settled", (1, 1), asks=False)
    for label, decision in (("channels", (1, 0)), ("frames", (0, 1)), ("channels and frames", (1, 1))):
        plain.add(run, label, decision)
        plain.add(run, f"{label}, settled", decision, asks=False)
    plain.add(run, "all open", (0, 0))
    run.profile("channels", plain.uncaptured, lambda: asked(plain.fast, 1, 0))
    absorbing.add_dense(run, graph=False)
    absorbing.add(run, "absorbed, channels", (1, 0), graph=False)
    plain.add(run, "channels", (1, 0), graph=False)
    finish()
    for align in options.aligns[1:]:
        dynamic(f"absorbed {align}", True, align).add(run, f"absorbed, channels, align {align}", (1, 0))
    if "mixed" in options.extras:
        absorbing.add_mixed(run, "absorbed, mixed")
    if options.compile and run.device.type == "cuda" and batch == options.batches[0]:
        add_compiled(run, network_of(name), inputs, absorbing.dense_macs, options.compile_seconds)
    finish()
    if "numerics" in options.extras and batch == options.batches[0]:
        for label, absorb in {"absorbed": True, "rebuilt": False}.items():
            config = redconvert.ConvertConfig(absorb=absorb, align=options.aligns[0])
            with untuned():
                run.note("numerics", label, lambda config=config: numerics(model, config, one, run.device))  # type: ignore[misc]


def add_dense(run: Run, dynamic: nn.Module, inputs: Tensor, macs: float) -> None:
    """The original network in every form but a compiled one."""
    found = dict(dense_forms(dynamic, inputs, compiled=False))
    for label, form in found.items():
        run.add(label, "dense", macs, lambda call=form.call: (call, nullcontext))  # type: ignore[misc]
    if "folded" in found and run.device.type == "cuda":
        call = found["folded"].call
        run.add("folded, graph", "dense", macs, lambda: (in_graph(call), nullcontext), call)
        run.profile("folded", call, nullcontext)


def add_compiled(run: Run, model: nn.Module, inputs: Tensor, macs: float, seconds: float) -> None:
    network, laid_out = in_channels_last(model.to(inputs.device, inputs.dtype), inputs)
    seconds = min(seconds, max(run.deadline - time.monotonic(), 1))
    run.add("compiled", "dense", macs, lambda: (compiled(network, laid_out, seconds), nullcontext))


# -- all of them ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--dtype", default=None, choices=["float16", "bfloat16", "float32"], help="float16 on a GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--aligns", type=int, nargs="+", default=[16, 32], help="the first in all rows, others in one")
    parser.add_argument("--extras", nargs="*", default=["numerics", "mixed"], choices=["numerics", "mixed"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=150, help="after which no further row starts")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, the first batch alone")
    parser.add_argument("--compile-seconds", type=float, default=120)
    parser.add_argument("--benchmark-limit", type=int, default=5, help="kernels that cuDNN tries for each shape")
    parser.add_argument("--smoke", action="store_true", help="tiny inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_latency.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.dtype = options.dtype or ("float16" if device.type == "cuda" else "float32")
    deadline = time.monotonic() + options.seconds
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = options.benchmark_limit
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    result = {"what": __doc__.split("\n")[0], **environment(options.seed, device), **machine(device), "runs": {}}
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("default")

        def save() -> None:
            result["warnings"] = sorted({str(each.message)[:500] for each in warned})
            result["seconds"] = round(time.monotonic() - deadline + options.seconds, 1)
            write(result, options.out)

        for name in options.networks:
            forms: dict[str, Any] = {}  # those found with the first batch serve the others
            for batch in options.batches:
                found = result["runs"].setdefault(f"{name}/{batch}/{options.dtype}", {})
                run = Run(found, save, device, options.repeats, deadline)
                try:
                    measure(name, batch, options, run, forms)
                except LimitError:
                    run.result["cut_off"] = True
                    run.finish() if run.rows else None
                except Exception as error:
                    run.result["error"] = f"{type(error).__name__}: {error}"[:2000]
                    print(f"{name}, {batch}: {run.result['error'][:500]}", file=sys.stderr, flush=True)
                save()
                for row in run.rows:
                    print(f"{name}/{batch} {row.name:40} {row.found['ms']:8.3f} ms", flush=True)
                del run
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    found = {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    with suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    return found


if __name__ == "__main__":
    main()
