"""Graphs of target "ort" against PyTorch, and the runner that keeps keys and values in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from architectures import MODELS, make
from random_routers import routers_of

if TYPE_CHECKING:
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers
    from mskip.compressor.sublayers import Granularity
    from mskip.exporters.fused_runner import FusedRunner
    from mskip.exporters.torch_runner import TorchRunner

ROUTED, STATIC, TAU = [1, 2, 3], 2, [0.5, 0.5, 0.5]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23, 24], [30], [40] * 6]
MIXED = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]])

# Falcon writes its attention into its modelling file and is refused, see below.
OTHERS = [
    (name, "attention") for name in MODELS if name != "llama" and not name.startswith("falcon")
]
# Heads as wide as the kernel wants them to turn them itself; what the others have is narrower.
WIDE: dict[str, Any] = {"head_dim": 16, "max_position_embeddings": 2048}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = [
    pytest.param(("llama", "attention", {}), id="llama"),
    pytest.param(("llama", "attention", WIDE), id="llama-wide"),
    pytest.param(("llama", "attention", {**WIDE, "rope_parameters": YARN}), id="llama-yarn"),
    *(
        pytest.param((*case, entries), id="-".join([*case, *entries]), marks=pytest.mark.matrix)
        for case in [*OTHERS, ("llama", "mlp"), ("llama", "block"), ("gemma2, sliding", "block")]
        for entries in ({}, WIDE)
        if not entries or case[0] in ("llama", "mistral, sliding", "smollm3, sliding", "qwen2")
    ),
]


def parts(
    name: str, kind: Granularity, entries: dict[str, Any], make_tokenizer: Callable[..., Any]
) -> tuple[BaseModel, Routers]:
    from mskip.compressor.models import BaseModel

    routers = routers_of(ROUTED, kind, compensated=True)
    model = make(name, entries=entries)
    return BaseModel(model, make_tokenizer(), None, ""), routers  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest,
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[BaseModel, Routers, Path]:
    """Model, routers and their export."""
    from mskip.exporters.onnx_export import contract_of, export_onnx
    from mskip.exporters.targets import Form

    base, routers = parts(*request.param, make_tokenizer)
    folder = tmp_path_factory.mktemp("fused")
    export_onnx(base, routers, contract_of(base, routers, TAU, 20, Form("ort")), folder, [STATIC])
    return base, routers, folder


@pytest.fixture
def engine(made: tuple[BaseModel, Routers, Path]) -> FusedRunner:
    from mskip.exporters.fused_runner import FusedRunner
    from mskip.exporters.opening import open_runner

    runner = open_runner(made[2], threads=1)
    assert isinstance(runner, FusedRunner)
    return runner


@pytest.fixture
def reference(made: tuple[BaseModel, Routers, Path], engine: FusedRunner) -> Iterator[TorchRunner]:
    from mskip.exporters.torch_runner import TorchRunner

    with TorchRunner(*made[:2], engine.contract) as runner:
        yield runner


def padded() -> tuple[Any, Any]:
    from mskip.exporters.runner import left_padded

    return left_padded(PROMPTS, 0)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forced", [None, MIXED], ids=["decided", "forced"])
def test_batch_of_unequal_lengths_equals_pytorch(
    engine: FusedRunner, reference: TorchRunner, forced: Any
) -> None:
    """Prefill of padded prompts with mixed decisions, steps, and several tokens at once."""
    ids, mask = padded()
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


def test_unequal_chunks_equal_pytorch(engine: FusedRunner, reference: TorchRunner) -> None:
    """Padding on either side of a chunk, as answers of unequal lengths have it.

    PyTorch runs each sequence alone: in a batch its sliding windows count padding among tokens.
    """
    ids, mask = padded()
    found = engine.prefill(ids, mask, routing=MIXED)
    alone = [
        reference.prefill(np.array([prompt]), routing=decisions[None])
        for prompt, decisions in zip(PROMPTS, MIXED, strict=True)
    ]
    rng = np.random.default_rng(0)
    right = np.arange(4) < np.array([[4], [2], [1], [3], [4], [0]])
    for new in (right, right[:, ::-1], np.ones((len(ids), 1), dtype=bool)):
        tokens = np.where(new, rng.integers(3, 90, new.shape), 0)
        found = engine.extend(found, tokens, new.astype(np.int64))
        for row in new.any(axis=1).nonzero()[0]:
            alone[row] = reference.extend(alone[row], tokens[row][new[row]][None])
            close(found.logits[row][new[row]], alone[row].logits[0])


def test_one_sequence_in_chunks_and_beyond_its_room(
    engine: FusedRunner, reference: TorchRunner
) -> None:
    """The buffer grows and keeps what is in it."""
    from mskip.exporters.buffered import ROOM

    ids = np.array([PROMPTS[1]])
    expected, found = reference.prefill(ids), engine.prefill(ids)
    close(found.logits, expected.logits)
    capacity = found.cache.buffers.capacity
    rng = np.random.default_rng(0)
    for new in (4, ROOM + 2 * ids.shape[1], 1):
        tokens = rng.integers(3, 90, (1, new))
        expected, found = reference.extend(expected, tokens), engine.extend(found, tokens)
        close(found.logits, expected.logits)
    assert found.cache.buffers.capacity > capacity


def test_last_logits_alone(engine: FusedRunner) -> None:
    ids, mask = padded()
    whole = engine.prefill(ids, mask, routing=MIXED)
    last = engine.prefill(ids, mask, routing=MIXED, last_only=True)
    assert last.logits.shape == (len(ids), 1, engine.contract.vocabulary)
    close(last.logits, whole.logits[:, -1:])


def test_peers_equal_forced_decisions(
    made: tuple[BaseModel, Routers, Path], reference: TorchRunner
) -> None:
    """The dense graph is the model; the static one is the model with nothing at the removed."""
    from mskip.exporters.onnx_export import DENSE
    from mskip.exporters.opening import open_runner

    ids, mask = padded()
    expected = reference.prefill(ids, mask, routing=np.ones_like(MIXED))
    found = open_runner(made[2], DENSE, threads=1).prefill(ids, mask)
    close(found.logits[mask == 1], expected.logits[mask == 1])


# -- what holds for one architecture holds for all --------------------------------------------


def llama_only(made: tuple[BaseModel, Routers, Path], engine: FusedRunner) -> None:
    if type(made[0].model).__name__ != "LlamaForCausalLM" or engine.contract.granularity == "mlp":
        pytest.skip("shown on one architecture")


def test_skipping_rows_take_no_memory(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    llama_only(made, engine)
    ids, mask = padded()
    state = engine.prefill(ids, mask, routing=MIXED)
    arrays = state.cache.buffers.arrays
    for layer, executing in zip(ROUTED, MIXED.sum(axis=0), strict=True):
        assert len(arrays[f"past_key_values.{layer}.key"]) == executing
    contract = engine.contract
    each = 2 * contract.kv_heads * contract.head_dim * 4 * ids.shape[1]
    always = contract.layers - len(ROUTED)
    assert engine.kv_bytes(state) == (always * len(ids) + MIXED.sum()) * each


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="tells no resident memory")
def test_unused_room_takes_no_memory_and_what_was_used_goes_back(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    """Also after as much was used and let go, when the heap would hand out used memory again."""
    from mskip.exporters.fused_runner import untouched

    llama_only(made, engine)

    def resident() -> int:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return int(next(x for x in lines if x.startswith("RssAnon")).split()[1]) * 1024

    size, before = 32 * 2**20, resident()
    for _ in range(3):
        array = untouched((4, 8, 2**18), np.dtype(np.float32))
        assert array.nbytes == size
        assert resident() - before < size // 8
        array[:] = 1
        assert resident() - before > size * 7 // 8
        del array
        assert resident() - before < size // 8


def test_a_step_writes_in_place(made: tuple[BaseModel, Routers, Path], engine: FusedRunner) -> None:
    """Its own position and nothing else: of a skipping layer nothing at all."""
    llama_only(made, engine)
    ids = np.array([PROMPTS[1]])
    state = engine.prefill(ids, routing=np.array([[1, 0, 1]]))
    before = {name: array.copy() for name, array in state.cache.buffers.arrays.items()}
    after = engine.extend(state, np.array([[9]]))
    assert after.cache.buffers is state.cache.buffers
    position = ids.shape[1]
    for name, array in after.cache.buffers.arrays.items():
        changed = (array != before[name]).any(axis=(0, 1, 3))
        assert changed.nonzero()[0].tolist() == ([] if ".2." in name else [position])
    assert not before["past_key_values.2.key"].any()


def test_going_back_refuses_what_was_overwritten(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    llama_only(made, engine)
    start = engine.prefill(np.array([PROMPTS[1]]))
    first = engine.extend(start, np.array([[9]]))
    second = engine.extend(start, np.array([[10]]))
    with pytest.raises(ValueError, match="overwritten"):
        engine.extend(first, np.array([[11]]))
    again = engine.extend(start, np.array([[9]]))
    close(again.logits, first.logits)
    assert np.abs(second.logits - first.logits).max() > 1e-3


def test_generation_equals_pytorch(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner, reference: TorchRunner
) -> None:
    """Prompts of unequal length, alone and after one prefix, which is used twice."""
    llama_only(made, engine)
    options: dict[str, Any] = {"routing": MIXED, "stop_at_end": False}
    expected = reference.generate(PROMPTS, 6, **options)
    assert engine.generate(PROMPTS, 6, **options).tokens == expected.tokens
    for decision in ([[1, 0, 1]], [[0, 1, 1]]):
        prefixes = [
            runner.prefill(np.array([PROMPTS[1]]), routing=np.array(decision))
            for runner in (reference, engine)
        ]
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[2:3]):
            expected, found = (
                runner.generate(prompts, 4, prefix=prefix, stop_at_end=False)
                for runner, prefix in zip((reference, engine), prefixes, strict=True)
            )
            assert found.tokens == expected.tokens


def test_sequences_are_taken_out_and_doubled(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    llama_only(made, engine)
    ids, mask = padded()
    token, rows = np.arange(10, 16)[:, None], [4, 0, 2, 4]
    state = engine.extend(engine.prefill(ids, mask, routing=MIXED), token)
    chosen = engine.select(state, rows)
    expected = engine.extend(state, token)
    found = engine.extend(chosen, token[rows])
    close(found.logits, expected.logits[rows])
    assert engine.kv_bytes(engine.select(state, [3])) < engine.kv_bytes(engine.select(state, [2]))
    engine.extend(state, token)
    with pytest.raises(ValueError, match="overwritten"):
        engine.select(expected, rows)


def test_a_step_allocates_nothing_that_grows(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    """Of the Python side, by tracemalloc; the runtime writes to bound memory."""
    import tracemalloc

    llama_only(made, engine)
    peaks = []
    for length in (20, 2000):
        state = engine.prefill(np.full((1, length), 7))
        for _ in range(3):
            state = engine.extend(state, np.array([[9]]))
        tracemalloc.start()
        state = engine.extend(state, np.array([[9]]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2000


@pytest.mark.parametrize(
    ("mask", "message"), [([[1, 0, 1]], "after its first token"), ([[1, 1, 0]], "after its first")]
)
def test_padding_among_tokens_is_refused(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner, mask: Any, message: str
) -> None:
    llama_only(made, engine)
    with pytest.raises(ValueError, match=message):
        engine.prefill(np.array([[5, 6, 7]]), np.array(mask))


def test_one_node_for_each_fused_form(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    import onnx

    from mskip.exporters.buffered import ROOM
    from mskip.exporters.onnx_export import DENSE

    llama_only(made, engine)
    graph = onnx.load(made[2] / DENSE, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    layers = engine.contract.layers
    assert kinds.count("GroupQueryAttention") == layers
    # The kernel turns heads that are wide enough, and takes what one product gives.
    wide = engine.contract.head_dim == 16
    assert kinds.count("RotaryEmbedding") == (0 if wide else 2 * layers)
    projections = [
        node
        for node in graph.node
        if any(f"{part}_proj.weight" in str(node.input) for part in "qkv")
    ]
    assert {node.op_type for node in projections} == {"MatMul"}
    assert len(projections) == layers * (1 if wide else 3)
    assert engine.contract.positions == (2048 + ROOM if wide else 0)
    # The sums of the residual stream are in the norms that follow them.
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * layers
    assert kinds.count("RMSNormalization") == 1
    # Tables and lengths are prepared once, and no head is taken apart and joined again.
    assert kinds.count("Reshape") + kinds.count("Slice") < layers + 5
    assert "Softmax" not in kinds
    assert "Pow" not in kinds


def test_sequences_longer_than_the_tables_are_refused(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    from mskip.compressor.errors import ArtifactError

    llama_only(made, engine)
    longest = engine.contract.positions
    if not longest:
        pytest.skip("no tables")
    state = engine.prefill(np.full((1, longest - 1), 7), last_only=True)
    state = engine.extend(state, np.array([[9]]))
    message = f"{longest + 1} positions, but this graph has tables for {longest}"
    with pytest.raises(ArtifactError, match=message):
        engine.extend(state, np.array([[9]]))
    with pytest.raises(ArtifactError, match=message):
        engine.prefill(np.full((1, longest + 1), 7))


def test_model_is_as_it_was_after_an_export(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    from transformers.models.llama import modeling_llama

    llama_only(made, engine)
    model = made[0].model
    assert model.config._attn_implementation != "mskip_fused"
    assert not any("forward" in vars(module) for module in model.modules())
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


def test_skipped_attention_does_not_run(
    made: tuple[BaseModel, Routers, Path], engine: FusedRunner
) -> None:
    """By the runtime's profile: kernels of the fused attention, one for each that executes."""
    from mskip.exporters.laziness import profiled

    llama_only(made, engine)
    ids = np.array([PROMPTS[1]])
    always = engine.contract.layers - len(ROUTED)
    assert profiled(made[2], ids, 0) == (0, 2 * always)
    inside, kernels = profiled(made[2], ids, 1)
    assert inside > 0
    assert kernels == 2 * engine.contract.layers


def test_attention_that_cannot_be_chosen_is_refused(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    from mskip.compressor.errors import ModelError
    from mskip.exporters.onnx_export import contract_of, export_onnx
    from mskip.exporters.targets import Form

    base, routers = parts("falcon", "attention", {}, make_tokenizer)
    contract = contract_of(base, routers, TAU, 20, Form("ort"))
    with pytest.raises(ModelError, match="no fused form"):
        export_onnx(base, routers, contract, tmp_path, [STATIC])
