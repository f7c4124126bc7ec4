"""Prefill, chunks, turns and single steps, by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from by_hand import CLOSE, MakeRouters, Prompts, by_hand, inputs, mixed, no_scoring, prefill
from torch import Tensor
from transformers import LlamaForCausalLM

from mskip.compressor.encoding import Batch
from mskip.compressor.skipping import MindSkip


@pytest.mark.parametrize("layers", [[0, 2], [1, 2]])
def test_prefill_and_decoding_is_one_long_forward(
    model: LlamaForCausalLM, tiny_routers: MakeRouters, prompt_batch: Prompts, layers: list[int]
) -> None:
    batch = prompt_batch([7, 4, 7, 2, 5, 6, 3, 7])
    answer = prompt_batch([5] * 8, seed=1)["input_ids"]
    ids = torch.cat([batch["input_ids"], answer], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(answer)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prompt_mask = torch.cat([batch["prompt_mask"], torch.zeros_like(answer).bool()], dim=1)
    with MindSkip(model, tiny_routers(model, layers)) as skip:
        cache = prefill(skip, batch)
        decisions = cache.decisions.clone()
        assert mixed(decisions)
        steps = [
            model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                past_key_values=cache,
            ).logits
            for t in range(7, 12)
        ]
        whole = model(ids, attention_mask=mask, position_ids=positions, prompt_mask=prompt_mask)
    assert torch.equal(whole.past_key_values.decisions, decisions)
    assert torch.equal(cache.decisions, decisions)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits[:, 7:], **CLOSE)


def test_chunked_prefill_decides_at_the_first_chunk(skip: MindSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([12] * 6)["input_ids"]
    first = skip.model(ids[:, :5]).past_key_values.decisions.clone()
    whole = skip.model(ids).past_key_values.decisions
    assert not torch.equal(first, whole)  # otherwise the test shows nothing

    cache = None
    chunks = []
    for chunk in ids.split(5, dim=1):
        output = skip.model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chunks.append(output.logits)
        assert torch.equal(cache.decisions, first)
    at_once = skip.model(ids, past_key_values=skip.cache(first)).logits
    torch.testing.assert_close(torch.cat(chunks, dim=1), at_once, **CLOSE)


def test_chunked_prefill_with_forced_decisions_is_whole_prefill(
    skip: MindSkip, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([12] * 4)["input_ids"]
    routing = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    cache = skip.cache(routing)
    chunks = [skip.model(chunk, past_key_values=cache).logits for chunk in ids.split([1, 7, 4], 1)]
    logits = torch.cat(chunks, dim=1)
    for row in range(4):
        alone = by_hand(skip, ids[row : row + 1], routing[row])
        torch.testing.assert_close(logits[row], alone[0], **CLOSE)


def test_one_token_prompt_is_a_prompt(
    skip: MindSkip, prompt_batch: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt_batch([2] * 8)["input_ids"]
    output = skip.model(ids[:, :1])
    cache = output.past_key_values
    decisions = cache.decisions.clone()
    assert mixed(decisions)
    for row in range(8):
        alone = by_hand(skip, ids[row : row + 1, :1], decisions[row])
        torch.testing.assert_close(output.logits[row], alone[0], **CLOSE)
    with no_scoring(monkeypatch):
        second = skip.model(ids[:, 1:], past_key_values=cache).logits
    for row in range(8):
        alone = by_hand(skip, ids[row : row + 1], decisions[row])
        torch.testing.assert_close(second[row, 0], alone[0, 1], **CLOSE)


def test_second_turn_keeps_the_decisions(
    skip: MindSkip, prompt_batch: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt_batch([13] * 6)["input_ids"]
    cache = skip.model(ids[:, :6]).past_key_values
    decisions = cache.decisions.clone()
    with no_scoring(monkeypatch):
        skip.model(ids[:, 6:7], past_key_values=cache)
        turn = skip.model(ids[:, 7:], past_key_values=cache).logits
    assert torch.equal(cache.decisions, decisions)
    for row in range(6):
        alone = by_hand(skip, ids[row : row + 1], decisions[row])
        torch.testing.assert_close(turn[row], alone[0, 7:], **CLOSE)


def test_interleaved_generations_do_not_meet(skip: MindSkip, prompt_batch: Prompts) -> None:
    sequences = [prompt_batch([9] * 3, seed=seed)["input_ids"] for seed in (0, 1)]

    def steps(ids: Tensor) -> Iterator[Tensor]:
        cache = None
        for part in ids.split([5, 1, 1, 2], dim=1):
            output = skip.model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            yield output.logits

    apart = [list(steps(ids)) for ids in sequences]
    woven = list(zip(*(steps(ids) for ids in sequences), strict=True))
    for one, other, both in zip(*apart, woven, strict=True):
        assert torch.equal(one, both[0])
        assert torch.equal(other, both[1])


def test_copied_cache_continues_on_its_own(skip: MindSkip, prompt_batch: Prompts) -> None:
    """One prefix, two continuations."""
    ids = prompt_batch([6] * 4)["input_ids"]
    cache = skip.model(ids[:, :4]).past_key_values
    copied = copy.deepcopy(cache)
    expected = skip.model(ids[:, 4:], past_key_values=cache).logits
    assert copied.get_seq_length() == 4
    assert torch.equal(skip.model(ids[:, 4:], past_key_values=copied).logits, expected)


def test_reset_cache_is_an_empty_one(skip: MindSkip, batch: Batch, prompt_batch: Prompts) -> None:
    cache = prefill(skip, batch)
    cache.reset()
    assert cache.get_seq_length() == cache.kv_bytes() == 0
    other = inputs(prompt_batch([5, 6, 7], seed=5))
    again = skip.model(**other, past_key_values=cache)
    assert again.past_key_values is cache
    fresh = skip.model(**other)
    assert torch.equal(again.logits, fresh.logits)
    assert torch.equal(cache.decisions, fresh.past_key_values.decisions)
