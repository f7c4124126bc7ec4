"""Validation passes a right engine, and fails a wrong one at the gate that is meant for it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mskip.compressor.artifact import Run
from mskip.compressor.errors import ArtifactError
from mskip.compressor.recipe import Recipe, ValidationLimits, ValidationSpec
from mskip.compressor.samples import run_samples
from mskip.exporters import parity
from mskip.exporters.contract import UNSCORED
from mskip.exporters.parity import (
    LARGEST,
    at_least,
    at_most,
    batch_invariance,
    compare,
    gates_of,
    quality,
    validate_run,
)
from mskip.exporters.runner import Floats, Ints, Runner, State
from mskip.exporters.torch_runner import TorchRunner

if TYPE_CHECKING:
    from conftest import Exported

    from mskip.compressor.encoding import Sample
    from mskip.compressor.models import BaseModel
    from mskip.exporters.ort_runner import OrtRunner

STEPS = 4
Fault = Callable[["Faulty", State, Ints], State]


class Faulty(Runner):
    """An engine that is right but for one thing."""

    def __init__(self, inner: Runner, fault: Fault) -> None:
        self.inner, self.fault = inner, fault
        self.name, self.contract = f"faulty {inner.name}", inner.contract
        self.again: Callable[[Ints], State]

    def forward(self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats) -> State:
        """See `Runner.forward`."""
        self.again = lambda other: self.inner.forward(input_ids, mask, cache, other, tau)
        return self.fault(self, self.inner.forward(input_ids, mask, cache, routing, tau), routing)

    def select(self, state: State, rows: Sequence[int]) -> State:
        """See `Runner.select`."""
        return self.inner.select(state, rows)

    def kv_bytes(self, state: State) -> int:
        """See `Runner.kv_bytes`."""
        return self.inner.kv_bytes(state)


def flips_a_decision(engine: Faulty, state: State, routing: Ints) -> State:
    if routing[0, 1] != -1:
        return state
    other = state.routing.copy()
    other[0, 1] ^= 1
    return replace(engine.again(other), scores=state.scores)


def flips_in_batches(engine: Faulty, state: State, routing: Ints) -> State:
    return flips_a_decision(engine, state, routing) if len(routing) > 1 else state


def adds_a_hundredth(engine: Faulty, state: State, routing: Ints) -> State:
    return replace(state, logits=state.logits + np.float32(0.01))


def adds_in_batches(engine: Faulty, state: State, routing: Ints) -> State:
    return adds_a_hundredth(engine, state, routing) if len(routing) > 1 else state


def changes_a_token(engine: Faulty, state: State, routing: Ints) -> State:
    if state.mask.shape[1] == state.logits.shape[1]:  # Not at prefill, at every step.
        return state
    logits = state.logits.copy()
    best = logits[0, -1].argmax()
    logits[0, -1, (best + 1) % logits.shape[-1]] = logits[0, -1, best] + 1
    return replace(state, logits=logits)


def gives_nan(engine: Faulty, state: State, routing: Ints) -> State:
    return replace(state, logits=np.full_like(state.logits, np.nan))


def gives_nan_once(engine: Faulty, state: State, routing: Ints) -> State:
    logits = state.logits.copy()
    logits[0, -1, 0] = np.nan
    return replace(state, logits=logits)


def forgets_the_answer(engine: Faulty, state: State, routing: Ints) -> State:
    return replace(state, logits=state.logits * np.float32(0.5))


@pytest.fixture(scope="module")
def samples(exported: Exported) -> list[Sample]:
    """Held-out samples of the run."""
    return run_samples(exported.run, exported.run.recipe(), exported.base).held_out


@pytest.fixture(scope="module")
def prompts(random_prompts: Callable[..., list[list[int]]]) -> list[list[int]]:
    """More than one batch of prompts."""
    return random_prompts([3, 9, 5, 1, 7, 6, 4, 8, 2, 5, 3], seed=3)


@pytest.fixture
def free_base(exported: Exported) -> BaseModel:
    """The base model again, without a patch."""
    from mskip.compressor.models import load_base

    return load_base(exported.run.recipe().model)


# -- comparisons ------------------------------------------------------------------------------


def test_a_right_engine(
    torch_runner: TorchRunner, ort_runner: OrtRunner, prompts: list[list[int]]
) -> None:
    found = compare(torch_runner, ort_runner, prompts, STEPS)
    assert (found.prompts, found.matching, found.calls) == (11, 11, 33)
    assert (found.flips, found.agreement) == ([], 1.0)
    assert 0 < found.max_abs < 1e-4
    assert 0 < found.max_rel < 1e-4
    tau = np.asarray(torch_runner.contract.tau, dtype=np.float32)
    margins = [np.abs(torch_runner.prefill(np.array([p])).scores - tau).min() for p in prompts]
    assert found.min_margin == pytest.approx(min(margins), abs=1e-5)


def test_a_flip_is_reported_with_its_margin_and_not_as_arithmetic(
    torch_runner: TorchRunner, ort_runner: OrtRunner, prompts: list[list[int]]
) -> None:
    found = compare(torch_runner, Faulty(ort_runner, flips_a_decision), prompts, STEPS)
    # One in the first row of each of the two batches.
    assert [(flip["prompt"], flip["layer"]) for flip in found.flips] == [(0, 2), (8, 2)]
    assert found.agreement == 1 - 2 / 33
    for flip in found.flips:
        assert flip["margin"] == pytest.approx(abs(flip["torch"] - 0.5))
        assert flip["engine"] == pytest.approx(flip["torch"], abs=1e-5)
    assert found.max_abs < 1e-4  # With decisions forced equal nothing is wrong.
    assert found.matching == 9  # But the flipped prompts are not the same text.


def test_wrong_logits(
    torch_runner: TorchRunner, ort_runner: OrtRunner, prompts: list[list[int]]
) -> None:
    found = compare(torch_runner, Faulty(ort_runner, adds_a_hundredth), prompts, STEPS)
    assert found.max_abs == pytest.approx(0.01, abs=1e-4)
    assert 1e-3 < found.max_rel < 0.1
    assert (found.agreement, found.matching) == (1.0, 11)


@pytest.mark.parametrize("fault", [gives_nan, gives_nan_once])
def test_nan_is_never_a_small_difference(
    fault: Fault,
    torch_runner: TorchRunner,
    ort_runner: OrtRunner,
    prompts: list[list[int]],
    samples: list[Sample],
) -> None:
    engine = Faulty(ort_runner, fault)
    found = compare(torch_runner, engine, prompts, STEPS)
    assert found.max_abs == found.max_rel == pytest.approx(LARGEST)
    assert batch_invariance(engine, prompts)["max_abs"] == pytest.approx(LARGEST)
    measured = quality(torch_runner, engine, samples)
    assert measured["kl_engine"] == pytest.approx(LARGEST)
    json.dumps(measured, allow_nan=False)


def test_a_wrong_token(
    torch_runner: TorchRunner, ort_runner: OrtRunner, prompts: list[list[int]]
) -> None:
    found = compare(torch_runner, Faulty(ort_runner, changes_a_token), prompts, STEPS)
    assert (found.prompts, found.matching) == (11, 9)
    assert found.agreement == 1.0


def test_a_wrong_token_after_the_last_step_is_not_seen(
    torch_runner: TorchRunner, ort_runner: OrtRunner, prompts: list[list[int]]
) -> None:
    found = compare(torch_runner, Faulty(ort_runner, changes_a_token), prompts, 1)
    assert found.matching == found.prompts == 11


def test_batch_invariance(ort_runner: OrtRunner, prompts: list[list[int]]) -> None:
    right = batch_invariance(ort_runner, prompts)
    assert right["decisions_equal"] is True
    assert right["max_abs"] < 1e-4
    dependent = batch_invariance(Faulty(ort_runner, flips_in_batches), prompts)
    assert dependent["decisions_equal"] is False
    shifted = batch_invariance(Faulty(ort_runner, adds_in_batches), prompts)
    assert shifted["decisions_equal"] is True
    assert shifted["max_abs"] == pytest.approx(0.01, abs=1e-4)


def test_quality_is_that_of_the_evaluation(
    torch_runner: TorchRunner,
    ort_runner: OrtRunner,
    exported: Exported,
    free_base: BaseModel,
    samples: list[Sample],
) -> None:
    """The same figures as `mskip eval`, which scores prompt and answer in one pass."""
    import torch

    from mskip.compressor.evaluation import Reference
    from mskip.compressor.patching import patched
    from mskip.compressor.routing import HardPass, fresh_decisions

    def route(batch: Any) -> HardPass:
        decisions, scores = fresh_decisions(len(batch["input_ids"]), 3)
        tau = torch.tensor(exported.contract.tau)
        return HardPass(exported.routers, tau, batch["prompt_mask"], decisions, scores)

    found = quality(torch_runner, ort_runner, samples)
    with patched(free_base.model, exported.routers.layers):
        expected = Reference(free_base, exported.routers.layers[0], samples).quality(route)
    assert found["tokens"] == expected.tokens
    assert expected.kl > 0.01
    for engine in ("torch", "engine"):
        assert found[f"kl_{engine}"] == pytest.approx(expected.kl, abs=1e-4)
        assert found[f"perplexity_{engine}"] == pytest.approx(expected.perplexity, rel=1e-4)
    wrong = quality(torch_runner, Faulty(ort_runner, forgets_the_answer), samples)
    assert abs(wrong["kl_engine"] - wrong["kl_torch"]) > 1e-3


# -- gates ------------------------------------------------------------------------------------

GOOD = {
    "rounded": None,
    "decisions": {"agreement": 1.0},
    "logits": {"max_abs": 1e-5, "max_rel": 1e-5, "kl": 1e-9},
    "tokens": {"match": 1.0, "next_match": 1.0},
    "laziness": {"skipped_branch_nodes": 0, "ratio": 1.5},
    "batch_invariance": {"max_abs": 1e-5, "decisions_equal": True},
    "quality": {"kl_engine": 0.25, "kl_torch": 0.25},
}


def failed_gates(report: dict[str, Any], limits: ValidationLimits) -> list[str]:
    gates = gates_of(report, ValidationSpec(limits=limits))
    return [gate.name for gate in gates if not gate.passed]


def test_a_good_report_passes_every_gate() -> None:
    gates = gates_of(GOOD, ValidationSpec())
    assert len(gates) == 9
    assert all(gate.passed for gate in gates)


@pytest.mark.parametrize(
    ("part", "key", "value", "gate"),
    [
        ("decisions", "agreement", 0.999, "decision agreement"),
        ("logits", "max_abs", 0.0011, "logits max abs"),
        ("logits", "max_abs", float("nan"), "logits max abs"),
        ("logits", "max_rel", 0.011, "logits max rel"),
        ("tokens", "match", 31 / 32, "greedy token match"),
        ("laziness", "skipped_branch_nodes", 1, "nodes run in skipped branches"),
        ("laziness", "ratio", 1.04, "execute / skip time"),
        ("batch_invariance", "max_abs", 0.0011, "batch invariance max abs"),
        ("batch_invariance", "decisions_equal", False, "batch invariance decisions"),
        ("quality", "kl_engine", 0.2511, "KL engine - KL PyTorch"),
        ("quality", "kl_engine", 0.2489, "KL engine - KL PyTorch"),
        ("quality", "kl_engine", LARGEST, "KL engine - KL PyTorch"),
    ],
)
def test_each_fault_has_its_gate(part: str, key: str, value: Any, gate: str) -> None:
    report: dict[str, Any] = copy.deepcopy(GOOD)
    report[part][key] = value
    assert failed_gates(report, ValidationLimits()) == [gate]


@pytest.mark.parametrize(
    ("part", "key", "int8", "int4", "gate"),
    [
        ("decisions", "agreement", 0.97, 0.94, "decision agreement"),
        ("logits", "kl", 0.021, 0.11, "KL to PyTorch"),
        ("logits", "kl", LARGEST, LARGEST, "KL to PyTorch"),
        ("tokens", "next_match", 0.94, 0.84, "next token match"),
        ("quality", "kl_engine", 0.28, 0.36, "KL engine - KL PyTorch"),
        ("laziness", "skipped_branch_nodes", 1, 1, "nodes run in skipped branches"),
        ("batch_invariance", "max_abs", 0.0011, 0.0011, "batch invariance max abs"),
    ],
)
def test_rounded_weights_have_gates_of_their_own(
    part: str, key: str, int8: float, int4: float, gate: str
) -> None:
    for weights, value in (("int8", int8), ("int4", int4)):
        report: dict[str, Any] = copy.deepcopy(GOOD)
        report["rounded"] = weights
        # What rounding changes by nature has no gate.
        report["logits"]["max_abs"], report["tokens"]["match"] = 9.0, 0.0
        assert failed_gates(report, ValidationLimits()) == []
        report[part][key] = value
        assert failed_gates(report, ValidationLimits()) == [gate]


@pytest.mark.parametrize(
    ("limit", "value", "gate"),
    [
        ("logits_max_abs", 1e-6, "logits max abs"),
        ("logits_max_rel", 1e-6, "logits max rel"),
        ("laziness_ratio", 1.6, "execute / skip time"),
        ("batch_invariance_max_abs", 1e-6, "batch invariance max abs"),
    ],
)
def test_limits_come_from_the_recipe(limit: str, value: float, gate: str) -> None:
    limits = ValidationLimits.model_validate({limit: value})
    assert failed_gates(GOOD, limits) == [gate]


def test_looser_limits_let_more_through() -> None:
    report: dict[str, Any] = copy.deepcopy(GOOD)
    report["decisions"]["agreement"] = report["tokens"]["match"] = 0.9
    report["laziness"]["skipped_branch_nodes"] = 3
    report["quality"]["kl_engine"] = 0.3
    loose = ValidationLimits(
        decision_agreement=0.9, token_match=0.9, skipped_branch_nodes=3, quality_difference=0.1
    )
    assert failed_gates(report, loose) == []


def test_laziness_that_was_not_measured_is_not_run() -> None:
    """It neither passes nor fails: graphs of operators that a plugin carries out."""
    report: dict[str, Any] = copy.deepcopy(GOOD)
    report["laziness"] = None
    gates = {gate.name: gate for gate in gates_of(report, ValidationSpec())}
    unrun = {name for name, gate in gates.items() if gate.passed is None}
    assert unrun == {"nodes run in skipped branches", "execute / skip time"}
    assert {gates[name].value for name in unrun} == {None}
    assert len(gates) == len(gates_of(GOOD, ValidationSpec()))


def test_a_value_at_its_limit_passes() -> None:
    assert at_least("x", 1.0, 1.0).passed
    assert at_most("x", 1.0, 1.0).passed
    assert not at_least("x", 0.9, 1.0).passed
    assert not at_most("x", 1.1, 1.0).passed


# -- the step ---------------------------------------------------------------------------------


def gate(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in report["gates"] if each["name"] == name]
    value: dict[str, Any] = found
    return value


@pytest.mark.usefixtures("brief")
def test_validation_end_to_end(exported: Exported, free_base: BaseModel) -> None:
    stages: list[str] = []
    report = validate_run(exported.run, free_base, lambda stage, *_: stages.append(stage))
    assert report["status"] == "passed"
    assert exported.run.report("validate", "") == report
    # The keys that were promised.
    assert {"status", "gates", "decisions", "logits", "tokens", "laziness"} < report.keys()
    assert {"agreement", "flips", "min_margin"} < report["decisions"].keys()
    assert report["logits"].keys() == {"max_abs", "max_rel", "kl"}
    assert report["tokens"] == {"prompts": 5, "steps": 4, "match": 1.0, "next_match": 1.0}
    assert report["decisions"]["calls"] == 15
    assert {"name", "value", "limit", "passed"} < report["gates"][0].keys()
    assert gate(report, "execute / skip time")["limit"] == 0.0
    assert {"compare engines", "batch invariance", "quality by engine", "laziness"} == set(stages)
    # The model is free again.
    assert "forward" not in vars(free_base.model.model.layers[1].self_attn)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    ("fault", "gates"),
    [
        (flips_a_decision, ["decision agreement", "greedy token match"]),
        (adds_a_hundredth, ["logits max abs"]),
        (changes_a_token, ["greedy token match", "logits max abs"]),
        (flips_in_batches, ["decision agreement", "batch invariance decisions"]),
        (forgets_the_answer, ["KL engine - KL PyTorch"]),
        (gives_nan, ["logits max abs", "KL engine - KL PyTorch", "batch invariance max abs"]),
    ],
)
def test_validation_fails_a_wrong_engine(
    fault: Fault,
    gates: list[str],
    exported: Exported,
    ort_runner: OrtRunner,
    free_base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copy_of(exported.run, tmp_path)
    monkeypatch.setattr(parity, "open_runner", lambda _: Faulty(ort_runner, fault))
    monkeypatch.setattr(parity, "measure_laziness", lambda *_: GOOD["laziness"])
    report = validate_run(run, free_base)
    assert report["status"] == "failed"
    assert run.report("validate", "")["status"] == "failed"
    for name in gates:
        assert not gate(report, name)["passed"], name


@pytest.mark.usefixtures("brief")
def test_validation_judges_by_the_limits_of_the_run(
    exported: Exported, free_base: BaseModel, tmp_path: Path
) -> None:
    run = copy_of(exported.run, tmp_path)
    value = run.recipe().model_dump()
    value["validation"]["limits"]["laziness_ratio"] = 1e6
    run.write_recipe(Recipe.model_validate(value))
    report = validate_run(run, free_base)
    assert report["status"] == "failed"
    assert [g["name"] for g in report["gates"] if not g["passed"]] == ["execute / skip time"]


def test_validation_needs_an_export_and_its_base_model(
    exported: Exported, exported_tied: Exported, free_base: BaseModel, tmp_path: Path
) -> None:
    run = copy_of(exported.run, tmp_path)
    with pytest.raises(ArtifactError, match="tuned on"):
        validate_run(run, exported_tied.base)
    shutil.rmtree(run.onnx)
    with pytest.raises(ArtifactError, match="mskip export"):
        validate_run(run, free_base)
    assert not (run.reports / "validate.json").exists()


def copy_of(run: Run, folder: Path) -> Run:
    shutil.copytree(run.path, folder / "run")
    (folder / "run" / "reports" / "validate.json").unlink(missing_ok=True)
    return Run(folder / "run")


def test_unscored_is_no_score(exported: Exported, ort_runner: OrtRunner) -> None:
    """What the graph gives where nothing was undecided lies outside a sigmoid's range."""
    assert UNSCORED < 0
    state = ort_runner.prefill(np.array([[5, 6]]), routing=np.array([[1, 0, 1]]))
    assert np.isnan(state.scores).all()
