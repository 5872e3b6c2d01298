"""Which layers the paper makes dynamic in each of its networks, by the network's name in the zoo.

    dynamic = redconvert.convert(zoo.create("r2plus1d_18"), redconvert.presets["r2plus1d_18"], example_inputs=clips)

| preset | dynamic |
| --- | --- |
| r2plus1d_18, tpn_r2plus1d_18, corrnet_r2plus1d_18 | the spatial (1x3x3) convolutions of the residual blocks |
| i3d_kinetics, i3d_v2, x3d_m | every convolution that pays; the classifier stays dense |
| tsn_resnet50, tpn_resnet50 | every convolution of the ResNet, decided per clip of 16 (8) frames in the batch |
| pspnet_resnet18 | every convolution, channels only |
| yowo_i3d, yowo_x3d_m | every convolution of the backbone; the detection head stays dense |

"Pays" is `ConvertConfig.min_saving`. X3D's squeeze-and-excitation, two convolutions on a single position, stays dense.
A preset is a plain, frozen `ConvertConfig`: change it with `dataclasses.replace`, for example
``replace(presets["tsn_resnet50"], num_frames=8)``. YOWO's backbone is frozen in the paper, which is a matter of its
parameters and not of the conversion: ``zoo.create("yowo_i3d", freeze_backbone=True)``. Gates and cheap operations,
which conversion adds, learn all the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from .config import ConvertConfig
from .errors import RedconvertError

__all__ = ["Presets", "presets"]

# Rules here only leave layers out, so that `dataclasses.replace` reaches all the others.
_NOT_SPATIAL = r"re:(?!(backbone\.)?layer\d\.\d+\.conv[12]\.0\.0$).*"
_SQUEEZE = "*.norm_b.1.block.*"
_TWO_PLUS_ONE = ConvertConfig(rules=((_NOT_SPATIAL, None),))
_EVERY = ConvertConfig()

_PRESETS = {
    "corrnet_r2plus1d_18": _TWO_PLUS_ONE,
    "i3d_kinetics": _EVERY,
    "i3d_v2": _EVERY,
    "pspnet_resnet18": ConvertConfig(temporal=False),
    "r2plus1d_18": _TWO_PLUS_ONE,
    "tpn_r2plus1d_18": _TWO_PLUS_ONE,
    "tpn_resnet50": ConvertConfig(num_frames=8, rules=(("neck.*", None),)),
    "tsn_resnet50": ConvertConfig(num_frames=16),
    "x3d_m": ConvertConfig(rules=((_SQUEEZE, None),)),
    "yowo_i3d": ConvertConfig(rules=(("head.*", None),)),
    "yowo_x3d_m": ConvertConfig(rules=((_SQUEEZE, None), ("head.*", None))),
}


class UnknownPresetError(RedconvertError, KeyError):
    """A KeyError too, as mappings have it: ``presets.get(name)`` is then None."""

    __str__ = Exception.__str__  # KeyError's own shows the message in quotes


class Presets(Mapping[str, ConvertConfig]):
    """The presets by name; an unknown name is an error that gives the nearest one."""

    def __getitem__(self, name: str) -> ConvertConfig:
        if name not in _PRESETS:
            near = difflib.get_close_matches(str(name).lower(), _PRESETS, n=1, cutoff=0.4)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise UnknownPresetError(f"There is no preset '{name}'. {hint}There are: {', '.join(sorted(_PRESETS))}.")
        return _PRESETS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(_PRESETS))

    def __len__(self) -> int:
        return len(_PRESETS)

    def __repr__(self) -> str:
        return f"presets({', '.join(self)})"


presets = Presets()
