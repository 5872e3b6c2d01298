"""What surrounds a reduced convolution, in one pass over memory: in C, on a GPU in Triton, else in PyTorch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gpu_passes
from .tape import launch

__all__ = [
    "Assembly",
    "Filling",
    "GateLayers",
    "Triple",
    "compiled",
    "contiguous",
    "max_pool",
    "multiplies",
    "pool_into",
]

SOURCES = [Path(__file__).with_name(name) for name in ("kernels.c", "vectors.c")]
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
LIMIT, HIDDEN = 4096, 256  # channels, units of a gate: as in kernels.c
RING = 16  # width of a pool's window: so many rows of channels lie on the stack
WIDTH, TILE = 32, 1024  # columns of a block of Phi_c, the most channels of one: likewise
RUN = 8  # channels in a row that are worth a loop of their own
Triple = tuple[int, int, int]
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Assembly:
    """Where each channel of a layer's output comes from, once k channels are computed and d rebuilt.

    ``out[c] = act(scale[c] * in[source[c]] + shift[c] + residual[c])`` with ``in = [computed, rebuilt]``: that is the
    layer's own channel order, the norm behind it, Phi_c where one source channel serves, residual and ReLU at once.

    Attributes:
        source: ``(C_out)``, int32, indices below ``k + d``.
        scale, shift: ``(C_out)``, float32.
        pieces: ``(pieces, 3)``, int32: begin, end and source of runs; source -1 for channels without one.
        product: Phi_c ``(d, k)``, where the rebuilt channels are to be computed in the same pass; ``rebuilt`` is then
            not given.
    """

    source: Tensor
    scale: Tensor
    shift: Tensor
    pieces: Tensor
    product: Tensor | None = None

    @classmethod
    def build(cls, source: Tensor, scale: Tensor, shift: Tensor, kept: int, product: Tensor | None = None) -> Assembly:
        """With the runs of consecutive sources, which never cross from the computed to the rebuilt channels."""
        pieces: list[list[int]] = []
        listed = source.tolist()
        for c, index in enumerate(listed):
            if c and index == listed[c - 1] + 1 and index != kept:
                pieces[-1][1] += 1
            else:
                pieces.append([c, c + 1, index])
        merged: list[list[int]] = []
        for begin, end, first in pieces:
            gathered = end - begin < RUN
            if gathered and merged and merged[-1][2] < 0:
                merged[-1][1] = end
            else:
                merged.append([begin, end, -1 if gathered else first])
        table = torch.tensor(merged, dtype=torch.int32, device=source.device)
        return cls(source.int().contiguous(), scale.float().contiguous(), shift.float().contiguous(), table, product)

    def __call__(
        self,
        computed: Tensor,
        rebuilt: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        pooled: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """``computed (N, T, H, W, k)`` and ``rebuilt (N, T, H, W, d)`` -> ``(N, T, H, W, C_out)``, all contiguous.

        ``pooled (N, T, C_out)``, zeros in float32, takes the mean of the result over H and W. ``into``: where the
        result may be written, which is channels of a larger contiguous tensor, or the residual; whoever gives it
        looks whether it was.
        """
        k, d, channels = computed.shape[-1], 0 if rebuilt is None else rebuilt.shape[-1], self.source.shape[0]
        if self.product is not None:
            d = -(-len(self.product) // WIDTH) * WIDTH
        function = _function("assemble", computed, max(k + d, channels))
        if function is None:
            out = self._on_gpu(computed, rebuilt, residual, relu, into)
            out = self.in_pytorch(computed, rebuilt, residual, relu) if out is None else out
            return pool_into(pooled, out)
        N, T, H, W = computed.shape[:4]
        out = computed.new_empty(N, T, H, W, channels) if into is None else into
        sources = (*contiguous(computed), k, *contiguous(rebuilt), d, *contiguous(self._blocks))
        sizes, to = (N * T, H * W, channels), (out, out.stride(3))
        given = (*sources, *self._table, *contiguous(residual), relu, *sizes, *to, *contiguous(pooled))
        launch(function, *given, owner=self)
        return out

    @functools.cached_property
    def _table(self) -> tuple[int | None, ...]:
        """What never changes of the C function's arguments."""
        return *addresses(self.pieces), len(self.pieces), *addresses(self.source, self.scale, self.shift)

    @functools.cached_property
    def _blocks(self) -> Tensor | None:
        """Phi_c as C reads it: blocks of WIDTH of its results, ``(blocks, k, WIDTH)``, float32."""
        if self.product is None:
            return None
        padded = F.pad(self.product.float(), (0, 0, 0, -len(self.product) % WIDTH))
        return padded.unflatten(0, (-1, WIDTH)).transpose(1, 2).contiguous()

    def _on_gpu(
        self, computed: Tensor, rebuilt: Tensor | None, residual: Tensor | None, relu: bool, into: Tensor | None
    ) -> Tensor | None:
        """In one kernel; None where there is none."""
        if not gpu_passes.runs(computed):
            return None
        parts = [None if each is None else each.contiguous() for each in (computed, rebuilt, residual)]
        out = computed.new_empty(*computed.shape[:4], len(self.source)) if into is None else into
        if self.product is None:
            table = (self.source, self.scale, self.shift)
            return gpu_passes.attempt("assemble", gpu_passes.assemble, *parts, relu, out, table)
        given = (parts[0], self.matrix.to(computed.dtype), parts[2], relu, out, self.shift)
        return gpu_passes.attempt("mix", gpu_passes.mix, *given)

    @functools.cached_property
    def matrix(self) -> Tensor:
        """Channel order, norm and Phi_c at once, ``(k, C_out)``, typed as Phi_c: ``out = in @ matrix + shift``."""
        assert self.product is not None
        product = self.product.float()
        eye = torch.eye(product.shape[1], device=product.device)
        table = torch.cat([eye, product])[self.source]  # (C_out, k)
        return (self.scale[:, None] * table).T.to(self.product.dtype).contiguous()

    def in_pytorch(self, computed: Tensor, rebuilt: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
        """The same, pass after pass."""
        if self.product is not None:
            rebuilt = computed @ self.product.T.to(computed.dtype)
        x = computed if rebuilt is None else torch.cat([computed, rebuilt], dim=-1)
        x = torch.addcmul(self.shift.to(x.dtype), x.index_select(-1, self.source), self.scale.to(x.dtype))
        x = x if residual is None else x.add_(residual)
        return x.relu_() if relu else x


@dataclass(frozen=True)
class Filling:
    """All frames of a clip from every R-th (Phi_t), with what follows.

    Frame ``s R + d`` is ``act(weight[d, 0] * y_s + weight[d, 1] * y_(s+1) + bias[d] + residual)``; the last y stands
    for its own follower.

    Attributes:
        weight: ``(R, 2, C)``, float32; bias: ``(R, C)``, float32.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def copies(cls, stride: int, like: Tensor) -> Filling:
        """Every frame as the computed one before it; ``like (..., C)``."""
        weight = torch.zeros(stride, 2, like.shape[-1], device=like.device)
        weight[:, 0] = 1
        return cls(weight, torch.zeros(stride, like.shape[-1], device=like.device))

    def __call__(
        self,
        y: Tensor,
        num_frames: int,
        residual: Tensor | None,
        relu: bool,
        pooled: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """``y (N, T', H, W, C)`` -> ``(N, num_frames, H, W, C)``, contiguous both.

        ``pooled`` and ``into`` as in `Assembly`, but ``into`` is contiguous.
        """
        N, held, H, W, C = y.shape
        function = _function("fill", y, C)
        if function is None:
            found = self._on_gpu(y, num_frames, residual, relu)
            return pool_into(pooled, self.in_pytorch(y, num_frames, residual, relu) if found is None else found)
        out = y.new_empty(N, num_frames, H, W, C) if into is None else into
        clips = (*contiguous(y), N, held, len(self.weight), num_frames)
        weights = contiguous(self.weight, self.bias)
        launch(function, *clips, *weights, *contiguous(residual), relu, H * W, C, *contiguous(out, pooled))
        return out

    def _on_gpu(self, y: Tensor, num_frames: int, residual: Tensor | None, relu: bool) -> Tensor | None:
        """In one kernel; None where there is none."""
        if not gpu_passes.runs(y):
            return None
        added = None if residual is None else residual.contiguous()
        given = (y.contiguous(), self.weight, self.bias, num_frames, added, relu)
        return gpu_passes.attempt("fill", gpu_passes.fill, *given)

    def in_pytorch(self, y: Tensor, num_frames: int, residual: Tensor | None, relu: bool) -> Tensor:
        """The same, pass after pass."""
        following = torch.cat([y[:, 1:], y[:, -1:]], dim=1)
        weight, bias = self.weight.to(y.dtype), self.bias.to(y.dtype)
        frames = [torch.addcmul(b + w[0] * y, w[1], following) for w, b in zip(weight, bias, strict=True)]
        x = torch.stack(frames, dim=2).flatten(1, 2)[:, :num_frames].contiguous()
        x = x if residual is None else x.add_(residual)
        return x.relu_() if relu else x


def max_pool(
    x: Tensor, kernel: Triple, stride: Triple, before: Triple, after: Triple, outside: float = -math.inf
) -> Tensor:
    """Max pooling of ``x (N, T, H, W, C)``, padded with ``outside``: ``(N, T_o, H_o, W_o, C)``, contiguous both."""
    sizes = [
        (n + b + a - k) // s + 1 for n, k, s, b, a in zip(x.shape[1:4], kernel, stride, before, after, strict=True)
    ]
    function = _function("max_pool", x, x.shape[4]) if kernel[2] <= RING else None
    if function is None:
        if gpu_passes.runs(x) and x.numel() < gpu_passes.LARGEST:
            given = (x.contiguous(), kernel, stride, before, sizes, outside)
            found = gpu_passes.attempt("max_pool", gpu_passes.max_pool, *given)
            if found is not None:
                return found
        pads = [amount for pair in zip(before[::-1], after[::-1], strict=True) for amount in pair]
        padded = F.pad(x.permute(0, 4, 1, 2, 3), pads, value=outside)
        return F.max_pool3d(padded, kernel, stride).permute(0, 2, 3, 4, 1).contiguous()
    out = x.new_empty(x.shape[0], *sizes, x.shape[4])
    shapes, window = (ctypes.c_int64 * 7)(*x.shape[:4], *sizes), (ctypes.c_int64 * 9)(*kernel, *stride, *before)
    launch(function, *contiguous(x), shapes, window, outside, x.shape[4], *contiguous(out))
    return out


@dataclass(frozen=True)
class GateLayers:
    """The gate (Eq. 4) with everything folded in: ``z = tanh(mean(x) w1 + b1) w2 + b2``, the mean over H and W.

    Attributes:
        w1: ``(T * C, hidden)``; b1: ``(hidden)``; w2: ``(hidden, outs)``; b2: ``(outs)``; all float32, contiguous.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __call__(self, x: Tensor, pooled: Tensor | None = None) -> Tensor:
        """``x (N, T, H, W, C)``, or ``pooled (N, T, C)``, which is mean(x), where it is known: ``z (N, outs)``."""
        given = x if pooled is None else pooled if pooled.dtype == self.w1.dtype else pooled.to(self.w1.dtype)
        function = _function("gate", given, given.shape[-1]) if self.b1.shape[0] <= HIDDEN else None
        if function is None:
            return self._in_pytorch(x if pooled is None else given[:, :, None, None])
        N, T, C = given.shape[0], given.shape[1], given.shape[-1]
        z, positions = self.b2.new_empty(N, self.b2.shape[0]), math.prod(given.shape[2:-1])
        launch(function, *contiguous(given), N, T, positions, C, *self._weights, z, owner=self)
        return z

    def _in_pytorch(self, x: Tensor) -> Tensor:
        z = self._on_gpu(x)
        if z is not None:
            return z
        pooled = x.flatten(2, 3).mean(2, dtype=self.w1.dtype if x.is_cuda else None)
        hidden = torch.addmm(self.b1, pooled.flatten(1).to(self.w1.dtype), self.w1).tanh_()
        return torch.addmm(self.b2, hidden, self.w2)

    def _on_gpu(self, x: Tensor) -> Tensor | None:
        """In two kernels; None where there are none."""
        stride = gpu_passes.row_stride(x) if gpu_passes.runs(x) else None
        if stride is None or max(self.w2.shape) > gpu_passes.WIDEST:
            return None
        return gpu_passes.attempt("gate", gpu_passes.gate, x, stride, self.w1, self.b1, self.w2, self.b2)

    @functools.cached_property
    def _weights(self) -> tuple[int | None, ...]:
        first, second = addresses(self.w1, self.b1), addresses(self.w2, self.b2)
        return *first, len(self.b1), *second, len(self.b2)


def multiplies(weight: Tensor) -> bool:
    """Whether an `Assembly` is to compute with Phi_c, ``(d, k, ...)``: oneDNN is faster in bfloat16."""
    if weight.is_cuda:
        return gpu_passes.mixes(weight)
    fits = weight.dtype == torch.float32 and max(weight.shape[:2]) <= TILE
    return fits and _function("assemble", weight, max(weight.shape[:2])) is not None


def pool_into(pooled: Tensor | None, x: Tensor) -> Tensor:
    """x, whose mean over H and W is added to ``pooled``, where there is one."""
    if pooled is not None and x.is_cuda:
        pooled += x.flatten(2, 3).mean(2, dtype=pooled.dtype)
    elif pooled is not None:
        pooled += x.flatten(2, 3).mean(2)
    return x


def _function(name: str, x: Tensor, channels: int) -> Any:
    """The C function for tensors like x; None where PyTorch serves."""
    library = compiled() if x.device.type == "cpu" and x.dtype in TYPES and channels <= LIMIT else None
    return library and getattr(library, f"{name}_{TYPES[x.dtype]}")


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """These tensors, for C, which takes no others."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return tensors


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Of contiguous tensors, for C."""
    return [None if tensor is None else tensor.data_ptr() for tensor in contiguous(*tensors)]


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The C functions; None where there is no compiler, or ``REDCONVERT_COMPILE=0``."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if os.environ.get("REDCONVERT_COMPILE") == "0" or not compiler:
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().split("\n")[0]
        warnings.warn(
            f"'{compiler}' does not compile redconvert's passes ({said or error}): PyTorch's own run instead, and are "
            f"slower. Set CC to another compiler, or REDCONVERT_COMPILE=0 to go without",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for kind in TYPES.values():
        for name, arguments in {
            "assemble": [
                *(pointer, number) * 2,
                *(pointer,) * 2,
                number,
                *(pointer,) * 4,
                flag,
                *(number,) * 3,
                pointer,
                number,
                pointer,
            ],
            "fill": [pointer, *(number,) * 4, *(pointer,) * 3, flag, number, number, pointer, pointer],
            "max_pool": [*(pointer,) * 3, ctypes.c_float, number, pointer],
            "gate": [pointer, *(number,) * 4, pointer, pointer, number, pointer, pointer, number, pointer],
        }.items():
            function = getattr(library, f"{name}_{kind}")
            function.argtypes, function.restype = arguments, None
    library.depthwise_f32.argtypes = [*(pointer,) * 5, flag, number, *(pointer,) * 3]
    library.rescale_f32.argtypes = [pointer, pointer, flag, *(number,) * 4, pointer, pointer]
    library.depthwise_f32.restype = library.rescale_f32.restype = None
    return library


def _build(compiler: str) -> Path:
    """Compile once per source, compiler and processor; a file that is half written is never loaded."""
    key = b"|".join(
        [*(source.read_bytes() for source in SOURCES), compiler.encode(), " ".join(FLAGS).encode(), _processor()]
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redconvert"
    library = folder / f"kernels-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        halves, whole = [f"{work}/{source.stem}.o" for source in SOURCES], f"{work}/kernels.so"
        for command in (
            *([compiler, *FLAGS, "-c", str(source), "-o", half] for source, half in zip(SOURCES, halves, strict=True)),
            # Linked without OpenMP: its functions are those that PyTorch has loaded, so both share one set of threads.
            [compiler, "-shared", *halves, "-o", whole],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(whole, library)
    return library


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n")
    except OSError:
        lines = [platform.processor().encode()]
    return b"".join(line for line in lines[:30] if line.startswith((b"model name", b"flags")))
