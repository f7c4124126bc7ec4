"""Questions about contexts, put to any `Runner`: how likely is a text, and what comes next.

Each distinct context is read once, by itself, so that decisions come from it alone and never
from the text that is scored; its continuations are then read from the same state, so four
choices cost one context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mskip.compressor.errors import DataError
from mskip.compressor.heap import give_back
from mskip.compressor.progress import Progress, silent
from mskip.exporters.answers import AnswerStore
from mskip.exporters.runner import Floats, Ints, Runner, State, left_padded
from mskip.exporters.serving.text_stream import TextStream

Ids = tuple[int, ...]
Decode = Callable[[list[int]], str]
Wanted = tuple[Ids, tuple[str, ...], int]

LARGEST = float(np.finfo(np.float32).max)
BATCH_TOKENS = 1024
"""Padded tokens of a batch of contexts whose continuations are scored. So many keep the
arithmetic busy; more cost padding, and on a CPU the faster attention without a mask."""
GENERATION_TOKENS = 2048
"""Padded tokens of a batch of contexts that are continued, where each step costs about the same
for one row as for many. An engine that makes all logits of a prompt needs 4 bytes x vocabulary
for each: 400 MB with 49,152 entries."""
LOGITS = 2048
"""Padded tokens of a chunk of continuations, whose logits all engines make."""


def batches(sizes: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[list[int]]:
    """Indices in batches, longest first, each padded to its longest within all budgets.

    Args:
        sizes: lengths of each item, as many as there are budgets, such as context and chunk.
        budgets: rows times longest stays within; an item that is too long stands alone.
    """
    made: list[list[int]] = []
    widest: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sum(sizes[index])):
        size = list(sizes[index])
        wider = [max(pair) for pair in zip(widest or size, size, strict=True)]
        rows = len(made[-1]) + 1 if made else 1
        if made and all(rows * each <= most for each, most in zip(wider, budgets, strict=True)):
            made[-1].append(index)
            widest = wider
        else:
            made.append([index])
            widest = size
    return made


def likelihood(logits: Floats, tokens: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of ``tokens``, nats, and whether each is the likeliest.

    Args:
        logits: before each token, [tokens, vocabulary].
        tokens: may be empty: (0, True).
    """
    scores, chosen = torch.from_numpy(logits).float(), torch.tensor(tokens, dtype=torch.int64)
    picked = scores.gather(1, chosen[:, None])[:, 0]
    total = float((picked.double() - scores.logsumexp(dim=1).double()).sum())
    greedy = bool((scores.argmax(dim=1) == chosen).all())
    # NaN would win every comparison, and has no JSON.
    return float(np.nan_to_num(total, nan=-LARGEST, neginf=-LARGEST)), greedy


class Reader:
    """Reads contexts with one engine and answers about what follows.

    Args:
        runner: the engine.
        decode: token ids to text, with special tokens.
        ends: token ids that end a text, besides the contract's.
        routing: decisions to force on every sequence, [routed] of 0 and 1; None leaves them
            to the routers.
        max_length: tokens that the model can read; longer contexts lose their beginning.
        max_tokens: padded tokens of a batch of contexts whose continuations are scored.
        max_generation_tokens: padded tokens of a batch of contexts that are continued.
        store: answers of earlier.
        stage: name for ``progress``.
        progress: one unit a question.

    Attributes:
        executed: routed sublayers executed for each distinct context that was read.
    """

    def __init__(
        self,
        runner: Runner,
        decode: Decode,
        *,
        ends: Sequence[int] = (),
        routing: Sequence[int] | None = None,
        max_length: int,
        max_tokens: int = BATCH_TOKENS,
        max_generation_tokens: int = GENERATION_TOKENS,
        store: AnswerStore | None = None,
        stage: str = "tasks",
        progress: Progress = silent,
    ) -> None:
        self.runner = runner
        self.decode = decode
        self.ends = {*runner.contract.eos, *ends}
        self.routing = None if routing is None else [int(each) for each in routing]
        self.max_length = max_length
        self.max_tokens = max_tokens
        self.max_generation_tokens = max_generation_tokens
        self.store = AnswerStore() if store is None else store
        self.stage, self.progress = stage, progress
        self.executed: dict[Ids, int] = {}

    @property
    def capacity(self) -> float | None:
        """Executed share of the routed sublayers over the contexts read; None without any."""
        calls = len(self.executed) * len(self.runner.contract.routed_layers)
        return sum(self.executed.values()) / calls if calls else None

    # -- likelihoods --------------------------------------------------------------------------

    def likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """`likelihood` of each continuation after its context, in order.

        Args:
            pairs: (context, continuation) as token ids; contexts not empty.

        Raises:
            DataError: a continuation that the model cannot read.
        """
        fitted = [self._fitted(context, continuation) for context, continuation in pairs]
        asked = Counter(fitted)
        answers: dict[tuple[Ids, Ids], tuple[float, bool]] = {}
        waiting: dict[Ids, list[Ids]] = {}
        for pair in asked:
            known = self.store.get("likelihood", self.routing, *pair)
            if known is None:
                waiting.setdefault(pair[0], []).append(pair[1])
            else:
                total, greedy, self.executed[pair[0]] = known
                answers[pair] = (total, greedy)
        done = sum(asked[pair] for pair in answers)
        self.progress(self.stage, done, len(pairs))
        contexts = list(waiting)
        sizes = [(len(each), max(map(len, waiting[each]))) for each in contexts]
        budgets = (1, 1) if self.runner.alone else (self.max_tokens, LOGITS)
        for batch in batches(sizes, budgets):
            rows = [(contexts[index], waiting[contexts[index]]) for index in batch]
            for pair, answer in self._read(rows):
                answers[pair] = answer
                known = [*answer, self.executed[pair[0]]]
                self.store.put(known, "likelihood", self.routing, *pair)
                done += asked[pair]
            self.store.flush()
            self.progress(self.stage, done, len(pairs))
        return [answers[pair] for pair in fitted]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Ids, Ids]:
        """The pair with the context cut on the left: its last token predicts, so it stays."""
        room = self.max_length + 1 - max(1, len(continuation))
        if room < 1:
            raise DataError(
                f"a continuation of {len(continuation)} tokens: the model reads {self.max_length}.",
                "Shorten it, or evaluate a model with a longer context.",
            )
        return tuple(context[-room:]), tuple(continuation)

    def _read(
        self, rows: Sequence[tuple[Ids, list[Ids]]]
    ) -> Iterator[tuple[tuple[Ids, Ids], tuple[float, bool]]]:
        """Answers of one batch: one prefill, and a chunk for each turn of continuations."""
        contexts = [context for context, _ in rows]
        state = self._prefill(contexts)
        # Longest first, so that those of one turn have about the same length.
        turns = [sorted(continuations, key=len, reverse=True) for _, continuations in rows]
        for turn in range(max(map(len, turns))):
            chosen = [each[turn] if turn < len(each) else None for each in turns]
            # The last token of a continuation predicts nothing that is asked for.
            following = self._extend(state, [() if c is None else c[:-1] for c in chosen])
            for row, continuation in enumerate(chosen):
                if continuation is not None:
                    after = following[row, : max(0, len(continuation) - 1)]
                    before = np.concatenate([state.logits[row, -1:], after])
                    answer = likelihood(before[: len(continuation)], continuation)
                    yield (contexts[row], continuation), answer

    def _prefill(self, contexts: Sequence[Ids]) -> State:
        ids, mask = left_padded(contexts, self.runner.contract.pad)
        routing: Ints | None = None
        if self.routing is not None:
            routing = np.tile(np.asarray(self.routing, dtype=np.int64), (len(contexts), 1))
        state = self.runner.prefill(ids, mask, routing=routing, last_only=True)
        self.executed.update(zip(contexts, state.routing.sum(axis=1).tolist(), strict=True))
        return state

    def _extend(self, state: State, fed: Sequence[Ids]) -> Floats:
        """Logits after each fed token, [rows, longest, vocabulary]; padding is on the right."""
        width = max(map(len, fed))
        if width == 0:
            return state.logits[:, :0]
        chunk = np.full((len(fed), width), self.runner.contract.pad, dtype=np.int64)
        mask = np.zeros_like(chunk)
        for row, tokens in enumerate(fed):
            chunk[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return self.runner.extend(state, chunk, mask).logits

    # -- continuations ------------------------------------------------------------------------

    def continuations(
        self, asked: Sequence[tuple[Sequence[int], Sequence[str], int]]
    ) -> list[list[int]]:
        """Greedy continuations, up to and with the token that completes a stop string.

        Args:
            asked: (context, stop strings, most tokens) of each; contexts not empty.

        Returns:
            Token ids without the end token.

        Raises:
            DataError: no room for so many tokens.
        """
        fitted: list[Wanted] = []
        for context, stops, most in asked:
            if most >= self.max_length:
                raise DataError(
                    f"a task generates {most} tokens: the model reads {self.max_length}.",
                    "Evaluate a model with a longer context.",
                )
            fitted.append((tuple(context[most - self.max_length :]), tuple(stops), most))
        answers: dict[Wanted, list[int]] = {}
        waiting: list[Wanted] = []
        for each in dict.fromkeys(fitted):
            known = self.store.get("continuation", self.routing, *each)
            if known is None:
                waiting.append(each)
            else:
                answers[each], self.executed[each[0]] = known
        self.progress(self.stage, sum(each in answers for each in fitted), len(fitted))
        sizes = [(len(context),) for context, _, _ in waiting]
        for batch in batches(sizes, (self.max_generation_tokens,)):
            rows = [waiting[index] for index in batch]
            for each, tokens in zip(rows, self._continue(rows), strict=True):
                answers[each] = tokens
                known = [tokens, self.executed[each[0]]]
                self.store.put(known, "continuation", self.routing, *each)
            self.store.flush()
            give_back()
            self.progress(self.stage, sum(each in answers for each in fitted), len(fitted))
        return [answers[each] for each in fitted]

    def _continue(self, rows: Sequence[Wanted]) -> list[list[int]]:
        state = self._prefill([context for context, _, _ in rows])
        written = [TextStream(self.decode, stops) for _, stops, _ in rows]
        running = [most > 0 for _, _, most in rows]
        held = list(range(len(rows)))  # the state's sequences
        while any(running):
            chosen = state.logits[:, -1].argmax(axis=-1).astype(np.int64)
            for row, token in zip(held, chosen.tolist(), strict=True):
                if running[row] and token not in self.ends:
                    written[row].add(token)
                    room = len(written[row].tokens) < rows[row][2]
                    running[row] = room and not written[row].stopped
                else:
                    running[row] = False
            kept = [place for place, row in enumerate(held) if running[row]]
            if 0 < 2 * len(kept) <= len(held):  # the others would be read for nothing
                state = self.runner.select(state, kept)
                held, chosen = [held[place] for place in kept], chosen[kept]
            if kept:
                state = self.runner.extend(state, chosen[:, None])
        return [stream.tokens for stream in written]
