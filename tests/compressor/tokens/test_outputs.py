"""One call that decides by the token, against the oracle: what comes out, and what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from by_hand import (
    CLOSE,
    LAYERS,
    LENGTHS,
    MakeModel,
    MakeRouters,
    Prompts,
    everything,
    inputs,
    zeroed,
)
from token_oracle import Oracle, close, prompt_of, routers_for
from torch import Tensor
from transformers import LlamaForCausalLM

from mskip.compressor.errors import ModelError
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE, UNDECIDED
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity, Sublayers
from mskip.compressor.token_cache import TokenCache
from mskip.compressor.token_skipping import TokenSkip


def test_the_oracle_is_the_dense_model_where_all_execute(
    model: LlamaForCausalLM, oracle: Oracle, tiny_routers: MakeRouters, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([9])["input_ids"]
    logits = oracle(tiny_routers(model, LAYERS), ids[0], tau=0.0).logits
    close(model(ids).logits[0], logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [0, 4, 32], ids=["identity", "rank 4", "full rank"])
def test_a_batch_is_each_sequence_by_hand(
    model: LlamaForCausalLM,
    oracle: Oracle,
    tiny_routers: MakeRouters,
    prompt_batch: Prompts,
    granularity: Granularity,
    side: Literal["left", "right"],
    rank: int,
) -> None:
    routers = routers_for(model, tiny_routers, granularity, rank)
    batch = prompt_batch(LENGTHS, side=side)
    real = batch["attention_mask"].bool()
    with TokenSkip(model, routers) as skip:
        routing = skip.token_pass(real)
        output = skip.model(**inputs(batch), routing=routing)
        assert output.past_key_values is None
        assert skip.model(**inputs(batch), use_cache=False).logits[real].equal(output.logits[real])
        cached = skip.model(**inputs(batch), use_cache=True)
    assert isinstance(cached.past_key_values, TokenCache)
    assert torch.equal(cached.past_key_values.decisions, routing.decisions)
    close(cached.logits[real], output.logits[real])
    share = (routing.decisions[real] == EXECUTE).double().mean(dim=0)
    assert bool(((share > 0.2) & (share < 0.8)).all()), "the test needs mixed decisions"
    for row in range(len(LENGTHS)):
        expected = oracle(routers, prompt_of(batch, row))
        assert torch.equal(routing.decisions[row, real[row]] == EXECUTE, expected.decisions)
        scores = torch.sigmoid(expected.router_logits).float()
        torch.testing.assert_close(routing.scores[row, real[row]], scores, **CLOSE)
        close(output.logits[row, real[row]], expected.logits)
    assert bool((routing.decisions[~real] == UNDECIDED).all())
    assert bool(routing.scores[~real].isnan().all())


@contextmanager
def tokens_seen(model: LlamaForCausalLM) -> Iterator[dict[str, int]]:
    """Tokens that went through each layer's query and up projections, padding of rows too."""
    seen: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any) -> None:
            seen[name] = seen.get(name, 0) + args[0].shape[:-1].numel()

        return hook

    hooks = [
        module.register_forward_pre_hook(count(f"{layer} {kind}"))
        for layer, block in enumerate(model.model.layers)
        for kind, module in (("attention", block.self_attn.q_proj), ("mlp", block.mlp.up_proj))
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def removed(model: LlamaForCausalLM, granularity: Granularity) -> Iterator[None]:
    """The routed sublayers add nothing, by hand."""
    weights = [
        weight
        for layer in LAYERS
        for kind, weight in (
            ("attention", model.model.layers[layer].self_attn.o_proj.weight),
            ("mlp", model.model.layers[layer].mlp.down_proj.weight),
        )
        if granularity in (kind, "block")
    ]
    with zeroed(weights):
        yield


def test_all_scores_above_tau_is_the_dense_model(
    model: LlamaForCausalLM,
    tiny_routers: MakeRouters,
    prompt_batch: Prompts,
    granularity: Granularity,
) -> None:
    whole, padded = prompt_batch([6, 6, 6]), prompt_batch([9, 4, 7])
    routers = routers_for(model, tiny_routers, granularity)
    dense = [model(**inputs(batch)).logits for batch in (whole, padded)]
    with TokenSkip(model, routers, tau=0.0):
        # Without padding nothing is gathered: the very same kernels.
        assert torch.equal(model(**inputs(whole), use_cache=False).logits, dense[0])
        for batch, expected in zip((whole, padded), dense, strict=True):
            real = batch["attention_mask"].bool()
            close(model(**inputs(batch), use_cache=True).logits[real], expected[real])
        assert torch.equal(model(**inputs(padded), routing=None).logits, dense[1])


def test_all_scores_below_tau_is_the_model_without_those_sublayers(
    model: LlamaForCausalLM,
    tiny_routers: MakeRouters,
    prompt_batch: Prompts,
    granularity: Granularity,
) -> None:
    batch = prompt_batch([9, 4, 7], side="right")
    real = batch["attention_mask"].bool()
    with removed(model, granularity):
        expected = model(**inputs(batch)).logits[real]
    routers = routers_for(model, tiny_routers, granularity)
    with TokenSkip(model, routers, tau=1.1) as skip, tokens_seen(model) as seen:
        output = model(**inputs(batch), use_cache=True)
        close(output.logits[real], expected)
        step = model(torch.full((3, 1), 5), past_key_values=output.past_key_values)
        assert step.past_key_values.get_seq_length() == 10
    kinds = [kind for kind in ("attention", "mlp") if granularity in (kind, "block")]
    assert not any(f"{layer} {kind}" in seen for layer in LAYERS for kind in kinds)
    assert seen["1 attention"] == seen["3 mlp"] == 3 * 9 + 3
    assert skip.cache().kv_bytes() == 0


def test_only_executed_tokens_are_computed(
    skip: TokenSkip, granularity: Granularity, prompt_batch: Prompts
) -> None:
    """Rows are padded to the longest for attention; an MLP gets exactly the tokens."""
    batch = prompt_batch(LENGTHS)
    with tokens_seen(skip.model) as seen:
        cache = skip.model(**inputs(batch), use_cache=True).past_key_values
    for index, layer in enumerate(LAYERS):
        counts = (cache.decisions[..., index] == EXECUTE).sum(dim=1)
        ragged = int((counts > 0).sum() * counts.max())
        expected = int(counts.sum()) if granularity == "mlp" else ragged
        assert seen[f"{layer} {'mlp' if granularity == 'mlp' else 'attention'}"] == expected
        assert expected < 8 * 9


def test_tau_may_differ_by_layer_and_is_inclusive(
    model: LlamaForCausalLM, tiny_routers: MakeRouters, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([6] * 3)["input_ids"]
    with TokenSkip(model, routers_for(model, tiny_routers), tau=[0.0, 1.1]):
        decisions = model(ids, use_cache=True).past_key_values.decisions
        assert decisions.tolist() == [[[1, 0]] * 6] * 3
    # Zero routers score exactly 0.5: the paper's untrained model executes.
    with TokenSkip(model, Routers(Sublayers(LAYERS, unit="token"), 32), tau=0.5):
        assert bool((model(ids, use_cache=True).past_key_values.decisions == EXECUTE).all())


def test_given_decisions_are_kept_and_open_ones_taken(
    skip: TokenSkip, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([7, 7])["input_ids"]
    real = torch.ones_like(ids, dtype=torch.bool)
    free = skip.token_pass(real)
    expected = skip.model(ids, routing=free).logits
    given = free.decisions.clone()
    given[:, ::2] = UNDECIDED
    forced = skip.token_pass(real, given)
    assert torch.equal(skip.model(ids, routing=forced).logits, expected)
    assert torch.equal(forced.decisions, free.decisions)
    assert bool((given[:, ::2] == UNDECIDED).all())  # the caller's tensor is the caller's
    padded = prompt_batch([9, 4])
    real = padded["attention_mask"].bool()
    everything_ = skip.token_pass(real, torch.ones(2, 9, 2))  # padding too, where it has no effect
    dense = skip.model(**inputs(padded), routing=None).logits[real]
    with tokens_seen(skip.model) as seen:
        close(skip.model(**inputs(padded), routing=everything_).logits[real], dense)
    assert seen["2 mlp"] == (13 if skip.routers.sublayers.granularity == "mlp" else 18)

    real = torch.ones_like(ids, dtype=torch.bool)
    other = skip.token_pass(real, 1 - free.decisions)
    assert not torch.allclose(skip.model(ids, routing=other).logits, expected)
    assert torch.equal(other.decisions, 1 - free.decisions)


def test_decisions_of_another_call_are_refused(skip: TokenSkip, prompt_batch: Prompts) -> None:
    real = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="4 sequences, 5 positions and 2 routed"):
        skip.token_pass(real, torch.ones(4, 6, 2))
    cache = skip.model(prompt_batch([5] * 4)["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 4 sequences; the call has 3"):
        skip.model(torch.full((3, 1), 5), past_key_values=cache)


def test_scores_are_float32_in_bfloat16(
    tiny_model: MakeModel, tiny_routers: MakeRouters, prompt_batch: Prompts
) -> None:
    """The product too: bfloat16 has a step of 0.004 near 0.5."""
    model = tiny_model()
    routers = routers_for(model, tiny_routers)
    seen: list[Tensor] = []
    hook = model.model.layers[0].input_layernorm.register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    batch = prompt_batch([9, 4, 7])
    real = batch["attention_mask"].bool()
    with TokenSkip(model.bfloat16(), routers), torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs(batch), use_cache=True)
    hook.remove()
    assert output.logits.dtype == torch.bfloat16
    scores = output.past_key_values.scores[real]
    assert scores.dtype == torch.float32
    weight, bias = routers.folded()
    expected = torch.sigmoid(seen[0][real].double() @ weight[0].double() + bias[0].double())
    torch.testing.assert_close(scores[:, 0], expected.float(), rtol=1e-5, atol=1e-6)


def test_detach_leaves_the_model_as_it_was(
    model: LlamaForCausalLM,
    tiny_routers: MakeRouters,
    prompt_batch: Prompts,
    granularity: Granularity,
) -> None:
    ids = prompt_batch([8, 8])["input_ids"]
    dense, before = model(ids).logits, everything(model)
    skip = TokenSkip(model, routers_for(model, tiny_routers, granularity))
    attached = everything(model)
    assert not torch.equal(model(ids, use_cache=True).logits, dense)
    assert everything(model) == attached  # nothing is kept on the modules
    with pytest.raises(ModelError, match="attached already"):
        MindSkip(model, Routers(LAYERS, 32))
    skip.detach()
    assert everything(model) == before
    assert torch.equal(model(ids).logits, dense)
