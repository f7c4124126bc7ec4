"""Contenders that take turns, and what their times say of each other.

The machines that this is run on are shared: their speed changes by a third from minute to minute.
So everybody prefills, and everybody steps, before anybody does so again, in an order that is drawn
anew each time. A ratio is taken within such a turn; of all turns the median is given, with the
interval of its bootstrap.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

PHASES = ("prefill", "decode")

Step = Callable[[], object]
Prefill = Callable[[], Step]
"""Reads the prompt; what it gives goes on by one token, always from the full prompt."""

Times = dict[str, dict[str, list[float]]]
"""ms by phase and contender, of everybody as many."""


def no_times(names: Iterable[str]) -> Times:
    """Nothing measured yet."""
    names = list(names)
    return {phase: {name: [] for name in names} for phase in PHASES}


def take_turns(
    contenders: dict[str, Prefill],
    times: Times,
    *,
    rounds: int,
    steps: int,
    seed: int = 0,
) -> None:
    """Add ``rounds`` prefills and after each ``steps`` steps of every contender to ``times``.

    One round before them and the first step of each are not counted: they make and bind buffers.
    """
    order = random.Random(seed)
    names = list(contenders)
    for number in range(rounds + 1):
        going: dict[str, Step] = {}
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            going[name] = contenders[name]()
            if number:
                times["prefill"][name].append((time.perf_counter() - start) * 1e3)
        for step in range(steps + 1 if number else 1):
            order.shuffle(names)
            for name in names:
                start = time.perf_counter()
                going[name]()
                if step:
                    times["decode"][name].append((time.perf_counter() - start) * 1e3)


def interval(
    values: NDArray[np.float64], statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> dict[str, Any]:
    """A statistic of all turns, and the 95 % interval of its bootstrap over turns.

    Args:
        values: [contenders, turns], ms.
        statistic: of [contenders, ..., turns] over the last axis.

    Returns:
        ``value``, ``low`` and ``high``, and ``turns``.
    """
    turns = values.shape[-1]
    drawn = np.random.default_rng(0).integers(0, turns, (1000, turns))
    low, high = np.quantile(statistic(values[:, drawn]), [0.025, 0.975])
    value = float(statistic(values))
    return {
        "value": round(value, 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "turns": turns,
    }


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Median of ``over`` / ``under`` within a turn, see `interval`."""
    return interval(np.array([over, under]), lambda ms: np.median(ms[0] / ms[1], axis=-1))


def saved_share(
    full: list[float], skipped: list[float], removed: list[float], share: float = 1.0
) -> dict[str, Any]:
    """What ``skipped`` saves of ``full``, over ``share`` of what ``removed`` saves of it.

    Both savings are medians of the differences within a turn, see `interval`.
    """
    return interval(
        np.array([full, skipped, removed]),
        lambda ms: np.median(ms[0] - ms[1], axis=-1) / (share * np.median(ms[0] - ms[2], axis=-1)),
    )


def shown(found: dict[str, Any]) -> str:
    """As "0.993 (0.990 to 0.997)"."""
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
