"""transformers' cache interface over graph inputs, while a model is traced."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mskip.exporters.contract import WITH_CAPACITY, Target


class GraphCache:
    """The model's cache interface over graph inputs: reads past, collects present."""

    is_compileable = False

    def __init__(self, past: list[tuple[Tensor, Tensor]], length: Any) -> None:
        self.past = past
        self.length = length
        self.present: list[tuple[Tensor, Tensor] | None] = [None] * len(past)
        self.is_sliding = [False] * len(past)
        self.positions: Tensor | None = None
        """Of the new tokens, [batch, sequence]; set by who calls the model."""

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Positions in the past."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the first query."""
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        """Width of the mask, and the position of its first key."""
        return self.width(query_length), 0

    def width(self, new: Any) -> Any:
        """Positions of the present, after a call with ``new`` ones."""
        return self.length + new

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values."""
        past_key, past_value = self.past[layer_idx]
        present = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.present[layer_idx] = present
        return present


class FusedCache(GraphCache):
    """Of a graph whose attention appends by itself: it is handed the new keys and values only.

    Which cache and layer it is called for is left in `PENDING`, since models hand their
    attention function neither.
    """

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `GraphCache.update`."""
        PENDING.set((self, layer_idx))
        return key, value


class BufferCache(GraphCache):
    """Of a graph that writes into buffers of a fixed capacity, at places that it is told.

    The write is left as a node of mskip's own, `WRITE` (past, new), whose place lowering adds.
    """

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `GraphCache.update`."""

        def written(past: Tensor, new: Tensor) -> Tensor:
            present: Tensor = torch.onnx.ops.symbolic(
                WRITE, (past, new), dtype=past.dtype, shape=past.shape, version=1
            )
            return present

        past_key, past_value = self.past[layer_idx]
        present = written(past_key, key), written(past_value, value)
        self.present[layer_idx] = present
        return present

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Positions of the rows' first queries, [batch, 1, 1, 1]: rows stand at different ones."""
        assert self.positions is not None
        return self.positions[:, :1, None, None]

    def width(self, new: Any) -> Any:
        """See `GraphCache.width`."""
        return self.length


WRITE = "mskip::CacheWrite"

PENDING: ContextVar[tuple[GraphCache, int]] = ContextVar("pending")


def graph_cache(target: Target) -> type[GraphCache]:
    """The class of cache that a target's attention works with."""
    if target in WITH_CAPACITY:
        return BufferCache
    return FusedCache if target == "ort" else GraphCache


def buffer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor,
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Tensor:
    """A table for `BufferCache`: 0 where a query attends, the least number elsewhere.

    Args:
        batch_size: rows.
        q_length: new positions.
        kv_length: the buffers' capacity.
        q_offset: see `BufferCache.get_query_offset`.
        mask_function: the architecture's: which key a query could see.
        attention_mask: which positions of the buffers hold a token, [batch, capacity] bool.
        dtype: of the scores.

    Returns:
        [batch, 1, sequence, capacity].
    """
    device = attention_mask.device
    queries = q_offset + torch.arange(q_length, device=device)[:, None]
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    keys = torch.arange(kv_length, device=device)[None, None, None]
    visible = mask_function(rows, 0, queries, keys) & attention_mask[:, None, None]
    return torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
