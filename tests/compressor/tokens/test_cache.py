"""The cache of executed tokens' keys and values, and what cannot hold them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from by_hand import LAYERS, LENGTHS, MakeModel, MakeRouters, Prompts, inputs
from token_oracle import close, routers_for
from torch import Tensor
from transformers import DynamicCache

from mskip.compressor.cache import RoutedCache
from mskip.compressor.errors import ModelError
from mskip.compressor.routing import EXECUTE
from mskip.compressor.sublayers import Granularity
from mskip.compressor.token_cache import TokenCache, TokenLayer
from mskip.compressor.token_skipping import TokenSkip


def test_keys_and_values_are_those_of_executed_tokens(
    skip: TokenSkip, granularity: Granularity, prompt_batch: Prompts
) -> None:
    batch = prompt_batch(LENGTHS)
    cache = skip.model(**inputs(batch), use_cache=True).past_key_values
    skip.model(
        torch.full((8, 1), 5),
        attention_mask=torch.cat([batch["attention_mask"], torch.ones(8, 1)], dim=1),
        past_key_values=cache,
    )
    executed = (cache.decisions == EXECUTE).sum(dim=(0, 1)).tolist()
    held = {0: 80, 1: 80, 2: 80, 3: 80}
    if granularity != "mlp":
        held |= dict(zip(LAYERS, executed, strict=True))
        assert sum(executed) < 100
    # 2 KV heads of 8 numbers, keys and values.
    size = cache.layers[1].keys.element_size()
    assert cache.kv_bytes() == sum(held.values()) * 2 * 8 * 2 * size
    assert [cache.get_seq_length(layer) for layer in range(4)] == [10] * 4
    for index, layer in enumerate(LAYERS if granularity != "mlp" else []):
        kept = cache.layers[layer]
        assert isinstance(kept, TokenLayer)
        for row in range(8):
            columns = (cache.decisions[row, :, index] == EXECUTE).nonzero()[:, 0]
            assert torch.equal(kept.columns[row], columns)
            assert kept.row_keys[row].shape == kept.row_values[row].shape == (len(columns), 2, 8)
            # No view of something larger stays alive behind an entry.
            storage = kept.row_keys[row].untyped_storage().nbytes()
            assert storage == kept.row_keys[row].nbytes


def following(skip: TokenSkip, cache: TokenCache, batch: int) -> Tensor:
    ids = torch.tensor([[7, 8, 9]]).expand(batch, -1)
    logits: Tensor = skip.model(ids, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("tau", [0.5, 1.1])
def test_a_cropped_cache_is_as_if_the_tokens_had_not_been(
    skip: TokenSkip, prompt_batch: Prompts, tau: float
) -> None:
    skip.tau.fill_(tau)
    ids = prompt_batch([8, 8, 8])["input_ids"]
    short = skip.model(ids[:, :5], use_cache=True).past_key_values
    cropped = skip.model(ids, use_cache=True).past_key_values
    cropped.crop(0)
    cropped.crop(-3)
    assert torch.equal(cropped.decisions, short.decisions)
    assert cropped.kv_bytes() == short.kv_bytes()
    close(following(skip, cropped, 3), following(skip, short, 3))
    with pytest.raises(ValueError, match="positive"):
        cropped.crop(4)


def test_rows_of_a_cache_can_be_chosen_and_repeated(skip: TokenSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([8] * 3)["input_ids"]
    cases: list[tuple[Callable[[TokenCache], None], list[int]]] = [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]
    for change, rows in cases:
        cache = skip.model(ids, use_cache=True).past_key_values
        change(cache)
        expected = skip.model(ids[rows], use_cache=True).past_key_values
        assert torch.equal(cache.decisions, expected.decisions)
        close(following(skip, cache, len(rows)), following(skip, expected, len(rows)))


def test_a_cache_is_used_anew_after_reset(skip: TokenSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([8] * 3)["input_ids"]
    fresh = skip.model(ids[:2], use_cache=True)
    cache = skip.model(ids, use_cache=True).past_key_values
    cache.reset()
    assert cache.kv_bytes() == cache.get_seq_length() == 0
    assert torch.equal(skip.model(ids[:2], past_key_values=cache).logits, fresh.logits)
    assert torch.equal(cache.decisions, fresh.past_key_values.decisions)


def test_caches_that_cannot_hold_tokens_are_refused(
    skip: TokenSkip, granularity: Granularity, prompt_batch: Prompts
) -> None:
    model, ids = skip.model, prompt_batch([5])["input_ids"]
    full = model(ids, routing=None, use_cache=True).past_key_values
    others = [full, RoutedCache(model.config, skip.routers.sublayers)]
    for cache in others:
        with pytest.raises(ModelError, match="cannot carry routing decisions"):
            model(ids, past_key_values=cache)
    if granularity != "mlp":
        routing = skip.token_pass(torch.ones_like(ids, dtype=torch.bool))
        with pytest.raises(ModelError, match="single tokens"):
            model(ids, past_key_values=DynamicCache(config=model.config), routing=routing)
    with pytest.raises(ModelError, match="two-dimensional attention mask"):
        model(ids, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


def test_attention_without_a_mask_a_query_is_refused(
    tiny_model: MakeModel, tiny_routers: MakeRouters
) -> None:
    model = tiny_model()
    routers = routers_for(model, tiny_routers)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="'flash_attention_2' cannot run some tokens"):
        TokenSkip(model, routers)
