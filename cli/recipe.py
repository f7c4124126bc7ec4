"""`mskip recipe`: the shipped recipes and what a recipe may say."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mskip.cli import console
from mskip.cli.options import AsJson, Overrides

app = typer.Typer()
recipes = typer.Typer(no_args_is_help=True)
app.add_typer(
    recipes,
    name="recipe",
    help="Show recipes, and the schema of one.",
    epilog="Example: mskip recipe show smollm2-135m",
    rich_help_panel="Around a run",
)


@recipes.command(epilog="Example: mskip recipe schema > recipe.schema.json")
def schema(as_json: AsJson = False) -> None:
    """Print the JSON Schema of a recipe (always JSON)."""
    from mskip.compressor.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@recipes.command("list", epilog="Example: mskip recipe list")
def listed(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from mskip.compressor.recipe import load_recipe, shipped_recipes

    loaded = [load_recipe(name) for name in shipped_recipes()]
    rows = [
        {
            "name": recipe.name,
            "model": recipe.model.name,
            "routed": len(recipe.routing.layers or range(recipe.routing.last)),
            "capacity": recipe.routing.capacity,
        }
        for recipe in loaded
    ]

    def show(rows: list[dict[str, Any]]) -> None:
        console.table(
            "Recipes",
            ["name", "base model", ">routed", ">capacity (skip rate)"],
            [
                [row["name"], row["model"], str(row["routed"]), console.shares(row["capacity"])]
                for row in rows
            ],
        )

    console.emit(rows, as_json, show)


@recipes.command(epilog="Example: mskip recipe show smollm2-135m > mine.yaml")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Shipped recipe, or a file.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print a recipe with every value, as YAML."""
    from mskip.compressor.recipe import dump_recipe, load_recipe

    recipe = load_recipe(name, overrides or [])
    console.emit(recipe.model_dump(), as_json, lambda _: print(dump_recipe(recipe), end=""))
