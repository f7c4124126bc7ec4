"""`mskip eval --tasks`: the paper's tasks, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mskip.cli.console import DIM, say, seconds, table
from mskip.cli.session import working

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.exporters.targets import Form


def score(
    run: Run,
    tasks: str,
    *,
    engine: str = "torch",
    form: Form | None = None,
    methods: Sequence[str] | None = None,
    task_dir: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score a run on tasks; what is wrong with the request is said before the model is loaded.

    Args:
        run: the run.
        tasks: "paper", or names with commas between.
        engine: "torch", "onnx" or "trt".
        form: of the graph that "onnx" runs; None is the portable one.
        methods: of "dense", "static", "routed"; None for all.
        task_dir: folder with a ``<task>.jsonl`` each; None is the hub.
        limit: documents of each task; None for all.

    Returns:
        The report, see `mskip.exporters.task_scores.score_run`; `scored` shows it.
    """
    run.calibration()
    from mskip.exporters.targets import PORTABLE
    from mskip.exporters.task_files import task_names
    from mskip.exporters.task_scores import METHODS, check_run, check_tasks, score_run

    form = form or PORTABLE
    names, chosen = task_names(tasks), METHODS if methods is None else methods
    check_run(run, engine, chosen, form)
    check_tasks(names, task_dir)
    with working(run.recipe().model) as (base, progress):
        return score_run(
            run,
            base,
            engine=engine,
            form=form,
            methods=chosen,
            tasks=names,
            task_dir=task_dir,
            limit=limit,
            progress=progress,
        )


def scored(report: dict[str, Any]) -> None:
    """A table an engine: tasks down, methods across."""
    for engine in dict.fromkeys(row["by"] for row in report["rows"]):
        _engine_table([row for row in report["rows"] if row["by"] == engine])
    say()
    say("percent ± one standard error; against dense: document by document", DIM)
    if report["limit"] is not None:
        say(f"at most {report['limit']} documents a task, chosen by lot", DIM)


def _engine_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    body = [
        [
            name,
            str(task["shots"]),
            task["metric"],
            str(task["documents"]),
            *(_percent(row["tasks"][name]) for row in rows),
        ]
        for name, task in first["tasks"].items()
    ]
    summary = {
        "average": [_percent(row["average"]) for row in rows],
        "against dense": [_percent(row.get("against_dense"), sign="+") for row in rows],
        "capacity": [f"{row['capacity']:.3f}" for row in rows],
        "skip rate": [f"{1 - round(row['capacity'], 3):.3f}" for row in rows],
        "time": [_time(row["seconds"]) for row in rows],
    }
    body += [[name, "", "", "", *cells] for name, cells in summary.items()]
    headings = ["task", ">shots", "metric", ">docs", *(f">{row['method']}" for row in rows)]
    table(f"Tasks, {first['engine']}", headings, body)


def _percent(figure: dict[str, Any] | None, sign: str = "") -> str:
    if figure is None:
        return "-"
    value = f"{100 * figure['value']:{sign}.1f}"
    return value if figure["stderr"] is None else f"{value} ±{100 * figure['stderr']:.1f}"


def _time(value: float) -> str:
    return seconds(value) if value < 3600 else f"{value / 3600:.1f} h"
