"""Arguments that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mskip.exporters.targets import Form

GATE_FAILED = 3
"""Exit status where the work was done and a gate did not pass."""
JSON_KEY = "mskip.json"


def _note_json(context: typer.Context, value: bool) -> bool:
    context.meta[JSON_KEY] = value  # shared by nested contexts: the error handler asks for it
    return value


AsJson = Annotated[
    bool,
    typer.Option("--json", metavar="", help="Print JSON and nothing else.", callback=_note_json),
]
RunFolder = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="Run folder; the last run if left out."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe; repeatable."),
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Run folder; runs/<recipe's name> if left out."),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", metavar="", help="Small grid: batch 1, contexts 128, 512, 2048; 3 repeats."
    ),
]


class Target(StrEnum):
    """Whose operators the graph may use."""

    portable = "portable"
    ort = "ort"
    trt = "trt"
    trt_plugin = "trt-plugin"


FOR_TENSORRT = Target.trt, Target.trt_plugin


GraphTarget = Annotated[
    Target,
    typer.Option(
        "--target",
        metavar="portable|ort|trt|trt-plugin",
        help="Standard operators, ONNX Runtime's fused ones with keys and values in place, or what "
        "TensorRT builds: conditionals, or plugins.",
    ),
]


OnEngine = Annotated[
    bool, typer.Option("--trt", metavar="", help="The TensorRT engine, on the GPU that it is for.")
]


class Engine(StrEnum):
    """What runs the model."""

    torch = "torch"
    onnx = "onnx"
    trt = "trt"


def check_engine(engine: Engine, form: Form) -> None:
    """Refuse a form of the graph for what does not run one.

    Raises:
        RecipeError: names the options that contradict each other.
    """
    from mskip.compressor.errors import RecipeError

    if engine is not Engine.onnx and form.options:
        runs = {
            Engine.torch: "PyTorch runs no exported graph",
            Engine.trt: "TensorRT runs the engine that was built last",
        }
        raise RecipeError(
            f"{runs[engine]}, and was asked for{form.options}.",
            f"Leave out --engine {engine.value}, or the options of the graph.",
        )


class Weights(StrEnum):
    """How weights are stored."""

    float = "float"
    int8 = "int8"
    int4 = "int4"


GraphWeights = Annotated[
    Weights,
    typer.Option(
        "--weights",
        metavar="float|int8|int4",
        help="As the model has them, or rounded to 8 or 4 bits; these need --target ort.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", metavar="", help="Run Python code that the model brings."),
]
