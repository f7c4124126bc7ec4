"""Per-token routing against a Llama written out by hand, one sequence at a time, in float64.

The oracle computes full attention, hides the keys of skipped tokens and zeroes their output.
It shares the model's weights and nothing else with what is tested.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from mskip.compressor.cache import RoutedCache
from mskip.compressor.calibration import UnreachableError
from mskip.compressor.compensation import Compensation
from mskip.compressor.encoding import Batch, Sample
from mskip.compressor.errors import ModelError
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import passing, patched
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE, UNDECIDED
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity, Sublayers
from mskip.compressor.token_cache import TokenCache, TokenLayer
from mskip.compressor.token_calibration import (
    TokenScorer,
    executed_share,
    find_token_tau,
    share_interval,
    token_quality,
    token_scores,
)
from mskip.compressor.token_skipping import TokenSkip
from mskip.compressor.tokenwise import TokenRelaxedPass, token_noise

Prompts = Callable[..., Batch]
MakeModel = Callable[..., LlamaForCausalLM]
MakeRouters = Callable[..., Routers]

LAYERS = [0, 2]
"""With layer 0 in it: the cache's first layer, from which positions and masks are counted."""
LENGTHS = [9, 4, 7, 1, 6, 9, 3, 8]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def close(actual: Tensor, expected: Tensor) -> None:
    """The rotary tables are float32 whatever the model is: not closer than this."""
    bound = 1e-5 if actual.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(actual, expected.to(actual), rtol=bound, atol=bound)


@pytest.fixture(autouse=True)
def _inference(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("differentiates" in request.node.name):
        yield


@pytest.fixture(params=["attention", "mlp", "block"])
def granularity(request: pytest.FixtureRequest) -> Granularity:
    value: Granularity = request.param
    return value


def routers_for(
    model: LlamaForCausalLM,
    tiny_routers: MakeRouters,
    granularity: Granularity = "attention",
    rank: int = 0,
    layers: list[int] = LAYERS,
) -> Routers:
    """Routers with mixed decisions, of a granularity, with a random compensation of a rank."""
    width = model.config.hidden_size
    compensation = None
    if rank:
        compensation = Compensation(len(layers), width, rank).requires_grad_(False)
        generator = torch.Generator().manual_seed(3)
        for parameter in compensation.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    routers = Routers(Sublayers(layers, granularity, compensation, "token"), width)
    routers.load_state_dict(tiny_routers(model, layers).state_dict())
    return routers.requires_grad_(False)


def inputs(batch: Batch) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}


# -- the oracle -------------------------------------------------------------------------------


@dataclass
class Plain:
    """One sequence: logits [sequence, vocabulary], decisions and logits of the routers."""

    logits: Tensor
    decisions: Tensor  # [sequence, routed] bool
    router_logits: Tensor  # [sequence, routed]


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [sequence, heads, dim] at positions 0, 1, ..."""
    length, _, dim = x.shape
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (torch.arange(length).double()[:, None] * frequency)[:, None, :]
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def plain_attention(block: Any, x: Tensor, visible: Tensor, theta: float) -> Tensor:
    """Attention over [sequence, hidden] with the keys of ``visible`` and a token's own."""
    attention, length = block.self_attn, len(x)
    q, k, v = (
        F.linear(x, getattr(attention, name).weight).view(length, -1, attention.head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k = rotate(q, theta), rotate(k, theta)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    weight = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(attention.head_dim)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & (visible | torch.eye(length, dtype=torch.bool))
    mixed = torch.einsum("hqk,khd->qhd", weight.masked_fill(~seen, -math.inf).softmax(-1), v)
    return F.linear(mixed.reshape(length, -1), attention.o_proj.weight)


def plain(
    model: LlamaForCausalLM,
    routers: Routers,
    ids: Tensor,
    tau: float = 0.5,
    mix: Tensor | None = None,
) -> Plain:
    """Run [sequence] ids by hand.

    ``mix`` ([sequence, routed]) takes the place of the gates where outputs are mixed; what is
    decided, and what later tokens see, stays as the routers have it.
    """
    sublayers = routers.sublayers
    kind, compensation = sublayers.granularity, sublayers.compensation
    weight, bias = (t.double() for t in routers.folded())
    theta = model.config.rope_parameters["rope_theta"]
    hidden = model.model.embed_tokens.weight[ids]
    gates, found = [], []
    for layer, block in enumerate(model.model.layers):
        routed = sublayers.layers.index(layer) if layer in sublayers.layers else None
        all_ = torch.ones(len(ids), dtype=torch.bool)

        def gate(
            x: Tensor, here: bool, routed: int | None = routed, all_: Tensor = all_
        ) -> tuple[Tensor, Tensor]:
            """Who executes, and by what its output is mixed."""
            if routed is None or not here:
                return all_, all_.double()[:, None]
            found.append(x @ weight[routed] + bias[routed])
            gates.append(torch.sigmoid(found[-1]) >= tau)
            given = gates[-1].double() if mix is None else mix[:, routed]
            return gates[-1], given[:, None]

        def instead(x: Tensor, routed: int | None = routed) -> Tensor:
            if compensation is None or routed is None:
                return torch.zeros_like(x)
            down = compensation.down[routed].double()
            up = down if compensation.up is None else down @ compensation.up[routed].double()
            return x @ up + compensation.bias[routed].double()

        x = block.input_layernorm(hidden)
        in_block, block_mix = gate(x, kind == "block")
        before, block_instead = hidden, instead(x)
        executes, attention_mix = gate(x, kind == "attention")
        out = plain_attention(block, x, executes & in_block, theta)
        hidden = hidden + out * attention_mix + instead(x) * (1 - attention_mix)
        x = block.post_attention_layernorm(hidden)
        _, mlp_mix = gate(x, kind == "mlp")
        hidden = hidden + block.mlp(x) * mlp_mix + instead(x) * (1 - mlp_mix)
        hidden = hidden * block_mix + (before + block_instead) * (1 - block_mix)
    logits = model.lm_head(model.model.norm(hidden))
    return Plain(logits, torch.stack(gates, dim=1), torch.stack(found, dim=1))


Oracle = Callable[..., Plain]


def prompt_of(batch: Batch, row: int) -> Tensor:
    """One prompt without its padding, [length]."""
    return batch["input_ids"][row][batch["attention_mask"][row].bool()]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_model: MakeModel) -> LlamaForCausalLM:
    """Eager in float32: transformers' eager attention gives NaN for float64 and left padding."""
    model = tiny_model(attn_implementation=request.param)
    model.generation_config.eos_token_id = None  # every generation runs to its full length
    return model.double() if request.param == "sdpa" else model


@pytest.fixture(scope="module")
def oracle(model: LlamaForCausalLM) -> Oracle:
    """`plain` on a copy of the model, in float64."""
    return functools.partial(plain, copy.deepcopy(model).double())


@pytest.fixture
def skip(
    model: LlamaForCausalLM, tiny_routers: MakeRouters, granularity: Granularity
) -> Iterator[TokenSkip]:
    with TokenSkip(model, routers_for(model, tiny_routers, granularity)) as attached:
        yield attached


def test_the_oracle_is_the_dense_model_where_all_execute(
    model: LlamaForCausalLM, oracle: Oracle, tiny_routers: MakeRouters, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([9])["input_ids"]
    logits = oracle(tiny_routers(model, LAYERS), ids[0], tau=0.0).logits
    close(model(ids).logits[0], logits)


# -- what comes out ---------------------------------------------------------------------------


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
    saved = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    try:
        yield
    finally:
        for weight, kept in zip(weights, saved, strict=True):
            weight.copy_(kept)


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


# -- one call, chunks, single tokens ----------------------------------------------------------


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


# -- the cache --------------------------------------------------------------------------------


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


# -- generation -------------------------------------------------------------------------------


def greedy(model: LlamaForCausalLM, ids: Tensor, tokens: int = 6, **options: Any) -> Tensor:
    """The new tokens of a generation, [batch, tokens]."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)
    return output[:, ids.shape[1] :]


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


def everything(model: LlamaForCausalLM) -> dict[str, dict[str, Any]]:
    """The `__dict__` of every module, its containers copied."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


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


# -- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_the_relaxed_pass_is_the_hard_pass_in_value(
    model: LlamaForCausalLM,
    tiny_routers: MakeRouters,
    prompt_batch: Prompts,
    granularity: Granularity,
    rank: int,
) -> None:
    routers = routers_for(model, tiny_routers, granularity, rank)
    batch = prompt_batch(LENGTHS, side="right")
    real = batch["attention_mask"].bool()
    with TokenSkip(model, routers) as skip:
        hard = skip.token_pass(real)
        expected = model(**inputs(batch), routing=hard).logits[real]
        relaxed = TokenRelaxedPass(routers, real, 1.0, None)
        close(model(**inputs(batch), routing=relaxed).logits[real], expected)
        scores = torch.sigmoid(torch.stack(list(relaxed.logits.values()), dim=1))
        torch.testing.assert_close(scores, hard.scores[real], **CLOSE)
        # Noise beyond any logit: the gates are the noise's.
        noise = torch.full((*real.shape, 2), -1e4)
        relaxed = TokenRelaxedPass(routers, real, 1.0, noise)
        none = skip.token_pass(real, torch.zeros(*real.shape, 2))
        shut = model(**inputs(batch), routing=none).logits[real]
        close(model(**inputs(batch), routing=relaxed).logits[real], shut)
        assert not torch.allclose(shut, expected)


def test_the_relaxed_pass_has_no_cache(
    skip: TokenSkip, granularity: Granularity, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([5])["input_ids"]
    relaxed = TokenRelaxedPass(skip.routers, torch.ones_like(ids).bool(), 1.0, None)
    assert skip.model(ids, routing=relaxed).past_key_values is None
    if granularity != "mlp":
        with pytest.raises(ValueError, match="use_cache=False"):
            skip.model(ids, routing=relaxed, past_key_values=skip.cache())


@pytest.mark.parametrize("rank", [0, 4])
def test_the_gate_differentiates_the_mix_of_outputs_alone(
    tiny_model: MakeModel,
    tiny_routers: MakeRouters,
    prompt_batch: Prompts,
    granularity: Granularity,
    rank: int,
) -> None:
    """The oracle's outputs mixed by a free tensor, times the slope of the backward sigmoid."""
    model = tiny_model().double()
    routers = routers_for(model, tiny_routers, granularity, rank, layers=[2])
    ids = prompt_batch([9])["input_ids"]
    mix = torch.zeros(9, 1, dtype=torch.float64)
    by_hand = plain(model, routers, ids[0], mix=mix)
    mix = by_hand.decisions.double().requires_grad_()
    assert 0 < int(by_hand.decisions.sum()) < 9
    into = torch.randn(9, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (plain(model, routers, ids[0], mix=mix).logits * into).sum().backward()
    assert mix.grad is not None
    slope = torch.sigmoid(by_hand.router_logits / 0.7)
    expected = (mix.grad * slope * (1 - slope) / 0.7).sum()

    routers.bias.requires_grad_()
    relaxed = TokenRelaxedPass(routers, torch.ones_like(ids, dtype=torch.bool), 0.7, None)
    with patched(model, routers.sublayers):
        logits = model(ids, routing=relaxed, use_cache=False).logits[0]
    (logits * into).sum().backward()
    torch.testing.assert_close(routers.bias.grad.double(), expected[None], rtol=1e-4, atol=1e-4)


def test_padding_takes_no_part_and_gives_no_nan(
    tiny_model: MakeModel, tiny_routers: MakeRouters, prompt_batch: Prompts
) -> None:
    """On the left it would see nothing at all, were it not for the token itself."""
    model = tiny_model()
    gradients = []
    for side in ("left", "right"):
        routers = tiny_routers(model, LAYERS).requires_grad_(True)
        batch = prompt_batch([9, 4, 7], side=side)
        real = batch["attention_mask"].bool()
        relaxed = TokenRelaxedPass(routers, real, 1.0, None)
        with torch.enable_grad(), patched(model, LAYERS), passing(relaxed):
            hidden = model.model(**inputs(batch), use_cache=False)
            hidden.last_hidden_state[real].square().sum().backward()
        assert [len(logit) for logit in relaxed.logits.values()] == [20, 20]
        gradients.append([parameter.grad for parameter in (routers.weight, routers.bias)])
    for left, right in zip(*gradients, strict=True):
        assert float(left.abs().max()) > 0
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_noise_is_the_sample_s_own() -> None:
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    noise = token_noise(3, torch.tensor([7, 8]), real, 2)
    assert noise.shape == (2, 5, 2)
    assert bool((noise[0, 3:] == 0).all())
    left = token_noise(
        3, torch.tensor([8, 7]), torch.tensor([[1] * 6, [0] * 3 + [1] * 3]).bool(), 2
    )
    assert torch.equal(left[1, 3:], noise[0, :3])
    assert not torch.equal(token_noise(4, torch.tensor([7, 8]), real, 2), noise)
    assert noise[real].unique().numel() == 16
    many = token_noise(0, torch.tensor([0]), torch.ones(1, 4000, dtype=torch.bool), 2)
    # Standard logistic: half above 0, a fifth beyond log 4.
    assert (many > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (many > math.log(4)).float().mean() == pytest.approx(0.2, abs=0.03)


# -- calibration and quality ------------------------------------------------------------------

ROUTED = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[Sample]]) -> list[Sample]:
    return make_samples(12, answer=(1, 6))


@pytest.fixture(scope="module")
def base_oracle(base: BaseModel) -> Oracle:
    return functools.partial(plain, copy.deepcopy(base.model).double())


def test_scores_are_each_sample_s_own(
    base: BaseModel,
    base_oracle: Oracle,
    samples: list[Sample],
    tiny_routers: MakeRouters,
    granularity: Granularity,
) -> None:
    routers = routers_for(base.model, tiny_routers, granularity, layers=ROUTED)
    routings = token_scores(base, routers, 0.4, samples, batch_size=5)
    for sample, routing in zip(samples, routings, strict=True):
        expected = base_oracle(routers, torch.tensor(sample.input_ids), tau=0.4)
        assert torch.equal(routing.decisions, expected.decisions)
        scores = torch.sigmoid(expected.router_logits).float()
        torch.testing.assert_close(routing.scores, scores, rtol=1e-3, atol=1e-4)
        assert len(routing.prompt) == sample.prompt_length
        assert len(routing.prompt) + len(routing.answer) == len(sample.input_ids)
    assert not any("forward" in module.__dict__ for module in base.model.modules())
    with patched(base.model, routers.sublayers):
        some = TokenScorer(base, routers, samples, 5)(torch.full((4,), 0.4), [9, 2])
    assert [each.prompt_length for each in some] == [samples[n].prompt_length for n in (9, 2)]
    assert torch.equal(some[0].decisions, routings[9].decisions)


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_the_capacity_of_prompt_tokens_is_met_within_half_a_token(
    base: BaseModel,
    base_oracle: Oracle,
    samples: list[Sample],
    tiny_routers: MakeRouters,
    granularity: Granularity,
    target: float,
) -> None:
    routers = routers_for(base.model, tiny_routers, granularity, layers=ROUTED)
    shown: list[str] = []

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        shown.append(note)

    found = find_token_tau(base, routers, target, samples, progress=progress)
    by_hand = [
        base_oracle(routers, torch.tensor(sample.input_ids), tau=found.tau) for sample in samples
    ]
    asked, answered = 0, 0
    for sample, each in zip(samples, by_hand, strict=True):
        asked += int(each.decisions[: sample.prompt_length].sum())
        answered += int(each.decisions[sample.prompt_length :].sum())
    prompt_calls = sum(sample.prompt_length for sample in samples) * 4
    answer_calls = sum(len(sample.input_ids) for sample in samples) * 4 - prompt_calls
    assert found.capacity == pytest.approx(asked / prompt_calls)
    assert found.answer_capacity == pytest.approx(answered / answer_calls)
    assert abs(asked - target * prompt_calls) <= 0.5 + 1e-9
    assert found.interval[0] <= found.capacity <= found.interval[1]
    assert found.answer_interval[0] <= found.answer_capacity <= found.answer_interval[1]
    assert 0 < found.evaluations == len(shown) <= 40


def test_tied_scores_cannot_be_parted(base: BaseModel, samples: list[Sample]) -> None:
    routers = Routers(ROUTED, 32)
    with pytest.raises(UnreachableError, match=r"no tau gives capacity 0\.500.*0\.000, 1\.000"):
        find_token_tau(base, routers, 0.5, samples)
    assert find_token_tau(base, routers, 1.0, samples).capacity == 1.0
    prompts = [Sample(s.input_ids[: s.prompt_length], s.prompt_length) for s in samples]
    without = find_token_tau(base, routers, 0.0, prompts)
    assert without.capacity == 0.0
    assert math.isnan(without.answer_capacity)


def test_an_interval_draws_whole_prompts() -> None:
    """One long prompt that executes, one short that does not: 0, 0.9 or 1."""
    long, short = torch.ones(9, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    assert executed_share([long, short]) == pytest.approx(0.9)
    assert share_interval([long, short]) == [0.0, 1.0]
    assert share_interval([long, long, long[:0]]) == [1.0, 1.0]
    many = share_interval([long, short] * 200)
    assert 0.85 < many[0] < 0.9 < many[1] < 0.93
    assert all(math.isnan(end) for end in share_interval([]))


def test_quality_is_that_of_the_oracle(
    base: BaseModel,
    base_oracle: Oracle,
    samples: list[Sample],
    tiny_routers: MakeRouters,
    granularity: Granularity,
) -> None:
    routers = routers_for(base.model, tiny_routers, granularity, layers=ROUTED)
    divergences, losses, shares = [], [], []
    for sample in samples:
        ids = torch.tensor(sample.input_ids)
        student = base_oracle(routers, ids, tau=0.4)
        teacher = base_oracle(routers, ids, tau=0.0)
        answers = slice(sample.prompt_length - 1, len(ids) - 1)
        p, q = (each.logits[answers].log_softmax(-1) for each in (teacher, student))
        divergences.append((p.exp() * (p - q)).sum(-1))
        losses.append(F.cross_entropy(q, ids[sample.prompt_length :], reduction="none"))
        shares.append(student.decisions)
    measured = token_quality(base, routers, 0.4, samples, batch_size=5)
    quality = measured.quality
    assert quality.tokens == len(torch.cat(losses))
    assert quality.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert quality.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-3)
    lengths = [sample.prompt_length for sample in samples]
    asked = torch.cat([each[:n] for each, n in zip(shares, lengths, strict=True)])
    answered = torch.cat([each[n:] for each, n in zip(shares, lengths, strict=True)])
    assert measured.capacity == pytest.approx(float(asked.double().mean()))
    assert measured.answer_capacity == pytest.approx(float(answered.double().mean()))
    assert 0.2 < measured.capacity < 0.8
    dense = token_quality(base, routers, 0.0, samples)
    assert (dense.capacity, dense.answer_capacity) == (1.0, 1.0)
    assert dense.quality.kl == pytest.approx(0, abs=1e-5)
