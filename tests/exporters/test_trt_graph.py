"""Graphs of target "trt" on ONNX Runtime, against PyTorch: what TensorRT builds its engine from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from architectures import MODELS, make
from tiny_export import CAPACITY, ROUTED, exported

if TYPE_CHECKING:
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers
    from mskip.exporters.fused_runner import BufferRunner
    from mskip.exporters.torch_runner import TorchRunner

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23, 24], [30], [40] * 6]
MIXED = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
FORCED = [None, MIXED, np.zeros_like(MIXED), np.ones_like(MIXED)]

CASES = [
    pytest.param(("llama", "attention"), id="llama"),
    pytest.param(("llama", "block"), id="llama-block"),
    *(
        pytest.param(case, id="-".join(case), marks=pytest.mark.matrix)
        for case in [
            *((name, "attention") for name in MODELS if name != "llama"),
            ("llama", "mlp"),
            ("gemma2, sliding", "block"),
        ]
    ),
]
Made = tuple["BaseModel", "Routers", Path]


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest,
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """Model, routers and their export."""
    name, kind = request.param
    folder = tmp_path_factory.mktemp("trt")
    return (*exported(folder, make_tokenizer(), name, kind), folder)


@pytest.fixture
def engine(made: Made) -> BufferRunner:
    from mskip.exporters.fused_runner import BufferRunner
    from mskip.exporters.opening import open_runner

    runner = open_runner(made[2], threads=1)
    assert isinstance(runner, BufferRunner)
    return runner


@pytest.fixture
def reference(made: Made, engine: BufferRunner) -> Iterator[TorchRunner]:
    from mskip.exporters.torch_runner import TorchRunner

    with TorchRunner(*made[:2], engine.contract) as runner:
        yield runner


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forced", FORCED, ids=["scores", "mixed", "skip", "execute"])
def test_batch_of_unequal_lengths_equals_pytorch(
    engine: BufferRunner, reference: TorchRunner, forced: Any
) -> None:
    """Prefill of padded prompts, steps, and several tokens at once."""
    from mskip.exporters.runner import left_padded

    ids, mask = left_padded(PROMPTS, 0)
    expected = reference.prefill(ids, mask, routing=forced)
    found = engine.prefill(ids, mask, routing=forced)
    np.testing.assert_array_equal(found.routing, expected.routing)
    close(found.scores, expected.scores)
    close(found.logits[mask == 1], expected.logits[mask == 1])
    rng = np.random.default_rng(0)
    for new in (1, 1, 3):
        tokens = rng.integers(3, 90, (len(ids), new))
        expected, found = reference.extend(expected, tokens), engine.extend(found, tokens)
        close(found.logits, expected.logits)


def test_one_sequence_in_chunks_up_to_its_capacity(
    engine: BufferRunner, reference: TorchRunner
) -> None:
    from mskip.compressor.errors import ArtifactError

    ids = np.array([PROMPTS[1]])
    expected, found = reference.prefill(ids), engine.prefill(ids)
    rng = np.random.default_rng(0)
    for new in (4, CAPACITY - ids.shape[1] - 4):
        tokens = rng.integers(3, 90, (1, new))
        expected, found = reference.extend(expected, tokens), engine.extend(found, tokens)
        close(found.logits, expected.logits)
    with pytest.raises(ArtifactError, match="exported for 32"):
        engine.extend(found, np.array([[5]]))
    with pytest.raises(ArtifactError, match="--profile context=33"):
        engine.prefill(np.full((1, CAPACITY + 1), 5))


def test_dense_peer_executes_everything(made: Made, reference: TorchRunner) -> None:
    from mskip.exporters.opening import open_runner

    ids = np.array([PROMPTS[1]])
    found = open_runner(made[2], "dense.onnx", threads=1).prefill(ids)
    everything = np.ones((1, len(ROUTED)), dtype=np.int64)
    close(found.logits, reference.prefill(ids, routing=everything).logits)


def test_has_the_form_that_the_build_matrix_asks_for(made: Made, engine: BufferRunner) -> None:
    """docs/tensorrt.md: writes at the top level, conditionals side by side, equal ranks."""
    import onnx

    graph = onnx.load(made[2] / "model.onnx", load_external_data=False).graph
    top = [node.op_type for node in graph.node]
    assert top.count("TensorScatter") == 2 * engine.contract.layers
    attends = engine.contract.granularity != "mlp"
    assert top.count("If") == (2 if attends else 1) * len(ROUTED)
    refused = {"TensorScatter", "If", "NonZero", "Attention", "Compress"}
    for node in graph.node:
        assert node.domain == ""
        if node.op_type != "If":
            continue
        branches = {attribute.name: attribute.g for attribute in node.attribute}
        for branch in branches.values():
            assert branch.node
            assert not refused & {each.op_type for each in branch.node}
        counts = {len(branch.output) for branch in branches.values()}
        assert counts == {len(node.output)}
    sizes = {
        spec.name: [axis.dim_value for axis in spec.type.tensor_type.shape.dim]
        for spec in graph.input
    }
    assert sizes["past_key_values.0.key"][2] == sizes["attention_mask"][1] == CAPACITY


def test_skipped_sublayers_do_not_run(made: Made, engine: BufferRunner) -> None:
    from mskip.exporters.laziness import profiled

    if engine.contract.granularity == "mlp":
        pytest.skip("its attention always runs")
    ids = np.array([PROMPTS[1]])
    nothing, softmax = profiled(made[2], ids, 0)
    assert nothing == 0
    # One more for each attention that runs, in a prefill and a step; experts have others.
    assert profiled(made[2], ids, 1)[1] - softmax == 2 * len(ROUTED)


def test_generation_equals_pytorch(engine: BufferRunner, reference: TorchRunner) -> None:
    expected = reference.generate(PROMPTS, 8)
    found = engine.generate(PROMPTS, 8)
    assert found.tokens == expected.tokens
    np.testing.assert_array_equal(found.routing, expected.routing)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_half_precision_stays_near_pytorch_in_float32(
    make_tokenizer: Callable[..., Any], tmp_path: Path, dtype: str, limit: float
) -> None:
    """The types of an engine are its graph's; relative to the largest logit."""
    from mskip.compressor.models import BaseModel
    from mskip.exporters.opening import open_runner
    from mskip.exporters.torch_runner import TorchRunner

    tokenizer = make_tokenizer()
    whole = BaseModel(make("llama"), tokenizer, None, "")  # type: ignore[arg-type]
    _, routers = exported(tmp_path, tokenizer, dtype=dtype)
    ids = np.array([PROMPTS[1]])
    try:
        engine = open_runner(tmp_path, threads=1)
    except Exception as error:
        if dtype == "bfloat16" and "NOT_IMPLEMENTED" in str(error):
            pytest.xfail("this ONNX Runtime has no such kernel on CPU")
        raise
    assert engine.contract.dtype == dtype
    with TorchRunner(whole, routers, engine.contract) as reference:
        for routing in (np.ones((1, 3), int), np.zeros((1, 3), int)):
            expected = reference.prefill(ids, routing=routing)
            found = engine.prefill(ids, routing=routing)
            scale = np.abs(expected.logits).max()
            assert np.abs(found.logits - expected.logits).max() < limit * scale
            expected, found = (
                runner.extend(state, np.array([[9]]))
                for runner, state in ((reference, expected), (engine, found))
            )
            assert np.abs(found.logits - expected.logits).max() < limit * scale
