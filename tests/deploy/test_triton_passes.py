"""Triton's passes give what PyTorch's give, in Triton's interpreter on a CPU: odd channels, frames, one position."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from redconvert.deploy import gpu_passes
from redconvert.deploy.kernels import Assembly, Filling, GateLayers

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def test_passes_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    root = Path(__file__).parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    found = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


SIGNATURES = {  # pointers to what is of the clip's type, pointers to other types, numbers known when compiled
    "bias_residual_relu": ("y residual out", {"bias": "*fp32"}, {"BIAS": True, "BLOCK": 1024}),
    "assemble": (
        "computed rebuilt residual out",
        {"source": "*i32", "scale": "*fp32", "shift": "*fp32"},
        {"REBUILT": True, "BP": 32, "BC": 64},
    ),
    "mix": ("computed matrix residual out", {"shift": "*fp32"}, {"STEPS": 5, "BP": 128, "BC": 128, "BK": 64}),
    "fill": ("y residual out", {"weight": "*fp32", "bias": "*fp32"}, {"R": 4, "BLOCK": 1024}),
    "max_pool": ("x out", {"outside": "fp32"}, {"KT": 3, "KH": 3, "KW": 3, "BP": 32, "BC": 64}),
    "gate_sums": ("x", {"w1": "*fp32", "sums": "*fp32"}, {"STEPS": 8, "HIDDEN": 16, "BP": 64, "BC": 64}),
    "gate_output": (
        "",
        dict.fromkeys(("sums", "b1", "w2", "b2", "z"), "*fp32"),
        {"STEPS": 3, "HIDDEN": 16, "OUTS": 4, "BP": 64},
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile_for_a_gpu_that_is_not_here(name):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from redconvert.deploy import triton_passes

    kernel, (typed, others, constants) = getattr(triton_passes, name), SIGNATURES[name]
    flags = {flag: True for flag in ("RESIDUAL", "RELU") if flag in kernel.arg_names}
    known = constants | flags
    for kind in ("fp16", "fp32") if name != "mix" else ("fp16", "bf16"):
        given = dict.fromkeys(typed.split(), f"*{kind}") | others | dict.fromkeys(known, "constexpr")
        signature = {argument: given.get(argument, "i32") for argument in kernel.arg_names}
        even = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
        found = triton.compile(ASTSource(kernel, signature, known, even), target=GPUTarget("cuda", 90, 32))
        assert found.asm["cubin"] and found.metadata.shared < 200_000


def test_a_kernel_that_does_not_run_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(gpu_passes, "_broken", set())
    calls = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        raise ValueError("no such instruction")

    with pytest.warns(UserWarning, match="'a pass' does not run here.*no such instruction"):
        assert gpu_passes.attempt("a pass", fails, torch.ones(1)) is None
    assert gpu_passes.attempt("a pass", fails, torch.ones(1)) is None
    assert len(calls) == 1


def test_the_matrix_of_an_assembly_is_the_assembly():
    torch.manual_seed(0)
    product, order = torch.randn(6, 5), torch.randperm(11)
    assembly = Assembly.build(order, torch.randn(11), torch.randn(11), 5, product)
    x = torch.randn(2, 3, 2, 2, 5)
    assert torch.allclose(x @ assembly.matrix + assembly.shift, assembly.in_pytorch(x, None, None, False), atol=1e-5)


def close(found: torch.Tensor, wanted: torch.Tensor, what: object) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, what
    error = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-3))
    assert error < TOLERANCE[found.dtype], (what, error)


def check_bias(dtype: torch.dtype, shape: tuple[int, ...], bias: bool, residual: bool, relu: bool) -> None:
    y, b = torch.randn(shape, dtype=dtype), torch.randn(shape[-1]) if bias else None
    added = torch.randn(shape, dtype=dtype) if residual else None
    wanted = y.float() + (0 if b is None else b) + (0 if added is None else added.float())
    wanted = (wanted.relu() if relu else wanted).to(dtype)
    close(gpu_passes.bias_residual_relu(y, b, added, relu), wanted, ("bias", dtype, shape))


def check_assembly(
    dtype: torch.dtype, shape: tuple[int, ...], kept: int, dropped: int, channels: int, residual: bool, apart: bool
) -> None:
    source = torch.randint(0, kept + dropped, (channels,))
    assembly = Assembly.build(source, torch.randn(channels), torch.randn(channels), kept)
    computed = torch.randn(*shape, kept, dtype=dtype)
    rebuilt = torch.randn(*shape, dropped, dtype=dtype) if dropped else None
    added = torch.randn(*shape, channels, dtype=dtype) if residual else None
    room = torch.full((*shape, channels + 7), float("nan"), dtype=dtype)
    out = room[..., 3 : 3 + channels] if apart else torch.empty(*shape, channels, dtype=dtype)
    table = (assembly.source, assembly.scale, assembly.shift)
    gpu_passes.assemble(computed, rebuilt, added, residual, out, table)
    wide = [None if each is None else each.float() for each in (computed, rebuilt, added)]
    close(out, assembly.in_pytorch(*wide, residual).to(dtype), ("assemble", dtype, shape, kept, dropped, channels))
    assert room[..., :3].isnan().all() and room[..., 3 + channels :].isnan().all()


def check_mix(dtype: torch.dtype, shape: tuple[int, ...], kept: int, channels: int, residual: bool) -> None:
    product = torch.randn(channels - kept, kept)
    order = torch.randperm(channels)
    assembly = Assembly.build(order, torch.rand(channels), torch.randn(channels), kept, product)
    computed = torch.randn(*shape, kept, dtype=dtype)
    added = torch.randn(*shape, channels, dtype=dtype) if residual else None
    out = torch.empty(*shape, channels, dtype=dtype)
    gpu_passes.mix(computed, assembly.matrix.to(dtype), added, residual, out, assembly.shift)
    wanted = assembly.in_pytorch(computed.float(), None, None if added is None else added.float(), residual)
    close(out, wanted.to(dtype), ("mix", dtype, shape, kept, channels))


def check_fill(
    dtype: torch.dtype, shape: tuple[int, ...], frames: int, stride: int, residual: bool, relu: bool
) -> None:
    C = shape[-1]
    filling = Filling(torch.randn(stride, 2, C), torch.randn(stride, C))
    y = torch.randn(shape, dtype=dtype)
    added = torch.randn(shape[0], frames, *shape[2:], dtype=dtype) if residual else None
    found = gpu_passes.fill(y, filling.weight, filling.bias, frames, added, relu)
    wanted = filling.in_pytorch(y.float(), frames, None if added is None else added.float(), relu)
    close(found, wanted.to(dtype), ("fill", dtype, shape, frames, stride))


def check_pool(kernel: tuple[int, int, int], stride: tuple[int, int, int], before: tuple[int, int, int], zero: bool):
    x, outside = torch.randn(2, 5, 6, 7, 9), 0.0 if zero else -math.inf
    padded = F.pad(
        x.permute(0, 4, 1, 2, 3), [p for size in before[::-1] for p in (size, size + (size > 0))], value=outside
    )
    wanted = F.max_pool3d(padded, kernel, stride).permute(0, 2, 3, 4, 1)
    found = gpu_passes.max_pool(x, kernel, stride, before, list(wanted.shape[1:4]), outside)
    close(found, wanted, ("pool", kernel))


def check_gate(dtype: torch.dtype, shape: tuple[int, ...], hidden: int, outs: int, apart: bool) -> None:
    x = (
        torch.randn(*shape[:4], shape[4] + 3, dtype=dtype)[..., 1 : 1 + shape[4]]
        if apart
        else torch.randn(shape).to(dtype)
    )
    stride = gpu_passes.row_stride(x)
    assert stride == shape[4] + 3 * apart
    layers = GateLayers(torch.randn(shape[1] * shape[4], hidden), *map(torch.randn, (hidden, (hidden, outs), outs)))
    found = gpu_passes.gate(x, stride, layers.w1, layers.b1, layers.w2, layers.b2)
    pooled = x.float().flatten(2, 3).mean(2)
    wanted = torch.tanh(pooled.flatten(1) @ layers.w1 + layers.b1) @ layers.w2 + layers.b2
    close(found, wanted, ("gate", dtype, shape))


def test_the_distance_of_positions():
    x = torch.zeros(2, 3, 4, 5, 6)
    assert gpu_passes.row_stride(x) == 6 and gpu_passes.row_stride(x[..., :2]) == 6
    assert gpu_passes.row_stride(x[:, :2]) is None and gpu_passes.row_stride(x[:, :, :, 1:]) is None


def main() -> None:
    torch.manual_seed(0)
    for dtype in TOLERANCE:
        check_bias(dtype, (2, 3, 4, 5, 7), True, True, True)
        check_bias(dtype, (1, 1, 30, 40, 16), True, False, False)
        check_bias(dtype, (1, 1, 1, 1, 1), False, True, True)
        check_assembly(dtype, (2, 3, 4, 5), 9, 6, 70, True, True)
        check_assembly(dtype, (1, 1, 1, 1), 1, 0, 3, False, False)
        check_assembly(dtype, (1, 2, 7, 3), 64, 66, 130, False, True)
        check_fill(dtype, (2, 3, 2, 3, 5), 5, 2, True, True)
        check_fill(dtype, (1, 1, 1, 2, 3), 3, 4, False, False)
        check_fill(dtype, (1, 4, 20, 20, 3), 13, 4, True, False)
        check_gate(dtype, (2, 3, 4, 5, 7), 16, 4, True)
        check_gate(dtype, (1, 2, 60, 70, 70), 5, 2, False)
        check_gate(dtype, (3, 1, 1, 1, 130), 17, 3, False)
    for dtype in (torch.float16, torch.float32):  # a product of bfloat16 comes out wrong in some interpreters
        check_mix(dtype, (2, 3, 4, 7), 5, 11, True)
        check_mix(dtype, (1, 1, 1, 1), 1, 2, False)
        check_mix(dtype, (1, 2, 9, 9), 72, 144, True)
    check_pool((1, 3, 3), (1, 2, 2), (0, 1, 1), False)
    check_pool((3, 3, 3), (1, 1, 1), (1, 1, 1), True)
    check_pool((2, 2, 2), (2, 2, 2), (0, 0, 0), True)


if __name__ == "__main__":
    main()
