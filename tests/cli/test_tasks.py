"""The table of the paper's tasks, and what is said before a model is loaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mskip.cli.tasks import score, scored
from mskip.compressor.errors import DataError, MskipError

METHODS = {"dense": 1.0, "static": 0.5, "routed": 0.4375}
TASKS = {"arc_challenge": ("acc_norm", 25), "gsm8k": ("exact_match", 5), "rte": ("acc", 0)}


def row(method: str, by: str, value: float) -> dict[str, Any]:
    """A row of the report, the same value for every task."""
    figure = {"value": value, "stderr": 0.019}
    tasks = {
        name: {"metric": metric, **figure, "shots": shots, "documents": 1319, "right": "1"}
        for name, (metric, shots) in TASKS.items()
    }
    made = {
        "method": method, "by": by, "engine": by, "capacity": METHODS[method],
        "average": {"value": value, "stderr": 0.011}, "tasks": tasks, "seconds": 3723.4,
    }  # fmt: skip
    return (
        made if method == "dense" else {**made, "against_dense": {"value": -0.02, "stderr": 0.004}}
    )


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What `scored` prints in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("RANK", raising=False)

    def show(report: dict[str, Any]) -> list[str]:
        scored(report)
        return capsys.readouterr().out.splitlines()

    return show


def test_a_table_an_engine(printed: Any) -> None:
    rows = [row(method, by, 0.2684) for by in ("onnx", "torch") for method in METHODS]
    lines = printed({"limit": 40, "rows": rows})
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    text = "\n".join(lines)
    assert text.index("Tasks, onnx") < text.index("Tasks, torch")
    (first, _) = (line for line in lines if line.startswith("arc_challenge"))
    assert first.split() == [
        *("arc_challenge", "25", "acc_norm", "1319"), *("26.8", "±1.9") * 3,
    ]  # fmt: skip
    (difference, _) = (line for line in lines if line.startswith("against dense"))
    assert difference.split() == ["against", "dense", "-", *("-2.0", "±0.4") * 2]
    ends = {line.split("  ")[0]: line.split()[-3:] for line in lines if line.strip()}
    assert ends["capacity"] == ["1.000", "0.500", "0.438"]
    assert ends["skip rate"] == ["0.000", "0.500", "0.562"]
    assert ends["time"][-2:] == ["1.0", "h"]
    assert "at most 40 documents" in text


def test_one_method_of_one_document(printed: Any) -> None:
    only = row("routed", "torch", 1.0)
    only["tasks"]["rte"]["stderr"] = only["average"]["stderr"] = None
    del only["against_dense"]
    lines = printed({"limit": None, "rows": [only]})
    assert next(line for line in lines if line.startswith("rte")).split()[-1] == "100.0"
    assert not any("dense" in line.split() for line in lines[:4])
    assert "at most" not in "\n".join(lines)


def test_faults_are_found_before_the_model_is_loaded(
    bare_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    from mskip.compressor.artifact import Run

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mskip.compressor.models.load_base", refuse)
    run = Run(bare_run)
    with pytest.raises(DataError, match="no task 'rta'"):
        score(run, "rta")
    with pytest.raises(DataError, match=r"rte\.jsonl, which task rte needs"):
        score(run, "rte", methods=["dense"], task_dir=tmp_path)
    with pytest.raises(MskipError, match="no engine 'jax'"):
        score(run, "rte", engine="jax")
    with pytest.raises(MskipError, match="no export report"):
        score(run, "rte", engine="onnx", methods=["dense"])


def test_a_run_is_scored(bare_run: Path, tmp_path: Path, printed: Any, tiny_routers: Any) -> None:
    pytest.importorskip("lm_eval")
    from mskip.compressor.artifact import Run, save_routers
    from mskip.compressor.models import load_base

    run, rng = Run(bare_run), random.Random(0)
    recipe = run.recipe()
    base = load_base(recipe.model)
    save_routers(run, tiny_routers(base.model, layers=(1, 2, 3)), base, recipe)
    run.write_report("tune", {"removal_orders": {"cosine": [3, 1, 2]}})
    lines = [
        json.dumps({"premise": "the answer", "hypothesis": word, "label": rng.randrange(2)})
        for word in ("one", "two", "is", "three")
    ]
    (tmp_path / "rte.jsonl").write_text("\n".join(lines))
    report = score(run, "rte", task_dir=tmp_path, limit=3)
    shown = printed(report)
    assert max(map(len, shown)) <= 80
    assert "Tasks, PyTorch" in "\n".join(shown)
    (line,) = (each for each in shown if each.startswith("rte"))
    figures = [float(part) for part in line.split()[4::2]]
    expected = [100 * each["tasks"]["rte"]["value"] for each in report["rows"]]
    assert figures == pytest.approx(expected, abs=0.05)
    assert len(figures) == 3
