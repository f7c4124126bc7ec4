"""One call of an attached model: what comes out, decided freely or by given decisions.

The oracle is a model whose routed attention is removed by hand, one sequence at a time and without
padding.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from by_hand import (
    CLOSE,
    LAYERS,
    LENGTHS,
    MakeRouters,
    Prompts,
    by_hand,
    inputs,
    mixed,
    prefill,
    prompt_of,
    removed,
    rows_seen,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from mskip.compressor.encoding import Batch
from mskip.compressor.router import Routers
from mskip.compressor.routing import ForcedPass, forced
from mskip.compressor.skipping import MindSkip


def test_all_execute_is_the_dense_model_bitwise(
    model: LlamaForCausalLM, routers: Routers, prompt_batch: Prompts
) -> None:
    batch = inputs(prompt_batch([9, 4, 7]))
    dense = model(**batch).logits
    with MindSkip(model, routers, tau=0.0) as skip:
        assert torch.equal(model(**batch).logits, dense)
        cache = skip.cache(torch.ones(3, 2))
        assert torch.equal(model(**batch, past_key_values=cache).logits, dense)
    with MindSkip(model, routers):  # no pass at all
        assert torch.equal(model(**batch, routing=None).logits, dense)


@pytest.mark.parametrize("layers", [[0, 2], [1], [3], [0, 1, 2, 3]])
def test_all_skip_is_the_model_without_those_sublayers(
    model: LlamaForCausalLM, tiny_routers: MakeRouters, prompt_batch: Prompts, layers: list[int]
) -> None:
    batch = inputs(prompt_batch([9, 4, 7], side="right"))
    with removed(model, layers):
        expected = model(**batch).logits
    with (
        MindSkip(model, tiny_routers(model, layers), tau=1.1),
        rows_seen(model, layers) as seen,
    ):
        assert torch.equal(model(**batch).logits, expected)
    assert not any(seen.values())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_mixed_batch_is_each_row_alone(
    skip: MindSkip, prompt_batch: Prompts, side: Literal["left", "right"], use_cache: bool
) -> None:
    batch = prompt_batch(LENGTHS, side=side)
    decisions = prefill(skip, batch).decisions
    assert mixed(decisions)
    logits = skip.model(**inputs(batch), use_cache=use_cache).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        prompt = prompt_of(batch, row)
        alone = by_hand(skip, prompt, decisions[row])
        torch.testing.assert_close(logits[row, mask], alone[0], **CLOSE)
        torch.testing.assert_close(skip.model(prompt).logits, alone, **CLOSE)


def test_scores_are_the_routers_on_the_routed_residual_stream(skip: MindSkip, batch: Batch) -> None:
    cache = prefill(skip, batch)
    for row in range(len(cache.decisions)):
        found: list[Tensor] = []
        norm = skip.model.model.layers[2].input_layernorm
        hook = norm.register_forward_hook(lambda _, __, out, found=found: found.append(out))
        by_hand(skip, prompt_of(batch, row), cache.decisions[row])
        hook.remove()
        weight, bias = skip.routers.folded()
        logit = found[0].mean(dim=1) @ weight[1] + bias[1]
        torch.testing.assert_close(cache.scores[row, 1], torch.sigmoid(logit)[0], **CLOSE)
    assert torch.equal(cache.decisions, (cache.scores >= 0.5).to(torch.int8))


def test_only_executing_rows_are_computed(skip: MindSkip, batch: Batch) -> None:
    with rows_seen(skip.model, [0, 1, 2, 3]) as seen:
        cache = prefill(skip, batch)
        skip.model(
            torch.full((8, 1), 5),
            attention_mask=torch.cat([batch["attention_mask"], torch.ones(8, 1)], dim=1),
            past_key_values=cache,
        )
    executing = cache.decisions.sum(dim=0).tolist()
    assert seen == {0: [executing[0]] * 2, 1: [8, 8], 2: [executing[1]] * 2, 3: [8, 8]}


def test_skipped_rows_write_no_keys(skip: MindSkip, batch: Batch) -> None:
    cache = prefill(skip, batch)
    executing = cache.decisions.sum(dim=0).tolist()
    rows = [cache.layers[layer].keys.shape[0] for layer in range(4)]
    assert rows == [executing[0], 8, executing[1], 8]
    # 2 KV heads of 8 numbers of 4 bytes, keys and values, for 9 positions.
    assert cache.kv_bytes() == sum(rows) * 9 * 2 * 8 * 4 * 2
    assert [cache.get_seq_length(layer) for layer in range(4)] == [9] * 4

    none = skip.cache(torch.zeros(8, 2))
    skip.model(**inputs(batch), past_key_values=none)
    assert [none.layers[layer].keys is None for layer in range(4)] == [True, False, True, False]
    assert none.kv_bytes() == 2 * 8 * 9 * 2 * 8 * 4 * 2
    assert [none.get_seq_length(layer) for layer in range(4)] == [9] * 4


def test_tau_may_differ_by_layer_and_is_inclusive(
    model: LlamaForCausalLM, routers: Routers, prompt_batch: Prompts
) -> None:
    batch = prompt_batch([6] * 5)
    with MindSkip(model, routers, tau=[0.0, 1.1]) as skip:
        assert prefill(skip, batch).decisions.tolist() == [[1, 0]] * 5
    # Zero routers score exactly 0.5: the paper's untrained model executes.
    with MindSkip(model, Routers(LAYERS, 32), tau=0.5) as skip:
        assert prefill(skip, batch).decisions.tolist() == [[1, 1]] * 5


def test_given_decisions_are_kept_and_open_ones_taken(skip: MindSkip, batch: Batch) -> None:
    taken = prefill(skip, batch)
    given_ = torch.full((8, 2), -1, dtype=torch.int8)
    given_[:, 0] = 1 - taken.decisions[:, 0]
    cache = skip.cache(given_)
    logits = skip.model(**inputs(batch), past_key_values=cache).logits
    assert torch.equal(cache.decisions[:, 0], given_[:, 0])
    assert bool((cache.decisions[:, 1] >= 0).all())
    assert cache.scores[:, 0].isnan().all()
    assert not cache.scores[:, 1].isnan().any()
    assert bool((given_[:, 1] == -1).all())  # the caller's tensor is the caller's
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = by_hand(skip, prompt_of(batch, row), cache.decisions[row])
        torch.testing.assert_close(logits[row, mask], alone[0], **CLOSE)


def test_passes_agree_with_the_attached_model(skip: MindSkip, batch: Batch) -> None:
    """`hard_pass` decides alike; forced passes give the same logits; and no cache is left half."""
    cache = prefill(skip, batch)
    expected = skip.model(**inputs(batch), use_cache=False).logits
    hard = skip.hard_pass(batch["prompt_mask"])
    output = skip.model(**inputs(batch), routing=hard)
    assert output.past_key_values is None
    assert torch.equal(output.logits, expected)
    assert torch.equal(hard.decisions, cache.decisions)
    assert torch.equal(hard.scores, cache.scores)
    for routing in (
        skip.hard_pass(batch["prompt_mask"], cache.decisions),
        ForcedPass(cache.decisions.bool()),
    ):
        assert torch.equal(skip.model(**inputs(batch), routing=routing).logits, expected)
    one = ForcedPass(torch.tensor([[True, False]]))  # one row of gates for every sequence
    with removed(skip.model, [2]):
        without = skip.model(**inputs(batch), routing=None).logits
    assert torch.equal(skip.model(**inputs(batch), routing=one).logits, without)
    nothing = skip.hard_pass(batch["prompt_mask"], torch.zeros(8, 2))
    assert skip.model(**inputs(batch), routing=nothing).logits.shape == expected.shape


@pytest.mark.parametrize("value", [2, -2, 7])
def test_decisions_of_another_value_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="other than -1"):
        forced(torch.tensor([[0, value]]))


@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (4, 1), (4, 3)])
def test_decisions_of_another_batch_are_refused(
    skip: MindSkip, prompt_batch: Prompts, shape: tuple[int, int]
) -> None:
    batch = prompt_batch([5, 5, 5, 5])
    routing = torch.ones(shape)
    with pytest.raises(ValueError, match="4 sequences and 2 routed"):
        skip.model(**inputs(batch), past_key_values=skip.cache(routing))
    with pytest.raises(ValueError, match="4 sequences and 2 routed"):
        skip.hard_pass(batch["prompt_mask"], routing)
