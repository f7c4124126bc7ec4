"""A table of the paper in small: a run a row, resumed, with the goals of calibrate after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .test_whole_job import OVERRIDES

GRID = """
name: small
title: Granularity
recipe: smollm2-135m
rows:
  - {name: mlp, set: [routing.granularity=mlp, compensation.rank=2, compensation.refine=false]}
  - {name: static, set: [method=static, compensation.rank=0], skip_of_all: 0.25}
tasks: [piqa]
"""


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    rows = [
        {"query": f"one {n}", "choices": ["the answer", "is two"], "gold": n % 2} for n in range(6)
    ]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_reproduce(mskip, tiny_folder, tmp_path, documents):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("lm_eval")
    (tmp_path / "grid.yaml").write_text(GRID)
    command = [
        "reproduce", "grid.yaml", "--model", tiny_folder, *OVERRIDES,
        "--set", "routing.exclude_last=0",
        "--task-dir", documents, "--limit", "4", "--output", "runs/grid",
    ]  # fmt: skip
    result = mskip(*command)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    table = json.loads(Path("runs/grid/table.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["dense", "mlp", "static"]
    dense, mlp, static = table["rows"]
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    # One of four layers is one of the two that are routed.
    assert static["capacity"] == 0.5
    for row in table["rows"]:
        assert 0 <= row["scores"]["piqa"]["value"] <= 1
        assert row["scores"]["piqa"]["documents"] == 4
    assert mlp["prefill_speedup"] > 0
    text = Path("runs/grid/table.md").read_text()
    assert text.startswith(
        "| Granularity | capacity | prefill | KL | piqa | average | against dense |\n| --- |"
    )
    # One task, so the average difference is the difference of its two scores.
    assert dense["against_dense"] is None
    for row in (mlp, static):
        lost = row["scores"]["piqa"]["value"] - dense["scores"]["piqa"]["value"]
        assert row["against_dense"]["value"] == pytest.approx(lost)
        assert f" {100 * lost:+.1f} ± {100 * row['against_dense']['stderr']:.1f} |" in text

    # Finished rows are kept; one that lost its tuning is made again.
    before = (Path("runs/grid/mlp/reports/tune.json")).stat().st_mtime_ns
    Path("runs/grid/static/router.safetensors").unlink()
    again = json.loads(mskip(*command, "--json").stdout)
    assert again["rows"][1] == mlp
    assert again["rows"][2]["kl"] == pytest.approx(static["kl"])
    assert Path("runs/grid/mlp/reports/tune.json").stat().st_mtime_ns == before

    # A timed run can be calibrated to a speedup: here one of two sublayers, by round figures.
    path = Path("runs/grid/static/reports/costs.json")
    costs = json.loads(path.read_text())
    assert costs["phase"] == "prefill"
    path.write_text(json.dumps({**costs, "dense_ms": 100, "execute_ms": 100, "skip_ms": 60}))
    result = mskip("calibrate", "runs/grid/static", "--speedup", "1.25", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["capacity"]["held_out"] == 0.5
    assert (
        "1.25 times as fast" in mskip("calibrate", "runs/grid/static", "--speedup", "1.25").stdout
    )
    assert "1.67 times as fast" in mskip("calibrate", "runs/grid/static", "--speedup", "2").stderr

    # And a run is swept.
    result = mskip("sweep", "runs/grid/mlp", "--capacity", "0.5,1")
    assert result.exit_code == 0, result.stderr
    assert "routed + rank 2" in result.stdout
    assert Path("runs/grid/mlp/reports/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_that_is_not_there(mskip):
    result = mskip("reproduce", "table9")
    assert result.exit_code == 1
    assert "fig2, methods, table-data, table1" in result.stderr


@pytest.mark.parametrize("option", [["--capacity", "2"], ["--capacity", "a"]])
def test_sweep_usage(mskip, bare_run, option):
    assert mskip("sweep", *option).exit_code == 2
