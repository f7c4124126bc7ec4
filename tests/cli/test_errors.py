"""Every error a user can mend: one message with a remedy, exit 1, nothing written."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def refused(result, *words: str) -> str:
    """Assert exit 1 with an error on stderr that holds ``words``; wrapped lines are joined."""
    assert result.exit_code == 1
    assert result.stdout == ""
    text = " ".join(result.stderr.split())
    assert "error: " in text
    assert "Traceback" not in text
    for word in words:
        assert word in text
    return text


@pytest.mark.parametrize(
    "command",
    [
        *("calibrate", "export", "validate", "bench", "eval", "report", "inspect", "serve", "lint"),
        "export --triton",
    ],
)
def test_no_run_yet(mskip, command):
    refused(mskip(*command.split()), "there is no run in runs/ yet", "mskip tune")
    assert not list(Path().iterdir())


def test_no_run_there(mskip):
    refused(mskip("calibrate", "runs/x"), "no run at runs/x")
    refused(mskip("generate", "hello", "--run", "runs/x"), "no run at runs/x")
    refused(mskip("tune", "--resume"), "there is no run")


def test_folder_that_is_no_run(mskip, tmp_path):
    refused(mskip("report", tmp_path), "is not a run: it has no recipe.yaml")


def test_corrupt_recipe(mskip, bare_run):
    Path("bad.yaml").write_text("name: [x\n")
    refused(mskip("tune", "--recipe", "bad.yaml"), "YAML error in line")
    (bare_run / "recipe.yaml").write_text("name: [x\n")
    refused(mskip("calibrate"), "YAML error in line")


def test_no_such_recipe(mskip):
    refused(mskip("tune", "--recipe", "nowhere.yaml"), "cannot read recipe", "smollm2-135m")


def test_unknown_key(mskip):
    words = "unknown key 'tuning.epoch', did you mean 'tuning.epochs'?"
    refused(mskip("tune", "--set", "tuning.epoch=2"), words)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("capacity", ["1.5", "-0.1", "nan"])
def test_capacity_out_of_range(mskip, bare_run, capacity):
    refused(mskip("calibrate", f"--capacity={capacity}"), "out of range", "executed share, 0..1")


def test_tau_out_of_range(mskip, bare_run):
    refused(mskip("generate", "hello", "--tau", "2"), "tau 2 is out of range")


def test_unsupported_architecture(mskip, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "opt", "num_hidden_layers": 2}')
    words = "architecture 'opt' is not supported", "llama", "families.py"
    refused(mskip("tune", "--model", "odd", "--dry-run"), *words)


def test_no_such_model(mskip):
    refused(mskip("tune", "--model", "./nowhere"), "model folder nowhere does not exist")
    assert not Path("runs").exists()


def test_model_too_small_for_the_recipe(mskip, tiny_folder):
    result = mskip("tune", "--model", tiny_folder)
    refused(result, "routing.last = 16", "the model has only 4 layers")
    assert not Path("runs").exists()


def test_malformed_data(mskip):
    Path("chats.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    refused(mskip("tune", "--data", "chats.jsonl", "--dry-run"), "chats.jsonl", "2")


def test_wrong_base_model(mskip, bare_run):
    config = {
        "format": 2,
        "method": "routed",
        "granularity": "attention",
        "layers": [0, 1, 2],
        "hidden_size": 32,
        "compensation_rank": 0,
        "base_model": {"name": "another", "sha256": "0" * 64},
        "sha256": {"router": "0" * 64},
    }
    (bare_run / "router_config.json").write_text(json.dumps(config))
    refused(mskip("eval"), "tuned on another with hash 000000000000")


def test_corrupt_calibration(mskip, bare_run):
    (bare_run / "calibration.json").write_text("{")
    for command in ("export", "eval", "inspect", "validate"):
        refused(mskip(command), "calibration.json is not valid JSON", "mskip calibrate")


def test_not_calibrated(mskip, bare_run):
    (bare_run / "calibration.json").unlink()
    refused(mskip("export"), "no calibration", "mskip calibrate --capacity 0.5")


def test_not_exported(mskip, bare_run):
    refused(mskip("bench"), "mskip export")
    refused(mskip("generate", "hello", "--engine", "onnx"), "mskip export")


def test_missing_extra(mskip, bare_run, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **others):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    for options in ([], ["--profile"]):
        result = mskip("bench", *options)
        refused(result, "onnxruntime is not installed", "pip install 'mskip[cpu]'")


# The tiny model has few layers and is narrower than the demo's rank.
NARROW = ["--set", "routing.last=2", "--set", "compensation.rank=0"]


def test_output_that_cannot_be_written(mskip, tiny_folder):
    Path("file").write_text("")
    tiny = ["tune", "--model", tiny_folder, *NARROW]
    refused(mskip(*tiny, "--output", "file/x"), "cannot write", "--output")
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_output(mskip, tiny_folder):
    Path("locked").mkdir(mode=0o555)
    tiny = ["tune", "--model", tiny_folder, *NARROW]
    refused(mskip(*tiny, "--output", "locked/x"), "cannot write", "--output")


def test_resume_with_another_recipe(mskip, bare_run, tiny_folder):
    (bare_run / "router.safetensors").write_text("")
    (bare_run / "reports").mkdir()
    (bare_run / "reports/tune.json").write_text("{}")
    refused(mskip("tune", "--resume", "--set", "tuning.seed=9"), "the recipe differs")
    result = mskip("run", bare_run / "recipe.yaml", "--output", bare_run, "--resume",
                   "--set", "tuning.seed=9")  # fmt: skip
    refused(result, "the recipe differs")


def test_errors_as_json(mskip):
    result = mskip("calibrate", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert set(answer) == {"error", "remedy"}
    assert "there is no run" in answer["error"]
    assert result.stderr == ""


def test_ctrl_c(mskip, bare_run, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mskip.compressor.calibrate_step.calibrate_run", stopped)
    refused(mskip("calibrate"), "stopped")


def test_a_bug_keeps_its_traceback(mskip, bare_run, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("mskip.compressor.calibrate_step.calibrate_run", broken)
    with pytest.raises(ZeroDivisionError):
        mskip("calibrate")


def test_broken_pipe_is_quiet():
    program = f'"{sys.executable}" -c "from mskip.cli.main import main; main()" recipe schema'
    done = subprocess.run(
        ["bash", "-c", f"{program} | head -1"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""
