"""Attached models beside models whose routed attention is removed by hand (``o_proj`` zeroed).

The removal shares no code with what is tested.
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
from mskip.compressor.encoding import Batch
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE
from mskip.compressor.skipping import MindSkip

Prompts = Callable[..., Batch]
MakeModel = Callable[..., LlamaForCausalLM]
MakeRouters = Callable[..., Routers]

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LAYERS = [0, 2]
"""With layer 0 in it: the cache's first layer, from which positions and masks are counted."""


LENGTHS = [9, 4, 7, 1, 6, 9, 3, 8]


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
def zeroed(weights: list[Tensor]) -> Iterator[None]:
    """These weights are zero for a while."""
    saved = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    try:
        yield
    finally:
        for weight, kept in zip(weights, saved, strict=True):
            weight.copy_(kept)


@contextmanager
def removed(model: LlamaForCausalLM, layers: list[int]) -> Iterator[None]:
    """The attention of ``layers`` adds nothing, by hand."""
    weights = [model.model.layers[layer].self_attn.o_proj.weight for layer in layers]
    with zeroed(weights):
        yield


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


def everything(model: LlamaForCausalLM) -> dict[str, dict[str, Any]]:
    """The `__dict__` of every module, its containers copied."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }
