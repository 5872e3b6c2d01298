"""What stands behind a convolution in a graph: its reader, what is added to its result, whether it is the output."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

__all__ = ["is_channelwise", "is_depthwise", "output_convs", "reader", "shortcut", "takes_means"]

# Modules and functions that hand a prediction on without mixing channels: a convolution whose result
# meets nothing else on its way out is the output layer.
_TRANSPARENT_MODULES = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.Flatten,
    nn.Identity,
    nn.Sigmoid,
    nn.Softmax,
    nn.Upsample,
    nn.modules.dropout._DropoutNd,
)
_TRANSPARENT_NAMES = {
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool2d", "avg_pool3d", "contiguous", "dropout", "flatten"),
    *("float", "getitem", "interpolate", "mean", "permute", "reshape", "sigmoid", "softmax", "squeeze", "transpose"),
    *("unsqueeze", "upsample", "view"),
}
# What treats each channel alone, so that missing ones are missed behind it and no sooner.
_CHANNELWISE_MODULES = (
    *(nn.BatchNorm2d, nn.BatchNorm3d, nn.Identity, nn.modules.dropout._DropoutNd),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.Mish, nn.Sigmoid),
    *(nn.Tanh, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d),
)
_CHANNELWISE_NAMES = frozenset(
    {"relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "hardtanh", "mish", "sigmoid", "tanh"}
)
_PRODUCTS = frozenset({operator.mul, torch.mul, "mul"})
_ADDITIONS = frozenset({"add", "add_", "iadd"})


def reader(conv: fx.Node, modules: dict[str, nn.Module], names: dict[Any, str]) -> tuple[str | None, tuple[str, ...]]:
    """The convolution that reads a result, behind what treats each channel alone, and those that follow on the way.

    These are depthwise convolutions, which treat each channel alone, too, and in squeeze and excitation the one that
    reads the channels' means.
    """
    node, dims = conv, len(modules[str(conv.target)].kernel_size)  # type: ignore[arg-type]
    followers: list[str] = []
    while not node.meta.get("hooked"):  # a hook sees, or changes, all channels
        users = [user for user in node.users if not _asks_shape(user)]
        if len(users) == 2 and (found := _product(node, users, modules, names, dims)) is not None:
            node, squeezed = found
            followers += squeezed
            continue
        if len(users) != 1:
            break
        before, node = node, users[0]
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and module in names:
            if not is_depthwise(module):
                return names[module], tuple(followers)
            followers.append(names[module])
        elif not is_channelwise(node, before, module, dims):
            break
    return None, ()


def _product(
    node: fx.Node, users: list[fx.Node], modules: dict[str, nn.Module], names: dict[Any, str], dims: int
) -> tuple[fx.Node, list[str]] | None:
    """The product of a result with what it says of each channel, and the convolution that reads the channels' means.

    None reads them where each channel speaks for itself, as in ``x * sigmoid(x)``.
    """
    product = next((user for user in users if user.target in _PRODUCTS and len(user.all_input_nodes) == 2), None)
    if product is None or product.kwargs:
        return None
    step = next(each for each in product.all_input_nodes if each is not node)
    way: list[fx.Node] = []
    while step is not node:
        if len(step.all_input_nodes) != 1 or len(step.users) != 1 or step.meta.get("hooked"):
            return None
        way.insert(0, step)
        step = step.all_input_nodes[0]
    called = [modules.get(str(step.target)) if step.op == "call_module" else None for step in way]
    if not way:
        return None
    before = [node, *way]
    if all(is_channelwise(step, of, module, dims) for step, of, module in zip(way, before, called, strict=False)):
        return product, []
    read = next((names[module] for module in called if module is not None and module in names), None)
    return (product, [read]) if read is not None and takes_means(way[0], called[0], dims) else None


def takes_means(node: fx.Node, module: nn.Module | None, dims: int) -> bool:
    """Whether a node averages each channel over all of its positions, which stay as axes of one."""
    if module is not None:
        pools = isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d)
        return pools and module.output_size in (1, (1,) * dims)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name != "mean":
        return False
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
    over: Any = given.get("dim")
    known = isinstance(over, list | tuple) and all(isinstance(dim, int) for dim in over)
    return known and {d % (dims + 2) for d in over} == {*range(2, dims + 2)} and given.get("keepdim") is True


def is_depthwise(module: Any) -> bool:
    """Whether each output channel comes of the input channel of the same number."""
    return bool(module.groups == module.in_channels == module.out_channels > 1)


def shortcut(conv: fx.Node, modules: dict[str, nn.Module], calls: dict[str, list[fx.Node]]) -> str | None:
    """The convolution whose input is added to a result, if that one runs before."""
    node = conv
    for _ in range(2):  # the norm, then the sum
        if len(node.users) != 1:
            return None
        before, node = node, next(iter(node.users))
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.modules.batchnorm._BatchNorm):
            break
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    others = [each for each in node.args if isinstance(each, fx.Node) and each is not before]
    if node.op not in ("call_function", "call_method") or name not in _ADDITIONS or len(others) != 1 or node.kwargs:
        return None
    found = (n for n, each in calls.items() if len(each) == 1 and each[0].args[:1] == (others[0],))
    return next((name for name in found if calls[name][0] < conv), None)


def _asks_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    )


def is_channelwise(node: fx.Node, of: fx.Node, module: nn.Module | None, dims: int) -> bool:
    """Whether a node treats each channel of ``of`` alone, and reads no other tensor.

    Args:
        module: what the node calls; None where it is a function or a method.
        dims: axes behind the channels.
    """
    return isinstance(module, _CHANNELWISE_MODULES) if module is not None else _calls_channelwise(node, of, dims)


def _calls_channelwise(node: fx.Node, of: fx.Node, dims: int) -> bool:
    if node.op not in ("call_function", "call_method") or node.args[:1] != (of,):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "pad":  # two amounts more would pad the channels, too
        amounts = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        return isinstance(amounts, list | tuple) and len(amounts) <= 2 * dims
    return len(node.all_input_nodes) == 1 and name in _CHANNELWISE_NAMES


def output_convs(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Convolution calls from which only averaging, reshaping and resizing leads to the graph's result."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [argument for node in graph.nodes if node.op == "output" for argument in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        module = modules.get(node.target) if node.op == "call_module" else None
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            found.add(node)
        elif isinstance(module, _TRANSPARENT_MODULES) or (module is None and name in _TRANSPARENT_NAMES):
            pending += node.all_input_nodes[:1]
    return found
