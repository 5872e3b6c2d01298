"""What each convolution of a network does in a forward pass: read with torch.fx, with fallbacks.

Tracing never makes conversion fail. In this order, and the plan says which one served:

1. ``fx``: the whole network traces symbolically.
2. ``fx in parts``: the sub-trees that trace.
3. ``forward``: one hooked forward pass on the example inputs.
4. ``module tree``: the names alone.

All of it happens on a copy whose tensors are fake (shapes without numbers), so that no buffer, hook
or random number of the user's network is touched and a large network costs no memory.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from ..errors import RedconvertError
from ..inputs import as_arguments
from .neighbours import output_convs, reader, shortcut

__all__ = ["ConvFacts", "LayerTracer", "Trace", "symbolic", "trace"]

Conv = nn.Conv2d | nn.Conv3d
Shape = tuple[int, ...]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_FUNCTIONAL_CONVS = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d"})


@dataclass(frozen=True)
class ConvFacts:
    """What is known of one convolution.

    Attributes:
        source: how it was learnt: ``"fx"``, ``"fx in parts"``, ``"forward"`` or ``"module tree"``.
        calls: how often one forward pass runs it; None where unknown.
        input_shape, output_shape: of its first call, batch included; None where unknown.
        norm: name of the norm that alone reads its result.
        feeds_norm: only norms read its result, so nothing changes it in place.
        is_output: its result is the network's prediction.
        reader: name of the one convolution that reads its channels, behind nothing but norms, activations, pooling and
            dropout, which treat each channel alone, depthwise convolutions, and squeeze and excitation.
        followers: names of the depthwise convolutions, and of those that read what is squeezed.
        shortcut: name of an earlier convolution whose input is added to its result, behind the norm where it has one.
    """

    source: str = "module tree"
    calls: int | None = None
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    norm: str | None = None
    feeds_norm: bool = False
    is_output: bool = False
    reader: str | None = None
    followers: tuple[str, ...] = ()
    shortcut: str | None = None

    @property
    def clip_frames(self) -> int | None:
        """Frames of its input; None for images and where unknown."""
        return self.input_shape[2] if self.input_shape is not None and len(self.input_shape) == 5 else None


@dataclass
class Trace:
    """Facts by the name under which ``named_modules`` finds each convolution first."""

    source: str
    facts: dict[str, ConvFacts] = field(default_factory=dict)
    functional: list[str] = field(default_factory=list)  # F.conv2d and the like: no module to convert
    problem: str | None = None  # why fx could not read the whole network

    def __getitem__(self, name: str) -> ConvFacts:
        return self.facts.get(name, ConvFacts())


def trace(model: nn.Module, example_inputs: Any = None) -> Trace:
    """Learn what each Conv2d and Conv3d of ``model`` feeds, how often it runs, and at which shapes.

    Raises:
        RedconvertError: the network's own forward pass fails on ``example_inputs``.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):  # a forward that draws numbers draws them while it is traced, too
        return _trace(model, example_inputs)


def _trace(model: nn.Module, example_inputs: Any) -> Trace:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin, fake, hooked = _twin(model, mode)
    names = {module: name for name, module in twin.named_modules() if isinstance(module, nn.Conv2d | nn.Conv3d)}
    result = Trace("module tree")
    try:
        _read_graph(result, twin, "", symbolic(twin, hooked), names)
        result.source = "fx"
    except Exception as error:
        result.problem = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
        _read_parts(result, twin, "", names, hooked)
        if result.facts:
            result.source = "fx in parts"
    result.facts = {name: replace(facts, source=result.source) for name, facts in result.facts.items()}
    if example_inputs is not None:
        _read_forward(result, model, twin if fake else None, mode, example_inputs)
    return result


def _twin(model: nn.Module, mode: FakeTensorMode) -> tuple[nn.Module, bool, set[nn.Module]]:
    """A copy of the structure with fake parameters and buffers; the model itself where it cannot be copied.

    Also says which modules of it the user has hooked.
    """
    try:
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        memo: dict[int, Any] = {key: mode.from_tensor(tensor) for key, tensor in tensors.items()}
        twin = copy.deepcopy(model, memo)
    except Exception:
        return model, False, {module for module in model.modules() if module._forward_hooks or _own_hooks(module)}
    hooked: set[nn.Module] = set()
    for module in twin.modules():  # the user's hooks must not see this pass
        own = _own_hooks(module)
        if own or module._forward_hooks:
            hooked.add(module)
        module._forward_hooks.clear()
        for key in own:
            del module._forward_pre_hooks[key]
    return twin.eval(), True, hooked


def _own_hooks(module: nn.Module) -> list[int]:
    """The user's pre-hooks: weight_norm and its kind, which compute the weight, are PyTorch's."""
    hooks = module._forward_pre_hooks.items()
    return [key for key, hook in hooks if not type(hook).__module__.startswith("torch.")]


# -- fx ------------------------------------------------------------------------------------------------


class LayerTracer(fx.Tracer):
    """Keeps convolutions and norms whole, also subclasses outside torch.nn, and what timm asks to keep whole.

    What goes into and comes out of a ``hooked`` module has ``meta["hooked"]``.
    """

    def __init__(self, hooked: Collection[nn.Module] = ()) -> None:
        timm_fx = sys.modules.get("timm.layers._fx") or sys.modules.get("timm.models._features_fx")
        functions: tuple[Callable, ...] = tuple(timm_fx.get_notrace_functions()) if timm_fx else ()
        super().__init__(autowrap_functions=functions)
        self.leaves = (nn.modules.conv._ConvNd, *_NORMS, *(timm_fx.get_notrace_modules() if timm_fx else ()))
        self.hooked = hooked

    def call_module(self, m: nn.Module, forward: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if m in self.hooked:
            for value in pytree.tree_leaves((args, kwargs, result)):
                if isinstance(value, fx.Proxy):
                    value.node.meta["hooked"] = True
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) is nn.Identity and not (m._forward_hooks or m._forward_pre_hooks):
            return False  # it may hold what is no tensor, such as SlowFast's lists
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def symbolic(module: nn.Module, hooked: Collection[nn.Module] = ()) -> fx.Graph:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        raise TypeError("the network is a single convolution")  # fx would look inside it
    with _untouched(module):  # a forward that stores what it computes stores proxies
        return LayerTracer(hooked).trace(module)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass leaves on modules: attributes, what lists and dicts hold, buffers, train flags."""
    attributes = {module: dict(vars(module)) for module in model.modules()}
    held = [value for values in attributes.values() for value in values.values() if isinstance(value, list | dict)]
    containers = [(value, copy.copy(value)) for value in held]
    real = [buffer for buffer in model.buffers() if not isinstance(buffer, FakeTensor)]  # fake ones hold no numbers
    buffers = [(buffer, buffer.detach().clone()) for buffer in real]
    try:
        yield
    finally:
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _read_parts(
    result: Trace, module: nn.Module, prefix: str, names: dict[Any, str], hooked: Collection[nn.Module]
) -> None:
    """Trace the largest sub-trees that trace."""
    for child_name, child in module.named_children():
        path = f"{prefix}{child_name}"
        if isinstance(child, nn.Conv2d | nn.Conv3d) or not any(
            isinstance(m, nn.Conv2d | nn.Conv3d) for m in child.modules()
        ):
            continue
        try:
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                raise TypeError("has no forward of its own")
            part = Trace("")
            _read_graph(part, child, f"{path}.", symbolic(child, hooked), names)
        except Exception:
            _read_parts(result, child, f"{path}.", names, hooked)
            continue
        result.functional += part.functional
        for name, facts in part.facts.items():
            # How often the part itself runs is unknown, and so is what its result feeds.
            result.facts.setdefault(name, replace(facts, calls=None, is_output=False))


def _read_graph(result: Trace, root: nn.Module, prefix: str, graph: fx.Graph, names: dict[Any, str]) -> None:
    modules = dict(root.named_modules(remove_duplicate=False))
    calls: dict[str, list[fx.Node]] = {
        name: [] for module in modules.values() if (name := names.get(module)) is not None
    }
    for node in graph.nodes:
        if node.op == "call_module" and (name := names.get(modules[node.target])) is not None:
            calls[name].append(node)
        elif node.op == "call_function" and getattr(node.target, "__name__", "") in _FUNCTIONAL_CONVS:
            result.functional.append(f"{prefix}{_owner(node)}{node.target.__name__}()")
    outputs = output_convs(graph, modules)
    for name, nodes in calls.items():
        users = [user for node in nodes for user in node.users]
        norms = {user.target for user in users if user.op == "call_module" and isinstance(modules[user.target], _NORMS)}
        feeds_norm = bool(users) and all(user.op == "call_module" and user.target in norms for user in users)
        read_by, followed_by = reader(nodes[0], modules, names) if len(nodes) == 1 else (None, ())
        result.facts[name] = ConvFacts(
            calls=len(nodes),
            feeds_norm=feeds_norm,
            norm=f"{prefix}{norms.pop()}" if feeds_norm and len(norms) == 1 else None,
            is_output=any(node in outputs for node in nodes),
            reader=read_by,
            followers=followed_by,
            shortcut=shortcut(nodes[0], modules, calls) if len(nodes) == 1 else None,
        )
    for name, facts in result.facts.items():  # a convolution that runs twice reads several tensors
        if facts.reader is not None and len(calls.get(facts.reader, ())) != 1:
            result.facts[name] = replace(facts, reader=None, followers=())


def _owner(node: fx.Node) -> str:
    """Path of the module whose forward made this call, as far as fx recorded it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0] if stack else ""
    return f"{path}." if path else ""


# -- one forward pass ----------------------------------------------------------------------------------


def _read_forward(
    result: Trace, model: nn.Module, twin: nn.Module | None, mode: FakeTensorMode, example_inputs: Any
) -> None:
    """Add call counts and shapes from one forward pass: on fake tensors where they serve, else on real ones."""
    seen: dict[str, list[tuple[Shape, Shape]]] | None = None
    if twin is not None:
        with mode:
            fakes = pytree.tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, example_inputs)
        log = logging.getLogger("torch._subclasses.fake_tensor")
        quiet, log.disabled = log.disabled, True  # a failure is no news: real numbers follow
        try:
            with mode:
                seen = _run(twin, fakes)
        except Exception:
            seen = None  # control flow on values
        finally:
            log.disabled = quiet
    if seen is None:
        seen = _run_real(model, example_inputs)
    if not result.facts:
        result.source = "forward"
    for name, calls in seen.items():
        facts = result.facts.get(name, ConvFacts(source="forward"))
        shapes = calls[0] if calls else (None, None)
        result.facts[name] = replace(facts, calls=len(calls), input_shape=shapes[0], output_shape=shapes[1])


def _run_real(model: nn.Module, example_inputs: Any) -> dict[str, list[tuple[Shape, Shape]]]:
    inputs = copy.deepcopy(example_inputs)
    try:
        with _untouched(model):
            return _run(model.eval(), inputs)
    except Exception as error:
        shapes = pytree.tree_map(lambda v: tuple(v.shape) if isinstance(v, Tensor) else v, example_inputs)
        reason = str(error).strip().split("\n")[0]
        raise RedconvertError(
            f"{type(model).__name__} does not run on example_inputs {shapes}: {type(error).__name__}: {reason}. "
            f"Pass what the model takes: a tensor, a tuple of positional or a dict of keyword arguments"
        ) from error


@torch.no_grad()
def _run(model: nn.Module, example_inputs: Any) -> dict[str, list[tuple[Shape, Shape]]]:
    calls: dict[str, list[tuple[Shape, Shape]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            calls[name] = []
            handles.append(module.register_forward_hook(_recorder(calls[name])))
    args, kwargs = as_arguments(example_inputs)
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _recorder(into: list[tuple[Shape, Shape]]) -> Callable:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(output, Tensor):
            into.append((tuple(args[0].shape), tuple(output.shape)))

    return record
