"""Bad input stops finetuning with a message that says what, where and what to do, and nothing is lost."""

from __future__ import annotations

import sys

import pytest
import torch
from problems import CLASSES, Planted, batches, network, run, same_state, state_of, undecided
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from redconvert import RedconvertError
from redconvert.errors import MissingExtraError
from redconvert.layers import dynamic_layers

NAN = float("nan")


def unchanged(dynamic: nn.Module, state: dict) -> bool:
    quiet = not any("observers" in vars(layer) for layer in dynamic_layers(dynamic).values())
    return same_state(dynamic, state) and quiet and all(p.grad is None for p in dynamic.parameters())


class Endless(IterableDataset):
    def __iter__(self):
        return iter(Planted())


class Short(IterableDataset):
    """Says 40, holds 20: two batches of 8 and one of 4."""

    def __len__(self) -> int:
        return 40

    def __iter__(self):
        return iter([Planted()[i] for i in range(20)])


def clips(*lengths: int) -> DataLoader:
    return DataLoader([(torch.randn(3, length, 6, 6), 1) for length in lengths], batch_size=2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "a loader is empty: give at least one batch"),
        (DataLoader([], batch_size=2), "a loader is empty"),
        (DataLoader(Planted(6), batch_size=8, drop_last=True), "a loader is empty.*drop_last"),
        (DataLoader(Endless(), batch_size=8), "DataLoader has no length.*schedule needs"),
        (iter(batches()), "has no length.*pass a DataLoader"),
        (batches()[0], "pass a DataLoader or a list of batches, not one tuple"),
        (batches()[0][0], "not one Tensor"),
        (["text"], "batch 0: cannot read a batch of type str"),
        ([42], "batch 0: cannot read a batch of type int"),
        ([(torch.randn(4, 3, 8, 8), ["a", "b", "c", "d"])], "batch 0 of epoch 1: labels must be a tensor, not list"),
        ([{"label": torch.tensor([1])}], "batch 0: a batch holds only labels"),
        ([(x, y + 1) for x, y in batches()], "batch 0 of epoch 1: labels run from 1 to 4, but the network scores 4"),
        ([(x, y[:3]) for x, y in batches()], r"labels of shape \(3,\) do not fit scores \(16, 4\)"),
    ],
)
def test_bad_batches(tmp_path, train, message):
    dynamic = undecided(network())
    state = state_of(dynamic)
    with pytest.raises(RedconvertError, match=message):
        run(dynamic, train, out=tmp_path)
    assert unchanged(dynamic, state) and not (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_clips_of_different_lengths(workers):
    dynamic = network(3)
    state = state_of(dynamic)
    loader = DataLoader([(torch.randn(3, length, 6, 6), 1) for length in (4, 5)], batch_size=2, num_workers=workers)
    with pytest.raises(RedconvertError, match=r"batch 0: samples of different sizes.*one length.*\[3, 4, 6, 6\]"):
        run(dynamic, loader)
    assert unchanged(dynamic, state)
    for lengths, where in (((4, 4, 4, 5), "batch 0 or 1"), ((4, 4, 4, 4, 4, 5), "batch 2")):
        with pytest.raises(RedconvertError, match=f"{where} of epoch 1: samples of different sizes"):
            run(dynamic, clips(*lengths))
    assert len(run(dynamic, clips(4, 4, 5, 5)).steps) == 2  # of one length within each batch


def test_a_bad_batch_later_loses_nothing(tmp_path):
    """The first epoch's state stays on the disk, the network is that of the batch before, and the run goes on."""
    good = batches(8, 3)
    bad = [*good[:2], (good[2][0], good[2][1] + CLASSES)]
    wanted = run(network(), good).losses

    class Turning(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter(good if self.reads == 2 else bad)  # the first reading measures costs

    dynamic = network()
    with pytest.raises(RedconvertError, match="batch 2 of epoch 2: labels run from"):
        run(dynamic, Turning(bad), epochs=2, out=tmp_path)
    assert len(torch.load(tmp_path / "resume.pt")["position"]["steps"]) == 3
    history = run(network(), good, epochs=2, out=tmp_path)
    assert history.losses == run(network(), good, epochs=2).losses and len(wanted) == 3


def test_a_loader_that_ends_early():
    with pytest.raises(RedconvertError, match="ended after 3 of the 5 batches that its length says"):
        run(network(), DataLoader(Short(), batch_size=8))


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ([], "a loader is empty"),
        ([(x, y + 9) for x, y in batches()], "batch 0 of the validation after epoch 1: labels run from 9"),
        ([None], "batch 0 of the validation after epoch 1: cannot read a batch of type NoneType"),
    ],
)
def test_bad_validation_batches(val, message):
    with pytest.raises(RedconvertError, match=message):
        run(network(), batches(), val)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan(tmp_path, where, accumulate):
    """In the loss at the last batch but one, or in a gradient whose loss is a number."""
    train, seen, networks = batches(8, 6), [], []

    def criterion(out, labels):
        seen.append(state_of(networks[-1]) if torch.is_grad_enabled() else None)
        loss = F.cross_entropy(out, labels)
        if len(networks) == 1 and len(seen) == 5:
            # sqrt(0) is a number, its gradient is not
            return loss * NAN if where == "loss" else loss + (out.sum() * 0).sqrt()
        return loss

    settings = {"out": tmp_path, "save_every": 1, "criterion": criterion, "accumulate": accumulate, "lr": 0.05}
    dynamic = undecided(network())
    networks.append(dynamic)
    batch = 4 if where == "loss" or accumulate == 1 else 5  # gradients are looked at when they are used
    what = "the loss is nan" if where == "loss" else "the gradient's norm is nan"
    with pytest.raises(
        RedconvertError, match=rf"{what} at batch {batch} of epoch 1.*as it was before this batch.*resume"
    ):
        run(dynamic, train, **settings)
    file = torch.load(tmp_path / "resume.pt")
    assert len(file["position"]["steps"]) == 4
    for key, value in dynamic.state_dict().items():
        assert torch.isfinite(value).all()
        statistics = "running" in key or "tracked" in key
        if batch == 4 or not statistics:  # the file is of just before batch 4
            assert torch.equal(value, file["model"][key]), key
    assert all(p.grad is None for p in dynamic.parameters())
    networks.append(undecided(network()))
    resumed = run(networks[-1], train, **settings)
    networks.append(undecided(network()))
    assert resumed.losses == run(networks[-1], train, **{**settings, "out": None}).losses


def test_nan_without_a_folder_and_before_the_first_save(tmp_path):
    train = [(torch.full((4, 3, 8, 8), NAN), torch.zeros(4).long())]
    dynamic = network()
    state = state_of(dynamic)
    with pytest.raises(RedconvertError, match=r"loss is nan at batch 0 of epoch 1.*No out= was given.*lr=0.01"):
        run(dynamic, train)
    with pytest.raises(RedconvertError, match=r"resume.pt' was not written yet"):
        run(dynamic, train, out=tmp_path)
    assert unchanged(dynamic, state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0.0}, r"target=0.0 must be a share of the dense MACs in \(0, 1\]"),
        ({"target": 1.5}, "target=1.5"),
        ({"target": NAN}, "target=nan"),
        ({"epochs": 0}, "epochs=0 must be an integer of at least 1"),
        ({"epochs": 1.5}, "epochs=1.5 must be an integer"),
        ({"accumulate": 0}, "accumulate=0 must be an integer"),
        ({"gate_every": -1}, "gate_every=-1 must be an integer of at least 0"),
        ({"save_every": 0}, "save_every=0 must be at least 1"),
        ({"lr": -1}, "lr=-1 must be a number of at least 0"),
        ({"lr": NAN}, "lr=nan must be a number of at least 0"),
        ({"gate_lr": -1}, "gate_lr=-1"),
        ({"efficiency": -1}, "efficiency=-1"),
        ({"temperature": 0}, "temperature=0 must be positive"),
        ({"clip": 0}, "clip=0 must be positive"),
        ({"distill": 2}, r"distill=2 must be in \[0, 1\]"),
        ({"warmup": -0.1}, r"warmup=-0.1 must be in \[0, 1\]"),
        ({"momentum": 1.0, "optimizer": "adamw"}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adamw, not 'lion'"),
        ({"mixed_precision": "int8"}, "mixed_precision must be one of .*not 'int8'"),
        ({"teacher": "myself"}, "teacher must be 'original', a network, a function or None, not 'myself'"),
        ({"trackers": "tensorboard"}, "trackers write to a folder: give out="),
        ({"criterion": lambda out, labels: out.sum(1)}, "criterion.*must return a scalar tensor"),
        ({"criterion": lambda out, labels: 1.0}, "criterion.*must return a scalar tensor"),
        ({"teacher": lambda x: torch.zeros(16, 7)}, r"outputs \[\(16, 4\)\] and its teacher \[\(16, 7\)\]"),
        ({"correct": lambda out, labels: out > 0}, r"one boolean for each of the 16 samples, not shape \(16, 4\)"),
    ],
)
def test_bad_settings(settings, message):
    dynamic = undecided(network())
    state = state_of(dynamic)
    with pytest.raises(RedconvertError, match=message):
        run(dynamic, batches(), **settings)
    assert unchanged(dynamic, state)


def test_networks_that_cannot_be_finetuned():
    with pytest.raises(RedconvertError, match="no dynamic layers"):
        run(nn.Linear(2, 2), batches())
    with pytest.raises(RedconvertError, match="every parameter of the network is frozen"):
        run(network().requires_grad_(False), batches())
    dynamic = network()
    dynamic.blocks.requires_grad_(False)
    with pytest.raises(RedconvertError, match="batch 0 of epoch 1: no gate of the network carries a gradient"):
        run(dynamic, batches())
    assert len(run(dynamic, batches(), efficiency=0).steps) == 3
    with pytest.raises(RedconvertError, match="no labels and there is no teacher"):
        run(network(), [batches()[0][0]], teacher=None)


def test_accelerators_that_say_otherwise():
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(RedconvertError, match="gradient_accumulation_steps=2: leave it at 1"):
        run(network(), batches(), accelerator=accelerate.Accelerator(gradient_accumulation_steps=2))
    with pytest.raises(RedconvertError, match="mixed_precision='bf16', but the accelerator has 'no'"):
        run(network(), batches(), accelerator=accelerate.Accelerator(), mixed_precision="bf16")
    if not torch.cuda.is_available():
        with pytest.raises(RedconvertError, match="mixed_precision='fp16' does nothing on cpu: take 'no' or 'bf16'"):
            run(network(), batches(), mixed_precision="fp16")


def test_packages_that_are_absent(tmp_path, monkeypatch):
    with pytest.raises(RedconvertError, match=r"accelerate refuses these settings: .*nonsense"):
        run(network(), batches(), out=tmp_path, trackers="nonsense")
    from accelerate.tracking import get_available_trackers

    if "comet_ml" not in get_available_trackers():
        with pytest.raises(MissingExtraError, match="'comet_ml' is not installed; pip install comet_ml"):
            run(network(), batches(), out=tmp_path, trackers=["comet_ml"])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"finetune needs the package 'accelerate'.*redconvert\[train\]"):
        run(network(), batches())


@pytest.mark.parametrize("kind", ["file", "inside a file", "read-only"])
def test_folders_that_cannot_be_written(tmp_path, kind, monkeypatch):
    (tmp_path / "taken").write_text("someone's")
    out = tmp_path / "taken"
    if kind == "inside a file":
        out = out / "run"
    if kind == "read-only":  # root may write everywhere: say what others hear
        out = tmp_path

        def touch(self, *_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.touch", touch)
    dynamic = network()
    state = state_of(dynamic)
    with pytest.raises(RedconvertError, match=r"cannot write to '.*'.*Give out= a folder that you may write to"):
        run(dynamic, batches(), out=out)
    assert unchanged(dynamic, state) and (tmp_path / "taken").read_text() == "someone's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_full_disk(tmp_path, monkeypatch):
    """When the second epoch's state cannot be written: the first one's is left, and the run goes on from it."""
    import redconvert.files

    fsync, count = redconvert.files.os.fsync, [0]

    def full(descriptor):
        count[0] += 1
        if count[0] == 4:  # teacher.pt, resume.pt, history.json, resume.pt
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(redconvert.files.os, "fsync", full)
    with pytest.raises(RedconvertError, match=r"cannot write '.*resume.pt': No space left on device"):
        run(network(), batches(), epochs=2, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "resume.pt", "teacher.pt"]
    history = run(network(), batches(), epochs=2, out=tmp_path)
    assert history.losses == run(network(), batches(), epochs=2).losses
    assert isinstance(history, redconvert.History)
