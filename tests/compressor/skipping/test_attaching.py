"""Attaching and detaching: what is refused, and that nothing stays behind."""

from __future__ import annotations

import functools

import pytest
import torch
from architectures import unsupported
from by_hand import LAYERS, MakeModel, MakeRouters, Prompts, everything, inputs
from transformers import LlamaForCausalLM

from mskip.compressor.encoding import Batch
from mskip.compressor.errors import ModelError
from mskip.compressor.patching import patched
from mskip.compressor.router import Routers
from mskip.compressor.skipping import MindSkip


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
