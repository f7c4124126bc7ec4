"""From capacity to thresholds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_between_capacities_it_is_a_straight_line(tmp_path: Path) -> None:
    from mskip.exporters.serving.dial import read_dial

    value = {"capacities": [0.0, 0.5, 1.0], "taus": [[1.1, 1.1], [0.4, 0.6], [0.0, 0.0]]}
    (tmp_path / "dial.json").write_text(json.dumps(value), encoding="utf-8")
    dial = read_dial(tmp_path / "dial.json")
    assert dial.tau(0.0) == [1.1, 1.1]
    assert dial.tau(1.0) == [0.0, 0.0]
    assert dial.tau(0.5) == [0.4, 0.6]
    assert dial.tau(0.75) == pytest.approx([0.2, 0.3])
    assert dial.tau(0.25) == pytest.approx([0.75, 0.85])
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 1"):
            dial.tau(wrong)
