"""The steps of a run, one command each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mskip.cli import console, tables
from mskip.cli.options import AsJson, Output, Overrides, Quick, RunFolder

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.compressor.models import BaseModel
    from mskip.compressor.progress import Progress
    from mskip.compressor.recipe import ModelSpec, Recipe

DEFAULT_RECIPE = "smollm2-135m"
GATE_FAILED = 3

app = typer.Typer()


# -- what the commands share ------------------------------------------------------------------


def load_model(spec: ModelSpec, progress: Progress) -> BaseModel:
    """The base model, shown as a stage."""
    from mskip.compressor.models import load_base

    progress("load model", 0, 1, spec.name)
    base = load_base(spec)
    progress("load model", 1, 1, spec.name)
    return base


def resolve(
    name: str | None,
    overrides: Sequence[str],
    output: Path | None,
    *,
    model: str | None = None,
    data: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
) -> tuple[Run, Recipe]:
    """The run folder and the recipe that arguments mean.

    Args:
        name: recipe; None is the default one, or with ``resume`` the run's own.
        overrides: ``key.sub=value``; ``model`` and the others come after them.
        output: run folder.
        model: hub id or folder.
        data: hub id or file.
        trust_remote_code: run the model's code.
        resume: go on with the run at ``output``, else with the last one.
    """
    from mskip.compressor.artifact import RUNS, Run, open_run
    from mskip.compressor.recipe import load_recipe

    overrides = [*overrides]
    for key, value in (("model.name", model), ("data.source", data)):
        if value is not None:
            # A folder or file stays the same one when later commands run elsewhere.
            path = Path(value).expanduser()
            overrides.append(f"{key}={json.dumps(str(path.resolve()) if path.exists() else value)}")
    if trust_remote_code:
        overrides.append("model.trust_remote_code=true")
    if resume and name is None:
        run = open_run(output)
        return run, load_recipe(str(run.path / "recipe.yaml"), overrides)
    recipe = load_recipe(name or DEFAULT_RECIPE, overrides)
    return Run(output or RUNS / recipe.name), recipe


def is_tuned(run: Run) -> bool:
    """Whether tuning ended after the recipe was last written."""
    written, ended = run.path / "recipe.yaml", run.reports / "tune.json"
    return (
        not run.checkpoints.exists()
        and (run.path / "router.safetensors").is_file()
        and written.is_file()
        and ended.is_file()
        and ended.stat().st_mtime >= written.stat().st_mtime
    )


def check_same_recipe(run: Run, recipe: Recipe) -> None:
    """Refuse to go on with another recipe than the run's own."""
    from mskip.compressor.errors import RecipeError

    if (run.path / "recipe.yaml").is_file() and run.recipe() != recipe:
        raise RecipeError(
            f"the recipe differs from the one that {run.path} was started with.",
            "Resume without --set, --data or --recipe, or choose another --output.",
        )


# -- commands ---------------------------------------------------------------------------------


@app.command(
    rich_help_panel="Steps of a run",
    epilog="Example: mskip tune --model ./my-llama --data chats.jsonl --set tuning.epochs=2",
)
def tune(
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help=f"Recipe; {DEFAULT_RECIPE} if left out."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="ID|FOLDER", help="Base model: sets model.name.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="ID|FILE", help="Data: sets data.source.")
    ] = None,
    overrides: Overrides = None,
    output: Output = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            help="Go on after an interruption; by default with the last run.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", metavar="", help="Print the recipe and the plan; write nothing."),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", metavar="", help="Run Python code that the model brings."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tune routers for a base model; makes a run folder."""
    run, resolved = resolve(
        recipe,
        overrides or [],
        output,
        model=model,
        data=data,
        trust_remote_code=trust_remote_code,
        resume=resume,
    )
    if dry_run:
        from mskip.cli.plan import plan_of, show_plan

        console.emit(plan_of(run, resolved), as_json, show_plan)
        return
    if resume and is_tuned(run):
        check_same_recipe(run, resolved)
        run.remember()
        report = run.report("tune", "Make it with: mskip tune")
    else:
        from mskip.compressor.workflow import tune_run

        with console.progress() as progress:
            base = load_model(resolved.model, progress)
            report = tune_run(run, resolved, base, resume=resume, progress=progress)
    console.emit(report, as_json, tables.tuned)
    if not as_json:
        tables.next_step(run.path, f"mskip calibrate --capacity {resolved.routing.capacity:g}")


@app.command(rich_help_panel="Steps of a run", epilog="Example: mskip calibrate --capacity 0.5")
def calibrate(
    run: RunFolder = None,
    capacity: Annotated[
        float | None,
        typer.Option(metavar="0..1", help="Share to execute; the recipe's if left out."),
    ] = None,
    per_layer: Annotated[
        bool | None,
        typer.Option(
            "--per-layer/--global",
            metavar="",
            help="One tau a layer, or one for all; the recipe says which.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the threshold tau for a capacity."""
    from mskip.compressor.artifact import open_run
    from mskip.compressor.errors import RecipeError

    opened = open_run(run)
    recipe = opened.recipe()
    wanted = recipe.routing.capacity if capacity is None else capacity
    if not 0.0 <= wanted <= 1.0:  # before the model is loaded
        raise RecipeError(
            f"capacity {wanted:g} is out of range.", "It is the executed share: 0 <= c <= 1."
        )
    from mskip.compressor.workflow import calibrate_run

    each = recipe.calibration.per_layer if per_layer is None else per_layer
    with console.progress() as progress:
        base = load_model(recipe.model, progress)
        report = calibrate_run(opened, base, wanted, per_layer=each, progress=progress)
    console.emit(report, as_json, tables.calibrated)
    if not as_json:
        tables.next_step(opened.path, "mskip export")


@app.command(rich_help_panel="Steps of a run", epilog="Example: mskip export --onnx")
def export(
    run: RunFolder = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", metavar="", help="ONNX graph (the default).")
    ] = False,
    trt: Annotated[
        bool, typer.Option("--trt", metavar="", help="TensorRT engine: not yet.")
    ] = False,
    triton: Annotated[
        bool, typer.Option("--triton", metavar="", help="Triton repository: not yet.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export the conditional graph, with its contract and tokenizer."""
    from mskip.compressor.errors import MskipError

    for wanted, what in ((trt, "--trt (TensorRT)"), (triton, "--triton (Triton Inference Server)")):
        if wanted:
            raise MskipError(
                f"not in this version of mskip: export {what}.",
                "There is: mskip export --onnx (ONNX, for ONNX Runtime).",
            )
    from mskip.compressor.artifact import open_run

    opened = open_run(run)
    opened.calibration()  # before the model is loaded
    from mskip.exporters.onnx_export import export_run

    with console.progress() as progress:
        base = load_model(opened.recipe().model, progress)
        report = export_run(opened, base, progress)
    console.emit(report, as_json, lambda value: tables.exported(value, opened.path))
    if not as_json:
        tables.next_step(opened.path, "mskip validate")


@app.command(rich_help_panel="Steps of a run", epilog="Example: mskip validate runs/smollm2-135m")
def validate(run: RunFolder = None, as_json: AsJson = False) -> None:
    """Prove the export against PyTorch; exit status 3 when a gate fails."""
    from mskip.compressor.artifact import open_run

    opened = open_run(run)
    opened.calibration()
    from mskip.exporters.parity import validate_run

    with console.progress() as progress:
        base = load_model(opened.recipe().model, progress)
        report = validate_run(opened, base, progress)
    console.emit(report, as_json, tables.validated)
    if report["status"] != "passed":
        raise typer.Exit(GATE_FAILED)
    if not as_json:
        tables.next_step(opened.path, "mskip bench")


def _counts(text: str | None, option: str) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(
            f"{text!r} is no list of whole numbers from 1, such as 1,8.", param_hint=option
        )
    return numbers


@app.command(
    rich_help_panel="Steps of a run",
    epilog="Example: mskip bench --batch 1,8 --context 128,512 --repeats 5",
)
def bench(
    run: RunFolder = None,
    quick: Quick = False,
    batch: Annotated[
        str | None, typer.Option(metavar="N,...", help="Batch sizes; the recipe's if left out.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="N,...", help="Prompt lengths in tokens; likewise.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Timed rounds; likewise.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time dense, routed, all-execute, all-skip and static engines, interleaved."""
    batches, contexts = _counts(batch, "--batch"), _counts(context, "--context")
    from mskip.compressor.artifact import open_run
    from mskip.exporters.speed import bench_run

    opened = open_run(run)
    with console.progress() as progress:
        report = bench_run(
            opened,
            quick=quick,
            batches=batches,
            contexts=contexts,
            repeats=repeats,
            progress=progress,
        )
    console.emit(report, as_json, tables.benched)
    if not as_json:
        tables.next_step(opened.path, "mskip report")


@app.command(
    "eval", rich_help_panel="Steps of a run", epilog="Example: mskip eval --data chats.jsonl"
)
def evaluate(
    run: RunFolder = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="ID|FILE", help="Data; the run's held-out prompts if left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure quality on held-out text: dense, static and routed side by side."""
    from mskip.compressor.artifact import open_run

    opened = open_run(run)
    opened.calibration()
    from mskip.compressor.workflow import evaluate_run

    with console.progress() as progress:
        base = load_model(opened.recipe().model, progress)
        report = evaluate_run(opened, base, source=data, progress=progress)
    console.emit(report, as_json, tables.evaluated)


@app.command(rich_help_panel="Steps of a run", epilog="Example: mskip report")
def report(run: RunFolder = None, as_json: AsJson = False) -> None:
    """Write the HTML report of what the run holds."""
    from mskip.compressor.artifact import open_run
    from mskip.exporters.report import write_report

    path = write_report(open_run(run).path)

    def show(value: Any) -> None:
        console.say(value["report"], whole=True)

    console.emit({"report": str(path)}, as_json, show)
