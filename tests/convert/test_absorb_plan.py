"""absorb=True: which convolutions hand over their channels, and which have no reader that can do without."""

from __future__ import annotations

import importlib

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


# -- with others in between that have the same channels ------------------------------------------------


class Squeeze(nn.Module):
    """Squeeze and excitation in many spellings."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.pool = how, nn.AdaptiveAvgPool2d(2 if how == "pool of four" else 1)
        self.fc1 = nn.Linear(8, 4) if how == "linear" else nn.Conv2d(8, 4, 1)
        self.fc2 = nn.Linear(4, 8) if how == "linear" else nn.Conv2d(4, 8, 1)

    def forward(self, x):
        if self.how == "linear":
            return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3))))))[:, :, None, None]
        means = {"mean": lambda: x.mean([-1, -2], True), "torch.mean": lambda: torch.mean(x, dim=(2, 3), keepdim=True)}
        means |= {"of H": lambda: x.mean((2,), keepdim=True), "max": lambda: x.amax((2, 3), keepdim=True)}
        s = means.get(self.how, lambda: self.pool(x))()
        s = torch.sigmoid(self.fc2(torch.relu(self.fc1(s))))
        if self.how == "pool of four":
            s = nn.functional.interpolate(s, x.shape[2:])
        if self.how == "read twice":
            return x * s + s
        return torch.mul(s, x) if self.how == "torch.mean" else x.mul(s)


def depthwise(channels=8, **options):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **options)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


FOLLOWING = {
    "depthwise": ((depthwise(),), {"between.0"}),
    "norms and swish": ((nn.BatchNorm2d(8), Swish(), depthwise(), nn.BatchNorm2d(8), nn.SiLU()), {"between.2"}),
    "two": ((depthwise(), nn.ReLU6(), depthwise(bias=False)), {"between.0", "between.2"}),
    "squeezed": ((depthwise(), Squeeze("mean")), {"between.0", "between.1.fc1"}),
    "torch.mean": ((nn.ReLU(), Squeeze("torch.mean")), {"between.1.fc1"}),
    "pool": ((Squeeze("pool"), Swish()), {"between.0.fc1"}),
}


def followers(model, example=X, **config):
    model(example)
    values = {"absorb": True, "min_saving": 0, **config}
    plan = redconvert.plan(model, ConvertConfig(**values), example_inputs=example)
    return {verdict.name: verdict.follows for verdict in plan.converted if verdict.follows}


@pytest.mark.parametrize("name", FOLLOWING)
def test_followers(name):
    between, names = FOLLOWING[name]
    model = Pair(*between)
    assert readers(model) == {"a": "b"} and followers(model) == dict.fromkeys(names, "a")
    plan = redconvert.plan(model, ConvertConfig(absorb=True, min_saving=0), example_inputs=X)
    (verdict,) = [each for each in plan.verdicts if each.name == min(names)]
    assert "has the channels of a" in str(plan) and verdict.channels == (model.get_submodule(min(names)).out_channels,)


NOT_FOLLOWING = {
    "a multiplier": (nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 8, 1)),
    "groups of two": (nn.Conv2d(8, 8, 3, padding=1, groups=4),),
    "linear": (Squeeze("linear"),),
    "of H": (Squeeze("of H"),),
    "max": (Squeeze("max"),),
    "pool of four": (Squeeze("pool of four"),),
    "read twice": (Squeeze("read twice"),),
}


@pytest.mark.parametrize("name", NOT_FOLLOWING)
def test_no_followers(name):
    model = Pair(*NOT_FOLLOWING[name])
    assert "a" not in readers(model) and "a" not in followers(model).values()


def test_followers_by_config():
    """One that a rule excludes stays dense, and so does the pair; as little may a soft gate be one."""
    for rule in (("between.0", None), ("between.0", {"gate": "soft", "absorb": False})):
        model = Pair(depthwise())
        assert readers(model, rules=(rule,)) == followers(model, rules=(rule,)) == {}
    shared = depthwise()
    assert followers(Pair(shared, nn.ReLU(), shared)) == {}


@pytest.mark.parametrize("where", ["between.0", "between.1", "between.1.pool", "between.1.fc1"])
def test_a_hook_that_would_see_channels_that_are_not_there(where):
    model = Pair(depthwise(), Squeeze("pool"))
    handle = model.get_submodule(where).register_forward_hook(lambda *_: None)
    assert followers(model) == readers(model) == {}
    handle.remove()
    assert len(followers(model)) == 2


def test_measured_networks_pair_what_is_left(monkeypatch):
    """A follower that does not gain by frames follows all the same; where the source stays dense nobody does."""
    from redconvert.convert.judge import CandidateTimes

    model = nn.Sequential(
        *(nn.Conv3d(3, 8, 1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv3d(8, 8, 1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    x = torch.randn(1, 3, 4, 8, 8)
    gains = {}

    def times(layers, progress=False):
        slow = CandidateTimes(1.0, (1.0,), (1.0,))
        fast = CandidateTimes(1.0, (0.5,), (0.5,))
        found = {name: fast if gains[name] else slow for name in layers}
        return {
            name: CandidateTimes(1.0, each.channel_ms if len(layers[name][1].channels) > 1 else (), each.temporal_ms)
            for name, each in found.items()
        }

    monkeypatch.setattr(importlib.import_module("redconvert.deploy.measure"), "time_candidates", times)
    config = ConvertConfig(absorb=True)
    for gain in (True, False):
        gains.update({"0": True, "2": gain, "4": True})
        plan = redconvert.plan(model, config, example_inputs=x, measure=True)
        (verdict,) = [each for each in plan.converted if each.name == "2"]
        assert verdict.follows == "0" and verdict.strides == ((1, 2) if gain else (1,))
        dynamic = redconvert.convert(model, config, example_inputs=x, measure=True)
        assert torch.equal(dynamic(x), model(x))
    gains["4"] = False  # a reader that does not gain by a choice of its own reads what is there all the same
    plan = redconvert.plan(model, config, example_inputs=x, measure=True)
    assert {each.name: each.follows for each in plan.converted if each.follows} == {"2": "0", "4": "0"}
    dynamic = redconvert.convert(model, config, example_inputs=x, measure=True)
    assert torch.equal(dynamic(x), model(x)) and dynamic[4].candidates.is_static and not dynamic[4].aside
    gains.update({"0": False, "4": True})
    plan = redconvert.plan(model, config, example_inputs=x, measure=True)
    assert not any(each.follows or each.reader for each in plan.converted)
    assert torch.equal(redconvert.convert(model, config, example_inputs=x, measure=True)(x), model(x))


def test_real_networks():
    """All inverted residual blocks, the first with the stem, and convolutions between that no shortcut passes."""
    import torchvision

    image = torch.randn(1, 3, 64, 64)
    for build, pairs, others in (
        (torchvision.models.mobilenet_v2, 19, 17),
        (torchvision.models.efficientnet_b0, 18, 32),
    ):
        model = build(weights=None).eval()
        plan = redconvert.plan(model, ConvertConfig(absorb=True), example_inputs=image)
        assert len(readers(model, image, min_saving=0.1)) == pairs
        assert sum(verdict.follows is not None for verdict in plan.converted) == others
    model = redconvert.zoo.create("x3d_m").eval()
    plan = redconvert.plan(model, ConvertConfig(absorb=True), example_inputs=torch.randn(1, 3, 4, 64, 64))
    assert sum(verdict.reader is not None for verdict in plan.converted) == 26
    assert sum(verdict.follows is not None for verdict in plan.converted) == 26 + 15


def test_a_source_that_pays_since_nothing_is_rebuilt():
    """A thin 1x1 convolution whose channels cost as much to rebuild as to compute; as a reader it may be one, too."""
    convs = [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, padding=1)]
    model = nn.Sequential(*(part for conv in convs for part in (conv, nn.ReLU())), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(1, 8, 8, 8)
    options = {"cheap": "pointwise", "min_saving": 0.1}
    assert readers(model, x, **options) == {"0": "2", "2": "4", "4": "6"}
    assert followers(model, x, **options) == {}
    dynamic = redconvert.convert(model, ConvertConfig(absorb=True, **options), example_inputs=x)
    assert [dynamic[i].candidates.channels for i in (0, 2, 4)] == [(16, 8), (8, 4), (16, 8)]
    assert torch.equal(dynamic(x), model(x))
    plain = redconvert.plan(model, ConvertConfig(**options), example_inputs=x)
    assert {each.name for each in plan_skipped(plain)} >= {"0", "4"}


def plan_skipped(plan):
    return [each for each in plan.skipped if each.reason.startswith("too small to pay")]
