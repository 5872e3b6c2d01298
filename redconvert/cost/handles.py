"""MACs of the operators in a jit trace, for fvcore: what it lacks, and what it counts otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["HANDLES", "may_multiply"]

# Without a handle, and yet full of products.
_HEAVY = frozenset(
    f"aten::{name}"
    for name in (
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        *(
            "bilinear",
            "_trilinear",
            "cdist",
            "mv",
            "addmv",
            "dot",
            "vdot",
            "ger",
            "outer",
            "addr",
            "addbmm",
            "tensordot",
        ),
        *("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "kron", "chain_matmul", "linalg_multi_dot"),
    )
)


def may_multiply(operator: str) -> bool:
    """Whether an operator without a handle may hide MACs: another library's, a Python function, a heavy one."""
    return operator in _HEAVY or operator.startswith(("prim::", "aten::fft_")) or not operator.startswith("aten::")


def _shape(value: Any) -> list[int]:
    shape = value.type().sizes()
    assert shape is not None, f"the trace does not know the shape of {value.debugName()}"
    return shape


def _convolution_same(inputs: list[Any], outputs: list[Any]) -> int:
    """``padding="same"`` or ``"valid"``: an operator of its own."""
    return math.prod(_shape(inputs[1])) * math.prod(_shape(outputs[0])[2:]) * _shape(outputs[0])[0]


def _matmul(inputs: list[Any], outputs: list[Any]) -> int:
    """Any ranks, either side broadcast: every output element sums over the last axis of the first factor."""
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(_shape(outputs[0])) * _shape(inputs[1])[-1]


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """PyTorch turns it into matrix products: let it, with tensors that hold no data."""
    operands = [torch.empty(_shape(value), device="meta") for value in inputs[1].node().inputs()]
    with FlopCounterMode(display=False) as counter:
        torch.einsum(inputs[0].toIValue(), *operands)
    return counter.get_total_flops() // 2


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """``softmax(q k^T) v`` with q ``(..., L, E)``, k ``(..., S, E)``, v ``(..., S, E_v)``: L S (E + E_v) per head."""
    query, key, value = (_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    """Elementwise work. A handle of its own: fvcore keeps its default where it is given None."""
    return 0


HANDLES = {
    "aten::_convolution_mode": _convolution_same,
    "aten::matmul": _matmul,
    "aten::mm": _matmul,
    "aten::bmm": _matmul,
    "aten::baddbmm": _baddbmm,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    "aten::batch_norm": _nothing,
    "aten::group_norm": _nothing,
    "aten::layer_norm": _nothing,
    "aten::instance_norm": _nothing,
    "aten::upsample_nearest2d": _nothing,
    "aten::upsample_bilinear2d": _nothing,
    "aten::adaptive_avg_pool2d": _nothing,
    "aten::grid_sampler": _nothing,
}
