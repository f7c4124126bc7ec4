"""The card's words, one after another, on a folder with another Llama. Last: it is the longest."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SMALL = [
    *("data.calibration=8", "data.held_out=8", "data.max_samples=16", "data.answer_tokens=4"),
    *("tuning.epochs=1", "tuning.batch_size=8", "compensation.rank=4", "routing.last=2"),
    *("router.sensitivity_prompts=4", "evaluation.prompts=4", "validation.prompts=4"),
    *("validation.steps=3", "bench.batches=[1]", "bench.contexts=[16]", "bench.repeats=1"),
    # The tiny model is too quick for its time to say anything.
    *("bench.decode_steps=1", "validation.limits.laziness_ratio=0"),
]
OVERRIDES = [part for each in SMALL for part in ("--set", each)]


def tensorrt(mskip: Any, done: Callable[..., str], run: Path) -> None:
    """The graph for TensorRT, and an engine where there is a builder."""
    small = ("--profile", "batch=1,2,4 seq=1,64,512 context=1024")
    assert "opset 24" in done("export", "--target", "trt", "--precision", "fp32", *small)
    assert "validation passed" in done("validate", "--target", "trt")
    unrun = mskip("validate", "--trt")
    assert unrun.exit_code == 1
    assert "engine: greedy token match" in unrun.stdout
    answer = mskip("generate", "hello", "--run", str(run), "--engine", "trt")
    for asked in (unrun, mskip("bench", "--trt"), answer):
        assert "TensorRT engine: not run: no CUDA device" in asked.stderr
        assert asked.exit_code == 1
    graph = mskip("bench", "--target", "trt")
    assert "its time there says nothing" in " ".join(graph.stderr.split())
    assert graph.exit_code == 1
    assert (run / "tensorrt/model.onnx").is_file()
    assert "--maxShapes=input_ids:4x512" in (run / "tensorrt/trtexec.sh").read_text()
    assert done("export", "--target", "trt-plugin", "--precision", "fp32", *small)
    proved = done("validate", "--target", "trt-plugin")
    assert "validation passed" in proved
    assert "not run: what a skip saves" in proved
    refused = mskip("export", "--trt", "--trt-mode", "plugin", "--trt-builder", "tensorrt-rtx")
    assert refused.exit_code == 1
    assert "tensorrt-rtx" in refused.stderr
    for alone in (["--trt-mode", "if"], ["--trt-peers"], ["--compute-capability", "8.9"]):
        assert mskip("export", *alone).exit_code == 2
    assert mskip("bench", "--trt", "--profile").exit_code == 2
    if find_spec("tensorrt_rtx_bindings"):
        engines = ("--compute-capability", "8.9", "--compute-capability", "12.0")
        assert "ceiling.engine" in done("export", "--trt", "--trt-peers", *engines, *small)
        built = json.loads((run / "reports/tensorrt.json").read_text())
        assert built["bytes"] == (run / "tensorrt/model.engine").stat().st_size > 10_000
        assert built["precision"] == "float16"
        assert built["peers"] == {
            name: (run / "tensorrt" / name).stat().st_size
            for name in ("dense.engine", "static.engine", "ceiling.engine")
        }
        record = json.loads((run / "tensorrt/engine.json").read_text())
        assert record["builder"] == "tensorrt-rtx"
        # Two for each of the routed attentions, none without them.
        assert record["conditions"] == {"model.engine": 4, **dict.fromkeys(built["peers"], 0)}
        assert set(built["behind_conditions"].values()) == {9}


def triton(mskip: Any, done: Callable[..., str], run: Path) -> None:
    """A repository, held against the rules and served; and one for another backend."""
    assert "mskip export --triton" in mskip("serve", "--check").stderr
    written = done("export", "--triton", "--max-batch-size", "4", "--max-positions", "256")
    assert "no faults" in written
    assert "no faults" in done("lint")
    checked = done("serve", "--check")
    assert "FAIL" not in checked
    assert "alone or together" in checked
    report = json.loads(done("serve", "--check", "--json"))
    assert report["passed"]
    assert len(report["checks"]) == 9
    (run / "triton/README.md").write_text("changed")
    faulty = mskip("lint", "--json")
    assert faulty.exit_code == 3
    assert json.loads(faulty.stdout)["faults"] == ["README.md is not what its checksum says"]
    for backend in ("onnxruntime", "tensorrt"):
        assert "linted, not loaded" in done("export", "--triton", "--backend", backend)
        unserved = mskip("serve", "--check")
        assert unserved.exit_code == 1
        assert f"the {backend} backend" in " ".join(unserved.stderr.split())
    for wrong, words in (
        (["--triton-target", "19.01"], "26.07"),
        (["--backend", "vllm"], "python"),
    ):
        unknown = mskip("export", "--triton", *wrong)
        assert unknown.exit_code == 1
        assert words in unknown.stderr
    assert mskip("export", "--triton", "--trt").exit_code == 2


def other_prompts(mskip: Any, done: Any, run: Path) -> None:
    """Calibrated on others: eval takes them, too, until the recipe's come back."""
    others = [{"prompt": f"the question is {n} " + "one two " * n} for n in range(8)]
    Path("others.jsonl").write_text("".join(json.dumps(each) + "\n" for each in others))
    whole = done("calibrate", "--capacity", "0.5", "--data", "others.jsonl")
    assert "others.jsonl" in whole
    saved = json.loads((run / "calibration.json").read_text())
    assert saved["data"] == {"source": str(Path("others.jsonl").resolve()), "max_length": 512}
    assert saved["prompts"] == {"calibration": 4, "held_out": 4}
    assert json.loads(done("eval", "--json"))["prompts"] == 4
    short = mskip("calibrate", "--data", "others.jsonl", "--max-length", "4")
    assert short.exit_code == 1
    assert "none of 8" in short.stderr
    assert mskip("calibrate", "--max-length", "64").exit_code == 2
    assert "tau" in done("calibrate", "--capacity", "0.5")
    assert not (run / "calibration_samples.jsonl").exists()


def test_the_commands_in_a_row(mskip, tiny_folder):  # noqa: PLR0915  # it is one job
    pytest.importorskip("onnxruntime")

    def done(*arguments: str | Path) -> str:
        result = mskip(*arguments)
        assert result.exit_code == 0, result.stderr
        assert max(map(len, result.stdout.splitlines()), default=0) <= 80 or "--json" in arguments
        return str(result.stdout)

    assert "reached" in done("tune", "--model", tiny_folder, *OVERRIDES, "--output", "runs/t")
    run = Path("runs/t")
    assert (run / "router.safetensors").is_file()
    assert (run / "recipe.yaml").is_file()
    other_prompts(mskip, done, run)
    assert abs(json.loads((run / "calibration.json").read_text())["target"] - 0.5) < 1e-9
    assert "torch" in done("generate", "hello", "--max-new-tokens", "2").lower()
    assert "conditional attentions" in done("export")
    assert "validation passed" in done("validate")
    assert "Prefill" in done("bench")
    for asked in (["validate"], ["bench"], ["bench", "--profile"], ["generate", "hello"]):
        missing = mskip(*asked, "--target", "ort")
        assert missing.exit_code == 1
        assert "mskip export --target ort" in missing.stderr
    contrary = mskip("generate", "hello", "--engine", "torch", "--target", "ort")
    assert contrary.exit_code == 1
    assert "Leave out --engine torch" in contrary.stderr
    assert "conditional attentions" in done("export", "--target", "ort")
    assert "validation passed" in done("validate", "--target", "ort")
    assert "Prefill" in done("bench", "--target", "ort")
    assert "SkipSimplified" in done("bench", "--target", "ort", "--profile", "--context", "8")
    for graph in ("onnx", "ort"):
        assert (run / graph / "model.onnx").is_file()
    for name in ("export", "validate", "bench"):
        assert (run / f"reports/{name}.json").is_file()
        assert (run / f"reports/{name}-ort.json").is_file()
    tensorrt(mskip, done, run)
    triton(mskip, done, run)
    assert mskip("export", "--target", "onnx").exit_code == 2
    for refused in (["--target", "ort", "--trt"], ["--precision", "fp16"], ["--precision", "x"]):
        assert mskip("export", *refused).exit_code == 2
    assert "routed" in done("eval")
    for ignored in (["--target", "ort"], ["--engine", "onnx"], ["--limit", "3"]):
        assert mskip("eval", *ignored).exit_code == 2
    assert "scores.png" in done("inspect")
    assert "report.html" in done("report")
    by_engine = [
        json.loads(done("generate", "hello you", "--max-new-tokens", "4", "--json", "--engine", e))
        for e in ("torch", "onnx")
    ]
    assert by_engine[0]["tokens"] == by_engine[1]["tokens"]
    assert by_engine[0]["kv_bytes"] == by_engine[1]["kv_bytes"] <= by_engine[0]["kv_bytes_dense"]
    for first, second in zip(by_engine[0]["layers"], by_engine[1]["layers"], strict=True):
        assert first["executed"] == second["executed"]
        assert first["score"] == pytest.approx(second["score"], abs=1e-4)
    everything = json.loads(done("generate", "hello you", "--tau", "0", "--json"))
    assert everything["capacity"] == 1.0
    assert everything["kv_bytes"] == everything["kv_bytes_dense"]

    # A finished run is kept by --resume, in whole or up to what is missing.
    assert "nothing to resume" in mskip("tune", "--resume").stderr
    (run / "reports/bench.json").unlink()
    result = mskip("run", run / "recipe.yaml", "--output", run, "--resume")
    assert result.exit_code == 0
    kept = [line for line in result.stderr.splitlines() if line.endswith(": kept")]
    assert [line.split()[1] for line in kept] == [
        *("tune:", "calibrate:", "eval:", "export:", "validate:")
    ]
    assert "The run" in result.stdout
    assert "report.html" in result.stdout

    # The same maps, what routing skips most removed for good; later commands go on with it.
    worth = json.loads((run / "reports/tune.json").read_text())["worth"]
    if "removed" not in worth:  # tiny random routers may tie, and then nothing is compared
        assert "no comparison" in mskip("static", run).stderr
    else:
        assert "(given)" in done("static", run)
        assert "warning" not in done("calibrate")
        assert "conditional attentions" in done("export")
        assert "validation passed" in done("validate")
        assert mskip("static").exit_code == 1


def test_a_run_per_token_ends_without_an_engine(mskip, tiny_folder):
    tokens = ("--set", "routing.unit=token", "--set", "compensation.rank=0")
    options = ("--set", f"model.name={tiny_folder}", *OVERRIDES, *tokens)
    result = mskip("run", "smollm2-135m", *options, "--output", "runs/tokens")
    assert result.exit_code == 0, result.stderr
    assert "export, validate, bench: not run" in result.stderr
    assert "KL to dense" in result.stdout
    assert "parity with PyTorch" not in result.stdout
    assert "report.html" in result.stdout
    assert not Path("runs/tokens/onnx").exists()
