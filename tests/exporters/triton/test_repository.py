"""What is written, and what lint finds in it."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BACKENDS = ["python", "onnxruntime", "tensorrt"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_lints_clean_with_the_versions_it_needs(
    make_repository: Callable[..., Path], backend: str
) -> None:
    from mskip.exporters.triton.lint import lint

    report = lint(make_repository(backend=backend))
    assert report["faults"] == []
    assert report["models"] == ["ensemble", "generate", "lm", "tokenizer"]
    needs = report["needs"]
    assert needs["triton"] == "26.07"
    assert needs["opset"] >= 23
    if backend == "onnxruntime":
        assert needs["onnxruntime"].startswith("1.27.0")
    if backend == "tensorrt":
        assert needs["tensorrt"] == "that of nvcr.io/nvidia/tensorrt:26.07-py3"
    assert ("linted, not loaded" in report["loaded"]["lm"]) == (backend != "python")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_can_be_moved(
    make_repository: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    """No file names a folder of this machine, and lint finds nothing after a move."""
    from mskip.exporters.triton.lint import lint

    moved = make_repository(backend=backend).rename(tmp_path / "elsewhere")
    assert lint(moved)["faults"] == []
    here = (str(tmp_path), str(Path(__file__).parents[3]), str(Path.home()))
    for path in moved.rglob("*"):
        if path.is_file() and path.suffix not in (".data", ".onnx"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            # The name of the base model is the user's own, and a folder in this test.
            for each in here:
                lines = [
                    line for line in text.splitlines() if each in line and '"name"' not in line
                ]
                lines = [line for line in lines if "MindSkip routing" not in line]
                lines = [line for line in lines if "**Base model**" not in line]
                assert not lines, f"{path.name}: {lines[:1]}"


def test_what_is_served_imports_nothing_else(make_repository: Callable[..., Path]) -> None:
    """The standard library, numpy, onnxruntime, tokenizers, and what Triton brings."""
    allowed = {"numpy", "onnxruntime", "tokenizers", "mskip_serving", "triton_python_backend_utils"}
    found = set()
    for path in (make_repository() / "models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {each.name.split(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) <= allowed
    assert {"numpy", "onnxruntime", "tokenizers"} <= found


def test_the_client_needs_python_alone(make_repository: Callable[..., Path]) -> None:
    tree = ast.parse((make_repository() / "client.py").read_text(encoding="utf-8"))
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert names <= set(sys.stdlib_module_names)


def test_options_are_where_the_server_reads_them(make_repository: Callable[..., Path]) -> None:
    """Values of the deployment in the configuration, parsed by Triton's own protobuf."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    folder = make_repository(sequences=3, instances=2, queue=7, queue_delay_us=500, kv_mib=5)
    read = {}
    for name in ("generate", "tokenizer"):
        text = (folder / "models" / name / "config.pbtxt").read_text(encoding="utf-8")
        read[name] = text_format.Parse(text, ModelConfig())
    values = {key: each.string_value for key, each in read["generate"].parameters.items()}
    assert values["sequences"] == "3"
    assert values["queue"] == "7"
    assert values["kv_bytes"] == str(5 << 20)
    assert values["engine"] == "local"
    assert read["generate"].instance_group[0].count == 2
    assert read["generate"].model_transaction_policy.decoupled
    assert read["tokenizer"].dynamic_batching.max_queue_delay_microseconds == 500
    assert {each.name for each in read["generate"].input} >= {
        *("text_input", "stream", "max_tokens", "stop_words", "top_p", "temperature", "seed"),
        *("frequency_penalty", "presence_penalty", "tau", "capacity"),
        *("return_num_input_tokens", "return_num_output_tokens"),
    }


@pytest.mark.parametrize("sequences", [1, 2, 16])
def test_the_budget_has_room_for_the_longest(
    make_repository: Callable[..., Path], sequences: int
) -> None:
    import re

    from mskip.exporters.serving.graph import read_shape

    folder = make_repository(sequences=sequences, positions=4096) / "models/generate"
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    (budget,) = re.findall(r'"kv_bytes"\s+value {\s+string_value: "(\d+)"', text)
    shape = read_shape(folder / "1/contract.json")
    assert int(budget) >= 4096 * len(shape.cached) * shape.position_bytes


def test_the_plan_is_built_for_the_sizes_of_a_full_batch(
    make_repository: Callable[..., Path],
) -> None:
    script = (make_repository(backend="tensorrt") / "build_plan.sh").read_text(encoding="utf-8")
    assert "nvcr.io/nvidia/tensorrt:26.07-py3" in script
    assert "--saveEngine=models/lm/1/model.plan" in script
    assert "input_ids:1x1," in script
    assert "input_ids:6x128," in script  # four sequences and two that are nobody's
    assert "past_key_values.0.key:6x2x128x8" in script
    assert "tau:" not in script  # it has one size


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


FAULTS: dict[str, tuple[str, tuple[str, str, str] | None]] = {
    "another name": ("named 'lm2'", ("models/lm/config.pbtxt", 'name: "lm"', 'name: "lm2"')),
    "another type": (
        "'routing' is not TYPE_INT64",
        (
            "models/lm/config.pbtxt",
            'name: "routing"\n  data_type: TYPE_INT64',
            'name: "routing"\n  data_type: TYPE_INT32',
        ),
    ),
    "other dims": (
        "'logits' has dims",
        ("models/lm/config.pbtxt", 'name: "logits"\n  data_type: TYPE_FP32\n  dims: [ -1,',
         'name: "logits"\n  data_type: TYPE_FP32\n  dims: [ 3,'),
    ),
    "the batch in dims": (
        "names the batch in its dims",
        ("models/tokenizer/config.pbtxt", "dims: [ -1 ]", "dims: [ -1, -1 ]"),
    ),
    "no configuration": (
        "no model configuration",
        ("models/lm/config.pbtxt", "input {", "inptu {"),
    ),
    "a batch size": ("max_batch_size is not 0",
                     ("models/lm/config.pbtxt", "max_batch_size: 0", "max_batch_size: 4")),
    "a step to nowhere": (
        "'generate2' is no model",
        ("models/ensemble/config.pbtxt", 'model_name: "generate"', 'model_name: "generate2"'),
    ),
    "an input too many": (
        "'more' is not in the contract",
        ("models/lm/config.pbtxt", "input {",
         'input {\n  name: "more"\n  data_type: TYPE_BOOL\n  dims: [ 1 ]\n}\ninput {'),
    ),
    "a changed file": ("not what its checksum says", ("README.md", "Serve it", "Serve them")),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_lint_finds(make_repository: Callable[..., Path], case: str) -> None:
    from mskip.exporters.triton.lint import lint

    words, change = FAULTS[case]
    folder = make_repository()
    assert change is not None
    _replace(folder / change[0], *change[1:])
    faults = lint(folder)["faults"]
    assert any(words in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("models/lm/1/model.onnx", "no graph at"),
        ("models/lm/1/model.onnx.data", "no weights at"),
        ("models/generate/1/model.py", "no model.py"),
        ("client.py", "client.py is gone"),
    ],
)
def test_lint_misses(make_repository: Callable[..., Path], gone: str, words: str) -> None:
    from mskip.exporters.triton.lint import lint

    folder = make_repository()
    (folder / gone).unlink()
    assert any(words in fault for fault in lint(folder)["faults"])


def test_a_release_that_is_too_old_names_both_versions(
    make_repository: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph's opset, and how far the release's runtime goes."""
    from mskip.exporters.triton import versions
    from mskip.exporters.triton.lint import lint

    assert lint(make_repository("a", backend="onnxruntime", target="26.01"))["faults"] == []
    old = versions.Release("24.01", "1.20.1")
    monkeypatch.setitem(versions.RELEASES, "24.01", old)
    (fault,) = lint(make_repository("b", backend="onnxruntime", target="24.01"))["faults"]
    assert "opset 23" in fault
    assert "ONNX Runtime 1.20.1 of Triton 24.01 goes up to 21" in fault
    assert "needs ONNX Runtime 1.23 or newer" in fault


def test_versions() -> None:
    from mskip.exporters.triton.versions import check_opset

    assert check_opset(23, 10, "1.23.2", "x") is None
    assert check_opset(23, 11, "1.32.0", "x") is None
    assert "IR version 13" in str(check_opset(21, 13, "1.23.2", "x"))
    assert "no version takes it" in str(check_opset(99, 10, "1.27.0", "x"))
    assert "older than any" in str(check_opset(9, 7, "1.2.0", "x"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "vllm"}, "no backend 'vllm'"),
        ({"target": "19.01"}, "no Triton release '19.01'"),
        ({"sequences": 0}, "sequences is 0"),
        ({"backend": "tensorrt", "weights": "int8"}, "no rounded weights"),
        ({"weights": "int8"}, "no export at"),
    ],
)
def test_deployments_that_cannot_be(
    make_repository: Callable[..., Path], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    from mskip.compressor.errors import MskipError

    with pytest.raises(MskipError, match=words):
        make_repository(**options)
    assert not list(tmp_path.iterdir())


def test_prompts_are_those_of_the_tokenizer(
    calibrated: Any, make_repository: Callable[..., Path]
) -> None:
    """As a chat and as they stand: the ids that tuning gave the same text."""
    from mskip.compressor.data import Conversation, Message
    from mskip.compressor.encoding import encode
    from mskip.exporters.serving.texts import Texts

    texts = Texts(make_repository() / "models/tokenizer/1")
    for text in ("the question is one", "two", " answer  the ", "user\nassistant"):
        expected = encode(Conversation((Message("user", text),)), calibrated.tokenizer, 500)
        assert expected is not None
        assert texts.ids(text, chat=True) == expected.input_ids
        plain = encode(Conversation(text=text), calibrated.tokenizer, 500)
        assert plain is not None
        assert texts.ids(text.encode()) == plain.input_ids
    with pytest.raises(ValueError, match="UTF-8"):
        texts.ids(b"\xff\xfe")
    with pytest.raises(ValueError, match="empty"):
        texts.ids("")


def test_the_dial_is_measured(calibrated: Any) -> None:
    """Each capacity is what its thresholds execute; the run's own target is on it."""
    from mskip.compressor.dial import saved_dial

    dial = calibrated.dial
    assert dial["capacities"] == sorted(dial["capacities"])
    assert dial["capacities"][0] == 0.0
    assert dial["capacities"][-1] == 1.0
    assert len(dial["capacities"]) > 3
    calibration = calibrated.run.calibration()
    at = dial["capacities"].index(calibration["capacity"]["calibration"])
    assert dial["taus"][at] == calibration["tau"]
    firsts = [taus[0] for taus in dial["taus"]]
    assert firsts == sorted(firsts, reverse=True)
    assert saved_dial(calibrated.run) == dial


def test_another_calibration_asks_for_another_dial(calibrated: Any, tmp_path: Path) -> None:
    import shutil

    from mskip.compressor.artifact import Run
    from mskip.compressor.dial import saved_dial

    copy = Run(Path(shutil.copytree(calibrated.run.path, tmp_path / "copy")))
    assert saved_dial(copy) is not None
    calibration = copy.calibration()
    copy.write_calibration({**calibration, "target": 0.25})
    assert saved_dial(copy) is None


def test_the_dashboard_names_metrics_that_there_are(make_repository: Callable[..., Path]) -> None:
    import re

    from mskip.exporters.serving.meter import METRICS

    text = (make_repository() / "grafana.json").read_text(encoding="utf-8")
    dashboard = json.loads(text)
    named = set(re.findall(r"mskip_\w+", " ".join(
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    )))  # fmt: skip
    assert named <= set(METRICS)
    assert {"mskip_decisions_total", "mskip_capacity", "mskip_kv_bytes"} <= named
