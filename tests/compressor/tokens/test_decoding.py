"""One call, chunks, single tokens, turns, windows and generation agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from by_hand import CLOSE, LENGTHS, MakeRouters, Prompts, greedy, inputs
from token_oracle import close, prompt_of, routers_for
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from mskip.compressor.encoding import Batch
from mskip.compressor.routing import EXECUTE
from mskip.compressor.sublayers import Granularity
from mskip.compressor.token_cache import TokenCache
from mskip.compressor.token_calibration import executed_share
from mskip.compressor.token_skipping import TokenSkip


def in_chunks(skip: TokenSkip, batch: Batch, sizes: list[int]) -> tuple[Tensor, TokenCache]:
    """Logits of all positions, run chunk by chunk."""
    cache, logits, start = skip.cache(), [], 0
    for size in sizes:
        end = start + size
        output = skip.model(
            input_ids=batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            position_ids=batch["position_ids"][:, start:end],
            past_key_values=cache,
        )
        logits.append(output.logits)
        start = end
    assert start == batch["input_ids"].shape[1]
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [LENGTHS, [9] * 8], ids=["padded", "alike"])
@pytest.mark.parametrize("sizes", [[9], [4, 1, 4], [1] * 9, [2, 7]], ids=str)
def test_prefill_in_one_go_in_chunks_and_token_by_token_agree(
    skip: TokenSkip,
    prompt_batch: Prompts,
    side: Literal["left", "right"],
    lengths: list[int],
    sizes: list[int],
) -> None:
    batch = prompt_batch(lengths, side=side)
    real = batch["attention_mask"].bool()
    whole = skip.token_pass(real)
    expected = skip.model(**inputs(batch), routing=whole).logits
    logits, cache = in_chunks(skip, batch, sizes)
    assert torch.equal(cache.decisions, whole.decisions)
    torch.testing.assert_close(cache.scores[real], whole.scores[real], **CLOSE)
    close(logits[real], expected[real])


def test_a_second_turn_finds_the_first(skip: TokenSkip, prompt_batch: Prompts) -> None:
    """Right padding stays in the middle of the cache: its keys are hidden, or not there."""
    first, second = prompt_batch([5, 3, 4], side="right"), prompt_batch([3, 3, 3], seed=1)
    output = skip.model(**inputs(first), use_cache=True)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    lengths = first["attention_mask"].sum(dim=1, keepdim=True)
    output = skip.model(
        input_ids=second["input_ids"],
        attention_mask=mask,
        position_ids=lengths + torch.arange(3),
        past_key_values=output.past_key_values,
    )
    for row in range(3):
        ids = torch.cat([prompt_of(first, row), second["input_ids"][row]])[None]
        close(output.logits[row], skip.model(ids, use_cache=False).logits[0, -3:])


WINDOWED: dict[str, Callable[..., Any]] = {
    "mistral": lambda **sizes: MistralForCausalLM(MistralConfig(**sizes)),
    # Layers 0, 1 and 3 slide; norms follow the sublayers.
    "gemma3": lambda **sizes: Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, head_dim=8, sliding_window_pattern=3)
    ),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", list(WINDOWED))
def test_sliding_windows_hold(
    tiny_routers: MakeRouters,
    prompt_batch: Prompts,
    granularity: Granularity,
    family: str,
    attention: str,
) -> None:
    """Routed layers keep all executed keys, the others a window: their masks begin apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WINDOWED[family](
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
            sliding_window=4, pad_token_id=0, attn_implementation=attention,
        ).eval().requires_grad_(False)  # fmt: skip
    batch = prompt_batch([14, 9, 12])
    real = batch["attention_mask"].bool()
    dense = model(**inputs(batch)).logits[real]
    routers = routers_for(model, tiny_routers, granularity)
    for tau in (0.0, 0.5):
        with TokenSkip(model, routers, tau) as skip:
            whole = model(**inputs(batch), use_cache=False).logits[real]
            for sizes in ([14], [5, 1, 8], [1] * 14):
                logits, cache = in_chunks(skip, batch, sizes)
                close(logits[real], whole)
        assert torch.allclose(whole, dense, atol=1e-4) == (tau == 0.0)
    assert 0.2 < executed_share([cache.decisions[real] == EXECUTE]) < 0.8
    assert model.config._attn_implementation == attention


def test_generation_in_a_batch_is_each_prompt_alone_and_needs_no_cache(
    skip: TokenSkip, prompt_batch: Prompts
) -> None:
    batch = prompt_batch([5, 3, 5, 1])
    mask = batch["attention_mask"]
    together = greedy(skip.model, batch["input_ids"], attention_mask=mask)
    uncached = greedy(skip.model, batch["input_ids"], attention_mask=mask, use_cache=False)
    assert together.tolist() == uncached.tolist()
    for row in range(4):
        assert greedy(skip.model, prompt_of(batch, row)[None]).tolist() == [together[row].tolist()]
    skip.detach()
    assert greedy(skip.model, batch["input_ids"], attention_mask=mask).tolist() != together.tolist()


def test_beams_and_looked_up_drafts(skip: TokenSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([6])["input_ids"].repeat(1, 2)  # repeats itself, so that drafts are made
    beams = {"num_beams": 3, "tokens": 5}
    assert greedy(skip.model, ids, **beams).equal(greedy(skip.model, ids, **beams, use_cache=False))
    drafted = greedy(skip.model, ids, tokens=8, prompt_lookup_num_tokens=3)
    assert drafted.equal(greedy(skip.model, ids, tokens=8))


def test_generations_can_interleave(skip: TokenSkip, prompt_batch: Prompts) -> None:
    model = skip.model
    prompts = [prompt_batch([length], seed=length)["input_ids"] for length in (5, 8)]
    alone = [greedy(model, ids, 4).tolist() for ids in prompts]
    outputs = [model(ids, use_cache=True) for ids in prompts]
    new: list[list[int]] = [[], []]
    for _ in range(4):
        for n in (0, 1):
            token = outputs[n].logits[:, -1:].argmax(-1)
            new[n].append(int(token))
            outputs[n] = model(token, past_key_values=outputs[n].past_key_values)
    assert [[tokens] for tokens in new] == alone
