"""`redconvert.deploy`: a converted network for inference, every pass over memory fused, each sample for itself."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..checkpoint import save_pretrained
from ..convert.trace import symbolic
from ..errors import RedconvertError
from ..files import write_text_atomic
from ..inputs import as_arguments, call_with, device_of, each_batch, evaluating, move_to, tensors_in
from ..layers import Decision, DynamicConv, GateWeights, Observation, dynamic_layers, observed
from .alone import in_layers
from .decide import Batch, Seen
from .fuse import fuse
from .graphs import Captures
from .pack import FORM_NAMES
from .pathways import count_pathways, spread
from .program import Program
from .replay import Replays
from .unit import Unit
from .ways import WAYS

__all__ = ["Deployed", "deploy"]

# Of the largest output, in float32 and in half precision: above it a deployed network computes something else.
TOLERANCE, LOW_TOLERANCE = 1e-3, 0.1
FORMS = "deploy.json"
KNOWN_FORMS = (*FORM_NAMES, *WAYS)
Forms = dict[str, dict[str, str]]
OUTSIDE = "a deployed network runs fused kernels of its own: there is nothing left to compile in it"


class Deployed(nn.Module):
    """What `redconvert.deploy` returns. Call it as the network was called; `network` is that network.

    Clips on a CPU run one by one, whatever each decides: nothing is gathered or scattered, and activations stay small.
    Images on a CPU run as a batch, which falls apart where samples decide differently. All else runs as a batch, in
    which the samples that decide alike are gathered layer by layer; on a GPU `capture` spares the host's launches.
    Not for several threads at once. `torch.compile` leaves it as it is, also inside a larger network.

    Attributes:
        network: the converted network, whose gates, thresholds and modes (`forced`, `disabled`) are followed.
        replays: the passes that were recorded; None on a GPU, and where nothing is to be.
        source: how it was read: ``"fx"``, or ``"layers"`` where fx cannot trace it and each layer stands alone.
        problem: why fx could not.
    """

    def __init__(
        self,
        network: nn.Module,
        forms: Forms | None = None,
        *,
        trace: bool = True,
        problem: str | None = None,
        pathways: int = 0,
        record: bool = True,
    ) -> None:
        super().__init__()
        _stay_outside_graphs()
        self.network = network
        self.batch = Batch()
        self.problem = problem
        self._like = _first_floating(network)
        self._program: Any
        units: Mapping[str, nn.Module]
        with evaluating(network):
            root = spread(network, pathways)
            graph = self._trace(root) if trace else None
            self._pathways = pathways if graph is not None else 0
            if graph is not None:
                modules = dict(root.named_modules(remove_duplicate=False))
                units = fuse(graph, modules, self.batch, forms or {})
                self._program = Program(graph, root, {**modules, **units}, self.batch)
            else:
                self._program, units = in_layers(network, self.batch, forms or {})
            self.source = "fx" if graph is not None else "layers"
        self.units = nn.ModuleDict(units)
        self._stand_ins = {id(unit.layer): unit for unit in units.values() if isinstance(unit, Unit)}
        self._layers = layers = list(dynamic_layers(network).values())
        clips = all(id(layer) in self._stand_ins and isinstance(layer, nn.Conv3d) for layer in layers)
        self.one_by_one = clips and self._like.device.type == "cpu"
        self._captures = Captures(layers, self._stand_ins, self.batch)
        self.replays: Replays | None = None
        if record and graph is not None and self._like.device.type == "cpu":
            self.replays = Replays(layers, graph, {**modules, **units}, self.batch)
        super().train(False)

    def _trace(self, root: nn.Module) -> fx.Graph | None:
        try:
            return symbolic(root)
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}".split("\n")[0]
            return None

    @property
    def deployed_from(self) -> nn.Module:
        """The network inside, for whoever looks behind wrappers."""
        return self.network

    def extra_repr(self) -> str:
        return f"source={self.source!r}"

    def train(self, mode: bool = True) -> Deployed:
        """Refused: train the network that was deployed, then deploy again."""
        if mode:
            raise RedconvertError("a deployed network is for inference: train .network, then deploy it again")
        return super().train(False)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        raise RedconvertError(
            "a deployed network keeps the device and dtype it was packed for: move or cast .network, then deploy again"
        )

    def bake(self, decisions: Mapping[DynamicConv, Decision]) -> None:
        """Ask the gates of these layers no more; `forced` and `disabled` still act."""
        for layer, decision in decisions.items():
            unit = self._stand_ins.get(id(layer))
            if unit is not None and unit.decider is not None:
                unit.decider.baked = decision
        if self.replays is not None:
            self.replays.clear()

    def stand_in(self, layer: nn.Module) -> nn.Module:
        """The module that runs in a dynamic layer's place, for hooks and clocks."""
        return self._stand_ins.get(id(layer), layer)

    def forms(self) -> Forms:
        """The form that each convolution was found fastest in: what `redconvert.deploy` takes as ``forms``."""
        found = {name: unit.chosen_forms() for name, unit in self.units.items() if isinstance(unit, Unit)}
        return {name: forms for name, forms in found.items() if forms}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """`redconvert.save_pretrained` of the network, and the forms beside it as ``deploy.json``.

        ``redconvert.deploy(redconvert.from_pretrained(model, folder), inputs, forms=folder)`` brings it back untimed.
        """
        save_pretrained(self.network, folder)
        write_text_atomic(Path(folder, FORMS), json.dumps(self.forms(), indent=2) + "\n")

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise RedconvertError(
                "a deployed network cannot be traced or exported, its kernels belong to this process: export "
                "redconvert.freeze(.network, policy), or .network itself"
            )
        with evaluating(self.network) if self.network.training else nullcontext():
            recording = self._captures(args, kwargs)
            return self._forward(args, kwargs) if recording is None else recording(tensors_in((args, kwargs)))

    def capture(self, example_inputs: Any) -> Deployed:
        """Record the pass over inputs like these in a CUDA graph, and return this network.

        Calls with inputs of these shapes and types then replay it: the host launches once, not hundreds of times. A
        graph follows one decision of each layer, so none may depend on the input: `disabled`, both axes `forced`,
        thresholds out of the input's reach (as after a budget by layers), or gates that are baked. Calls with other
        decisions or shapes, with observers or with hooks on layers, run as before; capture each that is to be fast.

        Args:
            example_inputs: what the network takes, on a GPU.

        Raises:
            RedconvertError: not on a GPU, a decision that the input makes, or an operation that no graph holds.
        """
        args, kwargs = as_arguments(example_inputs)
        with torch.no_grad(), evaluating(self.network):
            self._captures.add(args, kwargs, self._forward)
        return self

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.dim()]
        self._check(tensors)
        rows = tensors[0].shape[0] if tensors else 1
        frames = self._folded_frames(tensors[0]) if tensors else 1
        cuttable = self.one_by_one and all(t.shape[0] == rows for t in tensors) and rows % frames == 0
        total = rows // frames if cuttable else 1
        self.batch.seen.clear()
        self.batch.total, self.batch.samples = total, None
        self.batch.forks = self._like.device.type == "cpu" and not any(layer.observers for layer in self._layers)
        state = None if self.replays is None else self.replays.state()
        outputs = []
        for sample in range(total):
            self.batch.samples = [sample] if total > 1 else None
            part = slice(sample * frames, (sample + 1) * frames) if total > 1 else slice(None)
            one = tree_map(lambda leaf, part=part: _cut(leaf, part), (args, kwargs))
            outputs.append(self._run(one[0], one[1], state))
        self._tell(total)
        return outputs[0] if total == 1 else _joined(outputs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> Any:
        """The program, or what was recorded of it."""
        args = self._spread(args)
        run = partial(self._step_by_step, args, kwargs)
        return run() if state is None or self.replays is None else self.replays(state, args, kwargs, run)

    def _step_by_step(self, args: Any, kwargs: dict[str, Any]) -> Any:
        self.batch.gates_run = self.batch.always_ask or any(map(self._asks_its_gate, self._layers))
        return self._program(*args, **kwargs)

    def _spread(self, args: tuple[Any, ...]) -> Any:
        """The arguments of the program: the tensors of a list, where it was read for so many."""
        if not self._pathways:
            return args
        if len(args) != 1 or not isinstance(args[0], list) or len(args[0]) != self._pathways:
            raise RedconvertError(f"this network was deployed for a list of {self._pathways} tensors: give it that")
        return args[0]

    def _folded_frames(self, x: Tensor) -> int:
        """Rows per sample where the batch of a 2D network holds ``N * T`` frames."""
        folded = {unit.frames_per_sample for unit in self.units.values() if isinstance(unit, Unit)}
        return max(folded, default=1) if x.dim() == 4 else 1

    def _check(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device != self._like.device:
                raise RedconvertError(
                    f"this network was deployed on {self._like.device} and its input is on {tensor.device}: move the "
                    f"input, or move .network and deploy it again"
                )
            if tensor.is_floating_point() and tensor.dtype != self._like.dtype:
                raise RedconvertError(
                    f"this network was deployed in {self._like.dtype} and its input is {tensor.dtype}: cast the input, "
                    f"or cast .network and deploy it again"
                )
            if tensor.numel() == 0:
                raise RedconvertError(f"an empty batch, shape {tuple(tensor.shape)}: give at least one sample")

    def _asks_its_gate(self, layer: DynamicConv) -> bool:
        unit = self._stand_ins.get(id(layer))
        return layer.enabled if unit is None or unit.decider is None else unit.decider.asks()

    def _tell(self, total: int) -> None:
        """Tell observers of the whole batch what its samples decided: one observation per call of a layer."""
        for unit, seen in self.batch.seen.items():
            calls = len(seen) // total  # of one sample
            for call in range(calls):
                observation = _observation(unit, seen[call::calls])
                for observer in unit.layer.observers:
                    observer(unit.layer, observation)
        self.batch.seen.clear()


@functools.cache
def _stay_outside_graphs() -> None:
    """Have dynamo skip deployed networks: it would break its graph at each kernel, and compile again per decision.

    Not where the class is made: importing dynamo takes a second.
    """
    knows_reasons = "reason" in inspect.signature(torch.compiler.disable).parameters
    options: dict[str, Any] = {"reason": OUTSIDE} if knows_reasons else {}
    Deployed.forward = torch.compiler.disable(Deployed.forward, **options)  # type: ignore[method-assign]


def deploy(
    dynamic: nn.Module,
    example_inputs: Any = None,
    *,
    forms: Forms | str | os.PathLike[str] | None = None,
    bake: Any = None,
    check: bool = True,
    record: bool = True,
) -> Deployed:
    """Make a converted network fast: for inference, with the same results, following the same decisions.

    An fx pass folds norms into convolutions and cheap operations and fuses residual adds and activations; clips whose
    frames are copies are carried with the computed frames alone, and temporal convolutions over copies get
    fewer taps; weights are packed for oneDNN, layouts are channels-last, and where a convolution has several forms
    the first call times them. Weights are read now: train or calibrate first, deploy again after. Thresholds are
    read at each call, so `set_budget` acts at once.

    Args:
        dynamic: what `redconvert.convert` returned. It is not changed, and shared: forcing or disabling one
            acts on the other.
        example_inputs: what the network takes. With them the first call is made here: forms are chosen, and the
            results compared with the network's own.
        forms: of an earlier `Deployed.forms`, or the folder of a `Deployed.save`; saves the timing.
        bake: batches over which to watch the gates: those that never change their mind are not asked again, which saves
            their time. Deploy again after a change of the budget.
        check: compare, where there are example inputs.
        record: on a CPU, write down the calls of a pass when its decisions are met for the second time, and make these
            calls alone from then on.

    Raises:
        RedconvertError: no dynamic layers, or results that differ from the network's.
    """
    if isinstance(dynamic, Deployed):
        raise RedconvertError("this network is deployed already: deploy its .network again after a change")
    dynamic_layers(dynamic)
    forms = _read_forms(forms) if isinstance(forms, str | os.PathLike) else forms
    fast = Deployed(dynamic, forms, pathways=count_pathways(example_inputs), record=record)
    constant = _constant_decisions(dynamic, bake) if bake is not None else {}
    fast.bake(constant)
    if example_inputs is None:
        return fast
    if check:
        with evaluating(dynamic):
            wanted = call_with(dynamic, example_inputs)
    try:
        found = call_with(fast, example_inputs)
        problem = _difference(found, wanted, dynamic) if check else None
    except RedconvertError:
        raise
    except Exception as error:  # what fx read is not what runs: control flow, shapes that it took for fixed
        problem = f"{type(error).__name__}: {error}".split("\n")[0]
    if problem is None:
        return fast
    if fast.source == "layers":
        raise RedconvertError(problem)
    fast = Deployed(dynamic, forms, trace=False, problem=problem)
    fast.bake(constant)
    problem = _difference(call_with(fast, example_inputs), wanted, dynamic) if check else None
    if problem is not None:
        raise RedconvertError(problem)
    return fast


def _constant_decisions(dynamic: nn.Module, batches: Any) -> dict[DynamicConv, Decision]:
    """The layers whose decision is the same for every sample of the batches."""
    seen: dict[DynamicConv, set[Decision]] = {}

    def listen(layer: DynamicConv, observation: Observation) -> None:  # what others decide is no choice of its own
        seen.setdefault(layer, set()).update(decision._replace(source=0) for decision in observation.decisions)

    with evaluating(dynamic), observed(dynamic, listen):
        for batch in each_batch(batches):
            call_with(dynamic, move_to(batch, device_of(dynamic)))
    return {layer: next(iter(found)) for layer, found in seen.items() if len(found) == 1}


def _read_forms(folder: str | os.PathLike[str]) -> Forms:
    path = Path(folder, FORMS)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RedconvertError(
            f"forms in '{path}' cannot be read ({error}): give a folder that Deployed.save wrote, or leave them out "
            f"to time them again"
        ) from error
    known = isinstance(found, dict) and all(isinstance(each, dict) for each in found.values())
    if not known or any(form not in KNOWN_FORMS for each in found.values() for form in each.values()):
        raise RedconvertError(f"'{path}' holds no forms of a deployed network: leave forms out to time them again")
    return found


def _difference(found: Any, wanted: Any, dynamic: nn.Module) -> str | None:
    """What is wrong with the results, in words; None where they agree."""
    for ours, theirs in zip(tensors_in(found), tensors_in(wanted), strict=True):
        if not theirs.is_floating_point():
            continue
        scale = theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
        error = float((ours - theirs).abs().max() / scale) if ours.shape == theirs.shape else float("inf")
        if not error <= (TOLERANCE if theirs.dtype in (torch.float32, torch.float64) else LOW_TOLERANCE):
            return (
                f"deployed, {type(dynamic).__name__} gives results that differ by {error:.1e} of the largest one: it "
                f"keeps state between calls or between samples, or a gate stands on its threshold. Pass check=False "
                f"to take it as it is"
            )
    return None


def _observation(unit: Unit, seen: list[Seen]) -> Observation:
    """What the samples of a batch decided in one call of a layer, one after the other."""
    decisions = [decision for each in seen for decision in each.decisions]
    frames, is_image = unit.frames_per_sample, unit.dim == 2
    shapes = []
    for shape in (seen[0].input_shape, seen[0].output_shape):
        N, C, T, H, W = shape
        rows = N * len(seen)
        shapes.append(torch.Size((rows * frames, C, H, W) if is_image else (rows, C, T, H, W)))
    weights = GateWeights(*(torch.cat(parts) for parts in zip(*(each.weights for each in seen), strict=True)))
    sources = [each.source for each in seen if each.source is not None]
    return Observation(shapes[0], shapes[1], weights, decisions, torch.cat(sources) if sources else None)


def _cut(leaf: Any, part: slice) -> Any:
    return leaf[part] if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _joined(outputs: list[Any]) -> Any:
    """The outputs of single samples as that of a batch."""
    leaves, structure = [tree_flatten(each)[0] for each in outputs], tree_flatten(outputs[0])[1]
    return structure.unflatten(
        [
            torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]
            for parts in zip(*leaves, strict=True)
        ]
    )


def _first_floating(network: nn.Module) -> Tensor:
    return next(parameter for parameter in network.parameters() if parameter.is_floating_point())
