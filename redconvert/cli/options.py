"""Options that commands share, and what their values mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ConvertConfig, LayerConfig
from ..errors import RedconvertError
from ..presets import presets

__all__ = [
    "Absorb",
    "AsJson",
    "BatchSize",
    "ConfigFile",
    "Data",
    "Device",
    "FrameStep",
    "Input",
    "Mean",
    "Measure",
    "Model",
    "More",
    "NumFrames",
    "Out",
    "Rules",
    "SampleCount",
    "SearchSpace",
    "Std",
    "Trust",
    "Weights",
    "read_config",
    "read_shape",
]

MODEL_HELP = (
    "A state dict, checkpoint or safetensors file, a folder of save_pretrained, timm:NAME, torchvision:NAME, "
    "pytorchvideo:NAME, zoo:NAME, or module.path:factory."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Input shape such as 1,3,16,112,112; repeat it for a network that takes a list."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Measure = Annotated[
    bool,
    typer.Option("--measure", help="Time each layer here; leave dense what would not gain.", show_default=False),
]
Trust = Annotated[bool, typer.Option("--trust", help="Load pickled modules, which can run any code.")]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help="PATTERN=SETTING, the first match wins. A pattern is a glob or re:...; a setting is skip, channel, "
        "temporal or both.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A ConvertConfig as JSON, or a preset: r2plus1d_18, x3d_m, ...", show_default=False),
]
SearchSpace = Annotated[int | None, typer.Option(help="Candidates on each axis.", show_default="2")]
Absorb = Annotated[
    bool,
    typer.Option(
        "--absorb",
        help="Do not rebuild channels that one convolution alone reads, also behind depthwise ones: it does without.",
        show_default=False,
    ),
]
MixInputs = Annotated[
    bool,
    typer.Option(
        "--mix-inputs",
        help="Reduced layers read mixtures of their input channels, too: half of both costs a quarter.",
        show_default=False,
    ),
]
NumFrames = Annotated[int | None, typer.Option(help="Frames per clip where a 2D network's batch holds frames.")]
Data = Annotated[
    list[Path],
    typer.Option("--data", help="Folder, searched through, or file: videos or images without labels. Repeat it."),
]
Out = Annotated[Path, typer.Option(help="Folder for the dynamic network, as save_pretrained writes it.")]
More = Annotated[
    list[Path] | None, typer.Argument(help="More of --data, so that --data clips/*.mp4 works.", show_default=False)
]
Weights = Annotated[
    str | None, typer.Option(help="A checkpoint for MODEL; for zoo: also what its builder knows, KINETICS400.")
]
SampleCount = Annotated[int, typer.Option("--samples", min=1, help="Clips or images, spread over the files.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Of them at once.")]
FrameStep = Annotated[int, typer.Option("--step", min=1, help="From frame to frame of a clip, in 25ths of a second.")]
Mean = Annotated[
    str | None, typer.Option(help="Of each colour, for values in [0, 1]: 0.5,0.5,0.5.", show_default="the model's")
]
Std = Annotated[str | None, typer.Option(help="Likewise.", show_default="the model's")]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1.", show_default="cuda, else cpu")]


def read_config(
    file: Path | None,
    rules: list[str] | None,
    search_space: int | None,
    num_frames: int | None,
    model: str = "",
    absorb: bool = False,
    mix_inputs: bool = False,
) -> ConvertConfig:
    """The config that the options describe; networks of the zoo that take frames in the batch know how many."""
    values = {} if file is None else _config_of(file)
    known = presets[model[4:]].num_frames if model.startswith("zoo:") and model[4:] in presets else None
    if known is not None:
        values.setdefault("num_frames", known)
    if search_space is not None:
        values["search_space"] = search_space
    if num_frames is not None:
        values["num_frames"] = num_frames
    if absorb:
        values["absorb"] = True
    if mix_inputs:
        values["mix_inputs"] = True
    values["rules"] = [*(_rule(text) for text in rules or ()), *values.get("rules", ())]
    return ConvertConfig.from_dict(values)


def _config_of(file: Path) -> dict[str, Any]:
    if str(file) in presets and not file.exists():
        return presets[str(file)].to_dict()
    try:
        return ConvertConfig.from_json(file.read_text(encoding="utf-8")).to_dict()
    except (OSError, UnicodeDecodeError) as error:
        raise RedconvertError(
            f"the config '{file}' could not be read: {error}. Presets are {', '.join(presets)}"
        ) from error


SETTINGS: dict[str, dict[str, bool] | None] = {
    "skip": None,
    "channel": {"channel": True, "temporal": False},
    "temporal": {"channel": False, "temporal": True},
    "both": {"channel": True, "temporal": True},
}


def _rule(text: str) -> tuple[str, dict[str, bool] | LayerConfig | None]:
    pattern, equals, setting = text.rpartition("=")
    if not equals or not pattern or setting not in SETTINGS:
        raise typer.BadParameter(
            f"'{text}' is not PATTERN=SETTING with one of {', '.join(SETTINGS)}", param_hint="--rule"
        )
    return pattern, SETTINGS[setting]


def read_shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise typer.BadParameter(f"'{text}' is not a shape such as 1,3,16,112,112", param_hint="--input")
    return shape
