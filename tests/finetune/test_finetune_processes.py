"""Two processes on their shares of each batch against one process on all of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Planted, batches, network, run, state_of, undecided
from torch import distributed, multiprocessing
from torch.utils.data import DataLoader

import redconvert
from redconvert.layers.gate import Gate


def loader(size: int, world: int, dims: int = 2, samples: int = 32, shuffle: bool = True) -> DataLoader:
    """Batches of ``size`` samples over all processes."""
    return DataLoader(Planted(samples, dims), batch_size=size // world, shuffle=shuffle)


def summary(dynamic: torch.nn.Module, history: redconvert.History) -> dict[str, Any]:
    drop = ("seconds",)
    epochs = [{key: value for key, value in row.items() if key not in drop} for row in history.epochs]
    return {"steps": history.steps, "epochs": epochs, "state": state_of(dynamic)}


def images(world: int, folder: Path) -> dict[str, Any]:
    """Eq. 6 with labels and teacher, no batch norms but the gates'; 13 samples to validate."""
    dynamic = undecided(network(norms=False))
    val = DataLoader(Planted(13), batch_size=8 // world)
    return summary(dynamic, run(dynamic, loader(8, world), val, epochs=3, lr=0.02))


def clips(world: int, folder: Path) -> dict[str, Any]:
    """A target, frozen norms, gates that rest every second step, gradients accumulated and computed again."""
    dynamic = undecided(network(3))
    settings = {"epochs": 3, "lr": 0.02, "target": 0.6, "freeze_norms": True, "gradient_checkpointing": True}
    return summary(dynamic, run(dynamic, loader(8, world, 3), accumulate=2, gate_every=2, clip=1.0, **settings))


def twice(world: int, folder: Path) -> dict[str, Any]:
    """Finetuned, then finetuned again: both runs see both processes' samples. No decision is on the brink."""
    dynamic = undecided(network(norms=False))
    run(dynamic, loader(8, world), epochs=1, lr=0.004, target=0.8)
    return summary(dynamic, run(dynamic, loader(8, world), epochs=2, lr=0.004, target=0.6))


def resumed(world: int, folder: Path) -> dict[str, Any]:
    """Stopped in the second epoch, then resumed from the one file that the main process wrote."""
    settings = {"epochs": 2, "lr": 0.02, "target": 0.6, "out": folder / f"resumed-{world}"}

    def ends(out, labels):
        ends.calls += torch.is_grad_enabled()
        if ends.calls == 7:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(out, labels)

    ends.calls = 0
    try:
        run(undecided(network(norms=False)), loader(8, world), save_every=1, criterion=ends, **settings)
    except KeyboardInterrupt:
        dynamic = undecided(network(norms=False))
        return summary(dynamic, run(dynamic, loader(8, world), **settings))
    raise AssertionError("not interrupted")


def refused(world: int, folder: Path) -> dict[str, Any]:
    """A NaN in a batch of one process stops both; a list cannot be shared."""
    messages = []
    data = Planted(32)
    data.inputs[20:24] = float("nan")  # without shuffling: the third batch of 8, its second half
    dynamic = network(norms=False)
    state = state_of(dynamic)
    for train in (DataLoader(data, batch_size=8 // world), batches(4, 4)):
        try:
            run(dynamic, train, lr=0.0, weight_decay=0.0)
        except redconvert.RedconvertError as error:
            messages.append(str(error))
    kept = all(torch.equal(value, state[key]) for key, value in state_of(dynamic).items() if "gate.norm" not in key)
    return {"messages": messages, "kept": kept, "alive": distributed.is_initialized()}


def normalized(world: int, folder: Path) -> dict[str, Any]:
    """A gate's norm over uneven shares, with a mean far larger than the spread, through its gradient."""
    torch.manual_seed(0)
    gate, x = Gate(4, 1, 3, 1, hidden=8), torch.randn(7, 4, 1) + 100
    rank = distributed.get_rank() if world > 1 else 0
    mine = (x if world == 1 else x[:5] if rank == 0 else x[5:]).clone().requires_grad_()
    channel, _ = gate.train()(mine)
    channel.square().sum().backward()  # a sum over all samples
    gradients = [p.grad for p in gate.parameters()] if world == 1 else []
    if world > 1:
        for parameter in gate.parameters():
            distributed.all_reduce(parameter.grad)
            gradients.append(parameter.grad)
    return {"values": channel.detach(), "input": mine.grad, "gradients": gradients, "state": state_of(gate)}


JOBS: tuple[Callable[[int, Path], dict[str, Any]], ...] = (images, clips, twice, resumed, refused, normalized)


def start(rank: int, port: int, folder: str) -> None:
    """As torchrun and ``accelerate launch`` start a process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {job.__name__: job(2, Path(folder)) for job in JOBS}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, Any]]:
    """What every job returns in each process, by the job's name; starting processes is what takes time."""
    if not distributed.is_available():
        pytest.skip("torch without torch.distributed")
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(start, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("job", [images, clips, twice, resumed], ids=lambda job: job.__name__)
def test_two_processes_learn_what_one_does(both, tmp_path, job):
    wanted = job(1, tmp_path)
    for found in (each[job.__name__] for each in both):
        assert len(found["steps"]) == len(wanted["steps"]) and found["steps"] == both[0][job.__name__]["steps"]
        for key in ("loss", "task", "cost", "lr"):
            values, others = ([step[key] for step in each["steps"]] for each in (found, wanted))
            print(job.__name__, key, max(abs(a - b) / abs(b) for a, b in zip(values, others, strict=True)))
            assert values == pytest.approx(others, rel=1e-4)
        for row, other in zip(found["epochs"], wanted["epochs"], strict=True):
            assert row.keys() == other.keys()
            for key in row.keys() - {"val_loss"}:  # an average over batches, whose sizes differ
                assert row[key] == pytest.approx(other[key], rel=1e-4)
            assert row.get("val_loss", 1) == pytest.approx(other.get("val_loss", 1), rel=0.2)
        for key, value in wanted["state"].items():
            torch.testing.assert_close(found["state"][key], value, rtol=1e-2, atol=1e-3)
            assert torch.equal(found["state"][key], both[0][job.__name__]["state"][key])


def test_an_error_stops_both_processes(both, tmp_path):
    one = refused(1, tmp_path)
    assert "the loss is nan at batch 2 of epoch 1" in one["messages"][0]
    for found in (each["refused"] for each in both):
        assert "the loss is nan at batch 2 of epoch 1" in found["messages"][0]
        assert "several processes share a DataLoader" in found["messages"][1]
        assert found["kept"] and found["alive"]


def test_a_norm_over_uneven_shares(both, tmp_path):
    wanted = normalized(1, tmp_path)
    found = [each["normalized"] for each in both]
    for key in ("values", "input"):
        torch.testing.assert_close(torch.cat([each[key] for each in found]), wanted[key], rtol=1e-3, atol=1e-4)
    for each in found:
        for gradient, other in zip(each["gradients"], wanted["gradients"], strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3)
        for key, value in wanted["state"].items():
            torch.testing.assert_close(each["state"][key], value, rtol=1e-5, atol=1e-6)


def test_another_number_of_processes(both, tmp_path_factory):
    folder = next(path for path in tmp_path_factory.getbasetemp().glob("processes*/resumed-2"))
    with pytest.raises(redconvert.RedconvertError, match=r"processes=2, this one has 1|batches="):
        settings = {"epochs": 2, "lr": 0.02, "target": 0.6, "out": folder}
        run(undecided(network(norms=False)), loader(4, 1), **settings)
