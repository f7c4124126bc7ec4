"""Taking turns, and what is said of the times: on times that are known."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import turns

SLOW, FAST = [10.0, 20.0, 12.0, 40.0, 11.0], [5.0, 10.0, 6.0, 20.0, 5.5]


def test_everybody_steps_before_anybody_does_so_again() -> None:
    calls: list[str] = []

    def contender(name: str) -> Callable[[], Callable[[], object]]:
        def prefill() -> Callable[[], object]:
            calls.append(f"{name} reads")
            return lambda: calls.append(name)

        return prefill

    names = ["a", "b", "c"]
    times = turns.no_times(names)
    turns.take_turns({each: contender(each) for each in names}, times, rounds=2, steps=3)
    groups = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    reading = sorted(f"{name} reads" for name in names)
    assert [sorted(group) for group in groups] == [
        *([reading, names]),
        *([reading, *[names] * 4] * 2),
    ]
    assert len({tuple(group) for group in groups}) > 2  # not always in one order
    assert {name: len(found) for name, found in times["prefill"].items()} == dict.fromkeys(names, 2)
    assert {name: len(found) for name, found in times["decode"].items()} == dict.fromkeys(names, 6)


def test_times_are_of_the_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def contender(reading: float, stepping: float) -> Callable[[], Callable[[], object]]:
        def spend(seconds: float) -> None:
            now[0] += seconds

        def prefill() -> Callable[[], object]:
            spend(reading)
            return lambda: spend(stepping)

        return prefill

    times = turns.no_times(["slow", "fast"])
    both = {"slow": contender(2.0, 0.5), "fast": contender(1.0, 0.25)}
    turns.take_turns(both, times, rounds=2, steps=2)
    assert times["prefill"] == {"slow": [2000.0] * 2, "fast": [1000.0] * 2}
    assert times["decode"] == {"slow": [500.0] * 4, "fast": [250.0] * 4}


def test_a_ratio_is_taken_within_a_turn() -> None:
    """The machine's speed changes fourfold, the ratio not at all."""
    assert turns.ratio(FAST, SLOW) == {"value": 0.5, "low": 0.5, "high": 0.5, "turns": 5}


def test_the_interval_is_as_wide_as_the_turns_differ() -> None:
    found = turns.ratio([1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0], [1.0] * 7)
    assert found["value"] == 1.0
    assert 0.8 <= found["low"] < 1.0 < found["high"] <= 1.2
    assert turns.shown(found).startswith("1.000 (0.")


@pytest.mark.parametrize(("share", "expected"), [(1.0, 0.5), (0.5, 1.0)])
def test_what_is_saved_of_what_removing_saves(share: float, expected: float) -> None:
    full, skipped, removed = [10.0] * 5, [8.0] * 5, [6.0] * 5
    assert turns.saved_share(full, skipped, removed, share)["value"] == expected
