"""The steps of a tuned run on the PyTorch side: calibrate, evaluate.

Each reads what earlier steps left in the run folder and writes its own part,
whole, so a step can be repeated or resumed alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mskip.compressor.artifact import Run, load_routers, tuned_by
from mskip.compressor.baselines import (
    forced_to,
    kept_count,
    kept_of,
    static_gates,
)
from mskip.compressor.calibration import (
    Paths,
    PromptScorer,
    capacity_interval,
    find_tau,
    find_tau_per_layer,
)
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import ArtifactError, RecipeError
from mskip.compressor.evaluation import Quality, Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import Recipe
from mskip.compressor.routing import EXECUTE
from mskip.compressor.samples import Samples, run_samples
from mskip.compressor.skipping import patched
from mskip.compressor.sublayers import Sublayers
from mskip.compressor.tune_step import AFTER_CALIBRATION
from mskip.compressor.worth import routed_pass

# Steps below this distance of two scores are lost in the engine's arithmetic.
RESOLUTION = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


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
    run.forget_reports(*AFTER_CALIBRATION)
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
    """Quality on held-out text: dense, static removal by every rule, routed at the calibrated tau.

    A run with compensation is measured with it, and so is static removal; the ratio is to the
    best static removal without.

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
    orders = _saved_orders(run, routers.layers)
    samples = _evaluation_samples(run, recipe, base, source, progress)
    sublayers, routed = routers.sublayers, len(routers.layers)
    first, count = sublayers.layers[0], kept_count(run.calibration()["target"], routed)
    bare = Sublayers(sublayers.layers, sublayers.granularity)
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
        progress("evaluate", len(rows), expected, method)

    def add_static(suffix: str) -> None:
        for rule, order in orders.items():
            kept = kept_of(order, count)
            gates = static_gates(kept, routed).to(base.model.device)
            removed = [sublayers.layers[index] for index in range(routed) if index not in kept]
            quality = reference.quality(forced_to(gates))
            add(f"static ({rule}){suffix}", quality, count / routed, removed)

    def add_routed(method: str) -> Quality:
        decided: list[Tensor] = []
        quality = reference.quality(routed_pass(routers, tau, decided))
        executed = torch.cat(decided) == EXECUTE
        add(method, quality, float(executed.float().mean()), [])
        return quality

    own = "routed" if tuned_by(run) == "routed" else "this run (static)"
    compensation = sublayers.compensation
    expected = 2 + len(orders)
    with patched(base.model, bare):
        reference = Reference(base, first, samples, progress=progress)
        dense = reference.quality(lambda _: None)
        add("dense", dense, 1.0, [])
        add_static("")
        best = min(row["kl"] for row in rows[1:])
        if compensation is None:
            last = add_routed(own)
    if compensation is not None:
        expected += len(orders)
        with patched(base.model, sublayers):
            add_static(f" + rank {compensation.rank}")
            last = add_routed(f"{own} + rank {compensation.rank}")
    report = {
        "data": source or recipe.data.source,
        "prompts": len(samples),
        "tokens": dense.tokens,
        "rows": rows,
        "routed_over_static": last.kl / best if best else None,
    }
    run.write_report("eval", report)
    return report


def _saved_orders(run: Run, layers: list[int]) -> dict[str, list[int]]:
    """Order of removal by each rule, positions 0..routed-1."""
    saved = run.report("tune", "Make it with: mskip tune")
    try:
        return {
            rule: [layers.index(layer) for layer in order]
            for rule, order in saved["removal_orders"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{run.reports / 'tune.json'} lacks the orders of removal.", "Tune again."
        ) from error


def _evaluation_samples(
    run: Run, recipe: Recipe, base: BaseModel, source: str | None, progress: Progress
) -> list[Sample]:
    if source is None:
        samples: Samples = run_samples(run, recipe, base, progress)
        return samples.held_out
    from mskip.compressor.samples import read_samples

    return read_samples(source, recipe, base, recipe.evaluation.prompts, progress)
