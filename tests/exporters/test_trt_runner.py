"""The runner of TensorRT engines, with a stand-in where the engine would be.

No test of TensorRT: a GPU executes its engines. The stand-in runs the graph of the same export on
ONNX Runtime, with the shapes that the runner sets and on the very memory that it binds.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tiny_export import CAPACITY, ROUTED
from tiny_export import exported as write_export

if TYPE_CHECKING:
    from conftest import Exported

    from mskip.compressor.artifact import Run
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers
    from mskip.exporters.trt_runner import TrtRunner

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23, 24]]
MIXED = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
SIZES = f"batch=1,2,4 seq=1,8,16 context={CAPACITY}"
Made = tuple["BaseModel", "Routers", Path]


class Context:
    """What TensorRT calls an execution context, of one profile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.limits = self.engine.profiles[profile]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self.limits:
            least, _, most = self.limits[name]
            if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
                return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream: int) -> bool:
        contract = self.engine.contract
        for spec in contract.outputs():
            if spec.name.startswith("present."):
                past = spec.name.replace("present", "past_key_values")
                assert self.addresses[spec.name] == self.addresses[past]  # it writes in place
        feeds = {
            spec.name: self.memory(spec.name, self.shapes[spec.name], spec.dtype).copy()
            for spec in contract.inputs()
        }
        names = [spec.name for spec in contract.outputs()]
        self.engine.calls += 1
        for spec, value in zip(
            contract.outputs(), self.engine.session.run(names, feeds), strict=True
        ):
            self.memory(spec.name, value.shape, spec.dtype)[:] = value
        return True

    def memory(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        held = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(held, dtype).reshape(shape)


class Engine:
    """What TensorRT calls an engine."""

    def __init__(self, folder: Path, file: str, sizes: str) -> None:
        import onnxruntime

        from mskip.exporters.contract import read_contract
        from mskip.exporters.ort_runner import contract_path
        from mskip.exporters.trt_profile import parse_profile

        self.contract = read_contract(contract_path(folder, file))
        self.profiles = parse_profile(sizes).shapes(self.contract)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / file), options, providers=["CPUExecutionProvider"]
        )
        self.calls = 0

    def create_execution_context(self) -> Context:
        return Context(self)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return self.profiles[profile][name]


@pytest.fixture(scope="module", params=["trt", "trt-plugin"])
def made(
    request: pytest.FixtureRequest,
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    folder = tmp_path_factory.mktemp("trt")
    return (*write_export(folder, make_tokenizer(), target=request.param), folder)


def runner_of(folder: Path, file: str = "model.onnx", sizes: str = SIZES) -> TrtRunner:
    from mskip.exporters.trt_runner import TrtRunner

    engine = Engine(folder, file, sizes)
    return TrtRunner(
        engine, engine.contract, name="stand-in", conditions=6, captures=False, device="cpu"
    )


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forced", [None, MIXED], ids=["scores", "mixed"])
def test_batch_of_unequal_lengths_equals_pytorch(made: Made, forced: Any) -> None:
    from mskip.exporters.runner import left_padded
    from mskip.exporters.torch_runner import TorchRunner

    engine = runner_of(made[2])
    ids, mask = left_padded(PROMPTS, 0)
    rng = np.random.default_rng(0)
    with TorchRunner(*made[:2], engine.contract) as reference:
        expected = reference.prefill(ids, mask, routing=forced)
        found = engine.prefill(ids, mask, routing=forced)
        np.testing.assert_array_equal(found.routing, expected.routing)
        close(found.scores, expected.scores)
        close(found.logits[mask == 1], expected.logits[mask == 1])
        for new in (1, 1, 3):
            tokens = rng.integers(3, 90, (len(ids), new))
            expected, found = reference.extend(expected, tokens), engine.extend(found, tokens)
            close(found.logits, expected.logits)
        some = [2, 0, 2]
        tokens = rng.integers(3, 90, (len(some), 1))
        expected, found = (
            runner.extend(runner.select(state, some), tokens)
            for runner, state in ((reference, expected), (engine, found))
        )
        close(found.logits, expected.logits)
    assert engine.kv_bytes(found) > 0
    assert engine.largest_batch == 4


def test_generation_equals_pytorch(made: Made) -> None:
    from mskip.exporters.torch_runner import TorchRunner

    engine = runner_of(made[2])
    with TorchRunner(*made[:2], engine.contract) as reference:
        expected = reference.generate(PROMPTS, 8)
    found = engine.generate(PROMPTS, 8)
    assert found.tokens == expected.tokens
    np.testing.assert_array_equal(found.routing, expected.routing)


def test_a_step_binds_nothing_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses and shapes stay what they were, so a captured step stays right."""
    bound: list[str] = []
    engine = runner_of(made[2])
    take = Context.set_tensor_address

    def counted(self: Context, name: str, memory: int) -> bool:
        bound.append(name)
        return take(self, name, memory)

    monkeypatch.setattr(Context, "set_tensor_address", counted)
    state = engine.prefill(np.array([PROMPTS[1]]), last_only=True)
    state = engine.extend(state, np.array([[5]]))
    before = len(bound)
    state = engine.extend(state, np.array([[6]]))
    assert len(bound) == before
    other = engine.prefill(np.array([PROMPTS[0]]), last_only=True)
    engine.extend(other, np.array([[7]]))
    assert len(bound) > before  # other buffers
    before = len(bound)
    engine.extend(state, np.array([[8]]))
    assert len(bound) > before  # and back


def test_logits_of_a_whole_prompt_come_a_few_at_a_time(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mskip.exporters import trt_profile

    ids = np.array([PROMPTS[1]])
    whole = runner_of(made[2]).prefill(ids)
    monkeypatch.setattr(trt_profile, "LOGITS", 3)
    few = runner_of(made[2])
    found = few.prefill(ids)
    close(found.logits, whole.logits)
    assert few._engine.calls == 3  # 7 columns
    last = few.prefill(ids, last_only=True)
    assert few._engine.calls == 4
    close(last.logits[:, -1], whole.logits[:, -1])


def test_peer_without_routing(made: Made) -> None:
    from mskip.exporters.torch_runner import TorchRunner

    dense, routed = runner_of(made[2], "dense.onnx"), runner_of(made[2])
    ids = np.array([PROMPTS[1]])
    everything = np.ones((1, len(ROUTED)), dtype=np.int64)
    with TorchRunner(*made[:2], routed.contract) as reference:
        expected = reference.prefill(ids, routing=everything)
    close(dense.prefill(ids).logits, expected.logits)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [(5, 3, "input_ids of 1 x 1 to 4 x 16, not of 5 x 3"), (1, 17, "not of 1 x 17")],
)
def test_sizes_that_the_engine_was_not_built_for(
    made: Made, rows: int, columns: int, message: str
) -> None:
    from mskip.compressor.errors import ArtifactError

    with pytest.raises(ArtifactError, match=message) as refused:
        runner_of(made[2]).prefill(np.full((rows, columns), 5), last_only=True)
    assert "--profile" in refused.value.remedy


def test_context_that_is_not_given(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from mskip.compressor.errors import MskipError

    monkeypatch.setattr(Engine, "create_execution_context", lambda self: None)
    with pytest.raises(MskipError, match="no context for profile 0"):
        runner_of(made[2])


def test_engine_that_refuses_or_fails(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from mskip.compressor.errors import MskipError

    engine, ids = runner_of(made[2]), np.array([PROMPTS[0]])
    monkeypatch.setattr(Context, "execute_async_v3", lambda *_: False)
    with pytest.raises(MskipError, match="failed in a call"):
        engine.prefill(ids, last_only=True)
    engine = runner_of(made[2])
    monkeypatch.setattr(Context, "set_tensor_address", lambda *_: False)
    with pytest.raises(MskipError, match="does not take input_ids"):
        engine.prefill(ids, last_only=True)


@pytest.fixture
def built(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose engines, dense and static ones with it, the stand-in executes."""
    from mskip.compressor.artifact import Run
    from mskip.exporters import laziness, parity, speed
    from mskip.exporters.onnx_export import export_run
    from mskip.exporters.targets import Form

    shutil.copytree(exported.run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    export_run(run, exported.base, form=Form("trt"), context=128)
    run.write_report("tensorrt", {"mode": "if", "outside": []})
    monkeypatch.setattr(laziness, "CONTEXT", 32)
    monkeypatch.setattr(laziness, "REPEATS", 2)

    def opened(folder: Path, file: str = "model.engine") -> TrtRunner:
        graph = file.replace(".engine", ".onnx")
        return runner_of(folder, graph, "batch=1,2,4 seq=1,32,64 context=128")

    for module in (parity, speed):
        monkeypatch.setattr(module, "open_engine", opened)
    return run


def test_validation_of_a_built_engine(exported: Exported, built: Run) -> None:
    from mskip.exporters.parity import validate_run
    from mskip.exporters.trt_engine import built_form

    form = built_form(built)
    found = validate_run(built, exported.base, form=form, built=True)
    assert found["status"] == "passed"
    assert found["engine"] == "stand-in"
    assert len(found["gates"]) == 9
    assert all(gate["passed"] for gate in found["gates"])
    assert found["tokens"]["match"] == 1.0
    assert built.report("validate-engine", "") == found
    assert not (built.reports / "validate-tensorrt.json").exists()
    # What the build found to be outside of the conditionals fails the engine.
    built.write_report("tensorrt", {"mode": "if", "outside": ["a product"]})
    found = validate_run(built, exported.base, form=form, built=True)
    failed = [gate["name"] for gate in found["gates"] if not gate["passed"]]
    assert failed == ["nodes run in skipped branches"]


def test_bench_of_built_engines(built: Run) -> None:
    from mskip.exporters.speed import bench_run
    from mskip.exporters.trt_engine import built_form

    found = bench_run(
        built, batches=[1, 3], contexts=[16], repeats=1, form=built_form(built), built=True
    )
    assert built.report("bench-engine", "") == found
    assert {row["engine"] for row in found["rows"]} == {"tensorrt"}
    assert [(row["phase"], row["batch"]) for row in found["rows"]] == [
        *(("prefill", 1), ("prefill", 3), ("decode", 1), ("decode", 3))
    ]
    assert found["waits"] == dict.fromkeys(
        ["model.onnx", "dense.onnx", "static.onnx", "ceiling.onnx"], 6
    )
    assert found["machine"]["onnxruntime"] == "stand-in"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    from mskip.compressor.errors import MskipError
    from mskip.exporters.trt_runner import open_engine

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MskipError, match="not run: no CUDA device"):
        open_engine(tmp_path)


def test_it_calls_what_the_real_bindings_have() -> None:
    """By name: whether the calls do what is meant, a GPU would have to show."""
    from mskip.exporters.trt_builders import BUILDERS

    (row,) = [row for row in BUILDERS if row.crosses]
    if (trt := row.module()) is None:
        pytest.skip(f"not installed: {row.install}")
    for name in vars(Context):
        if name in ("memory", "__init__") or name.startswith("__"):
            continue
        assert hasattr(trt.IExecutionContext, name), name
    for name in ("create_execution_context", "get_tensor_profile_shape"):
        assert hasattr(trt.ICudaEngine, name)
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
    assert hasattr(trt.Logger, "ERROR")
