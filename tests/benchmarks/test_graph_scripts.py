"""Scripts that time an exported graph, on a tiny run: what they count, not how long it takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dial
import kv_memory
import pytest
import scaling

if TYPE_CHECKING:
    from mskip.compressor.artifact import Run
    from mskip.compressor.router import Routers


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tiny_routers: Callable[..., Routers], tmp_path_factory: Any) -> Run:
    from tiny_runs import tiny_run

    from mskip.compressor.models import load_base
    from mskip.exporters.onnx_export import export_run
    from mskip.exporters.targets import Form

    made = tiny_run(tmp_path_factory.mktemp("timed"), tiny_folder, tiny_routers)
    export_run(made, load_base(made.recipe().model), form=Form("ort"))
    return made


@pytest.fixture
def ended(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """The report of a script's main with some options."""

    def end(script: Any, *options: object) -> dict[str, Any]:
        output = tmp_path / "report.json"
        words = [script.__file__, str(run.path), "--output", str(output), *map(str, options)]
        monkeypatch.setattr("sys.argv", words)
        script.main()
        report: dict[str, Any] = json.loads(output.read_text("utf-8"))
        return report

    return end


@pytest.mark.parametrize("batches", [[], [2], [1, 2]], ids=str)
def test_scaling(ended: Callable[..., dict[str, Any]], tmp_path: Path, batches: list[int]) -> None:
    """A row a variant and phase of every case; keys and values as they are held; a picture."""
    contexts = [16] if batches != [2] else []
    asked = ["--contexts", *contexts, "--batches", *batches, "--batch-context", 8, "--rounds", 1]
    asked += ["--starts", 2, "--steps", 2]
    report = ended(scaling, *asked)
    cases = {(1, 16) for _ in contexts} | {(batch, 8) for batch in batches}
    found = {(row["batch"], row["context"]) for row in report["rows"]}
    assert found == cases
    assert len(report["rows"]) == len(cases) * len(scaling.VARIANTS) * 2
    assert all(
        len(row["all_ms"]) == (2 if row["phase"] == "prefill" else 4) for row in report["rows"]
    )
    assert len(report["ratios"]) == len(cases) * 2
    for batch, context in cases:
        held = {
            row["variant"]: row["kv_bytes"]
            for row in report["rows"]
            if (row["batch"], row["context"], row["phase"]) == (batch, context, "decode")
        }
        # Three of four layers are routed; "half" keeps two of three for one sequence.
        assert held["execute"] == held["dense"]
        assert held["skip"] == held["ceiling"] == held["dense"] / 4
        share = 3 / 4 if batch == 1 else (1 + 3 / 2) / 4
        assert held["half"] == held["dense"] * share
    limits = [row for row in report["rows"] if "limit_ms" in row]
    assert {row["variant"] for row in limits} == {"dense", "ceiling"}
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_dial(ended: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """tau rises, the executed share falls from all to none."""
    report = ended(dial, "--context", 16, "--taus", 5, "--rounds", 1)
    shares = [row["capacity"] for row in sorted(report["rows"], key=lambda row: row["tau"])]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    everything = report["rows"][0]
    assert everything["prefill_to_all"]["value"] == everything["decode_to_all"]["value"] == 1.0
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the memory")
def test_kv_memory(ended: Callable[..., dict[str, Any]]) -> None:
    report = ended(kv_memory, "--context", 32, "--prompts", 2, "--steps", 64)
    dense, half = report["rows"]
    # Every second of three routed layers, and the one that is not routed.
    assert half["kv_bytes"] == dense["kv_bytes"] / 2
    assert dense["kv_growth_bytes"] > half["kv_growth_bytes"] > 0
    assert len(dense["step_ms"]) == 1
