"""The first step of a run: from a base model and data to routers, saved in the run folder.

Two methods end in the same artefact. ``routed`` tunes routers; ``static`` gives every
prompt the same decisions, by constant scores in the order of removal.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mskip.compressor.artifact import Run, save_routers
from mskip.compressor.baselines import (
    Sensitivity,
    constant_logits,
    greedy_order,
    kept_count,
    kept_of,
    measure_sensitivity,
    router_inputs,
    static_gates,
)
from mskip.compressor.calibration import PromptScorer
from mskip.compressor.compensation import Compensation
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import RecipeError
from mskip.compressor.evaluation import Reference
from mskip.compressor.fitting import fit_compensation
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import Recipe
from mskip.compressor.router import Routers
from mskip.compressor.samples import Samples, run_samples
from mskip.compressor.skipping import patched
from mskip.compressor.starting import first_price, initialise
from mskip.compressor.sublayers import Sublayers
from mskip.compressor.tuning import tune
from mskip.compressor.worth import is_dynamic_worth_it

# Reports that describe the run at one tau.
AFTER_CALIBRATION = ("eval", "export", "validate", "bench")


def routed_sublayers(recipe: Recipe, base: BaseModel) -> Sublayers:
    """What a recipe routes in this model, with an unfitted compensation where it has one."""
    config = base.model.config.get_text_config()
    layers = recipe.routing.routed_layers(config.num_hidden_layers)
    rank, hidden = recipe.compensation.rank, int(config.hidden_size)
    compensation = None
    if rank:
        if rank != "full" and rank > hidden:
            raise RecipeError(
                f"compensation.rank = {rank}: the model's hidden state is only {hidden} wide.",
                'Give at most that, or "full".',
            )
        compensation = Compensation(len(layers), hidden, hidden if rank == "full" else rank)
        compensation.to(base.model.device)
    return Sublayers(layers, recipe.routing.granularity, compensation)


@dataclass(frozen=True)
class Measured:
    """What is known of the dense model before anything is tuned.

    Attributes:
        sensitivity: of every routed sublayer alone.
        orders: order of removal (positions 0..routed-1) by each rule.
        inputs: the routers' inputs, [samples, routed, hidden].
        reference: the samples that this was measured on.
    """

    sensitivity: Sensitivity
    orders: dict[str, list[int]]
    inputs: Tensor
    reference: Reference


def measure(
    base: BaseModel, sublayers: Sublayers, samples: list[Sample], removed: int, progress: Progress
) -> Measured:
    """Measure the routed sublayers; the model must be patched.

    Args:
        base: the base model.
        sublayers: what is routed, without compensation.
        samples: a few tuning samples.
        removed: how many sublayers the greedy rule takes out.
        progress: shows every stage.
    """
    reference = Reference(base, sublayers.layers[0], samples, progress=progress)
    sensitivity = measure_sensitivity(reference, sublayers, progress)
    orders = {
        "kl": sensitivity.order_by_kl(),
        "cosine": sensitivity.order_by_cosine(),
        "greedy": greedy_order(reference, sensitivity, removed, progress),
    }
    return Measured(sensitivity, orders, router_inputs(reference), reference)


def tune_run(
    run: Run, recipe: Recipe, base: BaseModel, *, resume: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Make the routers of a run and save them.

    Args:
        run: its folder is created; an earlier calibration in it is removed.
        recipe: the resolved recipe.
        base: the base model.
        resume: go on from a checkpoint; an unchanged recipe is then required.
        progress: shows every stage.

    Returns:
        The report, as saved in ``reports/tune.json``.

    Raises:
        RecipeError: ``resume`` with another recipe than the interrupted one, or a rank that
            the model has not.
        Interrupted: Ctrl-C, after a checkpoint.
    """
    started = time.monotonic()
    sublayers = routed_sublayers(recipe, base)
    if resume and (run.path / "recipe.yaml").is_file() and run.recipe() != recipe:
        raise RecipeError(
            f"the recipe differs from the one that {run.path} was started with.",
            "Resume without --set, --data or --recipe, or choose another --output.",
        )
    if not resume:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    run.write_recipe(recipe)
    run.remember()
    samples = run_samples(run, recipe, base, progress)
    target = recipe.routing.capacity
    count = kept_count(target, len(sublayers))
    bare = Sublayers(sublayers.layers, sublayers.granularity)
    with patched(base.model, bare):
        some = samples.tune[: recipe.router.sensitivity_prompts]
        measured = measure(base, bare, some, len(sublayers) - count, progress)
    order = measured.orders[recipe.static.rule]
    if sublayers.compensation is not None:
        _compensate(base, recipe, sublayers, samples.tune, order, count, progress)
    make = _static if recipe.method == "static" else _routed
    routers, details = make(run, recipe, base, sublayers, samples, measured, resume, progress)
    report = {
        "method": recipe.method,
        "target": target,
        "loss": recipe.tuning.loss,
        "samples": len(samples.tune),
        "sensitivity": {
            "layers": sublayers.layers,
            "kl": measured.sensitivity.kl,
            "cosine": measured.sensitivity.cosine,
        },
        "removal_orders": {
            rule: [sublayers.layers[index] for index in each]
            for rule, each in measured.orders.items()
        },
        **details,
        "seconds": round(time.monotonic() - started, 1),
    }
    save_routers(run, routers, base, recipe, recipe.method)
    # Thresholds belong to the routers they were found for, and so does all that follows.
    (run.path / "calibration.json").unlink(missing_ok=True)
    run.forget_reports(*AFTER_CALIBRATION)
    run.write_report("tune", report)
    run.write_manifest(
        base_model={"name": recipe.model.name, "sha256": base.sha256},
        seeds={"tuning": recipe.tuning.seed, "data": recipe.data.seed},
    )
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return report


def _compensate(
    base: BaseModel,
    recipe: Recipe,
    sublayers: Sublayers,
    samples: list[Sample],
    order: list[int],
    count: int,
    progress: Progress,
) -> None:
    gates = static_gates(kept_of(order, count), len(sublayers))
    with patched(base.model, sublayers):
        reference = Reference(base, sublayers.layers[0], samples, progress=progress)
        fit_compensation(reference, sublayers, gates, recipe.compensation.ridge, progress)


def _static(
    run: Run,
    recipe: Recipe,
    base: BaseModel,
    sublayers: Sublayers,
    samples: Samples,
    measured: Measured,
    resume: bool,
    progress: Progress,
) -> tuple[Routers, dict[str, Any]]:
    routers = Routers(sublayers, measured.inputs.shape[2])
    with torch.no_grad():
        routers.bias.copy_(constant_logits(measured.orders[recipe.static.rule]))
    return routers.to(base.model.device), {
        "rule": recipe.static.rule,
        "trace": [],
        "targets": [],
        "worth": None,
    }


def _routed(
    run: Run,
    recipe: Recipe,
    base: BaseModel,
    sublayers: Sublayers,
    samples: Samples,
    measured: Measured,
    resume: bool,
    progress: Progress,
) -> tuple[Routers, dict[str, Any]]:
    def tuned(target: float, name: str) -> tuple[Routers, list[dict[str, float]]]:
        torch.manual_seed(recipe.tuning.seed)
        routers = Routers(sublayers, measured.inputs.shape[2], bias=recipe.router.bias)
        routers.to(base.model.device)
        initialise(routers, recipe.router, measured.inputs, measured.sensitivity, target)
        stage = f"tune to capacity {target:g}"
        outcome = tune(
            base,
            routers,
            samples.tune,
            recipe.tuning,
            target,
            run.checkpoints / name,
            start_price=first_price(measured.sensitivity.kl, target),
            resume=resume,
            progress=lambda _, done, total, note="": progress(stage, done, total, note),
        )
        return outcome.routers, outcome.trace_json()

    target = recipe.routing.capacity
    routers, trace = tuned(target, "main")
    targets = [_reached(base, routers, samples.held_out, target, trace)]
    for other in recipe.tuning.check_targets:
        checked, other_trace = tuned(other, f"target-{other:g}")
        targets.append(_reached(base, checked, samples.held_out, other, other_trace))
    worth = is_dynamic_worth_it(
        base, routers, samples, target, measured.orders, measured.reference, progress
    )
    return routers, {"trace": trace, "targets": targets, "worth": worth}


def _reached(
    base: BaseModel,
    routers: Routers,
    samples: list[Sample],
    target: float,
    trace: list[dict[str, float]],
) -> dict[str, Any]:
    with patched(base.model, routers.sublayers):
        scorer = PromptScorer(base, routers, samples)
        decisions, _ = scorer(torch.full((len(routers.layers),), 0.5), list(range(len(scorer))))
    return {
        "target": target,
        "capacity": float(decisions.float().mean()),
        "steps": len(trace),
        "trace": [step["capacity"] for step in trace],
    }
