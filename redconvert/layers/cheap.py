"""Phi_c, the cheap linear operations that rebuild dropped channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gate import matching
from .routing import select

__all__ = [
    "KINDS",
    "CheapOp",
    "Depthwise",
    "Nothing",
    "OneSource",
    "Pointwise",
    "Principal",
    "Scale",
    "principal_factors",
    "resolve_cheap",
]

LEAST_SCALE = 1e-3  # of what is computed: it is divided by
AUTO_COST = 0.1  # "auto" takes pointwise where it costs at most this share of what it saves


def principal_factors(moments: Tensor, metric: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The map P of rank k for which ``tr(M (1 - P) S (1 - P)^T)`` is least, as the product of two factors.

    That is ``P = M^-1/2 U U^T M^1/2``, U being the eigenvectors of ``M^1/2 S M^1/2`` with the largest values.

    Args:
        moments: S, ``(C, C)``; metric: M, ``(C, C)``, or its diagonal ``(C)``.
        kept: k.

    Returns:
        ``M^-1/2 U`` and ``U^T M^1/2``, ``(C, k)`` and ``(k, C)``.
    """
    values, vectors = torch.linalg.eigh(metric if metric.dim() == 2 else metric.diag())
    values = values.clamp_min(1e-12 * values.max().clamp_min(torch.finfo(values.dtype).tiny))
    root, inverse = ((vectors * power) @ vectors.T for power in (values.sqrt(), values.rsqrt()))
    components = torch.linalg.eigh(root @ moments @ root).eigenvectors[:, -kept:]
    return inverse @ components, components.T @ root


def resolve_cheap(kind: str, kept: int, macs_per_output: int, groups: int = 1) -> str:
    """The operation that ``kind`` stands for.

    Per dropped channel and position, pointwise costs ``kept`` MACs and saves ``macs_per_output``. Filters of different
    groups read different inputs and cannot be mixed.
    """
    if kind == "principal" and groups > 1:
        kind = "auto"
    if kind != "auto":
        return kind
    return "pointwise" if kept <= AUTO_COST * macs_per_output else "scale"


class CheapOp(nn.Module):
    """A linear operation ``(N, k, ...) -> (N, D, ...)``, with what its backward pass needs and no more."""

    weight: nn.Parameter
    bias: nn.Parameter
    composes = False  # whether filters as large as the convolution's can do both

    @property
    def macs_per_position(self) -> int:
        return self.weight.numel()

    @torch.no_grad()
    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """``scale * y + shift`` behind it, ``(D)``."""
        self.weight.mul_(scale.view(-1, *(1,) * (self.weight.dim() - 1)))
        self.bias.mul_(scale).add_(shift)

    def pairing(self, kept: Tensor, gradient: Tensor) -> Tensor:
        """``<op(kept), gradient>`` per sample, ``(N)``; differentiable in the operation's parameters alone."""
        return (self(kept) * gradient).flatten(1).sum(1)

    def adjoint(self, gradient: Tensor, kept: Tensor) -> Tensor:
        """The gradient ``(N, k, ...)`` that ``gradient (N, D, ...)`` gives to ``kept``."""
        with torch.enable_grad():
            point = kept.detach().requires_grad_()
            return torch.autograd.grad(self(point), point, gradient)[0]

    def compose(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Filters ``(D, ...)`` and biases ``(D)`` that give what this makes of the result of ``weight (k, ...)``."""
        raise TypeError("use Pointwise or Scale")

    def fit(self, within: Tensor, across: Tensor, mean_x: Tensor, mean_y: Tensor, ridge: float) -> Tensor:
        """Set weight and bias to the regression of the dropped channels y on the kept ones x.

        Args:
            within: covariance of x, ``(k, k)``; across: of y with x, ``(D, k)``.
            mean_x, mean_y: ``(k)`` and ``(D)``.
            ridge: strength, relative to the mean variance of x; one source alone needs none.

        Returns:
            The coefficients, ``(D, k)``: ``y ~ mean_y + coefficients (x - mean_x)``.
        """
        raise TypeError("use Pointwise, Scale or Depthwise")


class Pointwise(CheapOp):
    """A 1x1 convolution, ``(N, k, ...) -> (N, D, ...)``: ``weight (D, k)``, ``bias (D)``."""

    composes = True

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dropped, kept))
        self.bias = nn.Parameter(torch.zeros(dropped))

    def forward(self, kept: Tensor) -> Tensor:
        convolve = F.conv3d if kept.dim() == 5 else F.conv2d
        weight = matching(self.weight, kept).reshape(*self.weight.shape, *(1,) * (kept.dim() - 2))
        return convolve(kept, weight, matching(self.bias, kept))

    def compose(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return (self.weight @ weight.flatten(1)).unflatten(1, weight.shape[1:]), self.bias + self.weight @ bias

    def pairing(self, kept: Tensor, gradient: Tensor) -> Tensor:
        # <W y, g> = <W, g y^T>: one product of small result instead of the operation's output.
        kept, gradient = kept.detach().flatten(2), gradient.detach().flatten(2)
        moments = torch.bmm(gradient, kept.transpose(1, 2))
        moments, sums = moments.to(self.weight.dtype), gradient.sum(2).to(self.weight.dtype)  # autocast: add in float32
        return torch.einsum("dk,ndk->n", self.weight, moments) + sums @ self.bias

    @torch.no_grad()
    def fit(self, within: Tensor, across: Tensor, mean_x: Tensor, mean_y: Tensor, ridge: float) -> Tensor:
        # W = S_yx (S_xx + ridge * mean(diag S_xx) I)^-1
        damping = ridge * within.diagonal().mean() + torch.finfo(within.dtype).tiny
        eye = torch.eye(len(within), dtype=within.dtype, device=within.device)
        coefficients = torch.linalg.solve(within + damping * eye, across.T).T
        self.weight.copy_(coefficients)
        self.bias.copy_(mean_y - coefficients @ mean_x)
        return coefficients

    def adjoint(self, gradient: Tensor, kept: Tensor) -> Tensor:
        return torch.matmul(self.weight.detach().to(gradient.dtype).T, gradient.flatten(2)).view_as(kept)


class Principal(Pointwise):
    """Pointwise from mixtures of the channels, ``mix (k, C) y + shift (k)``, y all channels in rank order.

    Candidates then compute ``mix W``, as many filters as they keep channels, none of them the layer's own: what spans
    the principal components of the result loses less than any k of its channels. Mixture r stands for the channel of
    rank r. Both are buffers: where weights are trained, the filters follow.

    ``components`` and ``offset`` are mix and shift as they suit the dense network's inputs; calibration goes out from
    them whenever the inputs are others (`correct`).
    """

    mix: Tensor
    shift: Tensor
    components: Tensor
    offset: Tensor

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__(kept, dropped)
        self.register_buffer("mix", torch.zeros(kept, kept + dropped))
        self.register_buffer("shift", torch.zeros(kept))
        self.register_buffer("components", torch.zeros(kept, kept + dropped))
        self.register_buffer("offset", torch.zeros(kept))
        self.choose()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name, of in (("components", "mix"), ("offset", "shift")):  # files of before there were any
            if prefix + of in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + of])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def choose(self) -> None:
        """Compute the channels themselves."""
        self.components.zero_().fill_diagonal_(1)
        self.offset.zero_()
        self.correct()

    @torch.no_grad()
    def correct(self, maps: Tensor | None = None, means: Tensor | None = None) -> None:
        """Mix what ``maps (C, C) y + means (C)`` makes of the channels instead of themselves; without: themselves."""
        if maps is None or means is None:
            self.mix.copy_(self.components)
            self.shift.copy_(self.offset)
            return
        components = self.components.to(maps.dtype)
        self.mix.copy_(components @ maps)
        self.shift.copy_(self.offset + components @ means)

    def project(self, ranks: Tensor) -> Tensor:
        """All channels ``(N, C, ...)`` in rank order -> what is computed, ``(N, k, ...)``."""
        mixed = torch.matmul(matching(self.mix, ranks), ranks.flatten(2)) + matching(self.shift, ranks)[:, None]
        return mixed.unflatten(2, ranks.shape[2:])

    def spread(self, gradient: Tensor) -> Tensor:
        """The adjoint of `project`: ``(N, k, ...) -> (N, C, ...)``."""
        return torch.matmul(matching(self.mix, gradient).T, gradient.flatten(2)).unflatten(2, gradient.shape[2:])

    def filters(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mixtures of filters ``(C, ...)`` and biases in rank order."""
        mix = matching(self.mix, weight)
        shift = matching(self.shift, weight)
        return (mix @ weight.flatten(1)).view(-1, *weight.shape[1:]), shift if bias is None else shift + mix @ bias

    @torch.no_grad()
    def fit_components(self, covariance: Tensor, metric: Tensor, means: Tensor) -> Tensor:
        """Keep the k principal components in the metric M, so that ``tr(M (1 - P) S (1 - P)^T)`` is least.

        The first k rows of that P (`principal_factors`) are ``mix``, and the others Phi_c times those.

        Args:
            covariance: S of the channels, ``(C, C)``; metric: what errors cost, ``(C, C)`` or ``(C)``.
            means: of the channels, ``(C)``; all in rank order, float64.

        Returns:
            The unexplained variance of each channel, ``(C)``.
        """
        kept = len(self.mix)
        back, forth = principal_factors(covariance, metric, kept)
        # Phi_c = back_d back_k^-1, where the k rows may be nearly dependent.
        phi = torch.linalg.lstsq(back[:kept].T, back[kept:].T, driver="gelsd" if back.device.type == "cpu" else None)
        whole = torch.cat([torch.eye(kept, dtype=back.dtype, device=back.device), phi.solution.T]) @ back[:kept] @ forth
        mix = whole[:kept]
        self.components.copy_(mix)
        self.offset.copy_(means[:kept] - mix @ means)
        self.correct()
        self.weight.copy_(phi.solution.T)
        self.bias.copy_(means[kept:] - phi.solution.T @ means[:kept])
        rest = torch.eye(len(whole), dtype=whole.dtype, device=whole.device) - whole
        return ((rest @ covariance) * rest).sum(1).clamp_min(0)

    @torch.no_grad()
    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """The same for every channel, ``(C)`` in rank order, as those that are computed are its own, too."""
        kept = len(self.mix)
        before = scale[:kept].clamp_min(LEAST_SCALE)
        for mix, offset in ((self.mix, self.shift), (self.components, self.offset)):
            mix.mul_(before[:, None])
            offset.mul_(before).add_(shift[:kept])
        self.weight.div_(before).mul_(scale[kept:, None])
        self.bias.mul_(scale[kept:]).add_(shift[kept:] - self.weight @ shift[:kept])


class OneSource(CheapOp):
    """Operations that read one kept channel for each dropped one: ``source (D)`` holds its index."""

    source: Tensor

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__()
        self.register_buffer("source", torch.arange(dropped) % kept)
        self.bias = nn.Parameter(torch.zeros(dropped))

    @torch.no_grad()
    def fit(self, within: Tensor, across: Tensor, mean_x: Tensor, mean_y: Tensor, ridge: float) -> Tensor:
        # The source is the kept channel that explains most of the variance of the dropped one. A constant one explains
        # nothing: what stands in its covariances is rounding, which a division by its variance would blow up.
        variance = within.diagonal()
        floor = 1e-9 * variance.mean().clamp_min(torch.finfo(within.dtype).tiny)
        slopes = torch.where(variance > floor, across / variance.clamp_min(floor), torch.zeros_like(across))
        source = (slopes * across).argmax(1)
        scale = slopes.gather(1, source[:, None]).squeeze(1)
        self.source.copy_(source)
        self._set_scale(scale.to(self.weight.dtype))
        self.bias.copy_(mean_y - scale * mean_x[source])
        return torch.zeros_like(across).scatter(1, source[:, None], scale[:, None])

    def _set_scale(self, scale: Tensor) -> None:
        self.weight.copy_(scale)


class Scale(OneSource):
    """``weight[d] * kept[source[d]] + bias[d]``, ``weight (D)``."""

    composes = True

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__(kept, dropped)
        self.weight = nn.Parameter(torch.zeros(dropped))

    def forward(self, kept: Tensor) -> Tensor:
        shape = (-1, *(1,) * (kept.dim() - 2))
        weight, bias = matching(self.weight, kept).view(shape), matching(self.bias, kept).view(shape)
        return torch.addcmul(bias, select(kept, 1, self.source), weight)

    def compose(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.weight.view(-1, *(1,) * (weight.dim() - 1))
        return scale * weight.index_select(0, self.source), self.bias + self.weight * bias.index_select(0, self.source)

    def pairing(self, kept: Tensor, gradient: Tensor) -> Tensor:
        gradient = gradient.detach().flatten(2)
        source = kept.detach().flatten(2).index_select(1, self.source)
        moments = torch.einsum("ndp,ndp->nd", source, gradient).to(self.weight.dtype)
        return moments @ self.weight + gradient.sum(2).to(self.weight.dtype) @ self.bias


class Depthwise(OneSource):
    """The paper's figure: a 3x3 convolution in H and W on one source channel each, ``weight (D, 1, 3, 3)``."""

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__(kept, dropped)
        self.weight = nn.Parameter(torch.zeros(dropped, 1, 3, 3))

    def forward(self, kept: Tensor) -> Tensor:
        source, weight, bias = select(kept, 1, self.source), matching(self.weight, kept), matching(self.bias, kept)
        if kept.dim() == 5:
            return F.conv3d(source, weight.unsqueeze(2), bias, padding=(0, 1, 1), groups=len(weight))
        return F.conv2d(source, weight, bias, padding=1, groups=len(weight))

    def _set_scale(self, scale: Tensor) -> None:
        self.weight.zero_()
        self.weight[:, 0, 1, 1] = scale


class Nothing(CheapOp):
    """Zeros: the channels are not rebuilt here, but by the convolution that reads them (see `absorb`)."""

    def __init__(self, kept: int, dropped: int) -> None:
        super().__init__()
        self.dropped = dropped

    @property
    def macs_per_position(self) -> int:
        return 0

    def forward(self, kept: Tensor) -> Tensor:
        return kept.new_zeros((kept.shape[0], self.dropped, *kept.shape[2:]))

    def fit(self, within: Tensor, across: Tensor, mean_x: Tensor, mean_y: Tensor, ridge: float) -> Tensor:
        return torch.zeros_like(across)


KINDS: dict[str, type[CheapOp]] = {
    "none": Nothing,
    "pointwise": Pointwise,
    "principal": Principal,
    "scale": Scale,
    "depthwise": Depthwise,
}
