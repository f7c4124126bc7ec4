"""Tune, calibrate and evaluate where tokens decide: a run on a folder with a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mskip.compressor.artifact import Run, load_routers, routing_unit, save_routers
from mskip.compressor.baselines import random_tokens, router_inputs
from mskip.compressor.calibrate_step import calibrate_run
from mskip.compressor.calibration import UnreachableError
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import ArtifactError, ModelError, RecipeError
from mskip.compressor.evaluate_step import evaluate_run
from mskip.compressor.evaluation import Reference
from mskip.compressor.goals import Goal
from mskip.compressor.loss import RouterObjective
from mskip.compressor.models import BaseModel, load_base
from mskip.compressor.patching import patched
from mskip.compressor.preparing import routed_sublayers
from mskip.compressor.recipe import Recipe, TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.samples import Samples, batches_of, run_samples
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Sublayers
from mskip.compressor.sweep_step import sweep_run
from mskip.compressor.token_calibration import executed_share, find_token_tau, token_scores
from mskip.compressor.token_skipping import TokenSkip
from mskip.compressor.tune_step import tune_run
from mskip.compressor.tuning import tune
from mskip.compressor.worth import is_dynamic_worth_it

LAYERS = [1, 2]


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> BaseModel:
    spec = Recipe.model_validate({"name": "x", "model": {"name": str(tiny_folder)}}).model
    return load_base(spec)


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"instruction": f"the {n} is" + " of the" * (n % 4), "output": f"{n * n} is the {n}"}
        for n in range(36)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"name": str(tiny_folder)},
            "routing": {"unit": "token", "layers": LAYERS},
            "router": {"init_scale": 0.2, "sensitivity_prompts": 6},
            "tuning": {"bf16": False, "max_steps": 6},
            "data": {"source": str(path), "calibration": 10, "held_out": 8},
        }
    )


def run_of(recipe: Recipe, base: BaseModel, place: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tune_run(Run(place / "run"), recipe, base)
    return Run(place / "run")


@pytest.fixture(scope="module")
def tuned(tiny: BaseModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tuned run; copy it before changing it."""
    return run_of(recipe, tiny, tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def run(tuned: Run, tmp_path: Path) -> Run:
    """A run of one's own, tuned."""
    shutil.copytree(tuned.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def samples(tuned: Run, tiny: BaseModel, recipe: Recipe) -> Samples:
    return run_samples(tuned, recipe, tiny)


# -- what ordinary calls do -------------------------------------------------------------------


@dataclass
class Outcome:
    """Of samples called one by one with TokenSkip: decisions [tokens, routed], sums of losses."""

    prompts: list[Tensor]
    answers: list[Tensor]
    prompt_scores: Tensor
    kl: float
    loss: float

    def capacity(self, index: int | slice = slice(None)) -> float:
        return float(torch.cat(self.prompts)[:, index].float().mean())

    @property
    def answer_capacity(self) -> float:
        return float(torch.cat(self.answers).float().mean())


@torch.no_grad()
def outcome(base: BaseModel, routers: Routers, tau: list[float], samples: list[Sample]) -> Outcome:
    prompts, answers, scores, kl, loss = [], [], [], [], []
    for sample in samples:
        ids, start = torch.tensor([sample.input_ids]), sample.prompt_length
        dense = base.model(ids).logits[0].log_softmax(-1)
        with TokenSkip(base.model, routers, tau):
            output = base.model(ids)
        decisions = output.past_key_values.decisions[0].bool()
        prompts.append(decisions[:start])
        answers.append(decisions[start:])
        scores.append(output.past_key_values.scores[0, :start])
        routed = output.logits[0].log_softmax(-1)
        p, q = (each[start - 1 : -1] for each in (dense, routed))
        kl.append((p.exp() * (p - q)).sum(-1))
        loss.append(F.cross_entropy(q, ids[0, start:], reduction="none"))
    return Outcome(
        prompts,
        answers,
        torch.cat(scores),
        float(torch.cat(kl).mean()),
        float(torch.cat(loss).mean()),
    )


def nearest(ones: Tensor, others: Tensor) -> Tensor:
    """Distance of each row of ``ones`` to the nearest row of ``others``."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(ones, others, compute_mode=exact).min(dim=1).values


# -- tune -------------------------------------------------------------------------------------


def test_tune_records_the_unit_and_reports_the_capacity_of_tokens(
    tuned: Run, tiny: BaseModel, samples: Samples
) -> None:
    config = json.loads((tuned.path / "router_config.json").read_text())
    assert (config["format"], config["unit"]) == (2, "token")
    assert routing_unit(tuned) == "token"
    routers = load_routers(tuned, tiny)
    assert routers.sublayers == Sublayers(LAYERS, unit="token")
    assert routers.weight.any()
    found = outcome(tiny, routers, [0.5, 0.5], samples.held_out)
    report = tuned.report("tune", "")
    assert report["targets"][0]["capacity"] == pytest.approx(found.capacity())
    assert [step["step"] for step in report["trace"]] == [1, 2, 3, 4, 5, 6]
    worth = report["worth"]
    assert worth["routed_kl"] > 0
    assert 0 <= worth["routed_answer_capacity"] <= 1
    assert sorted(report["removal_orders"]["learned"]) == LAYERS


def test_worth_compares_what_ordinary_calls_do(
    tuned: Run, tiny: BaseModel, samples: Samples
) -> None:
    routers = load_routers(tuned, tiny)
    with patched(tiny.model, routers.sublayers):
        reference = Reference(tiny, LAYERS[0], samples.tune[:6])
    orders = {"given": [1, 0]}
    worth = is_dynamic_worth_it(tiny, routers, samples, 0.5, orders, reference)
    # The tau of its own search is not in it: that of a calibration to the same capacity is it.
    tau = sweep_run(tuned, tiny, [0.5])["series"]["routed"][0]["tau"]
    found = outcome(tiny, routers, [tau, tau], samples.held_out)
    assert worth["routed_capacity"] == pytest.approx(found.capacity())
    assert worth["routed_answer_capacity"] == pytest.approx(found.answer_capacity)
    assert worth["routed_kl"] == pytest.approx(found.kl, rel=1e-3)
    asked = torch.cat(outcome(tiny, routers, [tau, tau], samples.calibration).prompts)
    shares = asked.float().mean(0)
    assert orders["learned"] == ([0, 1] if shares[0] <= shares[1] else [1, 0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_objective_counts_prompt_tokens(
    tiny: BaseModel, tuned: Run, samples: Samples, checkpointing: bool
) -> None:
    """Its logits are those of ordinary calls, of the prompts' tokens alone."""
    routers = load_routers(tuned, tiny).requires_grad_(True)
    some = samples.tune[:5]
    spec = TuningSpec(bf16=False, gradient_checkpointing=checkpointing)
    objective = RouterObjective(tiny, routers, spec, some)
    (batch,) = batches_of(some, tiny, 8)
    with patched(tiny.model, routers.sublayers):
        out = objective(
            **batch,
            index=torch.arange(5),
            noise_scale=0.0,
            noise_seed=0,
            num_items_in_batch=int(batch["answer_mask"].sum()),
        )
        (out["task"] + out["logits"].sum()).backward()
    assert float(routers.weight.grad.abs().max()) > 0
    ordered = sorted(some, key=lambda sample: len(sample.input_ids))
    found = outcome(tiny, routers, [0.5, 0.5], ordered)
    torch.testing.assert_close(
        torch.sigmoid(out["logits"].detach()), found.prompt_scores, rtol=1e-3, atol=1e-4
    )
    assert float(out["task"].detach()) == pytest.approx(found.kl, rel=1e-3)


def test_noise_is_of_tokens(tiny: BaseModel, tuned: Run, samples: Samples) -> None:
    """Strong noise makes tokens of one prompt part ways; it ends with its scale."""
    routers = load_routers(tuned, tiny)
    with torch.no_grad():
        routers.weight.zero_()
        routers.bias.fill_(4.0)
    some = samples.tune[:4]
    objective = RouterObjective(tiny, routers, TuningSpec(bf16=False), some)
    (batch,) = batches_of(some, tiny, 8)
    losses = []
    with patched(tiny.model, routers.sublayers), torch.no_grad():
        for scale, seed in ((0.0, 0), (5.0, 0), (5.0, 0), (5.0, 1)):
            out = objective(
                **batch,
                index=torch.arange(4),
                noise_scale=scale,
                noise_seed=seed,
                num_items_in_batch=1,
            )
            losses.append(float(out["task"]))
    assert losses[0] == pytest.approx(0, abs=1e-4)  # everything executes
    assert losses[1] == losses[2] > 1e-2
    assert losses[3] != losses[1]


def test_the_trace_is_the_share_of_prompt_tokens(
    tiny: BaseModel, tuned: Run, samples: Samples, tmp_path: Path
) -> None:
    """One step over all samples in two micro-batches: what the constraint observes."""
    routers = load_routers(tuned, tiny)
    some = samples.tune[:8]
    spec = TuningSpec(
        bf16=False, max_steps=1, batch_size=4, gradient_accumulation=2, noise_until=0.0
    )
    expected = executed_share([r.prompt for r in token_scores(tiny, routers, 0.5, some)])
    trace = tune(tiny, routers, some, spec, 0.5, tmp_path).trace
    assert trace[0].capacity == pytest.approx(expected)


def test_tuning_reaches_the_capacity(tiny: BaseModel, samples: Samples, tmp_path: Path) -> None:
    """From routers that execute everything, by the price of prompt tokens alone."""
    routers = Routers(Sublayers(LAYERS, unit="token"), tiny.model.config.hidden_size)
    with patched(tiny.model, routers.sublayers):
        reference = Reference(tiny, LAYERS[0], samples.tune)
        routers.standardise(router_inputs(reference, "token"))
    with torch.no_grad():
        routers.bias.fill_(0.5)
    everything = executed_share([r.prompt for r in token_scores(tiny, routers, 0.5, samples.tune)])
    assert everything == 1.0
    spec = TuningSpec(
        bf16=False, max_steps=60, batch_size=18, constraint_gain=30.0, constraint_integral=1.0
    )
    trace = tune(tiny, routers, samples.tune, spec, 0.5, tmp_path).trace
    assert sum(step.capacity for step in trace[-10:]) / 10 == pytest.approx(0.5, abs=0.12)


# -- the start --------------------------------------------------------------------------------


def test_random_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    generator = torch.Generator().manual_seed(0)
    drawn = [random_tokens(mask, 3, generator) for _ in range(200)]
    assert all(not bool((each & ~mask).any()) for each in drawn)
    assert {tuple(each.sum(1).tolist()) for each in drawn} == {(3, 2, 1)}
    shares = torch.stack(drawn).float().mean(0)[0]
    torch.testing.assert_close(shares, torch.full((6,), 0.5), rtol=0, atol=0.12)
    assert torch.equal(random_tokens(mask, 10, generator), mask)


def test_inputs_are_normed_states_of_prompt_tokens(tiny: BaseModel, samples: Samples) -> None:
    some = samples.tune[:5]
    with patched(tiny.model, LAYERS):
        reference = Reference(tiny, LAYERS[0], some)
        inputs = router_inputs(reference, "token")
        again = router_inputs(reference, "token")
    assert torch.equal(inputs, again)
    counts = [min(8, sample.prompt_length) for sample in some]
    assert inputs.shape == (sum(counts), 2, tiny.model.config.hidden_size)
    states: list[Tensor] = []
    hook = tiny.model.model.layers[2].input_layernorm.register_forward_hook(
        lambda _, __, output: states.append(output[0])
    )
    with torch.no_grad():
        for sample in some:
            tiny.model(torch.tensor([sample.input_ids[: sample.prompt_length]]))
    hook.remove()
    assert float(nearest(inputs[:, 1], torch.cat(states)).max()) < 1e-4


# -- calibrate --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "goal", [Goal("capacity", 0.25), Goal("capacity", 0.5), Goal("skip_rate", 0.3)], ids=str
)
def test_calibrate(run: Run, tiny: BaseModel, samples: Samples, goal: Goal) -> None:
    """Every figure is that of TokenSkip's ordinary calls at the tau reported."""
    calibration = calibrate_run(run, tiny, goal, per_layer=False)
    assert json.loads((run.path / "calibration.json").read_text()) == calibration
    assert set(calibration) == {
        "target", "goal", "data", "per_layer", "tau", "capacity", "prompts", "layers", "margins",
        "warnings", "evaluations", "answer_capacity",
    }  # fmt: skip
    assert calibration["target"] == goal.share
    assert calibration["prompts"] == {"calibration": 10, "held_out": 8}
    tau = calibration["tau"]
    assert len(tau) == 2
    assert len(set(tau)) == 1
    routers = load_routers(run, tiny)
    ours = outcome(tiny, routers, tau, samples.calibration)
    held_out = outcome(tiny, routers, tau, samples.held_out)
    figures, answers = calibration["capacity"], calibration["answer_capacity"]
    assert figures["calibration"] == pytest.approx(ours.capacity())
    assert figures["held_out"] == pytest.approx(held_out.capacity())
    assert answers["calibration"] == pytest.approx(ours.answer_capacity)
    assert answers["held_out"] == pytest.approx(held_out.answer_capacity)
    for each in (figures, answers):
        low, high = each["held_out_interval"]
        assert low <= each["held_out"] <= high
    calls = torch.cat(ours.prompts).numel()
    # The template's tokens are the same in all prompts, and skip or execute together: half a
    # call a prompt, and what one drags along.
    assert abs(figures["calibration"] - goal.share) <= (10 / 2 + 1) / calls
    for index, row in enumerate(calibration["layers"]):
        assert set(row) == {"layer", "tau", "capacity", "constant", "scores"}
        assert (row["layer"], row["tau"]) == (LAYERS[index], tau[index])
        assert row["capacity"] == pytest.approx(held_out.capacity(index))
        seen = held_out.prompt_scores[:, index]
        assert len(row["scores"]) == min(200, len(seen))
        assert all(float((seen - score).abs().min()) < 1e-4 for score in row["scores"])
    margins = calibration["margins"]
    assert 0 <= margins["min"] <= margins["p05"] <= margins["median"]
    every = torch.cat([ours.prompt_scores, held_out.prompt_scores])
    assert margins["median"] == pytest.approx(float((every - tau[0]).abs().median()), abs=1e-4)


def test_at_most_two_hundred_scores_a_layer(
    run: Run, tiny: BaseModel, recipe: Recipe, samples: Samples
) -> None:
    """Held-out prompts of more tokens than that: the same tokens of every layer."""
    data = recipe.data.model_copy(update={"held_out": 20, "calibration": 4})
    run.write_recipe(recipe.model_copy(update={"data": data}))
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    held_out = run_samples(run, run.recipe(), tiny).held_out
    assert sum(sample.prompt_length for sample in held_out) > 200
    routings = token_scores(tiny, load_routers(run, tiny), calibration["tau"], held_out)
    pairs = torch.cat([each.prompt_scores for each in routings])
    shown = torch.tensor([row["scores"] for row in calibration["layers"]]).T
    assert shown.shape == (200, 2)
    assert float(nearest(shown, pairs).max()) < 1e-6


def test_constant_gates_are_named(run: Run, tiny: BaseModel, recipe: Recipe) -> None:
    routers = load_routers(run, tiny)
    routers.weight.zero_()
    routers.bias.copy_(torch.tensor([3.0, -3.0]))
    save_routers(run, routers, tiny, recipe)
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    assert [row["constant"] for row in calibration["layers"]] == ["execute", "skip"]
    skipping, executing = calibration["warnings"]
    assert skipping.startswith("layer 2: every prompt token skips")
    assert executing.startswith("layer 1: every prompt token executes")
    # Far more of one score than there are prompts.
    with pytest.raises(UnreachableError, match="scores tie"):
        calibrate_run(run, tiny, Goal("capacity", 0.25), per_layer=False)


def test_the_template_s_tokens_tie_and_are_no_fault(
    tuned: Run, tiny: BaseModel, samples: Samples
) -> None:
    """They have one score in all prompts: any capacity is met to half a call a prompt."""
    routers = load_routers(tuned, tiny)
    prompts = [sample.input_ids[: sample.prompt_length] for sample in samples.calibration]
    assert len({tuple(ids[:6]) for ids in prompts}) == 1
    half = len(prompts) / 2 / (2 * sum(map(len, prompts)))
    distances = []
    for target in torch.linspace(0, 1, 15).tolist():
        found = find_token_tau(tiny, routers, target, samples.calibration)
        distances.append(abs(found.capacity - target))
    assert max(distances) <= 2 * half
    assert sorted(distances)[7] <= half


@pytest.mark.parametrize(
    ("goal", "per_layer", "message"),
    [
        (Goal("max_kl", 0.1), False, "--max-kl 0.1 cannot be had with routing.unit=token"),
        (Goal("max_ppl_increase", 0.1), False, "--max-ppl-increase 0.1 cannot be had"),
        (Goal("speedup", 1.1), False, "--speedup 1.1 cannot be had"),
        (Goal("capacity", 0.5), True, "--per-layer cannot be had with routing.unit=token"),
    ],
    ids=str,
)
def test_other_goals_are_refused(
    run: Run, tiny: BaseModel, goal: Goal, per_layer: bool, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        calibrate_run(run, tiny, goal, per_layer=per_layer)
    assert caught.value.remedy
    assert not (run.path / "calibration.json").exists()


# -- evaluate and sweep -----------------------------------------------------------------------


def test_evaluate(run: Run, tiny: BaseModel, samples: Samples) -> None:
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    report = evaluate_run(run, tiny)
    assert run.report("eval", "") == report
    dense, *static, routed = report["rows"]
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    found = outcome(tiny, load_routers(run, tiny), calibration["tau"], samples.held_out)
    assert routed["method"] == "routed"
    assert routed["capacity"] == pytest.approx(found.capacity())
    assert routed["answer_capacity"] == pytest.approx(found.answer_capacity)
    assert routed["kl"] == pytest.approx(found.kl, rel=1e-3)
    assert routed["perplexity"] == pytest.approx(math.exp(found.loss), rel=1e-3)
    best = min(row["kl"] for row in static)
    assert report["routed_over_static"] == pytest.approx(routed["kl"] / best)
    assert all("answer_capacity" not in row for row in (dense, *static))


def test_a_point_of_the_sweep_is_what_calibrate_and_eval_find(run: Run, tiny: BaseModel) -> None:
    point, whole = sweep_run(run, tiny, [0.5, 1.0])["series"]["routed"]
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    row = evaluate_run(run, tiny)["rows"][-1]
    assert point["tau"] == calibration["tau"][0]
    for name in ("capacity", "answer_capacity", "kl", "perplexity"):
        assert point[name] == pytest.approx(row[name], rel=1e-5)
    assert (whole["capacity"], whole["answer_capacity"]) == (1.0, 1.0)
    assert whole["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("granularity", ["mlp", "block"])
def test_other_granularities_with_compensation(
    tiny: BaseModel, recipe: Recipe, tmp_path: Path, granularity: str
) -> None:
    changed = recipe.model_dump()
    changed["routing"]["granularity"] = granularity
    changed["compensation"].update(rank=4, refine=True)
    changed["tuning"]["max_steps"] = 3
    run = run_of(Recipe.model_validate(changed), tiny, tmp_path)
    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    routed = evaluate_run(run, tiny)["rows"][-1]
    assert routed["method"] == "routed + rank 4"
    routers = load_routers(run, tiny)
    assert routers.sublayers.unit == "token"
    held_out = run_samples(run, run.recipe(), tiny).held_out
    found = outcome(tiny, routers, calibration["tau"], held_out)
    assert routed["capacity"] == pytest.approx(found.capacity())
    assert routed["kl"] == pytest.approx(found.kl, rel=1e-3)


# -- the unit ---------------------------------------------------------------------------------


def test_static_removal_has_no_unit(tiny: BaseModel, recipe: Recipe, tmp_path: Path) -> None:
    """It is the same for every token, so that it stays exportable."""
    run = run_of(recipe.model_copy(update={"method": "static"}), tiny, tmp_path)
    assert routing_unit(run) == "sequence"
    with MindSkip(tiny.model, load_routers(run, tiny)):
        pass


def test_a_configuration_without_the_entry_means_sequence(run: Run, tiny: BaseModel) -> None:
    path = run.path / "router_config.json"
    config = json.loads(path.read_text())
    del config["unit"]
    path.write_text(json.dumps(config))
    assert load_routers(run, tiny).sublayers.unit == routing_unit(run) == "sequence"
    for damage in ({**config, "unit": "word"}, []):
        path.write_text(json.dumps(damage))
        with pytest.raises(ArtifactError, match="lacks or mangles"):
            load_routers(run, tiny)
        with pytest.raises(ArtifactError, match="lacks or mangles"):
            routing_unit(run)
    path.unlink()
    assert routing_unit(run) == "sequence"


def test_each_attachment_refuses_the_other_s_routers(tuned: Run, tiny: BaseModel) -> None:
    routers = load_routers(tuned, tiny)
    with pytest.raises(ModelError, match="MindSkip takes one decision a sequence") as caught:
        MindSkip(tiny.model, routers)
    assert "PyTorch only" in caught.value.remedy
    assert "TokenSkip" in caught.value.remedy
    with pytest.raises(ModelError, match="TokenSkip takes one decision a token") as caught:
        TokenSkip(tiny.model, Routers(LAYERS, 32))
    assert "MindSkip" in caught.value.remedy
    assert not any("forward" in module.__dict__ for module in tiny.model.modules())


def test_attention_without_masks_is_refused_before_tuning(
    tiny: BaseModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.model.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ModelError, match="cannot run some tokens"):
        routed_sublayers(recipe, tiny)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelError, match="takes one decision a sequence") as caught:
        call()
    assert caught.value.status == 1
    assert "TokenSkip" in caught.value.remedy
    return caught.value.message


def test_ways_out_are_refused(run: Run, tiny: BaseModel) -> None:
    pytest.importorskip("onnxruntime")
    from mskip.exporters.onnx_export import contract_of, export_run
    from mskip.exporters.parity import validate_run
    from mskip.exporters.speed import bench_run
    from mskip.exporters.task_scores import check_run
    from mskip.exporters.torch_runner import TorchRunner

    calibration = calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    routers = load_routers(run, tiny)
    contract = contract_of(tiny, routers, calibration["tau"], 20)
    assert refused(lambda: TorchRunner(tiny, routers, contract)).startswith("this runner")
    assert refused(lambda: export_run(run, tiny)).startswith("the exported graph")
    assert not run.onnx.exists()
    refused(lambda: validate_run(run, tiny))
    refused(lambda: bench_run(run))
    refused(lambda: check_run(run, "torch", ["routed"]))


def test_commands_say_so_with_status_1(
    run: Run, tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from mskip.cli.main import app

    monkeypatch.chdir(run.path.parent)
    calibrate_run(run, tiny, Goal("capacity", 0.5), per_layer=False)
    folder = str(run.path)
    for arguments in (
        ["generate", "hello", "--run", folder],
        ["export", folder],
        ["validate", folder],
        ["bench", folder],
        ["eval", folder, "--tasks", "piqa"],
    ):
        result = CliRunner().invoke(app, arguments, prog_name="mskip")
        assert result.exit_code == 1, (arguments, result.stderr)
        words = " ".join(result.stderr.split())
        assert "these routers decide once a token" in words, arguments
        assert "TokenSkip" in words
    assert CliRunner().invoke(app, ["eval", folder], prog_name="mskip").exit_code == 0
