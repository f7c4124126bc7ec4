"""The first step of a run: from a base model and data to routers, saved in the run folder.

Two methods end in the same artefact. ``routed`` tunes routers; ``static`` gives every
prompt the same decisions, by constant scores in the order of removal.
"""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mskip.compressor.artifact import Run, save_routers
from mskip.compressor.baselines import constant_logits, kept_count, kept_of, static_gates
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import RecipeError
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.preparing import (
    Measured,
    bare_sublayers,
    compensate,
    measure,
    routed_sublayers,
)
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import Recipe
from mskip.compressor.router import Routers
from mskip.compressor.samples import Samples, run_samples
from mskip.compressor.sharding import Tune, meet
from mskip.compressor.starting import first_price, initialise
from mskip.compressor.sublayers import Sublayers
from mskip.compressor.tuning import tune
from mskip.compressor.units import prompt_paths
from mskip.compressor.worth import is_dynamic_worth_it

_FORMS = ("", "-ort", "-ort-int8", "-ort-int4", "-tensorrt", "-tensorrt-plugin", "-engine")
# Reports that describe the run at one tau: a graph has it as its default.
AFTER_CALIBRATION = (
    *("eval", "tasks", "tensorrt"),
    *(f"{name}{form}" for name in ("export", "validate", "bench") for form in _FORMS),
)


def tune_run(
    run: Run, recipe: Recipe, base: BaseModel, *, resume: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Make the routers of a run and save them.

    Of several processes the first one does it, and all of them tune; with ``model.shard`` the
    layers are spread over them, and stay so.

    Args:
        run: its folder is created; an earlier calibration in it is removed.
        recipe: the resolved recipe.
        base: the base model.
        resume: go on from a checkpoint; an unchanged recipe is then required.
        progress: shows every stage.

    Returns:
        The report, as saved in ``reports/tune.json``; empty in all processes but the first.

    Raises:
        RecipeError: ``resume`` with another recipe than the interrupted one, layers or a
            rank that the model has not, or ``model.shard`` in a single process.
        Interrupted: Ctrl-C, after a checkpoint.
    """
    processes = meet(recipe.model, base)
    if processes is None:
        return _tune_run(run, recipe, base, tune, resume=resume, progress=progress)
    if not processes.first:
        processes.follow()
        return {}
    with processes.leading():
        return _tune_run(run, recipe, base, processes.tune, resume=resume, progress=progress)


def _tune_run(
    run: Run, recipe: Recipe, base: BaseModel, train: Tune, *, resume: bool, progress: Progress
) -> dict[str, Any]:
    started = time.monotonic()
    routed_sublayers(recipe, base)  # refused before anything is written
    config = base.model.config.get_text_config()
    _check_removed(recipe, recipe.routing.candidates(config.num_hidden_layers))
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
    some = samples.tune[: recipe.router.sensitivity_prompts]
    bare, alone = bare_sublayers(base, recipe, some, progress)
    sublayers = routed_sublayers(recipe, base, bare.layers)
    _check_removed(recipe, bare.layers)
    routed, target = len(sublayers), recipe.routing.capacity
    lowest = min([target, *recipe.tuning.check_targets])
    with patched(base.model, bare):
        dense = measure(base, bare, some, routed - kept_count(lowest, routed), progress, alone)
    measured, orders = dense, dict(dense.orders)
    if sublayers.compensation is not None:
        asked = _asked_order(recipe, sublayers.layers, orders)
        measured = compensate(base, recipe, sublayers, samples.tune, dense, progress, asked)
        orders["compensated"] = measured.greedy.order
    make = _static if recipe.method == "static" else tune_routers
    work = Work(
        run.checkpoints, recipe, base, sublayers, samples, measured, orders, resume, progress, train
    )
    routers, details = make(work)
    report = {
        "method": recipe.method,
        "target": target,
        "loss": recipe.tuning.loss,
        "samples": len(samples.tune),
        "sensitivity": {
            "layers": sublayers.layers,
            "kl": dense.sensitivity.kl,
            "cosine": dense.sensitivity.cosine,
            "compensated_kl": measured.sensitivity.kl if measured is not dense else None,
        },
        "removal_orders": {
            rule: [sublayers.layers[index] for index in each] for rule, each in work.orders.items()
        },
        **details,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_tuned(run, routers, base, recipe, report)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return report


def write_tuned(
    run: Run, routers: Routers, base: BaseModel, recipe: Recipe, report: dict[str, Any]
) -> None:
    """Save routers and their report; what belonged to earlier ones goes.

    Args:
        run: its recipe is written already.
        routers: tuned, or constant.
        base: the model that they belong to.
        recipe: the run's.
        report: for ``reports/tune.json``.
    """
    save_routers(run, routers, base, recipe, recipe.method)
    # Thresholds belong to the routers they were found for, and so does all that follows.
    (run.path / "calibration.json").unlink(missing_ok=True)
    run.forget_reports(*AFTER_CALIBRATION, "costs", "sweep")
    run.write_report("tune", report)
    run.write_manifest(
        base_model={"name": recipe.model.name, "sha256": base.sha256},
        seeds={"tuning": recipe.tuning.seed, "data": recipe.data.seed},
    )


@dataclass
class Work:
    """What both methods of making routers start from.

    Attributes:
        checkpoints: folder of the tuner's checkpoints.
        recipe: the resolved recipe.
        base: the base model, not patched.
        sublayers: what is routed.
        samples: of the run.
        measured: with the compensation in place, where there is one.
        orders: order of removal by rule; what tuning learns is added.
        resume: go on from a checkpoint.
        progress: shows every stage.
        train: trains routers or maps, in this process or in all of them.
    """

    checkpoints: Path
    recipe: Recipe
    base: BaseModel
    sublayers: Sublayers
    samples: Samples
    measured: Measured
    orders: dict[str, list[int]]
    resume: bool
    progress: Progress
    train: Tune = tune


def _check_removed(recipe: Recipe, layers: list[int]) -> None:
    if strange := sorted(set(recipe.static.removed or ()) - set(layers)):
        raise RecipeError(
            f"static.removed names layers {strange}, which are not routed.",
            f"Routed are {layers}; see routing.layers.",
        )


def _asked_order(
    recipe: Recipe, layers: list[int], orders: dict[str, list[int]]
) -> list[int] | None:
    """Order of removal that a static recipe names; None where tuning is to find one."""
    spec = recipe.static
    if recipe.method == "routed":
        return None
    if spec.removed is None:
        return None if spec.rule == "greedy" else orders[spec.rule]
    gone = [layers.index(layer) for layer in spec.removed]
    return gone + [index for index in orders["greedy"] if index not in gone]


def _static(work: Work) -> tuple[Routers, dict[str, Any]]:
    recipe, sublayers = work.recipe, work.sublayers
    rule: str = recipe.static.rule
    if recipe.static.removed is not None:
        rule = "given"
    elif rule == "greedy" and "compensated" in work.orders:
        # With something in the place of what is removed, another removal is the cheapest.
        rule = "compensated"
    order = _asked_order(recipe, sublayers.layers, work.orders) or work.orders[rule]
    work.orders[rule] = order
    routers = Routers(sublayers, work.measured.inputs.shape[2]).to(work.base.model.device)
    constant = constant_logits(order).to(routers.bias)
    trace: list[dict[str, float]] = []
    if recipe.compensation.refine and sublayers.compensation is not None:
        # The decisions stand, the maps are trained under them.
        kept = kept_of(order, kept_count(recipe.routing.capacity, len(order)))
        with torch.no_grad():
            routers.bias.copy_(static_gates(kept, len(order))[0].to(constant) - 0.5)
        outcome = work.train(
            work.base,
            routers,
            work.samples.tune,
            recipe.tuning.model_copy(update={"noise_until": 0.0}),
            recipe.routing.capacity,
            work.checkpoints / "main",
            refine_rate=recipe.compensation.learning_rate,
            fixed=True,
            resume=work.resume,
            progress=lambda _, done, total, note="": work.progress(
                "refine compensation", done, total, note
            ),
        )
        trace = outcome.trace_json()
    with torch.no_grad():
        routers.bias.copy_(constant)
    return routers, {"rule": rule, "trace": trace, "targets": [], "worth": None}


def tune_routers(work: Work) -> tuple[Routers, dict[str, Any]]:
    """Tune routers, and compare them with static removal; the report's own entries with them."""
    recipe, measured = work.recipe, work.measured

    def tuned(target: float, name: str) -> tuple[Routers, list[dict[str, float]]]:
        torch.manual_seed(recipe.tuning.seed)
        sublayers = work.sublayers
        if name != "main" and sublayers.compensation is not None:
            # A check of the constraint must not train the maps that are kept.
            sublayers = replace(sublayers, compensation=copy.deepcopy(sublayers.compensation))
        routers = Routers(sublayers, measured.inputs.shape[2], bias=recipe.router.bias)
        routers.to(work.base.model.device)
        # Routers begin where the constraint does.
        first = 1.0 if recipe.tuning.capacity_warmup else target
        initialise(routers, recipe.router, measured.inputs, measured.costs, first)
        stage = f"tune to capacity {target:g}"
        outcome = work.train(
            work.base,
            routers,
            work.samples.tune,
            recipe.tuning,
            target,
            work.checkpoints / name,
            refine_rate=recipe.compensation.learning_rate if recipe.compensation.refine else None,
            start_price=first_price(measured.greedy.costs, target),
            resume=work.resume,
            progress=lambda _, done, total, note="": work.progress(stage, done, total, note),
        )
        return outcome.routers, outcome.trace_json()

    target = recipe.routing.capacity
    routers, trace = tuned(target, "main")
    targets = [_reached(work.base, routers, work.samples.held_out, target, trace)]
    for other in recipe.tuning.check_targets:
        checked, other_trace = tuned(other, f"target-{other:g}")
        targets.append(_reached(work.base, checked, work.samples.held_out, other, other_trace))
    worth = is_dynamic_worth_it(
        work.base, routers, work.samples, target, work.orders, measured.reference, work.progress
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
        decisions, _ = prompt_paths(base, routers, samples).at(0.5)
    return {
        "target": target,
        "capacity": float(decisions.float().mean()),
        "steps": len(trace),
        "trace": [step["capacity"] for step in trace],
    }
