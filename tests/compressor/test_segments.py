"""A model in two parts is the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from architectures import unsupported
from by_hand import everything
from transformers import LlamaForCausalLM

from mskip.compressor.encoding import Batch
from mskip.compressor.errors import ModelError
from mskip.compressor.patching import patched
from mskip.compressor.router import Routers
from mskip.compressor.routing import ForcedPass
from mskip.compressor.segments import SplitModel
from mskip.compressor.skipping import MindSkip

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
    watched = [*model.model.layers, model.model.norm]
    hooks = [
        module.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, module in enumerate(watched)
    ]
    model.requires_grad_(True)
    split, inputs = SplitModel(model, 2), parts(prompt_batch([4, 4]))
    with torch.enable_grad():
        stem = split.stem(*inputs)
        assert ran == [0, 1]
        split.layer_arguments(*inputs)
    assert ran == [0, 1]
    for hook in hooks:
        hook.remove()
    assert not stem.hidden.requires_grad


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "forward patched before"])
def test_stem_leaves_the_model_as_it_was(
    tiny_model: Callable[..., LlamaForCausalLM], prompt_batch: Prompts, wrapped: bool
) -> None:
    model = tiny_model()
    batch = prompt_batch([4, 4])
    if wrapped:  # as accelerate's hooks do, below the cut and above it
        for layer in model.model.layers[1:3]:
            layer.forward = functools.partial(layer.forward)
    with MindSkip(model, Routers([2, 3], 32)):
        before = everything(model)
        split = SplitModel(model, 2)
        split.stem(*parts(batch))
        split.layer_arguments(*parts(batch))
        assert everything(model) == before
        with pytest.raises(IndexError):
            split.stem(torch.full((1, 2), 10_000), torch.ones(1, 2), torch.arange(2)[None])
        assert everything(model) == before
    assert whole(model, batch).isfinite().all()


def test_models_that_ask_their_layers_are_answered(
    tiny_model: Callable[..., LlamaForCausalLM], prompt_batch: Prompts
) -> None:
    """Some look at a layer to know which mask to hand it."""

    class Asking(torch.nn.ModuleList):
        def __getitem__(self, key: Any) -> Any:
            chosen = super().__getitem__(key)
            if isinstance(key, slice):
                asked.append([layer.self_attn.layer_idx for layer in chosen])
            return chosen

    asked: list[list[int]] = []
    model = tiny_model()
    model.model.layers = Asking(model.model.layers)
    batch = prompt_batch([4, 3])
    split = SplitModel(model, 2)
    stem = split.stem(*parts(batch))
    assert [0, 1, 2, 3] in asked
    assert torch.equal(split.logits(split.finish(stem)), whole(model, batch))


def test_rows_of_a_stem(model: LlamaForCausalLM, prompt_batch: Prompts) -> None:
    batch = prompt_batch([2, 7, 1, 5])
    split = SplitModel(model, 1)
    stem = split.stem(*parts(batch))
    full = split.finish(stem)
    some = split.finish(stem.rows([3, 1]))
    torch.testing.assert_close(some, full[[3, 1]], rtol=1e-5, atol=1e-5)


def test_what_layers_share_stays_shared(
    model: LlamaForCausalLM, prompt_batch: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mask and one pair of rotary tables, however many layers; rows are taken once."""
    batch = prompt_batch([2, 7, 1, 5])
    stem = SplitModel(model, 1).stem(*parts(batch))
    assert list(stem.arguments) == [1, 2, 3]
    taken: list[torch.Tensor] = []
    select = torch.Tensor.index_select

    def counted(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        taken.append(tensor)
        return select(tensor, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "index_select", counted)
        some = stem.rows([3, 1])
    assert len(taken) == len({id(tensor) for tensor in taken})
    assert any(tensor is stem.hidden for tensor in taken)
    for each in (stem.arguments, some.arguments):
        assert each[1]["attention_mask"] is each[2]["attention_mask"] is each[3]["attention_mask"]
        assert each[1]["position_embeddings"] is each[3]["position_embeddings"]
    assert some.arguments[1]["attention_mask"].shape[0] == 2


def test_layer_arguments_are_those_of_the_stem(
    model: LlamaForCausalLM, prompt_batch: Prompts
) -> None:
    batch = prompt_batch([2, 7, 1, 5])
    split = SplitModel(model, 2)
    stem, arguments = split.stem(*parts(batch)), split.layer_arguments(*parts(batch))
    assert arguments.keys() == stem.arguments.keys() == {2, 3}
    assert all(arguments[layer].keys() == stem.arguments[layer].keys() for layer in arguments)
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
    with pytest.raises(ModelError, match="'opt' is not supported"):
        SplitModel(unsupported(), 1)
