"""Benchmark rows: what they hold and how they are computed; never how fast this machine is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mskip.compressor.artifact import Run
from mskip.compressor.errors import ArtifactError
from mskip.exporters.speed import bench_run, measure, row_of

if TYPE_CHECKING:
    from conftest import Exported

ROW = {
    "engine", "phase", "batch", "context", "capacity", "dense_ms", "routed_ms", "execute_ms",
    "skip_ms", "static_ms", "speedup", "efficiency", "overhead", "repeats", "spread",
}  # fmt: skip
EXTRAS = {"ceiling_ms", "speedup_skip"}


@pytest.fixture(scope="module")
def bench(exported: Exported) -> dict[str, Any]:
    """A quick benchmark of the tiny run."""
    return bench_run(exported.run, quick=True, contexts=[16, 32], repeats=1)


def series(**times: list[float]) -> dict[str, dict[str, list[float]]]:
    """Times of one phase; the other phase has other values, to be left alone."""
    return {name: {"prefill": ms, "decode": [99.0] * len(ms)} for name, ms in times.items()}


def test_a_row_is_computed_from_the_times() -> None:
    times = series(
        dense=[10.0, 20.0, 12.0],
        routed=[8.0, 10.0, 8.0],
        execute=[11.0, 24.0, 13.0],
        skip=[6.0, 6.5, 7.0],
        static=[8.5, 8.4, 8.6],
        ceiling=[4.0, 3.5, 4.5],
    )
    row = row_of(times, "prefill", 2, 64, 0.5)
    assert row.keys() == ROW | EXTRAS
    assert (row["phase"], row["batch"], row["context"], row["capacity"]) == ("prefill", 2, 64, 0.5)
    medians = {name: row[f"{name}_ms"] for name in times}
    assert medians == {
        "dense": 12.0, "routed": 8.0, "execute": 13.0, "skip": 6.5, "static": 8.5, "ceiling": 4.0,
    }  # fmt: skip
    assert row["speedup"] == 1.5  # of 1.25, 2, 1.5
    assert row["overhead"] == 1.1  # of 1.1, 1.2, 1.08
    assert row["speedup_skip"] == 13.0 / 6.5
    assert row["efficiency"] == pytest.approx((12 - 6.5) / (12 - 4))
    assert row["repeats"] == 3
    assert row["spread"] == pytest.approx((2 - 1.25) / 2 / 1.5)


def test_without_a_ceiling_there_is_no_efficiency() -> None:
    same = {name: [10.0] for name in ("dense", "routed", "execute", "skip", "static")}
    assert row_of(series(**same, ceiling=[9.9]), "prefill", 1, 8, 1.0)["efficiency"] is None
    assert row_of(series(**same, ceiling=[11.0]), "prefill", 1, 8, 1.0)["efficiency"] is None
    assert row_of(series(**same, ceiling=[9.0]), "prefill", 1, 8, 1.0)["efficiency"] == 0.0


def test_the_report(bench: dict[str, Any], exported: Exported) -> None:
    assert exported.run.report("bench", "") == bench
    assert bench["removed"] == {"static": [3], "ceiling": [1, 2, 3]}
    assert bench["machine"]["threads"] == 1
    assert bench["machine"]["onnxruntime"].endswith("CPUExecutionProvider")
    cases = [(row["phase"], row["batch"], row["context"]) for row in bench["rows"]]
    assert cases == [("prefill", 1, 16), ("prefill", 1, 32), ("decode", 1, 16), ("decode", 1, 32)]


def test_rows_are_complete_and_consistent(bench: dict[str, Any]) -> None:
    for row in bench["rows"]:
        assert row.keys() == ROW | EXTRAS
        assert row["repeats"] == 1
        assert row["spread"] == 0.0
        assert 0.0 <= row["capacity"] <= 1.0
        times = [value for key, value in row.items() if key.endswith("_ms")]
        assert len(times) == 6
        assert min(times) > 0
        # One repeat: each ratio is that of its times, which are rounded to a microsecond.
        dense = row["dense_ms"]
        assert row["speedup"] == pytest.approx(dense / row["routed_ms"], rel=0.02)
        assert row["overhead"] == pytest.approx(row["execute_ms"] / dense, rel=0.02)
        assert row["speedup_skip"] == pytest.approx(row["execute_ms"] / row["skip_ms"], rel=0.02)


def test_both_phases_of_a_case_have_its_capacity(bench: dict[str, Any], exported: Exported) -> None:
    from mskip.exporters.laziness import filled
    from mskip.exporters.ort_runner import OrtRunner
    from mskip.exporters.speed import sample_text

    engine = OrtRunner(exported.folder, threads=1)
    for row in bench["rows"]:
        ids = filled(sample_text(exported.run), row["context"], row["batch"])
        assert row["capacity"] == pytest.approx(engine.prefill(ids).routing.mean())


class _Engine:
    """Counts calls; time stands still."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.contract = type("Contract", (), {"routed_layers": [1, 2]})

    def prefill(self, ids: Any, routing: Any = None, last_only: bool = False) -> Any:
        from mskip.exporters.runner import State

        self.log.append(f"{self.name} prefill {None if routing is None else routing.tolist()}")
        nothing = np.zeros((len(ids), 4, 5), dtype=np.float32)
        return State(nothing, np.ones((len(ids), 2), dtype=np.int64), nothing[:, 0], ids, None)

    def extend(self, state: Any, tokens: Any) -> Any:
        assert tokens.shape == (1, 1)
        self.log.append(f"{self.name} step")
        return state


def test_variants_take_turns() -> None:
    """Interleaved rounds, one of them to warm up, and decisions forced as the variant says."""
    from mskip.exporters.speed import Variant

    log: list[str] = []
    engines: list[Any] = [_Engine(name, log) for name in "ab"]
    variants = {"a": Variant(engines[0]), "b": Variant(engines[1], 0)}
    times = measure(variants, np.zeros((1, 4), dtype=np.int64), repeats=2, steps=2)
    a = ["a prefill None", "a step", "a step"]
    b = ["b prefill [[0, 0]]", "b step", "b step"]
    assert log == [*b, *a, *a, *b, *b, *a]  # another one first in each round
    assert {len(phase) for variant in times.values() for phase in variant.values()} == {2}


@pytest.mark.parametrize(
    ("missing", "remedy"), [("onnx/static.onnx", "mskip export"), ("samples.jsonl", "mskip tune")]
)
def test_what_is_missing_is_named(
    missing: str, remedy: str, exported: Exported, tmp_path: Path
) -> None:
    shutil.copytree(exported.run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    (run.path / missing).unlink()
    (run.reports / "bench.json").unlink(missing_ok=True)
    with pytest.raises(ArtifactError) as caught:
        bench_run(run, contexts=[16], repeats=1)
    assert Path(missing).name in caught.value.message
    assert remedy in caught.value.remedy
    assert not (run.reports / "bench.json").exists()
