"""Attached models: what is skipped, what is not, and what every kind of generation makes of it.

The oracle throughout is a model whose routed attention is removed by hand (``o_proj`` zeroed),
one sequence at a time and without padding: it shares no code with what is tested.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from architectures import unsupported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from mskip.compressor.cache import RoutedCache
from mskip.compressor.encoding import Batch, Sample, collate
from mskip.compressor.errors import ModelError
from mskip.compressor.patching import patched, take_rows
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE, ForcedPass, forced
from mskip.compressor.skipping import MindSkip

Prompts = Callable[..., Batch]
MakeModel = Callable[..., LlamaForCausalLM]
MakeRouters = Callable[..., Routers]

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LAYERS = [0, 2]
"""With layer 0 in it: the cache's first layer, from which positions and masks are counted."""
LENGTHS = [9, 4, 7, 1, 6, 9, 3, 8]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_model: MakeModel) -> LlamaForCausalLM:
    model = tiny_model(attn_implementation=request.param)
    model.generation_config.eos_token_id = None  # every generation runs to its full length
    return model


@pytest.fixture(scope="module")
def routers(model: LlamaForCausalLM, tiny_routers: MakeRouters) -> Routers:
    return tiny_routers(model, LAYERS)


@pytest.fixture
def skip(model: LlamaForCausalLM, routers: Routers) -> Iterator[MindSkip]:
    with MindSkip(model, routers) as attached:
        yield attached


@pytest.fixture
def batch(skip: MindSkip, prompt_batch: Prompts) -> Batch:
    """Eight prompts of 1 to 9 tokens, padded left, whose decisions are mixed."""
    batch = prompt_batch(LENGTHS)
    assert mixed(prefill(skip, batch).decisions)
    return batch


def mixed(decisions: Tensor) -> bool:
    """Each layer executes some rows and skips some, and the layers differ: tests need all that."""
    share = decisions.float().mean(dim=0)
    differ = bool((decisions[:, 0] != decisions[:, 1]).any())
    return differ and bool(((share > 0) & (share < 1)).all())


def inputs(batch: Batch) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}


def prefill(skip: MindSkip, batch: Batch) -> RoutedCache:
    cache = skip.model(**inputs(batch), use_cache=True).past_key_values
    assert isinstance(cache, RoutedCache)
    return cache


def prompt_of(batch: Batch, row: int) -> Tensor:
    """One prompt without its padding, [1, length]."""
    return batch["input_ids"][row][batch["attention_mask"][row].bool()].unsqueeze(0)


@contextmanager
def removed(model: LlamaForCausalLM, layers: list[int]) -> Iterator[None]:
    """The attention of ``layers`` adds nothing, by hand."""
    weights = [model.model.layers[layer].self_attn.o_proj.weight for layer in layers]
    saved = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    try:
        yield
    finally:
        for weight, kept in zip(weights, saved, strict=True):
            weight.copy_(kept)


def by_hand(skip: MindSkip, ids: Tensor, decisions: Tensor) -> Tensor:
    """Logits of one sequence with its skipped layers removed by hand, [1, sequence, vocabulary]."""
    layers = skip.routers.layers
    skipped = [layer for layer, d in zip(layers, decisions, strict=True) if d != EXECUTE]
    with removed(skip.model, skipped):
        return skip.model(ids, routing=None, use_cache=False).logits


@contextmanager
def rows_seen(model: LlamaForCausalLM, layers: list[int]) -> Iterator[dict[int, list[int]]]:
    """Rows of every call of the layers' query projection."""
    seen: dict[int, list[int]] = {layer: [] for layer in layers}
    hooks = [
        model.model.layers[layer].self_attn.q_proj.register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0].shape[0])
        )
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def no_scoring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where a router is asked."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a decision that was taken is taken again")

    with monkeypatch.context() as patch:
        patch.setattr(Routers, "logit", refuse)
        yield


def greedy(model: LlamaForCausalLM, ids: Tensor, tokens: int = 6, **options: Any) -> Tensor:
    """The new tokens of a generation, [batch, tokens]."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)
    return output[:, ids.shape[1] :]


# -- in and out -------------------------------------------------------------------------------


def everything(model: LlamaForCausalLM) -> dict[str, dict[str, Any]]:
    """The `__dict__` of every module, its containers copied."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "forward patched before"])
def test_detach_leaves_the_model_as_it_was(
    tiny_model: MakeModel, tiny_routers: MakeRouters, prompt_batch: Prompts, wrapped: bool
) -> None:
    model = tiny_model()
    routers = tiny_routers(model, LAYERS)
    attention = model.model.layers[0].self_attn
    if wrapped:  # as accelerate's hooks do
        attention.forward = functools.partial(attention.forward)
    batch = inputs(prompt_batch([5, 3, 8, 2]))
    dense, before = model(**batch).logits, everything(model)

    skip = MindSkip(model, routers)
    assert not torch.equal(model(**batch).logits, dense)
    skip.detach()

    assert everything(model) == before
    assert torch.equal(model(**batch).logits, dense)
    skip.detach()  # a second time does no harm
    assert everything(model) == before


def test_an_error_in_the_block_takes_the_patch_out(
    model: LlamaForCausalLM, routers: Routers
) -> None:
    before = everything(model)
    with pytest.raises(KeyError), MindSkip(model, routers):
        raise KeyError
    assert everything(model) == before
    with patched(model, LAYERS):
        assert everything(model) != before
    with pytest.raises(KeyError), patched(model, LAYERS):
        raise KeyError
    assert everything(model) == before


def test_a_failed_call_leaves_nothing_behind(skip: MindSkip, batch: Batch) -> None:
    expected = skip.model(**inputs(batch)).logits
    before = everything(skip.model)
    with pytest.raises(IndexError):
        skip.model(input_ids=torch.tensor([[10_000]]))
    assert everything(skip.model) == before
    assert torch.equal(skip.model(**inputs(batch)).logits, expected)


@pytest.mark.parametrize("layers", [[0, 2], [1, 3]], ids=["the same layers", "other layers"])
def test_attaching_twice_is_refused_and_the_first_stays(
    skip: MindSkip, batch: Batch, tiny_routers: MakeRouters, layers: list[int]
) -> None:
    expected = skip.model(**inputs(batch)).logits
    before = everything(skip.model)
    second = Routers(layers, 32)
    with pytest.raises(ModelError, match="attached already"):
        MindSkip(skip.model, second)
    with pytest.raises(ModelError, match="attached already"), patched(skip.model, layers):
        pass
    assert everything(skip.model) == before
    assert torch.equal(skip.model(**inputs(batch)).logits, expected)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([1, 4], r"layers \[4\] do not exist: the model has layers 0\.\.3"),
        ([-1], r"layers \[-1\] do not exist"),
        ([1, 1], "twice"),
    ],
)
def test_impossible_layers_are_refused(
    tiny_model: MakeModel, layers: list[int], words: str
) -> None:
    model = tiny_model()
    before = everything(model)
    with pytest.raises(ModelError, match=words):
        MindSkip(model, Routers(layers, 32))
    assert everything(model) == before


def test_unsupported_architecture_is_refused() -> None:
    model = unsupported()
    with pytest.raises(ModelError, match=r"'opt' is not supported; supported: .*\bllama\b") as e:
        MindSkip(model, Routers([1], 16))
    assert "families.py" in str(e.value)


# -- what comes out ---------------------------------------------------------------------------


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


# -- given decisions --------------------------------------------------------------------------


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


# -- what counts as the prompt ----------------------------------------------------------------


def test_arguments_by_position_are_understood(skip: MindSkip, batch: Batch) -> None:
    named = skip.model(**inputs(batch))
    cache = skip.cache()
    output = skip.model(*inputs(batch).values(), cache)
    assert output.past_key_values is cache
    assert torch.equal(cache.scores, named.past_key_values.scores)
    assert torch.equal(output.logits, named.logits)


def test_embeddings_are_as_good_as_ids(skip: MindSkip, batch: Batch) -> None:
    by_ids = skip.model(**inputs(batch))
    rest = {**inputs(batch), "inputs_embeds": skip.model.get_input_embeddings()(batch["input_ids"])}
    del rest["input_ids"]
    output = skip.model(**rest)
    assert torch.equal(output.logits, by_ids.logits)
    assert torch.equal(output.past_key_values.scores, by_ids.past_key_values.scores)
    embeddings = rest["inputs_embeds"][:1]
    bare = skip.model(inputs_embeds=embeddings), skip.model(batch["input_ids"][:1])
    assert torch.equal(bare[0].past_key_values.scores, bare[1].past_key_values.scores)


def test_without_a_mask_every_position_is_prompt(skip: MindSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([6, 6, 6])["input_ids"]
    bare = skip.model(ids)
    masked = skip.model(ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(bare.past_key_values.scores, masked.past_key_values.scores)


def test_four_dimensional_mask_is_refused(skip: MindSkip, batch: Batch) -> None:
    mask = torch.ones(8, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(ModelError, match="two-dimensional attention mask"):
        skip.model(batch["input_ids"], attention_mask=mask)


prompts = st.lists(st.lists(st.integers(3, 96), min_size=1, max_size=10), min_size=1, max_size=4)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompt=st.lists(st.integers(3, 96), min_size=1, max_size=12),
    mates=prompts,
    padding=st.integers(0, 9),
    side=st.sampled_from(["left", "right"]),
    place=st.integers(0, 4),
    pad_id=st.integers(0, 96),
)
def test_neither_padding_nor_batch_mates_change_a_decision(
    skip: MindSkip,
    *,
    prompt: list[int],
    mates: list[list[int]],
    padding: int,
    side: Literal["left", "right"],
    place: int,
    pad_id: int,
) -> None:
    alone = skip.model(torch.tensor([prompt])).past_key_values
    place = min(place, len(mates))
    chosen = [*mates[:place], prompt, *mates[place:]]
    filler = [3] * (max(map(len, chosen)) + padding)  # a row that sets the width
    samples = [Sample(ids, len(ids)) for ids in [*chosen, filler]]
    together = prefill(skip, collate(samples, pad_id, padding_side=side))
    margins = (alone.scores[0] - 0.5).abs()
    for index, margin in enumerate(margins):
        # 1e-5 is what float32 rounding may do; a decision above changes what is scored below.
        torch.testing.assert_close(
            together.scores[place, index], alone.scores[0, index], rtol=0, atol=1e-5
        )
        if margin <= 1e-5:
            break
        assert together.decisions[place, index] == alone.decisions[0, index]


# -- generation by hand -----------------------------------------------------------------------


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


# -- what transformers does to a cache --------------------------------------------------------

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


# -- generate ---------------------------------------------------------------------------------


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


# -- the rows of a call's arguments -----------------------------------------------------------


def test_take_rows_takes_what_is_per_sequence() -> None:
    rows = torch.tensor([2, 0])
    mask = torch.arange(3 * 4).reshape(3, 1, 2, 2)
    shared, flat = torch.zeros(1, 5, 8), torch.arange(3)
    assert torch.equal(take_rows(mask, rows, 3), mask[[2, 0]])
    assert take_rows(shared, rows, 3) is shared
    assert take_rows(flat, rows, 3) is flat  # one dimension: positions, not sequences
    assert take_rows(None, rows, 3) is None
    pair = take_rows((mask, [shared, 1.5]), rows, 3)
    assert isinstance(pair, tuple)
    assert torch.equal(pair[0], mask[[2, 0]])
    assert pair[1] == [shared, 1.5]


def test_flex_attentions_block_mask_is_refused() -> None:
    """Its rows cannot be taken; the kernel would read another sequence's, or crash."""
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, 1, 8, 8, device="cpu")
    with pytest.raises(ModelError, match="flex attention"):
        take_rows(mask, torch.tensor([0]), 2)
