"""The proof of a row: right rows pass it, and every check fails for something that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import make
from torch import Tensor
from transformers import PreTrainedModel

from mskip.compressor.errors import ModelError
from mskip.compressor.families import FAMILIES, Family, family_of
from mskip.compressor.proof import CHECKS, Check, prove
from mskip.compressor.sublayers import Granularity

DETACH, DENSE, SKIP, COMPENSATION, ALL, NORMS, DECODING, BATCH, SPLIT = CHECKS
GEMMA = "gemma3_text, sliding"
KINDS: tuple[Granularity, ...] = ("attention", "mlp", "block")


def failures(checks: list[Check]) -> set[str]:
    assert [check.name for check in checks] == list(CHECKS)
    assert all(check.detail for check in checks)
    return {check.name for check in checks if not check.passed}


def wrong(name: str, kind: Granularity, **fields: Any) -> set[str]:
    """The checks that a row with other fields fails."""
    model = make(name)
    return failures(prove(model, replace(family_of(model), **fields), kind))


# -- rows that are right ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", GEMMA, "falcon", "gpt_neox, parallel", "granite"])
def test_right_rows_are_proven(name: str, kind: Granularity) -> None:
    model = make(name)
    checks = prove(model, family_of(model), kind)
    assert failures(checks) == set(), [check for check in checks if not check.passed]


def test_prompts_are_longer_than_the_window() -> None:
    model = make("mistral, sliding")
    model.config.sliding_window = 7
    checks = {check.name: check for check in prove(model, family_of(model), "attention")}
    assert "prompts of up to 12 tokens" in checks[DECODING].detail


def test_the_model_is_left_as_it_was() -> None:
    model = make("olmo2")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(ids).logits
        prove(model, family_of(model), "mlp")
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in each.__dict__ for each in model.modules())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


# -- rows that are wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "fields", "expected"),
    [
        ("llama", "attention", {"attention_norm": "post_attention_layernorm"}, {NORMS}),
        ("llama", "block", {"attention_norm": "post_attention_layernorm"}, {NORMS}),
        ("llama", "mlp", {"mlp_norm": "input_layernorm"}, {NORMS}),
        ("llama", "attention", {"attention_norm": None}, {NORMS}),
        (GEMMA, "attention", {"attention_post_norm": None}, {COMPENSATION, ALL}),
        ("olmo2", "mlp", {"mlp_post_norm": None}, {COMPENSATION, ALL}),
        ("granite", "attention", {"residual_factor": None}, {COMPENSATION, ALL}),
        ("granite", "mlp", {"logit_divisor": None}, {SPLIT}),
        (GEMMA, "mlp", {"logit_cap": None}, {SPLIT}),
        ("cohere", "block", {"logit_factor": None}, {SPLIT}),
        ("llama", "attention", {"final_norm": "model.layers.4.input_layernorm"}, {SPLIT}),
        ("llama", "mlp", {"cache": "layer_past"}, {DECODING}),
        ("gpt_neox", "attention", {"cache": "past_key_values"}, {DECODING}),
        ("llama", "mlp", {"layer_gives_tuple": True}, {SKIP, COMPENSATION, ALL, NORMS, SPLIT}),
    ],
)
def test_a_wrong_field_fails_its_checks(
    name: str, kind: Granularity, fields: dict[str, Any], expected: set[str]
) -> None:
    assert wrong(name, kind, **fields) == expected


def test_attention_and_mlp_swapped_fail() -> None:
    swapped = {"attention": "mlp", "mlp": "self_attn"}
    assert {DETACH, DENSE, SKIP, NORMS, DECODING, BATCH} <= wrong("llama", "attention", **swapped)
    assert {DETACH, SKIP, NORMS, DECODING, BATCH} <= wrong("llama", "mlp", **swapped)


def test_what_raises_has_failed_with_its_reason() -> None:
    model = make("llama")
    row = replace(family_of(model), attention="attn")
    for check in prove(model, row, "attention"):
        assert check.passed == (check.name == SPLIT)  # which needs no attention's name
        assert check.passed or "AttributeError: LlamaDecoderLayer has no attribute" in check.detail
    # With layers that cannot be found nothing is proven.
    checks = prove(model, replace(family_of(model), layers="model.blocks"), "attention")
    assert failures(checks) == set(CHECKS)


# -- models for which no row is right ---------------------------------------------------------


def scaled(model: PreTrainedModel) -> None:
    """Like the learned scale that some architectures put on a whole layer."""
    model.model.layers[2].register_forward_hook(lambda _, __, output: output * 0.5)


def mixing(model: PreTrainedModel) -> None:
    """Sequences of a batch see each other."""
    model.model.layers[1].self_attn.register_forward_hook(
        lambda _, __, output: (output[0] + output[0].mean(dim=0, keepdim=True), *output[1:])
    )


def moody(model: PreTrainedModel) -> None:
    """Other logits with every call."""
    calls: list[int] = []

    def hook(_: Any, __: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output + len(calls)

    model.lm_head.register_forward_hook(hook)


def forgetful(model: PreTrainedModel) -> None:
    """The first tokens of every call are favoured: a chunk is not part of a whole."""
    bonus = torch.linspace(1, 0, 64)[None, :, None]
    model.lm_head.register_forward_hook(lambda _, __, output: output + bonus[:, : output.shape[1]])


@pytest.mark.parametrize(
    ("spoil", "kind", "expected"),
    [
        (scaled, "attention", {SKIP, COMPENSATION, ALL}),
        (scaled, "block", {SKIP, COMPENSATION, ALL, DECODING}),
        (mixing, "attention", {BATCH}),
        (moody, "attention", {DETACH, DENSE, DECODING, BATCH, SPLIT}),
        (forgetful, "attention", {DECODING, BATCH}),
    ],
)
def test_a_model_that_no_row_describes_fails(
    spoil: Callable[[PreTrainedModel], None], kind: Granularity, expected: set[str]
) -> None:
    model = make("llama")
    spoil(model)
    found = failures(prove(model, FAMILIES["llama"], kind))
    assert expected <= found
    # Of what the spoilt part does not touch nothing is said.
    assert NORMS not in found


def test_nothing_is_proven_where_a_skip_does_no_harm() -> None:
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.mlp.down_proj.bias.zero_()
    found = {check.name: check for check in prove(model, family_of(model), "mlp")}
    for name in (DETACH, SKIP, ALL, DECODING):
        assert not found[name].passed
    assert "does not change the logits" in found[DETACH].detail
    assert "a skip changes nothing" in found[SKIP].detail
    assert "adds nothing" in found[ALL].detail


def test_nothing_is_proven_where_all_sequences_decide_alike() -> None:
    """A constant input to the routers: the norms give their bias whatever they are given."""
    model = make("gpt2")
    for layer in model.transformer.h:
        layer.ln_1.weight.zero_()
    found = {check.name: check for check in prove(model, family_of(model), "attention")}
    for name in (DECODING, BATCH):
        assert not found[name].passed
        assert "no mixed decisions" in found[name].detail


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (Family("phi"), "attention", "a row of 'phi' cannot be proven on a 'llama'"),
        (replace(Family("llama"), granularities=frozenset({"mlp"})), "block", "not offer block"),
    ],
)
def test_what_cannot_be_asked(row: Family, kind: Granularity, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        prove(make("llama"), row, kind)


def test_training_and_half_precision_are_refused() -> None:
    for model in (make("llama").train(), make("llama").half()):
        with pytest.raises(ModelError, match="in float32 on the CPU"):
            prove(model, FAMILIES["llama"], "attention")
