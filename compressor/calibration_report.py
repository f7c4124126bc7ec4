"""What ``calibration.json`` says of a threshold: capacity, layers, margins, warnings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mskip.compressor.sublayers import Unit

SHOWN_SCORES = 200
"""Most scores of a layer that are kept for looking at."""

# What decides, and between what a decision may flip where a score is close to tau.
_WORDS: dict[Unit, tuple[str, str]] = {
    "sequence": ("prompt", "engines"),
    "token": ("prompt token", "batches"),
}

# Steps below this distance of two scores are lost in the engine's arithmetic.
RESOLUTION = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Calibrated:
    """What either unit of routing ends in; rows are prompts, or tokens of prompts.

    Attributes:
        target: the capacity that was searched for.
        tau: [routed].
        decisions: on the calibration samples, [rows, routed] bool.
        scores: same shape, float32.
        held_decisions: on the held-out samples.
        held_scores: same shape, float32.
        held_interval: 95 % interval of their capacity over prompts.
        evaluations: trials of tau that ran prompts.
        reached: what a goal other than a share came to.
        extra: further entries of the calibration.
    """

    target: float
    tau: Tensor
    decisions: Tensor
    scores: Tensor
    held_decisions: Tensor
    held_scores: Tensor
    held_interval: list[float]
    evaluations: int
    reached: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def report(
        self, layers: list[int], unit: Unit, dtype: str, *, routed: bool = True
    ) -> dict[str, Any]:
        """The entries of ``calibration.json`` that follow from these.

        Args:
            layers: decoder layer index of each routed sublayer.
            unit: what decides.
            dtype: of the arithmetic in which a decision has to hold.
            routed: routers decide; of removal for good, constant decisions are no warning.
        """
        margins = (torch.cat([self.scores, self.held_scores]) - self.tau).abs()
        rows = _layer_rows(layers, unit, self)
        return {
            "tau": self.tau.tolist(),
            "capacity": {
                "calibration": float(self.decisions.float().mean()),
                "held_out": float(self.held_decisions.float().mean()),
                "held_out_interval": self.held_interval,
            },
            "layers": rows,
            "margins": {
                "min": float(margins.min()),
                "p05": _quantile(margins, 0.05),
                "median": float(margins.median()),
            },
            "warnings": _warnings(rows if routed else [], margins, dtype, *_WORDS[unit]),
            "evaluations": self.evaluations,
            **self.extra,
        }


def _quantile(values: Tensor, share: float) -> float:
    """As `torch.quantile`, which refuses as many values as tokens may be."""
    ordered = values.flatten().sort().values
    below, part = divmod(share * (len(ordered) - 1), 1)
    above = min(int(below) + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[int(below)], ordered[above], part))


def _layer_rows(layers: list[int], unit: Unit, found: Calibrated) -> list[dict[str, Any]]:
    every = torch.cat([found.decisions, found.held_decisions])
    held, scores = found.held_decisions, found.held_scores
    if unit == "token" and len(scores) > SHOWN_SCORES:
        chosen = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
        scores = scores[chosen[:SHOWN_SCORES].sort().values]
    rows = []
    for index, layer in enumerate(layers):
        column = every[:, index]
        constant = "execute" if bool(column.all()) else None if bool(column.any()) else "skip"
        rows.append(
            {
                "layer": layer,
                "tau": float(found.tau[index]),
                "capacity": float(held[:, index].float().mean()),
                "constant": constant,
                "scores": scores[:, index].tolist(),
            }
        )
    return rows


def _warnings(
    rows: list[dict[str, Any]], margins: Tensor, dtype: str, what: str, between: str
) -> list[str]:
    warnings = []
    constant = {
        kind: [row["layer"] for row in rows if row["constant"] == kind]
        for kind in ("skip", "execute")
    }
    if constant["skip"]:
        warnings.append(
            f"{_listed(constant['skip'])}: every {what} skips; removing it "
            "statically gives the same output and is simpler."
        )
    if constant["execute"]:
        warnings.append(
            f"{_listed(constant['execute'])}: every {what} executes; no router is needed."
        )
    close = int((margins < RESOLUTION[dtype]).sum())
    if close:
        warnings.append(
            f"{close} of {margins.numel()} scores stand closer to tau than {dtype} resolves "
            f"({RESOLUTION[dtype]:g}): their decisions may flip between {between}."
        )
    return warnings


def _listed(layers: list[int]) -> str:
    return ("layers " if len(layers) > 1 else "layer ") + ", ".join(map(str, layers))
