"""One interface over every engine that runs a routed model.

Arrays are numpy at the interface. A sequence's state (cache, mask, decisions)
is a value that the caller holds, so any number of generations interleave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mskip.exporters.contract import Contract
from mskip.exporters.serving.sampling import GREEDY, Sampler, Sampling
from mskip.exporters.serving.text_stream import TextStream

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Tau = float | Sequence[float] | None

UNDECIDED = -1


@dataclass(frozen=True)
class State:
    """Where a batch of sequences stands after a call.

    Attributes:
        logits: of the positions of the last call, [batch, sequence, vocabulary] float32;
            [batch, 1, vocabulary] where the last position alone was asked for.
        routing: decisions, [batch, routed] int64 of 0 and 1.
        scores: [batch, routed] float32, kept from the prefill; NaN where the decision was given.
        mask: [batch, past], 1 on real tokens; covers everything in the cache.
        cache: the engine's own keys and values.
    """

    logits: Floats
    routing: Ints
    scores: Floats
    mask: Ints
    cache: Any


@dataclass(frozen=True)
class Step:
    """One token of each sequence.

    Attributes:
        tokens: the new tokens; None of a sequence that has ended, at this step or before.
        text: what each token lets out, see `TextStream`; empty where no text was asked for.
        ended: "end" (end token), "stop" (stop string) or "length" of each sequence that has
            ended, None of the others.
        state: that the tokens were chosen from; it does not hold them yet.
    """

    tokens: list[int | None]
    text: list[str]
    ended: list[str | None]
    state: State


@dataclass(frozen=True)
class Generation:
    """Continuations.

    Attributes:
        tokens: new token ids of each prompt, without the end token.
        text: of each, before any stop string; empty where no text was asked for.
        ended: see `Step`.
        routing: decisions, [prompts, routed].
        scores: [prompts, routed].
        state: holds prompts and tokens but the last of each; `extend` or a ``prefix`` goes on.
    """

    tokens: list[list[int]]
    text: list[str]
    ended: list[str | None]
    routing: Ints
    scores: Floats
    state: State


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Ints, Ints]:
    """Token ids and mask, [prompts, longest] int64, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def positions(mask: Ints, new: int) -> Ints:
    """Positions of the last ``new`` columns, counted over real tokens; 0 on padding."""
    counted: Ints = np.clip(mask.cumsum(axis=1) - 1, 0, None)
    return np.ascontiguousarray(counted[:, mask.shape[1] - new :])


def selected(state: State, rows: Sequence[int], cache: Any) -> State:
    """A state with the given sequences; ``cache`` is theirs."""
    chosen = list(rows)
    return State(
        state.logits[chosen], state.routing[chosen], state.scores[chosen], state.mask[chosen], cache
    )


def cache_rows(contract: Contract, layer: int, routing: Ints, rows: Sequence[int]) -> Ints:
    """Where the given sequences lie in a layer's cache; [n], of the executing ones."""
    chosen = np.asarray(rows, dtype=np.int64)
    if layer not in contract.compact_layers:
        return chosen
    executing = routing[:, contract.routed_layers.index(layer)] == 1
    found: Ints = (executing.cumsum() - 1)[chosen[executing[chosen]]]
    return found


class Runner(ABC):
    """An engine with a loaded routed model.

    Attributes:
        name: of the engine, for reports.
        contract: names, axes and defaults.
        alone: reads several new tokens of one sequence in one call, those of several sequences
            column by column.
        largest_batch: most sequences of a call; None where any number goes.
    """

    name: str
    contract: Contract
    alone: bool = False
    largest_batch: int | None = None

    @abstractmethod
    def forward(self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats) -> State:
        """One call.

        Args:
            input_ids: [batch, sequence].
            mask: [batch, past + sequence].
            cache: of an earlier state; None for an empty one.
            routing: [batch, routed] of -1, 0, 1.
            tau: [routed].
        """

    def forward_last(
        self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats
    ) -> State:
        """`forward` with the logits of the last column alone, [batch, 1, vocabulary].

        A thousand tokens times a vocabulary of 50,000 are 200 MB that nobody reads. An
        engine that can leave them out overrides this; here they are made and let go.
        """
        after = self.forward(input_ids, mask, cache, routing, tau)
        return replace(after, logits=after.logits[:, -1:].copy())

    @abstractmethod
    def kv_bytes(self, state: State) -> int:
        """Bytes of keys and values that a state holds."""

    def prefill(
        self,
        input_ids: Ints,
        mask: Ints | None = None,
        *,
        routing: Ints | None = None,
        tau: Tau = None,
        last_only: bool = False,
    ) -> State:
        """Read prompts into an empty cache; open decisions are taken.

        Args:
            input_ids: [batch, sequence].
            mask: [batch, sequence], 1 on real tokens; None means no padding.
            routing: decisions to force, [batch, routed]; None leaves all open.
            tau: one threshold, or one a routed sublayer; None is the calibrated default.
            last_only: logits of the last column alone, see `forward_last`.
        """
        mask = np.ones_like(input_ids) if mask is None else mask
        if routing is None:
            shape = len(input_ids), len(self.contract.routed_layers)
            routing = np.full(shape, UNDECIDED, dtype=np.int64)
        run = self.forward_last if last_only else self.forward
        return run(input_ids, mask, None, routing, self._tau(tau))

    def extend(self, state: State, tokens: Ints, mask: Ints | None = None) -> State:
        """Read further tokens of the same sequences: a step, a chunk, another turn.

        Args:
            state: where the sequences stand; it stays usable.
            tokens: [batch, new].
            mask: [batch, new], 1 on real tokens; None means no padding.
        """
        new = np.ones_like(tokens) if mask is None else mask
        whole = np.concatenate([state.mask, new], axis=1)
        after = self.forward(tokens, whole, state.cache, state.routing, self._tau(None))
        return replace(after, scores=state.scores)

    @abstractmethod
    def select(self, state: State, rows: Sequence[int]) -> State:
        """The given sequences of a state, in the given order, with repeats.

        Args:
            state: it stays usable.
            rows: indices of its sequences.
        """

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        prefix: State | None = None,
        tau: Tau = None,
        routing: Ints | None = None,
        stop_at_end: bool = True,
    ) -> Iterator[Step]:
        """Continue prompts as one batch, token by token.

        Args:
            prompts: token ids, not empty; their lengths may differ.
            max_new_tokens: longest continuation.
            sampling: how tokens are chosen.
            stop: strings that end a sequence; they need ``decode``.
            decode: token ids to text; with it each step carries its text.
            prefix: where the sequences stand already, of one sequence for all prompts or one
                each: a system prompt, an earlier turn. Its decisions stay.
            tau: see `prefill`.
            routing: see `prefill`.
            stop_at_end: end a sequence at an end token.

        Raises:
            ValueError: ``tau`` or ``routing`` beside a ``prefix``; ``stop`` without ``decode``.
        """
        if prefix is not None and (tau is not None or routing is not None):
            raise ValueError("the decisions were taken with the prefix: no tau, no routing.")
        if stop and decode is None:
            raise ValueError("stop strings need a function that decodes tokens.")
        state = self._begun(prompts, prefix, tau, routing)
        sampler = Sampler(sampling, len(prompts))
        texts = [] if decode is None else [TextStream(decode, stop) for _ in prompts]
        ended: list[str | None] = [None] * len(prompts)
        for step in range(1, max_new_tokens + 1):
            chosen = sampler(state.logits[:, -1])
            running = np.array([reason is None for reason in ended])
            tokens: list[int | None] = [None] * len(prompts)
            text = [""] * len(prompts)
            for row in np.flatnonzero(running).tolist():
                token = int(chosen[row])
                if stop_at_end and token in self.contract.eos:
                    ended[row] = "end"
                else:
                    tokens[row] = token
                    text[row] = texts[row].add(token) if texts else ""
                    if texts and texts[row].stopped:
                        ended[row] = "stop"
                    elif step == max_new_tokens:
                        ended[row] = "length"
                if texts and ended[row] is not None:
                    text[row] += texts[row].rest()
            yield Step(tokens, text, list(ended), state)
            if all(ended):
                return
            going = np.array([[reason is None] for reason in ended])
            # A sequence that has ended is given padding, which its cache does not count.
            fed = np.where(going, chosen[:, None], self.contract.pad)
            state = self.extend(state, fed, None if going.all() else going.astype(np.int64))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> Generation:
        """All of `stream`, which has the same arguments, at once."""
        tokens: list[list[int]] = [[] for _ in prompts]
        text = [""] * len(prompts)
        step: Step | None = None
        for step in self.stream(prompts, max_new_tokens, **options):
            for row, token in enumerate(step.tokens):
                tokens[row] += [] if token is None else [token]
                text[row] += step.text[row]
        if step is None:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more.")
        state = step.state
        return Generation(tokens, text, step.ended, state.routing, state.scores, state)

    def _begun(
        self,
        prompts: Sequence[Sequence[int]],
        prefix: State | None,
        tau: Tau,
        routing: Ints | None,
    ) -> State:
        """The state after the prompts, whose last column is a token of each."""
        ids, mask = left_padded(prompts, self.contract.pad)
        if prefix is None:
            return self.prefill(ids, mask, routing=routing, tau=tau, last_only=True)
        if len(prefix.routing) == 1 < len(prompts):
            prefix = self.select(prefix, [0] * len(prompts))
        return self.extend(prefix, ids, mask)

    def _tau(self, tau: Tau) -> Floats:
        routed = len(self.contract.routed_layers)
        value = self.contract.tau if tau is None else tau
        return np.broadcast_to(np.asarray(value, dtype=np.float32), (routed,)).copy()
