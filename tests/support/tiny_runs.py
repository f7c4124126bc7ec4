"""A tiny run that was calibrated as real ones are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.compressor.router import Routers

WORDS = ["user", "assistant", "system", "the", "answer", "is", "question", "one", "two", "Response"]


def tiny_run(folder: Path, model_folder: Path, tiny_routers: Callable[..., Routers]) -> Run:
    """A run with random routers on the last three of four layers."""
    from mskip.compressor.artifact import Run, save_routers
    from mskip.compressor.calibrate_step import calibrate_run
    from mskip.compressor.goals import Goal
    from mskip.compressor.models import load_base
    from mskip.compressor.recipe import Recipe
    from mskip.compressor.samples import run_samples

    rng = random.Random(0)
    turns = [[" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in "ab"] for _ in range(40)]
    data = folder / "data.jsonl"
    lines = [json.dumps({"instruction": ask, "output": answer}) for ask, answer in turns]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    layers = [1, 2, 3]
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": str(model_folder)},
        "routing": {"layers": layers},
        "data": {"source": str(data), "calibration": 16, "held_out": 8},
        "evaluation": {"prompts": 4},
    }
    recipe = Recipe.model_validate(values)
    run = Run(folder / "run")
    base = load_base(recipe.model)
    run.write_recipe(recipe)
    save_routers(run, tiny_routers(base.model, layers=layers), base, recipe)
    kl = [1.0 / (1 + layer) for layer in layers]
    run.write_report(
        "tune",
        {
            "method": "routed",
            "sensitivity": {"layers": layers, "kl": kl, "cosine": kl},
            "removal_orders": {"greedy": layers[::-1]},
        },
    )
    run_samples(run, recipe, base)
    calibrate_run(run, base, Goal("capacity", 0.5), per_layer=False)
    return run
