"""Thresholds for capacities from none to all: what a server turns without a new calibration."""

from __future__ import annotations

from typing import Any

import torch

from mskip.compressor.artifact import Run, load_routers
from mskip.compressor.calibration import ABOVE_EVERY_SCORE, PromptScorer
from mskip.compressor.files import read_json, sha256, write_json
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.progress import Progress, silent
from mskip.compressor.samples import calibrated_samples

DIAL = "dial.json"
"""File of a run."""
STEPS = 8
"""Thresholds are tried at quantiles of one part in so many."""


def saved_dial(run: Run) -> dict[str, Any] | None:
    """The dial of a run, if it was found for the calibration that the run has."""
    path = run.path / DIAL
    if not path.is_file():
        return None
    dial: dict[str, Any] = read_json(path, "dial", "Delete it; it is made again.")
    same = dial.get("calibration") == sha256(run.path / "calibration.json")
    return dial if same else None


def find_dial(
    run: Run, base: BaseModel, progress: Progress = silent, steps: int = STEPS
) -> dict[str, Any]:
    """Thresholds of the routed sublayers, and the capacity of each, on the calibration prompts.

    Quantiles of the calibrated scores are tried as one threshold for all layers; what they execute
    is measured, not taken from the quantile, since a sublayer that is skipped changes the scores
    of those behind it. The run's own target has its calibrated thresholds.

    Args:
        run: a calibrated run whose sequences decide.
        base: its base model.
        progress: one unit a threshold.
        steps: one threshold less is tried.

    Returns:
        ``capacities``, rising from 0 to 1, ``taus``, [capacities][routed], and the hash of the
        ``calibration``; as saved in ``dial.json``.
    """
    calibration = run.calibration()
    routers = load_routers(run, base).to(base.model.device)
    routed = len(routers.layers)
    scores = torch.tensor([layer["scores"] for layer in calibration["layers"]]).flatten()
    found: dict[float, list[float]] = {}
    samples = calibrated_samples(run, run.recipe(), base, progress)
    with patched(base.model, routers.sublayers), torch.no_grad():
        scorer = PromptScorer(base, routers, samples.calibration)
        everyone = list(range(len(scorer)))
        for step in range(1, steps):
            tau = torch.full((routed,), float(scores.quantile(step / steps)))
            capacity = float(scorer(tau, everyone)[0].float().mean())
            progress("dial", step, steps, f"capacity {capacity:.3f}")
            if 0 < capacity < 1:
                found[capacity] = tau.tolist()
    reached = float(calibration["capacity"]["calibration"])
    if 0 < reached < 1:
        # Any other tau of nearly the same capacity would bend the dial around it.
        found = {each: tau for each, tau in found.items() if abs(each - reached) > 1 / (2 * steps)}
        found[reached] = [float(each) for each in calibration["tau"]]
    found |= {0.0: [ABOVE_EVERY_SCORE] * routed, 1.0: [0.0] * routed}
    progress("dial", steps, steps)
    capacities = sorted(found)
    dial = {
        "calibration": sha256(run.path / "calibration.json"),
        "capacities": capacities,
        "taus": [found[each] for each in capacities],
    }
    write_json(run.path / DIAL, dial)
    return dial
