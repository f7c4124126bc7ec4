"""From the capacity that a request asks for to thresholds."""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Dial:
    """Thresholds at some capacities, as they were calibrated; between them in a straight line.

    Attributes:
        capacities: executed shares, rising, from 0 to 1.
        taus: thresholds of the routed sublayers at each.
    """

    capacities: list[float]
    taus: list[list[float]]

    def tau(self, capacity: float) -> list[float]:
        """Thresholds for an executed share.

        Raises:
            ValueError: it is not within 0..1.
        """
        if not 0 <= capacity <= 1:
            raise ValueError(f"capacity {capacity:g} is out of range. It must be 0 to 1.")
        above = max(1, bisect.bisect_left(self.capacities, capacity))
        low, high = self.capacities[above - 1], self.capacities[above]
        part = (capacity - low) / (high - low)
        return [
            start + part * (end - start)
            for start, end in zip(self.taus[above - 1], self.taus[above], strict=True)
        ]


def read_dial(path: Path) -> Dial:
    """The dial that a ``dial.json`` holds."""
    value = json.loads(path.read_text(encoding="utf-8"))
    return Dial(value["capacities"], value["taus"])
