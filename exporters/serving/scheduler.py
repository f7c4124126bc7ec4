"""Requests that share one batch: they join and leave between two steps.

One thread owns the batch. It lets waiting requests in, in their order, as rows and memory become
free; a request that is cancelled goes at once. What a request is given depends on itself alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .batch import Batch
from .meter import Meter
from .sampling import GREEDY, Floats, Ints, Sampler, Sampling
from .text_stream import TextStream

PACE_SECONDS = 10.0
"""Over which tokens a second are counted."""


class RefusedError(ValueError):
    """A request that is not served; the message says why, and what would be."""


@dataclass(frozen=True)
class Event:
    """What a request is told.

    Attributes:
        text: that follows what was told before.
        tokens: ids that follow.
        ended: "end" (end token), "stop" (stop string), "length", "cancelled" or "error"; None
            while it goes on.
        statistics: with the first and the last event; see `Scheduler`.
        error: what went wrong.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    ended: str | None = None
    statistics: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        ids: the prompt's tokens.
        tau: threshold of each routed sublayer.
        emit: is told what happens, from the scheduler's thread; if it raises, the request is
            taken as cancelled.
        max_tokens: longest continuation.
        sampling: how tokens are chosen.
        stop: strings that end the text.
        frequency_penalty: taken from a token's logit for each time it was made.
        presence_penalty: taken from the logit of each token that was made.
        cancelled: whether nobody waits any more.
    """

    ids: Sequence[int]
    tau: Sequence[float]
    emit: Callable[[Event], None]
    max_tokens: int = 64
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    cancelled: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Limits:
    """What the scheduler takes on.

    Attributes:
        queue: requests that may wait.
        kv_bytes: keys and values that the running sequences may come to hold.
    """

    queue: int = 64
    kv_bytes: int = 1 << 30


@dataclass(frozen=True)
class Savings:
    """Seconds that skipping every routed sublayer saves, as measured when the server starts.

    Attributes:
        prompt_token: for each token of a prompt.
        step: for each token that is made, decoding alone.
    """

    prompt_token: float = 0.0
    step: float = 0.0


@dataclass
class _Running:
    """A request from its arrival on."""

    request: Request
    arrived: float
    sampler: Sampler
    text: TextStream
    routing: Ints | None = None
    scores: Floats | None = None
    counts: Counter[int] = field(default_factory=Counter)
    made: int = 0
    next: int = 0
    started: float = 0.0
    read: float = 0.0

    def choose(self, logits: Floats) -> int:
        """The next token."""
        request = self.request
        if self.counts and (request.frequency_penalty or request.presence_penalty):
            logits = logits.copy()
            for token, times in self.counts.items():
                logits[token] -= request.presence_penalty + times * request.frequency_penalty
        return int(self.sampler(logits[None].astype(np.float32, copy=False))[0])


class Scheduler:
    """Serves requests on one batch.

    The statistics of a request are: ``layers``, ``decisions``, ``scores`` and ``tau`` of the routed
    sublayers, ``capacity`` and ``skip_rate``, ``queue_ms``, ``prefill_ms``, ``decode_ms``,
    ``saved_ms`` (estimated from `Savings`), ``prompt_tokens``, ``tokens``, ``kv_bytes`` and
    ``kv_bytes_dense``.

    Args:
        batch: of no sequences; the scheduler's from then on.
        decode: token ids to text, without special tokens.
        meter: takes measurements.
        limits: what is taken on.
        savings: what skipping saves.
    """

    def __init__(
        self,
        batch: Batch,
        decode: Callable[[list[int]], str],
        meter: Meter,
        limits: Limits = Limits(),
        savings: Savings = Savings(),
    ) -> None:
        self.batch, self.decode, self.meter = batch, decode, meter
        self.limits, self.savings = limits, savings
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._closing = False
        self._decisions = [0, 0]
        self._paces: deque[tuple[float, int]] = deque()
        meter.set("mskip_kv_bytes_budget", limits.kv_bytes)
        self._gauge()
        self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RefusedError: it can never be served, or too many wait.
        """
        try:
            self._check(request)
            running = _Running(
                request,
                time.monotonic(),
                Sampler(request.sampling, 1),
                TextStream(self.decode, request.stop),
            )
            with self._changed:
                if self._closing:
                    raise RefusedError("the server is stopping.")
                if len(self._waiting) >= self.limits.queue:
                    raise RefusedError(
                        f"the queue is full: {self.limits.queue} requests wait. Try again later."
                    )
                self._waiting.append(running)
                self._changed.notify()
        except RefusedError:
            self.meter.add("mskip_requests_total", 1, outcome="refused")
            raise

    def close(self) -> None:
        """Stop; requests that are not finished are told so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # -- the thread --

    def _check(self, request: Request) -> None:
        if request.max_tokens < 1:
            raise RefusedError(f"max_tokens is {request.max_tokens}; it must be 1 or more.")
        for name in ("frequency_penalty", "presence_penalty"):
            if not math.isfinite(getattr(request, name)):
                raise RefusedError(f"{name} is {getattr(request, name)}; it must be a number.")
        if not request.ids:
            raise RefusedError("the prompt has no tokens.")
        if any(not 0 <= token < self.batch.shape.vocabulary for token in request.ids):
            raise RefusedError(f"a token id lies outside 0..{self.batch.shape.vocabulary - 1}.")
        whole = len(request.ids) + request.max_tokens
        if whole > self.batch.positions:
            raise RefusedError(
                f"{len(request.ids)} prompt tokens and {request.max_tokens} new ones are more than "
                f"the {self.batch.positions} positions that a sequence has here."
            )
        if self.batch.row_bytes(whole) > self.limits.kv_bytes:
            raise RefusedError(
                f"{whole} positions need {self.batch.row_bytes(whole)} bytes of keys and values; "
                f"the budget is {self.limits.kv_bytes}."
            )

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._running):
                    # Tokens a second fall to 0 while nothing is asked for.
                    if not self._changed.wait(1.0 if self._paces else None):
                        self._forget_paces()
                        self._gauge()
                if self._closing:
                    break
            try:
                self._drop_cancelled()
                self._let_in()
                self._step()
            except Exception as error:  # whatever it is, later requests have to be served
                for index in reversed(range(len(self._running))):
                    self._end(index, "error", error=f"{type(error).__name__}: {error}")
            self._gauge()
        for running in self._waiting:
            _tell(running, Event(ended="error", error="the server is stopping."))
        for index in reversed(range(len(self._running))):
            self._end(index, "error", error="the server is stopping.")

    def _drop_cancelled(self) -> None:
        for index in reversed(range(len(self._running))):
            if self._running[index].request.cancelled():
                self._end(index, "cancelled")
        with self._changed:
            gone = [each for each in self._waiting if each.request.cancelled()]
            for each in gone:
                self._waiting.remove(each)
        for each in gone:
            self.meter.add("mskip_requests_total", 1, outcome="cancelled")
            _tell(each, Event(ended="cancelled"))

    def _reserved(self) -> int:
        """Bytes that the running sequences may come to hold."""
        return sum(
            self.batch.row_bytes(len(each.request.ids) + each.request.max_tokens, each.routing)
            for each in self._running
        )

    def _let_in(self) -> None:
        """Read one prompt, so that those who decode wait for no more than that."""
        with self._changed:
            if not self._waiting or len(self._running) >= self.batch.most:
                return
            request = self._waiting[0].request
            # Undecided yet, so it is counted as if it executed everything.
            most = self.batch.row_bytes(len(request.ids) + request.max_tokens)
            if self._reserved() + most > self.limits.kv_bytes:
                return
            running = self._waiting.popleft()
        running.started = time.monotonic()
        try:
            logits, running.routing, running.scores = self.batch.join(
                running, request.ids, request.tau
            )
        except Exception as error:  # of this request alone
            self.meter.add("mskip_requests_total", 1, outcome="error")
            _tell(running, Event(ended="error", error=f"{type(error).__name__}: {error}"))
            return
        running.read = time.monotonic()
        self._running.append(running)
        self._count_prompt(running)
        self._advance(len(self._running) - 1, logits)

    def _step(self) -> None:
        if not self._running:
            return
        start = time.monotonic()
        logits = self.batch.step([each.next for each in self._running])
        for index in reversed(range(len(self._running))):
            self._advance(index, logits[index])
        now = time.monotonic()
        self.meter.add("mskip_steps_total", 1)
        self.meter.add("mskip_decode_seconds_total", now - start)
        self._paces.append((now, len(logits)))
        self._forget_paces()

    def _advance(self, index: int, logits: Floats) -> None:
        """Choose a sequence's next token and tell it; the sequence goes if it has ended."""
        running = self._running[index]
        request = running.request
        token = running.choose(logits)
        first = running.made == 0 and not running.counts
        if token in self.batch.shape.ends:
            self._end(index, "end")
            return
        running.made += 1
        running.counts[token] += 1
        running.next = token
        self.meter.add("mskip_tokens_total", 1, kind="generated")
        text = running.text.add(token)
        if running.text.stopped or running.made >= request.max_tokens:
            self._end(index, "stop" if running.text.stopped else "length", text, (token,))
            return
        statistics = self._statistics(running) if first else None
        if not _tell(running, Event(text, (token,), statistics=statistics)):
            self._end(index, "cancelled")

    def _end(
        self,
        index: int,
        outcome: str,
        text: str = "",
        tokens: tuple[int, ...] = (),
        error: str | None = None,
    ) -> None:
        running = self._running.pop(index)
        self.batch.leave(index)
        text += running.text.rest()
        if running.text.stopped and outcome in ("end", "length"):
            outcome = "stop"  # what was held back completed a stop string
        self.meter.add("mskip_requests_total", 1, outcome=outcome)
        # Before the last event: who has it may look at the memory.
        self._gauge()
        _tell(running, Event(text, tokens, outcome, self._statistics(running), error))

    # -- what is measured --

    def _count_prompt(self, running: _Running) -> None:
        assert running.routing is not None
        self.meter.add("mskip_prompts_total", 1)
        self.meter.add("mskip_tokens_total", len(running.request.ids), kind="prompt")
        self.meter.add("mskip_queue_seconds_total", running.started - running.arrived)
        self.meter.add("mskip_prefill_seconds_total", running.read - running.started)
        for layer, executed in zip(self.batch.shape.routed, running.routing.tolist(), strict=True):
            decision = "execute" if executed else "skip"
            self.meter.add("mskip_decisions_total", 1, layer=str(layer), decision=decision)
            self._decisions[executed] += 1

    def _forget_paces(self) -> None:
        now = time.monotonic()
        while self._paces and self._paces[0][0] < now - PACE_SECONDS:
            self._paces.popleft()

    def _gauge(self) -> None:
        recent = sum(count for _, count in self._paces)
        decided = sum(self._decisions)
        rows = self.batch.rows
        for name, value in {
            "mskip_capacity": self._decisions[1] / decided if decided else 1.0,
            "mskip_tokens_per_second": recent / PACE_SECONDS,
            "mskip_active_sequences": len(rows),
            "mskip_queued_requests": len(self._waiting),
            "mskip_kv_bytes": self.batch.kv_bytes,
            "mskip_kv_bytes_dense": sum(self.batch.row_bytes(row.length) for row in rows),
            "mskip_kv_bytes_reserved": self._reserved(),
        }.items():
            self.meter.set(name, value)

    def _statistics(self, running: _Running) -> dict[str, Any]:
        assert running.routing is not None
        assert running.scores is not None
        shape, request, now = self.batch.shape, running.request, time.monotonic()
        executed = int(running.routing.sum())
        routed = len(shape.routed)
        capacity = executed / routed if routed else 1.0
        held = len(request.ids) + max(running.made - 1, 0)
        saved = len(request.ids) * self.savings.prompt_token + running.made * self.savings.step
        return {
            "layers": shape.routed,
            "decisions": running.routing.tolist(),
            "scores": [round(float(score), 6) for score in running.scores],
            "tau": [round(float(each), 6) for each in request.tau],
            "capacity": capacity,
            "skip_rate": 1 - capacity,
            "queue_ms": round(1e3 * (running.started - running.arrived), 3),
            "prefill_ms": round(1e3 * (running.read - running.started), 3),
            "decode_ms": round(1e3 * (now - running.read), 3),
            "saved_ms": round(1e3 * saved * (1 - capacity), 3),
            "prompt_tokens": len(request.ids),
            "tokens": running.made,
            "kv_bytes": self.batch.row_bytes(held, running.routing),
            "kv_bytes_dense": self.batch.row_bytes(held),
        }


def _tell(running: _Running, event: Event) -> bool:
    """Whether anybody took it."""
    try:
        running.request.emit(event)
    except Exception:  # a client that is gone shows itself in as many ways as there are servers
        return False
    return True


def measured_savings(batch: Batch, tokens: int = 64, repeats: int = 3) -> Savings:
    """What skipping saves on this machine: medians of prompts and steps that do all and none.

    Args:
        batch: of no sequences, and of none afterwards.
        tokens: length of the prompts.
        repeats: of each.
    """
    if not batch.shape.routed:
        return Savings()
    times: dict[tuple[str, float], list[float]] = {}
    for _ in range(repeats):
        for tau in (0.0, 2.0):  # scores lie in 0..1
            start = time.perf_counter()
            batch.join("warm-up", [batch.shape.pad] * tokens, [tau] * len(batch.shape.routed))
            read = time.perf_counter()
            batch.step([batch.shape.pad])
            end = time.perf_counter()
            batch.leave(0)
            times.setdefault(("prompt", tau), []).append(read - start)
            times.setdefault(("step", tau), []).append(end - read)
    median = {key: float(np.median(values)) for key, values in times.items()}
    return Savings(
        max(0.0, median["prompt", 0.0] - median["prompt", 2.0]) / tokens,
        max(0.0, median["step", 0.0] - median["step", 2.0]),
    )
