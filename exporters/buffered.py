"""Runners whose keys and values stay where they are: which tokens lie where, and who may go on.

Every layer has one buffer with room for more positions than are in it, past and present at once, so
a step writes its own position and copies nothing. Rows lie with their real tokens first, whatever
side the caller pads on. What an engine does with the buffers is left to its own class.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from mskip.compressor.errors import ArtifactError
from mskip.exporters.contract import UNSCORED
from mskip.exporters.runner import UNDECIDED, Floats, Ints, Runner, State, cache_rows, selected

_STAMPS = count()
ROOM = 256
"""Positions that a new buffer has beyond its prompt."""


@dataclass
class Buffers:
    """Keys and values of a batch; an engine adds what it knows them by.

    Attributes:
        capacity: positions that they have room for.
        seen: the mask of all columns that were given, [batch, columns and room] int64.
        arrays: by name of the graph's input, [rows, kv heads, capacity, head dim]. Rows are all
            sequences; of a routed layer in a batch of several the executing ones, in their order.
        writes: columns and stamp of each call that wrote to them, in order.
        attended: memory for the graph's mask, batch x capacity int64.
        counted: 0, 1, ... capacity - 1.
    """

    capacity: int
    seen: Ints
    arrays: dict[str, Any] = field(default_factory=dict)
    writes: list[tuple[int, int]] = field(default_factory=list)
    attended: Ints = field(init=False)
    counted: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.make_room(self.capacity)

    def make_room(self, capacity: int) -> None:
        """Memory for masks of so many positions."""
        self.capacity = capacity
        self.attended = np.empty(len(self.seen) * capacity, dtype=np.int64)
        self.counted = np.arange(capacity)


@dataclass(frozen=True)
class Place:
    """Where a state stands in its buffers.

    Attributes:
        buffers: shared by all states of the same sequences.
        lengths: real tokens of each row, [batch].
        stamp: of the call that made it.
    """

    buffers: Buffers
    lengths: Ints
    stamp: int

    @property
    def columns(self) -> int:
        """Positions of the longest row."""
        return int(self.lengths.max())


@dataclass(frozen=True)
class Outcome:
    """What a call of an engine gives.

    Attributes:
        logits: of the columns asked for, [batch, kept, vocabulary] float32.
        routing: decisions, [batch, routed] int64.
        scores: [batch, routed] float32, `UNSCORED` where none was computed.
        present: keys and values for which there was no buffer yet, by name of the graph's output.
    """

    logits: Floats
    routing: Ints
    scores: Floats
    present: dict[str, npt.NDArray[Any]]


class BufferedRunner(Runner):
    """See the module.

    A state and those made from it share their buffers. Going on from an earlier state is fine and
    overwrites what later ones have written; these are then refused with a `ValueError`.
    """

    alone = True

    @abstractmethod
    def _run(self, buffers: Any, feeds: dict[str, npt.NDArray[Any]], routing: Ints) -> Outcome:
        """Call the engine.

        Args:
            buffers: of the sequences; their keys and values are read and written.
            feeds: the graph's other inputs by name, contiguous.
            routing: the decisions that were handed in, [batch, routed].
        """

    @abstractmethod
    def _new_buffers(self, capacity: int, seen: Ints) -> Any:
        """Empty `Buffers`, of the engine's own class."""

    @abstractmethod
    def _allocate(self, buffers: Any, layer: int, rows: int) -> None:
        """Memory for a layer's keys and values."""

    def _grow(self, buffers: Any, capacity: int, used: int) -> None:
        """More room, what is in the first ``used`` positions kept; not where it is fixed."""
        raise NotImplementedError

    def forward(self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats) -> State:
        """See `Runner.forward`; a prompt may have padding on its left only."""
        return self._forward(input_ids, mask, cache, routing, tau, last=False)

    def forward_last(
        self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats
    ) -> State:
        """See `Runner.forward_last`: the head reads one position of each row."""
        return self._forward(input_ids, mask, cache, routing, tau, last=True)

    def extend(self, state: State, tokens: Ints, mask: Ints | None = None) -> State:
        """See `Runner.extend`; nothing that grows with the context is allocated or copied."""
        place: Place = state.cache
        buffers, columns = place.buffers, state.mask.shape[1]
        self._check(place)
        whole = columns + tokens.shape[1]
        if whole > buffers.seen.shape[1]:
            roomy = np.zeros((len(tokens), 2 * whole), dtype=np.int64)
            roomy[:, :columns] = state.mask
            buffers.seen = roomy
        buffers.seen[:, columns:whole] = 1 if mask is None else mask
        seen = buffers.seen[:, :whole]
        after = self.forward(tokens, seen, place, state.routing, self._tau(None))
        return replace(after, scores=state.scores)

    def select(self, state: State, rows: Sequence[int]) -> State:
        """See `Runner.select`."""
        place: Place = state.cache
        self._check(place)
        chosen = list(rows)
        lengths = place.lengths[chosen]
        columns = int(lengths.max())
        buffers = self._new_buffers(self._room(columns), state.mask[chosen])
        for layer in self.contract.cached_layers:
            taken = cache_rows(self.contract, layer, state.routing, rows)
            self._allocate(buffers, layer, len(taken))
            for part in ("key", "value"):
                name = past(layer, part)
                used = place.buffers.arrays[name][:, :, :columns]
                buffers.arrays[name][:, :, :columns] = used[taken]
        stamp = next(_STAMPS)
        buffers.writes.append((columns, stamp))
        return selected(state, rows, Place(buffers, lengths, stamp))

    def kv_bytes(self, state: State) -> int:
        """Of the positions and rows that hold something; see `Runner.kv_bytes`."""
        place: Place = state.cache
        columns, executed = place.columns, dict(zip(
            self.contract.routed_layers, state.routing.sum(axis=0).tolist(), strict=True
        ))  # fmt: skip
        each = 2 * self.contract.kv_heads * self.contract.head_dim
        each *= np.dtype(self.contract.dtype).itemsize
        compact = self.contract.compact_layers
        rows = sum(
            executed[layer] if layer in compact else len(place.lengths)
            for layer in self.contract.cached_layers
        )
        return int(rows) * columns * each

    # -- calls --

    def _forward(
        self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats, *, last: bool
    ) -> State:
        if cache is None:
            return self._prefill(input_ids, mask, routing, tau, last)
        new = input_ids.shape[1]
        whole = bool(mask[:, mask.shape[1] - new :].all())
        if new == 1 or (whole and len(input_ids) == 1):
            return self._extend(input_ids, mask, cache, routing, tau, last)
        # The kernel reads several new positions for one sequence at a time only, and padding
        # among them would be taken for tokens.
        states: list[State] = []
        for column in range(new):
            upto = mask[:, : mask.shape[1] - new + column + 1]
            step = input_ids[:, column : column + 1]
            states.append(self._extend(step, upto, cache, routing, tau, last))
            cache, routing = states[-1].cache, states[-1].routing
        logits = np.concatenate([state.logits for state in states], axis=1)
        return replace(states[-1], logits=logits[:, -1:] if last else logits, mask=mask)

    def _prefill(
        self, input_ids: Ints, mask: Ints, routing: Ints, tau: Floats, last: bool
    ) -> State:
        batch, columns = input_ids.shape
        lengths = mask.sum(axis=1)
        first = mask.argmax(axis=1)
        if (mask.cumsum(axis=1)[:, -1] != lengths).any() or (
            mask != (np.arange(columns) >= first[:, None])
        ).any():
            raise ValueError("a prompt has padding after its first token.")
        # From padding on the left to padding on the right, and back for the logits.
        columns_of = (np.arange(columns) + first[:, None]) % columns
        ids = np.take_along_axis(input_ids, columns_of, axis=1)
        positions = np.broadcast_to(np.arange(columns), ids.shape)
        at = np.clip(np.arange(columns) - first[:, None], 0, None)
        buffers = self._new_buffers(self._room(columns), mask)
        # Rows of a routed layer are known once it has decided; of a single row they do not matter.
        open_layers = set(self.contract.compact_layers) if batch > 1 else set()
        for layer in set(self.contract.cached_layers) - open_layers:
            self._allocate(buffers, layer, batch)
        state, present = self._call(
            ids, lengths, positions, at[:, -1:] if last else at, routing, tau, buffers, lengths
        )  # fmt: skip
        for layer in open_layers:
            rows = int(state.routing[:, self.contract.routed_layers.index(layer)].sum())
            self._allocate(buffers, layer, rows)
            for part in ("key", "value") if rows else ():
                given = present[f"present.{layer}.{part}"]
                buffers.arrays[past(layer, part)][:, :, :columns] = given
        return replace(state, mask=mask)

    def _extend(
        self, input_ids: Ints, mask: Ints, place: Place, routing: Ints, tau: Floats, last: bool
    ) -> State:
        buffers, new = place.buffers, input_ids.shape[1]
        self._check(place)
        while buffers.writes[-1] != (place.columns, place.stamp):
            buffers.writes.pop()
        # A row that is given padding writes it behind its tokens, and does not count it.
        lengths = place.lengths + new
        columns = int(lengths.max())
        if columns > buffers.capacity:
            self._grow(buffers, self._room(columns), place.columns)
        at = np.broadcast_to(np.arange(new), input_ids.shape)
        positions = place.lengths[:, None] + np.arange(new)
        state, _ = self._call(
            input_ids, lengths, positions, at[:, -1:] if last else at, routing, tau, buffers,
            place.lengths + mask[:, mask.shape[1] - new :].sum(axis=1),
        )  # fmt: skip
        return replace(state, mask=mask)

    def _call(
        self,
        ids: Ints,
        attended: Ints,
        positions: Ints,
        at: Ints,
        routing: Ints,
        tau: Floats,
        buffers: Buffers,
        lengths: Ints,
    ) -> tuple[State, dict[str, npt.NDArray[Any]]]:
        """One call; gives a state without its mask, and what there was no buffer for.

        Args:
            ids: [batch, new].
            attended: positions of each row that attention reads, new ones with them, [batch].
            positions: [batch, new].
            at: columns whose logits are wanted, [batch, kept].
            routing: [batch, routed].
            tau: [routed].
            buffers: of the sequences.
            lengths: real tokens of each row afterwards, [batch].
        """
        columns = self._mask_columns(buffers, attended)
        if 0 < self.contract.positions < columns:
            raise ArtifactError(
                f"a sequence of {columns} positions, but this graph has tables for "
                f"{self.contract.positions}, some more than the model was made for.",
                "Shorten the prompt, or ask for fewer tokens.",
            )
        # Contiguous, as the runtime wants it, in memory that is there already.
        mask = buffers.attended[: len(ids) * columns].reshape(len(ids), columns)
        np.less(buffers.counted[:columns], attended[:, None], out=mask)
        arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "logits_at": at,
        }
        if self.contract.routed_layers:
            arrays |= {"routing": routing, "tau": tau}
        feeds = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        found = self._run(buffers, feeds, routing)
        stamp = next(_STAMPS)
        place = Place(buffers, lengths, stamp)
        buffers.writes.append((place.columns, stamp))
        scores = found.scores
        scores[(routing != UNDECIDED) | (scores == UNSCORED)] = np.nan
        return State(found.logits, found.routing, scores, mask, place), found.present

    def _mask_columns(self, buffers: Buffers, attended: Ints) -> int:
        """Width of the graph's mask: as far as any row is attended to."""
        return int(attended.max())

    def _check(self, place: Place) -> None:
        if (place.columns, place.stamp) not in place.buffers.writes:
            raise ValueError(
                "this state's keys and values were overwritten by going on from an earlier state."
            )

    def _room(self, columns: int) -> int:
        """Positions that a buffer gets for so many."""
        return 2 * columns + ROOM

    def _shape(self, rows: int, capacity: int) -> Sequence[int]:
        return (rows, self.contract.kv_heads, capacity, self.contract.head_dim)


class FixedBuffers(BufferedRunner):
    """Buffers of the capacity that the graph fixes; its mask covers all of it."""

    def _mask_columns(self, buffers: Buffers, attended: Ints) -> int:
        return buffers.capacity

    def _room(self, columns: int) -> int:
        capacity = self.contract.capacity
        if columns > capacity:
            raise ArtifactError(
                f"a sequence of {columns} positions, but this graph was exported for {capacity}.",
                f"Export with: --profile context={columns} or more.",
            )
        return capacity


def past(layer: int, part: str) -> str:
    """Name of the graph's input of a layer's "key" or "value"."""
    return f"past_key_values.{layer}.{part}"
