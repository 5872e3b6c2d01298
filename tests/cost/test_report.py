"""The report on tiny networks whose every number can be written out."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from rich.table import Table
from torch import nn

from redconvert.config import LayerConfig
from redconvert.cost import LayerReport, report
from redconvert.cost.measure import count_samples, one_sample, per_sample
from redconvert.cost.render import describe_conv, format_count
from redconvert.errors import RedconvertError
from redconvert.layers import DynamicConv2d, DynamicConv3d, forced

CONFIG = LayerConfig(cheap="pointwise", gate_hidden=4)
GATE_A = 3 * 4 * 6 * 6 + 3 * 4 * 4 + 4 * 4
GATE_B = 8 * 4 * 6 * 6 + 8 * 4 * 4 + 4 * 4
DENSE_A, DENSE_B, HEAD = 8 * 4 * 36 * (3 * 27), 6 * 4 * 9 * (8 * 9), 6 * 5
# (channel, temporal) -> MACs without gate: convolution + Phi_c + Phi_t
A = {
    (0, 0): DENSE_A,
    (1, 0): 4 * 4 * 36 * 81 + 4 * 4 * 4 * 36,
    (0, 1): 8 * 2 * 36 * 81 + 2 * 2 * 36 * 8,
    (1, 1): 4 * 2 * 36 * 81 + 4 * 4 * 2 * 36 + 2 * 2 * 36 * 8,
}
B = {
    (0, 0): DENSE_B,
    (1, 0): 3 * 4 * 9 * 72 + 3 * 3 * 4 * 9,
    (0, 1): 6 * 2 * 9 * 72 + 2 * 2 * 9 * 6,
    (1, 1): 3 * 2 * 9 * 72 + 3 * 3 * 2 * 9 + 2 * 2 * 9 * 6,
}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = DynamicConv3d(3, 8, 3, padding=1, config=CONFIG, gate_frames=4)
        self.norm = nn.BatchNorm3d(8)
        self.b = DynamicConv3d(8, 6, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), config=CONFIG, gate_frames=4)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()).mean((2, 3, 4)))


def clips(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 4, 6, 6)


def test_at_birth_everything_runs_and_the_gates_are_counted():
    model = Tiny()
    result = report(model, clips(), time=False)
    a, b = result.layers
    assert (a.name, a.kind, a.calls) == ("a", "Conv3d 3x3x3", 1)
    assert (b.name, b.kind, b.calls) == ("b", "Conv3d 1x3x3, stride 1x2x2", 1)
    assert (a.input_shape, a.output_shape) == ((2, 3, 4, 6, 6), (2, 8, 4, 6, 6))
    assert (b.input_shape, b.output_shape) == ((2, 8, 4, 6, 6), (2, 6, 4, 3, 3))
    assert (a.dense_macs, a.gate_macs, a.cheap_macs) == (DENSE_A, GATE_A, 0)
    assert (b.dense_macs, b.gate_macs, b.cheap_macs) == (DENSE_B, GATE_B, 0)
    assert a.executed_macs == a.executed_min == a.executed_max == DENSE_A + GATE_A
    assert (a.channels, a.frame_strides, a.decisions) == ((8, 4), (1, 2), {(0, 0): 2})
    assert result.dense_macs == DENSE_A + DENSE_B + HEAD
    assert result.executed_macs == DENSE_A + GATE_A + DENSE_B + GATE_B + HEAD
    assert (result.samples, result.batches, result.timed_batches) == (2, 1, 0)
    assert a.parameters == 8 * 3 * 27 + 8
    gate = 3 * 4 * 4 + 2 * 4 + 4 * 4 + 4  # FC1, norm, FC2, beta
    assert a.added_parameters == gate + (4 * 4 + 4) + (2 * 8 + 8)  # Phi_c, Phi_t
    assert result.parameters == a.parameters + (6 * 8 * 9 + 6) + 2 * 8 + (6 * 5 + 5)
    assert result.parameters + result.added_parameters == sum(p.numel() for p in model.parameters())
    assert (result.dense_ms, result.dynamic_ms, result.share, a.dense_ms, a.share) == (None,) * 5
    assert (result.model, result.uncounted) == ("Tiny", ())


def test_average_minimum_and_maximum_over_mixed_decisions():
    model = Tiny()
    taken = [(0, 0), (1, 0), (0, 1), (1, 1)]
    with forced(model, channel=[i for i, _ in taken], temporal=[j for _, j in taken]):
        result = report(model, [(clips(4), torch.arange(4)), clips(4)], time=False)
    for layer, table, gate in ((result.layers[0], A, GATE_A), (result.layers[1], B, GATE_B)):
        costs = [table[decision] + gate for decision in taken]
        assert layer.executed_macs == sum(costs) / 4
        assert (layer.executed_min, layer.executed_max) == (min(costs), max(costs))
        assert layer.decisions == dict.fromkeys(taken, 2) and list(layer.decisions) == sorted(taken)
    phi_c, phi_t = 4 * 4 * 36, 2 * 2 * 36 * 8
    assert result.layers[0].cheap_macs == (4 * phi_c + phi_t + (2 * phi_c + phi_t)) / 4
    whole = [A[decision] + B[decision] + GATE_A + GATE_B + HEAD for decision in taken]
    assert result.executed_macs == sum(whole) / 4
    assert (result.executed_min, result.executed_max) == (min(whole), max(whole))
    assert (result.samples, result.batches) == (8, 2)


def test_time_and_share():
    model = Tiny()
    with forced(model, channel=1, temporal=1):
        result = report(model, [clips(), clips(), clips()], repeats=2, timed_batches=2)
    assert result.timed_batches == 2
    assert result.dense_ms > 0 and result.dynamic_ms > 0
    saved = 1 - result.executed_macs / result.dense_macs
    assert result.share == pytest.approx((1 - result.dynamic_ms / result.dense_ms) / saved)
    for layer in result.layers:
        saved = 1 - layer.executed_macs / layer.dense_macs
        assert layer.share == pytest.approx((1 - layer.dynamic_ms / layer.dense_ms) / saved)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(layer.enabled for layer in (model.a, model.b))


def test_shared_layers_are_summed_and_others_never_run():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = DynamicConv2d(4, 4, 3, padding=1, config=CONFIG)
            self.again = self.shared
            self.idle = DynamicConv2d(4, 4, 1)

        def forward(self, x):
            return self.again(self.shared(x)[..., ::2, ::2])

    with forced(model := Shared(), channel=[0, 1]):
        result = report(model, torch.randn(2, 4, 8, 8), time=False)
    shared, idle = result.layers
    gate = (4 * 64 + 4 * 4 + 4 * 2) + (4 * 16 + 4 * 4 + 4 * 2)
    assert (shared.name, shared.calls, shared.input_shape) == ("shared", 2, (2, 4, 8, 8))
    assert shared.dense_macs == result.dense_macs == 4 * (64 + 16) * (4 * 9)
    assert shared.executed_max == result.executed_max == shared.dense_macs + gate
    assert shared.executed_min == result.executed_min == (64 + 16) * (2 * 4 * 9 + 2 * 2) + gate
    assert shared.decisions == {(0, 0): 2, (1, 0): 2}
    assert (idle.calls, idle.input_shape, idle.dense_macs, idle.executed_macs, idle.decisions) == (0, None, 0, 0, {})
    assert "never ran" in str(result) and "never ran" in result.to_html()


def test_frames_folded_into_the_batch():
    class Folded(nn.Module):
        def __init__(self, num_frames: int | None) -> None:
            super().__init__()
            self.conv = DynamicConv2d(3, 4, 3, padding=1, num_frames=num_frames, config=CONFIG)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.conv(x.flatten(0, -4)).mean((2, 3)))

    dense = 3 * 4 * 36 * 27  # 3 frames
    with forced(per_clip := Folded(3), channel=[0, 1], temporal=0):
        rows = report(per_clip, torch.randn(6, 3, 6, 6), time=False)
        nested = report(per_clip, torch.randn(2, 3, 3, 6, 6), time=False)
    for result in (rows, nested):
        assert result.samples == 2
        assert result.dense_macs == dense + 3 * 4 * 2
        assert result.layers[0].dense_macs == dense
        assert result.layers[0].executed_max - result.layers[0].gate_macs == dense
        assert result.layers[0].executed_min - result.layers[0].gate_macs == dense // 2 + 3 * 2 * 2 * 36
    per_frame = report(Folded(None), torch.randn(2, 3, 3, 6, 6), time=False)  # a clip decides 3 times
    assert (per_frame.samples, per_frame.layers[0].dense_macs) == (2, dense)
    assert per_frame.layers[0].decisions == {(0, 0): 6}
    assert "3 frames" in rows.layers[0].kind


def test_how_samples_are_found():
    assert per_sample([1, 2, 3, 4], 2) == [3, 7]
    assert per_sample([1, 2, 4], 2) == [3.5, 3.5]
    assert count_samples(torch.ones(4, 1), None) == 4
    assert count_samples(3, None) == 1
    x = torch.arange(6.0).view(6, 1)
    cut, count = one_sample({"x": x, "y": [x]}, 3)
    assert (cut["x"].shape, cut["y"][0].shape, count) == ((2, 1), (2, 1), 1)
    whole = (x, torch.ones(3))
    assert one_sample(whole, 3) == (whole, 3)


def test_samples_of_several_shapes():
    model = Tiny()
    result = report(model, [clips(1), torch.randn(3, 3, 8, 6, 6)], time=False)
    small = DENSE_A + DENSE_B
    assert result.dense_macs == (small + 3 * 2 * small) / 4 + HEAD
    assert result.executed_min == small + GATE_A + GATE_B + HEAD


def test_inputs_of_several_kinds():
    class Keywords(Tiny):
        def forward(self, *, video, scale=1.0):
            return {"out": super().forward(scale * video)}

    class Pathways(Tiny):
        def forward(self, paths):
            return super().forward(paths[0]) + super().forward(paths[1])

    keywords = report(Keywords(), {"video": clips(), "label": torch.zeros(2)}, time=False)
    pathways = report(Pathways(), [([clips(), clips()], torch.zeros(2))], time=False)
    assert keywords.dense_macs == DENSE_A + DENSE_B + HEAD
    assert pathways.dense_macs == 2 * keywords.dense_macs
    assert pathways.layers[0].calls == 2


def test_json():
    result = report(Tiny(), clips(), repeats=1)
    values = json.loads(result.to_json())
    assert values == result.to_dict()
    assert values["dense_macs"] == DENSE_A + DENSE_B + HEAD
    assert values["unit"] == "one multiply-add = one FLOP"
    assert values["layers"][0]["decisions"] == [{"channel": 0, "temporal": 0, "count": 2}]
    assert values["layers"][0]["output_shape"] == [2, 8, 4, 6, 6]
    environment = values["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["batch_shape"] == [[2, 3, 4, 6, 6]]
    assert (environment["device"], environment["dtype"]) == ("cpu", "float32")
    assert environment["threads"] == torch.get_num_threads()
    assert environment["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert re.match(r"\d{4}-\d\d-\d\dT", environment["date"])


def test_csv():
    with forced(model := Tiny(), channel=[0, 1], temporal=[0, 0]):
        result = report(model, clips(), repeats=1)
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [row["name"] for row in rows] == ["a", "b"]
    assert (rows[1]["kind"], rows[1]["input_shape"]) == ("Conv3d 1x3x3, stride 1x2x2", "2x8x4x6x6")
    assert (rows[0]["channels"], rows[0]["frame_strides"], rows[0]["decisions"]) == ("8 4", "1 2", "0/0:1 1/0:1")
    for row, layer in zip(rows, result.layers, strict=True):
        for field in ("dense_macs", "executed_macs", "executed_min", "gate_macs", "cheap_macs", "dense_ms", "share"):
            assert float(row[field]) == getattr(layer, field)
    assert set(rows[0]) == set(LayerReport.__dataclass_fields__)


class Page(HTMLParser):
    """Checks that tags nest, and remembers what a test asks for."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.seen if name in (attributes.get("class") or "").split()]


def test_html():
    with forced(model := Tiny(), channel=[0, 1], temporal=[0, 0]):
        text = report(model, clips(), repeats=1).to_html()
    page = Page(text)
    assert page.open == []
    assert len(page.of_class("executed")) == len(page.of_class("dense")) == len(page.of_class("whisker")) == 2
    assert page.of_class("dense")[0]["style"] == f"width:{100 * DENSE_A / (DENSE_A + GATE_A):.2f}%"
    pieces = [attributes for tag, attributes in page.seen if tag == "i" and "flex" in (attributes.get("style") or "")]
    assert [piece["title"] for piece in pieces] == ["full: 50%", "4/8 ch: 50%", "full: 50%", "3/6 ch: 50%"]
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?:|//|url\(|@import|\bsrc=|\bhref=", text)
    assert "$" not in text
    assert f"{DENSE_A:,}" in text and f"{DENSE_A + DENSE_B + HEAD:,}" in text


def test_html_escapes_names():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>&", DynamicConv2d(2, 2, 3))

        def forward(self, x):
            return self._modules["<b>&"](x)

    Odd.__name__ = "<script>alert(1)</script>"
    result = report(Odd(), torch.randn(1, 2, 4, 4), time=False)
    text = result.to_html()
    page = Page(text)
    assert page.open == [] and "script" not in {tag for tag, _ in page.seen}
    assert text.count("&lt;b&gt;&amp;") == 3  # the bar, its title, the table
    assert text.count("&lt;script&gt;") == 2  # the page's title, its headline
    assert "<b>&" in str(result)


def test_files(tmp_path):
    result = report(Tiny(), clips(), time=False)
    for write, name in ((result.to_json, "r.json"), (result.to_csv, "r.csv"), (result.to_html, "r.html")):
        (tmp_path / name).write_text("old")
        assert write(tmp_path / name) == (tmp_path / name).read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.html", "r.json"]
    for path in (tmp_path / "missing" / "r.json", tmp_path, tmp_path / "r.csv" / "r.json"):
        with pytest.raises(RedconvertError, match="cannot write"):
            result.to_json(path)


def test_text(monkeypatch):
    with forced(model := Tiny(), channel=[0, 1], temporal=[0, 0]):
        result = report(model, clips(), time=False)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = str(result)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines()[2:])) <= 100
    whole = format_count(result.executed_macs)
    assert f"{format_count(result.dense_macs)}MACs dense" in text and f"{whole}MACs executed" in text
    assert "full 50%, 4ch 50%" in text
    assert isinstance(result.table(), Table) and result.__rich__().row_count == 3
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were not installed
    plain = str(result)
    assert "full 50%, 4ch 50%" in plain and "(network)" in plain and "─" not in plain


def test_words_and_numbers():
    grouped = DynamicConv2d(8, 8, (3, 1), stride=2, dilation=(2, 1), groups=4)
    assert describe_conv(grouped) == "Conv2d 3x1, stride 2x2, dilation 2x1, groups 4"
    numbers = {0: "0", 999: "999", 999.4: "999", 1000: "1.00 k", 9_996: "10.0 k", 123_456: "123 k"}
    numbers |= {999_600: "1.00 M", 1_234_567: "1.23 M", 55.2e9: "55.2 G", 1.1e12: "1.10 T"}
    assert {value: format_count(value) for value in numbers} == numbers


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (iter(()), "batches is empty"),
        (7, "must be an iterable"),
        (["words"], "cannot read a batch of type str"),
        ([[]], "cannot read a batch of type empty list"),
        ([{"label": torch.ones(1)}], "only labels"),
    ],
)
def test_batches_that_are_none(batches, message):
    model = Tiny()
    with pytest.raises(RedconvertError, match=message):
        report(model, batches)
    assert model.training and model.norm.training


def test_refuses():
    with pytest.raises(RedconvertError, match="no dynamic layers"):
        report(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(RedconvertError, match="repeats=0"):
        report(Tiny(), clips(), repeats=0)


def test_leaves_the_network_as_it_was():
    model = Tiny()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    report(model, clips(), repeats=1)
    with pytest.raises(RedconvertError):
        report(model, [clips(), torch.ones(1, 2, 4, 6, 6)], time=False)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.a.observers == model.b.observers == ()
    assert torch.is_grad_enabled()


def test_progress(capsys):
    report(Tiny(), [clips()], time=False, progress=True)
    assert "\x1b" not in capsys.readouterr().err


def test_import_loads_neither_rich_nor_fvcore():
    code = "import sys, redconvert.cost; print([m for m in ('rich', 'fvcore', 'torchvision') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
