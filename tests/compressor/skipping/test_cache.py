"""What transformers does to a cache: rows rearranged, positions cropped, foreign caches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from by_hand import CLOSE, Prompts, by_hand, greedy, mixed, no_scoring
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from mskip.compressor.cache import RoutedCache
from mskip.compressor.errors import ModelError
from mskip.compressor.skipping import MindSkip

REARRANGED: dict[str, tuple[Callable[[RoutedCache], None], list[int]]] = {
    "reorder": (
        lambda cache: cache.reorder_cache(torch.tensor([5, 0, 0, 7, 1, 6, 6, 2])),
        [5, 0, 0, 7, 1, 6, 6, 2],
    ),
    "select": (
        lambda cache: cache.batch_select_indices(torch.tensor([6, 0, 2, 1])),
        [6, 0, 2, 1],
    ),
    "select one": (lambda cache: cache.batch_select_indices(torch.tensor([3])), [3]),
    "repeat": (
        lambda cache: cache.batch_repeat_interleave(2),
        [row for row in range(8) for _ in range(2)],
    ),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_rearranged_rows_keep_their_decisions_and_keys(
    skip: MindSkip, prompt_batch: Prompts, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rearrange, rows = REARRANGED[name]
    ids = prompt_batch([6] * 8)["input_ids"]
    cache = skip.model(ids[:, :5]).past_key_values
    decisions, scores = cache.decisions.clone(), cache.scores.clone()
    assert mixed(decisions)
    rearrange(cache)
    assert torch.equal(cache.decisions, decisions[rows])
    assert torch.equal(cache.scores, scores[rows])
    with no_scoring(monkeypatch):
        step = skip.model(ids[rows, 5:], past_key_values=cache).logits
    for place, row in enumerate(rows):
        alone = by_hand(skip, ids[row : row + 1], decisions[row])
        torch.testing.assert_close(step[place, 0], alone[0, 5], **CLOSE)


def test_rearranging_a_cache_without_sequences_does_nothing(skip: MindSkip) -> None:
    cache = skip.cache()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    assert cache.decisions is None


def test_crop_takes_back_the_last_positions(skip: MindSkip, prompt_batch: Prompts) -> None:
    """A draft of three tokens of which one is accepted."""
    ids = prompt_batch([9] * 6)["input_ids"]
    draft = prompt_batch([2] * 6, seed=1)["input_ids"]
    cache = skip.model(ids[:, :5]).past_key_values
    decisions = cache.decisions.clone()
    assert mixed(decisions)
    skip.model(torch.cat([ids[:, 5:6], draft], dim=1), past_key_values=cache)
    cache.crop(-2)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [6] * 4
    rest = skip.model(ids[:, 6:], past_key_values=cache).logits
    assert torch.equal(cache.decisions, decisions)
    for row in range(6):
        alone = by_hand(skip, ids[row : row + 1], decisions[row])
        torch.testing.assert_close(rest[row], alone[0, 6:], **CLOSE)


@pytest.mark.parametrize("decision", [0, 1])
def test_crop_of_more_than_there_is_leaves_nothing(
    skip: MindSkip, prompt_batch: Prompts, decision: int
) -> None:
    cache = skip.cache(torch.full((2, 2), decision))
    skip.model(prompt_batch([4, 4])["input_ids"], past_key_values=cache)
    cache.crop(0)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [4] * 4
    cache.crop(-9)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [0] * 4


def test_foreign_caches_are_refused(
    skip: MindSkip, model: LlamaForCausalLM, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([4, 4])["input_ids"]
    dense = model(ids, routing=None, use_cache=True).past_key_values
    assert type(dense) is DynamicCache
    with pytest.raises(ModelError, match="DynamicCache cannot carry routing decisions"):
        skip.model(ids, past_key_values=dense)
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ModelError, match="StaticCache cannot carry routing decisions"):
        skip.model(ids, past_key_values=static)
    # For this cache `generate` may make a mask of four dimensions, which is refused first.
    with pytest.raises(ModelError, match=r"StaticCache|two-dimensional"):
        greedy(model, ids, cache_implementation="static")
