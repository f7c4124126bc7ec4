"""The paper's tables as grids of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mskip.compressor.errors import RecipeError
from mskip.compressor.grid import load_grid, row_recipe, shipped_grids


def test_shipped_tables_resolve() -> None:
    """On the paper's model: 32 layers, 16 routed."""
    assert shipped_grids() == ["fig2", "methods", "table-data", "table1"]
    for name in shipped_grids():
        grid = load_grid(name)
        names = [row_recipe(grid, row, [], 32).name for row in grid.rows]
        assert names == [f"{name}-{row.name}" for row in grid.rows]


def test_rows_of_table_1_differ_in_granularity() -> None:
    grid = load_grid("table1")
    recipes = [row_recipe(grid, row, ["routing.capacity=0.75"], 32) for row in grid.rows]
    assert [each.routing.granularity for each in recipes] == ["attention", "mlp", "block"]
    assert {each.routing.capacity for each in recipes} == {0.75}


def test_rows_of_methods_differ_in_what_is_skipped_how() -> None:
    """Also of a recipe that has maps of its own."""
    grid = load_grid("methods").model_copy(update={"recipe": "smollm2-135m"})
    recipes = [row_recipe(grid, row, [], 30) for row in grid.rows]
    assert [each.method for each in recipes] == ["static", "routed", "routed"]
    assert [each.compensation.rank for each in recipes] == [0, 0, 64]
    assert recipes[-1].compensation.refine


def test_share_of_all_layers_becomes_a_capacity() -> None:
    """12.5 % of 32 layers is 4 of 16 routed ones, 25 % is 8."""
    grid = load_grid("fig2")
    recipes = {row.name: row_recipe(grid, row, [], 32) for row in grid.rows}
    assert recipes["static-12.5"].routing.capacity == pytest.approx(0.75)
    assert recipes["routed-25"].routing.capacity == pytest.approx(0.5)
    assert recipes["static-25"].method == "static"
    assert recipes["routed-25"].method == "routed"


def test_more_than_is_routed_is_refused() -> None:
    grid = load_grid("fig2")
    with pytest.raises(RecipeError, match=r"skips 0\.25 of 32 layers, but only 4 are routed"):
        row_recipe(grid, grid.rows[-1], ["routing.last=4"], 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\n", "rows"),
        ("name: x\ntitle: x\nrecipe: x\nrows: []\ntasks: []\n", "rows"),
        ("name: x\ntitle: x\nrecipe: x\nrows: [{name: a, sets: []}]\ntasks: []\n", "sets"),
        ("name: [", "YAML error"),
    ],
)
def test_damaged(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_grid(str(path))


def test_a_share_of_all_layers_is_a_whole_number_of_them() -> None:
    """Of 30 layers an eighth is 3.75: removal for good could not skip so many."""
    grid = load_grid("fig2")
    changes = ["routing.last=16"]
    skipped = [16 * (1 - row_recipe(grid, row, changes, 30).routing.capacity) for row in grid.rows]
    assert skipped == [4, 4, 8, 8]
