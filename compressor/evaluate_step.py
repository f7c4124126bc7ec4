"""What a calibrated run is worth: dense, static removal and routed on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mskip.compressor.artifact import Run, load_routers, saved_orders, tuned_by
from mskip.compressor.baselines import forced_to, kept_count, kept_of, static_gates
from mskip.compressor.encoding import Sample
from mskip.compressor.evaluation import Quality, Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import Recipe
from mskip.compressor.samples import Samples, calibrated_samples, read_samples
from mskip.compressor.units import routed_passes


def evaluate_run(
    run: Run, base: BaseModel, *, source: str | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Quality on held-out text: dense, static removal by every rule, routed at the calibrated tau.

    A run with compensation is measured with it, and so is static removal; the ratio is to the
    best static removal without. Where tokens decide, the row's capacity is that of the
    prompts' tokens, and it has the answers' beside it.

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
    orders = saved_orders(run, routers.layers)
    samples = _evaluation_samples(run, recipe, base, source, progress)
    sublayers, routed = routers.sublayers, len(routers.layers)
    first, count = sublayers.layers[0], kept_count(run.calibration()["target"], routed)
    bare = replace(sublayers, compensation=None)
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

    def add_static(rules: Sequence[str], suffix: str) -> None:
        for rule in rules:
            order = orders[rule]
            kept = kept_of(order, count)
            gates = static_gates(kept, routed).to(base.model.device)
            removed = [sublayers.layers[index] for index in range(routed) if index not in kept]
            quality = reference.quality(forced_to(gates))
            add(f"static ({rule}){suffix}", quality, count / routed, removed)

    def add_routed(method: str) -> Quality:
        passes = routed_passes(routers, tau)
        quality = reference.quality(passes)
        add(method, quality, passes.capacity, own_removed)
        if passes.answer_capacity is not None:
            rows[-1]["answer_capacity"] = passes.answer_capacity
        return quality

    own, own_removed = "routed", []
    if tuned_by(run) == "static":
        constant = torch.sigmoid(routers.folded()[1].cpu()) < tau
        own = "this run (static)"
        own_removed = [sublayers.layers[index] for index in constant.nonzero()[:, 0].tolist()]
    compensation = sublayers.compensation
    # Each order where it belongs: the greedy one taken with the maps in place, and the others.
    plain = [rule for rule in orders if rule != "compensated"]
    mapped = [rule for rule in ("compensated", "given", "learned") if rule in orders]
    expected = 2 + len(plain)
    with patched(base.model, bare):
        reference = Reference(base, first, samples, progress=progress)
        dense = reference.quality(lambda _: None)
        add("dense", dense, 1.0, [])
        add_static(plain, "")
        best = min(row["kl"] for row in rows[1:])
        if compensation is None:
            last = add_routed(own)
    if compensation is not None:
        expected += len(mapped)
        with patched(base.model, sublayers):
            add_static(mapped, f" + rank {compensation.rank}")
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


def _evaluation_samples(
    run: Run, recipe: Recipe, base: BaseModel, source: str | None, progress: Progress
) -> list[Sample]:
    if source is None:
        samples: Samples = calibrated_samples(run, recipe, base, progress)
        return samples.held_out
    return read_samples(source, recipe, base, recipe.evaluation.prompts, progress)
