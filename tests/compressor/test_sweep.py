"""Quality against capacity on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mskip.compressor.artifact import Run
from mskip.compressor.calibrate_step import calibrate_run
from mskip.compressor.errors import RecipeError
from mskip.compressor.evaluate_step import evaluate_run
from mskip.compressor.goals import Goal
from mskip.compressor.models import BaseModel, load_base
from mskip.compressor.recipe import Recipe
from mskip.compressor.sweep_step import sweep_run
from mskip.compressor.tune_step import tune_run


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> BaseModel:
    return load_base(
        Recipe.model_validate({"name": "x", "model": {"name": str(tiny_folder)}}).model
    )


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"instruction": f"the {n} is", "output": f"{n * n} is the {n}"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"name": str(tiny_folder)},
            "routing": {"layers": [1, 2, 3]},
            "router": {"init_scale": 0.2, "sensitivity_prompts": 6},
            "compensation": {"rank": 4},
            "tuning": {"bf16": False, "max_steps": 4},
            "data": {"source": str(path), "calibration": 10, "held_out": 8},
        }
    )


@pytest.fixture(scope="module")
def run(tiny: BaseModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tune_run(Run(place / "run"), recipe, tiny)
    return Run(place / "run")


def test_series_of_a_compensated_run(run: Run, tiny: BaseModel) -> None:
    report = sweep_run(run, tiny, [0.34, 0.67, 1.0])
    assert run.report("sweep", "") == report
    assert list(report["series"]) == [
        "static (greedy)", "static (compensated) + rank 4", "routed + rank 4",
    ]  # fmt: skip
    for name, points in report["series"].items():
        if name.startswith("static"):
            assert [point["capacity"] for point in points] == pytest.approx([2 / 3, 1.0, 1.0])
        assert points[-1]["capacity"] == 1.0
        assert points[-1]["kl"] == pytest.approx(0, abs=1e-6)
        assert points[-1]["perplexity"] == pytest.approx(report["dense_perplexity"], rel=1e-5)
        assert points[0]["kl"] > 0


def test_a_point_is_what_calibrate_and_eval_find(run: Run, tiny: BaseModel) -> None:
    (point,) = sweep_run(run, tiny, [0.5])["series"]["routed + rank 4"]
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    assert point["tau"] == calibration["tau"][0]
    assert point["capacity"] == pytest.approx(calibration["capacity"]["held_out"])
    rows = evaluate_run(run, tiny)["rows"]
    assert point["kl"] == pytest.approx(rows[-1]["kl"], rel=1e-5)
    assert rows[-1]["method"] == "routed + rank 4"


def test_calibration_to_a_limit_on_quality(run: Run, tiny: BaseModel) -> None:
    """The limit holds on the calibration prompts, and one step less capacity breaks it."""
    half = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    limit = evaluate_run(run, tiny)["rows"][-1]["kl"]
    found = calibrate_run(run, tiny, Goal("max_kl", limit), per_layer=False)
    assert found["goal"]["kind"] == "max_kl"
    assert found["goal"]["calibration"] <= limit
    assert found["goal"]["held_out"] > 0
    assert found["target"] == pytest.approx(half["target"], abs=0.35)
    assert json.loads((run.path / "calibration.json").read_text()) == found
    loose = calibrate_run(run, tiny, Goal("max_ppl_increase", 1e6), per_layer=False)
    assert loose["target"] == 0.0


def test_per_layer_wants_a_share(run: Run, tiny: BaseModel) -> None:
    with pytest.raises(RecipeError, match="--per-layer cannot be had with --max-kl"):
        calibrate_run(run, tiny, Goal("max_kl", 0.1), per_layer=True)


@pytest.fixture(scope="module")
def static(tiny: BaseModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Layer 2 goes first, whatever the rule would say."""
    place = tmp_path_factory.mktemp("static")
    changed = {**recipe.model_dump(), "method": "static", "static": {"removed": [2]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tune_run(Run(place / "run"), Recipe.model_validate(changed), tiny)
    return Run(place / "run")


def test_static_artefact_decides_alike_for_every_prompt(static: Run, tiny: BaseModel) -> None:
    calibration = calibrate_run(static, tiny, Goal("capacity", 2 / 3), per_layer=False)
    assert [row["constant"] for row in calibration["layers"]] == ["execute", "skip", "execute"]
    assert calibration["capacity"]["held_out"] == pytest.approx(2 / 3)
    rows = {row["method"]: row for row in evaluate_run(static, tiny)["rows"]}
    own = rows["this run (static) + rank 4"]
    assert own["kl"] == pytest.approx(rows["static (given) + rank 4"]["kl"], rel=1e-5)
    assert rows["static (given)"]["layers_removed"] == [2]
    assert own["layers_removed"] == [2]
    assert static.report("tune", "")["rule"] == "given"


def test_static_artefact_with_refined_maps(
    tiny: BaseModel, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = {**recipe.model_dump(), "method": "static"}
    changed["compensation"].update(refine=True, learning_rate=0.01)
    run = Run(tmp_path / "run")
    report = tune_run(run, Recipe.model_validate(changed), tiny)
    assert report["rule"] == "compensated"
    assert len(report["trace"]) == 4
    calibration = calibrate_run(run, tiny, Goal("capacity", 1 / 3), per_layer=False)
    assert {row["constant"] for row in calibration["layers"]} == {"execute", "skip"}
    assert calibration["capacity"]["held_out"] == pytest.approx(1 / 3)


def test_static_artefact_keeps_a_limit(static: Run, tiny: BaseModel) -> None:
    """Capacities are whole numbers of sublayers."""
    found = calibrate_run(static, tiny, Goal("max_kl", 1e-9), per_layer=False)
    assert found["target"] == 1.0
    loose = calibrate_run(static, tiny, Goal("max_kl", 1e9), per_layer=False)
    assert loose["target"] == 0.0


def test_removed_layers_must_be_routed(tiny: BaseModel, recipe: Recipe, tmp_path: Path) -> None:
    changed = {**recipe.model_dump(), "method": "static", "static": {"removed": [0]}}
    with pytest.raises(RecipeError, match=r"static\.removed names layers \[0\]"):
        tune_run(Run(tmp_path / "run"), Recipe.model_validate(changed), tiny)
    assert not (tmp_path / "run").exists()
