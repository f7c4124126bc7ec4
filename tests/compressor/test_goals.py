"""What a user has when tau is to be found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mskip.compressor.artifact import Run
from mskip.compressor.calibration import UnreachableError
from mskip.compressor.errors import ArtifactError, RecipeError
from mskip.compressor.goals import Goal, Kind, capacity_for_speedup, least_capacity


@pytest.mark.parametrize(
    ("kind", "value", "share"), [("capacity", 0.25, 0.25), ("skip_rate", 0.25, 0.75)]
)
def test_shares(kind: Kind, value: float, share: float) -> None:
    goal = Goal(kind, value)
    goal.check()
    assert goal.is_share
    assert goal.share == share


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("capacity", 1.5, "executed share"),
        ("skip_rate", -0.1, "skipped share"),
        ("max_kl", 0.0, "above 0"),
        ("speedup", float("inf"), "above 0"),
        ("max_ppl_increase", float("nan"), "above 0"),
    ],
)
def test_out_of_range(kind: Kind, value: float, words: str) -> None:
    with pytest.raises(RecipeError, match="out of range") as caught:
        Goal(kind, value).check()
    assert words in str(caught.value)


@given(limit=st.floats(0.001, 2), steps=st.integers(1, 100))
def test_least_capacity_is_the_smallest_that_keeps_the_limit(limit: float, steps: int) -> None:
    def cost(capacity: float) -> dict[str, float]:
        return {"max_kl": (1 - capacity) ** 2 * 2}

    found = least_capacity(Goal("max_kl", limit), steps, cost)
    assert cost(found)["max_kl"] <= limit
    if found > 0:
        assert cost(found - 1 / steps)["max_kl"] > limit


def costs(path: Path) -> Run:
    run = Run(path)
    run.write_report(
        "costs",
        {
            "engine": "an engine", "phase": "prefill", "batch": 1, "context": 2048,
            "dense_ms": 100.0, "execute_ms": 104.0, "skip_ms": 64.0, "per_sublayer_ms": 2.5,
        },
    )  # fmt: skip
    return run


def test_speedup_is_linear_in_the_sublayers(tmp_path: Path) -> None:
    """100 / 1.25 = 80 ms is 16 ms above all-skip, of 40 between the two."""
    capacity, case = capacity_for_speedup(costs(tmp_path), 1.25)
    assert capacity == pytest.approx(0.4)
    assert case["expected"] == pytest.approx(1.25)
    assert case["context"] == 2048


def test_speedup_below_what_executing_costs_skips_nothing(tmp_path: Path) -> None:
    capacity, case = capacity_for_speedup(costs(tmp_path), 0.5)
    assert capacity == 1.0
    assert case["expected"] == pytest.approx(100 / 104)


def test_speedup_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"2048 with everything skipped is 1\.56 times"):
        capacity_for_speedup(costs(tmp_path), 2.0)


def test_speedup_unmeasured(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="mskip bench"):
        capacity_for_speedup(Run(tmp_path), 1.2)
