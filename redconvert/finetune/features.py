"""What a network computes on the way to its answer, held against what its teacher computes there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..answers import in_backward
from ..errors import RedconvertError
from ..inputs import tensors_in, unwrapped
from ..layers import DynamicConv, dynamic_layers
from .memory import blocks_of

__all__ = ["FeatureLoss", "complete_blocks"]

LEAST_SPREAD = 1e-3  # of the squared means: a single sample's scores, say, have no variance


class FeatureLoss:
    """``L_f = mean_p sum (a_p - b_p)^2 / sum (b_p - mean b_p)^2``: the share of the teacher's features that is missed.

    ``a_p`` is what module p of the network puts out, ``b_p`` what the teacher's module of the same name does, both
    ``(N, C, ...)``; sums run over everything, the mean of b over all but the channel axis. 0: alike; 1: no better than
    each channel's mean. An answer's gradient reaches a block through all that follow; here each has one of its own. It
    takes a teacher of the same widths, as a dynamic network has in its original, and a pruned one has not.

    Build it once, before the loop: it listens to the forward passes of both, and each call compares the last ones.
    Gates that learn from it open, whatever that costs: add it where they rest.

        teacher = redconvert.frozen_original(dynamic)
        features = FeatureLoss(dynamic, teacher)
        for x, y in loader:
            with redconvert.resting_gates(dynamic):
                loss = redconvert.distillation_loss(dynamic(x), teacher(x)) + 100 * features()
                loss.backward()

    Args:
        dynamic: a converted network. It may be wrapped (DDP) afterwards; each process compares its own samples.
        teacher: a network with modules of the same names, such as `frozen_original` returns.
        layers: names of the modules to compare at. None: the largest that hold at most the square root of all dynamic
            layers (of a ResNet its residual blocks), but for those that hand on channels which others leave out.

    Attributes:
        layers: the names.

    Raises:
        RedconvertError: a name that one of the networks does not have, a convolution that hands on channels which
            others leave out, or nothing to compare at.
    """

    def __init__(self, dynamic: nn.Module, teacher: nn.Module, layers: Sequence[str] | None = None) -> None:
        if not isinstance(teacher, nn.Module):
            raise RedconvertError(
                f"features are compared with those of a network, not of a {type(teacher).__name__}: pass "
                f"redconvert.frozen_original(dynamic) or another with modules of the same names"
            )
        if isinstance(layers, str):
            raise RedconvertError(f"layers={layers!r} must be a list of names, such as [{layers!r}]")
        self._layers = tuple(dynamic_layers(dynamic).values())
        self.layers = tuple(complete_blocks(dynamic) if layers is None else layers)
        if not self.layers:
            raise RedconvertError(
                f"{type(dynamic).__name__} has no block whose channels are all there to compare with the teacher's: "
                f"name modules in layers=, or convert with absorb=False"
            )
        found = [_modules(network, self.layers) for network in (dynamic, teacher)]
        incomplete = [name for name, module in found[0].items() if not _is_complete(module)]
        if incomplete:
            raise RedconvertError(
                f"'{incomplete[0]}' hands on channels that others leave out (absorb=True), so its features are not "
                f"its teacher's: name the module that also holds the convolution which reads them"
            )
        self._own, self._taught = _Heard(), _Heard()
        removes = [_attach(*each) for each in zip((dynamic, teacher), found, (self._own, self._taught), strict=True)]
        self._remove = weakref.finalize(self, lambda: [remove() for remove in removes])

    @property
    def gates_rest(self) -> bool:
        """Whether all gates do, as in `resting_gates`."""
        return not any(layer.learns for layer in self._layers)

    def close(self) -> None:
        """Stop listening; also done when the loss is deleted."""
        self._remove()

    def forget(self) -> None:
        """Drop what the last passes left, such as those of a validation."""
        self._own.outputs, self._taught.outputs = {}, {}

    def __call__(self) -> Tensor:
        """L_f of the last forward passes of both networks, a scalar; what was compared is dropped.

        Raises:
            RedconvertError: a module that did not run, or that puts out something else than its teacher.
        """
        own, taught = self._own.outputs, self._taught.outputs
        self.forget()
        return torch.stack([_missed(name, own.get(name, []), taught.get(name, [])) for name in self.layers]).mean()


def complete_blocks(dynamic: nn.Module) -> list[str]:
    """Names of the blocks (see `memory.blocks_of`) whose outputs hold all channels."""
    network = unwrapped(dynamic)
    blocks = {id(block) for block in blocks_of(network)}
    return [name for name, module in network.named_modules() if id(module) in blocks and _is_complete(module)]


def _is_complete(block: nn.Module) -> bool:
    """Whether every convolution in it that hands over channels, or carries them, does so to one in it."""
    layers = [module for module in block.modules() if isinstance(module, DynamicConv)]
    read = [layer.reads_from for layer in layers if layer.reads_from is not None]
    handed = [tie for layer in layers for tie in (layer.hands_to, layer.carries) if tie is not None]
    return all(each in read for each in handed)


class _Heard:
    """What modules put out in the last pass. A copied or pickled network carries a silent one."""

    def __init__(self, listening: bool = True) -> None:
        self.listening = listening
        self.outputs: dict[str, list[Tensor]] = {}

    def __reduce__(self):
        return _Heard, (False,)

    def start(self, module: nn.Module, args: Any) -> None:
        if not in_backward():  # checkpointed modules run again there
            self.outputs = {}

    def add(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.listening and not in_backward():
            floating = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
            self.outputs.setdefault(name, []).extend(floating)


def _modules(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(unwrapped(network).named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise RedconvertError(
            f"{type(unwrapped(network)).__name__} has no module '{unknown[0]}' to compare features at: take names of "
            f"named_modules() that the network and its teacher share"
        )
    return {name: modules[name] for name in names}


def _attach(network: nn.Module, modules: dict[str, nn.Module], heard: _Heard) -> Callable[[], None]:
    """Let ``heard`` listen to these modules; returns what ends that. Neither keeps the loss alive."""
    handles = [unwrapped(network).register_forward_pre_hook(heard.start)]
    handles += [module.register_forward_hook(partial(heard.add, name)) for name, module in modules.items()]

    def remove() -> None:
        heard.listening, heard.outputs = False, {}
        for handle in handles:
            handle.remove()

    return remove


def _missed(name: str, own: list[Tensor], taught: list[Tensor]) -> Tensor:
    """What module ``name`` misses of what its teacher puts out, as a share of its variance."""
    if not own or not taught:
        whose = "the network" if not own else "its teacher"
        raise RedconvertError(f"'{name}' of {whose} did not run: call both networks, in eager mode, before FeatureLoss")
    shapes = [[tuple(tensor.shape) for tensor in each] for each in (own, taught)]
    if shapes[0] != shapes[1]:
        raise RedconvertError(f"'{name}' puts out {shapes[0]} and its teacher {shapes[1]}: they must be alike")
    return torch.stack([_unexplained(a, b) for a, b in zip(own, taught, strict=True)]).mean()


def _unexplained(a: Tensor, b: Tensor) -> Tensor:
    """``sum (a - b)^2 / sum (b - mean b)^2`` in float32."""
    # In one layout: where those of two tensors differ, a CPU takes four times as long.
    taught = torch.empty_like(a.detach(), dtype=b.dtype).copy_(b.detach()).float()
    with torch.autocast(a.device.type, enabled=False):
        mean = taught.mean([axis for axis in range(b.dim()) if axis != 1], keepdim=True)
        spread = F.mse_loss(taught, mean.expand_as(taught))  # `var` takes far longer
        least = LEAST_SPREAD * mean.square().mean() + torch.finfo(spread.dtype).tiny
        return F.mse_loss(a.float(), taught) / torch.maximum(spread, least)
