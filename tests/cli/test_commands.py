"""What the commands print and return, with the steps themselves replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mskip.cli import console


def test_a_failed_gate_exits_3(mskip, bare_run, validation, monkeypatch):
    monkeypatch.setattr("mskip.exporters.parity.validate_run", lambda *_, **__: validation)
    result = mskip("validate")
    assert result.exit_code == 3
    assert "decision agreement" in result.stdout
    assert "FAILED" in result.stdout
    assert "flip: prompt 1, layer 2" in result.stdout
    result = mskip("validate", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == validation


def test_capacity_and_skip_rate_stand_together(mskip, bare_run, calibration, monkeypatch):
    asked = []

    def calibrate_run(run, base, goal, *, per_layer, other, progress):
        assert other is None
        asked.append((str(goal), per_layer))
        return calibration

    monkeypatch.setattr("mskip.compressor.calibrate_step.calibrate_run", calibrate_run)
    result = mskip("calibrate")
    assert result.exit_code == 0
    assert "(skip rate)" in result.stdout
    assert "0.500 (0.500)" in result.stdout
    assert "warning: layers 3" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    mskip("calibrate", "--capacity", "0.25", "--per-layer")
    mskip("calibrate", "--max-kl", "0.2")
    assert asked == [("--capacity 0.5", False), ("--capacity 0.25", True), ("--max-kl 0.2", False)]
    result = mskip("calibrate", "--max-kl", "0.2", "--speedup", "1.2")
    assert result.exit_code == 2
    assert "one goal" in result.stderr
    assert json.loads(mskip("calibrate", "--json").stdout) == calibration


def test_only_the_main_process_speaks(mskip, bare_run, calibration, monkeypatch):
    monkeypatch.setattr(
        "mskip.compressor.calibrate_step.calibrate_run", lambda *_, **__: calibration
    )
    monkeypatch.setenv("RANK", "1")
    result = mskip("calibrate")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_inspect(mskip, bare_run):
    result = mskip("inspect")
    assert result.exit_code == 0
    assert "│" in result.stdout
    assert "reports/scores.png" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    answer = json.loads(mskip("inspect", "--json").stdout)
    assert all(Path(path).is_file() for path in answer["plots"])


def test_dry_run_writes_nothing(mskip, tiny_folder):
    arguments = ["tune", "--dry-run", "--model", tiny_folder, "--set", "routing.last=2"]
    result = mskip(*arguments)
    assert result.exit_code == 0
    assert "# routed layers: the least harmful 2" in result.stdout
    last = mskip(*arguments, "--set", "routing.choose=last")
    assert "# routed layers 1, 2 (2)" in last.stdout
    assert "# data embedded:prompts: " in result.stdout
    Path("again.yaml").write_text(result.stdout)  # what it prints is a recipe
    Path("again.yaml").rename("again.yaml")
    assert (
        json.loads(mskip("recipe", "show", "again.yaml", "--json").stdout)
        == (json.loads(mskip(*arguments, "--json").stdout)["recipe"])
    )
    assert [path.name for path in Path().iterdir()] == ["again.yaml"]


def test_dry_run_of_a_model_elsewhere(mskip):
    result = mskip("tune", "--dry-run", "--recipe", "llama-3-8b", "--data", "some/dataset")
    assert result.exit_code == 0
    assert "it is not on this machine" in result.stdout
    assert not list(Path().iterdir())


def test_recipes(mskip):
    assert "llama-3-8b" in mskip("recipe", "list").stdout
    names = [row["name"] for row in json.loads(mskip("recipe", "list", "--json").stdout)]
    assert "smollm2-135m" in names
    assert json.loads(mskip("recipe", "schema").stdout)["title"] == "Recipe"
    shown = mskip("recipe", "show", "smollm2-135m", "--set", "tuning.epochs=9").stdout
    assert "epochs: 9.0" in shown


@pytest.mark.parametrize(
    ("share", "drawn"), [(0.0, "····"), (1.0, "████"), (0.5, "██··"), (0.53, "██▏·"), (9.0, "████")]
)
def test_bar(share, drawn):
    assert console.bar(share, 4) == drawn


def test_histogram():
    assert console.histogram([0.0, 0.05, 0.3, 1.0], 0.5, 4) == "█▄│ ▄"
    assert console.histogram([], 0.0, 2) == "│  "
    assert console.histogram([1.0], 1.0, 2) == " █│"


def test_figures():
    assert console.shares(0.3335) == "0.334 (0.666)"
    assert console.shares(None) == "not run"
    assert console.ranges([1, 2, 3, 5, 8, 9]) == "1-3, 5, 8-9"
    assert console.size(1536) == "1.5 KiB"
    assert console.seconds(125) == "2 min 05 s"
    assert [console.milliseconds(value) for value in (0.123, 12.34, 1234.5, None)] == [
        *("0.12", "12.3", "1234", "not run")
    ]


def test_progress_in_a_log_is_a_line_a_stage(capsys):
    with console.progress() as progress:
        progress("first", 0, 3)
        progress("first", 3, 3, "loss 0.1")
        progress("second", 1, 40)
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert first.startswith("first ... ")
    assert first.endswith("s  loss 0.1")
    assert second.startswith("second ... ")


def test_resume_knows_what_is_finished(bare_run, calibration):
    import os

    from mskip.cli.job import finished
    from mskip.compressor.artifact import Run

    run = Run(bare_run)
    recipe = run.recipe()
    assert finished(run, recipe) == {}
    names = ["router.safetensors", "reports/tune.json", "calibration.json", "reports/export.json",
             "reports/bench.json", "reports/validate.json", "reports/eval.json"]  # fmt: skip
    (run.path / "reports").mkdir()
    start = (run.path / "recipe.yaml").stat().st_mtime
    for number, name in enumerate(names):
        path = run.path / name
        path.write_text(json.dumps(calibration if name == "calibration.json" else {}))
        os.utime(path, (start + number, start + number))
    every = {"tune", "calibrate", "eval", "export", "validate", "bench"}
    assert set(finished(run, recipe)) == every
    os.utime(run.path / "reports/export.json", (start + 9, start + 9))
    assert set(finished(run, recipe)) == every - {"validate", "bench"}
    run.write_calibration({**calibration, "target": 0.25})
    assert set(finished(run, recipe)) == {"tune"}
    run.checkpoints.mkdir()  # tuning was begun again
    assert finished(run, recipe) == {}


def test_run_finishes_everything_before_a_failed_gate_ends_it(
    mskip, bare_run, calibration, validation, monkeypatch
):
    done = []

    def step(name, report):
        def run_step(*_, **__):
            done.append(name)
            return report

        return run_step

    quality = {"kl": 0.5, "perplexity": 2.0}
    rows = [{"method": method, **quality} for method in ("dense", "static (cosine)", "routed")]
    timing = {"phase": "prefill", "batch": 1, "context": 8, "speedup": 1.0, "spread": 0.0,
              "execute_ms": 2.0, "skip_ms": 1.0}  # fmt: skip
    for target, report in {
        "compressor.tune_step.tune_run": {},
        "compressor.calibrate_step.calibrate_run": calibration,
        "compressor.evaluate_step.evaluate_run": {"rows": rows},
        "exporters.onnx_export.export_run": {},
        "exporters.parity.validate_run": validation,
        "exporters.speed.bench_run": {"rows": [timing]},
    }.items():
        monkeypatch.setattr(f"mskip.{target}", step(target.split(".")[-1], report))
    result = mskip("run", bare_run / "recipe.yaml", "--output", bare_run, "--quick")
    assert result.exit_code == 3
    assert done == [
        *("tune_run", "calibrate_run", "evaluate_run", "export_run", "validate_run", "bench_run")
    ]
    assert "failed gates: decision agreement" in result.stdout
    assert result.stdout.rstrip().endswith("reports/report.html")
    assert max(map(len, result.stdout.splitlines())) <= 80
