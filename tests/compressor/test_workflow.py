"""Tune, calibrate, evaluate: a whole run on a folder with a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mskip.compressor.artifact import Run, load_routers, open_run, save_routers
from mskip.compressor.baselines import measure_sensitivity
from mskip.compressor.calibrate_step import calibrate_run
from mskip.compressor.errors import ArtifactError, RecipeError
from mskip.compressor.evaluate_step import evaluate_run
from mskip.compressor.evaluation import Reference
from mskip.compressor.goals import Goal
from mskip.compressor.models import BaseModel, load_base
from mskip.compressor.patching import patched
from mskip.compressor.preparing import routed_sublayers
from mskip.compressor.recipe import (
    DataSpec,
    EvaluationSpec,
    ModelSpec,
    Recipe,
    RouterSpec,
    RoutingSpec,
    StaticSpec,
    TuningSpec,
)
from mskip.compressor.router import Routers
from mskip.compressor.samples import run_samples
from mskip.compressor.skipping import MindSkip
from mskip.compressor.tune_step import tune_run
from mskip.compressor.tuning import Interrupted


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> BaseModel:
    return load_base(ModelSpec(name=str(tiny_folder)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"the {n} is {n * n}"}]} for n in range(44)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, source: Path) -> Recipe:
    return Recipe(
        name="tiny",
        model=ModelSpec(name=str(tiny_folder)),
        routing=RoutingSpec(last=2),
        router=RouterSpec(init_scale=0.2, sensitivity_prompts=8),
        tuning=TuningSpec(bf16=False, max_steps=6, check_targets=[0.75]),
        data=DataSpec(source=str(source), calibration=12, held_out=8, answer_tokens=4),
        evaluation=EvaluationSpec(prompts=6),
    )


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tuned(
    tiny: BaseModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A tuned run folder and its report; copy it before changing it."""
    place = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        report = tune_run(Run(place / "run"), recipe, tiny)
    return place / "run", report


@pytest.fixture
def run(tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> Run:
    """A run of one's own, tuned."""
    shutil.copytree(tuned[0], tmp_path / "run")
    return Run(tmp_path / "run")


# -- tune -------------------------------------------------------------------------------------


def test_tune_leaves_a_run(tuned: tuple[Path, dict[str, Any]], tiny: BaseModel) -> None:
    folder, report = tuned
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "recipe.yaml",
        "reports",
        "router.safetensors",
        "router_config.json",
        "samples.jsonl",
    ]
    assert json.loads((folder / "reports" / "tune.json").read_text()) == report
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["base_model"]["sha256"] == tiny.sha256
    assert manifest["seeds"] == {"tuning": 0, "data": 0}
    assert load_routers(Run(folder), tiny).weight.any()
    assert (folder.parent / "runs" / ".last").read_text().strip() == str(folder)


def test_tune_report(tuned: tuple[Path, dict[str, Any]]) -> None:
    """The keys of docs/run-folder.md; every checked target with its own course."""
    report = tuned[1]
    assert set(report) == {
        "method", "target", "loss", "samples", "seconds", "trace", "sensitivity", "targets",
        "removal_orders", "worth",
    }  # fmt: skip
    assert report["method"] == "routed"
    assert set(report["removal_orders"]) == {"kl", "cosine", "greedy", "learned"}
    for order in report["removal_orders"].values():
        assert sorted(order) == [1, 2]
    assert report["target"] == 0.5
    assert report["samples"] == 44 - 12 - 8
    assert [step["step"] for step in report["trace"]] == [1, 2, 3, 4, 5, 6]
    assert set(report["trace"][0]) == {
        "step", "loss", "capacity", "price", "noise", "learning_rate",
    }  # fmt: skip
    assert report["sensitivity"]["layers"] == [1, 2]
    assert len(report["sensitivity"]["kl"]) == len(report["sensitivity"]["cosine"]) == 2
    assert [each["target"] for each in report["targets"]] == [0.5, 0.75]
    for each in report["targets"]:
        assert set(each) == {"target", "capacity", "steps", "trace"}
        assert each["steps"] == len(each["trace"]) == 6
        assert 0 <= each["capacity"] <= 1
    assert report["targets"][0]["trace"] == [step["capacity"] for step in report["trace"]]


def test_tune_reports_the_capacity_reached(
    tuned: tuple[Path, dict[str, Any]], tiny: BaseModel, recipe: Recipe
) -> None:
    """On held-out prompts, at tau 0.5, of the routers that are saved."""
    run = Run(tuned[0])
    held_out = run_samples(run, recipe, tiny).held_out
    taken = decided(tiny, load_routers(run, tiny), [0.5, 0.5], held_out)
    assert tuned[1]["targets"][0]["capacity"] == pytest.approx(float(taken.float().mean()))


def decided(
    base: BaseModel, routers: Routers, tau: list[float], samples: list[Any]
) -> torch.Tensor:
    """Decisions of ordinary calls of the attached model, one prompt each."""
    rows = []
    with MindSkip(base.model, routers, tau), torch.no_grad():
        for sample in samples:
            prompt = torch.tensor([sample.input_ids[: sample.prompt_length]])
            rows.append(base.model(prompt).past_key_values.decisions)
    return torch.cat(rows)


def test_tuning_again_removes_what_belongs_to_the_old_routers(
    run: Run, tiny: BaseModel, recipe: Recipe, tuned: tuple[Path, dict[str, Any]]
) -> None:
    run.write_calibration({"tau": [0.5, 0.5]})
    run.write_report("eval", {})
    report = tune_run(run, recipe, tiny)
    assert not (run.path / "calibration.json").exists()
    assert not (run.reports / "eval.json").exists()
    assert {**report, "seconds": 0} == {**tuned[1], "seconds": 0}  # the same seed
    assert open_run(None).path == run.path


def press_at(stage: str, step: int) -> Callable[..., None]:
    """A progress that presses Ctrl-C at a step of a stage."""

    def progress(name: str, done: int, total: int, note: str = "") -> None:
        if name == stage and done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


@pytest.mark.parametrize("target", ["0.5", "0.75"])
def test_resume_is_uninterrupted(
    tiny: BaseModel, recipe: Recipe, tuned: tuple[Path, dict[str, Any]], tmp_path: Path, target: str
) -> None:
    """Also where the interruption came in the second target: the first is not tuned again."""
    run = Run(tmp_path / "cut")
    with pytest.raises(Interrupted):
        tune_run(run, recipe, tiny, progress=press_at(f"tune to capacity {target}", 2))
    assert not (run.path / "router.safetensors").exists()
    assert open_run(None).path == run.path
    shown: list[tuple[str, int]] = []
    report = tune_run(
        run, recipe, tiny, resume=True,
        progress=lambda stage, done, total, note="": shown.append((stage, done)),
    )  # fmt: skip
    steps = {
        name: [done for stage, done in shown if stage == f"tune to capacity {name}"]
        for name in ("0.5", "0.75")
    }
    rest, whole = [3, 4, 5, 6], [1, 2, 3, 4, 5, 6]
    assert steps == ({"0.5": rest, "0.75": whole} if target == "0.5" else {"0.5": [], "0.75": rest})
    for ours, theirs in zip(report["trace"], tuned[1]["trace"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    ours, theirs = (load_routers(Run(path), tiny) for path in (run.path, tuned[0]))
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-5)
    assert not run.checkpoints.exists()


def test_a_falling_target_begins_with_everything_executed(
    tiny: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    """The routers begin where the target does, and end where the recipe wants them."""
    falling = recipe.tuning.model_copy(
        update={"capacity_warmup": 0.5, "max_steps": 24, "check_targets": []}
    )
    wanted = recipe.model_copy(update={"tuning": falling})
    trace = tune_run(Run(tmp_path / "run"), wanted, tiny)["trace"]
    assert trace[0]["capacity"] == 1
    assert trace[-1]["capacity"] == pytest.approx(0.5, abs=0.2)


def test_resume_with_another_recipe(tiny: BaseModel, recipe: Recipe, tmp_path: Path) -> None:
    run = Run(tmp_path / "cut")
    with pytest.raises(Interrupted):
        tune_run(run, recipe, tiny, progress=press_at("tune to capacity 0.5", 2))
    other = recipe.model_copy(update={"routing": RoutingSpec(last=2, capacity=0.25)})
    before = (run.path / "recipe.yaml").read_text()
    with pytest.raises(RecipeError, match="recipe differs") as caught:
        tune_run(run, other, tiny, resume=True)
    assert "--set" in caught.value.remedy
    assert (run.path / "recipe.yaml").read_text() == before
    assert run.checkpoints.exists()


def test_without_resume_old_checkpoints_go(
    tiny: BaseModel, recipe: Recipe, tuned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = Run(tmp_path / "cut")
    with pytest.raises(Interrupted):
        tune_run(run, recipe, tiny, progress=press_at("tune to capacity 0.5", 2))
    other = recipe.model_copy(update={"tuning": TuningSpec(bf16=False, max_steps=3)})
    report = tune_run(run, other, tiny)
    assert [step["step"] for step in report["trace"]] == [1, 2, 3]
    assert not run.checkpoints.exists()


def test_routed_layers(tiny: BaseModel, recipe: Recipe) -> None:
    assert routed_sublayers(recipe, tiny).layers == [1, 2]
    other = recipe.model_copy(update={"routing": RoutingSpec(last=16)})
    with pytest.raises(RecipeError, match=r"routing\.last = 16"):
        routed_sublayers(other, tiny)


def test_the_least_harmful_layers_are_routed(
    tiny: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    """Of all four; what each costs alone is what it costs with no other routed beside it."""
    routing = RoutingSpec(last=2, exclude_last=0, choose="least_harmful")
    run = Run(tmp_path / "run")
    report = tune_run(run, recipe.model_copy(update={"routing": routing}), tiny)
    samples = run_samples(run, run.recipe(), tiny).tune[:8]
    alone = {}
    for layer in range(4):
        with patched(tiny.model, [layer]):
            reference = Reference(tiny, layer, samples)
            alone[layer] = measure_sensitivity(reference, [layer]).kl[0]
    chosen = sorted(sorted(alone, key=lambda layer: alone[layer])[:2])
    assert report["sensitivity"]["layers"] == chosen == load_routers(run, tiny).layers
    assert report["sensitivity"]["kl"] == pytest.approx([alone[each] for each in chosen], rel=1e-4)

    # What a static recipe removes by name is routed whatever it costs.
    worst = max(alone, key=lambda layer: alone[layer])
    static = {"method": "static", "static": StaticSpec(removed=[worst])}
    tune_run(run, recipe.model_copy(update={"routing": routing, **static}), tiny)
    assert load_routers(run, tiny).layers == sorted(
        {worst, min(alone, key=lambda each: alone[each])}
    )


# -- calibrate --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("capacity", [0.25, 0.5])
def test_calibrate(
    run: Run, tiny: BaseModel, recipe: Recipe, capacity: float, per_layer: bool
) -> None:
    """Every figure is that of ordinary calls of the attached model at the tau reported."""
    calibration = calibrate_run(run, tiny, Goal("capacity", capacity), per_layer=per_layer)
    assert json.loads((run.path / "calibration.json").read_text()) == calibration
    assert set(calibration) == {
        "target", "goal", "data", "per_layer", "tau", "capacity", "prompts", "layers", "margins",
        "warnings", "evaluations",
    }  # fmt: skip
    assert calibration["target"] == capacity
    assert calibration["per_layer"] == per_layer
    assert calibration["prompts"] == {"calibration": 12, "held_out": 8}
    assert (len(set(calibration["tau"])) == 1) != per_layer
    samples = run_samples(run, recipe, tiny)
    routers = load_routers(run, tiny)
    ours, held_out = (
        decided(tiny, routers, calibration["tau"], part).float()
        for part in (samples.calibration, samples.held_out)
    )
    figures = calibration["capacity"]
    assert figures["calibration"] == pytest.approx(float(ours.mean()))
    assert figures["held_out"] == pytest.approx(float(held_out.mean()))
    low, high = figures["held_out_interval"]
    assert low <= figures["held_out"] <= high
    # A skip of the first layer can drag one of the second along.
    assert abs(figures["calibration"] - capacity) <= 1 / 24 + 1e-6
    if per_layer:
        assert ours.mean(0).tolist() == pytest.approx([capacity] * 2)
    for index, row in enumerate(calibration["layers"]):
        assert set(row) == {"layer", "tau", "capacity", "constant", "scores"}
        assert row["layer"] == [1, 2][index]
        assert row["tau"] == calibration["tau"][index]
        assert row["capacity"] == pytest.approx(float(held_out[:, index].mean()))
        assert len(row["scores"]) == 8
        share = sum(score >= row["tau"] for score in row["scores"]) / 8
        assert share == pytest.approx(row["capacity"])
    margins = calibration["margins"]
    assert 0 <= margins["min"] <= margins["p05"] <= margins["median"]


@pytest.mark.parametrize("capacity", [-0.1, 1.01, float("nan")])
def test_capacity_out_of_range(run: Run, tiny: BaseModel, capacity: float) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        calibrate_run(run, tiny, Goal("capacity", capacity), per_layer=False)
    assert not (run.path / "calibration.json").exists()


@pytest.mark.parametrize(("capacity", "kind"), [(0.0, "skip"), (1.0, "execute")])
def test_capacity_at_the_ends(run: Run, tiny: BaseModel, capacity: float, kind: str) -> None:
    calibration = calibrate_run(run, tiny, Goal("capacity", capacity), per_layer=False)
    assert calibration["capacity"]["calibration"] == capacity
    if calibration["capacity"]["held_out"] == capacity:
        assert {row["constant"] for row in calibration["layers"]} == {kind}


def set_routers(
    run: Run, base: BaseModel, recipe: Recipe, change: Callable[[Routers], None]
) -> None:
    routers = load_routers(run, base)
    change(routers)
    save_routers(run, routers, base, recipe)


def test_constant_gates_are_named(run: Run, tiny: BaseModel, recipe: Recipe) -> None:
    """A gate that never changes is static removal, or no router: it says so."""

    def make_constant(routers: Routers) -> None:
        routers.weight.zero_()
        routers.bias.copy_(torch.tensor([3.0, -3.0]))

    set_routers(run, tiny, recipe, make_constant)
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    assert [row["constant"] for row in calibration["layers"]] == ["execute", "skip"]
    skipping, executing = calibration["warnings"]
    assert skipping.startswith("layer 2: every prompt skips")
    assert "statically" in skipping
    assert executing.startswith("layer 1: every prompt executes")


def test_close_scores_are_named(run: Run, tiny: BaseModel, recipe: Recipe) -> None:
    """Scores nearer to tau than the engine's arithmetic resolves."""
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    assert not any("stand closer" in warning for warning in calibration["warnings"])

    def flatten(routers: Routers) -> None:
        routers.weight.mul_(1e-6)
        routers.bias.zero_()

    set_routers(run, tiny, recipe, flatten)
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=True)
    warning = calibration["warnings"][-1]
    assert warning.startswith("40 of 40 scores stand closer to tau than float32 resolves (1e-05)")


# -- evaluate ---------------------------------------------------------------------------------


def test_evaluate(run: Run, tiny: BaseModel) -> None:
    """Dense, static by two rules and routed, side by side on held-out text."""
    with pytest.raises(ArtifactError, match="no calibration"):
        evaluate_run(run, tiny)
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    shown: list[str] = []
    report = evaluate_run(
        run, tiny, progress=lambda stage, done, total, note="": shown.append(note)
    )
    assert json.loads((run.reports / "eval.json").read_text()) == report
    assert set(report) == {"data", "prompts", "tokens", "rows", "routed_over_static"}
    assert report["prompts"] == 8
    rules = ("kl", "cosine", "greedy", "learned")
    methods = ["dense", *(f"static ({rule})" for rule in rules), "routed"]
    assert [row["method"] for row in report["rows"]] == methods
    dense, by_kl, by_cosine, greedy, learned, routed = report["rows"]
    for row in report["rows"]:
        assert set(row) == {"method", "capacity", "kl", "perplexity", "layers_removed"}
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert dense["capacity"] == 1.0
    sensitivity = run.report("tune", "")["sensitivity"]
    least = sensitivity["kl"].index(min(sensitivity["kl"]))
    most_alike = sensitivity["cosine"].index(max(sensitivity["cosine"]))
    assert by_kl["layers_removed"] == [[1, 2][least]]
    assert by_cosine["layers_removed"] == [[1, 2][most_alike]]
    assert by_kl["capacity"] == by_cosine["capacity"] == 0.5
    assert routed["capacity"] == pytest.approx(calibration["capacity"]["held_out"])
    assert routed["kl"] > 0
    best = min(row["kl"] for row in (by_kl, by_cosine, greedy, learned))
    assert report["routed_over_static"] == pytest.approx(routed["kl"] / best)
    assert [note for note in shown if note in methods] == ["dense", *methods[1:]]


@pytest.mark.parametrize(("capacity", "removed"), [(1.0, 0), (0.75, 0), (0.5, 1), (0.0, 2)])
def test_static_baseline_executes_no_less(
    run: Run, tiny: BaseModel, capacity: float, removed: int
) -> None:
    """A whole number of layers, rounded in favour of the baseline."""
    calibrate_run(run, tiny, Goal("capacity", capacity), per_layer=False)
    rows = evaluate_run(run, tiny)["rows"]
    assert [len(row["layers_removed"]) for row in rows] == [0, *[removed] * 4, 0]


def test_evaluate_on_other_data(run: Run, tiny: BaseModel, tmp_path: Path) -> None:
    calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    path = tmp_path / "other.jsonl"
    rows = [{"instruction": f"one {n}", "output": "two three"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate_run(run, tiny, source=str(path))
    assert report["data"] == str(path)
    assert report["prompts"] == 6  # evaluation.prompts


def test_evaluate_without_sensitivity(run: Run, tiny: BaseModel) -> None:
    calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    run.write_report("tune", {})
    with pytest.raises(ArtifactError, match="lacks the orders of removal"):
        evaluate_run(run, tiny)


def test_another_base_model_is_refused(
    run: Run, tiny_model: Callable[..., Any], tiny: BaseModel, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    tiny_model(seed=9, vocab_size=len(tiny.tokenizer)).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    other = load_base(ModelSpec(name=str(folder)))
    with pytest.raises(ArtifactError, match="hash"):
        calibrate_run(run, other, Goal("capacity", 0.5), per_layer=False)
