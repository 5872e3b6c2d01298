"""The efficiency loss (Eq. 6): what the gates pay for what they compute."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..answers import in_backward
from ..errors import RedconvertError
from ..inputs import tensors_in
from ..layers import DynamicConv, Observation, dynamic_layers
from ..layers.gate import largest_open, processes
from ..layers.macs import LayerMacs, executed_macs, layer_macs

__all__ = ["EfficiencyLoss", "rows_of"]

Correct = Callable[[Any, Any], Tensor]


class EfficiencyLoss:
    """``L_e = mean_n(correct_n ? (mu_0 * cost_n)^p : otherwise)`` (Eq. 6), or the distance to a target.

    ``cost_n`` is the share of the dense multiply-adds that sample n executed, gates and cheap operations
    counted. Its value is what was executed (hard); its gradient is that of the expected cost under the gate's
    weights (soft), ``sum_ij w_c,i w_t,j MACs_ij``. With a target, ``L_e = (mean_n cost_n - target)^2`` over the
    samples of all processes.

    Build it once, before the loop: it listens to the network's forward passes, and each call prices the
    last one.

        efficiency = redconvert.EfficiencyLoss(dynamic, target=0.6)
        for x, y in loader:
            logits = dynamic(x)
            loss = criterion(logits, y) + 0.8 * efficiency(logits, y)

    Args:
        dynamic: a converted network. It may be wrapped (DDP) afterwards; the loss keeps listening.
        target: the wished average cost, a share in (0, 1]; None for Eq. 6, which has no lower end.
        mu_0, p, otherwise: of Eq. 6. The published text is garbled where it gives p and the second branch.
        correct: ``(outputs, labels) -> (N)`` booleans, for outputs that are not class scores.
        static_macs: per sample, of all that is not a dynamic layer. Costs are shares of the dynamic layers'
            dense MACs without it, and of the whole network's with it.

    Attributes:
        costs: of the samples of the last call, ``(N)``, without graph.
    """

    def __init__(
        self,
        dynamic: nn.Module,
        *,
        target: float | None = None,
        mu_0: float = 1.0,
        p: float = 1.0,
        otherwise: float = 0.0,
        correct: Correct | None = None,
        static_macs: float = 0.0,
    ) -> None:
        if target is not None and not 0 < target <= 1:
            raise RedconvertError(f"target={target!r} must be a share of the dense MACs in (0, 1]")
        if mu_0 <= 0 or p <= 0 or static_macs < 0:
            raise RedconvertError(
                f"mu_0={mu_0!r} and p={p!r} must be positive, static_macs={static_macs!r} not negative"
            )
        self.target, self.mu_0, self.p, self.otherwise = target, mu_0, p, otherwise
        self.correct, self.static_macs = correct, static_macs
        self.costs: Tensor | None = None
        self._tape, self._priced = _Tape(), _Priced()
        self._remove = weakref.finalize(self, _attach(dynamic, self._tape))

    def close(self) -> None:
        """Stop listening; also done when the loss is deleted."""
        self._remove()

    def __call__(self, outputs: Any, labels: Any = None) -> Tensor:
        """The loss of the network's last forward pass, a scalar.

        Args:
            outputs: of that pass; class scores ``(N, classes)``, or what ``correct`` takes.
            labels: ``(N)``, or a teacher's scores ``(N, classes)``: then agreeing with it is correct. Not
                needed with a target.

        Raises:
            RedconvertError: no forward pass was seen, no layer decided, or outputs and labels do not fit.
        """
        costs = self.cost(rows_of(outputs))
        self.costs = costs.detach()
        if self.target is not None:
            return (_mean_over_processes(costs) - self.target).square()
        right = self._right(outputs, labels).to(costs.device)
        if right.shape != costs.shape:
            raise RedconvertError(
                f"correct(outputs, labels) must return one boolean for each of the {len(costs)} samples, not shape "
                f"{tuple(right.shape)}"
            )
        return torch.where(right, (self.mu_0 * costs).pow(self.p), costs.new_full((), self.otherwise)).mean()

    def cost(self, num_samples: int) -> Tensor:
        """``cost_n`` of the last forward pass, ``(num_samples)``; its graph is that of the soft cost."""
        calls = self._tape.take()
        if not calls:
            raise RedconvertError(
                "the efficiency loss saw no forward pass: build it before the loop and call it after each pass of "
                "the converted network, in eager mode"
            )
        learning = torch.is_grad_enabled() and any(layer.learns for layer, _ in calls)
        if learning and not any(w.requires_grad for _, seen in calls for w in seen.weights):
            raise RedconvertError(
                "no gate of the network carries a gradient: a frozen gate, a no_grad forward pass or a reentrant "
                "torch.utils.checkpoint (pass use_reentrant=False) leaves the efficiency loss nothing to train"
            )
        executed, dense = [], self.static_macs * num_samples
        for layer, seen in calls:
            cost, whole = self._priced(layer, seen)
            executed.append(_per_sample(cost, num_samples))
            dense += whole
        return (torch.stack(executed).sum(0) + self.static_macs) / (dense / num_samples)

    def _right(self, outputs: Any, labels: Any) -> Tensor:
        if self.correct is not None:
            return torch.as_tensor(self.correct(outputs, labels)).detach().bool()
        if not isinstance(labels, Tensor) or not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise RedconvertError(
                "Eq. 6 prices correct samples only: pass labels (N) or a teacher's scores (N, classes) beside "
                "scores (N, classes), or give EfficiencyLoss a callable correct=(outputs, labels) -> (N) booleans"
            )
        wanted = labels.argmax(1) if labels.dim() == 2 else labels
        if wanted.shape != outputs.shape[:1]:
            raise RedconvertError(f"labels of shape {tuple(labels.shape)} do not fit scores {tuple(outputs.shape)}")
        return outputs.detach().argmax(1) == wanted


class _Tape:
    """What the layers decided in the last forward pass. A copied or pickled network carries a silent one."""

    def __init__(self, listening: bool = True) -> None:
        self.listening = listening
        self.calls: list[tuple[DynamicConv, Observation]] = []

    def __reduce__(self):
        return _Tape, (False,)

    def start(self, module: nn.Module, args: Any) -> None:
        if not in_backward():  # checkpointed layers run again there: the same decisions, no new ones
            self.calls = []

    def add(self, layer: DynamicConv, seen: Observation) -> None:
        if self.listening and not in_backward():
            self.calls.append((layer, seen))

    def take(self) -> list[tuple[DynamicConv, Observation]]:
        calls, self.calls = self.calls, []
        return calls

    def stop(self) -> None:
        self.listening, self.calls = False, []


def _attach(dynamic: nn.Module, tape: _Tape) -> Callable[[], None]:
    """Let ``tape`` listen to the network; returns what ends that. Neither keeps the loss alive."""
    layers, listen = list(dynamic_layers(dynamic).values()), tape.add
    for layer in layers:
        layer.observers = (*layer.observers, listen)
    handle = dynamic.register_forward_pre_hook(tape.start)

    def remove() -> None:
        tape.stop()  # `observed` may put observers back that it found before
        handle.remove()
        for layer in layers:
            rest = tuple(each for each in vars(layer).get("observers", ()) if each != listen)
            if rest:
                layer.observers = rest
            else:
                vars(layer).pop("observers", None)

    return remove


class _Priced:
    """The MACs of every decision of a layer, kept on the device by shapes: a CUDA graph may copy none to it."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Tensor, int]] = {}

    def __call__(self, layer: DynamicConv, seen: Observation) -> tuple[Tensor, float]:
        """Of every sample, hard in value and soft in gradient, and the dense MACs of all together."""
        channel, temporal = seen.weights
        dtype = torch.promote_types(channel.dtype, torch.float32)
        tables, dense = self._tables(layer, seen, dtype)
        # Of the layer that is read one candidate is certain where that one tells no weights.
        source = channel.new_ones(len(channel), 1) if seen.source is None else seen.source
        with torch.autocast(channel.device.type, enabled=False):  # MACs are larger than any float16
            soft = torch.einsum("ns,nc,nt,sct->n", source.to(dtype), channel.to(dtype), temporal.to(dtype), tables)
        if any(decision.blend for decision in seen.decisions):
            hard = tables.new_tensor(executed_macs(layer, seen))
        else:
            hard = tables[largest_open(source).long(), largest_open(channel).long(), largest_open(temporal).long()]
        return soft + (hard - soft).detach(), float(dense) * len(seen.decisions)

    def _tables(self, layer: DynamicConv, seen: Observation, dtype: torch.dtype) -> tuple[Tensor, int]:
        """``(S_source, S_c, S_t)``, and the dense MACs of one sample."""
        device, cheap = seen.weights.channel.device, layer.cheap_c
        rebuilding = cheap and tuple(op.macs_per_position for op in cheap.ops)  # calibration may choose another Phi_c
        key = (id(layer), seen.input_shape, seen.output_shape, rebuilding, device, dtype)
        if key not in self._kept:
            macs = layer_macs(layer, seen.input_shape, seen.output_shape)
            tables = torch.tensor([_table(macs, i) for i in range(len(macs.reads))], dtype=dtype, device=device)
            self._kept[key] = tables, macs.dense
        return self._kept[key]


def _table(macs: LayerMacs, source: int) -> list[list[int]]:
    """What every decision costs, ``[S_c][S_t]``."""
    return [[macs.executed(i, j, source) for j in range(len(row))] for i, row in enumerate(macs.conv)]


def _per_sample(costs: Tensor, num_samples: int) -> Tensor:
    """Sums for samples that decided several times in a row (frames in the batch); the average where none divide."""
    if len(costs) % num_samples:
        return (costs.sum() / num_samples).expand(num_samples)
    return costs.view(num_samples, -1).sum(1)


def rows_of(outputs: Any) -> int:
    """How many samples the outputs of a network hold: the first axis of their first tensor."""
    found = next((tensor for tensor in tensors_in(outputs) if tensor.dim()), None)
    if found is None:
        raise RedconvertError(
            f"the efficiency loss takes the network's outputs, whose first axis counts samples, not "
            f"{type(outputs).__name__}"
        )
    return found.shape[0]


def _mean_over_processes(costs: Tensor) -> Tensor:
    """The mean over all samples; the gradient is this process's share, as data parallel training averages it."""
    mean = costs.mean()
    if processes() == 1:
        return mean
    total = mean.detach().clone()
    distributed.all_reduce(total)
    return mean + (total / processes() - mean).detach()
