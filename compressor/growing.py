"""Keys and values that lie in memory with room for more, so that a step copies one position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Positions of room at least; else half of those that are held."""


@dataclass
class _Memory:
    """Shared by a layer and its copies.

    Attributes:
        keys: [rows, kv heads, positions and room, head dim].
        values: likewise.
        used: positions that some layer has written.
    """

    keys: Tensor
    values: Tensor
    used: int


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` that appends in place.

    transformers' own joins old and new at every step: a copy of all that is held, whose growing
    pieces leave the allocator's heap full of holes (after 48 steps of 9 contexts of 900 tokens,
    6 GB for 0.4 GB of keys and values). `keys` and `values` are views of what is written, and a
    position that a copy of this layer can see is never written again: the copy that goes on first
    goes on in place, any other takes memory of its own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory: _Memory | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append positions, [rows, kv heads, new, head dim]; gives all of them."""
        if torch.is_grad_enabled():  # A backward pass may want what was there.
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        before = keys.shape[-2] if keys.numel() else 0
        after = before + key_states.shape[-2]
        memory = self._memory
        if memory is None or not _ends(memory, keys, values, before, after):
            memory = self._memory = _Memory(
                _with_room(keys, key_states, before, after),
                _with_room(values, value_states, before, after),
                before,
            )
        memory.keys[:, :, before:after] = key_states
        memory.values[:, :, before:after] = value_states
        memory.used = after
        self.keys, self.values = memory.keys[:, :, :after], memory.values[:, :, :after]
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        self._memory = None
        super().reset()


def _ends(memory: _Memory, keys: Tensor, values: Tensor, before: int, after: int) -> bool:
    """Whether these are all that is written there, with room for more.

    Rows that were selected, moved to another device or cut lie elsewhere, or end earlier.
    """
    return (
        memory.used == before
        # An inference tensor is not written to outside of inference mode.
        and memory.keys.is_inference() == torch.is_inference_mode_enabled()
        and after <= memory.keys.shape[-2]
        and len(keys) == len(memory.keys)
        and keys.data_ptr() == memory.keys.data_ptr()
        and values.data_ptr() == memory.values.data_ptr()
    )


def _with_room(held: Tensor, new: Tensor, before: int, after: int) -> Tensor:
    rows, heads, _, width = new.shape
    memory = new.new_empty(rows, heads, after + max(ROOM, after // 2), width)
    if before:
        memory[:, :, :before] = held
    return memory
