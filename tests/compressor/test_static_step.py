"""The static run made from a routed one: what was compared is what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mskip.compressor.artifact import Run, load_routers, open_run, tuned_by
from mskip.compressor.baselines import forced_to, static_gates
from mskip.compressor.calibrate_step import calibrate_run
from mskip.compressor.errors import ArtifactError
from mskip.compressor.evaluation import Reference
from mskip.compressor.goals import Goal
from mskip.compressor.models import BaseModel, load_base
from mskip.compressor.patching import patched
from mskip.compressor.recipe import Recipe
from mskip.compressor.samples import run_samples
from mskip.compressor.static_step import static_run
from mskip.compressor.tune_step import tune_run


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> BaseModel:
    from mskip.compressor.recipe import ModelSpec

    return load_base(ModelSpec(name=str(tiny_folder)))


@pytest.fixture
def routed(
    base: BaseModel, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Run, dict[str, Any]]:
    """A tuned run with refined maps, and its report."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"the {n} is {n * n}"}]} for n in range(44)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": str(tiny_folder)},
        "routing": {"last": 3},
        "compensation": {"rank": 4},
        "router": {"sensitivity_prompts": 8},
        "tuning": {"bf16": False, "max_steps": 4},
        "data": {"source": str(source), "calibration": 12, "held_out": 8, "answer_tokens": 4},
    }
    run = Run(tmp_path / "run")
    return run, tune_run(run, Recipe.model_validate(values), base)


def test_what_was_compared_is_what_is_written(
    base: BaseModel, routed: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    """Constant decisions, the same maps, the KL that tuning had measured."""
    run, tuned = routed
    worth = tuned["worth"]
    made = Run(tmp_path / "made")
    report = static_run(run, base, made)
    assert report == made.report("tune", "")
    assert report["compared"] == worth
    assert tuned_by(made) == "static"
    assert open_run(None).path == made.path
    recipe = made.recipe()
    assert recipe.static.removed == worth["removed"]
    assert recipe.routing.layers == run.recipe().routing.routed_layers(4)
    before, after = load_routers(run, base), load_routers(made, base)
    assert not after.weight.any()
    one, other = before.sublayers.compensation, after.sublayers.compensation
    assert one is not None
    assert other is not None
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])

    goal = Goal("capacity", recipe.routing.capacity)
    assert goal.value == worth["static_capacity"]
    calibration = calibrate_run(made, base, goal, per_layer=False)
    kept = [index for index, layer in enumerate(after.layers) if layer not in worth["removed"]]
    executed = [layer["capacity"] for layer in calibration["layers"]]
    assert executed == [float(index in kept) for index in range(3)]
    samples = run_samples(made, recipe, base).held_out
    with patched(base.model, after.sublayers):
        reference = Reference(base, after.layers[0], samples)
        quality = reference.quality(forced_to(static_gates(kept, 3)))
    assert quality.kl == pytest.approx(worth["static_kl"], rel=1e-5)


def test_what_has_no_comparison_is_refused(
    base: BaseModel, routed: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    run, tuned = routed
    made = Run(tmp_path / "made")
    static_run(run, base, made)
    with pytest.raises(ArtifactError, match="a static run already"):
        static_run(made, base, Run(tmp_path / "again"))
    run.write_report("tune", {**tuned, "worth": {"skipped": "scores tie"}})
    with pytest.raises(ArtifactError, match="scores tie"):
        static_run(run, base, Run(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
