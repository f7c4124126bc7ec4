"""The second step of a run: tau for what the user has, from capacity to a limit on quality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mskip.compressor.artifact import Run, load_routers, tuned_by
from mskip.compressor.calibration import (
    Found,
    Paths,
    PromptScorer,
    capacity_interval,
    find_tau,
    find_tau_per_layer,
)
from mskip.compressor.errors import RecipeError
from mskip.compressor.evaluation import Reference
from mskip.compressor.goals import Goal, capacity_for_speedup, least_capacity
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import Routers
from mskip.compressor.samples import Samples, run_samples
from mskip.compressor.skipping import patched
from mskip.compressor.tune_step import AFTER_CALIBRATION
from mskip.compressor.worth import routed_pass

CAPACITY_STEPS = 64
"""A limit on quality is met to one part in so many of the capacity."""

# Steps below this distance of two scores are lost in the engine's arithmetic.
RESOLUTION = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


def calibrate_run(
    run: Run, base: BaseModel, goal: Goal, *, per_layer: bool, progress: Progress = silent
) -> dict[str, Any]:
    """Find tau for a goal and report on held-out prompts.

    Args:
        run: a tuned run.
        base: its base model.
        goal: what tau has to reach.
        per_layer: one tau a layer, each executing the wanted share.
        progress: one unit a trial.

    Returns:
        The calibration, as saved in ``calibration.json``.

    Raises:
        RecipeError: a goal out of range or, per layer, of another kind than capacity.
        ArtifactError: a goal in time, of a run that was not timed.
        UnreachableError: scores tie, or nothing reaches the goal.
    """
    goal.check()
    if per_layer and not goal.is_share:
        raise RecipeError(
            f"--per-layer cannot be had with {goal}.", "Give a capacity or a skip rate."
        )
    recipe = run.recipe()
    routers = load_routers(run, base).to(base.model.device)
    samples = run_samples(run, recipe, base, progress)
    routed = len(routers.layers)
    reached: dict[str, Any] = {}
    with patched(base.model, routers.sublayers):
        scorer = PromptScorer(base, routers, samples.calibration)
        everyone = list(range(len(scorer)))
        if per_layer:
            capacity = goal.share
            tau = find_tau_per_layer(scorer, len(scorer), routed, capacity)
            evaluations = routed
        else:
            paths = Paths(scorer, len(scorer), routed)

            def at(capacity: float) -> Found:
                return find_tau(paths, capacity, recipe.calibration.max_evaluations, progress)

            if goal.is_share:
                capacity = goal.share
            elif goal.kind == "speedup":
                capacity, reached = capacity_for_speedup(run, goal.value)
            else:
                steps = routed if tuned_by(run) == "static" else CAPACITY_STEPS
                quality = _Quality(base, routers, samples)
                capacity = least_capacity(goal, steps, lambda share: quality(at(share).tau))
            found = at(capacity)
            tau, evaluations = torch.full((routed,), found.tau), paths.evaluations
            if goal.in_quality:
                reached = {
                    "calibration": quality(found.tau)[goal.kind],
                    "held_out": quality(found.tau, held_out=True)[goal.kind],
                }
        decisions, scores = scorer(tau, everyone)
        held_out = PromptScorer(base, routers, samples.held_out)
        held_decisions, held_scores = held_out(tau, list(range(len(held_out))))
    margins = (torch.cat([scores, held_scores]) - tau).abs()
    rows = _layer_rows(routers.layers, tau, decisions, held_decisions, held_scores)
    calibration = {
        "target": capacity,
        "goal": {"kind": goal.kind, "value": goal.value, **reached},
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


class _Quality:
    """What a global tau costs, by the kind of goal; the model must be patched."""

    def __init__(self, base: BaseModel, routers: Routers, samples: Samples) -> None:
        self.base, self.routers, self.samples = base, routers, samples
        self.references: dict[bool, Reference] = {}

    def __call__(self, tau: float, *, held_out: bool = False) -> dict[str, float]:
        if held_out not in self.references:
            samples = self.samples.held_out if held_out else self.samples.calibration
            self.references[held_out] = Reference(self.base, self.routers.layers[0], samples)
        reference = self.references[held_out]
        taus = torch.full((len(self.routers.layers),), tau)
        found = reference.quality(routed_pass(self.routers, taus, []))
        dense = reference.quality(lambda _: None)
        return {"max_kl": found.kl, "max_ppl_increase": found.perplexity / dense.perplexity - 1}


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
