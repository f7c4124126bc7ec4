"""A table of the paper as a grid: one recipe, and what each row of the table changes in it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mskip.compressor.errors import RecipeError
from mskip.compressor.recipe import Recipe, load_recipe, read_yaml


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class GridRow(_Part):
    """One row: a run of its own.

    Attributes:
        name: of the row and its run.
        set: overrides of the recipe, as with ``--set``.
        skip_of_all: skipped share of the sublayers of *all* layers, routed or not, to the nearest
            whole number of them; replaces the recipe's capacity, which is of the routed ones.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    set: list[str] = []
    skip_of_all: Annotated[float, Field(gt=0, lt=1)] | None = None


class Grid(_Part):
    """A table.

    Attributes:
        name: of the table and its folder.
        title: heading of the column of row names.
        recipe: shipped recipe or file that all rows start from.
        rows: of the table.
        tasks: of the harness, its columns.
    """

    name: str
    title: str
    recipe: str
    rows: list[GridRow] = Field(min_length=1)
    tasks: list[str]


def shipped_grids() -> list[str]:
    """Names of the tables that come with mskip."""
    files = (entry.name for entry in (resources.files("mskip.recipes") / "paper").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def load_grid(name_or_path: str) -> Grid:
    """Read a table: a shipped one's name, or a YAML file.

    Raises:
        RecipeError: unreadable, or not of this form.
    """
    shipped = name_or_path in shipped_grids()
    value = read_yaml(f"paper/{name_or_path}" if shipped else name_or_path, shipped_grids())
    try:
        return Grid.model_validate(value)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError("\n  ".join([f"table '{name_or_path}':", *faults])) from error


def row_recipe(
    grid: Grid, row: GridRow, overrides: Sequence[str], num_layers: int | None
) -> Recipe:
    """The resolved recipe of a row.

    Args:
        grid: the table.
        row: of it.
        overrides: the user's, which come after the recipe's and before the row's.
        num_layers: decoder layers of the model, for ``skip_of_all``; None where not known.

    Raises:
        RecipeError: see `load_recipe`; or more to skip than is routed.
    """
    changes = [*overrides, *row.set, f'name="{grid.name}-{row.name}"']
    recipe = load_recipe(grid.recipe, changes)
    if row.skip_of_all is None or num_layers is None:
        return recipe
    routed = len(recipe.routing.routed_layers(num_layers))
    # Whole sublayers: removal for good can skip no other share, and both rows are to skip as much.
    skipped = max(1, round(row.skip_of_all * num_layers))
    if skipped > routed:
        raise RecipeError(
            f"row '{row.name}' skips {row.skip_of_all:g} of {num_layers} layers, but only "
            f"{routed} are routed.",
            "Route more with --set routing.last=N.",
        )
    return load_recipe(grid.recipe, [*changes, f"routing.capacity={1 - skipped / routed!r}"])
