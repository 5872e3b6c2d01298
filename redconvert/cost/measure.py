"""What one report is made of: MACs of every sample that passes, and the time of some batches."""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..inputs import call_with, device_of, evaluating, tensors_in
from ..layers import DynamicConv, Observation, disabled, dynamic_layers, observed
from ..layers.macs import executed_macs, layer_macs
from .clock import LayerClock, interleaved
from .count import dense_macs

__all__ = ["LayerRecord", "MacsMeter", "Stopwatch", "describe_environment", "static_macs"]


@dataclass
class LayerRecord:
    """What one layer did; one entry per sample in each list, summed over the layer's calls (0 where it has none)."""

    first: Observation | None = None
    calls: int = 0  # of the first forward pass in which it ran
    dense: list[float] = field(default_factory=list)
    executed: list[float] = field(default_factory=list)
    cheap: list[float] = field(default_factory=list)
    gate: list[float] = field(default_factory=list)
    decisions: Counter[tuple[int, int]] = field(default_factory=Counter)


class MacsMeter:
    """Runs batches through a network and counts what every layer and sample executes.

    Of a `redconvert.Cascade` the layers are those of its first pass; its second is in ``executed`` alone.

    Attributes:
        records: by layer name.
        dense, executed: MACs of the whole network, one entry per sample.
        batch_sizes: samples in each batch.
        uncounted: operators that may multiply and were not counted.
    """

    def __init__(self, model: nn.Module, layers: dict[str, DynamicConv]) -> None:
        self.model, self.layers = model, layers
        self.names = {id(layer): name for name, layer in layers.items()}
        self.records = {name: LayerRecord() for name in layers}
        self.dense: list[float] = []
        self.executed: list[float] = []
        self.batch_sizes: list[int] = []
        self.uncounted: tuple[str, ...] = ()
        self._networks: dict[Any, float] = {}  # dense MACs per sample, by network and the shapes of one sample

    def run(self, batch: Any) -> Any:
        """Count one batch, and return the network's outputs. Call it in ``eval()``, without gradients."""
        calls: dict[str, list[Observation]] = {}

        def listen(layer: DynamicConv, observation: Observation) -> None:
            calls.setdefault(self.names[id(layer)], []).append(observation)

        with observed(self.model, listen):
            outputs = call_with(self.model, batch)
        asked = getattr(self.model, "asked_again", None)  # of a cascade; counting its MACs runs it once more
        first = next(iter(calls.values()), None)
        num_samples = count_samples(batch, first[0] if first else None)
        for name in self.layers:
            self._record(name, calls.get(name, []), num_samples)
        self._add_network(batch, num_samples)
        if asked is not None and len(asked):
            self._add_second_pass(asked.tolist(), batch, num_samples)
        return outputs

    def _record(self, name: str, observations: list[Observation], num_samples: int) -> None:
        layer, record = self.layers[name], self.records[name]
        if record.first is None and observations:
            record.first, record.calls = observations[0], len(observations)
        added = {key: [0.0] * num_samples for key in ("dense", "executed", "cheap", "gate")}
        for seen in observations:
            macs, executed = layer_macs(layer, seen.input_shape, seen.output_shape), executed_macs(layer, seen)
            conv = [macs.convolved(d.channel, d.temporal, d.source) for d in seen.decisions]
            values = {
                "dense": [macs.dense] * len(executed),
                "executed": executed,
                "cheap": [total - part - macs.gate for total, part in zip(executed, conv, strict=True)],
                "gate": [macs.gate] * len(executed),
            }
            for key, sums in added.items():
                added[key] = [a + b for a, b in zip(sums, per_sample(values[key], num_samples), strict=True)]
            # Whoever carries channels computes those that another layer decided about.
            record.decisions.update((d.source if layer.carried else d.channel, d.temporal) for d in seen.decisions)
        for key, sums in added.items():
            getattr(record, key).extend(sums)

    def _add_network(self, batch: Any, num_samples: int) -> None:
        whole = self._network(getattr(self.model, "little", self.model), batch, num_samples)
        for sample in range(-num_samples, 0):  # those that were recorded last
            dense = sum(record.dense[sample] for record in self.records.values())
            executed = sum(record.executed[sample] for record in self.records.values())
            self.dense.append(max(whole, dense))
            self.executed.append(max(whole - dense, 0) + executed)
        self.batch_sizes.append(num_samples)

    def _add_second_pass(self, asked: list[int], batch: Any, num_samples: int) -> None:
        cascade: Any = self.model
        macs = self._network(cascade.little if cascade.big is None else cascade.big, batch, num_samples)
        for sample in asked:
            self.executed[sample - num_samples] += macs

    def _network(self, network: nn.Module, batch: Any, num_samples: int) -> float:
        """Dense MACs of a whole network per sample. Traced once for each shape."""
        inputs, count = one_sample(batch, num_samples)
        key = (network, count, *(tuple(tensor.shape) for tensor in tensors_in(inputs)))
        if key not in self._networks:
            macs = dense_macs(network, inputs)
            self.uncounted = tuple(sorted({*self.uncounted, *macs.unsupported}))
            self._networks[key] = macs.total / count
        return self._networks[key]


class Stopwatch:
    """Times batches, dense against dynamic in turn; sums over batches, in seconds.

    Attributes:
        dense, dynamic: of the whole network, medians without any hooks.
        layers: by layer name, the same of a forward pass in which every layer is timed.
    """

    def __init__(self, model: nn.Module, layers: dict[str, DynamicConv], repeats: int) -> None:
        self.model, self.repeats = model, repeats
        stand_in = getattr(model, "stand_in", lambda layer: layer)  # what a deployed network runs in its place
        self.modules: dict[str, nn.Module] = {name: stand_in(layer) for name, layer in layers.items()}
        self.device = device_of(model)
        self.dense = self.dynamic = 0.0
        self.batches = 0
        self.layers: dict[str, tuple[float, float]] = dict.fromkeys(layers, (0.0, 0.0))

    def run(self, batch: Any) -> None:
        times = interleaved(
            {"dense": lambda: call_with(self.model, batch), "dynamic": lambda: call_with(self.model, batch)},
            repeats=self.repeats,
            device=self.device,
            within={"dense": lambda: disabled(self.model)},
        )
        self.dense += times["dense"].median
        self.dynamic += times["dynamic"].median
        self.batches += 1
        self._run_layers(batch)

    def _run_layers(self, batch: Any) -> None:
        rounds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in self.modules}
        for _ in range(self.repeats):
            for mode in (0, 1):
                dense = disabled(self.model) if mode == 0 else nullcontext()
                with dense, LayerClock(self.modules, self.device) as clock:
                    call_with(self.model, batch)
                for name, seconds in clock.seconds.items():
                    rounds[name][mode].append(sum(seconds))
        for name, (slow, fast) in rounds.items():
            before = self.layers[name]
            self.layers[name] = (before[0] + statistics.median(slow), before[1] + statistics.median(fast))


def static_macs(model: nn.Module, batch: Any) -> float:
    """Dense MACs per sample of all that is not a dynamic layer, at the shapes of ``batch``."""
    meter = MacsMeter(model, dynamic_layers(model))
    with evaluating(model):
        meter.run(batch)
    return meter.dense[0] - sum(record.dense[0] for record in meter.records.values())


def count_samples(batch: Any, first: Observation | None) -> int:
    """How many samples a batch holds: its leading size, or fewer where T is folded into it.

    The first dynamic layer that ran says whether it is: it decides once per sample.
    """
    tensors = [tensor for tensor in tensors_in(batch) if tensor.dim()]
    decided = len(first.decisions) if first else 0
    rows = tensors[0].shape[0] if tensors else max(decided, 1)
    return decided if decided and decided < rows and rows % decided == 0 else rows


def per_sample(values: Any, num_samples: int) -> list[float]:
    """One number per sample from one per decision.

    A layer that decides several times per sample (frames folded into its batch) has them in a row; where
    the numbers do not divide (regions of a detector) every sample gets the average.
    """
    if len(values) % num_samples:
        return [sum(values) / num_samples] * num_samples
    run = len(values) // num_samples
    return [sum(values[start : start + run]) for start in range(0, len(values), run)]


def one_sample(batch: Any, num_samples: int) -> tuple[Any, int]:
    """The first sample of a batch and 1, or the whole batch and its size where it cannot be cut."""
    tensors = tensors_in(batch)
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    rows = max(sizes, default=0)
    if len(sizes) != 1 or rows % num_samples:
        return batch, num_samples
    return tree_map(lambda leaf: leaf[: rows // num_samples] if isinstance(leaf, Tensor) else leaf, batch), 1


def describe_environment(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Where and on what the numbers were measured: plain JSON types."""
    device = device_of(model)
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "torch": str(torch.__version__),
        "device": str(device),
        "device_name": name,
        "instructions": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(),
        "dtype": str(next(floating, torch.get_default_dtype())).removeprefix("torch."),
        "batch_shape": [list(tensor.shape) for tensor in tensors_in(batch)],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return next(iter(names), "") or platform.processor() or platform.machine()
