"""Max pooling in channels-last memory, with the padding that stands in front of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .frames import Frames, full
from .kernels import max_pool
from .pack import from_rows, to_rows

__all__ = ["Pool"]


class Pool(nn.Module):
    """A MaxPool2d or MaxPool3d on channels-last clips ``(N, C, T, H, W)``; images are clips of one frame.

    PyTorch's own runs on one thread in this layout, and pads in a pass of its own.
    """

    frames_per_sample = 1

    def __init__(self, pool: nn.MaxPool2d | nn.MaxPool3d) -> None:
        super().__init__()
        self.dim = 3 if isinstance(pool, nn.MaxPool3d) else 2
        self.kernel, self.stride = _triple(pool.kernel_size, self.dim, 1), _triple(pool.stride, self.dim, 1)
        self.padding = _triple(pool.padding, self.dim, 0)

    @staticmethod
    def serves(module: Any) -> bool:
        """Whether this class computes what the module does."""
        if type(module) not in (nn.MaxPool2d, nn.MaxPool3d) or module._forward_hooks or module._forward_pre_hooks:
            return False
        dilation = (module.dilation,) if isinstance(module.dilation, int) else module.dilation
        return set(dilation) == {1} and not module.ceil_mode and not module.return_indices

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}"

    def forward(self, x: Tensor | Frames, pads: list[int] | None = None, value: float | None = None) -> Tensor | Frames:
        """``pads`` and ``value`` are those of ``F.pad`` in front."""
        if isinstance(x, Frames) and self.kernel[0] == self.stride[0] == 1 and not self.padding[0] and pads is None:
            return x.replaced(
                from_rows(max_pool(to_rows(x.held), self.kernel, self.stride, self.padding, self.padding))
            )
        rows = to_rows(full(x))
        if pads is None:
            return from_rows(max_pool(rows, self.kernel, self.stride, self.padding, self.padding))
        amounts = [*pads, *[0] * (6 - len(pads))]
        before, after = (amounts[4], amounts[2], amounts[0]), (amounts[5], amounts[3], amounts[1])
        return from_rows(max_pool(rows, self.kernel, self.stride, before, after, float(value or 0)))


def _triple(value: Any, dim: int, time: int) -> tuple[int, int, int]:
    values = (value,) * dim if isinstance(value, int) else value  # PyTorch keeps lists as they were given
    return tuple(values) if dim == 3 else (time, *values)
