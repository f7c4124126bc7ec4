"""One interface over every engine that runs a routed model.

Arrays are numpy at the interface. A sequence's state (cache, mask, decisions)
is a value that the caller holds, so any number of generations interleave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mskip.exporters.contract import Contract

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
class Generation:
    """Greedy continuations.

    Attributes:
        tokens: new token ids of each prompt, without the end token.
        routing: decisions, [prompts, routed].
        scores: [prompts, routed].
    """

    tokens: list[list[int]]
    routing: Ints
    scores: Floats


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


class Runner(ABC):
    """An engine with a loaded routed model.

    Attributes:
        name: of the engine, for reports.
        contract: names, axes and defaults.
    """

    name: str
    contract: Contract

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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        tau: Tau = None,
        routing: Ints | None = None,
        stop_at_end: bool = True,
        on_token: Callable[[list[int]], None] | None = None,
    ) -> Generation:
        """Continue prompts greedily, as one batch.

        Args:
            prompts: token ids, not empty.
            max_new_tokens: longest continuation.
            tau: see `prefill`.
            routing: see `prefill`.
            stop_at_end: end a sequence at an end token.
            on_token: called with each step's token of every prompt.
        """
        ids, mask = left_padded(prompts, self.contract.pad)
        state = self.prefill(ids, mask, routing=routing, tau=tau)
        first = state
        tokens: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        for step in range(max_new_tokens):
            chosen = state.logits[:, -1].argmax(axis=-1)
            if on_token is not None:
                on_token(chosen.tolist())
            for row, token in enumerate(chosen.tolist()):
                if stop_at_end and token in self.contract.eos:
                    running[row] = False
                if running[row]:
                    tokens[row].append(token)
            if not any(running) or step == max_new_tokens - 1:
                break
            state = self.extend(state, chosen[:, None].astype(np.int64))
        return Generation(tokens, first.routing, first.scores)

    def _tau(self, tau: Tau) -> Floats:
        routed = len(self.contract.routed_layers)
        value = self.contract.tau if tau is None else tau
        return np.broadcast_to(np.asarray(value, dtype=np.float32), (routed,)).copy()
