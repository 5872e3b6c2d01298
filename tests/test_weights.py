"""Anyone's checkpoint files: read without running them, loaded whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from redconvert import ConvertConfig, RedconvertError, convert, forced
from redconvert.checkpoint import load_weights, read_file, read_state_dict
from redconvert.layers import dynamic_layers
from redconvert.weights import plain_names

torch.set_num_threads(1)

ADDED = (".gate.", ".cheap_c.", ".cheap_t.")


class Net(nn.Module):
    def __init__(self, seed: int = 0, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv3d(2, 8, 3, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 1))
        self.head = nn.Linear(8, classes)
        self.head.bias.data[0] = torch.nan  # not this module's business

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3, 4)))


def dynamic_net(seed: int = 0, **options: Any) -> Net:
    options = {"min_saving": 0, "cheap": "pointwise"} | options
    return convert(Net(seed), ConvertConfig(**options), example_inputs=torch.zeros(1, 2, 4, 6, 6))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(7), b[k].nan_to_num(7)) for k in a)


STATE = Net().state_dict()


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [[], ["state_dict"], ["model"], ["model_state"], ["model_state_dict"], ["module"]])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_with_a_dict_around(tmp_path: Path, keys: list[str], legacy: bool) -> None:
    content: Any = STATE
    for key in keys:
        content = {"epoch": 3, key: content, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert equal(read_state_dict(tmp_path / "a.pth"), STATE)
    assert equal(read_file(str(tmp_path / "a.pth")), STATE)  # type: ignore[arg-type]


def test_dicts_in_dicts_parameters_and_cycles(tmp_path: Path) -> None:
    parameters = {key: nn.Parameter(value) for key, value in Net().named_parameters()}
    torch.save({"model": {"state_dict": parameters}}, tmp_path / "a.pth")
    read = read_state_dict(tmp_path / "a.pth")
    assert read.keys() == parameters.keys() and not any(value.requires_grad for value in read.values())
    cycle: dict[str, Any] = {}
    cycle["model"] = cycle
    torch.save(cycle, tmp_path / "a.pth")
    with pytest.raises(RedconvertError, match="'model' is a dict, no tensor"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.safetensors", "pytorch_model.bin"])
def test_safetensors_by_name_or_content(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    assert equal(read_state_dict(tmp_path / name), STATE)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["module.a.w", "module.b"], ["a.w", "b"]),
        (["module.module.a.w", "module.module.b"], ["a.w", "b"]),
        (["module._orig_mod.module.a"], ["a"]),
        (["_orig_mod.a.w", "_orig_mod.b"], ["a.w", "b"]),
        (["a._orig_mod.w", "b._orig_mod._orig_mod.c", "d"], ["a.w", "b.c", "d"]),
        (["module.a", "b"], ["module.a", "b"]),  # a network's own module of that name
        (["a.module.w"], ["a.module.w"]),
        (["a._orig_mod.w", "a.w"], ["a._orig_mod.w", "a.w"]),  # else one would be lost
    ],
)
def test_prefixes(names: list[str], expected: list[str]) -> None:
    assert list(plain_names(names).values()) == expected


# --- refusals of files ---------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.system, (f"touch {self.victim}",)


def save_plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS = [torch.save, save_legacy, save_plain]


@pytest.mark.parametrize("write", WRITERS)
def test_a_malicious_pickle_does_not_run(tmp_path: Path, write: Any) -> None:
    path, victim = tmp_path / "evil.pth", tmp_path / "victim"
    write({"state_dict": STATE, "more": Malicious(victim)}, path)
    for read in (read_state_dict, read_file, lambda path: load_weights(Net(), path)):
        with pytest.raises(RedconvertError, match=r"(?s)was refused.*runs code.*trust=True.*--trust"):
            read(path)
    assert not victim.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_a_pickled_network_needs_trust(tmp_path: Path, write: Any) -> None:
    path, net = tmp_path / "net.pt", nn.Sequential(nn.Conv2d(3, 4, 3))
    for content in (net, {"epoch": 1, "model": net}):
        write(content, path)
        with pytest.raises(RedconvertError, match=r"refused.*--trust"):
            read_state_dict(path)
        assert isinstance(read_file(path, trust=True), nn.Sequential)
        assert equal(read_state_dict(path, trust=True), net.state_dict())
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3))
    load_weights(fresh, path, trust=True)
    assert equal(fresh.state_dict(), net.state_dict())


def test_trust_needs_the_code(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content.replace(b"Sequential", b"Sequentiel"))
    with pytest.raises(RedconvertError, match=r"classes are not here.*importable"):
        read_file(tmp_path / "a.pt", trust=True)


@pytest.mark.filterwarnings("ignore")
def test_a_script_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Conv2d(3, 4, 3)).save(str(tmp_path / "a.pt"))
    with pytest.raises(RedconvertError, match=r"refused.*TorchScript"):
        read_file(tmp_path / "a.pt")


@pytest.mark.parametrize("trust", [False, True])
def test_files_that_are_no_checkpoints(tmp_path: Path, trust: bool) -> None:
    def check(match: str, content: bytes | None = None, name: str = "a.pth") -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RedconvertError, match=match):
            read_file(tmp_path / name, trust=trust)

    check("is no file", name="nowhere.pth")
    check("is a folder", name=".")
    check("is empty", b"")
    check("is empty", b"", "a.safetensors")
    check("no whole checkpoint", b"hello, this is text\n" * 9)
    check("no whole checkpoint", b'{"json": 1}')
    check("no whole checkpoint", b"PK\x03\x04" + bytes(100))
    check("no whole safetensors", b"hello, this is text\n" * 9, "a.safetensors")
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a.txt", "no weights")
    check("no whole checkpoint")
    for write in (torch.save, save_legacy, save_file):
        name = "a.safetensors" if write is save_file else "a.pth"
        write(STATE, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for length in (1, 9, 30, 150, 700, len(whole) // 2, len(whole) - 1):
            check("no whole", whole[:length], name)


def test_files_without_a_state_dict(tmp_path: Path) -> None:
    for content, match in (
        (torch.zeros(3), "holds a Tensor, no state dict"),
        ([1, 2], "holds a list"),
        ({}, "empty state dict"),
        ({"epoch": 3}, "'epoch' is a int, no tensor"),
        ({1: torch.zeros(1)}, "entry 1 is a Tensor"),
        ({"state_dict": OrderedDict()}, "empty state dict"),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(RedconvertError, match=match):
            read_state_dict(tmp_path / "a.pth")


# --- loading -------------------------------------------------------------------------------------------------------


def test_a_converted_network_takes_original_checkpoints() -> None:
    dynamic = dynamic_net(1)
    added = {key for key in dynamic.state_dict() if any(part in key for part in ADDED)}
    keys = dynamic.load_state_dict(STATE, strict=False)
    assert added == set(dynamic.state_dict()) - set(STATE)
    # BatchNorm itself excuses its counter, as in any checkpoint from before it had one.
    assert set(keys.missing_keys) == {key for key in added if not key.endswith("num_batches_tracked")}
    assert not keys.unexpected_keys


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, torch.compile])
def test_original_into_converted(wrap: Any) -> None:
    dynamic = dynamic_net(1)
    for layer in dynamic_layers(dynamic).values():
        layer.gate.beta.data.fill_(0.25)
    load_weights(wrap(dynamic), STATE)
    expected = dynamic_net(0)  # converted with these weights
    assert torch.equal(dynamic.body[3].weight, STATE["body.3.weight"])
    for name, layer in dynamic_layers(dynamic).items():
        assert (layer.gate.beta == 0.25).all()  # what was learnt stays
        assert equal(layer.cheap_c.state_dict(), dynamic_layers(expected)[name].cheap_c.state_dict())
    x = torch.randn(1, 2, 4, 6, 6)
    with forced(dynamic.eval(), channel=1), forced(expected.eval(), channel=1):
        assert torch.equal(dynamic(x)[:, 1:], expected(x)[:, 1:])


def test_nan_in_original_weights(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in STATE.items()}
    state["body.0.weight"][0] = torch.nan
    dynamic = dynamic_net(1)
    load_weights(dynamic, state)
    assert dynamic.body[0].weight.isnan().any() and dynamic.body[0].cheap_c.ops[0].weight.isfinite().all()


def test_converted_into_converted_and_original(tmp_path: Path) -> None:
    dynamic = dynamic_net(1)
    dynamic.body[3].cheap_c.set_order(torch.arange(8).flip(0))
    dynamic.body[3].cheap_c.ops[0].weight.data.normal_()
    torch.save({"state_dict": {f"module.{k}": v for k, v in dynamic.state_dict().items()}}, tmp_path / "a.pth")
    other, plain = dynamic_net(2), Net(3)
    load_weights(other, tmp_path / "a.pth")
    assert equal(other.state_dict(), dynamic.state_dict()) and not other.body[3].cheap_c.is_identity
    load_weights(plain, tmp_path / "a.pth")
    assert equal(plain.state_dict(), {key: dynamic.state_dict()[key] for key in STATE})
    load_weights(nn.DataParallel(plain), dynamic_net(4).state_dict())
    assert equal(plain.state_dict(), Net(4).state_dict())


def test_old_checkpoints_lack_batch_counts() -> None:
    net = Net(1)
    load_weights(net, {key: value for key, value in STATE.items() if "num_batches" not in key})
    assert equal(net.state_dict(), STATE)


def test_refuses_other_networks_and_changes_nothing() -> None:
    changed = dict(STATE, **{"head.weight": torch.zeros(9, 8)})
    added = dynamic_net().state_dict()
    incomplete = {key: value for key, value in added.items() if not key.endswith("gate.beta")}
    order = "body.0.cheap_c.order"
    for model, state, match in (
        (Net(1), changed, r"wrong shape: head\.weight \(9, 8\) instead of \(4, 8\)"),
        (Net(1), {"head.weight": STATE["head.weight"]}, r"missing: body\.0\.weight, body\.1\.weight, \S+ and 5 more"),
        (Net(1), STATE | {f"x{i}": torch.zeros(1) for i in range(5)}, "unexpected: x0, x1, x2 and 2 more"),
        (Net(1), STATE | {"head.gate.beta": torch.zeros(1)}, r"unexpected: head\.gate\.beta"),
        (dynamic_net(1), incomplete, r"missing: body\.0\.gate\.beta, body\.3\.gate\.beta\)"),
        (dynamic_net(1, rules={"body.0": None}), added, r"unexpected: body\.0"),
        (dynamic_net(1, search_space=3), added, "missing: .*wrong shape"),
        (dynamic_net(1), added | {order: torch.zeros(8, dtype=torch.long)}, "no order of channels: 0 to 7"),
        (dynamic_net(1), changed, "wrong shape"),
        (Net(1).to("meta"), STATE, "meta device"),
        (dynamic_net(1), {"state_dict": 3}, "'state_dict' is a int"),
    ):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(RedconvertError, match=match):
            load_weights(model, state)
        assert model.head.weight.is_meta or equal(model.state_dict(), before)
    with pytest.raises(RedconvertError, match=r"torch\.nn\.Module, not dict"):
        load_weights({}, STATE)  # type: ignore[arg-type]


def test_refuses_sources_outside_the_computed_channels() -> None:
    state = dynamic_net(0, cheap="scale").state_dict()
    state["body.0.cheap_c.ops.0.source"] = torch.full((4,), 4)
    with pytest.raises(RedconvertError, match=r"ops\.0\.source' names channels"):
        load_weights(dynamic_net(1, cheap="scale"), state)
