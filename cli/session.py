"""What the commands work on: the run folder, its recipe and the base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mskip.cli import console

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.compressor.models import BaseModel
    from mskip.compressor.progress import Progress
    from mskip.compressor.recipe import ModelSpec, Recipe

DEFAULT_RECIPE = "smollm2-135m"


def fetch(spec: ModelSpec) -> None:
    """Download a model from the hub, which shows bars of its own, before ours are shown."""
    from mskip.compressor.embedded import PREFIX
    from mskip.compressor.models import model_folder

    if not spec.name.startswith(PREFIX):
        model_folder(spec)


def text_config(spec: ModelSpec) -> dict[str, Any]:
    """`text_entries` of a base model, which is fetched first.

    Raises:
        ModelError: the model cannot be had, or its configuration is damaged.
    """
    from mskip.compressor.models import model_folder, text_entries

    fetch(spec)
    return text_entries(model_folder(spec), trust_remote_code=spec.trust_remote_code)


def load_model(spec: ModelSpec, progress: Progress) -> BaseModel:
    """The base model, shown as a stage."""
    from mskip.compressor.embedded import PREFIX
    from mskip.compressor.models import load_base

    if spec.name.startswith(
        PREFIX
    ):  # converted on first use; nothing is downloaded that needs a bar
        from transformers.utils import logging

        logging.disable_progress_bar()
    progress("load model", 0, 1, spec.name)
    base = load_base(spec)
    progress("load model", 1, 1, spec.name)
    return base


@contextmanager
def working(spec: ModelSpec) -> Iterator[tuple[BaseModel, Progress]]:
    """The base model, and a display of progress that lasts as long as the block."""
    fetch(spec)
    with console.progress() as progress:
        yield load_model(spec, progress), progress


def resolve(
    name: str | None,
    overrides: Sequence[str],
    output: Path | None,
    *,
    model: str | None = None,
    data: str | None = None,
    method: str | None = None,
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
        method: routed or static.
        trust_remote_code: run the model's code.
        resume: go on with the run at ``output``, else with the last one.
    """
    from mskip.compressor.artifact import RUNS, Run, open_run
    from mskip.compressor.recipe import load_recipe

    overrides = overridden(overrides, model=model, data=data)
    if method is not None:
        overrides.append(f"method={json.dumps(method)}")
    if trust_remote_code:
        overrides.append("model.trust_remote_code=true")
    if resume and name is None:
        run = open_run(output)
        return run, load_recipe(str(run.path / "recipe.yaml"), overrides)
    recipe = load_recipe(name or DEFAULT_RECIPE, overrides)
    return Run(output or RUNS / recipe.name), recipe


def overridden(
    overrides: Sequence[str], *, model: str | None = None, data: str | None = None
) -> list[str]:
    """Overrides of a recipe with those that ``--model`` and ``--data`` mean."""
    overrides = [*overrides]
    for key, value in (("model.name", model), ("data.source", data)):
        if value is not None:
            overrides.append(f"{key}={json.dumps(lasting(value))}")
    return overrides


def lasting(name: str) -> str:
    """A folder or file by a path that stays the same one when later commands run elsewhere."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


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
