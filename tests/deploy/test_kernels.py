"""The C passes and their twins in PyTorch: the same numbers, in float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from redconvert.deploy import kernels
from redconvert.deploy.kernels import Assembly, Filling

TYPES = [torch.float32, torch.bfloat16]
sizes = st.integers(1, 5)


@pytest.fixture(scope="module", autouse=True)
def needs_a_compiler():
    if kernels.compiled() is None:
        pytest.skip("no C compiler: PyTorch alone serves, tested in test_deploy.py")


def in_place(call, residual: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    """Whether ``call(residual, into)`` gives the same to the bit where the result takes the residual's place."""
    if residual is None:
        return True
    place = residual.clone()
    found = call(place, place)
    return found.data_ptr() == place.data_ptr() and torch.equal(found, wanted)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    tolerance = 1e-5 if found.dtype == torch.float32 else 0.05
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@given(
    st.integers(1, 40),
    st.integers(0, 40),
    sizes,
    sizes,
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_assembly(dtype, kept, rebuilt, frames, width, relu, with_residual, random):
    torch.manual_seed(random.randrange(1000))
    channels = random.randint(1, 60)
    shape = (2, frames, 3, width)
    y = torch.randn(*shape, kept, dtype=dtype)
    z = torch.randn(*shape, rebuilt, dtype=dtype) if rebuilt else None
    source = torch.randint(0, kept + rebuilt, (channels,))
    if random.random() < 0.5:  # runs, as without a channel order
        source = torch.arange(channels) % (kept + rebuilt)
    assembly = Assembly.build(source, torch.randn(channels), torch.randn(channels), kept)
    residual = torch.randn(*shape, channels, dtype=dtype) if with_residual else None
    ours, theirs = torch.zeros(2, frames, channels), torch.zeros(2, frames, channels)
    found = assembly(y, z, residual, relu, ours)
    wanted = assembly.in_pytorch(y, z, residual, relu)
    assert found.dtype == dtype and close(found, wanted)
    again = torch.zeros_like(ours)
    assert in_place(lambda added, into: assembly(y, z, added, relu, again, into), residual, found)
    assert residual is None or torch.allclose(again, ours, rtol=1e-6, atol=1e-6)  # threads add in any order
    theirs += wanted.flatten(2, 3).float().mean(2)
    assert torch.allclose(ours, theirs, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 23), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_assembly_with_a_product(dtype, kept, dropped, width, relu, with_residual):
    """Phi_c in the same pass: rows beyond a multiple of what is taken at once, odd channels, bfloat16."""
    torch.manual_seed(kept)
    order, shape = torch.randperm(kept + dropped), (2, 2, 1, width)
    phi = torch.randn(dropped, kept) / kept**0.5
    assembly = Assembly.build(order, torch.randn(len(order)), torch.randn(len(order)), kept, phi)
    y = torch.randn(*shape, kept, dtype=dtype)
    residual = torch.randn(*shape, len(order), dtype=dtype) if with_residual else None
    ours = torch.zeros(2, 2, len(order))
    found = assembly(y, None, residual, relu, ours)
    rebuilt = (y.double() @ phi.double().T).to(dtype)
    x = torch.cat([y, rebuilt], dim=-1)[..., order].float() * assembly.scale + assembly.shift
    x = x if residual is None else x + residual.float()
    assert close(found, (x.relu() if relu else x).to(dtype))
    assert in_place(lambda added, into: assembly(y, None, added, relu, None, into), residual, found)
    assert close(assembly.in_pytorch(y, None, residual, relu), found)
    assert torch.allclose(ours, found.float().mean((2, 3)), atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_filling(dtype, stride, held, channels, relu, with_residual):
    torch.manual_seed(held)
    y = torch.randn(2, held, 3, 2, channels, dtype=dtype)
    filling = Filling(torch.randn(stride, 2, channels), torch.randn(stride, channels))
    for num_frames in range((held - 1) * stride + 1, held * stride + 1):  # the last group may be shorter
        residual = torch.randn(2, num_frames, 3, 2, channels, dtype=dtype) if with_residual else None
        pooled = torch.zeros(2, num_frames, channels)
        found = filling(y, num_frames, residual, relu, pooled)
        assert close(found, filling.in_pytorch(y, num_frames, residual, relu))
        assert torch.allclose(pooled, found.float().mean((2, 3)), atol=1e-2)
        assert in_place(lambda added, into, n=num_frames: filling(y, n, added, relu, None, into), residual, found)


def test_copies_are_copies():
    y = torch.randn(1, 3, 2, 2, 5)
    found = Filling.copies(2, y)(y, 5, None, relu=False)
    assert torch.equal(found, y.repeat_interleave(2, dim=1)[:, :5])


@pytest.mark.parametrize("dtype", TYPES)
@given(st.tuples(sizes, sizes, sizes), st.tuples(sizes, sizes, sizes), st.integers(1, 70), st.booleans())
@settings(max_examples=60, deadline=None)
def test_max_pool(dtype, kernel, stride, channels, zeros_outside):
    torch.manual_seed(channels)
    x = torch.randn(2, 6, 7, 5, channels, dtype=dtype)
    x[0, 2, 3, 1, 0] = float("nan")
    before, after = tuple(k // 2 for k in kernel), tuple((k - 1) // 2 for k in kernel)
    outside = 0.0 if zeros_outside else -float("inf")
    found = kernels.max_pool(x, kernel, stride, before, after, outside)
    pads = [amount for pair in zip(before[::-1], after[::-1], strict=True) for amount in pair]
    wanted = F.max_pool3d(F.pad(x.permute(0, 4, 1, 2, 3), pads, value=outside), kernel, stride).permute(0, 2, 3, 4, 1)
    assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("frames", "channels", "hidden"), [(1, 5, 16), (9, 130, 16), (3, 64, 7)])
def test_gate(dtype, frames, channels, hidden):
    x = torch.randn(3, frames, 5, 7, channels, dtype=dtype)
    first = torch.randn(frames * channels, hidden), torch.randn(hidden)
    second = torch.randn(hidden, 4), torch.randn(4)
    found = kernels.GateLayers(*first, *second)(x)
    pooled = x.float().flatten(2, 3).mean(2)
    wanted = torch.tanh(pooled.flatten(1) @ first[0] + first[1]) @ second[0] + second[1]
    assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(kernels.GateLayers(*first, *second)(x, pooled), wanted, atol=1e-4)


def test_rounding_to_bfloat16_is_pytorchs():
    values = torch.cat([torch.randn(500) * 10.0**e for e in range(-30, 30, 7)]).float()
    values = torch.cat([values, torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])])
    x = values.view(1, 1, 1, -1, 1).bfloat16()
    assembly = Assembly.build(torch.zeros(1, dtype=torch.long), torch.full((1,), 1.7), torch.zeros(1), 1)
    found, wanted = assembly(x, None, None, relu=False), (x.float() * 1.7).bfloat16()
    assert torch.equal(found.nan_to_num(1e9), wanted.nan_to_num(1e9))
