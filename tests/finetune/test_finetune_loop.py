"""`redconvert.finetune`: it learns, meets its target, and every setting does what it says."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest
import torch
from problems import CLASSES, Net, Planted, batches, costs_by_hand, network, run, same_state, state_of, undecided
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import redconvert
from redconvert import History
from redconvert.cost.measure import static_macs
from redconvert.finetune.parameters import learning_rate_factor
from redconvert.layers import dynamic_layers

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")


@pytest.mark.parametrize("dims", [2, 3])
def test_it_learns_and_meets_the_target(dims):
    dynamic = network(dims)
    train = DataLoader(Planted(dims=dims), batch_size=16, shuffle=True)
    history = run(dynamic, train, batches(dims=dims), epochs=16, lr=0.05, target=0.7, teacher=None)
    rows = history.epochs
    assert len(rows) == 16 and len(history.steps) == 48
    assert rows[-1]["task"] < 0.4 * rows[0]["task"]
    assert rows[-1]["val_accuracy"] > 0.9 > rows[0]["val_accuracy"]
    assert abs(rows[-1]["cost"] - 0.7) < 0.05 < rows[0]["cost"] - 0.7
    assert not dynamic.training


def test_figures_against_a_hand_evaluation():
    """Of the last epoch's validation, and of the first step's loss."""
    dynamic = undecided(network())
    before, val, train = copy.deepcopy(dynamic), batches(12, 2), batches(16, 1)
    history = run(dynamic, train, val, target=0.5, efficiency=3.0, distill=0.25, temperature=2.0, lr=1e-9)
    static = static_macs(before, val[0][0])
    x, labels = train[0]
    teacher = redconvert.frozen_original(before)
    out, costs = costs_by_hand(before.train(), x, static)
    kl = redconvert.distillation_loss(out, teacher(x), 2.0)
    task = float(0.75 * F.cross_entropy(out, labels) + 0.25 * kl)
    first = history.steps[0]
    assert first["task"] == pytest.approx(task, rel=1e-5)
    assert first["cost"] == pytest.approx(float(costs.mean()), rel=1e-6)
    assert first["loss"] == pytest.approx(task + 3 * (float(costs.mean()) - 0.5) ** 2, rel=1e-5)
    tasks, shares, rights = [], [], []
    with torch.no_grad():
        for x, labels in val:
            out, costs = costs_by_hand(dynamic.eval(), x, static)
            kl = redconvert.distillation_loss(out, teacher(x), 2.0)
            tasks.append(float(0.75 * F.cross_entropy(out, labels) + 0.25 * kl))
            shares += costs.tolist()
            rights += (out.argmax(1) == labels).tolist()
    row = history.epochs[0]
    assert row["val_loss"] == pytest.approx(sum(tasks) / 2, rel=1e-5)
    assert row["val_cost"] == pytest.approx(sum(shares) / 24, rel=1e-6)
    assert row["val_accuracy"] == pytest.approx(sum(rights) / 24)


def test_gates_learn_in_every_third_step():
    """Of four steps of two batches each: gates move in the steps 0 and 3, weights in all."""
    dynamic, passes, learning = undecided(network()), [], []
    dynamic.register_forward_pre_hook(lambda model, inputs: passes.append(model.training))
    gate = next(iter(dynamic_layers(dynamic).values())).gate.beta
    gate.register_post_accumulate_grad_hook(lambda parameter: learning.append((sum(passes) - 1) // 2))
    history = run(dynamic, batches(4, 8), accumulate=2, gate_every=3, target=0.6, lr=0.01)
    assert len(history.steps) == sum(passes) == 8
    assert learning == [0, 0, 3, 3]
    assert {step["cost"] for step in history.steps} != {1.0}
    again = run(undecided(network()), batches(4, 8), accumulate=2, gate_every=1, target=0.6, lr=0.01)
    assert again.steps[:2] == history.steps[:2]
    assert again.losses[3] == pytest.approx(history.losses[3], rel=1e-6)  # after the first update, which both make
    assert again.losses[6] != pytest.approx(history.losses[6], rel=1e-6)


def test_gates_never_learn():
    """Every step is one in which they rest; weights and what rebuilds learn, and cost stays what it was."""
    dynamic, data = undecided(network()), batches(4, 8)
    by_hand, before = copy.deepcopy(dynamic).train(), copy.deepcopy(dynamic.state_dict())
    history = run(dynamic, data, gate_every=0, target=0.6, lr=0.01, efficiency=3.0)
    (x, labels), teacher = data[0], redconvert.frozen_original(by_hand)
    with redconvert.resting_gates(by_hand):
        out = by_hand(x)
    task = 0.5 * F.cross_entropy(out, labels) + 0.5 * redconvert.distillation_loss(out, teacher(x))
    assert history.steps[0]["task"] == pytest.approx(float(task), rel=1e-5)
    now = dynamic.state_dict()
    moved = {name for name, _ in dynamic.named_parameters() if not torch.equal(now[name], before[name])}
    assert moved and not any(".gate." in name for name in moved)
    assert {name.rsplit(".", 1)[-1] for name in moved} >= {"weight", "bias"}
    for step in history.steps:
        assert step["loss"] == pytest.approx(step["task"] + 3 * (step["cost"] - 0.6) ** 2, rel=1e-5)


@pytest.mark.parametrize("as_list", [True, False])
def test_validation_reads_every_sample(as_list):
    """Also where the last training batch is short: 4 of 8 samples, of which a list's batches must not be cut."""
    dynamic, data, val = network(), Planted(20), batches(12, 2)
    inputs, labels = torch.cat([x for x, _ in val]), torch.cat([y for _, y in val])
    loader = DataLoader(list(zip(inputs, labels, strict=True)), batch_size=10)
    train = DataLoader(data, batch_size=8)
    row = run(dynamic, train, val if as_list else loader, lr=0.0, epochs=2, efficiency=0, teacher=None).epochs[-1]
    with torch.no_grad():
        out = dynamic.eval()(inputs)
    assert row["val_accuracy"] == pytest.approx(float((out.argmax(1) == labels).float().mean()))
    assert row["val_loss"] == pytest.approx(float(F.cross_entropy(out, labels)), rel=1e-5)


def test_the_learning_rate_and_the_steps():
    """Two epochs of three batches, two batches a step: 4 steps, the last of each epoch over one batch."""
    history = run(network(), batches(4, 3), epochs=2, lr=0.3, accumulate=2, warmup=0.25)
    rates = [0.3 * learning_rate_factor(step, 4, 0.25) for step in (0, 0, 1, 2, 2, 3)]
    assert [step["lr"] for step in history.steps] == pytest.approx(rates)
    assert rates[:3] == pytest.approx([0.15, 0.15, 0.3]) and rates[5] == pytest.approx(0.15 * (1 - 0.5))


def test_accumulation_is_a_larger_batch():
    """Where nothing looks at the whole batch: no batch norms (gates' included), Eq. 6 with p = 1."""
    dynamic = undecided(network(norms=False, rebuild_weight=0.0))
    for layer in dynamic_layers(dynamic).values():
        layer.gate.norm = nn.LayerNorm(16)
    train, whole = batches(8, 4), batches(16, 2)
    assert torch.equal(torch.cat([x for x, _ in train]), torch.cat([x for x, _ in whole]))
    networks = [copy.deepcopy(dynamic) for _ in range(2)]
    settings = {"epochs": 3, "lr": 0.1, "clip": 1.0}
    parts = run(networks[0], train, accumulate=2, **settings)
    once = run(networks[1], whole, **settings)
    pairs = [sum(parts.losses[i : i + 2]) / 2 for i in range(0, 12, 2)]
    assert pairs == pytest.approx(once.losses, rel=1e-5)
    assert not torch.allclose(networks[1].head.weight, dynamic.head.weight, atol=0.01)
    for a, b in zip(*(each.parameters() for each in networks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradient_checkpointing_changes_nothing(dims):
    dynamic = undecided(network(dims, dropout=0.3))
    networks = [copy.deepcopy(dynamic) for _ in range(2)]
    runs = [
        run(each, batches(8, 3, dims), epochs=2, lr=0.05, target=0.6, gradient_checkpointing=again, dropout=True)
        for each, again in zip(networks, (False, True), strict=True)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)
    assert all("forward" not in vars(module) for module in networks[1].modules())
    others = networks[1].state_dict()
    for key, value in networks[0].state_dict().items():
        torch.testing.assert_close(value, others[key], rtol=1e-5, atol=1e-6)
    counts = [value.item() for key, value in others.items() if key.endswith("num_batches_tracked")]
    assert sorted(set(counts)) == [6, 7]  # norms have seen one batch before conversion


def test_without_labels():
    """The teacher alone: its answers are the labels of Eq. 6 and of the accuracy."""
    dynamic = undecided(network())
    with torch.no_grad():
        dynamic.head.weight.mul_(20)  # a teacher of strong opinions
    teacher, x = redconvert.frozen_original(dynamic), batches()[0][0]
    out, costs = costs_by_hand(copy.deepcopy(dynamic).train(), x, static_macs(dynamic, x))
    right = (out.argmax(1) == teacher(x).argmax(1)).double()
    history = run(dynamic, [x], [x], epochs=30, lr=0.02, efficiency=0.5)
    first = history.steps[0]
    kl = float(redconvert.distillation_loss(out, teacher(x)))
    assert first["task"] == pytest.approx(kl, rel=1e-4)
    assert first["loss"] == pytest.approx(kl + 0.5 * float((costs * right).mean()), rel=1e-4)
    assert history.epochs[-1]["val_accuracy"] == pytest.approx(
        float((dynamic.eval()(x).argmax(1) == teacher(x).argmax(1)).float().mean())
    )
    assert history.epochs[-1]["val_loss"] < 0.7 * history.epochs[0]["val_loss"]


def test_dropout_rests_where_a_teacher_answers():
    """Off by default with a teacher, on without one, or as asked; afterwards the network is as it was."""
    dynamic = undecided(network(dropout=0.5))
    [(x, labels)] = batches(16, 1)
    quiet = copy.deepcopy(dynamic).train()
    quiet.dropout.eval()
    out = quiet(x)
    kl = float(redconvert.distillation_loss(out, redconvert.frozen_original(dynamic)(x)))
    labelled = float(F.cross_entropy(out, labels))
    tasks = {}
    for name, options in {
        "teacher": {"distill": 1.0},
        "teacher, dropout": {"distill": 1.0, "dropout": True},
        "labels": {"teacher": None},
        "labels, no dropout": {"teacher": None, "dropout": False},
    }.items():
        trained = copy.deepcopy(dynamic).train()
        tasks[name] = run(trained, [(x, labels)], efficiency=0.0, **options).steps[0]["task"]
        assert all(module.training for module in trained.modules())
    assert tasks["teacher"] == pytest.approx(kl, rel=1e-4)
    assert tasks["labels, no dropout"] == pytest.approx(labelled, rel=1e-5)
    assert tasks["teacher, dropout"] != pytest.approx(kl, rel=0.01)
    assert tasks["labels"] != pytest.approx(labelled, rel=1e-4)


def test_teachers():
    """A network in train mode answers in eval mode and is left alone; a function; none."""
    train, dynamic = batches(16, 1), network(dropout=0.5)
    other = Net(dropout=0.5).train()
    other(torch.randn(8, 3, 8, 8))
    state = state_of(other)
    losses = {}
    for name, teacher in (("network", other), ("function", lambda x: other.eval()(x)), ("none", None)):
        losses[name] = run(copy.deepcopy(dynamic), train, teacher=teacher, distill=0.9, efficiency=0).losses[0]
        other.train()
    assert losses["network"] == losses["function"] != losses["none"]
    assert same_state(other, state) and all(module.training for module in other.modules())
    assert all(p.requires_grad for p in other.parameters())


def test_a_criterion_of_ones_own():
    x, labels = batches(16, 1)[0]
    dynamic = network()
    wanted = float(F.mse_loss(copy.deepcopy(dynamic).train()(x), F.one_hot(labels, CLASSES).float()))

    def criterion(out: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(out, F.one_hot(labels, CLASSES).float())

    settings = {"criterion": criterion, "teacher": None, "efficiency": 0.5}
    assert run(copy.deepcopy(dynamic), [(x, labels)], **settings).steps[0]["task"] == pytest.approx(wanted, rel=1e-6)
    step = run(dynamic, [{"x": x, "label": labels}], correct=lambda out, labels: labels > 1, **settings).steps[0]
    assert step["loss"] == pytest.approx(wanted + 0.5 * step["cost"] / 2, rel=1e-5)  # all gates are alike at birth


def test_freeze_norms():
    for freeze in (True, False):
        dynamic = network()
        before = state_of(dynamic)
        run(dynamic, batches(4, 2), freeze_norms=freeze)
        own = [key for key in before if "running" in key and ".gate." not in key]
        gates = [key for key in before if "running" in key and ".gate." in key]
        assert len(own) == len(gates) == 4
        after = dynamic.state_dict()
        assert all(torch.equal(after[key], before[key]) == freeze for key in own)
        assert not any(torch.equal(after[key], before[key]) for key in gates)
        assert not torch.equal(after["blocks.0.1.weight"], before["blocks.0.1.weight"])  # the affine part learns


def test_it_leaves_no_traces():
    """Train flags, random numbers, gradients, observers and forwards are as they were; old gradients do not count."""
    import numpy

    dynamic, train = network(), DataLoader(Planted(augment=True), batch_size=16, shuffle=True)
    dynamic.train()
    dynamic.blocks[0].eval()
    flags = [module.training for module in dynamic.modules()]
    fresh = run(copy.deepcopy(dynamic), train)
    for parameter in dynamic.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    before = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state())
    attributes = {name: set(vars(module)) for name, module in dynamic.named_modules()}
    assert run(dynamic, train).losses == fresh.losses
    assert random.getstate() == before[0] and numpy.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [module.training for module in dynamic.modules()] == flags
    assert all(p.grad is None for p in dynamic.parameters())
    assert {name: set(vars(module)) for name, module in dynamic.named_modules()} == attributes
    assert not dynamic._forward_pre_hooks


def test_precisions_in_one_process():
    """Accelerate keeps its settings for the whole process, and marks networks as prepared."""
    import accelerate

    mine = accelerate.Accelerator()
    dynamic, losses = network(), {}
    for precision in ("no", "bf16", "no", None):
        other = copy.deepcopy(dynamic)
        losses.setdefault(precision, []).append(run(other, batches(), mixed_precision=precision, target=0.9).losses)
        assert vars(other).keys() == vars(dynamic).keys() and other(torch.randn(2, 3, 8, 8)).dtype == torch.float32
    assert losses["no"] == [losses[None][0]] * 2 and losses["bf16"][0] != losses["no"][0]
    assert losses["bf16"][0] == pytest.approx(losses["no"][0], rel=0.02)
    twice = [
        run(dynamic, batches(), mixed_precision=each, lr=0.0, freeze_norms=True).losses[0] for each in ("no", "bf16")
    ]
    assert twice[0] != twice[1]  # the second call on one network is not taken for prepared
    assert mine.mixed_precision == "no" and mine.state.distributed_type == accelerate.DistributedType.NO
    given = run(copy.deepcopy(dynamic), batches(), accelerator=mine)
    assert given.losses == run(copy.deepcopy(dynamic), batches()).losses


def test_adamw_and_clipping_take_the_first_step_by_hand():
    """AdamW's first step moves every number by the learning rate; clipped SGD moves all by at most it."""
    x, labels = batches(16, 1)[0]
    for optimizer, clip in (("adamw", None), ("sgd", 0.5)):
        dynamic = undecided(network())
        before = {name: p.detach().clone() for name, p in dynamic.named_parameters()}
        run(dynamic, [(x, labels)], optimizer=optimizer, clip=clip, lr=0.01, momentum=0.0, weight_decay=0.0)
        moved = {name: (p - before[name]).detach() for name, p in dynamic.named_parameters()}
        if clip is None:
            assert float(moved["head.bias"].abs().max()) == pytest.approx(0.01, rel=1e-3)
        else:
            assert math.sqrt(sum(float(m.square().sum()) for m in moved.values())) == pytest.approx(0.005, rel=1e-3)


def test_what_it_writes(tmp_path):
    dynamic = network()
    history = run(dynamic, batches(), batches(8, 1), epochs=2, out=tmp_path / "new" / "run", target=0.8)
    folder = tmp_path / "new" / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["history.json", "model", "resume.pt", "teacher.pt"]
    assert History(**json.loads((folder / "history.json").read_text())) == history
    assert history.settings["target"] == 0.8 and history.settings["batches"] == 3
    assert history.environment["processes"] == 1 and history.environment["device"] == "cpu"
    loaded = redconvert.from_pretrained(Net(), folder / "model")
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(loaded.eval()(x), dynamic.eval()(x))


def test_a_loader_with_persistent_workers_and_its_own_generator():
    data = Planted(16, augment=True)
    losses = []
    for persistent in (True, False):
        generator = torch.Generator().manual_seed(int(persistent))
        train = DataLoader(data, 8, shuffle=True, num_workers=1, persistent_workers=persistent, generator=generator)
        losses.append(run(network(), train, epochs=2).losses)
    assert losses[0] == losses[1]


def test_the_bar_is_gone_at_the_end(capsys):
    redconvert.finetune(network(), batches(), epochs=1)
    assert capsys.readouterr().out == ""


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    run(network(), batches(), batches(8, 1), out=tmp_path, trackers="tensorboard")
    assert list((tmp_path / "redconvert").glob("events.*"))


def test_a_tracker_of_ones_own(tmp_path):
    tracking = pytest.importorskip("accelerate.tracking")

    class Rows(tracking.GeneralTracker):
        name, requires_logging_directory = "rows", False

        def __init__(self) -> None:
            super().__init__()
            self.rows, self.config, self.finished = [], None, False

        @property
        def tracker(self) -> list:
            return self.rows

        def store_init_configuration(self, values: dict) -> None:
            self.config = values

        def log(self, values: dict, step: int | None = None, **_) -> None:
            self.rows.append((step, values))

        def finish(self) -> None:
            self.finished = True

    rows = Rows()
    history = run(network(), batches(), batches(8, 1), out=tmp_path, trackers=[rows], target=0.9)
    assert rows.finished and rows.config["target"] == 0.9
    assert [step for step, _ in rows.rows] == [1, 2, 3, 3]
    assert [values for _, values in rows.rows[:3]] == history.steps
    assert rows.rows[3][1] == {key: value for key, value in history.epochs[0].items() if key.startswith("val_")}
