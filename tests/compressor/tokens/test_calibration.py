"""Calibration and quality by the token, against the oracle."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import MakeRouters
from token_oracle import Oracle, plain, routers_for

from mskip.compressor.calibration import UnreachableError
from mskip.compressor.encoding import Sample
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.router import Routers
from mskip.compressor.sublayers import Granularity
from mskip.compressor.token_calibration import (
    TokenScorer,
    executed_share,
    find_token_tau,
    share_interval,
    token_quality,
    token_scores,
)

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
