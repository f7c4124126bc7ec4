"""Questions about contexts: what is read, what is answered, and what is kept."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mskip.compressor import heap
from mskip.compressor.errors import ArtifactError, DataError
from mskip.exporters import reading
from mskip.exporters.answers import AnswerStore
from mskip.exporters.reading import LARGEST, Reader, batches, likelihood
from mskip.exporters.runner import Floats, Ints, Runner, State

CLOSE = 1e-4
LENGTHS = [5, 17, 3, 9, 1, 12]


class Watched(Runner):
    """Another runner, and what it was asked."""

    def __init__(self, inner: Runner) -> None:
        self.inner, self.name, self.contract = inner, inner.name, inner.contract
        self.prefilled: list[list[int]] = []
        self.decided: list[list[int]] = []
        self.obeyed: list[list[int]] = []
        self.widths: list[int] = []

    def forward(self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats) -> State:
        """See `Runner.forward`."""
        state = self.inner.forward(input_ids, mask, cache, routing, tau)
        self.obeyed += [] if cache is None else routing.tolist()
        return state

    def forward_last(
        self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats
    ) -> State:
        """See `Runner.forward_last`."""
        state = self.inner.forward_last(input_ids, mask, cache, routing, tau)
        self.prefilled += [
            row[real == 1].tolist() for row, real in zip(input_ids, mask, strict=True)
        ]
        self.decided += state.routing.tolist()
        self.widths.append(state.logits.shape[1])
        return state

    def select(self, state: State, rows: Sequence[int]) -> State:
        """See `Runner.select`."""
        return self.inner.select(state, rows)

    def kv_bytes(self, state: State) -> int:
        """See `Runner.kv_bytes`."""
        return self.inner.kv_bytes(state)


def text(tokens: list[int]) -> str:
    """Stands for a tokenizer: a token is its number between commas."""
    return "".join(f"{token}," for token in tokens)


def reader(runner: Runner, **options: Any) -> Reader:
    return Reader(runner, text, **{"max_length": 512, **options})


def plain(
    runner: Runner, context: list[int], continuation: list[int], routing: list[int] | None = None
) -> tuple[float, bool, int]:
    """One sequence at a time, float64: log-likelihood, greedy, executed."""
    forced = None if routing is None else np.array([routing], dtype=np.int64)
    state = runner.prefill(np.array([context], dtype=np.int64), routing=forced)
    total, greedy = 0.0, True
    executed = int(state.routing.sum())
    for token in continuation:
        logits = state.logits[0, -1].astype(np.float64)
        total += logits[token] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        greedy &= int(logits.argmax()) == token
        state = runner.extend(state, np.array([[token]], dtype=np.int64))
    return total, greedy, executed


def question_pairs(prompts: list[list[int]], texts: list[list[int]]) -> list[Any]:
    """Every context with one to four continuations, one of them asked for twice."""
    pairs = [
        (p, texts[(i + j) % len(texts)]) for i, p in enumerate(prompts) for j in range(1 + i % 4)
    ]
    return [*pairs, pairs[3], (prompts[0], prompts[0])]


# -- likelihoods ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 20, 4096])
@pytest.mark.parametrize("routing", [None, [1, 1, 1], [1, 0, 0]])
def test_likelihoods_are_those_of_one_sequence_at_a_time(
    runner: Runner, random_prompts: Any, max_tokens: int, routing: list[int] | None
) -> None:
    pairs = question_pairs(random_prompts(LENGTHS), random_prompts([1, 4, 2, 7, 1], seed=1))
    tested = reader(runner, max_tokens=max_tokens, routing=routing)
    found = tested.likelihoods(pairs)
    assert len(found) == len(pairs)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        expected, likeliest, executed = plain(runner, context, continuation, routing)
        assert total == pytest.approx(expected, abs=CLOSE * len(continuation))
        assert greedy == likeliest
        assert tested.executed[tuple(context)] == executed
    executed_all = [tested.executed[tuple(prompt)] for prompt in random_prompts(LENGTHS)]
    assert tested.capacity == pytest.approx(np.mean(executed_all) / 3)
    if routing is None:
        assert len(set(executed_all)) > 1


def test_each_context_is_read_once_and_by_itself(torch_runner: Runner, random_prompts: Any) -> None:
    prompts = random_prompts(LENGTHS)
    pairs = question_pairs(prompts, random_prompts([1, 4, 2, 7, 1], seed=1))
    watched = Watched(torch_runner)
    reader(watched, max_tokens=20).likelihoods(pairs)
    assert sorted(watched.prefilled) == sorted(prompts)
    assert set(watched.widths) == {1}


def test_the_text_that_is_scored_never_decides(runner: Runner, random_prompts: Any) -> None:
    prompts, endless = random_prompts(LENGTHS), random_prompts([60], seed=2)[0]
    decided = []
    for length in (1, 2, 60):
        watched = Watched(runner)
        reader(watched).likelihoods([(prompt, endless[:length]) for prompt in prompts])
        decided.append(dict(zip(map(tuple, watched.prefilled), watched.decided, strict=True)))
        rows = list(decided[-1].values())
        assert watched.obeyed == rows * (length > 1)
    assert decided[0] == decided[1] == decided[2]
    assert len({tuple(row) for row in decided[0].values()}) > 1
    # It would have: read as prompts, context and continuation decide otherwise.
    together = [[*prompt, *endless] for prompt in prompts]
    whole = [runner.prefill(np.array([each])).routing[0].tolist() for each in together]
    assert whole != [decided[0][tuple(prompt)] for prompt in prompts]


def test_engines_agree(torch_runner: Runner, ort_runner: Runner, random_prompts: Any) -> None:
    pairs = question_pairs(random_prompts(LENGTHS), random_prompts([1, 4, 2, 7, 1], seed=1))
    readers = reader(torch_runner, max_tokens=40), reader(ort_runner, max_tokens=40)
    one, other = (each.likelihoods(pairs) for each in readers)
    assert readers[0].executed == readers[1].executed
    for (a, greedy_a), (b, greedy_b) in zip(one, other, strict=True):
        assert a == pytest.approx(b, abs=10 * CLOSE)
        assert greedy_a == greedy_b


def test_a_long_context_loses_its_beginning(torch_runner: Runner, random_prompts: Any) -> None:
    (context,), (short, long) = random_prompts([40]), random_prompts([3, 7], seed=1)
    found = reader(torch_runner, max_length=16).likelihoods([(context, short), (context, long)])
    # The last token of a continuation is never read.
    for (total, _), continuation in zip(found, (short, long), strict=True):
        kept = context[-(16 - (len(continuation) - 1)) :]
        expected = plain(torch_runner, kept, continuation)[0]
        assert total == pytest.approx(expected, abs=10 * CLOSE)
    with pytest.raises(DataError, match="17 tokens: the model reads 16"):
        reader(torch_runner, max_length=16).likelihoods([(context, [5] * 17)])


def test_likelihood_of_logits() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], dtype=np.float32))
    total, greedy = likelihood(logits, [0, 2])
    assert (total, greedy) == (pytest.approx(math.log(0.35), abs=1e-6), True)
    assert likelihood(logits, [1, 2]) == (pytest.approx(math.log(0.175), abs=1e-6), False)
    assert likelihood(logits[:0], []) == (0.0, True)
    assert likelihood(np.full((1, 3), np.nan, dtype=np.float32), [1])[0] == -LARGEST


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=20),
    st.integers(1, 60),
    st.integers(1, 20),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_batches_hold_everything_once_within_the_budgets(
    sizes: list[tuple[int, int]], first: int, second: int
) -> None:
    made = batches(sizes, (first, second))
    assert sorted(index for batch in made for index in batch) == list(range(len(sizes)))
    for batch in made:
        for budget, lengths in zip((first, second), zip(*sizes, strict=True), strict=True):
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_batches_are_filled() -> None:
    assert batches([(2,), (5,), (3,), (3,)], (10,)) == [[1, 2], [3, 0]]


# -- continuations ----------------------------------------------------------------------------


def written(runner: Runner, context: list[int], most: int) -> list[int]:
    return runner.generate([context], most).tokens[0]


def test_continuations_are_greedy_and_stop(runner: Runner, random_prompts: Any) -> None:
    prompts = random_prompts(LENGTHS)
    free = [written(runner, prompt, 9) for prompt in prompts]
    tested = reader(runner, max_generation_tokens=30)
    assert tested.continuations([(prompt, [], 9) for prompt in prompts]) == free
    assert tested.continuations([(prompt, [], 4) for prompt in prompts]) == [t[:4] for t in free]
    assert tested.continuations([(prompts[0], [], 0)]) == [[]]
    # Up to and with the token that completes a stop, each sequence at its own.
    long = [each for each in range(len(free)) if len(free[each]) > 5]
    assert long
    stops = [f"{free[each][2 + row % 3]}," for row, each in enumerate(long)]
    found = tested.continuations(
        [(prompts[each], [stop, "never"], 9) for each, stop in zip(long, stops, strict=True)]
    )
    for tokens, each, stop in zip(found, long, stops, strict=True):
        assert tokens == free[each][: len(tokens)]
        assert stop in text(tokens)
        assert stop not in text(tokens[:-1])


def test_an_end_token_ends(torch_runner: Runner, random_prompts: Any) -> None:
    prompts = random_prompts(LENGTHS)
    free = [written(torch_runner, prompt, 6) for prompt in prompts]
    row = next(row for row, tokens in enumerate(free) if len(tokens) == 6)
    end = free[row][3]
    found = reader(torch_runner, ends=[end]).continuations([(each, [], 6) for each in prompts])
    expected = [t[: t.index(end)] if end in t else t for t in free]
    assert found == expected
    assert len(found[row]) < 6


def test_memory_goes_back_after_each_batch(
    torch_runner: Runner, random_prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nothing holds the batch's keys and values any more."""
    alive: list[weakref.ref[Any]] = []
    left: list[int] = []

    class Held(Watched):
        def prefill(self, *arguments: Any, **options: Any) -> State:
            state = super().prefill(*arguments, **options)
            alive.append(weakref.ref(state.cache))
            return state

    def give_back() -> None:
        heap.give_back()  # frees what a cycle holds
        left.append(sum(each() is not None for each in alive))

    monkeypatch.setattr(reading, "give_back", give_back)
    asked = [(prompt, [], 3) for prompt in random_prompts([9, 8, 7])]
    reader(Held(torch_runner), max_generation_tokens=1).continuations(asked)
    assert len(alive) == 3
    assert left == [0, 0, 0]


def test_no_room_to_generate(torch_runner: Runner) -> None:
    with pytest.raises(DataError, match="generates 8 tokens: the model reads 8"):
        reader(torch_runner, max_length=8).continuations([([5, 6], [], 8)])
    watched = Watched(torch_runner)
    reader(watched, max_length=8).continuations([(list(range(4, 20)), [], 5)])
    assert watched.prefilled == [[17, 18, 19]]


# -- the store --------------------------------------------------------------------------------


def test_what_is_known_is_not_asked_again(
    torch_runner: Runner, random_prompts: Any, tmp_path: Path
) -> None:
    path = tmp_path / "made" / "answers.jsonl"
    pairs = question_pairs(random_prompts(LENGTHS), random_prompts([1, 4], seed=1))
    wanted = [(prompt, ["7,"], 5) for prompt in random_prompts([3, 6])]
    watched = Watched(torch_runner)
    with AnswerStore(path, {"tau": 0.5}) as store:
        first = reader(watched, store=store)
        answers, texts = first.likelihoods(pairs), first.continuations(wanted)
    asked = len(watched.prefilled)
    with AnswerStore(path, {"tau": 0.5}) as store:
        second = reader(watched, store=store)
        assert second.likelihoods(pairs) == answers
        assert second.continuations(wanted) == texts
        assert len(watched.prefilled) == asked
        assert second.executed == first.executed
        # Other decisions, another question, another model: nothing is known of them.
        reader(watched, store=store, routing=[1, 1, 1]).likelihoods(pairs[:1])
        second.likelihoods([(pairs[0][0], [9, 9, 9])])
        second.continuations([(wanted[0][0], ["8,"], 5)])
    with AnswerStore(path, {"tau": 0.6}) as store:
        reader(watched, store=store).likelihoods(pairs[:1])
    assert len(watched.prefilled) == asked + 4


def test_an_interruption_costs_one_batch(
    torch_runner: Runner, random_prompts: Any, tmp_path: Path
) -> None:
    pairs = [(prompt, [5, 6]) for prompt in random_prompts(LENGTHS)]
    path = tmp_path / "answers.jsonl"
    seen = []

    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        seen.append((stage, done, total))
        if done == 3:
            raise KeyboardInterrupt

    store = AnswerStore(path)
    with pytest.raises(KeyboardInterrupt):
        reader(torch_runner, max_tokens=1, store=store, stage="rte", progress=stop).likelihoods(
            pairs
        )
    assert seen == [("rte", done, 6) for done in range(4)]
    # As if the machine had gone: the file is what was flushed, and half a line.
    path.write_bytes(path.read_bytes() + b'{"key": "12')
    watched = Watched(torch_runner)
    with AnswerStore(path) as again:
        assert len(again) == 3
        found = reader(watched, max_tokens=1, store=again).likelihoods(pairs)
    assert len(watched.prefilled) == 3
    assert found == reader(torch_runner, max_tokens=1).likelihoods(pairs)
    lines = path.read_bytes().splitlines()
    assert len(lines) == 7
    assert [len(json.loads(line)["answer"]) for line in lines if line != lines[3]] == [3] * 6
    assert len(AnswerStore(path)) == 6


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = AnswerStore(tmp_path / "folder.jsonl")
    store.path = tmp_path / "file" / "answers.jsonl"
    with pytest.raises(ArtifactError, match="cannot keep answers"):
        store.put(1, "question")
    with pytest.raises(ArtifactError, match="cannot keep answers"):
        AnswerStore(tmp_path)
