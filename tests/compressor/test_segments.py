"""A model in two parts is the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from mskip.compressor.encoding import Batch
from mskip.compressor.errors import ModelError
from mskip.compressor.router import Routers
from mskip.compressor.routing import ForcedPass
from mskip.compressor.segments import SplitModel
from mskip.compressor.skipping import MindSkip, patched

Prompts = Callable[..., Batch]
Side = Literal["left", "right"]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["sdpa", "eager"])
def model(
    request: pytest.FixtureRequest, tiny_model: Callable[..., LlamaForCausalLM]
) -> LlamaForCausalLM:
    return tiny_model(attn_implementation=request.param)


def parts(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch["input_ids"], batch["attention_mask"], batch["position_ids"]


def whole(model: LlamaForCausalLM, batch: Batch, **options: object) -> torch.Tensor:
    """Logits of the whole model."""
    names = ("input_ids", "attention_mask", "position_ids")
    return model(**{name: batch[name] for name in names}, use_cache=False, **options).logits


@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("lengths", "side"),
    [([7, 7], "right"), ([2, 7, 1, 5], "left"), ([2, 7, 1, 5], "right"), ([1], "left")],
)
def test_stem_and_finish_are_the_whole_model(
    model: LlamaForCausalLM, prompt_batch: Prompts, first: int, lengths: list[int], side: Side
) -> None:
    batch = prompt_batch(lengths, side=side)
    split = SplitModel(model, first)
    stem = split.stem(*parts(batch))
    assert torch.equal(split.logits(split.finish(stem)), whole(model, batch))
    # A stem is used again and again: for the teacher, the student and every baseline.
    assert torch.equal(split.logits(split.finish(stem)), whole(model, batch))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_finish_runs_a_pass(model: LlamaForCausalLM, prompt_batch: Prompts, first: int) -> None:
    batch = prompt_batch([4, 6, 3, 6], side="right")
    gates = torch.tensor([[True, False], [False, True], [False, False], [True, True]])
    split = SplitModel(model, first)
    stem = split.stem(*parts(batch))
    with patched(model, [2, 3]):
        routed = split.logits(split.finish(stem, ForcedPass(gates)))
        assert torch.equal(routed, whole(model, batch, routing=ForcedPass(gates)))
        assert torch.equal(split.logits(split.finish(stem)), whole(model, batch, routing=None))
    assert not torch.equal(routed, whole(model, batch))


def test_stem_is_the_residual_stream_below(model: LlamaForCausalLM, prompt_batch: Prompts) -> None:
    batch = prompt_batch([5, 3])
    states = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")},
                   output_hidden_states=True).hidden_states  # fmt: skip
    for first in range(4):
        assert torch.equal(SplitModel(model, first).stem(*parts(batch)).hidden, states[first])


def test_stem_runs_nothing_above_and_has_no_gradient(
    model: LlamaForCausalLM, prompt_batch: Prompts
) -> None:
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(model.model.layers)
    ]
    model.requires_grad_(True)
    with torch.enable_grad():
        stem = SplitModel(model, 2).stem(*parts(prompt_batch([4, 4])))
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]
    assert not stem.hidden.requires_grad


def test_stem_leaves_no_hook_behind(model: LlamaForCausalLM, prompt_batch: Prompts) -> None:
    batch = prompt_batch([4, 4])
    split = SplitModel(model, 1)
    split.stem(*parts(batch))
    with pytest.raises(IndexError):
        split.stem(torch.full((1, 2), 10_000), torch.ones(1, 2), torch.arange(2).unsqueeze(0))
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert whole(model, batch).isfinite().all()


def test_rows_of_a_stem(model: LlamaForCausalLM, prompt_batch: Prompts) -> None:
    batch = prompt_batch([2, 7, 1, 5])
    split = SplitModel(model, 1)
    stem = split.stem(*parts(batch))
    full = split.finish(stem)
    some = split.finish(stem.rows([3, 1]))
    torch.testing.assert_close(some, full[[3, 1]], rtol=1e-5, atol=1e-5)


def test_layer_arguments_are_those_of_the_stem(
    model: LlamaForCausalLM, prompt_batch: Prompts
) -> None:
    batch = prompt_batch([2, 7, 1, 5])
    split = SplitModel(model, 2)
    stem, arguments = split.stem(*parts(batch)), split.layer_arguments(*parts(batch))
    assert arguments.keys() == stem.arguments.keys()
    again = type(stem)(stem.hidden, arguments)
    assert torch.equal(split.finish(again), split.finish(stem))


def test_finish_without_a_pass_is_dense_when_routers_are_attached(
    model: LlamaForCausalLM, prompt_batch: Prompts
) -> None:
    batch = prompt_batch([5, 3])
    dense = whole(model, batch)
    split = SplitModel(model, 1)
    with MindSkip(model, Routers([1, 2], 32), tau=1.1):
        assert torch.equal(split.logits(split.finish(split.stem(*parts(batch)))), dense)


def test_unsupported_architecture_is_refused() -> None:
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        SplitModel(GPT2LMHeadModel(config), 1)
