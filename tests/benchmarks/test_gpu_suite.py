"""The GPU script, on tiny shapes in triton's interpreter."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gpu_suite
import pytest

pytest.importorskip("triton")


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs, the kernels are right, and nothing is claimed that needs a GPU."""
    output = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "--smoke", "--output", str(output)])
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):  # it sets them itself
        monkeypatch.setenv(name, os.environ.get(name, ""))
    gpu_suite.main()
    report = json.loads(output.read_text())
    assert [row["kernel"] for row in report["parity"]] == ["linear", "attention"] * 2
    assert max(row["error"] for row in report["parity"]) < 1e-5
    (row,) = report["rows"]
    assert set(row["ms"]) == set(gpu_suite.VARIANTS)
    assert report["copy_gb_s"] is row["waits"] is report["capability"] is None
    assert {tile["kernel"] for tile in report["tiles"]} == {"linear", "attention"}
    assert [each["builder"] for each in report["builders"]] == ["tensorrt", "tensorrt-rtx"]
    assert all("not run" in each["answer"] for each in report["builders"])
    assert "no CUDA device" in report["engines"]["not_run"]


def test_fastest_tiles_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mskip.exporters.tiles import Tile, chosen

    monkeypatch.setenv("MSKIP_HOME", str(tmp_path))
    slow, fast = Tile(16, 64, 64), Tile(16, 32, 128, 8)
    rows = [
        {"kernel": "linear", "tile": fast.to_json(), "ms": 1.0},
        {"kernel": "linear", "tile": slow.to_json(), "ms": 2.0},
        {"kernel": "attention", "tile": slow.to_json(), "not_run": "too large"},
    ]
    report = {
        "capability": "9.0", "dtype": "torch.bfloat16", "tiles": rows, "shapes": {"head": 128}
    }  # fmt: skip
    assert gpu_suite.save_tiles(report) == tmp_path / "tiles.json"
    assert chosen("linear", "9.0", "bfloat16", prompt=False) == fast
    usual = chosen("attention", "9.0", "float16", prompt=False, head=128)
    assert chosen("attention", "9.0", "bfloat16", prompt=False, head=128) == usual


def test_steps_of_all_variants_agree() -> None:
    """Executing is the reference's arithmetic, skipping is removing, half is half of each."""
    import torch

    layers = gpu_suite.Layers(gpu_suite.SMOKE, torch.float32)
    results = {}
    for variant in gpu_suite.VARIANTS:
        case = gpu_suite.Case(layers, 2, 16, torch.float32)
        case.decide(variant)
        results[variant] = case.step(variant)
    torch.testing.assert_close(results["execute"], results["reference"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(results["skip"], results["removed"])
    torch.testing.assert_close(results["half"][0], results["execute"][0])
    torch.testing.assert_close(results["half"][1], results["skip"][1])
    assert not torch.allclose(results["execute"], results["skip"], atol=1e-6)


def test_time_that_is_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    report = gpu_suite.suite(gpu_suite.SMOKE, -1.0)
    assert report["rows"] == []
    assert report["not_run"] == ["batch 2, context 16: no time left of -1 s"]
    assert report["engines"] == {"not_run": "no time left of -1 s"}


def test_without_a_gpu_it_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="not run: no CUDA device"):
        gpu_suite.main()
    assert not list(tmp_path.iterdir())
