"""Graphs of target "trt-plugin" on ONNX Runtime, against PyTorch and the conditional graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tiny_export import ROUTED, exported

if TYPE_CHECKING:
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers
    from mskip.exporters.ort_runner import OrtRunner

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23, 24], [30], [40] * 6]
MIXED = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
FORCED = [None, MIXED, np.zeros_like(MIXED), np.ones_like(MIXED)]
CASES = [
    pytest.param(("llama", "attention"), id="llama"),
    # A window, a limit of scores, norms after.
    pytest.param(("gemma2, sliding", "attention"), id="gemma2"),
    pytest.param(("llama", "mlp"), id="llama-mlp", marks=pytest.mark.matrix),
    pytest.param(("llama", "block"), id="llama-block", marks=pytest.mark.matrix),
]
Made = tuple["BaseModel", "Routers", Path]


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest,
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """Model, routers and a folder with both forms."""
    name, kind = request.param
    folder = tmp_path_factory.mktemp("plugin")
    for target in ("trt", "trt-plugin"):
        (folder / target).mkdir()
        base, routers = exported(folder / target, make_tokenizer(), name, kind, target=target)
    return base, routers, folder


def opened(made: Made, target: str = "trt-plugin", file: str = "model.onnx") -> OrtRunner:
    from mskip.exporters.opening import open_runner

    return open_runner(made[2] / target, file, threads=1)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forced", FORCED, ids=["scores", "mixed", "skip", "execute"])
def test_equals_pytorch_and_the_conditional_graph(made: Made, forced: Any) -> None:
    from mskip.exporters.runner import left_padded
    from mskip.exporters.torch_runner import TorchRunner

    ids, mask = left_padded(PROMPTS, 0)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, 90, (len(ids), new)) for new in (1, 1, 3)]

    def run(engine: Any) -> tuple[Any, Any, list[Any]]:
        state = engine.prefill(ids, mask, routing=forced)
        logits = [state.logits[mask == 1]]
        for each in tokens:
            state = engine.extend(state, each)
            logits.append(state.logits)
        return state.routing, state.scores, logits

    plugin, conditional = opened(made), opened(made, "trt")
    routing, scores, logits = run(plugin)
    with TorchRunner(*made[:2], plugin.contract) as reference:
        peers = [run(conditional), run(reference)]
    for expected_routing, expected_scores, expected in peers:
        np.testing.assert_array_equal(routing, expected_routing)
        close(scores, expected_scores)
        for one, other in zip(logits, expected, strict=True):
            close(one, other)


def test_generation_equals_pytorch(made: Made) -> None:
    from mskip.exporters.torch_runner import TorchRunner

    engine = opened(made)
    with TorchRunner(*made[:2], engine.contract) as reference:
        expected = reference.generate(PROMPTS, 8)
    assert engine.generate(PROMPTS, 8).tokens == expected.tokens


def test_dense_peer_executes_everything(made: Made) -> None:
    ids = np.array([PROMPTS[1]])
    everything = np.ones((1, len(ROUTED)), dtype=np.int64)
    expected = opened(made, "trt").prefill(ids, routing=everything)
    close(opened(made, file="dense.onnx").prefill(ids).logits, expected.logits)


def test_all_that_a_skip_saves_is_an_operator_of_ours(made: Made) -> None:
    """No conditional, no product with a routed sublayer's weight that is not told who executes."""
    import onnx

    model = onnx.load(made[2] / "trt-plugin" / "model.onnx", load_external_data=False)
    assert {each.name for each in model.functions} == {"RoutedLinear", "RoutedAttention"}
    kind = opened(made).contract.granularity
    nodes = model.graph.node
    assert not [node for node in nodes if node.op_type in ("If", "NonZero", "Softmax")]
    attentions = [node for node in nodes if node.op_type == "RoutedAttention"]
    assert len(attentions) == opened(made).contract.layers
    makers = {output: node for node in nodes for output in node.output}
    routed = [n for n in attentions if makers[n.input[4]].op_type == "Cast"]
    assert len(routed) == (0 if kind == "mlp" else len(ROUTED))
    prefixes = tuple(f"layers.{layer}.{kind}" for layer in ROUTED)
    readers = [
        node for node in nodes for name in node.input
        if name.startswith(prefixes) and name.endswith(("weight.T", "down", "up"))
    ]  # fmt: skip
    assert readers
    assert {node.op_type for node in readers} == {"RoutedLinear"}
    assert {makers[node.input[2]].op_type for node in readers} == {"Cast"}


def test_attention_that_cannot_be_chosen_is_refused(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    from mskip.compressor.errors import ModelError

    with pytest.raises(ModelError, match="--target trt"):
        exported(tmp_path, make_tokenizer(), "falcon", target="trt-plugin")
    assert not list(tmp_path.iterdir())
