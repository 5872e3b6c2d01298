"""A convolution ready to run: weights packed once, what follows fused, the fastest form chosen by timing."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import vectors
from .gpu_forms import FUSED, GpuConv, bases_of
from .kernels import pool_into
from .layouts import as_clips, as_images, as_rows, channels_last, from_rows, to_rows
from .vectors import ACTIVATIONS

__all__ = ["Filter", "PackedConv", "channels_last", "from_rows", "to_rows"]

FORM_NAMES = ("conv", "frames", "line", "rows", "channels", *(f"{base}{FUSED}" for base in GpuConv.BASES))
AVAILABLE = torch.backends.mkldnn.is_available()
PACKED_TYPES = (torch.float32, torch.bfloat16)
# Without AVX-512 oneDNN refuses bfloat16, and PyTorch's own convolution takes a hundred times as long as in float32.
BFLOAT16 = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
TRIALS = 3
SHAPES = 4  # of the input for which a convolution keeps its packed weights

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Filter:
    """What is convolved, always in 3D: ``weight (C_out, C_in / groups, kt, kh, kw)``, ``bias (C_out)`` or None."""

    weight: Tensor
    bias: Tensor | None
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int = 1

    @property
    def kernel(self) -> Triple:
        return self.weight.shape[2], self.weight.shape[3], self.weight.shape[4]

    def scaled(self, scale: Tensor, shift: Tensor) -> Filter:
        """Followed by ``scale * y + shift`` per channel."""
        bias = shift if self.bias is None else self.bias * scale + shift
        return replace(self, weight=self.weight * scale.view(-1, 1, 1, 1, 1), bias=bias)

    def pick(self, channels: Tensor) -> Filter:
        """These output channels alone, in this order; of grouped filters whole groups, one after the other."""
        bias = None if self.bias is None else self.bias[channels]
        groups = self.groups * len(channels) // len(self.weight)
        return replace(self, weight=self.weight[channels], bias=bias, groups=max(groups, 1))

    def to(self, dtype: torch.dtype) -> Filter:
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))


@dataclass
class PackedConv:
    """``act(conv(x) [+ residual])`` for channels-last clips ``(N, C, T, H, W)``. Not for training.

    On a CPU weights are reordered for oneDNN, once, on a GPU for cuDNN (`GpuConv`); elsewhere PyTorch's convolution
    runs. Of the forms that compute the same, the first call times each and keeps the fastest:

    - ``conv``: as it is.
    - ``frames``: 1 x kh x kw with temporal stride 1, as a 2D convolution over N*T frames.
    - ``line``: kt x 1 x 1, as a 2D convolution over an image of T rows and H*W columns.
    - ``rows``: 1 x 1 x 1, as a product of matrices.
    - ``channels``: one filter per channel, in C.

    On a CPU that does not multiply in bfloat16 such weights and clips are widened, and the result rounded.
    """

    filter: Filter
    form: str | None = None  # None: to be timed
    images: bool = False  # the clips are images: 2D kernels do as well or better
    _packed: dict[tuple[str, torch.Size], Tensor] = field(default_factory=dict, repr=False)
    _wide: PackedConv | None = field(default=None, repr=False)
    _gpu: GpuConv | None = field(default=None, repr=False)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: str = "none",
        overwrite: bool = False,
        means: Tensor | None = None,
    ) -> Tensor:
        """``overwrite``: the result may take the residual's place in memory; ``means``: as in `gives_means`."""
        if not self._serves(x):
            run = self._on_gpu if x.is_cuda else self._plain
            y = run(x, residual, activation)
            pool_into(means, to_rows(y))
            return y
        if self.form not in self._candidates:  # None, or found on a GPU
            forms = self._candidates
            self.form = forms[0] if len(forms) == 1 else self._fastest(forms, x, residual, activation, means)
        assert self.form is not None
        return self._run(self.form, x, residual, activation, overwrite, means)

    def gives_means(self) -> bool:
        """Whether it adds the means of its result over H and W, ``(N, T_o, C_out)``, to ``means``."""
        return self.form == "channels" or (self.form is None and "channels" in self.forms())

    @functools.cached_property
    def _candidates(self) -> list[str]:
        return self.forms()

    def forms(self) -> list[str]:
        """Those that compute this convolution."""
        f, found = self.filter, ["frames"] if self.images else ["conv"]
        alone, plain = f.kernel[0] == 1 and f.padding[0] == 0, f.kernel[1:] == (1, 1) and f.padding[1:] == (0, 0)
        if alone and f.stride[0] == 1 and not self.images:
            found.append("frames")
        if plain and f.stride[1:] == (1, 1) and not self.images:
            found.append("line")
        if alone and plain and f.stride == (1, 1, 1) and f.groups == 1:
            found.append("rows")
        per_channel = f.groups == len(f.weight) and f.weight.shape[1] == 1 and f.dilation == (1, 1, 1)
        if per_channel and vectors.runs_in_c(f.weight, f.groups):
            found.append("channels")
        return found

    def _serves(self, x: Tensor) -> bool:
        packable = x.is_cpu and x.dtype in PACKED_TYPES and x.dtype == self.filter.weight.dtype
        return packable and AVAILABLE and bool(torch.backends.mkldnn.enabled)

    def _plain(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        f = self.filter
        y = F.conv3d(x, f.weight, f.bias, f.stride, f.padding, f.dilation, f.groups)
        y = y if residual is None else y.add_(residual)
        return channels_last(ACTIVATIONS[activation](y))

    def _on_gpu(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        if self._gpu is None:
            self._gpu = GpuConv(self.filter, bases_of(self.filter, self.images), self.form)
        y = self._gpu(x, residual, activation)
        self.form = self._gpu.form
        return y

    def _fastest(
        self, forms: list[str], x: Tensor, residual: Tensor | None, activation: str, means: Tensor | None
    ) -> str:
        times: dict[str, list[float]] = {form: [] for form in forms}
        for _ in range(TRIALS):
            for form in forms:
                begin = time.perf_counter()
                self._run(form, x, residual, activation, means=None if means is None else torch.zeros_like(means))
                times[form].append(time.perf_counter() - begin)
        fastest = min(times, key=lambda form: min(times[form]))
        self._packed = {key: packed for key, packed in self._packed.items() if key[0] == fastest}
        return fastest

    def _run(
        self,
        form: str,
        x: Tensor,
        residual: Tensor | None,
        activation: str,
        overwrite: bool = False,
        means: Tensor | None = None,
    ) -> Tensor:
        if form == "channels":
            return self._run_channels(x, residual, activation, means)
        if means is not None:  # of another form, while they are timed
            y = self._run(form, x, residual, activation, overwrite)
            pool_into(means, to_rows(y))
            return y
        if x.dtype == torch.bfloat16 and not BFLOAT16:
            return self._run_wide(form, x, residual, activation)
        if form == "rows":
            return self._run_rows(x, residual, activation)
        f = self.filter
        stride, padding, dilation = (_arguments(form, each) for each in (f.stride, f.padding, f.dilation))
        if form == "line":
            stride, padding, dilation = (stride[0], 1), (padding[0], 0), (dilation[0], 1)
        image = as_images(form, x)
        packed, geometry = (
            self._weight(form, image.shape, stride, padding, dilation),
            (padding, stride, dilation, f.groups),
        )
        operators, act = torch.ops.mkldnn, None if activation == "none" else activation
        if residual is None:
            y = operators._convolution_pointwise(image, packed, f.bias, *geometry, activation, [], "")
            return as_clips(form, y, x)
        other = as_images(form, residual)
        sum_and_act: tuple[Any, ...] = ("add", 1.0, act, [], None)
        if overwrite:
            y = operators._convolution_pointwise_.binary(other, image, packed, f.bias, *geometry, *sum_and_act)
        else:
            y = operators._convolution_pointwise.binary(image, other, packed, f.bias, *geometry, *sum_and_act)
        return as_clips(form, y, x)

    def _run_wide(self, form: str, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        if self._wide is None:
            self._wide = PackedConv(self.filter.to(torch.float32), form, self.images)
        other = None if residual is None else residual.float()
        return self._wide._run(form, x.float(), other, activation, overwrite=True).to(x.dtype)

    def _run_rows(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        f, rows = self.filter, as_rows(x)
        key = ("rows", rows.shape)
        if key not in self._packed:
            weight = f.weight.flatten(1).contiguous()
            self._keep(key, torch.ops.mkldnn._reorder_linear_weight(weight, len(rows)))
        operator = torch.ops.mkldnn._linear_pointwise
        if residual is None:
            y = operator.default(rows, self._packed[key], f.bias, activation, [], "")
        else:
            y = operator.binary(rows, as_rows(residual), self._packed[key], f.bias, "add")
            y = ACTIVATIONS[activation](y)
        return from_rows(y.view(*to_rows(x).shape[:4], -1))

    def _run_channels(self, x: Tensor, residual: Tensor | None, activation: str, means: Tensor | None) -> Tensor:
        f, key = self.filter, ("channels", torch.Size())
        if key not in self._packed:
            self._keep(key, f.weight.squeeze(1).permute(1, 2, 3, 0).contiguous())
        bias = f.weight.new_zeros(len(f.weight)) if f.bias is None else f.bias
        if residual is None and activation in vectors.CODES:
            return vectors.depthwise(x, self._packed[key], bias, f.stride, f.padding, activation, means)
        y = vectors.depthwise(x, self._packed[key], bias, f.stride, f.padding)
        y = ACTIVATIONS[activation](y if residual is None else y.add_(residual))
        pool_into(means, to_rows(y))
        return y

    def _keep(self, key: tuple[str, torch.Size], packed: Tensor) -> None:
        while len(self._packed) >= SHAPES:
            del self._packed[next(iter(self._packed))]
        self._packed[key] = packed

    def _weight(
        self, form: str, shape: torch.Size, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        """The weight in the order that oneDNN wants for this form and shape; another order is mended at every call."""
        key = (form, shape)
        if key not in self._packed:
            weight = self.filter.weight
            weight = weight if form == "conv" else weight.squeeze({"frames": 2, "line": 4}[form])
            reorder = getattr(torch._C._nn, f"mkldnn_reorder_conv{weight.dim() - 2}d_weight")
            opaque = weight.contiguous().to_mkldnn()
            self._keep(key, reorder(opaque, padding, stride, dilation, self.filter.groups, shape))
        return self._packed[key]


def _arguments(form: str, values: tuple[int, ...]) -> tuple[int, ...]:
    return values[1:] if form == "frames" else values
