"""Sequences that join and leave, against each of them alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from mskip.exporters.serving.batch import Batch
    from mskip.exporters.serving.graph import Graph

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23, 24], [30], [40] * 6]


@pytest.fixture
def graph(served_folder: Path) -> Graph:
    from mskip.exporters.serving.graph import LocalGraph, read_shape

    return LocalGraph(
        served_folder / "model.onnx", read_shape(served_folder / "contract.json"), threads=1
    )


@pytest.fixture
def batch(graph: Graph) -> Batch:
    from mskip.exporters.serving.batch import Batch

    return Batch(graph, 4, 64)


def alone(graph: Graph, prompt: list[int], tau: float, tokens: int) -> tuple[list[Any], Any]:
    """Logits of a prompt and its greedy continuation, and its decisions, in a batch of one."""
    from mskip.exporters.serving.batch import Batch

    batch = Batch(graph, 1, 64)
    logits, routing, _ = batch.join("x", prompt, [tau] * 3)
    seen = [logits.copy()]
    for _ in range(tokens):
        seen.append(batch.step([int(seen[-1].argmax())])[0].copy())
    return seen, routing


def test_a_sequence_equals_the_runner(served_folder: Path, graph: Graph) -> None:
    """Decisions, scores and greedy tokens of the runner that parity was proven with."""
    from mskip.exporters.opening import open_runner
    from mskip.exporters.serving.batch import Batch

    runner = open_runner(served_folder, threads=1)
    decided = set()
    for prompt in PROMPTS:
        expected = runner.generate([prompt], 6, stop_at_end=False)
        batch = Batch(graph, 1, 64)
        logits, routing, scores = batch.join("x", prompt, [0.5] * 3)
        tokens = [int(logits.argmax())]
        while len(tokens) < 6:
            tokens.append(int(batch.step(tokens[-1:])[0].argmax()))
        assert tokens == expected.tokens[0]
        np.testing.assert_array_equal(routing, expected.routing[0])
        np.testing.assert_allclose(scores, expected.scores[0], atol=1e-6)
        decided.add(tuple(routing.tolist()))
    assert len(decided) > 1, "prompts that all decide alike show nothing"


@pytest.mark.parametrize("seed", range(3))
def test_others_change_no_bit(graph: Graph, batch: Batch, seed: int) -> None:
    """Sequences join and leave at random, with thresholds of their own."""
    rng = random.Random(seed)
    taus = [rng.choice([0.0, 0.3, 0.5, 0.7, 1.1]) for _ in PROMPTS]
    expected = [alone(graph, p, t, 8) for p, t in zip(PROMPTS, taus, strict=True)]
    waiting, running, done = list(range(len(PROMPTS))), list[int](), 0
    at = dict.fromkeys(range(len(PROMPTS)), 0)
    crowds = set()
    while waiting or running:
        if waiting and len(running) < 4 and (not running or rng.random() < 0.6):
            one = waiting.pop(0)
            logits, routing, _ = batch.join(one, PROMPTS[one], [taus[one]] * 3)
            np.testing.assert_array_equal(routing, expected[one][1])
            assert np.array_equal(logits, expected[one][0][0])
            running.append(one)
            continue
        crowds.add(len(running))
        logits = batch.step([int(expected[one][0][at[one]].argmax()) for one in running])
        for index, one in enumerate(running):
            at[one] += 1
            assert np.array_equal(logits[index], expected[one][0][at[one]]), f"sequence {one}"
        for index in reversed(range(len(running))):
            if at[running[index]] == 8 or rng.random() < 0.1:
                batch.leave(index)
                running.pop(index)
                done += 1
    assert done == len(PROMPTS)
    assert max(crowds) > 2
    assert batch.kv_bytes == 0


def test_memory_is_of_executing_sequences_and_goes_back(batch: Batch) -> None:
    """What leaves is zero again: the kernel has its pages back."""
    shape = batch.shape
    each = 2 * shape.kv_heads * shape.head_dim * 4
    for prompt, tau in zip(PROMPTS[:3], (0.0, 1.1, 0.0), strict=True):
        batch.join(str(prompt), prompt, [tau] * 3)
    skipping = len(shape.cached) - len(shape.compact)
    assert batch.kv_bytes == each * (
        len(shape.cached) * (len(PROMPTS[0]) + len(PROMPTS[2])) + skipping * len(PROMPTS[1])
    )
    batch.step([5, 5, 5])
    for _ in range(3):
        batch.leave(0)
    assert batch.kv_bytes == 0
    for layer, parts in batch._buffers.items():
        for buffer in parts.values():
            assert not buffer.array.any(), f"layer {layer}"


@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("routed", [0, 1, 5])
def test_nobody_is_alone(sequences: int, routed: int) -> None:
    """No branch with a single row, and none that no sequence takes."""
    from mskip.exporters.serving.batch import MOST_COMPANY, company

    rng = np.random.default_rng(sequences)
    for _ in range(200):
        decisions = (rng.random((sequences, routed)) < rng.random()).astype(np.int64)
        more = company(decisions)
        assert len(more) <= MOST_COMPANY
        assert sequences + len(more) > 1
        whole = np.stack([*decisions, *more])
        for layer in range(routed):
            for branch in (0, 1):
                count = int((whole[:, layer] == branch).sum())
                assert count != 1
                assert count == 0 or (decisions[:, layer] == branch).any()
        lone = ((decisions.sum(axis=0) == 1) | (decisions.sum(axis=0) == sequences - 1)).any()
        assert bool(more) == bool(lone or sequences == 1)


def test_what_does_not_fit_is_refused(batch: Batch) -> None:
    with pytest.raises(ValueError, match="1 to"):
        batch.join("x", [], [0.5] * 3)
    with pytest.raises(ValueError, match="1 to"):
        batch.join("x", [5] * (batch.positions + 1), [0.5] * 3)
    for _ in range(4):
        batch.join("x", [5], [0.5] * 3)
    with pytest.raises(ValueError, match="full: 4"):
        batch.join("x", [5], [0.5] * 3)
    assert len(batch.rows) == 4


def test_a_graph_elsewhere_gives_the_same(served_folder: Path, graph: Graph) -> None:
    """Keys and values that travel to another model and back."""
    import onnxruntime

    from mskip.exporters.serving.batch import Batch
    from mskip.exporters.serving.graph import RemoteGraph

    session = onnxruntime.InferenceSession(served_folder / "model.onnx")
    names = [each.name for each in session.get_outputs()]

    def call(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    far = Batch(RemoteGraph(call, graph.shape), 4, 64)
    near = Batch(graph, 4, 64)
    for prompt, tau in zip(PROMPTS[:3], (0.5, 0.3, 1.1), strict=True):
        expected, found = (each.join("x", prompt, [tau] * 3) for each in (near, far))
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for _ in range(3):
        np.testing.assert_allclose(far.step([7, 8, 9]), near.step([7, 8, 9]), atol=1e-5)
    for each in (near, far):
        each.leave(1)
    np.testing.assert_allclose(far.step([7, 9]), near.step([7, 9]), atol=1e-5)


def test_a_portable_graph_is_refused(served_folder: Path, tmp_path: Path) -> None:
    from mskip.exporters.serving.graph import read_shape

    text = (served_folder / "contract.json").read_text(encoding="utf-8")
    (tmp_path / "contract.json").write_text(text.replace('"ort"', '"portable"'), encoding="utf-8")
    with pytest.raises(ValueError, match="in place"):
        read_shape(tmp_path / "contract.json")
