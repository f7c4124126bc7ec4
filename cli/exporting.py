"""`mskip export`: the graph in a target's form, and the engine that is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mskip.cli import console, tables
from mskip.cli.options import (
    FOR_TENSORRT,
    GATE_FAILED,
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
    from mskip.exporters.targets import Form
    from mskip.exporters.triton.repository import Deployment
    from mskip.exporters.trt_engine import Build, Mode
    from mskip.exporters.trt_profile import Profile

_TENSORRT = "TensorRT"
_TRITON = "Triton Inference Server, with --triton"
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
        bool,
        typer.Option("--triton", metavar="", help="Repository for Triton Inference Server."),
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
    trt_peers: Annotated[
        bool,
        typer.Option(
            "--trt-peers",
            metavar="",
            help="Also the dense and static engines that mskip bench --trt compares with.",
            rich_help_panel=_TENSORRT,
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", metavar="", help="All that the builder logs.", rich_help_panel=_TENSORRT
        ),
    ] = False,
    backend: Annotated[
        str,
        typer.Option(
            metavar="python|onnxruntime|tensorrt",
            help="What holds the graph: the model that schedules requests, or a backend of Triton.",
            rich_help_panel=_TRITON,
        ),
    ] = "python",
    triton_target: Annotated[
        str,
        typer.Option(metavar="YY.MM", help="Release of Triton.", rich_help_panel=_TRITON),
    ] = "26.07",
    max_batch_size: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Sequences that decode together.", rich_help_panel=_TRITON
        ),
    ] = 16,
    max_positions: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="Longest prompt and answer.", rich_help_panel=_TRITON
        ),
    ] = 2048,
    instances: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Schedulers, each with its graph.", rich_help_panel=_TRITON
        ),
    ] = 1,
    queue: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Requests that may wait.", rich_help_panel=_TRITON),
    ] = 128,
    queue_delay_us: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="US",
            help="That the tokenizer waits for more texts.",
            rich_help_panel=_TRITON,
        ),
    ] = 0,
    kv_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="MIB",
            help="Keys and values that running sequences may reserve.",
            rich_help_panel=_TRITON,
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Of one call; 0: the runtime's.", rich_help_panel=_TRITON
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Export the conditional graph, with its contract and tokenizer."""
    if precision not in (None, *_PRECISIONS):
        raise typer.BadParameter(f"--precision is one of {', '.join(_PRECISIONS)}.")
    if triton:
        if trt or target is not Target.portable:
            raise typer.BadParameter("--triton has the form that its --backend needs.")
        from mskip.exporters.triton.repository import Deployment

        deployment = Deployment(
            backend=backend,  # type: ignore[arg-type]  # it says which there are
            target=triton_target,
            sequences=max_batch_size,
            positions=max_positions,
            instances=instances,
            queue=queue,
            queue_delay_us=queue_delay_us,
            kv_mib=kv_mib,
            threads=threads,
            weights=weights.value,
        )
        _repository(run, deployment, precision, as_json)
        return
    if trt_mode not in (None, "if", "plugin"):
        raise typer.BadParameter("--trt-mode is if or plugin.")
    from mskip.compressor.artifact import open_run

    if trt and target is Target.ort:
        raise typer.BadParameter("--trt builds from a graph with --target trt or trt-plugin.")
    if not trt and (trt_mode or trt_peers or trt_builder or compute_capability):
        raise typer.BadParameter(
            "--trt-mode, --trt-peers, --trt-builder and --compute-capability are for --trt; a "
            "graph alone has --target trt or trt-plugin."
        )
    opened = open_run(run)
    opened.calibration()  # before the model is loaded
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
        build = Build(
            builder, sizes, capabilities, workspace, timing_cache, verbose, mode, trt_peers
        )
        target = Target(build.form.target)
    form = Form(target.value, weights.value)
    report = _graph(opened, form, sizes, precision)
    if build is not None:
        _engine(opened, build, as_json)
        return
    console.emit(report, as_json, lambda value: tables.exported(value, opened.path))
    if not as_json:
        tables.next_step(opened.path, f"mskip validate{form.options}")


def _repository(
    path: Path | None, deployment: Deployment, precision: str | None, as_json: bool
) -> None:
    """Write the repository; the graph and the dial first, where the run has none."""
    from mskip.compressor.artifact import open_run, routing_unit
    from mskip.compressor.dial import find_dial, saved_dial
    from mskip.compressor.models import load_tokenizer
    from mskip.compressor.sublayers import require_unit
    from mskip.exporters.contract import CONTRACT
    from mskip.exporters.onnx_export import export_run
    from mskip.exporters.triton.repository import FOLDER, write_repository

    run = open_run(path)
    require_unit(routing_unit(run), "sequence", "mskip export --triton")
    run.calibration()
    form = deployment.form
    dial = saved_dial(run)
    exported = (form.folder(run) / CONTRACT).is_file()
    spec = run.recipe().model
    if dial is None:
        with working(spec) as (base, progress):
            dial = find_dial(run, base, progress)
            if not exported and form.target == "ort":
                export_run(run, base, progress, form)
                exported = True
    if not exported:
        if form.target == "trt":
            spec = spec.model_copy(update={"dtype": _PRECISIONS[precision or "fp16"]})
        with working(spec) as (base, progress):
            export_run(run, base, progress, form, deployment.positions)
    with console.progress() as progress:
        tokenizer = load_tokenizer(form.folder(run))
        record = write_repository(run, tokenizer, dial, deployment, progress)
    folder = run.path / FOLDER
    report = {"repository": str(folder), **record, **_linted(folder)}
    console.emit(report, as_json, lambda value: tables.repository(value, folder))
    if not as_json:
        tables.next_step(run.path, "mskip serve --check" if record["backend"] == "python" else "")
    if report["faults"]:
        raise typer.Exit(GATE_FAILED)


def _linted(folder: Path) -> dict[str, Any]:
    """What lint finds; or that it was not run."""
    from mskip.compressor.errors import MissingExtraError
    from mskip.exporters.triton.lint import lint

    try:
        return lint(folder)
    except MissingExtraError as error:
        return {"lint": f"not run: {error.message} {error.remedy}", "faults": [], "loaded": {}}


def _graph(run: Run, form: Form, sizes: Profile, precision: str | None) -> dict[str, Any]:
    """Export the graph; for TensorRT with the command of its own tool beside it."""
    from mskip.exporters.onnx_export import export_run

    spec = run.recipe().model
    if Target(form.target) in FOR_TENSORRT:
        spec = spec.model_copy(update={"dtype": _PRECISIONS[precision or "fp16"]})
    with working(spec) as (base, progress):
        report = export_run(run, base, progress, form, sizes.context)
    if form.target == "trt":
        _trtexec(run, form, sizes)
    return report


def _trtexec(run: Run, form: Form, sizes: Profile) -> None:
    from mskip.compressor.files import write_text
    from mskip.exporters.contract import CONTRACT, read_contract
    from mskip.exporters.onnx_export import MODEL
    from mskip.exporters.trt_engine import ENGINE
    from mskip.exporters.trt_profile import trtexec_script

    folder = form.folder(run)
    script = trtexec_script(read_contract(folder / CONTRACT), sizes, MODEL, ENGINE)
    write_text(folder / "trtexec.sh", script)


def _engine(run: Run, build: Build, as_json: bool) -> None:
    from mskip.exporters.trt_engine import engine_run

    with console.progress() as progress:
        report = engine_run(run, build, progress)
    console.emit(report, as_json, lambda value: tables.built(value, run.path))
