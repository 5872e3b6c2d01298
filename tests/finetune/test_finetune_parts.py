"""Parameter groups, schedule, teacher, history, random numbers: each alone, as in a loop of one's own."""

from __future__ import annotations

import copy
import json
import random
from contextlib import nullcontext

import pytest
import torch
from problems import batches, network, undecided
from torch import nn
from torch.nn import functional as F

import redconvert
from redconvert import EfficiencyLoss, History, RedconvertError, distillation_loss, frozen_original, parameter_groups
from redconvert.finetune.memory import blocks_of, recomputed
from redconvert.finetune.objective import check_labels
from redconvert.finetune.parameters import build_optimizer, learning_rate_factor
from redconvert.finetune.randomness import own_randomness, renew_loader, seed_position
from redconvert.layers import dynamic_layers

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")

# -- parameters ----------------------------------------------------------------------------------------


def test_three_groups():
    dynamic = network(cheap="pointwise")
    groups = {group["name"]: group for group in parameter_groups(dynamic, 0.1, 0.02, 1e-3)}
    assert list(groups) == ["weights", "vectors", "gates"]
    assert [groups[kind]["lr"] for kind in groups] == [0.1, 0.1, 0.02]
    assert [groups[kind]["weight_decay"] for kind in groups] == [1e-3, 0.0, 0.0]
    # Weights: two convolutions, two pointwise Phi_c, the head. Vectors: conv biases, Phi_c's, norms', the head's.
    sizes = {kind: sum(p.numel() for p in group["params"]) for kind, group in groups.items()}
    assert sizes["weights"] == 16 * 27 + 16 * 144 + 2 * 8 * 8 + 4 * 16
    assert sizes["vectors"] == 2 * 16 + 2 * 8 + 2 * 2 * 16 + 4
    # Gates: FC1 (3 and 16 inputs), its norm, FC2 and beta for two candidates.
    assert sizes["gates"] == (3 + 16) * 16 + 2 * (2 * 16 + 2 * 16 + 2)
    assert sum(sizes.values()) == sum(p.numel() for p in dynamic.parameters())


def test_groups_leave_out_what_is_frozen():
    dynamic = network()
    dynamic.head.requires_grad_(False)
    for layer in dynamic_layers(dynamic).values():
        layer.gate.requires_grad_(False)
    groups = parameter_groups(dynamic, 0.1)
    assert [group["name"] for group in groups] == ["weights", "vectors"]
    assert not any(p is dynamic.head.weight for group in groups for p in group["params"])
    assert parameter_groups(network(), 0.3)[2]["lr"] == 0.3


def test_optimizers():
    groups = parameter_groups(network(), 0.1)
    sgd = build_optimizer("sgd", copy.deepcopy(groups), 0.8)
    assert all(g["momentum"] == 0.8 and g["nesterov"] and g["lr"] == 0.1 for g in sgd.param_groups)
    assert not build_optimizer("sgd", copy.deepcopy(groups), 0.0).param_groups[0]["nesterov"]
    adamw = build_optimizer("adamw", groups, 0.8)
    assert type(adamw) is torch.optim.AdamW and adamw.param_groups[0]["betas"] == (0.8, 0.999)
    assert [g["weight_decay"] for g in adamw.param_groups] == [5e-4, 0, 0]
    with pytest.raises(RedconvertError, match="one of sgd, adamw"):
        build_optimizer("lion", groups)
    with pytest.raises(RedconvertError, match="frozen"):
        build_optimizer("sgd", parameter_groups(network().requires_grad_(False), 0.1))


def test_the_schedule():
    """Ten steps, two of them warm-up: 1/3, 2/3, then half a cosine over eight."""
    factors = [learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[4] == pytest.approx(0.5 + 0.5 * 0.5**0.5)  # a quarter of the way
    assert factors[6] == pytest.approx(0.5)
    assert factors[8] == pytest.approx(0.5 - 0.5 * 0.5**0.5)
    assert 0 < factors[9] < 0.04
    assert learning_rate_factor(0, 10, 0) == 1 and learning_rate_factor(0, 1, 0.05) == 1
    assert [learning_rate_factor(step, 2, 1.0) for step in range(2)] == pytest.approx([1 / 3, 2 / 3])


# -- teacher -------------------------------------------------------------------------------------------


def test_the_original_is_dense_frozen_and_apart():
    dynamic = undecided(network(dropout=0.5)).train()
    x = batches()[0][0]
    with torch.no_grad(), redconvert.disabled(dynamic.eval()):
        wanted = dynamic(x)
    teacher = frozen_original(dynamic.train())
    assert torch.equal(teacher(x), wanted) and dynamic.training and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters()) and dynamic.head.weight.requires_grad
    with pytest.raises(RedconvertError, match="no dynamic layers"):
        dynamic_layers(teacher)
    with torch.no_grad():
        dynamic.head.weight.zero_()
    assert torch.equal(teacher(x), wanted)


def test_distillation_by_the_definition():
    torch.manual_seed(1)
    ours, wanted = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = (wanted / 3).softmax(1), (ours / 3).softmax(1)
    by_hand = 9 * (p * (p.log() - q.log())).sum(1).mean()
    assert float(distillation_loss(ours, wanted, 3.0)) == pytest.approx(float(by_hand), rel=1e-5)
    maps, others = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    pixels = [each.movedim(1, 3).reshape(18, 4) for each in (maps, others)]
    assert float(distillation_loss(maps, others)) == pytest.approx(float(distillation_loss(*pixels)), rel=1e-5)
    both = distillation_loss({"a": ours, "b": [maps]}, {"a": wanted, "b": [others]})
    apart = distillation_loss(ours, wanted) + distillation_loss(maps, others)
    assert float(both) == pytest.approx(float(apart), rel=1e-5)
    hot = (ours - wanted) - (ours - wanted).mean(1, keepdim=True)  # in the limit: half the variance of the differences
    assert float(distillation_loss(ours, wanted, 1e4)) == pytest.approx(float(hot.square().mean() / 2), rel=1e-3)
    regression = distillation_loss(torch.ones(3, 1), torch.full((3, 1), 3.0))
    assert float(regression) == 4.0
    assert float(distillation_loss(ours, ours)) == pytest.approx(0, abs=1e-6)
    for bad in (torch.randn(5, 3), [ours, ours], "text"):
        with pytest.raises(RedconvertError, match="must be alike"):
            distillation_loss(bad, wanted)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 4]), "labels run from 0 to 4, but the network scores 4 classes, 0 to 3"),
        (torch.tensor([0, -1, 2]), "labels run from -1 to 2"),
        (torch.tensor([0, -100, -3]), "labels run from -3 to 0"),
        (torch.tensor([[0], [1], [2]]), r"labels of shape \(3, 1\) do not fit scores \(3, 4\)"),
        (torch.rand(3, 5), r"labels of shape \(3, 5\) do not fit"),
        (["cat", "dog", "cow"], "labels must be a tensor, not list"),
    ],
)
def test_labels_that_are_no_classes(labels, message):
    with pytest.raises(RedconvertError, match=message):
        check_labels(torch.randn(3, 4), labels)


def test_labels_that_are_classes():
    for labels in (
        torch.tensor([0, 3, -100]),
        torch.tensor([-100] * 3),
        torch.rand(3, 4),
        torch.tensor([1, 2, 3]).int(),
    ):
        check_labels(torch.randn(3, 4), labels)
    check_labels(torch.randn(2, 4, 5, 5), torch.randint(4, (2, 5, 5)))
    with pytest.raises(RedconvertError, match="pass criterion"):
        check_labels([torch.randn(3, 4)], torch.tensor([0, 1, 2]))


# -- memory --------------------------------------------------------------------------------------------


def test_blocks_and_their_forwards():
    dynamic = network()  # two dynamic layers: blocks of one layer each
    assert blocks_of(dynamic) == list(dynamic.blocks)
    block = dynamic.blocks[0]
    own = block.forward = block.forward  # an instance's own
    with recomputed(dynamic):
        assert block.forward != own
    assert block.forward == own and "forward" not in vars(dynamic.blocks[1])
    single = redconvert.DynamicConv2d(3, 8, 3)
    assert blocks_of(nn.Sequential(nn.Identity(), single)) == [single]  # a lone layer where there is nothing else
    with pytest.raises(RedconvertError, match="is a single layer"), recomputed(single):
        pass


def test_blocks_of_a_deep_network():
    """Twelve convolutions in four groups of three, and a stem: blocks of at most three, and no lone stem."""

    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (redconvert.DynamicConv2d(4, 4, 3) for _ in range(3))

    stages = [nn.ModuleList([Group(), Group()]) for _ in range(2)]
    model = nn.Sequential(redconvert.DynamicConv2d(3, 4, 3), *stages)
    assert blocks_of(model) == [group for stage in stages for group in stage]


def test_blocks_keep_little():
    dynamic = network().train()
    x, sizes = torch.randn(8, 3, 8, 8), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in dynamic.parameters()}
    for context in (nullcontext(), recomputed(dynamic)):
        found: dict[int, int] = {}
        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = dynamic(x)
        sizes.append(sum(count for key, count in found.items() if key not in parameters))
        del out
    assert sizes[1] < 0.4 * sizes[0]


def test_norms_rest_while_a_block_runs_again():
    dynamic = network()
    for block in dynamic.blocks:
        block.append(nn.InstanceNorm2d(16, track_running_stats=True))
    other, x = copy.deepcopy(dynamic), torch.randn(4, 3, 8, 8)
    dynamic.train()(x).sum().backward()
    with recomputed(other):
        other.train()(x).sum().backward()
    for key, value in dynamic.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert all(m.momentum == 0.1 for m in other.modules() if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d))


# -- random numbers ------------------------------------------------------------------------------------


def test_positions_have_their_own_numbers():
    import numpy

    def draw() -> tuple:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    before = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state())
    drawn = {}
    with own_randomness(torch.device("cpu")):
        for position in ((0,), (-1,), (-2,), (0, 1), (1, 0), (-1, 0, 0, 1), (-2, 0, 0, 1)):
            seed_position(3, *position)
            drawn[position] = draw()
            seed_position(3, *position)
            assert draw() == drawn[position]
    assert len({each for row in drawn.values() for each in row}) == 3 * len(drawn)
    assert random.getstate() == before[0] and numpy.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_renewed_loader_draws_the_same_again():
    data = torch.arange(20.0)
    for generator in (torch.Generator(), None):
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * 20, 20, generator=generator)
        loader = torch.utils.data.DataLoader(data, batch_size=5, sampler=sampler, generator=torch.Generator())
        orders = []
        for epoch in (0, 1, 0):
            torch.manual_seed(epoch)
            renew_loader(loader, 3, epoch)
            orders.append(torch.cat(list(loader)).tolist())
        assert orders[0] == orders[2] != orders[1]


# -- history -------------------------------------------------------------------------------------------


def made() -> History:
    steps = [{"loss": 2.0 - i, "task": 1.0, "cost": 0.9, "lr": 0.1} for i in range(2)]
    epochs = [{"epoch": 1, "loss": 1.5, "cost": 0.9, "seconds": 0.1, "val_accuracy": 0.5, "val_cost": 0.8}]
    return History({"target": 0.6}, {"device": "cpu"}, steps, epochs)


def test_history_as_json(tmp_path):
    history = made()
    history.save(tmp_path / "history.json")
    assert History(**json.loads((tmp_path / "history.json").read_text())) == history
    assert history.losses == [2.0, 1.0]
    assert str(history).splitlines()[1].split() == ["1", "1.5", "0.9", "0.5", "0.8"]
    with pytest.raises(RedconvertError, match="cannot write"):
        history.save(tmp_path / "absent" / "history.json")


def test_history_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    figure = made().plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes()[:4] == b"\x89PNG"
    task, cost, accuracy = figure.axes
    assert task.lines[0].get_ydata().tolist() == [1.0, 1.0]
    assert cost.lines[0].get_ydata().tolist() == [0.9, 0.9] and cost.lines[1].get_ydata() == [0.6, 0.6]
    assert accuracy.lines[0].get_ydata().tolist() == [0.5]


# -- a loop of one's own -------------------------------------------------------------------------------


def test_a_loop_of_ones_own():
    dynamic, teacher = network(), frozen_original(network())
    efficiency = EfficiencyLoss(dynamic, target=0.7)
    optimizer = torch.optim.SGD(parameter_groups(dynamic, lr=0.05, gate_lr=0.2), momentum=0.9, nesterov=True)
    shares = []
    for _ in range(12):
        for x, labels in batches():
            out = dynamic.train()(x)
            loss = F.cross_entropy(out, labels) + distillation_loss(out, teacher(x)) + 20 * efficiency(out)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shares.append(float(efficiency.costs.mean()))
    assert shares[0] > 1 and abs(sum(shares[-6:]) / 6 - 0.7) < 0.06
