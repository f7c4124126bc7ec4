"""Quality against capacity: static removal and routing, with and without compensation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mskip.compressor.artifact import Run, load_routers, saved_orders, tuned_by
from mskip.compressor.baselines import forced_to, kept_count, kept_of, static_gates
from mskip.compressor.calibration import UnreachableError, find_tau
from mskip.compressor.evaluation import Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import Routers
from mskip.compressor.samples import Samples, calibrated_samples
from mskip.compressor.units import prompt_paths, routed_passes, ties_of

CAPACITIES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def sweep_run(
    run: Run,
    base: BaseModel,
    capacities: Sequence[float] = CAPACITIES,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Trace quality against capacity on held-out prompts.

    Tau of every point comes from the calibration prompts; static removal goes by the rule that
    was best on tuning samples where that is known, else greedy.

    Args:
        run: a tuned run.
        base: its base model.
        capacities: wanted, 0..1.
        progress: one unit a point.

    Returns:
        The report, as saved in ``reports/sweep.json``: the dense model's perplexity, and by
        method the points with capacity asked for and reached, KL and perplexity.
    """
    recipe = run.recipe()
    routers = load_routers(run, base).to(base.model.device)
    samples = calibrated_samples(run, recipe, base, progress)
    sublayers = routers.sublayers
    bare = replace(sublayers, compensation=None)
    orders = saved_orders(run, routers.layers)
    parts = [bare] if sublayers.compensation is None else [bare, sublayers]
    # A static run's own scores are an order of removal: there is nothing routed to show.
    ways = 2 if tuned_by(run) == "routed" else 1
    done, expected = 0, len(capacities) * (len(parts) + ways - 1)
    series: dict[str, list[dict[str, float]]] = {}
    dense = None
    for part in parts:
        plain = part.compensation is None
        suffix = "" if plain else f" + rank {sublayers.compensation_rank}"
        rule = "greedy" if plain or "compensated" not in orders else "compensated"
        with patched(base.model, part):
            reference = Reference(base, part.layers[0], samples.held_out, progress=progress)
            dense = dense or reference.quality(lambda _: None)
            for capacity in capacities:
                count = kept_count(capacity, len(part))
                gates = static_gates(kept_of(orders[rule], count), len(part))
                found = reference.quality(forced_to(gates.to(base.model.device)))
                series.setdefault(f"static ({rule}){suffix}", []).append(
                    {
                        "wanted": capacity,
                        "capacity": count / len(part),
                        "kl": found.kl,
                        "perplexity": found.perplexity,
                    }
                )
                done += 1
                progress("sweep", done, expected, f"static{suffix} at {capacity:g}")
            if ways == 2 and part is parts[-1]:
                points = _routed(base, routers, samples, reference, capacities)
                for point in points:
                    series.setdefault(f"routed{suffix}", []).append(point)
                    done += 1
                    progress("sweep", done, expected, f"routed{suffix}")
    assert dense is not None
    report = {
        "prompts": len(samples.held_out),
        "tokens": dense.tokens,
        "dense_perplexity": dense.perplexity,
        "series": series,
    }
    run.write_report("sweep", report)
    return report


def _routed(
    base: BaseModel,
    routers: Routers,
    samples: Samples,
    reference: Reference,
    capacities: Sequence[float],
) -> list[dict[str, float]]:
    routed = len(routers.layers)
    paths = prompt_paths(base, routers, samples.calibration)
    points = []
    for capacity in capacities:
        try:
            tau = find_tau(paths, capacity, 40, ties=ties_of(routers, samples.calibration)).tau
        except UnreachableError:
            continue  # Constant gates reach some capacities only; the others are not drawn.
        passes = routed_passes(routers, torch.full((routed,), tau))
        found = reference.quality(passes)
        point = {
            "wanted": capacity,
            "capacity": passes.capacity,
            "tau": tau,
            "kl": found.kl,
            "perplexity": found.perplexity,
        }
        if passes.answer_capacity is not None:
            point["answer_capacity"] = passes.answer_capacity
        points.append(point)
    return points
