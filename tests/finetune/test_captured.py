"""A step of training as a CUDA graph: the numbers of the same passes in Python."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import redconvert
from redconvert import RedconvertError

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def network(device, **config):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)),
        *(nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    x = torch.randn(8, 3, 8, 8)
    config = redconvert.ConvertConfig(rules=[("*", {})], **(config or {"absorb": True}))
    dynamic = redconvert.convert(model, config, example_inputs=x)
    redconvert.calibrate(dynamic, [x])
    redconvert.set_budget(dynamic, 0.7, [x])
    redconvert.keep_budget(dynamic)
    return dynamic.to(device).train(), x.to(device), torch.arange(8, device=device) % 5


def test_refused_on_a_cpu():
    dynamic, _, _ = network("cpu")
    optimizer = torch.optim.SGD(dynamic.parameters(), lr=0.1)
    with pytest.raises(RedconvertError, match="this network is on 'cpu'"):
        redconvert.CapturedPasses(lambda: None, dynamic, optimizer)


@on_gpu
@pytest.mark.parametrize("config", [{"absorb": True}, {"cheap": "principal", "mix_inputs": True}])
@pytest.mark.parametrize("rests", [True, False])
def test_steps_are_those_of_python(rests, config):
    ours, x, y = network("cuda", **config)
    theirs = copy.deepcopy(ours)
    losses, states = {}, {}
    for name, model in {"graph": ours, "python": theirs}.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        efficiency = None if rests else redconvert.EfficiencyLoss(model, target=0.3)
        held, found = x.clone(), torch.zeros((), device="cuda")

        def passes(model=model, efficiency=efficiency, held=held, found=found):
            scores = model(held)
            loss = nn.functional.cross_entropy(scores, y)
            loss = loss if efficiency is None else loss + efficiency(scores, y)
            found.copy_(loss.detach())
            loss.backward()

        step = redconvert.CapturedPasses(passes, model, optimizer, rests=rests) if name == "graph" else None
        losses[name] = []
        for i in range(4):
            held.copy_(x.roll(i, 0))
            if step is not None:
                step()
            else:
                optimizer.zero_grad()
                with redconvert.resting_gates(model) if rests else redconvert.capturable(model):
                    passes()
            optimizer.step()
            losses[name].append(float(found))
        states[name] = model.state_dict()
    assert losses["graph"] == pytest.approx(losses["python"], rel=1e-3)
    for key, value in states["python"].items():
        torch.testing.assert_close(states["graph"][key], value, atol=1e-3, rtol=1e-3)


@on_gpu
def test_a_look_at_a_value_is_refused():
    dynamic, x, _ = network("cuda")
    before = copy.deepcopy(dynamic.state_dict())
    optimizer = torch.optim.SGD(dynamic.parameters(), lr=0.1)
    with pytest.raises(RedconvertError, match="cannot be captured"):
        redconvert.CapturedPasses(lambda: print(dynamic(x).sum().item()), dynamic, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())
