"""The second step of a run: tau for what the user has, from capacity to a limit on quality."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mskip.compressor.artifact import Run, load_routers, tuned_by
from mskip.compressor.calibration import (
    Found,
    Paths,
    PromptScorer,
    capacity_interval,
    find_tau,
    find_tau_per_layer,
)
from mskip.compressor.calibration_report import Calibrated
from mskip.compressor.errors import RecipeError
from mskip.compressor.evaluation import Reference
from mskip.compressor.goals import Goal, capacity_for_speedup, least_capacity
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import Routers
from mskip.compressor.samples import OTHER_SAMPLES, Samples, other_prompts, run_samples
from mskip.compressor.token_calibration import (
    executed_share,
    find_token_tau,
    share_interval,
    token_scores,
)
from mskip.compressor.tune_step import AFTER_CALIBRATION
from mskip.compressor.units import routed_passes

CAPACITY_STEPS = 64
"""A limit on quality is met to one part in so many of the capacity."""


@dataclass(frozen=True)
class OtherPrompts:
    """Prompts to calibrate on that are not the recipe's.

    Attributes:
        source: see `mskip.compressor.data.read_conversations`.
        max_length: in tokens, prompt and answer together; longer prompts are left out.
    """

    source: str
    max_length: int


def calibrate_run(
    run: Run,
    base: BaseModel,
    goal: Goal,
    *,
    per_layer: bool,
    other: OtherPrompts | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Find tau for a goal and report on held-out prompts.

    Where tokens decide, a capacity is that of the prompts' tokens, and ``answer_capacity``
    stands beside it.

    Args:
        run: a tuned run.
        base: its base model.
        goal: what tau has to reach.
        per_layer: one tau a layer, each executing the wanted share.
        other: prompts to calibrate and report on; None takes those kept apart in tuning. The
            steps after this one take the same.
        progress: one unit a trial.

    Returns:
        The calibration, as saved in ``calibration.json``.

    Raises:
        RecipeError: a goal out of range; per layer, or where tokens decide, one of another
            kind than capacity; or per layer where tokens decide.
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
    unit = routers.sublayers.unit
    if unit == "token":
        _check_token_goal(goal, per_layer)
    if other is None:
        samples = run_samples(run, recipe, base, progress)
    else:
        # Positions that the model does not have are of no use to it.
        known = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
        other = replace(other, max_length=min(other.max_length, known or other.max_length))
        samples = other_prompts(run, recipe, base, other.source, other.max_length, progress)
    limit = recipe.calibration.max_evaluations
    if unit == "token":
        found = _of_tokens(base, routers, samples, goal.share, limit, progress)
    else:
        found = _of_sequences(run, base, routers, samples, goal, per_layer, limit, progress)
    # The decisions of sequences have to hold in the engine that they are exported to.
    dtype = recipe.export.dtype if unit == "sequence" else recipe.model.dtype
    calibration = {
        "target": found.target,
        "goal": {"kind": goal.kind, "value": goal.value, **found.reached},
        "per_layer": per_layer,
        "data": None if other is None else asdict(other),
        "prompts": {"calibration": len(samples.calibration), "held_out": len(samples.held_out)},
        **found.report(routers.layers, unit, dtype, routed=tuned_by(run) == "routed"),
    }
    run.write_calibration(calibration)
    if other is None:
        (run.path / OTHER_SAMPLES).unlink(missing_ok=True)
    run.forget_reports(*AFTER_CALIBRATION)
    return calibration


def _of_sequences(
    run: Run,
    base: BaseModel,
    routers: Routers,
    samples: Samples,
    goal: Goal,
    per_layer: bool,
    limit: int,
    progress: Progress,
) -> Calibrated:
    routed = len(routers.layers)
    reached: dict[str, Any] = {}
    with patched(base.model, routers.sublayers):
        scorer = PromptScorer(base, routers, samples.calibration)
        if per_layer:
            capacity = goal.share
            tau = find_tau_per_layer(scorer, len(scorer), routed, capacity)
            evaluations = routed
        else:
            paths = Paths(scorer, len(scorer), routed)

            def at(capacity: float) -> Found:
                return find_tau(paths, capacity, limit, progress)

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
        taken = scorer(tau, list(range(len(scorer))))
        held_out = PromptScorer(base, routers, samples.held_out)
        held = held_out(tau, list(range(len(held_out))))
    return Calibrated(
        capacity, tau, *taken, *held, capacity_interval(held[0]), evaluations, reached
    )


def _check_token_goal(goal: Goal, per_layer: bool) -> None:
    if per_layer:
        raise RecipeError(
            "--per-layer cannot be had with routing.unit=token: one tau holds for all layers.",
            "Leave it out, or say --global.",
        )
    if not goal.is_share:
        raise RecipeError(
            f"{goal} cannot be had with routing.unit=token.", "Give a capacity or a skip rate."
        )


def _of_tokens(
    base: BaseModel,
    routers: Routers,
    samples: Samples,
    capacity: float,
    limit: int,
    progress: Progress,
) -> Calibrated:
    found = find_token_tau(base, routers, capacity, samples.calibration, limit, progress=progress)
    held = token_scores(base, routers, found.tau, samples.held_out)
    prompts, answers = [each.prompt for each in held], [each.answer for each in held]
    return Calibrated(
        capacity,
        torch.full((len(routers.layers),), found.tau),
        torch.cat([each.prompt for each in found.routings]),
        torch.cat([each.prompt_scores for each in found.routings]),
        torch.cat(prompts),
        torch.cat([each.prompt_scores for each in held]),
        share_interval(prompts),
        found.evaluations,
        extra={
            "answer_capacity": {
                "calibration": found.answer_capacity,
                "held_out": executed_share(answers),
                "held_out_interval": share_interval(answers),
            }
        },
    )


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
        found = reference.quality(routed_passes(self.routers, taus))
        dense = reference.quality(lambda _: None)
        return {"max_kl": found.kl, "max_ppl_increase": found.perplexity / dense.perplexity - 1}
