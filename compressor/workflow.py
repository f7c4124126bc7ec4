"""The steps of a run on the PyTorch side: tune, calibrate, evaluate.

Each reads what earlier steps left in the run folder and writes its own part,
whole, so a step can be repeated or resumed alone.
"""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mskip.compressor.artifact import Run, load_routers, save_routers
from mskip.compressor.baselines import (
    Sensitivity,
    forced_to,
    kept_count,
    measure_sensitivity,
    router_inputs,
    static_gates,
)
from mskip.compressor.calibration import (
    Paths,
    PromptScorer,
    capacity_interval,
    find_tau,
    find_tau_per_layer,
)
from mskip.compressor.encoding import Batch, Sample
from mskip.compressor.errors import ArtifactError, RecipeError
from mskip.compressor.evaluation import Quality, Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import Recipe
from mskip.compressor.router import Routers
from mskip.compressor.routing import HardPass, fresh_decisions
from mskip.compressor.samples import Samples, run_samples
from mskip.compressor.skipping import patched
from mskip.compressor.starting import first_price, initialise
from mskip.compressor.sublayers import Sublayers
from mskip.compressor.tuning import tune

# Steps below this distance of two scores are lost in the engine's arithmetic.
RESOLUTION = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}

# Reports that describe the run at one tau.
_AFTER_CALIBRATION = ("eval", "export", "validate", "bench")


def routed_sublayers(recipe: Recipe, base: BaseModel) -> Sublayers:
    """What a recipe routes in this model."""
    count = base.model.config.get_text_config().num_hidden_layers
    return Sublayers(recipe.routing.routed_layers(count), recipe.routing.granularity)


def tune_run(
    run: Run, recipe: Recipe, base: BaseModel, *, resume: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Tune the routers of a run and save them.

    Args:
        run: its folder is created; an earlier calibration in it is removed.
        recipe: the resolved recipe.
        base: the base model.
        resume: go on from a checkpoint; an unchanged recipe is then required.
        progress: shows every stage.

    Returns:
        The report, as saved in ``reports/tune.json``.

    Raises:
        RecipeError: ``resume`` with another recipe than the interrupted one.
        Interrupted: Ctrl-C, after a checkpoint.
    """
    started = time.monotonic()
    sublayers = routed_sublayers(recipe, base)
    layers = sublayers.layers
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
    with patched(base.model, sublayers):
        measured = samples.tune[: recipe.router.sensitivity_prompts]
        reference = Reference(base, layers[0], measured, progress=progress)
        sensitivity = measure_sensitivity(reference, sublayers, progress)
        inputs = router_inputs(reference)

    def tuned(target: float, folder: Path, stage: str) -> tuple[Routers, list[dict[str, float]]]:
        torch.manual_seed(recipe.tuning.seed)
        routers = Routers(sublayers, inputs.shape[2], bias=recipe.router.bias).to(base.model.device)
        initialise(routers, recipe.router, inputs, sensitivity, target)
        outcome = tune(
            base,
            routers,
            samples.tune,
            recipe.tuning,
            target,
            folder,
            start_price=first_price(sensitivity.kl, target),
            resume=resume,
            progress=lambda _, done, total, note="": progress(stage, done, total, note),
        )
        return outcome.routers, outcome.trace_json()

    target = recipe.routing.capacity
    routers, trace = tuned(target, run.checkpoints / "main", f"tune to capacity {target:g}")
    targets = [_reached(base, routers, samples.held_out, target, trace)]
    for other in recipe.tuning.check_targets:
        folder = run.checkpoints / f"target-{other:g}"
        checked, other_trace = tuned(other, folder, f"tune to capacity {other:g}")
        targets.append(_reached(base, checked, samples.held_out, other, other_trace))
    report = {
        "target": target,
        "loss": recipe.tuning.loss,
        "samples": len(samples.tune),
        "seconds": round(time.monotonic() - started, 1),
        "trace": trace,
        "sensitivity": {
            "layers": layers,
            "kl": sensitivity.kl,
            "cosine": sensitivity.cosine,
        },
        "targets": targets,
    }
    save_routers(run, routers, base, recipe)
    # Thresholds belong to the routers they were found for, and so does all that follows.
    (run.path / "calibration.json").unlink(missing_ok=True)
    run.forget_reports(*_AFTER_CALIBRATION)
    run.write_report("tune", report)
    run.write_manifest(
        base_model={"name": recipe.model.name, "sha256": base.sha256},
        seeds={"tuning": recipe.tuning.seed, "data": recipe.data.seed},
    )
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return report


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


def calibrate_run(
    run: Run, base: BaseModel, capacity: float, *, per_layer: bool, progress: Progress = silent
) -> dict[str, Any]:
    """Find tau for a capacity and report on held-out prompts.

    Args:
        run: a tuned run.
        base: its base model.
        capacity: wanted executed share, 0..1.
        per_layer: one tau a layer, each executing the wanted share.
        progress: one unit a trial.

    Returns:
        The calibration, as saved in ``calibration.json``.

    Raises:
        RecipeError: capacity out of range.
        UnreachableError: scores tie.
    """
    if not 0.0 <= capacity <= 1.0:
        raise RecipeError(
            f"capacity {capacity:g} is out of range.", "It is the executed share: 0 <= c <= 1."
        )
    recipe = run.recipe()
    routers = load_routers(run, base).to(base.model.device)
    samples = run_samples(run, recipe, base, progress)
    routed = len(routers.layers)
    with patched(base.model, routers.sublayers):
        scorer = PromptScorer(base, routers, samples.calibration)
        everyone = list(range(len(scorer)))
        if per_layer:
            tau = find_tau_per_layer(scorer, len(scorer), routed, capacity)
            evaluations = routed
        else:
            paths = Paths(scorer, len(scorer), routed)
            found = find_tau(paths, capacity, recipe.calibration.max_evaluations, progress)
            tau, evaluations = torch.full((routed,), found.tau), found.evaluations
        decisions, scores = scorer(tau, everyone)
        held_out = PromptScorer(base, routers, samples.held_out)
        held_decisions, held_scores = held_out(tau, list(range(len(held_out))))
    margins = (torch.cat([scores, held_scores]) - tau).abs()
    rows = _layer_rows(routers.layers, tau, decisions, held_decisions, held_scores)
    calibration = {
        "target": capacity,
        "per_layer": per_layer,
        "tau": tau.tolist(),
        "capacity": {
            "calibration": float(decisions.float().mean()),
            "held_out": float(held_decisions.float().mean()),
            "held_out_interval": capacity_interval(held_decisions),
        },
        "prompts": {"calibration": len(scorer), "held_out": len(held_out)},
        "layers": rows,
        "margins": {
            "min": float(margins.min()),
            "p05": float(margins.flatten().quantile(0.05)),
            "median": float(margins.median()),
        },
        "warnings": _warnings(rows, margins, recipe.export.dtype),
        "evaluations": evaluations,
    }
    run.write_calibration(calibration)
    run.forget_reports(*_AFTER_CALIBRATION)
    return calibration


def _layer_rows(
    layers: list[int], tau: Tensor, decisions: Tensor, held: Tensor, scores: Tensor
) -> list[dict[str, Any]]:
    every = torch.cat([decisions, held])
    rows = []
    for index, layer in enumerate(layers):
        column = every[:, index]
        constant = "execute" if bool(column.all()) else None if bool(column.any()) else "skip"
        rows.append(
            {
                "layer": layer,
                "tau": float(tau[index]),
                "capacity": float(held[:, index].float().mean()),
                "constant": constant,
                "scores": scores[:, index].tolist(),
            }
        )
    return rows


def _warnings(rows: list[dict[str, Any]], margins: Tensor, dtype: str) -> list[str]:
    warnings = []
    constant = {
        kind: [row["layer"] for row in rows if row["constant"] == kind]
        for kind in ("skip", "execute")
    }
    if constant["skip"]:
        warnings.append(
            f"{_listed(constant['skip'])}: every prompt skips; removing the attention "
            "statically gives the same output and is simpler."
        )
    if constant["execute"]:
        warnings.append(
            f"{_listed(constant['execute'])}: every prompt executes; no router is needed."
        )
    close = int((margins < RESOLUTION[dtype]).sum())
    if close:
        warnings.append(
            f"{close} of {margins.numel()} scores stand closer to tau than {dtype} resolves "
            f"({RESOLUTION[dtype]:g}): their decisions may flip between engines."
        )
    return warnings


def _listed(layers: list[int]) -> str:
    return ("layers " if len(layers) > 1 else "layer ") + ", ".join(map(str, layers))


def evaluate_run(
    run: Run, base: BaseModel, *, source: str | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Quality on held-out text: dense, static removal by two rules, routed at the calibrated tau.

    Args:
        run: a calibrated run.
        base: its base model.
        source: other data to measure on; None takes the run's held-out samples.
        progress: shows every stage.

    Returns:
        The report, as saved in ``reports/eval.json``.

    Raises:
        ArtifactError: the run is not tuned or not calibrated.
    """
    recipe = run.recipe()
    routers = load_routers(run, base).to(base.model.device)
    tau = torch.tensor(run.calibration()["tau"])
    sensitivity = _saved_sensitivity(run)
    samples = _evaluation_samples(run, recipe, base, source, progress)
    layers, routed = routers.layers, len(routers.layers)
    decided: list[Tensor] = []

    def route(batch: Batch) -> HardPass:
        decisions, scores = fresh_decisions(len(batch["input_ids"]), routed)
        device = batch["input_ids"].device
        decided.append(decisions := decisions.to(device))
        return HardPass(routers, tau.to(device), batch["prompt_mask"], decisions, scores.to(device))

    rows: list[dict[str, Any]] = []

    def add(method: str, quality: Quality, capacity: float, removed: list[int]) -> None:
        rows.append(
            {
                "method": method,
                "capacity": capacity,
                "kl": quality.kl,
                "perplexity": quality.perplexity,
                "layers_removed": removed,
            }
        )
        progress("evaluate", len(rows), 4, method)

    with patched(base.model, routers.sublayers):
        reference = Reference(base, layers[0], samples, progress=progress)
        dense = reference.quality(lambda _: None)
        add("dense", dense, 1.0, [])
        routed_quality = reference.quality(route)
        capacity = float(torch.cat(decided).float().mean())
        count = kept_count(run.calibration()["target"], routed)
        for rule, kept in (
            ("sensitivity", sensitivity.kept_by_kl(count)),
            ("cosine", sensitivity.kept_by_cosine(count)),
        ):
            gates = static_gates(kept, routed).to(base.model.device)
            quality = reference.quality(forced_to(gates))
            removed = [layer for index, layer in enumerate(layers) if index not in kept]
            add(f"static ({rule})", quality, count / routed, removed)
        add("routed", routed_quality, capacity, [])
    best_static = min(row["kl"] for row in rows if row["method"].startswith("static"))
    report = {
        "data": source or recipe.data.source,
        "prompts": len(samples),
        "tokens": dense.tokens,
        "rows": rows,
        "routed_over_static": routed_quality.kl / best_static if best_static else None,
    }
    run.write_report("eval", report)
    return report


def _saved_sensitivity(run: Run) -> Sensitivity:
    saved = run.report("tune", "Make it with: mskip tune")
    try:
        return Sensitivity(**copy.deepcopy(saved["sensitivity"]))
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{run.reports / 'tune.json'} lacks the sensitivity of the layers.", "Tune again."
        ) from error


def _evaluation_samples(
    run: Run, recipe: Recipe, base: BaseModel, source: str | None, progress: Progress
) -> list[Sample]:
    if source is None:
        samples: Samples = run_samples(run, recipe, base, progress)
        return samples.held_out
    from mskip.compressor.samples import read_samples

    return read_samples(source, recipe, base, recipe.evaluation.prompts, progress)
