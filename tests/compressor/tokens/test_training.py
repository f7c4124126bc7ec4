"""The relaxed pass that tuning differentiates."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import CLOSE, LAYERS, LENGTHS, MakeModel, MakeRouters, Prompts, inputs
from token_oracle import close, plain, routers_for
from transformers import LlamaForCausalLM

from mskip.compressor.patching import passing, patched
from mskip.compressor.sublayers import Granularity
from mskip.compressor.token_skipping import TokenSkip
from mskip.compressor.tokenwise import TokenRelaxedPass, token_noise


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
@torch.enable_grad()
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
