"""What a GPU's forms of a convolution compute, and what is said where there is no GPU: on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from deploy_networks import Video, dynamic_from, undecided_gates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import redconvert
from redconvert.deploy import gpu_forms
from redconvert.deploy.gpu_forms import FUSED, GpuConv, bases_of
from redconvert.deploy.layouts import channels_last
from redconvert.deploy.pack import Filter, PackedConv


@pytest.mark.parametrize("activation", ["none", "relu", "swish"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)])
def test_every_form_is_the_convolution(kernel, bias, residual, activation):
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    filter = Filter(torch.randn(7, 5, *kernel), torch.randn(7) if bias else None, (1, 1, 1), padding, (1, 1, 1))
    bases = bases_of(filter, images=False)
    conv = GpuConv(filter, bases)
    x = channels_last(torch.randn(2, 5, 3, 6, 4))
    wanted = F.conv3d(x, filter.weight, filter.bias, 1, padding)
    other = channels_last(torch.randn_like(wanted)) if residual else None
    wanted = wanted if other is None else wanted + other
    wanted = {"none": wanted, "relu": wanted.relu(), "swish": F.silu(wanted)}[activation]
    forms = conv.forms(residual, activation)
    assert (len(forms) > len(bases)) == (activation == "relu")
    for form in forms:
        if form.endswith(FUSED) and not form.startswith("rows"):
            continue  # cuDNN's
        found = conv.run(form, x, other, activation)
        assert torch.allclose(found, wanted, atol=1e-4), form
        assert found.stride() == channels_last(wanted).stride()


def test_strides_and_images():
    torch.manual_seed(0)
    for kernel, stride in (
        ((1, 3, 3), (1, 2, 2)),
        ((1, 3, 3), (2, 1, 1)),
        ((3, 1, 1), (2, 1, 1)),
        ((1, 1, 1), (2, 2, 2)),
        ((3, 3, 3), (2, 2, 2)),
    ):
        padding = tuple(k // 2 for k in kernel)
        filter = Filter(torch.randn(7, 5, *kernel), None, stride, padding, (1, 1, 1))
        x = channels_last(torch.randn(2, 5, 5, 7, 6))
        for form in bases_of(filter, images=False):
            wanted = F.conv3d(x, filter.weight, None, stride, padding)
            assert torch.allclose(GpuConv(filter, [form]).run(form, x, None, "none"), wanted, atol=1e-4), form
    filter = Filter(torch.randn(7, 5, 1, 3, 3), None, (1, 2, 2), (0, 1, 1), (1, 1, 1))
    x = channels_last(torch.randn(2, 5, 1, 7, 6))
    found = GpuConv(filter, bases_of(filter, images=True)).run("frames", x, None, "none")
    assert torch.allclose(found, F.conv3d(x, filter.weight, None, (1, 2, 2), (0, 1, 1)), atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(1, 7)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(0, 3)] * 3),
    st.tuples(*[st.integers(7, 12)] * 3),
    st.integers(1, 4),
)
def test_blocks_are_the_convolution(kernel, stride, padding, size, channels):
    """Any kernel, stride and padding, also where positions at the end are read by nobody."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    x = channels_last(torch.randn(2, channels, *size, **options))
    weight, bias = torch.randn(5, channels, *kernel, **options), torch.randn(5, **options)
    filter = Filter(weight, bias, stride, padding, (1, 1, 1))
    assert ("blocks" in bases_of(filter, images=False)) == (max(stride) > 1)
    wanted = F.conv3d(x, weight, bias, stride, padding)
    found = GpuConv(filter, ["blocks"]).run("blocks", x, None, "none")
    torch.testing.assert_close(found, wanted)
    assert found.stride() == channels_last(wanted).stride()


def test_a_form_that_fails_or_is_wrong_is_no_candidate():
    def fails() -> torch.Tensor:
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    wanted = torch.ones(3)
    assert not gpu_forms._is_right(fails, wanted, True)
    assert not gpu_forms._is_right(lambda: wanted * 1.1, wanted, True)
    assert not gpu_forms._is_right(lambda: wanted * float("nan"), wanted, True)
    assert gpu_forms._is_right(lambda: wanted * 1.001, wanted, True)


def test_forms_of_a_gpu_are_timed_anew_on_a_cpu(tmp_path):
    x = torch.randn(1, 3, 4, 9, 9)
    fast = redconvert.deploy(dynamic_from(Video(), x), x)
    fast.save(tmp_path)
    forms = {unit: dict.fromkeys(each, "conv fused") for unit, each in fast.forms().items()}
    (tmp_path / "deploy.json").write_text(json.dumps(forms))
    again = redconvert.deploy(fast.network, x, forms=tmp_path)
    assert torch.allclose(again(x), fast(x), atol=1e-5)
    assert not any(form.endswith(FUSED) for each in again.forms().values() for form in each.values())


@pytest.mark.parametrize("form", ["rows", "line", "frames fused"])
def test_a_form_that_a_cpu_has_not_for_this_stride(form):
    torch.manual_seed(0)
    filter = Filter(torch.randn(16, 16, 1, 1, 1), None, (2, 2, 2), (0, 0, 0), (1, 1, 1))
    x = channels_last(torch.randn(1, 16, 4, 8, 8))
    packed = PackedConv(filter, form)
    assert torch.allclose(packed(x), F.conv3d(x, filter.weight, None, 2), atol=1e-4)
    assert packed.form in packed.forms()


def test_no_graphs_on_a_cpu_nor_of_decisions_that_the_input_makes():
    x = torch.randn(1, 3, 4, 9, 9)
    fast = redconvert.deploy(dynamic_from(Video(), x), x)
    with (
        redconvert.disabled(fast),
        pytest.raises(redconvert.RedconvertError, match="need a network and inputs on a GPU"),
    ):
        fast.capture(x)
    undecided_gates(fast.network)
    fast = redconvert.deploy(fast.network)
    with pytest.raises(redconvert.RedconvertError, match=r"gate of layer '.*' decides by its input"):
        fast.capture(x)
    with redconvert.forced(fast, channel=1), pytest.raises(redconvert.RedconvertError, match="decides by its input"):
        fast.capture(x)
    with redconvert.forced(fast, channel=[1], temporal=0), pytest.raises(redconvert.RedconvertError, match="decides"):
        fast.capture(x)
    handle = fast.units["unit0"].register_forward_hook(lambda *_: None)
    with redconvert.disabled(fast), pytest.raises(redconvert.RedconvertError, match="has hooks"):
        fast.capture(x)
    handle.remove()


def test_gates_that_nobody_follows_are_not_read(monkeypatch):
    from redconvert.deploy.bench import asked
    from redconvert.deploy.gate import FoldedGate

    x = torch.randn(2, 3, 4, 9, 9)
    fast = redconvert.deploy(dynamic_from(Video(), x[:1]), x[:1])
    reads = []
    original = FoldedGate.__call__

    def spy(self, x, sources=None, read=True):
        reads.append(read)
        return original(self, x, sources, read)

    monkeypatch.setattr(FoldedGate, "__call__", spy)
    with redconvert.forced(fast, channel=1, temporal=1):
        wanted = fast(x)
    assert not reads
    with asked(fast, 1, 1):
        found = fast(x)
    assert reads and not any(reads) and torch.equal(found, wanted)
    with redconvert.forced(fast, channel=1):
        fast(x)
    assert any(reads)
