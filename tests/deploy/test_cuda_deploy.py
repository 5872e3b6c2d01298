"""On a GPU: deployed networks give what the dynamic ones give, with Triton and without, in CUDA graphs and without."""

from __future__ import annotations

import itertools

import pytest
import torch
from deploy_networks import CHEAP, Image, Video, dynamic_from, undecided_gates

import redconvert
from redconvert.deploy import gpu_passes
from redconvert.deploy.bench import asked
from redconvert.deploy.engine import Deployed
from redconvert.deploy.gpu_forms import FUSED, GpuConv, _call, _is_right, bases_of
from redconvert.deploy.kernels import Assembly, Filling, GateLayers, max_pool
from redconvert.deploy.layouts import channels_last
from redconvert.deploy.pack import Filter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
DECISIONS = {"dense": (0, 0), "channels": (1, 0), "frames": (0, 1), "both": (1, 1), "mixed": ([0, 1, 1], [1, 0, 1])}


@pytest.fixture(autouse=True)
def exactly():
    """Float32 is float32, and no pass of Triton's fails unseen."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    gpu_passes._broken.clear()
    yield
    torch.backends.cudnn.allow_tf32 = before
    assert not gpu_passes._broken


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-6))


def on_gpu(make, x: torch.Tensor, dtype: torch.dtype, **options: object) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return dynamic_from(make(), x[:1], **options).to("cuda", dtype), x.to("cuda", dtype)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("blend_frames", [False, True])
@pytest.mark.parametrize("dtype", TYPES[:2])
def test_clips(dtype, blend_frames, absorb):
    dynamic, x = on_gpu(Video, torch.randn(3, 3, 7, 18, 18), dtype, blend_frames=blend_frames, absorb=absorb)
    fast = redconvert.deploy(dynamic, x)
    for name, (channel, temporal) in DECISIONS.items():
        with redconvert.forced(fast, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(x), dynamic(x)) < TOLERANCE[dtype], name
    with redconvert.disabled(fast), torch.no_grad():
        assert error(fast(x), dynamic(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("cheap", CHEAP)
def test_cheap_operations(cheap):
    for dtype in TYPES[:2]:
        dynamic, x = on_gpu(Video, torch.randn(3, 3, 6, 18, 18), dtype, **CHEAP[cheap])
        fast = redconvert.deploy(dynamic, check=False)
        for channel, temporal in DECISIONS.values():
            with redconvert.forced(fast, channel=channel, temporal=temporal), torch.no_grad():
                assert error(fast(x), dynamic(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_images(dtype):
    dynamic, x = on_gpu(Image, torch.randn(3, 3, 33, 33), dtype)
    fast = redconvert.deploy(dynamic, x)
    for channel in (0, 1, [0, 1, 1]):
        with redconvert.forced(fast, channel=channel), torch.no_grad():
            assert error(fast(x), dynamic(x)) < TOLERANCE[dtype]


def test_gates_decide():
    dynamic, x = on_gpu(Video, torch.randn(4, 3, 6, 18, 18), torch.float32)
    undecided_gates(dynamic)
    fast = redconvert.deploy(dynamic, x)
    with torch.no_grad():
        assert error(fast(x), dynamic(x)) < 1e-3


def test_without_triton(monkeypatch):
    monkeypatch.setattr(gpu_passes, "_installed", lambda: False)
    dynamic, x = on_gpu(Video, torch.randn(3, 3, 7, 18, 18), torch.float32, blend_frames=True)
    fast = redconvert.deploy(dynamic, x)
    for channel, temporal in DECISIONS.values():
        with redconvert.forced(fast, channel=channel, temporal=temporal), torch.no_grad():
            assert error(fast(x), dynamic(x)) < TOLERANCE[torch.float32]


# -- CUDA graphs ---------------------------------------------------------------------------------------


def replays(fast: Deployed, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with a number per replay."""
    from redconvert.deploy.graphs import Recording

    seen: list[int] = []
    original = Recording.__call__

    def spy(self, given):
        seen.append(len(seen))
        return original(self, given)

    monkeypatch.setattr(Recording, "__call__", spy)
    return seen


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("dtype", TYPES[:2])
def test_captured(dtype, absorb, monkeypatch):
    dynamic, x = on_gpu(Video, torch.randn(3, 3, 7, 18, 18), dtype, absorb=absorb, blend_frames=True)
    fast, seen = redconvert.deploy(dynamic), None
    plain = redconvert.deploy(dynamic)
    inputs = [torch.randn_like(x) for _ in range(3)]
    modes = {
        "dense": lambda: redconvert.disabled(fast),
        **{f"{i}{j}": (lambda i=i, j=j: asked(fast, i, j)) for i, j in itertools.product((0, 1), (0, 1))},
        "settled": lambda: redconvert.forced(fast, channel=1, temporal=0),
    }
    for mode in modes.values():
        with mode():
            assert fast.capture(x) is fast
    assert len(fast._captures) == len(modes)
    seen = replays(fast, monkeypatch)
    for name, mode in modes.items():
        with mode():  # of the network, which both share
            for each in inputs:
                assert error(fast(each), plain(each)) < TOLERANCE[dtype], name
    assert len(seen) == len(modes) * len(inputs)


def test_what_was_not_captured_runs_as_before(monkeypatch):
    dynamic, x = on_gpu(Video, torch.randn(4, 3, 6, 18, 18), torch.float32)
    fast = redconvert.deploy(dynamic, x)
    with redconvert.forced(fast, channel=1, temporal=0):
        fast.capture(x)
    seen = replays(fast, monkeypatch)
    undecided_gates(dynamic)
    fast_now = redconvert.deploy(dynamic)
    with torch.no_grad():
        for channel, temporal, given in ((0, 0, x), (1, 1, x), ([0, 1, 0, 1], 0, x), (1, 0, x[:2])):
            with redconvert.forced(dynamic, channel=channel, temporal=temporal):
                assert error(fast(given), dynamic(given)) < 1e-3
        assert not seen
        assert error(fast_now(x), dynamic(x)) < 1e-3  # gates that decide
        with redconvert.forced(fast, channel=1, temporal=0):
            first = fast(x)
            kept = first.clone()
            fast(torch.randn_like(x))
            assert len(seen) == 2 and torch.equal(first, kept)  # results are their callers'
            with redconvert.layers.observed(fast.network, lambda *_: None):
                fast(x)
            assert len(seen) == 2


def test_thresholds_move_after_capture(monkeypatch):
    dynamic, x = on_gpu(Video, torch.randn(2, 3, 6, 18, 18), torch.float32)
    fast = redconvert.deploy(dynamic, x).capture(x)  # at birth all gates are open, whatever they read
    seen = replays(fast, monkeypatch)
    with torch.no_grad():
        assert error(fast(x), dynamic(x)) < 1e-4 and len(seen) == 1
        for layer in redconvert.layers.dynamic_layers(dynamic).values():
            layer.gate.threshold.fill_(100.0)  # now none is: the last candidate
        assert error(fast(x), dynamic(x)) < 1e-4 and len(seen) == 1
        fast.capture(x)
        assert error(fast(x), dynamic(x)) < 1e-4 and len(seen) == 2
        for layer in redconvert.layers.dynamic_layers(dynamic).values():
            layer.gate.threshold.zero_()
    undecided_gates(dynamic)
    with pytest.raises(redconvert.RedconvertError, match="decides by its input"):
        redconvert.deploy(dynamic).capture(x)


# -- forms and passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)])
def test_forms(kernel, dtype):
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    for C_in, C_out in ((16, 32), (13, 23)):
        weight = torch.randn(C_out, C_in, *kernel, device="cuda") / C_in**0.5
        filter = Filter(weight, torch.randn(C_out, device="cuda"), (1, 1, 1), padding, (1, 1, 1)).to(dtype)
        x = channels_last(torch.randn(2, C_in, 5, 8, 6, device="cuda", dtype=dtype))
        plain = torch.nn.functional.conv3d(x.float(), filter.weight.float(), filter.bias.float(), 1, padding)
        residual = channels_last(torch.randn_like(plain).to(dtype))
        for other, activation in itertools.product((None, residual), ("none", "relu", "swish")):
            conv = GpuConv(filter, bases_of(filter, images=False))
            wanted = plain if other is None else plain + other.float()
            wanted = {"none": wanted, "relu": wanted.relu(), "swish": torch.nn.functional.silu(wanted)}[activation]
            found = conv(x, other, activation)
            assert conv.form is not None and error(found, wanted.to(dtype)) < TOLERANCE[dtype]
            for form in conv.bases:
                assert error(conv.run(form, x, other, activation), wanted.to(dtype)) < TOLERANCE[dtype], form


def test_fused_forms_run_in_half_precision():
    """Those of cuDNN and cuBLAS are no public functions: where none runs any more, deployment is slower, not wrong."""
    for kernel in ((1, 3, 3), (3, 1, 1), (1, 1, 1)):
        weight = torch.randn(64, 64, *kernel, device="cuda", dtype=torch.float16) / 24
        filter = Filter(weight, None, (1, 1, 1), tuple(k // 2 for k in kernel), (1, 1, 1))
        x = channels_last(torch.randn(2, 64, 4, 28, 28, device="cuda", dtype=torch.float16))
        for residual in (None, x):
            conv = GpuConv(filter, bases_of(filter, images=False))
            wanted = conv.run("conv", x, residual, "relu")
            calls = {form: _call(conv, form, x, residual, "relu") for form in conv.forms(residual is not None, "relu")}
            fused = [form for form, call in calls.items() if form.endswith(FUSED) and _is_right(call, wanted, True)]
            print(kernel, residual is not None, fused)
            assert fused


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (4, 8, 14, 14)])
def test_passes(shape, dtype):
    torch.manual_seed(0)

    def some(*size: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*size, device="cuda").to(kind)

    for kept, dropped, relu in ((1, 2, True), (9, 6, False), (64, 66, True)):
        channels = kept + dropped
        source = torch.randperm(channels, device="cuda")
        y, z, r = (some(*shape, c, kind=dtype) for c in (kept, dropped, channels))
        for product in (None, some(dropped, kept, kind=dtype) / kept**0.5):
            if product is not None and dtype == torch.float32:
                continue
            assembly = Assembly.build(source, some(channels), some(channels), kept, product)
            given = (y, z if product is None else None, r, relu)
            wide = [None if each is None else each.float() for each in given[:3]]
            found = assembly(*given)
            product_wide = None if product is None else product.float()
            exact = Assembly.build(source, assembly.scale, assembly.shift, kept, product_wide)
            assert error(found, exact.in_pytorch(*wide, relu).to(dtype)) < TOLERANCE[dtype]
            room = torch.full((*shape, channels + 5), 7.0, device="cuda", dtype=dtype)
            assert torch.equal(assembly(*given, None, room[..., 2:-3]), found)
            assert torch.equal(room[..., 2:-3], found) and (room[..., :2] == 7).all() and (room[..., -3:] == 7).all()
        filling = Filling(some(4, 2, kept), some(4, kept))
        frames = 4 * shape[1] - 1
        other = some(shape[0], frames, *shape[2:], kept, kind=dtype)
        exact_frames = filling.in_pytorch(y.float(), frames, other.float(), relu).to(dtype)
        assert error(filling(y, frames, other, relu), exact_frames) < TOLERANCE[dtype]
        layers = GateLayers(some(shape[1] * kept, 16), some(16), some(16, 4), some(4))
        hidden = torch.tanh(y.float().flatten(2, 3).mean(2).flatten(1) @ layers.w1 + layers.b1)
        assert error(layers(y), hidden @ layers.w2 + layers.b2) < 1e-3
        padded = torch.nn.functional.pad(y.float().permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 1, 1), value=-torch.inf)
        pooled = torch.nn.functional.max_pool3d(padded, 3, 2).permute(0, 2, 3, 4, 1).to(dtype)
        assert torch.equal(max_pool(y, (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)), pooled)
