"""Sequences that decode together, each of which joins and leaves whenever it likes.

Every layer has one buffer with a row for each sequence that holds keys and values there. A
sequence that joins is read by itself, straight into the next rows, so its decisions cannot
depend on others. One that leaves lets those behind it move up, and its memory goes back.

For a product of a single row ONNX Runtime takes another kernel than for several, and it rounds
differently. So that no sequence is ever alone in what it computes, a step may have one row more
or two that are nobody's: they take the branches in which a sequence would be alone, and no branch
that none takes. What a sequence computes is the same to the last bit, whoever decodes beside it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .graph import UNDECIDED, Array, Arrays, Graph, past

PAGE = mmap.PAGESIZE


@dataclass
class Row:
    """A sequence of the batch.

    Attributes:
        key: whose it is.
        length: positions that are in the cache.
        routing: decisions, [routed] of 0 and 1.
    """

    key: object
    length: int
    routing: npt.NDArray[np.int64]


class Buffer:
    """Keys or values of a layer, of all rows.

    Args:
        shape: [rows, kv heads, positions, head dim].
        dtype: of its elements.

    Attributes:
        array: of that shape. Pages that nothing was written to are not resident.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, access=mmap.ACCESS_COPY)
        self.array: Array = np.frombuffer(self._memory, dtype).reshape(shape)

    def move(self, row: int, length: int, before: int) -> None:
        """Copy a row of ``length`` positions to the row in front of it, which had ``before``."""
        self.array[row - 1, :, :length] = self.array[row, :, :length]
        self.release(row - 1, length, before)

    def release(self, row: int, first: int, last: int) -> None:
        """Give the memory of a row's positions from ``first`` to ``last`` back."""
        _, heads, positions, width = self.array.shape
        each = width * self.array.itemsize
        for head in range(heads if first < last else 0):
            base = (row * heads + head) * positions * each
            start = -(-(base + first * each) // PAGE) * PAGE
            end = base + last * each
            # Of the last page the rest is unused, unless it is the next head's.
            whole = (base + positions * each) % PAGE == 0
            end = -(-end // PAGE) * PAGE if whole else end // PAGE * PAGE
            if start < end:
                self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)


MOST_COMPANY = 2
"""Rows of a step that are nobody's."""


def company(decisions: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Decisions of rows with which no sequence is alone in a branch; at most `MOST_COMPANY`.

    Args:
        decisions: of the sequences, [sequences, routed] of 0 and 1.
    """
    sequences, routed = decisions.shape
    executing = decisions.sum(axis=0)
    skipping = sequences - executing
    most = (executing >= skipping).astype(np.int64)
    if routed == 0 or not ((executing == 1) | (skipping == 1)).any():
        return [most] if sequences == 1 else []
    first = np.where(executing == 1, 1, np.where(skipping == 1, 0, most))
    alone = (executing == 1) & (skipping == 1)
    return [first, np.where(alone, 0, first)] if alone.any() else [first]


class Batch:
    """The sequences that decode together on one graph.

    Args:
        graph: runs them.
        rows: most sequences at a time.
        positions: longest sequence, prompt and continuation; rounded up to whole pages.
    """

    def __init__(self, graph: Graph, rows: int, positions: int) -> None:
        shape = graph.shape
        self.graph, self.shape, self.most = graph, shape, rows
        step = max(1, PAGE // (shape.head_dim * np.dtype(shape.dtype).itemsize))
        self.positions = shape.capacity or -(-positions // step) * step
        self.rows: list[Row] = []
        self._company: list[Row] = []
        self._changes = 0
        self._composed: tuple[int, dict[str, Array], Array] | None = None
        space = rows + MOST_COMPANY
        each = space, shape.kv_heads, self.positions, shape.head_dim
        self._buffers = {
            layer: {part: Buffer(each, np.dtype(shape.dtype)) for part in ("key", "value")}
            for layer in shape.cached
        }

    # -- what it holds --

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of all sequences."""
        return sum(self.row_bytes(row.length, row.routing) for row in self.rows)

    def row_bytes(self, length: int, routing: npt.NDArray[np.int64] | None = None) -> int:
        """Bytes of a sequence of ``length`` positions; None: if it executes everything."""
        layers = len(self.shape.cached)
        if routing is not None:
            skipped = [
                at for at, value in zip(self.shape.routed, routing, strict=True) if not value
            ]
            layers -= len(self.shape.compact.intersection(skipped))
        return layers * length * self.shape.position_bytes

    # -- what it does --

    def join(
        self, key: object, ids: Sequence[int], tau: Sequence[float]
    ) -> tuple[Array, Array, Array]:
        """Read a prompt, which decides its routing; the sequence is the last from then on.

        Args:
            key: whose it is.
            ids: token ids, not empty.
            tau: threshold of each routed sublayer.

        Returns:
            Logits after it [vocabulary], decisions [routed] int64, scores [routed] float32.
        """
        if len(self.rows) >= self.most:
            raise ValueError(f"the batch is full: {self.most} sequences.")
        if not 0 < len(ids) <= self.positions:
            raise ValueError(f"{len(ids)} tokens; a sequence has 1 to {self.positions}.")
        routed = len(self.shape.routed)
        caches = {}
        for layer in self.shape.cached:
            at = self._held(layer)
            for part, buffer in self._buffers[layer].items():
                caches[past(layer, part)] = buffer.array[at : at + 1]
        feeds = self._feeds(
            np.array([ids], dtype=np.int64),
            np.array([len(ids)]),
            np.arange(len(ids), dtype=np.int64)[None],
            np.full((1, routed), UNDECIDED, dtype=np.int64),
            tau,
        )
        self._change()
        made = self.graph.run(feeds, caches, ("join", self._changes))
        routing = made["routing_out"][0].copy() if routed else np.zeros(0, np.int64)
        scores = made["routing_scores"][0].copy() if routed else np.zeros(0, np.float32)
        self.rows.append(Row(key, len(ids), routing))
        return made["logits"][0, -1], routing, scores

    def step(self, tokens: Sequence[int]) -> Array:
        """Append a token to every sequence; logits after it, [sequences, vocabulary]."""
        if self._composed is None or self._composed[0] != self._changes:
            self._composed = self._changes, *self._compose()
        _, caches, routing = self._composed
        lengths = np.array([row.length for row in (*self.rows, *self._company)], dtype=np.int64)
        ids = np.array([*tokens, *[self.shape.pad] * len(self._company)])[:, None]
        feeds = self._feeds(ids, lengths + 1, lengths[:, None], routing, self.shape.tau)
        made = self.graph.run(feeds, caches, ("step", self._changes))
        for row in self.rows:
            row.length += 1
        return made["logits"][: len(self.rows), -1]

    def leave(self, index: int) -> None:
        """Take a sequence out; those behind it move up."""
        gone = self.rows[index]
        self._change()
        for layer in self.shape.cached:
            if not self._holds(layer, gone.routing):
                continue
            behind = [row for row in self.rows[index + 1 :] if self._holds(layer, row.routing)]
            for buffer in self._buffers[layer].values():
                at, before = self._held(layer, index), gone.length
                for row in behind:
                    at += 1
                    buffer.move(at, row.length, before)
                    before = row.length
                buffer.release(at, 0, before)
        del self.rows[index]

    # -- parts --

    def _change(self) -> None:
        """Forget what was composed of the sequences so far, and the rows that are nobody's."""
        self._changes += 1
        for layer in self.shape.cached if self._company else ():
            at = self._held(layer)
            for buffer in self._buffers[layer].values():
                for row in range(at, at + len(self._company)):
                    buffer.release(row, 0, 1)
        self._company = []

    def _compose(self) -> tuple[dict[str, Array], Array]:
        """Keys and values of all rows, and their decisions."""
        decisions = np.stack([row.routing for row in self.rows])
        self._company = [Row(None, 0, each) for each in company(decisions)]
        more = {
            layer: sum(self._holds(layer, row.routing) for row in self._company)
            for layer in self.shape.cached
        }
        caches = {
            past(layer, part): buffer.array[: self._held(layer) + more[layer]]
            for layer in self.shape.cached
            for part, buffer in self._buffers[layer].items()
        }
        return caches, np.stack([row.routing for row in (*self.rows, *self._company)])

    def _holds(self, layer: int, routing: npt.NDArray[np.int64]) -> bool:
        if layer not in self.shape.compact:
            return True
        return bool(routing[self.shape.routed.index(layer)])

    def _held(self, layer: int, upto: int | None = None) -> int:
        """Rows of a layer's cache that the first sequences take."""
        return sum(self._holds(layer, row.routing) for row in self.rows[:upto])

    def _feeds(
        self,
        ids: Array,
        attended: Array,
        positions: Array,
        routing: Array,
        tau: Sequence[float],
    ) -> Arrays:
        columns = self.shape.capacity or int(attended.max())
        last = np.full((len(ids), 1), ids.shape[1] - 1, dtype=np.int64)
        feeds: Arrays = {
            "input_ids": np.ascontiguousarray(ids, dtype=np.int64),
            "attention_mask": (np.arange(columns) < attended[:, None]).astype(np.int64),
            "position_ids": np.ascontiguousarray(positions, dtype=np.int64),
            "logits_at": last,
        }
        if self.shape.routed:
            feeds["routing"] = routing
            feeds["tau"] = np.asarray(tau, dtype=np.float32)
        return feeds
