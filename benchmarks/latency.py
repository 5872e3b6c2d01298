"""Time against MACs: deployed dynamic networks beside every dense form at hand, and pruned ones.

    python benchmarks/latency.py                                  # all networks, batch 1 and 8, float32
    python benchmarks/latency.py --networks r2plus1d_18 --batches 1 --dtypes float32 bfloat16

All forms of one network, batch and dtype run in turn in one process of their own, which gets the allocator settings
of CONTRIBUTING.md; stop other work meanwhile. Rows: PyTorch eager, channels-last, folded, compiled with freezing,
OpenVINO, and the deployed network, dense and with channels, frames or both at half; in batches of 8 also mixed.
"Absorbed" is a network converted with ``absorb=True``, "inputs mixed" one with mixtures of filters and of inputs, 11/16
of both. Batches of one also have rows of a network converted with
``measure=True``, of one whose skipped frames are blended from both neighbours instead of copied (what calibration
sets), and Torch-Pruning's networks (of R(2+1)D, ResNet-50 and MobileNetV2, as near as they come to the MACs of
"channels" and of "channels and frames", absorbed or not, compiled). With --compile-dynamic they also have the dynamic
network in torch.compile: masked, and frozen to each decision (each takes a while to set up: the column of setup seconds
says how long), and the frozen ones in OpenVINO. Weights are random: time does not depend on them. JSON is written after
every network; what is in it already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write
from torch import Tensor, nn

import redconvert
from redconvert.deploy.bench import Bench, Rival, Row, bench, decisions
from redconvert.deploy.forms import DECISIONS, compiled_network, frozen_macs, in_channels_last, possible_decisions

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def _r2plus1d_18(batch: int) -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.video.r2plus1d_18(), torch.randn(batch, 3, 16, 112, 112)


def _i3d(batch: int) -> tuple[nn.Module, Any]:
    from redconvert import zoo

    return zoo.create("i3d_kinetics"), torch.randn(batch, 3, 16, 224, 224)


def _x3d_m(batch: int) -> tuple[nn.Module, Any]:
    from pytorchvideo.models.x3d import create_x3d

    model = create_x3d(input_clip_length=16, input_crop_size=224, depth_factor=2.2, model_num_class=400)
    return model, torch.randn(batch, 3, 16, 224, 224)


def _slowfast(batch: int) -> tuple[nn.Module, Any]:
    from pytorchvideo.models.slowfast import create_slowfast

    model = create_slowfast(model_num_class=400, head_pool_kernel_sizes=((8, 7, 7), (32, 7, 7)))
    return model, [torch.randn(batch, 3, 8, 224, 224), torch.randn(batch, 3, 32, 224, 224)]


def _resnet50(batch: int) -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.resnet50(), torch.randn(batch, 3, 224, 224)


def _mobilenet_v2(batch: int) -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.mobilenet_v2(), torch.randn(batch, 3, 224, 224)


def _efficientnet_b0(batch: int) -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.efficientnet_b0(), torch.randn(batch, 3, 224, 224)


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Any]]] = {
    "r2plus1d_18": _r2plus1d_18,
    "i3d": _i3d,
    "x3d_m": _x3d_m,
    "slowfast": _slowfast,
    "resnet50": _resnet50,
    "mobilenet_v2": _mobilenet_v2,
    "efficientnet_b0": _efficientnet_b0,
}


PRUNED = ("r2plus1d_18", "resnet50", "mobilenet_v2")  # Torch-Pruning takes many minutes for the branches of the others


# -- one network, in a process of its own --------------------------------------------------------------


def measure(
    name: str, batch: int, dtype: str, repeats: int, compile_dynamic: bool, absorbed_only: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name](batch)
    model = model.eval()
    kind = getattr(torch, dtype)
    one = [x[:1] for x in inputs] if isinstance(inputs, list) else inputs[:1]
    config = redconvert.ConvertConfig(align=16)
    dynamic = redconvert.convert(model, config, example_inputs=one).to(kind)
    inputs = [x.to(kind) for x in inputs] if isinstance(inputs, list) else inputs.to(kind)
    rivals: dict[str, Rival] = {}
    dense = redconvert.cost.dense_macs(model, one).total
    add_openvino(rivals, "OpenVINO", model, inputs, dtype, dense, "dense")
    absorbing = redconvert.convert(model, replace(config, absorb=True), example_inputs=one).to(kind)
    rivals |= _decided(absorbing, inputs, "absorbed", ("channels", "channels and frames", "mixed"), 0.0)
    both = replace(config, cheap="principal", mix_inputs=True, shares=(11 / 16,))  # of a 3x3 convolution about half
    mixing = redconvert.convert(model, both, example_inputs=one).to(kind)
    rivals |= _decided(mixing, inputs, "inputs mixed", ("channels", "channels and frames"), 0.0)
    if batch == 1:
        if not absorbed_only:
            rivals |= _measured(model, config, inputs, kind) | _blended(model, config, one, inputs, kind)
        if compile_dynamic:
            _add_frozen(rivals, dynamic, inputs, dtype, dense)
        if name in PRUNED:
            rivals |= _pruned({"": dynamic, "absorbed ": absorbing}, model, one, inputs, kind)
    found = bench(dynamic, inputs, repeats=repeats, compiled_dynamic=compile_dynamic and batch == 1, rivals=rivals)
    print(found, file=sys.stderr)
    return found.to_dict()


def add_openvino(
    rivals: dict[str, Rival], name: str, model: nn.Module, inputs: Any, dtype: str, macs: float, kind: str
) -> None:
    """A float32 network in OpenVINO, run at ``dtype``; nothing where OpenVINO is absent or cannot read it."""
    try:
        import openvino
    except ImportError:
        return
    begin = time.perf_counter()
    given = [x.float() for x in inputs] if isinstance(inputs, list) else inputs.float()
    example = (given,)  # a list is the one argument
    try:
        hint = {"INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16"}
        compiled = openvino.Core().compile_model(openvino.convert_model(model, example_input=example), "CPU", hint)
        arrays = [x.numpy() for x in given] if isinstance(given, list) else [given.numpy()]
        compiled(arrays)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return
    rivals[name] = Rival(lambda: compiled(arrays), macs, kind, time.perf_counter() - begin)


def _add_frozen(rivals: dict[str, Rival], dynamic: nn.Module, inputs: Any, dtype: str, dense: float) -> None:
    """In OpenVINO, frozen to each decision."""
    for label, decision in possible_decisions(dynamic).items():
        if decision != (0, 0):
            frozen = redconvert.freeze(dynamic, decision).float().eval()
            macs = frozen_macs(dynamic, inputs, decision, dense)
            add_openvino(rivals, f"OpenVINO, frozen, {label}", frozen, inputs, dtype, macs, "dynamic")


def _measured(model: nn.Module, config: redconvert.ConvertConfig, inputs: Any, kind: torch.dtype) -> dict[str, Rival]:
    """The same decisions where only the layers are dynamic that pay on this machine, as ``measure=True`` finds."""
    begin = time.perf_counter()
    typed = copy.deepcopy(model).to(kind)
    dynamic = redconvert.convert(typed, config, example_inputs=inputs, measure=True, inplace=True)
    return _decided(dynamic, inputs, "measured plan", DECISIONS, time.perf_counter() - begin)


def _blended(
    model: nn.Module, config: redconvert.ConvertConfig, one: Any, inputs: Any, kind: torch.dtype
) -> dict[str, Rival]:
    """Skipped frames blended from both neighbours, as calibration sets them: they are no copies, and cost a pass."""
    if not _is_video(inputs):
        return {}
    begin = time.perf_counter()
    dynamic = redconvert.convert(model, config, example_inputs=one).to(kind)
    for layer in redconvert.layers.dynamic_layers(dynamic).values():
        for weight in layer.cheap_t.weights if layer.cheap_t is not None else ():
            nn.init.constant_(weight, 0.5)
    return _decided(dynamic, inputs, "blended", ("frames", "channels and frames"), time.perf_counter() - begin)


def _decided(dynamic: nn.Module, inputs: Any, label: str, names: Collection[str], seconds: float) -> dict[str, Rival]:
    """Rows of another dynamic network, deployed: each of these decisions for all layers, gates asked."""
    begin = time.perf_counter()
    fast = redconvert.deploy(dynamic, inputs)
    seconds += time.perf_counter() - begin
    found = {}
    for name, mode, macs in decisions(fast, inputs):
        if name in names:

            def call(mode: Callable[[], AbstractContextManager[Any]] = mode) -> Any:
                with mode():
                    return fast(inputs)

            found[f"{label}, {name}"] = Rival(call, macs, "dynamic", seconds)
    return found


def _pruned(
    dynamic: dict[str, nn.Module], model: nn.Module, one: Any, inputs: Any, kind: torch.dtype
) -> dict[str, Rival]:
    """Torch-Pruning's smaller networks at the MACs of some of the dynamic rows, compiled with freezing."""
    try:
        import torch_pruning
    except ImportError:
        return {}
    found = {}
    dense = redconvert.cost.dense_macs(model, one).total
    rows = {
        name + label: (network, decision)
        for name, network in dynamic.items()
        for label, decision in possible_decisions(network).items()
        if label in ("channels", "channels and frames")
    }
    for label, (network, (channel, temporal)) in rows.items():
        try:
            with redconvert.forced(network, channel=channel, temporal=temporal):
                cast = [x.to(kind) for x in one] if isinstance(one, list) else one.to(kind)
                executed = redconvert.report(network, [(cast,)], time=False).executed_macs
            begin = time.perf_counter()
            # Uniform ratio over layers: MACs fall with its square.
            smaller = _prune(torch_pruning, model, one, executed / dense)
            macs = redconvert.cost.dense_macs(smaller, one).total
            smaller, _ = in_channels_last(smaller.to(kind), inputs)
            with torch.no_grad():
                compiled = compiled_network(smaller, inputs)
        except Exception as error:
            print(f"Torch-Pruning, {label}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - begin
        found[f"Torch-Pruning as {label}, compiled"] = Rival(
            lambda compiled=compiled: compiled(inputs), macs, "pruned", seconds
        )
    return found


def _prune(torch_pruning: Any, model: nn.Module, one: Any, share: float) -> nn.Module:
    """The pruned network whose MACs come nearest to this share of the dense ones."""
    dense = redconvert.cost.dense_macs(model, one).total
    low, high = 0.0, 0.9
    best: tuple[float, nn.Module] | None = None
    for _ in range(7):
        ratio = (low + high) / 2
        pruned = copy.deepcopy(model)
        ignored = [module for module in pruned.modules() if isinstance(module, nn.Linear)][-1:]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.BasePruner(
            pruned, one, importance, pruning_ratio=ratio, round_to=8, ignored_layers=ignored
        )
        pruner.step()
        macs = redconvert.cost.dense_macs(pruned, one).total
        low, high = (ratio, high) if macs > share * dense else (low, ratio)
        distance = abs(macs / dense - share)
        if best is None or distance < best[0]:
            best = distance, pruned
    assert best is not None
    return best[1].eval()


def _is_video(inputs: Any) -> bool:
    first: Tensor = inputs[0] if isinstance(inputs, list) else inputs
    return first.dim() == 5


# -- all of them ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one network, batch and dtype")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    parser.add_argument("--compile-dynamic", action="store_true", help="time dynamic networks in torch.compile too")
    parser.add_argument("--absorbed-only", action="store_true", help="no measured plans and no blended frames")
    parser.add_argument("--plot", nargs=2, metavar=("RUN", "FILE"), help="draw a run of the JSON, measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, batch, dtype = arguments.one.split("/")
        options = arguments.repeats, arguments.compile_dynamic, arguments.absorbed_only
        print(json.dumps(measure(name, int(batch), dtype, *options)))
        return
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"what": __doc__.split("\n")[0]}
    runs = result.setdefault("runs", {})
    if arguments.plot:
        run, file = arguments.plot
        Bench(**{**runs[run], "rows": tuple(Row(**row) for row in runs[run]["rows"])}).plot(file)
        return
    for name in arguments.networks:
        for batch in arguments.batches:
            for dtype in arguments.dtypes:
                key = f"{name}/{batch}/{dtype}"
                if key in runs:
                    continue
                command = [sys.executable, __file__, "--one", key, "--repeats", str(arguments.repeats)]
                command += ["--compile-dynamic"] if arguments.compile_dynamic else []
                command += ["--absorbed-only"] if arguments.absorbed_only else []
                environ = {**os.environ, **ALLOCATOR}
                try:
                    done = subprocess.run(
                        command, env=environ, stdout=subprocess.PIPE, text=True, check=True, timeout=arguments.timeout
                    )
                except subprocess.SubprocessError as error:
                    print(f"{key}: {error}", flush=True)
                    continue
                runs[key] = json.loads(done.stdout.splitlines()[-1])
                write(result | environment(0), arguments.out)


if __name__ == "__main__":
    main()
