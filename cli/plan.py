"""What `mskip tune --dry-run` tells: the resolved recipe and what would be done with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from mskip.cli import console
from mskip.cli.session import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mskip.compressor.artifact import Run
    from mskip.compressor.recipe import ModelSpec, Recipe


def plan_of(run: Run, recipe: Recipe) -> dict[str, Any]:
    """The recipe and the plan; nothing is written or downloaded.

    Raises:
        RecipeError: the routed layers do not fit a model that is at hand.
        ModelError: such a model's architecture is not supported.
        DataError: data at hand that cannot be read.
    """
    config = _config(recipe.model)
    layers = None
    if config is not None:
        layers = recipe.routing.routed_layers(config["num_hidden_layers"])
        layers = None if recipe.routing.measures else layers
    return {
        "run": str(run.path),
        "recipe": recipe.model_dump(),
        "architecture": None if config is None else config["model_type"],
        "routed_layers": layers,
        "conversations": _conversations(recipe),
        "targets": [recipe.routing.capacity, *recipe.tuning.check_targets],
    }


def show_plan(plan: dict[str, Any]) -> None:
    """Print the recipe as YAML and the plan as comments, so that the whole is still a recipe."""
    from mskip.compressor.recipe import Recipe, dump_recipe

    recipe = Recipe.model_validate(plan["recipe"])
    layers, count = plan["routed_layers"], plan["conversations"]
    which = "least harmful" if recipe.routing.measures else "last"
    lines = [
        f"would write {plan['run']}/",
        f"base model {recipe.model.name}: "
        + (plan["architecture"] or "architecture not checked, it is not on this machine yet"),
        f"routed layers {', '.join(map(str, layers))} ({len(layers)})"
        if layers
        else f"routed layers: {recipe.routing.layers or f'the {which} {recipe.routing.last}'}",
        f"data {recipe.data.source}: "
        + ("not read, it is not on this machine" if count is None else f"{count} conversations"),
        *(f"tune to capacity {console.capacity_words(target)}" for target in plan["targets"]),
    ]
    print(dump_recipe(recipe) + "".join(f"# {line}\n" for line in lines), end="")


def announce_memory(recipe: Recipe) -> None:
    """Say what tuning is going to take, before the model is loaded."""
    from mskip.compressor.memory import tuning_memory, weight_bytes
    from mskip.compressor.models import model_folder

    config = text_config(recipe.model)
    weights = weight_bytes(model_folder(recipe.model), recipe.model.dtype)
    memory = tuning_memory(recipe, config, weights, recipe.data.max_samples or 1000)
    console.note(
        f"memory, estimated: {console.size(memory.total)} at the peak (weights "
        f"{console.size(memory.weights)}, backward {console.size(memory.activations)}, logits "
        f"{console.size(memory.logits)}, kept activations up to {console.size(memory.store)})"
    )


def _config(spec: ModelSpec) -> dict[str, Any] | None:
    """Of the text model, where a supported model's folder is at hand."""
    from mskip.compressor.embedded import PREFIX, converted_folder
    from mskip.compressor.families import family_of, register
    from mskip.compressor.models import family_from, text_entries

    folder = Path(spec.name).expanduser()
    if spec.name.startswith(PREFIX):
        folder = converted_folder(spec.name)
    if not (folder / "config.json").is_file():
        return None
    if spec.family is not None:
        register(family_from(spec.family))
    config = text_entries(folder, trust_remote_code=spec.trust_remote_code)
    bare = SimpleNamespace(config=SimpleNamespace(**config))
    family_of(cast("PreTrainedModel", bare))  # it reads the configuration alone
    return config


def _conversations(recipe: Recipe) -> int | None:
    from mskip.compressor.data import read_conversations

    source = recipe.data.source
    if not source.startswith("embedded:") and not Path(source).exists():
        return None
    data = recipe.data
    most = None if data.max_samples is None else data.max_samples + data.calibration + data.held_out
    return len(read_conversations(source, max_samples=most))
