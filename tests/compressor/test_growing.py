"""`GrowingLayer`: what transformers' layer holds, without its copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mskip.compressor.growing import ROOM, GrowingLayer


def states(seed: int, new: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, rows, 2, new, 4, generator=generator)
    return made[0], made[1]


def given(layer: DynamicLayer, *parts: tuple[Tensor, Tensor]) -> DynamicLayer:
    for keys, values in parts:
        layer.update(keys, values)
    return layer


def same(layer: DynamicLayer, *parts: tuple[Tensor, Tensor]) -> None:
    assert layer.keys is not None
    assert layer.values is not None
    assert torch.equal(layer.keys, torch.cat([keys for keys, _ in parts], dim=2))
    assert torch.equal(layer.values, torch.cat([values for _, values in parts], dim=2))


@torch.no_grad()
def test_steps_are_written_in_place_until_the_room_is_used() -> None:
    parts = [states(0, 5), *(states(seed, 1) for seed in range(1, 2 * ROOM))]
    layer = given(GrowingLayer(), parts[0])
    places = set()
    for part in parts[1:]:
        given(layer, part)
        assert layer.keys is not None
        places.add(layer.keys.data_ptr())
    same(layer, *parts)
    assert len(places) == 2


@torch.no_grad()
def test_copies_go_their_own_ways() -> None:
    prompt, one, two, three = (states(seed, new) for seed, new in enumerate([5, 1, 2, 1]))
    first = given(GrowingLayer(), prompt)
    before = copy.copy(first)
    given(first, one)
    second = given(copy.copy(before), two)
    third = given(copy.copy(first), three)
    same(before, prompt)
    same(first, prompt, one)
    same(second, prompt, two)
    same(third, prompt, one, three)
    # The one that goes on first pays nothing, the other takes memory of its own.
    assert before.keys is not None
    assert first.keys is not None
    assert second.keys is not None
    assert first.keys.data_ptr() == before.keys.data_ptr() != second.keys.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "select", "repeat", "reorder", "reset"])
def test_what_transformers_does_to_a_layer(change: str) -> None:
    prompt, step = states(0, 5), states(1, 1)
    layers = [given(GrowingLayer(), prompt), given(DynamicLayer(), prompt)]  # type: ignore[no-untyped-call]
    witness = copy.copy(layers[0])
    for layer in layers:
        rows = 3
        if change == "crop":
            layer.crop(-2)
        elif change == "select":
            layer.batch_select_indices(torch.tensor([2, 0]))
            rows = 2
        elif change == "repeat":
            layer.batch_repeat_interleave(2)
            rows = 6
        elif change == "reorder":
            layer.reorder_cache(torch.tensor([2, 0, 1]))
        else:
            layer.reset()
        given(layer, tuple(part[:1].repeat(rows, 1, 1, 1) for part in step))  # type: ignore[arg-type]
    mine, theirs = layers
    assert mine.keys is not None
    assert mine.values is not None
    assert torch.equal(mine.keys, theirs.keys)
    assert torch.equal(mine.values, theirs.values)
    assert mine.get_seq_length() == theirs.get_seq_length()
    same(witness, prompt)


def test_a_backward_pass_finds_what_was_there() -> None:
    keys, values = states(0, 5)
    keys.requires_grad_()
    layer = GrowingLayer()
    held, _ = layer.update(keys, values)
    loss = held.square().sum()
    later, _ = layer.update(*states(1, 1))
    (loss + later.sum()).backward()
    assert keys.grad is not None
    torch.testing.assert_close(keys.grad, 2 * keys.detach() + 1)


def test_inference_mode_and_back() -> None:
    parts = [states(seed, 2) for seed in range(3)]
    with torch.inference_mode():
        layer = given(GrowingLayer(), parts[0])
    with torch.no_grad():
        given(layer, parts[1], parts[2])
    same(layer, *parts)
