"""Kernels in the Triton language that do no work for the sequences of a batch that skip.

Each reads the decisions from device memory, so the host never waits for them and a step can be
captured in a CUDA graph: a product with a weight, and attention over buffers of keys and values.
What a skipping sequence gets is zeros. Arguments stand in the order that TensorRT's ahead-of-time
plugins want: inputs, sizes, outputs.

Import this module late: it needs triton, which has no wheels for some systems.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mskip.exporters.tiles import Tile, chosen, few

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, step by step; read by triton when it is imported."""


@triton.jit  # type: ignore[untyped-decorator]
def linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, execute_ptr, rows, positions, inner, outer, out_ptr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``x @ weight``; a tile without an executing row ends at once.

    Args:
        x_ptr: [rows, inner], contiguous; ``positions`` rows a sequence.
        weight_ptr: [inner, outer], or [outer, inner] where TRANSPOSED.
        execute_ptr: int32 a sequence, 0 where it skips.
        rows: of x, of all sequences.
        positions: of a sequence.
        inner: columns of x.
        outer: columns of the result.
        out_ptr: [rows, outer]; zeros where a sequence skips.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there, wanted = row < rows, column < outer
    gate = tl.load(execute_ptr + row // positions, mask=there, other=0)
    runs = gate != 0
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if tl.max(gate, axis=0) != 0:
        wide = row.to(tl.int64)[:, None] * inner
        for start in range(0, inner, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(
                x_ptr + wide + k[None, :], mask=runs[:, None] & (k < inner)[None, :], other=0.0
            )
            if TRANSPOSED:
                at = column.to(tl.int64)[None, :] * inner + k[:, None]
            else:
                at = k.to(tl.int64)[:, None] * outer + column[None, :]
            right = tl.load(weight_ptr + at, mask=(k < inner)[:, None] & wanted[None, :], other=0.0)
            sums = tl.dot(left, right, sums, input_precision="ieee")
    to = row.to(tl.int64)[:, None] * outer + column[None, :]
    tl.store(out_ptr + to, sums.to(out_ptr.dtype.element_ty), mask=there[:, None] & wanted[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def attention_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, mask_ptr, execute_ptr, positions_ptr,
    heads, kv_heads, new, capacity, out_ptr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of some queries of the heads that share their keys; sums in float32.

    Args:
        query_ptr: [batch, heads, new, head dim], contiguous.
        key_ptr: [batch, kv heads, capacity, head dim]; new positions are written already.
        value_ptr: like the keys.
        mask_ptr: what is added to the scores, [batch, 1, new, capacity], finite.
        execute_ptr: [batch] int32, 0 where the sequence skips.
        positions_ptr: of the queries, [batch, new] int64; later keys are not read.
        heads: of the queries.
        kv_heads: of the keys.
        new: queries of a head.
        capacity: keys that a buffer has room for.
        out_ptr: [batch, new, heads, head dim]; zeros where the sequence skips.
    """
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    group = heads // kv_heads
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = m < group * new
    place, d = m % new, tl.arange(0, BLOCK_D)
    wide = there[:, None] & (d < HEAD)[None, :]
    first = batch.to(tl.int64) * heads + kv_head * group
    found = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    if tl.load(execute_ptr + batch) != 0:
        # Heads of a group, and their positions, lie one after the other.
        query = tl.load(
            query_ptr + (first * new + m[:, None]) * HEAD + d[None, :], mask=wide, other=0.0
        )
        at = tl.load(positions_ptr + batch * new + place, mask=there, other=0)
        end = tl.minimum(tl.max(at, axis=0) + 1, capacity).to(tl.int32)
        start = 0
        if WINDOW > 0:
            nearest = tl.min(tl.where(there, at, capacity), axis=0).to(tl.int32)
            start = tl.maximum(nearest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        keys = (batch.to(tl.int64) * kv_heads + kv_head) * capacity * HEAD
        masks = (batch.to(tl.int64) * new + place)[:, None] * capacity
        highest = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for low in range(start, end, BLOCK_N):
            n = low + tl.arange(0, BLOCK_N)
            inside = n < end
            cells = keys + n[:, None] * HEAD + d[None, :]
            seen = inside[:, None] & (d < HEAD)[None, :]
            key = tl.load(key_ptr + cells, mask=seen, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALE
            if SOFTCAP > 0:
                # tanh x = 2 sigmoid 2x - 1
                scores = SOFTCAP * (2 * tl.sigmoid(2 * scores / SOFTCAP) - 1)
            added = tl.load(
                mask_ptr + masks + n[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
            scores = tl.where(inside[None, :], scores + added.to(tl.float32), -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            shares = tl.exp(scores - higher[:, None])
            shrunk = tl.exp(highest - higher)
            total = total * shrunk + tl.sum(shares, axis=1)
            value = tl.load(value_ptr + cells, mask=seen, other=0.0)
            found = found * shrunk[:, None]
            found = tl.dot(shares.to(value.dtype), value, found, input_precision="ieee")
            highest = higher
        found = found / total[:, None]
    head = kv_head * group + m // new
    to = ((batch.to(tl.int64) * new + place) * heads + head)[:, None] * HEAD + d[None, :]
    tl.store(out_ptr + to, found.to(out_ptr.dtype.element_ty), mask=wide)


def linear(
    x: Tensor,
    weight: Tensor,
    execute: Tensor,
    *,
    transposed: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """``x @ weight`` for the sequences that execute, zeros for the others.

    Args:
        x: [batch, positions, inner].
        weight: [inner, outer]; [outer, inner], as in `torch.nn.Linear`, where ``transposed``.
        execute: [batch] int32, 0 where the sequence skips; it is not read on the host.
        transposed: see ``weight``.
        tile: how the work is cut.

    Returns:
        [batch, positions, outer], of the type of ``x``.
    """
    batch, positions, inner = x.shape
    outer = weight.shape[0] if transposed else weight.shape[1]
    x, rows = x.contiguous(), batch * positions
    tile = tile or chosen("linear", *_where(x), prompt=not few(rows))
    out = torch.empty(batch, positions, outer, dtype=x.dtype, device=x.device)
    grid = triton.cdiv(rows, tile.m), triton.cdiv(outer, tile.n)
    linear_kernel[grid](
        x, weight.contiguous(), execute, rows, positions, inner, outer, out, TRANSPOSED=transposed,
        **_launch(tile),
    )  # fmt: skip
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    execute: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    tile: Tile | None = None,
) -> Tensor:
    """Attention over buffers for the sequences that execute, zeros for the others.

    Args:
        query: [batch, heads, new, head dim].
        key: [batch, kv heads, capacity, head dim], the new ones in it.
        value: like ``key``.
        mask: added to the scores, [batch, 1, new, capacity], finite.
        execute: see `linear`.
        positions: of the queries, [batch, new] int64.
        scale: of the scores; 1 / sqrt(head dim) if None.
        softcap: largest score; 0 for no limit.
        window: positions that a query looks back on, itself included; 0 for all. It spares reads:
            what is not to be seen, the mask has to say all the same.
        tile: how the work is cut.

    Returns:
        [batch, new, heads, head dim], of the type of ``query``.
    """
    batch, heads, new, head = query.shape
    kv_heads, capacity = key.shape[1:3]
    group = heads // kv_heads
    tile = tile or chosen("attention", *_where(query), prompt=not few(group * new), head=head)
    out = torch.empty(batch, new, heads, head, dtype=query.dtype, device=query.device)
    grid = triton.cdiv(group * new, tile.m), batch * kv_heads
    attention_kernel[grid](
        query.contiguous(), key, value, mask.contiguous(), execute, positions.contiguous(),
        heads, kv_heads, new, capacity, out, **attention_constants(head, scale, softcap, window),
        **_launch(tile),
    )  # fmt: skip
    return out


def attention_constants(
    head: int, scale: float | None = None, softcap: float = 0.0, window: int = 0
) -> dict[str, Any]:
    """Constants of `attention_kernel` that say what is computed."""
    return {
        "SCALE": head**-0.5 if scale is None else scale,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "HEAD": head,
        "BLOCK_D": max(16, triton.next_power_of_2(head)),
    }


def _where(states: Tensor) -> tuple[str | None, str]:
    """Compute capability of the GPU that holds the states, and their type."""
    dtype = str(states.dtype).removeprefix("torch.")
    return (_capability(states.device) if states.is_cuda else None), dtype


@cache
def _capability(device: torch.device) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _launch(tile: Tile) -> dict[str, int]:
    return {**tile.constants(), "num_warps": tile.warps, "num_stages": tile.stages}
