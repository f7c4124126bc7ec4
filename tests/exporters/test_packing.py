"""Weights of branches within branches: where ONNX Runtime packs them, and nowhere twice on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_export import exported


@pytest.fixture(scope="module")
def folder(make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed")
    exported(place, make_tokenizer(), target="ort")
    return place


def places(tensors: Any) -> dict[str, tuple[str, ...]]:
    """File, offset and length of each tensor that lies in a file."""
    return {
        each.name: tuple(sorted(f"{entry.key}={entry.value}" for entry in each.external_data))
        for each in tensors
        if each.external_data
    }


def test_the_weights_within_are_the_same_bytes(folder: Path) -> None:
    """Four products and two maps a layer; each stands in the branch, and once in the file."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    own: dict[str, tuple[str, ...]] = {}
    for node in graph.node:
        for attribute in node.attribute:
            if any(inner.op_type == "If" for inner in attribute.g.node):
                own |= places(attribute.g.initializer)
    main = places(graph.initializer)
    assert len([name for name in own if "proj" in name]) == 3 * 4
    assert len([name for name in own if "compensation" in name]) == 3 * 2
    shared = [name for name, place in own.items() if place in main.values()]
    assert len(shared) == 3 * 4, "the other branch reads the same file at the same place"
    lengths = {place: int(place[0].partition("=")[2]) for place in {*own.values(), *main.values()}}
    assert sum(lengths.values()) <= (folder / "model.onnx.data").stat().st_size


def test_every_branch_reads_its_own(folder: Path) -> None:
    """No product within a branch of a branch reads a weight of the main graph."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    main = {each.name for each in graph.initializer}
    seen = 0
    for node in graph.node:
        for outer in node.attribute:
            for inner in (n for n in outer.g.node if n.op_type == "If"):
                for branch in inner.attribute:
                    for product in (n for n in branch.g.node if n.op_type == "MatMul"):
                        assert product.input[1] not in main
                        seen += 1
    assert seen >= 3 * (4 + 2 + 2)


def test_again_changes_nothing(folder: Path) -> None:
    from mskip.exporters.packing import own_weights

    assert own_weights(folder / "model.onnx") == 0


def test_mixed_rows_equal_rows_alone(folder: Path) -> None:
    """The graph as it runs: rows that decide differently, and each of them alone."""
    from mskip.exporters.opening import open_runner
    from mskip.exporters.runner import left_padded

    runner = open_runner(folder, threads=1)
    prompts = [[5, 6, 7], [8, 9, 10, 11], [3, 4]]
    routing = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]])
    ids, mask = left_padded(prompts, 0)
    state = runner.extend(runner.prefill(ids, mask, routing=routing), np.array([[5], [6], [7]]))
    for row, prompt in enumerate(prompts):
        alone = runner.prefill(np.array([prompt]), routing=routing[row : row + 1])
        alone = runner.extend(alone, np.array([[5 + row]]))
        np.testing.assert_allclose(state.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
