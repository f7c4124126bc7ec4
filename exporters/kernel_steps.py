"""Decoding in PyTorch with the kernels of `mskip.exporters.routed_kernels`.

Keys and values lie in buffers with room for more positions, decisions are tensors that only the
device reads, and no tensor's shape depends on a decision. So a step never waits for the host, and
on a GPU it is captured once in a CUDA graph and replayed. Executing and skipping sequences share
a batch; those that skip cost the products and the attention nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from mskip.compressor.cache import ExecutingRows, RoutedCache
from mskip.compressor.errors import MissingExtraError, ModelError
from mskip.compressor.families import family_of
from mskip.compressor.models import BaseModel
from mskip.compressor.router import Routers
from mskip.compressor.routing import Call
from mskip.exporters.attention_choice import attention_as, require_choice
from mskip.exporters.graph_cache import PENDING, BufferCache, buffer_mask
from mskip.exporters.runner import Ints

_NAME = "mskip_kernels"
ROOM = 256
"""Positions that buffers get beyond what they are made from."""
_EAGER_STEPS = 2
"""Steps before one is captured: kernels compile, libraries make their workspaces."""


class StepCache(BufferCache):
    """The model's cache interface over buffers that are written in place."""

    def __init__(self, past: list[tuple[Tensor, Tensor]], flags: Tensor, positions: Tensor) -> None:
        super().__init__(past, past[0][0].shape[2])
        self.flags = flags
        """Who executes a decoder layer, [layers, batch] int32."""
        self.positions = positions

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `GraphCache.update`."""
        assert self.positions is not None
        at = self.positions[:, None, :, None].expand_as(key)
        past_key, past_value = self.past[layer_idx]
        past_key.scatter_(2, at, key)
        past_value.scatter_(2, at, value)
        PENDING.set((self, layer_idx))
        return past_key, past_value


@dataclass
class StepBuffers:
    """What the steps of a batch read and write, all on the model's device.

    Attributes:
        keys: of each decoder layer, [batch, kv heads, capacity, head dim].
        values: like the keys.
        flags: who executes a routed sublayer, [routed, batch] int32.
        tokens: of the step, [batch, 1].
        lengths: positions of each row before the step, [batch] int64.
        logits: of the step, [batch, 1, vocabulary].
        steps: that were made.
        graph: the captured step, on a GPU.
        writes: columns and stamp of each step, in order.
    """

    keys: list[Tensor]
    values: list[Tensor]
    flags: Tensor
    tokens: Tensor
    lengths: Tensor
    logits: Tensor
    steps: int = 0
    graph: Any = None
    writes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self.keys[0].shape[2]

    def nbytes(self) -> int:
        """Bytes of keys and values, with their room."""
        return sum(each.nbytes for each in (*self.keys, *self.values))


@dataclass(frozen=True)
class StepPlace:
    """Where a state stands in its buffers: after so many columns, by which step."""

    buffers: StepBuffers
    columns: int
    stamp: int


class KernelSteps:
    """Decoding steps of a patched model.

    Args:
        base: the model, patched for these routers.
        routers: its routers.

    Raises:
        MissingExtraError: triton is not installed.
        ModelError: no GPU and no interpreter, or an architecture that does not let its attention
            be chosen.
    """

    def __init__(self, base: BaseModel, routers: Routers) -> None:
        try:
            from mskip.exporters import routed_kernels
        except ImportError:
            raise MissingExtraError("triton", "kernels") from None
        model = base.model
        if model.device.type != "cuda" and not routed_kernels.INTERPRETED:
            raise ModelError(
                f"the kernels run on an NVIDIA GPU; this model is on {model.device.type}.",
                "Leave kernels out, or set TRITON_INTERPRET=1 to try them slowly on the CPU.",
            )
        require_choice(model, "the kernels cannot take its place", "Leave kernels out.")
        self.model, self.routers = model, routers
        self._kernels = routed_kernels
        family, kind = family_of(model), routers.sublayers.granularity
        self._linears = [
            (part, index)
            for index, layer in enumerate(routers.layers)
            for part in family.sublayer_of(model, layer, kind).modules()
            if type(part) is nn.Linear
        ]
        self._layers = len(family.decoder_layers(model))

    # -- buffers --

    def buffers_from(self, cache: RoutedCache, routing: Ints, mask: Ints) -> StepBuffers:
        """Buffers with what a prefill left, each row's real tokens first.

        Args:
            cache: the prefill's.
            routing: decisions, [batch, routed].
            mask: [batch, columns], 1 on real tokens; padding on the left.
        """
        columns, rows = mask.shape[1], len(mask)
        first = columns - mask.sum(axis=1)
        executed = dict(zip(self.routers.sublayers.cached, routing.T, strict=False))
        keys, values = [], []
        held = [layer.keys for layer in cache.layers if isinstance(layer, DynamicLayer)]
        like = next(each for each in held if each is not None)
        shape = rows, like.shape[1], columns + ROOM, like.shape[3]
        for number, layer in enumerate(cache.layers):
            assert isinstance(layer, DynamicLayer)
            pair = tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in "kv")
            order = range(rows)
            if isinstance(layer, ExecutingRows):
                order = np.flatnonzero(executed[number])  # type: ignore[assignment]
            for compact, row in enumerate(order):
                for into, old in zip(pair, (layer.keys, layer.values), strict=True):
                    assert old is not None
                    gone = columns - old.shape[2]  # of a window, the positions it has left
                    start = max(int(first[row]), gone)
                    to = slice(start - int(first[row]), columns - int(first[row]))
                    into[row, :, to] = old[compact, :, start - gone :]
            keys.append(pair[0])
            values.append(pair[1])
        return self._made(keys, values, routing)

    def _made(self, keys: list[Tensor], values: list[Tensor], routing: Ints) -> StepBuffers:
        rows, device = len(routing), keys[0].device
        vocabulary = self.model.config.get_text_config().vocab_size
        return StepBuffers(
            keys,
            values,
            torch.from_numpy(np.ascontiguousarray(routing.T == 1)).to(device, torch.int32),
            torch.zeros(rows, 1, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, 1, vocabulary, dtype=self.model.dtype, device=device),
        )

    def selected(self, buffers: StepBuffers, rows: list[int], routing: Ints) -> StepBuffers:
        """A copy with the given rows; ``routing`` is theirs."""
        return self._made(
            [each[rows] for each in buffers.keys],
            [each[rows] for each in buffers.values],
            routing,
        )

    def grown(self, buffers: StepBuffers, routing: Ints) -> StepBuffers:
        """A copy with twice the room."""

        def larger(old: Tensor) -> Tensor:
            rows, heads, capacity, dim = old.shape
            new = old.new_zeros(rows, heads, 2 * capacity, dim)
            new[:, :, :capacity] = old
            return new

        keys, values = map(larger, buffers.keys), map(larger, buffers.values)
        return self._made(list(keys), list(values), routing)

    # -- steps --

    def step(self, buffers: StepBuffers) -> None:
        """``buffers.tokens`` at ``buffers.lengths``; the logits are left in ``buffers.logits``.

        Nothing is read on the host. On a GPU the step is captured in a CUDA graph after a few.
        """
        if self.model.device.type == "cuda" and buffers.steps >= _EAGER_STEPS:
            if buffers.graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._run(buffers)
                buffers.graph = graph
            buffers.graph.replay()
        else:
            self._run(buffers)
        buffers.steps += 1

    @torch.no_grad()
    def _run(self, buffers: StepBuffers) -> None:
        positions = buffers.lengths[:, None]
        cache = StepCache(
            list(zip(buffers.keys, buffers.values, strict=True)),
            self._flags(buffers),
            positions,
        )
        counted = torch.arange(buffers.capacity, device=positions.device)
        with self._in_force(buffers.flags):
            logits = self.model(
                input_ids=buffers.tokens,
                attention_mask=(counted[None] <= positions).to(torch.int64),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                routing=_StepPass(buffers.flags),
            ).logits
        buffers.logits.copy_(logits[:, -1:])

    def _flags(self, buffers: StepBuffers) -> Tensor:
        """Who executes the attention of each decoder layer, [layers, batch] int32."""
        flags = torch.ones(
            self._layers, len(buffers.tokens), dtype=torch.int32, device=buffers.flags.device
        )
        for index, layer in enumerate(self.routers.sublayers.cached):
            flags[layer] = buffers.flags[index]
        return flags

    @contextlib.contextmanager
    def _in_force(self, flags: Tensor) -> Iterator[None]:
        """The model's attention and the routed sublayers' products are the kernels'."""

        def product(part: nn.Linear, execute: Tensor) -> Any:
            def forward(states: Tensor) -> Tensor:
                found: Tensor = self._kernels.linear(states, part.weight, execute, transposed=True)
                return found if part.bias is None else found + part.bias

            return forward

        for part, index in self._linears:
            part.forward = product(part, flags[index])  # type: ignore[method-assign]
        try:
            with attention_as(self.model, _NAME, self._attention, buffer_mask):
                yield
        finally:
            for part, _ in self._linears:
                del part.forward

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface; the result is [batch, new, heads, head dim]."""
        if others.get("s_aux") is not None:
            raise ModelError(
                f"{type(module).__name__} has learned sinks, which the kernels lack.",
                "Leave kernels out.",
            )
        cache, layer = PENDING.get()
        assert isinstance(cache, StepCache)
        assert cache.positions is not None
        output = self._kernels.attention(
            query, key, value, attention_mask, cache.flags[layer], cache.positions,
            scale=scaling, softcap=float(softcap or 0.0), window=int(sliding_window or 0),
        )  # fmt: skip
        return output, None


class _StepPass:
    """Runs a routed sublayer for all rows, whose kernels look at ``flags``, and selects."""

    def __init__(self, flags: Tensor) -> None:
        self.flags = flags

    def __call__(self, call: Call) -> Tensor:
        """See `mskip.compressor.routing.Pass`."""
        output = call.execute(None)
        everyone = torch.arange(call.batch, device=output.device)
        skipped = call.skip(everyone).to(output.dtype)
        return torch.where(self.flags[call.index].bool()[:, None, None], output, skipped)
