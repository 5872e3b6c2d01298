"""What counts as inputs, as a batch, and as labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from redconvert.errors import RedconvertError
from redconvert.inputs import (
    as_arguments,
    call_with,
    device_of,
    each_batch,
    evaluating,
    measuring,
    move_to,
    take_inputs,
    tensors_in,
)

X, Y = torch.ones(2, 3), torch.zeros(2)


def test_arguments():
    assert as_arguments((X, Y)) == ((X, Y), {})
    assert as_arguments({"x": X, "scale": 2}) == ((), {"x": X, "scale": 2})
    assert as_arguments([X, Y]) == (([X, Y],), {})
    assert as_arguments(X) == ((X,), {})
    assert as_arguments({}) == (({},), {})
    assert as_arguments({1: X}) == (({1: X},), {})
    assert torch.equal(call_with(nn.Identity(), {"input": X}), X)


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        (X, X),
        ((X, Y), X),
        ([X, Y], X),
        ([X], X),
        (([X, Y], Y), [X, Y]),
        (((X, Y), Y), (X, Y)),
        (({"x": X}, Y), {"x": X}),
        ({"x": X, "label": Y}, {"x": X}),
        ({"x": X, "labels": Y, "target": Y, "targets": Y, "mask": Y}, {"x": X, "mask": Y}),
    ],
)
def test_labels_are_left_out(batch, inputs):
    taken = take_inputs(batch)
    assert taken is inputs or taken == inputs
    assert type(taken) is type(inputs)


@pytest.mark.parametrize("batch", [None, 3, "x", [], (), [3, X], [[], Y], [["x"], Y], {"label": X}, {}])
def test_what_is_no_batch(batch):
    with pytest.raises(RedconvertError, match=r"batch.* A batch is a tensor; a tuple or list whose first"):
        take_inputs(batch)


def test_batches():
    loader = DataLoader(TensorDataset(torch.ones(5, 3), torch.zeros(5)), batch_size=2)
    assert [len(x) for x in each_batch(loader)] == [2, 2, 1]
    for single in (X, (X, Y), {"x": X, "label": Y}):
        assert len(list(each_batch(single))) == 1
    assert len(list(each_batch(iter([X, (X, Y)])))) == 2
    with pytest.raises(RedconvertError, match="empty"):
        each_batch([])
    with pytest.raises(RedconvertError, match="iterable of batches, not int"):
        each_batch(3)


def test_moving():
    moved = move_to({"x": [X, 3], "y": (Y, None)}, "meta")
    assert moved["x"][0].is_meta and moved["y"][0].is_meta
    assert (moved["x"][1], moved["y"][1]) == (3, None)
    assert [tensor.shape for tensor in tensors_in(moved)] == [X.shape, Y.shape]
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.Identity()) == torch.device("cpu")


def test_evaluating():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].eval()
    with pytest.raises(ValueError), evaluating(model):
        assert not model.training and not model[1].training and not torch.is_grad_enabled()
        raise ValueError
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


def test_max_pools_of_clips_are_measured_channels_last():
    """The same to the bit, on a CPU alone; afterwards nothing is hooked and every flag is back."""
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.flat = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.MaxPool2d(2)
            self.pool.register_forward_hook(lambda module, args, out: seen.append(args[0]))

        def forward(self, x):
            return self.flat(self.pool(x).flatten(1, 2))

    model, x = Net().train(), torch.randn(2, 3, 4, 9, 9)
    wanted = model(x)
    with measuring(model):
        assert not model.training and not torch.is_grad_enabled()
        found = model(x)
    assert torch.equal(found, wanted) and torch.equal(seen[0], seen[1])
    assert [each.is_contiguous(memory_format=torch.channels_last_3d) for each in seen] == [False, True]
    assert model.training and not model.pool._forward_pre_hooks
    with measuring(model.pool):
        assert torch.equal(model.pool(x[0]), nn.functional.max_pool3d(x[0], (1, 3, 3), (1, 2, 2), (0, 1, 1)))
