"""`mskip run`: every step in one process, with the base model loaded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mskip.cli import console, tables
from mskip.cli.options import GATE_FAILED, AsJson, Output, Overrides, Quick
from mskip.cli.plan import announce_memory
from mskip.cli.session import check_same_recipe, fetch, is_tuned, load_model, resolve

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.compressor.models import BaseModel
    from mskip.compressor.progress import Progress
    from mskip.compressor.recipe import Recipe

app = typer.Typer()

_OUTPUTS = {
    "tune": "reports/tune.json",
    "calibrate": "calibration.json",
    "eval": "reports/eval.json",
    "export": "reports/export.json",
    "validate": "reports/validate.json",
    "bench": "reports/bench.json",
}
_READS = {
    "calibrate": "tune",
    "eval": "calibrate",
    "export": "calibrate",
    "validate": "export",
    "bench": "export",
}


_ENGINE = ("export", "validate", "bench")
"""Steps of the exported graph, which takes one decision a sequence."""


def finished(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Reports of the steps that need not be done again.

    A step is finished when its output is newer than that of the step it reads, that one is
    finished too, and the calibration is the recipe's.
    """
    from mskip.compressor.files import read_json

    reports: dict[str, Any] = {}
    times: dict[str, float] = {}
    asked = recipe.routing.capacity, recipe.calibration.per_layer, None
    for step, name in _OUTPUTS.items():
        path = run.path / name
        before = 0.0 if step == "tune" else times.get(_READS[step])
        if before is None or not path.is_file() or path.stat().st_mtime < before:
            continue
        report = read_json(path, f"{step} report", "Run again without --resume.")
        if step == "tune" and not is_tuned(run):
            continue
        if step == "calibrate":
            found = report.get("target"), report.get("per_layer"), report.get("data")
            if found != asked:
                continue
        reports[step], times[step] = report, path.stat().st_mtime
    return reports


class _Lender:
    """Loads the base model when the first step asks, and lets it go before timing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.base: BaseModel | None = None

    def __call__(self, progress: Progress) -> BaseModel:
        if self.base is None:
            self.base = load_model(self.recipe.model, progress)
        return self.base


def _steps(
    run: Run, recipe: Recipe, lender: _Lender, *, quick: bool, resume: bool
) -> dict[str, Callable[[Progress], Any]]:
    from mskip.compressor.calibrate_step import calibrate_run
    from mskip.compressor.evaluate_step import evaluate_run
    from mskip.compressor.goals import Goal
    from mskip.compressor.tune_step import tune_run
    from mskip.exporters.onnx_export import export_run
    from mskip.exporters.parity import validate_run
    from mskip.exporters.speed import bench_run

    goal, per_layer = Goal("capacity", recipe.routing.capacity), recipe.calibration.per_layer

    def bench(progress: Progress) -> Any:
        lender.base = None  # its memory is the engines' now
        return bench_run(
            run, quick=quick, batches=None, contexts=None, repeats=None, progress=progress
        )

    steps: dict[str, Callable[[Progress], Any]] = {
        "tune": lambda p: tune_run(run, recipe, lender(p), resume=resume, progress=p),
        "calibrate": lambda p: calibrate_run(run, lender(p), goal, per_layer=per_layer, progress=p),
        "eval": lambda p: evaluate_run(run, lender(p), progress=p),
        "export": lambda p: export_run(run, lender(p), p),
        "validate": lambda p: validate_run(run, lender(p), p),
        "bench": bench,
    }
    if recipe.routing.unit == "token":
        steps = {name: step for name, step in steps.items() if name not in _ENGINE}
    return steps


@app.command(
    "run", rich_help_panel="Steps of a run", epilog="Example: mskip run smollm2-135m --quick"
)
def run_all(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Shipped recipe, or a file.")],
    overrides: Overrides = None,
    output: Output = None,
    quick: Quick = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", metavar="", help="Keep finished steps, go on with the first other one."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Do every step, from tuning to the report; exit status 3 when a gate failed."""
    from mskip.exporters.report import write_report

    run, resolved = resolve(recipe, overrides or [], output)
    reports: dict[str, Any] = {}
    if resume:
        check_same_recipe(run, resolved)
        reports = finished(run, resolved)
        if reports:
            run.remember()
    if len(reports) < len(_OUTPUTS):
        fetch(resolved.model)
    if "tune" not in reports:
        announce_memory(resolved)
    lender = _Lender(resolved)
    for name, step in _steps(run, resolved, lender, quick=quick, resume=resume).items():
        if name in reports:
            console.note(f"== {name}: kept")
            continue
        console.note(f"== {name}")
        with console.progress() as progress:
            reports[name] = step(progress)
    if resolved.routing.unit == "token":
        console.note(f"== {', '.join(_ENGINE)}: not run: per-token routing runs in PyTorch only")
    html = write_report(run.path)
    # Without an engine there is no gate.
    passed = "validate" not in reports or reports["validate"]["status"] == "passed"
    result = {"run": str(run.path), "report": str(html), "passed": passed, "steps": reports}
    console.emit(result, as_json, lambda _: _show(reports, html))
    if not passed:
        raise typer.Exit(GATE_FAILED)


def _show(reports: dict[str, Any], html: Path) -> None:
    tables.summary(reports)
    console.say()
    console.say(f"report: {console.shown(html)}", whole=True)
