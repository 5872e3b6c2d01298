"""Calibration in two processes: each reads its own batches, and both end with what one process would have found."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn

import redconvert
from redconvert.layers import dynamic_layers


def network(absorb: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(3, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.Conv3d(16, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
    )
    model(torch.randn(8, 3, 6, 8, 8))  # running statistics
    config = redconvert.ConvertConfig(cheap="pointwise", absorb=absorb)
    return redconvert.convert(model.eval(), config, example_inputs=torch.randn(1, 3, 6, 8, 8))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 8, 8, generator=generator) for size in (4, 2, 3)]


def found(dynamic: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in dynamic.state_dict().items() if ".cheap_" in key}


def calibrated(dynamic: nn.Module, data: Any, importance: str = "norms") -> dict[str, Any]:
    # Matching depends on the batches' order, and the answers' random directions on who draws them.
    result = redconvert.calibrate(dynamic, data, rounds=2, match=False, importance=importance)
    shares = [share for layer in result.layers for share in (*layer.channel_explained, *layer.temporal_explained)]
    inner = getattr(dynamic, "module", dynamic)
    return {"samples": result.samples, "shares": torch.tensor(shares), "cheap": found(inner), "model": result.model}


def alone(rank: int) -> dict[str, Any]:
    """Uneven shares: the first process holds two batches of 4 + 2 samples, the second one of 3."""
    return calibrated(network(), batches()[:2] if rank == 0 else batches()[2:])


def wrapped(rank: int) -> dict[str, Any]:
    """As Accelerator.prepare returns it."""
    return calibrated(nn.parallel.DistributedDataParallel(network()), batches()[:2] if rank == 0 else batches()[2:])


def drifted(rank: int) -> dict[str, Any]:
    """Running statistics of their own in each process, as after data-parallel training."""
    dynamic = network()
    with torch.no_grad():
        for norm in (dynamic[1], dynamic[4]):
            norm.running_var *= torch.rand(16, generator=torch.Generator().manual_seed(rank)) * 9 + 1
    return calibrated(dynamic, batches())


def answers(rank: int) -> dict[str, Any]:
    """Channels chosen for answers of each process's own batches."""
    return calibrated(network(), batches()[:2] if rank == 0 else batches()[2:], importance="answers")


def absorbing(rank: int) -> dict[str, Any]:
    """Weights that absorb channels, solved for on patches of each process's own batches."""
    dynamic = network(absorb=True)
    assert dynamic_layers(dynamic)["0"].hands_to is not None
    redconvert.calibrate(dynamic, batches()[:2] if rank == 0 else batches()[2:], rounds=1)
    return found(dynamic)


def failing(rank: int) -> dict[str, Any]:
    """One process has nothing; then one has a NaN; then one's disk fails, and the processes go on together."""
    dynamic, before = network(), found(network())

    def broken():
        raise OSError("the disk is gone")
        yield

    class Broken:
        def __iter__(self):
            return broken()

    good, nan = batches()[:1], [torch.full((1, 3, 6, 8, 8), float("nan"))]
    messages = []
    for bad in ([], nan, Broken()):
        try:
            redconvert.calibrate(dynamic, bad if rank == 1 else good, rounds=1)
        except (redconvert.RedconvertError, OSError) as error:
            messages.append(str(error))
    kept = all(torch.equal(value, before[key]) for key, value in found(dynamic).items())
    return {"messages": messages, "kept": kept, "after": calibrated(dynamic, good)["samples"]}


def start(rank: int, jobs: tuple[Callable[[int], Any], ...], folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        torch.save({job.__name__: job(rank) for job in jobs}, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


JOBS = (alone, wrapped, drifted, answers, absorbing, failing)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, Any]]:
    """What every job returns in each process, by the job's name; starting processes is what takes time."""
    if not distributed.is_available():
        pytest.skip("torch without torch.distributed")
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(start, (JOBS, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("job", ["alone", "wrapped"])
def test_two_processes_find_what_one_does(both, job):
    wanted = calibrated(network(), batches())
    assert wanted["samples"] == 9
    results = [each[job] for each in both]
    for result in results:
        assert result["samples"] == 9 and result["model"] == "Sequential"
        torch.testing.assert_close(result["shares"], wanted["shares"], rtol=1e-5, atol=0)
        assert result["cheap"].keys() == wanted["cheap"].keys()
        for key, value in wanted["cheap"].items():
            if key.endswith("order"):
                assert result["cheap"][key].tolist() == value.tolist()
            else:
                torch.testing.assert_close(result["cheap"][key], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
    assert all(torch.equal(value, results[1]["cheap"][key]) for key, value in results[0]["cheap"].items())


def test_processes_choose_alike_where_their_running_statistics_differ(both):
    first, second = (each["drifted"]["cheap"] for each in both)
    for key in ("0.cheap_c.order", "3.cheap_c.order"):
        assert first[key].tolist() == second[key].tolist()


def test_processes_choose_alike_for_the_answers_of_all(both):
    first, second = (each["answers"]["cheap"] for each in both)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert first["0.cheap_c.order"].tolist() != both[0]["alone"]["cheap"]["0.cheap_c.order"].tolist()


def test_processes_absorb_alike(both):
    first, second = (each["absorbing"] for each in both)
    solved = [key for key in first if ".cheap_in." in key]
    assert len(solved) == 2 and all(first[key].any() for key in solved)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_an_error_in_one_process_stops_both_and_leaves_both_as_they_were(both):
    first, second = (each["failing"] for each in both)
    other = "calibration failed in 1 of the other processes: see the error there"
    nan = "layer '0' gives NaN or infinite values on these batches: check inputs and weights"
    assert first["messages"] == [other, nan, other]
    assert [message[:16] for message in second["messages"]] == ["batches is empty", nan[:16], "the disk is gone"]
    assert first["kept"] and second["kept"]
    assert first["after"] == second["after"] == 8


def test_dynamic_layers_keep_their_names_behind_a_wrapper():
    dynamic = network()
    shown = redconvert.calibrate(nn.DataParallel(dynamic), batches(), rounds=0)
    assert [layer.name for layer in shown.layers] == list(dynamic_layers(dynamic)) == ["0", "3"]
