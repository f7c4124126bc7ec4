"""The commands in this process, in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

Mskip = Callable[..., Result]


@pytest.fixture
def mskip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mskip:
    """``mskip("tune", "--json")``: run a command as the console script does, in ``tmp_path``."""
    from mskip.cli.main import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("RANK", "LOCAL_RANK", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    # What `console.prepare` sets is taken back when the test ends.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "error" if name.startswith("TRANS") else "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def invoke(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(app, [str(each) for each in arguments], prog_name="mskip")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def calibration() -> dict[str, Any]:
    """A calibration of three layers, one of which never executes."""
    layers = [
        {"layer": 1, "tau": 0.4, "capacity": 0.5, "constant": None, "scores": [0.1, 0.2, 0.7, 0.9]},
        {"layer": 2, "tau": 0.4, "capacity": 1.0, "constant": "execute", "scores": [1.0] * 4},
        {"layer": 3, "tau": 0.4, "capacity": 0.0, "constant": "skip", "scores": [0.0] * 4},
    ]
    return {
        "target": 0.5,
        "goal": {"kind": "capacity", "value": 0.5},
        "per_layer": False,
        "tau": [0.4, 0.4, 0.4],
        "capacity": {
            "calibration": 0.5,
            "held_out": 0.5,
            "held_out_interval": [0.4, 0.6],
        },
        "prompts": {"calibration": 4, "held_out": 4},
        "layers": layers,
        "margins": {"min": 0.1, "p05": 0.1, "median": 0.3},
        "warnings": ["layers 3 skip every prompt: removing them is simpler."],
        "evaluations": 3,
    }


@pytest.fixture
def bare_run(mskip: Mskip, tiny_folder: Path, calibration: dict[str, Any]) -> Path:
    """A run folder with recipe and calibration, without routers; it is the last run."""
    from mskip.compressor.artifact import Run
    from mskip.compressor.recipe import load_recipe

    run = Run(Path("runs/bare"))
    run.write_recipe(load_recipe("smollm2-135m", [f"model.name={tiny_folder}", "routing.last=3"]))
    run.write_calibration(calibration)
    run.remember()
    return run.path


@pytest.fixture
def validation() -> dict[str, Any]:
    """A validation report with one failed gate."""
    gate = {"limit": 1.0, "comparison": ">="}
    return {
        "status": "failed",
        "engine": "onnxruntime",
        "gates": [
            {"name": "decision agreement", "value": 0.75, "passed": False, **gate},
            {"name": "greedy token match", "value": 1.0, "passed": True, **gate},
        ],
        "decisions": {
            "calls": 8,
            "agreement": 0.75,
            "min_margin": 1e-6,
            "flips": [{"prompt": 1, "layer": 2, "torch": 0.4, "engine": 0.5, "margin": 1e-6}],
        },
        "logits": {"max_abs": 1e-5, "max_rel": 1e-6},
        "tokens": {"prompts": 4, "steps": 8, "match": 1.0},
        "laziness": {},
        "batch_invariance": {},
    }
