"""The Triton kernels compute what the eager layer does, and no tile more; in Triton's interpreter, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import redconvert
from redconvert.deploy.decide import Batch
from redconvert.deploy.pack import Filter
from redconvert.deploy.triton_conv import TritonUnit, device_decisions, serves
from redconvert.deploy.unit import Unit

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
CHANNEL, TEMPORAL = [0, 1, 1, 0], [0, 0, 1, 1]


def test_decisions_are_the_first_open_candidates_else_the_last():
    z = torch.tensor([[1.0, 2, -1, 3], [-1, -1, 0, 0], [-1, 1, 1, -1]])
    channel, temporal = device_decisions(z, 2)
    assert channel.tolist() == [1, 1, 0] and temporal.tolist() == [0, 1, 1]
    assert device_decisions(z, 0)[1].tolist() == [0, 0, 0]


def test_importing_redconvert_leaves_triton_alone():
    module = "redconvert.deploy.triton_kernels"
    code = f"import sys, redconvert, redconvert.deploy.triton_conv; assert {module!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    root = Path(__file__).parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    found = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def check(kernel: int, stride: int, cheap: str, blend: bool, relu: bool, dtype: torch.dtype = torch.float32) -> None:
    """One layer against the eager one; what was not computed is still NaN, and leaked nowhere."""
    torch.manual_seed(0)
    config = redconvert.LayerConfig(cheap=cheap)
    pad = kernel // 2
    geometry = ((1, kernel, kernel), (1, stride, stride), (0, pad, pad))
    layer = redconvert.DynamicConv3d(5, 35, *geometry, config=config, gate_frames=5).eval()
    for p in [*layer.cheap_c.parameters(), *(layer.cheap_t.parameters() if blend else ())]:
        torch.nn.init.normal_(p, std=0.3)
    layer.cheap_c.set_order(torch.randperm(35))
    scale, shift = torch.rand(35) + 0.5, torch.randn(35)
    f = Filter(layer.weight.detach(), layer.bias.detach(), *geometry[1:], (1, 1, 1))
    unit = Unit(layer, f, (scale, shift), "relu" if relu else "none", Batch())
    assert serves(unit)
    x = torch.randn(4, 5, 5, 5, 7)
    with redconvert.forced(layer, channel=CHANNEL, temporal=TEMPORAL), torch.no_grad():
        y = layer(x)
    residual = torch.randn_like(y) if relu else None
    wanted = y * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
    wanted = (wanted + residual).relu() if relu else wanted
    scratch = torch.full((4, 5, *y.shape[3:], 35), float("nan"), dtype=dtype)
    found = TritonUnit(unit)(
        x.to(dtype),
        torch.tensor(CHANNEL),
        torch.tensor(TEMPORAL),
        None if residual is None else residual.to(dtype),
        scratch,
    )
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < TOLERANCE[dtype], (kernel, stride, cheap, blend, error)
    for n, (i, j) in enumerate(zip(CHANNEL, TEMPORAL, strict=True)):
        computed = torch.zeros(scratch.shape[1:], dtype=torch.bool)
        computed[:: layer.candidates.strides[j], ..., : layer.candidates.channels[i]] = True
        assert torch.equal(~scratch[n].isnan(), computed), (n, i, j)


if __name__ == "__main__":
    check(1, 1, "scale", False, True)
    check(3, 1, "pointwise", False, False)
    check(1, 2, "pointwise", True, True)
    check(3, 2, "scale", True, False)
    check(3, 1, "pointwise", True, True, torch.float16)
