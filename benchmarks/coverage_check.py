"""Convert one network and compare: what the coverage run does in its worker processes.

python benchmarks/coverage_check.py     # reads names from stdin, writes one line of JSON for each
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from coverage_models import Candidate, build, candidates, family, fill, library_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import redconvert
from redconvert.inputs import as_arguments
from redconvert.layers import DynamicConv
from redconvert.layers.rebuild import ChannelRebuild

__all__ = ["check", "reason_class"]

# Parameters; larger networks are converted in place, to save memory, and their cheap operations start without the
# regression between filters, which takes most of the time and has no part in what is compared.
COPIED_UP_TO = 60_000_000
rewrite = importlib.import_module("redconvert.convert.rewrite")


def check(name: str) -> dict[str, Any]:
    """The row of one network: what conversion did, whether outputs are equal, and what it saves."""
    start = time.process_time()
    row: dict[str, Any] = {"model": name, "library": library_of(name), "family": family(name)}
    try:
        found = _first_that_runs(name)
        if isinstance(found, str):
            row |= {"status": "not built", "error": found}
        else:
            model, candidate, dense = found
            row |= _size(model) | {"input": candidate.shape}
            row |= _convert_and_compare(model, candidate, dense)
    except MemoryError as error:
        row |= {"status": "memory", "error": str(error)}
    except Exception as error:
        row |= {"status": "memory" if "allocate memory" in str(error) else "error", "error": _short(error)}
    return row | {"seconds": round(time.process_time() - start, 2)}


def _first_that_runs(name: str) -> tuple[nn.Module, Candidate, list[Tensor]] | str:
    """The network, how it is fed, and its output; or why none of the candidates runs."""
    problem = ""
    model, options = None, None
    for candidate in candidates(name):
        try:
            if model is None or options != candidate.options:
                model, options = None, candidate.options
                model = build(name, candidate.options)
            return model, candidate, _telling_output(model, candidate)
        except MemoryError:
            raise
        except Exception as error:
            if "allocate memory" in str(error):
                raise
            problem = problem or f"{candidate.shape}: {_short(error)}"
    return problem


def _telling_output(model: nn.Module, candidate: Candidate) -> list[Tensor]:
    """An output that is finite and not constant."""
    for gain in (None, 0.5, 2.0):
        if gain is not None:
            fill(model, gain)
        output = _run(model, candidate)
        if _tells(output):
            return output
    return output


def _tells(output: list[Tensor]) -> bool:
    """Whether equality of this output means something."""
    floats = [tensor for tensor in output if tensor.is_floating_point() and tensor.numel() > 1]
    return bool(floats) and all(t.isfinite().all() for t in floats) and any(t.min() < t.max() for t in floats)


def _size(model: nn.Module) -> dict[str, int]:
    convs = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "convs": sum(isinstance(m, nn.Conv2d | nn.Conv3d) for m in convs),
        "other_convs": sum(not isinstance(m, nn.Conv2d | nn.Conv3d) for m in convs),
    }


def _convert_and_compare(model: nn.Module, candidate: Candidate, dense: list[Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"copied": sum(p.numel() for p in model.parameters()) <= COPIED_UP_TO}
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    start = time.process_time()
    with _recorded_plan() as plans, contextlib.nullcontext() if row["copied"] else _no_regression():
        try:
            dynamic = redconvert.convert(model, example_inputs=candidate.inputs(), inplace=not row["copied"])
        except redconvert.RedconvertError as error:
            status = "nothing to convert" if str(error).startswith("nothing to convert") else "refused"
            return row | _plan(plans) | {"status": status, "error": _short(error, 400)}
    row |= {"convert_seconds": round(time.process_time() - start, 2)} | _plan(plans)
    row["tells"] = _tells(dense)
    row["keys_kept"] = [key for key in dynamic.state_dict() if key in set(keys)] == keys
    row["same_class"] = type(dynamic) is type(model)
    row["equal"] = _equal(_run(dynamic, candidate), dense)
    with redconvert.forced(dynamic, channel=1, temporal=_sparser(dynamic)):
        row["reduced_differs"] = not _equal(_run(dynamic, candidate), dense)
    redconvert.revert(dynamic)
    same = [type(module) for module in dynamic.modules()] == classes and list(dynamic.state_dict()) == keys
    row["reverted"] = same and _equal(_run(dynamic, candidate), dense)
    return row | {"status": _status(row)}


def _status(row: dict[str, Any]) -> str:
    if not row["equal"]:
        return "not equal"
    if not (row["keys_kept"] and row["reverted"] and row["same_class"]):
        return "not kept"
    return "ok" if row["tells"] and row["reduced_differs"] else "proves nothing"


def _sparser(dynamic: nn.Module) -> int:
    strides = [len(m.candidates.strides) for m in dynamic.modules() if isinstance(m, DynamicConv)]
    return 1 if max(strides) > 1 else 0


@contextlib.contextmanager
def _recorded_plan() -> Iterator[list[Any]]:
    """The plan that `convert` makes, so that the network is traced once."""
    plans: list[Any] = []
    make_plan = rewrite.make_plan

    def recording(*args: Any, **kwargs: Any) -> Any:
        plans.append(make_plan(*args, **kwargs))
        return plans[-1]

    with mock.patch.object(rewrite, "make_plan", recording):
        yield plans


def _no_regression() -> Any:
    return mock.patch.object(ChannelRebuild, "start_from_weights")


def _plan(plans: list[Any]) -> dict[str, Any]:
    if not plans:
        return {}
    plan = plans[0]
    covered = sum(verdict.dense_macs or 0 for verdict in plan.converted)
    row: dict[str, Any] = {
        "converted": len(plan.converted),
        "skipped": dict(Counter(reason_class(verdict.reason) for verdict in plan.skipped).most_common()),
        "skipped_macs": _macs_by_reason(plan),
        "functional": len(plan.functional),
        "traced": plan.source,
        "conv_macs": plan.dense_macs,
        "lowest_macs": plan.lowest_macs,
        "covered": round(covered / plan.dense_macs, 4) if plan.dense_macs else 0.0,
    }
    if plan.problem:
        row["problem"] = plan.problem[:160]
    return row


def _macs_by_reason(plan: Any) -> dict[str, int]:
    macs: Counter[str] = Counter()
    for verdict in plan.skipped:
        macs[reason_class(verdict.reason)] += verdict.dense_macs or 0
    return {reason: count for reason, count in macs.most_common() if count}


def reason_class(reason: str) -> str:
    """A verdict's reason without what differs from layer to layer."""
    return re.sub(r": .*| \(.*", "", reason) if not reason.startswith("own forward") else reason.partition(" is ")[0]


@torch.no_grad()
def _run(model: nn.Module, candidate: Candidate) -> list[Tensor]:
    torch.manual_seed(0)
    args, kwargs = as_arguments(candidate.inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """To the bit; not-a-number equals itself nowhere."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _short(error: BaseException, length: int = 240) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:length]


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # networks print
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        row = check(line.strip())
        gc.collect()  # networks are full of cycles
        out.write(json.dumps(row) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
