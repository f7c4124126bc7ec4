"""The steps of a run, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mskip.cli import console, tables
from mskip.cli.exporting import export
from mskip.cli.options import (
    FOR_TENSORRT,
    GATE_FAILED,
    AsJson,
    Engine,
    GraphTarget,
    GraphWeights,
    OnEngine,
    Output,
    Overrides,
    Quick,
    RunFolder,
    Target,
    TrustRemoteCode,
    Weights,
    check_engine,
)
from mskip.cli.session import (
    DEFAULT_RECIPE,
    check_same_recipe,
    is_tuned,
    lasting,
    resolve,
    working,
)

app = typer.Typer()


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
    method: Annotated[
        str | None,
        typer.Option(
            metavar="routed|static", help="Decide per prompt, or remove for good: sets method."
        ),
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
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Tune routers for a base model, or remove sublayers for good; makes a run folder."""
    run, resolved = resolve(
        recipe,
        overrides or [],
        output,
        model=model,
        data=data,
        method=method,
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
        console.note(f"{console.shown(run.path)} is tuned already: nothing to resume.")
    else:
        from mskip.cli.plan import announce_memory
        from mskip.compressor.tune_step import tune_run

        announce_memory(resolved)
        with working(resolved.model) as (base, progress):
            report = tune_run(run, resolved, base, resume=resume, progress=progress)
    console.emit(report, as_json, tables.tuned)
    if not as_json:
        tables.next_step(run.path, f"mskip calibrate --capacity {resolved.routing.capacity:g}")


@app.command(rich_help_panel="Steps of a run", epilog="Example: mskip static && mskip calibrate")
def static(run: RunFolder = None, output: Output = None, as_json: AsJson = False) -> None:
    """Make the run that removes for good what tuning found as good as routing.

    Same model, same maps, constant decisions; nothing is tuned. It goes to RUN-static, or to
    --output, and the later steps work on it as on any run.
    """
    from mskip.compressor.artifact import Run, open_run
    from mskip.compressor.static_step import static_run

    opened = open_run(run)
    made = Run(output or opened.path.with_name(f"{opened.path.name}-static"))
    if made.path.resolve() == opened.path.resolve():
        raise typer.BadParameter("--output is the run itself.")
    with working(opened.recipe().model) as (base, _):
        report = static_run(opened, base, made)
    console.emit(report, as_json, tables.tuned)
    if not as_json:
        tables.next_step(made.path, "mskip calibrate")


@app.command(
    rich_help_panel="Steps of a run",
    epilog="Example: mskip calibrate --capacity 0.5, or for other prompts: "
    "mskip calibrate --capacity 0.5 --data prompts.jsonl",
)
def calibrate(
    run: RunFolder = None,
    capacity: Annotated[
        float | None,
        typer.Option(metavar="0..1", help="Share to execute; the recipe's without any goal."),
    ] = None,
    skip_rate: Annotated[
        float | None, typer.Option(metavar="0..1", help="Share to skip: 1 - capacity.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="NATS", help="Skip most within this KL to dense.")
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Skip most within this rise; 0.05 is 5 per cent."),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(metavar="X", help="Dense time over routed time, by the last bench."),
    ] = None,
    per_layer: Annotated[
        bool | None,
        typer.Option(
            "--per-layer/--global",
            metavar="",
            help="One tau a layer, or one for all; the recipe says which.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Prompts like those that will be served; those kept apart in tuning without it.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, metavar="TOKENS", help="Longer prompts of --data are left out; 2048."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the threshold tau for one goal: a share, a limit on quality, or a speedup."""
    from mskip.compressor.artifact import open_run
    from mskip.compressor.goals import Goal, Kind

    given: dict[Kind, float | None] = {
        "capacity": capacity,
        "skip_rate": skip_rate,
        "max_kl": max_kl,
        "max_ppl_increase": max_ppl_increase,
        "speedup": speedup,
    }
    goals = [Goal(kind, value) for kind, value in given.items() if value is not None]
    if len(goals) > 1:
        raise typer.BadParameter(f"give one goal, not {' and '.join(map(str, goals))}.")
    if max_length is not None and data is None:
        raise typer.BadParameter("--max-length is of the prompts that --data gives.")
    opened = open_run(run)
    recipe = opened.recipe()
    goal = goals[0] if goals else Goal("capacity", recipe.routing.capacity)
    goal.check()  # before the model is loaded
    from mskip.compressor.calibrate_step import OtherPrompts, calibrate_run

    other = None if data is None else OtherPrompts(lasting(data), max_length or 2048)
    each = recipe.calibration.per_layer if per_layer is None else per_layer
    with working(recipe.model) as (base, progress):
        per_layer = each and goal.is_share
        report = calibrate_run(
            opened, base, goal, per_layer=per_layer, other=other, progress=progress
        )
    console.emit(report, as_json, tables.calibrated)
    if not as_json:
        # Where tokens decide there is nothing to export.
        following = "mskip eval" if "answer_capacity" in report else "mskip export"
        tables.next_step(opened.path, following)


app.command(rich_help_panel="Steps of a run", epilog="Example: mskip export --target ort")(export)


@app.command(rich_help_panel="Steps of a run", epilog="Example: mskip validate runs/smollm2-135m")
def validate(
    run: RunFolder = None,
    target: GraphTarget = Target.portable,
    weights: GraphWeights = Weights.float,
    trt: OnEngine = False,
    as_json: AsJson = False,
) -> None:
    """Prove the export against PyTorch; exit status 3 when a gate fails."""
    from mskip.compressor.artifact import open_run

    opened = open_run(run)
    opened.calibration()
    from mskip.exporters.parity import validate_run
    from mskip.exporters.targets import Form
    from mskip.exporters.trt_engine import built_form
    from mskip.exporters.trt_runner import no_device

    form = built_form(opened) if trt else Form(target.value, weights.value)
    unproved = no_device() if trt else None
    with working(opened.recipe().model) as (base, progress):
        report = validate_run(opened, base, progress, form)
        if trt and unproved is None:
            engine = validate_run(opened, base, progress, form, built=True)
            if engine["status"] != "passed":
                report["status"] = engine["status"]
            of_engine = engine["gates"]
        else:
            of_engine = [{**gate, "value": None, "passed": None} for gate in report["gates"]]
    if trt:
        report["gates"] += [{**gate, "name": f"engine: {gate['name']}"} for gate in of_engine]
    if unproved is not None:
        report["not_run"] = unproved.message
    console.emit(report, as_json, tables.validated)
    if report["status"] != "passed":
        raise typer.Exit(GATE_FAILED)
    if unproved is not None:
        raise typer.Exit(unproved.status) if as_json else unproved
    if not as_json:
        following = f"mskip bench{form.options}"
        if trt:
            following = "mskip bench --trt"
        elif target in FOR_TENSORRT:
            following = "mskip export --trt"
        tables.next_step(opened.path, following)


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


def _shares(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise typer.BadParameter(
            f"{text!r} is no list of shares from 0 to 1, such as 0.25,0.5.", param_hint=option
        )
    return shares


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
    trt: OnEngine = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Instead show where the time goes, by kind of node."),
    ] = False,
    target: GraphTarget = Target.portable,
    weights: GraphWeights = Weights.float,
    as_json: AsJson = False,
) -> None:
    """Time dense, routed, all-execute, all-skip and static engines, interleaved."""
    batches, contexts = _counts(batch, "--batch"), _counts(context, "--context")
    from mskip.compressor.artifact import open_run
    from mskip.compressor.errors import MskipError
    from mskip.exporters.kernels import profile_run
    from mskip.exporters.speed import bench_run
    from mskip.exporters.targets import Form

    if trt and profile:
        raise typer.BadParameter("--profile is of ONNX Runtime, not of an engine.")
    opened, form = open_run(run), Form(target.value, weights.value)
    if trt:
        from mskip.exporters.trt_engine import built_form

        form = built_form(opened)
    elif target in FOR_TENSORRT:
        raise MskipError(
            "on ONNX Runtime the graph for TensorRT attends over whole buffers, so its time there "
            "says nothing.",
            "Time its engine on a GPU: mskip bench --trt; or here: mskip bench --target ort",
        )
    if profile:
        with console.progress() as progress:
            report = profile_run(opened, form, contexts[0] if contexts else None, progress)
        console.emit(report, as_json, tables.profiled)
        return
    with console.progress() as progress:
        report = bench_run(
            opened,
            quick=quick,
            batches=batches,
            contexts=contexts,
            repeats=repeats,
            progress=progress,
            form=form,
            built=trt,
        )
    console.emit(report, as_json, tables.benched)
    if not as_json:
        tables.next_step(opened.path, "mskip report")


@app.command(
    "eval",
    rich_help_panel="Steps of a run",
    epilog="Example: mskip eval --tasks paper --task-dir data/eval --limit 100 --target ort",
)
def evaluate(
    run: RunFolder = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="ID|FILE", help="Data; the run's held-out prompts if left out."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="paper|NAME,...", help="Score tasks by lm-evaluation-harness."),
    ] = None,
    task_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="JSONL files of the tasks; the hub if left out."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Documents of each task.")
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(metavar="torch|onnx|trt", help="What runs the tasks; torch if left out."),
    ] = None,
    target: GraphTarget = Target.portable,
    weights: GraphWeights = Weights.float,
    methods: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of dense, static, routed.")
    ] = "dense,static,routed",
    as_json: AsJson = False,
) -> None:
    """Measure quality: KL on held-out text, or with --tasks the scores of benchmark tasks.

    --engine, --target and --weights say what runs the tasks; a target runs on ONNX Runtime.
    """
    from mskip.compressor.artifact import open_run

    graph = target is not Target.portable or weights is not Weights.float
    if tasks is None and (engine or graph or task_dir or limit):
        raise typer.BadParameter("--task-dir, --limit and what runs the tasks are for --tasks.")
    opened = open_run(run)
    opened.calibration()
    if tasks is not None:
        from mskip.cli.tasks import score, scored
        from mskip.exporters.targets import Form

        form = Form(target.value, weights.value)
        by = engine or (Engine.onnx if form.options else Engine.torch)
        check_engine(by, form)
        report = score(
            opened,
            tasks,
            engine=by.value,
            form=form,
            methods=methods.split(","),
            task_dir=task_dir,
            limit=limit,
        )
        console.emit(report, as_json, scored)
        return
    from mskip.compressor.evaluate_step import evaluate_run

    with working(opened.recipe().model) as (base, progress):
        report = evaluate_run(opened, base, source=data, progress=progress)
    console.emit(report, as_json, tables.evaluated)


@app.command(
    rich_help_panel="Steps of a run", epilog="Example: mskip sweep --capacity 0.25,0.5,0.75"
)
def sweep(
    run: RunFolder = None,
    capacity: Annotated[
        str | None,
        typer.Option(metavar="0..1,...", help="Capacities to try; six from 0.25 if left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Trace quality against capacity: dense, static, routed, compensated."""
    wanted = _shares(capacity, "--capacity")
    from mskip.compressor.artifact import open_run
    from mskip.compressor.sweep_step import CAPACITIES, sweep_run
    from mskip.exporters.report import write_plots

    opened = open_run(run)
    with working(opened.recipe().model) as (base, progress):
        report = sweep_run(opened, base, wanted or CAPACITIES, progress)
    write_plots(opened.path)
    console.emit(report, as_json, tables.swept)
    if not as_json:
        console.say(console.shown(opened.reports / "sweep.png"), whole=True)


@app.command(rich_help_panel="Steps of a run", epilog="Example: mskip report")
def report(run: RunFolder = None, as_json: AsJson = False) -> None:
    """Write the HTML report of what the run holds."""
    from mskip.compressor.artifact import open_run
    from mskip.exporters.report import write_report

    path = write_report(open_run(run).path)

    def show(value: Any) -> None:
        console.say(console.shown(value["report"]), whole=True)

    console.emit({"report": str(path)}, as_json, show)
