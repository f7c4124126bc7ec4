"""The graph of every row of the table of architectures, against PyTorch.

Here a tiny model of each row with routed attention; `make families` runs every model and
granularity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from architectures import MODELS, make, row_of
from forced import batch_of, forced_logits
from random_routers import routers_of

if TYPE_CHECKING:
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers
    from mskip.compressor.sublayers import Granularity
    from mskip.exporters.ort_runner import OrtRunner
    from mskip.exporters.runner import Runner
    from mskip.exporters.torch_runner import TorchRunner

ROUTED = [1, 2, 3]
TAU = [0.5] * len(ROUTED)
STATIC = 2
"""The layer that the static peer lacks."""
LIMIT = 1e-4
"""Largest difference of logits, float32; they are of the order of one."""


LATER = {"mistral", "qwen2", "stablelm", "gpt_neox", "falcon, one norm"}
"""Second models of a row, left to `make families`: an export costs many seconds."""


def _cases() -> list[Any]:
    from mskip.compressor.families import FAMILIES

    return [
        pytest.param(
            (name, kind),
            id=f"{name}-{kind}",
            # One process for a case, which is exported once.
            marks=[pytest.mark.xdist_group(f"{name}-{kind}")]
            + ([] if kind == "attention" and name not in LATER else [pytest.mark.matrix]),
        )
        for name in MODELS
        for kind in sorted(FAMILIES[row_of(name)].granularities)
    ]


@pytest.fixture(scope="module", params=_cases())
def case(request: pytest.FixtureRequest) -> tuple[str, Granularity]:
    chosen: tuple[str, Granularity] = request.param
    return chosen


@pytest.fixture(autouse=True)
def _in_matrix(request: pytest.FixtureRequest, record_property: Callable[..., None]) -> None:
    if "case" in request.fixturenames:
        name, kind = request.getfixturevalue("case")
        record_property("family", [name, kind, "ONNX"])


@pytest.fixture(scope="module")
def base(case: tuple[str, Granularity], make_tokenizer: Callable[..., Any]) -> BaseModel:
    return tiny(case[0], make_tokenizer)


def tiny(name: str, make_tokenizer: Callable[..., Any]) -> BaseModel:
    from mskip.compressor.models import BaseModel

    return BaseModel(make(name), make_tokenizer(), None, "")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def routers(case: tuple[str, Granularity]) -> Routers:
    """Of a block with compensation, which has the norm before the block in it."""
    return routers_of(ROUTED, case[1], compensated=case[1] == "block")


def exported(base: BaseModel, routers: Routers, folder: Path) -> Path:
    from mskip.exporters.onnx_export import contract_of, export_onnx

    export_onnx(base, routers, contract_of(base, routers, TAU, 21), folder, [STATIC])
    return folder


@pytest.fixture(scope="module")
def folder(base: BaseModel, routers: Routers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(base, routers, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> OrtRunner:
    from mskip.exporters.ort_runner import OrtRunner

    return OrtRunner(folder, threads=1)


@pytest.fixture
def reference(base: BaseModel, routers: Routers, engine: OrtRunner) -> Iterator[TorchRunner]:
    from mskip.exporters.torch_runner import TorchRunner

    with TorchRunner(base, routers, engine.contract) as runner:
        yield runner


MIXED = [[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]]


def run(runner: Runner, routing: list[list[int]]) -> np.ndarray:
    """Of prompts of 3 to 8 tokens, shorter and longer than a window, and four more tokens."""
    return forced_logits(runner, *batch_of(6), np.array(routing, dtype=np.int64))


def close(found: np.ndarray, expected: np.ndarray, limit: float = LIMIT) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


def test_decisions_are_pytorchs(engine: OrtRunner, reference: TorchRunner) -> None:
    ids, mask = batch_of(6)
    expected, found = reference.prefill(ids, mask), engine.prefill(ids, mask)
    assert 0 < expected.routing.mean() < 1
    np.testing.assert_array_equal(found.routing, expected.routing)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gates", ["mixed", "skip", "execute"])
def test_logits_are_pytorchs_with_decisions_forced(
    gates: str, engine: OrtRunner, reference: TorchRunner
) -> None:
    routing = {"mixed": MIXED, "skip": [[0, 0, 0]] * 6, "execute": [[1, 1, 1]] * 6}[gates]
    close(run(engine, routing), run(reference, routing))


def test_the_dense_peer_is_the_model(
    folder: Path, base: BaseModel, routers: Routers, reference: TorchRunner
) -> None:
    from mskip.exporters.onnx_export import DENSE
    from mskip.exporters.ort_runner import OrtRunner

    close(run(OrtRunner(folder, DENSE, threads=1), [[]] * 6), run(reference, [[1, 1, 1]] * 6))


def test_the_static_peer_lacks_its_sublayer(
    folder: Path, base: BaseModel, case: tuple[str, Granularity], engine: OrtRunner
) -> None:
    from mskip.exporters.onnx_export import STATIC as FILE
    from mskip.exporters.ort_runner import OrtRunner
    from mskip.exporters.torch_runner import TorchRunner

    gates = [int(layer != STATIC) for layer in ROUTED]
    plain = routers_of(ROUTED, case[1], compensated=False)
    with TorchRunner(base, plain, engine.contract) as reference:
        expected = run(reference, [gates] * 6)
    close(run(OrtRunner(folder, FILE, threads=1), [[]] * 6), expected)


def stored_types(path: Path) -> set[str]:
    """Of the weights; the routers, which stay float32, are left out."""
    import onnx

    stored = onnx.load(path, load_external_data=False).graph.initializer
    names = {onnx.TensorProto.DataType.Name(w.data_type) for w in stored if len(w.dims) == 2}
    return names - {"FLOAT"}


def widened(folder: Path, to: Path) -> Path:
    """A bfloat16 export with float32 in the place of bfloat16: same nodes, same values."""
    import onnx
    from onnx import AttributeProto, GraphProto, TensorProto, numpy_helper

    from mskip.exporters.contract import CONTRACT
    from mskip.exporters.onnx_export import MODEL

    def wide(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    def walk(graph: GraphProto) -> None:
        for tensor in graph.initializer:
            wide(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            if kind.elem_type == TensorProto.BFLOAT16:
                kind.elem_type = TensorProto.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    walk(attribute.g)
                elif attribute.type == AttributeProto.TENSOR:
                    wide(attribute.t)
                elif attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                    attribute.i = TensorProto.FLOAT

    model = onnx.load(folder / MODEL)
    walk(model.graph)
    to.mkdir()
    onnx.save(model, to / MODEL)
    contract = (folder / CONTRACT).read_text(encoding="utf-8")
    (to / CONTRACT).write_text(contract.replace("bfloat16", "float32"), encoding="utf-8")
    return to


def test_bfloat16(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    """It is written as such. ONNX Runtime's CPU has no kernels for it, so the very graph runs
    with its values widened, against PyTorch in float32 on the same values."""
    import torch

    from mskip.exporters.contract import CONTRACT, read_contract
    from mskip.exporters.onnx_export import MODEL
    from mskip.exporters.ort_runner import OrtRunner
    from mskip.exporters.torch_runner import TorchRunner

    base = tiny("llama", make_tokenizer)
    base.model.to(torch.bfloat16)
    routers = routers_of(ROUTED, "attention", compensated=False)
    exported(base, routers, tmp_path)
    assert stored_types(tmp_path / MODEL) == {"BFLOAT16"}
    assert read_contract(tmp_path / CONTRACT).dtype == "bfloat16"
    base.model.float()
    engine = OrtRunner(widened(tmp_path, tmp_path / "wide"), threads=1)
    with TorchRunner(base, routers, engine.contract) as reference:
        expected = run(reference, MIXED)
    # The graph's constants, such as the attention's scale, are bfloat16 too: 8 bits, 2^-9 each.
    close(run(engine, MIXED), expected, 4e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2, sliding"])
def test_half_precision(name: str, make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    """Weights, keys and logits are float16, against the same weights in float32 arithmetic.

    PyTorch's own float16 on a CPU is no reference: how its products round depends on the machine.
    """
    from mskip.exporters.onnx_export import MODEL
    from mskip.exporters.ort_runner import OrtRunner
    from mskip.exporters.torch_runner import TorchRunner

    base = tiny(name, make_tokenizer)
    base.model.half()
    routers = routers_of(ROUTED, "attention", compensated=False)
    engine = OrtRunner(exported(base, routers, tmp_path), threads=1)
    assert engine.contract.dtype == "float16"
    assert stored_types(tmp_path / MODEL) == {"FLOAT16"}
    base.model.float()
    with TorchRunner(base, routers, engine.contract) as reference:
        expected = run(reference, MIXED)
    close(run(engine, MIXED), expected, 1e-2)
