"""The graph of every granularity, with and without compensation, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from forced import batch_of, forced_logits

from mskip.compressor.sublayers import Granularity

if TYPE_CHECKING:
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers
    from mskip.exporters.ort_runner import OrtRunner
    from mskip.exporters.torch_runner import TorchRunner

LAYERS = [1, 2]
TAU = [0.5, 0.5]
CASES: list[tuple[Granularity, int]] = [
    ("attention", 4), ("mlp", 32), ("block", 0), ("block", 4),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-rank{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Granularity, int]:
    chosen: tuple[Granularity, int] = request.param
    return chosen


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> BaseModel:
    from mskip.compressor.models import load_base
    from mskip.compressor.recipe import ModelSpec

    return load_base(ModelSpec(name=str(tiny_folder)))


@pytest.fixture(scope="module")
def routers(
    case: tuple[Granularity, int], base: BaseModel, tiny_routers: Callable[..., Routers]
) -> Routers:
    """Random routers of the granularity, with a random compensation where it has a rank."""
    import torch

    from mskip.compressor.compensation import Compensation
    from mskip.compressor.router import Routers
    from mskip.compressor.sublayers import Sublayers

    granularity, rank = case
    plain = tiny_routers(base.model, layers=LAYERS)
    compensation = None
    if rank:
        compensation = Compensation(len(LAYERS), plain.hidden_size, rank)
        generator = torch.Generator().manual_seed(3)
        for value in compensation.parameters():
            value.data.normal_(std=0.3, generator=generator)
        compensation.requires_grad_(False)
    made = Routers(Sublayers(LAYERS, granularity, compensation), plain.hidden_size)
    made.load_state_dict(plain.state_dict())
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(base: BaseModel, routers: Routers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mskip.exporters.onnx_export import contract_of, export_onnx

    place = tmp_path_factory.mktemp("granularity")
    export_onnx(base, routers, contract_of(base, routers, TAU, 20), place, [2])
    return place


@pytest.fixture(scope="module")
def engine(folder: Path) -> OrtRunner:
    from mskip.exporters.ort_runner import OrtRunner

    return OrtRunner(folder, threads=1)


@pytest.fixture
def reference(base: BaseModel, routers: Routers, engine: OrtRunner) -> Iterator[TorchRunner]:
    from mskip.exporters.torch_runner import TorchRunner

    with TorchRunner(base, routers, engine.contract) as runner:
        yield runner


@pytest.mark.parametrize("gates", ["mixed", "skip", "execute"])
def test_logits_with_decisions_forced(
    gates: str, engine: OrtRunner, reference: TorchRunner
) -> None:
    ids, mask = batch_of(4)
    routing = {
        "mixed": np.array([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=np.int64),
        "skip": np.zeros((4, 2), dtype=np.int64),
        "execute": np.ones((4, 2), dtype=np.int64),
    }[gates]
    expected = forced_logits(reference, ids, mask, routing)
    np.testing.assert_allclose(
        forced_logits(engine, ids, mask, routing), expected, rtol=0, atol=2e-4
    )


def test_decisions_and_scores(engine: OrtRunner, reference: TorchRunner) -> None:
    ids, mask = batch_of(12)
    expected, found = reference.prefill(ids, mask), engine.prefill(ids, mask)
    assert 0 < expected.routing.mean() < 1
    np.testing.assert_array_equal(found.routing, expected.routing)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)


def test_keys_of_executing_rows_only(
    case: tuple[Granularity, int], engine: OrtRunner, reference: TorchRunner
) -> None:
    """A routed MLP leaves the cache alone."""
    ids, mask = batch_of(4)
    routing = np.array([[1, 0], [0, 0], [0, 0], [1, 0]], dtype=np.int64)
    state = engine.prefill(ids, mask, routing=routing)
    rows = [state.cache[f"past_key_values.{layer}.key"].shape()[0] for layer in range(4)]
    assert rows == ([4] * 4 if case[0] == "mlp" else [4, 2, 0, 4])
    assert engine.kv_bytes(state) == reference.kv_bytes(
        reference.prefill(ids, mask, routing=routing)
    )


@pytest.mark.parametrize(("file", "removed"), [("dense.onnx", []), ("static.onnx", [2])])
def test_peers_equal_forced_decisions(
    file: str, removed: list[int], case: tuple[Granularity, int], folder: Path,
    reference: TorchRunner,
) -> None:  # fmt: skip
    """Where nothing stands in for a skip, static removal is skipping always."""
    from mskip.exporters.ort_runner import OrtRunner

    if removed and case[1]:
        pytest.skip("the static peer has no compensation")
    ids, mask = batch_of(3)
    routing = np.array([[layer not in removed for layer in LAYERS]] * 3, dtype=np.int64)
    expected = forced_logits(reference, ids, mask, routing)
    found = forced_logits(OrtRunner(folder, file, threads=1), ids, mask, routing)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_skipping_reads_no_weight_of_the_sublayer(
    case: tuple[Granularity, int], folder: Path, engine: OrtRunner
) -> None:
    """No node of the then-branch runs when every sequence skips."""
    from mskip.exporters.laziness import profiled

    ids, _ = batch_of(1)
    assert profiled(folder, ids, 0)[0] == 0
    assert profiled(folder, ids, 1)[0] > 2 * len(LAYERS)
