"""Reading the runtime's profile."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mskip.exporters.kernels import VARIANTS, profile_run, self_times

if TYPE_CHECKING:
    from conftest import Exported


def node(kind: str, start: int, duration: int) -> dict[str, Any]:
    name, about = f"{kind}_kernel_time", {"op_name": kind}
    return {"cat": "Node", "name": name, "ts": start, "dur": duration, "args": about}


def test_a_conditional_counts_without_its_branch(tmp_path: Path) -> None:
    events = [
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 100},
        {"cat": "Session", "name": "model_run", "ts": 200, "dur": 100},
        node("MatMul", 1, 10),
        # The runtime writes a node when it ends: a branch's before the conditional.
        node("Add", 25, 5),
        node("MatMul", 32, 15),
        node("If", 31, 20),
        node("If", 20, 40),
        node("MatMul", 62, 3),
        node("Add", 201, 7),
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    first, second = self_times(path)
    assert first[0] == Counter(MatMul=10 + 15 + 3, Add=5, If=(40 - 5 - 20) + (20 - 15))
    assert first[1] == Counter(MatMul=3, Add=1, If=2)
    assert second == (Counter(Add=7), Counter(Add=1))


def test_profile_of_an_export(exported: Exported) -> None:
    report = profile_run(exported.run, context=16)
    rows = {(row["phase"], row["kind"]): row for row in report["rows"]}
    layers, routed = exported.contract.layers, len(exported.contract.routed_layers)
    for phase in ("prefill", "decode"):
        softmax = rows[phase, "Softmax"]
        nodes = [softmax[f"{name}_nodes"] for name in VARIANTS]
        assert nodes == [layers, layers, layers - routed]
        assert all(softmax[f"{name}_ms"] > 0 for name in VARIANTS)
        # A decision and a sublayer each; where nothing executes, a second one says so. Two a call:
        # which tokens are scored, and what was decided.
        conditionals = [rows[phase, "If"][f"{name}_nodes"] for name in VARIANTS]
        assert conditionals == [0, 2 * routed + 2, 3 * routed + 2]
    assert exported.run.report("profile", "")["rows"] == report["rows"]


@pytest.mark.parametrize("context", [None, 24])
def test_context_is_the_recipes_first_if_left_out(exported: Exported, context: int | None) -> None:
    report = profile_run(exported.run, context=context)
    assert report["context"] == (context or exported.run.recipe().bench.contexts[0])
