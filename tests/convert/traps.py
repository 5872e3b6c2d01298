"""Small networks that do what breaks tools which read networks; at module level, so that they pickle."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

X2, X3 = (2, 3, 12, 12), (2, 3, 4, 8, 8)


def conv3(c_in: int = 3, c_out: int = 16) -> nn.Conv3d:
    return nn.Conv3d(c_in, c_out, 3, padding=1)


class Shared(nn.Module):
    """One convolution under two names, called twice; the second time on another size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv3()
        self.first = conv3(16, 16)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.max_pool3d(self.first(self.stem(x)), 2)).relu().mean((2, 3, 4))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = conv3(), conv3()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).relu()


class Inherits(nn.Conv3d):
    """A subclass with the forward of Conv3d, a method of its own and another signature."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1)
        self.note = "kept"

    def describe(self) -> str:
        return f"{self.in_channels}->{self.out_channels} {self.note}"


class Own(nn.Conv2d):
    """A forward of its own: the weight is halved."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / 2, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Taught(Own):
    """The same, and a test registers how it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / 2, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3()
        self.weight = nn.Parameter(torch.randn(8, 16, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(self.conv(x).relu(), self.weight)


class OnlyFunctional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight)


class ListIn(nn.Module):
    """Changes the list that it is given, as SlowFast does."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = conv3(), conv3()

    def forward(self, clips: list[Tensor]) -> Tensor:
        clips[0] = self.slow(clips[0]).relu()
        clips[1] = self.fast(clips[1]).relu()
        return torch.cat([clip.mean((2, 3, 4)) for clip in clips], dim=1)


class DictOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv3(), nn.Conv3d(16, 5, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        features = self.conv(x).relu()
        return {"features": features, "out": self.head(features) * scale}


class PlainList(nn.Module):
    """A convolution that named_modules does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = conv3()
        self.hidden = [conv3(16, 16)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.seen(x).relu())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.norm, self.conv = conv3(), nn.BatchNorm3d(16, momentum=None), conv3(16, 16)

    def block(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.stem(x)).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant).mean((2, 3, 4))


class Branches(nn.Module):
    """Control flow on values: fx reads the parts alone, and fake tensors fail."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv3(), nn.BatchNorm3d(16), nn.ReLU(inplace=True), conv3(16, 16))
        self.rare = conv3(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if float(x.sum()) > 1e9:
            x = self.rare(x)
        return x.relu()


class FlatBranches(nn.Module):
    """The same, with no part that fx could read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv3(), conv3(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x).relu() if float(x.abs().sum()) > 0 else x


class Remembers(nn.Module):
    """Stores what it computes on itself, in an attribute, a list and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv3(), nn.BatchNorm3d(16)
        self.last, self.history = None, []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(self.conv(x))
        self.history.append(self.last)
        self.calls += 1
        return self.last.relu() + torch.rand(())


class InPlace(nn.Module):
    """Convolutions whose results are changed in place, by a ReLU and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv3(), conv3(16, 16)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        y = self.second(x)
        y += x
        return y.mean((2, 3, 4))


class Uncopiable(nn.Module):
    """No copy to read: fx and the hooked forward have only the network itself, which stores what it computes."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.branch = branch
        self.conv, self.norm, self.drop = conv3(), nn.BatchNorm3d(16), nn.Dropout()
        self.last, self.history = None, []
        self.register_buffer("calls", torch.zeros(()))
        self.pipe = (item for item in "a generator has no copy")

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(self.conv(x))
        self.history.append(self.last)
        self.calls += 1
        if self.branch and float(self.last.sum()) > 1e9:
            return self.last
        return self.drop(self.last).relu() + torch.rand(())
