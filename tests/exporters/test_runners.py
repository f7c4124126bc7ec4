"""One contract, two engines: every case runs on both, and both must agree.

A case is a function that drives a runner and returns its states. `TestRunner` checks each
engine by itself against what must hold; `test_engines_agree` checks one against the other.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mskip.compressor.errors import ArtifactError, MissingExtraError
from mskip.exporters.onnx_export import CEILING, DENSE, MODEL, STATIC
from mskip.exporters.ort_runner import OrtRunner
from mskip.exporters.runner import Floats, Ints, Runner, State, left_padded, positions
from mskip.exporters.serving.sampling import Sampling
from mskip.exporters.torch_runner import TorchRunner

if TYPE_CHECKING:
    from conftest import Exported

CLOSE = 1e-4
LENGTHS = [3, 9, 5, 1, 7, 6, 4, 8]
MIXED = np.array(
    [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]]
)


def tokens(*shape: int, seed: int = 1) -> Ints:
    """Random tokens, none of them special."""
    return np.random.default_rng(seed).integers(4, 300, shape)


PROMPTS: list[list[int]] = [tokens(n, seed=n).tolist() for n in LENGTHS]
IDS, MASK = left_padded(PROMPTS, 2)


# -- cases ------------------------------------------------------------------------------------


def prefill(runner: Runner) -> list[State]:
    return [runner.prefill(IDS, MASK)]


def forced(runner: Runner) -> list[State]:
    return [runner.prefill(IDS, MASK, routing=MIXED)]


def half_forced(runner: Runner) -> list[State]:
    routing = MIXED.copy()
    routing[::2, 0] = routing[1::3, 1:] = -1
    return [runner.prefill(IDS, MASK, routing=routing)]


def all_execute(runner: Runner) -> list[State]:
    return decoded(runner.prefill(IDS, MASK, routing=np.ones_like(MIXED)), runner)


def all_skip(runner: Runner) -> list[State]:
    return decoded(runner.prefill(IDS, MASK, routing=np.zeros_like(MIXED)), runner)


def other_tau(runner: Runner) -> list[State]:
    return [runner.prefill(IDS, MASK, tau=tau) for tau in (0.0, 1.1, [0.0, 1.1, 0.5])]


def decoded(state: State, runner: Runner, steps: int = 3) -> list[State]:
    states = [state]
    for step in range(steps):
        states.append(runner.extend(states[-1], tokens(len(state.mask), 1, seed=step)))
    return states


def decoding(runner: Runner) -> list[State]:
    return decoded(runner.prefill(IDS, MASK), runner, 4)


def chunked(runner: Runner) -> list[State]:
    first = runner.prefill(IDS[:, :5], np.maximum(MASK[:, :5], [0, 0, 0, 0, 1]), routing=MIXED)
    second = runner.extend(first, IDS[:, 5:7])
    return [first, second, runner.extend(second, IDS[:, 7:])]


def one_token_prompt(runner: Runner) -> list[State]:
    return decoded(runner.prefill(tokens(4, 1)), runner)


def second_turn(runner: Runner) -> list[State]:
    answered = decoded(runner.prefill(IDS, MASK), runner)
    return decoded(runner.extend(answered[-1], tokens(8, 4)), runner)


def interleaved(runner: Runner) -> list[State]:
    first, second = runner.prefill(IDS[:3], MASK[:3]), runner.prefill(tokens(5, 4))
    states = [first, second]
    for step in range(3):
        first = runner.extend(first, tokens(3, 1, seed=step))
        second = runner.extend(second, tokens(5, 2, seed=step))
        states += [first, second]
    return states


def forked(runner: Runner) -> list[State]:
    state = runner.prefill(IDS, MASK)
    futures = [tokens(8, 2, seed=seed) for seed in (1, 2, 1)]
    return [state, *(runner.extend(state, future) for future in futures)]


def right_padded_chunk(runner: Runner) -> list[State]:
    chunk_mask = (np.arange(4) < np.array([4, 1, 3, 2, 4, 1, 2, 3])[:, None]).astype(np.int64)
    state = runner.extend(runner.prefill(IDS, MASK), tokens(8, 4) * chunk_mask, chunk_mask)
    return decoded(state, runner, 2)


def right_padded_prompts(runner: Runner) -> list[State]:
    mask = np.ascontiguousarray(MASK[:, ::-1])
    ids = np.full_like(IDS, 2)
    ids[mask == 1] = IDS[MASK == 1]
    return decoded(runner.prefill(ids, mask), runner)


Case = Callable[[Runner], list[State]]
CASES: list[Case] = [
    prefill, forced, half_forced, all_execute, all_skip, other_tau, decoding, chunked,
    one_token_prompt, second_turn, interleaved, forked, right_padded_chunk,
    right_padded_prompts,
]  # fmt: skip


def real_logits(state: State) -> Floats:
    """Logits on real tokens, [tokens, vocabulary]."""
    new = state.logits.shape[1]
    logits: Floats = state.logits[state.mask[:, -new:] == 1]
    return logits


def thresholds(runner: Runner) -> Floats:
    return np.asarray(runner.contract.tau, dtype=np.float32)


def assert_same(one: State, other: State) -> None:
    np.testing.assert_array_equal(one.routing, other.routing)
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5, equal_nan=True)
    np.testing.assert_allclose(real_logits(one), real_logits(other), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_engines_agree(case: Case, torch_runner: TorchRunner, ort_runner: OrtRunner) -> None:
    expected, found = case(torch_runner), case(ort_runner)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
        assert torch_runner.kv_bytes(one) == ort_runner.kv_bytes(other)


@given(st.data())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_engines_agree_on_anything(
    torch_runner: TorchRunner, ort_runner: OrtRunner, data: st.DataObject
) -> None:
    batch = data.draw(st.integers(1, 4), "batch")
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch), "lengths")
    row = st.lists(st.sampled_from([-1, 0, 1]), min_size=3, max_size=3)
    routing = np.array(data.draw(st.lists(row, min_size=batch, max_size=batch), "routing"))
    chunk = data.draw(st.integers(1, 4), "chunk")
    seed = data.draw(st.integers(0, 99), "seed")
    ids, mask = left_padded([tokens(n, seed=seed + n).tolist() for n in lengths], 2)
    states = []
    for runner in (torch_runner, ort_runner):
        first = runner.prefill(ids, mask, routing=routing)
        second = runner.extend(first, tokens(batch, chunk, seed=seed))
        states.append([first, second, runner.extend(second, tokens(batch, 1, seed=seed))])
    for one, other in zip(*states, strict=True):
        assert_same(one, other)
    given_ = routing >= 0
    np.testing.assert_array_equal(states[1][0].routing[given_], routing[given_])


# -- each by itself ---------------------------------------------------------------------------


class TestRunner:
    def test_decisions_are_mixed_and_follow_the_scores(self, runner: Runner) -> None:
        (state,) = prefill(runner)
        assert ((state.routing == 0).any(axis=0) & (state.routing == 1).any(axis=0)).all()
        taken = state.scores >= thresholds(runner)
        np.testing.assert_array_equal(state.routing, taken)
        assert state.logits.shape == (*IDS.shape, runner.contract.vocabulary)
        assert state.routing.dtype.name == "int64"
        assert state.scores.dtype.name == "float32"

    def test_padding_and_batch_mates_change_nothing(self, runner: Runner) -> None:
        (together,) = prefill(runner)
        for row, prompt in enumerate(PROMPTS):
            alone = runner.prefill(np.array([prompt]))
            np.testing.assert_array_equal(alone.routing[0], together.routing[row])
            np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-5)
            expected = together.logits[row, -len(prompt) :]
            np.testing.assert_allclose(alone.logits[0], expected, atol=CLOSE)

    def test_all_execute_is_the_dense_model(self, runner: Runner, exported: Exported) -> None:
        import torch

        states = all_execute(runner)
        fed = np.concatenate([IDS, *(tokens(8, 1, seed=step) for step in range(3))], axis=1)
        mask = states[-1].mask
        with torch.no_grad():
            dense = exported.base.model(
                torch.from_numpy(fed),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions(mask, fed.shape[1])),
            ).logits.numpy()
        found = np.concatenate([state.logits for state in states], axis=1)
        np.testing.assert_allclose(found[mask == 1], dense[mask == 1], atol=CLOSE)

    def test_every_decision_matters(self, runner: Runner) -> None:
        (state,) = forced(runner)
        for index in range(3):
            other = MIXED.copy()
            other[:, index] ^= 1
            (changed,) = [runner.prefill(IDS, MASK, routing=other)]
            difference = np.abs(changed.logits[:, -1] - state.logits[:, -1]).max(axis=-1)
            assert (difference > 100 * CLOSE).all()

    def test_tau_overrides(self, runner: Runner) -> None:
        execute, skip, layered = other_tau(runner)
        assert (execute.routing == 1).all()
        assert (skip.routing == 0).all()
        np.testing.assert_array_equal(layered.routing[:, :2], [[1, 0]] * 8)
        assert_same(all_execute(runner)[0], replace(execute, scores=np.full((8, 3), np.nan)))
        assert_same(all_skip(runner)[0], replace(skip, scores=np.full((8, 3), np.nan)))

    def test_given_decisions_are_obeyed_and_not_scored(self, runner: Runner) -> None:
        (state,) = forced(runner)
        np.testing.assert_array_equal(state.routing, MIXED)
        assert np.isnan(state.scores).all()

    def test_open_decisions_among_given_ones_are_taken(self, runner: Runner) -> None:
        (state,) = half_forced(runner)
        open_ = np.zeros_like(MIXED, dtype=bool)
        open_[::2, 0] = open_[1::3, 1:] = True
        np.testing.assert_array_equal(np.isnan(state.scores), ~open_)
        np.testing.assert_array_equal(state.routing[~open_], MIXED[~open_])
        taken = state.scores >= thresholds(runner)
        np.testing.assert_array_equal(state.routing[open_], taken[open_])

    def test_scores_and_decisions_stay_with_the_sequences(self, runner: Runner) -> None:
        first, *later = decoding(runner)
        for state in later:
            np.testing.assert_array_equal(state.routing, first.routing)
            np.testing.assert_array_equal(state.scores, first.scores)

    def test_decoding_is_prefilling_the_longer_text(self, runner: Runner) -> None:
        states = decoding(runner)
        fed, mask = IDS, MASK
        for step, state in enumerate(states[1:]):
            fed = np.concatenate([fed, tokens(8, 1, seed=step)], axis=1)
            mask = np.concatenate([mask, np.ones_like(fed[:, :1])], axis=1)
            whole = runner.prefill(fed, mask, routing=states[0].routing)
            np.testing.assert_allclose(state.logits[:, -1], whole.logits[:, -1], atol=CLOSE)

    def test_chunks_are_the_whole(self, runner: Runner) -> None:
        states = chunked(runner)
        whole = runner.prefill(IDS, states[-1].mask, routing=MIXED)
        logits = np.concatenate([state.logits for state in states], axis=1)
        real = whole.mask == 1
        np.testing.assert_allclose(logits[real], whole.logits[real], atol=CLOSE)

    def test_one_token_prompt(self, runner: Runner) -> None:
        first, *later = one_token_prompt(runner)
        assert np.isfinite(first.scores).all()
        fed = np.concatenate([tokens(4, 1), *(tokens(4, 1, seed=s) for s in range(3))], axis=1)
        whole = runner.prefill(fed, routing=first.routing)
        np.testing.assert_allclose(later[-1].logits[:, -1], whole.logits[:, -1], atol=CLOSE)

    def test_second_turn(self, runner: Runner) -> None:
        (first,) = prefill(runner)
        states = second_turn(runner)
        steps = [tokens(8, 1, seed=step) for step in range(3)]
        fed = np.concatenate([IDS, *steps, tokens(8, 4), *steps], axis=1)
        whole = runner.prefill(fed, states[-1].mask, routing=first.routing)
        turn = slice(IDS.shape[1] + 3, IDS.shape[1] + 7)
        np.testing.assert_allclose(states[0].logits, whole.logits[:, turn], atol=CLOSE)
        np.testing.assert_allclose(states[-1].logits[:, -1], whole.logits[:, -1], atol=CLOSE)

    def test_interleaved_generations_do_not_meet(self, runner: Runner) -> None:
        states = interleaved(runner)
        alone = decoded(runner.prefill(IDS[:3], MASK[:3]), runner)
        for one, other in zip(states[::2], alone, strict=True):
            assert_same(one, other)
        second = runner.prefill(tokens(5, 4))
        for step, state in enumerate(states[3::2]):
            second = runner.extend(second, tokens(5, 2, seed=step))
            assert_same(state, second)

    def test_a_state_can_be_extended_twice(self, runner: Runner) -> None:
        state, one, other, again = forked(runner)
        np.testing.assert_array_equal(one.logits, again.logits)
        assert np.abs(one.logits - other.logits).max() > CLOSE
        assert_same(state, prefill(runner)[0])

    def test_padding_on_the_right_of_a_chunk(self, runner: Runner) -> None:
        states = right_padded_chunk(runner)
        chunk = tokens(8, 4)
        steps = np.concatenate([tokens(8, 1, seed=step) for step in range(2)], axis=1)
        for row, kept in enumerate([4, 1, 3, 2, 4, 1, 2, 3]):
            text = np.concatenate([PROMPTS[row], chunk[row, :kept], steps[row]])[None]
            alone = runner.prefill(text, routing=states[0].routing[[row]])
            np.testing.assert_allclose(
                states[0].logits[row, kept - 1], alone.logits[0, -3], atol=CLOSE
            )
            np.testing.assert_allclose(states[-1].logits[row, -1], alone.logits[0, -1], atol=CLOSE)

    def test_prompts_padded_on_the_right(self, runner: Runner) -> None:
        left, right = decoded(prefill(runner)[0], runner), right_padded_prompts(runner)
        np.testing.assert_array_equal(left[0].routing, right[0].routing)
        for one, other in zip(left, right, strict=True):
            np.testing.assert_allclose(real_logits(one), real_logits(other), atol=CLOSE)

    def test_cache_holds_executing_rows_only(self, runner: Runner) -> None:
        contract = runner.contract
        position = 2 * 4 * contract.kv_heads * contract.head_dim  # keys and values, float32
        for state in (*forced(runner), *all_skip(runner), *decoding(runner)):
            rows = len(state.routing) + int(state.routing.sum())
            assert runner.kv_bytes(state) == rows * state.mask.shape[1] * position

    def test_generation_is_prefilling_the_growing_text(self, runner: Runner) -> None:
        result = runner.generate(PROMPTS, 6, stop_at_end=False)
        assert [len(each) for each in result.tokens] == [6] * 8
        (first,) = prefill(runner)
        np.testing.assert_array_equal(result.routing, first.routing)
        np.testing.assert_array_equal(result.scores, first.scores)
        for row in (0, 1, 3):
            text = list(PROMPTS[row])
            for token in result.tokens[row]:
                state = runner.prefill(np.array([text]), routing=result.routing[[row]])
                assert token == state.logits[0, -1].argmax()
                text.append(token)

    def test_generation_obeys_tau_and_routing(self, runner: Runner) -> None:
        skipping = runner.generate(PROMPTS, 3, tau=1.1, stop_at_end=False)
        assert (skipping.routing == 0).all()
        told = runner.generate(PROMPTS, 3, routing=np.zeros_like(MIXED), stop_at_end=False)
        assert told.tokens == skipping.tokens
        assert np.isnan(told.scores).all()

    def test_generation_stops_at_the_end_token(
        self, runner: Runner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = runner.generate(PROMPTS, 6, stop_at_end=False).tokens
        ends = [free[0][2], free[1][0]]
        monkeypatch.setattr(runner, "contract", replace(runner.contract, eos=ends))
        steps = list(runner.stream(PROMPTS, 6))
        stopped = runner.generate(PROMPTS, 6)
        for row, whole in enumerate(free):
            at = next((i for i, token in enumerate(whole) if token in ends), len(whole))
            assert stopped.tokens[row] == whole[:at]
            assert stopped.ended[row] == ("length" if at == len(whole) else "end")
            given = [step.tokens[row] for step in steps]
            assert given == whole[:at] + [None] * (len(steps) - at)
        assert stopped.tokens[1] == []
        # Alone, the first prompt ends the call with its own end.
        at = next(i for i, token in enumerate(free[0]) if token in ends)
        assert len(list(runner.stream(PROMPTS[:1], 6))) == at + 1

    def test_a_sequence_that_has_ended_reads_nothing_more(
        self, runner: Runner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another turn after an answer goes on from its tokens, not from what the others wrote."""
        free = runner.generate(PROMPTS[:2], 6, stop_at_end=False).tokens
        end = next(t for t in free[0] if t not in free[1])
        monkeypatch.setattr(runner, "contract", replace(runner.contract, eos=[end]))
        done = runner.generate(PROMPTS[:2], 6)
        assert done.ended == ["end", "length"]
        answer = done.tokens[0]
        turn = [5, 6]
        more = runner.generate([turn, turn], 3, prefix=done.state, stop_at_end=False)
        text = [*PROMPTS[0], *answer, *turn]
        alone = runner.generate([text], 3, routing=done.routing[:1], stop_at_end=False)
        assert more.tokens[0] == alone.tokens[0]

    def test_one_prefix_for_all_prompts(self, runner: Runner) -> None:
        system = tokens(6, seed=40).tolist()
        prefix = runner.prefill(np.array([system]), routing=MIXED[:1])
        found = runner.generate(PROMPTS, 4, prefix=prefix, stop_at_end=False)
        again = runner.generate(PROMPTS[:1], 4, prefix=prefix, stop_at_end=False)
        whole = [system + prompt for prompt in PROMPTS]
        routing = np.repeat(prefix.routing, len(PROMPTS), axis=0)
        expected = runner.generate(whole, 4, routing=routing, stop_at_end=False)
        assert found.tokens == expected.tokens
        assert again.tokens == expected.tokens[:1]
        np.testing.assert_array_equal(found.scores, np.repeat(prefix.scores, len(PROMPTS), axis=0))

    def test_decisions_of_a_prefix_stay(self, runner: Runner) -> None:
        prefix = runner.prefill(IDS, MASK)
        with pytest.raises(ValueError, match="taken with the prefix"):
            runner.generate(PROMPTS, 1, prefix=prefix, tau=0.1)

    def test_sequences_are_taken_out_doubled_and_put_in_another_order(self, runner: Runner) -> None:
        rows = [3, 0, 6, 3]
        state = decoded(runner.prefill(IDS, MASK, routing=MIXED), runner)[-1]
        chosen = runner.select(state, rows)
        token = tokens(8, 1, seed=9)
        expected = runner.extend(state, token)
        found = runner.extend(chosen, token[rows])
        np.testing.assert_allclose(found.logits, expected.logits[rows], atol=CLOSE)
        np.testing.assert_array_equal(found.routing, expected.routing[rows])

    def test_draws_do_not_depend_on_the_batch(self, runner: Runner) -> None:
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=3)
        together = runner.generate(PROMPTS, 5, sampling=sampling, stop_at_end=False)
        assert (
            together.tokens
            == runner.generate(PROMPTS, 5, sampling=sampling, stop_at_end=False).tokens
        )
        alone = runner.generate(PROMPTS[:1], 5, sampling=sampling, stop_at_end=False)
        assert alone.tokens[0] == together.tokens[0]
        greedy = runner.generate(PROMPTS, 5, stop_at_end=False)
        assert greedy.tokens != together.tokens

    def test_stop_strings_end_a_sequence(self, runner: Runner) -> None:
        def decode(tokens: list[int]) -> str:
            return "".join(f"<{token}>" for token in tokens)

        free = runner.generate(PROMPTS, 6, stop_at_end=False).tokens
        stop = decode(free[0][2:4])[1:-1]  # from within one token to within another
        steps = list(runner.stream(PROMPTS, 6, stop=[stop], decode=decode, stop_at_end=False))
        found = runner.generate(PROMPTS, 6, stop=[stop], decode=decode, stop_at_end=False)
        for row, whole in enumerate(free):
            text = decode(whole)
            assert found.text[row] == text.split(stop)[0]
            assert found.ended[row] == ("stop" if stop in text else "length")
            assert "".join(step.text[row] for step in steps) == found.text[row]
        assert found.ended[0] == "stop"
        with pytest.raises(ValueError, match="decodes"):
            runner.generate(PROMPTS, 1, stop=["a"])


# -- graphs without routing -------------------------------------------------------------------


@pytest.mark.parametrize("name", [DENSE, STATIC, CEILING])
@pytest.mark.parametrize("export", ["exported", "exported_tied"])
def test_peers_equal_forced_routing(name: str, export: str, request: pytest.FixtureRequest) -> None:
    value: Exported = request.getfixturevalue(export)
    routed = OrtRunner(value.folder, threads=1)
    peer = OrtRunner(value.folder, name, threads=1)
    removed = peer.contract.removed_layers
    kept = [int(layer not in removed) for layer in value.contract.routed_layers]
    assert sum(kept) == {DENSE: len(kept), STATIC: -(-len(kept) // 2), CEILING: 0}[name]
    expected = routed.prefill(IDS, MASK, routing=np.array([kept] * 8))
    found = peer.prefill(IDS, MASK)
    for one, other in zip(decoded(expected, routed), decoded(found, peer), strict=True):
        np.testing.assert_allclose(real_logits(one), real_logits(other), atol=CLOSE)
        assert routed.kv_bytes(one) == peer.kv_bytes(other)
    assert found.routing.shape == (8, 0)


def test_a_tied_model_agrees(exported_tied: Exported) -> None:
    """Layer 0 routed, the first layer of the cache, and the head through Gemm."""
    value = exported_tied
    engine = OrtRunner(value.folder, threads=1)
    with TorchRunner(value.base, value.routers, value.contract) as reference:
        one, other = reference.prefill(IDS, MASK), engine.prefill(IDS, MASK)
        assert 0 < one.routing.mean() < 1
        for a, b in zip(decoded(one, reference), decoded(other, engine), strict=True):
            assert_same(a, b)


def test_one_routed_layer_agrees(
    make_exported: Callable[..., Exported], tiny_folder: Path, tmp_path: Path
) -> None:
    value = make_exported(tmp_path, tiny_folder, [2], [0.5], 20)
    engine = OrtRunner(value.folder, threads=1)
    some = MIXED[:, :1]
    with TorchRunner(value.base, value.routers, value.contract) as reference:
        for routing in (None, some, np.ones_like(some), np.zeros_like(some), some - 1):
            one, other = (each.prefill(IDS, MASK, routing=routing) for each in (reference, engine))
            for a, b in zip(decoded(one, reference), decoded(other, engine), strict=True):
                assert_same(a, b)


# -- opening and closing ----------------------------------------------------------------------


def test_torch_runner_restores_the_model(exported_tied: Exported) -> None:
    attention = exported_tied.base.model.model.layers[0].self_attn
    with TorchRunner(exported_tied.base, exported_tied.routers, exported_tied.contract):
        assert "forward" in vars(attention)
    assert "forward" not in vars(attention)


def test_engines_say_what_they_are(torch_runner: TorchRunner, ort_runner: OrtRunner) -> None:
    import onnxruntime

    assert torch_runner.name == "PyTorch"
    assert ort_runner.name == f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"


def test_no_export(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="mskip export"):
        OrtRunner(tmp_path)


@pytest.mark.parametrize("damage", ["gone", "garbage", "no data"])
def test_a_damaged_export_is_refused(damage: str, exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported.folder, folder)
    if damage == "gone":
        (folder / MODEL).unlink()
    elif damage == "garbage":
        (folder / MODEL).write_bytes(b"garbage")
    else:
        (folder / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError) as caught:
        OrtRunner(folder)
    assert str(folder / MODEL) in caught.value.message
    assert "xport" in caught.value.remedy


def test_without_onnxruntime(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"mskip\[cpu\]"):
        OrtRunner(exported.folder)
