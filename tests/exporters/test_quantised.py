"""Weights of 8 and 4 bits: rounded and multiplied by ONNX Runtime, shared by branches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from architectures import make
from random_routers import routers_of

from mskip.compressor.errors import ModelError, MskipError
from mskip.compressor.models import BaseModel
from mskip.exporters.onnx_export import DENSE, MODEL, contract_of, export_onnx
from mskip.exporters.opening import open_runner
from mskip.exporters.quantised import BLOCK, quantise
from mskip.exporters.targets import Form

if TYPE_CHECKING:
    from mskip.exporters.contract import Weights
    from mskip.exporters.runner import Floats

BITS: dict[Weights, int] = {"int8": 8, "int4": 4}
ROUTED, TAU = [1, 2, 3], [0.5, 0.5, 0.5]
IDS = np.random.default_rng(0).integers(3, 90, (3, 12))
MIXED = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]])


def tied() -> Any:
    """A tiny model whose head reads its embedding."""
    model = make("qwen2")
    model.config.tie_word_embeddings = True
    model.resize_token_embeddings(400)  # the exporter folds smaller matrices
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def apart(found: Any, expected: Any) -> float:
    """Root of the mean square of the difference, over that of what is right."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def restored(matrix: Floats, bits: int) -> Floats:
    """A matrix after rounding, by the definition of the packed form."""
    packed, scales, zeros = quantise(matrix, bits)
    outputs, blocks, _ = packed.shape

    def unpacked(values: Any, count: int) -> Any:
        if bits == 4:
            values = np.stack([values & 15, values >> 4], axis=-1)
        return values.reshape(outputs, -1)[:, :count].astype(np.float32)

    whole = unpacked(packed, blocks * BLOCK).reshape(outputs, blocks, BLOCK)
    zero = unpacked(zeros.reshape(outputs, -1), blocks)[..., None]
    found = (whole - zero) * scales.reshape(outputs, blocks, 1)
    return np.asarray(found.reshape(outputs, -1)[:, : len(matrix)].T, dtype=np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(64, 5), (96, 3), (40, 7)])
def test_rounding_is_within_half_a_step(bits: int, shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)
    found = restored(matrix, bits)
    for first in range(0, len(matrix), BLOCK):
        block = matrix[first : first + BLOCK]
        low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
        step = (high - low) / (2**bits - 1)
        # Half a step of the weight and half a step of the zero point.
        assert (np.abs(found[first : first + BLOCK] - block) <= step * 1.01).all()


@pytest.fixture(scope="module", params=["int8", "int4"])
def weights(request: pytest.FixtureRequest) -> Weights:
    chosen: Weights = request.param
    return chosen


@pytest.fixture(scope="module")
def folder(
    weights: Weights, make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export with rounded weights of a model whose head is tied to its embedding."""
    base = BaseModel(tied(), make_tokenizer(), None, "")  # type: ignore[arg-type]
    routers = routers_of(ROUTED, "attention", compensated=True)
    place = tmp_path_factory.mktemp(weights)
    contract = contract_of(base, routers, TAU, 20, Form("ort", weights))
    export_onnx(base, routers, contract, place, [2])
    return place


def test_the_kernel_multiplies_by_the_rounded_weights(weights: Weights, folder: Path) -> None:
    """Against the dense model with weights rounded by hand, up to activations of 8 bits."""
    import torch

    model = tied()
    bits = BITS[weights]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                rounded = restored(module.weight.T.numpy(), bits)
                module.weight.copy_(torch.from_numpy(rounded.T.copy()))
        expected = model(torch.from_numpy(IDS)).logits.numpy()
        plain = tied()(torch.from_numpy(IDS)).logits.numpy()
    found = open_runner(folder, DENSE, threads=1).prefill(IDS).logits
    # Activations of 8 bits put half a percent on each of 36 products, one after another.
    assert apart(found, expected) < 0.05
    # It is the rounded model that was computed, not the one before.
    if weights == "int4":
        assert apart(found, plain) > 5 * apart(found, expected)


def test_every_matrix_but_the_compensation_is_rounded(weights: Weights, folder: Path) -> None:
    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    matrices = {each.name: each for each in graph.initializer if len(each.dims) == 2}
    left = [
        name
        for name, each in matrices.items()
        if each.data_type == onnx.TensorProto.FLOAT and ".scales" not in name
    ]
    assert left
    assert all(".compensation." in name for name in left)
    assert not any(name.endswith(".T") for name in matrices)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GatherBlockQuantized") == 1  # the embedding, which the head reads, too
    assert "Gemm" not in kinds


def test_decisions_batches_and_caches_work_as_with_float(folder: Path) -> None:
    runner = open_runner(folder, threads=1)
    together = runner.prefill(IDS, routing=MIXED)
    steps = [runner.extend(together, IDS[:, :1])]
    steps.append(runner.extend(steps[0], IDS[:, 1:2]))
    for row in range(len(IDS)):
        alone = runner.prefill(IDS[[row]], routing=MIXED[[row]])
        np.testing.assert_allclose(alone.logits[0], together.logits[row], atol=1e-4)
        for column, step in enumerate(steps):
            alone = runner.extend(alone, IDS[[row], column : column + 1])
            np.testing.assert_allclose(alone.logits[0], step.logits[row], atol=1e-4)
    free = runner.prefill(IDS)
    assert set(free.routing.ravel().tolist()) <= {0, 1}
    np.testing.assert_array_equal(free.routing, free.scores >= 0.5)


def test_weights_of_other_types_are_refused(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    base = BaseModel(make("qwen2").to(torch.float16), make_tokenizer(), None, "")  # type: ignore[arg-type]
    routers = routers_of(ROUTED, "attention", compensated=False)
    contract = contract_of(base, routers, TAU, 20, Form("ort", "int8"))
    with pytest.raises(ModelError, match="made from float32 ones; these are FLOAT16"):
        export_onnx(base, routers, contract, tmp_path, [2])


def test_standard_operators_have_no_rounded_weights() -> None:
    with pytest.raises(MskipError, match="need ONNX Runtime's own operators"):
        Form("portable", "int4")
