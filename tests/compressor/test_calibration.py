"""Finding tau: exact where scores allow it, honest where they do not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mskip.compressor.calibration import (
    Found,
    Paths,
    PromptScorer,
    UnreachableError,
    capacity_interval,
    find_tau,
    find_tau_per_layer,
)
from mskip.compressor.encoding import Sample
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.router import Routers
from mskip.compressor.skipping import MindSkip


class Fixed:
    """Scores that depend on nothing.

    Args:
        scores: [prompts, routed].
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores.float()
        self.asked: list[list[int]] = []

    def paths(self) -> Paths:
        return Paths(self, *self.scores.shape)

    def __call__(self, tau: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        assert tau.dtype == torch.float32
        self.asked.append(list(numbers))
        scores = self.scores[numbers]
        return scores >= tau, scores


class Dragging(Fixed):
    """Scores that every skip before them moves.

    Args:
        scores: [prompts, routed], with everything executed.
        effect: [routed, routed]; row i is added to the later scores where i is skipped.
    """

    def __init__(self, scores: Tensor, effect: Tensor) -> None:
        super().__init__(scores)
        self.effect = effect

    def __call__(self, tau: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        self.asked.append(list(numbers))
        scores = self.scores[numbers].clone()
        for index in range(scores.shape[1]):
            skipped = scores[:, index] < tau[index]
            moved = scores[:, index + 1 :] + skipped[:, None] * self.effect[index, index + 1 :]
            scores[:, index + 1 :] = moved.clamp(0, 1)
        return scores >= tau, scores


def random_scores(prompts: int, routed: int, seed: int = 0) -> Tensor:
    return torch.rand(prompts, routed, generator=torch.Generator().manual_seed(seed))


def executed(scorer: Fixed, found: Found) -> int:
    """How many calls a fresh pass executes at the tau found."""
    prompts, routed = scorer.scores.shape
    decisions, _ = scorer(torch.full((routed,), found.tau), list(range(prompts)))
    return int(decisions.sum())


# -- one tau ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    bits=st.lists(st.integers(1, 2**23 - 1), min_size=1, max_size=48, unique=True),
    routed=st.integers(1, 4),
    target=st.floats(0, 1),
    spread=st.sampled_from([1.0, 1e-3]),
)
def test_distinct_scores_meet_every_target(
    bits: list[int], routed: int, target: float, spread: float
) -> None:
    """Within half a call, however close together the scores are."""
    routed = min(routed, len(bits))
    prompts = len(bits) // routed
    scores = torch.tensor(bits[: prompts * routed], dtype=torch.float64) / 2**23
    scores = 0.5 + (scores - 0.5) * spread
    if len(scores.float().unique()) < len(scores):
        return
    scorer = Fixed(scores.view(prompts, routed))
    found = find_tau(scorer.paths(), target, 200)
    assert abs(found.capacity - target) <= (0.5 + 1e-6) / (prompts * routed)
    assert executed(scorer, found) == round(found.capacity * prompts * routed)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.9])
def test_tau_is_in_the_middle_of_the_gap(target: float) -> None:
    scorer = Fixed(random_scores(50, 8))
    found = find_tau(scorer.paths(), target, 40)
    ordered = scorer.scores.flatten().sort(descending=True).values
    kept = round(target * 400)
    assert found.capacity == kept / 400
    assert found.tau == pytest.approx(float(ordered[kept - 1] + ordered[kept]) / 2, abs=1e-7)


def test_a_trial_that_hits_is_moved_to_the_middle() -> None:
    """The first trial, 0.5, executes one of two; it stands close to the lower score."""
    scorer = Fixed(torch.tensor([[0.9, 0.45]]))
    found = find_tau(scorer.paths(), 0.5, 40)
    assert found.tau == pytest.approx(0.675)
    assert found.evaluations == 1


def test_neighbouring_floats_are_told_apart() -> None:
    """A middle that is rounded down to the lower score would execute it."""
    low = 0.5
    scores = [low + step * 2.0**-24 * 2 for step in range(4)]
    scorer = Fixed(torch.tensor([scores]))
    for target in (0.25, 0.5, 0.75):
        found = find_tau(scorer.paths(), target, 40)
        assert found.capacity == target
        assert executed(scorer, found) == target * 4


@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_everything_and_nothing(target: float, saturated: bool) -> None:
    """Also where sigmoids have run out at exactly 0 and 1."""
    scores = random_scores(20, 4)
    if saturated:
        scores[:3, 0], scores[:3, 1] = 0.0, 1.0
    scorer = Fixed(scores)
    found = find_tau(scorer.paths(), target, 40)
    assert found.capacity == target
    assert executed(scorer, found) == target * 80


def test_ties_name_the_nearest_reachable() -> None:
    """Eight calls of sixteen at 0.6: between 4 and 12 executed there is nothing."""
    scores = torch.tensor([0.9] * 2 + [0.8] * 2 + [0.6] * 8 + [0.3, 0.2, 0.1, 0.05])
    scorer = Fixed(scores.view(4, 4))
    with pytest.raises(UnreachableError) as caught:
        find_tau(scorer.paths(), 0.5, 40)
    assert "capacity 0.500" in caught.value.message
    assert "0.250, 0.750 (skip rate 0.750, 0.250)" in caught.value.message
    assert caught.value.remedy
    assert find_tau(scorer.paths(), 0.25, 40).capacity == 0.25
    assert find_tau(scorer.paths(), 0.75, 40).capacity == 0.75
    assert find_tau(scorer.paths(), 0.27, 40).capacity == 0.25


@pytest.mark.parametrize("value", [0.5, 0.3, 0.0, 1.0])
def test_constant_scores(value: float) -> None:
    scorer = Fixed(torch.full((6, 3), value))
    with pytest.raises(UnreachableError, match=r"0\.000, 1\.000"):
        find_tau(scorer.paths(), 0.5, 40)
    for target in (0.0, 1.0):
        found = find_tau(scorer.paths(), target, 40)
        assert executed(scorer, found) == target * 18


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("target", [0.25, 0.5, 0.8])
def test_scores_that_depend_on_earlier_gates(seed: int, target: float) -> None:
    """Capacity is not monotone in tau there; the result still holds in a fresh pass."""
    generator = torch.Generator().manual_seed(seed)
    effect = 0.3 * torch.randn(6, 6, generator=generator)
    scorer = Dragging(random_scores(40, 6, seed), effect)
    found = find_tau(scorer.paths(), target, 40)
    assert executed(scorer, found) == round(found.capacity * 240)
    # A decision can drag the other five of its prompt along, no more.
    assert abs(found.capacity - target) <= 3.5 / 240
    dense = scorer.scores.flatten().quantile(1 - target)
    naive, _ = scorer(dense.expand(6), list(range(40)))
    assert abs(found.capacity - target) <= abs(float(naive.float().mean()) - target)


def test_a_leap_over_the_target_is_no_tie() -> None:
    """Skipping the first drags the second along: one executed call of two is out of reach."""
    effect = torch.tensor([[0.0, -0.5], [0.0, 0.0]])
    scorer = Dragging(torch.tensor([[0.5, 0.7]]), effect)
    found = find_tau(scorer.paths(), 0.5, 40)
    assert found.capacity in (0.0, 1.0)
    assert executed(scorer, found) == found.capacity * 2


def test_capacity_is_not_monotone_in_the_example() -> None:
    """The example above is one: a higher tau can execute more."""
    generator = torch.Generator().manual_seed(2)
    effect = 0.3 * torch.randn(6, 6, generator=generator)
    scorer = Dragging(random_scores(40, 6, 2), effect)
    shares = [
        int(scorer(torch.full((6,), tau / 400), list(range(40)))[0].sum()) for tau in range(401)
    ]
    assert any(after > before for before, after in itertools.pairwise(shares))


def test_only_changed_paths_are_run() -> None:
    """A trial of tau runs a prompt only where it leaves the interval of its path."""
    scorer = Fixed(random_scores(30, 4))
    paths = scorer.paths()
    paths.at(0.5)
    assert scorer.asked == [list(range(30))]
    paths.at(0.5)
    low, high = paths.interval(0.5)
    assert low < 0.5 <= high
    paths.at(high)
    paths.at((low + high) / 2)
    assert len(scorer.asked) == paths.evaluations == 1
    above = float(torch.tensor(high).nextafter(torch.tensor(1.0)))
    decisions, scores = paths.at(above)
    crossed = ((scorer.scores >= 0.5) & (scorer.scores < above)).any(1)
    assert scorer.asked[1:] == [crossed.nonzero().flatten().tolist()]
    assert len(scorer.asked[1]) == 1
    assert torch.equal(decisions, scorer.scores >= above)
    assert torch.equal(scores, scorer.scores)


def test_the_search_is_short_and_shown() -> None:
    scorer = Fixed(random_scores(48, 16))
    shown: list[tuple[str, int, int, str]] = []
    found = find_tau(
        scorer.paths(), 0.37, 40, lambda stage, done, total, note="": shown.append(
            (stage, done, total, note)
        )
    )  # fmt: skip
    assert found.evaluations <= 6
    assert sum(map(len, scorer.asked)) < 4 * 48
    assert shown[-1][:3] == ("calibrate", found.evaluations, 40)
    assert shown[-1][3] == f"capacity {found.capacity:.3f}"


# -- one tau a layer --------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("saturated", [False, True])
def test_every_layer_has_its_share(target: float, saturated: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = 0.3 + 0.5 * random_scores(40, 6)
    scores[:, 3] = 0.9 + scores[:, 3] * 0.01  # would execute always at a global tau
    if saturated:
        scores[0], scores[1] = 0.0, 1.0
    scorer = Dragging(scores, -0.05 * torch.rand(6, 6, generator=generator) * (not saturated))
    tau = find_tau_per_layer(scorer, 40, 6, target)
    assert tau.dtype == torch.float32
    decisions, _ = scorer(tau, list(range(40)))
    assert decisions.sum(0).tolist() == [target * 40] * 6


def test_per_layer_tells_neighbouring_floats_apart() -> None:
    scores = torch.tensor([[0.5 + 2.0**-24 * 2 * step] for step in range(4)])
    for target in (0.25, 0.5, 0.75):
        tau = find_tau_per_layer(Fixed(scores), 4, 1, target)
        assert int((scores >= tau).sum()) == target * 4


# -- the real gated forward pass --------------------------------------------------------------


@pytest.fixture
def routers(base: BaseModel, tiny_routers: Callable[..., Routers]) -> Routers:
    return tiny_routers(base.model, (1, 2, 3, 4))


def decided_alone(base: BaseModel, routers: Routers, samples: list[Sample], tau: float) -> float:
    """Capacity over ordinary calls of the attached model, one prompt each."""
    taken = []
    with MindSkip(base.model, routers, tau), torch.no_grad():
        for sample in samples:
            prompt = torch.tensor([sample.input_ids[: sample.prompt_length]])
            taken.append(base.model(prompt).past_key_values.decisions)
    return float(torch.cat(taken).float().mean())


@pytest.mark.parametrize("target", [0.3, 0.5, 0.62])
def test_capacity_is_that_of_the_attached_model(
    base: BaseModel,
    routers: Routers,
    make_samples: Callable[..., list[Sample]],
    target: float,
) -> None:
    samples = make_samples(24, prompt=(2, 12))
    with patched(base.model, routers.layers):
        scorer = PromptScorer(base, routers, samples, batch_size=5)
        assert len(scorer) == 24
        found = find_tau(Paths(scorer, 24, 4), target, 40)
    assert abs(found.capacity - target) <= 2 / 96
    assert decided_alone(base, routers, samples, found.tau) == pytest.approx(found.capacity)


def test_scorer_runs_the_prompts_asked_for(
    base: BaseModel, routers: Routers, make_samples: Callable[..., list[Sample]]
) -> None:
    samples = make_samples(13, prompt=(2, 12))
    with patched(base.model, routers.layers):
        scorer = PromptScorer(base, routers, samples, batch_size=4)
        tau = torch.tensor([0.5, 0.4, 0.6, 0.5])
        decisions, scores = scorer(tau, list(range(13)))
        some = [1, 2, 7, 12]
        part, part_scores = scorer(tau, some)
        # The answers are no part of what is scored.
        bare = [Sample(s.input_ids[: s.prompt_length], s.prompt_length) for s in samples]
        _, unanswered = PromptScorer(base, routers, bare)(tau, list(range(13)))
    assert torch.equal(decisions, scores >= tau)
    assert torch.equal(part, decisions[some])
    torch.testing.assert_close(part_scores, scores[some], rtol=0, atol=1e-5)
    torch.testing.assert_close(unanswered, scores, rtol=0, atol=1e-5)
    assert 0 < decisions.float().mean() < 1


def test_early_skips_move_later_scores(
    base: BaseModel, routers: Routers, make_samples: Callable[..., list[Sample]]
) -> None:
    with patched(base.model, routers.layers):
        scorer = PromptScorer(base, routers, make_samples(6))
        _, dense = scorer(torch.zeros(4), list(range(6)))
        _, without_first = scorer(torch.tensor([2.0, 0.0, 0.0, 0.0]), list(range(6)))
    assert torch.equal(dense[:, 0], without_first[:, 0])
    assert (dense[:, 1:] - without_first[:, 1:]).abs().max() > 1e-3


# -- the interval -----------------------------------------------------------------------------


def test_interval_covers_the_mean() -> None:
    """In 19 of 20 draws of prompts whose decisions hang together, by definition."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for draw in range(100):
        share = torch.rand(48, 1, generator=generator)  # prompts differ, their layers agree
        decisions = torch.rand(48, 16, generator=generator) < share
        low, high = capacity_interval(decisions, resamples=500, seed=draw)
        assert low <= float(decisions.float().mean()) <= high
        covered += low <= 0.5 <= high
    assert 88 <= covered <= 100


def test_interval_draws_whole_prompts() -> None:
    """Sixteen equal decisions of a prompt say no more than one."""
    decisions = torch.tensor([True] * 24 + [False] * 24)[:, None].expand(48, 16)
    low, high = capacity_interval(decisions)
    spread = 1.96 * math.sqrt(0.25 / 48)
    assert [low, high] == pytest.approx([0.5 - spread, 0.5 + spread], abs=0.03)
    assert capacity_interval(decisions) == [low, high]
    assert capacity_interval(torch.ones(8, 4, dtype=torch.bool)) == [1.0, 1.0]
