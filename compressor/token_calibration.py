"""Per-token routing measured: scores and decisions, tau for a capacity, quality.

A capacity counts one token at one routed sublayer as one call; tau is found on prompt tokens.
docs/per-token.md has the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mskip.compressor.calibration import Paths, find_tau
from mskip.compressor.encoding import Batch, Sample
from mskip.compressor.evaluation import PerSample, Quality, Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE
from mskip.compressor.samples import batches_of
from mskip.compressor.segments import SplitModel, Stem
from mskip.compressor.skipping import as_tau
from mskip.compressor.tokenwise import TokenPass, fresh_token_decisions, require_masks


@dataclass(frozen=True)
class TokenRouting:
    """How the tokens of one sample were routed.

    Attributes:
        decisions: [tokens, routed] bool, true where executed.
        scores: [tokens, routed] float32.
        prompt_length: the first so many tokens are the prompt's.
    """

    decisions: Tensor
    scores: Tensor
    prompt_length: int

    @property
    def prompt(self) -> Tensor:
        """Decisions of the prompt's tokens."""
        return self.decisions[: self.prompt_length]

    @property
    def prompt_scores(self) -> Tensor:
        """Scores of the prompt's tokens."""
        return self.scores[: self.prompt_length]

    @property
    def answer(self) -> Tensor:
        """Decisions of the answer's tokens; none where there is no answer."""
        return self.decisions[self.prompt_length :]


def executed_share(parts: list[Tensor]) -> float:
    """Executed share of the calls in all ``parts`` ([tokens, routed] bool); NaN where none."""
    calls = sum(part.numel() for part in parts)
    return sum(int(part.sum()) for part in parts) / calls if calls else float("nan")


def share_interval(parts: list[Tensor], *, resamples: int = 2000, seed: int = 0) -> list[float]:
    """95 % interval of the executed share, by the bootstrap over prompts.

    Tokens of one prompt hang together, so whole prompts are drawn, each with its length.

    Args:
        parts: decisions of each prompt, [tokens, routed] bool; those without tokens are left out.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    parts = [part for part in parts if part.numel()]
    if not parts:
        return [float("nan")] * 2
    executed = torch.tensor([int(part.sum()) for part in parts], dtype=torch.float64)
    calls = torch.tensor([part.numel() for part in parts], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(parts), (resamples, len(parts)), generator=generator)
    shares = executed[draws].sum(1) / calls[draws].sum(1)
    return [float(q) for q in torch.quantile(shares, torch.tensor([0.025, 0.975]).double())]


class TokenScorer:
    """Routes samples in the gated forward pass; the model must be patched.

    Args:
        base: the base model.
        routers: its routers.
        samples: whole samples; what lies below the first routed layer is kept.
        batch_size: samples per forward pass.
    """

    def __init__(
        self, base: BaseModel, routers: Routers, samples: list[Sample], batch_size: int = 16
    ) -> None:
        require_masks(base.model)
        self.routers = routers
        self.samples = samples
        self.split = SplitModel(base.model, routers.layers[0])
        # As `batches_of` has them.
        self._order = sorted(range(len(samples)), key=lambda n: len(samples[n].input_ids))
        self._stems: list[tuple[Tensor, Stem]] = []
        with torch.no_grad():
            for batch in batches_of(samples, base, batch_size):
                inputs = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
                self._stems.append((batch["attention_mask"].bool(), self.split.stem(*inputs)))

    @torch.no_grad()
    def __call__(self, tau: Tensor, numbers: list[int] | None = None) -> list[TokenRouting]:
        """Route some samples.

        Args:
            tau: [routed], float32.
            numbers: which samples; None routes all.

        Returns:
            One routing a sample, in the order of ``numbers``.
        """
        wanted = set(range(len(self.samples)) if numbers is None else numbers)
        found: dict[int, TokenRouting] = {}
        start = 0
        for real, stem in self._stems:
            batch = self._order[start : start + len(real)]
            start += len(real)
            rows = [row for row, number in enumerate(batch) if number in wanted]
            if not rows:
                continue
            part = stem if len(rows) == len(batch) else stem.rows(rows)
            routing = TokenPass(
                self.routers,
                tau.to(real.device),
                real[rows],
                *fresh_token_decisions(real[rows], len(self.routers.layers)),
            )
            self.split.finish(part, routing)
            for n, row in enumerate(rows):
                found[batch[row]] = TokenRouting(
                    (routing.decisions[n, real[row]] == EXECUTE).cpu(),
                    routing.scores[n, real[row]].cpu(),
                    self.samples[batch[row]].prompt_length,
                )
        return [
            found[number] for number in (range(len(self.samples)) if numbers is None else numbers)
        ]


def token_scores(
    base: BaseModel,
    routers: Routers,
    tau: float | Tensor | list[float],
    samples: list[Sample],
    batch_size: int = 16,
) -> list[TokenRouting]:
    """Scores and decisions of every token, prompt and answer, in the gated pass at ``tau``.

    Args:
        base: the base model, not patched.
        routers: its routers.
        tau: one threshold, or one per routed sublayer.
        samples: with or without answers.
        batch_size: samples per forward pass.
    """
    with patched(base.model, routers.sublayers):
        scorer = TokenScorer(base, routers, samples, batch_size)
        return scorer(as_tau(tau, len(routers.layers)))


@dataclass(frozen=True)
class TokenTau:
    """A threshold for per-token routing.

    Attributes:
        tau: the threshold, in the middle of the gap between the nearest scores.
        capacity: executed share of the prompt tokens' calls.
        interval: 95 % interval of it over prompts.
        answer_capacity: executed share of the answer tokens' calls; NaN without answers.
        answer_interval: 95 % interval of it over prompts.
        evaluations: trials of tau that ran prompts.
        routings: of every sample at this tau.
    """

    tau: float
    capacity: float
    interval: list[float]
    answer_capacity: float
    answer_interval: list[float]
    evaluations: int
    routings: list[TokenRouting]


def find_token_tau(
    base: BaseModel,
    routers: Routers,
    target: float,
    samples: list[Sample],
    max_evaluations: int = 40,
    batch_size: int = 16,
    progress: Progress = silent,
) -> TokenTau:
    """Find the global tau whose capacity over prompt tokens is nearest to ``target``.

    Searched in the gated pass, as scores of later layers change with tau; see `find_tau`,
    whose unit, the call, is here one token at one routed sublayer. Prompts of one template
    begin with the same tokens, whose scores tie; the nearer side of those is returned.

    Args:
        base: the base model, not patched.
        routers: its routers.
        target: wanted capacity, 0..1.
        samples: tau is found on their prompts; answers are routed once at the end.
        max_evaluations: most trials that run prompts.
        batch_size: samples per forward pass.
        progress: one unit a trial.

    Raises:
        UnreachableError: more scores tie around the target than there are prompts.
    """
    routed = len(routers.layers)
    with patched(base.model, routers.sublayers):
        paths = token_paths(base, routers, samples, batch_size)
        found = find_tau(paths, target, max_evaluations, progress, ties=len(samples))
        routings = TokenScorer(base, routers, samples, batch_size)(as_tau(found.tau, routed))
    asked, answered = [each.prompt for each in routings], [each.answer for each in routings]
    return TokenTau(
        found.tau,
        executed_share(asked),
        share_interval(asked),
        executed_share(answered),
        share_interval(answered),
        found.evaluations,
        routings,
    )


def token_paths(
    base: BaseModel, routers: Routers, samples: list[Sample], batch_size: int = 16
) -> Paths:
    """All tokens of all prompts as the calls of one path; the model must be patched.

    Within it every prompt has a path of its own, so that a trial of tau runs only the
    prompts that it changes. Those are padded to one length with calls that never execute.

    Args:
        base: the base model.
        routers: its routers.
        samples: only their prompts are used.
        batch_size: prompts per forward pass.

    Returns:
        Paths of one prompt, whose decisions are [1, tokens * routed], token by token.
    """
    bare = [Sample(s.input_ids[: s.prompt_length], s.prompt_length) for s in samples]
    scorer = TokenScorer(base, routers, bare, batch_size)
    lengths = [len(sample.input_ids) for sample in scorer.samples]
    routed = len(scorer.routers.layers)
    width = max(lengths) * routed
    real = torch.arange(width) < torch.tensor(lengths)[:, None] * routed

    def prompts(tau: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        decisions = torch.zeros(len(numbers), width, dtype=torch.bool)
        scores = torch.full((len(numbers), width), -1.0)
        for row, routing in enumerate(scorer(tau[:routed], numbers)):
            decisions[row, : routing.decisions.numel()] = routing.decisions.flatten()
            scores[row, : routing.scores.numel()] = routing.scores.flatten()
        return decisions, scores

    by_prompt = Paths(prompts, len(lengths), width)

    def together(tau: Tensor, _: list[int]) -> tuple[Tensor, Tensor]:
        decisions, scores = by_prompt.at(float(tau[0]))
        return decisions[real][None], scores[real][None]

    return Paths(together, 1, sum(lengths) * routed)


@dataclass(frozen=True)
class TokenQuality:
    """Quality on the answers, and what it was reached with.

    Attributes:
        per_sample: sums over the answer tokens of every sample, those of like length together.
        capacity: executed share of the prompt tokens' calls.
        answer_capacity: executed share of the answer tokens' calls.
    """

    per_sample: PerSample
    capacity: float
    answer_capacity: float

    @property
    def quality(self) -> Quality:
        """KL to the dense model and perplexity, over all answer tokens."""
        return self.per_sample.quality()


class TokenPasses:
    """A pass maker for `Reference`: routes every token of prompt and answer, and counts.

    Args:
        routers: the routers.
        tau: [routed].
    """

    def __init__(self, routers: Routers, tau: Tensor) -> None:
        self.routers = routers
        self.tau = tau
        self._taken: list[tuple[Batch, TokenPass]] = []

    def __call__(self, batch: Batch) -> TokenPass:
        """The pass of a batch."""
        real = batch["attention_mask"].bool()
        fresh = fresh_token_decisions(real, len(self.routers.layers))
        self._taken.append((batch, TokenPass(self.routers, self.tau.to(real.device), real, *fresh)))
        return self._taken[-1][1]

    @property
    def capacity(self) -> float:
        """Executed share of the prompt tokens' calls in all batches so far."""
        return executed_share(
            [each.decisions[batch["prompt_mask"]] == EXECUTE for batch, each in self._taken]
        )

    @property
    def answer_capacity(self) -> float:
        """Executed share of the answer tokens' calls in all batches so far."""
        return executed_share(
            [
                each.decisions[each.real & ~batch["prompt_mask"]] == EXECUTE
                for batch, each in self._taken
            ]
        )


def token_quality(
    base: BaseModel,
    routers: Routers,
    tau: float | Tensor | list[float],
    samples: list[Sample],
    batch_size: int = 8,
    progress: Progress = silent,
) -> TokenQuality:
    """KL to the dense model and perplexity on the answers, every token routed at ``tau``.

    Args:
        base: the base model, not patched.
        routers: its routers.
        tau: one threshold, or one per routed sublayer.
        samples: with answers.
        batch_size: samples per forward pass.
        progress: shows the dense forward passes.
    """
    require_masks(base.model)
    passes = TokenPasses(routers, as_tau(tau, len(routers.layers)))
    with patched(base.model, routers.sublayers):
        reference = Reference(base, routers.layers[0], samples, batch_size, progress)
        per_sample = reference.per_sample(passes)
    return TokenQuality(per_sample, passes.capacity, passes.answer_capacity)
