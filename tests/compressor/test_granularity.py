"""Attention, MLP and block, with and without compensation: what a skip leaves behind.

The oracle takes the sublayer out of each sequence by hand, one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mskip.compressor.cache import RoutedCache
from mskip.compressor.compensation import Compensation
from mskip.compressor.encoding import Batch
from mskip.compressor.router import Routers
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity, Sublayers

LAYERS = [0, 2]
LENGTHS = [9, 4, 7, 1, 6, 9, 3, 8]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def random_compensation(hidden: int, rank: int) -> Compensation:
    compensation = Compensation(len(LAYERS), hidden, rank)
    generator = torch.Generator().manual_seed(3)
    for parameter in compensation.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return compensation.requires_grad_(False)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["attention", "mlp", "block"])
def granularity(request: pytest.FixtureRequest) -> Granularity:
    value: Granularity = request.param
    return value


@pytest.fixture(params=[0, 4, 32], ids=["identity", "rank 4", "full rank"])
def skip(
    request: pytest.FixtureRequest,
    granularity: Granularity,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_routers: Callable[..., Routers],
) -> Iterator[MindSkip]:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    likely = tiny_routers(model, LAYERS)
    compensation = random_compensation(32, request.param) if request.param else None
    routers = Routers(Sublayers(LAYERS, granularity, compensation), 32)
    routers.load_state_dict(likely.state_dict())
    with MindSkip(model, routers) as attached:
        yield attached


@contextmanager
def by_hand(skip: MindSkip, decisions: Tensor) -> Iterator[None]:
    """The model with the sublayers that ``decisions`` ([routed] bool) skips replaced by hand."""
    sublayers = skip.routers.sublayers
    hooks = []
    for index, layer in enumerate(sublayers.layers):
        if decisions[index]:
            continue
        block = skip.model.model.layers[layer]

        def replace_output(
            module: Any, args: Any, kwargs: Any, output: Any, index: int = index, block: Any = block
        ) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            comp = sublayers.compensation
            if sublayers.granularity == "block":
                extra = 0 if comp is None else affine(comp, index, block.input_layernorm(hidden))
                return hidden + extra
            extra = hidden * 0 if comp is None else affine(comp, index, hidden)
            return (extra, None) if sublayers.granularity == "attention" else extra

        module = {"attention": block.self_attn, "mlp": block.mlp, "block": block}
        hooks.append(
            module[sublayers.granularity].register_forward_hook(replace_output, with_kwargs=True)
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def affine(compensation: Compensation, index: int, hidden: Tensor) -> Tensor:
    weight = compensation.down[index]
    if compensation.up is not None:
        weight = weight @ compensation.up[index]
    return hidden @ weight + compensation.bias[index]


def expected_logits(skip: MindSkip, ids: Tensor, decisions: Tensor) -> Tensor:
    skip.detach()
    try:
        with by_hand(skip, decisions):
            logits: Tensor = skip.model(input_ids=ids, use_cache=False).logits
            return logits
    finally:
        skip.__init__(skip.model, skip.routers, skip.tau)  # type: ignore[misc]


def test_a_batch_equals_each_sequence_with_its_sublayers_taken_out_by_hand(
    skip: MindSkip, prompt_batch: Callable[..., Batch]
) -> None:
    batch = prompt_batch(LENGTHS)
    out = skip.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=True
    )
    cache = out.past_key_values
    assert isinstance(cache, RoutedCache)
    decisions = cache.decisions
    assert decisions is not None
    assert len(set(map(tuple, decisions.tolist()))) >= 3, "the test needs mixed decisions"
    for row in range(len(decisions)):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real][None]
        expected = expected_logits(skip, ids, decisions[row].bool())
        torch.testing.assert_close(out.logits[row][real], expected[0], **CLOSE)


def test_decoding_with_the_cache_equals_one_long_call(
    skip: MindSkip, prompt_batch: Callable[..., Batch]
) -> None:
    batch = prompt_batch([6, 6, 6, 6, 6, 6])
    prompt, answer = batch["input_ids"][:, :6], torch.randint(4, 90, (6, 3))
    out = skip.model(input_ids=prompt, use_cache=True)
    decisions = out.past_key_values.decisions.clone()
    for position in range(3):
        out = skip.model(
            input_ids=answer[:, position : position + 1], past_key_values=out.past_key_values
        )
    assert out.past_key_values.decisions.equal(decisions)
    for row in range(6):
        ids = torch.cat([prompt[row], answer[row]])[None]
        expected = expected_logits(skip, ids, decisions[row].bool())
        torch.testing.assert_close(out.logits[row, -1], expected[0, -1], **CLOSE)


def test_only_attention_and_blocks_give_up_cache_rows(
    skip: MindSkip, granularity: Granularity, prompt_batch: Callable[..., Batch]
) -> None:
    batch = prompt_batch(LENGTHS)
    cache = skip.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=True
    ).past_key_values
    for index, layer in enumerate(LAYERS):
        executing = int(cache.decisions[:, index].sum())
        rows = len(LENGTHS) if granularity == "mlp" else executing
        assert cache.layers[layer].keys.shape[0] == rows


def test_detaching_restores_the_dense_model(skip: MindSkip) -> None:
    ids = torch.arange(4, 12)[None]
    routed = skip.model(input_ids=ids).logits
    forced_skip = skip.model(
        input_ids=ids, past_key_values=skip.cache(torch.zeros(1, 2, dtype=torch.int8))
    ).logits
    skip.detach()
    dense = skip.model(input_ids=ids).logits
    assert not forced_skip.equal(dense)
    assert not any("forward" in module.__dict__ for module in skip.model.modules()), (
        "an instance attribute was left behind"
    )
    with MindSkip(skip.model, skip.routers):
        assert skip.model(input_ids=ids).logits.equal(routed)


def test_generation_runs_with_every_granularity(
    skip: MindSkip, prompt_batch: Callable[..., Batch]
) -> None:
    batch = prompt_batch([5, 3, 5])
    alone = [
        skip.model.generate(
            batch["input_ids"][row][batch["attention_mask"][row].bool()][None],
            max_new_tokens=4,
            do_sample=False,
        )[0, -4:]
        for row in range(3)
    ]
    together = skip.model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=4,
        do_sample=False,
    )[:, -4:]
    assert together.tolist() == [row.tolist() for row in alone]
