"""`redconvert.export_onnx`: a dynamic network (masked) or a frozen one as one ONNX file."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import RedconvertError, require
from ..files import write_bytes_atomic
from ..inputs import as_arguments, call_with, device_of, evaluating, move_to, unwrapped
from ..layers import DynamicConv, dynamic_layers

__all__ = ["export_onnx"]

EXTRA = "export"
TOLERANCE = 1e-3  # of what verify compares, relative to the largest value


def export_onnx(
    network: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    opset: int | None = None,
    verify: bool = False,
) -> None:
    """Write a network as ONNX, in ``eval()``, through ``torch.export``.

    A dynamic network is written in its masked form: the gates decide in the file too, per sample, but everything is
    computed whatever they say. To compute less, write ``redconvert.freeze(dynamic, policy)``, which any runtime takes.

    Args:
        network: any network; it is left as it was.
        example_inputs: a tuple is the positional arguments, a dict with string keys the keyword arguments, anything
            else the one argument.
        path: the file. Whoever is killed half-way leaves the old one.
        dynamic_batch: leave axis 0 of every input open. Otherwise the file takes the shapes of ``example_inputs``.
        opset: the version of ONNX's operators; PyTorch's default where None.
        verify: run the file in onnxruntime on ``example_inputs`` and compare, before it is written.

    Raises:
        MissingExtraError: onnx, onnxscript or (to verify) onnxruntime is absent; the extra is ``export``.
        RedconvertError: a network that ``torch.export`` cannot read or whose batch cannot be left open, one inside
            ``redconvert.forced``, results that differ, over 2 GB, or a path that cannot be written.
    """
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        raise RedconvertError(f"export_onnx takes a torch.nn.Module in Python, not {type(network).__name__}")
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if verify else [])):
        require(package, extra=EXTRA, purpose="export_onnx")
    if not Path(path).absolute().parent.is_dir():
        raise RedconvertError(f"cannot write '{os.fspath(path)}': there is no such folder")
    network = unwrapped(network)
    _check_decisions(network)
    inputs = move_to(example_inputs, device_of(network))
    with evaluating(network), _quiet():
        content = _serialized(_program(network, inputs, dynamic_batch), opset)
    if verify:
        _verify(network, inputs, content)
    write_bytes_atomic(path, content)


def _check_decisions(network: nn.Module) -> None:
    """Refuse a dynamic network whose decisions are held for a while: the file would hold them for ever."""
    for name, layer in _dynamic(network).items():
        if layer.enabled and any(index is not None for index in layer.forced):
            raise RedconvertError(
                f"layer '{name}' is inside redconvert.forced(), which ends with its block, and a file has none: export "
                f"redconvert.freeze(network, (channel, temporal)), which computes that candidate alone"
            )


def _dynamic(network: nn.Module) -> dict[str, DynamicConv]:
    return dynamic_layers(network) if any(isinstance(m, DynamicConv) for m in network.modules()) else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own insides; errors come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _program(network: nn.Module, inputs: Any, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """The network as ``torch.export`` reads it."""
    shapes: Any = None
    if dynamic_batch:  # of two: a batch of one is special
        inputs = tree_map(lambda leaf: torch.cat([leaf, leaf]) if _has_batch(leaf) else leaf, inputs)
        open_axis = tree_map(lambda leaf: {0: torch.export.Dim.AUTO} if _has_batch(leaf) else None, inputs)
        positional, named = as_arguments(open_axis)
        shapes = named or positional
    args, kwargs = as_arguments(inputs)
    try:
        program = torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=False)
    except RedconvertError:
        raise
    except Exception as error:
        what = f"torch.export cannot read {type(network).__name__}: {type(error).__name__}: {_first_line(error)}"
        if _dynamic(network):  # where a layer does not see the tracer, say, and takes its sparse path
            what += ". A graph cannot hold decisions that Python takes; redconvert.freeze(network, policy) has none"
        raise RedconvertError(what) from error
    if dynamic_batch:
        _check_open(network, program)
    return program


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _check_open(network: nn.Module, program: torch.export.ExportedProgram) -> None:
    given = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in given and _has_batch(value) and str(value.shape[0]).isdigit():
            raise RedconvertError(
                f"{type(network).__name__} works for batches of {value.shape[0]} alone (input '{node.name}'): its "
                f"forward turns the size of the batch into a constant. Export without dynamic_batch"
            )


def _serialized(program: torch.export.ExportedProgram, opset: int | None) -> bytes:
    try:
        converted = torch.onnx.export(
            program, dynamo=True, opset_version=opset, verbose=False, external_data=False, optimize=False
        )
        assert converted is not None
        _simplify(converted)
    except Exception as error:
        raise RedconvertError(
            f"torch.onnx cannot write this network: {type(error).__name__}: {_first_line(error)}"
        ) from error
    try:
        return converted.model_proto.SerializeToString()
    except Exception as error:  # protobuf's own limit, whose class depends on the version
        raise RedconvertError(
            f"the network does not fit into one ONNX file of 2 GB ({_first_line(error)}): export it in half precision"
        ) from error


def _simplify(converted: Any) -> None:
    """The exporter's optimizer, on what is left once constants are folded.

    Its time grows with the square of the nodes, and three of four are constants and what is made of them: X3D-S,
    masked, has 17,165 nodes before and 4,580 after.
    """
    optimizer = require("onnxscript.optimizer", extra=EXTRA, purpose="export_onnx")
    optimizer.fold_constants(converted.model)
    optimizer.remove_unused_nodes(converted.model)
    converted.optimize()


def _verify(network: nn.Module, inputs: Any, content: bytes) -> None:
    """Compare onnxruntime with PyTorch on the example."""
    runtime = require("onnxruntime", extra=EXTRA, purpose="verify=True")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = [leaf.cpu().numpy() for leaf in tree_leaves(as_arguments(inputs)) if isinstance(leaf, Tensor)]
    found = session.run(None, {slot.name: value for slot, value in zip(session.get_inputs(), given, strict=True)})
    with evaluating(network):
        wanted = [leaf for leaf in tree_leaves(call_with(network, inputs)) if isinstance(leaf, Tensor)]
    for number, (value, expected) in enumerate(zip(found, wanted, strict=True)):
        expected = expected.cpu().double()
        error = float((torch.as_tensor(value).double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not error <= TOLERANCE:
            raise RedconvertError(
                f"onnxruntime gives another output {number} than PyTorch, by {error:.1g} of its largest value: nothing "
                f"was written. Try another opset, or inputs like those that the network will see"
            )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
