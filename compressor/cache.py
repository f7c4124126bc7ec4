"""A KV cache that carries the decisions and holds only executing rows.

The decisions belong to the sequences, so they travel with the cache: a second
turn, a chunk of a long prompt or a one-token step finds them there, and two
generations with two caches cannot disturb each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mskip.compressor.growing import GrowingLayer
from mskip.compressor.routing import EXECUTE, fresh_decisions
from mskip.compressor.sublayers import Sublayers, as_sublayers


class ExecutingRows(DynamicLayer):
    """Keys and values of one routed attention or block, for the executing rows only.

    The length counts the positions the model has seen, whether or not this
    sublayer executed, because masks and positions follow the model.
    """

    def skip(self, positions: int) -> None:
        """Let ``positions`` pass without keys or values."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> None:
        """Keep the given compact rows, in the given order, with repeats."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows)
            self.values = self.values.index_select(0, rows)


class RoutedLayer(ExecutingRows, GrowingLayer):
    """Of full attention: ``keys`` and ``values`` are [executing rows, kv heads, seen, head dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new positions of the executing rows."""
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def skip(self, positions: int) -> None:
        """Let ``positions`` pass without keys or values."""
        self.seen += positions

    def get_seq_length(self) -> int:
        """Positions seen by the model."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; ``tokens_to_remove`` is not positive, as in the base class."""
        super().crop(tokens_to_remove)
        self.seen = max(0, self.seen - abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0


class RoutedSlidingLayer(ExecutingRows, DynamicSlidingWindowLayer):
    """Of sliding attention: no more than the last ``sliding_window - 1`` positions are held.

    Args:
        sliding_window: positions a token attends to, itself included.
    """

    def skip(self, positions: int) -> None:
        """Let ``positions`` pass without keys or values."""
        self.cumulative_length += positions

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; ``tokens_to_remove`` is not positive, as in the base class.

        Raises:
            RuntimeError: the window has been left, and past positions were not recorded.
        """
        if self.keys is not None and len(self.keys):
            super().crop(tokens_to_remove)
        else:  # Nobody executes: there is a length and nothing else.
            DynamicLayer.crop(self, tokens_to_remove)
            self.cumulative_length = max(0, self.cumulative_length - abs(tokens_to_remove))


def _routed(dense: Any) -> ExecutingRows:
    """The layer that takes the place of a `DynamicCache`'s own."""
    if isinstance(dense, DynamicSlidingWindowLayer):
        return RoutedSlidingLayer(dense.sliding_window)
    return RoutedLayer()


class RoutedCache(DynamicCache):
    """`DynamicCache` with routed layers and the decisions of its sequences.

    Attributes:
        decisions: [batch, routed] int8, None before the first call.
        scores: [batch, routed] float32, NaN where a decision was given rather
            than taken; None before the first call.

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
        for number, layer in enumerate(self.layers):
            if number in self.sublayers.cached:
                self.layers[number] = _routed(layer)
            elif type(layer) is DynamicLayer:
                self.layers[number] = GrowingLayer()

    def open(self, batch: int, device: torch.device, routing: Tensor | None = None) -> None:
        """Give the cache its sequences, if it has none yet.

        Args:
            batch: number of sequences.
            device: device of the model's inputs.
            routing: decisions given from outside, [batch, routed]; None leaves
                every decision to the first call.
        """
        if self.decisions is None:
            decisions, scores = fresh_decisions(batch, len(self.sublayers))
            self.decisions = (decisions if routing is None else routing).to(device)
            self.scores = scores.to(device)

    def reset(self) -> None:
        """Forget everything, decisions included."""
        super().reset()  # type: ignore[no-untyped-call]
        self.decisions = None
        self.scores = None

    def _select(self, rows: Tensor) -> None:
        assert self.decisions is not None
        assert self.scores is not None
        rows = rows.to(self.decisions.device)
        for index, layer in enumerate(self.sublayers.cached):
            executing = self.decisions[:, index] == EXECUTE
            compact = executing.cumsum(0) - 1
            kept = compact[rows][executing[rows]]
            routed = self.layers[layer]
            assert isinstance(routed, ExecutingRows)
            routed.select(kept)
        for cached in self.layers:
            if isinstance(cached, DynamicLayer) and not isinstance(cached, ExecutingRows):
                cached.batch_select_indices(rows)
        self.decisions = self.decisions[rows]
        self.scores = self.scores[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search: row ``b`` continues the sequence ``beam_idx[b]``."""
        if self.decisions is not None:
            self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences ``indices``."""
        if self.decisions is not None:
            self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        if self.decisions is not None:
            self._select(torch.arange(len(self.decisions)).repeat_interleave(repeats))

    def kv_bytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(
            tensor.nbytes
            for layer in self.layers
            if isinstance(layer, DynamicLayer)
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )
