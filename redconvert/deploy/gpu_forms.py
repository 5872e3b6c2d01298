"""A packed convolution on a GPU: cuDNN's and cuBLAS's forms of it, timed at the first call, and one pass after it."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gpu_passes
from .layouts import as_rows, blocked_filter, channels_last, from_rows, in_blocks, to_rows, views
from .vectors import ACTIVATIONS

if TYPE_CHECKING:
    from .pack import Filter

__all__ = ["FUSED", "GpuConv", "bases_of"]

FUSED = " fused"  # behind the name of a form whose bias, residual and ReLU are in the convolution
TRIALS, CALLS = 3, 3
FEW = 4  # channels: those of pictures
PAUSE = 400_000  # clock cycles in which the host catches up with the device, so that launches are not timed
# Of the largest value, against the plain convolution: above it a form computes something else, or far too coarsely.
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class GpuConv:
    """``act(conv(x) [+ residual])`` for channels-last clips ``(N, C, T, H, W)`` on a GPU. Not for training.

    Forms are those of `PackedConv`, of strided convolutions too, and ``"blocks"`` for a stem's few channels
    (`in_blocks`: tensor cores take eight at a time). Each comes once more with what follows inside the convolution
    (``"conv fused"``): a ReLU, behind a bias and perhaps a residual, in cuDNN, or in cuBLAS where the kernel is
    1 x 1 x 1. What is not fused follows in one pass over memory.
    """

    BASES: ClassVar[tuple[str, ...]] = ("conv", "frames", "line", "rows", "blocks")

    filter: Filter
    bases: list[str]  # as `bases_of` lists them
    form: str | None = None
    _weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        if self.form is not None and self.form.removesuffix(FUSED) not in self.bases:
            self.form = None  # chosen on another machine
        if torch.cuda.is_current_stream_capturing():
            return self.run(self.form or self.bases[0], x, residual, activation)
        if self.form is None:
            self.form = self._fastest(x, residual, activation)
        try:
            return self.run(self.form, x, residual, activation)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a form that this machine, or an input of this shape, has no kernel for
            if self.form == self.bases[0]:
                raise
            self.form = self.bases[0]
        return self.run(self.form, x, residual, activation)

    def forms(self, residual: bool, activation: str) -> list[str]:
        """The candidates; what the convolution is called with first decides whether fused ones are among them."""
        if activation != "relu" or self.filter.groups > 1:
            return list(self.bases)
        return [*self.bases, *(base + FUSED for base in self.bases if base != "rows" or not residual)]

    def run(self, form: str, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """In one of the forms; what is fused is a ReLU, anything else follows."""
        base, fused = form.removesuffix(FUSED), form.endswith(FUSED) and activation == "relu"
        residual = None if residual is None else channels_last(residual)
        if base == "rows":
            return self._run_rows(x, residual, activation, fused)
        if fused:
            return channels_last(self._run_fused(base, x, residual))
        return self._followed(channels_last(self._convolved(base, x)), residual, activation)

    # -- the forms -------------------------------------------------------------------------------------

    def _convolved(self, base: str, x: Tensor) -> Tensor:
        """Without bias: PyTorch adds that in a pass of its own."""
        convolve: Callable[..., Tensor] = F.conv3d if base in ("conv", "blocks") else F.conv2d
        x = self._picked(base, x)
        view, back = views(base, x.shape)
        return back(convolve(view(x), self._weight(base), None, *self._geometry(base), self.filter.groups))

    def _run_fused(self, base: str, x: Tensor, residual: Tensor | None) -> Tensor:
        x = self._picked(base, x)
        view, back = views(base, x.shape)
        weight, bias = self._weight(base), self._bias(x.dtype)
        geometry = (*self._geometry(base), self.filter.groups)
        operators: Any = torch.ops.aten
        if residual is None:
            y = operators.cudnn_convolution_relu(view(x), weight, bias, *geometry)
        else:
            y = operators.cudnn_convolution_add_relu(view(x), weight, view(residual), 1.0, bias, *geometry)
        return back(y)

    def _run_rows(self, x: Tensor, residual: Tensor | None, activation: str, fused: bool) -> Tensor:
        x = self._picked("rows", x)
        rows, weight = as_rows(x), self._weight("rows")
        shape = (*to_rows(x).shape[:4], weight.shape[1])
        if residual is None and fused:
            operators: Any = torch.ops.aten
            return from_rows(operators._addmm_activation(self._bias(x.dtype), rows, weight).view(shape))
        if residual is None and activation == "none" and self.filter.bias is not None:
            return from_rows(torch.addmm(self._bias(x.dtype), rows, weight).view(shape))
        return self._followed(from_rows(torch.mm(rows, weight).view(shape)), residual, activation)

    def _followed(self, y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """``act(y + bias + residual)`` in one pass, in place of y."""
        relu = activation == "relu"
        if self.filter.bias is None and residual is None:
            return ACTIVATIONS[activation](y)
        rows, added = to_rows(y), None if residual is None else to_rows(residual)
        bias = None if self.filter.bias is None else self._bias(torch.float32)
        fits = rows.is_contiguous() and (added is None or (added.is_contiguous() and added.shape == rows.shape))
        out = None
        if fits and gpu_passes.runs(y) and y.numel() < gpu_passes.LARGEST:
            out = gpu_passes.attempt("bias", gpu_passes.bias_residual_relu, rows, bias, added, relu)
        if out is not None:
            return from_rows(out) if activation in ("relu", "none") else ACTIVATIONS[activation](from_rows(out))
        if bias is not None:
            y = y.add_(self._bias(y.dtype).view(-1, 1, 1, 1))
        y = y if residual is None else y.add_(residual)
        return ACTIVATIONS[activation](y)

    def _picked(self, base: str, x: Tensor) -> Tensor:
        """The positions that a form reads, where its stride has no place in it, or as it reads them: copied."""
        t, h, w = self.filter.stride
        if base == "frames" and t > 1:
            return channels_last(x[:, :, ::t])
        if base == "rows" and max(t, h, w) > 1:
            return channels_last(x[:, :, ::t, ::h, ::w])
        if base == "blocks":
            return in_blocks(x, self.filter.kernel, self.filter.stride, self.filter.padding)
        return x

    # -- what is prepared once -------------------------------------------------------------------------

    def _geometry(self, base: str) -> tuple[tuple[int, ...], ...]:
        """Stride, padding and dilation of a form."""
        f = self.filter
        if base == "frames":
            return f.stride[1:], f.padding[1:], f.dilation[1:]
        if base == "line":
            return (f.stride[0], 1), (f.padding[0], 0), (f.dilation[0], 1)
        if base == "blocks":
            return (1, 1, 1), (0, 0, 0), (1, 1, 1)
        return f.stride, f.padding, f.dilation

    def _weight(self, base: str) -> Tensor:
        """In the memory format that the form wants."""
        if base not in self._weights:
            weight = self.filter.weight
            if base == "rows":
                self._weights[base] = weight.flatten(1).contiguous().T
            elif base in ("conv", "blocks"):
                weight = weight if base == "conv" else blocked_filter(weight, self.filter.stride)
                self._weights[base] = weight.contiguous(memory_format=torch.channels_last_3d)
            else:
                image = weight.squeeze(2 if base == "frames" else 4)
                self._weights[base] = image.contiguous(memory_format=torch.channels_last)
        return self._weights[base]

    def _bias(self, dtype: torch.dtype) -> Tensor:
        """Zeros where there is none: cuDNN wants one."""
        if dtype not in self._biases:
            f = self.filter
            bias = f.weight.new_zeros(len(f.weight)) if f.bias is None else f.bias
            self._biases[dtype] = bias.to(dtype).contiguous()
        return self._biases[dtype]

    # -- the choice ------------------------------------------------------------------------------------

    def _fastest(self, x: Tensor, residual: Tensor | None, activation: str) -> str:
        """The fastest of the forms that run here and give what the plain convolution gives."""
        wanted = self.run(self.bases[0], x, residual, activation)
        calls: dict[str, Callable[[], Tensor]] = {}
        for form in self.forms(residual is not None, activation):
            call = _call(self, form, x, residual, activation)
            if form == self.bases[0] or _is_right(call, wanted, form.endswith(FUSED)):
                calls[form] = call
        del wanted
        times = _timed(calls) if len(calls) > 1 else {self.bases[0]: 0.0}
        fastest = min(times, key=times.__getitem__)
        base = fastest.removesuffix(FUSED)
        self._weights = {base: self._weights[base]}
        return fastest


def bases_of(filter: Filter, images: bool) -> list[str]:
    """The forms, none of them fused, that compute a convolution on a GPU; ``images``: its clips have one frame."""
    alone = filter.kernel[0] == 1 and filter.padding[0] == 0
    plain = filter.kernel[1:] == (1, 1) and filter.padding[1:] == (0, 0)
    found = ["frames"] if images and alone else ["conv"]
    if alone and not images:
        found.append("frames")
    if plain and filter.stride[1:] == (1, 1) and not images:
        found.append("line")
    if alone and plain and filter.groups == 1:
        found.append("rows")
    few = filter.weight.shape[1] <= FEW and max(filter.stride) > 1
    if few and filter.groups == 1 and filter.dilation == (1, 1, 1):
        found.append("blocks")
    return found


def _call(conv: GpuConv, form: str, x: Tensor, residual: Tensor | None, activation: str) -> Callable[[], Tensor]:
    return lambda: conv.run(form, x, residual, activation)


def _is_right(call: Callable[[], Tensor], wanted: Tensor, fused: bool) -> bool:
    """Whether a form runs at all, and gives this."""
    # cuDNN compiles fused kernels, each for a good part of a second: of those only its first choice is tried.
    untune = fused and torch.backends.cudnn.benchmark
    try:
        if untune:
            torch.backends.cudnn.benchmark = False
        found = call()
        scale = float(wanted.abs().max().float().clamp_min(1e-6))
        error = float((found - wanted).abs().max()) / scale
    except torch.OutOfMemoryError:
        return False  # its workspace does not fit
    except Exception:  # cuDNN has no such engine, or PyTorch no such operator
        return False
    finally:
        if untune:
            torch.backends.cudnn.benchmark = True
    return found.shape == wanted.shape and error <= TOLERANCE.get(wanted.dtype, 0.0)


def _timed(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Milliseconds of each, medians of interleaved runs; the device is kept waiting until all is launched."""
    times: dict[str, list[float]] = {form: [] for form in calls}
    for trial in range(1 + TRIALS):
        for form, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with contextlib.suppress(Exception):  # not a public function
                torch.cuda._sleep(PAUSE)
            start.record()
            for _ in range(CALLS):
                call()
            stop.record()
            stop.synchronize()
            if trial:
                times[form].append(start.elapsed_time(stop))
    return {form: statistics.median(found) for form, found in times.items()}
