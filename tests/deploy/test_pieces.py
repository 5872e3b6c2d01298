"""Reduced convolutions piece by piece: the numbers of the whole, and no more memory than the dense network."""

from __future__ import annotations

import pytest
import torch
from deploy_networks import CHEAP
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import redconvert
from redconvert.deploy import pieces
from redconvert.deploy.pack import Filter, channels_last
from redconvert.deploy.taps import Reading
from redconvert.layers import Decision


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    extra=st.sampled_from([(0, 0), (0, 0), (1, 0), (2, -1), (0, 2)]),
    least=st.sampled_from([1, 3 * 4 * 16, 10 * 4 * 16, 10**6]),
    most=st.integers(1, 9),
)
def test_every_frame_is_made_once_from_what_it_reads(sizes, kernel, stride, padding, dilation, extra, least, most):
    """Against a convolution in time of the whole clips."""
    weight = torch.randn(4, 3, kernel, 1, 1)
    f = Filter(weight, None, (stride, 1, 1), (padding, 0, 0), (dilation, 1, 1))
    read = Reading(f, 1, sizes[1], *extra)
    x = channels_last(torch.randn(sizes[0], 3, sizes[1] + 10, 2, 2))
    seen = x[:, :, : x.shape[2] + min(extra[1], 0)]
    padded = F.pad(seen, (0, 0, 0, 0, extra[0], max(extra[1], 0)))
    wanted = F.conv3d(padded, weight, None, f.stride, f.padding, f.dilation)
    assert pieces.output_sizes(read, x) == (wanted.shape[0], *wanted.shape[2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LEAST", least)
        patch.setattr(pieces, "MOST", most)
        found = pieces.pieces(read, pieces.output_sizes(read, x), 4 * 4 * 4)
    out, times = torch.zeros_like(wanted), torch.zeros(wanted.shape[0], wanted.shape[2])
    for piece in found:
        piece.of(times).add_(1)
        part = piece.cut(seen)
        if piece.reads == slice(None):
            part = F.pad(part, (0, 0, 0, 0, extra[0] + padding, max(extra[1], 0) + padding))
        piece.of(out.transpose(1, 2)).copy_(F.conv3d(part, weight, None, f.stride, 0, f.dilation).transpose(1, 2))
    assert (times == 1).all()
    torch.testing.assert_close(out, wanted)


def test_how_many():
    """Each of LEAST bytes or more, MOST at most; clips stay whole where time is padded."""
    read = Reading(Filter(torch.zeros(8, 8, 3, 3, 3), None, (2, 1, 1), (0, 1, 1), (1, 1, 1)), 1, 32)
    frames = [(piece.frames, piece.reads) for piece in pieces.pieces(read, (1, 16, 7, 7), pieces.LEAST // 16)]
    assert frames == [(slice(0, 16), slice(0, 33))]
    frames = [(piece.frames, piece.reads) for piece in pieces.pieces(read, (1, 16, 56, 56), pieces.LEAST)]
    wanted = [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert frames == [(slice(*each), slice(2 * each[0], 2 * each[1] + 1)) for each in wanted]
    clips = pieces.pieces(read, (8, 16, 56, 56), pieces.LEAST // 8)  # 16 of 2^22 / 8 each: 16 MB, four times two clips
    assert [piece.samples for piece in clips] == [slice(n, n + 2) for n in (0, 2, 4, 6)]
    padded = Reading(Filter(torch.zeros(8, 8, 3, 3, 3), None, (1, 1, 1), (1, 1, 1), (1, 1, 1)), 1, 32)
    assert pieces.pieces(padded, (1, 32, 56, 56), pieces.LEAST) == [(slice(0, 1), slice(0, 32), slice(None))]
    samples = [piece.samples for piece in pieces.pieces(padded, (3, 32, 56, 56), pieces.LEAST)]
    assert samples == [slice(n, n + 1) for n in range(3)]


class Video(nn.Module):
    """Padded in time, strided, two taps of another dilation, a shortcut, and branches side by side."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 16, (5, 3, 3), (2, 1, 1), (2, 1, 1)), nn.BatchNorm3d(16), nn.ReLU())
        self.a = nn.Sequential(nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(16))
        self.b = nn.Sequential(
            nn.Conv3d(16, 24, 3, padding=(2, 1, 1), dilation=(2, 1, 1)), nn.BatchNorm3d(24), nn.SiLU()
        )
        self.c = nn.Sequential(nn.Conv3d(16, 8, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU())
        self.head = nn.Conv3d(32, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.a(x) + x)
        return self.head(torch.cat([self.b(x), self.c(x)], dim=1)).mean((2, 3, 4))


@pytest.mark.parametrize("options", CHEAP.values(), ids=CHEAP)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks(monkeypatch, options, samples, dtype):
    """Every decision, its frames copied or blended, with a gate that reads means: as in one piece."""
    x = torch.randn(samples, 3, 12, 9, 9).to(dtype)
    config = redconvert.ConvertConfig(min_saving=0, search_space=2, **options)
    dynamic = redconvert.convert(Video().eval(), config, example_inputs=x[:1].float())
    redconvert.calibrate(dynamic, [x.float()])
    dynamic = dynamic.to(dtype).eval()
    found, cuts = {}, []
    for least in (2**22, 1):
        monkeypatch.setattr(pieces, "LEAST", least)
        fast = redconvert.deploy(dynamic, x)
        for decision in ((0, 0), (1, 0), (0, 1), (1, 1)):
            with redconvert.forced(fast, channel=decision[0], temporal=decision[1]), torch.no_grad():
                found.setdefault(decision, []).append(fast(x))
        with torch.no_grad():
            found.setdefault("gates", []).append(fast(x))
        paths = [path for m in fast.modules() for path in getattr(m, "_paths", {}).values() if path is not None]
        cuts.append(max(len(parts) for path in paths for _, parts in path._known.values()))
    assert cuts[0] == 1 and cuts[1] > samples
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for whole, parts in found.values():
        torch.testing.assert_close(parts, whole, **tolerance)


def test_less_is_held(monkeypatch):
    """Besides input and result, of one piece at a time what is computed: counted in bytes that PyTorch allocates."""
    conv = nn.Conv3d(8, 32, (1, 3, 3), padding=(0, 1, 1), bias=False)
    net = nn.Sequential(conv, nn.BatchNorm3d(32), nn.ReLU(), nn.Conv3d(32, 4, 1)).eval()
    x = channels_last(torch.randn(1, 8, 16, 16, 16))
    config = redconvert.ConvertConfig(rules=[("0", {"cheap": "pointwise", "search_space": 2, "temporal": False})])
    fast = redconvert.deploy(redconvert.convert(net, config, example_inputs=x), x)
    unit = next(m for m in fast.modules() if hasattr(m, "decider"))
    made: list[int] = []
    for least in (2**22, 2**14):
        monkeypatch.setattr(pieces, "LEAST", least)
        unit._paths.clear()
        with torch.no_grad():
            unit.run(x, None, Decision(1, 0))
            path = next(iter(unit._paths.values()))
            real, seen = path.packed.__class__.__call__, []

            def watched(self, *given, real=real, seen=seen, **options):
                y = real(self, *given, **options)
                seen.append(y.numel() * y.element_size())
                return y

            with monkeypatch.context() as patch:
                patch.setattr(path.packed.__class__, "__call__", watched)
                unit.run(x, None, Decision(1, 0))
        made.append(max(seen))
    assert made[0] == 16 * 16 * 16 * 16 * 4 and made[1] == made[0] // 4
