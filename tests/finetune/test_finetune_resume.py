"""Killed at any step and run again: the same numbers as a run that was never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed import BATCHES, EPOCHS, finetuned
from problems import Interrupted, Net, Planted, batches, network, run, same_state, state_of, undecided
from torch.utils.data import DataLoader

import redconvert
from redconvert import History, RedconvertError
from redconvert.finetune.state import RunFile

# save_every, workers, when: before a batch of the run (0 to 9), or while the n-th resume.pt is written
KILLS = [
    (1, 0, "3"),  # within an epoch
    (2, 0, "3"),  # one batch after a save
    (3, 1, "9"),  # the last batch, with a worker
    (1, 1, "7"),
    (0, 0, "5"),  # the first batch of the second epoch
    (0, 0, "2"),  # before anything was written
    (1, 0, "write:4"),
    (2, 0, "write:1"),  # the very first
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[tuple, Path]:
    """The folders of runs that ended as `KILLS` says."""
    folders = {case: tmp_path_factory.mktemp("run") for case in KILLS}
    program, environment = str(Path(__file__).with_name("killed.py")), os.environ | {"OMP_NUM_THREADS": "1"}
    # A process each: forks of one that has PyTorch's threads abort now and then.
    for start in range(0, len(KILLS), 4):
        running = {
            case: subprocess.Popen([sys.executable, program, str(folders[case]), *map(str, case)], env=environment)
            for case in KILLS[start : start + 4]
        }
        assert {case: process.wait() for case, process in running.items()} == dict.fromkeys(running, 9)
    return folders


@pytest.fixture(scope="module")
def whole() -> dict[int, History]:
    """Runs that were never killed, by number of workers."""
    return {workers: finetuned(None, workers=workers) for workers in (0, 1)}


@pytest.mark.parametrize("case", KILLS, ids=lambda case: "-".join(map(str, case)))
def test_killed_and_resumed(killed, whole, case):
    folder, (every, workers, moment) = killed[case], case
    done = 0
    if (folder / "resume.pt").exists():
        done = len(torch.load(folder / "resume.pt")["position"]["steps"])
    ended = int(moment) if moment.isdigit() else None
    if ended is not None:  # what was saved is all that could have been
        first = ended // BATCHES * BATCHES
        assert done == (first + (ended - first) // every * every if every else first)
    assert len(list(folder.glob(".resume.pt.*.tmp"))) == (ended is None)
    history = finetuned(folder, every or None, workers)
    wanted = whole[workers]
    assert history.steps == wanted.steps  # equal: not only to 1e-6
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in history.epochs] == [
        {k: v for k, v in row.items() if k not in drop} for row in wanted.epochs
    ]
    assert not list(folder.glob(".*"))  # nothing is left of what was half written


def test_the_runs_differ_in_what_they_draw(whole):
    """Otherwise the tests above would say little."""
    first, second = (whole[0].losses[i * BATCHES : (i + 1) * BATCHES] for i in range(EPOCHS))
    assert len({*first, *second}) == EPOCHS * BATCHES and whole[0].losses[0] != whole[1].losses[0]
    assert finetuned(None, seed=1, epochs=1).losses[0] != finetuned(None, epochs=1).losses[0]


def test_after_the_end(tmp_path, monkeypatch):
    """The same history at once, the weights of the end, and a model/ that was lost is written again."""
    dynamic = undecided(network())
    history = run(dynamic, batches(), batches(8, 1), out=tmp_path, epochs=2)
    ended = state_of(dynamic)
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "history.json").unlink()
    monkeypatch.setattr(torch.optim.SGD, "step", None)  # no step is made
    for other in (undecided(network()), dynamic):
        again = run(other, batches(), batches(8, 1), out=tmp_path, epochs=2)
        assert again.steps == history.steps and again.epochs == history.epochs
        assert same_state(other, ended)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(redconvert.from_pretrained(Net(), tmp_path / "model").eval()(x), dynamic.eval()(x))
    assert History(**json.loads((tmp_path / "history.json").read_text())).steps == history.steps


@pytest.mark.parametrize("trained", [False, True])
def test_the_teacher_is_the_network_of_the_beginning(tmp_path, trained):
    """An interrupted cell of a notebook is run again with the network that it has half trained."""
    dynamic = undecided(network())
    wanted = run(undecided(network()), batches(), epochs=2, distill=1.0, lr=0.1).losses
    data = Interrupted(batches())
    with pytest.raises(KeyboardInterrupt):
        run(dynamic, data, epochs=2, distill=1.0, lr=0.1, out=tmp_path)
    assert not same_state(dynamic, state_of(undecided(network())))
    again = dynamic if trained else undecided(network())
    assert run(again, batches(), epochs=2, distill=1.0, lr=0.1, out=tmp_path).losses == wanted


def test_a_generator_of_the_loader_and_a_sampler_of_its_own(tmp_path):
    """Their state after the first epoch is not in the file; it does not have to be."""

    def loader() -> DataLoader:
        data, generator = Planted(24, augment=True), torch.Generator().manual_seed(5)
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * 24, 24, generator=generator)
        return DataLoader(data, 8, sampler=sampler, num_workers=1, generator=generator, persistent_workers=True)

    settings = {"epochs": 3, "lr": 0.05}
    wanted = run(network(), loader(), **settings).losses
    assert len(set(wanted)) == 9

    def ends(out, labels):
        ends.calls += torch.is_grad_enabled()
        if ends.calls == 8:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(out, labels)

    ends.calls = 0
    with pytest.raises(KeyboardInterrupt):
        run(network(), loader(), out=tmp_path, save_every=1, criterion=ends, **settings)
    assert len(torch.load(tmp_path / "resume.pt")["position"]["steps"]) == 7
    assert run(network(), loader(), out=tmp_path, **settings).losses == wanted


def test_accumulation_resumes_between_steps(tmp_path):
    def ends(out, labels):
        ends.calls += torch.is_grad_enabled()
        if ends.calls == 4:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(out, labels)

    ends.calls, settings = 0, {"accumulate": 2, "gate_every": 2, "lr": 0.1, "optimizer": "adamw"}
    with pytest.raises(KeyboardInterrupt):
        run(network(), batches(8, 5), out=tmp_path, save_every=1, criterion=ends, **settings)
    assert len(torch.load(tmp_path / "resume.pt")["position"]["steps"]) == 2
    wanted = run(network(), batches(8, 5), **settings).steps
    assert run(network(), batches(8, 5), out=tmp_path, **settings).steps == wanted


def test_the_scale_of_float16_losses_is_kept(tmp_path):
    model, file = network(), RunFile(tmp_path)
    optimizer = torch.optim.SGD(model.parameters())
    file.save(model, optimizer, torch.amp.GradScaler("cpu", init_scale=512.0), {"epoch": 1})
    scaler = torch.amp.GradScaler("cpu")
    assert file.load(model, optimizer, scaler) == {"epoch": 1}
    assert scaler.get_scale() == 512.0


def test_starting_again(tmp_path):
    first = run(network(), batches(), out=tmp_path, lr=0.1).losses
    second = run(network(seed=1), batches(), out=tmp_path, lr=0.2, resume=False).losses
    assert first != second == run(network(seed=1), batches(), lr=0.2).losses
    assert torch.load(tmp_path / "resume.pt")["settings"]["lr"] == 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.2}, "lr=0.01, this one has 0.2"),
        ({"epochs": 2}, "epochs=1, this one has 2"),
        ({"target": 0.5, "efficiency": 0.8}, "target=None, this one has 0.5"),
        ({"teacher": None}, "teacher='original', this one has None"),
        ({"optimizer": "adamw"}, "optimizer='sgd', this one has 'adamw'"),
        ({"mixed_precision": "bf16"}, "mixed_precision='no', this one has 'bf16'"),
        ({"train": batches(8, 4)}, "batches=3, this one has 4"),
        ({"dynamic": network(search_space=3)}, r"of another network \('.*' differs\)"),
        ({"dynamic": network().requires_grad_(False)}, "frozen"),
    ],
)
def test_another_run_in_the_folder(tmp_path, changes, message):
    run(network(), batches(), out=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = {"dynamic": network(), "train": batches(), **changes}
    state = state_of(given["dynamic"])
    with pytest.raises(RedconvertError, match=message):
        run(given.pop("dynamic"), given.pop("train"), out=tmp_path, **given)
    assert same_state(changes.get("dynamic", network()), state)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_other_trained_parameters(tmp_path):
    run(network(), batches(), out=tmp_path)
    dynamic = network()
    dynamic.head.requires_grad_(False)
    state = state_of(dynamic)
    with pytest.raises(RedconvertError, match="trains other parameters"):
        run(dynamic, batches(), out=tmp_path)
    assert same_state(dynamic, state)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None, "number"])
def test_a_damaged_file(tmp_path, content):
    run(network(), batches(), out=tmp_path)
    path = tmp_path / "resume.pt"
    if content == "number":
        torch.save(7, path)
    else:
        path.write_bytes(path.read_bytes()[:-5000] if content is None else content)
    with pytest.raises(RedconvertError, match=r"resume.pt' (cannot be read|is not of a finetuning run).*resume=False"):
        run(network(), batches(), out=tmp_path)
    assert len(run(network(), batches(), out=tmp_path, resume=False).steps) == 3
