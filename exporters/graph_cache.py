"""transformers' cache interface over graph inputs, while a model is traced."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mskip.exporters.contract import Target


class GraphCache:
    """The model's cache interface over graph inputs: reads past, collects present."""

    is_compileable = False

    def __init__(self, past: list[tuple[Tensor, Tensor]], length: Any) -> None:
        self.past = past
        self.length = length
        self.present: list[tuple[Tensor, Tensor] | None] = [None] * len(past)
        self.is_sliding = [False] * len(past)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Positions in the past."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the first query."""
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        """Width of the mask, and the position of its first key."""
        return self.length + query_length, 0

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


PENDING: ContextVar[tuple[FusedCache, int]] = ContextVar("pending")


def graph_cache(target: Target) -> type[GraphCache]:
    """The class of cache that a target's attention works with."""
    return FusedCache if target == "ort" else GraphCache
