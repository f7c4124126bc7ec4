"""What a user has when tau is to be found: a share, a limit on quality, or a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mskip.compressor.artifact import Run
from mskip.compressor.calibration import UnreachableError
from mskip.compressor.errors import RecipeError

Kind = Literal["capacity", "skip_rate", "max_kl", "max_ppl_increase", "speedup"]


@dataclass(frozen=True)
class Goal:
    """What tau has to reach.

    Attributes:
        kind: what ``value`` is.
        value: of ``capacity`` and ``skip_rate`` a share, 0..1; of ``max_kl`` nats a token; of
            ``max_ppl_increase`` a share of the dense perplexity (0.05 is five per cent); of
            ``speedup`` dense time over routed time.
    """

    kind: Kind
    value: float

    def __str__(self) -> str:
        return f"--{self.kind.replace('_', '-')} {self.value:g}"

    @property
    def is_share(self) -> bool:
        """The goal is a capacity, however it is put."""
        return self.kind in ("capacity", "skip_rate")

    @property
    def in_quality(self) -> bool:
        """The goal is a limit on what skipping may cost."""
        return self.kind in ("max_kl", "max_ppl_increase")

    @property
    def share(self) -> float:
        """The capacity of a goal that is a share."""
        return self.value if self.kind == "capacity" else 1.0 - self.value

    def check(self) -> None:
        """Refuse a value out of range.

        Raises:
            RecipeError: names the goal and its range.
        """
        name = self.kind.replace("_", " ")
        if self.is_share and not 0.0 <= self.value <= 1.0:
            meaning = "executed" if self.kind == "capacity" else "skipped"
            raise RecipeError(
                f"{name} {self.value:g} is out of range.", f"It is the {meaning} share, 0..1."
            )
        if not self.is_share and not (self.value > 0 and math.isfinite(self.value)):
            raise RecipeError(f"{name} {self.value:g} is out of range.", "It is above 0.")


def least_capacity(goal: Goal, steps: int, cost: Callable[[float], dict[str, float]]) -> float:
    """The smallest capacity at which ``cost`` keeps the goal, by bisection.

    Args:
        goal: a limit on quality.
        steps: capacities tried are multiples of one over this.
        cost: capacity -> what it costs by kind; falls as capacity rises.
    """
    low, high = -1, steps  # everything executed costs nothing
    while high - low > 1:
        middle = (low + high) // 2
        if cost(middle / steps)[goal.kind] <= goal.value:
            high = middle
        else:
            low = middle
    return high / steps


def capacity_for_speedup(run: Run, speedup: float) -> tuple[float, dict[str, Any]]:
    """The capacity at which a measured case is ``speedup`` times as fast as dense.

    Time is linear in the number of executed sublayers: what each costs is what `mskip bench`
    measured between forced skip and forced execute.

    Args:
        run: a run that was timed.
        speedup: dense time over routed time.

    Returns:
        The capacity and the case it holds for.

    Raises:
        ArtifactError: the run was not timed.
        UnreachableError: skipping everything would not be enough.
    """
    case = run.report("costs", "Measure first: mskip export && mskip bench")
    dense, skip, execute = case["dense_ms"], case["skip_ms"], case["execute_ms"]
    allowed = dense / speedup
    if allowed < skip:
        raise UnreachableError(
            f"no capacity gives a speedup of {speedup:g}: {case['phase']} {case['batch']} x "
            f"{case['context']} with everything skipped is {dense / skip:.2f} times as fast as "
            "dense.",
            "Ask for less, time a longer context (mskip bench --context), or route more layers.",
        )
    capacity = 1.0 if execute <= skip else min(1.0, (allowed - skip) / (execute - skip))
    expected = dense / (skip + capacity * (execute - skip))
    names = ("engine", "form", "phase", "batch", "context", "per_sublayer_ms")
    return capacity, {"expected": expected, **{name: case.get(name) for name in names}}
