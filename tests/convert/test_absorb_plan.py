"""absorb=True: which convolutions hand over their channels, and which have no reader that can do without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import redconvert
from redconvert import ConvertConfig

X = torch.randn(2, 3, 8, 8)


class Pair(nn.Module):
    """conv, whatever stands between, conv, and a head."""

    def __init__(self, *between: nn.Module, groups: int = 1, head: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.between = nn.Sequential(*(between or (nn.BatchNorm2d(8), nn.ReLU())))
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)) if head else nn.Identity()

    def forward(self, x):
        return self.head(self.b(self.between(self.a(x))))


class TwoReaders(Pair):
    def forward(self, x):
        y = self.between(self.a(x))
        return self.head(self.b(y) + self.b(y * 2))


class Residual(Pair):
    def forward(self, x):
        y = self.a(x)
        return self.head(self.b(self.between(y) + y))


class Twice(Pair):
    def forward(self, x):
        return self.head(self.b(self.between(self.a(self.between[0](self.a(x))[:, :3]))))


class Aliased(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.a


def readers(model, example=X, **config):
    model(example)
    values = {"absorb": True, "min_saving": 0, **config}
    plan = redconvert.plan(model, ConvertConfig(**values), example_inputs=example)
    return {verdict.name: verdict.reader for verdict in plan.converted if verdict.reader}


CHANNELWISE = {
    "default": (),
    "nothing": (nn.Identity(),),
    "pools": (nn.MaxPool2d(3, 1, 1), nn.SiLU(), nn.AvgPool2d(3, 1, 1)),
    "dropout": (nn.BatchNorm2d(8), nn.Dropout2d(), nn.GELU()),
}


@pytest.mark.parametrize("between", CHANNELWISE)
def test_pairs(between):
    assert readers(Pair(*CHANNELWISE[between])) == {"a": "b"}


def test_a_chain_and_3d():
    layers = [layer for _ in range(3) for layer in (nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())]
    chain = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))
    assert readers(chain, torch.randn(1, 8, 4, 4, 4)) == {"0": "3", "3": "6"}


REFUSED = {
    "two readers": TwoReaders,
    "residual": Residual,
    "called twice": Twice,
    "aliased": Aliased,
    "GroupNorm": lambda: Pair(nn.GroupNorm(2, 8)),
    "softmax": lambda: Pair(nn.Softmax(1)),
    "shuffle": lambda: Pair(nn.ChannelShuffle(2)),
    "grouped reader": lambda: Pair(groups=2),
    "output reader": lambda: Pair(head=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_pair(name):
    assert readers(REFUSED[name]()) == {}


def test_no_pair_by_config():
    assert readers(Pair(), absorb=False) == {}
    assert readers(Pair(), rules=(("b", None),)) == {}
    assert readers(Pair(), rules=(("b", {"gate": "soft", "absorb": False}),)) == {}
    assert readers(Pair(), rules=(("a", {"absorb": False}),)) == {}
    assert readers(Pair(), rules=(("b", {"absorb": False}),)) == {"a": "b"}  # the source asks


def test_an_output_reader_that_a_rule_includes():
    assert readers(Pair(head=False), rules=(("b", {}),)) == {"a": "b"}


HOOKS = {
    "the source": ("a", "register_forward_hook"),
    "an activation": ("between.1", "register_forward_hook"),
    "before a norm": ("between.0", "register_forward_pre_hook"),
    "the block between": ("between", "register_forward_hook"),
    "before the block between": ("between", "register_forward_pre_hook"),
    "before the reader": ("b", "register_forward_pre_hook"),
}


@pytest.mark.parametrize("where", HOOKS)
def test_a_hook_that_sees_the_channels(where):
    """What the hook would be given is not there; nor may it be, where the hook changes it."""
    model = Pair()
    name, register = HOOKS[where]
    handle = getattr(model.get_submodule(name), register)(lambda *_: None)
    assert readers(model) == {}
    handle.remove()
    assert readers(model) == {"a": "b"}


def test_a_hook_on_an_identity_between():
    model = Pair(nn.Identity(), nn.ReLU())
    model.between[0].register_forward_hook(lambda *_: None)
    assert readers(model) == {}


def test_hooks_that_see_no_missing_channel():
    model = Pair()
    model.register_forward_hook(lambda *_: None)
    model.head.register_forward_hook(lambda *_: None)
    assert readers(model) == {"a": "b"}


def test_a_hook_in_a_part_that_fx_reads_alone():
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Pair()

        def forward(self, x):
            return self.part(x) if x.sum() > -1e9 else x

    model = Untraceable()
    assert readers(model) == {"part.a": "part.b"}
    model.part.between[1].register_forward_hook(lambda *_: None)
    assert readers(model) == {}


def test_lowest_macs_by_hand():
    model = Pair()
    model(X)
    config = ConvertConfig(absorb=True, min_saving=0, gate_hidden=4)
    found = {v.name: v for v in redconvert.plan(model, config, example_inputs=X).converted}
    gate_a = 3 * 64 + 3 * 4 + 4 * 2
    gate_b = 8 * 64 + 8 * 4 + 4 * 2
    assert found["a"].dense_macs == 8 * 64 * 27
    assert found["a"].lowest_macs == 4 * 64 * 27 + gate_a  # no Phi_c
    kind = redconvert.convert(model, config, example_inputs=X).b.cheap_c.op(1).macs_per_position
    assert found["b"].lowest_macs == 4 * 64 * 4 * 9 + gate_b + 64 * kind


def test_readers_that_save_next_to_nothing():
    """Behind a pool that leaves a sixteenth of the positions, the reader has too few MACs to be worth it."""
    assert readers(Pair(nn.MaxPool2d(4))) == {}
    assert readers(Pair(nn.MaxPool2d(2))) == {"a": "b"}
