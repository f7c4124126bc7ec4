"""A KV cache that holds executed tokens only, each routed layer its own.

A token that skips a routed attention leaves no key and no value there: later
tokens do not see it at that layer (Mixture-of-Depths, arXiv 2404.02258, section
3). Sequences then hold different numbers of keys, so the cache has an entry a
sequence. docs/per-token.md has the alternatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from mskip.compressor.sublayers import Sublayers, as_sublayers

Columns = dict[int, Tensor]
"""Sequences of a batch, and of each the columns of its keys: [held] int64, ascending."""


class TokenLayer(DynamicLayer):
    """Keys and values of one routed attention or block, for the executed tokens only.

    Attributes:
        seen: positions that the model has seen, whether or not this sublayer executed;
            masks and positions follow the model.
        columns: which of those positions each key belongs to, [held] int64 a sequence.
        row_keys: [held, kv heads, head dim] a sequence; no list before the first executed
            token. Never changed in place, so beams may share them.
        row_values: as ``row_keys``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reset()

    def reset(self) -> None:
        """Forget everything, the sequences too."""
        self.seen = 0
        self.columns: list[Tensor] = []
        self.row_keys: list[Tensor] = []
        self.row_values: list[Tensor] = []

    def open(self, batch: int, device: torch.device) -> None:
        """Give the layer its sequences, all of them empty."""
        self.columns = [torch.empty(0, dtype=torch.int64, device=device)] * batch

    def append(self, after: Columns, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the executed tokens of some sequences.

        Args:
            after: the columns that these sequences hold afterwards.
            keys: of the new tokens, [len(after), kv heads, n, head dim], padded on the right.
            values: same shape.

        Returns:
            All keys and values of these sequences, [len(after), kv heads, longest, head dim],
            padded on the right with zeros.
        """
        if not self.row_keys:
            self.row_keys, self.row_values = (
                [states.new_empty(0, states.shape[1], states.shape[3])] * len(self.columns)
                for states in (keys, values)
            )
        for number, (row, columns) in enumerate(after.items()):
            new = len(columns) - len(self.columns[row])
            for entries, states in ((self.row_keys, keys), (self.row_values, values)):
                entries[row] = torch.cat([entries[row], states[number, :, :new].transpose(0, 1)])
            self.columns[row] = columns
        return (
            _padded([self.row_keys[row] for row in after]),
            _padded([self.row_values[row] for row in after]),
        )

    def get_seq_length(self) -> int:
        """Positions seen by the model."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; ``tokens_to_remove`` is not positive, as in the base class."""
        super().crop(tokens_to_remove)  # refuses a positive number
        if not tokens_to_remove:
            return
        self.seen = max(0, self.seen - abs(tokens_to_remove))
        held = [int((columns < self.seen).sum()) for columns in self.columns]
        for entries in (self.columns, self.row_keys, self.row_values):
            # Copied, as what is cut off would stay in memory behind a view.
            entries[:] = [entry[:n].clone() for entry, n in zip(entries, held, strict=False)]

    def _select(self, rows: list[int]) -> None:
        for entries in (self.columns, self.row_keys, self.row_values):
            entries[:] = [entries[row] for row in rows] if entries else []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``b`` continues the sequence ``beam_idx[b]``."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences ``indices``."""
        self._select(torch.arange(len(self.columns))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        self._select([row for row in range(len(self.columns)) for _ in range(repeats)])


class TokenCache(DynamicCache):
    """`DynamicCache` whose routed layers hold executed tokens only, with what was decided.

    No decision depends on an earlier one, so ``decisions`` and ``scores`` are a record;
    what the model needs of the past is which keys are held.

    Attributes:
        decisions: [batch, seen, routed] int8 of UNDECIDED (padding) / SKIP / EXECUTE; None
            before the first call.
        scores: same shape, float32, NaN on padding; None before the first call.

    Args:
        config: the model's configuration.
        sublayers: what is routed; a bare list of layers means their attention.
    """

    decisions: Tensor | None
    scores: Tensor | None

    def __init__(self, config: PreTrainedConfig, sublayers: Sublayers | list[int]) -> None:
        super().__init__(config=config)
        self.sublayers = as_sublayers(sublayers)
        self.decisions = None
        self.scores = None
        for layer in self.sublayers.cached:
            self.layers[layer] = TokenLayer()

    def extend(self, decisions: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for the positions of one call.

        Args:
            decisions: of this call, [batch, positions, routed] int8.
            scores: same shape, float32.

        Returns:
            The cache's own storage of both, for a pass to fill in.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        batch, positions = decisions.shape[:2]
        if self.decisions is None or self.scores is None:
            for layer in self._token_layers():
                layer.open(batch, decisions.device)
            self.decisions, self.scores = decisions, scores
        elif len(self.decisions) != batch:
            raise ValueError(
                f"the cache holds {len(self.decisions)} sequences; the call has {batch}"
            )
        else:
            self.decisions = torch.cat([self.decisions, decisions], dim=1)
            self.scores = torch.cat([self.scores, scores], dim=1)
        return self.decisions[:, -positions:], self.scores[:, -positions:]

    def _token_layers(self) -> list[TokenLayer]:
        return [layer for layer in self.layers if isinstance(layer, TokenLayer)]

    def _record(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.decisions is not None and self.scores is not None:
            self.decisions, self.scores = change(self.decisions), change(self.scores)

    def reset(self) -> None:
        """Forget everything, decisions included."""
        super().reset()  # type: ignore[no-untyped-call]
        self.decisions = None
        self.scores = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions."""
        super().crop(tokens_to_remove)
        self._record(lambda record: record[:, : record.shape[1] - abs(tokens_to_remove)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search: row ``b`` continues the sequence ``beam_idx[b]``."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._record(lambda record: record[beam_idx.to(record.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences ``indices``."""
        super().batch_select_indices(indices)
        self._record(lambda record: record[indices.to(record.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._record(lambda record: record.repeat_interleave(repeats, dim=0))

    def kv_bytes(self) -> int:
        """Bytes held by keys and values; what beams share counts once."""
        held: dict[int, Tensor] = {}
        for layer in self.layers:
            if isinstance(layer, TokenLayer):
                held.update({id(entry): entry for entry in layer.row_keys + layer.row_values})
            elif isinstance(layer, DynamicLayer):
                states = (layer.keys, layer.values)
                held.update({id(entry): entry for entry in states if entry is not None})
        return sum(entry.nbytes for entry in held.values())


def _padded(entries: list[Tensor]) -> Tensor:
    """[n, heads, longest, dim] of n tensors [held, heads, dim]."""
    padded = entries[0].unsqueeze(0) if len(entries) == 1 else pad_sequence(entries, True)
    return padded.transpose(1, 2)
