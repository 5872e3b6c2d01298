"""Class names of the data sets that the zoo's weights were trained on."""

from __future__ import annotations

from importlib import resources

__all__ = ["kinetics400_classes"]


def kinetics400_classes() -> list[str]:
    """The 400 class names of Kinetics-400; position i names logit i of ``i3d_kinetics``.

    The names and their order are those of DeepMind's kinetics-i3d (``label_map.txt``, Apache-2.0).
    """
    text = resources.files("redconvert.zoo").joinpath("kinetics400.txt").read_text(encoding="utf-8")
    return text.splitlines()
