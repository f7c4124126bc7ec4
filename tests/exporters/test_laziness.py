"""A graph is lazy where a skipped attention does not run, and caught where it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest

from mskip.exporters.builder import Builder, branch_prefix
from mskip.exporters.contract import CONTRACT
from mskip.exporters.layers import SUBLAYER
from mskip.exporters.laziness import branch_nodes, filled, measure_laziness
from mskip.exporters.onnx_export import DATA, MODEL

if TYPE_CHECKING:
    from conftest import Exported


@pytest.fixture(scope="module")
def prompts(random_prompts: Callable[..., list[list[int]]]) -> list[list[int]]:
    """A few prompts."""
    return random_prompts([3, 9, 5, 1], seed=3)


def write_profile(path: Path, *nodes: tuple[str, str]) -> Path:
    events: list[dict[str, Any]] = [{"cat": "Session", "name": "layers.1.attention/whole"}]
    for name, kind in nodes:
        events.append({"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": kind}})
    path.write_text(json.dumps(events), encoding="utf-8")
    return path


def test_a_profile_is_counted(exported: Exported, tmp_path: Path) -> None:
    profile = write_profile(
        tmp_path / "profile.json",
        ("layers.1.attention/MatMul.7", "MatMul"),
        ("layers.1.attention/Softmax.9", "Softmax"),
        ("layers.11.attention/MatMul.7", "MatMul"),
        ("layers.1.skip/Expand.1", "Expand"),
        ("if.layers.1.attention", "If"),
        ("node_softmax", "Softmax"),
    )
    for layers, inside in (([1], 2), ([1, 11], 3), ([2], 0)):
        assert branch_nodes(profile, replace(exported.contract, routed_layers=layers)) == (
            inside,
            2,
        )
    mlp = replace(exported.contract, routed_layers=[1], granularity="mlp")
    assert branch_nodes(profile, mlp) == (0, 2)


def test_filled_is_real_text_of_the_asked_length() -> None:
    ids = filled([[1, 2, 3], [4, 5]], 7, batch=3)
    assert ids.shape == (3, 7)
    assert ids.dtype.name == "int64"
    assert ids[0].tolist() == [1, 2, 3, 4, 5, 1, 2]
    assert len({tuple(row) for row in ids.tolist()}) == 3


@pytest.mark.usefixtures("brief")
def test_the_export_is_lazy(exported: Exported, prompts: list[list[int]]) -> None:
    found = measure_laziness(exported.folder, prompts)
    assert found["skipped_branch_nodes"] == 0
    assert found["executed_branch_nodes"] > 2 * 3 * 10  # two calls, three layers
    # One softmax for each attention that ran, in a prefill and a step.
    assert found["softmax_kernels"] == {"skip": 2 * 1, "execute": 2 * 4}
    assert found["ratio"] == found["execute_ms"] / found["skip_ms"]


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("renamed", [False, True], ids=["named", "renamed"])
def test_attention_that_always_runs_is_caught(
    renamed: bool, exported: Exported, prompts: list[list[int]], tmp_path: Path
) -> None:
    """The usual wrong graph computes every attention and ignores what was not asked for."""
    model = exported.base.model.model
    builder = Builder(
        exported.traced, lambda layer: dict(model.layers[layer].self_attn.named_parameters())
    )
    builder.take_decisions()
    for node in builder.placeholders(SUBLAYER):
        builder.inline_sublayer(node)
    graph = builder.finish(exported.contract)
    if renamed:
        for number, node in enumerate(graph.graph):
            node.name = f"node.{number}"
    else:
        names = [node.name or "" for node in graph.graph]
        for layer in exported.contract.routed_layers:
            assert any(name.startswith(branch_prefix(layer)) for name in names)
    ir.save(graph, tmp_path / MODEL, external_data=DATA)
    exported.contract.write(tmp_path / CONTRACT)
    found = measure_laziness(tmp_path, prompts)
    assert found["skipped_branch_nodes"] >= 2 * 3
    assert found["softmax_kernels"]["skip"] == found["softmax_kernels"]["execute"]
