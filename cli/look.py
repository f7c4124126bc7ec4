"""Looking at a run: `mskip inspect` and `mskip generate`."""

from __future__ import annotations

import importlib.util
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mskip.cli import console
from mskip.cli.options import (
    AsJson,
    Engine,
    GraphTarget,
    GraphWeights,
    RunFolder,
    Target,
    Weights,
    check_engine,
)

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.exporters.targets import Form

app = typer.Typer()

BINS = 30


@app.command(rich_help_panel="Around a run", epilog="Example: mskip inspect runs/smollm2-135m")
def inspect(run: RunFolder = None, as_json: AsJson = False) -> None:
    """Show each layer's capacity and scores, here and as PNG."""
    from mskip.compressor.artifact import open_run
    from mskip.exporters.report import write_plots

    opened = open_run(run)
    calibration = opened.calibration()
    plots = write_plots(opened.path)

    def show(_: Any) -> None:
        console.table(
            "Layers on held-out prompts",
            [
                *(">layer", ">capacity\n(skip rate)", "0       1"),
                *("scores, 0 to 1; │ is tau".ljust(BINS + 1), ">tau"),
            ],
            [
                [
                    str(row["layer"]),
                    console.shares(row["capacity"], 2),
                    console.bar(row["capacity"], 9),
                    console.histogram(row["scores"], row["tau"], BINS),
                    f"{row['tau']:.4f}",
                ]
                for row in calibration["layers"]
            ],
        )
        console.say()
        whole = calibration["capacity"]["held_out"]
        console.say(f"held-out capacity {console.capacity_words(whole)}")
        for path in plots:
            console.say(console.shown(path), whole=True)

    layers = calibration["layers"]
    report = {"run": str(opened.path), "layers": layers, "plots": [str(path) for path in plots]}
    console.emit(report, as_json, show)


def _default_engine(run: Run, form: Form) -> Engine:
    exported = (form.folder(run) / "contract.json").is_file()
    ready = form.options or (exported and importlib.util.find_spec("onnxruntime"))
    return Engine.onnx if ready else Engine.torch


@app.command(
    rich_help_panel="Around a run", epilog='Example: mskip generate "Why is the sky blue?"'
)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer.")],
    run: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Run folder; the last run if left out."),
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(help="onnx where the run has an export, else torch, if left out."),
    ] = None,
    target: GraphTarget = Target.portable,
    weights: GraphWeights = Weights.float,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Draw tokens, from logits divided by T; 0: greedy.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", help="Draw from the likeliest that reach probability P."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Draw from the K likeliest; 0: from all.")
    ] = 0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of the draws; another every time if left out.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the answer before this text; repeatable."),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(metavar="0..1", help="Another threshold than the calibrated one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, and show which layers it skipped."""
    from mskip.cli import generation
    from mskip.compressor.artifact import open_run
    from mskip.compressor.errors import RecipeError
    from mskip.exporters.serving.sampling import Sampling
    from mskip.exporters.targets import Form

    if tau is not None and not 0.0 <= tau <= 1.0:
        raise RecipeError(f"tau {tau:g} is out of range.", "Scores lie in 0..1, and so does tau.")
    try:
        sampling = Sampling(temperature, top_k, top_p, seed)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    opened = open_run(run)
    live = not as_json and console.main_process()
    form = Form(target.value, weights.value)
    by = engine or _default_engine(opened, form)
    check_engine(by, form)
    with generation.opened_engine(opened, by, form) as (runner, tokenizer):
        ids = generation.prompt_ids(prompt, tokenizer)
        text, tokens, times = "", list[int](), [time.monotonic()]
        for step in runner.stream(
            [ids],
            max_new_tokens,
            sampling=sampling,
            stop=stop or [],
            decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
            tau=tau,
        ):
            times.append(time.monotonic())
            tokens += [token for token in step.tokens if token is not None]
            text += step.text[0]
            if live:
                print(step.text[0], end="", flush=True)
        if live:
            print()
        first, *later = [end - start for start, end in itertools.pairwise(times)]
        state = step.state
        report = {
            "engine": runner.name,
            "prompt_tokens": len(ids),
            "tokens": tokens,
            "text": text,
            "ended": step.ended[0],
            "seconds": round(times[-1] - times[0], 3),
            "seconds_to_first_token": round(first, 3),
            "seconds_a_token": round(sum(later) / len(later), 5) if later else None,
            **generation.routing_report(runner.contract, state, tau, runner.kv_bytes(state)),
        }
    console.emit(report, as_json, _show_routing)


def _show_routing(report: dict[str, Any]) -> None:
    console.table(
        "Routing of this prompt",
        [">layer", "attention", ">score", ">tau", "0        score        1"],
        [
            [
                str(row["layer"]),
                console.decision(row["executed"]),
                f"{row['score']:.4f}",
                f"{row['tau']:.4f}",
                console.bar(row["score"], 21),
            ]
            for row in report["layers"]
        ],
    )
    console.say()
    executed = sum(row["executed"] for row in report["layers"])
    console.say(
        f"capacity {console.capacity_words(report['capacity'])}: "
        f"{executed} of {len(report['layers'])} routed layers executed"
    )
    held, dense = report["kv_bytes"], report["kv_bytes_dense"]
    console.say(
        f"keys and values: {console.size(held)}; dense {console.size(dense)} "
        f"({1 - held / dense:.0%} less)"
    )
    each = report["seconds_a_token"]
    pace = "" if each is None else f", then {1 / each:.0f} a second"
    console.say(
        f"{report['prompt_tokens']} prompt tokens, {len(report['tokens'])} new, first after "
        f"{console.seconds(report['seconds_to_first_token'])}{pace}, {report['engine']}",
        console.DIM,
    )
