"""`mskip reproduce`: a table of the paper, one run a row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mskip.cli import console
from mskip.cli.job import finished
from mskip.cli.options import AsJson, Output, Overrides
from mskip.cli.plan import announce_memory
from mskip.cli.session import is_tuned, overridden, text_config, working

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.compressor.grid import Grid
    from mskip.compressor.models import BaseModel
    from mskip.compressor.progress import Progress
    from mskip.compressor.recipe import Recipe

app = typer.Typer()


@app.command(
    rich_help_panel="Around a run",
    epilog="Example: mskip reproduce table1 --model ./my-llama --task-dir data/eval --limit 100",
)
def reproduce(
    table: Annotated[
        str,
        typer.Argument(metavar="TABLE", help="table1, table-data, fig2, methods, or a YAML file."),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="ID|FOLDER", help="Base model; the table's if left out.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Recipe of all rows; the table's if left out."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="ID|FILE", help="Data: sets data.source.")
    ] = None,
    overrides: Overrides = None,
    task_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="JSONL files of the tasks; the hub if left out."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Documents of each task.")
    ] = None,
    tasks: Annotated[
        bool, typer.Option("--tasks/--no-tasks", metavar="", help="Score the tasks too.")
    ] = True,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", metavar="", help="Export and time every row too.")
    ] = True,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Run a table of the paper; a run that was cut short goes on where it stood."""
    from mskip.compressor.artifact import RUNS, Run
    from mskip.compressor.grid import load_grid, row_recipe

    grid = load_grid(table)
    if recipe is not None:
        grid = grid.model_copy(update={"recipe": recipe})
    changes = overridden(overrides or [], model=model, data=data)
    first = row_recipe(grid, grid.rows[0], changes, None)
    layers = int(text_config(first.model)["num_hidden_layers"])
    recipes = {row.name: row_recipe(grid, row, changes, layers) for row in grid.rows}
    if tasks:
        from mskip.exporters.task_scores import check_tasks

        check_tasks(grid.tasks, task_dir)
    folder = output or RUNS / grid.name
    announce_memory(first)
    with working(first.model) as (base, progress):
        for number, (name, resolved) in enumerate(recipes.items()):
            run = Run(folder / name)
            methods = ["dense", "routed"] if number == 0 else ["routed"]
            _finish(run, resolved, base, progress, speed=speed)
            if tasks:
                from mskip.exporters.task_scores import score_run

                score_run(
                    run,
                    base,
                    methods=methods,
                    tasks=grid.tasks,
                    task_dir=task_dir,
                    limit=limit,
                    progress=progress,
                )
    report = _report(grid, folder, tasks)
    from mskip.compressor.files import write_json, write_text

    write_json(folder / "table.json", report)
    write_text(folder / "table.md", _markdown(report))
    console.emit(report, as_json, lambda value: _show(value, folder))


def _finish(
    run: Run,
    recipe: Recipe,
    base: BaseModel,
    progress: Progress,
    *,
    speed: bool,
) -> None:
    """Every step of a row that is not finished yet."""
    from mskip.compressor.calibrate_step import calibrate_run
    from mskip.compressor.evaluate_step import evaluate_run
    from mskip.compressor.goals import Goal
    from mskip.compressor.tune_step import tune_run

    same = (run.path / "recipe.yaml").is_file() and run.recipe() == recipe
    done = finished(run, recipe) if same else {}
    if "tune" not in done:
        tune_run(run, recipe, base, resume=same and not is_tuned(run), progress=progress)
    if "calibrate" not in done:
        goal = Goal("capacity", recipe.routing.capacity)
        calibrate_run(run, base, goal, per_layer=recipe.calibration.per_layer, progress=progress)
    if "eval" not in done:
        evaluate_run(run, base, progress=progress)
    if speed and "bench" not in done:
        from mskip.exporters.onnx_export import export_run
        from mskip.exporters.speed import bench_run

        if "export" not in done:
            export_run(run, base, progress)
        bench_run(
            run, quick=True, batches=[1], contexts=[SPEED_CONTEXT], repeats=None, progress=progress
        )


SPEED_CONTEXT = 512
AVERAGES = "average", "against dense"


def _report(grid: Grid, folder: Path, tasks: bool) -> dict[str, Any]:
    """The table's figures, from the reports of its runs."""
    from mskip.compressor.artifact import Run

    rows: list[dict[str, Any]] = []
    dense_scores: dict[str, Any] | None = None
    for row in grid.rows:
        run = Run(folder / row.name)
        quality = run.report("eval", "")["rows"]
        ours = quality[-1]
        scores = {each["method"]: each for each in run.report("tasks", "")["rows"]} if tasks else {}
        if not rows:
            dense_scores = scores.get("dense")
            rows.append(_row("dense", quality[0], dense_scores, 1.0))
        bench = run.reports / "bench.json"
        speedup = None
        if bench.is_file():
            timed = run.report("bench", "")["rows"]
            speedup = next(each["speedup"] for each in timed if each["phase"] == "prefill")
        rows.append(_row(row.name, ours, scores.get("routed"), speedup, dense_scores))
    return {"table": grid.name, "title": grid.title, "tasks": grid.tasks, "rows": rows}


def _row(
    name: str,
    quality: dict[str, Any],
    scores: dict[str, Any] | None,
    speedup: float | None,
    dense: dict[str, Any] | None = None,
) -> dict[str, Any]:
    figures = ("value", "stderr", "documents")
    difference = None
    if scores is not None and dense is not None:
        from mskip.exporters.task_scores import against

        difference = against(scores, dense)
    return {
        "name": name,
        "capacity": quality["capacity"],
        "kl": quality["kl"],
        "perplexity": quality["perplexity"],
        "prefill_speedup": speedup,
        "scores": None
        if scores is None
        else {
            task: {key: found[key] for key in figures} for task, found in scores["tasks"].items()
        },
        "average": None if scores is None else scores["average"],
        "against_dense": difference,
    }


def _cell(figure: dict[str, float | None] | None, sign: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "not run"
    error = "" if figure["stderr"] is None else f" ± {100 * figure['stderr']:.1f}"
    return f"{100 * figure['value']:{sign}.1f}{error}"


def _table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    scored = any(row["scores"] for row in report["rows"])
    tasks = report["tasks"] if scored else []
    headings = [report["title"], "capacity", "prefill", "KL", *tasks, *AVERAGES[: 2 * scored]]
    rows = []
    for row in report["rows"]:
        speedup = row["prefill_speedup"]
        cells = [
            row["name"],
            console.shares(row["capacity"]),
            "not run" if speedup is None else f"{speedup:.2f}x",
            f"{row['kl']:.3f}",
        ]
        scores = row["scores"] or {}
        cells += [_cell(scores.get(task)) for task in tasks]
        if scored:
            cells.append(_cell(row["average"]))
            cells.append(_cell(row["against_dense"], "+") if row["against_dense"] else "-")
        rows.append(cells)
    return headings, rows


def _markdown(report: dict[str, Any]) -> str:
    headings, rows = _table(report)
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _show(report: dict[str, Any], folder: Path) -> None:
    headings, rows = _table(report)
    # A row of the paper's table is wider than a terminal: methods go across.
    names = [row[0] for row in rows]
    body = [[heading, *(row[place] for row in rows)] for place, heading in enumerate(headings)][1:]
    console.table(f"{report['table']}: {report['title']}", ["", *(f">{n}" for n in names)], body)
    console.say()
    console.say(console.shown(folder / "table.md"), whole=True)
