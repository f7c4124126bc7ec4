"""transformers' generate: greedy, beams, chunks, drafts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from by_hand import LAYERS, MakeModel, Prompts, by_hand, greedy, prefill, prompt_of, removed
from torch import Tensor
from transformers import DynamicCache

from mskip.compressor.cache import RoutedCache
from mskip.compressor.encoding import Batch
from mskip.compressor.errors import ModelError
from mskip.compressor.routing import EXECUTE
from mskip.compressor.skipping import MindSkip


def test_greedy_generation_is_one_by_one(skip: MindSkip, batch: Batch) -> None:
    together = greedy(skip.model, batch["input_ids"], attention_mask=batch["attention_mask"])
    decisions = prefill(skip, batch).decisions
    for row in range(8):
        prompt = prompt_of(batch, row)
        assert torch.equal(greedy(skip.model, prompt)[0], together[row])
        for _ in range(6):  # and it is the model without its skipped sublayers that speaks
            token = by_hand(skip, prompt, decisions[row])[:, -1:].argmax(-1)
            prompt = torch.cat([prompt, token], dim=1)
        assert torch.equal(prompt[0, -6:], together[row])
    skip.detach()
    dense = greedy(skip.model, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert not torch.equal(dense, together)  # skipping shows


def test_beam_search_is_row_by_row(skip: MindSkip, batch: Batch) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "tokens": 5}
    together = greedy(
        skip.model, batch["input_ids"], attention_mask=batch["attention_mask"], **options
    )
    for row in range(8):
        alone = greedy(skip.model, prompt_of(batch, row), **options)
        assert torch.equal(alone, together[2 * row : 2 * row + 2])


def test_beam_search_is_that_of_the_model_without_the_sublayers(
    skip: MindSkip, tiny_model: MakeModel, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([6] * 4)["input_ids"]
    decisions = skip.model(ids).past_key_values.decisions
    plain = tiny_model(attn_implementation=skip.model.config._attn_implementation)
    plain.generation_config.eos_token_id = None
    found = greedy(skip.model, ids, tokens=6, num_beams=4)
    for row in range(4):
        layers = [layer for layer, d in zip(LAYERS, decisions[row], strict=True) if d != EXECUTE]
        with removed(plain, layers):
            expected = greedy(plain, ids[row : row + 1], tokens=6, num_beams=4)
        assert torch.equal(found[row], expected[0])


def test_generate_goes_on_from_a_cache(skip: MindSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([7] * 5)["input_ids"]
    first = skip.model.generate(
        ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    cache = first.past_key_values
    decisions = cache.decisions.clone()
    said = torch.cat([first.sequences, prompt_batch([2] * 5, seed=3)["input_ids"]], dim=1)
    found = greedy(skip.model, said, tokens=3, past_key_values=cache)
    assert torch.equal(cache.decisions, decisions)
    for row in range(5):
        ids = said[row : row + 1]
        for _ in range(3):
            token = by_hand(skip, ids, decisions[row])[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
        assert torch.equal(ids[0, -3:], found[row])


def test_chunked_generate_decides_at_the_first_chunk(skip: MindSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([11] * 4)["input_ids"]
    first = skip.model(ids[:, :4]).past_key_values.decisions
    chunked = greedy(skip.model, ids, prefill_chunk_size=4)
    given_ = greedy(skip.model, ids, past_key_values=skip.cache(first))
    assert torch.equal(chunked, given_)


def test_chunk_of_padding_only_is_refused(skip: MindSkip, prompt_batch: Prompts) -> None:
    batch = prompt_batch([12, *[3] * 9])
    with pytest.raises(ModelError, match="all padding"):
        skip.model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            prefill_chunk_size=4,
            max_new_tokens=1,
        )


def test_a_users_own_cache_is_filled(skip: MindSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([6, 6])["input_ids"]
    cache = DynamicCache(config=skip.model.config)
    skip.model(ids, past_key_values=cache)
    assert isinstance(cache, RoutedCache)
    assert cache.get_seq_length() == 6
    assert cache.decisions is not None


def looping(prompt_batch: Prompts) -> Iterator[Tensor]:
    """Prompts that repeat themselves, so that prompt lookup has something to propose."""
    for ids in prompt_batch([4] * 12)["input_ids"]:
        yield ids.repeat(2).unsqueeze(0)


def test_assisted_generation_from_a_prefilled_prompt_is_greedy(
    skip: MindSkip, prompt_batch: Prompts
) -> None:
    for ids in looping(prompt_batch):
        decisions = skip.model(ids).past_key_values.decisions
        expected = greedy(skip.model, ids, tokens=8)
        cache = skip.cache(decisions)
        found = greedy(skip.model, ids, tokens=8, past_key_values=cache, prompt_lookup_num_tokens=3)
        assert torch.equal(found, expected)
        assert torch.equal(cache.decisions, decisions)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="assisted decoding puts its first draft into the call that decides",
)
def test_assisted_generation_is_greedy(skip: MindSkip, prompt_batch: Prompts) -> None:
    for ids in looping(prompt_batch):
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
        plain = skip.model.generate(ids, **options).past_key_values
        assisted = skip.model.generate(ids, **options, prompt_lookup_num_tokens=3).past_key_values
        torch.testing.assert_close(assisted.scores, plain.scores, rtol=0, atol=1e-5)
