"""A run's methods side by side on tasks: kept, resumed, and begun anew when something changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from task_documents import read, write, write_tasks

from mskip.compressor.artifact import Run
from mskip.compressor.errors import ArtifactError, MskipError
from mskip.exporters.reading import GENERATION_TOKENS
from mskip.exporters.runner import Runner
from mskip.exporters.targets import PORTABLE, Form
from mskip.exporters.task_scores import (
    KEYS_AND_VALUES,
    against,
    check_run,
    forced_decisions,
    generation_tokens,
    score_run,
    score_tasks,
)
from mskip.exporters.torch_runner import TorchRunner

if TYPE_CHECKING:
    from conftest import Exported

    from mskip.compressor.models import BaseModel

pytest.importorskip("lm_eval")

TASKS = ["boolq", "winogrande", "piqa"]
ORDERS = {"kl": [3, 2, 1], "greedy": [2, 3, 1], "cosine": [1, 2, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def run(exported: Exported, tmp_path: Path) -> Run:
    """The exported run, with orders of removal, to be written to."""
    copy = Run(shutil.copytree(exported.run.path, tmp_path / "run"))
    tuned = copy.report("tune", "")
    copy.write_report("tune", {**tuned, "removal_orders": ORDERS})
    return copy


@pytest.fixture(scope="module")
def plain_base(exported: Exported) -> BaseModel:
    """The base model once more: the other one may have routers attached."""
    from mskip.compressor.models import load_base

    return load_base(exported.run.recipe().model)


@pytest.mark.parametrize(
    ("worth", "kept"),
    [
        ({"rule": "cosine"}, [0, 1, 1]),
        ({"rule": "kl"}, [1, 1, 0]),
        ({"skipped": "scores tie"}, [1, 0, 1]),
        (None, [1, 0, 1]),
    ],
)
def test_static_removal_is_the_best_that_tuning_knew(
    run: Run, worth: dict[str, Any] | None, kept: list[int]
) -> None:
    """By the rule that tuning chose on its prompts; greedy, where it chose none."""
    run.write_report("tune", {"removal_orders": ORDERS, **({"worth": worth} if worth else {})})
    assert forced_decisions(run, 3, ["static"])["static"] == kept


def test_static_removal_of_a_static_run_is_its_own(run: Run) -> None:
    """Not as many as a target asks for, which somebody rounded."""
    configuration = run.path / "router_config.json"
    configuration.write_text(
        json.dumps({**json.loads(configuration.read_text()), "method": "static"})
    )
    run.write_calibration({**run.calibration(), "target": 0.3334})
    assert forced_decisions(run, 3, ["static"])["static"] is None


def test_methods_side_by_side(
    run: Run, plain_base: BaseModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(**options: Any) -> dict[str, Any]:
        return score_run(run, plain_base, **{"tasks": TASKS, "task_dir": folder, **options})

    report = score()
    assert report == json.loads((run.reports / "tasks.json").read_text())
    dense, static, routed = report["rows"]
    assert [row["method"] for row in report["rows"]] == ["dense", "static", "routed"]
    assert [row["by"] for row in report["rows"]] == ["torch"] * 3
    assert dense["capacity"] == 1.0
    assert static["capacity"] == pytest.approx(2 / 3)  # half of three, rounded up
    assert 0.0 < routed["capacity"] < 1.0
    assert "against_dense" not in dense
    for row in (static, routed):
        assert row["against_dense"] == against(row, dense)
        assert [task["right"] for task in row["tasks"].values()] != [
            task["right"] for task in dense["tasks"].values()
        ]
    # Layer 2 goes first by the greedy order.
    with TorchRunner(plain_base, *loaded(run, plain_base)) as runner:
        expected = score_tasks(
            runner,
            plain_base.tokenizer,
            TASKS,
            routing=[1, 0, 1],
            task_dir=folder,
            max_length=512,
        )
    assert static["tasks"] == expected["tasks"]

    onnx = score(engine="onnx", methods=["routed"])
    assert [(row["by"], row["method"]) for row in onnx["rows"]] == [
        ("onnx", "routed"),
        *(("torch", method) for method in ("dense", "static", "routed")),
    ]
    assert onnx["rows"][0]["engine"].startswith("onnxruntime")
    assert onnx["rows"][0]["tasks"] == routed["tasks"]
    assert onnx["rows"][1:] == report["rows"]
    assert "attached" not in str(plain_base.model.model.layers[1].self_attn.forward)

    # Everything is answered by now, so no engine is asked.
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "prefill", refuse)
        again = score()
    times = [row.pop("seconds") for row in [*again["rows"], *onnx["rows"]]]
    assert len(times) == 8
    assert again == onnx
    # Other documents or other tasks are another subject.
    assert len(score(limit=2, methods=["dense"])["rows"]) == 1
    assert len(score(tasks=["boolq"], methods=["routed"])["rows"]) == 1


def test_another_form_of_the_graph(run: Run, plain_base: BaseModel, folder: Path) -> None:
    """The fused graph, whose contexts are read one by one, says what the portable one says."""
    from mskip.exporters.onnx_export import export_run

    form = Form("ort")
    with pytest.raises(ArtifactError, match="--target ort"):
        check_run(run, "onnx", ["routed"], form)
    export_run(run, plain_base, form=form)
    tasks = [*TASKS, "gsm8k"]
    rows = [
        score_run(
            run, plain_base, engine="onnx", form=each, methods=["routed"], tasks=tasks,
            task_dir=folder, limit=3,
        )["rows"]
        for each in (PORTABLE, form)
    ]  # fmt: skip
    portable, fused = rows[1]
    assert [portable] == rows[0]
    assert (portable["by"], fused["by"]) == ("onnx", "ort")
    assert portable["tasks"] == fused["tasks"]


def loaded(run: Run, base: BaseModel) -> tuple[Any, Any]:
    from mskip.compressor.artifact import load_routers
    from mskip.exporters.contract import read_contract

    return load_routers(run, base), read_contract(run.onnx / "contract.json")


def test_an_interrupted_run_keeps_finished_methods(
    run: Run, plain_base: BaseModel, folder: Path
) -> None:
    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "torch static: boolq" and done:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"tasks": ["boolq"], "task_dir": folder}
    with pytest.raises(KeyboardInterrupt):
        score_run(run, plain_base, **arguments, progress=stop)
    saved = json.loads((run.reports / "tasks.json").read_text())
    assert [row["method"] for row in saved["rows"]] == ["dense"]
    report = score_run(run, plain_base, **arguments, methods=["static", "routed"])
    assert [row["method"] for row in report["rows"]] == ["dense", "static", "routed"]
    assert report["rows"][0] == saved["rows"][0]


def test_other_files_or_thresholds_start_anew(
    run: Run, plain_base: BaseModel, folder: Path, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    documents = read(folder / "boolq.jsonl")

    def methods(method: str) -> list[str]:
        report = score_run(run, plain_base, methods=[method], tasks=["boolq"], task_dir=files)
        return [row["method"] for row in report["rows"]]

    write(files / "boolq.jsonl", documents)
    assert methods("dense") == ["dense"]
    assert methods("routed") == ["dense", "routed"]
    write(files / "boolq.jsonl", documents[:4])
    assert methods("routed") == ["routed"]
    run.write_calibration({**run.calibration(), "tau": [0.0, 0.0, 0.0]})
    assert methods("dense") == ["dense"]
    report = score_run(run, plain_base, methods=["routed"], tasks=["boolq"], task_dir=files)
    dense, routed = report["rows"]
    assert routed["capacity"] == 1.0
    assert routed["tasks"] == dense["tasks"]
    assert routed["against_dense"] == {"value": 0.0, "stderr": 0.0}


def test_what_a_run_lacks(run: Run) -> None:
    check_run(run, "onnx", ["dense", "static", "routed"])
    for engine, methods, message in (
        ("tensorrt", ["dense"], "no engine 'tensorrt'"),
        ("torch", ["dense", "drop"], "no method 'drop'"),
    ):
        with pytest.raises(MskipError, match=message):
            check_run(run, engine, methods)
    tuned = run.report("tune", "")
    run.write_report("tune", {**tuned, "removal_orders": {}})
    with pytest.raises(ArtifactError, match="orders of removal"):
        check_run(run, "torch", ["static"])
    check_run(run, "torch", ["dense", "routed"])
    exported = run.report("export", "")
    run.write_report("export", {**exported, "router_sha256": "other"})
    with pytest.raises(ArtifactError, match="other routers"):
        check_run(run, "onnx", ["routed"])
    run.forget_reports("export")
    with pytest.raises(ArtifactError, match="mskip export"):
        check_run(run, "onnx", ["routed"])


def test_keys_and_values_of_a_batch_fill_what_they_may(exported: Exported) -> None:
    contract = exported.contract
    tokens = generation_tokens("torch", contract)
    assert tokens > GENERATION_TOKENS
    size = KEYS_AND_VALUES / tokens / contract.layers / 2 / contract.kv_heads / contract.head_dim
    assert size == pytest.approx(4, rel=1e-3)  # bytes of a float32
    half = generation_tokens("torch", replace(contract, dtype="bfloat16"))
    assert half == pytest.approx(2 * tokens, abs=2)
    # A batch is never smaller than what every engine takes.
    assert generation_tokens("torch", replace(contract, layers=10**6)) == GENERATION_TOKENS
    assert generation_tokens("onnx", contract) == GENERATION_TOKENS
