"""Convolving the frames that are held gives what the convolution of the whole clip gives."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from redconvert.deploy.pack import Filter, PackedConv, channels_last
from redconvert.deploy.taps import out_frames, reading


@given(
    taps=st.integers(1, 7),
    stride=st.integers(1, 3),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 2),
    skip=st.sampled_from([1, 2, 4]),
    held=st.sampled_from([1, 2, 4]),
    num_frames=st.integers(1, 17),
)
@settings(max_examples=300, deadline=None)
def test_reading(taps, stride, padding, dilation, skip, held, num_frames):
    torch.manual_seed(0)
    weight = torch.randn(3, 2, taps, 1, 1, dtype=torch.float64)
    filter = Filter(weight, None, (stride, 1, 1), (padding, 0, 0), (dilation, 1, 1))
    assume(num_frames + 2 * padding >= dilation * (taps - 1) + 1)
    computed = torch.randn(1, 2, -(-num_frames // held), 2, 2, dtype=torch.float64)
    clip = computed.repeat_interleave(held, dim=2)[:, :, :num_frames]
    found = reading(filter, skip, num_frames, held, keeps=True)
    whole = F.conv3d(clip, weight, None, (stride, 1, 1), (padding, 0, 0), (dilation, 1, 1))
    assert whole.shape[2] == out_frames(filter, num_frames)
    if found is None:  # asks for all frames
        assert held > 1
        return
    assert found.num_frames == whole.shape[2] and found.stride % skip == 0
    y = PackedConv(found.filter)(found.padded(channels_last(computed)))
    wanted = whole[:, :, :: found.stride]
    assert torch.allclose(y, wanted, atol=1e-12)
    # What is not held is a copy of what is: of the layer's own skipped frames, or because the input's are copies.
    kept = whole[:, :, ::skip].repeat_interleave(skip, dim=2)[:, :, : found.num_frames]
    assert torch.allclose(y.repeat_interleave(found.stride, dim=2)[:, :, : found.num_frames], kept, atol=1e-12)


def test_three_taps_over_pairs_are_two():
    weight = torch.arange(1.0, 4.0).view(1, 1, 3, 1, 1)
    found = reading(Filter(weight, None, (1, 1, 1), (1, 0, 0), (1, 1, 1)), 2, 8, 2, keeps=True)
    assert found.filter.weight.flatten().tolist() == [1.0, 5.0]
    assert (found.stride, found.before, found.after) == (2, 1, 0)


def test_forms_agree():
    torch.manual_seed(0)
    for kernel, stride, padding in (
        ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        ((3, 1, 1), (2, 1, 1), (1, 0, 0)),
        ((1, 1, 1),) * 2 + ((0, 0, 0),),
    ):
        x = channels_last(torch.randn(2, 12, 8, 9, 7))
        weight, bias = torch.randn(20, 12, *kernel), torch.randn(20)
        wanted = F.conv3d(x, weight, bias, stride, padding)
        residual = channels_last(torch.randn_like(wanted))
        packed = PackedConv(Filter(weight, bias, stride, padding, (1, 1, 1)))
        assert ("rows" in packed.forms()) == (kernel == (1, 1, 1))
        for form in packed.forms():
            packed.form = form
            assert torch.allclose(packed(x), wanted, atol=1e-4)
            assert torch.allclose(packed(x, residual, "relu"), (wanted + residual).relu(), atol=1e-4)
            copy = residual.clone(memory_format=torch.preserve_format)
            assert torch.allclose(packed(x, copy, "relu", True), (wanted + residual).relu(), atol=1e-4)
