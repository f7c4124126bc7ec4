"""`mskip export`: the graph in a target's form, and the engine that is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mskip.cli import console, tables
from mskip.cli.options import (
    FOR_TENSORRT,
    AsJson,
    GraphTarget,
    GraphWeights,
    RunFolder,
    Target,
    Weights,
)
from mskip.cli.session import working

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.compressor.errors import MskipError
    from mskip.exporters.trt_engine import Build, Mode

_TENSORRT = "TensorRT"
_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export(
    run: RunFolder = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", metavar="", help="ONNX graph (the default).")
    ] = False,
    trt: Annotated[
        bool,
        typer.Option("--trt", metavar="", help="TensorRT engine, from a graph with --target trt."),
    ] = False,
    triton: Annotated[
        bool, typer.Option("--triton", metavar="", help="Triton repository: not yet.")
    ] = False,
    target: GraphTarget = Target.portable,
    weights: GraphWeights = Weights.float,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|fp16|bf16",
            help="Type of the graph for TensorRT; fp16 if left out.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Least, likeliest, largest sizes: 'batch=1,4,8 seq=1,512,2048 context=4096'.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    trt_builder: Annotated[
        str | None,
        typer.Option(
            metavar="tensorrt|tensorrt-rtx",
            help="Builder; the first that can build here if left out.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    trt_mode: Annotated[
        str | None,
        typer.Option(
            metavar="if|plugin",
            help="What skips: conditionals, or plugins row by row (needs TensorRT itself). Left "
            "out: plugins for batches where the builder has them.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X.Y",
            help="Build for this GPU, none needed here (tensorrt-rtx); repeatable.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    workspace: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", min=0.0, help="Largest scratch memory.", rich_help_panel=_TENSORRT
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where measured kernels are kept.", rich_help_panel=_TENSORRT
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", metavar="", help="All that the builder logs.", rich_help_panel=_TENSORRT
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export the conditional graph, with its contract and tokenizer."""
    from mskip.compressor.errors import MskipError

    if triton:
        raise MskipError(
            "not in this version of mskip: export --triton (Triton Inference Server).",
            "There is: mskip export (ONNX), mskip export --trt (TensorRT).",
        )
    if precision not in (None, *_PRECISIONS):
        raise typer.BadParameter(f"--precision is one of {', '.join(_PRECISIONS)}.")
    if trt_mode not in (None, "if", "plugin"):
        raise typer.BadParameter("--trt-mode is if or plugin.")
    from mskip.compressor.artifact import open_run

    if trt and target is Target.ort:
        raise typer.BadParameter("--trt builds from a graph with --target trt or trt-plugin.")
    if trt_mode is not None and not trt:
        raise typer.BadParameter("--trt-mode is for --trt; a graph alone has --target trt-plugin.")
    opened = open_run(run)
    opened.calibration()  # before the model is loaded
    from mskip.exporters.onnx_export import export_run
    from mskip.exporters.targets import Form
    from mskip.exporters.trt_profile import Profile, parse_profile

    if not trt and target not in FOR_TENSORRT and (precision or profile):
        raise typer.BadParameter("--precision and --profile are for --trt and --target trt.")
    sizes = Profile() if profile is None else parse_profile(profile)
    build: Build | None = None
    if trt:
        from mskip.exporters.trt_builders import choose
        from mskip.exporters.trt_engine import Build

        capabilities = compute_capability or []
        plugins = trt_mode == "plugin" or target is Target.trt_plugin
        builder = choose(trt_builder, capabilities, plugins=plugins)
        if trt_mode is None and sizes.batch[2] > 1:
            plugins = plugins or builder.row.plugins
        mode: Mode = "plugin" if plugins else "if"
        build = Build(builder, sizes, capabilities, workspace, timing_cache, verbose, mode)
        target = Target(build.form.target)
    form = Form(target.value, weights.value)
    spec = opened.recipe().model
    if target in FOR_TENSORRT:
        spec = spec.model_copy(update={"dtype": _PRECISIONS[precision or "fp16"]})
    with working(spec) as (base, progress):
        report = export_run(opened, base, progress, form, sizes.context)
    if build is not None:
        _engine(opened, build, as_json)
        return
    console.emit(report, as_json, lambda value: tables.exported(value, opened.path))
    if not as_json:
        tables.next_step(opened.path, f"mskip validate{form.options}")


def _engine(run: Run, build: Build, as_json: bool) -> None:
    from mskip.exporters.trt_engine import engine_run

    with console.progress() as progress:
        report = engine_run(run, build, progress)
    console.emit(report, as_json, lambda value: tables.built(value, run.path))


def engine_not_run(remedy: str) -> MskipError:
    """Why no engine is executed: there is no GPU, or nothing yet that would run it."""
    import torch

    from mskip.compressor.errors import MskipError

    device = torch.cuda.is_available()
    reason = "this version of mskip has no runner for engines" if device else "no CUDA device"
    return MskipError(f"TensorRT engine: not run: {reason}.", remedy)
