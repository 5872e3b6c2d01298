"""A convolution ready to run: weights packed once, what follows fused, the fastest form chosen by timing."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import vectors
from .gpu_forms import FUSED, GpuConv, bases_of
from .kernels import pool_into
from .layouts import as_rows, channels_last, from_rows, to_rows, views
from .tape import unrecorded
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
Key = tuple[torch.Size, torch.dtype, bool, str, bool]  # of clips; nothing is added; activation; overwriting
Bound = Callable[[Tensor, Tensor | None], Tensor]
mkldnn_is_enabled: Callable[[], bool] = torch._C._get_mkldnn_enabled


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

    def output_sizes(self, sizes: Iterable[int]) -> list[int]:
        """T, H and W of the result for those of the input."""
        geometry = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry]

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
    _bound: dict[Key, Bound] = field(default_factory=dict, repr=False)
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
        key = (x.shape, x.dtype, residual is None, activation, overwrite)
        bound = self._bound.get(key) if means is None and mkldnn_is_enabled() else None
        if bound is not None:  # almost always: everything that can be looked up was
            return bound(x, residual)
        if not self._serves(x):
            run = self._on_gpu if x.is_cuda else self._plain
            y = run(x, residual, activation)
            pool_into(means, to_rows(y))
            return y
        if self.form not in self._candidates:  # None, or found on a GPU
            forms = self._candidates
            self.form = forms[0] if len(forms) == 1 else self._fastest(forms, x, residual, key, means)
        assert self.form is not None
        return self._runner(self.form, key)(x, residual, means)

    def forget(self) -> None:
        """Drop what was packed, and all that holds on to it."""
        self._packed.clear()
        self._bound.clear()

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

    def _fastest(self, forms: list[str], x: Tensor, residual: Tensor | None, key: Key, means: Tensor | None) -> str:
        runners = {form: self._runner(form, (*key[:4], False)) for form in forms}  # trials overwrite nothing
        times: dict[str, list[float]] = {form: [] for form in forms}
        with unrecorded():
            for _ in range(TRIALS):
                for form, run in runners.items():
                    begin = time.perf_counter()
                    run(x, residual, None if means is None else torch.zeros_like(means))
                    times[form].append(time.perf_counter() - begin)
        fastest = min(times, key=lambda form: min(times[form]))
        self._packed = {key: packed for key, packed in self._packed.items() if key[0] == fastest}
        return fastest

    def _runner(self, form: str, key: Key) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
        """One form, with means: a function of clips, residual and the room for them."""
        if form == "channels":
            return lambda x, residual, means: self._run_channels(x, residual, key[3], means)
        bound = self._bind(form, key)

        def run(x: Tensor, residual: Tensor | None, means: Tensor | None) -> Tensor:
            y = bound(x, residual)
            pool_into(means, to_rows(y))
            return y

        return run

    def _bind(self, form: str, key: Key) -> Bound:
        """One form for clips of one shape and what follows it: everything but the numbers looked up."""
        shape, dtype, alone, activation, overwrite = key
        if dtype == torch.bfloat16 and not BFLOAT16:
            bound = self._bind_wide(form, key)
        elif form == "rows":
            bound = self._bind_rows(shape, alone, activation)
        else:
            bound = self._bind_images(form, shape, alone, activation, overwrite)
        if form == self.form:
            self._bound[key] = bound
        return bound

    def _bind_images(self, form: str, shape: torch.Size, alone: bool, activation: str, overwrite: bool) -> Bound:
        f = self.filter
        stride, padding, dilation = (_arguments(form, each) for each in (f.stride, f.padding, f.dilation))
        if form == "line":
            stride, padding, dilation = (stride[0], 1), (padding[0], 0), (dilation[0], 1)
        view, back = views(form, shape)
        weight = self._weight(form, view(torch.empty(shape, device="meta")).shape, stride, padding, dilation)
        after: tuple[Any, ...] = (weight, f.bias, padding, stride, dilation, f.groups)
        operators, fused = torch.ops.mkldnn, _post_op(activation)
        if alone:
            convolve = operators._convolution_pointwise.default
            return lambda x, _: back(convolve(view(x), *after, *fused))
        after = (*after, "add", 1.0, "relu" if activation == "relu" else None, [], None)
        # Behind a sum oneDNN knows this activation alone.
        act = ACTIVATIONS["none" if activation == "relu" else activation]
        if overwrite:
            add_into = operators._convolution_pointwise_.binary
            return lambda x, residual: act(back(add_into(view(residual), view(x), *after)))  # type: ignore[arg-type]
        add = operators._convolution_pointwise.binary
        return lambda x, residual: act(back(add(view(x), view(residual), *after)))  # type: ignore[arg-type]

    def _bind_wide(self, form: str, key: Key) -> Bound:
        if self._wide is None:
            self._wide = PackedConv(self.filter.to(torch.float32), form, self.images)
        shape, dtype, alone, activation, _ = key
        wide = self._wide._bind(form, (shape, torch.float32, alone, activation, True))
        return lambda x, residual: wide(x.float(), None if residual is None else residual.float()).to(dtype)

    def _bind_rows(self, shape: torch.Size, alone: bool, activation: str) -> Bound:
        f, (N, _, T, H, W) = self.filter, shape
        size, channels = (N, T, H, W, len(f.weight)), f.weight.flatten(1).contiguous()
        weight = self._keep(("rows", shape), lambda: torch.ops.mkldnn._reorder_linear_weight(channels, N * T * H * W))
        linear, act = torch.ops.mkldnn._linear_pointwise, ACTIVATIONS[activation]
        fused = _post_op(activation)
        if alone:
            run = linear.default
            return lambda x, _: from_rows(run(as_rows(x), weight, f.bias, *fused).view(size))
        add = linear.binary
        return lambda x, residual: from_rows(
            act(add(as_rows(x), as_rows(residual), weight, f.bias, "add")).view(size)  # type: ignore[arg-type]
        )

    def _run_channels(self, x: Tensor, residual: Tensor | None, activation: str, means: Tensor | None) -> Tensor:
        f = self.filter
        weight = self._keep(("channels", torch.Size()), lambda: f.weight.squeeze(1).permute(1, 2, 3, 0).contiguous())
        bias = f.weight.new_zeros(len(f.weight)) if f.bias is None else f.bias
        if residual is None and activation in vectors.CODES:
            return vectors.depthwise(x, weight, bias, f.stride, f.padding, activation, means)
        y = vectors.depthwise(x, weight, bias, f.stride, f.padding)
        y = ACTIVATIONS[activation](y if residual is None else y.add_(residual))
        pool_into(means, to_rows(y))
        return y

    def _keep(self, key: tuple[str, torch.Size], make: Callable[[], Tensor]) -> Tensor:
        """What is packed by key; of more than SHAPES the oldest is forgotten, and all that holds on to it."""
        if key not in self._packed:
            while len(self._packed) >= SHAPES:
                del self._packed[next(iter(self._packed))]
                self._bound.clear()
            self._packed[key] = make()
        return self._packed[key]

    def _weight(
        self, form: str, shape: torch.Size, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        """The weight in the order that oneDNN wants for this form and shape; another order is mended at every call."""

        def pack() -> Tensor:
            weight = self.filter.weight
            weight = weight if form == "conv" else weight.squeeze({"frames": 2, "line": 4}[form])
            reorder = getattr(torch._C._nn, f"mkldnn_reorder_conv{weight.dim() - 2}d_weight")
            packed: Tensor = reorder(
                weight.contiguous().to_mkldnn(), padding, stride, dilation, self.filter.groups, shape
            )
            return packed

        return self._keep((form, shape), pack)


def _arguments(form: str, values: tuple[int, ...]) -> tuple[int, ...]:
    return values[1:] if form == "frames" else values


def _post_op(activation: str) -> tuple[str, list[float], str]:
    """What oneDNN calls an activation of ACTIVATIONS."""
    return ("hardtanh", [0.0, 6.0], "") if activation == "relu6" else (activation, [], "")
